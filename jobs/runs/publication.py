"""Verify and publish a run. It exists for readers once its record `<out>/runs/<id>.json` does.

<out>/locks/                      the current holder (`jobs.runs.lock`)
<out>/staging/<run_id>/           manifest and unverified rows (`jobs.runs.attempts`), removed after publishing
<out>/verdicts/run_date=…/run_id=…/part-*.parquet    or captions/…, facts/…: the product's name
<out>/runs/<run_id>.json          the commit record, written last
"""

import itertools
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.schema import IDS
from jobs.runs import drift, names, records, removal
from jobs.runs.attempts import RUN_ID, planned_rows
from jobs.runs.catalog import run_ids
from jobs.runs.lock import LockLost
from jobs.runs.products import PRODUCTS, VERDICTS, Product, final_folder
from jobs.storage import errors, parquet, reading, uris, writing
from jobs.storage.database import database
from jobs.storage.uris import Uri
from nsnet.digest import file_digest
from nsnet.errors import LockedError, NsnetError, StorageError

COUNTED: Final = ("status", "verdict", "error_class", "c2pa_state", "digital_source_type", "metadata_generator")
"""Columns whose values a record counts."""


class VerificationError(NsnetError):
    """Staged rows do not match the plan, or another publication came first; nothing was published."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run into an output."""

    out: Uri
    product: Product = VERDICTS
    run_id: str = field(default_factory=lambda: new_run_id())

    @property
    def staging(self) -> str:
        """Folder of unpublished files."""
        return uris.join(self.out, "staging", self.run_id)

    @property
    def final(self) -> str:
        """Folder of the published files."""
        return uris.join(self.out, final_folder(self.product.name, self.run_id))

    @property
    def record(self) -> str:
        """URI of the commit record."""
        return uris.join(self.out, "runs", f"{self.run_id}.json")

    def publish(
        self,
        manifest: str,
        staged: Sequence[str],
        details: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        planned_after: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Verify staged files of rows against the manifest, write the final files, then the record; returns it.

        Raises `VerificationError`, and publishes nothing, if rows are missing, surplus or doubled, if the run was
        published already, or if a run of the same maker outside `planned_after` was published. `check` raises
        `LockedError` when this process may no longer write here.

        A stalled publisher is harmless: part files have unique names, the record is created conditionally, and only
        its creator tidies up. If the process stalled after its last lock check, it deletes its record when it finds
        the lock lost or a newer run. So once another process holds the lock, a file that no record names is an orphan.
        """
        verify_ids(planned_rows(manifest, IDS), self._own(staged, IDS))
        check()
        counts = Counts()
        rows = counts.watch(self._own(staged, self.product.columns))
        files: list[dict[str, Any]] = []
        try:
            for file in write_parts(rows, self.product, self.final):
                files.append({**file, "path": file["path"].removeprefix(self.out + "/")})
            record = self._describe(counts, files, details)
            check()
            self._commit(record, check, planned_after)
        except (VerificationError, LockedError, LockLost):
            for file in files:
                writing.remove_file(uris.join(self.out, file["path"]))
            raise
        try:
            self.tidy(files)
        except Exception as error:  # botocore, aiohttp and OS errors share no base
            say(f"warning: {self.staging} was not removed, the next run tries again ({errors.reason(error)})")
        return record

    def _own(self, staged: Sequence[str], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
        """This run's rows of staged files, which may also hold rows of other runs of its pass."""
        name = RUN_ID.name
        if name not in self.product.columns.names:
            yield from parquet.read_small(staged, columns, optional=schema.LATER)
            return
        read = columns if name in columns.names else pa.schema([*columns, self.product.columns.field(name)])
        for batch in parquet.read_small(staged, read, optional=schema.LATER):
            yield batch.filter(pc.equal(batch.column(name), self.run_id)).select(columns.names)

    def _describe(self, counts: "Counts", files: list[dict[str, Any]], details: dict[str, Any]) -> dict[str, Any]:
        """The record of these files."""
        return {
            "run_id": self.run_id,
            "product": self.product.name,
            "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": counts.rows,
            "counts": counts.by_column(),
            "distributions": counts.distributions(),
            "store": counts.store(),
            "captions": counts.captions(self.run_id),
            "files": files,
            **details,
        }

    def _commit(self, record: dict[str, Any], check: Callable[[], None], planned_after: Collection[str] | None) -> None:
        """Create the record. Raises `VerificationError` if this or a later run was published already, and what `check`
        raises.
        """

        def refuse_if_overtaken() -> None:
            if planned_after is not None:
                others = run_ids(self.out, self.product, record[self.product.maker])
                others -= {*planned_after, self.run_id}
                if others:
                    raise VerificationError(
                        f"run {self.run_id} is not published, since {', '.join(sorted(others))} was published after it "
                        "was planned: run the same command again"
                    )

        refuse_if_overtaken()
        encoded = writing.encode_json(record)
        try:
            create_record(self.record, encoded)
            check()
            refuse_if_overtaken()
        except (VerificationError, LockedError, LockLost):
            withdraw_record(self.record, encoded)
            raise

    def tidy(self, files: Sequence[dict[str, Any]]) -> None:
        """Remove what a published run no longer needs: its staging, and final files that its record does not name."""
        named = {file["path"].rpartition("/")[2] for file in files}
        self._clean(lambda name: name in named)

    def abandon(self) -> None:
        """Remove all files of an unpublished run: its staging, and final files of interrupted publications."""
        self._clean(lambda name: False)

    def _clean(self, keep: Callable[[str], bool]) -> None:
        foreign = removal.remove(self.final, names.PARTS, keep).foreign
        foreign += removal.remove(self.staging, names.STAGED).foreign
        if foreign:
            say(removal.left_alone(foreign))


def create_record(uri: str, encoded: bytes) -> None:
    """Create a record. Raises `VerificationError` if it exists with other content.

    Whatever the store answers, the record is read back: not every store makes conditional puts atomic, and a retry may
    be refused because the first try succeeded.
    """
    writing.create(uri, encoded)
    try:
        is_ours = reading.read_bytes(uri) == encoded
    except FileNotFoundError as error:
        # the files stay, since the store may still create the record
        raise StorageError(
            f"{uri} was not created, though the store has no such record: start the command again"
        ) from error
    if not is_ours:
        raise VerificationError(
            f"run {uri.rpartition('/')[2].removesuffix('.json')} was published already, by another process"
        )


def withdraw_record(uri: str, encoded: bytes) -> None:
    """Remove a record if it is the one that this process tried to create."""
    with suppress(FileNotFoundError):
        if reading.read_bytes(uri) == encoded:
            writing.remove_file(uri)


class Counts:
    """Counts rows for a record while they stream through."""

    def __init__(self) -> None:
        self.rows = 0
        self._values: Counter[tuple[str, str]] = Counter()
        self._requests = self._asked_again = 0
        self._captioned_by: Counter[str] = Counter()
        self._distributions: dict[str, drift.Counts] = {}

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches and count their rows."""
        for batch in batches:
            self.rows += batch.num_rows
            for name in [name for name in COUNTED if name in batch.schema.names]:
                self._values.update({(name, value): n for value, n in _value_counts(batch.column(name))})
            if "caption_run_id" in batch.schema.names:
                self._captioned_by.update(dict(_value_counts(batch.column("caption_run_id"))))
            for name in [name for name in drift.COLUMNS if name in batch.schema.names]:
                values = batch.column(name).drop_null().to_numpy(zero_copy_only=False)
                self._distributions[name] = self._distributions.get(name, 0) + drift.histogram(values)
            self._requests += pc.sum(batch.column("requests")).as_py() or 0
            self._asked_again += pc.sum(pc.greater(batch.column("requests"), 1)).as_py() or 0
            yield batch

    def by_column(self) -> dict[str, dict[str, int]]:
        """Column -> value -> rows, for the columns of `COUNTED`."""
        return {
            name: {value: n for (column, value), n in sorted(self._values.items()) if column == name}
            for name in COUNTED
        }

    def distributions(self) -> dict[str, list[int]]:
        """Column -> rows by bin (`drift.histogram`), for the columns of `drift.COLUMNS`."""
        return {name: counts.tolist() for name, counts in self._distributions.items()}

    def store(self) -> dict[str, int]:
        """Number of requests for images, and of images that needed more than one request."""
        return {"requests": self._requests, "asked_again": self._asked_again}

    def captions(self, run_id: str) -> dict[str, int]:
        """Number of rows with a caption of this run, and with one of an earlier run."""
        made = self._captioned_by[run_id]
        return {"made": made, "reused": self._captioned_by.total() - made}


def _value_counts(column: pa.Array) -> list[tuple[str, int]]:
    return [(value["values"], value["counts"]) for value in pc.value_counts(column.drop_null()).to_pylist()]


def new_run_id() -> str:
    """A run's name: UTC time and six random hexadecimal digits; sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def verify_ids(planned: Iterable[pa.RecordBatch], staged: Iterable[pa.RecordBatch]) -> None:
    """Raise `VerificationError` unless both hold the same ids, each once. Works on disk, for any number of ids."""
    with database() as rows:
        for table, batches in (("planned", planned), ("came", staged)):
            rows.create(table, "image_id::uuid as image_id", IDS)
            rows.insert(table, batches)
        number = rows.number("select count(*) from came")
        doubled = number - rows.number("select count(distinct image_id) from came")
        missing = rows.number("select count(*) from planned anti join came using (image_id)")
        surplus = rows.number("select count(*) from came anti join planned using (image_id)")
        total = rows.number("select count(*) from planned")
    if doubled or missing or surplus:
        raise VerificationError(
            f"{total} images were planned, but {number} rows were made: {missing} missing, {surplus} surplus, "
            f"{doubled} doubled; nothing was published, run the same command again"
        )


def remove_orphans(out: Uri, published: Iterable[dict[str, Any]], unfinished: Collection[str]) -> list[str]:
    """Remove files of interrupted or overtaken publications, which readers by file pattern would mistake for published
    ones; returns their URIs.

    Such files have names of this program, and no record of `published`, the stored ones, names them. Files of
    `unfinished` runs stay until the run ends. Files of runs before the oldest also stay: their records may be lost. The
    caller must have held the lock since before it read the records.
    """
    published = list(published)
    named = {file["path"] for record in published for file in record["files"] if type(file) is dict}
    oldest = min((run_id for record in published for run_id in records.run_ids(record)), default=None)
    removed, older = [], 0
    for product in PRODUCTS:

        def keep(path: str, product: str = product) -> bool:
            nonlocal older
            match = names.PUBLISHED.files.fullmatch(path)
            if match is None or match["run_id"] in unfinished or f"{product}/{path}" in named:
                return True
            is_older = oldest is None or match["run_id"] < oldest
            older += is_older
            return is_older

        removed += removal.remove(uris.join(out, product), names.PUBLISHED, keep).removed
    if older:
        say(
            f"warning: {out} holds {older:,} files of runs that are older than all records (runs/*.json): restore "
            "their records, or remove the files"
        )
    return removed


def write_parts(batches: Iterator[pa.RecordBatch], product: Product, folder: str) -> Iterator[dict[str, Any]]:
    """Write each `part-*.parquet` to a local file, then upload it; yields path, rows, size and SHA-256 of each."""
    token = secrets.token_hex(4)
    for number in itertools.count():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "part.parquet"
            rows = parquet.write(_first(batches, product.rows_per_file), schema.stored(product.columns), str(path))
            if rows == 0:
                return
            uri = uris.join(folder, f"part-{number:05d}-{token}.parquet")
            writing.upload_file(path, uri)
            yield {"path": uri, "rows": rows, "size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def _first(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Take batches until they have at least this many rows, or until none are left."""
    while rows > 0 and (batch := next(batches, None)) is not None:
        rows -= batch.num_rows
        yield batch
