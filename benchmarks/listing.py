"""Measures the time and memory of listing and planning, which precede the first image.

    python -m benchmarks.listing --work /tmp/listing

Lists 200,000 files on disk and 20,000 objects on S3 (the tests' Swift server on this machine), and plans against 10 and
50 million published rows, each in a separate process.
"""

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from benchmarks import measure
from jobs.dataset import schema
from jobs.dataset.plan import write_manifest
from jobs.runs import catalog, publication
from jobs.storage import parquet, uris, writing

PUBLISHED_FILE_ROWS: Final = 500_000


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--files", type=int, default=200_000)
    arguments.add_argument("--objects", type=int, default=20_000)
    arguments.add_argument("--published", type=int, nargs="+", default=[10_000_000, 50_000_000])
    options = arguments.parse_args()
    work: Path = options.work
    lines = ["| case | seconds | entries/s | peak memory |", "|---|---|---|---|"]
    lines += [alone(on_disk, work, options.files), alone(on_s3, work, options.objects)]
    lines += [alone(against_history, work, rows) for rows in options.published]
    measure.write_result(options.results, "listing", lines)


def alone(benchmark: Callable[..., str], *arguments: Any) -> str:
    """Run one benchmark in a new process, so that its memory is measured separately."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return str(pool.apply(benchmark, arguments))


def planned(name: str, source: str, place: str, published: Iterable[pa.RecordBatch] = ()) -> str:
    """Plan a source and return a line of the table."""
    with measure.PeakMemory() as memory:
        started = time.monotonic()
        plan = write_manifest(source, uris.join(place, "manifest.parquet"), published=published)
        seconds = time.monotonic() - started
    listed = sum(plan.states.values())
    return f"| {name}: {plan.describe()} | {seconds:.1f} | {listed / seconds:,.0f} | {memory.text} |"


def on_disk(work: Path, files: int) -> str:
    """Plan many small files, a thousand per folder."""
    folder = work / f"files-{files}"
    for i in range(files):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir(parents=True, exist_ok=True)
        path = folder / f"{i // 1000:04d}" / f"{i}.jpg"
        if not path.exists():
            path.write_bytes(b"x")
    return planned(f"{files:,} files on disk", str(folder), str(work / "disk"))


def on_s3(work: Path, objects: int) -> str:
    """Plan many small objects, a thousand per prefix."""
    from concurrent.futures import ThreadPoolExecutor

    from tests.support.swift import SwiftServer
    from tests.support.tables import new_bucket

    with SwiftServer(work / "swift") as server:
        os.environ.update(server.environment())
        bucket = new_bucket()
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(
                lambda i: writing.write_bytes(f"{bucket}/pictures/{i // 1000:04d}/{i}.jpg", b"x"), range(objects)
            ):
                pass
        return planned(f"{objects:,} objects on S3", f"{bucket}/pictures", str(work / "s3"))


def against_history(work: Path, published: int) -> str:
    """Plan a source of a tenth as many rows as were published, of which all but a hundredth are known."""
    out = work / f"history-{published}"
    if not catalog.runs(str(out)):
        _publish(out, published)
    count = published // 10
    source = work / f"source-{published}.parquet"
    names = [f"s3://bucket/pictures/{i:09d}.jpg" for i in range(count)]
    etags = ["e" if i % 100 else "new" for i in range(count)]
    table = pa.table({"uri": names, "etag": etags})
    parquet.write(table.to_batches(), table.schema, str(source))
    del table, names, etags
    done = catalog.published(str(out), schema.DONE, detector_id="d")
    return planned(
        f"{count:,} rows of a manifest against {published:,} published rows", str(source), str(work / "p"), done
    )


def _publish(out: Path, rows: int) -> None:
    """Write a published run of this many rows, without their images."""
    from jobs.dataset.manifest import image_id

    run = publication.Run(out=str(out))
    files: list[dict[str, Any]] = []
    for start in range(0, rows, PUBLISHED_FILE_ROWS):
        names = [f"s3://bucket/pictures/{i:09d}.jpg" for i in range(start, min(rows, start + PUBLISHED_FILE_ROWS))]
        values: dict[str, Any] = {
            "image_id": [image_id(uri, "e") for uri in names], "uri": names, "status": ["scored"] * len(names),
            "error_class": pa.nulls(len(names), pa.string()),
        }  # fmt: skip
        table = pa.table(values, schema=schema.DONE)
        uri = uris.join(run.final, f"part-{len(files):05d}.parquet")
        parquet.write(table.to_batches(), schema.DONE, uri)
        files.append({"path": uri.removeprefix(f"{out}/"), "rows": len(names)})
    writing.write_json(run.record, {"run_id": run.run_id, "detector_id": "d", "files": files, "id": uuid.uuid4().hex})


if __name__ == "__main__":
    main()
