"""Measures what a linear probe finds of an image's content in its features: before and after the projection.

Dimensions: n images, D embedding, C classes, K bootstrap samples, m targets: the classes and their permutations.

The probe is a linear discriminant with equal priors: W = (S + λ I)⁻¹ Mᵀ, where S is the covariance within the classes
and M (C, D) are the classes' means, of features that the training folds standardise. It has a closed form, so the
result depends on no optimiser, and one factorisation per fold serves the classes and their permutations.

The probe finds what is linear. Content may remain in ũ in other forms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from nsnet.metrics import intervals, mean_defined, ratio

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MAX_IMAGES: Final = 10_000
"""Most images of a probe: its memory and time grow with n D + D²."""
FOLDS: Final = 5
MIN_MEMBERS: Final = 2 * FOLDS
"""Fewest groups of a class: two for each fold."""
RIDGE: Final = 3.0
"""λ, where standardised features have a mean variance of 1. Of 0.03 to 10, it is at most 0.05 below the best for normal
features of 128 and 768 dimensions, 10 classes, and 150 to 1,600 images."""
PERMUTATIONS: Final = 5
SAMPLES: Final = 1000
CHUNK: Final = 2**18
"""Weights of bootstrap samples in memory at a time."""
CLUSTERS: Final = 8
"""Clusters of captions by default: few enough that each has a hundred of 1,000 images."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How well a linear probe tells classes from features; None is undefined."""

    value: float | None = None
    """Balanced accuracy (mean over classes of the share of images that are recognised) of out-of-fold predictions."""
    low: float | None = None
    """95 % interval of a bootstrap over groups of images. It holds for these folds, not for another training set."""
    high: float | None = None
    chance: float | None = None
    """1 / C."""
    permuted: float | None = None
    """Mean value for permuted classes: what a probe finds where there is nothing."""
    classes: int = 0
    """C, without those that have too few images."""
    images: int = 0
    """Images of these classes."""
    reason: str | None = None
    """Why the value is undefined."""


def probe(
    features: npt.ArrayLike,
    classes: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Probe:
    """Cross-validate a linear probe of features (n, D) for classes (n,) of whole numbers; below 0: the image has none.

    `groups` (n,): images of a group, such as copies, are in one fold, and are drawn together in the bootstrap; None:
    every image is one. Classes with fewer than `MIN_MEMBERS` groups are left out. Raises `ValueError` for other shapes,
    for more than `MAX_IMAGES` images, and for features that are not finite.
    """
    x, y, g = _checked(features, classes, groups)
    kept = _large_enough(y, g)
    x, g = x[kept], np.unique(g[kept], return_inverse=True)[1]
    names, y = np.unique(y[kept], return_inverse=True)
    count = len(names)
    if count < 2:
        return Probe(
            classes=count,
            images=len(y),
            reason=f"{count} classes have at least {MIN_MEMBERS} different images, 2 needed",
        )
    random = np.random.default_rng(seed)
    targets = np.stack([y, *(random.permutation(y) for _ in range(PERMUTATIONS))])
    correct = _out_of_fold(x, targets, _folds(y, g, random), count) == targets
    weights = np.ones(len(y))
    value, *permuted = [float(_balanced(correct[i], targets[i], count, weights)) for i in range(len(targets))]
    bounds = intervals({"value": _bootstrap(correct[0], y, g, count, samples, random)})["value"]
    return Probe(
        value=value, low=bounds and bounds[0], high=bounds and bounds[1], chance=1.0 / count,
        permuted=float(np.mean(permuted)), classes=count, images=len(y),
    )  # fmt: skip


def _checked(
    features: npt.ArrayLike, classes: npt.ArrayLike, groups: npt.ArrayLike | None
) -> tuple[Array, Integers, npt.NDArray[Any]]:
    x, y = np.asarray(features, dtype=np.float64), np.asarray(classes)
    g = np.arange(len(y)) if groups is None else np.asarray(groups)
    if x.ndim != 2 or y.shape != x.shape[:1] or g.shape != y.shape:
        raise ValueError(f"need features (n, D), classes (n,), groups (n,), got {x.shape}, {y.shape}, {g.shape}")
    if len(x) > MAX_IMAGES:
        raise ValueError(f"a probe takes at most {MAX_IMAGES} images, got {len(x)}: draw a sample")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(axis=1).sum())} of {len(x)} features are not finite")
    return x, y.astype(np.int64), g


def _large_enough(y: Integers, g: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(n,) whether an image has a class with enough different groups."""
    large = [c for c in np.unique(y[y >= 0]) if len(np.unique(g[y == c])) >= MIN_MEMBERS]
    return np.isin(y, large)


def _folds(y: Integers, g: Integers, random: np.random.Generator) -> Integers:
    """(n,) fold of each image: the groups of each class, in random order, are dealt to the folds in turn.

    A group with images of several classes counts as of the class of its first image.
    """
    first = np.unique(g, return_index=True)[1]
    order = np.lexsort((random.permutation(len(first)), y[first]))
    fold = np.empty(len(first), dtype=np.int64)
    fold[order] = np.arange(len(first)) % FOLDS
    return np.asarray(fold[g])


def _out_of_fold(x: Array, targets: Integers, fold: Integers, count: int) -> Integers:
    """Predicted classes (m, n) of each image by the probes of the other folds, for each row of targets (m, n)."""
    predicted = np.zeros_like(targets)
    for k in range(FOLDS):
        train, held_out = fold != k, fold == k
        mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
        scale = np.where(deviation > 1e-9 * max(float(deviation.max(initial=0.0)), 1e-300), deviation, np.inf)
        z, unseen = (x[train] - mean) / scale, (x[held_out] - mean) / scale
        factor = cho_factor(z.T @ z / len(z) + RIDGE * np.eye(z.shape[1]), overwrite_a=True, check_finite=False)
        for row, target in enumerate(targets):
            weights, bias = _discriminant(z, factor, target[train], count)
            predicted[row, held_out] = (unseen @ weights + bias).argmax(axis=1)
    return predicted


def _discriminant(z: Array, factor: Any, y: Integers, count: int) -> tuple[Array, Array]:
    """Weights (D, C) and bias (C,) from centred features z (n, D) and their classes y (n,).

    `factor`: Cholesky factor of T + λI, where T = S + Mᵀ Q M is the total covariance and Q holds the classes' shares.
    By Woodbury's identity W = B (I − Q M B)⁻¹ with B = (T + λI)⁻¹ Mᵀ. A class without images is never predicted.
    """
    sizes = np.bincount(y, minlength=count).astype(np.float64)
    means = (np.eye(count)[y].T @ z) / np.maximum(sizes, 1.0)[:, None]
    total = cho_solve(factor, means.T, check_finite=False)
    weights = np.linalg.solve(np.eye(count) - (means @ total).T * (sizes / len(z)), total.T).T
    return weights, np.where(sizes > 0, -0.5 * np.einsum("cd,dc->c", means, weights), -np.inf)


def _balanced(correct: npt.NDArray[np.bool_], y: Integers, count: int, weights: Array) -> Array:
    """Mean over the classes of the weighted share of correct images; weights (..., n) -> (...,)."""
    members = np.eye(count)[y]
    return mean_defined([*np.moveaxis(ratio(weights @ (members * correct[:, None]), weights @ members), -1, 0)])


def _bootstrap(
    correct: npt.NDArray[np.bool_], y: Integers, g: Integers, count: int, samples: int, random: np.random.Generator
) -> Array:
    """Balanced accuracies (K,) of samples of groups, drawn with replacement."""
    size = int(g.max()) + 1
    step = max(1, CHUNK // max(size, len(y)))
    values = []
    for start in range(0, samples, step):
        drawn = random.multinomial(size, np.full(size, 1.0 / size), size=min(step, samples - start))
        values.append(_balanced(correct, y, count, drawn[:, g].astype(np.float64)))
    return np.concatenate(values)


def caption_clusters(text_features: npt.ArrayLike, count: int = CLUSTERS, seed: int = 0) -> Integers:
    """Clusters (n,) of caption features (n, D) by k-means on unit length; rows that are not finite get -1.

    Fitted to all captions at once, also those of held-out folds: the clusters are the probe's target, and no image
    feature takes part. At most as many clusters as different captions.
    """
    from sklearn.cluster import KMeans  # takes a second to import

    text = np.asarray(text_features, dtype=np.float64)
    found = np.full(len(text), -1, dtype=np.int64)
    known = np.isfinite(text).all(axis=1) if text.size else np.zeros(len(text), dtype=bool)
    unit = text[known] / np.maximum(np.linalg.norm(text[known], axis=1, keepdims=True), 1e-12)
    different = len(np.unique(unit.round(6), axis=0))
    if different:
        found[known] = KMeans(min(count, different), n_init=4, random_state=seed).fit_predict(unit)
    return found


def object_classes(names: Sequence[str | None]) -> Integers:
    """Whole numbers (n,) for names of classes; None gives -1."""
    numbers = {name: i for i, name in enumerate(sorted({name for name in names if name is not None}))}
    return np.array([-1 if name is None else numbers[name] for name in names], dtype=np.int64)


def leakage(
    image: npt.ArrayLike,
    projected: npt.ArrayLike,
    text: npt.ArrayLike | None,
    *,
    labels: npt.ArrayLike,
    classes: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    clusters: int = CLUSTERS,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe u `image`, ũ `projected` and caption features `text` (n, D) each; JSON-ready, probes as dictionaries.

    `object_class` and `caption_cluster`: probes of the features `u`, `projected` and `caption` for these. `label`: a
    probe of the caption features for `labels` (n,), real = 0 and fake = 1: does the caption give the answer away?
    `classes` (n,): below 0: unknown. `text` None, or rows that are not finite: no caption.
    """
    u, p, y = np.asarray(image), np.asarray(projected), np.asarray(labels, dtype=np.int64)
    t = np.full((len(u), 1), np.nan) if text is None else np.asarray(text)
    known = np.isfinite(t).all(axis=1) if t.size else np.zeros(len(u), dtype=bool)
    captions = np.where(known[:, None], t, 0.0) if t.size else np.zeros((len(u), 1))

    def probed(features: npt.NDArray[Any], targets: Integers) -> dict[str, Any]:
        return vars(probe(features, targets, groups, seed=seed))

    def probes(targets: Integers) -> dict[str, Any]:
        return {
            "u": probed(u, targets),
            "projected": probed(p, targets),
            "caption": probed(captions, np.where(known, targets, -1)),
        }

    energies = ratio(np.linalg.norm(p, axis=1), np.linalg.norm(u, axis=1))
    return {
        "images": len(u),
        "residual_energy": float(np.nanmean(energies)) if len(u) else None,
        "object_class": probes(np.asarray(classes, dtype=np.int64)),
        "caption_cluster": probes(caption_clusters(np.where(known[:, None], t, np.nan), clusters, seed)),
        "label": probed(captions, np.where(known, y, -1)),
    }
