"""Members of tars: names, keys, sidecars, labels, and what stands behind an end. Costs 4 s."""

import io
import os
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.dataset.source import Source
from nsnet.errors import SourceError
from tests.support.tables import put, tar_bytes


def listed(place: Path, content: bytes) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of a tar, in the order of its members, and what was left out of it."""
    put(str(place), {"x.tar": content})
    source = Source(str(place / "x.tar"))
    return list(source.rows()), dict(source.left_out)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["uri"].partition("#")[2] for row in rows]


def labels(place: Path, files: Mapping[str, bytes]) -> dict[str, int | None]:
    rows, _ = listed(place, tar_bytes(files))
    return dict(zip(names(rows), [row["label"] for row in rows], strict=True))


def test_label_is_found_by_the_whole_stem(tmp_path: Path) -> None:
    files = {f"img.{i}.v1{ending}": b"%d" % (i % 2) for i in range(4) for ending in (".jpg", ".cls")}
    assert labels(tmp_path, files) == {f"img.{i}.v1.jpg": i % 2 for i in range(4)}


def test_label_of_the_key_serves_all_its_images_unless_they_contradict_each_other(tmp_path: Path) -> None:
    files = {"a.cls": b"1", "a.left.jpg": b"x", "a.right.jpg": b"x", "b.1.cls": b"0", "b.2.cls": b"1", "b.3.jpg": b"x"}
    assert labels(tmp_path, files) == {"a.left.jpg": 1, "a.right.jpg": 1, "b.3.jpg": None}


@pytest.mark.parametrize("said", [b"real", b" FAKE\n", b"1", b"", b"-1", b"\xff"])
def test_cls_says_a_word_a_number_or_nothing(said: bytes, tmp_path: Path) -> None:
    expected = {b"real": 0, b" FAKE\n": 1, b"1": 1}.get(said)
    assert labels(tmp_path, {"a.jpg": b"x", "a.cls": said}) == {"a.jpg": expected}


def test_cls_beats_the_folder(tmp_path: Path) -> None:
    assert labels(tmp_path, {"1_fake/a.jpg": b"x", "1_fake/a.cls": b"0"}) == {"1_fake/a.jpg": 0}


@pytest.mark.parametrize("ending", ".label .caption .text .prompt .id .__url__ .pyd .msgpack .width .index .pb".split())
def test_what_decoders_know_as_text_or_object_is_no_image(ending: str, tmp_path: Path) -> None:
    rows, left_out = listed(tmp_path, tar_bytes({"a.jpg": b"x", f"a{ending}": b"y", f"alone{ending}": b"y"}))
    assert names(rows) == ["a.jpg"] and left_out == {f"{ending} is no picture": 2}


def test_what_lies_beside_an_image_of_its_key_is_about_it(tmp_path: Path) -> None:
    files = {"a.jpg": b"x", "a.mystery": b"y", "b.mystery": b"z", "c.input.JPEG": b"x", "c.target.raw": b"y"}
    rows, left_out = listed(tmp_path, tar_bytes(files))
    assert names(rows) == ["a.jpg", "b.mystery", "c.input.JPEG"]
    assert left_out == {"beside a picture of the same key in a tar": 2}


def test_last_of_several_members_of_one_name_counts(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.jpg", b"old"), ("b.jpg", b"x"), ("a.jpg", b"new one")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows, left_out = listed(tmp_path, buffer.getvalue())
    assert names(rows) == ["b.jpg", "a.jpg"] and [row["size_bytes"] for row in rows] == [1, 7]
    assert left_out == {"replaced by a later member of the same name in a tar": 1}


@pytest.mark.parametrize("padding", [0, 10_240, 512, 1_000_448])
def test_tars_one_after_the_other_are_read_on(padding: int, tmp_path: Path) -> None:
    first, second = tar_bytes({"a.jpg": b"x" * 5000}), tar_bytes({"b.jpg": b"yy"})
    rows, left_out = listed(tmp_path, first + bytes(padding) + second)
    assert names(rows) == ["a.jpg", "b.jpg"] and left_out == {}
    content = (tmp_path / "x.tar").read_bytes()
    assert [content[row["position"] :][: row["size_bytes"]] for row in rows] == [b"x" * 5000, b"yy"]


def test_what_is_no_tar_behind_the_end_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, left_out = listed(tmp_path, tar_bytes({"a.jpg": b"x"}) + b"\x01" + os.urandom(4999))
    assert names(rows) == ["a.jpg"] and left_out == {"data behind the end of a tar": 1}
    assert "5,000 bytes after its end are not a tar" in capsys.readouterr().err


def test_hidden_files_and_folders_are_hidden(tmp_path: Path) -> None:
    hidden = (
        ".git/a.jpg",
        "x/.cache/b.jpg",
        "__MACOSX/._c.jpg",
        "x/.d.jpg",
        "./.ipynb_checkpoints/e.jpg",
        "$RECYCLE.BIN/f.jpg",
        "@eaDir/g.jpg/SYNOPHOTO_THUMB_XL.jpg",
        "lost+found/h",
        "s/_temporary/0/i.jpg",
    )
    rows, left_out = listed(tmp_path, tar_bytes(dict.fromkeys((*hidden, "./x/f.jpg", "../g.jpg"), b"x")))
    assert names(rows) == ["./x/f.jpg", "../g.jpg"] and left_out == {"hidden file": len(hidden)}


def sparse_member(layout: str) -> bytes:
    """A tar whose only member is sparse: 4 bytes that say that they are a terabyte."""
    member = tarfile.TarInfo("a.jpg")
    member.size = 4
    if layout == "pax":
        member.pax_headers = {"GNU.sparse.size": str(10**12), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,4"}
        header = member.tobuf(tarfile.PAX_FORMAT)
    else:
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[156:157] = b"S"
        header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 4
        header[483:495] = b"%011o\0" % (8**11 - 1)
        checksum = sum(header[:148]) + sum(header[156:512]) + 256
        header[148:156] = b"%06o\0 " % checksum
    return bytes(header) + b"data".ljust(512, b"\0") + bytes(1024)


@pytest.mark.parametrize("layout", ["pax", "gnu"])
def test_sparse_members_are_left_out(layout: str, tmp_path: Path) -> None:
    rows, left_out = listed(tmp_path, sparse_member(layout))
    assert rows == [] and left_out == {"sparse file in a tar": 1}


def claims(size: int, kind: bytes) -> bytes:
    """1 KB of a tar whose first header, of a long name or of PAX records, says that it has so many bytes."""
    member = tarfile.TarInfo("././@LongLink")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(512)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [200 * 10**9, 2**62])
def test_size_that_a_header_claims_is_not_believed(size: int, kind: bytes, tmp_path: Path) -> None:
    put(str(tmp_path), {"a.jpg": b"x", "b.tar": claims(size, kind)})
    source = Source(str(tmp_path))
    assert [row["uri"] for row in source.rows()] == [f"{tmp_path}/a.jpg"]
    assert source.left_out == {".tar that cannot be read": 1} and source.left_out.unread == 1
    reason = "is not a complete, uncompressed tar: ValueError: it has a header of"
    assert f"{tmp_path}/b.tar {reason}" in source.left_out.named[0]


def test_large_header_in_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(claims(10**9, tarfile.XHDTYPE))
        file.truncate(2 * 10**9)  # a sparse file on disk: the bytes are there
    with pytest.raises(SourceError, match="a header of 1,000,000,000 bytes; the limit is 1,048,576"):
        list(Source(str(tmp_path / "x.tar")).rows())


@pytest.mark.parametrize("where", ["x.tar", "x.parquet", "x.jpg"])
def test_fifo_in_the_place_of_a_file_hangs_nothing(where: str, tmp_path: Path) -> None:
    path = tmp_path / where
    os.mkfifo(path)
    source = Source(str(tmp_path))
    assert list(source.rows()) == [] and source.left_out == {"broken link or special file": 1}
    if where != "x.jpg":
        with pytest.raises(SourceError):
            list(Source(str(path)).rows())


def test_many_members_are_listed_with_few_readings(tmp_path: Path) -> None:
    files = {f"{i:05}.jpg": bytes(100) for i in range(3000)}
    before = threading.active_count()
    rows, _ = listed(tmp_path, tar_bytes(files))
    assert names(rows) == [*files] and threading.active_count() == before


def test_folders_of_a_tar_go_on_in_it(tmp_path: Path) -> None:
    tars = {
        "train/real/00.tar": {"a.jpg": b"x"},
        "train/fake/00.tar": {"sdxl/a.jpg": b"x", "b.jpg": b"x", "b.cls": b"0"},
    }
    put(str(tmp_path), {name: tar_bytes(files) for name, files in tars.items()})
    rows = {row["uri"].removeprefix(f"{tmp_path}/"): row for row in Source(str(tmp_path)).rows()}
    said = {name: (row["label"], row["split"]) for name, row in rows.items()}
    assert said == {
        "train/real/00.tar#a.jpg": (0, "train"),
        "train/fake/00.tar#sdxl/a.jpg": (1, "train"),
        "train/fake/00.tar#b.jpg": (0, "train"),
    }
    assert rows["train/fake/00.tar#sdxl/a.jpg"]["generator"] == "sdxl"
