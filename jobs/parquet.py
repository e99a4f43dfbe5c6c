"""Parquet on storage, read and written as a stream of batches."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import storage

BATCH_ROWS: Final = 8192
GROUP_ROWS: Final = 65_536
"""Rows of a row group."""
READERS: Final = 8
"""Files that are read at a time."""


def read(uri: str, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, as batches of exactly this schema."""
    system, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=system) as file:
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
    with pq.ParquetWriter(path, schema, filesystem=system, compression="zstd") as writer:
        for table in _groups(batches, schema):
            writer.write_table(table)
            count += table.num_rows
    return count


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
