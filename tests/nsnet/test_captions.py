"""Captions by BLIP: the same for any batch, the same as transformers' own, and clear about what is missing."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nsnet import captioner as captioner_module
from nsnet import captions, images
from nsnet.captioner import Captioner
from nsnet.configuration import CaptionerConfig
from nsnet.errors import ConfigError, WeightsError
from tests.support import models
from tests.support.pickles import Harm

TINY = CaptionerConfig(model=None, max_new_tokens=8)
BLIP = CaptionerConfig()
REVISION = captions.PINNED_REVISIONS["Salesforce/blip-image-captioning-base"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioner")
    captioner_module.save_tiny_captioner(path, seed=0)
    return path


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.load(TINY, folder)


@pytest.fixture(scope="module")
def thumbnails() -> NDArray[np.uint8]:
    pixels = [np.asarray(models.image(seed)) for seed in range(64)]
    return np.stack([images.thumbnail(one, captions.TINY_SIDE_PX) for one in pixels])


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def test_tiny_captioner_survives_a_round_trip_through_a_folder(
    captioner: Captioner, thumbnails: NDArray[np.uint8], tmp_path: Path
) -> None:
    captioner.save(tmp_path)
    loaded = Captioner.load(TINY, tmp_path)
    assert loaded.caption(thumbnails) == captioner.caption(thumbnails)
    assert loaded.thumbnail_px == captioner.thumbnail_px == captions.thumbnail_px(tmp_path) == captions.TINY_SIDE_PX
    assert torch.equal(loaded.mean, captioner.mean) and torch.equal(loaded.std, captioner.std)


def test_tiny_captioner_is_a_function_of_its_seed(captioner: Captioner, thumbnails: NDArray[np.uint8]) -> None:
    state = torch.random.get_rng_state()
    same, other = Captioner.load(TINY), Captioner.load(replace(TINY, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not disturb other random numbers"
    assert same.caption(thumbnails) == captioner.caption(thumbnails) != other.caption(thumbnails)


def test_loading_the_tiny_captioner_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    transformers.utils.logging.enable_progress_bar()
    Captioner.load(TINY)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", ""), "a library prints nothing"


@pytest.mark.parametrize("batch_size", [8, 64])
def test_caption_does_not_depend_on_the_batch(
    batch_size: int, captioner: Captioner, thumbnails: NDArray[np.uint8]
) -> None:
    alone = [caption for one in thumbnails for caption in captioner.caption(one[None])]
    order = np.random.default_rng(batch_size).permutation(64)
    for chosen in (np.arange(64), np.arange(64)[::-1], order):
        batched: list[str | None] = []
        for start in range(0, 64, batch_size):
            batched += captioner.caption(thumbnails[chosen[start : start + batch_size]])
        assert batched == [alone[i] for i in chosen]
    assert len(set(alone)) > 20, "the captions must differ, or this proves nothing"


def test_every_caption_is_words_of_the_vocabulary(captioner: Captioner, thumbnails: NDArray[np.uint8]) -> None:
    for caption in captioner.caption(thumbnails):
        assert caption is not None
        words = caption.split(" ")
        assert 1 <= len(words) <= TINY.max_new_tokens and set(words) <= set(captioner_module.TINY_WORDS)


@pytest.mark.parametrize("limit", [1, 3])
def test_caption_is_no_longer_than_allowed(limit: int, folder: Path, thumbnails: NDArray[np.uint8]) -> None:
    short = Captioner.load(replace(TINY, max_new_tokens=limit), folder).caption(thumbnails[:4])
    assert [len(str(caption).split()) for caption in short] == [limit] * 4


def test_caption_without_a_word_is_none(copied: Path, thumbnails: NDArray[np.uint8]) -> None:
    def let_the_end_win(state: dict[str, torch.Tensor]) -> None:
        state["text_decoder.cls.predictions.bias"][3] = 1e6  # [SEP]

    rewrite(copied, let_the_end_win)
    assert Captioner.load(TINY, copied).caption(thumbnails[:3]) == [None, None, None]


def test_pixels_reach_the_model_as_hugging_faces_processor_makes_them(captioner: Captioner, folder: Path) -> None:
    from transformers import BlipImageProcessorPil

    processor = BlipImageProcessorPil.from_pretrained(folder)
    seen: list[torch.Tensor] = []
    hook = captioner.model.vision_model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        for seed, (width, height) in enumerate([(96, 80), (64, 64), (40, 300), (700, 500)]):
            image = models.image(seed, width, height)
            captioner.caption(images.thumbnail(np.asarray(image), captioner.thumbnail_px)[None])
            expected = processor(images=image, return_tensors="pt")["pixel_values"]
            assert expected.std() > 0.3
            torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=0)
    finally:
        hook.remove()


def test_captions_are_those_of_a_plain_transformers_loop(captioner: Captioner, folder: Path) -> None:
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    model = BlipForConditionalGeneration.from_pretrained(folder)
    files = [models.image(seed, 50 + 10 * seed, 90) for seed in range(12)]
    expected = []
    for image in files:
        out = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=TINY.max_new_tokens)
        expected.append(processor.decode(out[0], skip_special_tokens=True))
    thumbnails = np.stack([images.thumbnail(np.asarray(image), captioner.thumbnail_px) for image in files])
    assert captioner.caption(thumbnails) == expected
    assert len(set(expected)) > 6


def test_weights_in_pytorchs_format_are_read_as_tensors_only(
    captioner: Captioner, copied: Path, thumbnails: NDArray[np.uint8]
) -> None:
    state = load_file(copied / WEIGHTS)
    (copied / WEIGHTS).unlink()
    torch.save(state, copied / "pytorch_model.bin")
    assert Captioner.load(TINY, copied).caption(thumbnails[:8]) == captioner.caption(thumbnails[:8])


def test_pickle_with_code_is_refused_and_not_run(copied: Path, tmp_path: Path) -> None:
    state = load_file(copied / WEIGHTS)
    (copied / WEIGHTS).unlink()
    torch.save({**state, "extra": Harm(tmp_path / "harmed")}, copied / "pytorch_model.bin")
    with pytest.raises(WeightsError) as caught:
        Captioner.load(TINY, copied)
    assert str(copied) in models.one_line(caught.value)
    assert "weights_only" not in str(caught.value), "the message must not teach how to run the code"
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("shape", [(64, 64, 3), (2, 32, 32, 3), (2, 3, 64, 64), (2, 64, 64, 4), (1, 64, 32, 3)])
def test_wrong_thumbnail_shape_is_refused(shape: tuple[int, ...], captioner: Captioner) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 64, 64, 3\)") as caught:
        captioner.caption(np.zeros(shape, dtype=np.uint8))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("wrong", [0, -1, 513])
def test_caption_length_out_of_range_is_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"max_new_tokens must be between 1 and 512, got {wrong}"):
        CaptionerConfig(max_new_tokens=wrong)


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_that_of_the_files_wherever_they_lie(folder: Path, copied: Path) -> None:
    first = captions.captioner_id(TINY, folder)
    assert len(first) == 16 and set(first) <= set("0123456789abcdef")
    assert captions.captioner_id(TINY, copied) == first
    (copied / "README.md").write_text("how it was trained")  # no caption depends on it
    assert captions.captioner_id(TINY, copied) == first


def test_identity_follows_every_weight(folder: Path, copied: Path) -> None:
    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["vision_model.post_layernorm.bias"][7] += 1e-6

    rewrite(copied, nudge)
    assert captions.captioner_id(TINY, copied) != captions.captioner_id(TINY, folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "vocab.txt", "tokenizer.json", "config.json"])
def test_identity_follows_the_files_around_the_weights(name: str, folder: Path, copied: Path) -> None:
    with (copied / name).open("a") as file:
        file.write("\n")
    assert captions.captioner_id(TINY, copied) != captions.captioner_id(TINY, folder)


def test_identity_follows_the_name_of_a_file(folder: Path, copied: Path) -> None:
    (copied / WEIGHTS).rename(copied / "other.safetensors")
    assert captions.captioner_id(TINY, copied) != captions.captioner_id(TINY, folder)


def test_identity_follows_the_length_of_captions(folder: Path) -> None:
    ids = {captions.captioner_id(replace(TINY, max_new_tokens=n), where) for n in (7, 8, 9) for where in (folder, None)}
    assert len(ids) == 6


def test_identity_of_the_tiny_captioner_is_its_seed(folder: Path) -> None:
    first, other = (captions.captioner_id(replace(TINY, seed=seed), None) for seed in (0, 1))
    assert first == captions.captioner_id(TINY, None) != other
    # a folder's own weights count, not the seed with which the configuration would make others
    assert captions.captioner_id(TINY, folder) == captions.captioner_id(replace(TINY, seed=1), folder)


# --- what is missing or damaged --------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        Captioner.load(TINY, folder)
    assert caught.value.exit_code == 2
    message = models.one_line(caught.value)
    assert str(folder) in message
    return message


@pytest.mark.parametrize("names", captions.NEEDED_FILES, ids=lambda names: names[0])
def test_missing_file_is_named(names: tuple[str, ...], copied: Path) -> None:
    for name in names:
        (copied / name).unlink(missing_ok=True)
    assert " or ".join(names) in refused(copied)


def test_missing_folder_is_refused_with_what_belongs_in_it(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere")
    assert "--captioner" in message and all(names[0] in message for names in captions.NEEDED_FILES)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe damaged"], ids=["empty", "cut", "list", "noise"])
def test_damaged_file_is_refused_in_one_line(name: str, content: bytes, copied: Path) -> None:
    (copied / name).write_bytes(content)
    message = refused(copied)
    assert name in message or (name == WEIGHTS and "SafetensorError" in message)


def test_weights_cut_short_are_refused(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content[:-1000])
    assert "SafetensorError" in refused(copied)


def test_missing_weights_are_counted(copied: Path) -> None:
    def forget(state: dict[str, torch.Tensor]) -> None:
        del state["vision_model.post_layernorm.weight"], state["vision_model.post_layernorm.bias"]

    rewrite(copied, forget)
    assert "lacks 2 weights" in refused(copied)


def test_weights_of_another_size_are_refused(copied: Path) -> None:
    def widen(state: dict[str, torch.Tensor]) -> None:
        state["vision_model.post_layernorm.weight"] = torch.ones(80)

    rewrite(copied, widen)
    refused(copied)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [None, "half", [0.5]], ids=["absent", "text", "short"])
def test_normalisation_that_makes_no_sense_is_refused(name: str, value: Any, copied: Path) -> None:
    path = copied / "preprocessor_config.json"
    described = json.loads(path.read_text())
    del described[name]
    path.write_text(json.dumps(described if value is None else {**described, name: value}))
    assert "preprocessor_config.json" in refused(copied)


def test_thumbnail_side_needs_no_weights(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    assert captions.thumbnail_px(copied) == 64 == captions.thumbnail_px(None)
    (copied / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(WeightsError, match="does not describe a BLIP model") as caught:
        captions.thumbnail_px(copied)
    assert "config.json" in models.one_line(caught.value)


# --- the hub ---------------------------------------------------------------------------------------------------------


def fill_cache(cache: Path, folder: Path) -> Path:
    """Lay a captioner down where the hub's client keeps what it has fetched."""
    snapshot = cache / "models--Salesforce--blip-image-captioning-base" / "snapshots" / REVISION
    shutil.copytree(folder, snapshot)
    return snapshot


def test_hub_out_of_reach_gives_the_pinned_download_command_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with models.hub_at(models.closed_address(), tmp_path), pytest.raises(WeightsError) as caught:
        captions.find_captioner(BLIP)
    assert time.monotonic() - started < 5, "a machine without network must not wait"
    message = models.one_line(caught.value)
    assert f"hf download Salesforce/blip-image-captioning-base --revision {REVISION}" in message
    assert "--captioner" in message


def test_revision_that_was_asked_for_is_in_the_message(tmp_path: Path) -> None:
    with models.hub_at(models.closed_address(), tmp_path), pytest.raises(WeightsError, match="--revision abc123 "):
        captions.find_captioner(replace(BLIP, revision="abc123"))


@pytest.mark.parametrize(("model", "revision"), [("stranger/blip", None), (BLIP.model, "a" * 40), ("a/b", "a" * 40)])
def test_captioner_that_is_not_pinned_is_taken_from_the_cache_alone(
    model: str, revision: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of a stranger may name it: whoever trusts it fetches it by hand."""
    config = replace(BLIP, model=model, revision=revision)
    with models.hub_at(models.closed_address(), tmp_path):
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
        with pytest.raises(WeightsError, match="if you trust it, run: hf download") as caught:
            captions.find_captioner(config)
        assert "--captioner" in models.one_line(caught.value)
        cached = tmp_path / f"models--{model.replace('/', '--')}"
        shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("a" * 40)
        assert captions.find_captioner(config) == cached / "snapshots" / ("a" * 40)


def test_cached_captioner_needs_no_network(
    folder: Path, captioner: Captioner, thumbnails: NDArray[np.uint8], tmp_path: Path
) -> None:
    with models.hub_at(models.closed_address(), tmp_path):
        snapshot = fill_cache(tmp_path, folder)
        assert captions.find_captioner(BLIP) == snapshot
        cached = Captioner.load(replace(BLIP, max_new_tokens=8))
    assert cached.caption(thumbnails[:4]) == captioner.caption(thumbnails[:4])


def test_cached_captioner_without_weights_is_not_taken_for_whole(folder: Path, tmp_path: Path) -> None:
    with models.hub_at(models.closed_address(), tmp_path):
        (fill_cache(tmp_path, folder) / WEIGHTS).unlink()
        with pytest.raises(WeightsError, match="hf download"):
            captions.find_captioner(BLIP)


def test_folder_goes_before_the_hub_and_the_hub_before_the_tiny_captioner(folder: Path) -> None:
    assert captions.find_captioner(BLIP, folder) == folder
    assert captions.find_captioner(TINY) is None


def test_thumbnails_may_be_read_only(captioner: Captioner, thumbnails: NDArray[np.uint8]) -> None:
    frozen = thumbnails[:2].copy()
    frozen.flags.writeable = False
    assert captioner.caption(frozen) == captioner.caption(thumbnails[:2])
