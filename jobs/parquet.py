"""Parquet on storage, read and written as a stream of batches."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import storage

BATCH_ROWS: Final = 8192
GROUP_ROWS: Final = 65_536
"""Rows of a row group."""
READERS: Final = 8
"""Files that are read at a time."""
WRITERS: Final = 8
"""Files that are written at a time."""


def read(uri: str, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, as batches of exactly this schema."""
    with storage.open_file(uri) as source, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns.names):
            yield batch.select(columns.names).cast(columns)


def read_small(uris: Sequence[str], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Some columns of many small files, several read at a time, in the order of the files."""

    def whole(uri: str) -> list[pa.RecordBatch]:
        return list(read(uri, columns))

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(uris), READERS):  # no further ahead than this: memory is bounded
            for batches in pool.map(whole, uris[start : start + READERS]):
                yield from batches


def write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str) -> int:
    """Write a file of these rows; returns their number."""
    if storage.is_local(uri):
        storage.make_folder(uri.rpartition("/")[0])
    system, path = storage.arrow_filesystem(uri)
    count = 0
    with storage.naming(uri), pq.ParquetWriter(path, schema, filesystem=system, compression="zstd") as writer:
        for table in _groups(batches, schema):
            writer.write_table(table)
            count += table.num_rows
    return count


def write_many(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: str, rows: int) -> int:
    """Write small files of so many rows each, several at a time; returns the number of rows in all."""
    count = files = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        pending: deque[Future[int]] = deque()
        for part in _portions(batches, rows):
            pending.append(pool.submit(write, [part], schema, storage.join(folder, f"part-{files:06d}.parquet")))
            files += 1
            if len(pending) > 2 * WRITERS:
                count += pending.popleft().result()
        count += sum(written.result() for written in pending)
    return count


def _portions(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows as batches of exactly so many, the last one aside."""
    rest: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= rows:
            yield from rest.slice(0, rows).combine_chunks().to_batches()
            rest = rest.slice(rows)
    if rest is not None and rest.num_rows:
        yield from rest.combine_chunks().to_batches()


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Row groups: small batches put together."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch.select(schema.names).cast(schema))
        if sum(one.num_rows for one in group) >= GROUP_ROWS:
            yield pa.Table.from_batches(group)
            group = []
    if group:
        yield pa.Table.from_batches(group)
