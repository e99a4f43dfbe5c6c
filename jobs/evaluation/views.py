"""Evaluate the views of images (`nsnet score --views`): how often they disagree, and whether leaving such images alone
finds more fakes at the same rate of false alarms.
"""

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import comparison, groups
from jobs.evaluation.comparison import ALL, SAMPLES
from jobs.evaluation.groups import UNTRANSFORMED, Group

METRICS: Final = ("tpr_at_fpr_1", "tpr_at_fpr_01")
FIRST, AGREEING = "first_view", "agreeing"


def stability(table: pa.Table, *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any] | None:
    """Metrics over all labelled images that were judged in several views; JSON-ready. None: there is no such image.

    Keys: `images` and `disagree`, by label; `first_view`: metrics if only the first view counts; `agreeing`: metrics if
    an image raises an alarm only if its views lie on the same side of the detector's threshold.
    """
    if "views_agree" not in table.column_names:
        return None
    counted = pc.and_(pc.is_valid(table.column("label")), pc.is_valid(table.column("views_agree")))
    judged = pc.and_(
        pc.equal(table.column("status"), "scored"), pc.equal(groups.transforms_of(table), UNTRANSFORMED)
    )  # fmt: skip
    known = table.filter(pc.and_(counted, judged))
    if not known.num_rows:
        return None
    agree, labels = known.column("views_agree"), known.column("label")
    place = known.column_names.index("prob_fake")
    silenced = pc.if_else(agree, known.column("prob_fake"), 0.0)
    forms = {FIRST: known, AGREEING: known.set_column(place, "prob_fake", silenced)}
    of_label = {name: pc.equal(labels, label) for label, name in enumerate(("real", "fake"))}
    return {
        "images": {name: pc.sum(mask).as_py() or 0 for name, mask in of_label.items()},
        "disagree": {name: pc.sum(pc.and_(mask, pc.invert(agree))).as_py() or 0 for name, mask in of_label.items()},
        **{name: _numbers(rows, known, samples, seed) for name, rows in forms.items()},
    }


def _numbers(rows: pa.Table, known: pa.Table, samples: int, seed: int) -> dict[str, Any]:
    scores = groups.join(list(groups.split(rows, order_of=known).values()))
    (measured,) = comparison.measure_all({ALL: Group(rows=scores, reals_of=ALL)}, samples, seed)
    return measured.numbers(METRICS)
