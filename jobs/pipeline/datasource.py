"""A Ray Data source of Parquet files: one task per file, with our own reader.

Ray's reader trusts the Arrow schema in a file; `jobs.storage.parquet_file` explains why ours does not. Work and
captions are in buckets that others may write to.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from jobs.storage import parquet


class ParquetFiles(Datasource):
    """Columns of Parquet files, as tables of exactly this schema."""

    def __init__(self, uris: Sequence[str], columns: pa.Schema) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._uris, self._columns = list(uris), columns

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *limits: Any, **settings: Any) -> list[ReadTask]:
        """One task per file; ignores the parallelism that Ray asks for."""
        return [
            ReadTask(
                partial(_tables, uri, self._columns),
                BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=(uri,)),
                schema=self._columns,
            )
            for uri in self._uris
        ]


def _tables(uri: str, columns: pa.Schema) -> Iterator[pa.Table]:
    for batch in parquet.read(uri, columns):
        yield pa.Table.from_batches([batch], columns)
