"""The Grafana dashboard as JSON: `python -m tools.dashboard > cluster/monitoring/dashboard.json`.

Panels are laid out from left to right, and rows have a heading. A test compares the file with what this prints.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from jobs.telemetry import series as s
from jobs.telemetry.series import Series

WIDTH: Final = 24
"""Columns of Grafana's grid."""
WINDOW: Final = "$__rate_interval"
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
MODELS: Final = 'stage!~"fetching|decoding"'
"""Seconds of model actors, those of waiting included."""
Query = tuple[str, str]
"""Expression and legend."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel of the dashboard."""

    title: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    stacked: bool = False
    note: str = ""
    """Shown when a reader points at the title."""


def rate(series: Series, *by: str, where: str = "") -> str:
    """Increase of a counter per second, summed by labels."""
    labels = f" by ({', '.join(by)})" if by else ""
    return f"sum{labels} (rate({series.exported}{{{where}}}[{WINDOW}]))"


def newest(series: Series, *by: str) -> str:
    """A gauge of the processes that report now."""
    labels = f" by ({', '.join(by)})" if by else ""
    return f"max{labels} ({series.exported})"


def latest(series: Series, *by: str) -> str:
    """The largest value of a gauge in the last day, also after its cluster ended."""
    labels = f" by ({', '.join(by)})" if by else ""
    return f"max{labels} (max_over_time({series.exported}[24h]))"


def stat(title: str, unit: str, *queries: Query, note: str = "") -> Panel:
    """A number."""
    return Panel(title=title, queries=queries, kind="stat", unit=unit, width=4, height=4, note=note)


WAITING: Final = 'stage=~"waiting.*"'
busy = f"1 - {rate(s.STAGE_SECONDS, where=WAITING)} / {rate(s.STAGE_SECONDS, where=MODELS)}"
held = f"(time() - {s.LOCK_RENEWED.exported}) and {s.LOCKS_HELD.exported} > 0"
GROUPS: Final[dict[str, tuple[Panel, ...]]] = {
    "Night at a glance": (
        stat("Done", "percentunit", (f"{newest(s.DONE, 'work')} / {newest(s.PLANNED, 'work')}", "{{work}}")),
        stat("Last published", "dateTimeFromNow", (f"1000 * {latest(s.PUBLISHED_AT, 'product')}", "{{product}}")),
        stat(
            "Failed / allowed", "percentunit", (latest(s.FAILED_SHARE), "failed"),
            (latest(s.FAILED_SHARE_ALLOWED), "allowed"), note="The worst command of the last day, at its end.",
        ),
        stat("Drift alarms", "none", (f"sum({latest(s.DRIFT_ALARM, 'detector', 'statistic')})", "alarms")),
        stat("Age of the lease", "s", (f"max({held})", "age"), note="Renewed every 15 s, expires after 120 s."),
        stat("Exit code", "none", (latest(s.EXIT_CODE, "command"), "{{command}}"), note="The largest of the last day."),
        Panel(title="Images per second", unit="cps", width=12, queries=(
            (rate(s.IMAGES, "work", "stage"), "{{work}}: {{stage}}"),
        )),
        Panel(title="Progress", width=12, queries=(
            (newest(s.DONE, "work"), "{{work}}: done"), (newest(s.PLANNED, "work"), "{{work}}: planned"),
        )),
    ),
    "Stages": (
        Panel(title="Images that wait for a stage", queries=((newest(s.QUEUE_IMAGES, "work", "stage"), "{{stage}}"),)),
        Panel(title="Failed images per second", unit="cps", queries=(
            (rate(s.IMAGES, "stage", "error_class", where='outcome="failed"'), "{{stage}}: {{error_class}}"),
        )),
        Panel(title="Processes at work, by stage", stacked=True, queries=(
            (rate(s.STAGE_SECONDS, "stage"), "{{stage}}"),
        ), note="Seconds per second: how many processes do this."),
    ),
    "Store": (
        Panel(title="Fetched", unit="Bps", queries=((rate(s.FETCHED_BYTES, "work"), "{{work}}"),)),
        Panel(title="Repeated requests", unit="reqps", queries=((rate(s.REQUESTS_REPEATED, "work"), "{{work}}"),)),
        Panel(title="Age of leases", unit="s", queries=((f"max by (instance, WorkerId) ({held})", "{{instance}}"),)),
    ),
    "Models": (
        Panel(title="Busy share of the model actors", unit="percentunit", queries=((busy, "busy"),), width=6,
              note="Share of the actors' time in which a batch is in flight; without it they wait for images."),
        Panel(title="Model actors, by stage", stacked=True, width=6, queries=(
            (rate(s.STAGE_SECONDS, "stage", where=MODELS), "{{stage}}"),
        )),
        Panel(title="Called fake", unit="percentunit", width=6, queries=(
            (latest(s.FLAGGED_SHARE, "detector"), "{{detector}}"),
            (latest(s.FLAGGED_EXPECTED, "detector"), "{{detector}}: expected"),
        )),
        Panel(title="Published runs", width=6, queries=(
            (latest(s.PUBLISHED_IMAGES, "product", "status"), "{{product}}: {{status}}"),
            (latest(s.PUBLISHED_SECONDS, "product"), "{{product}}: seconds"),
        )),
    ),
    "Training": (
        Panel(title="Loss", queries=((newest(s.TRAINING_LOSS, "term"), "{{term}}"),)),
        Panel(title="Images per second", unit="cps", queries=((rate(s.TRAINING_IMAGES), "trained"),)),
        Panel(title="Where the time goes", unit="percentunit", stacked=True, queries=(
            (f"{rate(s.TRAINING_SECONDS, 'part')} / on () group_left () {rate(s.TRAINING_SECONDS)}", "{{part}}"),
        ), note="Of the first process. `waiting` is the data-wait share."),
        Panel(title="Residual energy", unit="percentunit", queries=((newest(s.RESIDUAL_ENERGY), "residual energy"),)),
        Panel(title="Validation AP", queries=((newest(s.VALIDATION_AP), "AP"),)),
        Panel(title="Epochs and checkpoints", queries=(
            (newest(s.TRAINING_EPOCH), "completed epochs"),
            (f'sum({s.TRAINING_SECONDS.exported}{{part="checkpointing"}})', "seconds of checkpoints"),
        )),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, group in GROUPS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        row = {"type": "row", "title": heading, "collapsed": False, "panels": [], "gridPos": place}
        panels.append({"id": len(panels) + 1, **row})
        x, y, height = 0, y + 1, 0
        for panel in group:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": place})
            x, height = x + panel.width, max(height, panel.height)
        y += height
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "nsnet", "title": "NS-Net on Ray", "tags": ["nsnet", "ray"], "schemaVersion": 39, "version": 1,
        "editable": True, "timezone": "utc", "refresh": "30s", "time": {"from": "now-12h", "to": "now"},
        "templating": {"list": [source]}, "annotations": {"list": []}, "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40} if panel.stacked else {}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
