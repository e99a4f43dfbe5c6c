"""Shares of a cluster: no stage may wait for ever, whatever the cluster, and nobody may sit idle."""

import itertools
import logging
import re
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.logging import HiddenRecordFilter
from ray.exceptions import RuntimeEnvSetupError

from jobs.cluster import embedded, resources
from jobs.cluster.resources import shares
from jobs.console import output
from nsnet.errors import StorageError
from tests.support.tables import unmarked

CPUS = [0.5, 1, 1.5, 2, 2.5, 3, *range(4, 33), 47.5, 48, 63, 64, 96, 128]
GPUS = [0, 0.5, 1, 2, 3, 4, 7, 8]
PRECISION = 1e-4
"""Ray counts resources in steps of this size."""


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("cpus", CPUS)
def test_every_stage_finds_room_beside_all_actors(cpus: float, gpus: float) -> None:
    it = shares(cpus, gpus)
    held = (it.captioners + it.scorers) * it.actor_cpus
    assert held + it.task_cpus + it.light_task_cpus <= cpus
    assert held <= cpus / 4 + 1e-9
    assert min(it.actor_cpus, it.task_cpus, it.light_task_cpus) >= PRECISION
    assert it.captioners >= 1 and it.scorers >= 1 and it.threads >= 1
    assert it.cpus == cpus
    assert (it.captioners + it.scorers) * it.actor_gpus <= gpus
    assert (it.actor_gpus > 0) == (gpus >= 1)


def test_tasks_and_actors_fit_on_a_node_of_one_cpu() -> None:
    for cpus, gpus in itertools.product(CPUS, GPUS):
        it = shares(cpus, gpus)
        assert max(it.actor_cpus, it.task_cpus, it.light_task_cpus) <= 1.0 and it.actor_gpus <= 1.0


def test_two_cores_decode_two_images_at_a_time() -> None:
    it = shares(2, 0)
    assert (2 - (it.captioners + it.scorers) * it.actor_cpus - it.light_task_cpus) // it.task_cpus == 2
    assert it.threads == 1


def test_every_gpu_has_a_captioner_and_a_scorer() -> None:
    for gpus in (1, 2, 8):
        it = shares(64, gpus)
        assert (it.captioners, it.scorers, it.actor_gpus) == (gpus, gpus, 0.5)


def test_more_cpus_never_mean_smaller_shares_or_fewer_actors() -> None:
    for gpus in GPUS:
        made = [shares(cpus, gpus) for cpus in CPUS]
        for smaller, larger in itertools.pairwise(made):
            assert larger.captioners >= smaller.captioners and larger.task_cpus >= smaller.task_cpus


@pytest.mark.parametrize("gpus", [0, 4])
def test_cluster_without_cpus_is_refused(gpus: float) -> None:
    with pytest.raises(StorageError, match="no CPU for decoding: add CPU workers"):
        shares(0, gpus)


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


def test_handler_of_sigterm_is_the_commands_own_again_after_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does

    monkeypatch.setattr(resources.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(resources, "check_address", lambda address: None)
    monkeypatch.setattr(embedded, "start", start)
    for name in ("configure_data", "guard_logs", "_await_worker", "_disable_uv_hook"):
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
