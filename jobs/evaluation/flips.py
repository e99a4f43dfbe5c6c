"""Compare the verdicts of two detectors on the same images: flips, shift of the score, agreement.

A is the detector in use, B the one that may follow it. An image counts if both judged the same version of it under the
same transform; the newest verdict of each counts. The rows are joined in a database on disk, so outputs of any size
fit. Intervals have 95 %:

- a share: Wilson's (`curves.wilson`);
- a difference of two shares of the same images: Agresti and Min (Statistics in Medicine 24, 2005): Wald's formula after
  0.5 is added to each of the four cells; its test is McNemar's, exact (binomial);
- Cohen's kappa: the large-sample variance of Fleiss, Cohen and Everitt (Psychological Bulletin 72, 1969).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa

from jobs.dataset import schema
from jobs.dataset.labels import NO_GENERATOR
from jobs.evaluation.curves import Z, wilson
from jobs.evaluation.groups import SAID, Integers
from jobs.storage.database import Database, database

FAILED: Final = "failed"
CLASSES: Final = (*SAID, FAILED)
"""What a detector may say of an image."""
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_GROUPS: Final = 50
"""Generators that are shown, the largest first; the others are one group."""
OTHERS: Final = "(others)"

READ: Final = pa.schema(
    [
        schema.VERDICTS.field(name)
        for name in ("image_id", "status", "verdict", "prob_fake", "logit", "error_class", "label", "generator")
    ]
)
"""Columns of verdicts that are compared."""
SHOWN: Final = pa.schema([schema.VERDICTS.field(name) for name in ("image_id", "uri", "transform", "caption")])
"""Columns that are read again for flips only: they take most of the space."""
FLIPS: Final = pa.schema(
    [
        *SHOWN,
        *schema.LABELS,
        *(pa.field(f"said_{which}", pa.string(), nullable=False) for which in "ab"),  # of `CLASSES`
        *(pa.field(f"prob_fake_{which}", pa.float64()) for which in "ab"),
        *(pa.field(f"logit_{which}", pa.float64()) for which in "ab"),
        *(pa.field(f"error_class_{which}", pa.string()) for which in "ab"),
    ]
)
"""Images that the detectors judge differently, the largest difference of `prob_fake` first."""

Batches = Iterable[pa.RecordBatch]


def compare(
    one: Batches, two: Batches, shown: Batches, *, examples: int, write: Callable[[Batches], Any] = lambda flips: None
) -> dict[str, Any]:
    """Compare the newest verdicts (`READ`) of two detectors; JSON-ready, None is undefined.

    `shown`: `SHOWN` of any of their rows, read after the others. `examples`: number of flips to include. `write` is
    given all flips (`FLIPS`).
    """
    with database() as rows:
        _load(rows, one, two)
        counts = _table(rows)
        result: dict[str, Any] = {
            "images": {
                "both": int(counts.sum()),
                "only_a": rows.number("select count(*) from a anti join b using (image_id)"),
                "only_b": rows.number("select count(*) from b anti join a using (image_id)"),
                "scored_by_both": int(counts[:3, :3].sum()),
            },
            "flips": _flips(counts),
            "by_label": {name: _flips(_table(rows, f"label = {number}")) for number, name in enumerate(SAID[::2])},
            "by_generator": dict(_by_generator(rows)),
            "agreement": _agreement(counts[:3, :3]),
            "flagged": _paired(counts[:3, :3], [said == "fake" for said in SAID]),
            "shift": {name: _shift(rows, name) for name in ("prob_fake", "logit")},
            "same_share": _same_share(rows, int(counts[2, :3].sum())),
            "labelled": _labelled(rows),
        }
        _load_flips(rows, shown)
        write(_in_order(rows))
        result["examples"] = [row for batch in _in_order(rows, examples) for row in batch.to_pylist()]
    return result


def _load(rows: Database, one: Batches, two: Batches) -> None:
    """Create the tables `a`, `b`, and `both` of images that both judged, with what they said as numbers."""
    cases = " ".join(f"when '{said}' then {number}" for number, said in enumerate(SAID))
    said = f"case when status <> 'scored' then {len(SAID)} else (case verdict {cases} else {len(SAID)} end) end"
    for table, batches in (("a", one), ("b", two)):
        rows.create(
            table,
            f"image_id::uuid as image_id, {said} as said, prob_fake, logit, error_class, label, generator",
            READ,
        )
        rows.insert(table, batches)
    columns = ", ".join(
        f"{which}.{name} as {name}_{which}"
        for name in ("said", "prob_fake", "logit", "error_class")
        for which in ("a", "b")
    )
    rows.execute(
        f"create table both_judged as select a.image_id, {columns}, coalesce(b.label, a.label) as label, "
        "coalesce(b.generator, a.generator) as generator from a join b on a.image_id = b.image_id"
    )


def _table(rows: Database, where: str = "true") -> Integers:
    """(4, 4) images by what A and what B said, in the order of `CLASSES`."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    found = rows.execute(f"select said_a, said_b, count(*) from both_judged where {where} group by 1, 2")
    for said_a, said_b, number in found:
        counts[said_a, said_b] = number
    return counts


def _flips(counts: Integers) -> dict[str, Any]:
    """Images, flips, and the table, rows by A."""
    images, flips = int(counts.sum()), int(counts.sum() - np.trace(counts))
    table = {said: dict(zip(CLASSES, map(int, row), strict=True)) for said, row in zip(CLASSES, counts, strict=True)}
    return {"images": images, "flips": flips, "share": flips / images if images else None, "table": table}


def _by_generator(rows: Database) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flips of the largest generators with labelled images, and of all others together."""
    name = f"coalesce(generator, '{NO_GENERATOR}')"
    rows.execute(
        f"create table names as select {name} as name, count(*) as images from both_judged where label is not null "
        f"group by 1 order by images desc, name limit {MAX_GROUPS}"
    )
    found: dict[str, Any] = {}
    for shown, said_a, said_b, number in rows.execute(
        f"select coalesce(n.name, '{OTHERS}'), said_a, said_b, count(*) from both_judged left join names n "
        f"on n.name = {name} where label is not null group by 1, 2, 3"
    ):
        counts = found.setdefault(shown, np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64))
        counts[said_a, said_b] += number
    for shown in sorted(found, key=lambda shown: (shown == OTHERS, -int(found[shown].sum()), shown)):
        yield shown, _flips(found[shown])


def _agreement(counts: Integers) -> dict[str, Any]:
    """Share of equal verdicts, and Cohen's kappa with its interval, of images that both scored."""
    n = int(counts.sum())
    if not n:
        return {"share": None, "kappa": None, "low": None, "high": None}
    p = counts / n
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = float(np.trace(p)), float(rows @ columns)
    if expected >= 1.0:  # both always say the same one thing: kappa is 0 / 0
        return {"share": observed, "kappa": None, "low": None, "high": None}
    kappa = (observed - expected) / (1.0 - expected)
    both = columns[:, None] + rows[None, :]
    """both[i, j]: how often B says i, plus how often A says j."""
    diagonal = (np.diag(p) * ((1.0 - expected) - np.diag(both) * (1.0 - observed)) ** 2).sum()
    beside = (1.0 - observed) ** 2 * (p * both**2)[~np.eye(len(p), dtype=bool)].sum()
    variance = (diagonal + beside - (observed * expected - 2.0 * expected + observed) ** 2) / (
        n * (1.0 - expected) ** 4
    )
    error = Z * float(np.sqrt(max(0.0, variance)))
    return {"share": observed, "kappa": kappa, "low": kappa - error, "high": min(1.0, kappa + error)}


def _paired(counts: Integers, marked: list[bool]) -> dict[str, Any]:
    """Share of images with marked verdicts of A and of B, and the difference B − A. `counts`: by verdicts of both."""
    mark = np.array(marked)
    n = int(counts.sum())
    only_a, only_b = int(counts[mark][:, ~mark].sum()), int(counts[~mark][:, mark].sum())
    totals = {"a": int(counts[mark].sum()), "b": int(counts[:, mark].sum())}
    return {
        **{which: _share(number, n) for which, number in totals.items()},
        "only_a": only_a,
        "only_b": only_b,
        **_difference(only_a, only_b, n),
    }


def _share(number: int, n: int) -> dict[str, float | None]:
    """A share with its interval."""
    if not n:
        return {"value": None, "low": None, "high": None}
    low, high = wilson(np.array([number / n]), np.array([n]))
    return {"value": number / n, "low": float(low[0]), "high": float(high[0])}


def _difference(only_a: int, only_b: int, n: int) -> dict[str, Any]:
    """Difference of two shares of the same n images, with interval and p-value, from the images that differ."""
    if not n:
        return {"difference": {"value": None, "low": None, "high": None}, "p_value": None}
    from scipy.stats import binomtest

    a, b, total = only_a + 0.5, only_b + 0.5, n + 2.0
    centre = (b - a) / total
    error = Z * float(np.sqrt(a + b - (b - a) ** 2 / total)) / total
    p_value = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    difference = {"value": (only_b - only_a) / n, "low": max(-1.0, centre - error), "high": min(1.0, centre + error)}
    return {"difference": difference, "p_value": p_value}


def _shift(rows: Database, name: str) -> dict[str, Any]:
    """B − A of a column over images that both scored: mean, and exact quantiles."""
    rows.execute(
        f"create or replace table sorted as select {name}_b - {name}_a as d from both_judged "
        f"where said_a < {len(SAID)} and said_b < {len(SAID)} and d is not null order by d"
    )
    n = rows.number("select count(*) from sorted")
    if not n:
        return {"mean": None, "mean_absolute": None, "quantiles": {}}
    (mean, absolute), *_ = rows.execute("select avg(d), avg(abs(d)) from sorted")
    quantiles = {
        f"{q:g}": rows.execute(f"select d from sorted limit 1 offset {min(n - 1, int(q * n))}")[0][0] for q in QUANTILES
    }
    return {"mean": mean, "mean_absolute": absolute, "quantiles": quantiles}


def _same_share(rows: Database, flagged_by_a: int) -> dict[str, Any]:
    """The smallest threshold at which B flags no more of the images that both scored than A; None: there is none."""
    scored = f"said_a < {len(SAID)} and said_b < {len(SAID)} and prob_fake_b is not null"
    n = rows.number(f"select count(*) from both_judged where {scored}")
    counted = rows.execute(
        f"select min(p), max(up_to) from (select prob_fake_b as p, sum(count(*)) over (order by prob_fake_b desc) as "
        f"up_to from both_judged where {scored} group by 1) where up_to <= {flagged_by_a}"
    )
    threshold, flagged = counted[0]
    return {
        "threshold": threshold,
        "flagged": int(flagged or 0),
        "share": int(flagged or 0) / n if n else None,
        "flagged_by_a": flagged_by_a,
    }


def _labelled(rows: Database) -> dict[str, Any] | None:
    """Accuracy, and shares of fakes and of reals that are called fake, of images that both scored; None: no labels.

    An uncertain verdict is not correct.
    """
    reals, fakes = (_table(rows, f"label = {label}")[:3, :3] for label in (0, 1))
    if not reals.sum() + fakes.sum():
        return None
    is_real, is_fake = ([said == name for said in SAID] for name in ("real", "fake"))
    right = [_paired(reals, is_real), _paired(fakes, is_fake)]
    n = int(reals.sum() + fakes.sum())
    correct = {
        "a": int(reals[0].sum() + fakes[2].sum()),
        "b": int(reals[:, 0].sum() + fakes[:, 2].sum()),
    }
    only_a, only_b = (sum(one[name] for one in right) for name in ("only_a", "only_b"))
    accuracy = {
        **{which: _share(number, n) for which, number in correct.items()},
        "only_a": only_a, "only_b": only_b, **_difference(only_a, only_b, n),
    }  # fmt: skip
    return {
        "reals": int(reals.sum()),
        "fakes": int(fakes.sum()),
        "accuracy": accuracy,
        "tpr": _paired(fakes, is_fake),
        "fpr": _paired(reals, is_fake),
    }


def _load_flips(rows: Database, shown: Batches) -> None:
    """Create the table `flips`, with the place and caption of each."""
    rows.execute("create table flipped as select * from both_judged where said_a <> said_b")
    rows.create(
        "shown", "image_id::uuid as image_id, uri, transform, caption", SHOWN,
        where="image_id::uuid in (select image_id from flipped)",
    )  # fmt: skip
    rows.insert("shown", shown)
    rows.execute(
        "create table flips as select f.*, s.uri, s.transform, s.caption from flipped f left join (select image_id, "
        "max(uri) as uri, max(transform) as transform, max(caption) as caption from shown group by 1) s "
        "on f.image_id = s.image_id"
    )


def _in_order(rows: Database, limit: int | None = None) -> Iterator[pa.RecordBatch]:
    """Flips, the largest difference first."""
    texts = ", ".join(f"'{name}'" for name in CLASSES)
    said_a, said_b = (f"[{texts}][said_{which} + 1] as said_{which}" for which in "ab")
    selected = rows.select(
        f"select * replace (replace(image_id::varchar, '-', '') as image_id, {said_a}, {said_b}) from flips "
        "order by abs(prob_fake_b - prob_fake_a) desc nulls last, flips.image_id"
        + ("" if limit is None else f" limit {limit}")
    )
    for batch in selected:
        yield batch.select(FLIPS.names).cast(FLIPS)
