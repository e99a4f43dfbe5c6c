"""The size of a cluster: by hand for round numbers, and as properties for any numbers."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jobs.cluster.shares import NodeShape, shares
from jobs.planning import rates
from jobs.planning.plan import Cluster, Cost, Memory, Plan, Prices, Workload, forecast, plan_cluster, smallest_cluster
from jobs.planning.rates import Rates
from nsnet.errors import ConfigError, UsageError
from tests.support.rates import FIXED_SECONDS, HOURS, RATES, WORKLOAD, file_of


def busy(made: Plan) -> dict[str, float]:
    return {stage.name: stage.busy for stage in made.stages}


def slack(made: Plan) -> dict[str, float]:
    return {stage.name: stage.slack for stage in made.stages}


# By hand.


@pytest.mark.parametrize(
    ("cpus_per_gpu", "cpus", "on_gpu_nodes"),
    [
        (1, 7, 4),  # 100 images/s · 30 ms / 0.5 = 6 CPUs for tasks; 8 actors hold 1/8 each
        (2, 8, 8),  # they hold 1/4 each: 6 + 2
        (4, 16, 16),  # 6 + 4 are fewer than four nodes have
        (16, 64, 64),
    ],
)
def test_smallest_cluster_is_that_computed_by_hand(cpus_per_gpu: int, cpus: int, on_gpu_nodes: int) -> None:
    cluster = smallest_cluster(WORKLOAD, HOURS, cpus_per_gpu, RATES)
    assert (cluster.gpus, cluster.cpus, cluster.gpu_node_cpus) == (4, cpus, on_gpu_nodes)  # 100 · 20 ms / 0.5 = 4


def test_hours_of_a_given_cluster_are_those_computed_by_hand() -> None:
    made = forecast(WORKLOAD, Cluster(gpus=4, cpus=8, cpus_per_gpu=2), file_of())
    assert made.images_per_s == pytest.approx(100.0)
    assert made.hours == pytest.approx(HOURS)
    assert (made.serial_hours, made.startup_hours) == pytest.approx((1000 / 3600, 60 / 3600))
    assert busy(made) == pytest.approx(
        {"fetching": 1 / 3, "decoding": 2 / 3, "captioning": 0.5, "scoring": 0.5, "writing": 0.1}
    )
    assert slack(made) == pytest.approx(
        {"fetching": 0.0, "decoding": 0.0, "captioning": 0.0, "scoring": 0.0, "writing": 9.0}
    )


def test_slack_is_what_the_other_units_could_do_more() -> None:
    made = forecast(WORKLOAD, Cluster(gpus=6, cpus=9, cpus_per_gpu=1), file_of())
    assert made.images_per_s == pytest.approx(7.5 * 0.5 / 0.030)  # 12 actors hold 1/8 each
    assert made.bottleneck == "decoding"
    assert slack(made)["captioning"] == slack(made)["scoring"] == pytest.approx(150.0 / 125.0 - 1.0)
    assert slack(made)["decoding"] == slack(made)["fetching"] == 0.0


def test_memory_is_that_of_processes_actors_and_blocks() -> None:
    """12 decoding tasks of half a CPU, 2 writing tasks, 8 actors; 2 blocks of a task, 4 of an actor, of 64 images."""
    made = forecast(WORKLOAD, Cluster(gpus=4, cpus=8, cpus_per_gpu=2), file_of()).memory
    store = (12 * 2 + 8 * 4) * 32_000_000
    assert made == Memory(
        total=8 * 4_000_000_000 + 14 * 1_000_000_000 + store,
        object_store=store,
        per_gpu=2 * 4_000_000_000 + 2 * 4 * 32_000_000,
        per_cpu=(14 * 1_000_000_000 + 12 * 2 * 32_000_000) // 8,
    )
    large = replace(RATES, store_image_bytes=1e6)  # 32 to a block
    assert forecast(WORKLOAD, Cluster(gpus=4, cpus=8, cpus_per_gpu=2), file_of(large)).memory.object_store == (
        (12 * 2 + 8 * 4) * 32_000_000
    )


def test_cost_is_of_gpus_with_their_nodes_and_of_other_cpus_for_all_hours() -> None:
    cluster = Cluster(gpus=4, cpus=7, cpus_per_gpu=1)
    made = forecast(WORKLOAD, cluster, file_of(), prices=Prices(gpu=2.0, cpu=0.1))
    total = HOURS * (4 * 2.0 + 3 * 0.1)
    assert made.cost == Cost(total=pytest.approx(total), per_million=pytest.approx(total))
    half = forecast(replace(WORKLOAD, images=500_000), cluster, file_of(), prices=Prices(gpu=2.0, cpu=0.1))
    assert half.cost is not None and half.cost.per_million == pytest.approx(2.0 * half.cost.total)
    assert forecast(WORKLOAD, cluster, file_of()).cost is None


@pytest.mark.parametrize(
    ("values", "bottleneck"),
    [
        ({"fetch_bytes_per_s": 1e6}, "fetching"),
        ({"fetch_images_per_s": 2.0}, "fetching"),
        ({"prepare_images_per_s": 5.0}, "decoding"),
        ({"caption_images_per_s": 10.0}, "captioning"),
        ({"score_images_per_s": 10.0}, "scoring"),
        ({"write_images_per_s": 1.0}, "writing"),
    ],
)
def test_bottleneck_is_the_stage_that_takes_most(values: dict[str, float], bottleneck: str) -> None:
    made = forecast(WORKLOAD, Cluster(gpus=4, cpus=8, cpus_per_gpu=2), file_of(replace(RATES, **values)))
    assert made.bottleneck == bottleneck
    assert slack(made)[bottleneck] == 0.0 and busy(made)[bottleneck] == max(busy(made).values())


def test_decoding_grows_with_megapixels_and_fetching_with_bytes() -> None:
    assert RATES.prepare_seconds(1.0) == pytest.approx(0.020)
    assert RATES.prepare_seconds(12.0) == pytest.approx(0.005 + 12 * 0.015)
    assert RATES.fetch_seconds(0) == pytest.approx(0.005)
    assert RATES.fetch_seconds(10**8) == pytest.approx(1.005)


def test_captioning_beside_scoring_is_what_both_together_leave() -> None:
    both = replace(RATES, both_images_per_s=40.0)  # 25 ms, of which scoring takes 10
    assert both.caption_seconds() == pytest.approx(0.015)
    assert RATES.caption_seconds() == pytest.approx(0.010)


def test_known_captions_need_no_captioning() -> None:
    cluster = Cluster(gpus=4, cpus=64, cpus_per_gpu=16)
    for known, images_per_s in ((0.0, 100.0), (0.5, 4 * 0.5 / 0.015), (1.0, 200.0)):
        made = forecast(replace(WORKLOAD, known_captions=known), cluster, file_of())
        assert made.images_per_s == pytest.approx(images_per_s)
        assert ("captioning" in busy(made)) == (known < 1.0)


def test_cpus_that_tasks_use_are_those_that_actors_do_not_hold() -> None:
    """As `shares` divides a cluster when a run starts."""
    cluster = Cluster(gpus=3, cpus=40, cpus_per_gpu=8)
    made = forecast(WORKLOAD, cluster, file_of())
    parts = shares([NodeShape(cpus=8, gpus=1, count=3), NodeShape(cpus=16)])
    units = {stage.unit: stage.units for stage in made.stages}
    held = parts.actors * parts.actor_cpus
    assert units == {"CPU": 40 - held, "GPU": 3, "writing task": parts.writers}


# As properties.

RATE = st.floats(10.0, 5000.0)
ANY_RATES = st.builds(
    Rates,
    prepare_images_per_s=st.floats(2.0, 200.0),
    prepare_megapixels=st.floats(0.2, 20.0),
    prepare_fixed_seconds=st.floats(1e-6, 0.004),
    fetch_images_per_s=RATE,
    fetch_bytes_per_s=st.floats(1e6, 1e9),
    caption_images_per_s=RATE,
    score_images_per_s=RATE,
    both_images_per_s=st.none() | st.floats(1.0, 9.9),
    write_images_per_s=RATE,
    serial_images_per_s=st.floats(1000.0, 1e6),
    startup_seconds=st.floats(1.0, 600.0),
    efficiency=st.floats(0.3, 1.0),
    task_bytes=st.floats(1e8, 1e10),
    actor_bytes=st.floats(1e8, 1e11),
    store_image_bytes=st.floats(1e4, 1e7),
)
ANY_WORKLOAD = st.builds(
    Workload,
    images=st.integers(1, 10**8),
    megapixels=st.floats(0.1, 30.0),
    image_bytes=st.integers(1000, 10**7),
    known_captions=st.floats(0.0, 1.0),
)
CPUS_PER_GPU = st.integers(1, 64)
HOURS_LEFT = st.floats(1.0, 1000.0)


def fixed_hours(workload: Workload, rates: Rates) -> float:
    return (rates.startup_seconds + workload.images / rates.serial_images_per_s) / 3600.0


def planned(workload: Workload, hours: float, cpus_per_gpu: int, rates: Rates) -> Cluster:
    try:
        return smallest_cluster(workload, hours, cpus_per_gpu, rates)
    except ConfigError:
        assume(False)
        raise


@settings(deadline=None)
@given(ANY_WORKLOAD, HOURS_LEFT, CPUS_PER_GPU, ANY_RATES)
def test_plan_meets_its_deadline_and_no_smaller_cluster_does(
    workload: Workload, hours: float, cpus_per_gpu: int, rates: Rates
) -> None:
    deadline = hours + fixed_hours(workload, rates)
    cluster = planned(workload, deadline, cpus_per_gpu, rates)
    made = forecast(workload, cluster, file_of(rates), deadline_hours=deadline)
    assert made.hours <= deadline * (1.0 + 1e-6)
    assert cluster.cpus >= cluster.gpus * cpus_per_gpu
    if cluster.gpus > 1:
        fewer = replace(cluster, gpus=cluster.gpus - 1)  # and as many CPUs as before
        assert forecast(workload, fewer, file_of(rates)).hours > deadline * (1.0 - 1e-6)
    if cluster.cpus > cluster.gpus * cpus_per_gpu:
        fewer = replace(cluster, cpus=cluster.cpus - 1)
        assert forecast(workload, fewer, file_of(rates)).hours > deadline * (1.0 - 1e-6)


@settings(deadline=None)
@given(ANY_WORKLOAD, HOURS_LEFT, CPUS_PER_GPU, ANY_RATES)
def test_numbers_of_a_plan_are_consistent(workload: Workload, hours: float, cpus_per_gpu: int, rates: Rates) -> None:
    cluster = planned(workload, hours + fixed_hours(workload, rates), cpus_per_gpu, rates)
    made = forecast(workload, cluster, file_of(rates))
    units = {stage.unit: 0.0 for stage in made.stages}
    for stage in made.stages:
        units[stage.unit] += stage.busy
        assert stage.slack >= 0.0 and 0.0 < stage.busy <= 1.0 + 1e-9
    assert max(units.values()) == pytest.approx(1.0)
    limiting = {stage.name: stage.busy for stage in made.stages if stage.slack == 0.0}
    assert limiting[made.bottleneck] == max(limiting.values())
    parts = made.memory
    assert parts.total == pytest.approx(cluster.gpus * parts.per_gpu + cluster.cpus * parts.per_cpu, rel=1e-6)
    assert 0 < parts.object_store < parts.total


@settings(deadline=None)
@given(ANY_WORKLOAD, HOURS_LEFT, CPUS_PER_GPU, ANY_RATES, st.floats(1.0, 10.0), st.floats(1.0, 10.0))
def test_more_images_or_fewer_hours_never_need_less(
    workload: Workload, hours: float, cpus_per_gpu: int, rates: Rates, more: float, less: float
) -> None:
    larger = replace(workload, images=int(workload.images * more))
    deadline = fixed_hours(larger, rates) + hours
    base = planned(workload, deadline, cpus_per_gpu, rates)
    shorter = fixed_hours(larger, rates) + hours / less
    for other in (
        planned(larger, deadline, cpus_per_gpu, rates),
        planned(workload, shorter, cpus_per_gpu, rates),
        planned(larger, shorter, cpus_per_gpu, rates),
    ):
        assert other.gpus >= base.gpus and other.cpus >= base.cpus
        memory, least = (forecast(workload, cluster, file_of(rates)).memory for cluster in (other, base))
        assert memory.total >= least.total and memory.object_store >= least.object_store


# What is refused.


def test_plan_of_the_command_uses_the_rates_of_the_release_by_default() -> None:
    made = plan_cluster(images=10_000_000, hours=6.0)
    assert made.rates == rates.load()
    assert made.workload.megapixels == made.rates.rates.prepare_megapixels
    assert made.workload.image_bytes == round(0.3e6 * made.workload.megapixels)
    assert made.hours <= 6.0 == made.deadline_hours
    again = plan_cluster(images=10_000_000, gpus=made.cluster.gpus, cpus=made.cluster.cpus)
    assert (again.hours, again.deadline_hours, again.cluster) == (made.hours, None, made.cluster)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give either --hours, for a cluster, or --gpus and --cpus, for the hours"),
        ({"hours": 6.0, "gpus": 1, "cpus": 1}, "give either"),
        ({"hours": 6.0, "gpus": 1}, "give either"),
        ({"gpus": 1}, "give either"),
        ({"cpus": 1}, "give either"),
        ({"hours": 6.0, "price_gpu": 1.0}, "give both --price-gpu and --price-cpu"),
        (
            {"hours": 6.0, "price_gpu": -1.0, "price_cpu": 1.0},
            "--price-gpu must be between 0 and .* got -1",
        ),
        ({"hours": 6.0, "price_gpu": 1.0, "price_cpu": float("nan")}, "--price-cpu must be between .* got nan"),
        ({"hours": 0.0}, "--hours must be above 0 and at most 100,000, got 0"),
        ({"hours": -1.0}, "--hours must be above 0"),
        ({"hours": float("nan")}, "--hours must be above 0"),
        ({"hours": float("inf")}, "--hours must be above 0"),
        ({"hours": 6.0, "images": 0}, "--images must be above 0 and at most 1,000,000,000,000, got 0"),
        ({"hours": 6.0, "images": 10**13}, "--images must be above 0"),
        ({"hours": 6.0, "megapixels": 0.0}, "--megapixels must be above 0"),
        ({"hours": 6.0, "megapixels": float("nan")}, "--megapixels must be above 0"),
        ({"hours": 6.0, "image_bytes": 0}, "--image-bytes must be above 0"),
        ({"hours": 6.0, "known_captions": 1.5}, "--known-captions must be between 0 and 100%"),
        ({"hours": 6.0, "cpus_per_gpu": 0}, "--cpus-per-gpu must be above 0"),
        ({"gpus": 0, "cpus": 4}, "--gpus must be above 0"),
        ({"gpus": 1, "cpus": 10**7}, "--cpus must be above 0 and at most 1,000,000, got 1e.07"),
        ({"gpus": 8, "cpus": 4}, "8 GPUs need at least as many CPUs, got 4"),
    ],
)
def test_request_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"^{reason}"):
        plan_cluster(**{"images": 1_000_000, **options})


def test_deadline_that_no_cluster_meets_is_refused() -> None:
    too_soon = FIXED_SECONDS / 3600.0
    with pytest.raises(ConfigError, match="--hours 0.294444: starting, listing and publishing take 0.294 hours"):
        smallest_cluster(WORKLOAD, too_soon, 1, RATES)
    with pytest.raises(ConfigError, match="the plan needs more than 1,000,000 GPUs: raise --hours"):
        smallest_cluster(WORKLOAD, too_soon + 1e-6, 1, RATES)
    slow = replace(RATES, prepare_images_per_s=1e-4)
    with pytest.raises(ConfigError, match="the plan needs more than 1,000,000 CPUs: raise --hours"):
        smallest_cluster(WORKLOAD, HOURS, 1, slow)
