"""Fits temperature, threshold and uncertain band on validation images; they are stored with the detector.

Dimensions: n validation images.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Final, Literal, Self, cast, get_args

import numpy as np
import numpy.typing as npt

from nsnet.config import added
from nsnet.errors import ConfigError
from nsnet.metrics import check

Array = npt.NDArray[np.float64]
Label = Literal["real", "fake", "uncertain"]
Rule = Literal["accuracy", "fpr", "cost"]
Disagreement = Literal["ignored", "uncertain"]

LOG_TEMPERATURES: Final = (-4.0, 4.0)
"""Search range of log T: T between 0.018 and 55."""

BELOW_1: Final = math.nextafter(1.0, 0.0)

SETTINGS: Final[dict[Rule, tuple[str, ...]]] = {
    "accuracy": (),
    "fpr": ("fpr", "confidence"),
    "cost": ("false_alarm_cost", "miss_cost", "base_rate"),
}
"""Settings that each rule uses, besides the uncertain share."""

NUMBER: Final = "[0-9.e+-]+"
PATTERN: Final = re.compile(
    f"(accuracy|fpr=(?P<fpr>{NUMBER}%?)|fpr<=(?P<sure_fpr>{NUMBER}%?)@(?P<confidence>{NUMBER}%?)"
    f"|cost=(?P<false_alarm_cost>{NUMBER}):(?P<miss_cost>{NUMBER})@(?P<base_rate>{NUMBER}%?))"
    f"(, *uncertain=(?P<uncertain_share>{NUMBER}%?))?"
    "(, *disagreement=(?P<disagreement>uncertain))?"
)
SYNTAX: Final = (
    "give accuracy, fpr=1%, fpr<=1%@95% (kept with a probability of 95%) or cost=10:1@0.01 (a false alarm costs 10, a "
    "miss 1, 0.01 of the images are fake); append ,uncertain=5% to call that share uncertain, and "
    ",disagreement=uncertain to call images uncertain whose views disagree (--views)"
)


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """The aim by which a threshold is chosen. `str` writes the form that `parse` reads."""

    rule: Rule = "accuracy"
    """accuracy: most correct verdicts. fpr: most fakes found within a limit of false alarms. cost: least mean cost."""
    fpr: float = 0.01
    """Largest share of reals called fake, in [0, 1). This and the next four may be set only for their own rule."""
    confidence: float = added(0.0)
    """Probability, over draws of the validation reals, that the true FPR keeps the limit, in [0, 1). 0: only the
    validation reals keep it, and the true FPR exceeds it in about half of the draws."""
    false_alarm_cost: float = 1.0
    """Cost of a real called fake, > 0, in the unit of `miss_cost`."""
    miss_cost: float = 1.0
    """Cost of a fake called real, > 0."""
    base_rate: float = 0.5
    """Share of fakes expected in use, in (0, 1); it may differ from the share in the validation images."""
    uncertain_share: float = 0.0
    """Share of the validation images that is called uncertain, in [0, 1): those nearest to the threshold."""
    disagreement: Disagreement = added("ignored")
    """uncertain: so is an image whose views lie on both sides of the threshold. It needs views (`PreparationConfig`).
    Threshold and rates are those of the first view alone."""

    def __post_init__(self) -> None:
        if self.rule not in SETTINGS:
            raise ConfigError(f"the rule of an operating point must be one of {', '.join(SETTINGS)}, got {self.rule!r}")
        costs = (self.false_alarm_cost, self.miss_cost)
        if (
            not 0.0 <= self.fpr < 1.0
            or not all(0.0 < cost < math.inf for cost in costs)
            or not 0.0 < self.base_rate < 1.0
            or not 0.0 <= self.uncertain_share < 1.0
            or not 0.0 <= self.confidence < 1.0
        ):
            raise ConfigError(
                "need 0 ≤ fpr < 1, 0 ≤ confidence < 1, finite costs > 0, 0 < base_rate < 1, 0 ≤ uncertain_share < 1, "
                f"got {self.fpr}, {self.confidence}, {costs}, {self.base_rate}, {self.uncertain_share}"
            )
        if self.disagreement not in get_args(Disagreement):
            raise ConfigError(f"disagreement must be ignored or uncertain, got {self.disagreement!r}")
        if self.confidence and not self.fpr:
            raise ConfigError("no number of reals guarantees an FPR of 0: give a limit above 0, such as fpr<=0.1%@95%")
        used = {"rule", "uncertain_share", "disagreement", *SETTINGS[self.rule]}
        for field in fields(self):
            if field.name not in used and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(
                    f"an operating point with rule {self.rule} does not use {field.name}, got {value}: leave it out"
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a command-line value: `accuracy`, `fpr=1%`, `fpr<=1%@95%`, `cost=10:1@0.01` (false alarm : miss @ base
        rate).

        `,uncertain=5%` may follow, then `,disagreement=uncertain`; a share is a number or a percentage. Raises
        `ConfigError`.
        """
        match = PATTERN.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"{text!r} is not an operating point: {SYNTAX}")
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        disagreement = cast(Disagreement, found.pop("disagreement", "ignored"))
        try:
            given = {name: _number(value) for name, value in found.items()}
        except ValueError:
            raise ConfigError(f"{text!r} is not an operating point: {SYNTAX}") from None
        if "sure_fpr" in given:
            given["fpr"] = given.pop("sure_fpr")
            if not given["confidence"]:
                raise ConfigError(
                    f"{text!r} guarantees nothing: write fpr={given['fpr']:g}, or a confidence such as 95%"
                )
        rule: Rule = "fpr" if "fpr" in given else "cost" if "miss_cost" in given else "accuracy"
        return cls(rule=rule, disagreement=disagreement, **given)

    @property
    def min_reals(self) -> int:
        """Fewest validation reals from which the guarantee can be kept: with none of them called fake."""
        return math.ceil(math.log1p(-self.confidence) / math.log1p(-self.fpr) - 1e-9) if self.confidence else 0

    def check_reals(self, reals: int, where: str = "") -> None:
        """Raise `ConfigError` if so many validation reals cannot give the guarantee. `where`: for the message."""
        if reals < self.min_reals:
            raise ConfigError(
                f"{self} needs at least {self.min_reals:,} real validation images, there are {reals:,}{where}: add "
                "reals, or allow a larger FPR or a smaller confidence"
            )

    def __str__(self) -> str:
        settings = [str(getattr(self, name)).removesuffix(".0") for name in SETTINGS[self.rule]]
        form = {"accuracy": "accuracy", "fpr": "fpr<={}@{}" if self.confidence else "fpr={}", "cost": "cost={}:{}@{}"}[
            self.rule
        ]
        share = f",uncertain={self.uncertain_share}" if self.uncertain_share else ""
        disagreement = f",disagreement={self.disagreement}" if self.disagreement != "ignored" else ""
        return form.format(*settings) + share + disagreement


MOST_CORRECT: Final = OperatingPoint()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Maps a logit to a probability and a verdict: p = σ(logit / T), fake if p ≥ threshold."""

    temperature: float = 1.0
    """T > 0."""
    threshold: float = 0.5
    """Smallest probability at which an image is called fake, in (0, 1)."""
    uncertain_margin: float = 0.0
    """Images closer than this to the threshold, in probability, are called uncertain."""
    fitted_on: int = 0
    """Number of validation images; 0: not fitted."""
    point: OperatingPoint = MOST_CORRECT
    """The aim by which threshold and margin were chosen."""
    validation_fpr: float | None = None
    """Share of the validation reals at or above the threshold, including uncertain ones; None: not fitted."""
    validation_fpr_upper: float | None = None
    """Upper end of the one-sided 95 % interval of the FPR that `validation_fpr` estimates (Clopper and Pearson 1934).
    If it is above `point.fpr`, validation meets that limit but has too few reals to verify it."""
    validation_tpr: float | None = None
    """Share of the validation fakes at or above the threshold, including uncertain ones; None: not fitted."""
    version: int = 1
    """Increases by one each time a detector is calibrated."""

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
        from scipy.special import expit  # slow to import, for a driver that computes nothing

        return np.asarray(expit(np.asarray(logit, dtype=np.float64) / self.temperature))

    def verdict(self, prob_fake: float, views_agree: bool = True) -> Label:
        """The verdict for one probability, of the first view if there are several."""
        if abs(prob_fake - self.threshold) < self.uncertain_margin:
            return "uncertain"
        if not views_agree and self.point.disagreement == "uncertain":
            return "uncertain"
        return "fake" if prob_fake >= self.threshold else "real"


def fit(
    labels: npt.ArrayLike, logits: npt.ArrayLike, point: OperatingPoint = MOST_CORRECT, *, version: int = 1
) -> Calibration:
    """Fit on validation labels (n,) and logits (n,): T by least cross-entropy, threshold and margin by the point.

    If a class is missing, nothing can be fitted: returns the default, with `fitted_on` 0. Raises `ConfigError` if there
    are too few reals for the point's guarantee.
    """
    y, s = check(labels, logits)
    point.check_reals(int((1 - y).sum()))
    if not 0 < y.sum() < len(y):
        return Calibration()
    temperature = _temperature(y, s)
    probability = Calibration(temperature=temperature).probability(s)
    threshold = _threshold(y, probability, point)
    false_alarms, hits = (int((probability[y == label] >= threshold).sum()) for label in (0, 1))
    fakes, reals = int(y.sum()), int((1 - y).sum())
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        uncertain_margin=_margin(probability, threshold, point.uncertain_share),
        fitted_on=len(y),
        point=point,
        validation_fpr=false_alarms / reals,
        validation_fpr_upper=rate_upper(false_alarms, reals),
        validation_tpr=hits / fakes,
        version=version,
    )


def fit_reals(logits: npt.ArrayLike, point: OperatingPoint, before: Calibration) -> Calibration:
    """Choose the threshold by the logits (n,) of reals alone, such as those of one source. The temperature stays.

    Raises `ConfigError` unless the point limits the FPR and there are enough reals for its guarantee.
    """
    if point.rule != "fpr":
        raise ConfigError(f"{point} needs fakes as well: with reals alone give fpr=1% or fpr<=1%@95%")
    if not np.size(logits):
        raise ConfigError("there are no reals to choose a threshold by")
    point.check_reals(np.size(logits))
    probability = before.probability(logits)
    y = np.zeros(len(probability), np.int64)
    threshold = _threshold(y, probability, point)
    false_alarms = int((probability >= threshold).sum())
    return Calibration(
        temperature=before.temperature,
        threshold=threshold,
        uncertain_margin=_margin(probability, threshold, point.uncertain_share),
        fitted_on=len(y),
        point=point,
        validation_fpr=false_alarms / len(y),
        validation_fpr_upper=rate_upper(false_alarms, len(y)),
        version=before.version + 1,
    )


def rate_upper(count: int, total: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate that was observed as `count` in `total`; for 0 in 100 it is 3.0 %.

    Clopper and Pearson (1934): the quantile of Beta(count + 1, total − count). The bound also holds if the threshold
    was chosen so that `count` of these reals lie above it: the share above the next real has this distribution.
    """
    from scipy.special import betaincinv

    return float(betaincinv(count + 1, total - count, confidence)) if count < total else 1.0


def _temperature(y: npt.NDArray[np.int64], s: Array) -> float:
    """Find the T of least cross-entropy.

    The targets are Platt's (1999), slightly inside 0 and 1: otherwise a validation set that the detector separates
    without error would drive T to 0.
    """
    from scipy.optimize import minimize_scalar  # slow to import; only training and calibrating need it

    fakes, reals = int(y.sum()), int((1 - y).sum())
    target = np.where(y == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))

    def cross_entropy(log_temperature: float) -> float:
        z = s / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, z) - target * z))

    return float(np.exp(minimize_scalar(cross_entropy, bounds=LOG_TEMPERATURES, method="bounded").x))


def _threshold(y: npt.NDArray[np.int64], probability: Array, point: OperatingPoint) -> float:
    """Return the middle of a gap between probabilities.

    `fpr`: the lowest gap that keeps the FPR; other rules: the widest of the gaps with the least loss. If reals have
    probability 1, no threshold excludes them: returns the highest one.
    """
    edges = np.unique(np.concatenate([[0.0], probability, [1.0]]))
    low, high = edges[:-1], edges[1:]
    middles = (low + high) / 2.0
    # neighbours in fp64 have no number between them: use the upper one, unless it is 1
    thresholds = np.minimum(np.where(middles > low, middles, high), BELOW_1)
    reals, fakes = np.sort(probability[y == 0]), np.sort(probability[y == 1])
    false_alarms = len(reals) - np.searchsorted(reals, thresholds)
    missed = np.searchsorted(fakes, thresholds)
    if point.rule == "fpr":
        allowed = false_alarms <= _most_false_alarms(point, len(reals))
        if point.confidence and not allowed.any():
            raise ConfigError(f"no threshold keeps {point}: too many real validation images have probability 1")
        return float(thresholds[np.argmax(allowed)] if allowed.any() else thresholds[-1])
    loss = (false_alarms + missed).astype(np.float64)
    if point.rule == "cost":
        miss, false_alarm = point.base_rate * point.miss_cost, (1.0 - point.base_rate) * point.false_alarm_cost
        loss = miss * missed / len(fakes) + false_alarm * false_alarms / len(reals)
    best = np.flatnonzero(loss <= loss.min() * (1.0 + 1e-12))  # equal costs may differ by rounding
    return float(thresholds[best[np.argmax((high - low)[best])]])


def _most_false_alarms(point: OperatingPoint, reals: int) -> float:
    """Most reals that may lie above the threshold.

    With a confidence: the most whose `rate_upper` keeps the limit; -1 if none does. That bound is exact for the share
    above the next real, whatever the distribution of scores.
    """
    most = int(point.fpr * reals + 1e-9)
    if point.confidence:
        while most >= 0 and rate_upper(most, reals, point.confidence) > point.fpr:
            most -= 1
    return most


def _margin(probability: Array, threshold: float, share: float) -> float:
    """Return the margin that contains this share of the images, or fewer if distances tie; 0 if it contains none."""
    distance = np.sort(np.abs(probability - threshold))
    count = int(share * len(distance) + 1e-9)
    return min(float(distance[count]), BELOW_1) if count else 0.0


def _number(text: str) -> float:
    """Parse a number or a percentage; `ValueError` for anything else."""
    return float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
