"""Kill -9 of everything that can be killed, at random moments, on a Ray cluster of several nodes with S3 behind it.

`NSNET_KILLS` runs are killed, each role in its turn: 2 by default; `make test-faults` asks for 20, four of each.
"""

import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jobs.runs import catalog
from jobs.storage import listing
from tests.support.multinode import ROLES, Nodes, running
from tests.support.swift import SwiftServer
from tests.support.tables import image_file, new_bucket, put, save_bundle

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("NSNET_KILLS", "2"))
IMAGES = 600
RUN_SECONDS = 400.0

Rows = dict[str, tuple[Any, ...]]


class Baseline(NamedTuple):
    """A run that nobody disturbed."""

    rows: Rows
    seconds: float
    """From the first image to the end."""


@pytest.fixture(scope="module")
def nodes(s3_environment: SwiftServer, forked_workers: None) -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def source(s3_environment: SwiftServer) -> str:
    """A bucket of images, some of which are broken, and some of which repeat."""
    files = {f"{i % 7}/{i}.jpg": image_file(i, "JPEG", 160, 120) for i in range(IMAGES - 40)}
    files |= {f"broken/{i}.jpg": b"no image %d" % i for i in range(20)}
    files |= {f"again/{i}.jpg": image_file(i, "JPEG", 160, 120) for i in range(20)}
    return put(f"{new_bucket()}/pictures", files)


def arguments(source: str, detector: Path, out: str, nodes: Nodes) -> list[str]:
    return [source, "--detector", str(detector), "--out", out, "--address", nodes.address, "--max-failed", "5%"]


def rows_of(out: str) -> Rows:
    """What was published for each image, but for times and ids of the run; each image once."""
    table = catalog.verdicts(out).to_table()
    rows = table.drop_columns(["run_id", "caption_run_id", "scored_at", "requests"]).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows) == IMAGES
    return {row["uri"]: tuple(row.values()) for row in rows}


@pytest.fixture(scope="module")
def baseline(source: str, detector: Path, nodes: Nodes) -> Baseline:
    out = new_bucket()
    with running(*arguments(source, detector, out, nodes)) as score:
        assert score.wait_for(lambda: score.prepared > 0, RUN_SECONDS), score.text()
        started = time.monotonic()
        assert score.end(RUN_SECONDS) == 0, score.text()
    return Baseline(rows_of(out), time.monotonic() - started)


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_ends_as_if_nothing_had_happened(
    kill: int, source: str, detector: Path, nodes: Nodes, baseline: Baseline
) -> None:
    dice, role = random.Random(kill), ROLES[kill % len(ROLES)]
    for seconds in (dice.uniform(0.0, 0.8 * baseline.seconds), 1.0, 0.0):  # a run may end before its moment comes
        out = new_bucket()
        with running(*arguments(source, detector, out, nodes)) as score:
            assert score.wait_for(lambda: score.prepared > 0, RUN_SECONDS), score.text()
            moment = time.monotonic() + seconds
            hit = score.wait_for(partial(time_has_come, moment), RUN_SECONDS)
            if hit and role == "driver":
                score.kill()
                hit = not catalog.runs(out)  # it may have come to its record, and leaves nothing to continue
            else:
                hit = hit and score.wait_for(lambda: nodes.kill(role, dice), RUN_SECONDS)
                assert score.end(RUN_SECONDS) == 0, score.text()
        if hit:
            break
    else:
        pytest.fail(f"no {role} could be killed in three runs")
    if role == "driver":
        with running(*arguments(source, detector, out, nodes)) as again:
            assert again.end(RUN_SECONDS) == 0, again.text()
    assert rows_of(out) == baseline.rows
    (record,) = catalog.runs(out)
    assert record["attempts"] == (2 if role == "driver" else 1)
    assert listing.subfolders(f"{out}/staging") == []
    print(f"kill {kill}: {role}, after {seconds:.1f} s; captions {record['captions']}")


def time_has_come(moment: float) -> bool:
    return time.monotonic() > moment


def test_of_two_runs_at_once_one_wins_and_the_result_is_whole(
    source: str, detector: Path, nodes: Nodes, baseline: Baseline
) -> None:
    out = new_bucket()
    with (
        running(*arguments(source, detector, out, nodes)) as one,
        running(*arguments(source, detector, out, nodes)) as other,
    ):
        codes = [one.end(RUN_SECONDS), other.end(RUN_SECONDS)]
    assert sorted(codes) == [0, 4]
    loser = one if codes[0] == 4 else other
    assert "another run writes to" in loser.text()
    assert rows_of(out) == baseline.rows
    assert len(catalog.runs(out)) == 1
