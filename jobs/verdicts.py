"""Verdicts from storage: a published output, or a Parquet file that anybody wrote, read by the same rules as a source.

Files come from pandas joins and spreadsheets: what a column's values mean is clear from the column as a whole, whatever
its type. Labels are those of `labels.meanings`, as in a source.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs import labels, ledger, parquet, schema, storage
from jobs.labelled import SAID
from jobs.parquet_file import ParquetFile
from nsnet.errors import SourceError

NEEDED: Final = ("label", "generator", "prob_fake", "verdict", "status", "detector_id")
WANTED: Final = ("image_id", "threshold", "transform", "split")
"""Columns that verdicts may have besides."""
TYPES: Final = {field.name: field.type for field in [*schema.VERDICTS, schema.SPLIT]}
MAX_SHOWN: Final = 10
"""Names or values in a message."""


def read(uri: str) -> pa.Table | None:
    """Verdict rows of a published output or a Parquet file; None for what is no such file and no such folder.

    A picture that several runs have judged counts once, as the newest run has it. Raises `SourceError` for a file that
    lacks a column of verdicts, or whose values mean nothing.
    """
    if not storage.is_folder(uri):
        if not storage.exists(uri):
            raise SourceError(f"there is no {uri}")
        return _from_file(uri) if uri.lower().endswith(".parquet") else None
    if not ledger.runs(uri):
        return None
    columns = [*NEEDED, *(name for name in WANTED if name in schema.VERDICTS.names)]
    table = ledger.verdicts(uri).to_table(columns=columns)
    pictures = zip(table.column("image_id").to_pylist(), table.column("detector_id").to_pylist(), strict=True)
    newest = {picture: row for row, picture in enumerate(pictures)}  # the oldest run comes first
    return table.take(list(newest.values()))


def found_instead(uri: str) -> str:
    """What lies at a place that holds no published verdicts, for people."""
    if not storage.is_folder(uri):
        return f"{uri} is no Parquet file"
    prefix = uri.rstrip("/") + "/"
    names = [entry.uri.removeprefix(prefix) for entry in islice(storage.list_files(uri), 4)]
    shown = f"files such as {', '.join(names[:3])}" if names else "nothing at all"
    return f"{uri} holds no published verdicts (runs/*.json), but {shown}; to compare one file, name it"


# A file that anybody wrote.


def is_whole(uri: str) -> bool:
    """Whether a Parquet file has all columns of verdicts."""
    with _reading(uri) as file:
        return not _missing(file)
