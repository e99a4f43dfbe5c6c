"""The stage that holds a run is named from measured seconds, in the log and at the end. Cost: a tenth of a second."""

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from jobs.pipeline import actors, progress
from jobs.pipeline.bottleneck import MIN_SECONDS, WAITING, holding_stage, statement
from jobs.pipeline.metrics import Snapshot
from jobs.pipeline.rows import ProgressReporter

MODELS = {"captioning": 30.0, "scoring": 60.0}


@pytest.mark.parametrize(
    ("seconds", "holder"),
    [
        (MODELS | {"waiting": 9.0, "decoding": 500.0}, "scoring"),
        (MODELS | {"waiting": 11.0, "decoding": 50.0, "fetching": 40.0}, "decoding"),
        (MODELS | {"waiting": 11.0, "decoding": 40.0, "fetching": 50.0}, "fetching"),
        ({"captioning": 60.0, "scoring": 30.0, "waiting": 0.0}, "captioning"),
        ({"decoding": 15.0, "fetching": 6.0}, "decoding"),  # a run without a model
        ({"decoding": 6.0, "fetching": 15.0}, "fetching"),
        ({"scoring": MIN_SECONDS / 2, "waiting": MIN_SECONDS / 2 - 0.1, "decoding": 500.0}, None),
        ({"decoding": MIN_SECONDS - 0.1}, None),
        ({}, None),
    ],
)
def test_models_hold_a_run_unless_they_wait(seconds: Mapping[str, float], holder: str | None) -> None:
    assert holding_stage(seconds) == holder
    assert (statement(seconds, {}) is None) == (holder is None)


def test_statement_contains_the_shares_of_both_kinds_of_process() -> None:
    seconds, images = MODELS | {"waiting": 30.0, "decoding": 75.0, "fetching": 25.0}, {"captioning": 0, "decoding": 0}
    shares = (
        "decoding holds the run (model actors captioning 25%, scoring 50%, waiting 25%; preparing tasks decoding 75%, "
        "fetching 25%)"
    )
    assert statement(seconds, images) == shares
    images = {"scoring": 2000, "captioning": 4000, "waiting": 4000, "decoding": 0}
    assert statement(seconds, images) == f"{shares}; per image: captioning 7.5 ms, scoring 30.0 ms"


class Seconds(ProgressReporter):
    """A reporter that keeps the seconds."""

    def spend(self, images: int = 0, /, **seconds: float) -> None:
        calls.append((images, seconds))


calls: list[tuple[int, dict[str, float]]] = []


class Slow:
    """A stage that lets a clock advance by its seconds."""

    def __init__(self, name: str, seconds: float, clock: SimpleNamespace) -> None:
        self.name, self.seconds, self.clock = name, seconds, clock

    def __call__(self, table: pa.Table) -> pa.Table:
        self.clock.now += self.seconds
        return table


def test_actor_reports_the_seconds_of_its_stages_and_those_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, table = SimpleNamespace(now=100.0), pa.table({"a": [1, 2]})
    monkeypatch.setattr(actors, "time", SimpleNamespace(monotonic=lambda: clock.now))
    calls.clear()
    actor = actors.ModelActor(
        Seconds(), WAITING, lambda: Slow("captioning", 2.0, clock), lambda: Slow("scoring", 3.0, clock)
    )
    clock.now += 50.0
    actor(table)
    assert calls == []  # models load in the first call
    clock.now += 7.0
    assert actor(table) is table
    assert calls == [(2, {"captioning": 2.0, "scoring": 3.0, "waiting": 7.0})]


def test_board_counts_the_images_that_seconds_were_spent_on() -> None:
    board = progress.Board.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    board.spend({"captioning": 2.0, "waiting": 1.0}, 128)
    board.spend({"captioning": 3.0, "waiting": 0.0}, 64)
    board.spend({"decoding": 9.0})
    assert board.spent() == (
        {"captioning": 5.0, "waiting": 1.0, "decoding": 9.0}, {"captioning": 192, "waiting": 192, "decoding": 0}
    )  # fmt: skip
    assert board.snapshot().measured["captioning"] == 192


@pytest.mark.parametrize(("after", "times"), [(0.0, 2), (3600.0, 1)])
def test_progress_names_the_holder_after_the_first_results_and_at_the_end(
    after: float, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, snapshots = threading.Event(), 0

    def get(*_: Any, **__: Any) -> Snapshot:
        nonlocal snapshots
        snapshots += 1
        if snapshots == 5:
            ended.set()
        return Snapshot(
            {"scored": max(0, snapshots - 1)}, MODELS | {"waiting": 1.0}, {}, [], measured={"scoring": 2000}
        )

    monkeypatch.setattr(progress.ray, "get", get)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.001)
    monkeypatch.setattr(progress, "HOLDER_SECONDS", after)
    board = SimpleNamespace(snapshot=SimpleNamespace(remote=lambda: None))
    progress._print_loop(board, "score", 4, ("scored",), ended)
    said = capsys.readouterr().err
    assert said.count("score: scoring holds the run (model actors ") == times
    assert said.count("; per image: scoring 30.0 ms\n") == times
