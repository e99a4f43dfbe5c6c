"""Set gauges and add to counters of this process; Ray's agent on the node exports them.

Does nothing unless the process is connected to a Ray cluster. An embedded cluster collects no metrics and ignores them.
A gauge is exported until 20 s after its process ended, a counter until its node ends: Ray's agent keeps it.
"""

import math
import sys
from functools import cache
from typing import Any

from jobs.telemetry.series import Series


def put(series: Series, value: float, **labels: str) -> None:
    """Set a gauge; a value that is not finite is left out."""
    if is_connected() and math.isfinite(value):
        _metric(series).set(value, labels)


def add(series: Series, value: float, **labels: str) -> None:
    """Add to a counter."""
    if value > 0 and is_connected():
        _metric(series).inc(value, labels)


def is_connected() -> bool:
    """Whether this process belongs to a Ray cluster."""
    ray = sys.modules.get("ray")  # not imported here: many commands end before they need it
    return ray is not None and bool(ray.is_initialized())


@cache
def _metric(series: Series) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if series.kind == "counter" else metrics.Gauge
    return kind(series.name, series.help, series.labels)
