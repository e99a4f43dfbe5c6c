"""The semantic basis of 144,000 captions, as a stream, against one decomposition of them all.

    python -m benchmarks.basis --work /tmp/basis

Writes captions' features of 768 dimensions as `nsnet caption` publishes them, and computes their basis by Ray, from a
third of so many, from all, and from three times as many, each in a process of its own. Says how much memory that took,
and the largest angle between the streamed basis and that of one SVD, for several ranks.
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
    """Captions of a few topics, far from the origin, with noise in all directions: as CLIP's text features lie."""
    world = np.random.default_rng(0)
    topics, centre = world.normal(size=(TOPICS, DIM)), 3.0 * world.normal(size=DIM)
    dice = np.random.default_rng([1, start])
    mixed = dice.normal(size=(rows, TOPICS)) * np.linspace(2.0, 0.1, TOPICS)
    return (mixed @ topics * 0.2 + centre + 0.02 * dice.normal(size=(rows, DIM))).astype(np.float32)


def write(folder: Path, count: int) -> list[str]:
    """Published captions: files of so many rows, and the ids of all."""
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
    everyone = pa.table({"image_id": [f"{i:032x}" for i in range(count)]})
    pq.write_table(everyone, folder.parent / "ids.parquet")
    return files


class Cost(NamedTuple):
    """Of a basis from so many captions."""

    seconds: float
    driver: int
    """Most bytes that the driver holds for itself."""
    everything: int
    """Likewise of all processes together."""


def streamed(files: list[str], count: int, out: Path) -> Cost:
    """Compute the basis of the first captions."""
    command = [sys.executable, "-c", CODE, json.dumps(files), str(count), str(out)]
    process = subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.PIPE, text=True)
    with measure.PeakMemory(process.pid, with_children=True) as memory:
        told, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the basis ended with {process.returncode}")
    return Cost(json.loads(told.splitlines()[-1])["seconds"], memory.peak_own, memory.peak_of_all)


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
    costs = [streamed(files[: -(-some // FILE_ROWS)], some, work / f"{some}.npz") for some in counts]
    started = time.monotonic()
    everything = np.concatenate(
        [features(start, min(FILE_ROWS, count - start)) for start in range(0, count, FILE_ROWS)]
    )
    _, values, directions = np.linalg.svd(everything.astype(np.float64), full_matrices=False)
    once = time.monotonic() - started
    found = np.load(work / f"{count}.npz", allow_pickle=False)
    error = np.abs(found["values"] / values - 1.0).max()
    angles = [f"| {rank} | {angle(directions[:rank].T, found['directions'][:rank].T):.1e} |" for rank in RANKS]
    measure.write_result(
        options.results,
        "basis",
        [
            f"Captions of {DIM} dimensions in files of {FILE_ROWS:,}.",
            "",
            f"| captions | {' | '.join(f'{some:,}' for some in counts)} |",
            "|---|---|---|---|",
            f"| seconds | {' | '.join(f'{cost.seconds:.1f}' for cost in costs)} |",
            f"| driver's most memory, MiB | {' | '.join(f'{cost.driver / 2**20:.0f}' for cost in costs)} |",
            f"| of all processes, MiB | {' | '.join(f'{cost.everything / 2**20:.0f}' for cost in costs)} |",
            "",
            f"One SVD of {count:,} in memory, {everything.nbytes * 2 / 2**20:.0f} MiB as fp64: {once:.1f} s. Largest "
            f"relative difference of a singular value: {error:.1e}. Largest principal angle between the two bases:",
            "",
            "| rank | radians |",
            "|---|---|",
            *angles,
        ],
    )


if __name__ == "__main__":
    main()
