"""Compare the verdicts on images as they are (raw) with those on aligned images: the same images, judged both ways.

Dimensions: n images, K bootstrap samples.

A detector that knows the fakes by their format, quality or size loses its numbers under an alignment. Differences are
aligned − raw, and their intervals come from the same resamples of the same images. Of 20 differences that are zero,
about one has an interval without zero.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset.labels import NO_GENERATOR
from jobs.dataset.manifest import form_id
from jobs.evaluation import comparison, groups
from jobs.evaluation.comparison import ROBUSTNESS_METRICS, SAMPLES, Measured
from jobs.evaluation.groups import FAKE, REAL, UNTRANSFORMED, Array, Group, LabelledScores
from nsnet import metrics
from nsnet.errors import SourceError


def compare_aligned(
    table: pa.Table, align: str, *, samples: int = SAMPLES, seed: int = 0, pairs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Metrics raw and under the alignment, and their differences, per generator and as their mean; JSON-ready.

    `table`: verdict rows with `image_id`, of raw and of aligned images. `pairs`: as in `comparison.compare`. Keys:
    `transform`; `images` judged both ways, and `unpaired` ones, which do not count; `raw`, `aligned` and `difference`;
    `parted`, generator -> its metrics whose difference has an interval without zero. Raises `SourceError` if no image
    was judged both ways.
    """
    known = table.filter(pc.is_valid(table.column("label")))
    chains = groups.transforms_of(known)
    forms = {name: known.filter(pc.equal(chains, name)) for name in (UNTRANSFORMED, align)}
    failed = {name: pc.sum(pc.equal(rows.column("status"), "failed")).as_py() or 0 for name, rows in forms.items()}
    judged = {name: rows.filter(pc.equal(rows.column("status"), "scored")) for name, rows in forms.items()}
    raw, aligned = _paired(judged[UNTRANSFORMED], judged[align], align)
    if raw.num_rows == 0:
        raise SourceError(
            f"no labelled image was judged both raw and under {align}: --align needs both verdicts, with the image_id "
            "of their image"
        )
    raws, aligneds = (
        groups.groups(groups.split(rows, order_of=raw), dict(pairs or {})) for rows in (raw, aligned)
    )  # fmt: skip
    before, after = (comparison.measure_all(parts, samples, seed) for parts in (raws, aligneds))
    gained = [
        _difference(group, aligneds[name].rows, first, second, samples, seed)
        for (name, group), first, second in zip(raws.items(), before, after, strict=True)
    ]
    difference = comparison.summarise(raws, gained, ROBUSTNESS_METRICS)
    return {
        "transform": align,
        "images": raw.num_rows,
        "unpaired": sum(rows.num_rows for rows in judged.values()) - 2 * raw.num_rows,
        "raw": {**comparison.summarise(raws, before, ROBUSTNESS_METRICS), "failed": failed[UNTRANSFORMED]},
        "aligned": {**comparison.summarise(aligneds, after, ROBUSTNESS_METRICS), "failed": failed[align]},
        "difference": difference,
        "parted": {
            name: parted for name, numbers in difference["generators"].items() if (parted := _parted(numbers))
        },
    }  # fmt: skip


def _paired(raw: pa.Table, aligned: pa.Table, align: str) -> tuple[pa.Table, pa.Table]:
    """The rows of the images in both tables, in the same order. A form has an id of its own, or that of its image."""
    if "image_id" not in raw.column_names:
        return raw.slice(0, 0), aligned.slice(0, 0)

    def keys(rows: pa.Table) -> list[tuple[str, str | None]]:
        names = pc.fill_null(rows.column("generator"), NO_GENERATOR).to_pylist()
        return list(zip(names, rows.column("image_id").to_pylist(), strict=True))

    places = {key: place for place, key in enumerate(keys(aligned)) if key[1] is not None}
    pairs = []
    for place, (name, image_id) in enumerate(keys(raw)):
        if image_id is not None:
            of_image = places.get((name, image_id))
            other = places.get((name, form_id(image_id, align)), of_image)
            pairs += [(place, other)] if other is not None else []
    chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return raw.take(chosen[:, 0]), aligned.take(chosen[:, 1])


def _difference(
    raw: Group, aligned: LabelledScores, before: Measured, after: Measured, samples: int, seed: int
) -> Measured:
    """Aligned − raw. `before` and `after` were measured with equal seeds: their samples drew the same images."""
    values = {name: after.values[name] - before.values[name] for name in ROBUSTNESS_METRICS}
    drawn = {name: after.samples[name] - before.samples[name] for name in ROBUSTNESS_METRICS}
    # accuracies are sampled from counts of verdicts, which do not say which image they belong to
    gain = (_correct(aligned) - _correct(raw.rows)) / len(raw.rows.labels)
    weights = metrics.resamples(raw.rows.labels, samples=samples, seed=comparison.seed_of(seed, raw.reals_of))
    drawn["acc"] = np.concatenate([part @ gain for part in weights])
    return Measured(values=values, samples=drawn, without_interval=before.without_interval)


def _correct(rows: LabelledScores) -> Array:
    """(n,) 1 where the verdict is correct, else 0."""
    return np.asarray(rows.said == np.where(rows.labels == 1, FAKE, REAL), dtype=np.float64)


def _parted(numbers: Mapping[str, Any]) -> list[str]:
    """The metrics whose difference has an interval without zero."""
    intervals = {name: (numbers[name]["low"], numbers[name]["high"]) for name in ROBUSTNESS_METRICS}
    return [name for name, (low, high) in intervals.items() if low is not None and not low <= 0.0 <= high]
