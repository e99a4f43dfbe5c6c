"""The stream of images through Ray Data: manifest → decoding tasks → captioning actors → further actors → Parquet."""

import uuid
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from jobs.cluster import resources
from jobs.cluster.resources import Shares, cluster_shares
from jobs.dataset import schema
from jobs.pipeline import progress
from jobs.pipeline.actors import Caption
from jobs.pipeline.datasource import ParquetFiles
from jobs.pipeline.models import Models
from jobs.pipeline.poison import Remembered
from jobs.pipeline.preparing import Prepare
from jobs.pipeline.rows import ROWS_PER_BLOCK, Progress
from jobs.storage import errors, filesystems, listing
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.uris import Uri
from nsnet.captions import CaptionerConfig
from nsnet.errors import NsnetError, StorageError
from nsnet.preparation import PreparationConfig


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A pipeline under construction: its dataset, and what its stages share."""

    dataset: Dataset
    shares: Shares
    models: Models
    batch_size: int
    """Images per model call."""
    report: Progress
    board: Any
    """The progress board; it lives as long as somebody holds it."""

    def captioned(self, captioner: CaptionerConfig, keep: pa.Schema) -> "Stream":
        """Append the captioning actors, which drop the thumbnails and keep these columns."""
        return self.through(
            Caption, self.shares.captioners, self.models, captioner, keep, self.batch_size, self.report
        )  # fmt: skip

    def through(self, actor: Any, actors: int, *arguments: Any) -> "Stream":
        """Append a stage of actors, which take blocks as Arrow tables."""
        dataset = self.dataset.map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_format="pyarrow",
            batch_size=max(ROWS_PER_BLOCK, self.batch_size),  # Ray wants a number where there are GPUs
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=self.shares.actor_cpus,
            num_gpus=self.shares.actor_gpus,
        )
        return replace(self, dataset=dataset)

    def write(
        self, folder: str, title: str, total: int, stages: tuple[str, ...], rows_per_file: int | None = None
    ) -> None:
        """Run the pipeline into Parquet files, showing its progress.

        Raises `OutageError`, what an actor raises on purpose, and `StorageError` for what Ray cannot mend.
        """
        system, path = filesystems.arrow_filesystem(folder)
        with progress.watch(self.board, title, total, stages):
            try:
                self.dataset.write_parquet(
                    path,
                    filesystem=system,
                    min_rows_per_file=rows_per_file,
                    concurrency=self.shares.writers,
                    ray_remote_args={"num_cpus": self.shares.light_task_cpus},
                )
            except (NsnetError, RayError, ExecutionTimeoutError, SystemException) as error:
                raise _of_stream(error, folder) from None


def _of_stream(error: Exception, folder: str) -> Exception:
    """What ended a stream, as a command's error in one line; a bug of a stage is left as it is, with its traceback."""
    cause = errors.root_cause(error)
    if isinstance(cause, NsnetError):
        return type(cause)(errors.own_words(cause))  # Ray's copy of it carries a remote traceback
    if (line := errors.explain(cause)) is not None:
        named = not isinstance(cause, OSError) or errors.file_of(cause)
        return StorageError(line if named else f"writing below {folder}: {line}")
    return error


def prepared(
    todo: str,
    source: Uri,
    preparation: PreparationConfig,
    models: Models,
    *,
    keep: pa.Schema,
    batch_size: int,
    checkpoint: str | None = None,
    outage_seconds: float = OUTAGE_SECONDS,
    remembered: Remembered | None = None,
) -> Stream:
    """The pipeline up to prepared images, over a folder of work that `attempts.write_todo` made from a manifest.

    `keep`: columns after it, pixels aside. `checkpoint`: folder of Ray Data's job checkpoint. `remembered`: what need
    not be decoded to know how it ends.
    """
    shares = cluster_shares()
    on_gpu = shares.actor_gpus > 0
    models = replace(models, device="cuda" if on_gpu else "cpu", threads=shares.threads)
    board_name = f"nsnet-{uuid.uuid4().hex[:8]}"
    board = progress.start_board(board_name, shares.cpus, preparation.limits.max_seconds)
    report = Progress(board_name=board_name)
    files = sorted(entry.uri for entry in listing.list_files(todo))
    # Reading takes as much CPU as preparing so that Ray puts both into one task, a file each. A repartition in between
    # would hold a whole CPU as long as the run lasts, which small nodes do not have.
    images = ray.data.read_datasource(
        ParquetFiles(files, schema.TODO), num_cpus=shares.task_cpus, override_num_blocks=len(files)
    )
    if checkpoint is not None:  # on this dataset alone, not in the process's settings: a training has others after it
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
        batch_size=None,  # a whole file; with a number Ray would not put reading and preparing together
        zero_copy_batch=True,
        compute=TaskPoolStrategy(),
        num_cpus=shares.task_cpus,
    )
    return Stream(dataset=dataset, shares=shares, models=models, batch_size=batch_size, report=report, board=board)


def with_pixels(columns: pa.Schema, preparation: PreparationConfig) -> pa.Schema:
    """A schema of light columns, and of the pixels that this preparation makes."""
    made = {"mosaic": preparation.patches is not None, "thumbnail": preparation.thumbnail_px > 0}
    return pa.schema([*columns, *(pa.field(name, pa.binary()) for name, wanted in made.items() if wanted)])


SCORING_COLUMNS = pa.schema(
    [*schema.SOURCE, *schema.IMAGE, *schema.CAPTION, *schema.OUTCOME, *schema.LABELS, schema.TRANSFORM]
)
"""What a row carries to scoring, pixels aside."""
