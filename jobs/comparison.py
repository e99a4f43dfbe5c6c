"""Verdict rows against their labels: every metric with its interval, per generator, as their mean, and over all.

Dimensions: n pictures, K bootstrap samples.

A verdict "uncertain" is no right answer. `acc`, `real_acc` and `fake_acc` are shares of all pictures that were judged
rightly, so that no detector gains by not answering. `acc_decided` is the share of right ones among the other verdicts,
to be read beside `uncertain_share`: a detector that answers only where it is easy looks good there. An uncertain
verdict raises no alarm, which is what the precisions count; the other metrics are of the probabilities alone.

The mean over generators gives each the same weight, however many pictures it has. Intervals are percentiles of a
bootstrap that draws reals and fakes of each generator anew; reals that several generators are compared with are drawn
once for all of them, or the mean would seem better known than it is. `ece` has none: drawing adds noise to each bin,
and the interval would lie above the value. Neither the order of rows nor other generators change a generator's numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import layouts
from nsnet import metrics
from nsnet.errors import ConfigError, SourceError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

METRICS: Final = (*metrics.METRICS, "acc_decided", "uncertain_share")
ROBUSTNESS_METRICS: Final = ("acc", "ap", "auroc", "tpr_at_fpr_1")
"""What is compared under each transform."""
WITHOUT_INTERVAL: Final = "ece"
SAMPLES: Final = 1000
CONFIDENCE: Final = 0.95

SAID: Final = ("real", "uncertain", "fake")
REAL, UNCERTAIN, FAKE = range(3)
NO_GENERATOR: Final = "(none)"

LONG: Final = pa.schema(
    [
        pa.field("group", pa.string(), nullable=False),  # generator, (macro mean) or (all)
        pa.field("transform", pa.string()),  # null: none
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: undefined
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("real", pa.int64()),  # pictures; null for the mean
        pa.field("fake", pa.int64()),
    ]
)
"""One row per group, transform and metric."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scored verdicts with labels."""

    labels: Integers
    """(n,), real = 0, fake = 1."""
    probabilities: Array
    """(n,), finite, in [0, 1]."""
    said: Integers
    """(n,), place of the verdict in `SAID`."""
    failed: int
    """Pictures beside these that failed."""

    def take(self, chosen: npt.NDArray[Any], failed: int) -> "Rows":
        """Some rows, by mask or by places."""
        return Rows(
            labels=self.labels[chosen],
            probabilities=self.probabilities[chosen],
            said=self.said[chosen],
            failed=failed,
        )

    def confusion(self) -> Integers:
        """(2, 3) pictures by label and verdict."""
        return np.bincount(self.labels * 3 + self.said, minlength=6).reshape(2, 3)

    def counts(self) -> dict[str, Any]:
        """Pictures, JSON-ready."""
        table = self.confusion()
        return {
            "real": int(table[0].sum()),
            "fake": int(table[1].sum()),
            "failed": self.failed,
            "uncertain": int(table[:, UNCERTAIN].sum()),
            "confusion": {SAID[2 * label]: dict(zip(SAID, table[label].tolist(), strict=True)) for label in (0, 1)},
        }


def join(parts: Sequence[Rows]) -> Rows:
    """All rows in one; at least one part."""
    return Rows(
        labels=np.concatenate([part.labels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        said=np.concatenate([part.said for part in parts]),
        failed=sum(part.failed for part in parts),
    )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Metrics of one group: their values, and those of its bootstrap samples. NaN is undefined."""

    values: dict[str, Array]
    """Metric -> ()."""
    samples: dict[str, Array]
    """Metric -> (K,)."""

    def numbers(self, names: Sequence[str]) -> dict[str, Any]:
        """Value, low and high of each metric, JSON-ready; None where undefined."""
        found = metrics.intervals(self.samples, CONFIDENCE)
        numbers = {}
        for name in names:
            low, high = (found[name] if name != WITHOUT_INTERVAL else None) or (None, None)
            value = float(self.values[name])
            numbers[name] = {"value": None if np.isnan(value) else value, "low": low, "high": high}
        return numbers


def compare(
    table: pa.Table, *, samples: int = SAMPLES, seed: int = 0, pairs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Compare verdict rows (`schema.VERDICTS`) with their labels; JSON-ready, None is undefined.

    `pairs`: generator with fakes only -> the one whose reals it is compared with; one that is all reals is then no
    generator of its own. Rows with a transform go to `robustness` and into no other number. Raises `SourceError` where
    there is nothing to compare, `ConfigError` for pairs that do not fit.
    """
    labelled = table.filter(pc.is_valid(table.column("label")))
    if labelled.num_rows == 0:
        raise SourceError("no verdict has a label: nothing can be compared")
    chains = transforms_of(labelled)
    plain = labelled.filter(pc.equal(chains, ""))
    if plain.num_rows == 0:
        raise SourceError("every labelled verdict is of a transformed picture: there is nothing to compare with")
    parts, pairs = split(plain), dict(pairs or {})
    _check_pairs(parts, pairs)
    groups = _groups(parts, pairs)
    drawn = _draw_groups(groups, parts, samples, seed)
    everything = join(list(parts.values()))
    return {
        "generators": {name: groups[name].counts() | drawn[name].numbers(METRICS) for name in groups},
        "macro_mean": _macro_mean(drawn, METRICS),
        "all": everything.counts() | _draw(everything, samples, (seed,), (seed,)).numbers(METRICS),
        "failed": everything.failed,
        "without_label": pc.sum(pc.and_(pc.is_null(table.column("label")), pc.equal(transforms_of(table), ""))).as_py(),
        "pairs": pairs,
        "bootstrap": {"samples": samples, "seed": seed, "confidence": CONFIDENCE},
        "robustness": {
            chain: _under_transform(labelled.filter(pc.equal(chains, chain)), pairs, samples, seed)
            for chain in sorted(set(pc.unique(chains).to_pylist()) - {""})
        },
    }


def transforms_of(table: pa.Table) -> Any:
    """Chains of the rows as an Arrow array of strings; "" for pictures that are as they were."""
    if "transform" not in table.column_names:
        return pa.array([""] * table.num_rows, pa.string())
    return pc.fill_null(table.column("transform"), "")


def find_pairs(table: pa.Table) -> dict[str, str]:
    """Pairs that are known of benchmarks (`layouts.paired_reals`), for the generators of these rows that need one."""
    labelled = table.filter(pc.and_(pc.is_valid(table.column("label")), pc.equal(transforms_of(table), "")))
    names = pc.fill_null(labelled.column("generator"), NO_GENERATOR)
    with_reals = set(names.filter(pc.equal(labelled.column("label"), 0)).to_pylist())
    known = layouts.paired_reals(set(names.to_pylist()))
    return {fake: real for fake, real in known.items() if fake not in with_reals and real in with_reals}


def split(table: pa.Table) -> dict[tuple[str, int], Rows]:
    """Labelled verdicts by generator and label, each in an order that the order of the table does not change."""
    status = np.asarray(table.column("status").to_pylist(), dtype=object) == "scored"
    labels = np.asarray(table.column("label").to_pylist(), dtype=np.int64)
    probabilities = np.asarray(table.column("prob_fake").to_pylist(), dtype=np.float64)
    said = pc.index_in(table.column("verdict"), pa.array(SAID)).to_pylist()
    rows = Rows(
        labels=labels,
        probabilities=probabilities,
        said=np.asarray([-1 if place is None else place for place in said], dtype=np.int64),
        failed=0,
    )
    _check(rows.take(status, 0))
    coded = pc.fill_null(table.column("generator"), NO_GENERATOR).combine_chunks().dictionary_encode()
    codes, names = coded.indices.to_numpy(zero_copy_only=False), coded.dictionary.to_pylist()
    parts = {}
    for name in sorted(names):
        own = codes == names.index(name)
        for label in (0, 1):
            here = own & (labels == label)
            part = rows.take(here & status, int((here & ~status).sum()))
            order = np.lexsort((part.said, part.probabilities))
            # neighbours in this order are alike: groups of one size must not draw the same places of it
            np.random.default_rng(crc32(name.encode())).shuffle(order)
            parts[name, label] = part.take(order, part.failed)
    return parts


def _check(scored: Rows) -> None:
    if not np.isin(scored.labels, (0, 1)).all():
        raise SourceError("labels must be 0 (real) or 1 (fake)")
    bad = ~((scored.probabilities >= 0.0) & (scored.probabilities <= 1.0))  # NaN is bad as well
    if bad.any():
        raise SourceError(f"{int(bad.sum())} scored rows have no probability in [0, 1]")
    if (scored.said < 0).any():
        raise SourceError(f"{int((scored.said < 0).sum())} scored rows have no verdict such as {', '.join(SAID)}")


def _check_pairs(parts: Mapping[tuple[str, int], Rows], pairs: Mapping[str, str]) -> None:
    for fake, real in pairs.items():
        for name in (fake, real):
            if (name, 0) not in parts:
                raise ConfigError(f"the pair {fake}={real}: no verdict is of a generator {name}")
        if len(parts[fake, 0].labels):
            raise ConfigError(f"the pair {fake}={real}: {fake} has reals of its own, leave the pair out")
        if not len(parts[real, 0].labels):
            raise ConfigError(f"the pair {fake}={real}: {real} has no reals")


def _groups(parts: Mapping[tuple[str, int], Rows], pairs: Mapping[str, str]) -> dict[str, Rows]:
    """Generator -> its fakes, with its own reals or those of its pair."""
    fakes_only = {fake for fake, real in pairs.items() if (real, 0) in parts}
    groups = {}
    for name in dict.fromkeys(name for name, _ in parts):
        reals = parts[pairs[name] if name in fakes_only else name, 0]
        fakes = parts[name, 1]
        lends_only = name in pairs.values() and not len(fakes.labels) + fakes.failed
        if not lends_only:
            groups[name] = join([reals, fakes])
    return groups
