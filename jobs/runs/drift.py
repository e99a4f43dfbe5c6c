"""Does a run differ from earlier runs of the same detector by more than those differ from each other?

Three statistics: the share of images called fake, and the distributions of `prob_fake` and of `residual_energy`. Days
differ, so the bounds count the spread between earlier runs as well as chance:

- share: a prediction interval of a random-effects model (DerSimonian and Laird 1986), with Student's t;
- distribution: the distance of Kolmogorov and Smirnov to all earlier runs together. Its bound adds, in squares, chance
  (Kolmogorov's distribution) and the spread of earlier runs beyond chance (Student's t): the mean square of each one's
  distance to the others, less that of chance.

An alarm is a p-value below `FALSE_ALARMS` / 3: of runs without a change, at most that share raises one. No change is
proved by silence: `smallest_share` says what a run of this size could have shown.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

BINS: Final = 100
"""Equal bins of a distribution on [0, 1]; larger values count in the last one."""
COLUMNS: Final = ("prob_fake", "residual_energy")
"""Columns whose distributions a record holds."""
FALSE_ALARMS: Final = 0.05
"""Largest share of unchanged runs with an alarm."""
MIN_RUNS: Final = 5
MAX_RUNS: Final = 28
"""Earlier runs that are compared: at least, and the latest at most."""
MIN_ROWS: Final = 100
"""Smallest run that is compared, in scored rows."""
MAX_ROWS: Final = 10**12
"""Largest count that a record may hold: the sum of a histogram stays below 2^63."""
KOLMOGOROV_SQUARE: Final = np.pi**2 / 12.0
"""Mean square of Kolmogorov's distribution."""

Counts = npt.NDArray[np.int64]
Record = dict[str, Any]


def histogram(values: npt.NDArray[np.float64]) -> Counts:
    """Values by bin, (BINS,) int64; NaN is left out."""
    finite = values[~np.isnan(values)]
    return np.bincount(np.clip(finite * BINS, 0, BINS - 1).astype(np.int64), minlength=BINS)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run's record says of its scores."""

    scored: int
    flagged: int
    """Rows with the verdict fake."""
    distributions: Mapping[str, Counts]

    @property
    def share(self) -> float:
        """Share called fake; the run has rows."""
        return self.flagged / self.scored


def seen(record: Mapping[str, Any]) -> Seen | None:
    """What a record says; None if it holds too few rows, is of a release without distributions, or is damaged."""
    found, verdicts = record.get("distributions"), record.get("counts", {}).get("verdict", {})
    if not isinstance(found, dict) or not isinstance(verdicts, dict):
        return None
    if not all(_is_histogram(found.get(name)) for name in COLUMNS) or not _is_count(verdicts.get("fake", 0)):
        return None
    distributions = {name: np.array(found[name], dtype=np.int64) for name in COLUMNS}
    scored = int(distributions[COLUMNS[0]].sum())
    if scored < MIN_ROWS:
        return None
    return Seen(scored=scored, flagged=min(verdicts.get("fake", 0), scored), distributions=distributions)


def _is_histogram(counts: Any) -> bool:
    return isinstance(counts, list) and len(counts) == BINS and all(_is_count(count) for count in counts)


def _is_count(value: Any) -> bool:
    """Whether a value of a record, which others may have written, is a number of rows."""
    return type(value) is int and 0 <= value <= MAX_ROWS


def with_earlier(records: Iterable[Record]) -> Iterator[tuple[Record, Seen | None, list[Seen]]]:
    """Records with rows, each with what it says and what the latest earlier ones of the same detector and source say.

    `records`: of verdicts, oldest first.
    """
    earlier: dict[tuple[Any, Any], list[Seen]] = defaultdict(list)
    for record in records:
        if not record.get("rows"):
            continue
        now, same = seen(record), earlier[record.get("detector_id"), record.get("source")]
        yield record, now, same[-MAX_RUNS:]
        if now is not None:
            same.append(now)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A run against earlier ones."""

    runs: int
    """Earlier runs."""
    expected_share: float
    """Share called fake that they predict."""
    smallest_share: float
    """Difference to it, in either direction, from which this run raises an alarm."""
    p_values: Mapping[str, float]
    """Statistic (`flagged`, `prob_fake`, `residual_energy`) -> p-value."""

    @property
    def alarms(self) -> tuple[str, ...]:
        """The statistics that differ by more than chance and days explain."""
        return tuple(name for name, p in self.p_values.items() if p < FALSE_ALARMS / len(self.p_values))


def drift(now: Seen, earlier: Sequence[Seen]) -> Drift | None:
    """Compare a run with earlier ones, oldest first; None if there are fewer than `MIN_RUNS`."""
    from scipy.stats import t

    earlier = earlier[-MAX_RUNS:]
    if len(earlier) < MIN_RUNS:
        return None
    mean, deviation = _predicted(now, earlier)
    freedom = len(earlier) - 1
    p_values = {"flagged": float(2.0 * t.sf(abs(now.share - mean) / deviation, freedom))}
    for name in COLUMNS:
        counts = np.array([one.distributions[name] for one in earlier])
        total = counts.sum(axis=0)
        squares, sizes = zip(*(_squared_distance(one, total - one) for one in counts), strict=True)
        beyond = max(0.0, sum(squares) - KOLMOGOROV_SQUARE * len(squares)) / sum(sizes)
        square, size = _squared_distance(now.distributions[name], total)
        p_values[name] = _tail(square, beyond * size, freedom)
    smallest = deviation * float(t.isf(FALSE_ALARMS / len(p_values) / 2.0, freedom))
    return Drift(runs=len(earlier), expected_share=mean, smallest_share=smallest, p_values=p_values)


def _predicted(now: Seen, earlier: Sequence[Seen]) -> tuple[float, float]:
    """Mean and standard deviation of the share that earlier runs predict for this one."""
    flagged, scored = (np.array([getattr(one, name) for one in earlier], float) for name in ("flagged", "scored"))
    # one image more of each verdict, so that shares of 0 and 1 have a variance
    pooled = (flagged.sum() + 1.0) / (scored.sum() + 2.0)
    variance = pooled * (1.0 - pooled)
    weights = scored / variance
    shares = flagged / scored
    mean = (weights * shares).sum() / weights.sum()
    excess = (weights * (shares - mean) ** 2).sum() - (len(earlier) - 1)
    between = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1.0 / (variance / scored + between)
    mean = (weights * shares).sum() / weights.sum()
    return float(mean), float(np.sqrt(between + variance / now.scored + 1.0 / weights.sum()))


def _tail(square: float, beyond: float, freedom: int) -> float:
    """The p at which the module's bound equals this squared distance. `beyond`: the square beyond chance."""
    from scipy.optimize import brentq
    from scipy.stats import kstwobign, t

    def gap(log_p: float) -> float:
        p = np.exp(log_p)
        return float(kstwobign.isf(p) ** 2 + beyond * t.isf(p / 2.0, freedom) ** 2 - square)

    if gap(0.0) >= 0.0:
        return 1.0
    smallest = np.log(1e-12)
    return float(np.exp(brentq(gap, smallest, 0.0))) if gap(smallest) > 0.0 else 1e-12


def _squared_distance(counts: Counts, others: Counts) -> tuple[float, float]:
    """Kolmogorov's squared distance of two histograms times their effective size, which makes chance give his
    distribution; and that size.
    """
    n, m = float(counts.sum()), float(others.sum())
    if not n or not m:
        return 0.0, 1.0
    size = n * m / (n + m)
    return size * float(np.abs(np.cumsum(counts) / n - np.cumsum(others) / m).max()) ** 2, size
