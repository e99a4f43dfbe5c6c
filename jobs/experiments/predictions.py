"""Results of a training: predictions on validation and test, calibration, metrics with intervals, and their record.

Dimensions: n images of validation and test.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset.schema import PREDICTIONS
from jobs.evaluation.comparison import compare
from jobs.report.text import as_text
from jobs.storage import parquet
from jobs.training.checkpoints import LOGITS, ROWS, Progress
from jobs.training.examples import Examples
from nsnet import calibration
from nsnet.calibration import Calibration, OperatingPoint
from nsnet.config import to_dict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Predictions of the best epoch, calibrated on validation."""

    table: pa.Table
    """(n,) rows of `PREDICTIONS`."""
    calibration: Calibration

    def of(self, split: str) -> pa.Table:
        """The rows of a split."""
        return self.table.filter(pc.equal(self.table.column("split"), split))


def judge(examples: Examples, progress: Progress, point: OperatingPoint) -> Judged:
    """Calibrate on validation, and judge validation and test with that calibration."""
    labels = examples.labels
    rows, logits = (progress.validation[name].numpy() for name in (ROWS, LOGITS))
    fitted = calibration.fit(labels[rows], logits, point)
    parts = [_table(examples, "val", rows, logits, fitted)]
    if progress.test:
        parts.append(_table(examples, "test", progress.test[ROWS].numpy(), progress.test[LOGITS].numpy(), fitted))
    return Judged(table=pa.concat_tables(parts), calibration=fitted)


def _table(examples: Examples, split: str, rows: Any, logits: Any, fitted: Calibration) -> pa.Table:
    probabilities = fitted.probability(logits)
    count = len(rows)
    columns = {
        **{name: examples.table.column(name).take(rows) for name in ("image_id", "uri", "label", "generator")},
        "split": [split] * count,
        "logit": logits,
        "prob_fake": probabilities,
        "verdict": [fitted.verdict(float(p)) for p in probabilities],
        "threshold": np.full(count, fitted.threshold),
        "status": ["scored"] * count,
        "detector_id": pa.nulls(count, pa.string()),
    }
    return pa.table(columns, schema=PREDICTIONS)


def write_predictions(judged: Judged, detector_id: str, uri: str) -> None:
    """Store predictions with the id of their detector."""
    ids = pa.array([detector_id] * judged.table.num_rows, pa.string())
    table = judged.table.set_column(judged.table.schema.get_field_index("detector_id"), "detector_id", ids)
    parquet.write_whole(table.combine_chunks().to_batches(), PREDICTIONS, uri)


def describe(judged: Judged, progress: Progress, origin: dict[str, Any]) -> dict[str, Any]:
    """The JSON-ready record of a training: origin, epochs, calibration, metrics.

    `origin`: further keys of the record. Without test images `test` is null.
    """
    best = next(record for record in progress.history if record["epoch"] == progress.best_epoch)
    test = judged.of("test")
    return {
        **origin,
        "history": progress.history,
        "best_epoch": best,
        "calibration": to_dict(judged.calibration),
        "validation": compare(judged.of("val")),
        "test": compare(test) if test.num_rows else None,
    }


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    best, fitted = result["best_epoch"], result["calibration"]
    ap = "undefined" if best["val_ap"] is None else f"{best['val_ap']:.4f}"
    lines = [
        f"epoch {best['epoch']} of {len(result['history'])}: validation AP {ap}, residual energy "
        f"{best['residual_energy']:.2f}; temperature {fitted['temperature']:.3g}, threshold {fitted['threshold']:.3g}"
    ]
    if result["test"] is not None:
        lines += ["test:", as_text(result["test"])]
    return "\n".join(lines)
