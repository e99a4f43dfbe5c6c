"""CLIP towers: loaded, saved and identified, against stock open_clip and Hugging Face."""

import copy
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsnet import captioner as captioner_module
from nsnet import clip, clip_weights
from nsnet.configuration import ClipConfig
from nsnet.errors import ConfigError, WeightsError
from tests.support import models
from tests.support.models import features, pixels
from tests.support.pickles import Harm

SMALL = models.FROZEN.clip
CAPTIONS = ["a red boat on a lake", "two dogs", "", "the moon over a grey tower, seen from far away"]


# --- identity of the text tower -------------------------------------------------------------------------------------


def test_text_tower_of_equal_configuration_has_one_id() -> None:
    same = replace(SMALL, architecture=dict(reversed(list(models.ARCHITECTURE.items()))))
    found = clip_weights.text_tower_id(SMALL, None)
    assert found == clip_weights.text_tower_id(copy.deepcopy(SMALL), None) == clip_weights.text_tower_id(same, None)
    assert re.fullmatch("[0-9a-f]{16}", found)


def test_equal_ids_mean_equal_text_features_and_other_seeds_others(tmp_path: Path) -> None:
    models_of: dict[str, Tensor] = {}
    for config in (SMALL, copy.deepcopy(SMALL), replace(SMALL, seed=1), replace(SMALL, seed=2)):
        features = clip.load_clip(config).encode_text(CAPTIONS)
        known = models_of.setdefault(clip_weights.text_tower_id(config, None), features)
        assert torch.equal(known, features)
    assert len(models_of) == 3
    first, *others = models_of.values()
    assert all((first - other).abs().max() > 1e-3 for other in others)


def test_text_tower_of_another_seed_name_or_architecture_has_another_id() -> None:
    deeper = copy.deepcopy(models.ARCHITECTURE)
    deeper["text_cfg"]["layers"] += 1
    others = [
        SMALL,
        replace(SMALL, seed=1),
        replace(SMALL, model="other"),
        replace(SMALL, architecture=deeper),
        replace(SMALL, architecture=None),
    ]
    assert len({clip_weights.text_tower_id(config, None) for config in others}) == len(others)


def no_weights(folder: Path, **other: bytes) -> Path:
    """A folder in open_clip's format but for its content, which is no model; a few files may be other ones."""
    folder.mkdir(parents=True)
    files = {clip_weights.WEIGHTS_FILE: b"no weights at all", clip_weights.CONFIG_FILE: b"{}"}
    for name, content in (files | {f"{name}.json": content for name, content in other.items()}).items():
        (folder / name).write_bytes(content)
    return folder


def test_id_is_of_the_files_content_wherever_it_lies_and_nothing_is_loaded(tmp_path: Path) -> None:
    """The content is no model: whoever loaded it would fail."""
    one, same = no_weights(tmp_path / "one"), no_weights(tmp_path / "elsewhere" / "two")
    assert clip_weights.text_tower_id(SMALL, one) == clip_weights.text_tower_id(SMALL, same)
    file = one / clip_weights.WEIGHTS_FILE
    assert clip_weights.text_tower_id(SMALL, file) == clip_weights.text_tower_id(
        SMALL, same / clip_weights.WEIGHTS_FILE
    )
    # the seed decides nothing where there are weights
    assert clip_weights.text_tower_id(replace(SMALL, seed=5), file) == clip_weights.text_tower_id(SMALL, file)
    assert clip_weights.text_tower_id(SMALL, file) != clip_weights.text_tower_id(SMALL, None)
    with pytest.raises(WeightsError):
        clip.load_clip(SMALL, file)


def test_id_changes_with_any_file_of_the_weights(tmp_path: Path) -> None:
    folders = [
        no_weights(tmp_path / "as it is"),
        no_weights(tmp_path / "last byte"),
        no_weights(tmp_path / "one byte more"),
        no_weights(tmp_path / "tokenizer", tokenizer=b"{}"),
        no_weights(tmp_path / "other tokenizer", tokenizer=b"[]"),
        no_weights(tmp_path / "other configuration", open_clip_config=b"[]"),
    ]
    (folders[1] / clip_weights.WEIGHTS_FILE).write_bytes(b"no weights at alm")
    (folders[2] / clip_weights.WEIGHTS_FILE).write_bytes(b"no weights at all ")
    ids = [clip_weights.text_tower_id(SMALL, folder) for folder in folders]
    ids += [clip_weights.text_tower_id(SMALL, folder / clip_weights.WEIGHTS_FILE) for folder in folders[:3]]
    assert len(set(ids)) == len(ids)


# --- models and their weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> clip.Clip:
    loaded = clip.load_clip(SMALL)
    models.randomise(loaded.model, 7)
    return loaded


def image_features(model: clip.Clip, count: int = 2) -> Tensor:
    return features(model.visual, pixels(model.visual, count))


def test_random_weights_are_a_function_of_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first = clip.load_clip(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not disturb other random numbers"
    torch.rand(5)
    assert clip.load_clip(SMALL).digest() == first.digest()
    assert clip.load_clip(replace(SMALL, seed=1)).digest() != first.digest()


def test_facts_are_read_from_the_model(small: clip.Clip) -> None:
    assert (small.embed_dim, small.image_px) == (32, 64)
    assert small.mean == open_clip.OPENAI_DATASET_MEAN and small.std == open_clip.OPENAI_DATASET_STD
    assert not any(parameter.requires_grad for parameter in small.model.parameters()) and not small.model.training


def test_text_features_are_those_of_stock_open_clip(small: clip.Clip) -> None:
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)(CAPTIONS)
    expected = small.model.encode_text(tokens, normalize=False)  # type: ignore[operator]
    encoded = small.encode_text(CAPTIONS)
    assert encoded.dtype == torch.float32 and encoded.shape == (4, 32) and not encoded.requires_grad
    assert torch.equal(encoded, expected)
    assert (encoded[0] - encoded[1]).abs().max() > 1e-3


def test_digest_is_of_the_values_alone(small: clip.Clip) -> None:
    digest = small.digest()
    assert len(digest) == 64 and digest == small.digest()
    other = clip.load_clip(SMALL)
    other.model.load_state_dict(small.model.state_dict())
    assert other.digest() == digest
    for name in ("visual.conv1.weight", "logit_scale", "token_embedding.weight"):
        changed = clip.load_clip(SMALL)
        changed.model.load_state_dict(small.model.state_dict())
        tensor = changed.model.state_dict()[name].view(-1)
        tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(torch.inf))
        assert changed.digest() != digest, name


def save_as(kind: str, model: clip.Clip, folder: Path) -> Path:
    """Weights of a model in one of the forms that people have them in."""
    if kind == "local-dir":
        model.save(folder)
        return folder
    if kind == "safetensors":
        save_file(model.model.state_dict(), folder / "weights.safetensors")
        return folder / "weights.safetensors"
    state = model.model.state_dict()
    torch.save(
        state if kind == "pt" else {"state_dict": {f"module.{name}": state[name] for name in state}}, folder / kind
    )
    return folder / kind


@pytest.mark.parametrize("kind", ["local-dir", "safetensors", "pt", "checkpoint.pt"])
def test_saved_weights_load_again_as_the_same_model(kind: str, small: clip.Clip, tmp_path: Path) -> None:
    path = save_as(kind, small, tmp_path)
    loaded = clip.load_clip(SMALL, clip_weights.find_weights(SMALL, path))
    assert loaded.digest() == small.digest()
    assert torch.equal(image_features(loaded), image_features(small))
    assert torch.equal(loaded.encode_text(CAPTIONS), small.encode_text(CAPTIONS))
    assert (loaded.embed_dim, loaded.image_px, loaded.mean, loaded.std) == (
        small.embed_dim, small.image_px, small.mean, small.std
    )  # fmt: skip


def test_folder_brings_its_own_architecture_and_normalisation(small: clip.Clip, tmp_path: Path) -> None:
    small.save(tmp_path)
    described = json.loads((tmp_path / clip_weights.CONFIG_FILE).read_text())
    assert described["model_cfg"] == models.ARCHITECTURE
    described["preprocess_cfg"] = {"mean": [0.5, 0.25, 0.125], "std": [1.0, 0.5, 0.25]}
    (tmp_path / clip_weights.CONFIG_FILE).write_text(json.dumps(described))
    by_name = ClipConfig(model="ViT-B-32-quickgelu", pretrained="openai")
    loaded = clip.load_clip(by_name, tmp_path)
    assert (loaded.embed_dim, loaded.image_px) == (32, 64)
    assert loaded.mean == (0.5, 0.25, 0.125) and loaded.std == (1.0, 0.5, 0.25)
    loaded.save(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / clip_weights.CONFIG_FILE).read_text())["preprocess_cfg"]
        == described["preprocess_cfg"]
    )
    assert clip.load_clip(by_name, tmp_path / "again").digest() == small.digest()


def test_folder_with_a_hugging_face_tokenizer_keeps_it_when_saved(tmp_path: Path) -> None:
    text = {**models.ARCHITECTURE["text_cfg"], "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    source = clip.load_clip(replace(SMALL, architecture={**models.ARCHITECTURE, "text_cfg": text}))
    source.save(tmp_path / "first")
    captioner_module.save_tiny_captioner(tmp_path, seed=0)  # for its tokenizer of few words, unlike open_clip's own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "first" / name)
    by_name = ClipConfig(model="ViT-B-16-SigLIP", pretrained="webli")
    first = clip.load_clip(by_name, tmp_path / "first")
    assert isinstance(first.tokenizer, open_clip.tokenizer.HFTokenizer)
    first.save(tmp_path / "second")
    second = clip.load_clip(by_name, tmp_path / "second")
    assert first.tokenizer(CAPTIONS).max() < 200, "the tokenizer of few words must be in use"
    assert torch.equal(second.tokenizer(CAPTIONS), first.tokenizer(CAPTIONS))
    assert torch.equal(second.encode_text(CAPTIONS), first.encode_text(CAPTIONS))


def test_features_are_those_of_hugging_faces_clip_given_the_same_weights(tmp_path: Path) -> None:
    from transformers import CLIPModel

    architecture = {**models.ARCHITECTURE, "quick_gelu": True}
    config = replace(SMALL, architecture=architecture)
    source = clip.load_clip(config)
    models.randomise(source.model, 11, std=0.15)
    source.save(tmp_path)
    ours = clip.load_clip(config, tmp_path)
    theirs = CLIPModel(models.huggingface_clip_config(architecture)).eval()
    theirs.load_state_dict(models.huggingface_clip_state(load_file(tmp_path / clip_weights.WEIGHTS_FILE)))
    images = pixels(ours.visual, 4)
    with torch.no_grad():
        out = theirs(input_ids=ours.tokenizer(CAPTIONS), pixel_values=images)
    image, text = features(ours.visual, images), ours.encode_text(CAPTIONS)
    assert models.cosine(image, out.image_embeds) > 0.999999
    assert models.cosine(text, out.text_embeds) > 0.999999
    assert models.cosine(image[:1], image[1:2]) < 0.999 and models.cosine(text[:1], text[1:2]) < 0.999
    plain = clip.load_clip(replace(config, architecture=models.ARCHITECTURE), tmp_path / clip_weights.WEIGHTS_FILE)
    assert models.cosine(features(plain.visual, images), out.image_embeds) < 0.99999, "the activation must matter"


# --- weights that are missing, damaged or others ---------------------------------------------------------------------


DAMAGES: dict[str, Callable[[Path, clip.Clip], Path]] = {}


def damage(make: Callable[[Path, clip.Clip], Path]) -> Callable[[Path, clip.Clip], Path]:
    DAMAGES[make.__name__.replace("_", "-")] = make
    return make


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@damage
def empty_file(folder: Path, model: clip.Clip) -> Path:
    return put(folder / "weights.pt", b"")


@damage
def empty_safetensors(folder: Path, model: clip.Clip) -> Path:
    return put(folder / "weights.safetensors", b"")


@damage
def text_file(folder: Path, model: clip.Clip) -> Path:
    return put(folder / "weights.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@damage
def truncated_safetensors(folder: Path, model: clip.Clip) -> Path:
    path = save_as("safetensors", model, folder)
    return put(path, path.read_bytes()[:-100])


@damage
def truncated_checkpoint(folder: Path, model: clip.Clip) -> Path:
    path = save_as("pt", model, folder)
    return put(path, path.read_bytes()[:5000])


@damage
def list_of_tensors(folder: Path, model: clip.Clip) -> Path:
    torch.save(list(model.model.state_dict().values()), folder / "weights.pt")
    return folder / "weights.pt"


@damage
def empty_dictionary(folder: Path, model: clip.Clip) -> Path:
    torch.save({}, folder / "weights.pt")
    return folder / "weights.pt"


@damage
def other_dimensions(folder: Path, model: clip.Clip) -> Path:
    wider = {**models.ARCHITECTURE, "vision_cfg": {**models.ARCHITECTURE["vision_cfg"], "width": 80}}
    return save_as("safetensors", clip.load_clip(replace(SMALL, architecture=wider)), folder)


@damage
def missing_tensor(folder: Path, model: clip.Clip) -> Path:
    state = dict(model.model.state_dict())
    del state["visual.proj"]
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@damage
def folder_with_damaged_config(folder: Path, model: clip.Clip) -> Path:
    model.save(folder)
    put(folder / clip_weights.CONFIG_FILE, b'{"model_cfg": {')
    return folder


@damage
def folder_with_strange_setting(folder: Path, model: clip.Clip) -> Path:
    model.save(folder)
    put(folder / clip_weights.CONFIG_FILE, json.dumps({"model_cfg": {**models.ARCHITECTURE, "colour": 1}}).encode())
    return folder


@damage
def folder_without_weights(folder: Path, model: clip.Clip) -> Path:
    model.save(folder)
    (folder / clip_weights.WEIGHTS_FILE).unlink()
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_refused_in_one_line(kind: str, small: clip.Clip, tmp_path: Path) -> None:
    path = DAMAGES[kind](tmp_path, small)
    with pytest.raises(WeightsError) as caught:
        clip.load_clip(SMALL, clip_weights.find_weights(SMALL, path))
    assert str(path) in models.one_line(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("place", ["file", "folder"])
def test_pickle_with_code_is_refused_and_not_run(place: str, small: clip.Clip, tmp_path: Path) -> None:
    target, state = tmp_path / "harmed", {**small.model.state_dict(), "extra": Harm(tmp_path / "harmed")}
    path = tmp_path / "weights.pt"
    if place == "folder":
        small.save(tmp_path / "model")
        (tmp_path / "model" / clip_weights.WEIGHTS_FILE).unlink()
        path = tmp_path / "model"
    torch.save(state, path / "open_clip_pytorch_model.bin" if path.is_dir() else path)
    with pytest.raises(WeightsError) as caught:
        clip.load_clip(SMALL, clip_weights.find_weights(SMALL, path))
    message = models.one_line(caught.value)
    assert str(path) in message and "write_text" not in message.split(":")[0]
    assert "weights_only" not in message, "the message must not teach how to run the code"
    assert not target.exists()


def test_pickle_of_the_test_above_is_armed(small: clip.Clip, tmp_path: Path) -> None:
    """The only place that unpickles: were the file harmless, its refusal would prove nothing."""
    torch.save(Harm(tmp_path / "harmed"), tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "harmed").exists()


def test_missing_path_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist") as caught:
        clip_weights.find_weights(SMALL, tmp_path / "nothing.safetensors")
    assert "--clip-weights" in models.one_line(caught.value) and "nothing.safetensors" in str(caught.value)


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="open_clip_config.json") as caught:
        clip_weights.find_weights(SMALL, tmp_path)
    assert str(tmp_path) in models.one_line(caught.value)


def test_seeded_random_weights_need_no_file() -> None:
    assert clip_weights.find_weights(SMALL) is None


def test_unknown_tag_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no weights 'opnai' for ViT-L-14-quickgelu") as caught:
        clip_weights.find_weights(ClipConfig(pretrained="opnai"))
    assert "openai" in models.one_line(caught.value) and "dfn2b" in str(caught.value)


@pytest.mark.parametrize(("model", "tag"), [("ViT-L-14", "openai"), ("ViT-B-32", "openai"), ("ViT-H-14-378", "dfn5b")])
def test_weights_of_another_activation_are_refused(model: str, tag: str) -> None:
    with pytest.raises(ConfigError, match="quick_gelu") as caught:
        clip_weights.find_weights(ClipConfig(model=model, pretrained=tag))
    assert model in models.one_line(caught.value) and tag in str(caught.value)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises((ConfigError, WeightsError), match="ViT-Z-99"):
        clip.load_clip(ClipConfig(model="ViT-Z-99", pretrained=None))


def test_random_weights_are_not_announced_as_a_fault(logged: list[str]) -> None:
    clip.load_clip(SMALL)
    assert logged == []


# --- the hub ---------------------------------------------------------------------------------------------------------


PAPERS = ClipConfig()
REPOSITORY = "timm/vit_large_patch14_clip_224.openai"
REVISION = clip_weights.PINNED_REVISIONS[REPOSITORY]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one download needs."""

    content: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.answer(body=False)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.content.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.content, Hub.asked = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with models.hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"):
        yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def hub_failure(config: ClipConfig) -> str:
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        clip_weights.find_weights(config)
    assert time.monotonic() - started < 5, "a machine without network must not wait"
    return models.one_line(caught.value)


def test_hub_out_of_reach_gives_the_pinned_download_command_at_once(tmp_path: Path) -> None:
    with models.hub_at(models.closed_address(), tmp_path):
        message = hub_failure(PAPERS)
    assert f"hf download {REPOSITORY} open_clip_model.safetensors --revision {REVISION}" in message
    assert "--clip-weights" in message


def address_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_hub_that_never_answers_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsnet.hub.TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, models.hub_at(address_of(silent), tmp_path):
        assert f"hf download {REPOSITORY}" in hub_failure(PAPERS)


def test_weights_without_a_pinned_revision_name_the_repository(tmp_path: Path) -> None:
    with models.hub_at(models.closed_address(), tmp_path):
        message = hub_failure(ClipConfig(model="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    assert "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in message and "--revision" not in message


def test_repository_that_the_hub_does_not_know_is_said_to_be_so(hub: type[Hub]) -> None:
    message = hub_failure(PAPERS)
    assert "RepositoryNotFoundError" in message and f"hf download {REPOSITORY}" in message
    asked = [path for path in hub.asked if REPOSITORY in path]  # the client asks for other things once per process
    assert asked and all(REVISION in path for path in asked)


def test_weights_come_from_the_hub_at_the_pinned_revision_and_then_from_the_cache(
    hub: type[Hub], tmp_path: Path
) -> None:
    hub.content = {f"/{REPOSITORY}/resolve/{REVISION}/open_clip_model.safetensors": b"weights"}
    found = clip_weights.find_weights(PAPERS)
    assert found is not None and found.read_bytes() == b"weights"
    hub.asked.clear()
    assert clip_weights.find_weights(PAPERS) == found
    assert not hub.asked, "what is in the cache needs no network"
