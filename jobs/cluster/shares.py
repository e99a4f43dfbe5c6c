"""Compute the share of a cluster that each stage takes. Imports no Ray, so that a planner can use the same numbers."""

from dataclasses import dataclass
from typing import Final

from nsnet.errors import StorageError

BLOCK_BYTES: Final = 40 * 2**20
"""Largest block between stages: small enough to stream through a small object store."""
ROWS_PER_BLOCK: Final = 128
"""Most images per block. A block costs Ray and Arrow some 50 ms of CPU time in all processes, whatever its rows."""
ROW_STEP: Final = 32
"""Images per block are a multiple of this, so that model calls are full."""
BLOCKS_PER_ACTOR: Final = 2
"""Blocks that are sent to an actor at a time: one to compute, one to wait, so that the actor never does."""

UNLIKE_TASKS: Final = 0.99
"""Factor that makes an actor's CPUs differ from a decoding task's. If both requested the same, Ray Data would fuse the
stages and decode inside the actors, in one thread."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Resources of each stage, chosen so that no stage starves another. Actors hold theirs; tasks release theirs."""

    cpus: float
    """CPUs of the cluster."""
    actors: int
    """Number of model actors."""
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
    cores, two tasks of 0.5 CPU and a writer beside an actor of 0.5. When actors held 1.5 of them, writing tasks did not
    fit and a quarter of the CPU time was idle. Two actors and a task fit on any node, so that work continues when one
    node is left; on nodes with GPUs half of the CPUs stay free. Two actors share a GPU: while one prepares its next
    batch, the other computes. Without GPUs there is one actor per 4 CPUs, which its threads use.
    """
    node_cpus = cpus if node_cpus is None else node_cpus
    if cpus <= 0:
        raise StorageError("the cluster has no CPU for decoding: add CPU workers")
    actors = 2 * int(gpus) if gpus >= 1 else max(1, int(cpus) // 4)
    actor_cpus = min(1.0, cpus / 4.0 / actors, node_cpus / (8.0 if actors > 1 else 4.0))
    if gpus < 1:
        actor_cpus *= UNLIKE_TASKS
    elif cpus_per_gpu is not None:
        actor_cpus = min(actor_cpus, cpus_per_gpu / 4.0)
    return Shares(
        cpus=cpus,
        actors=actors,
        actor_cpus=actor_cpus,
        actor_gpus=0.5 if gpus >= 1 else 0.0,
        task_cpus=min(1.0, 0.25 * node_cpus),
        light_task_cpus=min(0.5, node_cpus / 16.0),
        writers=max(1, int(cpus) // 4),
        threads=max(1, min(4, int(cpus) // 2)),
    )


def rows_per_block(image_bytes: float) -> int:
    """Images per block if each has this many bytes between stages: 128 with small thumbnails, 64 with BLIP's."""
    steps = int(BLOCK_BYTES / max(1.0, image_bytes)) // ROW_STEP
    return min(ROWS_PER_BLOCK, max(1, steps) * ROW_STEP)


def training_cpus(shares: Shares, workers: int) -> tuple[float, float]:
    """CPUs that each training process holds, and CPUs left for decoding.

    A process holds at most one CPU, and all together at most half of the cluster's; the rest decodes.
    """
    worker_cpus = min(1.0, 0.5 * shares.cpus / workers)
    return worker_cpus, max(shares.task_cpus, shares.cpus - worker_cpus * workers)
