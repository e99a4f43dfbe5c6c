"""Three detectors in one pass over a bucket: each image is fetched once, and each detector's rows are as if alone."""

import os
from dataclasses import replace
from typing import Any

import pytest

from jobs.runs import catalog
from jobs.storage import listing
from jobs.workflows.score import score
from nsnet import recipes
from nsnet.captioner import save_tiny_captioner
from nsnet.patches import PatchConfig
from nsnet.recipes import Recipe
from tests.support.models import FROZEN, as_if_trained
from tests.support.multinode import running
from tests.support.proxy import FaultyProxy
from tests.support.tables import image_file, new_bucket, put

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("forked_workers", "cluster")]

IMAGES = int(os.environ.get("NSNET_FAULT_IMAGES", "200"))
RUN_SECONDS = 560.0
SMALL = Recipe(name="small", detector=FROZEN, training=recipes.TINY.training)
CONFIGS = {
    "linear": recipes.variant(SMALL, "linear").detector,  # first, though it has no captioner for the others
    "advanced": FROZEN,
    "finer": replace(FROZEN, patches=PatchConfig(patch_px=16, mosaic_px=64)),
}
GONE = ("run_id", "caption_run_id", "scored_at", "requests")
"""What differs between two runs in any case."""


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("detectors")
    save_tiny_captioner(folder, seed=0)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        captioner = folder if config.projection.needs_captions else None
        as_if_trained(config, seed).save(folder / name, captioner=captioner)
    return [str(folder / name) for name in CONFIGS]


def rows_by_detector(out: str) -> dict[str, dict[str, Any]]:
    """What each detector published for each image, but for what differs between runs; each image once."""
    found: dict[str, dict[str, Any]] = {}
    for row in catalog.verdicts(out).to_table().drop_columns(list(GONE)).to_pylist():
        assert found.setdefault(row["detector_id"], {}).setdefault(row["uri"], row) is row
    return found


def test_pass_of_three_detectors_fetches_each_image_once_and_survives_a_kill(
    detectors: list[str], proxy: FaultyProxy
) -> None:
    source, out, killed = f"{new_bucket()}/images", new_bucket(), new_bucket()
    put(source, {f"{i}.jpg": image_file(i, "JPEG", 160, 120) for i in range(IMAGES - 1)} | {"broken.jpg": b"no image"})
    options = [option for detector in detectors for option in ("--detector", detector)]
    environment = proxy.environment()

    def fetched() -> int:
        return proxy.requests(f"GET {source.removeprefix('s3:/')}/")

    def listed() -> int:
        return proxy.requests(f"LIST {source.removeprefix('s3:/').rpartition('/')[0]}")

    with running(source, *options, "--out", out, env=environment) as run:
        assert run.end(RUN_SECONDS) == 0, run.text()
    assert fetched() == IMAGES and run.prepared <= IMAGES
    assert listed() <= 8  # 5 or 6 requests list the source for one detector
    records = catalog.runs(out)
    assert [record["rows"] for record in records] == [IMAGES] * 3
    assert [record["counts"]["status"] for record in records] == [{"failed": 1, "scored": IMAGES - 1}] * 3

    singles: dict[str, dict[str, Any]] = {}
    for detector in detectors:
        alone = new_bucket()
        score(source, detector=detector, out=alone)
        singles |= rows_by_detector(alone)
    assert len(singles) == 3 and rows_by_detector(out) == singles

    proxy.forget()
    with running(source, *options, "--out", killed, env=environment) as run:
        assert run.wait_for(lambda: committed(killed) > 0, RUN_SECONDS), run.text()
        run.kill()
    assert catalog.runs(killed) == [] and len(listing.subfolders(f"{killed}/staging")) == 3
    before = fetched()
    with running(source, *options, "--out", killed, env=environment) as run:
        assert run.end(RUN_SECONDS) == 0, run.text()
    assert any(line.startswith("continuing run") for line in run.lines), run.text()
    assert fetched() - before < IMAGES  # the rows that were committed are not made again
    assert rows_by_detector(killed) == singles
    assert [record["attempts"] for record in catalog.runs(killed)] == [2] * 3
    assert listing.subfolders(f"{killed}/staging") == []


def committed(out: str) -> int:
    """Number of finished files of rows."""
    names = [entry.uri for entry in listing.list_files(f"{out}/staging")] if listing.exists(f"{out}/staging") else []
    return sum("/checkpoint/" in name and not name.endswith(".pending.parquet") for name in names)
