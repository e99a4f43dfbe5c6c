"""Measures the time and memory of reading verdicts for an evaluation, by default 10 million in two runs.

    python -m benchmarks.evaluate --work /tmp/evaluate

The first run judges each image, the second a tenth of the images again: the newest row counts. A separate process reads
the verdicts and does nothing else; its memory includes the modules that it has imported.
"""

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from benchmarks import measure
from jobs.dataset import schema
from jobs.runs.publication import Run
from jobs.storage import parquet, uris, writing
from jobs.storage.uris import Uri

FILE_ROWS: Final = 500_000
COLUMNS: Final = pa.schema(
    [
        schema.VERDICTS.field(name)
        for name in (
            "image_id", "uri", "label", "generator", "prob_fake", "verdict", "threshold", "status", "detector_id"
        )
    ]
)  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--verdicts", type=int, default=10_000_000)
    options = arguments.parse_args()
    out = Uri(str(options.work / f"verdicts-{options.verdicts}"))
    if not Path(out).exists():
        publish(out, range(options.verdicts), "20260101T000000Z-000000")
        publish(out, range(0, options.verdicts, 10), "20260102T000000Z-000000")
    lines = ["| rows read | verdicts | seconds | memory before, peak |", "|---|---|---|---|"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", out], stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(done.stdout)
    rows = options.verdicts + -(-options.verdicts // 10)
    lines.append(
        f"| {rows:,} | {found['verdicts']:,} | {found['seconds']:.0f} | "
        f"{found['before_mib']:.0f} MiB, {found['peak_mib']:.0f} MiB |"
    )
    measure.write_result(options.results, "evaluate", lines)


def read(out: Uri) -> dict[str, Any]:
    """Read the verdicts in this process."""
    from jobs.evaluation import verdicts

    before, started = peak_mib(), time.monotonic()
    table = verdicts.read(out)
    seconds = time.monotonic() - started
    return {"verdicts": table.num_rows, "seconds": seconds, "before_mib": before, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Peak memory of this process since it was executed; `getrusage` begins with the peak of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def publish(out: Uri, numbers: range, run_id: str) -> None:
    """A published run with a verdict on each of these images."""
    run = Run(out=out, run_id=run_id)
    files: list[dict[str, Any]] = []
    for start in range(0, len(numbers), FILE_ROWS):
        some = np.asarray(numbers[start : start + FILE_ROWS])
        fake = some % 2
        probability = np.random.default_rng([start, len(numbers)]).uniform(size=len(some))
        table = pa.table(
            {
                "image_id": [f"{number:032x}" for number in some],
                "uri": [f"s3://bucket/images/{number:09d}.jpg" for number in some],
                "label": fake,
                "generator": [f"generator {number % 25}" for number in some],
                "prob_fake": probability,
                "verdict": np.where(probability >= 0.5, "fake", "real"),
                "threshold": np.full(len(some), 0.5),
                "status": np.full(len(some), "scored"),
                "detector_id": np.full(len(some), "d" * 16),
            }
        ).cast(COLUMNS)
        uri = uris.join(run.final, f"part-{len(files):05d}.parquet")
        parquet.write(table.to_batches(), COLUMNS, uri)
        files.append({"path": uri.removeprefix(f"{out}/"), "rows": len(some)})
    writing.write_json(run.record, {"run_id": run_id, "detector_id": "d" * 16, "files": files, "id": uuid.uuid4().hex})


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        print(json.dumps(read(Uri(sys.argv[1]))))
    else:
        main()
