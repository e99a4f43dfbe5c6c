"""The loop of a training process: steps, epochs, checkpoints, and the final test.

Dimensions: B images of this process in a step.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from torch import Tensor, nn

from jobs.storage import uris, writing
from jobs.training import checkpoints
from jobs.training.batches import Batches
from jobs.training.checkpoints import LOGITS, ROWS, Progress
from jobs.training.collectives import mean_over_processes
from jobs.training.config import WorkerConfig
from jobs.training.examples import Examples
from jobs.training.ingest import Arrival, Ingest
from jobs.training.metrics import CHECKPOINTING, COMPUTING, VALIDATING, TrainingMetrics
from jobs.training.order import Order
from jobs.training.reporting import Reporter, logged
from jobs.training.validation import CannotGoOn, Validation, quality, scores
from nsnet.configuration import LossConfig, TrainingConfig
from nsnet.losses import Gather, Losses
from nsnet.network import Network
from nsnet.precision import to_device
from nsnet.training import set_learning_rate, training_step

LOG_STEPS: Final = {"cpu": 1, "cuda": 20}
"""Steps between two transfers of losses to the host. Each transfer waits until the GPU is idle."""
FINISHED: Final = "finished"
"""Metric that is reported with the last checkpoint."""


class Logged(NamedTuple):
    """What is logged of a step."""

    step: int
    """Counted from 0."""
    rates: dict[str, float]
    """Learning rates."""
    values: Tensor
    """This process's losses, sums of residual energy and of images, and failed images, on the device."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One process's part of a training, starting at its progress."""

    config: WorkerConfig
    training: TrainingConfig
    loss: LossConfig
    network: Network
    model: nn.Module
    """The network as prepared by Ray Train: DDP if there are several processes."""
    optimizer: torch.optim.Optimizer
    progress: Progress
    examples: Examples
    ingest: Ingest
    gather: Gather
    device: torch.device

    def run(self) -> str | None:
        """Train until the end or a fatal error; returns the reason for the latter, else None."""
        reporter = self._reporter
        try:
            self._train()
            self._test()
        except CannotGoOn as reason:
            return str(reason)
        finally:
            self._metrics.flush(wait=True)
            reporter.close()
        return None

    @cached_property
    def _pending(self) -> list[Logged]:
        """Steps whose values are still on the device."""
        return []

    @cached_property
    def _reporter(self) -> Reporter:
        return Reporter(self.config, self.progress, self.training.epochs, active=self.gather.rank == 0)

    @cached_property
    def _metrics(self) -> TrainingMetrics:
        return TrainingMetrics(self.config.board if self.gather.rank == 0 else None)

    @cached_property
    def _order(self) -> Order:
        return self._order_of("train", shuffled=True)

    @cached_property
    def _batches(self) -> Batches:
        return Batches(
            examples=self.examples, captions=self.training.captions, seed=self.config.seed, device=self.device
        )

    @cached_property
    def _validation(self) -> Validation:
        return Validation(
            network=self.network,
            ingest=self.ingest,
            batches=self._batches,
            order=self._order_of,
            gather=self.gather,
            failed_share=self.config.failed_share,
        )

    def _order_of(self, split: str, *, shuffled: bool = False) -> Order:
        return Order(
            rows=self.examples.rows(split), batch_size=self.training.batch_size, seed=self.config.seed,
            rank=self.gather.rank, world_size=self.gather.world_size, shuffled=shuffled,
        )  # fmt: skip

    def _train(self) -> None:
        progress, steps = self.progress, self._order.steps_per_epoch
        last = steps * self.training.epochs
        if progress.ended:
            return
        self._reporter.count(progress.step * self.training.batch_size)
        arrivals = self._metrics.waited_for(self.ingest.stream(self._order, progress.step, last))
        for step, arrival in enumerate(arrivals, start=progress.step):
            with self._metrics.spent(COMPUTING):
                self._step(step, last, arrival)
            if progress.step % steps == 0:
                self._record()
                with self._metrics.spent(VALIDATING):
                    self._end_epoch()
                self._checkpoint(progress.history[-1])
                if progress.ended:
                    return
            elif self.training.checkpoint_steps and progress.step % self.training.checkpoint_steps == 0:
                self._record()
                self._checkpoint({"step": progress.step})

    def _step(self, step: int, last: int, arrival: Arrival) -> None:
        self.model.train()
        set_learning_rate(self.optimizer, self.training, step, last)
        losses, energy = training_step(
            self.model, self._batches.of(arrival), self.optimizer, self.loss, self.training, self.gather,
            seed=self.config.seed * 1_000_003 + step,
        )  # fmt: skip
        self._write_failures(step, arrival)
        self._pending.append(Logged(step, self._rates(), self._local(losses, energy, arrival)))
        self.progress.step = step + 1
        if len(self._pending) == LOG_STEPS[self.device.type]:
            self._record()

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        return {"lr/backbone": float(groups[0]["lr"]), "lr/heads": float(groups[-1]["lr"])}

    def _local(self, losses: Losses, energy: Tensor, arrival: Arrival) -> Tensor:
        """This process's values of a step: losses, sums of residual energy and of images, failed images."""
        counts = torch.tensor([float(arrival.valid.sum()), float(len(arrival.failed))], dtype=torch.float64)
        kept = losses if self.loss.decorrelation_weight > 0 else losses[:-1]  # in the order of `logged`
        values = torch.stack([*(value.double() for value in kept), energy.double()])
        return torch.cat([values, to_device(counts.numpy(), self.device)])

    def _record(self) -> None:
        """Log the pending steps. Stops the training if a loss is not finite, or if too many images failed."""
        if not self._pending:
            return
        means = mean_over_processes(torch.stack([logged.values for logged in self._pending])).cpu().numpy()
        progress, names = self.progress, logged(self.loss)
        for (step, rates, _), row in zip(self._pending, means, strict=True):
            values = np.append(row[:-3], row[-3] / max(row[-2], 1e-12))  # `logged`
            if not np.isfinite(values).all():
                self._diverged(step)
            is_first = step % self._order.steps_per_epoch == 0
            progress.sums = values.tolist() if is_first else (np.array(progress.sums) + values).tolist()
            progress.failed = round(row[-1] * self.gather.world_size) + (0 if is_first else progress.failed)
            images, named = len(self._order.whole(step)), dict(zip(names, values.tolist(), strict=True))
            self._reporter.count(images)
            self._reporter.step(step + 1, named | rates)
            self._metrics.step(images, named)
        self._pending.clear()
        self._check_failures()

    def _diverged(self, step: int) -> None:
        """Save the names of the step's images, and stop the training."""
        uri = uris.join(self.config.work, "diverged.json")
        epoch = self._order.epoch(step) + 1
        if self.gather.rank == 0:
            names = self.examples.names(self._order.whole(step))
            writing.write_json(uri, {"epoch": epoch, "step": step + 1, "pictures": names})
        raise CannotGoOn(
            f"the loss is not finite in step {step + 1} (epoch {epoch}): check its images, which {uri} names, or "
            "lower the learning rates"
        )

    @property
    def _failures(self) -> str:
        """Folder of the images that failed."""
        return uris.join(self.config.work, "failed")

    def _write_failures(self, step: int, arrival: Arrival) -> None:
        """Store a step's failed images."""
        if arrival.failed:
            name = f"step-{step + 1:08d}-{self.gather.rank:04d}.json"
            writing.write_json(uris.join(self._failures, name), arrival.failed)

    def _check_failures(self) -> None:
        """Stop the training if too many images of the epoch failed."""
        count = len(self._order.rows)
        if self.progress.failed > self.config.failed_share * count:
            raise CannotGoOn(
                f"{self.progress.failed} of {count} training images could not be read, more than "
                f"{self.config.failed_share:.0%} (--max-failed): check that the split still matches its source; "
                f"{self._failures} lists the images"
            )

    def _end_epoch(self) -> None:
        """Judge the validation images, and keep the weights if this epoch is the best so far."""
        progress, steps = self.progress, self._order.steps_per_epoch
        rows, logits, _ = self._validation.judge("val")
        means = np.array(progress.sums) / steps
        record: dict[str, Any] = {
            "epoch": progress.step // steps,
            **{name: float(value) for name, value in zip(logged(self.loss), means, strict=True)},
            **scores(self.examples.labels[rows], logits),
            "failed": progress.failed,
        }
        progress.history.append(record)
        if max(progress.history, key=quality) is record:
            progress.best_epoch = int(record["epoch"])
            progress.best = checkpoints.trained_weights(self.network)
            progress.validation = {ROWS: torch.from_numpy(rows), LOGITS: torch.from_numpy(logits)}
        stale = int(record["epoch"]) - progress.best_epoch
        progress.ended = progress.step == steps * self.training.epochs or 0 < self.training.patience <= stale
        self._reporter.epoch(record)
        self._metrics.epoch(record["epoch"], record["val_ap"])

    def _test(self) -> None:
        """Judge the test images with the weights of the best epoch, and store the logits in the last checkpoint."""
        checkpoints.load_weights(self.network, self.progress.best)
        if not self.progress.test and len(self.examples.rows("test")):
            with self._metrics.spent(VALIDATING):
                rows, logits, features = self._validation.judge("test", keep=self.config.leakage)
            self.progress.test = {ROWS: torch.from_numpy(rows), LOGITS: torch.from_numpy(logits)}
            self.progress.features = features
        self._checkpoint({FINISHED: True})

    def _checkpoint(self, metrics: dict[str, Any]) -> None:
        """Report to Ray Train; the first process adds the checkpoint, which is uploaded while training continues."""
        if self.gather.rank != 0:
            ray.train.report(metrics)
            return
        with self._metrics.spent(CHECKPOINTING):
            self._reporter.flush()
            folder = checkpoints.save(self.network, self.optimizer, self.progress, self.config.digest)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            )
