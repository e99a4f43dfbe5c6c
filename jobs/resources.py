"""The cluster that a command runs on, and the shares of it that its stages take."""

import os
from dataclasses import dataclass
from typing import Any, Final

from jobs.console import say
from nsnet.errors import StorageError

OBJECT_STORE_BYTES: Final = 2 * 2**30
"""Object store of an embedded cluster: pictures stream through it, they do not collect there."""


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
    threads: int
    """Threads of an actor that computes on the CPU."""


def shares(cpus: float, gpus: float) -> Shares:
    """Shares of a cluster with so many CPUs and GPUs.

    Actors hold at most a quarter of the CPUs, so tasks of every stage always find room: on two cores, tasks of 0.5 CPU
    beside two actors of 0.25. With GPUs each is shared by one captioner and one scorer, captioning having the larger
    part because it is the slower stage.
    """
    if cpus <= 0:
        raise StorageError("the cluster has no CPU for decoding: add CPU workers")
    pairs = max(1, int(gpus))
    actor_cpus = min(1.0, cpus / 8.0 / pairs)
    return Shares(
        cpus=cpus,
        captioners=pairs,
        scorers=pairs,
        actor_cpus=actor_cpus,
        actor_gpus=0.5 if gpus >= 1 else 0.0,
        task_cpus=min(1.0, cpus / 4.0),
        light_task_cpus=min(0.5, cpus / 16.0),
        threads=max(1, int(cpus) // 2),
    )


def connect(address: str | None = None) -> None:
    """Join a cluster: the given one, the one this process runs in (`RAY_ADDRESS`), or an embedded one."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        settings.pop("include_dashboard")
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StorageError(f"the Ray cluster {address} cannot be reached: {error}") from error
    else:
        ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, **settings)
    quiet_data()
    say("cluster: {:g} CPUs, {:g} GPUs".format(*_size()))


def quiet_data() -> None:
    """Ray Data's own bars give way to one line per stage (`jobs.progress`)."""
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # advice on memory requests, every 30 s
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)


def cluster_shares() -> Shares:
    """Shares of the cluster that this process is connected to."""
    return shares(*_size())


def _size() -> tuple[float, float]:
    import ray

    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return available.get("CPU", 0.0), available.get("GPU", 0.0)
