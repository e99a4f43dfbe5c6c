"""Temperature and threshold, fitted on validation only and stored with the detector.

Dimensions: n validation images.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit

from nsnet.errors import ConfigError
from nsnet.metrics import check

Label = Literal["real", "fake", "uncertain"]

LOG_TEMPERATURES: Final = (-4.0, 4.0)
"""Search range of log T: T between 0.018 and 55."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a logit becomes a probability and a verdict: p = σ(logit / T), fake where p ≥ threshold."""

    temperature: float = 1.0
    """T > 0."""
    threshold: float = 0.5
    """Probability from which a picture is called fake, in (0, 1)."""
    uncertain_margin: float = 0.0
    """Pictures closer than this to the threshold, in probability, are called uncertain."""
    fitted_on: int = 0
    """Number of validation images; 0: not fitted."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0.0 < self.threshold < 1.0 or not 0.0 <= self.uncertain_margin < 1.0:
            raise ConfigError(
                f"need temperature > 0, 0 < threshold < 1, 0 ≤ uncertain_margin < 1, got {self.temperature}, "
                f"{self.threshold}, {self.uncertain_margin}"
            )

    def probability(self, logit: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """P(fake) of logits of any shape, fp64."""
        return np.asarray(expit(np.asarray(logit, dtype=np.float64) / self.temperature))

    def verdict(self, prob_fake: float) -> Label:
        """The verdict for one probability."""
        if abs(prob_fake - self.threshold) < self.uncertain_margin:
            return "uncertain"
        return "fake" if prob_fake >= self.threshold else "real"


def fit(labels: npt.ArrayLike, logits: npt.ArrayLike) -> Calibration:
    """Fit on validation labels (n,) and logits (n,): T by least cross-entropy, threshold by most correct verdicts.

    The targets are Platt's (1999), slightly inside 0 and 1: a validation set that the detector separates without an
    error is no proof that it never errs, and would drive T to 0.
    Among equally good thresholds, the middle of the widest gap between scores. Without both classes nothing can be
    fitted: the default comes back, with `fitted_on` 0.
    """
    y, s = check(labels, logits)
    if not 0 < y.sum() < len(y):
        return Calibration()

    fakes_count, reals_count = int(y.sum()), int((1 - y).sum())
    target = np.where(y == 1, (fakes_count + 1) / (fakes_count + 2), 1 / (reals_count + 2))

    def cross_entropy(log_temperature: float) -> float:
        z = s / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, z) - target * z))

    temperature = float(np.exp(minimize_scalar(cross_entropy, bounds=LOG_TEMPERATURES, method="bounded").x))
    probability = Calibration(temperature=temperature).probability(s)
    values = np.unique(probability)
    edges = np.concatenate([[0.0], values, [1.0]])
    middles, widths = (edges[1:] + edges[:-1]) / 2.0, np.diff(edges)
    reals = np.sort(probability[y == 0])
    fakes = np.sort(probability[y == 1])
    correct = np.searchsorted(reals, middles) + len(fakes) - np.searchsorted(fakes, middles)
    best = np.flatnonzero(correct == correct.max())
    threshold = float(middles[best[np.argmax(widths[best])]])
    # saturated probabilities would put it at exactly 0 or 1
    threshold = min(max(threshold, 1e-6), 1.0 - 1e-6)
    return Calibration(temperature=temperature, threshold=threshold, fitted_on=len(y))
