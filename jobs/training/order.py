"""Pure functions that give the rows of each training process in each step, and the seeds of their images.

Dimensions: n examples, G images of a step over all processes, B of this one.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nsnet.splits import Indices


@dataclass(frozen=True, kw_only=True)
class Order:
    """The rows of each process in each step: a pure function of its fields."""

    rows: Indices
    """Row numbers of the examples."""
    batch_size: int
    """G, images of a step over all processes."""
    seed: int
    rank: int
    world_size: int
    shuffled: bool = True
    """Whether each epoch has its own random order; else the order is that of `rows`, for one epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch. An epoch uses each row once; its last step may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both counted from 0."""
        return step // self.steps_per_epoch

    def whole(self, step: int) -> Indices:
        """Rows (≤ G,) of a step over all processes, independent of the number of processes."""
        rows = self.rows
        if self.shuffled:
            rows = rows[_permutation(len(rows), self.seed, self.epoch(step))]
        start = step % self.steps_per_epoch * self.batch_size
        return rows[start : start + self.batch_size]

    def part(self, step: int) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """This process's equal part of a step, (B,), padded with the first row, and a mask, False for padding."""
        whole = self.whole(step)
        size = -(-len(whole) // self.world_size)
        part = whole[self.rank * size : (self.rank + 1) * size]
        padding = np.repeat(whole[:1], size - len(part))
        return np.concatenate([part, padding]), np.arange(size) < len(part)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(count)


def image_seed(seed: int, epoch: int, image_id: str) -> int:
    """63-bit seed of an image's slots and augmentation in an epoch."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
