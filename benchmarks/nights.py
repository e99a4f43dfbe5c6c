"""Measures what a night costs before its first image is fetched, after 9 and after 364 earlier nights, before and after
`nsnet compact`.

    python -m benchmarks.nights --work /tmp/nights

Each night published 50 images. Their records and files are written directly, without Ray; the source holds the last
350. Measured is what `nsnet score` does from taking the lock until its pipeline would start: unfinished runs, listing,
planning, known captions, remembered failures. Each measurement is a process of its own, the median of several. On S3
(the tests' Swift server on this machine), requests are counted; a delay for each stands for a store that is further
away.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks import measure
from jobs.dataset import schema
from jobs.runs import attempts, catalog, compaction, execution, failures, products
from jobs.runs.execution import Planned, Request
from jobs.runs.publication import Run
from jobs.storage import listing, parquet, uris
from jobs.storage.uris import Uri
from nsnet.config import to_dict

IMAGES: Final = 50
NIGHTS: Final = (9, 364)
SOURCE_NIGHTS: Final = 7
DETECTOR: Final = "d" * 16
LIMITS: Final = {"max_bytes": 1}
DELAY_SECONDS: Final = 0.02
REPO_ROOT: Final = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--places", nargs="+", choices=["disk", "s3"], default=["disk", "s3"])
    arguments.add_argument("--measure", nargs=3, metavar=("SOURCE", "OUT", "DELAY"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        source, out, delay = options.measure
        print(json.dumps(planning(source, out, float(delay))))
        return
    work: Path = options.work
    lines = [
        f"{IMAGES} images a night; the source holds {IMAGES * SOURCE_NIGHTS}. Median of {options.repeat} processes.",
        "",
        "| place | earlier nights | records, files | seconds | CPU s | memory | requests |",
        "|---|---|---|---|---|---|---|",
    ]
    if "disk" in options.places:
        lines += at_place(work / "disk", str(work / "disk"), options.repeat, (0.0,))
    if "s3" in options.places:
        from tests.support.swift import SwiftServer
        from tests.support.tables import new_bucket

        with SwiftServer(work / "swift") as server:
            os.environ.update(server.environment())
            lines += at_place(work / "s3", new_bucket(), options.repeat, (0.0, DELAY_SECONDS))
    measure.write_result(options.results, "nights", lines)


def at_place(scratch: Path, place: str, repeat: int, delays: tuple[float, ...]) -> list[str]:
    """Lines of the table for a disk or a bucket."""
    from tests.support.nights import run_id

    lines = []

    def add(state: str, source: str, out: str) -> None:
        for delay in delays:
            lines.append(_line(state, source, out, repeat, delay))
            print(lines[-1], flush=True)

    for nights in NIGHTS:
        out, source = uris.join(place, f"out-{nights}"), str(scratch / f"source-{nights}.parquet")
        _publish(out, nights)
        _write_source(source, nights)
        add(f"{nights}", source, out)
    started = time.monotonic()
    compaction.compact(Uri(out), before=run_id(nights - SOURCE_NIGHTS), grace_seconds=0.0)
    add(f"{nights}, compacted a week ago, in {time.monotonic() - started:.0f} s", source, out)
    compaction.compact(Uri(out), grace_seconds=0.0)
    add(f"{nights}, just compacted", source, out)
    return lines


def _line(state: str, source: str, out: str, repeat: int, delay: float) -> str:
    results = [in_a_process(source, out, delay) for _ in range(repeat)]
    middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
    entries = [entry.uri for entry in listing.list_files(out)]
    records = sum("/runs/" in uri for uri in entries)
    place = "disk" if uris.is_local(out) else f"S3, {delay * 1000:g} ms a request" if delay else "S3"
    return (
        f"| {place} | {state} | {records}, {sum(uri.endswith('.parquet') for uri in entries)} | "
        f"{middle['seconds']:.2f} | {middle['cpu_seconds']:.2f} | {middle['memory_bytes'] / 2**20:.0f} MiB | "
        f"{middle['requests'] if not uris.is_local(out) else '–'} |"
    )


def in_a_process(source: str, out: str, delay_seconds: float = 0.0) -> dict[str, float]:
    """What `planning` returns in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.nights", "--work", ".", "--measure", source, out, str(delay_seconds)]
    ended = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def _publish(out: str, nights: int) -> None:
    from nsnet import recipes
    from tests.support.nights import CAPTIONER, night_rows, publish, run_id

    details: dict[str, Any] = {
        "detector_id": DETECTOR, "captioner_id": CAPTIONER, "attempts": 1, "unread": [], "unread_count": 0,
        "listing": {"new": IMAGES, "scored before": IMAGES * (SOURCE_NIGHTS - 1)},
        "settings": {"limits": LIMITS, "detector": to_dict(recipes.get("vit-l-14").detector)},
        "versions": {name: "1.0.0" for name in execution.RECORDED_PACKAGES},
    }  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: publish(out, run_id(n), night_rows(n, IMAGES, DETECTOR), **details), range(nights)))


def _write_source(path: str, nights: int) -> None:
    """A manifest of the last images, of which those of tonight are new."""
    import pyarrow as pa

    names = [f"s3://in/{night:04d}/{i}.jpg" for night in range(nights - SOURCE_NIGHTS + 1, nights + 1)
             for i in range(IMAGES)]  # fmt: skip
    table = pa.table({"uri": names, "etag": [""] * len(names)})
    parquet.write(table.to_batches(), table.schema, path)


class _Ready(Exception):
    """The pipeline would start now."""


def planning(source: str, out: str, delay_seconds: float) -> dict[str, float]:
    """Seconds, CPU seconds, memory of the process and requests to the store of what precedes the first image."""
    requests = _count_requests(delay_seconds)
    request = Request(
        source=Uri(source), out=Uri(out), product=products.VERDICTS, maker=DETECTOR, settings={"limits": LIMITS}
    )
    listing.is_folder(out)  # the client connects
    staging: list[Run] = []

    def make_work(planned: list[Planned]) -> Any:
        run = planned[0].run
        staging.append(run)
        known = catalog.published(request.out, schema.CAPTIONED, captioner_id="c" * 16)
        attempts.begin([run.staging], 1, known, "c" * 16)
        failures.remembered(request)
        raise _Ready

    count = len(requests)
    started, cpu = time.monotonic(), time.process_time()
    with measure.PeakMemory() as memory:
        try:
            execution.carry_out_together([request], make_work)  # type: ignore[arg-type]
        except _Ready:
            result = {
                "seconds": time.monotonic() - started,
                "cpu_seconds": time.process_time() - cpu,
                "memory_bytes": max(memory.peak, psutil.Process().memory_info().rss),
                "requests": len(requests) - count,
            }
    for run in staging:
        run.abandon()
    return result


def _count_requests(delay_seconds: float) -> list[str]:
    """The names of all requests from now on; each is delayed."""
    from aiobotocore.client import AioBaseClient

    found: list[str] = []
    call = AioBaseClient._make_api_call

    async def counted(self: Any, operation_name: str, api_params: Any) -> Any:
        found.append(operation_name)
        await asyncio.sleep(delay_seconds)
        return await call(self, operation_name, api_params)

    AioBaseClient._make_api_call = counted
    return found


if __name__ == "__main__":
    main()
