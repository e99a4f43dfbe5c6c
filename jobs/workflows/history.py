"""The published runs of an output, with a comparison of each with earlier ones."""

from collections.abc import Sequence
from typing import Any

from jobs.console import tables
from jobs.runs import catalog
from jobs.runs.drift import Drift, drift, with_earlier
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.errors import SourceError

HEADING = ("run", "detector", "rows", "failed", "images/s", "called fake", "expected", "drift")


def history(out: Uri, detector_id: str | None = None) -> list[dict[str, Any]]:
    """A dictionary per run that published rows, oldest first. Raises `SourceError` if there is none."""
    probes.reachable(out)
    lines = [
        _line(record, None if now is None else drift(now, earlier))
        for record, now, earlier in with_earlier(catalog.runs(out))
        if detector_id in (None, record.get("detector_id"))
    ]
    if not lines:
        of = "" if detector_id is None else f" of detector {detector_id}"
        raise SourceError(f"{out} holds no published runs{of}")
    return lines


def _line(record: dict[str, Any], found: Drift | None) -> dict[str, Any]:
    counts, rows, seconds = record["counts"], record["rows"], record.get("seconds")
    scored = counts.get("status", {}).get("scored", 0)
    return {
        "run_id": record["run_id"],
        "published_at": record.get("published_at"),
        "source": record.get("source"),
        "detector_id": record.get("detector_id"),
        "rows": rows,
        "failed": counts.get("status", {}).get("failed", 0),
        "images_per_s": round(rows / seconds, 1) if seconds else None,
        "flagged_share": counts.get("verdict", {}).get("fake", 0) / scored if scored else None,
        "drift": None
        if found is None
        else {
            "runs": found.runs,
            "expected_share": found.expected_share,
            "smallest_share": found.smallest_share,
            "p_values": dict(found.p_values),
            "alarms": list(found.alarms),
        },
    }


def as_text(runs: Sequence[dict[str, Any]]) -> str:
    """A table for the console."""
    rows = [HEADING]
    for run in runs:
        found = run["drift"]
        rows.append(
            (
                run["run_id"], str(run["detector_id"])[:12], f"{run['rows']:,}", f"{run['failed']:,}",
                tables.UNDEFINED if run["images_per_s"] is None else f"{run['images_per_s']:,.1f}",
                tables.UNDEFINED if run["flagged_share"] is None else f"{run['flagged_share']:.2%}",
                tables.UNDEFINED
                if found is None
                else f"{found['expected_share']:.2%} ± {found['smallest_share']:.2%}",
                tables.UNDEFINED if found is None else ", ".join(found["alarms"]) or "none",
            )
        )  # fmt: skip
    lines = tables.aligned(rows, left=2)
    if any(run["drift"] is None for run in runs):
        lines.append("– no comparison: fewer than 5 earlier runs of this detector and source with 100 scored images")
    return "\n".join(lines)
