"""Run the demo: draw a labelled bucket, then train, score and evaluate on it."""

import sys
import time
from pathlib import Path
from typing import Any, Final

from jobs.cluster.address import check_address
from jobs.console import output
from jobs.console.output import say
from jobs.dataset.synthetic import write_bucket
from jobs.experiments.request import TrainRequest
from jobs.storage.uris import Uri
from jobs.workflows.evaluate import evaluate
from jobs.workflows.score import score
from nsnet.bundle import DESCRIPTION
from nsnet.errors import UsageError

TRAINING_SCENES: Final = range(0, 300)
VALIDATION_SCENES: Final = range(300, 380)
HELD_OUT_SCENES: Final = range(1000, 1150)
"""The three ranges are disjoint, so that the real and the fake image of a scene are always in the same part."""


def demo(out: Path, *, seed: int = 0, workers: int = 2, address: str | None = None) -> dict[str, Any]:
    """Run the demo; returns the evaluation."""
    started = time.monotonic()
    out = out.absolute()
    if (out / "detector" / DESCRIPTION).exists():
        raise UsageError(f"{out} already holds a finished demo; choose another --out or remove it")
    check_address(address)
    from jobs.experiments.job import train  # it imports torch, which takes seconds

    parts = {"training/train": TRAINING_SCENES, "training/val": VALIDATION_SCENES, "held_out": HELD_OUT_SCENES}
    for name, scenes in parts.items():
        count = write_bucket(out / "pictures" / name, scenes, seed=seed, progress=_progress(name, len(scenes)))
        say(f"images: {count} in {out / 'pictures' / name}")
    train(
        TrainRequest(
            source=Uri(str(out / "pictures" / "training")), out=Uri(str(out / "detector")),
            workers=(workers, workers), seed=seed, address=address,
        )
    )  # fmt: skip
    verdicts = Uri(str(out / "scored"))
    score(Uri(str(out / "pictures" / "held_out")), detector=Uri(str(out / "detector")), out=verdicts, address=address)
    result = evaluate(verdicts, out=Uri(str(out / "evaluation")))
    say(
        f"done in {time.monotonic() - started:.0f} s\n"
        f"detector: {out / 'detector'}\nverdicts: {out / 'scored' / 'verdicts'}\n"
        f"table:    {out / 'evaluation' / 'evaluation.json'}"
    )
    return result


def _progress(name: str, total: int) -> Any:
    """A callback that redraws a progress line on a terminal; None if stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda done: output.redraw(f"images: {name}, scene {done}/{total}", last=done == total)
