"""A Ray cluster on this machine alone, for a command that was given no other."""

import os
import resource
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray
import ray._private.services as services

from jobs.console.output import say, waiting
from jobs.storage import errors
from nsnet.errors import StorageError

OBJECT_STORE_BYTES: Final = 2 * 2**30
"""Object store of an embedded cluster: images stream through it, they do not collect there."""

NODE_ENVIRONMENT: Final = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""Variables that Ray's nodes should be started with. A node ends workers that idle for a second where it has more of
them than CPUs; but decoding waits for the models now and then, and every new worker imports for seconds: on two cores,
nearly half of the throughput."""
START_SECONDS: Final = 240.0
"""Longest wait for an embedded cluster, and for the first worker of any: a machine may be busy with other things."""
START_ENVIRONMENT: Final = {
    "RAY_gcs_server_port_wait_time_s": "60",
    "RAY_agent_register_timeout_ms": f"{1000 * START_SECONDS:.0f}",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
}
"""Ray's own limits for the start of an embedded cluster's parts, which are 10 to 60 s."""
MIN_OPEN_FILES: Final = 512
MIN_TEMPORARY_BYTES: Final = 64 * 2**20
"""Least room for the sockets and logs of an embedded cluster."""


def start(**settings: Any) -> None:
    """An embedded cluster. A busy machine is waited for; a start that fails sooner is tried once more."""

    _check_machine()
    for name, value in {**NODE_ENVIRONMENT, **START_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    _keep_token()
    started = time.monotonic()
    with waiting("the embedded Ray cluster to start"), _patience():
        for last in (False, True):
            try:
                ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, **settings)
                return
            except Exception as error:  # Ray has no class for it
                ray.shutdown()
                if last or time.monotonic() - started > START_SECONDS:
                    raise StorageError(
                        f"an embedded Ray cluster does not start: {errors.explain(error) or errors.reason(error)}; is "
                        "the machine busy or its memory full?"
                    ) from error
                say("the embedded Ray cluster did not start: once more")


@contextmanager
def _patience() -> Iterator[None]:
    """Let Ray ask for its node for `START_SECONDS`: it gives up after 30, whatever it was set to.

    Not its `RAY_raylet_start_wait_time_s`, within which no Ctrl-C and no SIGTERM comes through.
    """

    ask, deadline = services.get_node, time.monotonic() + START_SECONDS

    def ask_again(*arguments: Any) -> Any:
        while True:
            try:
                return ask(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError:  # the node is not there after 10 s
                if time.monotonic() > deadline:
                    raise

    services.get_node = ask_again
    try:
        yield
    finally:
        services.get_node = ask


def _check_machine() -> None:
    """Ray's processes die without a word where they cannot open or write their files."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < MIN_OPEN_FILES:
        raise StorageError(
            f"{allowed} open files are allowed, a Ray cluster needs {MIN_OPEN_FILES}: raise `ulimit -n`, to 65536 for "
            "instance"
        )
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray looks for it
    if (free := shutil.disk_usage(folder).free) < MIN_TEMPORARY_BYTES:
        raise StorageError(
            f"{folder}: {free / 2**20:.0f} MiB are free, Ray's own files need {MIN_TEMPORARY_BYTES / 2**20:.0f}: make "
            "room, or set TMPDIR to another folder"
        )


def _keep_token() -> None:
    """Ray keeps the token of an embedded cluster below HOME; where that cannot be written, the environment holds it."""
    known = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(name in os.environ for name in known):
        return
    folder = os.path.join(os.path.expanduser("~"), ".ray")
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.path.isfile(os.path.join(folder, "auth_token")) and not os.access(folder, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
