"""Run a training under Ray Train: number of processes, resources, and worker configuration."""

import tempfile
import uuid
from pathlib import Path
from typing import Any, Final, cast

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError as RayTrainError

from jobs.cluster import resources
from jobs.cluster.shares import Shares, training_cpus
from jobs.experiments.experiment import Experiment
from jobs.experiments.paths import FITTED_FILE, SPLIT_FILE
from jobs.pipeline import progress
from jobs.storage import errors, filesystems
from jobs.storage.redaction import without_secrets
from jobs.training import worker
from jobs.training.checkpoints import settings_digest
from jobs.training.config import WorkerConfig
from jobs.training.examples import Examples
from jobs.training.loop import FINISHED
from nsnet.config import to_dict
from nsnet.errors import NsnetError
from nsnet.preparation import PreparationConfig

RESTARTS: Final = 8
"""Maximum number of restarts after a worker died; restarts after a drained node do not count."""


class TrainingFailedError(NsnetError):
    """Training ended without a detector."""


def run_trainer(experiment: Experiment, examples: Examples) -> Path:
    """Train under Ray Train; returns a local folder with the last checkpoint."""
    request = experiment.request
    resources.connect(request.address)
    shares = resources.cluster_shares()
    cpus, _ = training_cpus(shares, request.workers[1])
    board_name = f"nsnet-train-{uuid.uuid4().hex[:8]}"
    board = progress.start_board(board_name)
    gpus = {"GPU": 1.0} if shares.actor_gpus > 0 else {}
    low, high = request.workers
    system, path = filesystems.arrow_filesystem(request.work)
    trainer = TorchTrainer(
        cast(Any, worker.run),
        train_loop_config=vars(_worker_config(experiment, shares, board_name)),
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
    total = experiment.recipe.training.epochs * len(examples.rows("train"))
    with progress.watch(board, "train", total, ("trained",)):
        try:
            result = cast(Any, trainer.fit())  # Ray's type hints are those of its older version
        except RayTrainError as error:
            raise TrainingFailedError(f"training failed: {_first_cause(error)}") from error
    if result.error is not None:
        raise TrainingFailedError(f"training failed: {_first_cause(result.error)}")
    if result.return_value is not None:
        raise TrainingFailedError(f"training stopped: {result.return_value}")
    if result.checkpoint is None or FINISHED not in (result.metrics or {}):
        raise TrainingFailedError("training ended without its last checkpoint; run the same command again")
    return Path(result.checkpoint.to_directory(tempfile.mkdtemp(prefix="nsnet-trained-")))


def _first_cause(error: BaseException) -> str:
    """The root cause of an error that Ray has wrapped, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = errors.root_cause(next(iter(failures.values()), error))
    if (line := errors.explain(cause)) is not None:
        return line
    return without_secrets(" ".join(str(cause).split()))[-600:]


def _worker_config(experiment: Experiment, shares: Shares, board: str) -> WorkerConfig:
    request, detector = experiment.request, experiment.recipe.detector
    preparation = PreparationConfig(patches=(detector.patches,), limits=request.limits)
    return WorkerConfig(
        detector=to_dict(detector), training=to_dict(experiment.recipe.training), preparation=to_dict(preparation),
        seed=request.seed, source=request.source, clip_weights=request.clip_weights,
        text_weights=request.text_weights, weights=request.weights, work=request.work,
        split=experiment.file(SPLIT_FILE),
        captions=experiment.facts.place if detector.projection.needs_captions else None,
        features_id=experiment.facts.maker,
        fitted=experiment.file(FITTED_FILE) if detector.projection.kind in ("global", "rank_k") else None,
        digest=settings_digest(experiment.settings), failed_share=request.max_failed, task_cpus=shares.task_cpus,
        board=board, leakage=request.leakage,
    )  # fmt: skip
