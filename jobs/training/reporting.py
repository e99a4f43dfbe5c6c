"""Report a training from its first process: progress and epochs to the driver, scalars to TensorBoard and MLflow."""

import time
from contextlib import suppress
from typing import Any, Final

import ray

from jobs.storage import uris
from jobs.training.checkpoints import Progress
from jobs.training.config import WorkerConfig
from jobs.training.tracking import Records
from nsnet.configuration import LossConfig

LOGGED: Final = ("loss", "contrastive", "bce", "alignment", "residual_energy")
"""Values of a step, in this order."""
PENALTY: Final = "decorrelation"
"""One more value, before the residual energy, if it has a weight: other trainings are recorded as by older releases."""
COLLAPSED: Final = 0.05
"""Mean residual energy ‖ũ‖/‖u‖ below which the projection has removed nearly everything."""
UPDATE_SECONDS: Final = 1.0
"""Shortest interval between updates of the progress line."""


def logged(loss: LossConfig) -> tuple[str, ...]:
    """Values of a step of this objective, in this order."""
    return (*LOGGED[:-1], PENALTY, LOGGED[-1]) if loss.decorrelation_weight > 0 else LOGGED


class Reporter:
    """Reports one training from its first process; does nothing on other processes."""

    def __init__(self, config: WorkerConfig, progress: Progress, epochs: int, *, active: bool) -> None:
        self._progress, self._epochs = progress, epochs
        self._board = config.board if active else None
        self._updated_at, self._uncounted = 0.0, 0
        self._records: Records | None = None
        if active:
            settings = {"source": config.source, "seed": config.seed, **config.training, **config.detector}
            self._records = Records(
                uris.join(config.work, "tensorboard"),
                first_step=progress.step,
                settings=settings,
                mlflow_run=progress.mlflow_run,
            )
            progress.mlflow_run = self._records.mlflow_run

    def count(self, images: int) -> None:
        """Count trained images."""
        self._uncounted += images
        if self._board is not None and time.monotonic() > self._updated_at + UPDATE_SECONDS:
            ray.get_actor(self._board).add.remote({"trained": self._uncounted})
            self._updated_at, self._uncounted = time.monotonic(), 0

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step, counted from 1 (`logged`, and learning rates)."""
        if self._records is not None:
            self._records.step(step, values)

    def epoch(self, record: dict[str, Any]) -> None:
        """Report the record of a completed epoch."""
        if self._board is not None:
            board = ray.get_actor(self._board)
            ray.get([board.log.remote(message) for message in self._messages(record)])
        if self._records is not None:
            values = {name: float(record[name]) for name in ("val_ap", "val_bce") if record[name] is not None}
            means = {f"epoch/{name}": float(record[name]) for name in (*LOGGED, PENALTY) if name in record}
            self._records.epoch(self._progress.step, values | means)

    def flush(self) -> None:
        """Copy the event files to storage."""
        if self._records is not None:
            self._records.flush()

    def close(self) -> None:
        """Flush and close all records, and report the images that were counted since the last update."""
        if self._board is not None and self._uncounted:
            with suppress(ray.exceptions.RayError, ValueError):  # the board has gone
                ray.get(ray.get_actor(self._board).add.remote({"trained": self._uncounted}), timeout=10)
            self._uncounted = 0
        if self._records is not None:
            self._records.close()

    def _messages(self, record: dict[str, Any]) -> list[str]:
        """The epoch's line; a warning is a message of its own, because a message has one level."""
        ap = "undefined" if record["val_ap"] is None else f"{record['val_ap']:.4f}"
        penalty = f", {PENALTY} {record[PENALTY]:.3f}" if PENALTY in record else ""
        line = (
            f"train: epoch {record['epoch']}/{self._epochs}, loss {record['loss']:.4f} (contrastive "
            f"{record['contrastive']:.3f}, bce {record['bce']:.3f}, alignment {record['alignment']:.3f}{penalty}), "
            f"residual energy {record['residual_energy']:.2f}, validation AP {ap}"
        )
        if record["failed"]:
            line += f", {record['failed']} images failed"
        if record["residual_energy"] >= COLLAPSED:
            return [line]
        return [line, f"warning: the projection leaves {record['residual_energy']:.1%} of the image feature"]
