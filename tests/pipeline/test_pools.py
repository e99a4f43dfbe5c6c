"""Sizes of the pools of model actors: an actor for each place, and the places divided by what was measured."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data._internal.execution import streaming_executor
from ray.exceptions import GetTimeoutError

from jobs.cluster import resources
from jobs.cluster.shares import NodeShape, shares
from jobs.pipeline import pools
from jobs.pipeline.pools import MIN_SECONDS, PoolKeeper, Pools, divided, kept

NODE = NodeShape(cpus=8, gpus=1)


class Cluster:
    """Stands in for the cluster and the clock; `look` goes on to the next look at the nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.now, self.spent = [NODE] * 2, 0.0, dict[str, float]()
        self.images = dict[str, int]()
        monkeypatch.setattr(resources, "nodes", lambda: self.nodes)
        monkeypatch.setattr(pools.time, "monotonic", lambda: self.now)

    def pools_of(self, *stages: str) -> Pools:
        def spent() -> tuple[Mapping[str, float], Mapping[str, int]]:
            return self.spent, self.images

        return Pools(stages=stages, shares=shares(self.nodes), spent=spent, title="score")

    def look(self, of: Pools, seconds: float = pools.BALANCE_SECONDS) -> list[int]:
        self.now += seconds
        of.update()
        return of.sizes


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@given(st.integers(0, 40), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4))
def test_no_other_division_makes_the_slowest_pool_faster(total: int, weights: list[float]) -> None:
    sizes = divided(total, weights)
    assert len(sizes) == len(weights) and min(sizes) >= 1 and sum(sizes) == max(total, len(weights))
    slowest = max(weight / size for weight, size in zip(weights, sizes, strict=True))
    for giver in range(len(sizes)):
        for taker in range(len(sizes)):
            other = list(sizes)
            other[giver] -= 1
            other[taker] += 1
            if min(other) >= 1:
                assert max(w / s for w, s in zip(weights, other, strict=True)) >= slowest - 1e-9


def test_pool_follows_nodes_that_come_and_leave(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    of = cluster.pools_of("captioning+scoring")
    assert of.sizes == [4]
    cluster.nodes = [NODE] * 3 + [NodeShape(cpus=16)]
    assert cluster.look(of) == [6]
    assert cluster.look(of) == [6]
    cluster.nodes = [NODE]
    assert cluster.look(of) == [2]
    cluster.nodes = [NodeShape(cpus=16)]
    assert cluster.look(of) == [1]  # it waits for a GPU
    said = capsys.readouterr().err
    assert said.count("the cluster has places for") == 3
    assert "score: the cluster has places for 6 model actors" in said


def test_gpu_that_comes_to_a_run_without_one_is_said_once(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.nodes = [NodeShape(cpus=16)]
    of = cluster.pools_of("captioning+scoring")
    assert cluster.look(of) == [4]
    assert "GPU" not in capsys.readouterr().err
    cluster.nodes = [NodeShape(cpus=16), NodeShape(cpus=0, gpus=1)]  # no actor runs on a node without CPUs
    cluster.look(of)
    assert "GPU" not in capsys.readouterr().err
    cluster.nodes = [NodeShape(cpus=16), NODE]
    assert cluster.look(of) == cluster.look(of) == [6]
    said = capsys.readouterr().err
    assert said.count("warning: score: the cluster has a GPU now") == 1 and "start it again" in said


def test_no_gpu_is_said_to_be_unused_by_a_run_on_gpus(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    of = cluster.pools_of("captioning+scoring")
    cluster.nodes = [NODE] * 3
    cluster.look(of)
    assert "warning" not in capsys.readouterr().err


def test_added_node_with_few_cpus_has_no_more_places_than_fit(cluster: Cluster) -> None:
    cluster.nodes = [NodeShape(cpus=32, gpus=1)]
    of = cluster.pools_of("captioning+scoring")
    cluster.nodes.append(NodeShape(cpus=2, gpus=8))
    assert cluster.look(of) == [3]


def test_cluster_is_not_asked_at_each_step(cluster: Cluster) -> None:
    of = cluster.pools_of("scoring")
    cluster.look(of)
    cluster.nodes = [NODE] * 3
    assert cluster.look(of, pools.CHECK_SECONDS / 2) == [4]
    assert cluster.look(of, pools.CHECK_SECONDS / 2) == [6]


def test_slower_stage_gets_more_places_once_it_was_measured(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    of = cluster.pools_of("captioning", "scoring")
    assert of.sizes == [2, 2]
    cluster.spent, cluster.images = {"captioning": MIN_SECONDS / 2, "decoding": 1000.0}, {"captioning": 50}
    assert cluster.look(of) == cluster.look(of) == [2, 2]  # nothing was scored
    said = capsys.readouterr().err
    assert said.count("score: model actors: 2 for captioning, 2 for scoring, until both were measured") == 1
    cluster.spent, cluster.images = {"captioning": 75.0, "scoring": 25.0}, {"captioning": 1000, "scoring": 1000}
    assert cluster.look(of) == [3, 1]
    said = capsys.readouterr().err
    assert said.endswith(
        "score: model actors: 3 for captioning (75.0 ms per image), 1 for scoring (25.0 ms per image)\n"
    )
    cluster.nodes = [NODE] * 4
    assert cluster.look(of) == [6, 2]


def test_images_between_two_stages_do_not_make_the_first_one_slower(cluster: Cluster) -> None:
    """Both take as long for an image; captioning has done four times as many."""
    of = cluster.pools_of("captioning", "scoring")
    cluster.spent, cluster.images = {"captioning": 80.0, "scoring": 20.0}, {"captioning": 4000, "scoring": 1000}
    assert cluster.look(of) == [2, 2]


def test_measured_times_are_said_once_although_the_sizes_stay(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    of = cluster.pools_of("captioning", "scoring")
    cluster.look(of)
    cluster.spent, cluster.images = {"captioning": 30.0, "scoring": 30.0}, {"captioning": 1000, "scoring": 1000}
    assert cluster.look(of) == cluster.look(of) == [2, 2]
    assert capsys.readouterr().err.count("2 for captioning (30.0 ms per image), 2 for scoring (30.0 ms per image)") == 1


def test_head_that_does_not_answer_changes_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> list[NodeShape]:
        raise GetTimeoutError

    of = cluster.pools_of("scoring")
    monkeypatch.setattr(resources, "nodes", silent)
    assert cluster.look(of) == [4]


class Pool:
    """Stands in for an actor pool of Ray Data."""

    def __init__(self, size: int, most: int) -> None:
        self.size, self.most, self.requests = size, most, list[Any]()

    def min_size(self) -> int:
        return 1

    def max_size(self) -> int:
        return self.most

    def current_size(self) -> int:
        return self.size

    def scale(self, request: Any) -> None:
        self.requests.append(request)

    def max_tasks_in_flight_per_actor(self) -> int:
        return 2

    def max_actor_concurrency(self) -> int:
        return 1


class Operator:
    """Stands in for the operator of an actor pool."""

    def __init__(self, pool: Pool, ended: bool) -> None:
        self.pool, self._inputs_complete = pool, ended

    def get_autoscaling_actor_pools(self) -> list[Pool]:
        return [self.pool]

    def has_completed(self) -> bool:
        return False


def keeper(of: Pools, pool: Pool, *, ended: bool = False) -> PoolKeeper:
    op = Operator(pool, ended)
    state = SimpleNamespace(total_enqueued_input_blocks=lambda: 0)
    create: Any = streaming_executor.create_actor_autoscaler
    config = SimpleNamespace(
        actor_pool_util_upscaling_threshold=1.75, actor_pool_util_downscaling_threshold=0.5,
        actor_pool_max_upscaling_delta=None,
    )  # fmt: skip
    with kept(of, "score"):
        made = streaming_executor.create_actor_autoscaler({op: state}, None, config=config)  # type: ignore[attr-defined]
    assert streaming_executor.create_actor_autoscaler is create  # type: ignore[attr-defined]
    assert isinstance(made, PoolKeeper)
    return made


@pytest.mark.parametrize(
    ("size", "most", "change"),
    [(4, 16, 0), (1, 16, 3), (6, 16, -2), (1, 3, 2)],
    ids=["full", "too few", "too many", "no more than the pool's most"],
)
def test_pool_is_kept_at_its_size(cluster: Cluster, size: int, most: int, change: int) -> None:
    pool = Pool(size, most)
    keeper(cluster.pools_of("scoring"), pool).try_trigger_scaling()
    assert [request.delta for request in pool.requests] == [change]


def test_idle_actors_end_when_the_input_has_ended(cluster: Cluster) -> None:
    """They leave their places to actors of lost nodes, which hold the last blocks."""
    pool = Pool(4, 16)
    keeper(cluster.pools_of("scoring"), pool, ended=True).try_trigger_scaling()
    assert [(request.delta, request.force) for request in pool.requests] == [(-1, True)]


def test_ray_data_makes_its_autoscaler_by_the_name_that_is_replaced() -> None:
    """An attribute of a private module: a new release of Ray may use another."""
    assert "= create_actor_autoscaler(" in inspect.getsource(streaming_executor)
