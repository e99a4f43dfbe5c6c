"""`nsnet calibrate`: the same weights for another operating point, from validation predictions of this detector."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.dataset.schema import PREDICTIONS
from jobs.experiments.recalibration import calibrate
from jobs.storage import parquet
from nsnet import bundle, calibration
from nsnet.calibration import Calibration, OperatingPoint
from nsnet.config import from_dict
from nsnet.detector import Detector
from nsnet.errors import ConfigError, SourceError, UsageError
from tests.support.models import as_if_trained, mosaics, one_line
from tests.support.tables import run_command

Rows = list[dict[str, Any]]
COUNT = 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector; do not change it."""
    folder = tmp_path_factory.mktemp("calibrate") / "detector"
    as_if_trained().save(folder, training={"seed": 1, "source": "/pictures"})
    return folder


def predictions(detector_id: str, *, seed: int = 0, test_shift: float = 0.0) -> Rows:
    """Validation and test predictions; those of the test are moved."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(2 * COUNT):
        split, label = ("val", "test")[i // COUNT], i % 2
        logit = float(rng.normal() + label - 0.5) + (test_shift if split == "test" else 0.0)
        fields = {"image_id": f"{i:032x}", "uri": f"/p/{i}.png", "label": label, "generator": "Glide", "split": split}
        scores = {"logit": logit, "prob_fake": 0.5, "verdict": "real", "threshold": 0.5, "status": "scored"}
        rows.append(fields | scores | {"detector_id": detector_id})
    return rows


def stored(rows: Rows, path: Path) -> str:
    parquet.write(pa.Table.from_pylist(rows, schema=PREDICTIONS).to_batches(), PREDICTIONS, str(path))
    return str(path)


def refused(trained: Path, uri: str, folder: Path, point: str = "fpr=1%") -> str:
    with pytest.raises(SourceError) as caught:
        calibrate(str(trained), predictions=uri, operating_point=point, out=str(folder / "out"))
    assert not (folder / "out").exists()
    return one_line(caught.value)


def test_new_bundle_has_the_same_weights_and_the_calibration_of_the_validation_rows(
    trained: Path, tmp_path: Path
) -> None:
    before = bundle.read(trained)
    rows = predictions(before.detector_id)
    calibrate(
        str(trained), predictions=stored(rows, tmp_path / "p.parquet"), operating_point="fpr=5%", uncertain=0.1,
        out=str(tmp_path / "out"),
    )  # fmt: skip
    after = bundle.read(tmp_path / "out")
    assert after.files == before.files and after.config == before.config
    assert after.detector_id != before.detector_id
    assert after.training["calibrated_from"] == before.detector_id and after.training["seed"] == 1

    val = [row for row in rows if row["split"] == "val"]
    labels, logits = (np.array([row[name] for row in val]) for name in ("label", "logit"))
    point = OperatingPoint(rule="fpr", fpr=0.05, uncertain_share=0.1)
    found = from_dict(Calibration, after.calibration)
    assert found == replace(calibration.fit(labels, logits, point), version=2)
    assert found.uncertain_margin > 0 and after.training["calibration"] == after.calibration

    old, new = (Detector.load(folder) for folder in (trained, tmp_path / "out"))
    scores = [detector.score(mosaics(3), ["a", "b", "c"]) for detector in (old, new)]
    assert scores[0].logit.tolist() == scores[1].logit.tolist() and new.calibration == found
    assert scores[0].prob_fake.tolist() != scores[1].prob_fake.tolist()
    card = (tmp_path / "out" / bundle.CARD).read_text()
    assert "at most 5.000% of real images called fake" in card and "version 2" in card


def test_test_rows_are_never_looked_at(trained: Path, tmp_path: Path) -> None:
    ids = set()
    for shift in (0.0, 9.0):
        uri = stored(predictions(bundle.read(trained).detector_id, test_shift=shift), tmp_path / f"{shift}.parquet")
        out = str(tmp_path / f"out-{shift}")
        ids.add(calibrate(str(trained), predictions=uri, operating_point="accuracy", out=out).detector_id)
    assert len(ids) == 1


def test_calibrated_detector_may_be_calibrated_again_from_the_same_predictions(trained: Path, tmp_path: Path) -> None:
    origin = bundle.read(trained).detector_id
    uri, place, versions = stored(predictions(origin), tmp_path / "p.parquet"), str(trained), []
    for i, point in enumerate(("fpr=1%", "cost=10:1@0.01", "fpr=1%")):
        out = str(tmp_path / f"out-{i}")
        after = calibrate(place, predictions=uri, operating_point=point, out=out)
        assert after.training["calibrated_from"] == origin
        versions.append(after.calibration["version"])
        place = out
    assert versions == [2, 3, 4]


def test_predictions_of_another_detector_are_refused(trained: Path, tmp_path: Path) -> None:
    detector_id = bundle.read(trained).detector_id
    rows = predictions(detector_id)
    rows[0]["detector_id"] = "f" * 16
    assert f"is of detector {'f' * 16}, not of {detector_id}" in refused(
        trained, stored(rows, tmp_path / "p.parquet"), tmp_path
    )


@pytest.mark.parametrize("kind", ["no validation", "one class", "no label", "not finite"])
def test_validation_that_says_nothing_is_refused(kind: str, trained: Path, tmp_path: Path) -> None:
    rows = predictions(bundle.read(trained).detector_id)
    for row in rows:
        if kind == "no validation":
            row["split"] = "test"
        elif kind == "one class":
            row["label"] = 0
    if kind == "no label":
        rows[0]["label"] = None
    elif kind == "not finite":
        rows[0]["logit"] = float("nan")
    assert "must be both real and fake" in refused(trained, stored(rows, tmp_path / "p.parquet"), tmp_path)


def test_file_that_holds_no_predictions_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    table = pa.table({"x": [1]})
    parquet.write(table.to_batches(), table.schema, str(other))
    assert "does not hold a training's predictions" in refused(trained, str(other), tmp_path)
    (tmp_path / "text.parquet").write_text("no Parquet")
    assert "does not hold a training's predictions" in refused(trained, str(tmp_path / "text.parquet"), tmp_path)
    assert "does not exist" in refused(trained, str(tmp_path / "none.parquet"), tmp_path)


def test_place_with_a_detector_and_nonsense_points_are_refused(trained: Path, tmp_path: Path) -> None:
    uri = stored(predictions(bundle.read(trained).detector_id), tmp_path / "p.parquet")
    shutil.copytree(trained, tmp_path / "taken")
    with pytest.raises(UsageError, match="already holds a detector"):
        calibrate(str(trained), predictions=uri, operating_point="accuracy", out=str(tmp_path / "taken"))
    assert bundle.read(tmp_path / "taken") == bundle.read(trained)
    with pytest.raises(ConfigError, match="not an operating point"):
        calibrate(str(trained), predictions=uri, operating_point="best", out=str(tmp_path / "out"))


def test_command_prints_what_it_chose(trained: Path, tmp_path: Path) -> None:
    uri, out = stored(predictions(bundle.read(trained).detector_id), tmp_path / "p.parquet"), str(tmp_path / "out")
    options = ["--predictions", uri, "--operating-point", "fpr=1%", "--uncertain", "5%", "--out", out]
    code, _, log = run_command("calibrate", str(trained), *options)
    after = bundle.read(tmp_path / "out")
    assert code == 0 and f"detector {after.detector_id}: threshold " in log and "fpr=0.01,uncertain=0.05" in log
    assert json.loads(json.dumps(after.calibration)) == after.calibration


def test_bundle_of_version_1_is_carried_over_to_the_present_version(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "old")
    path = tmp_path / "old" / bundle.DESCRIPTION
    values = {**json.loads(path.read_text()), "format_version": 1}
    del values["sha256"]
    files = sorted([name, sha] for name, sha in values["files"].items() if name.endswith((".safetensors", ".txt")))
    content = json.dumps([values["config"], values["calibration"], values["clip_digest"], files], sort_keys=True)
    values["detector_id"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    path.write_text(json.dumps({**values, "sha256": bundle._seal_of(values)}))
    before = bundle.read(tmp_path / "old")
    uri = stored(predictions(before.detector_id), tmp_path / "p.parquet")
    calibrate(str(tmp_path / "old"), predictions=uri, operating_point="fpr=5%", out=str(tmp_path / "out"))
    after = bundle.read(tmp_path / "out")
    assert (before.format_version, after.format_version) == (1, bundle.FORMAT_VERSION) == (1, 2)
    assert after.files == before.files and after.training["calibrated_from"] == before.detector_id
    assert before.note in " ".join(capsys.readouterr().err.split()) and not after.note
