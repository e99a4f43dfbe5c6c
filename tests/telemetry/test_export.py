"""Without a Ray cluster nothing is reported, and Ray is not imported for it."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.telemetry import export, series

Call = tuple[str, str, float, dict[str, str]]


class Metric:
    """Stands for one of Ray's metrics; keeps what it is told."""

    calls: list[Call] = []

    def __init__(self, name: str, *_: Any) -> None:
        self._name = name

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.calls.append(("set", self._name, value, labels))

    def inc(self, value: float, labels: dict[str, str]) -> None:
        self.calls.append(("inc", self._name, value, labels))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))  # type: ignore[misc]
    metrics = SimpleNamespace(Counter=Metric, Gauge=Metric)
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(metrics=metrics))  # type: ignore[misc]
    monkeypatch.setattr(Metric, "calls", [])
    export._metric.cache_clear()
    yield Metric.calls
    export._metric.cache_clear()


def test_gauge_is_set_and_counter_grows(calls: list[Call]) -> None:
    export.put(series.PLANNED, 3, work="score")
    export.add(series.FETCHED_BYTES, 5.0, work="score")
    assert calls == [
        ("set", "nsnet_run_images_planned", 3, {"work": "score"}),
        ("inc", "nsnet_fetched_bytes_total", 5.0, {"work": "score"}),
    ]


def test_value_that_is_no_number_or_nothing_is_left_out(calls: list[Call]) -> None:
    export.put(series.RESIDUAL_ENERGY, float("nan"))
    export.put(series.RESIDUAL_ENERGY, float("inf"))
    export.add(series.TRAINING_IMAGES, 0)
    assert calls == []


def test_nothing_is_imported_without_a_cluster() -> None:
    code = (
        "import sys\nfrom jobs.telemetry import export, series\n"
        "export.put(series.LOCKS_HELD, 1)\nexport.add(series.TRAINING_IMAGES, 1)\nprint('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
