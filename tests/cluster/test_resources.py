"""Connecting to a cluster: what it waits for, what it says, and what it leaves as it was."""

import inspect
import logging
import re
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import DataContext
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.logging import HiddenRecordFilter
from ray.exceptions import RuntimeEnvSetupError

from jobs.cluster import embedded, resources
from jobs.cluster.shares import NodeShape, shares
from jobs.console import output
from nsnet.errors import StorageError
from tests.support.tables import unmarked


def test_wait_is_said_with_the_load_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "WAITING_SECONDS", 0.01)
    with output.waiting("a cluster"):
        time.sleep(0.1)
    lines = unmarked(capsys.readouterr().err).splitlines()
    assert len(lines) >= 2
    assert all(re.fullmatch(r"waiting for a cluster: \d+ s so far, load \d+ on \d+ cores", line) for line in lines)


@pytest.mark.parametrize("asked", [None, "1"])
def test_uv_makes_no_environments_for_workers_unless_asked(
    asked: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray._private.worker as worker
    from ray._private import ray_constants
    from ray._private.runtime_env import uv_runtime_env_hook

    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "nsnet"])
    monkeypatch.setattr(uv_runtime_env_hook, "hook", lambda _: {"py_executable": "uv run python"})
    monkeypatch.setenv(resources.UV_HOOK, asked or "")
    if asked is None:
        monkeypatch.delenv(resources.UV_HOOK)
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    resources._disable_uv_hook()
    assert worker._maybe_modify_runtime_env({}, False) == ({"py_executable": "uv run python"} if asked else {})
    assert ("uv run: workers use this environment unchanged" in capsys.readouterr().err) == (asked is None)


class StubbornRay:
    """Stands in for Ray: tasks never start, or fail."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def remote(self, **_: object) -> Any:
        return lambda function: SimpleNamespace(remote=lambda: "first")

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return (references, []) if self.error else ([], references)

    def get(self, _: str) -> None:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "none within 240 s"), (RuntimeEnvSetupError("uv: no such file"), "RuntimeEnvSetupError: .*no such file")],
)
def test_cluster_that_starts_no_worker_is_given_up(
    error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = StubbornRay(error)
    for name in ("remote", "wait", "get"):
        monkeypatch.setattr(f"ray.{name}", getattr(stubborn, name))
    monkeypatch.setattr("ray.cancel", lambda _: None)
    with pytest.raises(
        StorageError, match=f"^the cluster starts no worker: {reason}.*may hold all its CPUs.*raylet.out"
    ):
        resources._await_worker()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data warns of settings of its own
@pytest.mark.parametrize("module", ["ray.data.exceptions", streaming_executor_state.__name__])
def test_error_of_ray_data_is_kept_off_the_console(module: str) -> None:
    resources.configure_data()
    resources.configure_data()  # for each dataset's settings
    record = logging.makeLogRecord({"levelno": logging.ERROR, "msg": "Full stack trace:"})
    assert logging.getLogger(module).filter(record)
    assert not HiddenRecordFilter().filter(record)  # which Ray Data's console has, and its log file has not


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_ray_data_leaves_cpus_to_models_without_gpus(gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes of private modules: a new release of Ray may read others."""
    policy, name = resources.DownstreamCapacityBackpressurePolicy, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"
    assert f"timeout={name}" in inspect.getsource(streaming_executor_state.process_completed_tasks)
    assert "<= self.OBJECT_STORE_BUDGET_UTIL_THRESHOLD" in inspect.getsource(policy)
    context = DataContext.get_current().copy()
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    monkeypatch.setattr(resources, "_size", lambda: (2.0, gpus))
    monkeypatch.setattr(streaming_executor_state, name, 0.1)
    monkeypatch.setattr(policy, "OBJECT_STORE_BUDGET_UTIL_THRESHOLD", 0.5)
    resources._leave_cpus_to_models()
    changed = (
        getattr(streaming_executor_state, name),
        policy.OBJECT_STORE_BUDGET_UTIL_THRESHOLD,
        context.downstream_capacity_backpressure_ratio,
    )
    assert changed == ((0.1, 0.5, 2.0) if gpus else (resources.SCHEDULING_SECONDS, 0.0, resources.BLOCKS_WAITING))


def test_handler_of_sigterm_is_the_commands_own_again_after_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does

    monkeypatch.setattr(resources.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(resources, "check_address", lambda address: None)
    monkeypatch.setattr(embedded, "start", start)
    for name in ("configure_data", "guard_logs", "_await_worker", "_disable_uv_hook", "_leave_cpus_to_models"):
        monkeypatch.setattr(resources, name, lambda *_: None)
    monkeypatch.setattr(resources, "_size", lambda: (2.0, 0.0))
    before = signal.getsignal(signal.SIGTERM)

    def own(*_: object) -> None:
        pass

    try:
        signal.signal(signal.SIGTERM, own)
        resources.connect("local")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("embedded_cluster", "largest", "most"),
    [
        (True, None, 4),
        (False, None, 4 * resources.GROWTH),
        (False, {"CPU": 64, "GPU": 8, "memory": 1}, 16),
        (False, {"CPU": 64, "GPU": 1}, 4),  # nodes were added by hand
        (False, {"CPU": sys.maxsize, "GPU": sys.maxsize}, 4 * resources.MAX_GROWTH),
    ],
    ids=["embedded", "no autoscaler", "autoscaler", "autoscaler of a smaller cluster", "no limit"],
)
def test_cluster_may_grow_as_far_as_its_autoscaler_says(
    embedded_cluster: bool, largest: dict[str, int] | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "is_running", lambda: embedded_cluster)
    monkeypatch.setattr(resources.state, "get_max_resources_from_cluster_config", lambda: largest)
    assert resources.most_places(shares([NodeShape(cpus=8, gpus=2)])) == most


def test_nodes_that_have_ended_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "node:__internal_head__": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
        {"Alive": True, "Resources": {"memory": 1.0}},
    ]
    monkeypatch.setattr(resources.ray, "nodes", lambda: found)
    assert resources.nodes() == [NodeShape(cpus=4.0, gpus=1.0), NodeShape(cpus=0.0)]
