"""Report published runs: to the metrics of the cluster, and to the command's summary."""

import os
import time
from collections.abc import Sequence
from typing import Any, Final

from jobs.console import summary
from jobs.console.output import say
from jobs.runs import catalog
from jobs.runs.drift import Seen, drift, with_earlier
from jobs.runs.products import VERDICTS, Product
from jobs.storage import errors
from jobs.storage.uris import Uri
from jobs.telemetry import export, series

ID_LETTERS: Final = 12
"""Letters of a detector's id in a label, as in the table of `nsnet runs`."""


def report(out: Uri, product: Product, records: Sequence[dict[str, Any]], address: str | None) -> None:
    """Report the records of a command's runs. A failure of the cluster or the store only warns: they are published.

    Joins the cluster that `address` or `RAY_ADDRESS` names if the runs had nothing to do: an alarm misses a night
    without a report. If none is named, Ray is not imported.
    """
    for record in records:
        summary.note_item(
            "runs", run_id=record["run_id"], product=product.name, maker=record.get(product.maker),
            rows=record["rows"], status=record["counts"].get("status", {}), verdict=record["counts"].get("verdict", {}),
            unread=record.get("unread_count", 0), attempts=record.get("attempts", 0), seconds=record.get("seconds"),
            record=f"{out}/runs/{record['run_id']}.json",
        )  # fmt: skip
    try:
        if not export.is_connected() and (address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local"):
            from jobs.cluster import resources

            resources.connect(address, awaits_worker=False)
        if export.is_connected():
            _export(out, product, records)
    except Exception as error:  # botocore, aiohttp, Ray and OS errors have no common base
        line = errors.explain(error)
        if line is None:  # a bug of this program
            raise
        say(f"warning: the metrics of the published runs are not reported ({line})")


def _export(out: Uri, product: Product, records: Sequence[dict[str, Any]]) -> None:
    of = {"product": product.name}
    export.put(series.PUBLISHED_AT, time.time(), **of)
    export.put(series.PUBLISHED_SECONDS, max((record.get("seconds") or 0.0) for record in records), **of)
    for status in ("scored", "failed"):
        count = sum(record["counts"].get("status", {}).get(status, 0) for record in records)
        export.put(series.PUBLISHED_IMAGES, count, status=status, **of)
    own = {record["run_id"] for record in records if record["rows"]}
    if product == VERDICTS and own:
        for record, now, earlier in with_earlier(catalog.runs(out)):
            if record["run_id"] in own and now is not None:  # None: too few rows to compare
                _export_drift(str(record.get(VERDICTS.maker))[:ID_LETTERS], now, earlier)


def _export_drift(detector: str, now: Seen, earlier: Sequence[Seen]) -> None:
    export.put(series.FLAGGED_SHARE, now.share, detector=detector)
    found = drift(now, earlier)
    if found is None:
        return
    export.put(series.FLAGGED_EXPECTED, found.expected_share, detector=detector)
    for statistic in found.p_values:
        export.put(series.DRIFT_ALARM, float(statistic in found.alarms), detector=detector, statistic=statistic)
