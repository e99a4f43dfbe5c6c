"""Connect to a Ray cluster, and compute the share of it that each stage takes."""

import logging
import os
import signal
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray._private.ray_constants as constants
import ray.data
from ray.data.checkpoint import CheckpointConfig

from jobs.cluster import embedded
from jobs.cluster.address import check_address
from jobs.console.output import say, waiting
from jobs.storage import errors, filesystems
from jobs.storage.redaction import guard_logs
from nsnet.errors import StorageError

BLOCK_BYTES: Final = 16 * 2**20
"""Largest block between stages: about 32 images with BLIP's thumbnails, small enough to stream."""

WORKER_CPUS: Final = 0.001
"""CPUs of the task that tests whether workers start: above 0, so that a head without CPUs does not run it."""
UV_HOOK: Final = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Resources of each stage, chosen so that no stage starves another. Actors hold theirs; tasks release theirs."""

    cpus: float
    """CPUs of the cluster."""
    captioners: int
    """Number of captioning actors."""
    scorers: int
    """Number of scoring actors."""
    actor_cpus: float
    """CPUs that each actor holds."""
    actor_gpus: float
    """GPUs that each actor holds; 0: actors compute on the CPU."""
    task_cpus: float
    """CPUs of a decoding task."""
    light_task_cpus: float
    """CPUs of a task that only reads or writes."""
    writers: int
    """Maximum parallel writing tasks: each is a process that takes seconds to start."""
    threads: int
    """Threads of an actor that computes on the CPU."""


def shares(cpus: float, gpus: float, node_cpus: float | None = None, cpus_per_gpu: float | None = None) -> Shares:
    """Shares of a cluster with these CPUs and GPUs.

    `node_cpus`: CPUs of its smallest node that has any; None: `cpus`. `cpus_per_gpu`: the lowest ratio of any node;
    None: that of the whole cluster.

    Actors hold at most a quarter of the CPUs, with or without GPUs, so that tasks of every stage always fit: on two
    cores, three tasks of 0.5 CPU beside two actors of 0.25. With two actors of 0.75, writing tasks did not fit and a
    quarter of the CPU time was idle. A pair of actors and a task fit on any node, so that work continues when one node
    is left; on nodes with GPUs half of the CPUs stay free. A captioner and a scorer share a GPU; without GPUs there is
    one pair per 8 CPUs, which its threads use.
    """
    node_cpus = cpus if node_cpus is None else node_cpus
    if cpus <= 0:
        raise StorageError("the cluster has no CPU for decoding: add CPU workers")
    pairs = max(1, int(gpus) if gpus >= 1 else int(cpus) // 8)
    actor_cpus = min(1.0, cpus / 8.0 / pairs, node_cpus / 8.0)
    if gpus >= 1 and cpus_per_gpu is not None:
        actor_cpus = min(actor_cpus, cpus_per_gpu / 4.0)
    return Shares(
        cpus=cpus,
        captioners=pairs,
        scorers=pairs,
        actor_cpus=actor_cpus,
        actor_gpus=0.5 if gpus >= 1 else 0.0,
        task_cpus=min(1.0, 0.25 * node_cpus),
        light_task_cpus=min(0.5, node_cpus / 16.0),
        writers=max(1, int(cpus) // 4),
        threads=max(1, min(4, int(cpus) // 2)),
    )


def training_cpus(shares: Shares, workers: int) -> tuple[float, float]:
    """CPUs that each training process holds, and CPUs left for decoding.

    A process holds at most one CPU, and all together at most half of the cluster's; the rest decodes.
    """
    worker_cpus = min(1.0, 0.5 * shares.cpus / workers)
    return worker_cpus, max(shares.task_cpus, shares.cpus - worker_cpus * workers)


def streaming_bytes() -> int:
    """Bytes of the cluster's object store available for training images."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(0.25 * available.get("object_store_memory", embedded.OBJECT_STORE_BYTES))


def connect(address: str | None = None) -> None:
    """Connect to the given cluster, the one this process runs in (`RAY_ADDRESS`), or an embedded one.

    Raises `StorageError` if it does not answer or start, or if it starts no worker.
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
            with waiting(f"the Ray cluster {address}"):
                ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise StorageError(f"the Ray cluster {address} cannot be reached: {errors.reason(error)}") from error
    else:
        embedded.start(**settings)
    if callable(sigterm_handler):  # Ray replaces the command's handler
        signal.signal(signal.SIGTERM, sigterm_handler)
    configure_data()
    guard_logs("ray", "ray.data", "ray.train")
    _await_worker()
    say("cluster: {:g} CPUs, {:g} GPUs".format(*_size()))


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
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    sizes = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]]
    return shares(
        *_size(),
        node_cpus=min((cpus for cpus, _ in sizes if cpus), default=None),
        cpus_per_gpu=min((cpus / gpus for cpus, gpus in sizes if gpus), default=None),
    )


def _size() -> tuple[float, float]:

    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return available.get("CPU", 0.0), available.get("GPU", 0.0)
