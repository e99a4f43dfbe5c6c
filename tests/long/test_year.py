"""A year of small nights: what planning night 365 costs against night 10, before and after `nsnet compact`.

Counted are files that are opened and memory that Python and Arrow allocate. CPU seconds and memory at peak are those of
fresh processes, as each night is one (`benchmarks/nights.py`).
"""

import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.nights import LIMITS, in_a_process
from jobs.dataset import schema
from jobs.runs import attempts, catalog, execution, failures, products, records
from jobs.runs.compaction import compact
from jobs.runs.execution import Planned, Request
from jobs.storage import parquet, reading
from jobs.storage.uris import Uri
from tests.support.nights import CAPTIONER, night_rows, publish, run_id

DETECTOR = "d" * 16
IMAGES = 20


class Ready(Exception):
    """The pipeline would start now."""


def write_source(path: Path, night: int) -> str:
    """A manifest of the images of a week, of which those of this night are new."""
    names = [f"s3://in/{past:04d}/{i}.jpg" for past in range(night - 6, night + 1) for i in range(IMAGES)]
    table = pa.table({"uri": names, "etag": [""] * len(names)})
    parquet.write(table.to_batches(), table.schema, str(path))
    return str(path)


def plan(source: str, out: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What precedes the first image of a night: files below the output that were opened, bytes at peak, images."""
    opened: list[str] = []
    found: dict[str, Any] = {}

    def make_work(planned: Sequence[Planned]) -> Any:
        (one,) = planned
        known = catalog.published(request.out, schema.CAPTIONED, captioner_id=CAPTIONER)
        attempts.begin([one.run.staging], 1, known, CAPTIONER)
        failures.remembered(request)
        found.update(images=one.count, staging=one.run)
        raise Ready

    def watched(read: Any) -> Any:
        def call(uri: str, *rest: Any) -> Any:
            if "/runs/" in uri or "/verdicts/" in uri:
                opened.append(uri)
            return read(uri, *rest)

        return call

    request = Request(
        source=Uri(source), out=Uri(out), product=products.VERDICTS, maker=DETECTOR, settings={"limits": LIMITS}
    )
    records._last_read.clear()
    with patch.context() as patched:
        for name in ("read_bytes", "open_file"):
            patched.setattr(reading, name, watched(getattr(reading, name)))
        tracemalloc.start()
        arrow = pa.total_allocated_bytes()
        with pytest.raises(Ready):
            execution.carry_out_together([request], make_work)
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow
        tracemalloc.stop()
    found.pop("staging").abandon()
    return {**found, "opened": len(opened), "peak": peak}


def minima(*places: tuple[str, str]) -> list[dict[str, float]]:
    """For each source and output, the minima of three fresh processes: a busy machine only adds to them. Those of
    different outputs run together.
    """
    with ThreadPoolExecutor(len(places)) as pool:
        rounds = [list(pool.map(lambda place: in_a_process(*place), places)) for _ in range(3)]
    return [{name: min(one[name] for one in results) for name in results[0]} for results in zip(*rounds, strict=True)]


def test_night_365_costs_what_night_10_costs_if_the_output_is_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = str(tmp_path / "early"), str(tmp_path / "late")
    details = {"detector_id": DETECTOR, "settings": {"limits": LIMITS}, "versions": {}}
    for night in range(364):
        for out in (early, late) if night < 9 else (late,):
            publish(out, run_id(night), night_rows(night, IMAGES, DETECTOR), **details)
    source = write_source(tmp_path / "late.parquet", 364)
    early_source = write_source(tmp_path / "early.parquet", 9)
    plan(early_source, early, monkeypatch)  # what is imported and kept for good is not counted
    ten = plan(early_source, early, monkeypatch)
    before = plan(source, late, monkeypatch)
    assert ten["images"] == before["images"] == IMAGES
    assert ten["opened"] == 3 * 9 and before["opened"] == 3 * 364  # each record once, each file for ids and captions
    compact(late, before=run_id(357), grace_seconds=0.0)
    week = plan(source, late, monkeypatch)
    assert week["images"] == IMAGES and week["opened"] == 3 * 8 <= 1.5 * ten["opened"]
    process_of_ten, process_of_week = minima((early_source, early), (source, late))
    for name in ("cpu_seconds", "memory_bytes"):
        assert process_of_week[name] <= 1.5 * process_of_ten[name], (name, process_of_week, process_of_ten)
    compact(late, grace_seconds=0.0)
    after = plan(source, late, monkeypatch)
    assert after["images"] == IMAGES and after["opened"] <= 3 + 1  # a slice of the merged file may be opened once more
    for one in (before, week, after):  # a driver without models takes 200 MiB
        assert one["peak"] - ten["peak"] < 8 * 2**20, (ten, before, week, after)
    assert len(catalog.runs(late)) == 364
