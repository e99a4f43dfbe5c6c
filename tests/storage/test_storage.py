"""Storage: the same answers from a disk and from a real S3 server, and failures in one line."""

import errno
import hashlib
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import s3fs

from jobs.storage import bundles, filesystems, listing, probes, reading, uris, writing
from jobs.storage.left_out import LeftOut
from jobs.storage.listing import Entry
from jobs.storage.uris import Uri
from nsnet.errors import BundleError, StorageError, UsageError
from tests.support.proxy import Action, Always, FaultyProxy, Kind, Script, in_front_of
from tests.support.swift import SwiftServer
from tests.support.tables import new_bucket, put


@pytest.fixture
def bucket(s3_environment: SwiftServer) -> str:
    return new_bucket()


@pytest.fixture
def proxy(s3_environment: SwiftServer) -> Iterator[FaultyProxy]:
    with in_front_of(s3_environment) as proxy:
        yield proxy


@pytest.fixture
def clients() -> Iterator[None]:
    """fsspec keeps its clients, which hold the keys of the environment that they were made in."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def names(place: str, left_out: LeftOut | None = None) -> list[str]:
    return sorted(entry.uri.removeprefix(place + "/") for entry in listing.list_files(place, left_out))


# URIs.


def test_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert Uri("a/../b c") == f"{tmp_path}/b c"
    assert Uri("~/x") == "/somewhere/x"
    assert Uri("/x//y/") == "/x/y"
    assert Uri("file:///x/y/") == "/x/y"
    assert Uri("file://x/~") == f"{tmp_path}/x/~"
    assert Uri("a:b") == f"{tmp_path}/a:b"


def test_s3_uri_keeps_its_key() -> None:
    assert Uri("s3://bucket") == Uri("s3://bucket/") == "s3://bucket"
    assert Uri("s3://bucket/a//../ü ~#?x/") == "s3://bucket/a//../ü ~#?x"


@pytest.mark.parametrize("uri", ["http://x/y.jpg", "https://x", "gs://b/k", "S3://b/k", "://x", "memory://", "s3a://b"])
def test_other_scheme_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"only local paths and s3:// are supported, not {uri[:-4]}"[:50])):
        Uri(uri)


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///key", "file://"])
def test_uri_of_no_place_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no file or bucket"):
        Uri(uri)


def test_join_and_locality() -> None:
    assert uris.join("/a/", "b", "c.json") == "/a/b/c.json"
    assert uris.join("s3://bucket", "b") == "s3://bucket/b"
    assert uris.is_local("/a/b") and not uris.is_local("s3://bucket/b")


def test_weights_must_be_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert uris.model_path("clip.pt") == str(tmp_path / "clip.pt")
    with pytest.raises(UsageError, match="local path"):
        uris.model_path("s3://bucket/clip.pt")


# Reading, writing and listing.

NAMES = ["a.jpg", "ä ö/图像 #1?.png", "x/100%+1&a=b.webp", "x/y/_deep.tar.jpg", ".hidden", "no ending", "y.jpg/z"]


def test_every_name_is_written_listed_and_read(place: str) -> None:
    put(place, {name: name.encode() for name in NAMES})
    assert names(place) == sorted(NAMES)
    for entry in listing.list_files(place):
        name = entry.uri.removeprefix(place + "/")
        assert reading.read_bytes(entry.uri) == name.encode()
        assert entry == listing.describe(entry.uri)
        assert entry.size_bytes == len(name.encode()) and entry.etag and '"' not in entry.etag


RANGES = [(0, None), (0, 10), (7, 13), (90, 500), (95, None), (0, 1), (5, 0), (0, 0), (100, 3), (200, 3)]


def test_ranges_are_those_of_a_slice(place: str) -> None:
    content = bytes(range(100))
    put(place, {"x": content, "empty": b""})
    for start, length in RANGES:
        end = None if length is None else start + length
        assert reading.read_bytes(f"{place}/x", start, length) == content[start:end], (start, length)
        assert reading.read_bytes(f"{place}/empty", start, length) == b"", (start, length)


def test_missing_object_is_not_found(place: str) -> None:
    put(place, {"x": b""})
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(f"{place}/y")
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(f"{place}/y", 3, 5)
    with pytest.raises(FileNotFoundError):
        listing.describe(f"{place}/y")


def test_existence_of_objects_and_folders(place: str) -> None:
    put(place, {"a/b/c": b"1", "ab": b"1"})
    assert listing.is_folder(place) and listing.is_folder(f"{place}/a") and listing.is_folder(f"{place}/a/b")
    assert not listing.is_folder(f"{place}/a/b/c") and not listing.is_folder(f"{place}/ab")
    assert not listing.is_folder(f"{place}/absent")
    assert listing.exists(f"{place}/a/b/c") and listing.exists(f"{place}/a/b")
    assert not listing.exists(f"{place}/absent") and not listing.exists(f"{place}/a/b/d")


def test_listing_holds_nothing_beside_the_folder(place: str) -> None:
    put(place, {"a/1": b"", "ab/2": b"", "b": b""})
    assert names(f"{place}/a") == ["1"]


def test_etag_follows_the_content(place: str) -> None:
    put(place, {"x": b"one"})
    first = listing.describe(f"{place}/x").etag
    assert listing.describe(f"{place}/x").etag == first
    put(place, {"x": b"two"})
    assert listing.describe(f"{place}/x").etag != first


def test_json_round_trips(place: str) -> None:
    value = {"ü": [1, 2.5, None], "nested": {"a": "half a pair: \ud800"}}
    writing.write_json(f"{place}/deep/x.json", value)
    assert reading.read_json(f"{place}/deep/x.json") == value


def test_removed_file_takes_nothing_else_along(place: str) -> None:
    put(place, {"lock": b"", "lock/1": b""} if not uris.is_local(place) else {"lock": b"", "locks": b""})
    kept = [name for name in names(place) if name != "lock"]
    writing.remove_file(f"{place}/lock")
    writing.remove_file(f"{place}/lock")
    assert names(place) == kept and len(kept) == 1


def test_uploaded_file_is_whole_and_replaces(place: str, tmp_path: Path) -> None:
    for content in (os.urandom(6_000_000), b"", b"short"):
        (tmp_path / "file").write_bytes(content)
        writing.upload_file(tmp_path / "file", f"{place}/deep/x.bin")
        assert reading.read_bytes(f"{place}/deep/x.bin") == content
    assert names(place) == ["deep/x.bin"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1", "Expecting ',' delimiter"),
        (b"\xff", "can't decode"),
        (b"[" * 33 + b"]" * 33, "it is nested deeper than 32"),
        (b"[" * 10**6, "it is nested deeper than 32"),
        (b'"' + b"x" * 100 + b'"', "it is larger than 64 bytes"),
        (b"[]", "it holds a list instead of an object"),
        (b"{}", "it has no a"),
        (b'{"a": true}', "its a is a bool instead of a int"),
    ],
)
def test_damaged_json_is_named_with_its_reason_and_what_to_do(
    content: bytes, reason: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"x" in content:
        monkeypatch.setattr(reading, "MAX_JSON_BYTES", 64)
    put(place, {"x.json": content})
    with pytest.raises(StorageError) as caught:
        reading.read_json(f"{place}/x.json", {"a": int}, "remove it")
    message = str(caught.value)
    assert message.startswith(f"{place}/x.json is damaged (") and reason in message and message.endswith("): remove it")


def test_json_as_deep_as_is_allowed_is_read(tmp_path: Path) -> None:
    put(str(tmp_path), {"x.json": b"[" * 32 + b"]" * 32})
    assert reading.read_json(f"{tmp_path}/x.json")


def test_folder_in_the_place_of_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(StorageError, match=f"{tmp_path}/x.json is damaged .it is a folder.: restore it"):
        reading.read_json(f"{tmp_path}/x.json")


def test_names_below_a_folder_are_told_apart(place: str) -> None:
    put(place, {"b/1": b"", "b/c/2": b"", "a": b"", "ü #": b""})
    assert listing.names_below(place) == listing.Names(folders=["b"], files=["a", "ü #"], others=[])
    assert listing.names_below(f"{place}/absent") == listing.Names(folders=[], files=[], others=[])


def test_links_are_neither_files_nor_folders(tmp_path: Path) -> None:
    put(str(tmp_path), {"file": b"x", "folder/1": b"x"})
    for name in ("file", "folder", "absent"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
    found = listing.names_below(str(tmp_path))
    assert (found.folders, found.files) == (["folder"], ["file"])
    assert found.others == ["link to absent", "link to file", "link to folder"]
    assert listing.subfolders(str(tmp_path)) == ["folder"]


def test_subfolders_are_named_sorted_and_not_deeper(place: str) -> None:
    put(place, {"b/1": b"", "a ü#/x/2": b"", "file": b"", "b/c/d/3": b"", "zz/1": b""})
    assert listing.subfolders(place) == ["a ü#", "b", "zz"]
    assert listing.subfolders(f"{place}/b") == ["c"]
    assert listing.subfolders(f"{place}/zz") == listing.subfolders(f"{place}/absent") == []


def test_reader_of_a_file_that_is_rewritten_sees_all_or_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    size = 3_000_000
    contents = [bytes([i]) * size for i in range(30)]
    writing.write_bytes(path, contents[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(reading.read_bytes(path))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        writing.write_bytes(path, content)
    stop.set()
    reader.join()
    assert len(seen) > 1 and seen <= set(contents)
    assert os.listdir(tmp_path) == ["x"]


# Listing, many folders at a time.


def tree(count: int, seed: int, odd: bool) -> list[str]:
    """Names of files in folders of all depths, in some very many of them; `odd`: also keys with empty parts."""
    rng = random.Random(seed)
    found = {f"wide/{i}/x" for i in range(count // 4)} | {f"flat/{i}" for i in range(count // 4)}
    found |= {"/".join(["deep"] * depth) + "/x" for depth in range(1, 13)}
    found |= {"a/c/z", "a/c/y/z"} | ({"a//x", "a/b//y", "a/c//z"} if odd else set())
    while len(found) < count:
        parts = [rng.choice("abcdefghij") for _ in range(rng.randint(1, 6))]
        if odd and rng.random() < 0.2:
            parts.insert(rng.randint(1, len(parts)), "")
        found.add("/".join([*parts, f"{len(found)}.jpg"]))
    return sorted(found)


def put_many(place: str, keys: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        if uris.is_local(place):
            list(pool.map(lambda key: writing.write_bytes(f"{place}/{key}", b""), keys))
        else:
            bucket, _, prefix = place.removeprefix("s3://").partition("/")
            system, _ = filesystems.filesystem(place)
            list(pool.map(lambda key: system.call_s3("put_object", Bucket=bucket, Key=f"{prefix}/{key}"), keys))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that small trees reach."""
    monkeypatch.setattr(listing, "LISTING_PAGE", 7)
    monkeypatch.setattr(listing, "FAN_OUT", 5)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_every_file_of_a_tree_is_listed_once(
    threads: int, small_pages: None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "LISTING_THREADS", threads)
    keys = tree(120 if uris.is_local(place) else 40, threads, odd=not uris.is_local(place))
    put_many(place, keys)
    assert names(place) == keys
    for folder in ("wide", "flat", "deep/deep", "a"):
        assert names(f"{place}/{folder}") == [
            key.removeprefix(f"{folder}/") for key in keys if key.startswith(f"{folder}/")
        ]


@pytest.mark.long
def test_thousands_of_files_in_very_many_folders_are_listed(place: str) -> None:
    """More than a page of keys, and more prefixes than are listed one by one."""
    wide = [f"wide/{i:04}/x" for i in range(listing.FAN_OUT + 6)]
    flat = [f"flat/{i:04}.jpg" for i in range(listing.LISTING_PAGE + 10)]
    put_many(place, wide + flat)
    assert names(place) == sorted(wide + flat)


def test_folders_that_are_listed_before_their_parent_is_done_do_not_end_the_listing() -> None:
    """The first folder below the root is done before the second one is begun."""
    done = threading.Event()

    class Slow(list[str]):
        def __iter__(self) -> Iterator[str]:
            yield "first"
            done.wait(5)
            time.sleep(0.2)  # what it put into the queue is taken out of it meanwhile
            yield "second"

    def entry(name: str) -> Entry:
        return Entry(uri=name, size_bytes=0, etag="", modified_at=datetime.now(UTC))

    def pages(folder: str) -> Iterator[tuple[list[Entry], list[str]]]:
        if folder == "root":
            yield [entry("root")], Slow(["first", "second"])
        else:
            yield [entry(folder)], []
            yield [], []
            done.set()

    assert sorted(found.uri for found in listing._walk("root", pages)) == ["first", "root", "second"]


def test_consumer_that_stops_early_leaves_no_thread_behind(
    small_pages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "LISTING_THREADS", 2)
    put_many(str(tmp_path), [f"{i}/{j}" for i in range(60) for j in range(10)])  # far more pages than are waiting
    before = set(threading.enumerate())
    for taken in (1, 5, 50):
        walked = listing.list_files(str(tmp_path))
        assert len(list(islice(walked, taken))) == taken
        assert set(threading.enumerate()) > before
        walked.close()  # type: ignore[attr-defined]
        assert set(threading.enumerate()) == before


def test_listing_is_not_begun_before_it_is_asked_for(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    walked = listing.list_files(str(tmp_path / "absent"))
    assert set(threading.enumerate()) == before
    left_out = LeftOut()
    assert list(walked) == list(listing.list_files(str(tmp_path / "absent"), left_out)) == []
    assert left_out == {"folder that cannot be read (No such file or directory)": 1}


def test_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was published would be taken for new."""
    put(str(tmp_path), {"a/1": b"", "2": b""})
    real = os.scandir

    def stale(folder: str) -> Any:
        if folder.endswith("/a"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        names(str(tmp_path))
    left_out = LeftOut()
    assert names(str(tmp_path), left_out) == ["2"]
    assert left_out == {"folder that cannot be read (Stale file handle)": 1}


def test_error_deep_in_the_tree_reaches_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_many(str(tmp_path), [f"{i}/{j}" for i in range(30) for j in range(30)])
    real = listing._list_disk

    def fail(folder: str, leave_out: Callable[[str], None]) -> Iterator[tuple[list[Entry], list[str]]]:
        if folder == f"{tmp_path}/17":
            raise ZeroDivisionError("so it says")
        return real(folder, leave_out)

    monkeypatch.setattr(listing, "_list_disk", fail)
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError, match="so it says"):
        list(listing.list_files(str(tmp_path)))
    assert set(threading.enumerate()) == before


@pytest.mark.s3
def test_listing_of_a_bucket_that_is_gone_says_so(bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        list(listing.list_files(f"{bucket}-absent/x"))


@pytest.mark.s3
def test_listing_survives_a_bad_network(proxy: FaultyProxy, small_pages: None) -> None:
    place = new_bucket() + "/place"
    keys = tree(80, 5, odd=True)
    put_many(place, keys)
    faults = [Action("slow_down"), Action("reset"), Action("cut", 0.5), Action("lose_answer"), Action("cut", 0.9)]
    proxy.policy = Script(*faults, *faults, wanted="LIST ")
    assert names(place) == keys
    assert sum(proxy.counts.values()) - proxy.counts["pass"] == len(faults) * 2


@pytest.mark.s3
def test_listing_of_which_a_part_fails_for_good_is_an_error(proxy: FaultyProxy, small_pages: None) -> None:
    """Half a listing must not be taken for the whole."""
    place = new_bucket() + "/place"
    put_many(place, [f"{i}/{j}" for i in range(4) for j in range(20)])
    proxy.policy = Always(
        Action("refuse", status=403, code="AccessDenied"),
        wanted=lambda request: "continuation-token" in request.target and "prefix=place%2F2%2F" in request.target,
    )
    with pytest.raises(PermissionError):
        list(listing.list_files(place))
    assert proxy.counts["refuse"] >= 1


# Creating what is not there.


def test_object_is_created_only_where_there_is_none(place: str) -> None:
    assert writing.create(f"{place}/deep/lock", b"first")
    assert not writing.create(f"{place}/deep/lock", b"second")
    assert reading.read_bytes(f"{place}/deep/lock") == b"first"
    writing.remove_file(f"{place}/deep/lock")
    assert writing.create(f"{place}/deep/lock", b"third")
    assert reading.read_bytes(f"{place}/deep/lock") == b"third"
    assert names(place) == ["deep/lock"]


def race(uri: str, count: int) -> list[bytes]:
    """Which of many creators, each with its own content, get a success."""
    start = threading.Barrier(count)

    def create(i: int) -> bytes | None:
        start.wait()
        return b"%d" % i if writing.create(uri, b"%d" % i) else None

    with ThreadPoolExecutor(count) as pool:
        return [content for content in pool.map(create, range(count)) if content is not None]


def test_one_of_many_creators_on_a_disk_succeeds(tmp_path: Path) -> None:
    for i in range(50):
        (winner,) = race(f"{tmp_path}/{i}", 16)
        assert (tmp_path / str(i)).read_bytes() == winner
    assert len(os.listdir(tmp_path)) == 50  # nothing else is left behind


@pytest.mark.s3
def test_one_of_many_creators_in_a_bucket_succeeds(proxy: FaultyProxy) -> None:
    """As far as the store compares and writes at once: the proxy sees to that."""
    bucket = new_bucket()
    for i in range(5):
        (winner,) = race(f"{bucket}/{i}", 16)
        assert reading.read_bytes(f"{bucket}/{i}") == winner


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["lose_answer", "reset", "slow_down", "cut"])
def test_creator_whose_answer_was_lost_knows_its_own_object(fault: Kind, proxy: FaultyProxy) -> None:
    uri = new_bucket() + "/lock"
    proxy.policy = Script(Action(fault), wanted="PUT ")
    assert writing.create(uri, b"mine")
    assert proxy.counts[fault] == 1 and proxy.requests("PUT ") >= 2
    assert reading.read_bytes(uri) == b"mine"
    proxy.policy = Script(Action(fault), wanted="PUT ")
    assert not writing.create(uri, b"yours")
    assert reading.read_bytes(uri) == b"mine"


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["lose_answer", "reset", "slow_down", "cut"])
def test_object_is_written_whole_over_a_bad_network(fault: Kind, proxy: FaultyProxy, tmp_path: Path) -> None:
    bucket, content = new_bucket(), os.urandom(500_000)
    (tmp_path / "file").write_bytes(content)
    proxy.policy = Script(Action(fault), wanted="/written")
    writing.write_bytes(f"{bucket}/written", content)
    proxy.policy = Script(Action(fault), wanted="/uploaded")
    writing.upload_file(tmp_path / "file", f"{bucket}/uploaded")
    assert proxy.counts[fault] == 2
    for name in ("written", "uploaded"):
        assert reading.read_bytes(f"{bucket}/{name}") == content
        proxy.policy = Script(Action(fault), wanted=f"HEAD /{bucket[5:]}/{name}")
        assert listing.describe(f"{bucket}/{name}").size_bytes == len(content)


def test_age_is_that_by_the_stores_clock(place: str) -> None:
    put(place, {"old": b"", "b": b""})
    first = writing.age_seconds(f"{place}/old")
    assert -2.0 <= first < 300.0
    if uris.is_local(place):
        os.utime(f"{place}/old", (0, os.stat(f"{place}/b").st_mtime - 3600))
        assert writing.age_seconds(f"{place}/old") >= 3599
    else:
        time.sleep(2.2)
        assert writing.age_seconds(f"{place}/old") >= first + 1
    assert names(place) == ["b", "old"]
    with pytest.raises(FileNotFoundError):
        writing.age_seconds(f"{place}/absent")


# What lies on disks.


def test_links_and_special_files_are_counted_and_nothing_runs_in_circles(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    put(str(folder), {"a/x.jpg": b"x", "y.jpg": b"yy"})
    (folder / "link.jpg").symlink_to(folder / "y.jpg")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "there").symlink_to(folder / "back")
    (folder / "back").symlink_to(folder / "there")
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    os.mkfifo(folder / "pipe.jpg")
    left_out = LeftOut()
    assert names(str(folder), left_out) == ["a/x.jpg", "link.jpg", "y.jpg"]
    assert sum(left_out.values()) == 6
    assert left_out["link to a folder"] == 1 and left_out["broken link or special file"] >= 2


def test_folder_that_is_itself_a_link_is_listed(tmp_path: Path) -> None:
    put(str(tmp_path / "real"), {"a/x.jpg": b"x"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(str(tmp_path / "link")) == ["a/x.jpg"]


def test_files_and_folders_that_vanish_during_the_listing_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), {"gone/x": b"", "b/gone": b"", "b/y": b""})
    scandir = os.scandir

    @contextmanager
    def vanish(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        if Path(folder).name == "gone":
            os.unlink(f"{folder}/x")
            os.rmdir(folder)
        with scandir(folder) as items:
            yield (unlink(item) for item in items)

    def unlink(item: os.DirEntry[str]) -> os.DirEntry[str]:
        if item.name == "gone" and item.is_file():
            os.unlink(item.path)
        return item

    monkeypatch.setattr(os, "scandir", vanish)
    left_out = LeftOut()
    found = [entry.uri for entry in listing.list_files(str(tmp_path), left_out)]
    monkeypatch.undo()
    assert found == [f"{tmp_path}/b/y"]
    assert left_out == {
        "file that cannot be read (No such file or directory)": 1,
        "folder that cannot be read (No such file or directory)": 1,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_without_permission_is_counted(tmp_path: Path) -> None:
    put(str(tmp_path), {"a/1": b"", "x": b""})
    (tmp_path / "a").chmod(0)
    left_out = LeftOut()
    assert names(str(tmp_path), left_out) == ["x"] and sum(left_out.values()) == 1
    (tmp_path / "a").chmod(0o700)


# What lies in buckets.


@pytest.mark.s3
def test_keys_that_are_no_paths_are_listed_and_read(bucket: str) -> None:
    system, _ = filesystems.filesystem(bucket)
    keys = ["a//b.jpg", "a/c.jpg", "/lead.jpg", "a", "a/../d", "tail.jpg"]
    for key in keys:
        system.call_s3("put_object", Bucket=bucket[5:], Key=key, Body=key.encode())
    found = {entry.uri: reading.read_bytes(entry.uri) for entry in listing.list_files(bucket)}
    assert found == {f"{bucket}/{key}": key.encode() for key in keys}
    assert names(f"{bucket}/a") == ["../d", "/b.jpg", "c.jpg"]


@pytest.mark.s3
def test_listing_goes_on_after_the_first_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LISTING_PAGE", 3)
    put(bucket, {f"p/{i}": b"" for i in range(9)} | {"q": b""})
    assert names(f"{bucket}/p") == [str(i) for i in range(9)]
    assert len(names(bucket)) == 10


@pytest.mark.s3
def test_empty_bucket_and_absent_prefix_list_nothing(bucket: str) -> None:
    assert names(bucket) == [] and names(f"{bucket}/absent") == []
    assert not listing.is_folder(f"{bucket}/absent")


@pytest.mark.s3
def test_listing_sees_what_others_wrote_meanwhile(bucket: str) -> None:
    assert names(bucket) == []
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{bucket}/x", b"x")
    assert names(bucket) == ["x"] and listing.exists(f"{bucket}/x")


# Stores that do not answer.


def complaint(uri: str, seconds: float = 15.0) -> str:
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        probes.reachable(uri)
    message = str(caught.value)
    assert time.monotonic() - started < seconds
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.s3
def test_bucket_that_is_there_is_reachable(bucket: str, tmp_path: Path) -> None:
    probes.reachable(bucket)
    probes.reachable(f"{bucket}/no/such/prefix")
    probes.reachable(str(tmp_path / "absent"))


@pytest.mark.s3
def test_missing_bucket_is_named(bucket: str) -> None:
    assert complaint(f"{bucket}-absent/x/y", 5) == f"the bucket {bucket}-absent does not exist"


@pytest.mark.s3
def test_wrong_secret_is_said_without_the_secret(
    bucket: str, clients: None, monkeypatch: pytest.MonkeyPatch, s3_environment: SwiftServer
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret-that-is-wr0ng")
    message = complaint(bucket, 5)
    assert bucket in message and s3_environment.endpoint_url in message and "signature" in message
    assert "a-s3cret-that-is-wr0ng" not in message and s3_environment.secret_key not in message.split()


@pytest.mark.s3
def test_unknown_key_is_said(bucket: str, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody:known")
    assert bucket in complaint(bucket, 5)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:9", "127.0.0.1:9"),
        ("nonsense", "Invalid endpoint: nonsense"),
    ],
)
def test_wrong_endpoint_is_named(endpoint: str, reason: str, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret")
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 1.0)
    message = complaint("s3://bucket/x")
    assert reason in message and "s3://bucket" in message and "a-s3cret" not in message


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("endpoint", ["http://somebody:a-s3cret@127.0.0.1:9", "somebody:a-s3cret@127.0.0.1:9"])
def test_endpoint_with_a_password_is_refused(
    name: str, endpoint: str, clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, endpoint)
    shown = endpoint.replace("somebody:a-s3cret", "***")
    for attempt in (probes.reachable, listing.list_files, reading.fetch):
        with pytest.raises(UsageError, match=re.escape(f"{name} is {shown}: it must not contain a user or password")):
            list(attempt("s3://bucket/x") or ())  # type: ignore[operator]


def test_missing_keys_are_said(tmp_path: Path, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert "credentials" in complaint("s3://bucket")


def test_store_that_never_answers_is_given_up(clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.PROBE_TIMEOUT_SECONDS <= 10
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret")
        monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 1.0)
        assert "no answer in time" in complaint("s3://bucket", 5)


# Bundles.

DESCRIPTION = "detector.json"
FILES = {"network.safetensors": b"weights", "lora/adapter_model.safetensors": b"more", "captioner/vocab.txt": b"a\nb\n"}


def describe(files: dict[str, bytes]) -> bytes:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return json.dumps({"files": digests}).encode()


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "detectors"


def test_upload_writes_the_marking_file_last(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "bundle"
    put(str(folder), {**FILES, DESCRIPTION: b"{}", "zz": b"after it in the alphabet"})
    writing.upload_folder(folder, f"{place}/done", last=DESCRIPTION)
    assert {entry.uri.removeprefix(f"{place}/done/") for entry in listing.list_files(f"{place}/done")} == set(
        content_of(folder)
    )
    assert reading.read_bytes(f"{place}/done/lora/adapter_model.safetensors") == b"more"


def test_upload_that_fails_leaves_no_marking_file(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    put(str(folder), {**FILES, DESCRIPTION: b"{}", "zz": b""})
    (tmp_path / "out" / "zz" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        writing.upload_folder(folder, str(tmp_path / "out"), last=DESCRIPTION)
    assert (tmp_path / "out" / "network.safetensors").exists()
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_local_bundle_is_taken_where_it_is(tmp_path: Path, cache: Path) -> None:
    assert bundles.fetch_bundle(str(tmp_path / "bundle"), DESCRIPTION) == tmp_path / "bundle"
    assert not cache.exists()


@pytest.mark.s3
def test_remote_bundle_is_fetched_once(bucket: str, cache: Path) -> None:
    bundle = put(f"{bucket}/detector", {**FILES, DESCRIPTION: describe(FILES), "not listed": b""})
    first = bundles.fetch_bundle(bundle, DESCRIPTION)
    assert content_of(first) == {**FILES, DESCRIPTION: describe(FILES)}
    assert first.parent == cache
    for name in FILES:
        if name.startswith("lora/"):
            writing.remove_file(f"{bundle}/{name}")
    assert bundles.fetch_bundle(bundle, DESCRIPTION) == first
    changed = {"network.safetensors": b"other weights"}
    put(bundle, {**changed, DESCRIPTION: describe(changed)})
    second = bundles.fetch_bundle(bundle, DESCRIPTION)
    assert second != first and content_of(second) == {**changed, DESCRIPTION: describe(changed)}
    assert sorted(cache.iterdir()) == sorted([first, second])


@pytest.mark.s3
def test_remote_bundle_fetched_by_many_at_once_is_whole_for_each(bucket: str, cache: Path) -> None:
    files = {f"captioner/model-0000{i}-of-00004.safetensors": os.urandom(200_000) for i in range(5)}
    bundle = put(f"{bucket}/detector", {**files, DESCRIPTION: describe(files)})

    def fetch(_: int) -> dict[str, bytes]:
        return content_of(bundles.fetch_bundle(bundle, DESCRIPTION))

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(fetch, range(12)):
            assert found == {**files, DESCRIPTION: describe(files)}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.s3
@pytest.mark.parametrize(
    "name",
    [
        "../../../escaped",
        "/tmp/nsnet-escaped",
        "a/../../escaped",
        "..",
        "",
        ".",
        "a\0b",
        "clip/../../escaped",
        "clip/tokenizer.py",
        "captioner/pytorch_model.bin",
        "clip/deep/model.safetensors",
    ],
)
def test_names_that_leave_the_bundle_are_refused(name: str, bucket: str, cache: Path, tmp_path: Path) -> None:
    bundle = put(f"{bucket}/a/b/c/detector", {DESCRIPTION: json.dumps({"files": {name: "0" * 64}}).encode()})
    with pytest.raises(BundleError, match="does not belong in a bundle"):
        bundles.fetch_bundle(bundle, DESCRIPTION)
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/nsnet-escaped").exists()
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.s3
def test_damaged_remote_bundle_is_refused_and_not_kept(bucket: str, cache: Path) -> None:
    bundle = f"{bucket}/detector"
    with pytest.raises(BundleError, match=r"no detector bundle: detector\.json is missing"):
        bundles.fetch_bundle(bundle, DESCRIPTION)
    for description in (b"", b"{", b"[]", b"{}", b'{"files": 7}', b'{"files": ["a"]}', b"\xff"):
        put(bundle, {DESCRIPTION: description})
        with pytest.raises(BundleError, match=r"detector\.json is damaged"):
            bundles.fetch_bundle(bundle, DESCRIPTION)
    put(bundle, {DESCRIPTION: describe(FILES)})
    with pytest.raises(BundleError, match="is damaged: .* is missing"):
        bundles.fetch_bundle(bundle, DESCRIPTION)
    put(bundle, {**FILES, "lora/adapter_model.safetensors": b"half of an upload"})
    with pytest.raises(BundleError, match=r"the SHA-256 of lora/adapter_model\.safetensors"):
        bundles.fetch_bundle(bundle, DESCRIPTION)
    assert list(cache.iterdir()) == []
    put(bundle, FILES)
    assert content_of(bundles.fetch_bundle(bundle, DESCRIPTION)) == {**FILES, DESCRIPTION: describe(FILES)}


def test_entry_of_a_file_is_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 255))
    changed = datetime(1970, 1, 1, tzinfo=UTC)
    assert listing.describe(str(path)) == Entry(uri=str(path), size_bytes=5, etag="5-ff", modified_at=changed)


def test_time_of_the_last_change_is_that_of_the_store(place: str) -> None:
    put(place, {"x": b"1"})
    (entry,) = listing.list_files(place)
    assert entry.modified_at == listing.describe(f"{place}/x").modified_at
    assert abs(datetime.now(UTC) - entry.modified_at) < timedelta(minutes=5)
    if uris.is_local(place):
        os.utime(f"{place}/x", (0, 86_400))
        assert listing.describe(f"{place}/x").modified_at == datetime(1970, 1, 2, tzinfo=UTC)
