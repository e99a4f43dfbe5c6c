"""Leakage by a sample of scored images: which are drawn, and that their features are those of scoring."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.dataset.plan import write_manifest
from jobs.pipeline.models import Models
from jobs.runs.publication import Run
from jobs.storage.uris import Uri
from jobs.workflows import evaluate as evaluation
from jobs.workflows import leakage as module
from jobs.workflows.evaluate import evaluate
from nsnet.errors import ConfigError
from nsnet.patches import SCORING_SEED
from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
from tests.support import models
from tests.support.tables import manifest_row, manifest_table, verdict_row, verdict_table

CLASSES = ("cat", "dog")
CAPTIONS = ("a cat on a mat", "a dog in the fog")
EACH = 6
"""Images of a class and label."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector") / "bundle"
    models.as_if_trained().save(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for seed, place in enumerate(f"progan/{c}/{label}" for c in CLASSES for label in ("0_real", "1_fake")):
        (root / place).mkdir(parents=True)
        for i in range(EACH):
            (root / place / f"{i}.png").write_bytes(models.file_bytes(models.image(100 * seed + i)))
    return root


def published(source: Path, folder: Path, detector_id: str) -> tuple[str, list[dict[str, Any]]]:
    """A manifest of the source, and verdicts with captions that name the class, published in the folder."""
    manifest = str(folder / "manifest.parquet")
    write_manifest(Uri(str(source)), manifest)
    rows = [
        verdict_row(
            listed["uri"], 0.5, image_id=listed["image_id"], label=listed["label"], generator=listed["generator"],
            caption=CAPTIONS["dog" in listed["uri"]], content_hash=listed["uri"], detector_id=detector_id,
        )
        for listed in pq.read_table(manifest).to_pylist()
    ]  # fmt: skip
    run = Run(out=str(folder / "scored"))
    Path(run.staging).mkdir(parents=True)
    planned = [manifest_row(row["uri"], image_id=row["image_id"]) for row in rows]
    pq.write_table(manifest_table(*planned), f"{run.staging}/manifest.parquet")
    pq.write_table(verdict_table(*({**row, "run_id": run.run_id} for row in rows)), f"{run.staging}/rows.parquet")
    run.publish(f"{run.staging}/manifest.parquet", [f"{run.staging}/rows.parquet"], {"detector_id": detector_id})
    return manifest, rows


def test_features_are_those_of_scoring_and_classes_those_of_the_folders(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = models.Detector.load(bundle, captioner=False)
    assert detector.detector_id is not None
    manifest, rows = published(source, tmp_path, detector.detector_id)
    given: dict[str, Any] = {}
    monkeypatch.setattr("nsnet.leakage.leakage", lambda u, p, t, **others: given.update(u=u, p=p, t=t, **others) or {})
    wanted = {row["image_id"] for row in rows if not row["uri"].endswith("/0.png")}
    places = Uri(str(source)), Uri(str(tmp_path / "scored"))
    module.measure(manifest, wanted, *places, detector.detector_id, Models(detector=Uri(str(bundle))))
    kept = sorted((row for row in rows if row["image_id"] in wanted), key=lambda row: str(row["image_id"]))
    assert len(kept) == 4 * (EACH - 1)
    assert given["labels"].tolist() == [row["label"] for row in kept]
    assert given["classes"].tolist() == [int("/dog/" in row["uri"]) for row in kept]
    assert given["groups"] == [row["content_hash"] for row in kept]
    config = PreparationConfig(patches=(detector.config.patches,))
    patches = [prepare(Path(row["uri"]).read_bytes(), config).patches for row in kept]
    mosaics = np.concatenate([assemble_mosaics(ranked, config, SCORING_SEED) for ranked in patches])
    captions = [row["caption"] for row in kept]
    expected = detector.features(mosaics, captions)
    for name, values in (("u", expected.image), ("p", expected.projected), ("t", detector.text_features.of(captions))):
        np.testing.assert_allclose(given[name], values.numpy(), rtol=1e-4, atol=1e-5)


def test_labelled_scored_and_untransformed_images_are_drawn() -> None:
    rows = [verdict_row(f"/{i}", 0.5, label=i % 2) for i in range(20)]
    others = [
        verdict_row("/unknown", 0.5), verdict_row("/failed", None, label=1),
        verdict_row("/jpeg", 0.5, label=1, transform="jpeg:75"),
    ]  # fmt: skip
    table = verdict_table(*rows, *others)
    assert module.draw(table, 99) == {row["image_id"] for row in rows}
    some = module.draw(table, 5)
    assert len(some) == 5 and some == module.draw(table, 5) != module.draw(table, 5, seed=1)


def test_evaluation_reports_leakage_as_json_and_text(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score` is tested where it is: here it publishes what it would."""
    detector_id = models.Detector.load(bundle, captioner=False).detector_id
    assert detector_id is not None

    def score(given: str, *, out: str, **_: Any) -> dict[str, Any]:
        published(source, Path(out).parent, detector_id)
        return {"unread": [], "unread_count": 0}

    monkeypatch.setattr(evaluation, "score", score)
    (tmp_path / "out").mkdir()
    out, detector = Uri(str(tmp_path / "out")), Uri(str(bundle))
    result = evaluate(Uri(str(source)), out=out, detector=detector, samples=1, leakage=100)
    found = result["leakage"]
    assert found["images"] == 4 * EACH and found["object_class"]["u"]["classes"] == 2
    assert found["object_class"]["caption"]["value"] == 1.0 and found["label"]["value"] < 0.8
    text = (tmp_path / "out" / "evaluation.txt").read_text()
    assert "class: 2 classes, chance 0.500" in text and "cross-validated on 24 images" in text
    assert "probe" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match="--leakage 5: verdicts hold no features; give a source of images"):
        evaluate(Uri(str(tmp_path / "out" / "scored")), out=out, leakage=5)
    with pytest.raises(ConfigError, match="--leakage 5: .*scored holds verdicts, which hold no features; give their"):
        evaluate(Uri(str(tmp_path / "out" / "scored")), out=out, detector=detector, leakage=5)
