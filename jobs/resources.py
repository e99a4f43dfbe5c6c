"""The cluster that a command runs on, and the shares of it that its stages take."""

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jobs.console import say
from nsnet.errors import StorageError

if TYPE_CHECKING:
    from ray.data.checkpoint import CheckpointConfig

OBJECT_STORE_BYTES: Final = 2 * 2**30
"""Object store of an embedded cluster: pictures stream through it, they do not collect there."""

BLOCK_BYTES: Final = 16 * 2**20
"""Largest block between stages: some 32 pictures with BLIP's thumbnails, small enough to stream."""

NODE_ENVIRONMENT: Final = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""Variables that Ray's nodes should be started with. A node ends workers that idle for a second where it has more of
them than CPUs; but decoding waits for the models now and then, and every new worker imports for seconds: on two cores,
nearly half of the throughput."""


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
    """Bytes of the cluster's object store that training pictures may take."""
    import ray

    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(0.25 * available.get("object_store_memory", OBJECT_STORE_BYTES))


def connect(address: str | None = None) -> None:
    """Join a cluster: the given one, the one this process runs in (`RAY_ADDRESS`), or an embedded one."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The share of the cluster that a killed driver asked for is kept from its successor for so long, instead of 180 s.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    for name, value in NODE_ENVIRONMENT.items():  # for an embedded cluster
        os.environ.setdefault(name, value)
    # Ray's C++ side prints advice on its own actors as errors; failures that matter reach Python.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ended = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        settings.pop("include_dashboard")
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StorageError(f"the Ray cluster {address} cannot be reached: {error}") from error
    else:
        _begin(object_store_memory=OBJECT_STORE_BYTES, **settings)
    if callable(ended):  # Ray puts its own in the place of the command's
        signal.signal(signal.SIGTERM, ended)
    configure_data()
    say("cluster: {:g} CPUs, {:g} GPUs".format(*_size()))


def _begin(**settings: Any) -> None:
    """An embedded cluster; once more where it does not start, as on a machine that is busy: Ray waits for 30 s."""
    import ray

    for last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray has no class for it
            ray.shutdown()
            if last:
                raise StorageError(
                    f"an embedded Ray cluster does not start: {' '.join(str(error).split())[:300]}; is the machine "
                    "busy or its memory full?"
                ) from error
            say("the embedded Ray cluster did not start: once more")


def configure_data() -> None:
    """Settings of Ray Data: no bars of its own beside ours, and its older Parquet reader.

    The newer one starts 32 actors to read the footers of the manifest's files: 32 s on two cores.
    """
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    if hasattr(context, "use_datasource_v2"):
        context.use_datasource_v2 = False
    context.issue_detectors_config.detectors = []  # advice on memory requests, every 30 s
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off


def job_checkpoint(uri: str) -> "CheckpointConfig":
    """A folder to which a dataset commits what it writes, so that its next run leaves that out."""
    from ray.data.checkpoint import CheckpointConfig

    from jobs import storage

    system, path = storage.arrow_filesystem(uri)
    return CheckpointConfig(
        id_column="image_id", checkpoint_path=path, override_filesystem=system, delete_checkpoint_on_success=False
    )


def cluster_shares() -> Shares:
    """Shares of the cluster that this process is connected to."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    sizes = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]]
    return shares(
        *_size(),
        node_cpus=min((cpus for cpus, _ in sizes if cpus), default=None),
        cpus_per_gpu=min((cpus / gpus for cpus, gpus in sizes if gpus), default=None),
    )


def _size() -> tuple[float, float]:
    import ray

    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return available.get("CPU", 0.0), available.get("GPU", 0.0)
