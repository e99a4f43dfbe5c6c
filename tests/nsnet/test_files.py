"""Only regular files are opened, and every read has an end."""

import os
import socket
from pathlib import Path

import pytest

from nsnet import files


def test_file_is_read_whole(tmp_path: Path) -> None:
    content = os.urandom(files.CHUNK_BYTES + 17)
    (tmp_path / "file").write_bytes(content)
    assert files.read_regular(tmp_path / "file", len(content)) == content
    with files.open_regular(str(tmp_path / "file")) as file:
        assert file.read() == content


@pytest.mark.parametrize("max_bytes", [0, 1, 5])
def test_file_over_the_bound_is_refused_with_the_bound(max_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * (max_bytes + 1))
    with pytest.raises(OSError, match=f"larger than {max_bytes} bytes") as caught:
        files.read_regular(tmp_path / "file", max_bytes)
    assert caught.value.filename == str(tmp_path / "file")


def test_empty_file_is_read_under_the_smallest_bound(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files.read_regular(tmp_path / "file", 0) == b""


def test_file_without_a_size_is_read_to_the_bound() -> None:
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(OSError, match="larger than 100 bytes"):
        files.read_regular("/proc/self/maps", 100)


def test_fifo_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="not a regular file but a FIFO"):
        files.open_regular(tmp_path / "file")


def test_device_folder_and_socket_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        files.read_regular("/dev/zero", 10)
    with pytest.raises(IsADirectoryError):
        files.open_regular(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError):
            files.open_regular(tmp_path / "socket")


def test_link_is_followed_and_a_missing_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "link")
    (tmp_path / "file").write_bytes(b"content")
    assert files.read_regular(tmp_path / "link", 7) == b"content"


def test_refused_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError):
            files.open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
