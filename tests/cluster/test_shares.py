"""Shares of a cluster: no stage may wait for ever, whatever the cluster, and nobody may sit idle."""

import itertools

import pytest

from jobs.cluster.shares import BLOCK_BYTES, ROW_STEP, ROWS_PER_BLOCK, rows_per_block, shares
from nsnet.errors import StorageError

CPUS = [0.5, 1, 1.5, 2, 2.5, 3, *range(4, 33), 47.5, 48, 63, 64, 96, 128]
GPUS = [0, 0.5, 1, 2, 3, 4, 7, 8]
PRECISION = 1e-4
"""Ray counts resources in steps of this size."""


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("cpus", CPUS)
def test_every_stage_finds_room_beside_all_actors(cpus: float, gpus: float) -> None:
    it = shares(cpus, gpus)
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
        it = shares(cpus, gpus)
        assert max(it.actor_cpus, it.task_cpus, it.light_task_cpus) <= 1.0 and it.actor_gpus <= 1.0


def test_block_holds_as_many_images_as_fit_in_whole_steps() -> None:
    assert rows_per_block(3 * (224**2 + 64**2)) == ROWS_PER_BLOCK
    assert rows_per_block(3 * (224**2 + 384**2)) == 64  # with thumbnails of BLIP
    for image_bytes in (0, 1, 1e5, 3e5, 6e5, 1e6, 1e8):
        rows = rows_per_block(image_bytes)
        assert rows % ROW_STEP == 0 and ROW_STEP <= rows <= ROWS_PER_BLOCK
        assert rows == ROW_STEP or rows * image_bytes <= BLOCK_BYTES


def test_two_cores_decode_two_images_at_a_time() -> None:
    it = shares(2, 0)
    assert (2 - it.actors * it.actor_cpus - it.light_task_cpus) // it.task_cpus == 2
    assert it.threads == 1


def test_two_actors_share_a_gpu() -> None:
    for gpus in (1, 2, 8):
        it = shares(64, gpus)
        assert (it.actors, it.actor_gpus) == (2 * gpus, 0.5)


def test_more_cpus_never_mean_smaller_shares_or_fewer_actors() -> None:
    for gpus in GPUS:
        made = [shares(cpus, gpus) for cpus in CPUS]
        for smaller, larger in itertools.pairwise(made):
            assert larger.actors >= smaller.actors and larger.task_cpus >= smaller.task_cpus


@pytest.mark.parametrize("gpus", [0, 4])
def test_cluster_without_cpus_is_refused(gpus: float) -> None:
    with pytest.raises(StorageError, match="no CPU for decoding: add CPU workers"):
        shares(0, gpus)
