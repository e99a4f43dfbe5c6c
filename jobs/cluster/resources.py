"""Connect to a Ray cluster, and look up its size and the shares of its stages."""

import logging
import os
import signal
from typing import Any, Final

import ray
import ray._private.ray_constants as constants
import ray.data
import ray.data._internal.execution.streaming_executor_state as streaming_executor_state
from ray._private.state import state
from ray.data._internal.execution.backpressure_policy import DownstreamCapacityBackpressurePolicy
from ray.data.checkpoint import CheckpointConfig

from jobs.cluster import embedded
from jobs.cluster.address import check_address
from jobs.cluster.shares import BLOCK_BYTES, NodeShape, Shares, places, shares
from jobs.console.output import format_logs, native_lines, say, waiting
from jobs.storage import errors, filesystems
from jobs.storage.redaction import guard_logs
from nsnet.errors import StorageError

SCHEDULING_SECONDS: Final = 0.3
"""Interval of Ray Data's scheduling on a machine without a GPU. Its own is 0.1 s; a round takes the driver 10 ms."""
BLOCKS_WAITING: Final = 1.0
"""Decoded blocks that may wait for the models, as a multiple of those that were sent to them, on a machine without a
GPU. There decoding ahead takes CPU time from the models: with Ray Data's own limits, two cores decoded a thousand
images before the models were loaded, and the first verdict came 3.6 s later."""
WORKER_CPUS: Final = 0.001
"""CPUs of the task that tests whether workers start: above 0, so that a head without CPUs does not run it."""
GROWTH: Final = 4
"""How much a cluster without an autoscaler may grow while a run lasts, as a multiple of its size."""
MAX_GROWTH: Final = 100
"""The same of a cluster whose autoscaler has no limit."""
UV_HOOK: Final = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


def streaming_bytes() -> int:
    """Bytes of the cluster's object store available for training images."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(0.25 * available.get("object_store_memory", embedded.OBJECT_STORE_BYTES))


def connect(address: str | None = None, *, awaits_worker: bool = True) -> None:
    """Connect to the given cluster, the one this process runs in (`RAY_ADDRESS`), or an embedded one.

    Raises `StorageError` if it does not answer or start, or if it starts no worker, which only `awaits_worker` finds.
    """
    if ray.is_initialized():
        return
    check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Seconds until the resources that a killed driver requested become available to its successor; Ray's default: 180.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    # Ray's C++ code prints advice about its own actors as errors; relevant failures reach Python.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _disable_uv_hook()
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        settings.pop("include_dashboard")
        try:
            with waiting(f"the Ray cluster {address}"), native_lines("ray"):
                ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise StorageError(f"the Ray cluster {address} cannot be reached: {errors.reason(error)}") from error
    else:
        with native_lines("ray"):
            embedded.start(**settings)
        _leave_cpus_to_models()
    if callable(sigterm_handler):  # Ray replaces the command's handler
        signal.signal(signal.SIGTERM, sigterm_handler)
    configure_data()
    guard_logs("ray", "ray.data", "ray.train")
    format_logs("ray", "ray.data", "ray.train")
    if awaits_worker:
        _await_worker()
        cpus, gpus = _size()
        say(f"cluster: {cpus:g} CPUs, {gpus:g} GPUs", cpus=cpus, gpus=gpus)


def _disable_uv_hook() -> None:
    """Stop Ray from starting each worker by `uv run`, which rebuilds the environment: that takes minutes or hangs.

    The constant is set too, because Ray reads the variable at import, which may have happened before.
    """
    if UV_HOOK in os.environ:
        return

    os.environ[UV_HOOK] = "0"
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`
        say(f"uv run: workers use this environment unchanged; with {UV_HOOK}=1 Ray rebuilds it for each worker")


def _leave_cpus_to_models() -> None:
    """If models compute on this machine's CPUs, let Ray Data schedule less often and decode fewer blocks ahead. A GPU
    would wait.
    """
    if not _size()[1]:
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = SCHEDULING_SECONDS
        ray.data.DataContext.get_current().downstream_capacity_backpressure_ratio = BLOCKS_WAITING
        DownstreamCapacityBackpressurePolicy.OBJECT_STORE_BUDGET_UTIL_THRESHOLD = 0.0  # even if memory is left


def _await_worker() -> None:
    """Wait until the cluster runs a first task; later tasks reuse its process. Raises `StorageError`."""
    first = ray.remote(num_cpus=WORKER_CPUS, max_retries=0)(_started).remote()
    try:
        with waiting("a first worker of the cluster"):
            ready, _ = ray.wait([first], timeout=embedded.START_SECONDS)
        if ready:
            ray.get(first)
            return
        ray.cancel(first)
        problem = f"none within {embedded.START_SECONDS:g} s"
    except ray.exceptions.RayError as error:
        problem = errors.reason(errors.root_cause(error))
    raise StorageError(
        f"the cluster starts no worker: {problem}. Other work may hold all its CPUs (`ray status`), or its "
        "processes fail to start: see /tmp/ray/session_latest/logs/raylet.out"
    )


def _started() -> bool:
    return True


def configure_data() -> None:
    """Configure Ray Data: no progress bars, errors unchanged from the stages, the older Parquet reader.

    The newer reader starts 32 actors to read the footers of the manifest's files: 32 s on two cores.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.raise_original_map_exception = True  # else `UserCodeException` replaces it, without a cause
    if hasattr(context, "use_datasource_v2"):
        context.use_datasource_v2 = False
    context.issue_detectors_config.detectors = []  # advice on memory requests, every 30 s
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).addFilter(_only_to_file)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # reports that its progress bars are off


def _only_to_file(record: logging.LogRecord) -> bool:
    """Hide Ray Data's errors on the console, where `main.run` prints them; its log file keeps them all."""
    record.hide = record.levelno >= logging.ERROR
    return True


def job_checkpoint(uri: str) -> "CheckpointConfig":
    """Checkpoint folder where a dataset records written rows, so that its next run skips them."""
    system, path = filesystems.arrow_filesystem(uri)
    return CheckpointConfig(
        id_column="image_id", checkpoint_path=path, override_filesystem=system, delete_checkpoint_on_success=False
    )


def cluster_shares() -> Shares:
    """Shares of the cluster that this process is connected to."""
    return shares(nodes())


def nodes() -> list[NodeShape]:
    """Living nodes of the cluster that this process is connected to."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    sizes = [node["Resources"] for node in found if node["Alive"]]
    return [NodeShape(cpus=size.get("CPU", 0.0), gpus=size.get("GPU", 0.0)) for size in sizes]


def most_places(now: Shares) -> int:
    """Number of model actors that the cluster may get places for while a run lasts.

    The autoscaler says how large it may make the cluster; without one, it is assumed to grow to `GROWTH` times its
    size: Ray Data reserves CPUs for all actors that a pool may have. An embedded cluster does not grow.
    """
    if embedded.is_running():
        return now.actors
    largest: dict[str, int] | None = state.get_max_resources_from_cluster_config()
    if not largest:
        return GROWTH * now.actors
    size = NodeShape(cpus=largest.get("CPU", 0), gpus=largest.get("GPU", 0))
    most = places([size], on_gpus=now.actor_gpus > 0, actor_cpus=now.actor_cpus)
    return max(now.actors, min(most, MAX_GROWTH * now.actors))


def _size() -> tuple[float, float]:
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return available.get("CPU", 0.0), available.get("GPU", 0.0)
