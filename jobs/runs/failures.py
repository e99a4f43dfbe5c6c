"""Images that hung or killed the decoder in earlier runs of an output, so that they are not decoded again."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.pipeline.poison import KINDS, key
from jobs.runs import catalog
from jobs.runs.execution import Request
from jobs.runs.rows import read_rows
from jobs.storage.uris import Uri

MAX_REMEMBERED: Final = 10_000
"""Maximum number of contents to remember, the newest first."""
COLUMNS: Final = pa.schema(
    [schema.FACTS.field(name) for name in ("content_hash", "error_class", "error_message")]
    + [schema.TRANSFORM]
)  # fmt: skip


def remembered(request: Request) -> dict[str, tuple[str, str]]:
    """Failures of earlier runs of the same output with the same limits and decoder, which would occur again.

    Reads only runs whose records count such failures, the newest first.
    """
    failures: dict[str, tuple[str, str]] = {}
    if request.selection.retry_failed or request.selection.rescore:
        return failures
    decoder = version("pillow")  # reads a file
    for record in reversed(catalog.runs(request.out, request.product)):
        counts = record.get("counts", {}).get("error_class")
        same_limits = record.get("settings", {}).get("limits") == request.settings["limits"]
        if not same_limits or record.get("versions", {}).get("pillow") != decoder:
            continue
        if type(counts) is not dict or not counts.keys() & {*KINDS}:
            continue
        for row in _failures(request.out, record):
            name = key(row["content_hash"], row["transform"] or "")
            failures.setdefault(name, (row["error_class"], f"{row['error_message']} (in run {record['run_id']})"))
            if len(failures) >= MAX_REMEMBERED:
                return failures
    return failures


def _failures(out: Uri, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for batch in read_rows(out, [record], COLUMNS):
        for row in batch.filter(pc.is_in(batch.column("error_class"), pa.array(KINDS))).to_pylist():
            if row["content_hash"]:
                yield row
