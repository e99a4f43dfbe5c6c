"""Parquet files as a source of Ray Data: one task for each file, read by our own reader.

Ray's reader believes the Arrow schema that lies in a file; `jobs.storage.parquet_file` says why ours does not. Work and
captions lie in buckets that others may write to.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from jobs.storage import parquet


class ParquetFiles(Datasource):
    """Some columns of Parquet files, as tables of exactly this schema."""

    def __init__(self, uris: Sequence[str], columns: pa.Schema) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._uris, self._columns = list(uris), columns

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *limits: Any, **settings: Any) -> list[ReadTask]:
        """A task for each file, however many Ray would like."""
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
