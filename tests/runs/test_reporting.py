"""Published runs are reported to the cluster, and nothing that fails there undoes or hides anything."""

from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from jobs.cluster import resources
from jobs.console import summary
from jobs.runs import catalog, reporting
from jobs.runs.drift import BINS, MIN_RUNS
from jobs.runs.products import CAPTIONS, VERDICTS
from jobs.telemetry import export, series
from nsnet.errors import StorageError

Reported = dict[tuple[str, ...], float]
OUT = "s3://bucket/out"


def record(number: int, fake: int = 20, detector: str = "0123456789abcdef", **changes: Any) -> dict[str, Any]:
    """The record of a run with 200 verdicts."""
    counts = [0] * BINS
    counts[10], counts[90] = 200 - fake, fake
    return {
        "run_id": f"202601{number:02}T000000Z-000000", "rows": 201, "source": "s3://in", "detector_id": detector,
        "counts": {"status": {"scored": 200, "failed": 1}, "verdict": {"fake": fake, "real": 200 - fake}},
        "distributions": {"prob_fake": counts, "residual_energy": counts}, "seconds": 10.0, **changes,
    }  # fmt: skip


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reported]:
    """Series and labels -> value, in a process that belongs to a cluster."""
    values: Reported = {}

    def put(one: series.Series, value: float, **labels: str) -> None:
        values[one.name, *(labels[name] for name in one.labels)] = value

    monkeypatch.setattr(export, "put", put)
    monkeypatch.setattr(export, "is_connected", lambda: True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    summary.begin()
    yield values
    summary.begin()


def report(*records: dict[str, Any], product: Any = VERDICTS, address: str | None = None) -> None:
    reporting.report(OUT, product, records, address)


def test_run_is_compared_with_earlier_ones_of_its_detector(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = [record(day) for day in range(1, MIN_RUNS + 1)]
    other, now = record(20, fake=150, detector="another"), record(21, fake=150)
    later = record(22, fake=0)
    monkeypatch.setattr(catalog, "runs", lambda _: [*earlier, other, now, later])
    report(now)
    assert reported["nsnet_flagged_share", "0123456789ab"] == 0.75
    assert reported["nsnet_flagged_share_expected", "0123456789ab"] == pytest.approx(0.1, abs=0.01)
    assert reported["nsnet_drift_alarm", "0123456789ab", "flagged"] == 1.0
    assert not any("another" in key for key in reported)


def test_runs_of_one_pass_are_reported_together(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the help of the series says."""
    runs = [record(1), record(2, detector="another", seconds=30.0)]
    monkeypatch.setattr(catalog, "runs", lambda _: runs)
    report(*runs)
    assert reported["nsnet_published_images", "verdicts", "scored"] == 400
    assert reported["nsnet_published_images", "verdicts", "failed"] == 2
    assert reported["nsnet_published_seconds", "verdicts"] == 30.0
    assert {key[1] for key in reported if key[0] == "nsnet_flagged_share"} == {"0123456789ab", "another"}
    for one in (series.PUBLISHED_IMAGES, series.PUBLISHED_SECONDS):
        assert "of several detectors" in one.help


def test_captions_have_no_verdicts(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "runs", lambda _: pytest.fail("read"))
    report(record(1), product=CAPTIONS)
    assert {key[0] for key in reported} == {
        "nsnet_published_timestamp_seconds", "nsnet_published_seconds", "nsnet_published_images",
    }  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [StorageError("s3://bucket: denied"), ConnectionResetError("reset"), GetTimeoutError("no answer")],
    ids=lambda error: type(error).__name__,
)
def test_failure_of_store_or_cluster_only_warns(
    error: Exception, reported: Reported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str) -> list[dict[str, Any]]:
        raise error

    monkeypatch.setattr(catalog, "runs", fail)
    report(record(1))
    said = capsys.readouterr().err
    assert "warning: the metrics of the published runs are not reported (" in said and len(said.splitlines()) == 1


def test_bug_of_this_program_is_not_a_warning(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "runs", lambda _: [{}["missing"]])
    with pytest.raises(KeyError):
        report(record(1))


@pytest.mark.parametrize(
    ("address", "variable", "joined"),
    [(None, None, False), ("local", None, False), (None, "local", False), ("head:6379", None, True),
     (None, "head:6379", True), ("local", "head:6379", False)],
)  # fmt: skip
def test_night_with_nothing_to_do_joins_only_a_cluster_that_is_named(
    address: str | None, variable: str | None, joined: bool, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str | None] = []
    monkeypatch.setattr(export, "is_connected", lambda: bool(connected))
    monkeypatch.setattr(resources, "connect", lambda address, awaits_worker: connected.append(address))
    monkeypatch.setenv("RAY_ADDRESS", variable or "")
    report(record(1, rows=0, counts={}, seconds=None), address=address)
    assert bool(connected) == bool(reported) == joined
    if joined:
        assert reported["nsnet_published_images", "verdicts", "scored"] == 0
