"""Sources: what becomes a row, with which label, and what is left out and counted; on disk and on S3."""

import errno
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import endings, fetching, schema
from jobs.dataset.manifest import image_id, series
from jobs.dataset.source import Source
from jobs.storage import errors, filesystems, listing, reading
from jobs.storage.errors import Fault
from jobs.storage.uris import Uri
from nsnet.errors import (
    FetchError,
    ImageTooLargeError,
    ObjectChangedError,
    ObjectMissingError,
    SourceError,
    StorageError,
    UsageError,
)
from tests.support.proxy import PASS, Action, Always, Script, in_front_of
from tests.support.swift import SwiftServer
from tests.support.tables import image_file, manifest_row, new_bucket, parquet_bytes, put, tar_bytes, unmarked

Rows = list[dict[str, Any]]
IMAGE = image_file()
LARGE = 10**9
HASH = hashlib.sha256(IMAGE).hexdigest()


@pytest.fixture
def place(place: str) -> str:
    """A source named as AIGIBench names a generator."""
    return f"{place}/sdv1.4"


def rows_of(uri: str | Path) -> Rows:
    """In the order of their URIs and places: a listing comes in none."""
    rows = list(Source(str(uri)).rows())
    table = pa.Table.from_pylist(rows, schema=schema.MANIFEST)  # every row fits
    assert table.column("listed").null_count == 0
    return sorted(rows, key=lambda row: (row["container"] or row["uri"], row["position"] or 0))


def fetch(row: dict[str, Any], max_bytes: int) -> bytes:
    fetched = fetching.fetch(row, max_bytes)
    assert fetched.requests == 1
    return fetched.data


def by_name(place: str, rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["uri"].removeprefix(place).lstrip("/#"): row for row in rows}


def identities(rows: Rows) -> set[str]:
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"] for row in rows}


# Folders and prefixes.


def test_folder_gives_a_row_per_image_with_its_labels(place: str) -> None:
    files = ["train/0_real/a.jpg", "train/1_fake/b.PNG", "val/Glide/1_fake/ü #1?.webp", "c.jpg"]
    put(place, {name: IMAGE + bytes(i) for i, name in enumerate(files)})
    rows = by_name(place, rows_of(place))
    expected = [(0, "sdv1.4", "train"), (1, "sdv1.4", "train"), (1, "Glide", "val"), (None, None, None)]
    for i, (name, labels) in enumerate(zip(files, expected, strict=True)):
        row = rows.pop(name)
        assert (row["label"], row["generator"], row["split"]) == labels
        assert row["folder"] == (name.rpartition("/")[0] or None)
        assert row["uri"] == f"{place}/{name}" and row["size_bytes"] == len(IMAGE) + i
        assert row["etag"] == listing.describe(row["uri"]).etag != ""
        assert row["image_id"] == image_id(row["uri"], row["etag"])
        assert (row["container"], row["position"]) == (None, None)
        assert fetch(row, LARGE) == IMAGE + bytes(i)
    assert rows == {}


KEPT = [
    "photo.final.v2.JPEG", "x.jfif", "y.avif", "z.heic", "unknown.xyz", "no ending", "_underscore.png", "_", "a.b/c",
    "empty.png", "trailing dot.", "spaces  .jpg", "a/_b/c.tif", "tar", "x.tar.jpg", "README.png",
    "letter.doc", "film.mp4", "drawing.svg",
]  # fmt: skip
LEFT_OUT = {
    ".DS_Store": "hidden file", ".hidden.png": "hidden file", "a/._x.jpg": "hidden file", "._x.tar": "hidden file",
    ".part-0.parquet.crc": "hidden file", "_SUCCESS": "empty marker object", "README.md": ".md is no picture",
    "a/list.CSV": ".csv is no picture", "model.safetensors": ".safetensors is no picture",
    "shard.tar.gz": ".gz is no picture", "more.tgz": ".tgz is no picture", "labels.json": ".json is no picture",
}  # fmt: skip


def test_every_file_is_a_row_or_is_counted_by_reason(place: str) -> None:
    empty = {"empty.png", "_SUCCESS"}
    put(place, {name: b"" if name in empty else b"content" for name in [*KEPT, *LEFT_OUT]})
    source = Source(place)
    rows = by_name(place, list(source.rows()))
    assert sorted(rows) == sorted(KEPT)
    assert rows["empty.png"]["size_bytes"] == 0 and fetch(rows["empty.png"], 10) == b""
    reasons = list(LEFT_OUT.values())
    assert source.left_out == {reason: reasons.count(reason) for reason in reasons}


@pytest.mark.s3
def test_folder_markers_and_odd_keys_of_a_bucket(s3_environment: SwiftServer) -> None:
    bucket = new_bucket()
    system, _ = filesystems.filesystem(bucket)
    for key in ("p/", "p/a/", "p/x.tar/", "p/y.parquet/", "p/a//twice.jpg", "p/a/b.jpg", "pq.jpg"):
        system.call_s3("put_object", Bucket=bucket[5:], Key=key, Body=b"" if key.endswith("/") else b"x")
    source = Source(f"{bucket}/p")
    rows = list(source.rows())
    assert sorted(row["uri"] for row in rows) == [f"{bucket}/p/a//twice.jpg", f"{bucket}/p/a/b.jpg"]
    assert all(fetch(row, 10) == b"x" for row in rows)
    assert source.left_out == {"empty marker object": 4}


def test_links_are_counted(tmp_path: Path) -> None:
    put(str(tmp_path / "source"), {"a.jpg": b"x"})
    (tmp_path / "source" / "loop").symlink_to(tmp_path)
    (tmp_path / "source" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    source = Source(str(tmp_path / "source"))
    assert len(list(source.rows())) == 1
    assert source.left_out == {"link to a folder": 1, "broken link or special file": 1}


def test_name_that_is_no_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(b"x")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")
    source = Source(str(tmp_path))
    assert [row["uri"] for row in source.rows()] == [str(tmp_path / "good.jpg")]
    assert source.left_out == {"name that is no UTF-8": 1}


def test_identity_follows_uri_and_version(place: str) -> None:
    put(place, {"a.jpg": b"one", "b.jpg": b"one"})
    first = rows_of(place)
    assert identities(first) == identities(rows_of(place))
    put(place, {"a.jpg": b"two"})
    second = rows_of(place)
    assert len(identities(first) & identities(second)) == 1
    assert image_id("a", "bc") != image_id("ab", "c")
    assert len(image_id("s3://ü/图", "")) == 32


def test_fetch_reads_one_byte_more_than_allowed(place: str) -> None:
    put(place, {"a.jpg": bytes(1000), "b.tar": tar_bytes({"x.png": bytes(1000)})})
    put(place, {"c.parquet": parquet_bytes({"bytes": [bytes(1000)]})})
    rows = rows_of(place)
    assert len(rows) == 3
    for row in rows:
        assert [len(fetch(row, limit)) for limit in (10, 999, 1000, 1001)] == [11, 1000, 1000, 1000]


# Sources that are none.


@pytest.mark.parametrize(
    ("name", "said"),
    [("list.csv.gz", "a compressed file"), ("x.tar.lz4", "a compressed tar"), ("x.rar", "a RAR archive"),
     ("x.ndjson", "JSON lines"), ("list.xlsx", "a spreadsheet")],
)  # fmt: skip
def test_file_that_people_take_for_a_source_is_named_as_what_it_is(name: str, said: str, tmp_path: Path) -> None:
    put(str(tmp_path), {name: b"x"})
    with pytest.raises(SourceError, match=f"not a source: it is .*{said}"):
        Source(str(tmp_path / name)).check()


def test_missing_source_is_said(place: str) -> None:
    put(place, {"a.jpg": b"x"})
    for name, message in (("absent", "there is no folder or prefix"), ("absent.parquet", "there is no source")):
        with pytest.raises(SourceError, match=message):
            Source(f"{place}/{name}").check()
        with pytest.raises(SourceError, match=message):
            next(Source(f"{place}/{name}").rows())
    with pytest.raises(SourceError, match="is a file that is not a source: .* use nsnet predict"):
        Source(f"{place}/a.jpg").check()


def test_folder_without_images_gives_no_row(place: str, tmp_path: Path) -> None:
    put(place, {"README.md": b"x"})
    assert rows_of(place) == []
    (tmp_path / "empty").mkdir()
    assert rows_of(tmp_path / "empty") == []


def test_other_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="only local paths and s3://"):
        Source(Uri("https://example.org/pictures"))


@pytest.mark.s3
def test_missing_bucket_is_said(s3_environment: SwiftServer) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        Source("s3://there-is-no-such-bucket/x").check()


# Manifests.


def test_manifest_says_uri_label_generator_and_split(place: str) -> None:
    put(place, {f"{i}.jpg": bytes([i]) for i in range(4)})
    columns = {
        "uri": [f"{place}/{i}.jpg" for i in range(4)],
        "label": ["real", "FAKE", "1", None],
        "generator": ["g", None, "ü", ""],
        "split": ["train", "Validation", "test", "other"],
        "content_hash": [HASH, HASH.upper(), None, ""],
        "etag": ["v1", None, "", "v2"],
        "size_bytes": pa.array([1, 1, None, 1], pa.int64()),
        "more": [1, 2, 3, 4],
    }
    put(place, {"manifest.parquet": parquet_bytes(columns, row_group_size=2)})
    rows = rows_of(f"{place}/manifest.parquet")
    assert [row["label"] for row in rows] == [0, 1, 1, None]
    assert [row["generator"] for row in rows] == ["g", None, "ü", None]
    assert [row["split"] for row in rows] == ["train", "val", "test", None]
    assert [row["expected_hash"] for row in rows] == [HASH, HASH, None, None]
    assert {row["folder"] for row in rows} == {row["transform"] for row in rows} == {None}
    assert [row["etag"] for row in rows] == ["v1", "", "", "v2"]
    assert [row["size_bytes"] for row in rows] == [1, 1, None, 1]
    assert [fetch(row, LARGE) for row in rows] == [bytes([i]) for i in range(4)]
    assert rows[0]["image_id"] == image_id(f"{place}/0.jpg", "v1")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([0, 1, None], pa.int64()), [0, 1, None]),
        (pa.array([0, 1], pa.uint8()), [0, 1]),
        (pa.array([0.0, 1.0, float("nan")]), [0, 1, None]),
        (pa.array([False, True]), [0, 1]),
        (["0", " Real ", "fake", ""], [0, 0, 1, None]),
        (pa.array(["real", "fake"]).dictionary_encode(), [0, 1]),
    ],
)
def test_labels_of_every_type_are_understood(values: Any, expected: list[int | None], tmp_path: Path) -> None:
    uris = [f"/{i}" for i in range(len(expected))]
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": uris, "label": values})})
    assert [row["label"] for row in rows_of(tmp_path / "m.parquet")] == expected


@pytest.mark.parametrize("value", [2, 0.5, 1.5, -7, "12"])
def test_numbers_beyond_0_and_1_are_no_labels_of_any_row(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"uri": ["/a", "/b", "/c"], "label": [type(value)(0), type(value)(1), value]}
    put(str(tmp_path), {"m.parquet": parquet_bytes(columns)})
    assert [row["label"] for row in rows_of(tmp_path / "m.parquet")] == [None] * 3
    assert "m.parquet: its column `label` holds other values than real and fake, or 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "expected"), [([1, -1], [1, None]), (["fake", "ai?"], [1, None])])
def test_unknown_label_is_none_and_the_others_stay(
    values: list[Any], expected: list[int | None], tmp_path: Path
) -> None:
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b"], "label": values})})
    assert [row["label"] for row in rows_of(tmp_path / "m.parquet")] == expected


def problems(rows: Rows) -> list[str | None]:
    """Why rows name no image; such a row fails where it is fetched, and nothing else does."""
    for row in rows:
        if row["problem"]:
            with pytest.raises(FetchError, match=re.escape(row["problem"])):
                fetching.fetch(row, LARGE)
    return [row["problem"] for row in rows]


@pytest.mark.parametrize(
    "value", [HASH[:-1], HASH + "0", f" {HASH}", "sha256:" + HASH, "g" * 64, "\u0661" * 64, "-", 7, bytes.fromhex(HASH)]
)
def test_row_with_another_content_hash_fails_and_says_which(value: Any, tmp_path: Path) -> None:
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b"], "content_hash": [None, value]})})
    first, second = problems(rows_of(tmp_path / "m.parquet"))
    assert first is None and second is not None
    assert second.startswith("row 1 of the manifest: content_hash ") and "is not a SHA-256 of 64 hexadecimal" in second


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_content_hash_of_any_text_type_is_understood(kind: pa.DataType, tmp_path: Path) -> None:
    columns = {"uri": ["/a", "/b"], "content_hash": pa.array([HASH, None]).cast(kind)}
    put(str(tmp_path), {"m.parquet": parquet_bytes(columns)})
    assert [row["expected_hash"] for row in rows_of(tmp_path / "m.parquet")] == [HASH, None]


def test_stored_images_have_no_expected_hash(tmp_path: Path) -> None:
    columns = {"bytes": [b"x", b"y"], "content_hash": ["neither read nor judged" * 1000, None]}
    put(str(tmp_path), {"m.parquet": parquet_bytes(columns)})
    assert [row["expected_hash"] for row in rows_of(tmp_path / "m.parquet")] == [None, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [(["val", "", None], ["val", None, None]), (pa.nulls(2), [None, None]), (["TRAIN", "valid"], ["train", "val"])],
)
def test_split_of_a_manifest_may_be_missing(values: Any, expected: list[str | None], tmp_path: Path) -> None:
    columns = {"uri": [f"/{i}" for i in range(len(expected))], "split": values}
    put(str(tmp_path), {"m.parquet": parquet_bytes(columns)})
    assert [row["split"] for row in rows_of(tmp_path / "m.parquet")] == expected


def test_split_that_is_none_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b", "/c"], "split": ["dev", "holdout", "test"]})})
    assert [row["split"] for row in rows_of(tmp_path / "m.parquet")] == [None, None, "test"]
    log = capsys.readouterr().err
    assert log.count("warning") == 1 and "split 'dev' is none of train, val" in log


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_manifest_of_images_in_a_container_is_a_source_like_it(kind: str, place: str) -> None:
    """As a split is stored: the same identities, and the same bytes."""
    contents = {f"g/{i % 2}_{('real', 'fake')[i % 2]}/{i}.png": bytes([i]) * (i + 1) for i in range(4)}
    container = f"{place}/data.{kind}"
    columns = {"bytes": [*contents.values()], "label": [0, 1] * 2, "uri": ["http://x/a.png", "b", None, "b"]}
    content = tar_bytes(contents) if kind == "tar" else parquet_bytes(columns)
    put(place, {f"data.{kind}": content})
    listed = rows_of(container)
    kept = [{name: row[name] for name in schema.MANIFEST.names} | {"split": "test"} for row in listed]
    put(place, {"split.parquet": parquet_bytes(pa.Table.from_pylist(kept, schema=schema.MANIFEST).to_pydict())})
    found = rows_of(f"{place}/split.parquet")
    assert [row["image_id"] for row in found] == [row["image_id"] for row in listed]
    assert [row["label"] for row in found] == [0, 1, 0, 1] and {row["split"] for row in found} == {"test"}
    assert [fetch(row, 100) for row in found] == [*contents.values()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"container": "/x.zip"},
        {"container": "http://x/y.tar"},
        {"position": None},
        {"position": -1},
        {"size_bytes": None},
    ],
)
def test_row_of_a_container_that_makes_no_sense_fails(wrong: dict[str, Any], tmp_path: Path) -> None:
    row = {"uri": "/x.tar#1.png", "container": "/x.tar", "position": 512, "size_bytes": 10} | wrong
    put(str(tmp_path), {"m.parquet": parquet_bytes({name: [value] for name, value in row.items()})})
    (problem,) = problems(rows_of(tmp_path / "m.parquet"))
    assert problem is not None


def test_columns_of_other_tables_that_are_called_alike_do_no_harm(tmp_path: Path) -> None:
    for columns in ({"position": ["front", "back"]}, {"container": ["box 1", None]}):
        put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b"], **columns})})
        assert [row["container"] for row in rows_of(tmp_path / "m.parquet")] == [None, None]


def test_generators_that_are_numbers_become_text(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b"], "generator": [7, None], "etag": [1, 2]})})
    rows = rows_of(tmp_path / "m.parquet")
    assert [row["generator"] for row in rows] == ["7", None] and [row["etag"] for row in rows] == ["1", "2"]


def test_relative_uri_is_relative_to_its_manifest(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = ["x.jpg", "./sub/../x.jpg", f"{place}/lists/x.jpg", "../y.jpg"]
    put(place, {"lists/x.jpg": b"x", "y.jpg": b"y", "lists/m.parquet": parquet_bytes({"uri": uris})})
    rows = rows_of(f"{place}/lists/m.parquet")
    assert [row["uri"] for row in rows] == [f"{place}/lists/x.jpg"] * 3 + [f"{place}/y.jpg"]
    assert [fetch(row, LARGE) for row in rows] == [b"x", b"x", b"x", b"y"]


def test_relative_manifest_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        str(tmp_path), {"a/x.jpg": b"x", "a/m.parquet": parquet_bytes({"uri": ["x.jpg", f"file://{tmp_path}/a/x.jpg"]})}
    )
    monkeypatch.chdir(tmp_path)
    assert [row["uri"] for row in rows_of("a/m.parquet")] == [f"{tmp_path}/a/x.jpg"] * 2


def test_manifest_without_a_column_of_images_is_refused(place: str) -> None:
    put(place, {"m.parquet": parquet_bytes({"url": ["a"], "label": [1]})})
    message = r"m\.parquet has neither a `uri` column nor an image column .*, only label \(int64\), url \(string\)"
    with pytest.raises(SourceError, match=message):
        rows_of(f"{place}/m.parquet")


def test_container_that_cannot_be_read_does_not_stop_the_rest(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(place, {"a.jpg": b"x", "b.tar": tar_bytes({"b.jpg": b"y"}), "cut.tar": tar_bytes({"c.jpg": b"z"})[:700]})
    put(place, {"statistics.parquet": parquet_bytes({"mean": [1.0]}), "x.parquet": b"no Parquet"})
    source = Source(place)
    assert sorted(row["uri"] for row in source.rows()) == [f"{place}/a.jpg", f"{place}/b.tar#b.jpg"]
    assert source.left_out == {
        ".tar that cannot be read": 1,
        ".parquet that cannot be read": 1,
        ".parquet without pictures": 1,
    }
    assert source.left_out.unread == 2  # what can be read, and holds no images, is no reason to worry
    said = unmarked(capsys.readouterr().err)
    assert all(f"warning: left out: {place}/{name}" in said for name in ("cut.tar", "x.parquet"))
    assert f"\nleft out: {place}/statistics.parquet" in f"\n{said}"


def sized_member(size_bytes: int) -> bytes:
    """A tar's header of a member that says to be of this size."""
    member = tarfile.TarInfo("x.jpg")
    member.size = size_bytes
    return member.tobuf(tarfile.GNU_FORMAT)


def pax_header(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A tar's extended header of these records, whatever they are."""
    text = b""
    for name, value in records.items():
        rest = f" {name}={value}\n"
        length = next(n for n in range(len(rest), 2 * len(rest)) if n == len(rest) + len(str(n)))
        text += f"{length}{rest}".encode()
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, len(text)
    return member.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % tarfile.BLOCKSIZE)


HOSTILE_TARS = {
    "sparse map of letters": pax_header({"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"}),
    "sparse without a map": pax_header({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "size beyond all files": pax_header({"size": "9" * 30}),
    "headers of headers": pax_header({"comment": "x"}) * 2000,
    "negative size": sized_member(-512),
    "size of minus one": sized_member(-1),
    "long name for all": pax_header({"path": "x" * 100_000}, tarfile.XGLTYPE),
}


@pytest.mark.parametrize("header", HOSTILE_TARS.values(), ids=list(HOSTILE_TARS))
def test_hostile_tar_does_not_stop_the_rest(header: bytes, tmp_path: Path) -> None:
    put(str(tmp_path), {"a.jpg": b"x", "b.tar": header + tar_bytes({"b.jpg": b"y"})})
    source = Source(str(tmp_path))
    assert f"{tmp_path}/a.jpg" in {row["uri"] for row in source.rows()}
    assert source.left_out == {".tar that cannot be read": 1}
    with pytest.raises(SourceError, match=r"b\.tar is not a complete, uncompressed tar"):
        rows_of(tmp_path / "b.tar")


def damaged_page() -> bytes:
    """Parquet with a whole footer and a column of which a page is damaged."""
    columns = {"generator": [f"name-{i}" for i in range(5000)], "bytes": [b"x"] * 5000}
    data = bytearray(parquet_bytes(columns, compression="zstd", use_dictionary=False))
    place = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).data_page_offset
    data[place + 40 : place + 60] = bytes(letter ^ 0xFF for letter in data[place + 40 : place + 60])
    return bytes(data)


def no_utf8() -> bytes:
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    return parquet_bytes({"generator": text, "bytes": [b"x"]})


HOSTILE_PARQUET = {
    "damaged page": damaged_page,
    "no UTF-8": no_utf8,
    "rows of nothing": lambda: parquet_bytes({"bytes": pa.nulls(100_000, pa.binary())}),
    "long text many times": lambda: parquet_bytes({"label": ["x" * 10_000] * 3000, "bytes": [b""] * 3000}),
}


def test_long_hash_many_times_does_not_fill_the_memory(tmp_path: Path) -> None:
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * 2**20]))
    columns = {"uri": ["/a"] * 5000, "content_hash": often}
    content = parquet_bytes(columns, store_schema=False, dictionary_pagesize_limit=2**24)
    assert len(content) < 2 * 2**20
    put(str(tmp_path), {"m.parquet": content})
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(SourceError, match="a text of column `content_hash` has 1,048,576 bytes, the limit is 8,192"):
        rows_of(tmp_path / "m.parquet")
    assert pa.default_memory_pool().max_memory() - before < 50 * 2**20


@pytest.mark.parametrize("content", HOSTILE_PARQUET.values(), ids=list(HOSTILE_PARQUET))
def test_hostile_parquet_does_not_stop_the_rest(content: Callable[[], bytes], tmp_path: Path) -> None:
    put(str(tmp_path), {"a.jpg": b"x", "b.parquet": content()})
    source = Source(str(tmp_path))
    assert [row["uri"] for row in source.rows()] == [f"{tmp_path}/a.jpg"]
    assert source.left_out == {".parquet that cannot be read": 1}
    with pytest.raises(SourceError, match=r"b\.parquet(: a text|: column| is not a complete Parquet file| claims to)"):
        rows_of(tmp_path / "b.parquet")


@pytest.mark.s3
def test_store_that_fails_is_not_taken_for_a_damaged_container(s3_environment: SwiftServer) -> None:
    with in_front_of(s3_environment) as proxy:
        for name, content in (("b.parquet", parquet_bytes({"bytes": [b"x"]})), ("b.tar", tar_bytes({"b.jpg": b"y"}))):
            bucket = put(new_bucket(), {"a.jpg": b"x", name: content})
            proxy.policy = Always(Action("slow_down"), wanted=f"/{name}")
            with pytest.raises(Exception, match="SlowDown|Service Unavailable|So the proxy says") as caught:
                list(Source(bucket).rows())
            assert errors.kind(caught.value) is Fault.TRANSIENT
            proxy.policy = Always(PASS)


@pytest.mark.s3
def test_image_in_parquet_is_asked_for_again_and_says_so(s3_environment: SwiftServer) -> None:
    with in_front_of(s3_environment) as proxy:
        bucket = put(new_bucket(), {"x.parquet": parquet_bytes({"bytes": [b"x" * 100]})})
        (row,) = rows_of(f"{bucket}/x.parquet")
        proxy.policy = Script(*[Action("slow_down")] * 6, wanted="/x.parquet")
        fetched = fetching.fetch(row, 1000)
        assert fetched.data == b"x" * 100 and fetched.requests == 2


def test_image_that_is_stored_once_and_meant_often_does_not_fill_the_memory(
    tmp_path: Path,
) -> None:
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([os.urandom(2**20)], pa.binary()))
    content = parquet_bytes({"bytes": often}, store_schema=False, dictionary_pagesize_limit=2**24)
    assert len(content) < 2 * 2**20
    put(str(tmp_path), {"x.parquet": content})
    row = rows_of(tmp_path / "x.parquet")[4999]
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ImageTooLargeError, match="hold images of more than [0-9,]+ bytes"):
        fetch(row, 2**21)
    assert len(fetch(rows_of(tmp_path / "x.parquet")[3], 2**21)) == 2**20
    assert pa.default_memory_pool().max_memory() - before < 50 * 2**20


def test_stored_images_among_others_speak_for_themselves_only(place: str) -> None:
    columns = {"uri": [f"{place}/a.jpg", None], "bytes": [b"x", b"y"], "label": ["real", None]}
    put(place, {"a.jpg": b"x", "b.parquet": parquet_bytes(columns)})
    uris = sorted(row["uri"] for row in Source(place).rows())
    assert uris == [f"{place}/a.jpg", f"{place}/b.parquet#0", f"{place}/b.parquet#1"]


def test_manifest_among_images_is_not_followed(place: str, tmp_path: Path) -> None:
    """Whoever may put a file into a bucket must not have others read."""
    put(place, {"a.jpg": b"x", "m.parquet": parquet_bytes({"uri": [str(tmp_path / "secret"), "s3://other/secret"]})})
    source = Source(place)
    assert [row["uri"] for row in source.rows()] == [f"{place}/a.jpg"]
    assert source.left_out == {".parquet without pictures": 1}


@pytest.mark.s3
def test_manifest_in_a_bucket_names_no_file_of_this_machine(s3_environment: SwiftServer) -> None:
    bucket = new_bucket()
    uris = [f"{bucket}/a.jpg", "/etc/passwd", "file:///etc/passwd", "../../../etc/passwd", "b.jpg"]
    put(bucket, {"m.parquet": parquet_bytes({"uri": uris})})
    found = problems(list(Source(f"{bucket}/m.parquet").rows()))
    assert [problem is None for problem in found] == [True, False, False, False, True]
    assert "is a local path" in str(found[1])


@pytest.mark.parametrize("name", ["b.tar", "b.parquet"])
def test_container_that_may_not_be_read_does_not_stop_the_rest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(
        str(tmp_path),
        {"a.jpg": b"x", "b.tar": tar_bytes({"b.jpg": b"y"}), "b.parquet": parquet_bytes({"bytes": [b"x"]})},
    )
    reader = reading.reader

    def denied(uri: str) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", uri)

        return read if uri.endswith(name) else reader(uri)

    monkeypatch.setattr(reading, "reader", denied)
    source = Source(str(tmp_path))
    assert len(list(source.rows())) == 2 and source.left_out.unread == 1
    assert f"{name}: it cannot be read: " in source.left_out.named[0]


@pytest.mark.parametrize("include", [(), ("*.txt",), ("*.jpg", "*/*.TXT")])
def test_ending_of_sidecars_is_tried_where_it_is_asked_for(include: tuple[str, ...], tmp_path: Path) -> None:
    put(str(tmp_path), {"a/a.jpg": b"x", "a/a.txt": b"x", "a/a.TXT": b"x", "a/a.json": b"x"})
    put(str(tmp_path / "tar"), {"b.tar": tar_bytes({"b/b.txt": b"x", "b/b.json": b"x"})})
    listed, tar = Source(str(tmp_path / "a"), include), Source(str(tmp_path / "tar" / "b.tar"), include)
    found = {PurePosixPath(row["uri"]).name for source in (listed, tar) for row in source.rows()}
    expected = {(): {"a.jpg"}, ("*.txt",): {"a.txt", "b.txt"}, ("*.jpg", "*/*.TXT"): {"a.jpg"}}
    assert found == expected[include]
    assert listed.left_out[".json is no picture"] == tar.left_out[".json is no picture"] == 1
    assert (listed.left_out[".txt is no picture"] == 2) == (not include)


def test_excluded_container_is_not_opened(place: str) -> None:
    put(place, {"a.jpg": b"x", "deep/cut.tar": b"no tar"})
    source = Source(place, exclude=["*.tar"])
    assert [row["uri"] for row in source.rows()] == [f"{place}/a.jpg"]
    assert source.left_out == {"excluded": 1}


@pytest.mark.parametrize("value", [-1, 2**64, "many", float("inf")])
def test_row_of_a_size_that_is_no_number_of_bytes_fails(value: Any, tmp_path: Path) -> None:
    column = pa.array([value], pa.decimal128(30) if value == 2**64 else None)
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a"], "size_bytes": column})})
    (problem,) = problems(rows_of(tmp_path / "m.parquet"))
    assert problem is not None and "is not a number of bytes" in problem


def test_size_may_be_a_whole_float_or_nothing(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": ["/a", "/b"], "size_bytes": [7.0, float("nan")]})})
    assert [row["size_bytes"] for row in rows_of(tmp_path / "m.parquet")] == [7, None]


def test_bad_row_of_a_manifest_fails_alone(tmp_path: Path) -> None:
    uris = [str(tmp_path / "a.jpg"), None, "https://user:pw@x/y.jpg?token=abc", "s3://", "gs://b/x", "", "b\0c"]
    put(str(tmp_path), {"a.jpg": b"x", "m.parquet": parquet_bytes({"uri": uris, "label": [1] * 7})})
    rows = list(Source(str(tmp_path / "m.parquet")).rows())
    found = problems(rows)
    assert [problem is None for problem in found] == [True, *[False] * 6]
    assert rows[1]["uri"] == f"{tmp_path}/m.parquet#1" and found[1] == "row 1 of the manifest: it has no uri"
    assert "holds a user, a password or a signature, which is not allowed in an address" in str(found[2])
    assert "only local paths and s3:// are supported, not gs://" in str(found[4])
    assert not any(secret in str(row) for row in rows for secret in ("user:pw", "token=abc"))
    identities(rows)
    assert [row["label"] for row in rows] == [1] * 7
    assert fetch(rows[0], LARGE) == b"x"


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("train-00000-6347f3d7.tar train-00001-6347f3d8.tar train-00002-6347F3D9.tar", 1),
        ("0b5c6a2e-1d3f-4a5b-8c7d-9e0f1a2b3c4d.tar 1B5C6A2E-1D3F-4A5B-8C7D-9E0F1A2B3C4D.tar", 1),
        ("part_00000000.tar part_00000001.tar", 1),
        ("a0000001.tar b0000001.tar", 1),
        ("20230101fake.tar 20230101real.tar", 2),
        ("decade.tar facade.tar", 2),
    ],
)
def test_series_of_containers_are_parted_by_their_words(names: str, count: int) -> None:
    assert len({series(f"s3://bucket/{name}") for name in names.split()}) == count


def test_rows_that_differ_in_a_secret_alone_are_two_rows(tmp_path: Path) -> None:
    uris = [f"https://store/a.jpg?sig={secret}" for secret in ("one", "two")]
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": uris})})
    rows = list(Source(str(tmp_path / "m.parquet")).rows())
    assert len(identities(rows)) == 2 and all("a.jpg?***" in str(problem) for problem in problems(rows))


def test_file_that_is_no_parquet_is_refused(place: str) -> None:
    whole = parquet_bytes({"uri": ["a"]})
    for content in (b"", b"text", whole[:-20], bytes(5000)):
        put(place, {"m.parquet": content})
        with pytest.raises(SourceError, match=r"m\.parquet is not a complete Parquet file"):
            rows_of(f"{place}/m.parquet")


def test_folder_named_like_a_file_is_a_folder(place: str) -> None:
    """What Spark and Ray write."""
    put(place, {"m.parquet/part-0.parquet": parquet_bytes({"uri": [f"{place}/a"]}), "m.parquet/_SUCCESS": b""})
    put(place, {"m.parquet/part-1.parquet": parquet_bytes({"uri": [f"{place}/b"]})})
    assert sorted(row["uri"] for row in rows_of(f"{place}/m.parquet")) == [f"{place}/a", f"{place}/b"]


# Images inside Parquet.


def test_parquet_holds_images(place: str) -> None:
    images = [bytes([i]) * (i + 1) for i in range(25)]
    images[7] = None  # type: ignore[call-overload]
    columns = {"bytes": images, "label": [i % 2 for i in range(25)], "generator": ["g"] * 25}
    put(place, {"shard.parquet": parquet_bytes(columns, row_group_size=10)})
    rows = rows_of(place)
    assert [row["uri"] for row in rows] == [f"{place}/shard.parquet#{i}" for i in range(25)]
    assert [row["position"] for row in rows] == list(range(25)) and {row["size_bytes"] for row in rows} == {None}
    assert [row["label"] for row in rows] == columns["label"]
    identities(rows)
    for i in (24, 0, 10, 9, 7, 19, 20):
        assert fetch(rows[i], LARGE) == (images[i] or b"")
    with pytest.raises(FetchError):
        fetch({**rows[0], "position": 25}, LARGE)


def test_images_of_one_uri_are_told_apart(tmp_path: Path) -> None:
    columns = {"bytes": [b"1", b"2", b"3"], "uri": ["http://x/a.jpg", "http://x/a.jpg", None]}
    put(str(tmp_path), {"shard.parquet": parquet_bytes(columns)})
    rows = rows_of(tmp_path / "shard.parquet")
    assert [row["uri"] for row in rows] == ["http://x/a.jpg"] * 2 + [f"{tmp_path}/shard.parquet#2"]
    identities(rows)
    assert [fetch(row, LARGE) for row in rows] == [b"1", b"2", b"3"]


def test_neighbours_in_a_row_group_are_read_once(tmp_path: Path) -> None:
    put(str(tmp_path), {"shard.parquet": parquet_bytes({"bytes": [os.urandom(50_000) for _ in range(100)]})})
    rows = rows_of(tmp_path / "shard.parquet")

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    assert sum(len(fetch(row, LARGE)) for row in rows) == 5_000_000
    assert read_so_far() - before < 15_000_000


# WebDataset tars.


def test_tar_gives_a_row_per_member(place: str) -> None:
    files = {
        "0_real/a.jpg": b"AAA", "train/Glide/1_fake/b.c.png": b"BB", "c.jpg": b"CCCC", "c.cls": b"1\n", "d.jpg": b"D",
        "d.cls": b"", "e/f.webp": b"", "c.json": b"{}", ".DS_Store": b"x", "e/._f.webp": b"x", "e/f.cls": b"real",
    }  # fmt: skip
    put(place, {"shard-000.tar": tar_bytes(files)})
    source = Source(place)
    rows = by_name(f"{place}/shard-000.tar", list(source.rows()))
    labels = {name: (row["label"], row["generator"], row["split"]) for name, row in rows.items()}
    assert labels == {
        "0_real/a.jpg": (0, None, None), "train/Glide/1_fake/b.c.png": (1, "Glide", "train"), "c.jpg": (1, None, None),
        "d.jpg": (None, None, None), "e/f.webp": (0, None, None),
    }  # fmt: skip
    folders = {name: row["folder"] for name, row in rows.items() if row["folder"]}  # a .cls file is no folder
    assert folders == {"0_real/a.jpg": "0_real", "train/Glide/1_fake/b.c.png": "train/Glide/1_fake"}
    for name, row in rows.items():
        assert fetch(row, LARGE) == files[name] and row["size_bytes"] == len(files[name])
        assert row["container"] == f"{place}/shard-000.tar"
    assert source.left_out == {".json is no picture": 1, "hidden file": 2}
    assert identities(list(rows.values())) == identities(rows_of(f"{place}/shard-000.tar"))


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_member_names_of_any_kind_are_only_names(layout: int, tmp_path: Path) -> None:
    files = {"../../etc/passwd": b"1", "/absolute.jpg": b"2", "ü 图.png": b"3", f"{'d/' * 45}long.jpg": b"4"}
    put(str(tmp_path), {"x.tar": tar_bytes(files, format=layout)})
    rows = by_name(f"{tmp_path}/x.tar#", rows_of(tmp_path / "x.tar"))
    assert {name: fetch(row, LARGE) for name, row in rows.items()} == {k.lstrip("/"): v for k, v in files.items()}
    assert os.listdir(tmp_path) == ["x.tar"]


def test_member_names_that_are_no_text_stay_apart(tmp_path: Path) -> None:
    files = {os.fsdecode(b"caf\xe9.jpg"): b"1", os.fsdecode(b"caf\xe8.jpg"): b"2"}
    put(str(tmp_path), {"x.tar": tar_bytes(files, format=tarfile.GNU_FORMAT, errors="surrogateescape")})
    rows = rows_of(tmp_path / "x.tar")
    identities(rows)
    assert [fetch(row, LARGE) for row in rows] == [b"1", b"2"]


def test_links_in_a_tar_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("a/x.jpg")
        tar.addfile(member)
    source = Source(str(tmp_path))
    assert [row["uri"] for row in source.rows()] == [f"{tmp_path}/x.tar#a/x.jpg"]
    assert source.left_out == {"link or special file in a tar": 2}


def test_tar_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes({"a.jpg": bytes(700), "b.jpg": bytes(100), "c.jpg": bytes(10)}, format=tarfile.USTAR_FORMAT)
    put(str(tmp_path), {"x.tar": whole})
    assert len(rows_of(tmp_path / "x.tar")) == 3
    # in a header, in a body, between two members, and before the end mark
    for length in (100, 600, 1536, 1700, 2100, 2560, 3584 - 1, 3584):
        put(str(tmp_path), {"x.tar": whole[:length]})
        with pytest.raises(SourceError, match=r"x\.tar is not a complete, uncompressed tar"):
            rows_of(tmp_path / "x.tar")


def test_tar_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes({"a.jpg": bytes(10), "b.jpg": bytes(10), "c.jpg": bytes(10)}))
    whole[1024 + 20] ^= 0xFF
    put(str(tmp_path), {"x.tar": bytes(whole)})
    with pytest.raises(SourceError, match="damaged or truncated at byte 1,024"):
        rows_of(tmp_path / "x.tar")


@pytest.mark.parametrize(
    "content", [b"", b"text" * 1000, tar_bytes({"a.jpg": b"x"}, mode="w:gz")], ids=["empty", "text", "gz"]
)
def test_other_content_or_compressed_tar_is_refused(content: bytes, place: str) -> None:
    put(place, {"x.tar": content})
    with pytest.raises(SourceError, match=r"x\.tar is not a complete, uncompressed tar"):
        rows_of(f"{place}/x.tar")


def test_classes_in_a_tar_are_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{number}.jpg": b"x" for number in range(3)} | {f"{number}.cls": b"%d" % number for number in range(3)}
    put(str(tmp_path), {"x.tar": tar_bytes(files)})
    assert [row["label"] for row in rows_of(tmp_path / "x.tar")] == [None] * 3
    assert "x.tar: its .cls members hold other numbers than 0 and 1" in capsys.readouterr().err


# Fetching.


def test_fetch_of_what_is_gone_is_missing(place: str) -> None:
    put(place, {"a.jpg": b"x"})
    for row in (
        manifest_row(f"{place}/b.jpg"),
        manifest_row("x", container=f"{place}/b.tar", position=512, size_bytes=3),
        manifest_row("x", container=f"{place}/b.parquet", position=0),
    ):
        with pytest.raises(ObjectMissingError) as caught:
            fetch(row, LARGE)
        assert caught.value.may_be_outage and caught.value.requests == 1


def containers(content: bytes) -> dict[str, bytes]:
    return {
        "a.jpg": content, "b.tar": tar_bytes({"x.png": content}),
        "c.parquet": parquet_bytes({"bytes": [content, b"more"]}),
    }  # fmt: skip


@pytest.mark.parametrize("replacement", [IMAGE[::-1], IMAGE + b"longer", b"short", b""])
def test_fetch_of_what_was_replaced_since_it_was_listed_has_changed(replacement: bytes, place: str) -> None:
    put(place, containers(IMAGE))
    rows = rows_of(place)
    assert [row["listed"] for row in rows] == [True] * 4
    assert {fetch(row, LARGE) for row in rows} == {IMAGE, b"more"}
    put(place, containers(replacement))
    fetching.close()  # what was read before is still there, and is what was listed
    for row in rows:
        with pytest.raises(ObjectChangedError) as caught:
            fetch(row, LARGE)
        assert not caught.value.may_be_outage


def test_image_of_a_manifest_may_have_any_version(place: str) -> None:
    """Its etag column is somebody else's: it tells versions apart, and need not be the store's own."""
    columns = {"uri": [f"{place}/a.jpg"], "etag": ["2024-05-01"]}
    put(place, {"a.jpg": b"x", "manifest.parquet": parquet_bytes(columns)})
    (row,) = rows_of(f"{place}/manifest.parquet")
    assert (row["listed"], row["etag"], row["modified_at"]) == (False, "2024-05-01", None)
    assert fetch(row, LARGE) == b"x"
    put(place, {"a.jpg": b"y"})
    assert fetch(row, LARGE) == b"y"


def test_rows_say_when_their_object_was_changed(place: str) -> None:
    put(place, containers(IMAGE))
    for row in rows_of(place):
        assert row["modified_at"] == listing.describe(row["container"] or row["uri"]).modified_at


@pytest.mark.s3
def test_fetch_says_how_often_it_asked(s3_environment: SwiftServer) -> None:
    with in_front_of(s3_environment) as proxy:
        bucket = put(new_bucket(), containers(IMAGE))
        image, member = (row for row in rows_of(bucket) if row["uri"].endswith((".jpg", ".png")))
        for row, name in ((image, "/a.jpg"), (member, "/b.tar")):
            proxy.policy = Script(Action("slow_down"), Action("cut", 0.5), wanted=name)
            fetched = fetching.fetch(row, LARGE)
            assert fetched.data == IMAGE and fetched.requests > 1


@pytest.mark.s3
def test_image_in_a_parquet_survives_a_bad_network(s3_environment: SwiftServer) -> None:
    with in_front_of(s3_environment) as proxy:
        images = [os.urandom(20_000) for _ in range(6)]
        bucket = put(new_bucket(), {"c.parquet": parquet_bytes({"bytes": images}, row_group_size=2)})
        rows = rows_of(bucket)
        for fault in (Action("slow_down"), Action("reset"), Action("cut", 0.5)):
            fetching.close()
            proxy.policy = Script(*[fault] * 3, wanted="/c.parquet")
            assert [fetching.fetch(row, LARGE).data for row in rows] == images
            assert proxy.counts[fault.kind] == 3


# What is wanted of a source.

FILTERED = ["a.jpg", "a.png", "b/a.jpg", "b/a.PNG", "b/c/a.jpg", "b/[x] 1.jpg"]
FILTERS: list[tuple[list[str], list[str], list[str]]] = [
    ([], [], FILTERED),
    (["*.jpg"], [], ["a.jpg", "b/a.jpg", "b/c/a.jpg", "b/[x] 1.jpg"]),
    (["a.*"], [], ["a.jpg", "a.png"]),
    (["b/*"], [], ["b/a.jpg", "b/a.PNG", "b/c/a.jpg", "b/[x] 1.jpg"]),
    (["*/c/*", "a.p?g"], [], ["a.png", "b/c/a.jpg"]),
    ([], ["b/*"], ["a.jpg", "a.png"]),
    (["*.jpg"], ["*/c/*"], ["a.jpg", "b/a.jpg", "b/[x] 1.jpg"]),
    (["*.[pP][nN][gG]"], [], ["a.png", "b/a.PNG"]),
    (["b/[[]x] ?.jpg"], [], ["b/[x] 1.jpg"]),
    (["jpg", "a", "b"], [], []),
    (["*"], ["*"], []),
]


@pytest.mark.parametrize(("include", "exclude", "expected"), FILTERS)
def test_images_are_chosen_by_their_path(
    include: list[str], exclude: list[str], expected: list[str], place: str
) -> None:
    put(place, {name: b"x" for name in FILTERED})
    source = Source(place, include, exclude)
    assert sorted(by_name(place, list(source.rows()))) == sorted(expected)
    assert sum(source.left_out.values()) == len(FILTERED) - len(expected)
    assert set(source.left_out) <= {"excluded", "not included"}


def test_what_was_not_chosen_is_counted_by_reason(place: str) -> None:
    put(place, {name: b"x" for name in FILTERED})
    source = Source(place, ["*.jpg"], ["b/*"])
    assert [row["uri"] for row in source.rows()] == [f"{place}/a.jpg"]
    assert source.left_out == {"excluded": 4, "not included": 1}


def test_members_of_containers_are_chosen_by_their_own_names(place: str) -> None:
    put(place, {"s/x.tar": tar_bytes({"d/a.jpg": b"1", "b.jpg": b"2"}), "y.parquet": parquet_bytes({"bytes": [b"3"]})})
    for include, expected in (
        (["s/x.tar#d/*"], [b"1"]), (["*.jpg"], [b"1", b"2"]), (["*#0"], [b"3"]), (["s/*"], [b"1", b"2"]),
    ):  # fmt: skip
        rows = list(Source(place, include).rows())
        assert sorted(fetch(row, LARGE) for row in rows) == expected
    rows = list(Source(f"{place}/s/x.tar", ["d/*"]).rows())  # the source itself: the name in the tar
    assert [fetch(row, LARGE) for row in rows] == [b"1"]


def test_images_of_a_manifest_are_chosen_by_their_whole_uri(tmp_path: Path) -> None:
    uris = ["s3://one/a.jpg", "s3://two/a.jpg", "/disk/a.png"]
    put(str(tmp_path), {"m.parquet": parquet_bytes({"uri": uris})})
    choices = [(["s3://one/*"], uris[:1]), (["*.jpg"], uris[:2]), (["*/a.png"], uris[2:]), (["/disk/*"], uris[2:])]
    for include, expected in choices:
        rows = list(Source(f"{tmp_path}/m.parquet", include).rows())
        assert [row["uri"] for row in rows] == expected


def test_kinds_that_pillow_opens_are_not_left_out() -> None:
    from PIL import Image

    from nsnet.images import FORMATS

    Image.init()
    known = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    assert known and not known & endings.SIDECARS
