"""Temperature, threshold and uncertain band, fitted on validation only and stored with the detector.

Dimensions: n validation images.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, expit

from nsnet.errors import ConfigError
from nsnet.metrics import check

Array = npt.NDArray[np.float64]
Label = Literal["real", "fake", "uncertain"]
Rule = Literal["accuracy", "fpr", "cost"]

LOG_TEMPERATURES: Final = (-4.0, 4.0)
"""Search range of log T: T between 0.018 and 55."""

BELOW_1: Final = math.nextafter(1.0, 0.0)

SETTINGS: Final[dict[Rule, tuple[str, ...]]] = {
    "accuracy": (),
    "fpr": ("fpr",),
    "cost": ("false_alarm_cost", "miss_cost", "base_rate"),
}
"""What each rule heeds, beside the uncertain share."""

NUMBER: Final = "[0-9.e+-]+"
PATTERN: Final = re.compile(
    f"(accuracy|fpr=(?P<fpr>{NUMBER}%?)"
    f"|cost=(?P<false_alarm_cost>{NUMBER}):(?P<miss_cost>{NUMBER})@(?P<base_rate>{NUMBER}%?))"
    f"(, *uncertain=(?P<uncertain_share>{NUMBER}%?))?"
)
SYNTAX: Final = (
    "give accuracy, fpr=1% or cost=10:1@0.01 (a false alarm costs 10, a miss 1, 0.01 of the images are fake), and "
    "after it ,uncertain=5% if that share is to be called uncertain"
)


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What a threshold is chosen for. `str` of it is what `parse` reads."""

    rule: Rule = "accuracy"
    """accuracy: most correct verdicts. fpr: most fakes found within a limit of false alarms. cost: least mean cost."""
    fpr: float = 0.01
    """Largest share of reals called fake, in [0, 1). Like the next three, only its rule may set it."""
    false_alarm_cost: float = 1.0
    """Cost of a real called fake, > 0, in the unit of `miss_cost`."""
    miss_cost: float = 1.0
    """Cost of a fake called real, > 0."""
    base_rate: float = 0.5
    """Share of fakes expected in use, in (0, 1); that of the validation images may be another."""
    uncertain_share: float = 0.0
    """Share of validation images, those nearest to the threshold, that are called uncertain, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.rule not in SETTINGS:
            raise ConfigError(f"the rule of an operating point must be one of {', '.join(SETTINGS)}, got {self.rule!r}")
        costs = (self.false_alarm_cost, self.miss_cost)
        if (
            not 0.0 <= self.fpr < 1.0
            or not all(0.0 < cost < math.inf for cost in costs)
            or not 0.0 < self.base_rate < 1.0
            or not 0.0 <= self.uncertain_share < 1.0
        ):
            raise ConfigError(
                "need 0 ≤ fpr < 1, finite costs > 0, 0 < base_rate < 1, 0 ≤ uncertain_share < 1, got "
                f"{self.fpr}, {costs}, {self.base_rate}, {self.uncertain_share}"
            )
        heeded = {"rule", "uncertain_share", *SETTINGS[self.rule]}
        for field in fields(self):
            if field.name not in heeded and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(f"the rule {self.rule} of an operating point heeds no {field.name}, got {value}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line: `accuracy`, `fpr=1%`, `cost=10:1@0.01` (false alarm : miss @ base rate).

        `,uncertain=5%` may follow; a share is a number or a percentage. Raises `ConfigError`.
        """
        found = PATTERN.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"{text!r} is no operating point: {SYNTAX}")
        try:
            given = {name: _number(value) for name, value in found.groupdict().items() if value is not None}
        except ValueError:
            raise ConfigError(f"{text!r} is no operating point: {SYNTAX}") from None
        rule: Rule = "fpr" if "fpr" in given else "cost" if "miss_cost" in given else "accuracy"
        return cls(rule=rule, **given)

    def __str__(self) -> str:
        settings = [str(getattr(self, name)).removesuffix(".0") for name in SETTINGS[self.rule]]
        form = {"accuracy": "accuracy", "fpr": "fpr={}", "cost": "cost={}:{}@{}"}[self.rule]
        return form.format(*settings) + (f",uncertain={self.uncertain_share}" if self.uncertain_share else "")


MOST_CORRECT: Final = OperatingPoint()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a logit becomes a probability and a verdict: p = σ(logit / T), fake where p ≥ threshold."""

    temperature: float = 1.0
    """T > 0."""
    threshold: float = 0.5
    """Probability from which an image is called fake, in (0, 1)."""
    uncertain_margin: float = 0.0
    """Images closer than this to the threshold, in probability, are called uncertain."""
    fitted_on: int = 0
    """Number of validation images; 0: not fitted."""
    point: OperatingPoint = MOST_CORRECT
    """What the threshold and the margin were chosen for."""
    validation_fpr: float | None = None
    """Share of the validation reals at or above the threshold, uncertain ones too; None: not fitted."""
    validation_fpr_upper: float | None = None
    """Upper end of the one-sided 95 % interval of the FPR that `validation_fpr` is an estimate of (Clopper and
    Pearson 1934). Above `point.fpr`, that limit is kept on validation but not verified: there were too few reals."""
    validation_tpr: float | None = None
    """Share of the validation fakes at or above the threshold, uncertain ones too; None: not fitted."""
    version: int = 1
    """Raised by one each time a detector is calibrated anew."""

    def __post_init__(self) -> None:
        if (
            not 0.0 < self.temperature < math.inf
            or not 0.0 < self.threshold < 1.0
            or not 0.0 <= self.uncertain_margin < 1.0
        ):
            raise ConfigError(
                f"need 0 < temperature < ∞, 0 < threshold < 1, 0 ≤ uncertain_margin < 1, got {self.temperature}, "
                f"{self.threshold}, {self.uncertain_margin}"
            )
        rates = (self.validation_fpr, self.validation_fpr_upper, self.validation_tpr)
        if self.fitted_on < 0 or self.version < 1 or not all(0.0 <= rate <= 1.0 for rate in rates if rate is not None):
            raise ConfigError(
                f"need fitted_on ≥ 0, version ≥ 1 and rates in [0, 1], got {self.fitted_on}, {self.version}, {rates}"
            )

    def probability(self, logit: npt.ArrayLike) -> Array:
        """P(fake) of logits of any shape, fp64."""
        return np.asarray(expit(np.asarray(logit, dtype=np.float64) / self.temperature))

    def verdict(self, prob_fake: float) -> Label:
        """The verdict for one probability."""
        if abs(prob_fake - self.threshold) < self.uncertain_margin:
            return "uncertain"
        return "fake" if prob_fake >= self.threshold else "real"


def fit(
    labels: npt.ArrayLike, logits: npt.ArrayLike, point: OperatingPoint = MOST_CORRECT, *, version: int = 1
) -> Calibration:
    """Fit on validation labels (n,) and logits (n,): T by least cross-entropy, threshold and margin by the point.

    Without both classes nothing can be fitted: the default comes back, with `fitted_on` 0.
    """
    y, s = check(labels, logits)
    if not 0 < y.sum() < len(y):
        return Calibration()
    temperature = _temperature(y, s)
    probability = Calibration(temperature=temperature).probability(s)
    threshold = _threshold(y, probability, point)
    false_alarms, found = (int((probability[y == label] >= threshold).sum()) for label in (0, 1))
    fakes, reals = int(y.sum()), int((1 - y).sum())
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        uncertain_margin=_margin(probability, threshold, point.uncertain_share),
        fitted_on=len(y),
        point=point,
        validation_fpr=false_alarms / reals,
        validation_fpr_upper=rate_upper(false_alarms, reals),
        validation_tpr=found / fakes,
        version=version,
    )


def rate_upper(count: int, of: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate of which `count` in `of` were seen: 0 in 100 leave it up to 3.0 %.

    Clopper and Pearson (1934): the quantile of Beta(count + 1, of − count). It stays a bound where the threshold was
    chosen to leave `count` of these very reals above it, for the share above the next of them has this distribution.
    """
    return float(betaincinv(count + 1, of - count, confidence)) if count < of else 1.0


def _temperature(y: npt.NDArray[np.int64], s: Array) -> float:
    """T of least cross-entropy.

    The targets are Platt's (1999), slightly inside 0 and 1: a validation set that the detector separates without an
    error is no proof that it never errs, and would drive T to 0.
    """
    fakes, reals = int(y.sum()), int((1 - y).sum())
    target = np.where(y == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))

    def cross_entropy(log_temperature: float) -> float:
        z = s / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, z) - target * z))

    return float(np.exp(minimize_scalar(cross_entropy, bounds=LOG_TEMPERATURES, method="bounded").x))


def _threshold(y: npt.NDArray[np.int64], probability: Array, point: OperatingPoint) -> float:
    """The middle of a gap between probabilities: of the lowest that keeps the FPR, else of the widest of the best.

    Where reals are saturated at probability 1 no threshold keeps them out: the highest one is taken.
    """
    edges = np.unique(np.concatenate([[0.0], probability, [1.0]]))
    low, high = edges[:-1], edges[1:]
    middles = (low + high) / 2.0
    # between neighbours in fp64 there is no middle: the upper one is a threshold as well, but for 1 itself
    thresholds = np.minimum(np.where(middles > low, middles, high), BELOW_1)
    reals, fakes = np.sort(probability[y == 0]), np.sort(probability[y == 1])
    false_alarms = len(reals) - np.searchsorted(reals, thresholds)
    missed = np.searchsorted(fakes, thresholds)
    if point.rule == "fpr":
        allowed = false_alarms <= point.fpr * len(reals) + 1e-9
        return float(thresholds[np.argmax(allowed)] if allowed.any() else thresholds[-1])
    loss = (false_alarms + missed).astype(np.float64)
    if point.rule == "cost":
        miss, false_alarm = point.base_rate * point.miss_cost, (1.0 - point.base_rate) * point.false_alarm_cost
        loss = miss * missed / len(fakes) + false_alarm * false_alarms / len(reals)
    best = np.flatnonzero(loss <= loss.min() * (1.0 + 1e-12))  # equal costs may differ by rounding
    return float(thresholds[best[np.argmax((high - low)[best])]])


def _margin(probability: Array, threshold: float, share: float) -> float:
    """Margin with the share of the images strictly inside it, or fewer where several are equally far: 0 for none."""
    distance = np.sort(np.abs(probability - threshold))
    count = int(share * len(distance) + 1e-9)
    return min(float(distance[count]), BELOW_1) if count else 0.0


def _number(text: str) -> float:
    """A number, or a percentage; `ValueError` for what is neither."""
    return float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
