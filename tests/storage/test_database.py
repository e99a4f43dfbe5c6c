"""Joins and Parquet as streams: what goes in comes out, and whatever goes wrong on the way keeps its name."""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.storage import filesystems, listing, parquet
from jobs.storage.database import Database, database, last_of_each
from tests.support.tables import batches

NUMBERS = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("name", pa.string())])


class StoreError(Exception):
    """Something that a stream of rows may raise."""


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"n": i, "name": f"{i}"} for i in range(start, start + count)]


def failing(count: int) -> Iterator[pa.RecordBatch]:
    yield from batches(numbered(count), NUMBERS, size=10)
    raise StoreError("the store is away")


@pytest.fixture
def rows() -> Iterator[Database]:
    with database() as opened:
        opened.create("numbers", "n, name", NUMBERS)
        yield opened


# The database.


def test_rows_come_out_as_they_were_put_in(rows: Database) -> None:
    rows.insert("numbers", batches(numbered(20_000), NUMBERS, size=777))
    rows.insert("numbers", batches(numbered(5, start=20_000), NUMBERS))
    found = [row for batch in rows.select("select * from numbers order by n") for row in batch.to_pylist()]
    assert found == numbered(20_005)


def test_columns_are_computed_from_each_batch() -> None:
    with database() as rows:
        rows.create("doubled", "2 * n as twice", NUMBERS)
        rows.insert("doubled", batches(numbered(10), NUMBERS, size=3))
        assert rows.execute("select * from doubled order by 1") == [(2 * i,) for i in range(10)]


def test_rows_are_chosen_from_each_batch() -> None:
    with database() as rows:
        rows.create("wanted", "n", pa.schema([NUMBERS.field("n")]))
        rows.insert("wanted", batches([{"n": n} for n in (1, 4, 8, 99)], pa.schema([NUMBERS.field("n")])))
        rows.create("found", "n as number", NUMBERS, where="n in (select n from wanted) and name != '4'")
        rows.insert("found", batches(numbered(10), NUMBERS, size=3))
        assert rows.execute("select number from found order by 1") == [(1,), (8,)]


def test_number_of_nothing_is_zero(rows: Database) -> None:
    assert rows.number("select count(*) from numbers") == rows.number("select sum(n) from numbers") == 0


def test_error_of_an_inserted_stream_keeps_its_type(rows: Database) -> None:
    with pytest.raises(StoreError, match="the store is away"):
        rows.insert("numbers", failing(100))


def test_batches_flow_through_an_insertion(rows: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.storage.database.GROUP_BYTES", 1)  # smaller ones are inserted together
    alive: set[int] = set()
    most = 0

    def batch(start: int) -> pa.RecordBatch:
        nonlocal most
        made = pa.RecordBatch.from_pylist(numbered(10, start), schema=NUMBERS)
        alive.add(start)
        weakref.finalize(made, alive.discard, start)
        most = max(most, len(alive))
        return made

    rows.insert("numbers", map(batch, range(0, 1000, 10)))
    assert rows.number("select count(*) from numbers") == 1000 and most <= 3


def test_arrow_memory_of_an_insertion_is_that_of_few_batches(rows: Database) -> None:
    names = "x" * 100_000
    before = pa.total_allocated_bytes()
    most = size = 0

    def made() -> Iterator[pa.RecordBatch]:
        nonlocal most, size
        for start in range(0, 1000, 10):  # about 100 MB in all
            most = max(most, pa.total_allocated_bytes() - before)
            batch = pa.RecordBatch.from_pylist([{"n": n, "name": names} for n in range(start, start + 10)], NUMBERS)
            size = batch.nbytes
            yield batch

    rows.insert("numbers", made())
    assert rows.number("select count(*) from numbers") == 1000
    assert size < most < 10 * size  # a transaction over all batches would have held each of them until its end


def test_database_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StoreError), database() as rows:
        rows.create("numbers", "n, name", NUMBERS)
        assert len(os.listdir(tmp_path)) == 1
        rows.insert("numbers", failing(100))
    assert os.listdir(tmp_path) == []


def test_rows_beyond_the_memory_limit_are_spilled_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("jobs.storage.database.MEMORY_LIMIT", "32MB")
    size, text = 2_000, np.random.default_rng(0).bytes(2_000).hex()  # 80 MB in all, which no compression shrinks
    with database() as rows:
        rows.create("numbers", "n, name", NUMBERS)
        for start in range(0, 10 * size, size):
            named = [{"n": n, "name": f"{n}{text[n % 97 :]}"} for n in range(start, start + size)]
            rows.insert("numbers", batches(named, NUMBERS))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 2**20
        assert rows.execute("select count(*), sum(n) from numbers") == [(10 * size, sum(range(10 * size)))]
    assert os.listdir(tmp_path) == []


# Parquet.


def test_file_round_trips(place: str) -> None:
    uri = f"{place}/deep/er/numbers.parquet"
    assert parquet.write(batches(numbered(20_000), NUMBERS), NUMBERS, uri) == 20_000
    read = list(parquet.read(uri, NUMBERS))
    assert all(batch.schema.equals(NUMBERS) for batch in read)
    assert [row for batch in read for row in batch.to_pylist()] == numbered(20_000)


def test_file_without_rows_has_its_columns(place: str) -> None:
    assert parquet.write([], NUMBERS, f"{place}/numbers.parquet") == 0
    assert list(parquet.read(f"{place}/numbers.parquet", NUMBERS)) == []
    system, path = filesystems.arrow_filesystem(f"{place}/numbers.parquet")
    assert pq.read_schema(path, filesystem=system).equals(NUMBERS)


def test_small_batches_become_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 100)
    parquet.write(batches(numbered(250), NUMBERS, size=3), NUMBERS, str(tmp_path / "x.parquet"))
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [102, 102, 46]


def test_columns_are_chosen_ordered_and_cast(tmp_path: Path) -> None:
    table = pa.table({"name": pa.array(["a"], pa.large_string()), "other": [1], "n": pa.array([7], pa.int8())})
    pq.write_table(table, tmp_path / "other.parquet")
    parquet.write(parquet.read(str(tmp_path / "other.parquet"), NUMBERS), NUMBERS, str(tmp_path / "x.parquet"))
    read = pq.read_table(tmp_path / "x.parquet")
    assert read.schema.equals(NUMBERS) and read.to_pylist() == [{"n": 7, "name": "a"}]


def test_error_of_a_written_stream_keeps_its_type(place: str) -> None:
    with pytest.raises(StoreError, match="the store is away"):
        parquet.write(failing(100), NUMBERS, f"{place}/x.parquet")
    with pytest.raises(StoreError, match="the store is away"):
        parquet.write_many(failing(100), NUMBERS, f"{place}/many", 7)


def test_small_files_are_read_in_their_order(place: str) -> None:
    uris = [f"{place}/{i * 7 % 20}.parquet" for i in range(20)]
    for i, uri in enumerate(uris):
        parquet.write(batches(numbered(3, start=3 * i), NUMBERS), NUMBERS, uri)
    found = [row for batch in parquet.read_small(uris, NUMBERS) for row in batch.to_pylist()]
    assert found == numbered(60)


def test_small_files_are_not_read_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [str(tmp_path / f"{i}.parquet") for i in range(5 * parquet.READERS)]
    for uri in uris:
        parquet.write(batches(numbered(1), NUMBERS), NUMBERS, uri)
    opened: list[str] = []
    lock, read = threading.Lock(), parquet.read

    def counted(uri: str, columns: pa.Schema, **options: Any) -> Iterator[pa.RecordBatch]:
        with lock:
            opened.append(uri)
        return read(uri, columns, **options)

    monkeypatch.setattr(parquet, "read", counted)
    stream = parquet.read_small(uris, NUMBERS)
    next(stream)
    time.sleep(0.2)  # whoever reads ahead has the time to do so
    assert len(opened) <= 2 * parquet.READERS
    assert len(list(stream)) == len(uris) - 1 and sorted(opened) == sorted(uris)


@pytest.mark.parametrize(("count", "rows", "sizes"), [(0, 7, []), (7, 7, [7]), (20, 7, [7, 7, 6]), (3, 7, [3])])
def test_rows_are_spread_over_files_of_one_size(count: int, rows: int, sizes: list[int], place: str) -> None:
    stream = batches(numbered(count), NUMBERS, size=5)
    assert parquet.write_many(stream, NUMBERS, f"{place}/many", rows) == count
    uris = [f"{place}/many/part-{i:06d}.parquet" for i in range(len(sizes))]
    if sizes:
        assert sorted(entry.uri for entry in listing.list_files(f"{place}/many")) == uris
    found = [[row for batch in parquet.read(uri, NUMBERS) for row in batch.to_pylist()] for uri in uris]
    assert [len(part) for part in found] == sizes
    assert [row for part in found for row in part] == numbered(count)


KEYED = pa.schema([pa.field("k", pa.string()), pa.field("m", pa.string()), pa.field("value", pa.int64())])


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("key", [("k",), ("k", "m")])
def test_last_row_of_each_key_is_kept_in_the_order_in_which_these_came(key: tuple[str, ...], size: int) -> None:
    """However the rows are cut into batches; nulls are one key."""
    rng = np.random.default_rng(0)
    keys = ["a", "b", "c", None]
    rows = [{"k": keys[rng.integers(4)], "m": keys[rng.integers(2)], "value": i} for i in range(100)]
    last = {tuple(row[name] for name in key): row for row in rows}
    expected = sorted(last.values(), key=lambda row: row["value"])
    found = pa.Table.from_batches(last_of_each(batches(rows, KEYED, size=size), KEYED, key), KEYED)
    assert found.to_pylist() == expected
    (only,) = pa.Table.from_batches(last_of_each(batches(rows, KEYED, size=size), KEYED, key, ["value"])).columns
    assert only.to_pylist() == [row["value"] for row in expected]


def test_last_of_no_rows_is_none() -> None:
    assert pa.Table.from_batches(last_of_each([], KEYED, ["k"]), KEYED).num_rows == 0
