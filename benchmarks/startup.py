"""Measures how long a user waits for the first result of each command, on a machine that has run it before.

    python -m benchmarks.startup --work /tmp/startup

Help, one image with `tiny`, a night with nothing to do, the first verdict of `nsnet score` with an embedded cluster.
Each command runs several times, in turn with `import torch`, which shows how fast the machine is at that moment.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import measure

NSNET: Final = str(Path(sys.executable).with_name("nsnet"))
IMAGES: Final = 64


def run(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command, with its children. Raises `CalledProcessError` if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_verdict(source: Path, bundle: Path, out: Path) -> float:
    """Seconds from the start of `nsnet score` to the first line of progress that counts a scored image."""
    command = [NSNET, "score", str(source), "--detector", str(bundle), "--out", str(out)]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=measure.ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seconds = 0.0
        for line in process.stderr:
            if not seconds and ": scored " in line and "scored 0/" not in line:
                seconds = time.perf_counter() - started
    if process.returncode or not seconds:
        raise RuntimeError("nsnet score failed, or made no progress")
    return seconds


def text(seconds: Sequence[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=4)
    options = arguments.parse_args()
    work = Path(options.work)
    images = measure.write_jpegs(work / "images", IMAGES)
    bundle = measure.tiny_bundle(work / "bundle")
    done = work / f"done-{time.time_ns()}"
    score = [NSNET, "score", str(work / "images"), "--detector", str(bundle), "--out", str(done)]
    run(score)
    commands = {
        "`import torch`, for comparison": [sys.executable, "-c", "import torch"],
        "`nsnet --help`": [NSNET, "--help"],
        "`nsnet score --help`": [NSNET, "score", "--help"],
        "`nsnet calibrate --help`": [NSNET, "calibrate", "--help"],
        "`nsnet predict`, one image": [NSNET, "predict", str(images[0]), "--detector", str(bundle)],
        "`nsnet score`, nothing to do": score,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    first = []
    for number in range(options.rounds):
        for name, command in commands.items():
            times[name].append(run(command))
        first.append(first_verdict(work / "images", bundle, work / f"out-{time.time_ns()}-{number}"))
    lines = [
        f"{options.rounds} rounds of all in turn, with bytecode. Median, least and greatest, in seconds.",
        "",
        "| command | wall | CPU, with children |",
        "|---|---|---|",
        *(
            f"| {name} | {text([w for w, _ in pairs])} | {text([c for _, c in pairs])} |"
            for name, pairs in times.items()
        ),
        f"| `nsnet score`, {IMAGES} images, embedded cluster: first verdict | {text(first)} | |",
    ]
    measure.write_result(options.results, "startup", lines)


if __name__ == "__main__":
    main()
