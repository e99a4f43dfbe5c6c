"""A run on a cluster that changes: a node with a GPU comes and is used, and the node of the start leaves."""

import time
from pathlib import Path

import pytest

from jobs.runs import catalog
from tests.support.multinode import Nodes, running
from tests.support.tables import image_file, save_bundle

pytestmark = pytest.mark.faults

IMAGES = 900
LEFT = 300
"""Images that are not scored yet when the first node leaves, and are scored on the other."""
RUN_SECONDS = 300.0


def images(folder: Path) -> Path:
    folder.mkdir()
    for i in range(IMAGES):
        (folder / f"{i}.jpg").write_bytes(image_file(i, "JPEG", 160, 120))
    return folder


def test_node_that_comes_is_used_and_node_that_leaves_is_survived(
    tmp_path: Path, forked_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pool for each model; `tests/long/test_submit.py` has one for both."""
    monkeypatch.setenv("RAY_worker_niceness", "15")  # as by default: a node that comes must start beside busy workers
    source, detector, out = images(tmp_path / "images"), save_bundle(tmp_path / "detector"), tmp_path / "out"
    nodes = Nodes(1, num_cpus=4, num_gpus=1)
    try:
        (first,) = nodes.cluster.worker_nodes
        options = ["--detector", str(detector), "--out", str(out), "--address", nodes.address]
        options += ["--batch-size", "32", "--separate-models"]
        with running(str(source), *options, module="tests.support.pretended_gpus") as score:
            assert score.wait_for(lambda: score.scored > 0, RUN_SECONDS), score.text()
            second = nodes.add()
            assert score.wait_for(lambda: len(nodes.workers("model actor", second)) == 2, RUN_SECONDS), score.text()
            time.sleep(2.0)  # they load their models
            nodes.remove(first)
            assert score.scored < IMAGES - LEFT, score.text()
            assert score.end(RUN_SECONDS) == 0, score.text()
    finally:
        nodes.stop()
    rows = catalog.verdicts(str(out)).to_table(columns=["uri", "status"]).to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows) == IMAGES
    assert {row["status"] for row in rows} == {"scored"}
    sizes = [line for line in score.lines if "model actors:" in line]
    assert sizes and all("captioning" in line and "scoring" in line for line in sizes), score.text()
