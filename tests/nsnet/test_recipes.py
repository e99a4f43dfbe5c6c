"""Recipes: the tiny one, the paper's, and any model of open_clip by its name."""

import json
from dataclasses import asdict, replace
from typing import Any

import open_clip
import pytest

from nsnet import recipes
from nsnet.clip_weights import activation_fits
from nsnet.config import from_dict, to_dict
from nsnet.configuration import BasisRule, DetectorConfig
from nsnet.detector import Detector
from nsnet.errors import ConfigError
from tests.support import models


def test_paper_recipe_has_the_papers_settings() -> None:
    recipe = recipes.get("vit-l-14")
    detector = recipe.detector
    assert recipe.name == "vit-l-14"
    assert (detector.clip.model, detector.clip.pretrained) == ("ViT-L-14-quickgelu", "openai")
    assert detector.clip.architecture is None and not detector.train_backbone
    assert (detector.lora.rank, detector.lora.alpha) == (6, 6.0)
    assert (detector.patches.patch_px, detector.patches.mosaic_px, detector.patches.slots) == (32, 224, 49)
    assert detector.patches.spectrum == "magnitude"
    assert (detector.projection.kind, detector.projection.rank) == ("per_sample", 0)
    assert detector.mapper.hidden_dim == 1024
    assert (detector.head.hidden_dim, detector.head.feature_dim) == (768, 512)
    loss = detector.loss
    assert (loss.temperature, loss.bce_weight, loss.alignment_weight) == (0.07, 0.2, 0.3)
    assert detector.captioner.model == "Salesforce/blip-image-captioning-base"
    assert detector.captioner.max_new_tokens == 40
    assert (recipe.training.epochs, recipe.training.head_lr) == (2, 2e-4)


def test_recipe_of_the_authors_later_code_has_its_settings() -> None:
    recipe = recipes.get("dgs-net")
    changed = {name: value for name, value in settings(recipe).items() if settings(recipes.VIT_L_14).get(name) != value}
    assert recipe.name == "dgs-net" and recipe.basis is None
    assert changed == {
        "detector.patches.spectrum": "power", "detector.patches.grey": "luma", "detector.patches.fill": "black",
        "detector.lora.dropout": 0.8, "detector.normalisation": "imagenet", "training.epochs": 4,
        "training.batch_size": 32, "training.head_lr": 1e-4, "training.weight_decay": 0.0, "training.warmup": 0.0,
        "training.schedule": "constant",
    }  # fmt: skip
    assert (recipe.training.backbone_lr, recipe.detector.lora.rank, recipe.detector.lora.alpha) == (1e-4, 6, 6.0)


def test_tiny_recipe_needs_no_weights_and_trains_everything() -> None:
    recipe = recipes.get("tiny")
    detector = recipe.detector
    assert recipe.name == "tiny"
    assert detector.clip.pretrained is None and detector.captioner.model is None and detector.train_backbone
    assert detector.clip.architecture is not None
    assert detector.clip.architecture["vision_cfg"]["image_size"] == detector.patches.mosaic_px == 224


@pytest.mark.parametrize(
    ("name", "patch_px", "mosaic_px", "embed_dim"),
    [
        ("ViT-B-16", 32, 224, 512),
        ("ViT-B-16-SigLIP-256", 32, 256, 768),
        ("ViT-B-16-SigLIP-384", 32, 384, 768),
        ("ViT-L-14-336-quickgelu", 28, 336, 768),
        ("ViT-H-14-378-quickgelu", 27, 378, 1024),
        ("ViT-bigG-14", 32, 224, 1280),
    ],
)
def test_dimensions_are_read_from_the_model(name: str, patch_px: int, mosaic_px: int, embed_dim: int) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name and recipe.detector.clip.model == name
    patches = recipe.detector.patches
    assert (patches.patch_px, patches.mosaic_px) == (patch_px, mosaic_px)
    assert patches.slots == (mosaic_px // patch_px) ** 2
    assert recipe.detector.head.hidden_dim == embed_dim == open_clip.get_model_config(name)["embed_dim"]
    paper = recipes.VIT_L_14
    assert recipe.detector.lora == paper.detector.lora and recipe.detector.mapper == paper.detector.mapper
    assert recipe.training == paper.training and not recipe.detector.train_backbone


def test_every_model_that_open_clip_knows_makes_a_recipe() -> None:
    for name in open_clip.list_models():
        assert recipes.get(name).detector.patches.mosaic_px >= 64, name


def test_tag_is_taken_as_given() -> None:
    clip = recipes.get("ViT-B-16:laion2b_s34b_b88k").detector.clip
    assert (clip.model, clip.pretrained) == ("ViT-B-16", "laion2b_s34b_b88k")


@pytest.mark.parametrize(
    ("name", "tag"),
    [("ViT-B-32", "laion2b_e16"), ("ViT-B-32-quickgelu", "openai"), ("ViT-L-14", "laion400m_e31"), ("RN50", "openai")],
)
def test_without_a_tag_the_first_with_the_models_activation_is_taken(name: str, tag: str) -> None:
    """OpenAI's weights come first, and were trained with quick_gelu. RN50 alone has no others: refused by name."""
    clip = recipes.get(name).detector.clip
    assert clip.pretrained == tag
    assert activation_fits(name, tag) == (name != "RN50")


def test_model_without_public_weights_starts_from_random_ones() -> None:
    bare = next(name for name in open_clip.list_models() if not open_clip.list_pretrained_tags_by_model(name))
    assert recipes.get(bare).detector.clip.pretrained is None


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tinny", "tiny"),
        ("vit-l-l4", "vit-l-14"),
        ("ViT-L-14-quickgeluu", "ViT-L-14-quickgelu"),
        ("ViT-B-16-SigLIB-256:webli", "ViT-B-16-SigLIP-256"),
    ],
)
def test_misspelt_recipe_is_refused_with_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match="unknown recipe") as caught:
        recipes.get(name)
    message = models.one_line(caught.value)
    hint = message.partition("did you mean ")[2]
    assert repr(name) in message and suggestion in hint and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "zzzzzzzz", ":openai", "hf-hub:someone/else", "local-dir:/tmp"])
def test_nonsense_is_refused_with_the_named_recipes(name: str) -> None:
    with pytest.raises(ConfigError, match="choose tiny, vit-l-14, dgs-net or an open_clip model name") as caught:
        recipes.get(name)
    models.one_line(caught.value)


@pytest.mark.parametrize("name", ["tiny", "vit-l-14", "dgs-net", "ViT-B-16-SigLIP-384:webli", "ViT-L-14-336-quickgelu"])
def test_recipe_survives_json(name: str) -> None:
    detector = recipes.get(name).detector
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(detector)))) == detector


# --- variants --------------------------------------------------------------------------------------------------------


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def settings(recipe: recipes.Recipe) -> dict[str, Any]:
    return flat({"detector": asdict(recipe.detector), "training": asdict(recipe.training)})


NO_ALIGNMENT = {"detector.loss.alignment_weight": 0.0}
GLOBAL = {"detector.projection.kind": "global"} | NO_ALIGNMENT
LINEAR = {
    "detector.projection.kind": "none",
    "detector.patches.selection": "center",
    "detector.lora.rank": 0,
    "detector.head.kind": "linear",
    "detector.loss.contrastive_weight": 0.0,
    "detector.loss.bce_weight": 1.0,
    "detector.train_backbone": False,
    **NO_ALIGNMENT,
}
CHANGED: dict[str, dict[str, Any]] = {
    "advanced": {},
    "original": GLOBAL,
    "original:rank=64": GLOBAL,
    "linear": LINEAR,
    "linear:resize": LINEAR | {"detector.patches.selection": "resize", "detector.normalisation": "imagenet"},
    "rank-k": {"detector.projection.kind": "rank_k", "detector.projection.rank": 4},
    "rank-k:3": {"detector.projection.kind": "rank_k", "detector.projection.rank": 3},
    "no-projection": {"detector.projection.kind": "none", **NO_ALIGNMENT},
    "no-mapper": {"detector.mapper.hidden_dim": 0, **NO_ALIGNMENT},
    "no-alignment": NO_ALIGNMENT,
    "mapper-detached": {"detector.mapper.detached": True},
    "raw-after-mapped": {"detector.projection.kind": "mapped_and_raw"},
    "decorrelated": {"detector.loss.decorrelation_weight": 1.0},
    "decorrelated:0.3": {"detector.loss.decorrelation_weight": 0.3},
    "constant-caption": {"training.captions": "constant"},
    "shuffled-captions": {"training.captions": "shuffled"},
}
"""Variant -> the settings that it sets, and no others."""


def test_every_variant_is_covered_here() -> None:
    assert {name.partition(":")[0] for name in CHANGED} == recipes.VARIANTS.keys()


@pytest.mark.parametrize("recipe", ["tiny", "vit-l-14", "dgs-net", "ViT-B-16-SigLIP-256"])
@pytest.mark.parametrize("name", CHANGED)
def test_variant_changes_what_it_says_and_nothing_else(name: str, recipe: str) -> None:
    plain = recipes.get(recipe)
    before, changed = settings(plain), recipes.variant(plain, name)
    assert CHANGED[name].keys() <= before.keys() | {"detector.normalisation"}  # not written at its default
    assert settings(changed) == before | CHANGED[name]
    assert (settings(changed) != before) == (name != "advanced")
    assert changed.name == plain.name and (changed.basis is None) == (not name.startswith("original"))
    assert settings(plain) == before and plain.basis is None


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("original", BasisRule(energy=0.9)), ("original:rank=64", BasisRule(rank=64)),
        ("original:tau=1e-6", BasisRule(tau=1e-6)), ("original:energy=0.5", BasisRule(energy=0.5)),
    ],
)  # fmt: skip
def test_original_takes_a_rule_for_its_basis(name: str, rule: BasisRule) -> None:
    assert recipes.variant(recipes.TINY, name).basis == rule


def test_variant_of_a_variant_starts_from_its_settings() -> None:
    twice = recipes.variant(recipes.variant(recipes.TINY, "original"), "no-mapper")
    assert twice.basis is None and twice.detector.projection.kind == "global"


@pytest.mark.parametrize(
    "name",
    [
        "", "nothing", "Advanced", "advanced:", "advanced:3", "linear=resize", "no-mapper:1", "rank_k", "rank-k3",
        ":rank=64", "originall", "advanced,linear", "shuffled-captions:x",
    ],
)  # fmt: skip
def test_unknown_variant_is_refused_with_the_known_ones(name: str) -> None:
    known = ", ".join(recipes.VARIANTS)
    ways = "original:RULE, linear:resize, rank-k:K or decorrelated:WEIGHT"
    with pytest.raises(ConfigError, match=f"unknown variant .*: choose {known}, {ways}") as caught:
        recipes.variant(recipes.TINY, name)
    assert repr(name) in models.one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("original:", "is not a rule: give rank=64"), ("original:64", "'64' is not a rule: give rank=64"),
        ("original:rank=0", "rank ≥ 1"), ("original:rank=1.5", "is not a rule"), ("original:energy=2", "energy ≤ 1"),
        ("original:tau=0", "0 < tau"), ("original:colour=3", "is not a rule"), ("rank-k:", "'' is not a number"),
        ("linear:", "'' is no input of a linear probe: give linear .centre crop. or linear:resize"),
        ("linear:center", "'center' is no input"), ("linear:rank=3", "'rank=3' is no input"),
        ("rank-k:x", "'x' is not a number of directions: give rank-k:4"), ("rank-k:-3", "is not a number"),
        ("rank-k:2.5", "is not a number"), ("rank-k:1", "rank_k needs rank ≥ 2"), ("rank-k:0", "rank_k needs rank ≥ 2"),
        ("decorrelated:", "'' is not a weight > 0: give decorrelated:1"), ("decorrelated:0", "is not a weight > 0"),
        ("decorrelated:nan", "is not a weight"), ("decorrelated:x", "is not a weight"),
    ],
)  # fmt: skip
def test_setting_of_a_variant_that_makes_no_sense_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipes.variant(recipes.TINY, name)
    models.one_line(caught.value)


@pytest.mark.parametrize("name", CHANGED)
def test_every_variant_of_tiny_can_be_built_and_survives_json(name: str) -> None:
    detector = recipes.variant(recipes.TINY, name).detector
    kind = detector.projection.kind
    if not detector.projection.fitted:
        with pytest.raises(ConfigError, match=f"the {kind} projection has no basis or bank yet"):
            Detector.build(detector)
        computed: Any = {"rank": 40} if kind == "global" else {"bank": 6}
        detector = replace(detector, projection=replace(detector.projection, **computed))
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(detector)))) == detector
    built = Detector.build(detector)
    names = {part.partition(".")[0] for part, p in built.network.named_parameters() if p.requires_grad}
    assert names == {
        "original": {"visual", "head"}, "linear": {"head"}, "no-projection": {"visual", "head"},
        "no-mapper": {"visual", "head"},
    }.get(name.partition(":")[0], {"visual", "mapper", "head"})  # fmt: skip
