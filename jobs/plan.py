"""What is to be done: a source's listing as a manifest Parquet."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import schema, storage
from jobs.sources import Source
from nsnet.errors import SourceError, UsageError

BATCH_ROWS: Final = 8192
FILE: Final = "manifest.parquet"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A written manifest."""

    uri: str
    """The manifest Parquet."""
    count: int
    """Pictures in it."""
    left_out: dict[str, int]
    """Reason -> objects of the source that are not in it."""
    labels: dict[int | None, int]
    """Label -> pictures."""

    def describe(self) -> str:
        """One line for the console."""
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{self.count:,} pictures" + (f" ({reasons})" if reasons else "")


def write_manifest(source: Source, uri: str, limit: int | None = None) -> Plan:
    """List a source into a manifest. Raises `SourceError` when it holds no picture; nothing is left behind then."""
    if uri.startswith(source.uri.rstrip("/") + "/"):
        raise UsageError(f"--out lies inside the source {source.uri}, which would list it: choose a place beside it")
    seen: set[bytes] = set()
    labels: Counter[int | None] = Counter()
    pending: list[dict[str, Any]] = []
    listed = source.rows()
    first = next(listed, None)
    if first is None:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(source.left_out.items()))
        raise SourceError(f"{source.uri} holds no pictures" + (f" ({reasons})" if reasons else ""))
    if storage.is_local(uri):
        storage.make_folder(uri.rpartition("/")[0])
    system, path = storage.arrow_filesystem(uri)
    with pq.ParquetWriter(path, schema.MANIFEST, filesystem=system) as writer:
        row: dict[str, Any] | None = first
        while row is not None and (limit is None or len(seen) < limit):
            key = bytes.fromhex(row["image_id"])
            if key in seen:
                source.left_out["listed twice"] += 1
            else:
                seen.add(key)
                labels[row["label"]] += 1
                pending.append(row)
            if len(pending) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema.MANIFEST))
                pending.clear()
            row = next(listed, None)
        writer.write_table(pa.Table.from_pylist(pending, schema=schema.MANIFEST))
    return Plan(uri=uri, count=len(seen), left_out=dict(source.left_out), labels=dict(labels))
