"""Make the tensors of a batch from the images that arrived for a step.

Dimensions: n examples, B images of this process in a step, D embedding.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from jobs.training.examples import Examples
from jobs.training.ingest import Arrival
from nsnet.precision import to_device
from nsnet.splits import Indices
from nsnet.training import Batch


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Makes batches on a device."""

    examples: Examples
    captions: str
    """`TrainingConfig.captions`: which caption an image gets."""
    seed: int
    device: torch.device

    def of(self, arrival: Arrival) -> Batch:
        """The batch of a step's images."""
        rows, device = arrival.rows, self.device
        features = self._text_features(rows)
        return Batch(
            mosaics=to_device(arrival.mosaics, device),
            text_features=to_device(features, device) if features is not None else None,
            labels=to_device(self.examples.labels[rows], device),
            valid=to_device(arrival.valid, device),
        )

    def _text_features(self, rows: Indices) -> npt.NDArray[np.float32] | None:
        """Caption features (B, D) of these images, or an ablation's replacement."""
        features = self.examples.text_features
        if features is None:
            return None
        if self.captions == "constant":
            rows = np.zeros_like(rows)
        elif self.captions == "shuffled":
            rows = self._shuffled[rows]
        return np.ascontiguousarray(features[rows])

    @cached_property
    def _shuffled(self) -> Indices:
        return np.random.default_rng([self.seed, 1]).permutation(self.examples.table.num_rows)
