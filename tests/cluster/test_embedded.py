"""An embedded cluster waits for a busy machine, and says at once what it can never start on."""

import inspect
import itertools
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.node import Node

from jobs.cluster import embedded
from nsnet.errors import StorageError


@pytest.mark.parametrize("failures", [1, 2])
def test_embedded_cluster_that_does_not_start_is_tried_once_more(
    failures: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = itertools.count(1)

    def init(**_: object) -> None:
        if next(tries) <= failures:
            raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    if failures == 1:
        embedded.start()
    else:
        with pytest.raises(
            StorageError, match=r"does not start: Exception: The current node timed out .* check the machine's load"
        ):
            embedded.start()
    assert next(tries) == 3 and capsys.readouterr().err.count("once more") == 1


def test_node_that_ended_is_not_waited_for_and_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A raylet ends if its agent takes more than 15 s for its imports: the start must not wait until its timeout."""
    import ray._private.services as services

    def absent(*_: object) -> None:
        raise RuntimeError("no such node")

    killed: list[object] = []

    class FakeNode:
        def __init__(self, code: int | None) -> None:
            process = SimpleNamespace(poll=lambda: code)
            self.all_processes = {"raylet": [SimpleNamespace(process=process)]}

        def kill_all_processes(self, *, check_alive: bool) -> None:
            killed.append(self)

    codes: list[int | None] = [-6, -6, -6, None]

    def init(**_: object) -> None:
        Node.start_raylet(FakeNode(code := codes.pop(0)))  # type: ignore[arg-type, call-arg]
        if code is not None:
            services.get_node("address", "id")

    monkeypatch.setattr(Node, "start_raylet", lambda *_: None)
    monkeypatch.setattr(services, "get_node", absent)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    embedded.start()
    assert codes == [] and len(killed) == 3 and capsys.readouterr().err.count("once more") == 3
    codes += [-6] * embedded.MAX_STARTS
    with pytest.raises(StorageError, match="its node ended while it started; its agent may have been too slow; check"):
        embedded.start()
    assert codes == []
    codes += [-6, -6]  # then another error, which is not retried
    with pytest.raises(StorageError, match="IndexError: pop from empty list"):
        embedded.start()


@pytest.mark.parametrize("own", [None, "http://head.of.another:8265"])
def test_training_on_an_embedded_cluster_asks_no_other_cluster_for_its_controller(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train removes the workers of a training whose controller is unknown to the cluster at this address."""
    variable, inherited = "RAY_API_SERVER_ADDRESS", []
    monkeypatch.delenv(variable, raising=False)
    if own is not None:
        monkeypatch.setenv(variable, own)
    monkeypatch.setattr("ray.init", lambda **_: inherited.append(os.environ[variable]))
    embedded.start()
    assert inherited == [embedded.NO_API_SERVER] and os.environ.get(variable) == own


def test_node_is_asked_for_again_until_the_start_has_taken_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.services as services

    tries = itertools.count(1)

    def absent(*_: object) -> str:
        if next(tries) < 5:
            raise RuntimeError("no such node")
        return "node"

    monkeypatch.setattr(services, "get_node", absent)
    with embedded._patience():
        assert services.get_node("address", "id") == "node"
    assert services.get_node is absent
    monkeypatch.setattr(embedded, "START_SECONDS", -1.0)
    tries = itertools.count(1)
    with pytest.raises(RuntimeError, match="no such node"), embedded._patience():
        services.get_node("address", "id")
    assert next(tries) == 2


def test_embedded_cluster_is_not_begun_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("begun"))
    with pytest.raises(StorageError, match=rf"^{re.escape(str(tmp_path))}: 1 MiB are free.*set TMPDIR"):
        embedded.start()


def test_embedded_cluster_is_not_begun_with_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (20, 20))
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("begun"))
    with pytest.raises(StorageError, match="^the limit of open files is 20, .* raise `ulimit -n`"):
        embedded.start()


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
def test_token_of_an_embedded_cluster_needs_no_home(
    mode: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("HOME", str(tmp_path))
    embedded._keep_token()
    assert "RAY_AUTH_TOKEN" not in os.environ  # Ray keeps it below HOME
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # cannot be made, whoever tries
    embedded._keep_token()
    assert len(os.environ.get("RAY_AUTH_TOKEN", "")) == (0 if mode == "disabled" else 64)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)


def test_node_starts_without_the_processes_of_other_clusters() -> None:
    """Methods of a private class: a new release of Ray may call others."""
    called = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    own = {name: getattr(Node, name) for name in embedded.HELPERS}
    with embedded._without_helpers():
        for name in embedded.HELPERS:
            assert f"self.{name}(" in called
            assert getattr(Node, name)(None, include_dashboard=False) is None
    assert {name: getattr(Node, name) for name in embedded.HELPERS} == own


@pytest.mark.parametrize(
    ("cpus", "memory", "shared", "expected"),
    [(2, 2**40, 2**40, 2**31), (16, 2**40, 2**40, 2**33), (16, 2**34, 2**40, 2**32), (64, 2**40, 2**34, 0.9 * 2**34),
     (64, 2**40, 0, 2**31)],
)  # fmt: skip
def test_object_store_grows_with_the_cpus_within_memory(
    cpus: int, memory: int, shared: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(embedded, "get_system_memory", lambda: memory)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda folder: SimpleNamespace(free=shared))
    assert embedded._object_store_bytes() == int(expected)
