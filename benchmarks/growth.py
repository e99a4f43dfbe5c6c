"""Scores 14,000, 140,000 and 1,400,000 images: does a larger run become slower, or take more memory?

    python -m benchmarks.growth --work /tmp/growth

The images are hard links to 1,000 small JPEGs. Equal bytes are captioned and scored once, so what remains is what each
image costs the run itself: listing, planning, fetching, decoding, blocks, rows, publishing. Memory is that of the
driver, and that which no other process shares of all processes together.
"""

import shutil
from pathlib import Path
from typing import Final

from benchmarks import measure
from jobs.runs import catalog

DISTINCT: Final = 1_000
SIDE_PX: Final = 48


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, nargs="+", default=[14_000, 140_000, 1_400_000])
    options = arguments.parse_args()
    work: Path = options.work
    bundle = measure.tiny_bundle(work / "bundle")
    images = measure.write_jpegs(work / f"distinct-{SIDE_PX}", DISTINCT, sides_px=(SIDE_PX,))
    lines = [
        "| images | seconds until the first verdict, in total | images/s: whole stream, first tenth, last tenth |"
        " driver after a tenth, at the end, peak | all processes after a tenth, at the end |",
        "|---|---|---|---|---|",
    ]
    for count in options.count:
        source, out = work / f"growth-{count}", work / "out"
        measure.link(images, source, count)
        shutil.rmtree(out, ignore_errors=True)
        watched = measure.score([str(source), "--detector", str(bundle), "--out", str(out)])
        record = catalog.runs(str(out))[-1]
        if record["counts"]["status"] != {"scored": count}:
            raise RuntimeError(f"{record['counts']['status']} of {count:,} images")
        run = measure.Tenths.of(watched.samples, count)
        driver = (run.early.driver_bytes, run.end.driver_bytes, watched.driver_peak_bytes)
        lines.append(
            f"| {count:,} | {run.first.seconds:.0f}, {record['seconds']:.0f} | "
            f"{', '.join(f'{speed:.0f}' for speed in run.images_per_s())} | "
            f"{', '.join(f'{size / 2**20:.0f}' for size in driver)} MiB | "
            f"{run.early.all_bytes / 2**20:.0f}, {run.end.all_bytes / 2**20:.0f} MiB |"
        )
        print(lines[-1], flush=True)
    profile = measure.profile(watched)
    measure.write_result(
        options.results,
        "growth",
        [
            f"Hard links to {DISTINCT:,} JPEGs of {SIDE_PX} px, `tiny`.",
            "",
            *lines,
            "",
            "CPU seconds of the last run:",
            "",
            *profile,
        ],
    )


if __name__ == "__main__":
    main()
