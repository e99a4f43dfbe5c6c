"""Judging a whole split by the present weights, and which epoch is the best.

Dimensions: n images of a split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.training.batches import Batches
from jobs.training.ingest import Ingest
from jobs.training.order import Indices, Order
from nsnet.losses import Gather
from nsnet.metrics import average_precision
from nsnet.network import Network


class CannotGoOn(Exception):
    """Training cannot go on, on any process; it would end the same way again."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Judges splits; all processes of a training call it together."""

    network: Network
    ingest: Ingest
    batches: Batches
    order: Callable[[str], Order]
    """Name of a split -> the order in which its images are judged."""
    gather: Gather
    failed_share: float
    """Share of a split's images that may fail."""

    @torch.inference_mode()
    def judge(self, split: str) -> tuple[Indices, npt.NDArray[np.float64]]:
        """Rows (n,) and logits (n,) of a split's images, on every process; those that failed are left out.

        Raises `CannotGoOn` for logits that are not finite, and where too many images failed.
        """
        self.network.eval()
        order = self.order(split)
        logits, good = [], []
        for step, arrival in enumerate(self.ingest.stream(order, 0, order.steps_per_epoch)):
            batch = self.batches.of(arrival)
            out = self.gather(self.network(batch.mosaics, batch.text_features).logit.double())
            counts = len(order.whole(step))
            logits.append(out.cpu().numpy()[:counts])
            good.append(self.gather(batch.valid).cpu().numpy()[:counts])
        kept = np.concatenate(good)
        if not np.isfinite(np.concatenate(logits)[kept]).all():
            raise CannotGoOn(
                f"the weights are not finite any more: the split {split} cannot be judged; lower the learning rates"
            )
        if (lost := int((~kept).sum())) > self.failed_share * len(kept):
            raise CannotGoOn(
                f"{lost} of {len(kept)} images of the split {split} could not be had any more, more than "
                f"{self.failed_share:.0%} (--max-failed): does the split still match its source?"
            )
        return order.rows[kept], np.concatenate(logits)[kept]


def scores(labels: npt.NDArray[np.int64], logits: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Average precision and mean binary cross-entropy of logits (n,) of images with labels (n,)."""
    bce = float(np.mean(np.logaddexp(0.0, logits) - labels * logits))
    return {"val_ap": average_precision(labels, logits), "val_bce": bce}


def quality(record: dict[str, Any]) -> tuple[float, float]:
    """What the best epoch is chosen by: validation AP; equal APs by the lower cross-entropy."""
    return float(record["val_ap"] or 0.0), -float(record["val_bce"])
