"""Start a Ray cluster on this machine for a command without a cluster address."""

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
from ray._common.utils import get_system_memory
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from jobs.console.output import say, waiting
from jobs.storage import errors
from nsnet.errors import StorageError

OBJECT_STORE_BYTES: Final = 2 * 2**30
"""Smallest object store of an embedded cluster: images stream through it and do not accumulate."""
STORE_BYTES_PER_CPU: Final = 2**29
"""Ray Data starts no further decoding task if its blocks would not fit."""

NODE_ENVIRONMENT: Final = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""Variables for starting Ray's nodes. By default a node with more workers than CPUs ends those idle for one second. But
decoding sometimes waits for the models, and each new worker spends seconds on imports: on two cores this cost nearly
half of the throughput."""
AUTOSCALER: Final = {"RAY_DATA_CLUSTER_AUTOSCALER": "V2"}
"""Ray Data's default autoscaler reserves what the stages request and whole CPUs of the rest. Stages request fractions:
on two cores 1.125 CPUs were left for use, one decoding task ran instead of two, and an eighth of the CPU time was idle.
V2, the older one, reserves all CPUs. On shared clusters it would starve the next job, so they keep the default."""
NO_METRICS: Final = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
"""An embedded cluster has no dashboard: nobody reads what its processes would measure and send each second."""
START_SECONDS: Final = 240.0
"""Timeout for starting an embedded cluster, and for the first worker of any cluster: the machine may be busy."""
START_ENVIRONMENT: Final = {
    "RAY_gcs_server_port_wait_time_s": "60",
    "RAY_agent_register_timeout_ms": f"{1000 * START_SECONDS:.0f}",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
}
"""Ray's timeouts for starting the parts of an embedded cluster; its defaults are 10 to 60 s."""
MAX_STARTS: Final = 5
NO_API_SERVER: Final = "http://127.0.0.1:1"
"""An address that refuses connections. Ray Train asks the API server whether its own controller is alive, but an
embedded cluster has no API server. Without an address the search takes 40 s, and each training ends 12 s later. If the
variable names another cluster, that one does not know the controller, and Ray Train removes the training's workers."""
SHARED_MEMORY: Final = "/dev/shm"
HELPERS: Final = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's `Node`."""
MIN_OPEN_FILES: Final = 512
MIN_TEMPORARY_BYTES: Final = 64 * 2**20
"""Minimum free space for the sockets and logs of an embedded cluster."""


def start(**settings: Any) -> None:
    """Start an embedded cluster, waiting up to `START_SECONDS`. An earlier failure is retried once, and `MAX_STARTS`
    starts are made if the node ended meanwhile, as it does if its agent is too slow.
    """
    _check_machine()
    for name, value in {**NODE_ENVIRONMENT, **AUTOSCALER, **NO_METRICS, **START_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    _keep_token()
    started = time.monotonic()
    with waiting("the embedded Ray cluster to start"), _patience() as nodes, _without_api_server(), _without_helpers():
        for number in range(1, MAX_STARTS + 1):
            try:
                ray.init(address="local", object_store_memory=_object_store_bytes(), **settings)
                return
            except Exception as error:  # Ray has no error class for a failed start
                ray.shutdown()
                while nodes:  # Ray leaves the processes of a node that did not start
                    nodes.pop().kill_all_processes(check_alive=False)
                is_last = number >= (MAX_STARTS if isinstance(error, _NodeEndedError) else 2)
                if is_last or time.monotonic() - started > START_SECONDS:
                    raise StorageError(
                        f"an embedded Ray cluster does not start: {errors.explain(error) or errors.reason(error)}; "
                        "check the machine's load and free memory"
                    ) from error
                say("the embedded Ray cluster did not start: trying once more")


def is_running() -> bool:
    """Whether this process is connected to a cluster that it started itself."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _object_store_bytes() -> int:
    """Bytes for all CPUs, within a quarter of the memory of the machine or the container, and within shared memory:
    beyond that Ray would use a disk.
    """
    shared = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    most = min(int(get_system_memory()) // 4, shared * 9 // 10)
    return max(OBJECT_STORE_BYTES, min((os.cpu_count() or 1) * STORE_BYTES_PER_CPU, most))


class _NodeEndedError(Exception):
    """The node ended while it started."""


@contextmanager
def _patience() -> Iterator[list[Node]]:
    """Make Ray wait up to `START_SECONDS` for its node, as long as that runs: it gives up after 30 s, whatever its
    settings. Yields the nodes that were started.

    `RAY_raylet_start_wait_time_s` is no alternative: during that wait Ray handles neither Ctrl-C nor SIGTERM. A node
    ends if its agent needs more than 15 s for its imports, and Ray would wait for it nevertheless.
    """
    get_node, start_raylet, deadline = services.get_node, Node.start_raylet, time.monotonic() + START_SECONDS
    nodes: list[Node] = []

    def start_noted_raylet(node: Node, *arguments: Any, **options: Any) -> None:
        nodes.append(node)
        start_raylet(node, *arguments, **options)

    def get_node_with_retries(*arguments: Any) -> Any:
        while True:
            try:
                return get_node(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError as error:  # the node is not registered after Ray's own wait of up to 30 s
                if nodes and not _is_alive(nodes[-1]):
                    raise _NodeEndedError(
                        "its node ended while it started; its agent may have been too slow"
                    ) from error
                if time.monotonic() > deadline:
                    raise

    services.get_node = get_node_with_retries
    setattr(Node, "start_raylet", start_noted_raylet)  # noqa: B010, as an assignment mypy refuses it
    try:
        yield nodes
    finally:
        services.get_node = get_node
        setattr(Node, "start_raylet", start_raylet)  # noqa: B010


def _is_alive(node: Node) -> bool:
    return all(info.process.poll() is None for info in node.all_processes.get(PROCESS_TYPE_RAYLET, ()))


@contextmanager
def _without_api_server() -> Iterator[None]:
    """Start the processes of a cluster with the address `NO_API_SERVER`; then restore the variable of this process."""
    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    os.environ[variable] = NO_API_SERVER
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Start a node without the processes that only other clusters need: the autoscaler's monitor, the monitor of log
    files and the API server. They took 3.5 of 11.5 s of CPU at the start, and 2.5 % of a core afterwards.
    """
    helpers = {name: getattr(Node, name) for name in HELPERS}
    for name in HELPERS:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start_helper in helpers.items():
            setattr(Node, name, start_helper)


def _check_machine() -> None:
    """Raise `StorageError` if Ray's processes would exit silently for lack of open files or disk space."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < MIN_OPEN_FILES:
        raise StorageError(
            f"the limit of open files is {allowed}, a Ray cluster needs {MIN_OPEN_FILES}: raise `ulimit -n`, for "
            "example to 65536"
        )
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # in Ray's order
    if (free := shutil.disk_usage(folder).free) < MIN_TEMPORARY_BYTES:
        raise StorageError(
            f"{folder}: {free / 2**20:.0f} MiB are free, Ray's own files need {MIN_TEMPORARY_BYTES / 2**20:.0f}: free "
            "some space, or set TMPDIR to another folder"
        )


def _keep_token() -> None:
    """Put an embedded cluster's token into the environment if HOME, where Ray stores it, is not writable."""
    token_variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(
        name in os.environ for name in token_variables
    ):
        return
    folder = os.path.join(os.path.expanduser("~"), ".ray")
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.path.isfile(os.path.join(folder, "auth_token")) and not os.access(folder, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
