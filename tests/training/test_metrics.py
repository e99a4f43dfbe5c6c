"""The first training process reports its losses and where its time goes; the others report nothing."""

from collections import Counter
from types import SimpleNamespace

import pytest

from jobs.training import metrics
from jobs.training.metrics import COMPUTING, WAITING, TrainingMetrics


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """Series and labels -> value, of all that a board got."""
    values: dict[tuple[str, ...], float] = Counter()  # type: ignore[assignment]

    def measure(added: dict[tuple[str, ...], float], put: dict[tuple[str, ...], float]) -> None:
        for key, value in added.items():
            values[key] += value
        values.update(put)

    board = SimpleNamespace(measure=SimpleNamespace(remote=measure))
    monkeypatch.setattr(metrics.ray, "get_actor", {"board": board}.__getitem__)
    monkeypatch.setattr(metrics.ray, "get", lambda *_, **__: None)
    return values


def test_time_is_split_into_waiting_and_computing(
    reported: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(metrics, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))

    def arrivals() -> object:
        for item in range(3):
            clock[0] += 2.0
            yield item

    own = TrainingMetrics("board")
    for _ in own.waited_for(arrivals()):  # type: ignore[arg-type, attr-defined]
        with own.spent(COMPUTING):
            clock[0] += 5.0
    own.flush(wait=True)
    assert reported["nsnet_training_seconds_total", WAITING] == 6.0
    assert reported["nsnet_training_seconds_total", COMPUTING] == 15.0


def test_step_reports_each_term_and_the_energy(reported: dict[tuple[str, ...], float]) -> None:
    TrainingMetrics("board").step(8, {"loss": 2.0, "bce": 0.5, "residual_energy": 0.75})
    TrainingMetrics("board").epoch(2, 0.9)
    assert reported == {
        ("nsnet_training_images_total",): 8, ("nsnet_training_loss", "loss"): 2.0, ("nsnet_training_loss", "bce"): 0.5,
        ("nsnet_training_residual_energy",): 0.75, ("nsnet_training_epoch",): 2,
        ("nsnet_training_validation_ap",): 0.9,
    }  # fmt: skip


def test_board_that_has_gone_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"there is no actor {name}")

    monkeypatch.setattr(metrics.ray, "get_actor", refuse)
    TrainingMetrics("board").epoch(1, 0.5)


def test_other_processes_and_undefined_values_report_nothing(reported: dict[tuple[str, ...], float]) -> None:
    own = TrainingMetrics(None)
    own.step(8, {"loss": 2.0})
    own.epoch(1, 0.5)
    with own.spent(COMPUTING):
        pass
    assert list(own.waited_for([1, 2])) == [1, 2] and reported == {}
    own.flush(wait=True)
    assert reported == {}
    TrainingMetrics("board").epoch(1, None)
    assert reported == {("nsnet_training_epoch",): 1}
