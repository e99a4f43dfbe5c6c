"""Storage: the same answers from a disk and from a real S3 server, and failures in one line."""

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from jobs import storage
from jobs.storage import Entry
from nsnet.errors import BundleError, StorageError, UsageError
from tests.swift import SwiftServer
from tests.tables import new_bucket, put


@pytest.fixture
def bucket(s3_environment: SwiftServer) -> str:
    return new_bucket()


@pytest.fixture
def clients() -> Iterator[None]:
    """fsspec keeps its clients, which hold the keys of the environment that they were made in."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def names(place: str, left_out: Counter[str] | None = None) -> list[str]:
    return sorted(entry.uri.removeprefix(place + "/") for entry in storage.list_files(place, left_out))


# URIs.


def test_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert storage.absolute("a/../b c") == f"{tmp_path}/b c"
    assert storage.absolute("~/x") == "/somewhere/x"
    assert storage.absolute("/x//y/") == "/x/y"
    assert storage.absolute("file:///x/y/") == "/x/y"
    assert storage.absolute("file://x/~") == f"{tmp_path}/x/~"
    assert storage.absolute("a:b") == f"{tmp_path}/a:b"


def test_s3_uri_keeps_its_key() -> None:
    assert storage.absolute("s3://bucket") == storage.absolute("s3://bucket/") == "s3://bucket"
    assert storage.absolute("s3://bucket/a//../ü ~#?x/") == "s3://bucket/a//../ü ~#?x"


@pytest.mark.parametrize("uri", ["http://x/y.jpg", "https://x", "gs://b/k", "S3://b/k", "://x", "memory://", "s3a://b"])
def test_other_scheme_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"only local paths and s3:// are supported, not {uri[:-4]}"[:50])):
        storage.absolute(uri)


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///key", "file://"])
def test_uri_of_no_place_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no place"):
        storage.absolute(uri)


def test_join_and_locality() -> None:
    assert storage.join("/a/", "b", "c.json") == "/a/b/c.json"
    assert storage.join("s3://bucket", "b") == "s3://bucket/b"
    assert storage.is_local("/a/b") and not storage.is_local("s3://bucket/b")


def test_weights_must_be_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.model_path(None) is None
    assert storage.model_path("clip.pt") == str(tmp_path / "clip.pt")
    with pytest.raises(UsageError, match="local path"):
        storage.model_path("s3://bucket/clip.pt")


# Reading, writing and listing.

NAMES = ["a.jpg", "ä ö/图像 #1?.png", "x/100%+1&a=b.webp", "x/y/_deep.tar.jpg", ".hidden", "no ending", "y.jpg/z"]


def test_every_name_is_written_listed_and_read(place: str) -> None:
    put(place, {name: name.encode() for name in NAMES})
    assert names(place) == sorted(NAMES)
    for entry in storage.list_files(place):
        name = entry.uri.removeprefix(place + "/")
        assert storage.read_bytes(entry.uri) == name.encode()
        assert entry == storage.describe(entry.uri)
        assert entry.size_bytes == len(name.encode()) and entry.etag and '"' not in entry.etag


RANGES = [(0, None), (0, 10), (7, 13), (90, 500), (95, None), (0, 1), (5, 0), (0, 0), (100, 3), (200, 3)]


def test_ranges_are_those_of_a_slice(place: str) -> None:
    content = bytes(range(100))
    put(place, {"x": content, "empty": b""})
    for start, length in RANGES:
        end = None if length is None else start + length
        assert storage.read_bytes(f"{place}/x", start, length) == content[start:end], (start, length)
        assert storage.read_bytes(f"{place}/empty", start, length) == b"", (start, length)


def test_missing_object_is_not_found(place: str) -> None:
    put(place, {"x": b""})
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/y")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/y", 3, 5)
    with pytest.raises(FileNotFoundError):
        storage.describe(f"{place}/y")


def test_existence_of_objects_and_folders(place: str) -> None:
    put(place, {"a/b/c": b"1", "ab": b"1"})
    assert storage.is_folder(place) and storage.is_folder(f"{place}/a") and storage.is_folder(f"{place}/a/b")
    assert not storage.is_folder(f"{place}/a/b/c") and not storage.is_folder(f"{place}/ab")
    assert not storage.is_folder(f"{place}/absent")
    assert storage.exists(f"{place}/a/b/c") and storage.exists(f"{place}/a/b")
    assert not storage.exists(f"{place}/absent") and not storage.exists(f"{place}/a/b/d")


def test_listing_holds_nothing_beside_the_folder(place: str) -> None:
    put(place, {"a/1": b"", "ab/2": b"", "b": b""})
    assert names(f"{place}/a") == ["1"]


def test_etag_follows_the_content(place: str) -> None:
    put(place, {"x": b"one"})
    first = storage.describe(f"{place}/x").etag
    assert storage.describe(f"{place}/x").etag == first
    put(place, {"x": b"two"})
    assert storage.describe(f"{place}/x").etag != first


def test_json_round_trips(place: str) -> None:
    value = {"ü": [1, 2.5, None], "nested": {"a": "b"}}
    storage.write_json(f"{place}/deep/x.json", value)
    assert storage.read_json(f"{place}/deep/x.json") == value


def test_removed_folder_takes_nothing_else_along(place: str) -> None:
    put(place, {"work/a/1": b"", "work/2": b"", "workshop": b"", "b": b""})
    storage.remove_folder(f"{place}/work")
    storage.remove_folder(f"{place}/work")
    assert names(place) == ["b", "workshop"]


def test_reader_of_a_file_that_is_rewritten_sees_all_or_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    size = 3_000_000
    contents = [bytes([i]) * size for i in range(30)]
    storage.write_bytes(path, contents[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(storage.read_bytes(path))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        storage.write_bytes(path, content)
    stop.set()
    reader.join()
    assert len(seen) > 1 and seen <= set(contents)
    assert os.listdir(tmp_path) == ["x"]


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
    left_out: Counter[str] = Counter()
    assert names(str(folder), left_out) == ["a/x.jpg", "link.jpg", "y.jpg"]
    assert sum(left_out.values()) == 6
    assert left_out["link to a folder"] == 1 and left_out["broken link or special file"] >= 2


def test_folder_that_is_itself_a_link_is_listed(tmp_path: Path) -> None:
    put(str(tmp_path / "real"), {"a/x.jpg": b"x"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(str(tmp_path / "link")) == ["a/x.jpg"]


def test_files_and_folders_that_vanish_during_the_listing_are_counted(tmp_path: Path) -> None:
    put(str(tmp_path), {"a/1": b"", "b/2": b"", "x": b"", "y": b""})
    left_out: Counter[str] = Counter()
    listing = storage.list_files(str(tmp_path), left_out)
    found = [next(listing)]
    for name in ("a", "b"):
        storage.remove_folder(str(tmp_path / name))
    (tmp_path / ("y" if found[0].uri.endswith("x") else "x")).unlink()
    found += listing
    assert len(found) == 1 and sum(left_out.values()) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_without_permission_is_counted(tmp_path: Path) -> None:
    put(str(tmp_path), {"a/1": b"", "x": b""})
    (tmp_path / "a").chmod(0)
    left_out: Counter[str] = Counter()
    assert names(str(tmp_path), left_out) == ["x"] and sum(left_out.values()) == 1
    (tmp_path / "a").chmod(0o700)


# What lies in buckets.


@pytest.mark.s3
def test_keys_that_are_no_paths_are_listed_and_read(bucket: str) -> None:
    system, _ = storage.filesystem(bucket)
    keys = ["a//b.jpg", "a/c.jpg", "/lead.jpg", "a", "a/../d", "tail.jpg"]
    for key in keys:
        system.call_s3("put_object", Bucket=bucket[5:], Key=key, Body=key.encode())
    found = {entry.uri: storage.read_bytes(entry.uri) for entry in storage.list_files(bucket)}
    assert found == {f"{bucket}/{key}": key.encode() for key in keys}
    assert names(f"{bucket}/a") == ["../d", "/b.jpg", "c.jpg"]


@pytest.mark.s3
def test_listing_goes_on_after_the_first_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LISTING_PAGE", 3)
    put(bucket, {f"p/{i}": b"" for i in range(9)} | {"q": b""})
    assert names(f"{bucket}/p") == [str(i) for i in range(9)]
    assert len(names(bucket)) == 10


@pytest.mark.s3
def test_empty_bucket_and_absent_prefix_list_nothing(bucket: str) -> None:
    assert names(bucket) == [] and names(f"{bucket}/absent") == []
    assert not storage.is_folder(f"{bucket}/absent")


@pytest.mark.s3
def test_listing_sees_what_others_wrote_meanwhile(bucket: str) -> None:
    assert names(bucket) == []
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{bucket}/x", b"x")
    assert names(bucket) == ["x"] and storage.exists(f"{bucket}/x")


# Stores that do not answer.


def complaint(uri: str, seconds: float = 15.0) -> str:
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.reachable(uri)
    message = str(caught.value)
    assert time.monotonic() - started < seconds
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.s3
def test_bucket_that_is_there_is_reachable(bucket: str, tmp_path: Path) -> None:
    storage.reachable(bucket)
    storage.reachable(f"{bucket}/no/such/prefix")
    storage.reachable(str(tmp_path / "absent"))


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
    ("endpoint", "reason"), [("http://127.0.0.1:9", "127.0.0.1:9"), ("nonsense", "Invalid endpoint: nonsense")]
)
def test_wrong_endpoint_is_named(endpoint: str, reason: str, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret")
    monkeypatch.setattr(storage, "REACH_SECONDS", 1.0)
    message = complaint("s3://bucket/x")
    assert reason in message and "s3://bucket" in message and "a-s3cret" not in message


def test_missing_keys_are_said(tmp_path: Path, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert "credentials" in complaint("s3://bucket")


def test_store_that_never_answers_is_given_up(clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.REACH_SECONDS <= 10
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret")
        monkeypatch.setattr(storage, "REACH_SECONDS", 1.0)
        assert "no answer in time" in complaint("s3://bucket", 5)


# Bundles.

DESCRIPTION = "detector.json"
FILES = {"network.safetensors": b"weights", "lora/adapter.safetensors": b"more", "captioner/vocab.txt": b"a\nb\n"}


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
    storage.upload_folder(folder, f"{place}/done", last=DESCRIPTION)
    assert {entry.uri.removeprefix(f"{place}/done/") for entry in storage.list_files(f"{place}/done")} == set(
        content_of(folder)
    )
    assert storage.read_bytes(f"{place}/done/lora/adapter.safetensors") == b"more"


def test_upload_that_fails_leaves_no_marking_file(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    put(str(folder), {**FILES, DESCRIPTION: b"{}", "zz": b""})
    (tmp_path / "out" / "zz" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        storage.upload_folder(folder, str(tmp_path / "out"), last=DESCRIPTION)
    assert (tmp_path / "out" / "network.safetensors").exists()
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_local_bundle_is_taken_where_it_is(tmp_path: Path, cache: Path) -> None:
    assert storage.fetch_bundle(str(tmp_path / "bundle"), DESCRIPTION) == tmp_path / "bundle"
    assert not cache.exists()


@pytest.mark.s3
def test_remote_bundle_is_fetched_once(bucket: str, cache: Path) -> None:
    bundle = put(f"{bucket}/detector", {**FILES, DESCRIPTION: describe(FILES), "not listed": b""})
    first = storage.fetch_bundle(bundle, DESCRIPTION)
    assert content_of(first) == {**FILES, DESCRIPTION: describe(FILES)}
    assert first.parent == cache
    storage.remove_folder(f"{bundle}/lora")
    assert storage.fetch_bundle(bundle, DESCRIPTION) == first
    changed = {"network.safetensors": b"other weights"}
    put(bundle, {**changed, DESCRIPTION: describe(changed)})
    second = storage.fetch_bundle(bundle, DESCRIPTION)
    assert second != first and content_of(second) == {**changed, DESCRIPTION: describe(changed)}
    assert sorted(cache.iterdir()) == sorted([first, second])


@pytest.mark.s3
def test_remote_bundle_fetched_by_many_at_once_is_whole_for_each(bucket: str, cache: Path) -> None:
    files = {f"{i}.safetensors": os.urandom(200_000) for i in range(5)}
    bundle = put(f"{bucket}/detector", {**files, DESCRIPTION: describe(files)})

    def fetch(_: int) -> dict[str, bytes]:
        return content_of(storage.fetch_bundle(bundle, DESCRIPTION))

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(fetch, range(12)):
            assert found == {**files, DESCRIPTION: describe(files)}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.s3
@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/nsnet-escaped", "a/../../escaped", "..", "", ".", "a\0b"])
def test_names_that_leave_the_bundle_are_refused(name: str, bucket: str, cache: Path, tmp_path: Path) -> None:
    bundle = put(f"{bucket}/a/b/c/detector", {DESCRIPTION: json.dumps({"files": {name: "0" * 64}}).encode()})
    with pytest.raises(BundleError, match="does not belong in a bundle"):
        storage.fetch_bundle(bundle, DESCRIPTION)
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/nsnet-escaped").exists()
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.s3
def test_damaged_remote_bundle_is_refused_and_not_kept(bucket: str, cache: Path) -> None:
    bundle = f"{bucket}/detector"
    with pytest.raises(BundleError, match=r"no detector bundle: detector\.json is missing"):
        storage.fetch_bundle(bundle, DESCRIPTION)
    for description in (b"", b"{", b"[]", b"{}", b'{"files": 7}', b'{"files": ["a"]}', b"\xff"):
        put(bundle, {DESCRIPTION: description})
        with pytest.raises(BundleError, match=r"detector\.json is damaged"):
            storage.fetch_bundle(bundle, DESCRIPTION)
    put(bundle, {DESCRIPTION: describe(FILES)})
    with pytest.raises(BundleError, match="is damaged: .* is missing"):
        storage.fetch_bundle(bundle, DESCRIPTION)
    put(bundle, {**FILES, "lora/adapter.safetensors": b"half of an upload"})
    with pytest.raises(BundleError, match=r"the SHA-256 of lora/adapter\.safetensors"):
        storage.fetch_bundle(bundle, DESCRIPTION)
    assert list(cache.iterdir()) == []
    put(bundle, FILES)
    assert content_of(storage.fetch_bundle(bundle, DESCRIPTION)) == {**FILES, DESCRIPTION: describe(FILES)}


def test_entry_of_a_file_is_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 255))
    assert storage.describe(str(path)) == Entry(uri=str(path), size_bytes=5, etag="5-ff")
