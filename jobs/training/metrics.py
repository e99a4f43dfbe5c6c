"""The metrics of a training: its first process sends losses, images and where its time goes to the progress board.

The driver exports them. A training process would lose its last 10 s: Ray Train ends it without an export.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import ray

from jobs.telemetry import series
from jobs.telemetry.series import Key

WAITING: Final = "waiting"
"""Parts of the loop's time: for the images of the next step;"""
COMPUTING: Final = "computing"
"""for a step, on a GPU with the wait for earlier steps;"""
VALIDATING: Final = "validating"
"""for the validation and test images;"""
CHECKPOINTING: Final = "checkpointing"
"""for saving a checkpoint, whose upload happens beside the next steps."""
SEND_SECONDS: Final = 1.0
"""Shortest interval between two messages to the board."""
T = TypeVar("T")


class TrainingMetrics:
    """Reports one process's loop."""

    def __init__(self, board: str | None) -> None:
        """`board`: name of the progress board; None, as on other processes than the first: report nothing."""
        self._board = board
        self._added: Counter[Key] = Counter()
        self._put: dict[Key, float] = {}
        self._sent_at = 0.0

    def flush(self, *, wait: bool = False) -> None:
        """Send what came since the last message. `wait`: until the board has it. Without a board it is dropped."""
        if self._board is not None:
            with suppress(ray.exceptions.RayError, ValueError):  # the board has gone; metrics must not end a training
                sent: Any = ray.get_actor(self._board).measure.remote(dict(self._added), self._put)
                if wait:
                    ray.get(sent, timeout=10)
        self._added, self._put, self._sent_at = Counter(), {}, time.monotonic()

    @contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Count the seconds of the body as this part of the loop's time."""
        started = time.monotonic()
        yield
        self._added[series.TRAINING_SECONDS.key(part)] += time.monotonic() - started  # type: ignore[assignment]

    def waited_for(self, arrivals: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time until each of them counts as `WAITING`."""
        items = iter(arrivals)
        while True:
            with self.spent(WAITING):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def step(self, images: int, values: Mapping[str, float]) -> None:
        """Report a step's number of images over all processes, and its losses and residual energy (`logged`)."""
        self._added[series.TRAINING_IMAGES.key()] += images
        for name, value in values.items():
            is_energy = name == "residual_energy"
            self._put[series.RESIDUAL_ENERGY.key() if is_energy else series.TRAINING_LOSS.key(name)] = value
        if time.monotonic() > self._sent_at + SEND_SECONDS:
            self.flush()

    def epoch(self, number: int, validation_ap: float | None) -> None:
        """Report a completed epoch."""
        self._put[series.TRAINING_EPOCH.key()] = number
        if validation_ap is not None:
            self._put[series.VALIDATION_AP.key()] = validation_ap
        self.flush()
