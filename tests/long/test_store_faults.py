"""A whole run of scoring: over a bad network, with a store that goes away, with images that poison their decoder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.runs import catalog
from jobs.storage import reading, uris
from tests.support.multinode import running
from tests.support.proxy import FaultyProxy, RandomPolicy
from tests.support.swift import SwiftServer
from tests.support.tables import big_image_file, image_file, new_bucket, put, save_bundle

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("forked_workers")]

IMAGES = int(os.environ.get("NSNET_FAULT_IMAGES", "300"))
RUN_SECONDS = 560.0
RATE = 0.05
"""Share of the requests that fail."""


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def source(s3_environment: SwiftServer) -> str:
    return put(f"{new_bucket()}/pictures", {f"{i}.jpg": image_file(i, "JPEG", 90, 70) for i in range(IMAGES)})


@pytest.fixture
def proxy(s3_environment: SwiftServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_environment.endpoint_url, lock_conditional_puts=True) as proxy:
        yield proxy


def verdicts(out: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = catalog.verdicts(out).to_table().to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return rows


def test_no_image_is_lost_or_failed_by_a_bad_network(source: str, detector: Path, proxy: FaultyProxy) -> None:
    out = new_bucket()
    proxy.policy = RandomPolicy(RATE, seed=3)
    with running(source, "--detector", str(detector), "--out", out, env=proxy.environment()) as score:
        assert score.end(RUN_SECONDS) == 0, score.text()
    rows = verdicts(out)
    assert len(rows) == IMAGES and {row["status"] for row in rows} == {"scored"}
    assert all(proxy.counts[kind] for kind in ("slow_down", "reset", "cut", "stall")), proxy.counts
    (record,) = catalog.runs(out)
    assert record["store"]["asked_again"] == sum(row["requests"] > 1 for row in rows) > 0
    print(f"proxy: {dict(proxy.counts)}; {record['store']}; {record['seconds']} s")


def test_run_that_was_stopped_by_an_outage_and_by_a_signal_is_continued_by_the_same_command(
    detector: Path, tmp_path: Path
) -> None:
    """The store is a disk, which is away at once; what S3 clients do until they give up is tested with the stage."""
    source, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    put(str(source), {f"{i}.jpg": image_file(i, "JPEG", 200, 150) for i in range(3000)})
    arguments = [str(source), "--detector", str(detector), "--out", str(tmp_path / "out"), "--outage-seconds", "5"]
    with running(*arguments) as score:
        assert score.wait_for(lambda: score.prepared > 0, RUN_SECONDS), score.text()
        source.rename(elsewhere)
        assert score.end(RUN_SECONDS) == 1, score.text()
    assert "error: the store of the images has not answered for 5 s" in score.text()
    assert catalog.runs(str(tmp_path / "out")) == []
    elsewhere.rename(source)
    with running(*arguments) as score:
        assert score.wait_for(lambda: score.prepared > 0, RUN_SECONDS), score.text()
        score.process.terminate()
        assert score.end(60) == 143, score.text()
    assert score.lines[-1] == "error: stopped"
    (number,) = (tmp_path / "out" / "locks").iterdir()
    assert reading.read_json(str(number)) == {"released": True}
    with running(*arguments) as score:
        assert score.end(RUN_SECONDS) == 0, score.text()
    rows = verdicts(str(tmp_path / "out"))
    assert len(rows) == 3000 and {row["status"] for row in rows} == {"scored"}
    assert catalog.runs(str(tmp_path / "out"))[0]["attempts"] == 3


def test_images_that_take_too_long_fail_alone_and_are_not_tried_on_the_next_night(
    detector: Path, tmp_path: Path
) -> None:
    poison = {f"slow {side}.png": big_image_file(side) for side in (8000, 8001, 8002)}
    poison["again.png"] = poison["slow 8000.png"]
    source = put(str(tmp_path / "pictures"), {f"{i}.jpg": image_file(i, "JPEG", 90, 70) for i in range(100)} | poison)
    arguments = ["--detector", str(detector), "--out", str(tmp_path / "out"), "--max-seconds", "1"]
    with running(source, *arguments) as score:
        assert score.end(RUN_SECONDS) == 3, score.text()
    rows = verdicts(str(tmp_path / "out"))
    failed = {row["uri"]: row for row in rows if row["status"] == "failed"}
    assert len(rows) == 104 and {uris.join(source, name) for name in poison} == failed.keys()
    assert {(row["error_stage"], row["error_class"]) for row in failed.values()} == {("decode", "ImageTimeoutError")}
    put(source, {"the same again.png": poison["slow 8001.png"]})
    with running(source, *arguments) as score:
        assert score.end(RUN_SECONDS) == 3, score.text()
    (row,) = [row for row in verdicts(str(tmp_path / "out")) if row["uri"].endswith("/the same again.png")]
    assert "(in run " in row["error_message"]
