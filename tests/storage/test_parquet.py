"""Parquet files that this program writes."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.storage import listing, parquet
from jobs.storage.uris import Uri


def test_file_is_written_whole_or_not_at_all(place: str) -> None:
    columns = pa.schema([("x", pa.int64())])
    batch = pa.RecordBatch.from_pydict({"x": [*range(parquet.GROUP_ROWS)]}, columns)
    uri = f"{place}/report/flips.parquet"

    def failing() -> Iterator[pa.RecordBatch]:
        yield batch
        raise OSError("the source is gone")

    for before in ([], [1, 2]):
        if before:
            parquet.write_whole([pa.RecordBatch.from_pydict({"x": before}, columns)], columns, uri)
        with pytest.raises(OSError, match="the source is gone"):
            parquet.write_whole(failing(), columns, uri)
        names = [entry.uri for entry in listing.list_files(Uri(place))]
        assert names == ([uri] if before else [])
    assert pa.Table.from_batches(parquet.read(uri, columns), columns).column("x").to_pylist() == [1, 2]
    assert parquet.write_whole([batch], columns, uri) == parquet.GROUP_ROWS


def test_only_files_that_no_reader_knows_yet_are_written_in_place() -> None:
    jobs = Path(parquet.__file__).parents[1]
    writers = {path.relative_to(jobs).as_posix() for path in jobs.rglob("*.py") if "parquet.write(" in path.read_text()}
    assert writers == {
        "dataset/plan.py",  # the manifest of a staging, whose run.json is written afterwards
        "runs/publication.py",  # a local file, which is uploaded
        "workflows/compare.py",  # likewise
    }
