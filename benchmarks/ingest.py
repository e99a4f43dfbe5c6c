"""Measures the input side of training: one epoch over 144,000 images, the size of AIGIBench.

    python -m benchmarks.ingest --work /tmp/ingest

Draws a few thousand JPEGs of mixed sizes, links them 144,000 times, and reads one epoch of shuffled, augmented batches
for `tiny`, without training a network. This times fetching, decoding, augmenting, selecting patches, and the transfer
to the training process. For comparison, plain processes do the same work without Ray on images of the same sizes.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import measure
from jobs.cluster import resources
from jobs.dataset.schema import SPLIT
from jobs.dataset.source import Source
from jobs.pipeline.preparing import transform_seed
from jobs.training.examples import Examples
from jobs.training.ingest import Ingest
from jobs.training.order import Order, image_seed
from nsnet import recipes, transforms
from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
from nsnet.transforms import AugmentationConfig

BATCH = 64
AUGMENTATION = AugmentationConfig(jpeg_share=0.5, blur_share=0.1, resize_share=0.1, crop_share=0.5)
CONFIG = PreparationConfig(patches=(recipes.TINY.detector.patches,))


def split_of(source: Path) -> Examples:
    """Put all images of a source into the training split."""
    rows = [
        {**dict.fromkeys(SPLIT.names), **row, "label": i % 2, "split": "train", "group": i}
        for i, row in enumerate(Source(str(source)).rows())
    ]
    return Examples(table=pa.Table.from_pylist(rows, schema=SPLIT).sort_by("image_id"))


def plain(paths: list[str]) -> int:
    """Do the same work for some images in this process; returns their number."""
    for path in paths:
        seed = image_seed(0, 0, path)
        chain = transforms.to_text(transforms.draw(AUGMENTATION, seed))
        prepared = prepare(Path(path).read_bytes(), CONFIG, chain, transform_seed(path, seed))
        assemble_mosaics(prepared.patches, CONFIG, seed)
    return len(paths)


def plain_speed(images: list[Path], processes: int) -> float:
    """Images per second of plain processes."""
    chunks = [[str(path) for path in images[i::8]] for i in range(8)]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(plain, [chunk[:8] for chunk in chunks]))  # warm-up: imports
        started = time.monotonic()
        count = sum(pool.map(plain, chunks))
    return count / (time.monotonic() - started)


def mib(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:.0f}"


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=144_000)
    arguments.add_argument("--distinct", type=int, default=3_000)
    options = arguments.parse_args()
    images = measure.write_jpegs(options.work / "distinct", options.distinct)
    source = options.work / f"pictures-{options.count}"
    measure.link(images, source, options.count)
    cores = os.cpu_count() or 1
    before = plain_speed(images, cores)
    examples = split_of(source)
    resources.connect("local")
    order = Order(rows=np.arange(options.count), batch_size=BATCH, seed=0, rank=0, world_size=1)
    ingest = Ingest(
        examples=examples, preparation=CONFIG, source=str(source), seed=0, augmentation=AUGMENTATION,
        task_cpus=resources.cluster_shares().task_cpus, cpus=float(cores),
        memory_bytes=resources.streaming_bytes(),
    )  # fmt: skip
    started, driver = time.monotonic(), psutil.Process()
    marks: list[tuple[float, int, int, int]] = []
    count = failed = 0
    for step, arrival in enumerate(ingest.stream(order, 0, order.steps_per_epoch)):
        count, failed = count + int(arrival.valid.sum()), failed + len(arrival.failed)
        if step % 50 == 0 or count + failed == options.count:
            memory = driver.memory_info().rss
            marks.append((time.monotonic() - started, count, memory, measure.own_memory(driver.pid)))
            print(f"{count:,} images, {count / marks[-1][0]:.1f} images/s, {memory / 2**20:.0f} MiB", flush=True)
    after = plain_speed(images, cores)

    def at(share: float) -> tuple[float, int, int, int]:
        return next(mark for mark in marks if mark[1] >= share * count)

    def speed(a: float, b: float) -> float:
        first, last = at(a), at(b)
        return (last[1] - first[1]) / (last[0] - first[0])

    whole = speed(0.0, 1.0)
    measure.write_result(
        options.results,
        "ingest",
        [
            f"{options.count:,} hard links to {options.distinct:,} JPEGs, long sides {measure.SIDES_PX} px, batches of "
            f"{BATCH}, one training process. Augmentation: {AUGMENTATION}.",
            "",
            "| | |",
            "|---|---|",
            f"| images received, failed | {count:,}, {failed} |",
            f"| seconds until the first batch | {marks[0][0]:.0f} |",
            f"| images/s after that: whole epoch, first tenth, last tenth | {whole:.1f}, {speed(0.0, 0.1):.1f}, "
            f"{speed(0.9, 1.0):.1f} |",
            f"| images/s of {cores} plain processes, before and after | {before:.1f}, {after:.1f} |",
            f"| stream / plain | {2 * whole / (before + after):.2f} |",
            f"| MiB of the training process at a tenth, at the end | {mib(at(0.1)[2])}, {mib(marks[-1][2])} |",
            f"| unshared MiB of all processes, at a tenth, at the end | {mib(at(0.1)[3])}, {mib(marks[-1][3])} |",
        ],
    )


if __name__ == "__main__":
    main()
