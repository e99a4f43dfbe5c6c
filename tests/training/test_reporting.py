"""The first training process sends each completed epoch to the console; a warning is a message of its own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.console import output
from jobs.training import reporting
from jobs.training.config import WorkerConfig
from jobs.training.reporting import Reporter

EPOCH = {
    "epoch": 1, "loss": 2.0, "contrastive": 1.0, "bce": 0.5, "alignment": 0.5, "residual_energy": 0.5, "failed": 0,
    "val_ap": None, "val_bce": None,
}  # fmt: skip


@pytest.mark.parametrize(("energy", "levels"), [(0.5, ["info"]), (0.01, ["info", "warning"])])
def test_warning_of_a_collapsed_projection_has_its_own_level(
    energy: float,
    levels: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    board = SimpleNamespace(log=SimpleNamespace(remote=lines.append))
    monkeypatch.setattr(reporting.ray, "get_actor", {"board": board}.__getitem__)
    monkeypatch.setattr(reporting.ray, "get", lambda *_, **__: None)
    records = SimpleNamespace(mlflow_run=None, epoch=lambda *_: None)
    monkeypatch.setattr(reporting, "Records", lambda *_, **__: records)
    config = SimpleNamespace(board="board", source="s", seed=0, training={}, detector={}, work=str(tmp_path))
    reporter = Reporter(
        cast(WorkerConfig, config), cast(Any, SimpleNamespace(step=1, mlflow_run=None)), epochs=3, active=True
    )
    reporter.epoch(EPOCH | {"residual_energy": energy})
    monkeypatch.setattr(output, "_format", "json")
    for line in lines:
        output.say(line)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["level"] for event in events] == levels
    assert events[0]["message"].startswith("train: epoch 1/3, loss 2.0000")
