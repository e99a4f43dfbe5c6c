"""What comes out of a training: thresholds know validation alone, and every prediction is stored with its image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.dataset import schema
from jobs.evaluation.comparison import compare
from jobs.experiments import predictions
from jobs.storage import parquet
from jobs.training.checkpoints import Progress
from jobs.training.examples import Examples
from nsnet import calibration
from nsnet.calibration import OperatingPoint
from tests.support.tables import manifest_row

COUNT = 120
POINT = OperatingPoint(rule="fpr", fpr=0.1, uncertain_share=0.1)


def split() -> pa.Table:
    """Images of two generators in three splits."""
    rows = []
    for i in range(COUNT):
        fields = {
            "label": i % 2,
            "generator": ("Glide", "ADM")[i // 2 % 2],
            "split": ("train", "val", "test")[i // 4 % 3],
        }
        rows.append(manifest_row(f"/p/{i:03d}.png", **fields) | {"content_hash": f"{i:064x}", "group": i})
    return pa.Table.from_pylist(rows, schema=schema.SPLIT).sort_by("image_id")


def progress(found: Examples, *, test_shift: float = 0.0, test: bool = True, seed: int = 0) -> Progress:
    """Logits that know the label a little; those of the test are moved."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=COUNT) + 2.0 * found.labels - 1.0

    def of(name: str, shift: float) -> dict[str, torch.Tensor]:
        rows = found.rows(name)
        return {"rows": torch.from_numpy(rows), "logits": torch.from_numpy(logits[rows] + shift)}

    records = [
        {"epoch": epoch, "val_ap": ap, "loss": 1.0, "residual_energy": 0.5}
        for epoch, ap in ((1, 0.7), (2, 0.9), (3, 0.8))
    ]
    return Progress(
        step=9, history=records, best_epoch=2, best={"w": torch.zeros(1)}, validation=of("val", 0.0),
        test=of("test", test_shift) if test else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Examples:
    return Examples(table=split())


def test_calibration_is_that_of_validation_whatever_the_test_says(found: Examples) -> None:
    judged = predictions.judge(found, progress(found), POINT)
    known = progress(found).validation
    rows = known["rows"].numpy()
    assert judged.calibration == calibration.fit(found.labels[rows], known["logits"].numpy(), POINT)
    moved = predictions.judge(found, progress(found, test_shift=5.0), POINT)
    assert moved.calibration == judged.calibration
    assert moved.of("val").equals(judged.of("val")) and not moved.of("test").equals(judged.of("test"))


def test_prediction_carries_its_own_images_identity_and_verdict(found: Examples) -> None:
    state = progress(found)
    judged = predictions.judge(found, state, POINT)
    by_id = {row["image_id"]: row for row in found.table.to_pylist()}
    logits = {
        found.image_ids[row]: logit
        for part in (state.validation, state.test)
        for row, logit in zip(part["rows"].tolist(), part["logits"].tolist(), strict=True)
    }
    predicted = judged.table.to_pylist()
    assert {row["image_id"] for row in predicted} == logits.keys() and len(predicted) == len(logits) == 2 * COUNT // 3
    for row in predicted:
        known = by_id[row["image_id"]]
        assert [row[name] for name in ("uri", "label", "generator", "split")] == [
            known[name] for name in ("uri", "label", "generator", "split")
        ]
        assert row["logit"] == logits[row["image_id"]]
        assert row["prob_fake"] == pytest.approx(1 / (1 + np.exp(-row["logit"] / judged.calibration.temperature)))
        assert row["verdict"] == judged.calibration.verdict(row["prob_fake"])
        assert row["threshold"] == judged.calibration.threshold and row["status"] == "scored"
    assert {row["verdict"] for row in predicted} == {"real", "fake", "uncertain"}


def test_training_images_are_never_judged(found: Examples) -> None:
    assert set(predictions.judge(found, progress(found), POINT).table.column("split").to_pylist()) == {"val", "test"}


def test_record_has_the_numbers_of_both_parts_and_the_best_epoch(found: Examples) -> None:
    state = progress(found)
    judged = predictions.judge(found, state, POINT)
    result = predictions.describe(judged, state, {"seed": 3})
    assert result["seed"] == 3 and result["best_epoch"]["epoch"] == 2 and len(result["history"]) == 3
    assert result["validation"] == compare(judged.of("val")) and result["test"] == compare(judged.of("test"))
    assert result["validation"] != result["test"]
    assert json.loads(json.dumps(result)) == result
    assert result["calibration"]["point"]["fpr"] == 0.1
    text = predictions.summary(result)
    assert text.startswith("epoch 2 of 3: validation AP 0.9000, residual energy 0.50") and "ADM" in text


def test_without_test_images_the_record_says_so(found: Examples) -> None:
    state = progress(found, test=False)
    result = predictions.describe(predictions.judge(found, state, POINT), state, {})
    assert result["test"] is None and "test" not in predictions.summary(result)


def test_undefined_ap_is_said(found: Examples) -> None:
    state = progress(found)
    state.history[1]["val_ap"] = None
    result = predictions.describe(predictions.judge(found, state, POINT), state, {})
    assert "validation AP undefined" in predictions.summary(result)


def test_predictions_are_stored_under_their_detector(found: Examples, place: str) -> None:
    judged = predictions.judge(found, progress(found), POINT)
    uri = f"{place}/predictions.parquet"
    predictions.write_predictions(judged, "d" * 16, uri)
    stored = pa.Table.from_batches(parquet.read(uri, schema.PREDICTIONS), schema.PREDICTIONS)
    assert set(stored.column("detector_id").to_pylist()) == {"d" * 16}

    def without_id(table: pa.Table) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = table.drop_columns("detector_id").to_pylist()
        return rows

    assert without_id(stored) == without_id(judged.table)


def test_predictions_that_cannot_be_written_leave_those_before(
    found: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, path = predictions.judge(found, progress(found), POINT), tmp_path / "predictions.parquet"
    predictions.write_predictions(judged, "d" * 16, str(path))
    before = path.read_bytes()

    def fail(*_: Any) -> Iterator[pa.Table]:
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(parquet, "_groups", fail)
    with pytest.raises(OSError, match="No space left"):
        predictions.write_predictions(judged, "e" * 16, str(path))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
