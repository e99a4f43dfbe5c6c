"""The plan: a source's listing as a manifest, each picture once, and nothing left behind by a source without any."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import plan, schema, storage
from jobs.plan import write_manifest
from jobs.sources import Source
from nsnet.errors import SourceError, UsageError
from tests.swift import SwiftServer
from tests.tables import new_bucket, put


def manifest_of(uri: str) -> list[dict[str, Any]]:
    system, path = storage.arrow_filesystem(uri)
    table = pq.read_table(path, filesystem=system)
    assert table.schema.equals(schema.MANIFEST)
    return table.to_pylist()


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    files = {f"0_real/{i}.jpg": b"x" for i in range(5)} | {f"1_fake/{i}.jpg": b"x" for i in range(3)}
    return put(str(tmp_path / "pictures"), {**files, "c.jpg": b"x", "README.md": b"", ".hidden": b""})


def test_manifest_holds_the_rows_of_the_source(pictures: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "er" / "manifest.parquet")
    written = write_manifest(Source(pictures), uri)
    assert manifest_of(uri) == list(Source(pictures).rows())
    assert (written.uri, written.count, written.labels) == (uri, 9, {0: 5, 1: 3, None: 1})
    assert written.left_out == {".md is no picture": 1, "hidden file": 1}
    assert written.describe() == "9 pictures (1 left out: .md is no picture; 1 left out: hidden file)"


@pytest.mark.s3
def test_manifest_round_trips_through_a_bucket(s3_environment: SwiftServer) -> None:
    bucket = new_bucket()
    put(f"{bucket}/pictures", {"ü #1?.jpg": b"x", "1_fake/b.png": b"yy"})
    write_manifest(Source(f"{bucket}/pictures"), f"{bucket}/out/manifest.parquet")
    assert manifest_of(f"{bucket}/out/manifest.parquet") == list(Source(f"{bucket}/pictures").rows())


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9])
def test_rows_are_all_written_whatever_the_batch(
    count: int, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "BATCH_ROWS", 4)
    written = write_manifest(Source(pictures), str(tmp_path / "m.parquet"), limit=count)
    assert manifest_of(written.uri) == list(Source(pictures).rows())[:count]
    assert written.count == count == sum(written.labels.values())


def test_limit_beyond_the_source_takes_all(pictures: str, tmp_path: Path) -> None:
    assert write_manifest(Source(pictures), str(tmp_path / "m.parquet"), limit=1000).count == 9


def test_object_listed_twice_is_planned_once_and_counted(tmp_path: Path) -> None:
    columns = {"uri": ["/a", "/b", "/a", "/a", "/b"], "etag": ["1", "1", "1", "2", "1"]}
    source = Source(write_parquet(tmp_path / "source.parquet", columns))
    written = write_manifest(source, str(tmp_path / "m.parquet"))
    rows = [(row["uri"], row["etag"]) for row in manifest_of(written.uri)]
    assert rows == [("/a", "1"), ("/b", "1"), ("/a", "2")]
    assert written.count == 3 and written.left_out == {"listed twice": 2}


def test_source_without_pictures_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    put(str(tmp_path / "source"), {"a.txt": b"", "b.txt": b"", ".c": b""})
    with pytest.raises(SourceError) as caught:
        write_manifest(Source(str(tmp_path / "source")), str(tmp_path / "out" / "m.parquet"))
    assert str(caught.value) == f"{tmp_path}/source holds no pictures (2: .txt is no picture; 1: hidden file)"
    assert os.listdir(tmp_path) == ["source"]


def test_output_inside_the_source_is_refused(pictures: str, tmp_path: Path) -> None:
    for place in (f"{pictures}/out/m.parquet", f"{pictures}/m.parquet"):
        with pytest.raises(UsageError, match="--out lies inside the source"):
            write_manifest(Source(pictures), place)
    assert len(list(Source(pictures).rows())) == 9
    write_manifest(Source(pictures), f"{pictures}-out/m.parquet")  # beside it, with the same beginning
