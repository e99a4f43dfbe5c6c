"""What ends a stream is said in one line that names the place and the reason, not in Ray's two hundred."""

import errno
import os

import pytest
import ray
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayTaskError, WorkerCrashedError

from jobs.pipeline.stream import _stream_error
from nsnet.errors import OutageError, StorageError


def carried(cause: Exception) -> Exception:
    """The error as Ray raises it in the driver: an instance of both classes, with the task's traceback as its text."""
    error = RayTaskError("Write", "ray::Write()\n" + "  File x, line 1\n" * 200, cause, "ray::Write", 1, "127.0.0.1")
    raised: Exception = error.as_instanceof_cause()
    assert len(str(raised)) > 3000
    return raised


@pytest.fixture(autouse=True)
def known_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EMFILE])
def test_disk_that_fails_a_task_is_named_by_its_reason(code: int) -> None:
    error = _stream_error(carried(OSError(code, os.strerror(code))), "/out/staging/rows")
    assert type(error) is StorageError
    assert str(error).startswith(f"writing below /out/staging/rows: OSError: {os.strerror(code)}; ")
    named = _stream_error(carried(OSError(code, os.strerror(code), "/tmp/x")), "/out/staging/rows")
    assert str(named).startswith(f"/tmp/x: {os.strerror(code)}; ")


def test_error_on_purpose_keeps_class_and_words() -> None:
    error = _stream_error(carried(OutageError("the store is away")), "/out")
    assert type(error) is OutageError and str(error) == "the store is away"


def test_memory_of_a_task_is_reported_and_its_secrets_are_hidden() -> None:
    assert "out of memory" in str(_stream_error(carried(MemoryError("x")), "/out"))
    assert "s3cret" not in str(_stream_error(carried(ConnectionError("http://me:s3cret@store")), "/out"))


@pytest.mark.parametrize("error", [WorkerCrashedError(), ExecutionTimeoutError("no progress for 1800 s")])
def test_cluster_that_fails_is_said(error: Exception) -> None:
    raised = _stream_error(error, "/out")
    assert type(raised) is StorageError and str(raised).startswith(f"the cluster failed: {type(error).__name__}: ")


def test_bug_of_a_stage_stays_what_it_is() -> None:
    error = carried(KeyError("uri"))
    assert _stream_error(error, "/out") is error


def test_mark_of_ray_data_is_no_cause() -> None:
    error = WorkerCrashedError()
    error.__cause__ = SystemException()
    assert str(_stream_error(error, "/out")).startswith("the cluster failed: WorkerCrashedError: ")
