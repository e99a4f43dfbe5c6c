"""Verdict rows against their labels: every metric with its interval, per generator, as their mean, and over all.

Dimensions: K bootstrap samples.

A verdict "uncertain" is no right answer. `acc`, `real_acc` and `fake_acc` are shares of all images that were judged
rightly, so that no detector gains by not answering. `acc_decided` is the share of right ones among the other verdicts,
to be read beside `uncertain_share`: a detector that answers only where it is easy looks good there. An uncertain
verdict raises no alarm, which is what the precisions count; the other metrics are of the probabilities alone.

The mean over generators gives each the same weight, however many images it has. Intervals are percentiles of a
bootstrap that draws reals and fakes of each generator anew; reals that several generators are compared with are drawn
once for all of them, or the mean would seem better known than it is. `ece` has none: drawing adds noise to each bin,
and the interval would lie above the value. A TPR at a false positive rate of 1/m has none below m reals, nor has a mean
of such. Neither the order of rows nor other generators change a generator's numbers.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import FAKE, REAL, UNCERTAIN, UNTRANSFORMED, Array, Group, LabelledScores
from nsnet import metrics
from nsnet.errors import ConfigError, SourceError
from nsnet.transforms import KINDS

METRICS: Final = (*metrics.METRICS, "acc_decided", "uncertain_share")
ROBUSTNESS_METRICS: Final = ("acc", "ap", "auroc", "tpr_at_fpr_1")
"""What is compared under each transform."""
WITHOUT_INTERVAL: Final = frozenset({"ece"})
OF_BOTH: Final = ("acc", "acc_decided")
"""Metrics that are another number where there is one class only: the mean over generators leaves such a one out."""
SAMPLES: Final = 1000
CONFIDENCE: Final = 0.95

LONG: Final = pa.schema(
    [
        pa.field("group", pa.string(), nullable=False),  # a generator, or one of the two below
        pa.field("transform", pa.string()),  # null: none
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: undefined
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("real", pa.int64()),  # images; null for the mean
        pa.field("fake", pa.int64()),
    ]
)
"""One row per group, transform and metric."""
MACRO_MEAN: Final = "(macro mean)"
ALL: Final = "(all)"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of one group: their values, and those of its bootstrap samples. NaN is undefined."""

    values: dict[str, Array]
    """Metric -> ()."""
    samples: dict[str, Array]
    """Metric -> (K,)."""
    without_interval: frozenset[str] = WITHOUT_INTERVAL
    """Metrics whose samples say nothing."""

    def numbers(self, names: Sequence[str] = METRICS) -> dict[str, dict[str, float | None]]:
        """Metric -> value, low and high; None where undefined."""
        intervals = metrics.intervals({name: self.samples[name] for name in names}, CONFIDENCE)
        found = {}
        for name in names:
            low, high = (None, None) if name in self.without_interval else intervals[name] or (None, None)
            value = float(self.values[name])
            found[name] = {"value": None if np.isnan(value) else value, "low": low, "high": high}
        return found


def compare(
    table: pa.Table, *, samples: int = SAMPLES, seed: int = 0, pairs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Compare verdict rows (`schema.VERDICTS`) with their labels; JSON-ready, None is undefined.

    `pairs`: generator with fakes only -> the one whose reals it is compared with; one that only lends its reals is no
    generator of the result. Rows with a transform go to `robustness`, and into no other number. Raises `SourceError`
    where there is nothing to compare, `ConfigError` for pairs that do not fit.
    """
    if samples < 1:
        raise ConfigError(f"an interval needs at least 1 bootstrap sample, got {samples}")
    known = table.filter(pc.is_valid(table.column("label")))
    if known.num_rows == 0:
        raise SourceError("no verdict has a label: nothing can be compared")
    chains = groups.transforms_of(known)
    plain = known.filter(pc.equal(chains, UNTRANSFORMED))
    if plain.num_rows == 0:
        raise SourceError("all labelled verdicts are of transformed images, none is of an image as it is")
    parts, pairs = groups.split(plain), dict(pairs or {})
    groups.check_pairs(parts, pairs)
    everything = groups.join(list(parts.values()))
    untransformed = pc.equal(groups.transforms_of(table), UNTRANSFORMED)
    return {
        **_generators(groups.groups(parts, pairs), METRICS, samples, seed),
        "all": everything.counts() | _measure(everything, samples, (seed,), (seed,)).numbers(),
        "failed": everything.failed,
        "without_label": table.filter(untransformed).num_rows - plain.num_rows,
        "pairs": pairs,
        "bootstrap": {"samples": samples, "seed": seed, "confidence": CONFIDENCE},
        "robustness": {
            chain: _under_transform(known.filter(pc.equal(chains, chain)), pairs, samples, seed)
            for chain in sorted(set(pc.unique(chains).to_pylist()) - {UNTRANSFORMED}, key=_strength)
        },
    }


def step(chain: str) -> tuple[str, float] | None:
    """Kind and value of a chain of one step; None for longer ones, and for what is no chain."""
    name, _, value = chain.partition(":")
    return (name, float(value)) if name in KINDS and re.fullmatch(r"\d+(\.\d+)?", value) else None


def _strength(chain: str) -> tuple[bool, int, float, str]:
    """The order of chains: single steps first, by kind, from weak to strong."""
    if (found := step(chain)) is None:
        return True, 0, 0.0, chain
    kind, value = found
    return False, list(KINDS).index(kind), -value if kind in ("jpeg", "crop") else value, chain


def _under_transform(table: pa.Table, pairs: Mapping[str, str], samples: int, seed: int) -> dict[str, Any]:
    parts = groups.split(table)
    compared = _generators(groups.groups(parts, pairs), ROBUSTNESS_METRICS, samples, seed)
    return {**compared, "failed": sum(part.failed for part in parts.values())}


def _generators(parts: Mapping[str, Group], names: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    """Numbers of each generator and of their unweighted mean, over those for which a metric is defined."""

    def measure(item: tuple[str, Group]) -> Measured:
        name, group = item
        return _measure(group.rows, samples, _seed(seed, group.reals_of), _seed(seed, name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of it is NumPy's, which lets other threads work
        measured = list(pool.map(measure, parts.items()))
    whole = [each for each, group in zip(measured, parts.values(), strict=True) if group.rows.both_classes]
    counted = {name: whole if name in OF_BOTH else measured for name in names}
    mean = Measured(
        values={name: _mean([each.values[name] for each in some]) for name, some in counted.items()},
        samples={name: _mean([each.samples[name] for each in some]) for name, some in counted.items()},
        without_interval=WITHOUT_INTERVAL.union(*(each.without_interval for each in measured)),
    )
    defined = {name: sum(not np.isnan(each.values[name]) for each in some) for name, some in counted.items()}
    return {
        "generators": {
            name: group.rows.counts() | each.numbers(names)
            for (name, group), each in zip(parts.items(), measured, strict=True)
        },
        "macro_mean": {name: {**number, "generators": defined[name]} for name, number in mean.numbers(names).items()},
    }


def _seed(seed: int, name: str) -> tuple[int, int]:
    return seed, crc32(name.encode())


def _measure(rows: LabelledScores, samples: int, reals_seed: tuple[int, ...], fakes_seed: tuple[int, ...]) -> Measured:
    """Groups with the same reals and `reals_seed` draw the same of them."""
    given = rows.labels, rows.probabilities, rows.said == FAKE
    values = {name: np.asarray(np.nan if x is None else x) for name, x in metrics.summary(*given).items()}
    drawn = metrics.bootstrap(*given, samples=samples, seed=reals_seed)
    counts = rows.confusion()
    seeds = (*reals_seed, REAL), (*fakes_seed, FAKE)
    redrawn = np.stack([_redraw(n, samples, seed) for n, seed in zip(counts, seeds, strict=True)], axis=1)
    # of so few reals a sample repeats the highest or lacks it, and says little of what other reals would score
    few = {name for name, limit in metrics.FPR_LIMITS.items() if counts[REAL].sum() * limit < 1.0 - 1e-9}
    return Measured(
        values=values | _of_verdicts(counts), samples=drawn | _of_verdicts(redrawn),
        without_interval=WITHOUT_INTERVAL | few,
    )  # fmt: skip


def _redraw(counts: groups.Integers, samples: int, seed: tuple[int, ...]) -> groups.Integers:
    """(K, 3) verdicts of bootstrap samples of images of which so many (3,) got each: to draw images is to draw
    their verdicts."""
    total = int(counts.sum())
    if not total:
        return np.zeros((samples, 3), dtype=np.int64)
    return np.random.default_rng(seed).multinomial(total, counts / total, size=samples)


def _of_verdicts(counts: groups.Integers) -> dict[str, Array]:
    """Metrics (...,) of images (..., 2, 3) by label and verdict; NaN where there is no image."""
    reals, fakes, uncertain = counts[..., 0, :].sum(-1), counts[..., 1, :].sum(-1), counts[..., UNCERTAIN].sum(-1)
    passed, found = counts[..., 0, REAL], counts[..., 1, FAKE]
    return {
        "acc": _ratio(passed + found, reals + fakes),
        "real_acc": _ratio(passed, reals),
        "fake_acc": _ratio(found, fakes),
        "acc_decided": _ratio(passed + found, reals + fakes - uncertain),
        "uncertain_share": _ratio(uncertain, reals + fakes),
    }


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Array:
    undefined = np.full(np.shape(whole), np.nan)
    return np.asarray(np.divide(part, whole, out=undefined, where=np.asarray(whole) > 0))


def _mean(values: Sequence[Array]) -> Array:
    """Mean over groups, of arrays of one shape, without those that are NaN; NaN where all are, or none is there."""
    if not values:
        return np.asarray(np.nan)
    stacked = np.stack(values)
    defined = ~np.isnan(stacked)
    return _ratio(np.where(defined, stacked, 0.0).sum(axis=0), defined.sum(axis=0))


def long_table(result: Mapping[str, Any]) -> pa.Table:
    """A result of `compare` as rows of `LONG`."""
    rows = list(_long_rows(result, METRICS, None))
    for chain, compared in result["robustness"].items():
        rows += _long_rows(compared, ROBUSTNESS_METRICS, chain)
    return pa.Table.from_pylist(rows, schema=LONG)


def _long_rows(compared: Mapping[str, Any], names: Sequence[str], chain: str | None) -> Iterator[dict[str, Any]]:
    named = {MACRO_MEAN: compared["macro_mean"], **({ALL: compared["all"]} if "all" in compared else {})}
    for group, numbers in [*named.items(), *compared["generators"].items()]:
        counts = {"real": numbers.get("real"), "fake": numbers.get("fake")}
        for name in names:
            yield {"group": group, "transform": chain, "metric": name, **numbers[name], **counts}
