"""Compute the size of a cluster for a deadline, or the hours of a given cluster. Pure arithmetic over `Rates`.

A stream has three kinds of units, and each stage runs on one: CPUs fetch and decode, GPUs caption and score, writing
tasks write. Stages of one kind share its units. With u units, efficiency e, and t_i seconds of a unit for one image in
stage i, the images per second of a kind are at most u · e / Σ t_i. The stream is as fast as its slowest kind.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from jobs.cluster.shares import BLOCKS_PER_ACTOR, NodeShape, Shares, rows_per_block, shares
from jobs.planning import rates as rate_files
from jobs.planning.rates import Rates, RatesFile, check_positive
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError, UsageError

CPUS_PER_GPU: Final = 8
"""CPUs of a node with GPUs for each of its GPUs, unless the user names another node type."""
JPEG_BYTES_PER_PX: Final = 0.3
"""Bytes per pixel of a photograph as JPEG of good quality."""
BLOCKS_PER_TASK: Final = 2
"""Blocks of a decoding task in the object store: one in the making, one that waits for an actor."""
MAX_IMAGES: Final = 10**12
MAX_HOURS: Final = 100_000.0
MAX_UNITS: Final = 1_000_000
"""Most GPUs or CPUs of a cluster."""
MAX_MEGAPIXELS: Final = 10_000.0
MAX_IMAGE_BYTES: Final = 10**12
MAX_PRICE: Final = 1e9
ROUNDING: Final = 1e-9
"""Relative error of sums that must not make 12 units 13."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The images of a run."""

    images: int
    megapixels: float
    """Mean size, in 10^6 pixels."""
    image_bytes: int
    """Mean size of a file, in bytes."""
    known_captions: float = 0.0
    """Share of images that need no captioning, 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("--images", self.images, MAX_IMAGES)
        check_positive("--megapixels", self.megapixels, MAX_MEGAPIXELS)
        check_positive("--image-bytes", self.image_bytes, MAX_IMAGE_BYTES)
        if not 0.0 <= self.known_captions <= 1.0:
            raise ConfigError(f"--known-captions must be between 0 and 100%, got {self.known_captions:g}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of nodes with one GPU each, and of nodes without GPUs that have no fewer CPUs."""

    gpus: int
    cpus: int
    """CPUs of all nodes."""
    cpus_per_gpu: int = CPUS_PER_GPU
    """CPUs of a node with a GPU; fewer if `cpus` does not suffice for them."""

    def __post_init__(self) -> None:
        check_positive("--gpus", self.gpus, MAX_UNITS)
        check_positive("--cpus", self.cpus, MAX_UNITS)
        check_positive("--cpus-per-gpu", self.cpus_per_gpu, MAX_UNITS)
        if self.cpus < self.gpus:
            raise ConfigError(f"{self.gpus:,} GPUs need at least as many CPUs, got {self.cpus:,}")

    @property
    def gpu_node_cpus(self) -> int:
        """CPUs of the nodes with GPUs."""
        return min(self.cpus, self.gpus * self.cpus_per_gpu)

    def shares(self) -> Shares:
        """What each stage gets when a run starts on this cluster."""
        cpus = self.gpu_node_cpus / self.gpus
        others = NodeShape(cpus=cpus, count=self.cpus / cpus - self.gpus)
        return shares([NodeShape(cpus=cpus, gpus=1, count=self.gpus), others])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the stream in a plan."""

    name: str
    unit: str
    """What the stage runs on: CPU, GPU or writing task."""
    units: float
    """Units in the cluster that it shares with the other stages of this unit."""
    images_per_s: float
    """Images per second of one unit that does nothing else, without loss of efficiency."""
    busy: float
    """Share of its units' time that it takes in this plan, 0 to 1."""
    slack: float
    """How much faster its units could do their stages: 0 in the bottleneck, 0.5 if by half."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a cluster, in bytes, without the operating system and Ray's own processes."""

    total: int
    """Host memory of all nodes, with the object store."""
    object_store: int
    """Ray's object store of all nodes."""
    per_gpu: int
    """Host memory for each GPU: its two actors and their blocks."""
    per_cpu: int
    """Host memory for each CPU: decoding and writing processes and their blocks."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of an hour, in any currency."""

    gpu: float
    """One GPU with the CPUs of its node."""
    cpu: float
    """One CPU of a node without GPUs."""

    def __post_init__(self) -> None:
        for name, price in (("--price-gpu", self.gpu), ("--price-cpu", self.cpu)):
            if not 0.0 <= price <= MAX_PRICE:
                raise ConfigError(f"{name} must be between 0 and {MAX_PRICE:,.0f}, got {price:g}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs, in the currency of the prices."""

    total: float
    per_million: float
    """For a million images."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cluster, and what a run on it takes."""

    workload: Workload
    deadline_hours: float | None
    """None: the cluster was given."""
    cluster: Cluster
    hours: float
    """From the start of the command to its end."""
    serial_hours: float
    """Hours of these for listing and publishing, which one process does and no cluster shortens."""
    startup_hours: float
    images_per_s: float
    """Images per second of the stream, between start-up and publishing."""
    stages: tuple[Stage, ...]
    """In the order in which an image passes them."""
    bottleneck: str
    """Name of the stage that limits the stream."""
    memory: Memory
    cost: Cost | None
    """None: no prices were given."""
    rates: RatesFile


def plan_cluster(
    *,
    images: int,
    hours: float | None = None,
    gpus: int | None = None,
    cpus: int | None = None,
    cpus_per_gpu: int = CPUS_PER_GPU,
    megapixels: float | None = None,
    image_bytes: int | None = None,
    known_captions: float = 0.0,
    price_gpu: float | None = None,
    price_cpu: float | None = None,
    rates: Uri | None = None,
) -> Plan:
    """Plan the smallest cluster that meets a deadline of `hours`, or how long a cluster of `gpus` and `cpus` takes.

    `megapixels`: None: the size that the rates were measured at. `image_bytes`: None: JPEG of this size. `rates`: a
    local JSON file; None: the rates of this release. Raises `UsageError` for options that contradict each other or are
    out of range, and for a deadline that no cluster meets.
    """
    if (hours is None) == (gpus is None and cpus is None) or (gpus is None) != (cpus is None):
        raise UsageError("give either --hours, for a cluster, or --gpus and --cpus, for the hours")
    if (price_gpu is None) != (price_cpu is None):
        raise UsageError("give both --price-gpu and --price-cpu: a plan may have CPUs on nodes without GPUs")
    file = rate_files.load(rates)
    size = file.rates.prepare_megapixels if megapixels is None else megapixels
    check_positive("--megapixels", size, MAX_MEGAPIXELS)
    workload = Workload(
        images=images,
        megapixels=size,
        image_bytes=max(1, round(1e6 * size * JPEG_BYTES_PER_PX)) if image_bytes is None else image_bytes,
        known_captions=known_captions,
    )
    prices = None if price_gpu is None or price_cpu is None else Prices(gpu=price_gpu, cpu=price_cpu)
    if gpus is not None and cpus is not None:
        cluster = Cluster(gpus=gpus, cpus=cpus, cpus_per_gpu=cpus_per_gpu)
    else:
        assert hours is not None
        cluster = smallest_cluster(workload, hours, cpus_per_gpu, file.rates)
    return forecast(workload, cluster, file, deadline_hours=hours, prices=prices)


def smallest_cluster(workload: Workload, hours: float, cpus_per_gpu: int, rates: Rates) -> Cluster:
    """The fewest GPUs that caption and score within `hours`; then the fewest CPUs, at least those of the GPUs' nodes.

    Raises `ConfigError` if no cluster of at most `MAX_UNITS` GPUs and CPUs does.
    """
    check_positive("--hours", hours, MAX_HOURS)
    check_positive("--cpus-per-gpu", cpus_per_gpu, MAX_UNITS)
    fixed_hours = (rates.startup_seconds + workload.images / rates.serial_images_per_s) / 3600.0
    if fixed_hours >= hours:
        raise ConfigError(
            f"--hours {hours:g}: starting, listing and publishing take {fixed_hours:.3g} hours on any cluster: raise "
            "--hours, or split the source into portions with an output each"
        )
    needed = workload.images / (3600.0 * (hours - fixed_hours)) * (1.0 - ROUNDING)

    def of(gpus: int, cpus: int) -> Cluster:
        return Cluster(gpus=gpus, cpus=cpus, cpus_per_gpu=cpus_per_gpu)

    def gpus_suffice(gpus: int) -> bool:
        return _capacities(workload, of(gpus, gpus * cpus_per_gpu), rates)["GPU"] >= needed

    def cpus_suffice(cpus: int) -> bool:
        return min(_capacities(workload, of(gpus, cpus), rates).values()) >= needed

    gpus = _smallest("GPUs", 1, MAX_UNITS // cpus_per_gpu, gpus_suffice)
    return of(gpus, _smallest("CPUs", gpus * cpus_per_gpu, MAX_UNITS, cpus_suffice))


def forecast(
    workload: Workload,
    cluster: Cluster,
    file: RatesFile,
    *,
    deadline_hours: float | None = None,
    prices: Prices | None = None,
) -> Plan:
    """How long the images take on a cluster, which stage limits it, and how busy the others are."""
    capacities, units = _capacities(workload, cluster, file.rates), _units(cluster)
    images_per_s = min(capacities.values())
    stages = tuple(
        Stage(
            name=name,
            unit=unit,
            units=units[unit],
            images_per_s=1.0 / seconds,
            busy=images_per_s * seconds / (units[unit] * file.rates.efficiency),
            slack=capacities[unit] / images_per_s - 1.0,
        )
        for name, unit, seconds in _stage_seconds(workload, file.rates)
    )
    serial_hours = workload.images / file.rates.serial_images_per_s / 3600.0
    startup_hours = file.rates.startup_seconds / 3600.0
    hours = startup_hours + serial_hours + workload.images / images_per_s / 3600.0
    limiting = (stage for stage in stages if capacities[stage.unit] == images_per_s)
    return Plan(
        workload=workload,
        deadline_hours=deadline_hours,
        cluster=cluster,
        hours=hours,
        serial_hours=serial_hours,
        startup_hours=startup_hours,
        images_per_s=images_per_s,
        stages=stages,
        bottleneck=max(limiting, key=lambda stage: stage.busy).name,
        memory=_memory(cluster, file.rates),
        cost=None if prices is None else _cost(workload, cluster, hours, prices),
        rates=file,
    )


def _stage_seconds(workload: Workload, rates: Rates) -> list[tuple[str, str, float]]:
    """Name of each stage, its unit, and seconds of one unit per image of the run."""
    captioning = rates.caption_seconds() * (1.0 - workload.known_captions)
    return [
        ("fetching", "CPU", rates.fetch_seconds(workload.image_bytes)),
        ("decoding", "CPU", rates.prepare_seconds(workload.megapixels)),
        *([("captioning", "GPU", captioning)] if captioning > 0.0 else []),
        ("scoring", "GPU", 1.0 / rates.score_images_per_s),
        ("writing", "writing task", 1.0 / rates.write_images_per_s),
    ]


def _units(cluster: Cluster) -> dict[str, float]:
    """Units of each kind. CPUs are those that actors do not hold: tasks use them."""
    parts = cluster.shares()
    held = parts.actors * parts.actor_cpus
    return {"CPU": cluster.cpus - held, "GPU": float(cluster.gpus), "writing task": float(parts.writers)}


def _capacities(workload: Workload, cluster: Cluster, rates: Rates) -> dict[str, float]:
    """Images per second that the units of each kind can do."""
    seconds: dict[str, float] = {}
    for _, unit, cost in _stage_seconds(workload, rates):
        seconds[unit] = seconds.get(unit, 0.0) + cost
    return {unit: number * rates.efficiency / seconds[unit] for unit, number in _units(cluster).items()}


def _memory(cluster: Cluster, rates: Rates) -> Memory:
    parts = cluster.shares()
    tasks = max(1, int(_units(cluster)["CPU"] / parts.task_cpus + ROUNDING))
    block = rows_per_block(rates.store_image_bytes) * rates.store_image_bytes
    actor_store = 2 * BLOCKS_PER_ACTOR * block  # blocks that come and blocks that go
    task_store = tasks * BLOCKS_PER_TASK * block
    of_actors = parts.actors * (rates.actor_bytes + actor_store)
    of_tasks = (tasks + parts.writers) * rates.task_bytes + task_store
    return Memory(
        total=round(of_actors + of_tasks),
        object_store=round(parts.actors * actor_store + task_store),
        per_gpu=round(of_actors / cluster.gpus),
        per_cpu=round(of_tasks / cluster.cpus),
    )


def _cost(workload: Workload, cluster: Cluster, hours: float, prices: Prices) -> Cost:
    total = hours * (cluster.gpus * prices.gpu + (cluster.cpus - cluster.gpu_node_cpus) * prices.cpu)
    return Cost(total=total, per_million=total / workload.images * 1e6)


def _smallest(what: str, low: int, high: int, suffices: Callable[[int], bool]) -> int:
    """The smallest number from `low` to `high` that suffices, as all larger ones do. Raises `ConfigError` if none."""
    if low > high or not suffices(high):
        raise ConfigError(f"the plan needs more than {high:,} {what}: raise --hours")
    return bisect.bisect_left(range(high + 1), True, lo=low, key=suffices)
