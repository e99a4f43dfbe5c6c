"""What earlier runs of an output found to hang or kill its decoder, so that it is not tried again."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.pipeline.poison import KINDS, key
from jobs.runs import catalog
from jobs.runs.execution import Request
from jobs.storage.uris import Uri

MAX_REMEMBERED: Final = 10_000
"""Contents that are remembered: the newest."""
COLUMNS: Final = pa.schema(
    [schema.FACTS.field(name) for name in ("content_hash", "error_class", "error_message")]
    + [schema.TRANSFORM]
)  # fmt: skip


def remembered(request: Request) -> dict[str, tuple[str, str]]:
    """What failed in earlier runs into the same output and would fail again: with the same limits and decoder.

    Only runs whose records count such failures are looked at, the newest first.
    """
    found: dict[str, tuple[str, str]] = {}
    if request.selection.retry_failed or request.selection.rescore:
        return found
    for record in reversed(catalog.runs(request.out, request.product)):
        counts = record.get("counts", {}).get("error_class")
        same = record.get("settings", {}).get("limits") == request.settings["limits"]
        if not same or record.get("versions", {}).get("pillow") != version("pillow"):
            continue
        if type(counts) is not dict or not counts.keys() & {*KINDS}:
            continue
        for row in _failures(request.out, record):
            name = key(row["content_hash"], row["transform"] or "")
            found.setdefault(name, (row["error_class"], f"{row['error_message']} (in run {record['run_id']})"))
            if len(found) >= MAX_REMEMBERED:
                return found
    return found


def _failures(out: Uri, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for batch in catalog.rows_of(out, record, COLUMNS):
        for row in batch.filter(pc.is_in(batch.column("error_class"), pa.array(KINDS))).to_pylist():
            if row["content_hash"]:
                yield row
