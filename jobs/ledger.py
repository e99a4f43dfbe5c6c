"""Runs on storage: staged, verified, published. A run exists for readers once its record `<out>/runs/<id>.json` does.

<out>/staging/<run_id>/           manifest and unverified rows, removed after publishing
<out>/verdicts/run_date=…/run_id=…/part-*.parquet
<out>/runs/<run_id>.json          the commit record, written last
"""

import hashlib
import secrets
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from jobs import schema, storage
from nsnet.errors import NsnetError, SourceError

ROWS_PER_FILE: Final = 500_000
"""About 100 MB of verdicts: what query engines like to read."""
BATCH_ROWS: Final = 32_768
COUNTED: Final = ("status", "verdict", "error_class")
"""Columns whose values a record counts."""


class VerificationError(NsnetError):
    """Staged rows are not what was planned; nothing was published."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of scoring into an output."""

    out: str
    run_id: str = field(default_factory=lambda: new_run_id())

    @property
    def staging(self) -> str:
        """Folder of what is not yet published."""
        return storage.join(self.out, "staging", self.run_id)

    @property
    def staged_rows(self) -> str:
        """Folder of unverified verdict rows."""
        return storage.join(self.staging, "rows")

    @property
    def final(self) -> str:
        """Folder of the published files."""
        date = datetime.strptime(self.run_id[:8], "%Y%m%d").date()
        return storage.join(self.out, "verdicts", f"run_date={date.isoformat()}", f"run_id={self.run_id}")

    @property
    def record(self) -> str:
        """The commit record."""
        return storage.join(self.out, "runs", f"{self.run_id}.json")

    def publish(self, manifest: str, details: dict[str, Any]) -> dict[str, Any]:
        """Verify the staged rows against the manifest, write the final files, then the record; returns the record.

        Raises `VerificationError` when rows are missing, surplus or doubled; then nothing is published.
        """
        if not storage.is_folder(self.staged_rows):
            raise VerificationError(f"no row of run {self.run_id} was staged; nothing was published")
        rows = staged(self.staged_rows, schema.VERDICTS)
        verify_ids(ids(manifest), rows.to_table(columns=["image_id"]).column(0))
        counts: Counter[tuple[str, str]] = Counter()
        files: list[dict[str, Any]] = []
        writer: _Part | None = None
        for batch in rows.scanner(batch_size=BATCH_ROWS).to_batches():
            table = pa.Table.from_batches([batch]).select(schema.VERDICTS.names).cast(schema.VERDICTS)
            counts += count_values(table)
            writer = writer or _Part(storage.join(self.final, f"part-{len(files):05d}.parquet"))
            writer.write(table)
            if writer.rows >= ROWS_PER_FILE:
                files.append(writer.close())
                writer = None
        if writer is not None:
            files.append(writer.close())
        record = {
            "run_id": self.run_id,
            "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": sum(file["rows"] for file in files),
            "counts": by_column(counts),
            "files": [{**file, "path": file["path"].removeprefix(self.out + "/")} for file in files],
            **details,
        }
        storage.write_json(self.record, record)
        storage.remove_folder(self.staging)
        return record


def new_run_id() -> str:
    """A run's name: UTC time and six random hexadecimal digits; sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def verify_ids(planned: pa.ChunkedArray, staged: pa.ChunkedArray) -> None:
    """Raise `VerificationError` unless both hold the same ids, each once."""
    doubled = len(staged) - pc.count_distinct(staged).as_py()
    missing = pc.sum(pc.invert(pc.is_in(planned, value_set=staged))).as_py() or 0
    surplus = pc.sum(pc.invert(pc.is_in(staged, value_set=planned))).as_py() or 0
    if doubled or missing or surplus:
        raise VerificationError(
            f"{len(planned)} pictures were planned and {len(staged)} rows came: {missing} missing, {surplus} surplus, "
            f"{doubled} doubled; nothing was published, run the same command again"
        )


def count_values(table: pa.Table) -> Counter[tuple[str, str]]:
    """(column, value) -> rows, for the columns that say how it went and that the table has."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in [name for name in COUNTED if name in table.column_names]:
        for value in pc.value_counts(table.column(name)).to_pylist():
            if value["values"] is not None:
                counts[name, value["values"]] += value["counts"]
    return counts


def by_column(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Column -> value -> rows."""
    return {name: {value: n for (column, value), n in sorted(counts.items()) if column == name} for name in COUNTED}


def summary(record: dict[str, Any]) -> str:
    """What came out, in a few lines."""
    counts = record["counts"]
    parts = [f"{number} {verdict}" for verdict, number in counts["verdict"].items()]
    parts.append(f"{counts['status'].get('failed', 0)} failed")
    lines = [f"{record['rows']:,} rows in {record['seconds']:.1f} s: {', '.join(parts)}"]
    lines += [f"  failed with {name}: {number}" for name, number in counts["error_class"].items()]
    lines += [f"  left out of the source, {reason}: {number}" for reason, number in record["left_out"].items()]
    return "\n".join(lines)


def runs(out: str) -> list[dict[str, Any]]:
    """Records of all published runs below an output, oldest first."""
    folder = storage.join(storage.absolute(out), "runs")
    if not storage.exists(folder):
        return []
    records = [storage.read_json(entry.uri) for entry in storage.list_files(folder) if entry.uri.endswith(".json")]
    return sorted(records, key=lambda record: str(record["run_id"]))


def verdicts(out: str) -> pads.Dataset:
    """The verdicts of all published runs, as an Arrow dataset; raises `SourceError` when there is none."""
    out = storage.absolute(out)
    paths = [storage.join(out, file["path"]) for record in runs(out) for file in record["files"]]
    if not paths:
        raise SourceError(f"{out} holds no published run")
    system, _ = storage.arrow_filesystem(out)
    names = [storage.arrow_path(path) for path in paths]
    return pads.dataset(names, schema=schema.VERDICTS, filesystem=system, format="parquet")


class _Part:
    """One published file."""

    def __init__(self, uri: str) -> None:
        self.uri, self.rows = uri, 0
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, schema.VERDICTS, compression="zstd")

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)
        self.rows += table.num_rows

    def close(self) -> dict[str, Any]:
        self._writer.close()
        data = self._sink.getvalue().to_pybytes()
        storage.write_bytes(self.uri, data)
        return {
            "path": self.uri, "rows": self.rows, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip


def staged(folder: str, columns: pa.Schema) -> pads.Dataset:
    """The rows that a pipeline wrote into a folder."""
    system, path = storage.arrow_filesystem(folder)
    return pads.dataset(path, schema=columns, filesystem=system, format="parquet")


def ids(manifest: str) -> pa.ChunkedArray:
    """The image ids of a manifest."""
    system, path = storage.arrow_filesystem(manifest)
    return pq.read_table(path, columns=["image_id"], filesystem=system).column(0)
