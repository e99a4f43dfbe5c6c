"""Many cases of a kind, in two drivers that are watched: what they came to, and which failed."""

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
SEEDS: Final[dict[str, dict[str, str]]] = json.loads(Path(__file__).with_name("seeds.json").read_text())
"""Kind -> seed -> why it is kept."""
DRIVERS: Final = 2
MIN_CASES: Final = 120
"""Of a second driver: for fewer it takes longer to start than to help."""
MAX_WAIT_SECONDS: Final = 150.0
"""By the wall clock, for one case: over the longest wait of a guard."""
START_SECONDS: Final = 300.0
SLOW_SECONDS: Final = 10.0
NOTABLE: Final = ("DecoderCrashError", "ImageTimeoutError", "endless", "too large")
"""Outcomes that are allowed, and named with their seeds."""

ENDED: Final = {"outcome": "driver ended", "grown": 0, "peak": 0, "seconds": 0.0}


@dataclass
class Summary:
    """What the cases of a kind came to."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    """kind:seed -> what happened that may not."""
    notable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    grown: int = 0
    """Most memory that a case took of its driver, in bytes."""
    peak: int = 0
    """Most memory that a driver had, in bytes."""

    def __str__(self) -> str:
        found = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        return (
            f"{self.kind}: {sum(self.outcomes.values())} cases in {self.seconds:.0f} s, {len(self.failures)} failures; "
            f"driver at most +{self.grown / 2**20:.0f} MiB for a case, {self.peak / 2**20:.0f} MiB in all; {found}"
        )


def kept(kind: str) -> list[int]:
    """Seeds of what failed once."""
    return [int(seed) for seed in SEEDS.get(kind, {})]


def run(
    kind: str, seeds: Sequence[int], folder: Path, say: Callable[[str], None] = lambda line: None, keep: bool = False
) -> Summary:
    """Run these cases; the inputs of those that fail stay in the folder (`keep`: of all)."""
    summary, lock, begun = Summary(kind), threading.Lock(), time.monotonic()

    def note(seed: int | None, answer: dict[str, Any], case: Path) -> None:
        with lock:
            _note(summary, seed, answer, case)
            done = sum(summary.outcomes.values())
            if seed is not None and done % 100 == 0:
                say(f"{kind}: {done} of {len(seeds)}, {len(summary.failures)} failures")
        if seed is not None and not keep and not answer["failure"]:
            shutil.rmtree(case)

    threads = []
    drivers = DRIVERS if len(seeds) >= MIN_CASES else 1
    for number in range(drivers):
        own = folder / f"{kind}-{number}"
        own.mkdir(parents=True)
        threads.append(threading.Thread(target=_drive, args=(kind, seeds[number::drivers], own, note)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary.seconds = time.monotonic() - begun
    return summary


def _note(summary: Summary, seed: int | None, answer: dict[str, Any], case: Path) -> None:
    if seed is None:  # a driver's last words
        if answer["left"]:
            summary.failures[f"{summary.kind}, at the end"] = f"left behind: {answer['left']}"
        return
    name = f"{summary.kind}:{seed}"
    outcome = answer["outcome"]
    summary.outcomes[outcome.partition(":")[0] if outcome.startswith("DecoderCrash") else outcome] += 1
    summary.grown, summary.peak = max(summary.grown, answer["grown"]), max(summary.peak, answer["peak"])
    if answer["failure"]:
        summary.failures[name] = f"{answer['failure']}\nthe input is in {case}; again: python -m tests.fuzz {name}"
    if answer["seconds"] > SLOW_SECONDS or any(word in outcome for word in NOTABLE):
        summary.notable.append(f"{name}: {outcome}, {answer['seconds']:.1f} s")


def _drive(kind: str, seeds: Sequence[int], folder: Path, note: Callable[..., None]) -> None:
    """Run cases in a driver, and in another one where it ends."""
    left = list(seeds)
    while left:
        with _start(kind, folder) as driver:
            answer: dict[str, Any] | None = {}
            while left and answer is not None:
                seed = left.pop(0)
                answer = _ask(driver, f"{seed}\n")
                note(seed, answer or ENDED | {"failure": _end(driver)}, folder / str(seed))
            if answer is not None:
                note(None, _ask(driver, None) or {"left": "a driver that does not end"}, folder)
            driver.kill()


def _end(driver: "subprocess.Popen[str]") -> str:
    """End a driver that gave no answer; says why there was none."""
    try:
        code = driver.wait(10.0)  # its pipes are closed a moment earlier
    except subprocess.TimeoutExpired:
        driver.kill()
        return "the driver ended: it took too long"
    return f"the driver ended: exit code {code}"


def _start(kind: str, folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.driver", kind, str(folder)], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip


def _ask(driver: "subprocess.Popen[str]", line: str | None) -> dict[str, Any] | None:
    """The driver's answer to a line, or to the end of its input; None: it ended, or takes too long."""
    assert driver.stdin is not None and driver.stdout is not None
    try:
        if line is None:
            driver.stdin.close()
        else:
            driver.stdin.write(line)
            driver.stdin.flush()
    except BrokenPipeError:
        return None
    if not select.select([driver.stdout], [], [], MAX_WAIT_SECONDS)[0]:
        return None
    answer = driver.stdout.readline()
    return json.loads(answer) if answer else None
