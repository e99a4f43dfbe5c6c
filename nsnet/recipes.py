"""Defines complete configurations by name (`tiny`, `vit-l-14`, a model of open_clip or timm), and their variants."""

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any, Final

from nsnet import imports
from nsnet.clip_weights import activation_fits, known_models, timm_settings
from nsnet.configuration import (
    TIMM,
    BasisRule,
    CaptionerConfig,
    ClipConfig,
    DetectorConfig,
    HeadConfig,
    LoraSettings,
    MapperConfig,
    ProjectionConfig,
    TrainingConfig,
)
from nsnet.errors import ConfigError
from nsnet.patches import PatchConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configurations of a detector and of its training."""

    name: str
    detector: DetectorConfig
    training: TrainingConfig
    basis: BasisRule | None = None
    """Rule for the rank of a global projection, applied to the captions' spectrum."""


VIT_L_14: Final = Recipe(name="vit-l-14", detector=DetectorConfig(), training=TrainingConfig())
"""The paper's configuration: OpenAI's CLIP ViT-L/14, BLIP base, LoRA rank 6."""

DGS_NET: Final = Recipe(
    name="dgs-net",
    detector=DetectorConfig(
        patches=PatchConfig(spectrum="power", grey="luma", fill="black"),
        lora=LoraSettings(dropout=0.8),
        normalisation="imagenet",
    ),
    # With weight_decay 0, AdamW is Adam. There, three epochs fit a linear teacher on the frozen tower, which has no
    # counterpart here, and one fits the adapters. At a constant rate, four epochs include a training of one, and
    # validation chooses among them.
    training=TrainingConfig(
        epochs=4, batch_size=32, head_lr=1e-4, backbone_lr=1e-4, weight_decay=0.0, warmup=0.0, schedule="constant"
    ),
)
"""The paper's model with input, adapters and schedule of the authors' later code, DGS-Net (arXiv 2511.13108)."""

TINY: Final = Recipe(
    name="tiny",
    detector=DetectorConfig(
        clip=ClipConfig(
            model="tiny",
            pretrained=None,
            architecture={
                "embed_dim": 128,
                "vision_cfg": {"image_size": 224, "layers": 2, "width": 128, "head_width": 32, "patch_size": 32},
                "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
            },
        ),
        captioner=CaptionerConfig(model=None, max_new_tokens=8),
        mapper=MapperConfig(hidden_dim=256),
        head=HeadConfig(hidden_dim=128, feature_dim=64),
        train_backbone=True,
    ),
    # Chosen on five seeds: with random initial weights, training with the contrastive loss is unstable. At 1e-3 for the
    # tower, or with a short warm-up, some seeds drop to chance level after a perfect epoch (docs/log.md).
    training=TrainingConfig(epochs=10, batch_size=32, head_lr=1e-3, backbone_lr=3e-4, weight_decay=0.05, warmup=0.2),
)
"""The embedded default: CPU, seeded random weights, everything trainable. Its captions have no meaning."""

_NAMED: Final = {recipe.name: recipe for recipe in (TINY, VIT_L_14, DGS_NET)}


def get(name: str) -> Recipe:
    """Return a recipe by name; reads no weights. Raises `ConfigError` for an unknown name.

    `MODEL` or `MODEL:TAG` of open_clip gives that model with the paper's settings. Without a tag, the first tag in
    open_clip's list with the model's activation is used. `timm/NAME` gives an image tower of timm, which has no text
    tower; `timm/NAME+MODEL:TAG` adds the text tower of an open_clip model, or of a named recipe. The mosaic has the
    model's input size.
    """
    if name in _NAMED:
        return _NAMED[name]
    if name.startswith(TIMM):
        return _without_text(name)
    clip, config = _open_clip(name)
    vision = config["vision_cfg"]
    side = vision.get("image_size", 224)
    convolutional = isinstance(vision.get("layers"), list) or str(vision.get("timm_model_name")).startswith("convnext")
    return _of_tower(
        name,
        clip,
        side=int(side[0] if isinstance(side, list | tuple) else side),
        embed_dim=int(config["embed_dim"]),
        has_attention=not convolutional,
    )


def _open_clip(name: str) -> tuple[ClipConfig, dict[str, Any]]:
    """The settings of `MODEL` or `MODEL:TAG`, and open_clip's configuration of the model."""
    open_clip = imports.open_clip()
    model, _, tag = name.partition(":")
    config = open_clip.get_model_config(model) if model in known_models() else None
    if config is None:
        similar = difflib.get_close_matches(model, [*_NAMED, *known_models()], n=3)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise ConfigError(
            f"unknown recipe {name!r}: choose {', '.join(_NAMED)} or an open_clip model name, or timm/NAME for a tower "
            f"without text{hint}"
        )
    all_tags = open_clip.list_pretrained_tags_by_model(model)
    # if no tag fits, `find_weights` raises an error; -quickgelu names are separate models
    tags = [known_tag for known_tag in all_tags if activation_fits(model, known_tag)] or all_tags
    return ClipConfig(model=model, pretrained=tag or (tags[0] if tags else None)), config


def _without_text(name: str) -> Recipe:
    """The recipe of `timm/NAME`, which has no projection, or of `timm/NAME+MODEL:TAG`."""
    from nsnet import timm_towers  # imports torch, which takes seconds

    image, plus, text = name.partition("+")
    tower, _, tag = image.removeprefix(TIMM).partition(".")
    known = imports.timm().list_models()
    if tower not in known:
        similar = difflib.get_close_matches(tower, known, n=3)
        hint = f"; did you mean {' or '.join(TIMM + model for model in similar)}?" if similar else ""
        raise ConfigError(f"unknown recipe {name!r}: timm has no model {tower!r}{hint}")
    clip = ClipConfig(model=f"{TIMM}{tower}", pretrained=None)
    clip = replace(clip, pretrained=tag or timm_settings(clip).tag or None)
    facts = timm_towers.facts(clip)
    recipe = _of_tower(
        name, clip, side=facts.image_px, embed_dim=facts.embed_dim, has_attention=facts.has_attention,
        projection=ProjectionConfig(kind="none"),
    )  # fmt: skip
    if not plus:
        return recipe
    encoder = _NAMED[text].detector.clip if text in _NAMED else _open_clip(text)[0]
    detector = replace(recipe.detector, text=encoder)
    return replace(recipe, detector=replace(detector, projection=VIT_L_14.detector.projection))


def _of_tower(
    name: str,
    clip: ClipConfig,
    *,
    side: int,
    embed_dim: int,
    has_attention: bool,
    projection: ProjectionConfig = VIT_L_14.detector.projection,
) -> Recipe:
    """The paper's settings for another tower. One without attention has no place for adapters and stays frozen."""
    paper = VIT_L_14.detector
    return Recipe(
        name=name,
        detector=DetectorConfig(
            clip=clip,
            patches=PatchConfig(patch_px=_patch_px(side), mosaic_px=side),
            lora=paper.lora if has_attention else replace(paper.lora, rank=0),
            projection=projection,
            head=HeadConfig(hidden_dim=embed_dim),
        ),
        training=VIT_L_14.training,
    )


VARIANTS: Final = {
    "advanced": "removes the mapped caption of each image; mapper and alignment loss (the unchanged recipe)",
    "original": "removes a global basis of raw captions (NS-Net); original:RULE, such as original:rank=64",
    "linear": "a linear probe on the frozen image tower, the middle of the image (UniversalFakeDetect); linear:resize: "
    "the whole image, squashed, with ImageNet's normalisation (AIGIBench's UniversalFakeDetect)",
    "rank-k": "removes the mapped caption and its nearest in a bank; rank-k:K, default 4",
    "no-projection": "removes nothing",
    "no-mapper": "removes the unmapped caption feature of each image",
    "no-alignment": "advanced without the alignment loss",
    "mapper-detached": "advanced; the mapper learns from the alignment only, not from the detection losses",
    "raw-after-mapped": "removes the mapped caption of each image, and then its unmapped feature",
    "decorrelated": "advanced with a penalty on what ũ says of the caption; decorrelated:WEIGHT, default 1",
    "constant-caption": "advanced with the same caption for every image (a control: not for use)",
    "shuffled-captions": "advanced with the caption of another image (a control: not for use)",
}
"""Name -> description."""

_WITHOUT_CAPTIONS: Final = ("linear", "no-projection")
"""Variants that need no text tower."""
_RAW_CAPTIONS: Final = ("original", "no-mapper", "raw-after-mapped")
"""Variants that remove captions as they are, and so need a text tower in the space of the images."""

DEFAULT_RULE: Final = BasisRule(energy=0.9)
"""Rule of `original`: the paper's tau = 1e-6 leaves no null space if there are as many captions as dimensions."""
BANK: Final = 4096
"""Maximum number of captions in the bank of `rank-k`."""


def allowed_variants(detector: DetectorConfig) -> tuple[str, ...]:
    """Names of `VARIANTS` that the towers of a recipe allow, from their names alone: nothing is loaded or built."""
    if detector.text_tower is None:
        return _WITHOUT_CAPTIONS
    return tuple(name for name in VARIANTS if detector.text is None or name not in _RAW_CAPTIONS)


def variant(recipe: Recipe, name: str) -> Recipe:
    """Return a variant of a recipe (`VARIANTS`), such as `original:rank=64`.

    Raises `ConfigError` if it is unknown, or if the towers of the recipe do not allow it.
    """
    kind, colon, setting = name.partition(":")
    if kind not in VARIANTS or (colon and kind not in ("original", "linear", "rank-k", "decorrelated")):
        raise ConfigError(
            f"unknown variant {name!r}: choose {', '.join(VARIANTS)}, original:RULE, linear:resize, rank-k:K or "
            "decorrelated:WEIGHT"
        )
    allowed = allowed_variants(recipe.detector)
    if kind not in allowed:
        remedy = "" if recipe.detector.text else f", or the recipe {recipe.name}+MODEL with the text tower of open_clip"
        reason = "is in another space than its text tower" if recipe.detector.text else "has no text tower"
        raise ConfigError(
            f"the variant {name} is not possible with {recipe.name}, whose image tower {reason}: choose "
            f"{', '.join(allowed)}{remedy}"
        )
    detector, training, basis = recipe.detector, recipe.training, None
    no_alignment = replace(detector.loss, alignment_weight=0.0)
    if kind == "original":
        basis = BasisRule.parse(setting) if colon else DEFAULT_RULE
        detector = replace(detector, projection=ProjectionConfig(kind="global"), loss=no_alignment)
    elif kind == "linear":
        if colon and setting != "resize":
            raise ConfigError(f"{setting!r} is no input of a linear probe: give linear (centre crop) or linear:resize")
        detector = replace(
            detector,
            projection=ProjectionConfig(kind="none"),
            patches=replace(detector.patches, selection="resize" if colon else "center"),
            normalisation="imagenet" if colon else detector.normalisation,
            lora=replace(detector.lora, rank=0),
            head=replace(detector.head, kind="linear"),
            loss=replace(no_alignment, contrastive_weight=0.0, bce_weight=1.0),
            train_backbone=False,
        )
    elif kind == "rank-k":
        detector = replace(
            detector, projection=ProjectionConfig(kind="rank_k", rank=_number(setting if colon else "4"))
        )
    elif kind == "no-projection":
        detector = replace(detector, projection=ProjectionConfig(kind="none"), loss=no_alignment)
    elif kind == "no-mapper":
        detector = replace(detector, mapper=replace(detector.mapper, hidden_dim=0), loss=no_alignment)
    elif kind == "no-alignment":
        detector = replace(detector, loss=no_alignment)
    elif kind == "mapper-detached":
        detector = replace(detector, mapper=replace(detector.mapper, detached=True))
    elif kind == "raw-after-mapped":
        detector = replace(detector, projection=ProjectionConfig(kind="mapped_and_raw"))
    elif kind == "decorrelated":
        weight = _weight(setting) if colon else 1.0
        detector = replace(detector, loss=replace(detector.loss, decorrelation_weight=weight))
    elif kind == "constant-caption":
        training = replace(training, captions="constant")
    elif kind == "shuffled-captions":
        training = replace(training, captions="shuffled")
    return replace(recipe, detector=detector, training=training, basis=basis)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is not a number of directions: give rank-k:4, for example")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight < math.inf:
        raise ConfigError(f"{text!r} is not a weight > 0: give decorrelated:1, for example")
    return weight


def _patch_px(side: int) -> int:
    """Return 32 px if it divides the input size, else the nearest size that does (336: 28, 378: 27)."""
    return min((n for n in range(8, side + 1) if side % n == 0), key=lambda n: (abs(n - 32), n))
