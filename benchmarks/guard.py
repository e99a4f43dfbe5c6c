"""What the guard costs: pictures prepared in a child process that may crash, against the same in this process.

    python -m benchmarks.guard --work /tmp/guard

Both do the same pictures in turn, round by round, with the captioner's side of `tiny` and of BLIP.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import measure
from jobs.guard import GuardedDecoder
from nsnet.preparation import PreparationConfig, prepare

THUMBNAILS_PX: Final = {"tiny": 64, "BLIP": 384}


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    pictures = [path.read_bytes() for path in measure.write_jpegs(Path(options.work) / "distinct", options.count)]
    lines = [
        f"{options.count} JPEGs, long sides {measure.SIDES_PX} px, {options.rounds} rounds of both in turn after one "
        "that is not counted.",
        "",
        "| thumbnail | ms a picture in the process | with the guard | ratio: min, median, max |",
        "|---|---|---|---|",
    ]
    for name, side in THUMBNAILS_PX.items():
        config = PreparationConfig(thumbnail_px=side)
        guard = GuardedDecoder(config)
        plain, guarded = [], []
        for _ in range(options.rounds + 1):
            plain.append(seconds(lambda picture, config=config: prepare(picture, config), pictures))  # type: ignore[misc]
            guarded.append(seconds(guard.prepare, pictures))
        guard.close()
        ratios = [b / a for a, b in zip(plain[1:], guarded[1:], strict=True)]
        each = [1000 * statistics.median(times[1:]) / options.count for times in (plain, guarded)]
        lines.append(
            f"| {name}, {side} px | {each[0]:.2f} | {each[1]:.2f} | "
            f"{min(ratios):.3f}, {statistics.median(ratios):.3f}, {max(ratios):.3f} |"
        )
    measure.write_result(options.results, "guard", lines)


def seconds(work: Callable[[bytes], object], pictures: list[bytes]) -> float:
    """Seconds that some work over all pictures takes."""
    started = time.perf_counter()
    for picture in pictures:
        work(picture)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
