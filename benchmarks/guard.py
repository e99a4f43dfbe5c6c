"""What the guard costs: images prepared in child processes that may crash, against the same without them.

    python -m benchmarks.guard --work /tmp/guard

All do the same images in turn, round by round: processes as they are, processes that keep their memory as the guard's
children do, and the guard. Twice as many processes as cores, as where Ray's tasks decode: what counts is the work, not
that a process waits for its child. With the captioner's side of `tiny` and of BLIP.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Final

from benchmarks import measure
from jobs.isolation.guard import ENVIRONMENT
from jobs.pipeline.decoding import GuardedDecoder
from nsnet.preparation import PreparationConfig, prepare

THUMBNAILS_PX: Final = {"tiny": 64, "BLIP": 384}
WORKERS: Final = 2 * (os.cpu_count() or 1)


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=800)
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    paths = measure.write_jpegs(Path(options.work) / "distinct", options.count)
    lines = [
        f"{options.count} JPEGs, long sides {measure.SIDES_PX} px, {WORKERS} processes, {options.rounds} rounds of all "
        "in turn after one that is not counted. Images a second (medians), and the guard's time over the other's.",
        "",
        "| thumbnail | plain | keeps its memory | guard | over plain: min, median, max | over what keeps its memory |",
        "|---|---|---|---|---|---|",
    ]
    context = multiprocessing.get_context("spawn")
    for name, side in THUMBNAILS_PX.items():
        with context.Pool(WORKERS) as plain:
            seconds(plain, without_guard, paths, side)  # all have started, before the next ones' environment
            os.environ.update(ENVIRONMENT)
            with context.Pool(WORKERS) as keeping, context.Pool(WORKERS) as guarded:
                ways = ((plain, without_guard), (keeping, without_guard), (guarded, with_guard))
                rounds = [[seconds(*way, paths, side) for way in ways] for _ in range(options.rounds + 1)][1:]
            for variable in ENVIRONMENT:
                del os.environ[variable]
        speeds = [f"{options.count / statistics.median(times):.0f}" for times in zip(*rounds, strict=True)]
        ratios = [sorted(times[2] / times[i] for times in rounds) for i in (0, 1)]
        told = [f"{ratio[0]:.3f}, {statistics.median(ratio):.3f}, {ratio[-1]:.3f}" for ratio in ratios]
        lines.append(f"| {name}, {side} px | {' | '.join(speeds + told)} |")
    measure.write_result(options.results, "guard", lines)


def seconds(pool: Pool, way: Any, paths: Sequence[Path], side: int) -> float:
    """Seconds that the processes of a pool take for all images, one each at a time."""
    started = time.perf_counter()
    for _ in pool.imap_unordered(way, [(path, side) for path in paths], chunksize=8):
        pass
    return time.perf_counter() - started


def without_guard(task: tuple[Path, int]) -> None:
    """Prepare an image in this process."""
    path, side = task
    prepare(path.read_bytes(), PreparationConfig(thumbnail_px=side))


def with_guard(task: tuple[Path, int]) -> None:
    """Prepare an image in this process's guarded child."""
    path, side = task
    _guard(side).prepare(path.read_bytes())


@cache
def _guard(side: int) -> GuardedDecoder:
    return GuardedDecoder(PreparationConfig(thumbnail_px=side))


if __name__ == "__main__":
    main()
