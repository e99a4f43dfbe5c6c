"""What a training process runs under Ray Train: steps, validation, checkpoints, and at the end the test.

Dimensions: n pictures of a split, B images of this process in a step.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from torch import Tensor

from jobs.cluster import resources
from jobs.storage import uris, writing
from jobs.training import checkpoints, examples
from jobs.training.checkpoints import LOGITS, ROWS, Progress, load_fitted
from jobs.training.collectives import gather, mean_over_processes
from jobs.training.examples import Examples
from jobs.training.ingest import Arrival, Ingest
from jobs.training.order import Order
from jobs.training.tracking import Records
from nsnet.config import from_dict
from nsnet.detector import Detector, DetectorConfig
from nsnet.losses import Losses
from nsnet.metrics import average_precision
from nsnet.network import Network
from nsnet.preparation import PreparationConfig
from nsnet.training import (
    Batch,
    TrainingConfig,
    build_optimizer,
    set_learning_rate,
    training_step,
    use_activation_checkpointing,
)

FINISHED: Final = "finished"
"""Key of what is reported with the last checkpoint."""
COLLAPSED: Final = 0.05
"""Mean residual energy ‖ũ‖/‖u‖ below which the projection has removed nearly everything."""
LOGGED: Final = ("loss", "contrastive", "bce", "alignment", "residual_energy")
"""What is known of a step, in this order."""
TOLD_SECONDS: Final = 1.0
"""Least time between two tellings of the progress."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything a worker is told; travels as JSON-ready values."""

    detector: dict[str, Any]
    training: dict[str, Any]
    preparation: dict[str, Any]
    seed: int
    source: str
    clip_weights: str | None
    work: str
    """URI of the training's own place."""
    split: str
    """URI of the stored split."""
    captions: str | None
    """URI of published captions; None: the detector needs none."""
    features_id: str
    """Whose captions and features."""
    fitted: str | None
    """URI of what was computed from all captions: basis or bank."""
    digest: str
    """Of the settings."""
    failed_share: float
    """Share of an epoch's pictures that may fail."""
    task_cpus: float
    """CPUs of a decoding task."""
    board: str | None
    """Name of the progress board."""


def run(values: dict[str, Any]) -> str | None:
    """The training function of every worker; returns why training cannot go on, None where it came to its end.

    All processes return it together. An exception is for what may concern one alone, and is tried again; of a report
    without a checkpoint Ray Train keeps nothing.
    """
    resources.configure_data()
    told = WorkerConfig(**values)
    context = ray.train.get_context()
    with torch.random.fork_rng():
        return _Training(told, context.get_world_rank(), context.get_world_size()).run()


class _Stop(Exception):
    """Training cannot go on, on any process; it would end the same way again."""


class _Training:
    """One process's part of a training."""

    def __init__(self, told: WorkerConfig, rank: int, world_size: int) -> None:
        self.told, self.rank, self.world_size = told, rank, world_size
        self.config = from_dict(DetectorConfig, told.detector)
        self.training = from_dict(TrainingConfig, told.training)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.gather = gather()
        self.examples = _load_examples(told)
        self.network = _build(told, self.config, self.training).to(self.device)
        self.optimizer = build_optimizer(self.network, self.training)
        self.progress = self._restored()
        self.model = ray.train.torch.prepare_model(self.network, parallel_strategy_kwargs={"broadcast_buffers": False})
        self.order = self._order("train", shuffled=True)
        self.steps = self.order.steps_per_epoch
        self.told_at, self.untold = 0.0, 0

    @cached_property
    def ingest(self) -> Ingest:
        """Streams of this process's pictures."""
        told, count = self.told, self.world_size
        # of the cluster as it is now: nodes come and go between one start and the next
        _, decoding = resources.training_cpus(resources.cluster_shares(), count)
        return Ingest(
            examples=self.examples,
            preparation=from_dict(PreparationConfig, told.preparation),
            source=told.source,
            seed=told.seed,
            augmentation=self.training.augmentation,
            task_cpus=told.task_cpus,
            cpus=decoding / count,
            memory_bytes=resources.streaming_bytes() // count,
        )

    def _order(self, split: str, *, shuffled: bool) -> Order:
        return Order(
            rows=self.examples.rows(split), batch_size=self.training.batch_size, seed=self.told.seed,
            rank=self.rank, world_size=self.world_size, shuffled=shuffled,
        )  # fmt: skip

    def _restored(self) -> Progress:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Progress()
        with checkpoint.as_directory() as folder:
            return checkpoints.restore(Path(folder), self.network, self.optimizer, self.device, self.told.digest)

    def run(self) -> str | None:
        """From where the training is to its end, or to where it cannot go on, and why."""
        self.records = self._records() if self.rank == 0 else None
        try:
            self._train()
            self._test()
        except _Stop as stop:
            return str(stop)
        finally:
            if self.records is not None:
                self.records.close()
        return None

    def _records(self) -> Records:
        settings = {"source": self.told.source, "seed": self.told.seed, **self.told.training, **self.told.detector}
        records = Records(
            uris.join(self.told.work, "tensorboard"),
            first_step=self.progress.step,
            settings=settings,
            mlflow_run=self.progress.mlflow_run,
        )
        self.progress.mlflow_run = records.mlflow_run
        return records

    def _train(self) -> None:
        progress, last = self.progress, self.steps * self.training.epochs
        if progress.ended:
            return
        self._count(progress.step * self.training.batch_size)
        for step, arrival in enumerate(self.ingest.stream(self.order, progress.step, last), start=progress.step):
            self._step(step, last, arrival)
            progress.step = step + 1
            if progress.step % self.steps == 0:
                self._end_epoch()
                self._checkpoint(progress.history[-1])
                if progress.ended:
                    return
                self.model.train()
            elif self.training.checkpoint_steps and progress.step % self.training.checkpoint_steps == 0:
                self._checkpoint({"step": progress.step})

    def _step(self, step: int, last: int, arrival: Arrival) -> None:
        self.model.train()
        set_learning_rate(self.optimizer, self.training, step, last)
        losses, energy = training_step(
            self.model, self._batch(arrival), self.optimizer, self.config.loss, self.training, self.gather,
            seed=self.told.seed * 1_000_003 + step,
        )  # fmt: skip
        values = self._over_all(losses, energy, arrival)
        if not np.isfinite(values).all():
            self._diverged(step)
        progress = self.progress
        progress.sums = values.tolist() if step % self.steps == 0 else (np.array(progress.sums) + values).tolist()
        self._check_failures(step, arrival)
        self._count(len(self.order.whole(step)))
        if self.records is not None:
            rates = {"lr/backbone": self.optimizer.param_groups[0]["lr"], "lr/heads": self._head_rate()}
            self.records.step(step + 1, dict(zip(LOGGED, values.tolist(), strict=True)) | rates)

    def _head_rate(self) -> float:
        return float(self.optimizer.param_groups[-1]["lr"])

    def _over_all(self, losses: Losses, energy: Tensor, arrival: Arrival) -> npt.NDArray[np.float64]:
        """The step's losses and mean residual energy over all processes (`LOGGED`)."""
        counted = torch.tensor(float(arrival.valid.sum()), device=self.device)
        own = torch.stack([*(value.double() for value in losses), energy.double(), counted.double()])
        values = mean_over_processes(own).cpu().numpy()
        return np.append(values[:-2], values[-2] / max(values[-1], 1e-12))

    def _batch(self, arrival: Arrival) -> Batch:
        rows, device = arrival.rows, self.device
        features = self._text_features(rows)
        return Batch(
            mosaics=torch.from_numpy(arrival.mosaics).to(device, non_blocking=True),
            text_features=torch.from_numpy(features).to(device) if features is not None else None,
            labels=torch.from_numpy(self.examples.labels[rows]).to(device),
            valid=torch.from_numpy(arrival.valid).to(device),
        )

    def _text_features(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Caption features (B, D) of some pictures, or what an ablation gives them instead."""
        features = self.examples.text_features
        if features is None:
            return None
        if self.training.captions == "constant":
            rows = np.zeros_like(rows)
        elif self.training.captions == "shuffled":
            rows = self._shuffled[rows]
        return np.ascontiguousarray(features[rows])

    @cached_property
    def _shuffled(self) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.told.seed, 1]).permutation(self.examples.table.num_rows)

    def _diverged(self, step: int) -> None:
        """Save which pictures the step had, and stop."""
        uri = uris.join(self.told.work, "diverged.json")
        if self.rank == 0:
            names = self.examples.names(self.order.whole(step))
            writing.write_json(uri, {"epoch": self.order.epoch(step) + 1, "step": step + 1, "pictures": names})
        raise _Stop(
            f"the loss is not finite in step {step + 1} (epoch {self.order.epoch(step) + 1}); its pictures are named "
            f"in {uri}: look at them, or lower the learning rates"
        )

    def _check_failures(self, step: int, arrival: Arrival) -> None:
        """Count the pictures of the epoch that could not be had; list them; stop where there are too many."""
        if step % self.steps == 0:
            self.progress.failed = 0
        failed = torch.tensor([float(len(arrival.failed))], dtype=torch.float64, device=self.device)
        self.progress.failed += round(float(mean_over_processes(failed)) * self.world_size)
        if arrival.failed:
            uri = uris.join(self.told.work, "failed", f"step-{step + 1:08d}-{self.rank:04d}.json")
            writing.write_json(uri, arrival.failed)
        count = len(self.order.rows)
        if self.progress.failed > self.told.failed_share * count:
            raise _Stop(
                f"{self.progress.failed} of {count} training pictures could not be had any more, more than "
                f"{self.told.failed_share:.0%} (--max-failed): they are listed in "
                f"{uris.join(self.told.work, 'failed')}; does the split still match its source?"
            )

    def _end_epoch(self) -> None:
        progress = self.progress
        rows, logits = self._judged("val")
        labels = self.examples.labels[rows]
        bce = float(np.mean(np.logaddexp(0.0, logits) - labels * logits))
        means = np.array(progress.sums) / self.steps
        record: dict[str, Any] = {
            "epoch": progress.step // self.steps,
            **{name: float(value) for name, value in zip(LOGGED, means, strict=True)},
            "val_ap": average_precision(labels, logits),
            "val_bce": bce,
            "failed": progress.failed,
        }
        progress.history.append(record)
        best = max(progress.history, key=quality)
        if best is record:
            progress.best_epoch = int(record["epoch"])
            progress.best = checkpoints.trained_weights(self.network)
            progress.validation = {ROWS: torch.from_numpy(rows), LOGITS: torch.from_numpy(logits)}
        stale = int(record["epoch"]) - progress.best_epoch
        progress.ended = progress.step == self.steps * self.training.epochs or 0 < self.training.patience <= stale
        self._tell(record)
        if self.records is not None:
            values = {name: float(record[name]) for name in ("val_ap", "val_bce") if record[name] is not None}
            self.records.epoch(progress.step, values | {f"epoch/{name}": float(record[name]) for name in LOGGED})

    def _test(self) -> None:
        """Judge the test pictures by the weights of the best epoch; the last checkpoint holds what came out."""
        checkpoints.load_weights(self.network, self.progress.best)
        if not self.progress.test and len(self.examples.rows("test")):
            rows, logits = self._judged("test")
            self.progress.test = {ROWS: torch.from_numpy(rows), LOGITS: torch.from_numpy(logits)}
        self._checkpoint({FINISHED: True})

    @torch.inference_mode()
    def _judged(self, split: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Rows (n,) and logits (n,) of a split's pictures, on every process; those that failed are left out."""
        self.network.eval()
        order = self._order(split, shuffled=False)
        logits, good = [], []
        for step, arrival in enumerate(self.ingest.stream(order, 0, order.steps_per_epoch)):
            batch = self._batch(arrival)
            out = self.gather(self.network(batch.mosaics, batch.text_features).logit.double())
            counts = len(order.whole(step))
            logits.append(out.cpu().numpy()[:counts])
            good.append(self.gather(batch.valid).cpu().numpy()[:counts])
        kept = np.concatenate(good)
        if not np.isfinite(np.concatenate(logits)[kept]).all():
            raise _Stop(
                f"the weights are not finite any more: the split {split} cannot be judged; lower the learning rates"
            )
        if (lost := int((~kept).sum())) > self.told.failed_share * len(kept):
            raise _Stop(
                f"{lost} of {len(kept)} pictures of the split {split} could not be had any more, more than "
                f"{self.told.failed_share:.0%} (--max-failed): does the split still match its source?"
            )
        return order.rows[kept], np.concatenate(logits)[kept]

    def _checkpoint(self, metrics: dict[str, Any]) -> None:
        """Report to Ray Train; the first process hands over the state, which is uploaded while training goes on."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        if self.records is not None:
            self.records.flush()
        folder = checkpoints.save(self.network, self.optimizer, self.progress, self.told.digest)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )

    def _count(self, pictures: int) -> None:
        """Tell the board of pictures that were trained on."""
        self.untold += pictures
        if self.rank == 0 and self.told.board is not None and time.monotonic() > self.told_at + TOLD_SECONDS:
            ray.get_actor(self.told.board).add.remote({"trained": self.untold})
            self.told_at, self.untold = time.monotonic(), 0

    def _tell(self, record: dict[str, Any]) -> None:
        if self.rank != 0 or self.told.board is None:
            return
        ap = "undefined" if record["val_ap"] is None else f"{record['val_ap']:.4f}"
        line = (
            f"train: epoch {record['epoch']}/{self.training.epochs}, loss {record['loss']:.4f} (contrastive "
            f"{record['contrastive']:.3f}, bce {record['bce']:.3f}, alignment {record['alignment']:.3f}), residual "
            f"energy {record['residual_energy']:.2f}, validation AP {ap}"
        )
        if record["failed"]:
            line += f", {record['failed']} pictures failed"
        if record["residual_energy"] < COLLAPSED:
            line += f"\nwarning: the projection leaves {record['residual_energy']:.1%} of the image feature"
        ray.get(ray.get_actor(self.told.board).tell.remote(line))


def _build(told: WorkerConfig, config: DetectorConfig, training: TrainingConfig) -> Network:
    """The network alone: of the detector, what training needs no more is let go, the text tower first of all."""
    weights = Path(told.clip_weights) if told.clip_weights else None
    network = Detector.build(config, weights, seed=told.seed).network
    if told.fitted is not None:
        load_fitted(network, told.fitted)
    if training.activation_checkpointing:
        use_activation_checkpointing(network)
    return network


def _load_examples(told: WorkerConfig) -> Examples:
    table = examples.read_split(told.split)
    features = None
    if told.captions is not None:
        features = examples.load_text_features(told.captions, told.features_id, table)
    return Examples(table=table, text_features=features)


def quality(record: dict[str, Any]) -> tuple[float, float]:
    """What the best epoch is chosen by: validation AP; equal APs by the lower cross-entropy."""
    return float(record["val_ap"] or 0.0), -float(record["val_bce"])
