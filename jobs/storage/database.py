"""Joins over more rows than fit in memory, by DuckDB, which spills to a temporary folder; Arrow batches in and out."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import duckdb
import pyarrow as pa

from jobs.storage.parquet import BATCH_ROWS

MEMORY_LIMIT: Final = "512MB"
"""Memory limit of the database; it spills the rest to the temporary folder."""
THREADS: Final = 2
GROUP_BYTES: Final = 2**18
"""Smaller batches are inserted together."""


class Database:
    """A connection to a private database."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._selected: dict[str, str] = {}

    def create(self, table: str, columns: str, schema: pa.Schema, where: str = "true") -> None:
        """Create an empty table for the result of `select <columns> from rows where …`, `rows` having this schema."""
        self._selected[table] = f"select {columns} from rows where {where}"
        self._connection.register("rows", schema.empty_table())
        self._connection.execute(f"create table {table} as {self._selected[table]}")

    def insert(self, table: str, batches: Iterable[pa.RecordBatch]) -> None:
        """Insert Arrow batches into a table that `create` made."""
        for group in _groups(batches):  # one transaction each: a single one would hold all in memory until its end
            self._connection.register("rows", pa.Table.from_batches(group))
            self._connection.execute(f"insert into {table} {self._selected[table]}")

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement; returns its rows, all in memory."""
        rows: list[tuple[Any, ...]] = self._connection.execute(sql).fetchall()
        return rows

    def number(self, sql: str) -> int:
        """The number that a query returns; 0 for null."""
        return int(self.execute(sql)[0][0] or 0)

    def select(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, as Arrow batches."""
        yield from self._connection.sql(sql).to_arrow_reader(BATCH_ROWS)


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches, small ones together, because each insertion takes a millisecond."""
    group: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += batch.nbytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextmanager
def database() -> Iterator[Database]:
    """An empty database, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="nsnet-database-") as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY_LIMIT,
            "threads": THREADS,
            "temp_directory": folder,
            "autoinstall_known_extensions": "false",  # nothing is downloaded
            "autoload_known_extensions": "false",
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            yield Database(connection)


def last_of_each(
    batches: Iterable[pa.RecordBatch], columns: pa.Schema, key: Sequence[str], keep: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The last row of each key, in input order.

    columns: schema of the batches. key: the key columns; nulls are equal. keep: the columns to return, in this order;
    None: all. Works on disk, for any number of rows.
    """
    with database() as rows:
        rows.create("every", "*", columns)
        rows.insert("every", batches)
        rows.execute(f"create table last as select max(rowid) as number from every group by {', '.join(key)}")
        wanted = pa.schema([columns.field(name) for name in keep or columns.names])
        selected = rows.select(
            f"select {', '.join(wanted.names)} from every join last on every.rowid = last.number order by number"
        )
        for batch in selected:
            yield batch.cast(wanted)
