"""The Ray Data pipeline of images: manifest → decoding tasks → model actors → Parquet."""

import uuid
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from jobs.cluster import resources
from jobs.cluster.resources import cluster_shares
from jobs.cluster.shares import BLOCKS_PER_ACTOR, Shares, rows_per_block
from jobs.dataset import schema
from jobs.pipeline import progress
from jobs.pipeline.actors import MakeStage, ModelActor, stage_name
from jobs.pipeline.bottleneck import WAITING, WAITING_FOR_MODELS
from jobs.pipeline.datasource import ParquetFiles
from jobs.pipeline.models import Models
from jobs.pipeline.pixels import pixel_bytes, with_pixels
from jobs.pipeline.poison import Remembered
from jobs.pipeline.pools import Pools, kept
from jobs.pipeline.preparing import Prepare
from jobs.pipeline.rows import ProgressReporter
from jobs.storage import errors, filesystems, listing
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.uris import Uri
from nsnet.configuration import resolved
from nsnet.errors import NsnetError, StorageError
from nsnet.preparation import PreparationConfig

CPU_BATCH: Final = 32
GPU_BATCH: Final = 128
"""Images per model call, if the user does not choose."""
BOARD_SECONDS: Final = 5.0
"""Timeout of a question to the progress board."""
COMPILED_FROM: Final = 500_000
"""Images per actor from which compiling the towers takes less time than it saves: an estimate, not measured."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A pipeline under construction: its dataset, and the settings that its stages share."""

    dataset: Dataset
    shares: Shares
    models: Models
    batch_size: int
    """Images per model call."""
    block_rows: int
    """Most images per block."""
    report: ProgressReporter
    board: Any
    """Handle of the progress board, which keeps it alive."""
    pools: Pools | None = None
    """Sizes of the pools of model actors."""

    def arithmetic(self) -> dict[str, Any]:
        """What the results depend on in their last digits, for the record."""
        device = self.models.device
        precision = resolved(self.models.precision, device)
        return {"device": device, "precision": precision, "batch_size": self.batch_size}

    def through(self, *stages: MakeStage, separate: bool = False) -> "Stream":
        """Append a pool of model actors, each with all of these stages; `separate`: a pool for each stage."""
        makers = [[stage] for stage in stages] if separate else [stages]
        pools = Pools(
            stages=tuple("+".join(stage_name(stage) for stage in of_pool) for of_pool in makers),
            shares=self.shares,
            spent=lambda: ray.get(self.board.spent.remote(), timeout=BOARD_SECONDS),
        )
        most = resources.most_places(self.shares)
        dataset = self.dataset
        for number, (of_pool, size) in enumerate(zip(makers, pools.sizes, strict=True)):
            dataset = dataset.map_batches(
                ModelActor,
                fn_constructor_args=(self.report, WAITING if number == 0 else WAITING_FOR_MODELS, *of_pool),
                batch_format="pyarrow",
                batch_size=max(self.block_rows, self.batch_size),  # Ray requires a number with GPUs
                zero_copy_batch=True,
                compute=ActorPoolStrategy(
                    min_size=1, max_size=max(size, most), initial_size=size,
                    max_tasks_in_flight_per_actor=BLOCKS_PER_ACTOR,
                ),
                num_cpus=self.shares.actor_cpus,
                num_gpus=self.shares.actor_gpus,
            )  # fmt: skip
        return replace(self, dataset=dataset, pools=pools)

    def write(
        self, folder: str, title: str, total: int, stages: tuple[str, ...], rows_per_file: int | None = None
    ) -> None:
        """Run the pipeline into Parquet files and show its progress.

        Raises `OutageError`, other `NsnetError`s of stages, and `StorageError` for failures that retries do not fix.
        """
        system, path = filesystems.arrow_filesystem(folder)
        with progress.watch(self.board, title, total, stages), kept(self.pools, title):
            try:
                self.dataset.write_parquet(
                    path,
                    filesystem=system,
                    min_rows_per_file=rows_per_file,
                    concurrency=self.shares.writers,
                    ray_remote_args={"num_cpus": self.shares.light_task_cpus},
                )
            except (NsnetError, RayError, ExecutionTimeoutError, SystemException) as error:
                raise _stream_error(error, folder) from None


def _stream_error(error: Exception, folder: str) -> Exception:
    """The error that ended a stream, in one line for the user; a stage's bug is returned with its traceback."""
    cause = errors.root_cause(error)
    if isinstance(cause, NsnetError):
        return type(cause)(errors.own_words(cause))  # Ray's copy contains a remote traceback
    if (line := errors.explain(cause)) is not None:
        names_file = not isinstance(cause, OSError) or errors.file_of(cause)
        return StorageError(line if names_file else f"writing below {folder}: {line}")
    return error


def prepared(
    todo: str,
    source: Uri,
    preparation: PreparationConfig,
    models: Models,
    *,
    keep: pa.Schema,
    images_todo: int,
    batch_size: int | None,
    checkpoint: str | None = None,
    outage_seconds: float = OUTAGE_SECONDS,
    remembered: Remembered | None = None,
) -> Stream:
    """The pipeline up to prepared images, over a folder `todo` that `attempts.write_todo` made from a manifest.

    `keep`: columns of the result besides pixels. `images_todo`: number of images. `batch_size`: images per model call;
    None: `GPU_BATCH` on GPUs, else `CPU_BATCH`. `checkpoint`: folder of Ray Data's job checkpoint. `remembered`:
    failures of earlier runs, which are not decoded again.
    """
    shares = cluster_shares()
    on_gpu = shares.actor_gpus > 0
    models = replace(
        models,
        device="cuda" if on_gpu else "cpu",
        threads=shares.threads,
        compiled=on_gpu and images_todo >= COMPILED_FROM * shares.actors,
    )
    board_name = f"nsnet-{uuid.uuid4().hex[:8]}"
    board = progress.start_board(board_name, shares.cpus, preparation.limits.max_seconds)
    report = ProgressReporter(board_name=board_name)
    files = sorted(entry.uri for entry in listing.list_files(todo))
    # Reading requests as much CPU as preparing so that Ray fuses both into one task per file. A repartition in between
    # would occupy a whole CPU for the whole run, which small nodes cannot spare.
    images = ray.data.read_datasource(
        ParquetFiles(files, schema.TODO), num_cpus=shares.task_cpus, override_num_blocks=len(files)
    )
    image_bytes = pixel_bytes(preparation)
    block_rows = rows_per_block(image_bytes)
    if image_bytes:  # full tables of `Prepare` are one block each: Ray would join and cut others, and copy their pixels
        images.context.target_max_block_size = block_rows * image_bytes
    if checkpoint is not None:  # for this dataset only, not for the process: a training creates more datasets
        images.context.checkpoint_config = resources.job_checkpoint(checkpoint)
    dataset = images.map_batches(
        Prepare(
            config=preparation,
            schema=with_pixels(keep, preparation),
            report=report,
            source=source,
            outage_seconds=outage_seconds,
            remembered=remembered or {},
        ).in_blocks,
        batch_format="pyarrow",
        batch_size=None,  # a whole file; with a number Ray would not fuse reading and preparing
        zero_copy_batch=True,
        compute=TaskPoolStrategy(),
        num_cpus=shares.task_cpus,
    )
    return Stream(
        dataset=dataset,
        shares=shares,
        models=models,
        batch_size=batch_size or (GPU_BATCH if on_gpu else CPU_BATCH),
        block_rows=block_rows,
        report=report,
        board=board,
    )


SCORING_COLUMNS = pa.schema(
    [
        *schema.SOURCE,
        *schema.IMAGE,
        *schema.PROVENANCE,
        *schema.CAPTION,
        *schema.OUTCOME,
        schema.WANTED,
        *schema.LABELS,
        schema.TRANSFORM,
    ]
)
"""Columns of a row before scoring, besides pixels."""
