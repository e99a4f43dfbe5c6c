"""Scores 144,000 images, the size of AIGIBench, with `tiny` through the whole pipeline on one machine.

    python -m benchmarks.aigibench_size --work /tmp/aigibench

Draws a few thousand JPEGs of mixed sizes, links them 144,000 times, and scores them without reusing verdicts for equal
bytes, so that each is fetched, decoded, captioned and scored. Reports whether all rows were published, how much the
driver's memory grew between a tenth of the run and its end, and the speed of the last tenth relative to the first.
"""

from pathlib import Path

from benchmarks import measure
from jobs.runs import catalog


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=144_000)
    arguments.add_argument("--distinct", type=int, default=3_000)
    options = arguments.parse_args()
    work: Path = options.work
    source, out = work / f"pictures-{options.count}", work / "out"
    measure.link(measure.write_jpegs(work / "distinct", options.distinct), source, options.count)
    bundle = measure.tiny_bundle(work / "bundle")
    watched = measure.score([str(source), "--detector", str(bundle), "--out", str(out), "--no-reuse", "--rescore"])
    record = catalog.runs(str(out))[-1]
    run = measure.Tenths.of(watched.samples, record["rows"])
    early, end = run.early, run.end
    speed_all, speed_first, speed_last = run.images_per_s()
    measure.write_result(
        options.results,
        "aigibench_size",
        [
            f"{options.count:,} hard links to {options.distinct:,} JPEGs, long sides {measure.SIDES_PX} px, `tiny`, "
            "nothing reused.",
            "",
            "| | |",
            "|---|---|",
            f"| rows published | {record['rows']:,}, failed {record['counts']['status'].get('failed', 0)} |",
            f"| seconds in total, until the first image | {record['seconds']:.0f}, {run.first.seconds:.0f} |",
            f"| images/s: whole run, first tenth, last tenth | {speed_all:.1f}, {speed_first:.1f}, {speed_last:.1f} |",
            f"| last tenth / first tenth | {speed_last / speed_first:.3f} |",
            f"| driver at {early.scored:,} images | {early.driver_bytes / 2**20:.0f} MiB |",
            f"| driver at the end | {end.driver_bytes / 2**20:.0f} MiB |",
            f"| driver's peak, including plan and publication | {watched.driver_peak_bytes / 2**20:.0f} MiB |",
            f"| driver's memory: end / a tenth | {end.driver_bytes / early.driver_bytes:.3f} |",
            "",
            *measure.profile(watched),
            "",
            "```",
            *watched.lines[-8:-2],  # the last two name folders of this machine
            "```",
        ],
    )


if __name__ == "__main__":
    main()
