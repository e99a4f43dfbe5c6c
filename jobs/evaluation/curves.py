"""What the plots of an evaluation show, of all pictures together, as numbers of its JSON.

Dimensions: n pictures, d points of a curve, b bins that hold a picture.
"""

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import FAKE, UNCERTAIN, UNTRANSFORMED, Array, Rows
from nsnet import metrics
from nsnet.calibration import rate_upper

BINS: Final = 10
"""Of the reliability diagram: fewer than the ECE has, for each is to hold enough pictures to be read."""
HISTOGRAM_BINS: Final = 40
LOWEST_FPR: Final = 1e-3
BASE_RATES: Final = np.geomspace(1e-4, 0.5, 60)
"""Shares of fakes for which the worth of an alarm is shown."""
Z: Final = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def curves(table: pa.Table) -> dict[str, Any]:
    """Curves of the untransformed labelled verdicts of `table`, JSON-ready; a curve that is undefined is None."""
    known = table.filter(pc.is_valid(table.column("label")))
    known = known.filter(pc.equal(groups.transforms_of(known), UNTRANSFORMED))
    rows = groups.join(list(groups.split(known).values()))
    return {
        "roc": _roc(rows),
        "reliability": _reliability(rows),
        "histogram": _histogram(rows),
        "threshold": _threshold(known),
        "uncertain": _band(rows),
        "precision": _precision(rows),
    }


def _roc(rows: Rows) -> dict[str, Any] | None:
    """Points (d,) of the ROC curve, thinned: those at which a plot could tell it from the whole curve."""
    curve = metrics.roc_curve(rows.labels, rows.probabilities)
    if curve is None:
        return None
    fpr, tpr = curve
    grid = np.concatenate([[0.0], np.geomspace(LOWEST_FPR, 1.0, 200)])
    kept = np.unique(np.searchsorted(fpr, grid + 1e-12, side="right") - 1)  # the last point with at most this FPR
    return {"fpr": fpr[kept].tolist(), "tpr": tpr[kept].tolist(), "reals": int((rows.labels == 0).sum())}


def _reliability(rows: Rows) -> dict[str, Any]:
    """(b,) mean probability, share of fakes with its interval, and pictures."""
    probability, share, pictures = metrics.reliability(rows.labels, rows.probabilities, BINS)
    low, high = wilson(share, pictures)
    found = {"probability": probability, "fakes": share, "low": low, "high": high, "pictures": pictures}
    return {name: values.tolist() for name, values in found.items()}


def wilson(share: Array, pictures: groups.Integers) -> tuple[Array, Array]:
    """95 % score interval of shares (b,) of so many pictures (b,), each at least 1 (Wilson 1927)."""
    factor = 1.0 / (1.0 + Z**2 / pictures)
    centre = factor * (share + Z**2 / (2.0 * pictures))
    half = factor * Z * np.sqrt(share * (1.0 - share) / pictures + Z**2 / (4.0 * pictures**2))
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)  # equal, but for rounding


def _histogram(rows: Rows) -> dict[str, Any]:
    """Pictures of each class per bin of the probability; edges are equally far apart from 0 to 1."""

    def counts(label: int) -> list[int]:
        found, _ = np.histogram(rows.probabilities[rows.labels == label], bins=HISTOGRAM_BINS, range=(0.0, 1.0))
        return [int(count) for count in found]

    return {"real": counts(0), "fake": counts(1)}


def _threshold(table: pa.Table) -> float | None:
    """The threshold of the verdicts; None where they have several, or say none."""
    if "threshold" not in table.column_names:
        return None
    found = pc.unique(pc.drop_null(table.column("threshold"))).to_pylist()
    return float(found[0]) if len(found) == 1 else None


def _band(rows: Rows) -> list[float] | None:
    """Least and largest probability that was called uncertain."""
    found = rows.probabilities[rows.said == UNCERTAIN]
    return [float(found.min()), float(found.max())] if len(found) else None


def _precision(rows: Rows) -> dict[str, Any] | None:
    """Share of right alarms at each base rate: as measured, and at the upper end of what the FPR may be."""
    confusion = rows.confusion()
    reals, fakes = (int(count) for count in confusion.sum(axis=1))
    false_alarms, found = int(confusion[0, FAKE]), int(confusion[1, FAKE])
    if not reals or not fakes or not found:
        return None
    upper = rate_upper(false_alarms, reals)
    return {
        "base_rate": BASE_RATES.tolist(),
        "value": _precision_at(found / fakes, false_alarms / reals).tolist(),
        "cautious": _precision_at(found / fakes, upper).tolist(),
        "fpr": false_alarms / reals,
        "fpr_upper": upper,
    }


def _precision_at(tpr: float, fpr: float) -> Array:
    """b·TPR / (b·TPR + (1 − b)·FPR) at each base rate b; TPR > 0."""
    alarms = BASE_RATES * tpr + (1.0 - BASE_RATES) * fpr
    return np.asarray(BASE_RATES * tpr / alarms)
