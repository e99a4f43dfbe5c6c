"""Group labelled verdict rows by generator, each with the reals to compare its fakes with.

Dimensions: n images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import benchmarks
from jobs.dataset.labels import NO_GENERATOR
from nsnet.errors import ConfigError, SourceError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SAID: Final = ("real", "uncertain", "fake")
"""Verdicts."""
REAL, UNCERTAIN, FAKE = range(3)
UNTRANSFORMED: Final = ""


@dataclass(frozen=True, kw_only=True)
class LabelledScores:
    """Scored verdicts with labels."""

    labels: Integers
    """(n,), real = 0, fake = 1."""
    probabilities: Array
    """(n,), in [0, 1]."""
    said: Integers
    """(n,), index of the verdict in `SAID`."""
    failed: int = 0
    """Number of further images that failed."""

    def take(self, chosen: npt.NDArray[Any], failed: int = 0) -> "LabelledScores":
        """The chosen rows, by mask or index."""
        return LabelledScores(
            labels=self.labels[chosen],
            probabilities=self.probabilities[chosen],
            said=self.said[chosen],
            failed=failed,
        )

    @property
    def both_classes(self) -> bool:
        """Whether there are reals and fakes."""
        return 0 < int(self.labels.sum()) < len(self.labels)

    def confusion(self) -> Integers:
        """(2, 3) number of images by label and verdict."""
        return np.bincount(self.labels * 3 + self.said, minlength=6).reshape(2, 3)

    def counts(self) -> dict[str, Any]:
        """JSON-ready numbers of images."""
        table = self.confusion()
        return {
            "real": int(table[0].sum()),
            "fake": int(table[1].sum()),
            "failed": self.failed,
            "uncertain": int(table[:, UNCERTAIN].sum()),
            "confusion": {
                name: dict(zip(SAID, table[label].tolist(), strict=True)) for label, name in enumerate(("real", "fake"))
            },
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """A generator: its fakes, and the reals that they are compared with."""

    rows: LabelledScores
    """Reals, then fakes."""
    reals_of: str
    """The generator that the reals belong to."""


Parts = dict[tuple[str, int], LabelledScores]
"""(Generator, label) -> its rows."""


def join(parts: Sequence[LabelledScores]) -> LabelledScores:
    """Concatenate the rows of at least one part."""
    return LabelledScores(
        labels=np.concatenate([part.labels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        said=np.concatenate([part.said for part in parts]),
        failed=sum(part.failed for part in parts),
    )


def transforms_of(table: pa.Table) -> Any:
    """Chains of the rows (n,) as Arrow strings; `UNTRANSFORMED` if the value or the column is missing."""
    if "transform" not in table.column_names:
        return pa.array([UNTRANSFORMED] * table.num_rows, pa.string())
    return pc.fill_null(table.column("transform"), UNTRANSFORMED)


def split(table: pa.Table, order_of: pa.Table | None = None) -> Parts:
    """Labelled verdicts by generator and label, in an order that does not depend on the table's.

    `order_of`: verdicts on the same images, row by row, that determine the order instead; two splits by one order can
    be compared image by image. Raises `SourceError` for scored rows without a valid verdict or probability.
    """
    scored = pc.equal(table.column("status"), "scored").to_numpy(zero_copy_only=False)
    rows = _scores(table)
    ordering = rows if order_of is None else _scores(order_of)
    _check(rows.take(scored))
    generators = pc.fill_null(table.column("generator"), NO_GENERATOR)
    names = sorted(pc.unique(generators).to_pylist())
    codes = pc.index_in(generators, pa.array(names, pa.string())).to_numpy()
    parts = {}
    for code, name in enumerate(names):
        for label in (0, 1):
            mask = (codes == code) & (rows.labels == label)
            part, by = rows.take(mask & scored, int((mask & ~scored).sum())), ordering.take(mask & scored)
            order = np.lexsort((by.said, by.probabilities))
            # shuffle, because bootstraps of equal-sized groups draw the same positions, which would have similar scores
            np.random.default_rng(crc32(name.encode())).shuffle(order)
            parts[name, label] = part.take(order, part.failed)
    return parts


def _scores(table: pa.Table) -> LabelledScores:
    """All rows of a table, also those of failed images."""
    verdicts = pc.fill_null(pc.index_in(table.column("verdict"), pa.array(SAID)), -1)
    return LabelledScores(
        labels=table.column("label").to_numpy().astype(np.int64),
        probabilities=table.column("prob_fake").cast(pa.float64()).to_numpy(),  # null becomes NaN
        said=verdicts.to_numpy().astype(np.int64),
    )


def _check(scored: LabelledScores) -> None:
    if not np.isin(scored.labels, (0, 1)).all():
        raise SourceError("labels must be 0 (real) or 1 (fake)")
    good = (scored.probabilities >= 0.0) & (scored.probabilities <= 1.0)  # False for NaN
    if not good.all():
        raise SourceError(f"{int((~good).sum())} scored rows have no probability in [0, 1]")
    if (scored.said < 0).any():
        raise SourceError(f"{int((scored.said < 0).sum())} scored rows have a verdict other than {', '.join(SAID)}")


def groups(parts: Parts, pairs: Mapping[str, str]) -> dict[str, Group]:
    """The generators, each with its own reals or, if present, those of its pair.

    A generator that only lends its reals has no group; its images and failures may count in several groups.
    """
    by_name = {}
    lenders = {real for fake, real in pairs.items() if (fake, 1) in parts}
    for name in dict.fromkeys(name for name, _ in parts):
        fakes, reals_of = parts[name, 1], pairs.get(name, name)
        if (reals_of, 0) not in parts:
            reals_of = name
        if name in lenders and not len(fakes.labels) and not fakes.failed:
            continue
        by_name[name] = Group(rows=join([parts[reals_of, 0], fakes]), reals_of=reals_of)
    return by_name


def check_pairs(parts: Parts, pairs: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a pair whose first generator has reals, or whose second has none."""
    for fake, real in pairs.items():
        pair = f"the pair {fake}={real} does not fit"
        for name in (fake, real):
            if (name, 0) not in parts:
                raise ConfigError(f"{pair}: no labelled verdict is of a generator {name}")
        if len(parts[fake, 0].labels):
            raise ConfigError(f"{pair}: {fake} has reals of its own")
        if not len(parts[real, 0].labels):
            raise ConfigError(f"{pair}: {real} has no scored reals")


def find_pairs(table: pa.Table) -> dict[str, str]:
    """Pairs of benchmarks (`benchmarks.paired_reals`) for the generators in these rows that have no reals."""
    chosen = pc.and_(pc.is_valid(table.column("label")), pc.equal(transforms_of(table), UNTRANSFORMED))
    labelled = table.filter(chosen)
    names = pc.fill_null(labelled.column("generator"), NO_GENERATOR)
    reals = pc.and_(pc.equal(labelled.column("label"), 0), pc.equal(labelled.column("status"), "scored"))
    with_reals = set(pc.unique(names.filter(reals)).to_pylist())
    known = benchmarks.paired_reals(pc.unique(names).to_pylist())
    return {fake: real for fake, real in known.items() if fake not in with_reals and real in with_reals}
