"""Rows of published runs, in the order of the runs.

An output of a year has hundreds of small files, whose requests take longer than their rows: these are read ahead, in
parallel. Runs of a merged record are slices of one file, which is read once, even if runs of other makers lie between.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from jobs.storage import errors, filesystems, listing, parquet, reading, uris
from jobs.storage.uris import Uri
from nsnet.digest import file_digest
from nsnet.errors import StorageError

AHEAD: Final = 2 * filesystems.LISTING_THREADS
"""Small files that are read before their turn, at most."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a file."""

    uri: str
    record: str
    """URI of the record that names the file."""
    start: int
    rows: int | None
    """None: all."""
    is_small: bool

    def is_followed_by(self, other: "Piece") -> bool:
        """Whether the other one holds the next rows of the file."""
        return self.rows is not None and self.uri == other.uri and self.start + self.rows == other.start


def read_rows(out: Uri, records: Iterable[dict[str, Any]], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Columns of published runs, in the order of these records, null where a file lacks them.

    Raises `StorageError` for a missing or damaged file.
    """
    pieces = iter(_pieces(out, records))
    cursors: dict[str, _Cursor] = {}

    def whole(piece: Piece) -> list[pa.RecordBatch]:
        with naming(piece.uri, piece.record):
            return list(parquet.read(piece.uri, columns, optional=columns.names, small=True))

    def begin(piece: Piece) -> tuple[Piece, Future[list[pa.RecordBatch]] | None]:
        return piece, pool.submit(whole, piece) if piece.is_small else None

    pool = ThreadPoolExecutor(filesystems.LISTING_THREADS)
    try:
        begun = deque(map(begin, islice(pieces, AHEAD)))
        while begun:
            piece, result = begun.popleft()
            begun.extend(map(begin, islice(pieces, 1)))
            if result is not None:
                yield from result.result()
                continue
            with naming(piece.uri, piece.record):
                if piece.rows is None:
                    yield from parquet.read(piece.uri, columns, optional=columns.names)
                    continue
                cursor = cursors.get(piece.uri)
                if cursor is None or cursor.at > piece.start:
                    cursor = cursors[piece.uri] = _Cursor(piece.uri, columns, piece.start)
                yield from cursor.take(piece.start, piece.rows)
    finally:
        pool.shutdown(cancel_futures=True)


class _Cursor:
    """Reads a file once, forwards."""

    def __init__(self, uri: str, columns: pa.Schema, start: int) -> None:
        self._batches = parquet.read(uri, columns, optional=columns.names, start=start)
        self._rest: pa.RecordBatch | None = None
        self.at = start
        """Rows before the next one."""

    def take(self, start: int, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows from `start` on, which must not lie before `at`."""
        for wanted, left in ((False, start - self.at), (True, rows)):
            while left:
                if not self._rest:
                    self._rest = next(self._batches, None)
                if self._rest is None:
                    raise pa.ArrowInvalid(f"it ends before its row {start + rows:,}")
                taken = self._rest.slice(0, left)
                self._rest = self._rest.slice(len(taken))
                self.at += len(taken)
                left -= len(taken)
                if wanted:
                    yield taken


def _pieces(out: Uri, records: Iterable[dict[str, Any]]) -> Sequence[Piece]:
    """The files of runs, in order; slices of a file that follow each other are one."""
    pieces: list[Piece] = []
    for record in records:
        for file in record["files"]:
            start = file.get("start")
            piece = Piece(
                uri=uris.join(out, file["path"]),
                record=uris.join(out, "runs", f"{file['path'].split('/')[2].removeprefix('run_id=')}.json"),
                start=start or 0,
                rows=None if start is None else file["rows"],
                is_small=start is None and _is_small(file),
            )
            last = pieces[-1] if pieces else None
            if last is not None and last.is_followed_by(piece):
                pieces[-1] = replace(last, rows=(last.rows or 0) + (piece.rows or 0))
            else:
                pieces.append(piece)
    return pieces


def _is_small(file: dict[str, Any]) -> bool:
    """Whether a file of a record, as that says, is read at once: few rows may be large."""
    size, rows = file.get("size_bytes"), file.get("rows")
    return type(size) is int and type(rows) is int and size <= parquet.SMALL_BYTES and rows <= parquet.BATCH_ROWS


def difference(path: Path, file: dict[str, Any]) -> str | None:
    """In what a file, here a local copy, is not as its record says; None: nothing. Records of other programs may lack
    its size or SHA-256. Raises `FileNotFoundError`, and `pa.ArrowInvalid` for a file that is damaged all the same.
    """
    size_bytes = path.stat().st_size
    if file.get("size_bytes", size_bytes) != size_bytes:
        return f"it has {size_bytes:,} bytes, and {file['size_bytes']} in its record"
    if "sha256" in file and file_digest(path) != file["sha256"]:
        return "its SHA-256 is not that in its record"
    with parquet.opened(str(path)) as opened:
        if opened.rows != file.get("rows"):
            return f"it has {opened.rows:,} rows, and {file.get('rows')} in its record"
    return None


@contextmanager
def naming(uri: str, record: str) -> Iterator[None]:
    """Explain a file that is missing or damaged. `record`: URI of the record that names it."""
    name = "/".join(record.rsplit("/", 2)[1:])
    try:
        yield
    except FileNotFoundError as error:
        if listing.exists(record):
            message = f"{uri} is missing, but its record {name} exists: remove the record as well"
        else:
            message = (
                f"{uri} and its record {name} were removed while they were read: start the command again. `nsnet "
                "compact` removes files --grace after it merged them; use a longer --grace"
            )
        raise StorageError(message) from error
    except pa.ArrowInvalid as error:
        remedy = f"restore it from a copy, or remove it and its record {name} to do its images again"
        raise reading.damaged(uri, errors.reason(error), remedy) from error
