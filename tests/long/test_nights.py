"""Nights in a row over a bucket: each version of an image is scored once by a detector, and captioned once at all."""

from pathlib import Path

import pytest

from jobs.dataset import schema
from jobs.dataset.plan import Selection
from jobs.runs import catalog
from jobs.storage import listing
from jobs.workflows import streams
from jobs.workflows.score import score
from nsnet.detector import Detector
from tests.support.tables import image_file, new_bucket, put, save_bundle

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("cluster")]

IMAGES = 200


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("detector"))


def uris_of(run_id: str, out: str) -> set[str]:
    rows = catalog.verdicts(out).to_table(columns=["uri", "run_id"]).to_pylist()
    return {row["uri"] for row in rows if row["run_id"] == run_id}


def nothing_to_do(*_: object, **__: object) -> None:
    pytest.fail("a stream was made for a night without images")


def test_each_night_scores_what_is_new_or_changed(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = new_bucket()
    source, out = f"{bucket}/pictures", f"{bucket}/out"
    put(source, {f"{i}.jpg": image_file(i, "JPEG", 100, 80) for i in range(IMAGES - 2)})
    put(source, {"broken.jpg": b"no image", "again.jpg": image_file(0, "JPEG", 100, 80)})

    first = score(source, detector=str(detector), out=out)
    assert first["rows"] == IMAGES and first["listing"] == {"new": IMAGES}
    assert first["counts"]["status"] == {"failed": 1, "scored": IMAGES - 1}
    assert first["captions"] == {"made": IMAGES - 1, "reused": 0}

    with monkeypatch.context() as patch:
        patch.setattr(streams, "scoring", nothing_to_do)
        second = score(source, detector=str(detector), out=out)
    assert second["rows"] == 0
    assert [record["rows"] for record in catalog.runs(out)] == [IMAGES, 0]
    assert listing.subfolders(f"{out}/staging") == []

    put(source, {f"new {i}.jpg": image_file(1000 + i, "JPEG", 100, 80) for i in range(6)})
    put(source, {f"{i}.jpg": image_file(2000 + i, "JPEG", 100, 80) for i in range(2)})
    third = score(source, detector=str(detector), out=out)
    expected = {f"{source}/{name}.jpg" for name in ("0", "1", *(f"new {i}" for i in range(6)))}
    assert uris_of(third["run_id"], out) == expected and third["rows"] == len(expected)
    assert third["listing"] == {"new": 6, "changed": 2, "failed before": 1, "scored before": IMAGES - 3}

    retried = score(source, detector=str(detector), out=out, selection=Selection(retry_failed=True))
    assert uris_of(retried["run_id"], out) == {f"{source}/broken.jpg"}
    rows = catalog.verdicts(out).to_table(columns=["image_id", "status"]).to_pylist()
    scored = [row["image_id"] for row in rows if row["status"] == "scored"]
    assert len(scored) == len(set(scored)) == IMAGES - 1 + 8


def test_new_detector_scores_all_again_with_the_captions_that_there_are(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(tmp_path / "pictures"), str(tmp_path / "out")
    put(source, {f"{i}.jpg": image_file(i, "JPEG", 100, 80) for i in range(30)})
    old = score(source, detector=str(detector), out=out)
    changed = Detector.load(detector)
    for parameter in changed.network.head.parameters():
        parameter.data.mul_(0.5)
    changed.save(tmp_path / "new", captioner=detector / "captioner")
    put(source, {"30.jpg": image_file(30, "JPEG", 100, 80)})

    new = score(source, detector=str(tmp_path / "new"), out=out)
    assert new["rows"] == 31 and new["detector_id"] != old["detector_id"]
    assert new["captioner_id"] == old["captioner_id"]
    assert new["captions"] == {"made": 1, "reused": 30}
    columns = ["uri", "run_id", "caption", "caption_id", "caption_run_id", "prob_fake"]
    rows = catalog.verdicts(out).to_table(columns=columns).to_pylist()
    before, after = ({row["uri"]: row for row in rows if row["run_id"] == run["run_id"]} for run in (old, new))
    for uri, row in before.items():
        assert after[uri]["caption"] == row["caption"] and after[uri]["caption_id"] == row["caption_id"]
        assert after[uri]["caption_run_id"] == row["caption_run_id"] == old["run_id"]
        assert after[uri]["prob_fake"] != row["prob_fake"]

    fresh = score(source, detector=str(tmp_path / "new"), out=out, selection=Selection(rescore=True), reuse=False)
    assert fresh["captions"] == {"made": 31, "reused": 0}
    table = catalog.verdicts(out).to_table()
    assert table.schema.equals(schema.VERDICTS)
    again = {row["uri"]: row for row in table.to_pylist() if row["run_id"] == fresh["run_id"]}
    for uri, row in after.items():
        assert again[uri]["caption"] == row["caption"] and again[uri]["prob_fake"] == row["prob_fake"]
