"""Compares the streamed semantic basis of 144,000 captions with one decomposition of all of them.

    python -m benchmarks.basis --work /tmp/basis

Writes caption features of 768 dimensions as `nsnet caption` publishes them, and computes their basis with Ray from a
third of the captions, from all, and from three times as many, each in a separate process. Reports the memory used, and
the largest angle between the streamed basis and that of one SVD, for several ranks.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from jobs.dataset import schema

DIM, FILE_ROWS, TOPICS = 768, 8_000, 60
RANKS = (1, 16, 64, 256, 512, 767)
CODE = """
import json, sys, time
import pyarrow.parquet as pq
import numpy as np
from jobs.cluster import resources
from jobs.experiments import basis
resources.connect("local")
files, count, out = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ids = pq.read_table(files[0].rpartition("/")[0] + "/../ids.parquet").column("image_id").combine_chunks().slice(0, count)
started = time.monotonic()
found = basis.spectrum(files, ids, task_cpus=0.5)
print(json.dumps({"seconds": time.monotonic() - started}))
np.savez(out, values=found.singular_values.numpy(), directions=found.directions.numpy())
"""


def features(start: int, rows: int) -> npt.NDArray[np.float32]:
    """Draw features like CLIP's text features: a few topics, far from the origin, with noise in all directions."""
    world = np.random.default_rng(0)
    topics, centre = world.normal(size=(TOPICS, DIM)), 3.0 * world.normal(size=DIM)
    dice = np.random.default_rng([1, start])
    mixed = dice.normal(size=(rows, TOPICS)) * np.linspace(2.0, 0.1, TOPICS)
    return (mixed @ topics * 0.2 + centre + 0.02 * dice.normal(size=(rows, DIM))).astype(np.float32)


def write(folder: Path, count: int) -> list[str]:
    """Write published captions in files of `FILE_ROWS` rows, and the ids of all; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = pa.schema([schema.CAPTIONS.field("image_id"), schema.TEXT_FEATURES])
    files = []
    for start in range(0, count, FILE_ROWS):
        path, rows = folder / f"part-{start:07d}.parquet", min(FILE_ROWS, count - start)
        files.append(str(path))
        if not path.exists():
            values = pa.array(features(start, rows).ravel())
            lists = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * DIM, pa.int32()), values)
            ids = pa.array([f"{i:032x}" for i in range(start, start + rows)])
            pq.write_table(pa.table([ids, lists.cast(columns.field(1).type)], schema=columns), path)
    all_ids = pa.table({"image_id": [f"{i:032x}" for i in range(count)]})
    pq.write_table(all_ids, folder.parent / "ids.parquet")
    return files


class Cost(NamedTuple):
    """Time and memory of computing a basis."""

    seconds: float
    driver: int
    """Peak of the driver's own bytes."""
    everything: int
    """Peak of the own bytes of all processes together."""


def streamed(files: list[str], count: int, out: Path) -> Cost:
    """Compute the basis of the first `count` captions in a separate process."""
    command = [sys.executable, "-c", CODE, json.dumps(files), str(count), str(out)]
    process = subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.PIPE, text=True)
    with measure.PeakMemory(process.pid, with_children=True) as memory:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the process for the basis failed with exit code {process.returncode}: see its output")
    return Cost(json.loads(output.splitlines()[-1])["seconds"], memory.peak_own, memory.peak_of_all)


def angle(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Largest principal angle between the spans of orthonormal columns."""
    outside = second - first @ (first.T @ second)
    return float(np.arcsin(min(1.0, np.linalg.norm(outside, 2))))


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=144_000)
    options = arguments.parse_args()
    count, work = options.count, options.work
    counts = (count // 3, count, 3 * count)
    files = write(work / "captions", counts[-1])
    costs = [streamed(files[: -(-size // FILE_ROWS)], size, work / f"{size}.npz") for size in counts]
    started = time.monotonic()
    everything = np.concatenate(
        [features(start, min(FILE_ROWS, count - start)) for start in range(0, count, FILE_ROWS)]
    )
    _, values, directions = np.linalg.svd(everything.astype(np.float64), full_matrices=False)
    svd_seconds = time.monotonic() - started
    streamed_basis = np.load(work / f"{count}.npz", allow_pickle=False)
    error = np.abs(streamed_basis["values"] / values - 1.0).max()
    angles = [f"| {rank} | {angle(directions[:rank].T, streamed_basis['directions'][:rank].T):.1e} |" for rank in RANKS]
    measure.write_result(
        options.results,
        "basis",
        [
            f"Captions of {DIM} dimensions in files of {FILE_ROWS:,}.",
            "",
            f"| captions | {' | '.join(f'{size:,}' for size in counts)} |",
            "|---|---|---|---|",
            f"| seconds | {' | '.join(f'{cost.seconds:.1f}' for cost in costs)} |",
            f"| driver's peak memory, MiB | {' | '.join(f'{cost.driver / 2**20:.0f}' for cost in costs)} |",
            f"| peak memory of all processes, MiB | {' | '.join(f'{cost.everything / 2**20:.0f}' for cost in costs)} |",
            "",
            f"One SVD of {count:,} in memory, {everything.nbytes * 2 / 2**20:.0f} MiB as fp64: {svd_seconds:.1f} s. "
            f"Largest relative difference of a singular value: {error:.1e}. Largest principal angle between the two "
            "bases:",
            "",
            "| rank | radians |",
            "|---|---|",
            *angles,
        ],
    )


if __name__ == "__main__":
    main()
