"""Removal: nothing but what this program made goes, whatever lies beside it, and no link is followed."""

import os
import subprocess
from pathlib import Path

import pytest

from jobs.runs import names, removal
from jobs.storage import listing, uris
from nsnet.errors import StorageError
from tests.support.tables import WRITE, put, rows_file

RUN_ID = "20260102T000000Z-abcdef"
ATTEMPT = "attempt-00000007"
STAGED = {
    "manifest.parquet": b"m",
    "run.json": b"{}",
    "run.json.partial-0a1b2c3d": b"{",
    f"{ATTEMPT}/accepted.json": b"[]",
    f"{ATTEMPT}/accepted.json.partial-0a1b2c3d": b"[",
    f"{ATTEMPT}/todo/part-000000.parquet": b"t",
    f"{ATTEMPT}/todo/part-1234567.parquet": b"t",
    rows_file(ATTEMPT): b"r",
    f"{ATTEMPT}/checkpoint/{WRITE}_000000.parquet": b"c",
    f"{ATTEMPT}/checkpoint/{WRITE}_000001.pending.parquet": b"p",
}
"""All that a run stages."""
FOREIGN = {
    "photo.jpg": b"x",
    "run.json/photo.jpg": b"x",
    "manifest.parquet.bak": b"x",
    "run.json.partial-mine": b"x",
    "holidays/2026/photo.jpg": b"x",
    "attempt-7/rows/a.parquet": b"x",
    f"{ATTEMPT}/photo.jpg": b"x",
    f"{ATTEMPT}/manifest.parquet": b"x",
    f"{ATTEMPT}/rows/photo.jpg": b"x",
    f"{ATTEMPT}/rows/data_000000-0.parquet": b"x",
    f"{ATTEMPT}/rows/deeper/{WRITE}_000000-0.parquet": b"x",
    f"{ATTEMPT}/todo/part-000000.parquet.txt": b"x",
    f"{ATTEMPT}/checkpoint/photo.jpg": b"x",
    "a[b]*?.txt": b"x",
}
"""What others may put beside it."""


def paths(place: str) -> list[str]:
    if uris.is_local(place) and not os.path.exists(place):
        return []
    return sorted(entry.uri.removeprefix(f"{place}/") for entry in listing.list_files(place))


def test_all_that_a_run_stages_goes_and_its_folder_with_it(place: str) -> None:
    put(place, STAGED)
    put(f"{place}-beside", {"manifest.parquet": b"x"})
    removed = removal.remove(place, names.STAGED)
    assert sorted(removed.removed) == sorted(f"{place}/{name}" for name in STAGED) and removed.foreign == []
    assert paths(place) == [] and not listing.is_folder(place)
    assert paths(f"{place}-beside") == ["manifest.parquet"]
    assert removal.remove(place, names.STAGED) == removal.remove(place, names.STAGED)  # gone is gone
    assert listing.names_below(place).folders == []


def test_what_others_put_beside_it_stays_and_is_named(place: str) -> None:
    foreign = {name: content for name, content in FOREIGN.items() if name != "run.json/photo.jpg"}
    put(place, STAGED | foreign)
    left = removal.remove(place, names.STAGED).foreign
    assert paths(place) == sorted(foreign)
    for name in foreign:  # by itself, or by the folder that holds it
        assert any(f"{place}/{name}".startswith(uri) for uri in left), name


def test_folder_with_the_name_of_a_file_of_ours_stays(tmp_path: Path) -> None:
    put(str(tmp_path), {"run.json/photo.jpg": b"x"})
    assert removal.remove(str(tmp_path), names.STAGED).foreign == [f"{tmp_path}/run.json/"]
    assert paths(str(tmp_path)) == ["run.json/photo.jpg"]


def test_what_is_to_be_kept_stays_without_being_named(place: str) -> None:
    put(place, {"part-00000-0a1b2c3d.parquet": b"1", "part-00001-0a1b2c3d.parquet": b"2"})
    removed = removal.remove(place, names.PARTS, keep=lambda name: name.startswith("part-00001"))
    assert paths(place) == ["part-00001-0a1b2c3d.parquet"] and removed.foreign == []


def test_dry_removal_removes_nothing(place: str) -> None:
    put(place, STAGED | {"photo.jpg": b"x"})
    removed = removal.remove(place, names.STAGED, dry=True)
    assert (removed.removed, removed.foreign) == ([], [f"{place}/photo.jpg"])
    assert paths(place) == sorted([*STAGED, "photo.jpg"])


@pytest.mark.parametrize("at", ["", ATTEMPT, f"{ATTEMPT}/rows"])
def test_link_to_a_folder_elsewhere_is_not_followed(at: str, tmp_path: Path) -> None:
    staging, elsewhere = tmp_path / "staging", tmp_path / "elsewhere"
    below = {name.removeprefix(at).lstrip("/"): content for name, content in STAGED.items() if name.startswith(at)}
    put(str(elsewhere), below)
    link = staging / at
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    removed = removal.remove(str(staging), names.STAGED)
    assert removed.removed == [] and removed.foreign == [str(link)]
    assert paths(str(elsewhere)) == sorted(below) and link.is_symlink()


def test_link_and_special_file_with_a_name_of_ours_stay(tmp_path: Path) -> None:
    put(str(tmp_path), {"elsewhere/photo.jpg": b"x"})
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "manifest.parquet").symlink_to(tmp_path / "elsewhere" / "photo.jpg")
    os.mkfifo(staging / "run.json")
    assert sorted(removal.remove(str(staging), names.STAGED).foreign) == [
        f"{staging}/manifest.parquet", f"{staging}/run.json"
    ]  # fmt: skip
    assert (staging / "manifest.parquet").is_symlink() and (staging / "run.json").exists()


def test_folder_that_is_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / RUN_ID).write_bytes(b"x")
    assert removal.remove(str(tmp_path / RUN_ID), names.STAGED).foreign == [f"{tmp_path}/{RUN_ID}"]
    assert (tmp_path / RUN_ID).read_bytes() == b"x"


def test_folders_of_others_may_be_deeper_than_python_recurses(tmp_path: Path) -> None:
    deep = tmp_path / "staging"
    deep.mkdir()
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        assert removal.remove(str(deep), names.STAGED).foreign == [f"{deep}/d/"]
    finally:  # shutil, with which pytest removes its folders some sessions later, does recurse
        subprocess.run(["rm", "-rf", str(deep)], check=True)


def test_disk_that_does_not_allow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), {"run.json": b"{}"})

    def refuse(name: str, **_: int) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be cleaned up: .*Permission denied: 'run.json'"):
        removal.remove(str(tmp_path), names.STAGED)


def test_line_names_the_first_and_counts_the_rest() -> None:
    assert removal.left_alone(["/b", "/a"]).endswith("made it: /a, /b")
    assert removal.left_alone([f"/{i}" for i in range(1003)]).endswith("made it: /0, /1, /10 and 1,000 more")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (RUN_ID, True), ("20260102T000000Z-ABCDEF", False), ("20260102T000000Z-abcde", False), ("", False),
        ("20261399T000000Z-abcdef", False), ("２０260102T000000Z-abcdef", False), (f"{RUN_ID}\n", False), (None, False),
        ([], False), (20260102, False), (f"../{RUN_ID}", False),
    ],
)  # fmt: skip
def test_run_ids_are_told_from_other_names(name: object, expected: bool) -> None:
    assert names.is_run_id(name) is expected
