"""Read verdicts from a published output, or from a Parquet file of any origin.

Such files come from joins in pandas and from spreadsheets. Values of any column type are accepted if their meaning is
clear; labels have the same meanings as in a source (`labels.meanings`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.dataset import labels, schema
from jobs.evaluation import claims
from jobs.evaluation.groups import SAID
from jobs.runs import catalog
from jobs.storage import listing, parquet
from jobs.storage.parquet_file import ParquetFile
from jobs.storage.uris import Uri
from nsnet.errors import SourceError

NEEDED: Final = ("label", "generator", "prob_fake", "verdict", "status", "detector_id")
WANTED: Final = ("image_id", "threshold", "transform", "split", "views_agree", *claims.COLUMNS)
"""Optional columns of verdicts."""
TYPES: Final = {field.name: field.type for field in [*schema.VERDICTS, schema.SPLIT_COLUMN]}
APART: Final = ("image_id", "detector_id", "transform", "generator", "split")
"""Columns that identify a row of a file: an image may be among the reals of several generators."""
TRUTHS: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
STATUSES: Final = ("scored", "failed")
MAX_SHOWN: Final = 12
"""Maximum number of names or values in a message."""

Converter = Callable[[Any], Any]


class NoVerdictsError(SourceError):
    """The location holds no verdicts; it may be a source of images."""


def read(uri: Uri) -> pa.Table:
    """Verdict rows of a published output or a Parquet file: `NEEDED`, and the existing columns of `WANTED`.

    The newest run's row of an image counts. Raises `NoVerdictsError` if there are no verdicts, `SourceError` for a
    damaged file or for invalid values.
    """
    if not listing.is_folder(uri):
        if not listing.exists(uri):
            raise SourceError(f"{uri} does not exist")
        if not uri.lower().endswith(".parquet"):
            raise NoVerdictsError(f"{uri} holds no published verdicts: it is neither a folder nor a .parquet file")
        return _from_file(uri)
    if not any(record["files"] for record in catalog.runs(uri)):
        prefix = uri.rstrip("/") + "/"
        files = [entry.uri.removeprefix(prefix) for entry in islice(listing.list_files(uri), 3)]
        content = f"it holds files such as {', '.join(sorted(files))}" if files else "it is empty"
        raise NoVerdictsError(f"{uri} holds no published verdicts (runs/*.json); {content}")
    names = [*NEEDED, *(name for name in WANTED if name in schema.VERDICTS.names)]
    columns = pa.schema([schema.VERDICTS.field(name) for name in names])
    return pa.Table.from_batches(catalog.newest(uri, columns), columns)


# Parquet files of any origin.


def _from_file(uri: str) -> pa.Table:
    with _reading(uri), parquet.opened(uri) as file:
        columns = {name: _column(file, name) for name in (*NEEDED, *WANTED)}
        if missing := [f"`{name}`" for name in NEEDED if columns[name] is None]:
            raise NoVerdictsError(
                f"{uri} holds no {' and no '.join(missing)} column; it has {_shown(file.schema.names)}"
            )
        present = {name: column for name, column in columns.items() if column is not None}
        file.check_plain([*present.values()])
        stored = pa.schema([file.schema.field(column) for column in present.values()])
        batches = (batch.select(stored.names) for batch in file.batches(stored.names, batch_rows=parquet.BATCH_ROWS))
        table = pa.Table.from_batches(batches, stored)
        converted = {name: _convert(file, name, column, table.column(column)) for name, column in present.items()}
    return _once(pa.table(converted), uri)


def _once(table: pa.Table, uri: str) -> pa.Table:
    """The last row for each combination of `APART`, if the file has image ids.

    Rows of an image share its label; an image that is labelled both real and fake has none.
    """
    if "image_id" not in table.column_names:
        return table
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    named = table.filter(pc.is_valid(table.column("image_id")))
    distinct = named.group_by([name for name in APART if name in table.column_names])
    last = distinct.aggregate([("row", "max")]).column("row_max")
    by_image = named.group_by("image_id").aggregate([("label", "min"), ("label", "max")])
    both = pc.fill_null(pc.not_equal(by_image.column("label_min"), by_image.column("label_max")), False)
    repeats, contradictory = named.num_rows - len(last), pc.sum(both).as_py() or 0
    if repeats:
        say(f"warning: {uri}: {repeats:,} rows repeat an image: the last row of each counts")
    if contradictory:
        say(f"warning: {uri}: {contradictory:,} images are labelled both real and fake: their labels are ignored")
    if repeats or contradictory:
        kept = pc.or_(pc.is_in(table.column("row"), last), pc.is_null(table.column("image_id")))
        table = table.filter(kept)
        label = pc.if_else(both, pa.scalar(None, TYPES["label"]), by_image.column("label_min"))
        label = label.take(pc.index_in(table.column("image_id"), by_image.column("image_id")))
        label = pc.if_else(pc.is_null(table.column("image_id")), table.column("label"), label)
        table = table.set_column(table.column_names.index("label"), "label", label)
    return table.drop_columns(["row"])


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{uri} is not a readable Parquet file: {error}") from error


def _column(file: ParquetFile, name: str) -> str | None:
    """A column's name in the file: the same name, or the only one that differs by case alone; None: no such column."""
    names: list[str] = file.schema.names
    matches = [other for other in names if other == name] or [other for other in names if other.lower() == name]
    if len(matches) > 1:
        raise SourceError(f"{file.name} has {len(matches)} columns that may be `{name}`: {_shown(matches)}; keep one")
    return matches[0] if matches else None


def _convert(file: ParquetFile, name: str, file_name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any plain type, converted to the type of verdicts; `file_name`: its name in the file."""
    convert: Converter = labels.text
    if pa.types.is_floating(TYPES[name]):
        convert = _number(file, name)
    elif name == "status":
        convert = _status(file)
    elif pa.types.is_boolean(TYPES[name]):
        convert = _truth(file, name)
    elif name in ("label", "verdict"):
        try:
            names = labels.class_names(file.key_value, file_name)
        except SourceError as error:
            raise SourceError(f"{file.name}: {error}: write the file again without them") from error
        values = {_plain(value) for chunk in column.chunks for value in pc.unique(chunk).to_pylist()}
        values = {value for value in values if not labels.is_missing(value)}
        convert = _label(file, values, names) if name == "label" else _verdict(values, names)
    return _mapped(column, convert, TYPES[name])


def _mapped(column: pa.ChunkedArray, convert: Converter, kind: pa.DataType) -> pa.ChunkedArray:
    """A column with each distinct value converted once; missing values become null."""

    def one(chunk: pa.Array) -> pa.Array:
        encoded = chunk.dictionary_encode()
        plain = [_plain(value) for value in encoded.dictionary.to_pylist()]
        values = [None if labels.is_missing(value) else convert(value) for value in plain]
        return pa.array(values, kind).take(encoded.indices)

    return pa.chunked_array([one(chunk) for chunk in column.chunks], kind)


def _plain(value: Any) -> Any:
    """Bytes as text, because not all writers mark text columns as text."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _label(file: ParquetFile, values: set[Any], names: Sequence[str] | None) -> Converter:
    meanings = labels.meanings(values, names)
    if not meanings and values:
        named = f", which the file names {_shown(names)}" if names is not None else ""
        raise SourceError(
            f"{file.name}: the values of `label` are {_shown(sorted(values, key=str))}{named}: none means real (0) or "
            "fake (1); use these labels"
        )
    return (meanings or {}).get


def _verdict(values: set[Any], names: Sequence[str] | None) -> Converter:
    """Converts `SAID` in any case, and words that mean a label; other texts stay as they are."""
    others = {value for value in values if str(value).strip().lower() not in SAID}
    meant = dict(labels.meanings(others, names) or {})
    for value in others - meant.keys():  # a verdict can only mean real or fake
        if (label := labels.paired_label(str(value)[: labels.MAX_WORD])) is not None:
            meant[value] = label

    def convert(value: Any) -> str:
        text = str(value).strip().lower()
        return text if text in SAID or value not in meant else ("real", "fake")[meant[value]]

    return convert


def _status(file: ParquetFile) -> Converter:
    def convert(value: Any) -> str:
        text = str(value).strip().lower()
        if text not in STATUSES:
            raise SourceError(f"{file.name}: the status {str(value)[:40]!r} is neither scored nor failed")
        return text

    return convert


def _truth(file: ParquetFile, name: str) -> Converter:
    def convert(value: Any) -> bool:
        text = str(value).strip().lower()
        if text not in TRUTHS:
            raise SourceError(f"{file.name}: {name} {str(value)[:40]!r} is neither true nor false")
        return TRUTHS[text]

    return convert


def _number(file: ParquetFile, name: str) -> Converter:
    def convert(value: Any) -> float:
        try:
            return float(value)
        except ValueError:
            raise SourceError(f"{file.name}: {name} {str(value)[:40]!r} is not a number") from None

    return convert


def _shown(values: Sequence[Any]) -> str:
    more = [f"and {len(values) - MAX_SHOWN:,} more"] if len(values) > MAX_SHOWN else []
    return ", ".join([*(str(value)[:40] for value in values[:MAX_SHOWN]), *more])
