"""The steps of a training under Ray Train: how many processes, on what, and what they are told."""

import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError as RayTrainError

from jobs.cluster import resources
from jobs.cluster.resources import Shares
from jobs.experiments.inputs import Facts
from jobs.experiments.paths import FITTED, SPLIT
from jobs.experiments.request import TrainRequest
from jobs.pipeline import progress
from jobs.storage import errors, filesystems, uris
from jobs.storage.redaction import without_secrets
from jobs.training import worker
from jobs.training.checkpoints import settings_digest
from jobs.training.examples import Examples
from jobs.training.worker import WorkerConfig
from nsnet.config import to_dict
from nsnet.errors import NsnetError
from nsnet.preparation import PreparationConfig

if TYPE_CHECKING:
    from nsnet.recipes import Recipe

RESTARTS: Final = 8
"""How often a training goes on after a worker died, for reasons other than a node that was told to leave."""


class TrainingFailedError(NsnetError):
    """Training ended without a detector."""


def run_trainer(
    request: TrainRequest, recipe: "Recipe", facts: Facts, examples: Examples, settings: dict[str, Any]
) -> Path:
    """Train under Ray Train; returns a local folder with the last checkpoint."""
    resources.connect(request.address)
    shares = resources.cluster_shares()
    told, cpus = _worker_config(request, recipe, facts, settings_digest(settings), shares)
    board_name = f"nsnet-train-{uuid.uuid4().hex[:8]}"
    board = progress.start_board(board_name)
    gpus = {"GPU": 1.0} if shares.actor_gpus > 0 else {}
    low, high = request.workers
    system, path = filesystems.arrow_filesystem(request.work)
    trainer = TorchTrainer(
        cast(Any, worker.run),
        train_loop_config=vars(replace(told, board=board_name)),
        scaling_config=ScalingConfig(
            num_workers=cast(Any, high if low == high else (low, high)), use_gpu=bool(gpus),
            resources_per_worker={"CPU": cpus, **gpus},
        ),
        run_config=RunConfig(
            name="checkpoints", storage_path=path, storage_filesystem=system,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=RESTARTS),
        ),
    )  # fmt: skip
    total = recipe.training.epochs * len(examples.rows("train"))
    with progress.watch(board, "train", total, ("trained",)):
        try:
            result = cast(Any, trainer.fit())  # Ray's types are those of its older version
        except RayTrainError as error:
            raise TrainingFailedError(f"training failed: {_first_cause(error)}") from error
    if result.error is not None:
        raise TrainingFailedError(f"training failed: {_first_cause(result.error)}")
    if result.return_value is not None:
        raise TrainingFailedError(f"training stopped: {result.return_value}")
    if result.checkpoint is None or worker.FINISHED not in (result.metrics or {}):
        raise TrainingFailedError("training ended without its last checkpoint; the same command goes on")
    return Path(result.checkpoint.to_directory(tempfile.mkdtemp(prefix="nsnet-trained-")))


def _first_cause(error: BaseException) -> str:
    """What a person can act on, of an error that Ray has wrapped."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = errors.root_cause(next(iter(failures.values()), error))
    if (line := errors.explain(cause)) is not None:
        return line
    return without_secrets(" ".join(str(cause).split()))[-600:]


def _worker_config(
    request: TrainRequest, recipe: "Recipe", facts: Facts, digest: str, shares: Shares
) -> tuple[WorkerConfig, float]:
    """What workers are told, and the CPUs that each holds."""
    cpus, _ = resources.training_cpus(shares, request.workers[1])
    preparation = PreparationConfig(patches=recipe.detector.patches, limits=request.limits)
    captions = facts.place if recipe.detector.projection.needs_captions else None
    fitted = uris.join(request.work, FITTED)
    told = WorkerConfig(
        detector=to_dict(recipe.detector), training=to_dict(recipe.training), preparation=to_dict(preparation),
        seed=request.seed, source=request.source, clip_weights=request.clip_weights, work=request.work,
        split=uris.join(request.work, SPLIT), captions=captions, features_id=facts.maker,
        fitted=fitted if recipe.detector.projection.kind in ("global", "rank_k") else None,
        digest=digest, failed_share=request.max_failed, task_cpus=shares.task_cpus, board=None,
    )  # fmt: skip
    return told, cpus
