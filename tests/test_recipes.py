"""Recipes: the tiny one, the paper's, and any model of open_clip by its name."""

import json

import open_clip
import pytest

from nsnet import recipes
from nsnet.clip import activation_fits
from nsnet.config import from_dict, to_dict
from nsnet.detector import DetectorConfig
from nsnet.errors import ConfigError
from tests import models


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
    with pytest.raises(ConfigError, match="choose tiny, vit-l-14 or an open_clip model name") as caught:
        recipes.get(name)
    models.one_line(caught.value)


@pytest.mark.parametrize("name", ["tiny", "vit-l-14", "ViT-B-16-SigLIP-384:webli", "ViT-L-14-336-quickgelu"])
def test_recipe_survives_json(name: str) -> None:
    detector = recipes.get(name).detector
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(detector)))) == detector
