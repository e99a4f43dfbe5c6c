"""The S3 server that other tests rely on: that it is S3 as our clients speak it, and that it leaves no process."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import s3fs
from botocore.exceptions import ClientError

from tests.support import swift

MIB = 1 << 20


@pytest.fixture(scope="module")
def filesystem(s3_server: swift.SwiftServer) -> Iterator[s3fs.S3FileSystem]:
    """s3fs as the library would make it: no argument about the server, all from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def bucket(filesystem: s3fs.S3FileSystem) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    filesystem.mkdir(name)
    return name


def servers_under(root: Path) -> list[int]:
    """Process ids of the servers configured under root, whoever their parent is."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = cmdline.read_bytes().split(b"\0")
        except OSError:  # ended between the listing and the reading
            continue
        if any(argument.startswith(os.fsencode(root)) for argument in command):
            found.append(int(cmdline.parent.name))
    return found


def test_put_get_delete_round_trips(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    filesystem.pipe(f"{bucket}/a/b.bin", b"0123456789")
    assert filesystem.cat(f"{bucket}/a/b.bin") == b"0123456789"
    assert filesystem.info(f"{bucket}/a/b.bin")["size"] == 10
    filesystem.rm(f"{bucket}/a/b.bin")
    assert not filesystem.exists(f"{bucket}/a/b.bin")


def test_range_read_returns_only_the_range(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    filesystem.pipe(f"{bucket}/x", b"0123456789")
    assert filesystem.cat_file(f"{bucket}/x", start=3, end=7) == b"3456"
    assert filesystem.cat_file(f"{bucket}/x", start=-4) == b"6789"


def test_list_separates_files_from_prefixes(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    filesystem.pipe({f"{bucket}/{key}": b"" for key in ("top", "d/one", "d/two", "d/e/three")})
    assert sorted(filesystem.ls(bucket)) == [f"{bucket}/d", f"{bucket}/top"]
    assert sorted(filesystem.find(f"{bucket}/d")) == [f"{bucket}/d/e/three", f"{bucket}/d/one", f"{bucket}/d/two"]


def test_multipart_upload_is_one_object(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    body = os.urandom(11 * MIB)
    with filesystem.open(f"{bucket}/big", "wb", block_size=5 * MIB) as stream:
        stream.write(body[: 6 * MIB])
        stream.write(body[6 * MIB :])
    info = filesystem.info(f"{bucket}/big")
    assert info["size"] == len(body)
    assert info["ETag"].strip('"').endswith("-2")  # S3's mark of an upload in two parts
    assert filesystem.cat(f"{bucket}/big") == body
    assert filesystem.cat_file(f"{bucket}/big", start=5 * MIB - 3, end=5 * MIB + 3) == body[5 * MIB - 3 : 5 * MIB + 3]
    assert filesystem.find(bucket) == [f"{bucket}/big"]


def test_missing_key_raises_file_not_found(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        filesystem.cat(f"{bucket}/absent")
    with pytest.raises(FileNotFoundError):
        filesystem.info(f"{bucket}-absent/x")


def test_wrong_secret_raises_permission_error(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    filesystem.pipe(f"{bucket}/x", b"")
    stranger = s3fs.S3FileSystem(key=swift.SwiftServer.access_key, secret="wrong", skip_instance_cache=True)
    with pytest.raises(PermissionError):
        stranger.cat(f"{bucket}/x")
    with pytest.raises(PermissionError):
        stranger.pipe(f"{bucket}/y", b"")


def test_conditional_put_refuses_an_existing_key(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    filesystem.pipe_file(f"{bucket}/once", b"first", mode="create")
    with pytest.raises(OSError, match="preconditions you specified did not hold") as caught:
        filesystem.pipe_file(f"{bucket}/once", b"second", mode="create")
    assert isinstance(caught.value.__cause__, ClientError)
    assert caught.value.__cause__.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert filesystem.cat(f"{bucket}/once") == b"first"


@pytest.mark.parametrize("key", ["mit Leerzeichen/größe ä.png", "图像/сто 100%+1&a=b?.jpg", "e\u0301 is not \u00e9"])
def test_key_beyond_ascii_round_trips(filesystem: s3fs.S3FileSystem, bucket: str, key: str) -> None:
    filesystem.pipe(f"{bucket}/{key}", key.encode())
    assert filesystem.find(bucket) == [f"{bucket}/{key}"]
    assert filesystem.cat(f"{bucket}/{key}") == key.encode()


def test_objects_written_in_parallel_are_all_listed(filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    bodies = {f"{bucket}/{number:03d}": str(number).encode() for number in range(200)}
    filesystem.pipe(bodies)
    assert sorted(filesystem.find(bucket)) == sorted(bodies)
    assert filesystem.cat(list(bodies)) == bodies


def test_pyarrow_reads_and_writes(s3_server: swift.SwiftServer, filesystem: s3fs.S3FileSystem, bucket: str) -> None:
    by_uri, path = pyarrow.fs.FileSystem.from_uri(f"s3://{bucket}/small")
    with by_uri.open_output_stream(path) as stream:
        stream.write(b"small")
    with by_uri.open_output_stream(f"{bucket}/big") as stream:
        stream.write(bytes(11 * MIB))
    assert filesystem.cat(path) == b"small"
    assert filesystem.info(f"{bucket}/big")["size"] == 11 * MIB
    by_argument = pyarrow.fs.S3FileSystem(endpoint_override=s3_server.endpoint_url)
    with by_argument.open_input_file(path) as file:
        assert file.read_at(3, 1) == b"mal"


def test_failed_start_shows_the_log_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift, "PROXY_CONF", "[app:proxy-server]\nuse = egg:swift#nonsense\n")
    server = swift.SwiftServer(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)the proxy server ended with status 1.*nonsense"):
        server.start()
    assert servers_under(tmp_path) == []
    server.stop()


def test_root_without_extended_attributes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(RuntimeError, match="user extended attributes"):
        swift.SwiftServer(tmp_path).start()


def test_servers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from tests.support.swift import SwiftServer\n"
        "server = SwiftServer(pathlib.Path(sys.stdin.readline().strip())); server.start()\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=swift.REPO_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(f"{tmp_path}\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "ready\n"
        assert len(servers_under(tmp_path)) == len(swift.SERVERS)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while servers_under(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert servers_under(tmp_path) == []
