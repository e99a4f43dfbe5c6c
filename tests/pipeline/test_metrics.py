"""The driver reports what its board counted since the last snapshot, and what waits before each stage."""

from collections import Counter
from typing import Any

import pytest

from jobs.pipeline.metrics import DONE, Snapshot, StreamMetrics
from jobs.telemetry import export, series

COUNTS = ("prepared", "captioned", "scored")


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """Name and labels of a series -> its value."""
    values: Counter[tuple[str, ...]] = Counter()

    def add(one: series.Series, value: float, **labels: str) -> None:
        values[one.name, *(labels[name] for name in one.labels)] += value  # type: ignore[assignment]

    def put(one: series.Series, value: float, **labels: str) -> None:
        values[one.name, *(labels[name] for name in one.labels)] = value  # type: ignore[assignment]

    monkeypatch.setattr(export, "add", add)
    monkeypatch.setattr(export, "put", put)
    return values  # type: ignore[return-value]


def snapshot(images: dict[tuple[str, str], int], seconds: dict[str, float] | None = None, **counts: int) -> Snapshot:
    return Snapshot(counts, seconds or {}, images, [])


def test_counters_grow_by_what_came_since_the_last_snapshot(reported: dict[Any, float]) -> None:
    metrics = StreamMetrics("score", 100, COUNTS)
    metrics.report(snapshot({("preparing", DONE): 10}, {"decoding": 2.0}, fetched_bytes=500))
    metrics.report(
        snapshot(
            {("preparing", DONE): 30, ("preparing", "ImageEmptyError"): 1}, {"decoding": 5.5},
            fetched_bytes=900, requests_repeated=2,
        )
    )  # fmt: skip
    assert reported["nsnet_images_total", "score", "preparing", "done", ""] == 30
    assert reported["nsnet_images_total", "score", "preparing", "failed", "ImageEmptyError"] == 1
    assert reported["nsnet_stage_seconds_total", "score", "decoding"] == 5.5
    assert reported["nsnet_fetched_bytes_total", "score"] == 900
    assert reported["nsnet_requests_repeated_total", "score"] == 2


def test_snapshots_share_no_values() -> None:
    one, other = snapshot({}), snapshot({})
    one.added["nsnet_training_images_total",] = 1.0
    one.put["nsnet_training_epoch",] = 1.0
    assert (other.added, other.put) == ({}, {})


def test_error_classes_are_those_of_this_program(reported: dict[Any, float]) -> None:
    """A row's class may come from a file of an earlier run, which others can write."""
    metrics = StreamMetrics("score", 100, COUNTS)
    metrics.report(snapshot({("preparing", "ImageEmptyError"): 1, ("preparing", "<script>"): 2, ("preparing", "x"): 3}))
    failed = {key[-1]: value for key, value in reported.items() if "failed" in key}
    assert failed == {"ImageEmptyError": 1, "other": 5}


def test_board_that_was_started_again_counts_from_nothing(reported: dict[Any, float]) -> None:
    metrics = StreamMetrics("score", 100, COUNTS)
    for count in (40, 50, 5, 8):  # after 50 its node was lost
        metrics.report(snapshot({("preparing", DONE): count}))
    assert reported["nsnet_images_total", "score", "preparing", "done", ""] == 58


def test_queue_is_what_the_stage_before_has_passed(reported: dict[Any, float]) -> None:
    metrics = StreamMetrics("score", 100, COUNTS)
    metrics.report(snapshot({}, prepared=70, captioned=40, scored=32))
    queues = {key[2]: value for key, value in reported.items() if key[0] == "nsnet_queue_images"}
    assert queues == {"preparing": 30, "captioning": 30, "scoring": 8}
    assert reported["nsnet_run_images_done", "score"] == 32 and reported["nsnet_run_images_planned", "score"] == 100
    metrics.report(snapshot({}, prepared=120, captioned=100, scored=101))  # blocks that Ray repeated count twice
    queues = {key[2]: value for key, value in reported.items() if key[0] == "nsnet_queue_images"}
    assert queues == {"preparing": 0, "captioning": 0, "scoring": 0}
    assert reported["nsnet_run_images_done", "score"] == 100
