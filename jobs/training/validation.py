"""Judge a whole split with the current weights, and choose the best epoch.

Dimensions: n images of a split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from jobs.training.batches import Batches
from jobs.training.ingest import Ingest
from jobs.training.order import Order
from nsnet.losses import Gather
from nsnet.metrics import average_precision
from nsnet.network import Network
from nsnet.splits import Indices

IMAGE: Final = "image"
PROJECTED: Final = "projected"


class Judged(NamedTuple):
    """Results for a split's images, without failed images."""

    rows: Indices
    """(n,)"""
    logits: npt.NDArray[np.float64]
    """(n,)"""
    features: dict[str, torch.Tensor]
    """`IMAGE` u and `PROJECTED` ũ of the first m images, (m, D) fp32 each; empty if none are kept."""


class CannotGoOn(Exception):
    """Training must stop on all processes; a retry would fail the same way."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Judges splits; all processes of a training must call it together."""

    network: Network
    ingest: Ingest
    batches: Batches
    order: Callable[[str], Order]
    """Name of a split -> the order in which its images are judged."""
    gather: Gather
    failed_share: float
    """Share of a split's images that may fail."""

    @torch.inference_mode()
    def judge(self, split: str, keep: int = 0) -> Judged:
        """Judge a split's images, with the same result on every process. `keep`: images whose features are kept.

        Raises `CannotGoOn` if logits are not finite or too many images failed.
        """
        self.network.eval()
        order = self.order(split)
        logits, valid = [], []
        kept_features: dict[str, list[torch.Tensor]] = {IMAGE: [], PROJECTED: []}
        seen = 0
        for step, arrival in enumerate(self.ingest.stream(order, 0, order.steps_per_epoch)):
            batch = self.batches.of(arrival)
            out = self.network(batch.mosaics, batch.text_features)
            count = len(order.whole(step))
            logits.append(self.gather(out.logit.double()).cpu().numpy()[:count])
            valid.append(self.gather(batch.valid).cpu().numpy()[:count])
            if seen < keep:  # the same on every process, since all take part in gathering
                for name, values in ((IMAGE, out.image), (PROJECTED, out.projected)):
                    good = self.gather(values.float()).cpu()[:count][torch.from_numpy(valid[-1])]
                    kept_features[name].append(good[: keep - seen])
                seen += len(kept_features[IMAGE][-1])
        kept = np.concatenate(valid)
        if not np.isfinite(np.concatenate(logits)[kept]).all():
            raise CannotGoOn(f"the logits of the split {split} are not finite: lower the learning rates")
        if (failed := int((~kept).sum())) > self.failed_share * len(kept):
            raise CannotGoOn(
                f"{failed} of {len(kept)} images of the split {split} could not be read, more than "
                f"{self.failed_share:.0%} (--max-failed): check that the split still matches its source"
            )
        features = {name: torch.cat(values) for name, values in kept_features.items()} if seen else {}
        return Judged(order.rows[kept], np.concatenate(logits)[kept], features)


def scores(labels: npt.NDArray[np.int64], logits: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Average precision and mean binary cross-entropy of logits (n,) of images with labels (n,)."""
    bce = float(np.mean(np.logaddexp(0.0, logits) - labels * logits))
    return {"val_ap": average_precision(labels, logits), "val_bce": bce}


def quality(record: dict[str, Any]) -> tuple[float, float]:
    """Sort key of the best epoch: validation AP, then lower cross-entropy."""
    return float(record["val_ap"] or 0.0), -float(record["val_bce"])
