"""Provides what the benchmarks share: test images, monitoring of `nsnet score`, and result files."""

import argparse
import contextlib
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from PIL import Image

ROOT: Final = Path(__file__).parents[1]
SIDES_PX: Final = (224, 256, 320, 384, 512, 640, 768, 1024)
"""Long sides of the generated images, all equally often; the short side is 3/4 of the long one."""


@dataclass(frozen=True)
class Sample:
    """State of a run at one time."""

    seconds: float
    """Seconds since the run's start."""
    prepared: int
    captioned: int
    scored: int
    driver_bytes: int
    """Resident memory of the driver."""
    all_bytes: int
    """Unshared memory of the driver and its descendants."""


def hardware() -> str:
    """Describe this machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    gpus = "a GPU" if Path("/dev/nvidia0").exists() else "no GPU"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {gpus}, {platform.system()}, Python {platform.python_version()}"


def write_jpegs(folder: Path, count: int, seed: int = 0, sides_px: Sequence[int] = SIDES_PX) -> list[Path]:
    """Write smooth random images with noise, of these long sides in turn, as JPEG of quality 90."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        dice = np.random.default_rng([seed, i])
        side = sides_px[i % len(sides_px)]
        small = dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        noise = dice.normal(0.0, 12.0, (side * 3 // 4, side, 1))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return paths


def link(images: Sequence[Path], folder: Path, count: int) -> None:
    """Create `count` hard links to the images, a thousand per folder."""
    for i in range(count):
        subfolder = folder / f"{i // 1000:04d}"
        if i % 1000 == 0:
            subfolder.mkdir(parents=True, exist_ok=True)
        target = subfolder / f"{i:06d}.jpg"
        if not target.exists():
            os.link(images[i % len(images)], target)


def tiny_bundle(folder: Path) -> Path:
    """Write the `tiny` recipe with random weights as a bundle, if it does not exist."""
    from nsnet import recipes
    from nsnet.detector import Detector

    if not folder.exists():
        Detector.build(recipes.get("tiny").detector).save(folder)
    return folder


@dataclass(frozen=True)
class Watched:
    """Measurements of a run of `nsnet score`, taken by another process."""

    samples: list[Sample]
    lines: list[str]
    driver_peak_bytes: int
    """Peak resident memory of the driver, sampled ten times per second from the plan to the record."""
    cpu_seconds: dict[str, tuple[float, float]]
    """Kind of process -> CPU seconds until the first scored image, and from then to the end."""


def score(arguments: Sequence[str], tree: Path = ROOT) -> Watched:
    """Run `nsnet score` of a checkout and measure it. Raises `RuntimeError` if it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.score", *arguments], cwd=tree, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    started = time.monotonic()
    memory_of_driver = PeakMemory(process.pid)
    memory_of_driver.__enter__()
    samples: list[Sample] = []
    lines: list[str] = []
    startup_seconds: dict[int, float] = {}
    cpu_seconds: dict[int, tuple[str, float]] = {}
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        print(line, end="", file=sys.stderr, flush=True)
        _, progress, counts = line.partition("score: scored ")  # after the time and the run
        if progress:
            prepared, captioned = (
                int(counts.partition(f"{name} ")[2].partition(",")[0]) for name in ("prepared", "captioned")
            )
            scored = int(counts.partition("/")[0])
            memory = psutil.Process(process.pid).memory_info().rss
            everything = own_memory(process.pid)
            samples.append(Sample(time.monotonic() - started, prepared, captioned, scored, memory, everything))
            for pid, (kind, seconds) in _cpu_seconds(process.pid).items():
                cpu_seconds[pid] = (
                    cpu_seconds[pid][0] if kind == KINDS["ray::"] and pid in cpu_seconds else kind,
                    seconds,
                )
            if scored == 0:
                startup_seconds = {pid: seconds for pid, (_, seconds) in cpu_seconds.items()}
    code = process.wait()
    memory_of_driver.__exit__()
    if code != 0:
        raise RuntimeError(f"nsnet score failed with exit code {code}: see its output")
    by_kind: dict[str, tuple[float, float]] = {}
    for pid, (kind, seconds) in cpu_seconds.items():
        before, after = by_kind.get(kind, (0.0, 0.0))
        startup = startup_seconds.get(pid, 0.0)
        by_kind[kind] = (before + startup, after + seconds - startup)
    return Watched(samples, lines, memory_of_driver.peak, by_kind)


KINDS: Final = {
    "MapBatches(Prepare": "reading and preparing",
    "zygote.py": "decoding children",
    "MapBatches(ModelActor": "model actors",
    "Write": "writing",
    "ray::": "idle workers and small actors of Ray",
    "raylet": "raylet",
    "gcs_server": "GCS",
    "jobs.score": "driver",
}
"""Part of a command line -> kind of process; the first match counts."""


def _cpu_seconds(pid: int) -> dict[int, tuple[str, float]]:
    """Process id -> kind and CPU seconds so far; a worker's name is that of its last task."""
    processes = {}
    driver = psutil.Process(pid)
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            line, times = " ".join(process.cmdline()), process.cpu_times()
            kind = next((kind for part, kind in KINDS.items() if part in line), "Ray's other processes")
            processes[process.pid] = (kind, times.user + times.system)
    return processes


def profile(watched: Watched) -> list[str]:
    """Return a table of the CPU seconds by kind of process."""
    last, first = watched.samples[-1], next(sample for sample in reversed(watched.samples) if sample.scored == 0)
    total = sum(after for _, after in watched.cpu_seconds.values())
    rows = sorted(watched.cpu_seconds.items(), key=lambda item: -item[1][1])
    return [
        "| process | CPU s until the first image | CPU s after that | ms per image | share |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {before:.0f} | {after:.0f} | {1000 * after / last.scored:.2f} | {after / total:.0%} |"
            for kind, (before, after) in rows
        ),
        f"| idle | | {(last.seconds - first.seconds) * (os.cpu_count() or 1) - total:.0f} | | |",
    ]


def at(samples: Sequence[Sample], scored: int) -> Sample:
    """Return the first sample with at least this many scored images."""
    return next(sample for sample in samples if sample.scored >= scored)


@dataclass(frozen=True)
class Tenths:
    """A run at its first scored image, after a tenth, before the last tenth, and at its end."""

    first: Sample
    early: Sample
    late: Sample
    end: Sample

    @staticmethod
    def of(samples: Sequence[Sample], count: int) -> "Tenths":
        """Those of a run of `count` images."""
        return Tenths(*(at(samples, scored) for scored in (1, count // 10, count - count // 10, count)))

    def images_per_s(self) -> tuple[float, float, float]:
        """Speed of the whole run, of its first tenth and of its last tenth; NaN if that took less than one line of
        progress.
        """
        whole, first, last = (
            (end.scored - start.scored) / (end.seconds - start.seconds) if end is not start else math.nan
            for start, end in ((self.first, self.end), (self.first, self.early), (self.late, self.end))
        )
        return whole, first, last


class PeakMemory:
    """Peak resident memory of a process (None: this one) during a block, sampled ten times per second."""

    def __init__(self, pid: int | None = None, *, with_children: bool = False) -> None:
        """`with_children`: also measure the unshared memory of the process and its descendants (`peak_of_all`).

        `peak_own` is the peak of the process's own unshared memory.
        """
        self._process = psutil.Process(pid)
        self._with_children = with_children
        self.peak_of_all = self.peak_own = 0

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._stop.wait(0.1):
                memory = self._process.memory_info()
                self.peak = max(self.peak, memory.rss)
                self.peak_own = max(self.peak_own, memory.rss - memory.shared)
                if self._with_children:
                    self.peak_of_all = max(self.peak_of_all, own_memory(self._process.pid))

    @property
    def text(self) -> str:
        """Format the peak, and the increase since the start of the block."""
        return f"{self.peak / 2**20:.0f} MiB, of which {(self.peak - self.before) / 2**20:.0f} MiB by this step"


def own_memory(pid: int) -> int:
    """Bytes of unshared memory of a process and its descendants."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--work", type=Path, required=True, help="Folder for images and output, on one disk (hard links)."
    )
    arguments.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="Folder for results.")
    return arguments


def write_result(folder: Path, name: str, text: Iterator[str] | Sequence[str]) -> Path:
    """Write `<name>_<hardware>_<yyyymmdd>.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{os.cpu_count()}cores_{datetime.now(UTC):%Y%m%d}.md"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [f"# {name}", "", f"{hardware()}. Commit {commit.strip()}, {datetime.now(UTC):%Y-%m-%d}.", "", *text]
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return path
