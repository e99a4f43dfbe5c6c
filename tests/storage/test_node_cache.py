"""Files that a node fetches once: by one of many processes, whole or not at all, and again if the disk changed them."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.storage import mirror, node_cache
from jobs.storage.node_cache import Refusal, Wanted
from jobs.storage.uris import Uri
from nsnet.errors import StorageError, WeightsError
from nsnet.published import PublishedModel
from tests.storage.test_mirror import BLIP, BLIP_FILES, described, upload
from tests.support.models import one_line
from tests.support.proxy import Action, Always, FaultyProxy
from tests.support.tables import new_bucket

REPO_ROOT = Path(__file__).parents[2]
REFUSAL = Refusal(what="the thing", error=WeightsError)
WAIT_SECONDS = 60.0
WORKER = """
import json, sys, time
from pathlib import Path
from jobs.storage import mirror
from jobs.storage.uris import Uri
from nsnet.published import PublishedModel
place, model, ready, go = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
ready.touch()
while not go.exists():
    time.sleep(0.001)
print(mirror.fetch(Uri(place), PublishedModel(**model), "?"), flush=True)
"""
"""A process of a worker that loads a model from a mirror; it waits for the file `go`."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


def wanted(path: Path, content: bytes) -> Wanted:
    path.write_bytes(content)
    return Wanted(uri=Uri(str(path)), sha256=hashlib.sha256(content).hexdigest(), max_bytes=len(content))


def fetch(source: Path, content: bytes = b"content") -> Path:
    files = {"lora/a.bin": wanted(source, content)}
    return node_cache.fetch_once("things", "name", files, {"note": b"added"}, REFUSAL)


def writable(folder: Path) -> None:
    """Let its owner change a cached folder."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "added changed", "a link"])
def test_cached_file_that_the_disk_changed_is_fetched_again(damage: str, cache: Path, tmp_path: Path) -> None:
    folder = fetch(tmp_path / "source")
    path = folder / ("note" if damage == "added changed" else "lora/a.bin")
    before = path.stat()
    writable(folder)
    if damage == "changed":
        path.write_bytes(b"Content")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif damage == "cut":
        path.write_bytes(b"con")
    elif damage == "removed":
        path.unlink()
    elif damage == "added changed":
        path.write_bytes(b"other")
    else:
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    assert fetch(tmp_path / "source") == folder
    assert (folder / "lora/a.bin").read_bytes() == b"content" and (folder / "note").read_bytes() == b"added"
    assert [*cache.iterdir()] == [folder]


@pytest.mark.parametrize("added", ["origin.json", "lora/b.bin", "other/", "lora/link", "lora is a link"])
def test_cached_folder_that_holds_more_than_was_fetched_is_fetched_again(
    added: str, cache: Path, tmp_path: Path
) -> None:
    """A loader might prefer what was added to a file that was fetched."""
    folder = fetch(tmp_path / "source")
    writable(folder)
    if added == "lora is a link":
        (folder / "lora").rename(tmp_path / "lora")
        (folder / "lora").symlink_to(tmp_path / "lora")
    elif added.endswith("link"):
        (folder / added).symlink_to(tmp_path / "source")
    elif added.endswith("/"):
        (folder / added).mkdir()
    else:
        (folder / added).write_bytes(b"[]")
    assert fetch(tmp_path / "source") == folder
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == ["lora", "lora/a.bin", "note"]
    assert not (folder / "lora").is_symlink() and [*cache.iterdir()] == [folder]


def test_folder_is_read_only_and_becomes_writable_before_it_is_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path / "source")
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "lora")} == {0o555}
    assert {(folder / name).stat().st_mode & 0o777 for name in ("lora/a.bin", "note")} == {0o444}
    removed: list[int] = []

    def remove(path: Path, **_: object) -> None:
        removed.extend(part.stat().st_mode & 0o200 for part in (path, *path.rglob("*")) if part.is_dir())

    monkeypatch.setattr("shutil.rmtree", remove)
    node_cache._remove(folder)
    assert removed == [0o200, 0o200]


def test_whole_folder_is_neither_fetched_nor_hashed_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path / "source")
    fetch(tmp_path / "source")
    (tmp_path / "source").unlink()
    monkeypatch.setattr("nsnet.digest.file_digest", lambda path: pytest.fail(f"{path} was hashed again"))
    files = {"lora/a.bin": Wanted(uri=Uri("/nowhere"), sha256=hashlib.sha256(b"content").hexdigest(), max_bytes=7)}
    assert node_cache.fetch_once("things", "name", files, {"note": b"added"}, REFUSAL) == folder


def test_what_a_killed_process_left_is_removed_and_other_files_stay(cache: Path, tmp_path: Path) -> None:
    stale = cache / "name.partial-01234567"
    names = ("name-2.partial-01234567", "name.partial-notes", "name.partial-0123456789", "name.partial-0123456")
    others = [cache / name for name in names]
    for folder in (stale, *others):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"half")
    (link := cache / "name.partial-89abcdef").symlink_to(tmp_path)
    folder = fetch(tmp_path / "source")
    assert sorted(cache.iterdir()) == sorted([folder, *others, link]) and (tmp_path / "source").exists()


def test_file_system_without_locks_is_used_without_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (cache / "name.partial-01234567").mkdir(parents=True)  # perhaps of a process that is at work
    folder = fetch(tmp_path / "source")
    assert (folder / "lora/a.bin").read_bytes() == b"content" and (cache / "name.partial-01234567").exists()


@pytest.mark.parametrize("removed", ["the folder", "a file of it"])
def test_cache_that_nodes_share_without_common_locks_is_refused_by_name(
    removed: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node removes what it takes for the rest of a killed process."""
    read = node_cache.read_bytes

    def read_and_lose(uri: Uri, *arguments: int) -> bytes:
        if uri.endswith("second"):
            (partial,) = cache.iterdir()
            if removed == "the folder":
                shutil.rmtree(partial)
            else:
                (partial / "first").unlink()
        return read(uri, *arguments)

    monkeypatch.setattr(node_cache, "read_bytes", read_and_lose)
    files = {name: wanted(tmp_path / name, name.encode()) for name in ("first", "second", "third")}
    with pytest.raises(StorageError, match="must be local to the node") as caught:
        node_cache.fetch_once("things", "name", files, {}, REFUSAL)
    assert f"NSNET_CACHE ({cache.parent})" in one_line(caught.value) and [*cache.iterdir()] == []


@contextmanager
def workers(count: int, place: str, model: PublishedModel, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that load a model at the same moment."""
    folder.mkdir(exist_ok=True)
    go = folder / "go"
    started = []
    for i in range(count):
        command = [sys.executable, "-c", WORKER, place, json.dumps(vars(model)), str(folder / f"ready-{i}"), str(go)]
        started.append(subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True))
    try:
        until(lambda: all((folder / f"ready-{i}").exists() for i in range(count)))
        go.touch()
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.s3
def test_two_workers_of_one_node_download_each_file_once(proxy: FaultyProxy, cache: Path, tmp_path: Path) -> None:
    place = f"{new_bucket()}/mirror"
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    proxy.forget()
    proxy.policy = Always(Action("trickle", seconds=0.5), "GET /" + place.removeprefix("s3://") + "/files/")
    with workers(2, place, BLIP, tmp_path / "sync") as both:
        folders = {process.communicate(timeout=WAIT_SECONDS)[0].strip() for process in both}
        assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert {path.name: path.read_bytes() for path in Path(*folders).iterdir()} == BLIP_FILES
    names = [mirror.file_uri(Uri(place), file) for file in described(BLIP, BLIP_FILES).files.values()]
    assert [proxy.requests(f"GET {name.removeprefix('s3:/')}") for name in names] == [1, 1, 1]


@pytest.mark.long
@pytest.mark.s3
def test_worker_that_waits_takes_over_from_one_that_is_killed(proxy: FaultyProxy, cache: Path, tmp_path: Path) -> None:
    place = f"{new_bucket()}/mirror"
    upload(place, BLIP, BLIP_FILES, tmp_path / "a")
    file = described(BLIP, BLIP_FILES).files["model.safetensors"]
    last = f"GET {mirror.file_uri(Uri(place), file).removeprefix('s3:/')}"
    proxy.forget()
    proxy.policy = Always(Action("stall", 3, seconds=30.0), last)
    weights = cache.parent / "weights"
    with workers(1, place, BLIP, tmp_path / "first") as (first,):
        until(lambda: proxy.requests(last) == 1)
        with workers(1, place, BLIP, tmp_path / "second") as (second,):
            (partial,) = weights.iterdir()
            proxy.policy = Always(Action())
            first.send_signal(signal.SIGKILL)
            first.wait(WAIT_SECONDS)
            folder = Path(second.communicate(timeout=WAIT_SECONDS)[0].strip())
            assert second.returncode == 0
    assert [*weights.iterdir()] == [folder] and folder != partial
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BLIP_FILES
    assert proxy.requests(last) == 2
