"""Compares `nsnet score` with a plain pool of two processes that call the same functions (stream efficiency).

    python -m benchmarks.stream_efficiency --work /tmp/efficiency

The pool's processes fetch, hash, decode, caption and score half of the images each, in batches of 32, with one thread
and without Ray; their clocks start when the models are loaded. They also time each stage. From these times follows how
many seconds the pool would need for the preparing, captioning and scoring that the stream did between its first scored
image and its end. The efficiency without start-up is this number divided by the seconds of the stream. Pool and stream
run one after the other, for several rounds.
"""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import measure

BATCH: Final = 32
STAGES: Final = ("prepare", "caption", "score")


def pool_worker(
    paths: Sequence[str], bundle: str, ready: "multiprocessing.Queue[object]", go: object, done: object
) -> None:
    """Run one process of the plain pool; puts its seconds per stage into `done`."""
    import numpy as np
    import torch

    from nsnet.captioner import Captioner
    from nsnet.detector import Detector
    from nsnet.patches import SCORING_SEED
    from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare

    torch.set_num_threads(1)
    detector = Detector.load(bundle, captioner=False)
    captioner = Captioner.load(detector.config.captioner)
    config = PreparationConfig(thumbnail_px=captioner.thumbnail_px, patches=(detector.config.patches,))
    blank = np.zeros((BATCH, captioner.thumbnail_px, captioner.thumbnail_px, 3), np.uint8)
    captioner.caption(blank)
    ready.put(os.getpid())
    go.wait()  # type: ignore[attr-defined]
    spent = dict.fromkeys(STAGES, 0.0)
    for start in range(0, len(paths), BATCH):
        clock = time.perf_counter()
        prepared = []
        for path in paths[start : start + BATCH]:
            data = Path(path).read_bytes()
            hashlib.sha256(data).hexdigest()
            prepared.append(prepare(data, config))
        mosaics = np.stack([assemble_mosaics(image.patches, config, SCORING_SEED)[0] for image in prepared])
        thumbnails = np.stack([image.thumbnail for image in prepared])
        spent["prepare"] -= clock - (clock := time.perf_counter())
        captions = captioner.caption(thumbnails)
        spent["caption"] -= clock - (clock := time.perf_counter())
        detector.score(mosaics, [caption or "" for caption in captions])
        spent["score"] -= clock - time.perf_counter()
    done.put(spent)  # type: ignore[attr-defined]


def pool(paths: Sequence[str], bundle: Path) -> tuple[float, dict[str, float]]:
    """Run the pool; returns its seconds for all images, and the seconds per image of each stage."""
    context = multiprocessing.get_context("spawn")
    ready, done, go = context.Queue(), context.Queue(), context.Event()
    workers = [
        context.Process(target=pool_worker, args=(paths[half::2], str(bundle), ready, go, done)) for half in range(2)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.get()
    started = time.perf_counter()
    go.set()
    spent = [done.get() for _ in workers]
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return seconds, {stage: sum(times[stage] for times in spent) / len(paths) for stage in STAGES}


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--distinct", type=int, default=2_000)
    arguments.add_argument("--rounds", type=int, default=2)
    options = arguments.parse_args()
    work: Path = options.work
    source = work / f"pictures-{options.count}"
    measure.link(measure.write_jpegs(work / "distinct", options.distinct), source, options.count)
    bundle = measure.tiny_bundle(work / "bundle")
    paths = sorted(str(path) for path in source.rglob("*.jpg"))
    rows = []
    for number in range(options.rounds):
        pool_seconds, stage = pool(paths, bundle)
        out = work / f"out-{os.getpid()}-{number}"
        watched = measure.score([str(source), "--detector", str(bundle), "--out", str(out), "--no-reuse"])
        first, end = measure.at(watched.samples, 1), measure.at(watched.samples, options.count)
        remaining = {
            "prepare": options.count - first.prepared,
            "caption": options.count - first.captioned,
            "score": options.count - first.scored,
        }
        work_seconds = sum(remaining[name] * stage[name] for name in STAGES) / 2.0  # two processes
        stream_seconds = end.seconds - first.seconds
        whole = (options.count / end.seconds) / (options.count / pool_seconds)
        rows.append((pool_seconds, stage, first, end, work_seconds / stream_seconds, whole))
    measure.write_result(
        options.results,
        "stream_efficiency",
        [
            f"{options.count:,} JPEGs ({options.distinct:,} distinct, long sides {measure.SIDES_PX} px), `tiny`, "
            "nothing reused; a plain pool of two processes before each stream.",
            "",
            "| round | pool, images/s | ms per image: prepare, caption, score | stream: first image at, end at |"
            " efficiency without start-up | with start-up |",
            "|---|---|---|---|---|---|",
            *(
                f"| {i} | {options.count / seconds:.1f} | "
                f"{', '.join(f'{1000 * stage[name]:.2f}' for name in STAGES)} | "
                f"{first.seconds:.0f} s, {end.seconds:.0f} s | {efficiency:.2f} | {whole:.2f} |"
                for i, (seconds, stage, first, end, efficiency, whole) in enumerate(rows)
            ),
            "",
            "CPU seconds of the last stream, including start-up:",
            "",
            *measure.profile(watched),
        ],
    )


if __name__ == "__main__":
    main()
