"""The detector: built, trained in part, saved, loaded, and the same verdict for the same image however it comes."""

import io
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nsnet
from nsnet import captioner as captioner_module
from nsnet import clip, clip_weights, configuration, recipes
from nsnet.calibration import Calibration
from nsnet.configuration import DetectorConfig, LoraSettings, ProjectionConfig, TrainingConfig
from nsnet.detector import Detector, Verdict
from nsnet.errors import BundleError, ConfigError, WeightsError
from nsnet.images import DecodeLimits
from nsnet.network import residual_energy
from nsnet.patches import SCORING_SEED, PatchConfig, center_crop, select_mosaic
from nsnet.preparation import PreparationConfig
from nsnet.training import Batch, build_optimizer, training_step
from tests.support import models

WORDS = ["a red boat on a lake", "two dogs", "the moon over a grey tower", "a small cup"]
GLOBAL = replace(models.FROZEN, projection=ProjectionConfig(kind="global", rank=5))
NONE = replace(models.FROZEN, projection=ProjectionConfig(kind="none"))
RANK_K = replace(models.FROZEN, projection=ProjectionConfig(kind="rank_k", rank=3, bank=8))
NO_MAPPER = replace(models.FROZEN, mapper=replace(models.FROZEN.mapper, hidden_dim=0))
PROJECTIONS = {"per_sample": models.FROZEN, "rank_k": RANK_K, "no mapper": NO_MAPPER, "global": GLOBAL, "none": NONE}
WITHOUT_CAPTIONS = ("global", "none")


def trained(config: DetectorConfig = models.FROZEN) -> Detector:
    detector = models.as_if_trained(config)
    network: Any = detector.network
    generator = torch.Generator().manual_seed(4)
    if config.projection.kind == "global":
        network.semantic_basis.copy_(torch.linalg.qr(torch.randn(network.semantic_basis.shape, generator=generator)).Q)
    network.caption_bank.copy_(torch.randn(network.caption_bank.shape, generator=generator))
    return detector


def forward(detector: Detector, count: int = 4) -> Any:
    with torch.no_grad():
        return detector.network(
            torch.from_numpy(models.mosaics(count)), detector.clip.encode_text((WORDS * count)[:count])
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "detector"
    trained().save(folder)
    return folder


@pytest.fixture(scope="module")
def detector(saved: Path) -> Detector:
    return Detector.load(saved)


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_frozen_backbone_trains_adapters_mapper_and_head_only(kind: str) -> None:
    built = Detector.build(PROJECTIONS[kind])
    trainable = {name for name, parameter in built.network.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trainable if name.startswith("visual.") and ".lora_" in name}
    assert len(adapters) == 2 * 3 * 2  # blocks × (q, k, v) × (A, B)
    rest = {name.partition(".")[0] for name in trainable - adapters}
    assert rest == ({"mapper", "head"} if kind in ("per_sample", "rank_k") else {"head"})
    assert not any(
        parameter.requires_grad for name, parameter in built.clip.model.named_parameters() if "lora" not in name
    )


def test_tiny_recipe_trains_the_whole_image_tower_and_no_text_tower() -> None:
    built = Detector.build(recipes.TINY.detector)
    assert all(parameter.requires_grad for parameter in built.network.parameters())
    text = [parameter for name, parameter in built.clip.model.named_parameters() if not name.startswith("visual.")]
    assert text and not any(parameter.requires_grad for parameter in text)


def test_without_adapters_a_frozen_tower_stays_stock_and_frozen() -> None:
    built = Detector.build(replace(models.FROZEN, lora=LoraSettings(rank=0)))
    assert not any(parameter.requires_grad for parameter in built.network.visual.parameters())
    assert any(isinstance(module, torch.nn.MultiheadAttention) for module in built.network.visual.modules())


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_training_step_moves_what_is_trained_and_nothing_else(kind: str) -> None:
    built = trained(PROJECTIONS[kind])
    before = {name: tensor.clone() for name, tensor in {**built.network.state_dict(), **text_state(built)}.items()}
    config = TrainingConfig(head_lr=1e-2, backbone_lr=1e-2)
    batch = Batch(
        torch.from_numpy(models.mosaics(4)),
        built.clip.encode_text(WORDS),
        torch.tensor([0, 1, 0, 1]),
        torch.ones(4, dtype=torch.bool),
    )
    losses, energy = training_step(
        built.network, batch, build_optimizer(built.network, config), built.config.loss, config
    )
    assert all(math.isfinite(float(value)) for value in losses) and 0 < energy < 4.001
    after = {**built.network.state_dict(), **text_state(built)}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name, parameter in built.network.named_parameters() if parameter.requires_grad}
    assert moved == trainable


def text_state(detector: Detector) -> dict[str, torch.Tensor]:
    state = detector.clip.model.state_dict()
    return {f"clip.{name}": tensor for name, tensor in state.items() if not name.startswith("visual.")}


def test_build_is_a_function_of_its_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (Detector.build(models.FROZEN, seed=seed).network.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state), "building must not disturb other random numbers"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.classifier.weight"], other["head.classifier.weight"])
    first_adapter = next(name for name in one if "lora_A" in name)
    assert not torch.equal(one[first_adapter], other[first_adapter])


def test_mosaic_that_the_tower_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="mosaic_px is 128, .* takes 64 px") as caught:
        Detector.build(replace(models.FROZEN, patches=PatchConfig(patch_px=32, mosaic_px=128)))
    models.one_line(caught.value)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("normalisation", ["clip", "imagenet"])
def test_mosaics_are_normalised_as_the_tower_was_trained_or_as_imagenet(normalisation: Any) -> None:
    built = Detector.build(replace(models.FROZEN, normalisation=normalisation))
    mosaics = models.mosaics(3)
    pixels = np.moveaxis(mosaics.astype(np.float64) / 255, 3, 1)
    constants = (built.clip.mean, built.clip.std) if normalisation == "clip" else IMAGENET
    for channel, (mean, std) in enumerate(zip(*constants, strict=True)):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        expected = clip.load_clip(models.FROZEN.clip).visual(torch.from_numpy(pixels).float())
    torch.testing.assert_close(forward(built, 3).image, expected, atol=1e-5, rtol=1e-5)


# --- projections -----------------------------------------------------------------------------------------------------


def test_per_sample_projection_removes_the_mapped_caption() -> None:
    out = forward(trained())
    assert out.semantic is not None and out.image.shape == out.projected.shape == (4, 32)
    cosine = torch.nn.functional.cosine_similarity(out.projected.double(), out.semantic.double(), dim=1)
    assert cosine.abs().max() < 1e-6
    assert torch.nn.functional.cosine_similarity(out.image, out.semantic, dim=1).abs().max() > 0.01
    u, v = out.image.double(), out.semantic.double()
    expected = u - (u * v).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True) * v
    torch.testing.assert_close(out.projected.double(), expected, atol=1e-6, rtol=1e-5)


def test_logit_depends_on_the_caption_unless_the_projection_needs_none() -> None:
    for kind, config in PROJECTIONS.items():
        detector = trained(config)
        one, two = (detector.score(models.mosaics(1), [caption]).logit for caption in WORDS[:2])
        assert (one != two) == (kind not in WITHOUT_CAPTIONS)


def test_global_projection_removes_the_basis_and_none_removes_nothing() -> None:
    detector = trained(GLOBAL)
    out = forward(detector)
    basis = detector.network.semantic_basis.double()  # type: ignore[operator]
    assert (
        out.semantic is None
        and (out.projected.double() @ basis).abs().max() < 1e-5 < (out.image.double() @ basis).abs().max()
    )
    torch.testing.assert_close(
        out.projected.double(), out.image.double() @ (torch.eye(32) - basis @ basis.T).double(), atol=1e-5, rtol=1e-5
    )
    out = forward(trained(NONE))
    assert out.semantic is None and torch.equal(out.projected, out.image)
    assert torch.equal(residual_energy(out), torch.ones(4))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_features_are_of_unit_length_and_energy_a_share(kind: str) -> None:
    out = forward(trained(PROJECTIONS[kind]))
    torch.testing.assert_close(out.features.norm(dim=1), torch.ones(4))
    energy = residual_energy(out)
    assert out.logit.shape == (4,) and bool(((energy > 0) & (energy <= 1.000001)).all())


@pytest.mark.parametrize(
    ("kind", "rank"), [("global", -1), ("per_sample", 3), ("none", 1), ("rank_k", 1), ("sideways", 0)]
)
def test_projection_that_contradicts_itself_is_refused(kind: Any, rank: int) -> None:
    with pytest.raises(ConfigError, match="needs rank ≥ 1|unknown projection"):
        ProjectionConfig(kind=kind, rank=rank)


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_loaded_detector_gives_the_logits_of_the_trained_one(kind: str, tmp_path: Path) -> None:
    built = trained(PROJECTIONS[kind])
    built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    before, after = (one.score(models.mosaics(4), WORDS) for one in (built, loaded))
    np.testing.assert_allclose(after.logit, before.logit, atol=1e-5, rtol=0)
    assert np.std(before.logit) > 1e-3 and after.verdict == before.verdict
    assert loaded.config == built.config and loaded.calibration == built.calibration
    for name in ("semantic_basis", "caption_bank"):
        assert torch.equal(loaded.network.state_dict()[name], built.network.state_dict()[name])


def test_loaded_adapters_are_merged_into_open_clips_own_modules(tmp_path: Path) -> None:
    built = trained()
    plain = Detector.build(models.FROZEN)
    built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    stock = clip.load_clip(models.FROZEN.clip).visual
    assert [type(module) for module in loaded.network.visual.modules()] == [type(module) for module in stock.modules()]
    assert loaded.network.visual is loaded.clip.visual
    images = models.mosaics(4)
    np.testing.assert_allclose(forward(loaded).image.numpy(), forward(built).image.numpy(), atol=1e-5, rtol=1e-5)
    assert np.abs(forward(loaded).image.numpy() - forward(plain).image.numpy()).max() > 1e-3, images.shape


def test_detector_without_adapters_survives_bit_for_bit(tmp_path: Path) -> None:
    built = trained(replace(models.FROZEN, lora=LoraSettings(rank=0)))
    built.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "lora").exists()
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    assert np.array_equal(loaded.score(models.mosaics(4), WORDS).logit, built.score(models.mosaics(4), WORDS).logit)


def test_tower_that_was_trained_itself_survives(tmp_path: Path) -> None:
    config = replace(models.FROZEN, train_backbone=True)
    built = trained(config)
    models.randomise(built.network.visual, 9, std=0.02)
    built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    np.testing.assert_allclose(
        loaded.score(models.mosaics(4), WORDS).logit, built.score(models.mosaics(4), WORDS).logit, atol=1e-5
    )


def test_saving_does_not_disturb_training(tmp_path: Path) -> None:
    built = trained()
    before, trainable = forward(built).logit, [p.requires_grad for p in built.network.parameters()]
    names, tower, random = list(built.clip.model.state_dict()), built.clip.visual, torch.random.get_rng_state()
    for turn in range(2):
        built.save(tmp_path / str(turn))
    assert torch.equal(torch.random.get_rng_state(), random), "a checkpoint must not change what is drawn after it"
    assert torch.equal(forward(built).logit, before)
    assert [p.requires_grad for p in built.network.parameters()] == trainable
    assert built.clip.visual is tower and list(built.clip.model.state_dict()) == names


def test_loaded_detector_is_frozen_and_in_inference_mode(detector: Detector) -> None:
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())
    assert not any(module.training for module in detector.network.modules())
    assert not any(module.training for module in detector.clip.model.modules())
    assert detector.detector_id == detector.description.detector_id  # type: ignore[union-attr]
    assert Detector.build(models.FROZEN).detector_id is None
    assert nsnet.Detector is Detector and nsnet.Verdict is Verdict


def test_mapper_dropout_does_not_act_when_scoring(detector: Detector) -> None:
    assert detector.config.mapper.dropout > 0
    scores = [detector.score(models.mosaics(3), WORDS[:3]).logit for _ in range(3)]
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])


def test_dropout_of_the_adapters_acts_in_training_and_not_when_scoring(tmp_path: Path) -> None:
    """At the rate of DGS-Net; the loaded detector has merged its adapters."""
    config = replace(models.FROZEN, lora=replace(recipes.DGS_NET.detector.lora, rank=3))
    assert config.lora.dropout == 0.8
    built, mosaics = models.as_if_trained(config), models.mosaics(4)
    tensor = torch.from_numpy(mosaics)
    built.network.train()
    with torch.no_grad():
        torch.manual_seed(0)
        one, other = built.network.encode_image(tensor), built.network.encode_image(tensor)
    assert (one - other).abs().max() > 1e-3
    logits = built.score(mosaics, WORDS[:4]).logit
    assert np.array_equal(built.score(mosaics, WORDS[:4]).logit, logits)
    built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle", captioner=False)
    np.testing.assert_allclose(loaded.score(mosaics, WORDS[:4]).logit, logits, rtol=0, atol=1e-4)


def test_detector_that_was_built_scores_without_dropout_too() -> None:
    built = Detector.build(models.FROZEN)
    assert built.config.mapper.dropout > 0 and built.network.training
    scores = [built.score(models.mosaics(3), WORDS[:3]).logit for _ in range(3)]
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])


SINGLE: list[Any] = [
    "a.png", np.str_("a.png"), b"bytes", Path("a.png"), models.image(0), io.BytesIO(b"bytes"),
    np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8),
]  # fmt: skip


@pytest.mark.parametrize("image", SINGLE, ids=lambda image: type(image).__name__)
def test_single_image_instead_of_a_list_is_refused(image: Any, detector: Detector) -> None:
    with pytest.raises(TypeError, match=r"takes a list of images; for one image: predict\(\[image\]\)"):
        detector.predict(image)


@pytest.mark.parametrize("images", [None, 7, {"a.png": 1}, {}])
def test_what_is_no_list_is_refused_with_its_type(images: Any, detector: Detector) -> None:
    with pytest.raises(TypeError, match=f"takes a list of images, got {type(images).__name__}"):
        detector.predict(images)


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"content")
    file.close()
    return file


NO_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "tensor": (torch.zeros(3, 8, 8), TypeError, "of type Tensor; predict takes a path, bytes"),
    "none": (None, TypeError, "of type NoneType"),
    "number": (7, TypeError, "of type int"),
    "dictionary": ({"bytes": b""}, TypeError, "of type dict"),
    "list": ([models.image(0)], TypeError, "of type list"),
    "numpy number": (np.uint8(7), TypeError, "of type uint8"),
    "bytearray": (bytearray(b"a"), TypeError, "of type bytearray"),
    "float array": (np.zeros((8, 8, 3)), TypeError, "an array of float64; predict takes uint8"),
    "bool array": (np.zeros((8, 8), dtype=bool), TypeError, "an array of bool"),
    "signed array": (np.zeros((8, 8, 3), dtype=np.int8), TypeError, "an array of int8"),
    "channels first": (np.zeros((3, 8, 8), dtype=np.uint8), ValueError, r"an array \(3, 8, 8\)"),
    "four channels": (np.zeros((8, 8, 4), dtype=np.uint8), ValueError, r"takes \(H, W, 3\), RGB, or \(H, W\), grey"),
    "batch": (np.zeros((1, 8, 8, 3), dtype=np.uint8), ValueError, "an array"),
    "row": (np.zeros(8, dtype=np.uint8), ValueError, "an array"),
    "no pixels": (np.zeros((0, 8, 3), dtype=np.uint8), ValueError, "an array"),
    "text file": (io.StringIO("text"), TypeError, "a file opened in text mode; open it with mode 'rb'"),
    "closed file": (closed_file(), ValueError, "a file that cannot be read: I/O operation on closed file"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_refused_before_any_is_judged(
    kind: str, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "predict_prepared", lambda *_: pytest.fail("an image was judged"))
    monkeypatch.setattr("nsnet.detector.try_prepare", lambda *_: pytest.fail("an image was read"))
    wrong, error, message = NO_IMAGES[kind]
    with pytest.raises(error, match=f"^image 2 is .*{message}") as caught:
        detector.predict([models.image(0), "missing.png", wrong], batch_size=1)
    models.one_line(caught.value)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_of_no_images_is_refused(batch_size: int, detector: Detector) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        detector.predict([models.image(0)], batch_size=batch_size)


def test_arrays_and_files_are_judged_as_the_images_they_hold(detector: Detector, tmp_path: Path) -> None:
    image, grey = models.image(3), models.image(4).convert("L")
    content = models.file_bytes(image)
    (tmp_path / "a.png").write_bytes(content)
    expected, expected_grey = (detector.predict([one])[0] for one in (image, grey))
    pixels = np.asarray(image)
    strided = np.repeat(pixels, 2, axis=1)[:, ::2]
    with (tmp_path / "a.png").open("rb") as file:
        given: list[Any] = [pixels, strided, file, io.BytesIO(content), np.str_(tmp_path / "a.png")]
        verdicts = detector.predict(given, batch_size=1)
    assert [scored(verdict).logit for verdict in verdicts] == [expected.logit] * len(given)
    assert detector.predict(np.stack([pixels, pixels]), batch_size=1) == [verdicts[0]] * 2
    assert detector.predict([np.asarray(grey)])[0].logit == scored(expected_grey).logit != expected.logit
    assert [verdict.logit for verdict in detector.predict(iter([image]))] == [expected.logit]


class Slow(io.RawIOBase):
    """A file that gives a few bytes at a time and cannot go back, as a pipe does."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(memoryview(buffer)[:1000])


def test_file_is_read_to_its_end_and_from_its_start(detector: Detector) -> None:
    content = models.file_bytes(models.image(3))
    file = io.BytesIO(content)
    file.read()
    given: list[Any] = [content, Slow(content), file, file]
    verdicts = detector.predict(given)
    assert [scored(verdict).logit for verdict in verdicts] == [scored(verdicts[0]).logit] * len(given)


def test_file_or_path_over_the_limit_is_a_failed_verdict(detector: Detector, tmp_path: Path) -> None:
    content = models.file_bytes(models.image(3))
    (tmp_path / "a.png").write_bytes(content)
    given = [tmp_path / "a.png", io.BytesIO(content), content]
    verdicts = detector.predict(given, limits=DecodeLimits(max_bytes=len(content) - 1))
    assert [verdict.error_class for verdict in verdicts] == ["ImageTooLargeError"] * 3
    assert all(scored(verdict) for verdict in detector.predict([tmp_path / "a.png", io.BytesIO(content)]))


def test_fifo_in_the_place_of_an_image_is_a_failed_verdict_at_once(detector: Detector, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    verdicts = detector.predict([tmp_path / "a.png", "/dev/zero"])
    assert [verdict.error_class for verdict in verdicts] == ["FetchError"] * 2
    assert "not a regular file" in str(verdicts[0].error_message)


# --- weights with a name ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    clip.load_clip(models.FROZEN.clip).save(folder)
    return folder


def test_named_weights_are_referred_to_and_not_put_inside(weights: Path, tmp_path: Path) -> None:
    built = models.as_if_trained(models.NAMED, clip_weights=weights)
    built.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "clip").exists()
    loaded = Detector.load(tmp_path / "bundle", clip_weights=weights, captioner=False)
    same_file = Detector.load(tmp_path / "bundle", clip_weights=weights / clip_weights.WEIGHTS_FILE, captioner=False)
    expected = built.score(models.mosaics(4), WORDS).logit
    for one in (loaded, same_file):
        np.testing.assert_allclose(one.score(models.mosaics(4), WORDS).logit, expected, atol=1e-5)


def test_other_clip_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    description = models.as_if_trained(models.NAMED, clip_weights=weights).save(tmp_path / "bundle")
    shutil.copytree(weights, tmp_path / "others")
    path = tmp_path / "others" / clip_weights.WEIGHTS_FILE
    state = load_file(path)
    state["text_projection"][0, 0] += 1e-6
    save_file(state, path)
    with pytest.raises(WeightsError, match="not those that detector") as caught:
        Detector.load(tmp_path / "bundle", clip_weights=tmp_path / "others", captioner=False)
    message = models.one_line(caught.value)
    assert (
        description.detector_id in message and description.clip_digest[:16] in message and "--clip-weights" in message
    )


def test_named_weights_out_of_reach_are_refused_with_the_command(weights: Path, tmp_path: Path) -> None:
    models.as_if_trained(models.NAMED, clip_weights=weights).save(tmp_path / "bundle")
    with models.hub_at(models.closed_address(), tmp_path / "cache"), pytest.raises(WeightsError, match="hf download"):
        Detector.load(tmp_path / "bundle", captioner=False)


# --- variants --------------------------------------------------------------------------------------------------------


def variant(name: str) -> DetectorConfig:
    """A variant of the tiny recipe in the smallest size, its basis or bank made, the captioner on the hub by name."""
    small = replace(models.FROZEN, train_backbone=True)
    config = recipes.variant(replace(recipes.TINY, detector=small), name).detector
    made: Any = {"global": {"rank": 5}, "rank_k": {"bank": 8}}.get(config.projection.kind, {})
    return replace(
        config,
        projection=replace(config.projection, **made),
        captioner=configuration.CaptionerConfig(max_new_tokens=6),
    )


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    captioner_module.save_tiny_captioner(folder, seed=0)
    return folder


@pytest.mark.parametrize("name", [*recipes.VARIANTS, "rank-k:3", "linear:resize"])
def test_every_variant_is_saved_loaded_and_judges_an_image(name: str, captioner: Path, tmp_path: Path) -> None:
    """With captions, or without any captioner: the hub that would have it is out of reach."""
    config = variant(name)
    built = trained(config)
    models.randomise(built.network.visual, 9, std=0.02)
    built.save(tmp_path / "bundle")
    with models.hub_at(models.closed_address(), tmp_path / "cache"):
        loaded = Detector.load(tmp_path / "bundle", captioner=captioner if config.projection.needs_captions else None)
    assert loaded.config == config
    assert (loaded.captioner is None) == (not config.projection.needs_captions)
    image = models.image(3, 100, 90)
    (verdict,) = loaded.predict([image])
    scored(verdict)
    mosaic = select_mosaic(np.asarray(image), SCORING_SEED, config.patches)[None]
    if config.projection.needs_captions:
        assert verdict.caption
        expected = built.score(mosaic, [verdict.caption])
    else:
        assert verdict.caption is None
        expected = built.score(mosaic, None)
    assert verdict.logit == pytest.approx(expected.logit[0], abs=1e-5)
    assert verdict.residual_energy == pytest.approx(expected.residual_energy[0], abs=1e-5)
    assert (verdict.residual_energy == 1.0) == (config.projection.kind == "none")


@pytest.mark.parametrize("kind", WITHOUT_CAPTIONS)
def test_detector_without_captions_makes_no_thumbnail_and_takes_no_caption(kind: str, tmp_path: Path) -> None:
    trained(PROJECTIONS[kind]).save(tmp_path / "bundle")
    with models.hub_at(models.closed_address(), tmp_path / "cache"):
        loaded = Detector.load(tmp_path / "bundle")
    assert loaded.captioner is None and loaded.preparation().thumbnail_px == 0
    images = [models.image(seed) for seed in range(3)]
    verdicts = loaded.predict([images[0], b"no image", *images[1:]])
    assert [verdict.error_class for verdict in verdicts] == [None, "ImageUnidentifiedError", None, None]
    assert {verdict.caption for verdict in verdicts} == {None}
    mosaics = models.mosaics(2)
    assert np.array_equal(loaded.score(mosaics, None).logit, loaded.score(mosaics, WORDS[:2]).logit)


@pytest.mark.parametrize("kind", [kind for kind in PROJECTIONS if kind not in WITHOUT_CAPTIONS])
def test_detector_that_needs_captions_does_not_score_without(kind: str) -> None:
    with pytest.raises(ConfigError, match="needs a caption for each image") as caught:
        trained(PROJECTIONS[kind]).score(models.mosaics(1), None)
    models.one_line(caught.value)


def test_image_is_judged_by_its_middle_where_patches_are_not_chosen(tmp_path: Path) -> None:
    trained(variant("linear")).save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle")
    middle = np.asarray(models.image(3, 64, 64))
    framed = np.random.default_rng(0).integers(0, 256, (2, 101, 90, 3), dtype=np.uint8)
    framed[:, 18:82, 13:77] = middle  # round(18.5) = 18
    first, *others = loaded.predict([Image.fromarray(pixels) for pixels in (middle, *framed)])
    assert all(scored(other).logit == pytest.approx(first.logit, abs=1e-5) for other in others)
    moved = loaded.predict([Image.fromarray(np.roll(framed[0], 1, axis=0))])[0]
    assert abs(scored(moved).logit - first.logit) > 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("name", ["linear", "linear:resize"])
def test_published_linear_head_judges_features_of_the_stock_tower(name: str, tmp_path: Path) -> None:
    """UniversalFakeDetect: the frozen tower's feature of the middle, or in AIGIBench of the squashed image with
    ImageNet's mean and deviation, and one linear layer."""
    built = Detector.build(variant(name))
    probe = torch.nn.Linear(32, 1)
    models.randomise(probe, 5)
    built.network.head.classifier.load_state_dict(probe.state_dict())
    built.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle")
    image = models.image(4, 130, 90)
    stock = clip.load_clip(built.config.clip)
    if name == "linear":
        given, (mean, std) = center_crop(np.asarray(image), 64), (stock.mean, stock.std)
    else:
        given, (mean, std) = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)), IMAGENET
    pixels = torch.from_numpy(given.copy()).permute(2, 0, 1).float() / 255
    normal = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = float(probe(stock.visual(normal[None]))[0, 0])
    assert loaded.predict([image])[0].logit == pytest.approx(expected, abs=1e-5)


# --- predict ---------------------------------------------------------------------------------------------------------


def scored(verdict: Verdict) -> Verdict:
    assert verdict.status == "scored", verdict
    return verdict


def test_prediction_carries_all_that_is_known_of_the_image(detector: Detector) -> None:
    image = models.image(3, 90, 70)
    (verdict,) = detector.predict([models.file_bytes(image, "JPEG")])
    scored(verdict)
    assert (verdict.width, verdict.height, verdict.format) == (90, 70, "JPEG")
    assert verdict.threshold == 0.4 and verdict.verdict == ("fake" if verdict.prob_fake >= 0.4 else "real")  # type: ignore[operator]
    assert verdict.caption and set(verdict.caption.split()) <= set(captioner_module.TINY_WORDS)
    assert verdict.residual_energy is not None and 0 < verdict.residual_energy <= 1
    assert (verdict.error_stage, verdict.error_class, verdict.error_message) == (None, None, None)


def test_probability_is_the_sigmoid_of_logit_over_temperature(saved: Path) -> None:
    detector = Detector.load(saved)
    images = [models.image(seed) for seed in range(6)]
    for verdict in detector.predict(images):
        assert verdict.prob_fake == pytest.approx(1 / (1 + math.exp(-scored(verdict).logit / 0.5)), abs=1e-12)  # type: ignore[operator]
    probabilities = sorted(v.prob_fake for v in detector.predict(images))  # type: ignore[type-var]
    between = (probabilities[2] + probabilities[3]) / 2
    detector.set_calibration(Calibration(temperature=0.5, threshold=between))
    assert sorted(str(v.verdict) for v in detector.predict(images)) == ["fake"] * 3 + ["real"] * 3
    detector.set_calibration(Calibration(temperature=0.5, threshold=between, uncertain_margin=0.999))
    assert {v.verdict for v in detector.predict(images)} == {"uncertain"}


def bad_images(folder: Path) -> dict[str, tuple[Any, str]]:
    """Name -> (what is given to `predict`, class of the error)."""
    whole = models.file_bytes(models.image(1, 200, 200), "PNG")
    closed = models.image(2)
    closed.close()
    lazy = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    return {
        "missing path": (folder / "missing.png", "FetchError"),
        "missing string": (str(folder / "missing.png"), "FetchError"),
        "folder": (folder / "folder.png", "FetchError"),
        "path with a null": ("a\0b.png", "FetchError"),
        "too long a path": ("x" * 5000, "FetchError"),
        "empty file": (folder / "empty.png", "ImageEmptyError"),
        "no bytes": (b"", "ImageEmptyError"),
        "noise": (b"no image at all", "ImageUnidentifiedError"),
        "cut short": (whole[: len(whole) // 2], "ImageCorruptError"),
        "cut short, opened": (lazy, "ImageCorruptError"),
        "closed": (closed, "ImageCorruptError"),
        "no pixels": (Image.new("RGB", (0, 5)), "ImageCorruptError"),
    }


def test_bad_images_become_failed_verdicts_in_their_places(detector: Detector, tmp_path: Path) -> None:
    image = models.image(5)
    path = tmp_path / "good.png"
    image.save(path)
    good: list[Any] = [path, str(path), path.read_bytes(), image]
    (expected,) = detector.predict([path])
    inputs: list[tuple[Any, str | None]] = []
    for i, bad in enumerate(bad_images(tmp_path).values()):
        inputs += [bad, (good[i % 4], None)]
    for batch_size in (1, 3, 100):
        verdicts = detector.predict([given for given, _ in inputs], batch_size=batch_size)
        assert len(verdicts) == len(inputs)
        for verdict, (given, error) in zip(verdicts, inputs, strict=True):
            assert verdict.error_class == error, (given, verdict)
            if error is None:
                assert scored(verdict).prob_fake == pytest.approx(expected.prob_fake, abs=1e-5)
                assert verdict.caption == expected.caption
            else:
                assert verdict.status == "failed" and verdict.error_stage and verdict.error_message
                assert "\n" not in verdict.error_message
                assert (verdict.verdict, verdict.prob_fake, verdict.logit, verdict.threshold) == (None,) * 4


def test_nothing_but_bad_images_and_nothing_at_all_are_fine(detector: Detector, tmp_path: Path) -> None:
    verdicts = detector.predict([given for given, _ in bad_images(tmp_path).values()])
    assert {verdict.status for verdict in verdicts} == {"failed"}
    assert detector.predict([]) == []


def test_image_over_the_limit_is_a_failed_verdict(detector: Detector) -> None:
    verdicts = detector.predict(
        [models.image(0, 200, 100), models.image(0, 40, 40)], limits=DecodeLimits(max_pixels=5000)
    )
    assert [verdict.error_class for verdict in verdicts] == ["ImageTooLargeError", None]


def test_probability_does_not_depend_on_batch_order_or_neighbours(detector: Detector) -> None:
    sizes = [(96, 80), (33, 31), (1, 1), (300, 200), (64, 64), (50, 400), (31, 500), (128, 128)]
    images = [models.image(i, *sizes[i % 8]) for i in range(64)]  # one batch holds them all
    alone = detector.predict(images, batch_size=1)
    assert len({verdict.prob_fake for verdict in alone}) > 50
    order = np.random.default_rng(0).permutation(64)
    for batch_size in (8, 64):
        for chosen in (np.arange(64), order):
            verdicts = detector.predict([images[i] for i in chosen], batch_size=batch_size)
            for i, verdict in zip(chosen, verdicts, strict=True):
                assert scored(verdict).prob_fake == pytest.approx(alone[i].prob_fake, abs=1e-5)
                assert verdict.caption == alone[i].caption
                assert (verdict.width, verdict.height) == images[i].size


def test_same_image_scores_the_same_whatever_it_is_called_and_in_whatever_form(
    detector: Detector, tmp_path: Path
) -> None:
    content = models.file_bytes(models.image(8))
    names = ["real.png", "midjourney_fake_0001.png", "0_real", "a dog.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    verdicts = [detector.predict([given])[0] for given in (*(tmp_path / name for name in names), content)]
    assert len(set(verdicts)) == 1 and scored(verdicts[0])
    (opened,) = detector.predict([Image.open(io.BytesIO(content))])
    assert opened == replace(verdicts[0], c2pa_state=None)  # pixels have no file that states its origin


def test_loading_does_not_disturb_other_random_numbers(saved: Path) -> None:
    state = torch.random.get_rng_state()
    Detector.load(saved)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scoring_is_repeatable_to_the_last_bit(saved: Path, detector: Detector) -> None:
    images = [models.image(seed) for seed in range(5)]
    first = detector.predict(images)
    torch.manual_seed(12345)
    assert detector.predict(images) == first
    assert Detector.load(saved).predict(images) == first


def test_mosaics_may_be_read_only(detector: Detector) -> None:
    mosaics = models.mosaics(2)
    expected = detector.score(mosaics, WORDS[:2]).logit
    mosaics.flags.writeable = False
    assert np.array_equal(detector.score(mosaics, WORDS[:2]).logit, expected)


def test_image_without_a_caption_is_a_failed_verdict(saved: Path, tmp_path: Path) -> None:
    captioner_module.save_tiny_captioner(tmp_path, seed=0)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["text_decoder.cls.predictions.bias"][3] = 1e6  # [SEP] comes first, and ends every caption
    save_file(state, path, metadata={"format": "pt"})
    verdicts = Detector.load(saved, captioner=tmp_path).predict([models.image(1), b"", models.image(2)])
    assert [verdict.error_class for verdict in verdicts] == ["CaptionError", "ImageEmptyError", "CaptionError"]
    assert verdicts[0].error_stage == "caption" and verdicts[0].prob_fake is None


def test_detector_without_captioner_scores_but_does_not_predict(saved: Path) -> None:
    detector = Detector.load(saved, captioner=False)
    assert detector.score(models.mosaics(1), WORDS[:1]).logit.shape == (1,)
    for use in (
        lambda: detector.predict([b""]),
        detector.preparation,
        lambda: detector.predict_prepared([], PreparationConfig()),
    ):
        with pytest.raises(ConfigError, match="without its captioner"):
            use()


def test_captioner_in_the_bundle_goes_before_the_hub_and_the_given_one_before_both(tmp_path: Path) -> None:
    config = replace(
        models.FROZEN, captioner=configuration.CaptionerConfig(max_new_tokens=6)
    )  # the hub's BLIP, by name
    folder = tmp_path / "captioner"
    folder.mkdir()
    captioner_module.save_tiny_captioner(folder, seed=0)
    models.as_if_trained(config).save(tmp_path / "with", captioner=folder)
    models.as_if_trained(config).save(tmp_path / "without")
    with models.hub_at(models.closed_address(), tmp_path / "cache"):
        inside = Detector.load(tmp_path / "with")
        given = Detector.load(tmp_path / "without", captioner=folder)
        with pytest.raises(WeightsError, match="hf download Salesforce/blip-image-captioning-base"):
            Detector.load(tmp_path / "without")
        captioner_module.save_tiny_captioner(folder, seed=1)
        instead = Detector.load(tmp_path / "with", captioner=folder)
    said = [one.predict([models.image(0)])[0].caption for one in (inside, given, instead)]
    assert said[0] == said[1] != said[2]


LOADERS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path / "nowhere",
    "file": lambda path: path / "file",
}


@pytest.mark.parametrize("kind", LOADERS)
def test_path_that_is_no_bundle_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    path = LOADERS[kind](tmp_path)
    for given in (path, str(path)):
        with pytest.raises(BundleError, match="no detector bundle") as caught:
            Detector.load(given)
        assert models.one_line(caught.value)
