"""Compute the share of a cluster that each stage takes. Imports no Ray, so that a planner can use the same numbers."""

import itertools
from collections.abc import Sequence
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
ROUNDING: Final = 1e-6
"""Error of a quotient of CPUs, which must not take away an actor."""


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """Nodes of one size."""

    cpus: float
    """CPUs of each node."""
    gpus: float = 0.0
    """GPUs of each node."""
    count: float = 1
    """Number of nodes; a fraction only in a plan, whose last node is not full."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Resources of each stage, chosen so that no stage starves another. Actors hold theirs; tasks release theirs."""

    cpus: float
    """CPUs of the cluster."""
    actors: int
    """Number of model actors that the cluster has places for."""
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


def places(nodes: Sequence[NodeShape], *, on_gpus: bool, actor_cpus: float = 0.0) -> int:
    """Number of model actors that these nodes have places for.

    Two actors share a GPU: while one prepares its next batch, the other computes. Without GPUs there is one actor per 4
    CPUs, which its threads use, and at least one.

    `actor_cpus`: CPUs of an actor, once a run has begun. Nodes with GPUs that came since may have fewer CPUs per GPU:
    there, too, actors hold at most half of them.
    """
    if not on_gpus:  # an actor has at most one CPU: as many fit
        return max(1, int(sum(node.cpus * node.count for node in nodes)) // 4)

    def fitting(node: NodeShape) -> int:
        most = 2 * int(node.gpus)
        return min(most, int(node.cpus / 2.0 / actor_cpus + ROUNDING)) if actor_cpus else most

    return int(sum(fitting(node) * node.count for node in nodes if node.cpus > 0))


def shares(nodes: Sequence[NodeShape]) -> Shares:
    """Shares of a cluster of these nodes. Raises `StorageError` if none has a CPU.

    Actors hold at most a quarter of the CPUs, with or without GPUs, so that tasks of every stage always fit: on two
    cores, two tasks of 0.5 CPU and a writer beside an actor of 0.5. When actors held 1.5 of them, writing tasks did not
    fit and a quarter of the CPU time was idle. Two actors and a task fit on any node that actors run on, so that work
    continues when one node is left; on nodes with GPUs half of the CPUs stay free. Tasks run on all nodes, and take
    whole CPUs if most CPUs are on nodes of four or more: one small node must not make large ones decode two images per
    CPU.
    """
    nodes = [node for node in nodes if node.cpus > 0]
    if not nodes:
        raise StorageError("the cluster has no CPU for decoding: add CPU workers")
    cpus = sum(node.cpus * node.count for node in nodes)
    with_gpus = [node for node in nodes if node.gpus >= 1]
    actors = places(nodes, on_gpus=bool(with_gpus))
    smallest, usual = min(node.cpus for node in nodes), _usual_cpus(nodes)
    if with_gpus:
        of_node = min(node.cpus / max(8.0, 4.0 * int(node.gpus)) for node in with_gpus)
    else:
        of_node = smallest / (8.0 if actors > 1 else 4.0)
    return Shares(
        cpus=cpus,
        actors=actors,
        actor_cpus=min(1.0, cpus / 4.0 / actors, of_node) * (1.0 if with_gpus else UNLIKE_TASKS),
        actor_gpus=0.5 if with_gpus else 0.0,
        task_cpus=min(1.0, 0.25 * usual, 0.5 * smallest),
        light_task_cpus=min(0.5, smallest / 16.0),
        writers=max(1, int(cpus) // 4),
        threads=max(1, min(4, int(usual) // 2)),
    )


def _usual_cpus(nodes: Sequence[NodeShape]) -> float:
    """CPUs of the node that the median CPU belongs to."""
    ordered = sorted((node.cpus, node.cpus * node.count) for node in nodes)
    so_far = itertools.accumulate(of_shape for _, of_shape in ordered)
    half = sum(of_shape for _, of_shape in ordered) / 2.0
    return next(cpus for (cpus, _), held in zip(ordered, so_far, strict=True) if held >= half)


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
