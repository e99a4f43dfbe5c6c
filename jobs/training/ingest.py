"""Stream training images from their bucket with Ray Data: fetched, decoded, augmented, cut to mosaics, in order.

Dimensions: n examples, G images of a step over all processes, B of this one, M mosaic side.

Each training process runs its own Ray Data pipeline over its part of each step, because its images must be a function
of (seed, epoch, step) alone. Ray's `streaming_split` gives blocks to the first process that asks, and with `equal=True`
drops rows that do not divide evenly. The order is checked on arrival.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy

from jobs.dataset import schema
from jobs.pipeline.pixels import MOSAIC
from jobs.pipeline.preparing import Prepare
from jobs.pipeline.rows import ProgressReporter
from jobs.storage.uris import Uri
from jobs.training.examples import Examples
from jobs.training.order import Order, image_seed
from nsnet import transforms
from nsnet.patches import SCORING_SEED
from nsnet.preparation import PreparationConfig
from nsnet.splits import Indices
from nsnet.transforms import AugmentationConfig

IMAGES_PER_TASK: Final = 64
"""The overhead of a task is about 25 ms, as much as four images."""
STEPS_AHEAD: Final = 4
"""Batches that are prefetched from Ray's object store."""

ROW: Final = pa.field("row", pa.int64())
ARRIVED: Final = pa.schema([ROW, schema.VERDICTS.field("image_id"), *schema.OUTCOME])
FETCHED: Final = (
    "image_id", "uri", "etag", "size_bytes", "container", "position", "column", "listed", "expected_hash"
)  # fmt: skip
"""Columns of a split that fetching an image needs."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """This process's images of one step."""

    rows: Indices
    """(B,) row numbers of the examples."""
    valid: npt.NDArray[np.bool_]
    """(B,) False: padding, or an image that failed."""
    mosaics: npt.NDArray[np.uint8]
    """(B, M, M, 3) uint8."""
    failed: list[dict[str, Any]]
    """Images that could not be fetched or decoded, with `image_id` and `error_*`."""


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """Streams of prepared images for one training process."""

    examples: Examples
    preparation: PreparationConfig
    source: Uri
    """URI of the source."""
    seed: int
    augmentation: AugmentationConfig
    task_cpus: float
    """CPUs of a decoding task."""
    cpus: float
    """CPUs of the cluster that this process's decoding may use."""
    memory_bytes: int
    """Memory of Ray's object store that this process's decoding may use."""

    def stream(self, order: Order, first: int, last: int) -> Iterator[Arrival]:
        """Yield the steps from `first` up to, not including, `last`.

        Images of a shuffled order are augmented; others are prepared as for scoring.

        Raises `RuntimeError` if other images arrive than the order demands.
        """
        places = ray.put(self.examples.table.select(FETCHED))
        prepare = Prepare(
            config=self.preparation,
            schema=pa.schema([*ARRIVED, pa.field(MOSAIC, pa.binary())]),
            report=ProgressReporter(),
            source=self.source,
        )
        task = _Task(
            places=[places], order=order, prepare=prepare,
            augmentation=self.augmentation if order.shuffled else AugmentationConfig(),
        )  # fmt: skip
        share = -(-order.batch_size // order.world_size)
        chunk = max(1, IMAGES_PER_TASK // share)
        starts = [pa.table({"first": [s], "last": [min(s + chunk, last)]}) for s in range(first, last, chunk)]
        if not starts:
            return
        dataset = ray.data.from_arrow(starts).map_batches(
            task.run, batch_format="pyarrow", batch_size=None, compute=TaskPoolStrategy(), num_cpus=self.task_cpus
        )  # fmt: skip
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources(cpu=self.cpus, object_store_memory=self.memory_bytes)
        dataset.context.execution_no_progress_timeout_s = -1  # validation, or a slow device, may pause it for long
        side = self._side()
        arrived = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=STEPS_AHEAD))
        rest: pa.Table | None = None
        for step in range(first, last):
            rows, valid = order.part(step)
            while rest is None or rest.num_rows < len(rows):
                more = next(arrived, None)
                if more is None:
                    raise RuntimeError(f"the image stream ended before step {step + 1}")
                rest = more if rest is None else pa.concat_tables([rest, more])
            table, rest = rest.slice(0, len(rows)), rest.slice(len(rows))
            if table.column("row").to_pylist() != rows.tolist():
                raise RuntimeError(f"step {step + 1} received other images than its order demands")
            yield _arrival(table, rows, valid, side)

    def _side(self) -> int:
        (geometry,) = self.preparation.mosaics
        return geometry.mosaic_px


def _arrival(table: pa.Table, rows: Indices, valid: npt.NDArray[np.bool_], side: int) -> Arrival:
    column = table.column(MOSAIC)
    mosaics = np.stack([np.frombuffer(value.as_buffer(), np.uint8).reshape(side, side, 3) for value in column])
    outcome = table.drop_columns([MOSAIC, "row"]).to_pylist()
    failed = [row for row, counts in zip(outcome, valid, strict=True) if counts and row["status"] == "failed"]
    good = np.array([row["status"] != "failed" for row in outcome])
    return Arrival(rows=rows, valid=valid & good, mosaics=mosaics, failed=failed)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A decoding task: prepares one process's images of a range of steps."""

    places: list[Any]
    """Reference to the table of `FETCHED` columns; in a list, so that Ray does not resolve it."""
    order: Order
    prepare: Prepare
    augmentation: AugmentationConfig

    def run(self, steps: pa.Table) -> Iterator[pa.Table]:
        """Yield each step's rows, in order."""
        places: pa.Table = ray.get(self.places[0])
        for first, last in zip(steps["first"].to_pylist(), steps["last"].to_pylist(), strict=True):
            for step in range(first, last):
                rows, _ = self.order.part(step)
                wanted = places.take(rows).append_column("row", pa.array(rows))
                yield self._with_pixels(wanted, self.order.epoch(step))

    def _with_pixels(self, wanted: pa.Table, epoch: int) -> pa.Table:
        ids = wanted.column("image_id").to_pylist()
        seeds = [SCORING_SEED] * len(ids)
        chains: list[str | None] = [None] * len(ids)
        if self.order.shuffled:
            seeds = [image_seed(self.order.seed, epoch, image_id) for image_id in ids]
            chains = [transforms.to_text(transforms.draw(self.augmentation, seed)) for seed in seeds]
        wanted = wanted.append_column("transform", pa.array(chains, pa.string()))
        wanted = wanted.append_column("slot_seed", pa.array(seeds, pa.int64()))
        return pa.concat_tables(self.prepare.in_blocks(wanted))
