"""The pools of model actors: how many actors each has, while nodes come and go.

Ray Data's own autoscaler follows how busy a pool is: it would end actors while their models load, and start more than a
GPU holds. Here a pool has as many actors as the cluster has places for, whatever they do.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import ray.data._internal.execution.streaming_executor as streaming_executor
from ray.data._internal.actor_autoscaler import ActorPoolScalingRequest, AutoscalingActorPool
from ray.data._internal.actor_autoscaler.default_actor_autoscaler import DefaultActorAutoscaler
from ray.exceptions import RayError

from jobs.cluster import resources
from jobs.cluster.shares import Shares, places
from jobs.console.output import say
from jobs.pipeline.bottleneck import milliseconds

CHECK_SECONDS: Final = 5.0
"""Interval between two looks at the cluster's nodes."""
BALANCE_SECONDS: Final = 60.0
"""Interval between two divisions of the places among pools."""
MIN_SECONDS: Final = 20.0
"""Minimum seconds that all model stages together worked, from which places are divided by what was measured."""


@dataclass(kw_only=True)
class Pools:
    """The pools of a stream, and the actors that each should have."""

    stages: tuple[str, ...]
    """Name of each pool's stage; one name for a pool that has all stages."""
    shares: Shares
    spent: Callable[[], tuple[Mapping[str, float], Mapping[str, int]]] = lambda: ({}, {})
    """Seconds by stage that actors have worked so far, and the images that they worked on."""
    title: str = ""
    """Verb of the progress line."""
    sizes: list[int] = field(init=False)
    """Actors that each pool should have now."""
    _places: int = field(init=False)
    _weights: list[float] = field(init=False)
    """Seconds per image of each pool's stage, up to a factor until they were measured."""
    _measured: bool = False
    _said: tuple[list[int], bool] | None = None
    """Sizes that the log names, and whether they follow from what was measured."""
    _next_check: float = 0.0
    _next_balance: float = 0.0
    _warned_of_gpus: bool = False

    def __post_init__(self) -> None:
        self._weights = [1.0] * len(self.stages)
        self._places = self.shares.actors
        self.sizes = divided(self._places, self._weights)
        if len(self.stages) == 1:  # its size is what the user knows of the cluster
            self._said = (self.sizes, False)

    def update(self) -> None:
        """Look at the cluster and at what was measured, each after its interval; says what changes."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        try:
            nodes = resources.nodes()
            on_gpus, actor_cpus = self.shares.actor_gpus > 0, self.shares.actor_cpus
            self._places = places(nodes, on_gpus=on_gpus, actor_cpus=actor_cpus)
            if len(self.stages) > 1 and now >= self._next_balance:
                self._weigh(*self.spent())
                self._next_balance = now + BALANCE_SECONDS
        except RayError:  # the head does not answer: the next look may succeed
            return
        if not on_gpus and not self._warned_of_gpus and any(node.gpus >= 1.0 and node.cpus > 0.0 for node in nodes):
            self._warned_of_gpus = True
            say(
                f"warning: {self.title}: the cluster has a GPU now, but this run began without one and stays on CPUs. "
                "To use it, stop the command and start it again, which continues the run. Start the next run when a "
                "node with a GPU is ready: on Kubernetes, give its group minReplicas of at least 1"
            )
        self.sizes = divided(self._places, self._weights)
        if self._said != (self.sizes, self._measured):
            self._said = (self.sizes, self._measured)
            say(f"{self.title}: {self.describe()}")

    def _weigh(self, seconds: Mapping[str, float], images: Mapping[str, int]) -> None:
        """Captioning is ahead of scoring by the images between them, so seconds alone would not compare."""
        worked = [(seconds.get(stage, 0.0), images.get(stage, 0)) for stage in self.stages]
        if sum(spent for spent, _ in worked) >= MIN_SECONDS and min(min(spent, count) for spent, count in worked) > 0.0:
            self._weights = [spent / count for spent, count in worked]
            self._measured = True

    def describe(self) -> str:
        """Numbers of actors, and what they were divided by, as a line."""
        if len(self.stages) == 1:
            return f"the cluster has places for {self.sizes[0]} model actors"
        parts = [
            f"{size} for {stage}" + (f" ({milliseconds(weight)} per image)" if self._measured else "")
            for stage, size, weight in zip(self.stages, self.sizes, self._weights, strict=True)
        ]
        return f"model actors: {', '.join(parts)}" + ("" if self._measured else ", until both were measured")


def divided(total: int, weights: Sequence[float]) -> list[int]:
    """Divide places among pools so that the slowest pool is as fast as possible; each pool gets at least one.

    weights: seconds per image of each pool's stage, up to a factor.
    """
    sizes = [1] * len(weights)
    for _ in range(total - len(weights)):
        sizes[max(range(len(weights)), key=lambda i: weights[i] / sizes[i])] += 1
    return sizes


class PoolKeeper(DefaultActorAutoscaler):
    """Ray Data's autoscaler of actor pools, replaced: it keeps the sizes of `Pools`.

    The actors of a lost node restart where there is room. Without room, blocks that were sent to them wait: for a new
    node, or for the end of the input, when idle actors end and leave their places.
    """

    def __init__(self, pools: Pools, *topology: Any, **settings: Any) -> None:
        super().__init__(*topology, **settings)
        self._pools = pools
        in_order = [pool for op in self._topology for pool in op.get_autoscaling_actor_pools()]
        self._numbers = {id(pool): number for number, pool in enumerate(in_order)}

    def try_trigger_scaling(self) -> None:
        self._pools.update()
        super().try_trigger_scaling()  # type: ignore[no-untyped-call]

    def _derive_target_scaling_config(
        self, actor_pool: AutoscalingActorPool, op: Any, op_state: Any
    ) -> ActorPoolScalingRequest:
        if op.has_completed() or (op._inputs_complete and op_state.total_enqueued_input_blocks() == 0):
            ending: ActorPoolScalingRequest = super()._derive_target_scaling_config(actor_pool, op, op_state)
            return ending  # of idle actors
        wanted = min(self._pools.sizes[self._numbers[id(actor_pool)]], actor_pool.max_size())
        surplus = actor_pool.current_size() - wanted
        if surplus > 0:  # ends actors that are starting or idle, and no others
            return ActorPoolScalingRequest(delta=-surplus, force=True, reason="more actors than places")
        return ActorPoolScalingRequest(delta=-surplus, reason="an actor for each place")


@contextmanager
def kept(pools: Pools | None, title: str) -> Iterator[None]:
    """Make streams that start in the body keep the sizes of these pools. `title`: verb of the progress line."""
    executor: Any = streaming_executor
    create = executor.create_actor_autoscaler
    if pools is not None:
        pools.title = title
        executor.create_actor_autoscaler = partial(PoolKeeper, pools)
    try:
        yield
    finally:
        executor.create_actor_autoscaler = create
