"""A mirror of weights: what is written and when, what is copied again, and what a hostile or damaged one may do."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.storage import listing, mirror, reading, writing
from jobs.storage.mirror import Entry, MirroredFile
from jobs.storage.uris import Uri, join
from nsnet import captions
from nsnet.errors import WeightsError
from nsnet.published import PublishedModel
from tests.support.models import one_line
from tests.support.tables import put

TOWER = PublishedModel(kind="clip", model="timm/x", version="a")
BLIP = PublishedModel(kind="captioner", model="someone/blip", version="b" * 40)
BLIP_FILES = {"config.json": b"{}", "vocab.txt": b"a\n", "model.safetensors": b"weights of blip"}
COMMAND = "where there is internet, run nsnet weights mirror --to M --recipe R"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def described(model: PublishedModel, files: Mapping[str, bytes], origin: Any = None) -> Entry:
    return Entry(
        model=model,
        revision="",
        files={
            name: MirroredFile(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        },
        origin=origin,
    )


def upload(to: str, model: PublishedModel, files: Mapping[str, bytes], scratch: Path, origin: Any = None) -> list[str]:
    """Mirror files; returns the names of those that were copied."""
    put(str(scratch), files)
    paths = {name: scratch / name for name in files}
    return [name for name, copied in mirror.upload(Uri(to), described(model, files, origin), paths) if copied]


def contents(place: str) -> dict[str, bytes]:
    return {
        entry.uri.removeprefix(f"{place}/"): reading.read_bytes(entry.uri) for entry in listing.list_files(Uri(place))
    }


def test_model_is_what_it_was_and_a_second_mirror_copies_nothing(place: str, tmp_path: Path, cache: Path) -> None:
    put(place, {"models/README.md": b"of others", "files/of-others": b"1", "elsewhere": b"2"})
    assert upload(place, BLIP, BLIP_FILES, tmp_path / "a") == [*BLIP_FILES]
    before = contents(place)
    assert len(before) == 3 + len(BLIP_FILES) + 1
    assert upload(place, BLIP, BLIP_FILES, tmp_path / "a") == []
    assert contents(place) == before
    folder = mirror.fetch(Uri(place), BLIP, COMMAND)
    assert folder.parent == cache and contents(str(folder)) == BLIP_FILES
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    assert mirror.descriptions(Uri(place)) == [mirror.description_uri(Uri(place), BLIP)]


def test_tower_of_one_file_is_its_path_and_models_share_files(place: str, tmp_path: Path, cache: Path) -> None:
    files = {"model.safetensors": BLIP_FILES["model.safetensors"]}
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    assert upload(place, TOWER, files, tmp_path / "b") == []
    assert mirror.fetch(Uri(place), TOWER, COMMAND).read_bytes() == files["model.safetensors"]


def test_origin_of_a_layout_lies_in_its_folder(place: str, tmp_path: Path, cache: Path) -> None:
    origin = [["pytorch_model.bin", "0" * 64], ["vocab.txt", hashlib.sha256(b"a\n").hexdigest()]]
    upload(place, BLIP, BLIP_FILES, tmp_path / "a", origin)
    folder = mirror.fetch(Uri(place), BLIP, COMMAND)
    digests = {name: file.sha256 for name, file in described(BLIP, BLIP_FILES).files.items()}
    assert json.loads((folder / "origin.json").read_text()) == {"origin": origin, "files": digests}
    assert captions.identity_files(folder) == origin
    moved = tmp_path / "mine"
    shutil.copytree(folder, moved)
    assert captions.identity_files(moved) == origin, "a copy of the folder is the same model"
    moved.chmod(0o755)
    (moved / "model.safetensors").unlink()
    (moved / "model.safetensors").write_bytes(b"other weights")
    assert dict(captions.identity_files(moved)) == {
        **digests,
        "model.safetensors": hashlib.sha256(b"other weights").hexdigest(),
    }


def test_interrupted_upload_continues(place: str, tmp_path: Path, cache: Path) -> None:
    entry, paths = described(BLIP, BLIP_FILES), {name: tmp_path / "a" / name for name in BLIP_FILES}
    put(str(tmp_path / "a"), BLIP_FILES)
    for number, _ in enumerate(mirror.upload(Uri(place), entry, paths)):
        if number == 1:
            break
    with pytest.raises(WeightsError, match=f"does not hold captioner someone/blip.*{COMMAND}"):
        mirror.fetch(Uri(place), BLIP, COMMAND)
    assert upload(place, BLIP, BLIP_FILES, tmp_path / "a") == ["model.safetensors"]
    mirror.fetch(Uri(place), BLIP, COMMAND)


def test_file_of_another_size_is_copied_again(place: str, tmp_path: Path, cache: Path) -> None:
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    entry = described(BLIP, BLIP_FILES)
    writing.write_bytes(mirror.file_uri(Uri(place), entry.files["vocab.txt"]), b"")
    assert upload(place, BLIP, BLIP_FILES, tmp_path / "a") == ["vocab.txt"]


def test_model_that_is_mirrored_does_not_change(place: str, tmp_path: Path, cache: Path) -> None:
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"with other files \(vocab\.txt differ\)") as caught:
        upload(place, BLIP, {**BLIP_FILES, "vocab.txt": b"b\n"}, tmp_path / "b")
    assert "does not change" in one_line(caught.value)


def test_mirrors_that_are_written_at_the_same_time_lose_no_model(place: str, tmp_path: Path, cache: Path) -> None:
    models = [PublishedModel(kind="captioner", model="someone/blip", version=f"v{i}") for i in range(4)]

    def one(i: int) -> None:
        upload(place, models[i % 4], {**BLIP_FILES, "vocab.txt": f"{i % 4}".encode()}, tmp_path / str(i))

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(one, range(8))]
    for model in models:
        assert (mirror.fetch(Uri(place), model, COMMAND) / "vocab.txt").read_text() == model.version[1]


def test_file_with_one_byte_changed_is_refused_by_name_and_not_kept(place: str, tmp_path: Path, cache: Path) -> None:
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    file = described(BLIP, BLIP_FILES).files["model.safetensors"]
    uri = mirror.file_uri(Uri(place), file)
    writing.write_bytes(uri, b"Weights of blip")
    with pytest.raises(WeightsError) as caught:
        mirror.fetch(Uri(place), BLIP, COMMAND)
    message, found = one_line(caught.value), hashlib.sha256(b"Weights of blip").hexdigest()
    assert all(part in message for part in (uri, "model.safetensors", found, file.sha256, "nsnet weights check"))
    assert [*cache.iterdir()] == []
    writing.write_bytes(uri, b"weights of blip")
    mirror.fetch(Uri(place), BLIP, COMMAND)


@pytest.mark.parametrize("damage", ["longer", "shorter", "missing"])
def test_file_of_a_wrong_size_is_refused(damage: str, place: str, tmp_path: Path, cache: Path) -> None:
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    uri = mirror.file_uri(Uri(place), described(BLIP, BLIP_FILES).files["model.safetensors"])
    if damage == "missing":
        writing.remove_file(uri)
    else:
        writing.write_bytes(uri, b"weights of blip and more"[: 24 if damage == "longer" else 3])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        mirror.fetch(Uri(place), BLIP, COMMAND)
    assert [*cache.iterdir()] == []


def hostile(**changes: Any) -> bytes:
    return json.dumps({**described(BLIP, BLIP_FILES).as_json(), **changes}).encode()


FILE = {"size_bytes": 3, "sha256": "0" * 64}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a path above": (hostile(files={"../x": FILE}), "'../x', which does not belong"),
    "an absolute path": (hostile(files={"/etc/passwd": FILE}), "does not belong"),
    "a pickle": (hostile(files={"pytorch_model.bin": FILE}), "'pytorch_model.bin', which does not belong"),
    "code": (hostile(files={"modeling.py": FILE}), "does not belong"),
    "its own origin": (hostile(files={"origin.json": FILE}), "does not belong"),
    "many files": (hostile(files={f"model-{i:05}-of-00999.safetensors": FILE for i in range(999)}), "names 999 files"),
    "huge JSON": (b'{"files": {' + b'"a": 1, ' * 200_000 + b'"b": 1}}', "larger than 1,048,576 bytes"),
    "deep JSON": (b'{"files": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
    "no JSON": (b"\xff\xfe", "damaged"),
    "a list": (b"[]", "instead of an object"),
    "a huge file": (hostile(files={"vocab.txt": {**FILE, "size_bytes": 10**12}}), "no size from 1 to"),
    "a size that is true": (hostile(files={"vocab.txt": {**FILE, "size_bytes": True}}), "no size from 1 to"),
    "a hash that is a path": (hostile(files={"vocab.txt": {**FILE, "sha256": "../../x"}}), "or no SHA-256"),
    "a file that is a list": (hostile(files={"vocab.txt": []}), "or no SHA-256"),
    "another model": (hostile(model="someone/else"), "describes 'captioner someone/else"),
    "another kind": (hostile(kind="lora"), "describes 'lora"),
    "another version": (hostile(format_version=2), "format version 2"),
    "another origin": (hostile(origin=[["vocab.txt", "0" * 64]]), "its origin is not"),
    "an origin of texts": (hostile(origin=["a"]), "its origin is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_description_is_refused_in_one_line(name: str, tmp_path: Path, cache: Path) -> None:
    content, message = HOSTILE[name]
    target = mirror.description_uri(Uri(str(tmp_path / "mirror")), BLIP)
    writing.write_bytes(target, content)
    with pytest.raises(WeightsError) as caught:
        mirror.fetch(Uri(str(tmp_path / "mirror")), BLIP, COMMAND)
    assert message in one_line(caught.value) and target in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize("part", ["description", "file"])
def test_link_in_a_mirror_is_refused(part: str, tmp_path: Path, cache: Path) -> None:
    place = Uri(str(tmp_path / "mirror"))
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    file = described(BLIP, BLIP_FILES).files["vocab.txt"]
    path = Path(mirror.description_uri(place, BLIP) if part == "description" else mirror.file_uri(place, file))
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(WeightsError, match="is a link"):
        mirror.fetch(place, BLIP, COMMAND)


def test_fifo_in_a_mirror_hangs_nothing(tmp_path: Path, cache: Path) -> None:
    place = Uri(str(tmp_path / "mirror"))
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    path = Path(mirror.file_uri(place, described(BLIP, BLIP_FILES).files["vocab.txt"]))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        mirror.fetch(place, BLIP, COMMAND)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (TOWER, "clip--timm--x--a.json"),
        (PublishedModel(kind="captioner", model="a..b", version="..."), "captioner--a..b--....json"),
    ],
)
def test_description_has_the_name_of_its_model(model: PublishedModel, name: str) -> None:
    assert mirror.description_uri(Uri("s3://b"), model) == join("s3://b", "models", name)
