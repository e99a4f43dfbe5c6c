"""Progress of a pipeline: stages add counts to a board, and the driver prints one line."""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.console.output import is_terminal, redraw, say
from jobs.pipeline.bottleneck import statement
from jobs.pipeline.metrics import Snapshot, StreamMetrics
from jobs.pipeline.poison import Budget
from jobs.telemetry.series import Key

REFRESH_SECONDS: Final = 1.0
LINE_SECONDS: Final = 5.0
"""Interval of progress lines if the output is a file, where a line cannot be redrawn. The first result has a line."""
HOLDER_SECONDS: Final = 60.0
"""Seconds after the first result at which the stage that holds the run is named first; again at the end."""


@ray.remote(num_cpus=0, max_restarts=-1)
class Board:
    """An actor with counts per stage, for display only: a block that is retried counts twice here, not in results."""

    def __init__(self, cpus: float = 1.0, max_seconds: float = 0.0) -> None:
        """`cpus` of the cluster and `max_seconds` per image set the run's `Budget`."""
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()
        self.images: Counter[tuple[str, str]] = Counter()
        self.added: Counter[Key] = Counter()
        self.put: dict[Key, float] = {}
        self.lines: list[str] = []
        self._budget = Budget(cpus, max_seconds)

    def add(self, counts: dict[str, int], images: dict[tuple[str, str], int] | None = None) -> None:
        """Add to the counts, and to the images by stage and error class (`metrics.Snapshot`)."""
        self.counts.update(counts)
        self.images.update(images or {})

    def measure(self, added: dict[Key, float], put: dict[Key, float]) -> None:
        """Add to counters, and set gauges (`metrics.Snapshot`)."""
        self.added.update(added)
        self.put.update(put)

    def spend(self, seconds: dict[str, float], images: int = 0) -> None:
        """Add seconds by stage (`bottleneck`), and the images that they were spent on."""
        self.seconds.update(seconds)
        self.measured.update(dict.fromkeys(seconds, images))

    def spent(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds by stage so far, and the images that they were spent on."""
        return dict(self.seconds), dict(self.measured)

    def lease(self, seconds: float) -> float | None:
        """As `Budget.lease`."""
        return self._budget.lease(seconds)

    def settle(self, leased: float, good: float, slow: float) -> None:
        """As `Budget.settle`."""
        self._budget.settle(leased, good, slow)

    def log(self, line: str) -> None:
        """Add a line for the console."""
        self.lines.append(line)

    def snapshot(self) -> Snapshot:
        """Counts so far, and the lines since the last call."""
        lines, self.lines = self.lines, []
        return Snapshot(
            dict(self.counts), dict(self.seconds), dict(self.images), lines, dict(self.added), dict(self.put),
            dict(self.measured),
        )  # fmt: skip


def start_board(name: str, *budget: float) -> Any:
    """Start a board that workers find by name; it lives as long as its handle. `budget`: arguments of `Board`.

    It runs on the driver's node if possible: another node may be lost in the middle of a run, and the counts with it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return cast(Any, Board).options(name=name, scheduling_strategy=here).remote(*budget)


@contextmanager
def watch(board: Any, title: str, total: int, stages: Sequence[str]) -> Iterator[None]:
    """Print and export the board's counts while the body runs: the last stage as a share of the total, then the other
    stages.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_print_loop, args=(board, title, total, stages, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _print_loop(board: Any, title: str, total: int, stages: Sequence[str], stop: threading.Event) -> None:
    terminal, metrics = is_terminal(), StreamMetrics(title, total, stages)
    started = time.monotonic()
    next_line, name_holder = started + LINE_SECONDS, math.inf
    has_results = False
    while True:
        ended = stop.wait(REFRESH_SECONDS)
        try:
            snapshot = ray.get(board.snapshot.remote(), timeout=5)
        except ray.exceptions.RayError:
            if ended:
                return
            continue
        metrics.report(snapshot)
        counts, lines, now = snapshot.counts, snapshot.lines, time.monotonic()
        had_results, has_results = has_results, counts.get(stages[-1], 0) > 0
        if has_results > had_results:
            name_holder = now + HOLDER_SECONDS
        if (ended or now >= name_holder) and (holder := statement(snapshot.seconds, snapshot.measured)):
            name_holder = math.inf
            lines.append(f"{title}: {holder}")
        if terminal and lines:
            redraw("")
        for line in lines:
            say(line)
        if total and (terminal or ended or now >= next_line or has_results > had_results):
            next_line = now + LINE_SECONDS
            text = _line(title, counts, total, stages, now - started)
            if terminal:
                redraw(text, last=ended)
            else:
                say(text, **_numbers(counts, total, stages, now - started))
        if ended:
            return


def _numbers(counts: dict[str, int], total: int, stages: Sequence[str], seconds: float) -> dict[str, Any]:
    """The numbers of the progress line."""
    done = min(total, counts.get(stages[-1], 0))
    before = {name: min(total, counts.get(name, 0)) for name in stages[:-1]}
    failed = counts.get("failed", 0)
    return {**before, "done": done, "planned": total, "failed": failed, "images_per_s": round(done / seconds, 1)}


def _line(title: str, counts: dict[str, int], total: int, stages: Sequence[str], seconds: float) -> str:
    done = min(total, counts.get(stages[-1], 0))
    parts = [f"{stage} {min(total, counts.get(stage, 0))}" for stage in stages[:-1]]
    parts.append(f"failed {counts.get('failed', 0)}")
    return (
        f"{title}: {stages[-1]} {done}/{total} ({done / total:.0%}), {', '.join(parts)}, {done / seconds:.1f} images/s"
    )
