"""Modern towers as baselines: PE-Core, SigLIP2, MetaCLIP2, and DINOv3 without text; narrow ones of random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nsnet import bundle, clip, clip_weights, recipes, timm_towers
from nsnet.config import from_dict, to_dict
from nsnet.configuration import ClipConfig, DetectorConfig, LoraSettings, MapperConfig, ProjectionConfig, TrainingConfig
from nsnet.detector import Detector
from nsnet.errors import BundleError, ConfigError, WeightsError
from nsnet.mapper import SemanticMapper
from nsnet.patches import PatchConfig
from nsnet.training import Batch, build_optimizer, training_step
from tests.support import models, towers
from tests.support.models import close, features, pixels
from tests.support.pickles import Harm

CAPTIONS = ["a red boat on a lake", "two dogs", "the moon over a grey tower", "a cup"]
DINO = towers.timm_clip("dinov3_reduced")
TEXT = models.FROZEN.clip  # 32 dimensions; images have 48


def small(recipe: recipes.Recipe, image: ClipConfig, text: ClipConfig | None = None) -> recipes.Recipe:
    """A recipe with narrow towers in the place of its own."""
    detector = replace(
        recipe.detector, clip=image, text=text, patches=PatchConfig(patch_px=32, mosaic_px=towers.SIDE_PX),
        mapper=MapperConfig(hidden_dim=24),
    )  # fmt: skip
    return replace(recipe, detector=detector)


def two_towers() -> recipes.Recipe:
    return small(recipes.get("timm/vit_small_patch16_dinov3+ViT-B-32-quickgelu:openai"), DINO, TEXT)


RECIPES: dict[str, recipes.Recipe] = {
    **{name: small(recipes.get(name), config) for name, config in towers.CLIPS.items()},
    "DINOv3 and text": two_towers(),
    "ConvNeXt and text": small(
        recipes.get("timm/convnext_tiny+ViT-B-32-quickgelu:openai"), towers.timm_clip("convnext_reduced"), TEXT
    ),
}


def stepped(detector: Detector) -> tuple[dict[str, torch.Tensor], float]:
    """Train one step; returns the weights from before, and the loss."""
    before = {name: tensor.clone() for name, tensor in detector.network.state_dict().items()}
    text = detector.text_features.of(CAPTIONS) if detector.config.projection.needs_captions else None
    batch = Batch(
        mosaics=torch.from_numpy(models.mosaics(4)), text_features=text, labels=torch.tensor([0, 1, 0, 1]),
        valid=torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    config = TrainingConfig(head_lr=1e-2, backbone_lr=1e-2)
    losses, _ = training_step(
        detector.network.train(), batch, build_optimizer(detector.network, config), detector.config.loss, config
    )
    return before, float(losses.total)


def part(name: str) -> str:
    """The part of the network to which a parameter belongs."""
    return "lora" if ".lora_" in name else name.partition(".")[0]


@pytest.mark.parametrize("variant", ["linear", "advanced"])
@pytest.mark.parametrize("name", RECIPES)
def test_tower_trains_one_step_of_the_parameters_that_are_meant_to(name: str, variant: str) -> None:
    config = recipes.variant(RECIPES[name], variant).detector
    detector = Detector.build(config)
    expected = {"head"} if variant == "linear" else {"head", "mapper", "lora"}
    if "ConvNeXt" in name:  # it has no attention: the tower stays frozen
        expected -= {"lora"}
    before, loss = stepped(detector)
    assert torch.isfinite(torch.tensor(loss)) and loss > 0
    trained = {name for name, parameter in detector.network.named_parameters() if parameter.grad is not None}
    assert {part(name) for name in trained} == expected
    assert trained == {name for name, parameter in detector.network.named_parameters() if parameter.requires_grad}
    after = detector.network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {part(name) for name in changed} == expected


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("PE-Core-B-16", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("ViT-B-32-SigLIP2-256", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("ViT-H-14-worldwide", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("DINOv3 and text", (0.4, 0.3, 0.2), (0.3, 0.2, 0.1)),
    ],
)
def test_images_are_normalised_as_the_tower_wants_them(name: str, mean: tuple[float], std: tuple[float]) -> None:
    detector = Detector.build(recipes.variant(RECIPES[name], "linear").detector)
    mosaics = torch.from_numpy(models.mosaics(2))
    normalised = (mosaics.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    detector.network.eval()
    with torch.no_grad():
        close(detector.network.encode_image(mosaics), features(detector.clip.visual, normalised))


@pytest.mark.parametrize("name", RECIPES)
def test_bundle_of_a_tower_scores_as_before(name: str, tmp_path: Path) -> None:
    """Adapters are merged; both towers, which have random weights, come from the bundle."""
    built = models.as_if_trained(recipes.variant(RECIPES[name], "advanced").detector)
    mosaics = models.mosaics(4)
    expected = built.score(mosaics, CAPTIONS)
    described = built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    assert abs(loaded.score(mosaics, CAPTIONS).logit - expected.logit).max() < 1e-4 < expected.logit.std()
    other = loaded.score(mosaics, CAPTIONS[::-1]).logit
    assert abs(other - expected.logit).max() > 1e-5, "captions must matter"
    assert (tmp_path / "bundle" / "text").is_dir() == ("and text" in name)
    assert described.clip_digest.count(bundle.DIGESTS) == ("and text" in name)
    assert recipes.allowed_variants(loaded.config) == recipes.allowed_variants(RECIPES[name].detector)


@pytest.mark.parametrize("name", towers.CLIPS)
def test_text_features_are_those_of_open_clip(name: str) -> None:
    loaded = clip.load_clip(towers.CLIPS[name])
    models.randomise(loaded.model, 3)
    tokens = loaded.tokenizer(CAPTIONS)
    encoded = loaded.encode_text(CAPTIONS)
    close(encoded, loaded.model.encode_text(tokens))  # type: ignore[operator]
    assert models.cosine(encoded[:1], encoded[1:2]) < 0.9999


# --- a separate text tower --------------------------------------------------------------------------------------------


def test_linear_probe_neither_loads_nor_records_the_separate_text_tower(tmp_path: Path) -> None:
    missing = replace(TEXT, model="ViT-B-32-quickgelu", pretrained="openai", architecture=None)  # would ask the hub
    config = replace(recipes.variant(two_towers(), "linear").detector, text=missing)
    with models.hub_at(models.closed_address(), tmp_path / "cache"):
        built = Detector.build(config)
        described = built.save(tmp_path / "bundle")
        loaded = Detector.load(tmp_path / "bundle")
    assert built.text is None and loaded.text is None and bundle.DIGESTS not in described.clip_digest
    assert loaded.score(models.mosaics(2), None).logit.shape == (2,)


@pytest.mark.parametrize("kind", ["clip", "text"])
def test_bundle_whose_named_tower_has_other_weights_is_refused(kind: str, tmp_path: Path) -> None:
    """Weights with a name are not in the bundle; the digest finds that those given differ."""
    recipe = two_towers()
    named: dict[str, Any] = {
        "clip": {"clip": replace(DINO, pretrained="none")}, "text": {"text": replace(TEXT, pretrained="openai")}
    }[kind]  # fmt: skip
    config = replace(recipe.detector, **named)
    for seed in (0, 1):
        model = clip.load_clip(replace(DINO if kind == "clip" else TEXT, seed=seed))
        save_file(model.model.state_dict(), tmp_path / f"{seed}.safetensors")
    first, other = ({f"{kind}_weights": tmp_path / f"{seed}.safetensors"} for seed in (0, 1))
    Detector.build(config, **first).save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / kind).exists()
    Detector.load(tmp_path / "bundle", captioner=False, **first)
    with pytest.raises(WeightsError, match=f"pass the right --{kind}-weights") as caught:
        Detector.load(tmp_path / "bundle", captioner=False, **other)
    assert named[kind].model in models.one_line(caught.value)


def test_bank_of_captions_has_the_dimension_of_the_separate_text_tower() -> None:
    config = recipes.variant(two_towers(), "rank-k:3").detector
    detector = Detector.build(replace(config, projection=replace(config.projection, bank=5)))
    bank = detector.network.get_buffer("caption_bank")
    assert bank.shape == (5, 32)
    bank.copy_(detector.text_features.of(["a", "b", "c", "d", "e"]))
    scores = detector.score(models.mosaics(4), CAPTIONS)
    assert ((scores.residual_energy > 0) & (scores.residual_energy < 1)).all()


def test_mapper_between_two_spaces_has_a_learned_skip_and_the_papers_none() -> None:
    paper, between = SemanticMapper(48, MapperConfig()), SemanticMapper(48, MapperConfig(dropout=0.0), text_dim=32)
    assert not list(paper.skip.parameters()) and list(paper.state_dict()) == [
        f"{layer}.{kind}" for layer in ("inner", "outer", "norm") for kind in ("weight", "bias")
    ]
    captions = torch.randn(5, 32)
    skip, inner, outer = between.skip, between.inner, between.outer
    assert isinstance(skip, nn.Linear)
    by_hand = captions @ skip.weight.T + (captions @ inner.weight.T + inner.bias).relu() @ outer.weight.T + outer.bias
    close(between(captions), nn.functional.layer_norm(by_hand, (48,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": DINO}, "must be an open_clip model"),
        ({"clip": TEXT}, "beside an image tower timm/NAME, got small beside small"),
        ({"text": None}, "timm/dinov3_reduced has no text tower, which the projection per_sample needs"),
        ({"mapper": MapperConfig(hidden_dim=0)}, "another space .* mapper of width 0"),
        ({"projection": ProjectionConfig(kind="global")}, "another space .* got the projection global"),
    ],
)
def test_settings_that_the_towers_do_not_allow_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        replace(two_towers().detector, **changes)
    models.one_line(caught.value)


def test_captions_without_a_text_tower_are_refused() -> None:
    with pytest.raises(ConfigError, match="timm/dinov3_reduced has no text tower") as caught:
        clip.load_clip(DINO).encode_text(["two dogs"])
    models.one_line(caught.value)


def test_settings_of_older_releases_stay_as_they_are() -> None:
    """Ids are computed from this JSON."""
    stored = to_dict(models.FROZEN)
    assert "text" not in stored and from_dict(DetectorConfig, stored) == models.FROZEN
    config = two_towers().detector
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(DetectorConfig, {**stored, "text": None}) == models.FROZEN


# --- variants ---------------------------------------------------------------------------------------------------------

WITH_MAPPED_CAPTIONS = (
    "advanced", "linear", "rank-k", "no-projection", "no-alignment", "mapper-detached", "decorrelated",
    "constant-caption", "shuffled-captions",
)  # fmt: skip


def test_variants_that_a_tower_allows_are_known_from_names_alone() -> None:
    """No library knows these names: whoever looked them up would fail."""
    image, text = ClipConfig(model="timm/unknown"), ClipConfig(model="unknown")
    alone = DetectorConfig(clip=image, projection=ProjectionConfig(kind="none"))
    assert recipes.allowed_variants(alone) == ("linear", "no-projection")
    assert recipes.allowed_variants(DetectorConfig(clip=image, text=text)) == WITH_MAPPED_CAPTIONS
    assert recipes.allowed_variants(DetectorConfig(clip=text)) == tuple(recipes.VARIANTS)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit+tiny", "tiny"])
@pytest.mark.parametrize("variant", recipes.VARIANTS)
def test_allowed_variants_are_made_and_others_refused_with_those_allowed(name: str, variant: str) -> None:
    recipe = recipes.get(name)
    allowed = recipes.allowed_variants(recipe.detector)
    if variant in allowed:
        assert recipes.variant(recipe, variant).name == name
        return
    with pytest.raises(ConfigError, match=f"the variant {variant} is not possible with") as caught:
        recipes.variant(recipe, variant)
    message = models.one_line(caught.value)
    assert f"choose {', '.join(allowed)}" in message and name in message


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_recipe_of_a_timm_tower_has_its_sizes_and_removes_nothing() -> None:
    detector = recipes.get("timm/vit_small_patch16_dinov3").detector
    assert detector.clip == ClipConfig(model="timm/vit_small_patch16_dinov3", pretrained="lvd1689m")
    assert (detector.patches.mosaic_px, detector.patches.patch_px) == (256, 32)
    assert (detector.head.hidden_dim, detector.lora.rank, detector.projection.kind) == (384, 6, "none")
    settings = clip_weights.timm_settings(detector.clip)
    assert settings.mean == (0.485, 0.456, 0.406) and settings.std == (0.229, 0.224, 0.225)


def test_recipe_of_two_towers_names_both() -> None:
    recipe = recipes.get("timm/vit_base_patch16_dinov3.lvd1689m+ViT-B-16:laion2b_s34b_b88k")
    assert (recipe.detector.clip.model, recipe.detector.clip.pretrained) == ("timm/vit_base_patch16_dinov3", "lvd1689m")
    assert recipe.detector.text == ClipConfig(model="ViT-B-16", pretrained="laion2b_s34b_b88k")
    assert recipe.detector.projection.kind == "per_sample"
    assert recipes.get("timm/test_vit+tiny").detector.text == recipes.TINY.detector.clip


@pytest.mark.parametrize("name", ["RN50", "convnext_base", "timm/test_convnext"])
def test_tower_without_attention_stays_frozen(name: str) -> None:
    assert recipes.get(name).detector.lora == LoraSettings(rank=0)


def test_facts_are_those_of_the_built_tower_and_need_no_memory() -> None:
    found = timm_towers.facts(ClipConfig(model="timm/vit_7b_patch16_dinov3", pretrained=None))  # 27 GB in fp32
    assert found == (256, 4096, True)
    built = clip.load_clip(DINO)
    assert timm_towers.facts(DINO) == (built.image_px, built.embed_dim, True)
    assert features(built.visual, pixels(built.visual)).shape == (3, built.embed_dim)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_small_patch16_dinov4", "did you mean timm/vit_small_patch16_dinov3"),
        ("timm/", "timm has no model ''"),
        ("timm/hf-hub:someone/else", "timm has no model 'hf-hub:someone/else'"),
        ("timm/test_vit.mine", "no weights 'mine' for test_vit; its tags: r160_in1k"),
        ("timm/test_vit+", "unknown recipe ''"),
        ("timm/test_vit+ViT-B-23", "did you mean ViT-B-32"),
        ("ViT-B-32+ViT-B-16", "unknown recipe 'ViT-B-32.ViT-B-16'"),
    ],
)
def test_name_that_no_library_knows_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipes.get(name)
    models.one_line(caught.value)


@pytest.mark.parametrize("model", ["timm/hf-hub:a/b", "timm/../x", "timm/local-dir:/tmp", "hf-hub:timm/x"])
def test_name_that_would_make_timm_download_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="must be a name"):
        ClipConfig(model=model)
    with pytest.raises(ConfigError, match="defined by its name"):
        ClipConfig(model="timm/test_vit", architecture=models.ARCHITECTURE)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt", "folder"])
def test_weights_of_a_timm_tower_load_from_a_file_with_its_classifier_left_out(kind: str, tmp_path: Path) -> None:
    source = clip.load_clip(replace(DINO, seed=5))
    state = {**source.visual.state_dict(), "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    path = tmp_path / kind
    if kind == "safetensors":
        save_file(state, path := tmp_path / "model.safetensors")
    elif kind == "pt":
        torch.save(state, path)
    else:
        source.save(path)
    loaded = clip.load_clip(DINO, clip_weights.find_weights(DINO, path))
    assert loaded.digest() == source.digest() != clip.load_clip(DINO).digest()
    assert (loaded.mean, loaded.std, loaded.image_px) == (source.mean, source.std, 64)


@pytest.mark.parametrize("kind", ["other tower", "missing tensor", "clip", "folder of a clip", "no folder", "pickle"])
def test_weights_that_are_not_of_the_tower_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = dict(clip.load_clip(DINO).visual.state_dict())
    if kind == "other tower":
        state = clip.load_clip(towers.timm_clip("convnext_reduced")).visual.state_dict()
    elif kind == "missing tensor":
        del state["norm.weight"]
    elif kind == "clip":
        state = clip.load_clip(TEXT).model.state_dict()
    elif kind == "folder of a clip":
        path = tmp_path / "folder"
        clip.load_clip(TEXT).save(path)
    elif kind == "no folder":
        path = tmp_path / "empty"
        path.mkdir()
        (path / "config.json").write_text("{}")
    if kind == "pickle":
        path = tmp_path / "model.pt"
        torch.save({**state, "extra": Harm(tmp_path / "harmed")}, path)
    elif path.suffix:
        save_file(state, path)
    with pytest.raises(WeightsError) as caught:
        clip.load_clip(DINO, clip_weights.find_weights(DINO, path))
    assert str(path) in models.one_line(caught.value) and not (tmp_path / "harmed").exists()


def test_folder_of_a_timm_tower_is_no_clip(tmp_path: Path) -> None:
    clip.load_clip(DINO).save(tmp_path)
    assert all(name.startswith("visual.") for name in load_file(tmp_path / clip_weights.WEIGHTS_FILE))
    with pytest.raises(WeightsError, match="holds an image tower without text") as caught:
        clip.load_clip(ClipConfig(), tmp_path)
    assert str(tmp_path) in models.one_line(caught.value)


def test_missing_weights_of_timm_give_the_download_command(tmp_path: Path) -> None:
    with models.hub_at(models.closed_address(), tmp_path), pytest.raises(WeightsError) as caught:
        clip_weights.find_weights(recipes.get("timm/vit_small_patch16_dinov3").detector.clip)
    assert "hf download timm/vit_small_patch16_dinov3.lvd1689m model.safetensors" in models.one_line(caught.value)


@pytest.mark.parametrize(
    ("model", "repository"),
    [("ViT-B-16-SigLIP2", "timm/ViT-B-16-SigLIP2"), ("ViT-L-14-worldwide", "google/mt5-base")],
)
def test_tokenizer_that_is_missing_is_named_before_anything_is_loaded(
    model: str, repository: str, tmp_path: Path
) -> None:
    """A file of weights holds no tokenizer; a folder in open_clip's format does."""
    (tmp_path / "weights.safetensors").touch()
    config = replace(recipes.get(model).detector.clip, pretrained=None)
    with models.hub_at(models.closed_address(), tmp_path / "cache"):
        for weights in (None, tmp_path / "weights.safetensors"):
            with pytest.raises(WeightsError, match=f"hf download {repository} ") as caught:
                clip_weights.find_weights(config, weights, option="--text-weights")
            assert "--text-weights with a folder" in models.one_line(caught.value)
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / clip_weights.CONFIG_FILE).touch()
        assert clip_weights.find_weights(config, folder) == folder
        assert clip_weights.find_weights(recipes.get("PE-Core-B-16").detector.clip, tmp_path / "weights.safetensors")


def test_damaged_bundle_of_two_towers_is_refused(tmp_path: Path) -> None:
    Detector.build(two_towers().detector).save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "text" / clip_weights.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="text/open_clip_model.safetensors is not the one that was recorded"):
        Detector.load(tmp_path / "bundle", captioner=False)


def test_tower_for_images_that_are_not_square_is_refused() -> None:
    names = timm.list_models(pretrained=True)
    wide = next(name for name in names if len(set(timm.get_pretrained_cfg(name).input_size[1:])) > 1)
    with pytest.raises(ConfigError, match="only square ones"):
        recipes.get(f"timm/{wide}")
