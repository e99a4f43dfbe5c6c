"""What an older release left on storage (`left/`) is read and continued. Two short runs on the shared cluster."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.runs import catalog
from jobs.storage import filesystems, writing
from jobs.workflows.caption import caption
from jobs.workflows.evaluate import evaluate
from jobs.workflows.score import score
from tests.golden.compute import FOLDER, LEFT, fixed_bundle
from tests.golden.left import BUCKET, COPIES, put_images

IMAGES = 12
ACCEPTED = 128
"""Rows that the stopped run had committed."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = fixed_bundle(tmp_path_factory.mktemp("left") / "bundle")
    yield str(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket(cluster: None) -> str:
    """A bucket as the older release left it: its name is in every id of an image."""
    system, _ = filesystems.filesystem(f"s3://{BUCKET}")
    with suppress(FileExistsError):
        system.mkdir(BUCKET)
    put_images()
    for product in ("scored", "captioned", "unfinished"):
        for path in (LEFT / product).rglob("*"):
            if path.is_file():
                writing.write_bytes(f"s3://{BUCKET}/{path.relative_to(LEFT)}", path.read_bytes())
    return f"s3://{BUCKET}"


def golden_probabilities() -> dict[str, float]:
    rows: dict[str, Any] = json.loads((FOLDER / "verdicts.json").read_text(encoding="utf-8"))
    return {name: row["prob_fake"] for name, row in rows.items()}


def test_published_verdicts_are_read_and_nothing_is_scored_again(bucket: str, bundle: str, tmp_path: Path) -> None:
    record = score(f"{bucket}/images", detector=bundle, out=f"{bucket}/scored")
    assert record["rows"] == 0 and record["listing"] == {"scored before": IMAGES}
    rows = catalog.verdicts(f"{bucket}/scored").to_table().to_pylist()
    found = {row["uri"].removeprefix(f"{bucket}/images/"): row["prob_fake"] for row in rows}
    assert found == pytest.approx(golden_probabilities(), abs=1e-6)
    result = evaluate(f"{bucket}/scored", out=str(tmp_path / "report"))
    (generator,) = result["generators"].values()
    assert (generator["real"], generator["fake"]) == (IMAGES // 2, IMAGES // 2)


def test_published_captions_are_read_and_nothing_is_captioned_again(bucket: str) -> None:
    record = caption(f"{bucket}/images", out=f"{bucket}/captioned")
    assert record["rows"] == 0 and record["listing"] == {"scored before": IMAGES}


def test_stopped_run_is_continued(bucket: str, bundle: str) -> None:
    (staging,) = (LEFT / "unfinished" / "staging").iterdir()
    record = score(f"{bucket}/many", detector=bundle, out=f"{bucket}/unfinished")
    assert record["run_id"] == staging.name and record["attempts"] == 2
    assert record["rows"] == IMAGES * COPIES
    rows = catalog.verdicts(f"{bucket}/unfinished").to_table().to_pylist()
    assert len({row["image_id"] for row in rows}) == IMAGES * COPIES == len(rows)
    expected = golden_probabilities()
    for row in rows:
        name = row["uri"].removeprefix(f"{bucket}/many/").partition("/")[2]
        assert row["prob_fake"] == pytest.approx(expected[name], abs=1e-6)
    times = sorted(row["scored_at"] for row in rows)
    assert (times[ACCEPTED] - times[ACCEPTED - 1]).total_seconds() > 60  # those rows are the older release's own
