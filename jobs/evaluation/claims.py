"""Count what files state about their origin, beside labels and verdicts. Statements and verdicts are independent."""

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import UNTRANSFORMED
from nsnet.provenance import NONE

COLUMNS: Final = ("c2pa_state", "digital_source_type", "metadata_generator")


def stated(table: pa.Table) -> list[dict[str, Any]]:
    """One dictionary per column and value, JSON-ready: `column`, `value`, and numbers of scored images: `real`, `fake`
    and `unknown` by label, and `called_fake` by verdict. Images without statements do not count.
    """
    scored = table.filter(
        pc.and_(pc.equal(table.column("status"), "scored"), pc.equal(groups.transforms_of(table), UNTRANSFORMED))
    )
    found = []
    for column in [name for name in COLUMNS if name in scored.column_names]:
        values = scored.column(column)
        for value in sorted(value for value in pc.unique(values).to_pylist() if value not in (None, NONE)):
            rows = scored.filter(pc.equal(values, value))
            labels = rows.column("label")
            found.append(
                {
                    "column": column,
                    "value": value,
                    "real": pc.sum(pc.equal(labels, 0)).as_py() or 0,
                    "fake": pc.sum(pc.equal(labels, 1)).as_py() or 0,
                    "unknown": labels.null_count,
                    "called_fake": pc.sum(pc.equal(rows.column("verdict"), "fake")).as_py() or 0,
                }
            )
    return found
