"""Measure how well file metadata alone (format, size, bytes per pixel, JPEG quality) separate real from fake.

Dimensions: n images, k columns.

If they do, a detector may learn them instead of the generator's traces, and a benchmark rewards it (Grommelt et al.
2024, "Fake or JPEG?"). The measure is the AUROC of a small random forest on images that it was not fitted on.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nsnet import metrics
from nsnet.splits import Indices

Array = npt.NDArray[np.float64]

BOUND: Final = 0.6
"""A generator is biased if the lower end of its AUROC's interval is above this.

Of 360 synthetic sets of 20, 40 and 100 images with uninformative metadata, two were called biased. Of eight sets of
real files, three were, with lower ends of at least 0.65 over five seeds; the next one had 0.42."""
MIN_IMAGES: Final = 10
"""Minimum distinct images (near-duplicates count once) per class."""
MAX_IMAGES: Final = 10_000
"""Maximum images per class, drawn at random: more would only narrow an interval of ± 0.01."""
MAX_RATIO: Final = 20
"""Maximum ratio of the classes: more images add nothing, and trees would rarely see the rare class."""

FOLDS: Final = 5
TREES: Final = 50
TREE_IMAGES: Final = 2000
"""Maximum training images per tree; a detector is unlikely to learn a weaker shortcut."""
LEAF_IMAGES: Final = 3

CONFIDENCE_Z: Final = 1.96
WIDENING: Final = 4.0 / 3.0
"""Factor on the standard error. The interval's formula takes the scores as fixed, but the forests that gave them share
most of their images: on synthetic sets of 20 to 100 images, with and without a shortcut, the AUROCs spread 1.3 to 1.4
times as wide as the formula predicts."""

UNREADABLE: Final = -1
"""Group number of a failed image."""

SIZE: Final = ("width", "height", "area", "aspect")
CAUSES: Final = ("format", "size", "bytes per pixel", "JPEG quality")
"""Causes of bias that a user can remove, as named in a report."""
SINGLE: Final = (*SIZE, "bytes per pixel", "JPEG quality", "format")
"""Values with an AUROC of their own."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """File metadata of n images."""

    columns: dict[str, Array]
    """(n, k) for each of `CAUSES`: one-hot formats; `SIZE`; JPEG quality, NaN if the image has none."""
    labels: Indices
    """(n,) real = 0, fake = 1."""
    groups: Indices
    """(n,) near-duplicate group, which is never split over two folds."""

    def at(self, rows: Indices) -> "Metadata":
        """The metadata of these rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Metadata(columns=columns, labels=self.labels[rows], groups=self.groups[rows])


def metadata(table: pa.Table, groups: Indices) -> Metadata:
    """The metadata of labelled and readable rows of `inventory.IMAGES`; `groups`: near-duplicate group of each row."""
    usable = pc.is_valid(table.column("label")).to_numpy() & (groups != UNREADABLE)
    table, groups = table.filter(pa.array(usable)), groups[usable]
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
    """Measure how well metadata predict the labels; JSON-ready.

    Keys: `auroc` with its 95 % `interval`, `biased`, `told_by` (causes that suffice alone, the strongest first, each
    with AUROC and interval), `single` (AUROC of each of `SINGLE` in the better direction, without a model), and
    `undefined` (the reason if there is no AUROC). Undefined numbers are None, never 0.
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
    """The reason why these images cannot be judged; None: they can."""
    different = [len(np.unique(known.groups[known.labels == label])) for label in (0, 1)]
    if not all(different):
        return "one class only" if any(different) else "no image with a label"
    return None if min(different) >= MIN_IMAGES else f"fewer than {MIN_IMAGES} different images of a class"


def separation(known: Metadata, columns: Array, seed: int = 0) -> dict[str, Any]:
    """AUROC and interval of cross-validated forests on columns (n, k); NaN counts as a value of its own."""
    auroc, error = clustered_auroc(known.labels, _scores(known, columns, seed), known.groups)
    reach = CONFIDENCE_Z * WIDENING * error
    return {"auroc": auroc, "interval": [max(auroc - reach, 0.0), min(auroc + reach, 1.0)]}


def clustered_auroc(labels: Indices, scores: Array, groups: Indices) -> tuple[float, float]:
    """(AUROC, its standard error) of scores (n,) of both classes.

    DeLong et al. 1988, with the sum over clusters of Obuchowski 1997, because images of one group are not independent.
    The standard error is 0 for perfectly separated classes, which does not mean that the AUROC is known exactly.
    """
    fake = labels == 1
    m, n = int(fake.sum()), int((~fake).sum())
    from scipy.stats import rankdata  # a second to import

    ranks = rankdata(scores)
    shares = np.empty(len(scores))  # for each image, the share of the other class that it is ranked correctly against
    shares[fake] = (ranks[fake] - rankdata(scores[fake])) / n
    shares[~fake] = 1.0 - (ranks[~fake] - rankdata(scores[~fake])) / m
    auroc = float(shares[fake].mean())
    _, cluster = np.unique(groups, return_inverse=True)
    parts = np.bincount(cluster, weights=(shares - auroc) / np.where(fake, m, n))
    return auroc, float(np.sqrt(len(parts) / max(len(parts) - 1, 1) * (parts**2).sum()))


def folds(labels: Indices, groups: Indices, seed: int) -> Indices:
    """(n,) fold of each image: groups stay whole, and classes are spread evenly.

    Groups are dealt to the folds in the order of their share of fakes. Groups with a real image are then consecutive,
    and so are those with a fake one: each fold gets some of each class that has at least `FOLDS` groups.
    (scikit-learn's StratifiedGroupKFold takes seconds for 10,000 groups.)
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    share = np.bincount(group, weights=labels) / sizes
    order = np.lexsort((np.random.default_rng(seed).random(len(sizes)), sizes, share))
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % FOLDS
    return np.asarray(fold[group])


def _scores(known: Metadata, columns: Array, seed: int) -> Array:
    """(n,) predicted probability of fake, by forests that were not fitted on the image or a near-duplicate of it."""
    from sklearn.ensemble import RandomForestClassifier  # takes a second to import

    columns = np.where(np.isnan(columns), -1.0, columns)
    scores = np.zeros(len(columns))
    if (columns == columns[:1]).all():  # the class shares of the folds would otherwise look like a signal
        return scores
    fold = folds(known.labels, known.groups, seed)
    for number in range(FOLDS):
        fitted, held_out = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        forest = RandomForestClassifier(
            TREES, min_samples_leaf=LEAF_IMAGES, max_samples=min(len(fitted), TREE_IMAGES), n_jobs=1,
            random_state=seed,
        )  # fmt: skip
        forest.fit(columns[fitted], known.labels[fitted])
        scores[held_out] = forest.predict_proba(columns[held_out])[:, 1]
    return scores


def _sample(known: Metadata, seed: int) -> Metadata:
    """A random sample of at most `MAX_IMAGES` images per class, and `MAX_RATIO` times the other class."""
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(known.labels == label) for label in (0, 1)]
    most = min(MAX_IMAGES, MAX_RATIO * min(len(rows) for rows in by_class))
    by_class = [rng.choice(rows, most, replace=False) if len(rows) > most else rows for rows in by_class]
    return known.at(np.sort(np.concatenate(by_class)))


def _causes(known: Metadata, seed: int) -> dict[str, dict[str, Any]]:
    """The causes that suffice alone, the strongest first. JPEG quality is measured on images that have one."""
    sufficient = {}
    for name in CAUSES:
        with_value = known.at(np.flatnonzero(~np.isnan(known.columns[name]).any(axis=1)))
        if undefined(with_value) is None:
            alone = separation(with_value, with_value.columns[name], seed)
            if alone["interval"][0] > BOUND:
                sufficient[name] = alone
    return dict(sorted(sufficient.items(), key=lambda item: -item[1]["auroc"]))


def _single(known: Metadata) -> dict[str, float | None]:
    """AUROC of each single value in the better direction; for formats, that of the most informative one."""
    columns = known.columns
    values = {name: columns["size"][:, i : i + 1] for i, name in enumerate(SIZE)} | columns
    return {name: _best(known.labels, values[name]) for name in SINGLE}


def _best(labels: Indices, columns: Array) -> float | None:
    aurocs = []
    for column in columns.T:
        defined = ~np.isnan(column)
        auroc = metrics.auroc(labels[defined], column[defined])
        aurocs += [max(auroc, 1.0 - auroc)] if auroc is not None else []
    return max(aurocs, default=None)
