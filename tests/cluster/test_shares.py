"""Shares of a cluster: no stage may wait for ever, whatever the cluster, and nobody may sit idle."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jobs.cluster.shares import (
    BLOCK_BYTES,
    ROW_STEP,
    ROWS_PER_BLOCK,
    NodeShape,
    Shares,
    places,
    rows_per_block,
    shares,
)
from nsnet.errors import StorageError

CPUS = [0.5, 1, 1.5, 2, 2.5, 3, *range(4, 33), 47.5, 48, 63, 64, 96, 128]
GPUS = [0, 0.5, 1, 2, 3, 4, 7, 8]
PRECISION = 1e-4
"""Ray counts resources in steps of this size."""


def of_one_node(cpus: float, gpus: float) -> Shares:
    return shares([NodeShape(cpus=cpus, gpus=gpus)])


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("cpus", CPUS)
def test_every_stage_finds_room_beside_all_actors(cpus: float, gpus: float) -> None:
    it = of_one_node(cpus, gpus)
    held = it.actors * it.actor_cpus
    assert held + it.task_cpus + it.light_task_cpus <= cpus
    assert held <= cpus / 4 + 1e-9
    assert min(it.actor_cpus, it.task_cpus, it.light_task_cpus) >= PRECISION
    assert it.actors >= 1 and it.threads >= 1
    assert it.cpus == cpus
    assert it.actors * it.actor_gpus <= gpus
    assert (it.actor_gpus > 0) == (gpus >= 1)
    assert (it.actor_cpus, it.actor_gpus) not in ((it.task_cpus, 0.0), (it.light_task_cpus, 0.0))  # no fused stages


def test_tasks_and_actors_fit_on_a_node_of_one_cpu() -> None:
    for cpus, gpus in itertools.product(CPUS, GPUS):
        it = of_one_node(cpus, gpus)
        assert max(it.actor_cpus, it.task_cpus, it.light_task_cpus) <= 1.0 and it.actor_gpus <= 1.0


def test_block_holds_as_many_images_as_fit_in_whole_steps() -> None:
    assert rows_per_block(3 * (224**2 + 64**2)) == ROWS_PER_BLOCK
    assert rows_per_block(3 * (224**2 + 384**2)) == 64  # with thumbnails of BLIP
    for image_bytes in (0, 1, 1e5, 3e5, 6e5, 1e6, 1e8):
        rows = rows_per_block(image_bytes)
        assert rows % ROW_STEP == 0 and ROW_STEP <= rows <= ROWS_PER_BLOCK
        assert rows == ROW_STEP or rows * image_bytes <= BLOCK_BYTES


def test_two_cores_decode_two_images_at_a_time() -> None:
    it = of_one_node(2, 0)
    assert (2 - it.actors * it.actor_cpus - it.light_task_cpus) // it.task_cpus == 2
    assert it.threads == 1


def test_two_actors_share_a_gpu() -> None:
    for gpus in (1, 2, 8):
        it = of_one_node(64, gpus)
        assert (it.actors, it.actor_gpus) == (2 * gpus, 0.5)


def test_more_cpus_never_mean_smaller_shares_or_fewer_actors() -> None:
    for gpus in GPUS:
        made = [of_one_node(cpus, gpus) for cpus in CPUS]
        for smaller, larger in itertools.pairwise(made):
            assert larger.actors >= smaller.actors and larger.task_cpus >= smaller.task_cpus


@pytest.mark.parametrize("gpus", [0, 4])
def test_cluster_without_cpus_is_refused(gpus: float) -> None:
    with pytest.raises(StorageError, match="no CPU for decoding: add CPU workers"):
        of_one_node(0, gpus)


# Nodes of several sizes.

SIZES = st.builds(
    NodeShape,
    cpus=st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 64]),
    gpus=st.sampled_from([0, 0, 1, 2, 8]),
    count=st.integers(1, 5),
)


@given(st.lists(SIZES, min_size=1, max_size=5))
def test_actors_and_a_task_fit_on_each_node_that_they_run_on(nodes: list[NodeShape]) -> None:
    assume(any(node.cpus for node in nodes))
    it = shares(nodes)
    assert it.actors * it.actor_cpus <= it.cpus / 4 + PRECISION
    for node in nodes:
        held = 2 * int(node.gpus) if it.actor_gpus else 2
        if node.cpus and (node.gpus >= 1 or not it.actor_gpus):
            assert held * it.actor_cpus <= node.cpus / 2 + PRECISION
        assert not node.cpus or it.task_cpus <= node.cpus / 2 + PRECISION


def held(node: NodeShape, it: Shares) -> int:
    """Actors that a node holds, put on it one by one while half of its CPUs stay free."""
    actors = 0
    while (actors + 1) * it.actor_cpus <= node.cpus / 2 + PRECISION and (actors + 1) * 0.5 <= int(node.gpus):
        actors += 1
    return actors


@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, max_size=4))
def test_actors_fit_on_nodes_of_any_size_that_come_and_leave(before: list[NodeShape], since: list[NodeShape]) -> None:
    assume(any(node.cpus for node in before))
    it = shares(before)
    on_gpus = it.actor_gpus > 0
    assert places(before, on_gpus=on_gpus, actor_cpus=it.actor_cpus) == it.actors
    for nodes in (since, before + since):
        found = places(nodes, on_gpus=on_gpus, actor_cpus=it.actor_cpus)
        if on_gpus:
            assert found == sum(held(node, it) * node.count for node in nodes)
        else:
            assert found <= max(1, sum(int(node.cpus / it.actor_cpus) * node.count for node in nodes))


def test_added_node_with_many_gpus_has_places_for_as_many_actors_as_its_cpus_hold() -> None:
    start = NodeShape(cpus=32, gpus=1)
    it = shares([start])
    assert (it.actors, it.actor_cpus) == (2, 1.0)
    added = [NodeShape(cpus=cpus, gpus=8) for cpus in (1, 4, 8, 32, 64)]
    assert [places([start, node], on_gpus=True, actor_cpus=1.0) for node in added] == [2, 4, 6, 18, 18]


def test_actors_are_on_the_nodes_with_gpus_of_a_mixed_cluster() -> None:
    it = shares([NodeShape(cpus=0), NodeShape(cpus=8, gpus=2, count=2), NodeShape(cpus=64), NodeShape(cpus=0, gpus=4)])
    assert (it.actors, it.actor_gpus, it.cpus) == (8, 0.5, 80)
    assert it.actor_cpus == 1.0


def test_one_small_node_does_not_make_large_ones_decode_more_images_than_they_have_cpus() -> None:
    large, small = NodeShape(cpus=64, count=3), NodeShape(cpus=2)
    assert shares([large]).task_cpus == shares([large, small]).task_cpus == 1.0
    assert shares([small]).task_cpus == 0.5
    assert shares([large, small]).threads == 4 and shares([NodeShape(cpus=1, count=64)]).threads == 1


def test_nodes_that_come_have_places_and_nodes_that_leave_take_theirs() -> None:
    gpu, cpu = NodeShape(cpus=4, gpus=1), NodeShape(cpus=16)
    assert [places([gpu] * n + [cpu], on_gpus=True) for n in (0, 1, 3)] == [0, 2, 6]
    assert [places([cpu] * n, on_gpus=False) for n in (0, 1, 3)] == [1, 4, 12]
