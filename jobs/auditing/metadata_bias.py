"""How well real and fake can be told apart without looking at an image: by its file's format, size, bytes and quality.

Dimensions: n images, k columns.

Where that works, a detector may learn it instead of the generator's traces, and a benchmark rewards it (Grommelt et al.
2024, "Fake or JPEG?"). A small random forest is asked about images that it was not fitted on; its AUROC counts.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nsnet import metrics

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

BOUND: Final = 0.6
"""Metadata tell a generator's images apart where the lower end of the AUROC's interval is above this.

Of 360 made-up sets of 20, 40 and 100 images whose metadata say nothing, two are called so. Of the eight sets of
real files that it was tried on three are, with lower ends of 0.65 and above over five seeds; the next one has 0.42."""
MIN_IMAGES: Final = 10
"""Different images (near-duplicates count once) that each class must have."""
MAX_IMAGES: Final = 10_000
"""Images of each class that are looked at, drawn at random: more would only make an interval of ± 0.01 narrower."""
MAX_RATIO: Final = 20
"""Images of a class for each of the other at most: more say no more, and trees would hardly meet the rare class."""

FOLDS: Final = 5
TREES: Final = 50
TREE_IMAGES: Final = 2000
"""Images that a tree is grown on at most: a rule that needs more to be found is none that a detector takes up."""
LEAF_IMAGES: Final = 3

CONFIDENCE_Z: Final = 1.96
WIDENING: Final = 4.0 / 3.0
"""Factor on the standard error. The interval's formula takes the scores as given, but the forests that gave them shared
most of their images: of made-up sets of 20 to 100 images, with a rule and without, the AUROCs were spread 1.3 to
1.4 times as wide as the formula says."""

UNREADABLE: Final = -1
"""In place of the group of an image that failed."""

SIZE: Final = ("width", "height", "area", "aspect")
CAUSES: Final = ("format", "size", "bytes per pixel", "JPEG quality")
"""What a person can do something about, in the words of a report."""
SINGLE: Final = (*SIZE, "bytes per pixel", "JPEG quality", "format")
"""What has an AUROC of its own."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What is known of n images without looking at them."""

    columns: dict[str, Array]
    """(n, k) of each of `CAUSES`: formats one by one as 0 or 1; `SIZE`; JPEG quality NaN where there is none."""
    labels: Indices
    """(n,) real = 0, fake = 1."""
    groups: Indices
    """(n,) near-duplicate group: it is never in two folds."""

    def at(self, rows: Indices) -> "Metadata":
        """Those of some rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Metadata(columns=columns, labels=self.labels[rows], groups=self.groups[rows])


def metadata(table: pa.Table, groups: Indices) -> Metadata:
    """Of those rows of `inventory.IMAGES` that have a label and a group; `groups`: near-duplicate group of each."""
    some = pc.is_valid(table.column("label")).to_numpy() & (groups != UNREADABLE)
    table, groups = table.filter(pa.array(some)), groups[some]
    names = ("width", "height", "size_bytes", "jpeg_quality")
    width, height, size_bytes, quality = (np.asarray(table.column(name).to_numpy(), dtype=np.float64) for name in names)
    area = np.maximum(width * height, 1.0)
    formats = table.column("format").combine_chunks().fill_null("").dictionary_encode().indices.to_numpy()
    return Metadata(
        columns={
            "format": (formats[:, None] == np.unique(formats)).astype(np.float64),
            "size": np.stack([width, height, np.log(area), width / np.maximum(height, 1.0)], axis=1),
            "bytes per pixel": (size_bytes / area)[:, None],
            "JPEG quality": quality[:, None],
        },
        labels=table.column("label").to_numpy().astype(np.int64),
        groups=groups,
    )


def measure(known: Metadata, seed: int = 0) -> dict[str, Any]:
    """What a generator's metadata say of its labels; JSON-ready.

    `auroc` with its 95 % `interval`, `biased`, `told_by` (causes that suffice alone, the strongest first, with AUROC
    and interval of each), `single` (AUROC of every one of `SINGLE` in the better direction, without a model), and
    `undefined`: why there are no such numbers. What is undefined is None, never 0.
    """
    counts = {name: int((known.labels == label).sum()) for label, name in enumerate(("real", "fake"))}
    result: dict[str, Any] = {**counts, "auroc": None, "interval": None, "biased": None, "told_by": {}}
    reason = undefined(known)
    if reason is not None:
        return {**result, "single": dict.fromkeys(SINGLE), "undefined": reason}
    known = _sample(known, seed)
    together = separation(known, np.concatenate([known.columns[name] for name in CAUSES], axis=1), seed)
    biased = together["interval"][0] > BOUND
    causes = _causes(known, seed) if biased else {}
    return {**result, **together, "biased": biased, "told_by": causes, "single": _single(known), "undefined": None}


def undefined(known: Metadata) -> str | None:
    """Why these images cannot tell anything; None: they can."""
    different = [len(np.unique(known.groups[known.labels == label])) for label in (0, 1)]
    if not all(different):
        return "one class only" if any(different) else "no image with a label"
    return None if min(different) >= MIN_IMAGES else f"fewer than {MIN_IMAGES} different images of a class"


def separation(known: Metadata, columns: Array, seed: int = 0) -> dict[str, Any]:
    """AUROC and interval of cross-validated forests on columns (n, k); NaN is a value like any other."""
    auroc, error = clustered_auroc(known.labels, _scores(known, columns, seed), known.groups)
    reach = CONFIDENCE_Z * WIDENING * error
    return {"auroc": auroc, "interval": [max(auroc - reach, 0.0), min(auroc + reach, 1.0)]}


def clustered_auroc(labels: Indices, scores: Array, groups: Indices) -> tuple[float, float]:
    """(AUROC, its standard error) of scores (n,) of both classes.

    DeLong et al. 1988, with the sum over clusters of Obuchowski 1997: images of one group are no independent
    witnesses.
    Where the classes are separated without an error it is 0, which does not mean that the AUROC is known exactly.
    """
    fake = labels == 1
    m, n = int(fake.sum()), int((~fake).sum())
    ranks = _ranks(scores)
    shares = np.empty(len(scores))  # of the other class that an image is on the right side of
    shares[fake] = (ranks[fake] - _ranks(scores[fake])) / n
    shares[~fake] = 1.0 - (ranks[~fake] - _ranks(scores[~fake])) / m
    auroc = float(shares[fake].mean())
    _, cluster = np.unique(groups, return_inverse=True)
    parts = np.bincount(cluster, weights=(shares - auroc) / np.where(fake, m, n))
    return auroc, float(np.sqrt(len(parts) / max(len(parts) - 1, 1) * (parts**2).sum()))


def folds(labels: Indices, groups: Indices, seed: int) -> Indices:
    """(n,) fold of each image: no group is cut, and classes are dealt out evenly.

    Groups lie in the order of their share of fakes, so that those with a real one are a run, and those with a fake one:
    each fold gets some of either once there are `FOLDS` of them. (scikit-learn's way takes seconds for 10,000 groups.)
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    share = np.bincount(group, weights=labels) / sizes
    order = np.lexsort((np.random.default_rng(seed).random(len(sizes)), sizes, share))
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) % FOLDS
    return np.asarray(place[group])


def _ranks(values: Array) -> Array:
    """(n,) from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[place])


def _scores(known: Metadata, columns: Array, seed: int) -> Array:
    """(n,) share of the trees that call an image fake, by forests that have not seen it or a near-duplicate of it."""
    from sklearn.ensemble import RandomForestClassifier  # a second to import

    columns = np.where(np.isnan(columns), -1.0, columns)
    scores = np.zeros(len(columns))
    if (columns == columns[:1]).all():  # else the shares of the folds' classes would pass for knowledge
        return scores
    fold = folds(known.labels, known.groups, seed)
    for number in range(FOLDS):
        fitted, asked = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        forest = RandomForestClassifier(
            TREES, min_samples_leaf=LEAF_IMAGES, max_samples=min(len(fitted), TREE_IMAGES), n_jobs=1,
            random_state=seed,
        )  # fmt: skip
        forest.fit(columns[fitted], known.labels[fitted])
        scores[asked] = forest.predict_proba(columns[asked])[:, 1]
    return scores


def _sample(known: Metadata, seed: int) -> Metadata:
    """At most `MAX_IMAGES` images of each class, and `MAX_RATIO` for each of the other."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(known.labels == label) for label in (0, 1)]
    most = min(MAX_IMAGES, MAX_RATIO * min(len(some) for some in rows))
    rows = [rng.choice(some, most, replace=False) if len(some) > most else some for some in rows]
    return known.at(np.sort(np.concatenate(rows)))


def _causes(known: Metadata, seed: int) -> dict[str, dict[str, Any]]:
    """The causes that suffice alone, the strongest first. JPEG quality is asked of images that have one."""
    found = {}
    for name in CAUSES:
        some = known.at(np.flatnonzero(~np.isnan(known.columns[name]).any(axis=1)))
        if undefined(some) is None:
            alone = separation(some, some.columns[name], seed)
            if alone["interval"][0] > BOUND:
                found[name] = alone
    return dict(sorted(found.items(), key=lambda item: -item[1]["auroc"]))


def _single(known: Metadata) -> dict[str, float | None]:
    """AUROC of each single value, in the better direction; of formats that of the one that tells most."""
    columns = known.columns
    values = {name: columns["size"][:, i : i + 1] for i, name in enumerate(SIZE)} | columns
    return {name: _best(known.labels, values[name]) for name in SINGLE}


def _best(labels: Indices, columns: Array) -> float | None:
    found = []
    for column in columns.T:
        some = ~np.isnan(column)
        auroc = metrics.auroc(labels[some], column[some])
        found += [max(auroc, 1.0 - auroc)] if auroc is not None else []
    return max(found, default=None)
