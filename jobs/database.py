"""Joins over more rows than fit in memory: a DuckDB database in a temporary folder, fed and read as Arrow batches."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

MEMORY_LIMIT: Final = "512MB"
"""What a join may hold in memory; the rest lies in the temporary folder."""
THREADS: Final = 2
BATCH_ROWS: Final = 8192


@contextmanager
def database() -> Iterator[Any]:
    """A connection to an empty database, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="nsnet-database-") as folder:
        settings = {
            "memory_limit": MEMORY_LIMIT,
            "threads": THREADS,
            "temp_directory": folder,
            "autoinstall_known_extensions": "false",  # nothing is downloaded
            "autoload_known_extensions": "false",
        }
        with duckdb.connect(str(Path(folder) / "rows.duckdb"), config=settings) as connection:
            yield connection


def insert(connection: Any, sql: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Run an `insert … from rows`, where `rows` are Arrow batches of the schema, read as they come."""
    connection.register("rows", pa.RecordBatchReader.from_batches(schema, iter(batches)))
    try:
        connection.execute(sql)
    finally:
        connection.unregister("rows")


def select(connection: Any, sql: str) -> Iterator[pa.RecordBatch]:
    """The rows of a query, as Arrow batches."""
    yield from connection.sql(sql).to_arrow_reader(BATCH_ROWS)
