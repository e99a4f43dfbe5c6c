"""Compare verdicts with labels: metrics with intervals, per generator, as their mean, and over all images.

Dimensions: K bootstrap samples.

An "uncertain" verdict is not correct. `acc`, `real_acc` and `fake_acc` are shares of all images that were judged
correctly, so that a detector gains nothing by abstaining. `acc_decided` is the share of correct ones among the other
verdicts; read it with `uncertain_share`, since a detector that decides only easy images scores well there. An uncertain
verdict raises no alarm, which is what the precisions count. The other metrics use only the probabilities.

The mean over generators weights each generator equally. Intervals are percentiles of a bootstrap that resamples the
reals and the fakes of each generator. Reals that several generators share are resampled once for all of them; else the
interval of the mean would be too narrow. `ece` has no interval: resampling adds noise to each bin, and the interval
would lie above the value. A TPR at a false positive rate of 1/m has no interval with fewer than m reals, and neither
has a mean of such TPRs. A generator's numbers do not depend on the order of rows or on other generators.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import FAKE, REAL, UNCERTAIN, UNTRANSFORMED, Array, Group, LabelledScores
from nsnet import metrics
from nsnet.errors import ConfigError, SourceError
from nsnet.metrics import mean_defined, ratio
from nsnet.transforms import KINDS

METRICS: Final = (*metrics.METRICS, "acc_decided", "uncertain_share")
ROBUSTNESS_METRICS: Final = ("acc", "ap", "auroc", "tpr_at_fpr_1")
"""Metrics to compute under each transform."""
WITHOUT_INTERVAL: Final = frozenset({"ece"})
OF_BOTH: Final = ("acc", "acc_decided")
"""Metrics with another meaning if there is one class only: the mean leaves out generators with one class."""
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
"""Columns of the long table: one row per group, transform and metric."""
MACRO_MEAN: Final = "(macro mean)"
ALL: Final = "(all)"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of one group and of its bootstrap samples. NaN is undefined."""

    values: dict[str, Array]
    """Metric -> value ()."""
    samples: dict[str, Array]
    """Metric -> values (K,) of the bootstrap samples."""
    without_interval: frozenset[str] = WITHOUT_INTERVAL
    """Metrics whose samples give no valid interval."""

    def numbers(self, names: Sequence[str] = METRICS) -> dict[str, dict[str, float | None]]:
        """Metric -> value, low and high; None if undefined."""
        intervals = metrics.intervals({name: self.samples[name] for name in names}, CONFIDENCE)
        numbers = {}
        for name in names:
            low, high = (None, None) if name in self.without_interval else intervals[name] or (None, None)
            value = float(self.values[name])
            numbers[name] = {"value": None if np.isnan(value) else value, "low": low, "high": high}
        return numbers


def compare(
    table: pa.Table, *, samples: int = SAMPLES, seed: int = 0, pairs: Mapping[str, str] | None = None, align: str = ""
) -> dict[str, Any]:
    """Compare verdict rows (`schema.VERDICTS`) with their labels; JSON-ready, None is undefined.

    `pairs`: generator without reals -> the generator whose reals it is compared with. A generator that only lends its
    reals is not in the result. Rows with a transform count only in `robustness`; with `align`, a chain, those of images
    that were aligned by it before, under the name of the transform that followed. Raises `SourceError` if there is
    nothing to compare, `ConfigError` for pairs that do not fit.
    """
    if samples < 1:
        raise ConfigError(f"an interval needs at least 1 bootstrap sample, got {samples}")
    known = table.filter(pc.is_valid(table.column("label")))
    if known.num_rows == 0:
        raise SourceError("no verdict has a label: give verdicts on a labelled source")
    chains = groups.transforms_of(known)
    plain = known.filter(pc.equal(chains, UNTRANSFORMED))
    if plain.num_rows == 0:
        raise SourceError("all labelled verdicts are of transformed images: untransformed ones are needed")
    parts, pairs = groups.split(plain), dict(pairs or {})
    groups.check_pairs(parts, pairs)
    everything = groups.join(list(parts.values()))
    untransformed = pc.equal(groups.transforms_of(table), UNTRANSFORMED)
    first = f"{align}+" if align else UNTRANSFORMED
    after = {
        chain.removeprefix(first): chain
        for chain in pc.unique(chains).to_pylist()
        if chain.startswith(first) and chain != UNTRANSFORMED
    }
    return {
        **_generators(groups.groups(parts, pairs), METRICS, samples, seed),
        "all": everything.counts() | _measure(everything, samples, (seed,), (seed,)).numbers(),
        "failed": everything.failed,
        "without_label": table.filter(untransformed).num_rows - plain.num_rows,
        "pairs": pairs,
        "bootstrap": {"samples": samples, "seed": seed, "confidence": CONFIDENCE},
        "robustness": {
            name: _under_transform(known.filter(pc.equal(chains, after[name])), pairs, samples, seed)
            for name in sorted(after, key=_strength)
        },
    }


def baseline(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers that those of `robustness` are compared with: of aligned images, if there are some."""
    untransformed: Mapping[str, Any] = result["alignment"]["aligned"] if result.get("alignment") else result
    return untransformed


def step(chain: str) -> tuple[str, float] | None:
    """Kind and value of a chain of one step; None for a longer or invalid chain."""
    name, _, value = chain.partition(":")
    return (name, float(value)) if name in KINDS and re.fullmatch(r"\d+(\.\d+)?", value) else None


def _strength(chain: str) -> tuple[bool, int, float, str]:
    """Sort key of chains: single steps first, by kind, from weak to strong."""
    if (parsed := step(chain)) is None:
        return True, 0, 0.0, chain
    kind, value = parsed
    return False, list(KINDS).index(kind), -value if kind in ("jpeg", "crop", "centre") else value, chain


def _under_transform(table: pa.Table, pairs: Mapping[str, str], samples: int, seed: int) -> dict[str, Any]:
    parts = groups.split(table)
    compared = _generators(groups.groups(parts, pairs), ROBUSTNESS_METRICS, samples, seed)
    return {**compared, "failed": sum(part.failed for part in parts.values())}


def _generators(parts: Mapping[str, Group], names: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    return summarise(parts, measure_all(parts, samples, seed), names)


def measure_all(parts: Mapping[str, Group], samples: int, seed: int) -> list[Measured]:
    """Metrics of each generator."""

    def measure(item: tuple[str, Group]) -> Measured:
        name, group = item
        return _measure(group.rows, samples, seed_of(seed, group.reals_of), seed_of(seed, name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy does most of the work and releases the GIL
        return list(pool.map(measure, parts.items()))


def summarise(parts: Mapping[str, Group], measured: Sequence[Measured], names: Sequence[str]) -> dict[str, Any]:
    """Metrics of each generator, and their unweighted mean over the generators for which a metric is defined."""
    both_classes = [each for each, group in zip(measured, parts.values(), strict=True) if group.rows.both_classes]
    averaged = {name: both_classes if name in OF_BOTH else measured for name in names}
    mean = Measured(
        values={name: mean_defined([each.values[name] for each in members]) for name, members in averaged.items()},
        samples={name: mean_defined([each.samples[name] for each in members]) for name, members in averaged.items()},
        without_interval=WITHOUT_INTERVAL.union(*(each.without_interval for each in measured)),
    )
    defined = {name: sum(not np.isnan(each.values[name]) for each in members) for name, members in averaged.items()}
    return {
        "generators": {
            name: group.rows.counts() | each.numbers(names)
            for (name, group), each in zip(parts.items(), measured, strict=True)
        },
        "macro_mean": {name: {**number, "generators": defined[name]} for name, number in mean.numbers(names).items()},
    }


def seed_of(seed: int, name: str) -> tuple[int, int]:
    """Seed of the samples of a generator's reals, or of its fakes."""
    return seed, crc32(name.encode())


def _measure(rows: LabelledScores, samples: int, reals_seed: tuple[int, ...], fakes_seed: tuple[int, ...]) -> Measured:
    """Metrics of a group. Groups with the same reals and `reals_seed` draw the same bootstrap samples of them."""
    inputs = rows.labels, rows.probabilities, rows.said == FAKE
    values = {name: np.asarray(np.nan if x is None else x) for name, x in metrics.summary(*inputs).items()}
    drawn = metrics.bootstrap(*inputs, samples=samples, seed=reals_seed)
    counts = rows.confusion()
    seeds = (*reals_seed, REAL), (*fakes_seed, FAKE)
    redrawn = np.stack([_redraw(n, samples, seed) for n, seed in zip(counts, seeds, strict=True)], axis=1)
    # with so few reals, a sample either repeats or lacks the highest one, so the interval would be invalid
    few = {name for name, limit in metrics.FPR_LIMITS.items() if counts[REAL].sum() * limit < 1.0 - 1e-9}
    return Measured(
        values=values | _of_verdicts(counts), samples=drawn | _of_verdicts(redrawn),
        without_interval=WITHOUT_INTERVAL | few,
    )  # fmt: skip


def _redraw(counts: groups.Integers, samples: int, seed: tuple[int, ...]) -> groups.Integers:
    """(K, 3) verdict counts of bootstrap samples, given the verdict counts (3,) of the images: resampling the images
    is the same as resampling their verdicts."""
    total = int(counts.sum())
    if not total:
        return np.zeros((samples, 3), dtype=np.int64)
    return np.random.default_rng(seed).multinomial(total, counts / total, size=samples)


def _of_verdicts(counts: groups.Integers) -> dict[str, Array]:
    """Metrics (...,) from counts (..., 2, 3) by label and verdict; NaN if there is no image."""
    reals, fakes, uncertain = counts[..., 0, :].sum(-1), counts[..., 1, :].sum(-1), counts[..., UNCERTAIN].sum(-1)
    real_correct, fake_correct = counts[..., 0, REAL], counts[..., 1, FAKE]
    return {
        "acc": ratio(real_correct + fake_correct, reals + fakes),
        "real_acc": ratio(real_correct, reals),
        "fake_acc": ratio(fake_correct, fakes),
        "acc_decided": ratio(real_correct + fake_correct, reals + fakes - uncertain),
        "uncertain_share": ratio(uncertain, reals + fakes),
    }


def long_table(result: Mapping[str, Any]) -> pa.Table:
    """A result of `compare` as rows of `LONG`; with the one of `alignment.compare_aligned` as `alignment`, if any.

    The metric of a difference between aligned and raw images ends in `_difference`.
    """
    rows = list(_long_rows(result, METRICS, None))
    first = ""
    if aligned := result.get("alignment"):
        rows += _long_rows(aligned["aligned"], ROBUSTNESS_METRICS, aligned["transform"])
        differences = _long_rows(aligned["difference"], ROBUSTNESS_METRICS, aligned["transform"])
        rows += ({**row, "metric": f"{row['metric']}_difference"} for row in differences)
        first = f"{aligned['transform']}+"
    for chain, compared in result["robustness"].items():
        rows += _long_rows(compared, ROBUSTNESS_METRICS, first + chain)
    return pa.Table.from_pylist(rows, schema=LONG)


def _long_rows(compared: Mapping[str, Any], names: Sequence[str], chain: str | None) -> Iterator[dict[str, Any]]:
    named = {MACRO_MEAN: compared["macro_mean"], **({ALL: compared["all"]} if "all" in compared else {})}
    for group, numbers in [*named.items(), *compared["generators"].items()]:
        counts = {"real": numbers.get("real"), "fake": numbers.get("fake")}
        for name in names:
            yield {"group": group, "transform": chain, "metric": name, **numbers[name], **counts}
