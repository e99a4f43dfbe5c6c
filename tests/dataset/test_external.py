"""Parquet files as `datasets` writes them, with images inside or named by path; which paths are followed. Costs 3 s."""

import json
import os
import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.dataset import fetching
from jobs.dataset.source import Source
from nsnet.errors import FetchError, ObjectMissingError, SourceError
from tests.support.tables import image_file, parquet_bytes, put

IMAGES = [image_file(seed, width=24, height=24) for seed in range(4)]
SECRET = image_file(99, width=24, height=24)
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PATHS = ["images/0.png", "1.png", "./images/2.png", "ü 3.png"]
LABELS, EXPECTED = [1, 0, 0, 1], [0, 1, 1, 0]
LARGE = 10**6


def metadata(**columns: Any) -> dict[str, str | bytes]:
    """The metadata of the schema that `datasets` writes."""
    return {"huggingface": json.dumps({"info": {"features": columns}})}


LABEL = {"names": ["fake", "real"], "_type": "ClassLabel"}
NAMES = {"model_name": ["sdxl", None, "flux", "sdxl"], "label": LABELS}


def structs(contents: list[bytes | None], paths: list[str | None]) -> pa.Array:
    return pa.array([{"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)], IMAGE)


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stored with its name": ({"image": structs(IMAGES, ["a.png"] * 4)}, {"image": {"_type": "Image"}}),
    "bytes under another name": ({"image_data": IMAGES}, {"image_data": {"dtype": "binary", "_type": "Value"}}),
    "paths outside": ({"image": structs([None] * 4, PATHS)}, {"image": {"_type": "Image"}}),
    "some inside": ({"image": structs([*IMAGES[:2], None, None], PATHS)}, {"image": {"_type": "Image"}}),
    "paths and no schema": ({"image": [{"bytes": None, "path": path} for path in PATHS]}, {}),
}


def file_of(shape: str) -> bytes:
    columns, described = SHAPES[shape]
    return parquet_bytes(columns | NAMES, metadata(**described, label=LABEL), row_group_size=3)


def images_of(rows: list[dict[str, Any]], source: str | None = None) -> list[bytes]:
    return [fetching.fetch(row, LARGE, source).data for row in rows]


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    fetching.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_file_as_datasets_writes_it_is_a_source(shape: str, place: str) -> None:
    put(place, {f"data/{posixpath.normpath(path)}": image for path, image in zip(PATHS, IMAGES, strict=True)})
    put(place, {"data/train-00000-of-00001.parquet": file_of(shape)})
    uri = f"{place}/data/train-00000-of-00001.parquet"
    rows = list(Source(uri).rows())
    assert images_of(rows, uri) == IMAGES
    assert [row["label"] for row in rows] == EXPECTED
    assert [row["generator"] for row in rows] == NAMES["model_name"]
    assert [row["uri"] for row in rows] == [f"{uri}#{number}" for number in range(4)]


def test_many_short_paths_that_compress_well_are_believed_and_many_nulls_are_not(tmp_path: Path) -> None:
    paths: list[str | None] = [f"images/{number:06}.png" for number in range(20_000)]
    for name, rows in (("good", paths), ("bad", [None] * len(paths))):
        image = structs([None] * len(rows), rows)
        put(str(tmp_path), {f"{name}.parquet": parquet_bytes({"image": image}, compression="zstd")})
    assert (tmp_path / "good.parquet").stat().st_size < 20 * len(paths)
    assert sum(1 for _ in Source(str(tmp_path / "good.parquet")).rows()) == len(paths)
    with pytest.raises(SourceError, match=r"claims to hold 20,000 images in [0-9,]+ bytes, which is impossible"):
        list(Source(str(tmp_path / "bad.parquet")).rows())


def test_column_that_no_rule_finds_is_named(tmp_path: Path) -> None:
    content = parquet_bytes({"photo": structs([None] * 4, PATHS), "is_real": LABELS}, metadata(is_real=LABEL))
    put(str(tmp_path), dict(zip(PATHS, IMAGES, strict=True)) | {"x.parquet": content})
    rows = list(Source(str(tmp_path / "x.parquet"), columns={"image": "photo", "label": "is_real"}).rows())
    assert images_of(rows) == IMAGES and [row["label"] for row in rows] == EXPECTED


def rows_of(place: str, *paths: str | None) -> list[dict[str, Any]]:
    """Rows of the file `data/x.parquet` below a place, which names images and stores none."""
    put(place, {"data/x.parquet": parquet_bytes({"image": structs([None] * len(paths), list(paths))})})
    return [row for row in Source(place).rows() if row["container"]]


def test_path_is_relative_to_the_file_and_then_to_the_source(place: str) -> None:
    put(place, {"data/own.png": IMAGES[0], "own.png": IMAGES[1], "images/a.png": IMAGES[2]})
    own, other = rows_of(place, "own.png", "images/a.png")
    assert images_of([own, other], place) == [IMAGES[0], IMAGES[2]]
    for source in (None, f"{place}/data", f"{place}/data/x.parquet", f"{place}/dat", "/elsewhere"):
        assert images_of([own], source) == [IMAGES[0]]
        with pytest.raises(ObjectMissingError):
            fetching.fetch(other, LARGE, source)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "leads upwards"), ("images/../../secret.png", "leads upwards"), ("..", "leads upwards"),
        ("{place}/secret.png", "is absolute|is an address"), ("/secret.png", "is absolute"),
        ("//host/secret.png", "is absolute"),
        ("C:\\secret.png", "is absolute"), ("file://{place}/secret.png", "is an address"),
        ("s3://other-bucket/secret.png", "is an address"), ("hf://datasets/x/y.png", "is an address"),
        ("https://example.com/a.png", "is an address"), ("zip://a.png::/secret.zip", "is an address"),
        (".hidden.png", "is hidden"), ("images/.git/a.png", "is hidden"), (".", "names no file"),
        ("a.png\0", "is not UTF-8"), ("x" * 1025, "has more than 1,024 bytes"), ("ü" * 513, "has more than 1,024"),
    ],
)  # fmt: skip
def test_path_that_leads_elsewhere_is_one_row_that_failed_and_nothing_is_read(
    path: str, reason: str, place: str
) -> None:
    inside = f"{place}/in"
    put(place, {"secret.png": SECRET, "in/data/.hidden.png": SECRET, "in/data/a.png": IMAGES[0]})
    refused, good = rows_of(inside, path.replace("{place}", place), "a.png")
    with pytest.raises(FetchError, match=reason) as caught:
        fetching.fetch(refused, LARGE, inside)
    assert "\n" not in str(caught.value) and not caught.value.may_be_outage
    assert images_of([good], inside) == [IMAGES[0]]


def test_link_is_followed_below_the_source_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(str(tmp_path), {"secret.png": SECRET, "source/data/a.png": IMAGES[0], "source/b.png": IMAGES[1]})
    os.symlink(tmp_path / "secret.png", source / "data" / "file.png")
    os.symlink(tmp_path, source / "data" / "folder")
    os.symlink(source / "data" / "a.png", source / "data" / "good.png")
    os.symlink(source, tmp_path / "alias")
    out, folder, good = rows_of(str(source), "file.png", "folder/secret.png", "good.png")
    for row in (out, folder):
        with pytest.raises(FetchError, match="is a link to a file elsewhere"):
            fetching.fetch(row, LARGE, str(source))
    assert images_of([good], str(source)) == [IMAGES[0]]
    (through,) = rows_of(str(tmp_path / "alias"), "b.png")  # the source itself may be a link
    assert images_of([through], str(tmp_path / "alias")) == [IMAGES[1]]


def test_row_without_image_and_path_is_empty_and_its_neighbours_are_not(tmp_path: Path) -> None:
    put(str(tmp_path), {"data/a.png": IMAGES[0]})
    assert images_of(rows_of(str(tmp_path), None, "a.png", "")) == [b"", IMAGES[0], b""]


def test_path_that_is_no_utf_8_costs_its_row(tmp_path: Path) -> None:
    paths = pa.array([b"\xff.png", b"a.png"]).view(pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(2, pa.binary()), paths], ["bytes", "path"])
    put(str(tmp_path), {"a.png": IMAGES[0], "x.parquet": parquet_bytes({"image": image})})
    bad, good = Source(str(tmp_path / "x.parquet")).rows()
    with pytest.raises(ObjectMissingError):
        fetching.fetch(bad, LARGE)
    assert images_of([good]) == [IMAGES[0]]


def test_file_that_is_missing_or_too_large_costs_its_row(tmp_path: Path) -> None:
    put(str(tmp_path), {"data/a.png": IMAGES[0]})
    missing, good = rows_of(str(tmp_path), "b.png", "a.png")
    with pytest.raises(ObjectMissingError, match="b.png"):
        fetching.fetch(missing, LARGE, str(tmp_path))
    assert fetching.fetch(good, 10).data == IMAGES[0][:11]
