"""Published models laid out for a mirror: the same identity, the same output, and nothing that is pickled."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsnet import captions, clip, clip_weights, digest, model_files, published, recipes
from nsnet.captioner import Captioner, save_tiny_captioner
from nsnet.configuration import CaptionerConfig, ClipConfig
from nsnet.errors import WeightsError
from nsnet.published import Layout
from tests.support import hub, models, towers
from tests.support.pickles import Harm

BLIP = CaptionerConfig(max_new_tokens=6)
SIGLIP = ClipConfig(model="ViT-B-16-SigLIP", pretrained="webli")


def assembled(layout: Layout, folder: Path) -> Path:
    """A layout as a mirror's reader assembles it."""
    folder.mkdir()
    for name, path in layout.files.items():
        shutil.copyfile(path, folder / name)
    if layout.origin is not None:
        digests = {name: digest.file_digest(path) for name, path in layout.files.items()}
        (folder / digest.ORIGIN).write_bytes(digest.origin_file(layout.origin, digests))
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "safetensors"])
def test_captioner_keeps_its_identity_and_its_captions(pickled: bool, tmp_path: Path, scratch: Path) -> None:
    """The pinned BLIP is a pickle: its mirror holds safetensors."""
    files = hub.captioner_files(tmp_path / "blip", pickled=pickled)
    snapshot = hub.add(tmp_path / "cache", hub.BLIP_REPOSITORY, hub.BLIP_REVISION, files)
    with hub.offline(tmp_path / "cache"):
        found = captions.find_captioner(BLIP)
        assert found == snapshot
        layout = published.lay_out_captioner(found, scratch)
        folder = assembled(layout, tmp_path / "copy")
    assert layout.revision == hub.BLIP_REVISION
    assert all(model_files.content_of("captioner", name).in_bundle for name in layout.files)  # type: ignore[union-attr]
    assert "model.safetensors" in layout.files and hub.PICKLED not in layout.files
    assert layout.origin is not None and dict(layout.origin).keys() == files.keys()  # other.json too
    assert captions.captioner_id(BLIP, folder) == captions.captioner_id(BLIP, snapshot)
    images = models.mosaics(3, captions.TINY_SIDE_PX)
    assert Captioner.load(BLIP, folder).caption(images) == Captioner.load(BLIP, snapshot).caption(images)


def test_folder_that_needs_no_change_names_no_origin(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "blip"
    folder.mkdir()
    save_tiny_captioner(folder, seed=0)
    layout = published.lay_out_captioner(folder, scratch)
    assert layout.origin is None and layout.revision == ""
    assert {*layout.files} == {path.name for path in folder.iterdir()}


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "blip"
    hub.captioner_files(folder)
    torch.save({**torch.load(folder / hub.PICKLED), "extra": Harm(tmp_path / "harmed")}, folder / hub.PICKLED)
    with pytest.raises(WeightsError, match="cannot be converted to safetensors") as caught:
        published.lay_out_captioner(folder, scratch)
    assert str(folder) in models.one_line(caught.value) and not (tmp_path / "harmed").exists()


def test_setting_that_is_not_allowed_is_refused_before_the_upload(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "blip"
    hub.captioner_files(folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}')
    with pytest.raises(WeightsError, match="tokenizer_config.json is refused: 'auto_map'"):
        published.lay_out_captioner(folder, scratch)


def test_tower_is_one_file_with_the_hubs_name(tmp_path: Path, scratch: Path) -> None:
    hub.fill(tmp_path / "cache", tmp_path / "made")
    with hub.offline(tmp_path / "cache"):
        found = clip_weights.find_weights(models.NAMED.clip)
    assert found is not None
    layout = published.lay_out_tower(models.NAMED.clip, found, scratch)
    assert {*layout.files} == {"open_clip_model.safetensors"} and layout.revision == hub.CLIP_REVISION
    path = assembled(layout, tmp_path / "copy") / "open_clip_model.safetensors"
    ids = {clip_weights.text_tower_id(models.NAMED.clip, weights) for weights in (found, path)}
    assert len(ids) == 1
    given = found.parent / "mine.safetensors"
    given.symlink_to(found)
    assert {*published.lay_out_tower(models.NAMED.clip, given, scratch).files} == {"open_clip_model.safetensors"}


def test_pickled_tower_becomes_a_folder_with_its_features_and_identity(tmp_path: Path, scratch: Path) -> None:
    source = clip.load_clip(models.FROZEN.clip)
    pickled = tmp_path / "pytorch_model.bin"
    state = {f"module.{name}": tensor for name, tensor in source.model.state_dict().items()}
    torch.save({"state_dict": state}, pickled)
    layout = published.lay_out_tower(models.NAMED.clip, pickled, scratch)
    folder = assembled(layout, tmp_path / "copy")
    assert {*layout.files} == {"open_clip_config.json", "open_clip_model.safetensors"}
    loaded = clip.load_clip(models.NAMED.clip, clip_weights.find_weights(models.NAMED.clip, folder))
    assert loaded.digest() == source.digest()
    assert loaded.mean == clip.load_clip(models.NAMED.clip, pickled).mean
    assert len({clip_weights.text_tower_id(models.NAMED.clip, path) for path in (pickled, folder)}) == 1


def test_pickled_tower_of_timm_becomes_safetensors(tmp_path: Path, scratch: Path) -> None:
    config = towers.timm_clip("dinov3_reduced")
    source = clip.load_clip(config)
    torch.save(source.visual.state_dict(), pickled := tmp_path / "weights.pth")
    layout = published.lay_out_tower(replace(config, pretrained="none"), pickled, scratch)
    (path,) = layout.files.values()
    assert {*layout.files} == {"model.safetensors"} and clip.load_clip(config, path).digest() == source.digest()


def test_tower_whose_tokenizer_is_on_the_hub_becomes_a_folder_that_holds_it(tmp_path: Path, scratch: Path) -> None:
    words = {path: content for path, content in hub.captioner_files(tmp_path / "words").items() if "token" in path}
    save_file({"logit_scale": torch.ones(1)}, file := tmp_path / "open_clip_model.safetensors")
    cache = tmp_path / "cache"
    hub.add(cache, "timm/ViT-B-16-SigLIP", "a" * 40, {**words, file.name: file.read_bytes()})
    with hub.offline(cache):
        found = clip_weights.find_weights(SIGLIP)
        assert found is not None
        layout = published.lay_out_tower(SIGLIP, found, scratch)
    folder = assembled(layout, tmp_path / "copy")
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= layout.files.keys()
    assert layout.origin == [["open_clip_model.safetensors", digest.file_digest(file)]]
    assert clip_weights.text_tower_id(SIGLIP, folder) == clip_weights.text_tower_id(SIGLIP, found)
    with model_files.opened(folder, "clip") as checked, hub.offline(tmp_path / "empty"):
        tokenizer = open_clip.get_tokenizer(f"local-dir:{checked}", local_files_only=True)
        assert isinstance(tokenizer, open_clip.tokenizer.HFTokenizer)
        assert tokenizer("a red house").max() < 200, "the tokenizer of few words"


@pytest.mark.parametrize("kind", ["captioner", "tower"])
@pytest.mark.parametrize("change", ["weights", "settings", "one more file", "one file less"])
def test_folder_that_was_changed_has_an_identity_of_its_own(
    kind: str, change: str, tmp_path: Path, scratch: Path
) -> None:
    """Its captions or features must not be taken for those of the published model."""
    if kind == "captioner":
        source, settings, more = tmp_path / "blip", "vocab.txt", "added_tokens.json"
        hub.captioner_files(source)
        folder = assembled(published.lay_out_captioner(source, scratch), tmp_path / "copy")
        weights = folder / "model.safetensors"

        def identity(path: Path) -> str:
            return captions.captioner_id(BLIP, path)
    else:
        source, settings, more = tmp_path / "pytorch_model.bin", "open_clip_config.json", "merges.txt"
        torch.save(clip.load_clip(models.FROZEN.clip).model.state_dict(), source)
        folder = assembled(published.lay_out_tower(models.NAMED.clip, source, scratch), tmp_path / "copy")
        weights = folder / "open_clip_model.safetensors"

        def identity(path: Path) -> str:
            return clip_weights.text_tower_id(models.NAMED.clip, path)

    assert identity(folder) == identity(source)
    if change == "weights":
        state = load_file(weights)
        next(iter(state.values())).add_(1.0)
        save_file(state, weights)
    elif change == "settings":
        with (folder / settings).open("a") as file:
            file.write("\n")
    elif change == "one more file":
        (folder / more).write_text("{}")
    else:
        (folder / settings).unlink()
    changed = identity(folder)
    assert changed != identity(source)
    (folder / digest.ORIGIN).unlink()
    assert identity(folder) == changed, "an origin that is not of these files does not count at all"


def test_origin_that_names_no_files_is_not_believed(tmp_path: Path) -> None:
    """The format of an earlier release."""
    folder = tmp_path / "blip"
    folder.mkdir()
    save_tiny_captioner(folder, seed=0)
    before = captions.captioner_id(BLIP, folder)
    (folder / digest.ORIGIN).write_text(json.dumps([["pytorch_model.bin", "0" * 64]]))
    assert captions.captioner_id(BLIP, folder) == before


def test_files_of_a_folder_are_hashed_once(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.captioner_files(tmp_path / "blip")
    folder = assembled(published.lay_out_captioner(tmp_path / "blip", scratch), tmp_path / "copy")
    hashed: list[str] = []
    file_digest = digest.file_digest

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(digest, "file_digest", counted)
    assert captions.captioner_id(BLIP, folder) == captions.captioner_id(BLIP, folder)
    assert sorted(hashed) == sorted({path.name for path in folder.iterdir()} - {digest.ORIGIN})


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "{}", '{"origin": [], "files": []}', '[["a", "b"]]', '[["a", "' + "0" * 63 + 'g"]]', "[" * 10_000],
)
def test_damaged_origin_is_refused(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "blip"
    folder.mkdir()
    save_tiny_captioner(folder, seed=0)
    (folder / digest.ORIGIN).write_text(content)
    with pytest.raises(WeightsError, match=r"origin\.json") as caught:
        captions.captioner_id(BLIP, folder)
    models.one_line(caught.value)


def test_names_of_models_and_recipes_that_need_them() -> None:
    assert str(published.tower(models.NAMED.clip)) == "clip ViT-B-32-quickgelu:openai"
    assert published.tower(models.FROZEN.clip) is None
    blip = published.captioner(BLIP)
    assert str(blip) == f"captioner {hub.BLIP_REPOSITORY}@{hub.BLIP_REVISION}"
    assert published.captioner(CaptionerConfig(model="a/b")).version == "main"  # type: ignore[union-attr]
    assert (
        blip is not None
        and blip.recipe == "vit-l-14"
        and recipes.get(blip.recipe).detector.captioner == CaptionerConfig()
    )
    others = [CaptionerConfig(model="a/b"), CaptionerConfig(revision="a" * 40)]
    assert [published.captioner(other).recipe for other in others] == [None, None]  # type: ignore[union-attr]
    timm = published.tower(ClipConfig(model="timm/test_vit", pretrained="r160_in1k"))
    assert timm is not None and timm.recipe == "timm/test_vit.r160_in1k"


def test_captioner_of_the_hubs_cache_loads_from_safetensors(tmp_path: Path) -> None:
    """The cache's names are links to files without a suffix."""
    files = hub.captioner_files(tmp_path / "blip", pickled=False)
    snapshot = hub.add(tmp_path / "cache", hub.BLIP_REPOSITORY, hub.BLIP_REVISION, files)
    assert load_file(snapshot / "model.safetensors")
    Captioner.load(BLIP, snapshot)
