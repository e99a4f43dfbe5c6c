"""Named, complete configurations: `tiny`, `vit-l-14`, or any model that open_clip can build, by its name."""

import difflib
from dataclasses import dataclass
from typing import Final

from nsnet.captions import CaptionerConfig
from nsnet.clip import ClipConfig, activation_fits, known_models
from nsnet.detector import DetectorConfig
from nsnet.errors import ConfigError
from nsnet.head import HeadConfig
from nsnet.mapper import MapperConfig
from nsnet.patches import PatchConfig
from nsnet.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A detector and how it is trained."""

    name: str
    detector: DetectorConfig
    training: TrainingConfig


VIT_L_14: Final = Recipe(name="vit-l-14", detector=DetectorConfig(), training=TrainingConfig())
"""The paper's: OpenAI's CLIP ViT-L/14, BLIP base, LoRA rank 6."""

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
    # Found on five seeds: from random weights the contrastive loss is brittle. At 1e-3 for the tower, or with a short
    # warm-up, some seeds fall back to chance after a perfect epoch (docs/log.md).
    training=TrainingConfig(epochs=10, batch_size=32, head_lr=1e-3, backbone_lr=3e-4, weight_decay=0.05, warmup=0.2),
)
"""The embedded default: CPU, seeded random weights, everything trainable. Its captions mean nothing."""

_NAMED: Final = {recipe.name: recipe for recipe in (TINY, VIT_L_14)}


def get(name: str) -> Recipe:
    """A recipe by name, or for `MODEL` or `MODEL:TAG` of open_clip: that model with the paper's settings.

    The mosaic takes the model's input size; without a tag, the first that open_clip lists and whose
    activation is the model's is taken.
    Raises `ConfigError` for an unknown name.
    """
    if name in _NAMED:
        return _NAMED[name]
    import open_clip

    model, _, tag = name.partition(":")
    config = open_clip.get_model_config(model) if model in known_models() else None
    if config is None:
        close = difflib.get_close_matches(model, [*_NAMED, *known_models()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"unknown recipe {name!r}: choose {', '.join(_NAMED)} or an open_clip model name{hint}")
    listed = open_clip.list_pretrained_tags_by_model(model)
    # where none fits, `find_weights` says so; -quickgelu names are models of their own
    tags = [one for one in listed if activation_fits(model, one)] or listed
    side = config["vision_cfg"].get("image_size", 224)
    side = int(side[0] if isinstance(side, list | tuple) else side)
    return Recipe(
        name=name,
        detector=DetectorConfig(
            clip=ClipConfig(model=model, pretrained=tag or (tags[0] if tags else None)),
            patches=PatchConfig(patch_px=_patch_px(side), mosaic_px=side),
            head=HeadConfig(hidden_dim=int(config["embed_dim"])),
        ),
        training=VIT_L_14.training,
    )


def _patch_px(side: int) -> int:
    """32 px where the input is a multiple of it, else the nearest size that divides it (336: 28, 378: 27 or 42)."""
    return min((n for n in range(8, side + 1) if side % n == 0), key=lambda n: (abs(n - 32), n))
