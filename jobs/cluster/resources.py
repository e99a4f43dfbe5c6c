"""The cluster that a command runs on, and the shares of it that its stages take."""

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
"""Largest block between stages: some 32 images with BLIP's thumbnails, small enough to stream."""

WORKER_CPUS: Final = 0.001
"""CPUs of the task that shows that workers start: more than none, since a head without CPUs does no work."""
UV_HOOK: Final = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who takes how much, so that no stage can starve another: actors hold their share, tasks come and go."""

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
    """Most tasks that write at a time: each is a process that takes seconds to start."""
    threads: int
    """Threads of an actor that computes on the CPU."""


def shares(cpus: float, gpus: float, node_cpus: float | None = None, cpus_per_gpu: float | None = None) -> Shares:
    """Shares of a cluster with so many CPUs and GPUs.

    `node_cpus`: CPUs of its smallest node that has any; None: all. `cpus_per_gpu`: on its node with the fewest; None:
    as in the whole cluster.

    Actors hold at most a quarter of the CPUs, whatever they compute with, so tasks of every stage always find room: on
    two cores, three tasks of 0.5 CPU beside two actors of 0.25. With two of 0.75 there was no room to write beside
    them, and a quarter of the CPUs' time went unused. A pair of actors and a task fit on any node, so that
    work goes on where one node is left; on nodes with GPUs half of the CPUs stay free. A captioner and a scorer share a
    GPU; without GPUs there is one pair per 8 CPUs, whose threads use them.
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
    """CPUs that each training process holds, and CPUs that are left to all decoding for them.

    Without GPUs the processes compute on what they hold, at most half of all; the rest decodes. With GPUs a CPU each.
    """
    held = min(1.0, 0.5 * shares.cpus / workers)
    return held, max(shares.task_cpus, shares.cpus - held * workers)


def streaming_bytes() -> int:
    """Bytes of the cluster's object store that training images may take."""

    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(0.25 * available.get("object_store_memory", embedded.OBJECT_STORE_BYTES))


def connect(address: str | None = None) -> None:
    """Join a cluster: the given one, the one this process runs in (`RAY_ADDRESS`), or an embedded one.

    Raises `StorageError` where none answers or starts, or where it starts no worker.
    """

    if ray.is_initialized():
        return
    check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The share of the cluster that a killed driver asked for is kept from its successor for so long, instead of 180 s.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    # Ray's C++ side prints advice on its own actors as errors; failures that matter reach Python.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _leave_uv_alone()
    ended = signal.getsignal(signal.SIGTERM)
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
    if callable(ended):  # Ray puts its own in the place of the command's
        signal.signal(signal.SIGTERM, ended)
    configure_data()
    guard_logs("ray", "ray.data", "ray.train")
    _await_worker()
    say("cluster: {:g} CPUs, {:g} GPUs".format(*_size()))


def _leave_uv_alone() -> None:
    """Under `uv run`, Ray would start each worker by `uv run` too, which makes the environment anew: minutes, or never.

    Ray reads the variable when it is imported, which may have been long ago.
    """
    if UV_HOOK in os.environ:
        return

    os.environ[UV_HOOK] = "0"
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # uv sets it for what it runs
        say(f"uv run: workers use this environment as it is; {UV_HOOK}=1 has Ray make it anew for each")


def _await_worker() -> None:
    """Wait until the cluster runs a first task, whose process others use after it. Raises `StorageError`."""

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
        f"the cluster starts no worker: {problem}. Either other work holds all its CPUs (`ray status`), or its "
        "processes do not start: see /tmp/ray/session_latest/logs/raylet.out"
    )


def _started() -> bool:
    return True


def configure_data() -> None:
    """Settings of Ray Data: no bars of its own beside ours, errors as stages raise them, its older Parquet reader.

    The newer one starts 32 actors to read the footers of the manifest's files: 32 s on two cores.
    """

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.raise_original_map_exception = True  # or `UserCodeException` comes in its place, without a cause
    if hasattr(context, "use_datasource_v2"):
        context.use_datasource_v2 = False
    context.issue_detectors_config.detectors = []  # advice on memory requests, every 30 s
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).addFilter(_to_file_alone)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off


def _to_file_alone(record: logging.LogRecord) -> bool:
    """Keep Ray Data's errors off the console, where `console.run` says them; its log file has them all."""
    record.hide = record.levelno >= logging.ERROR
    return True


def job_checkpoint(uri: str) -> "CheckpointConfig":
    """A folder to which a dataset commits what it writes, so that its next run leaves that out."""

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
