"""Every series that dashboard and alarms name is scraped from a real training and a real run; their logs are JSON."""

import contextlib
import json
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.cluster import embedded
from jobs.cluster.embedded import NO_METRICS, NODE_ENVIRONMENT, START_ENVIRONMENT
from jobs.cluster.shares import ROWS_PER_BLOCK
from jobs.dataset import synthetic
from jobs.runs import catalog
from jobs.runs.drift import BINS, MIN_RUNS
from jobs.storage import writing
from jobs.telemetry import series
from nsnet import bundle
from tests.support.nodes import free_ports
from tests.support.preloaded import COMMAND
from tests.support.priority import preferred
from tests.support.proxy import Action, FaultyProxy, Script
from tests.support.tables import new_bucket

ROOT = Path(__file__).resolve().parents[2]
SCENES = 52
"""Scenes of the training. Each is a real image and a fake one."""
SCORED_SCENES = 66
"""Scenes of the run, those of the training among them: more images than a run needs to be compared with earlier ones,
and more than a block holds. A model actor reports its seconds from its second block on."""
IMAGES = 2 * SCORED_SCENES
Labels = dict[str, str]


class Scraper:
    """Reads a node's metrics each second, as Prometheus would, and keeps the last value of each series."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._stop = threading.Event()
        self.last: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
        self.first_seen: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._thread = threading.Thread(target=self._scrape_always, daemon=True)
        self._thread.start()

    def _scrape_always(self) -> None:
        while not self._stop.wait(1.0):
            with contextlib.suppress(OSError):
                self.scrape()

    def scrape(self) -> set[str]:
        """Scrape once; returns the names that are exported now."""
        with urllib.request.urlopen(self._url, timeout=5) as answer:
            text = answer.read().decode()
        found = set()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_nsnet_"):
                    found.add(sample.name)
                    labels = frozenset(sample.labels.items())
                    self.last[sample.name][labels] = sample.value
                    self.first_seen.setdefault((sample.name, labels), time.time())
        return found

    def of(self, wanted: series.Series, **labels: str) -> list[tuple[Labels, float]]:
        """Labels and last value of the series with these labels."""
        return [
            (dict(own), value)
            for own, value in self.last.get(wanted.exported, {}).items()
            if labels.items() <= dict(own).items()
        ]

    def total(self, wanted: series.Series, **labels: str) -> float:
        """The sum of these series."""
        return sum(value for _, value in self.of(wanted, **labels))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)


def start_node() -> tuple[Any, int]:
    """A cluster of one node, and the port where it exports metrics.

    On a busy machine its agent may not be up within the 15 s that the node waits for it: then there is another try.
    """
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 2, "object_store_memory": 512 * 2**20, "include_dashboard": False}
    for is_last in (False, False, True):
        (port,), cluster = free_ports(1), Cluster()
        try:
            with preferred(), embedded._without_api_server(), embedded._without_helpers():
                cluster.add_node(**settings, metrics_export_port=port)
            return cluster, port
        except Exception:  # Ray has no class of its own for it
            cluster.shutdown()
            if is_last:
                raise
    raise AssertionError("unreachable")


@pytest.fixture
def node(proxy: FaultyProxy, forked_workers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Scraper]]:
    """Address of a cluster of one node, and its scraper."""
    for name in NO_METRICS:  # an embedded cluster of other tests may have set them
        monkeypatch.delenv(name, raising=False)
    for name, value in {**NODE_ENVIRONMENT, **START_ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)
    cluster, port = start_node()
    scraper = Scraper(port)
    try:
        yield str(cluster.address), scraper
    finally:
        scraper.stop()
        cluster.shutdown()


def run(module: str, *arguments: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run a command with JSON logs; returns its events and its summary."""
    command = [*COMMAND, module, *arguments, "--log-format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if not line.startswith("{")] == []  # nothing else is on stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    return events, events[-1]["summary"]


def earlier_record(out: str, day: int, source: str, detector_id: str) -> None:
    """Write the record of an earlier run, of which no image was called fake."""
    run_id = f"2026010{day}T010203Z-000000"
    counts = [0] * BINS
    counts[3] = 200
    record = {
        "run_id": run_id, "product": "verdicts", "rows": 200, "files": [], "source": source, "detector_id": detector_id,
        "counts": {"status": {"scored": 200}, "verdict": {"real": 200}},
        "distributions": {"prob_fake": counts, "residual_energy": counts}, "seconds": 10.0,
    }  # fmt: skip
    writing.write_json(f"{out}/runs/{run_id}.json", record)


def test_every_series_of_the_table_is_scraped_from_a_training_and_a_run(
    node: tuple[str, Scraper], proxy: FaultyProxy, tmp_path: Path
) -> None:
    address, scraper = node
    folder, source = tmp_path / "pictures", f"{new_bucket()}/pictures"
    synthetic.write_bucket(folder, range(SCENES), seed=0, size_px=64, processes=1)
    writing.upload_folder(folder, source, last="")
    detector, out = f"{tmp_path}/detector", f"{tmp_path}/out"

    events, summary = run("jobs.train", source, "--out", detector, "--epochs", "1", "--address", address)
    assert {"training", "export"} <= {event.get("stage") for event in events}
    (trained,) = summary["trainings"]
    assert (trained["bundle"], trained["epochs"]) == (detector, 1)
    result = json.loads(Path(f"{detector}.training/result.json").read_text())
    train_images = sum(result["split"]["train"]["upsampler"])
    assert scraper.total(series.TRAINING_IMAGES) == train_images
    assert scraper.total(series.DONE, work="train") == train_images
    parts = {labels["part"]: value for labels, value in scraper.of(series.TRAINING_SECONDS)}
    assert set(parts) == {"waiting", "computing", "validating", "checkpointing"} and min(parts.values()) > 0.0
    terms = {labels["term"] for labels, _ in scraper.of(series.TRAINING_LOSS)}
    assert {"loss", "contrastive", "bce", "alignment"} <= terms

    detector_id = bundle.read(Path(detector)).detector_id
    for day in range(1, MIN_RUNS + 1):
        earlier_record(out, day, source, detector_id)
    more = tmp_path / "more"
    synthetic.write_bucket(more, range(SCENES, SCORED_SCENES), seed=0, size_px=64, processes=1)
    writing.upload_folder(more, source, last="")
    writing.write_bytes(f"{source}/broken.jpg", b"\xff\xd8\xff\xe0 cut off")
    assert IMAGES + 1 > ROWS_PER_BLOCK
    proxy.policy = Script(Action("slow_down"), wanted="/broken.jpg")
    command = ("jobs.score", source, "--detector", detector, "--out", out, "--address", address)
    events, summary = run(*command)
    ended = time.time()
    record = catalog.runs(out)[-1]
    assert {event["attempt"] for event in events if event.get("stage") == "score"} == {1}
    assert {"planning", "score", "publishing"} <= {event.get("stage") for event in events}
    assert {event.get("run_id") for event in events if event.get("stage") == "publishing"} == {record["run_id"]}
    progress = [event for event in events if "planned" in event][-1]
    assert (progress["done"], progress["planned"], progress["failed"]) == (IMAGES + 1, IMAGES + 1, 1)
    assert summary["runs"][0]["record"] == f"{out}/runs/{record['run_id']}.json"

    def images(**labels: str) -> float:
        return scraper.total(series.IMAGES, work="score", **labels)

    while scraper.total(series.PUBLISHED_IMAGES, product="verdicts", status="scored") == 0:
        assert time.time() < ended + 5.0, "the last values of a command are lost when it ends"
        time.sleep(0.2)
    assert images(stage="scoring", outcome="done") == record["counts"]["status"]["scored"] == IMAGES
    assert images(outcome="failed") == record["counts"]["status"]["failed"] == 1
    ((error, count),) = record["counts"]["error_class"].items()
    assert images(stage="preparing", outcome="failed", error_class=error) == count
    sizes = sum(path.stat().st_size for part in (folder, more) for path in part.rglob("*.*"))
    assert scraper.total(series.FETCHED_BYTES, work="score") == pytest.approx(sizes + 14, abs=10)
    repeated = record["store"]["requests"] - record["rows"]
    assert scraper.total(series.REQUESTS_REPEATED, work="score") == repeated == 1
    seconds = {labels["stage"]: value for labels, value in scraper.of(series.STAGE_SECONDS, work="score")}
    assert set(seconds) == {"fetching", "decoding", "captioning", "scoring", "waiting"}
    assert min(seconds.values()) > 0.0
    assert scraper.total(series.PLANNED, work="score") == scraper.total(series.DONE, work="score") == IMAGES + 1
    queues = {labels["stage"]: value for labels, value in scraper.of(series.QUEUE_IMAGES, work="score")}
    assert queues == {"preparing": 0.0, "captioning": 0.0, "scoring": 0.0}
    assert {value for _, value in scraper.of(series.EXIT_CODE, command="score")} == {0.0}
    assert max(value for _, value in scraper.of(series.FAILED_SHARE)) == pytest.approx(1 / (IMAGES + 1))
    alarms = {labels["statistic"]: value for labels, value in scraper.of(series.DRIFT_ALARM)}
    assert alarms == {"flagged": 1.0, "prob_fake": 1.0, "residual_energy": 1.0}
    for one in series.TABLE.values():
        found = scraper.of(one)
        assert found, f"{one.exported} was not scraped"
        for labels, _ in found:
            assert set(one.labels) <= set(labels), one.exported

    gauges = {one.exported for one in series.TABLE.values() if one.kind == "gauge"}
    while scraper.scrape() & gauges:
        assert time.time() < ended + 40.0, "gauges of a process that ended are still exported"
        time.sleep(1.0)
    last = max(at for (name, _), at in scraper.first_seen.items() if name == series.EXIT_CODE.exported)
    assert time.time() > last + 15.0, "a scrape each 15 s may miss the last values of a command"
    held = [value for _, value in scraper.of(series.LOCKS_HELD)]
    assert held and max(held) == 0.0  # each lease was released, and that was exported

    scraper.last.clear()
    _, summary = run(*command)  # nothing is left to do
    assert summary["runs"][0]["rows"] == 0
    scraper.scrape()
    assert scraper.of(series.PUBLISHED_AT, product="verdicts")[0][1] > ended
