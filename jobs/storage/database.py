"""Joins over more rows than fit in memory: a DuckDB database in a temporary folder, fed and read as Arrow batches."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from jobs.storage.parquet import BATCH_ROWS

MEMORY_LIMIT: Final = "512MB"
"""What a join may hold in memory; the rest lies in the temporary folder."""
THREADS: Final = 2


class Database:
    """A connection to a database of its own."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._selected: dict[str, str] = {}

    def create(self, table: str, columns: str, schema: pa.Schema, where: str = "true") -> None:
        """A table of what `select <columns> from rows where …` gives, where `rows` are Arrow batches of the schema."""
        self._selected[table] = f"select {columns} from rows where {where}"
        self._connection.register("rows", schema.empty_table())
        self._connection.execute(f"create table {table} as {self._selected[table]}")

    def insert(self, table: str, batches: Iterable[pa.RecordBatch]) -> None:
        """Insert Arrow batches into a table that `create` made, as they come."""
        for batch in batches:  # each in a transaction of its own: one would hold all batches in memory until its end
            self._connection.register("rows", pa.Table.from_batches([batch]))
            self._connection.execute(f"insert into {table} {self._selected[table]}")

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement; returns its rows, which must be few."""
        rows: list[tuple[Any, ...]] = self._connection.execute(sql).fetchall()
        return rows

    def number(self, sql: str) -> int:
        """The one number that a query gives; 0 for null."""
        return int(self.execute(sql)[0][0] or 0)

    def select(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, as Arrow batches."""
        yield from self._connection.sql(sql).to_arrow_reader(BATCH_ROWS)


@contextmanager
def database() -> Iterator[Database]:
    """An empty database, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="nsnet-database-") as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY_LIMIT,
            "threads": THREADS,
            "temp_directory": folder,
            "autoinstall_known_extensions": "false",  # nothing is downloaded
            "autoload_known_extensions": "false",
        }
        with duckdb.connect(str(Path(folder) / "rows.duckdb"), config=settings) as connection:
            yield Database(connection)


def last_of_each(
    batches: Iterable[pa.RecordBatch], columns: pa.Schema, key: Sequence[str], keep: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Of rows with an equal key the last one, in the order in which these came.

    columns: schema of the batches. key: its columns that make rows equal; nulls are equal. keep: its columns that are
    wanted, in this order; None: all. Works on disk, for any number of rows.
    """
    with database() as rows:
        rows.create("every", "*", columns)
        rows.insert("every", batches)
        rows.execute(f"create table last as select max(rowid) as number from every group by {', '.join(key)}")
        wanted = pa.schema([columns.field(name) for name in keep or columns.names])
        found = rows.select(
            f"select {', '.join(wanted.names)} from every join last on every.rowid = last.number order by number"
        )
        for batch in found:
            yield batch.cast(wanted)
