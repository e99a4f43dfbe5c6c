"""Read and write Parquet files on storage as streams of batches."""

import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from jobs.storage import filesystems, reading, uris, writing
from jobs.storage.parquet_file import BUFFER_BYTES, ParquetFile

BATCH_ROWS: Final = 8192
GROUP_ROWS: Final = 65_536
"""Rows of a row group."""
MAX_WHOLE_BYTES: Final = 2**26
"""Files up to this size are read without a buffer: pyarrow would allocate what a page header claims, up to 2 GB."""
SMALL_BYTES: Final = 2**20
"""Files up to this size are fetched in one request if their reader knows their size."""
READERS: Final = 8
"""Files read in parallel."""
WRITERS: Final = 8
"""Files written in parallel."""


@contextmanager
def opened(uri: str, *, small: bool = False) -> Iterator[ParquetFile]:
    """Open a file on storage. Raises what the store raises, and a `pa.ArrowException` if the file is damaged.

    `small`: it has at most `SMALL_BYTES`, as far as the caller knows.
    """
    data = reading.read_bytes(uri, 0, SMALL_BYTES + 1) if small else None
    try:
        with reading.open_file(uri) if data is None or len(data) > SMALL_BYTES else pa.BufferReader(data) as source:
            yield ParquetFile(source, uri, buffer_bytes=0 if source.size() <= MAX_WHOLE_BYTES else BUFFER_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # an error of the store: missing file, no permission
        raise pa.ArrowInvalid(f"{uri}: {error}") from error  # pyarrow's error for a damaged page names no file


def read(
    uri: str, columns: pa.Schema, *, optional: Collection[str] = (), start: int = 0, small: bool = False
) -> Iterator[pa.RecordBatch]:
    """Read columns of a file as batches of exactly this schema; missing `optional` columns are null.

    `start`: rows before the first one to return; row groups before it are not read. `small`: as in `opened`. Raises
    `KeyError` for a missing column, `ColumnTypeError` for an extension type.
    """
    with opened(uri, small=small) as file:
        present = [name for name in columns.names if name in file.schema.names]
        if missing := sorted({*columns.names} - {*present, *optional}):
            raise KeyError(f"{uri} has no column {', '.join(missing)}")
        groups, skipped = _groups_from(file, start)
        for batch in file.batches(present, batch_rows=BATCH_ROWS, groups=groups):
            batch, skipped = batch.slice(skipped), max(0, skipped - len(batch))
            arrays = [
                batch.column(field.name).cast(field.type) if field.name in present else pa.nulls(len(batch), field.type)
                for field in columns
            ]
            whole = pa.RecordBatch.from_arrays(arrays, schema=columns)
            whole.validate(full=True)  # checks, for example, that texts are UTF-8
            yield whole


def _groups_from(file: ParquetFile, start: int) -> tuple[list[int], int]:
    """The row groups from the one with row `start` on, and the rows before it in that group."""
    sizes = file.group_rows()
    first = 0
    while first < len(sizes) and start >= sizes[first]:
        start -= sizes[first]
        first += 1
    return list(range(first, len(sizes))), start


def dataset(files: Sequence[str], columns: pa.Schema) -> pads.Dataset:
    """An Arrow dataset of files with this schema, for external readers; a column that a file lacks is null.

    Raises `ColumnTypeError` for an extension type in one of these columns.
    """

    def check(uri: str) -> None:
        with opened(uri) as file:
            file.check(columns.names)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(check, files))
    system, _ = filesystems.arrow_filesystem(files[0])
    return pads.dataset([uris.arrow_path(uri) for uri in files], schema=columns, filesystem=system, format="parquet")


def read_small(files: Sequence[str], columns: pa.Schema, *, optional: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """As `read`, for many small files; several are read in parallel, the order is kept."""

    def whole(uri: str) -> list[pa.RecordBatch]:
        return list(read(uri, columns, optional=optional))

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), READERS):  # reads no further ahead, to bound memory
            for batches in pool.map(whole, files[start : start + READERS]):
                yield from batches


def write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str) -> int:
    """Write a file of these rows; returns their number. An error may leave a part of them: see `write_whole`."""
    if uris.is_local(uri):
        filesystems.make_folder(uri.rpartition("/")[0])
    system, path = filesystems.arrow_filesystem(uri)
    count = 0
    with writing.naming(uri), pq.ParquetWriter(path, schema, filesystem=system, compression="zstd") as writer:
        for table in _groups(batches, schema):
            writer.write_table(table)
            count += table.num_rows
    return count


def write_whole(batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str) -> int:
    """As `write`, but atomically: a reader sees the whole file or none, also after an error."""
    with tempfile.TemporaryDirectory(prefix="nsnet-parquet-") as scratch:
        path = Path(scratch) / "rows.parquet"
        count = write(batches, schema, str(path))
        writing.upload_file(path, uri)
    return count


def write_many(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: str, rows: int) -> int:
    """Write small files of `rows` rows each, several in parallel; returns the total number of rows."""
    count = files = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        pending: deque[Future[int]] = deque()
        for part in portions(batches, rows):
            pending.append(pool.submit(write, [part], schema, uris.join(folder, f"part-{files:06d}.parquet")))
            files += 1
            if len(pending) > 2 * WRITERS:
                count += pending.popleft().result()
        count += sum(result.result() for result in pending)
    return count


def portions(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `rows` rows; the last batch may be smaller."""
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
    """Merge small batches into row groups."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch.select(schema.names).cast(schema))
        if sum(item.num_rows for item in group) >= GROUP_ROWS:
            yield pa.Table.from_batches(group)
            group = []
    if group:
        yield pa.Table.from_batches(group)
