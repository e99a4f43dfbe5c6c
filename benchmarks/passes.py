"""Images per second of `nsnet score` with several detectors, or several views, in one pass; beside an older release.

    python -m benchmarks.passes --work DIR [--before CHECKOUT] [--count N] [--rounds R]

Cases run in turn, so that a slow hour meets all of them. A rate counts from the first verdict to the end: start-up is
left out. CHECKOUT is the folder of an older release, whose rate is 1 in the result; without it, one detector of this
release is.
"""

import os
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import measure

DETECTORS = 3
VIEWS = 3


def bundles(folder: Path) -> list[Path]:
    """Three detectors of the recipe `tiny`: two with the same patches, and one with finer ones."""
    from nsnet import recipes
    from nsnet.detector import Detector
    from nsnet.patches import PatchConfig

    config = recipes.TINY.detector
    configs = [config, config, replace(config, patches=PatchConfig(patch_px=16))]
    for seed, config in enumerate(configs):
        if not (folder / str(seed)).exists():
            Detector.build(config, seed=seed).save(folder / str(seed))
    return [folder / str(seed) for seed in range(DETECTORS)]


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--before", type=Path, help="checkout of an older release")
    arguments.add_argument("--count", type=int, default=3_000)
    arguments.add_argument("--distinct", type=int, default=1_000)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    work: Path = options.work
    source = work / f"pictures-{options.count}"
    measure.link(measure.write_jpegs(work / "distinct", options.distinct), source, options.count)
    one, *others = (["--detector", str(bundle)] for bundle in bundles(work / "three"))
    cases: dict[str, tuple[Path, list[str]]] = {
        "one detector": (measure.ROOT, one),
        f"one detector, {VIEWS} views": (measure.ROOT, [*one, "--views", str(VIEWS)]),
        f"{DETECTORS} detectors": (measure.ROOT, [*one, *(part for other in others for part in other)]),
    }
    if options.before:
        cases = {"older release, one detector": (options.before.resolve(), one)} | cases
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.rounds):
        for name, (tree, given) in cases.items():
            out = work / f"out-{os.getpid()}-{number}-{len(rates[name])}-{list(cases).index(name)}"
            watched = measure.score([str(source), *given, "--out", str(out), "--no-reuse"], tree)
            first, end = measure.at(watched.samples, 1), measure.at(watched.samples, options.count)
            rates[name].append((options.count - first.scored) / (end.seconds - first.seconds))
    first_name = next(iter(cases))
    lines = [
        f"{options.count:,} JPEGs ({options.distinct:,} distinct, long sides {measure.SIDES_PX} px), `tiny`, nothing "
        f"reused, {options.rounds} rounds in turn. Start-up is left out. Ratio: to the first row, in the same round.",
        "",
        "| case | images/s, median (all rounds) | ratio, median (lowest to highest) |",
        "|---|---|---|",
    ]
    for name, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, rates[first_name], strict=True)]
        every = ", ".join(f"{rate:.1f}" for rate in found)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {median(found):.1f} ({every}) | {median(ratios):.2f} ({spread}) |")
    measure.write_result(options.results, "passes", lines)


if __name__ == "__main__":
    main()
