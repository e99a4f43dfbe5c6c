"""TensorBoard's files hold every scalar and survive a restart; MLflow gets the epochs where it is installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from jobs.storage import filesystems
from jobs.training import tracking
from jobs.training.tracking import Records
from tests.support.events import events

SETTINGS = {"seed": 0, "source": "/pictures"}


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def begin(place: str, first_step: int = 0, mlflow_run: str | None = None) -> Records:
    return Records(f"{place}/tensorboard", first_step=first_step, settings=SETTINGS, mlflow_run=mlflow_run)


def files(place: str) -> list[bytes]:
    """Contents of the event files, oldest first by the step that their names begin with."""
    uri = f"{place}/tensorboard"
    system, path = filesystems.filesystem(uri)
    return [system.cat_file(found) for found in sorted(system.ls(path, detail=False), key=lambda name: name[-8:])]


def scalars(content: bytes) -> dict[tuple[str, int], float]:
    return {(value.tag, event.step): value.simple_value for event in events(content) for value in event.summary.value}


def test_scalars_are_written_with_their_steps(place: str) -> None:
    writer = begin(place)
    writer.step(1, {"loss": 2.5, "bce": 0.5})
    writer.step(2, {"loss": 1.5})
    writer.epoch(2, {"val_ap": 0.75})
    writer.close()
    (content,) = files(place)
    assert scalars(content) == {("loss", 1): 2.5, ("bce", 1): 0.5, ("loss", 2): 1.5, ("val_ap", 2): 0.75}
    assert next(iter(events(content))).file_version == "brain.Event:2"


def test_everything_before_a_flush_is_in_storage_though_the_process_dies(place: str) -> None:
    writer = begin(place)
    writer.step(1, {"loss": 2.5})
    writer.flush()
    writer.step(2, {"loss": 1.5})
    (content,) = files(place)
    assert scalars(content) == {("loss", 1): 2.5}
    writer.close()


def test_restart_writes_a_file_of_its_own_that_has_later_steps_dropped(place: str) -> None:
    first = begin(place)
    for step in (1, 2, 3):
        first.step(step, {"loss": float(step)})
    first.flush()  # then it dies; the last checkpoint was of step 1
    second = begin(place, first_step=1)
    second.step(2, {"loss": 20.0})
    second.close()
    before, after = files(place)
    assert scalars(before)[("loss", 3)] == 3.0 and scalars(after) == {("loss", 2): 20.0}
    starts = [event for event in events(after) if event.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [2]
    first.close()


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = begin(str(tmp_path))
    writer.step(1, {"loss": 2.5})
    writer.close()
    found = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.5)]


def test_training_goes_on_where_records_cannot_be_stored(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    writer = begin(str(tmp_path))
    writer.step(1, {"loss": 2.5})
    writer.close()
    assert "was not copied" in "".join(logged)


def test_mlflow_is_used_where_it_has_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not tracking._mlflow_wanted()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
    assert tracking._mlflow_wanted()
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    writer = begin(str(tmp_path))
    assert writer.mlflow_run is None
    writer.close()


class Server:
    """An MLflow client that records its calls, and can fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        def call(*values: Any, **named: Any) -> None:
            if self.fails:
                raise ConnectionError("the server is away")
            self.calls.append((name, *values, *named.values()))

        return call


def test_server_that_goes_away_is_warned_of(logged: list[str]) -> None:
    server = Server()
    mlflow = tracking._Mlflow(server, "run")
    mlflow.log({"val_ap": 0.5}, 10)
    assert server.calls == [("log_metric", "run", "val_ap", 0.5, 10)]
    server.fails = True
    mlflow.log({"val_ap": 0.5}, 20)
    mlflow.end()
    assert "did not store step 20" in "".join(logged) and "not ended" in "".join(logged)


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow's client on a store in a folder, where MLflow is installed."""
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    yield MlflowClient()


def test_mlflow_run_is_continued_after_a_restart(mlflow: Any, tmp_path: Path) -> None:
    first = begin(str(tmp_path))
    first.epoch(10, {"val_ap": 0.5})
    first.flush()
    second = begin(str(tmp_path), first_step=10, mlflow_run=first.mlflow_run)
    second.epoch(20, {"val_ap": 0.75})
    second.close()
    assert first.mlflow_run is not None and second.mlflow_run == first.mlflow_run
    run = mlflow.get_run(first.mlflow_run)
    assert run.data.params == {"seed": "0", "source": "/pictures"} and run.info.status == "FINISHED"
    history = mlflow.get_metric_history(first.mlflow_run, "val_ap")
    assert [(value.step, value.value) for value in history] == [(10, 0.5), (20, 0.75)]
    first.close()
