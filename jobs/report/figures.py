"""Choose the plots of an evaluation's page, with their headings, captions and notes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from jobs.evaluation.comparison import baseline, step
from jobs.evaluation.curves import MIN_FPR
from jobs.report import plots
from jobs.report.plots import NAME_WIDTH, SMALL_WIDTH, Number, shown
from jobs.report.wording import per_cent
from nsnet.transforms import KINDS

Figure = dict[str, Any]
"""Keys: `svg`, `heading`, `caption`, `note`."""

MAX_THIN_LINES: Final = 30
DESCRIBED: Final = 10
"""Maximum number of rows of a plot that its description names."""
HEADINGS: Final = {
    "jpeg": "JPEG", "blur": "Blur", "resize": "Resizing", "noise": "Noise", "crop": "Cropping",
    "screenshot": "Screenshots", "centre": "Central parts",
}  # fmt: skip


def _figure(svg: str, heading: str, caption: str = "", note: str = "") -> Figure:
    return {"svg": Markup(svg), "heading": heading, "caption": caption, "note": note}


def number_text(number: Number) -> str:
    """A metric as text in per cent."""
    return "undefined" if number["value"] is None else f"{per_cent(number['value'])} %"


def _describe_rows(rows: Iterable[tuple[str, Number]]) -> str:
    return (
        "; ".join(f"{shown(name, NAME_WIDTH)} {number_text(number)}" for name, number in list(rows)[:DESCRIBED]) + "."
    )


def of_generators(result: Mapping[str, Any]) -> list[Figure]:
    """Accuracy and AP of each generator, the worst first."""
    figures = []
    for metric, heading in (("acc", "Accuracy at its threshold"), ("ap", "Average precision")):
        rows = [(name, numbers[metric]) for name, numbers in result["generators"].items()]
        rows.sort(key=lambda row: (row[1]["value"] is None, row[1]["value"] or 0.0, row[0]))
        svg = plots.forest(
            metric, rows, result["macro_mean"][metric]["value"], f"{heading} of each generator",
            f"Worst first: {_describe_rows(rows)}",
        )  # fmt: skip
        left_out = len(rows) - plots.MAX_ROWS
        note = f"{left_out} more generators, all better, are only in the table." if left_out > 0 else ""
        caption = "Dots with 95 % intervals; the dotted line is the mean over generators."
        figures.append(_figure(svg, heading, caption, note))
    return figures


def of_all(result: Mapping[str, Any]) -> list[Figure]:
    """The defined curves of all images together."""
    curves = result["curves"]
    return [
        *([_roc(result)] if curves["roc"] else []),
        *([_reliability(result), _histogram(curves)] if curves["reliability"]["probability"] else []),
        *([_precision(result)] if curves["precision"] else []),
    ]


def _roc(result: Mapping[str, Any]) -> Figure:
    curve, counts = result["curves"]["roc"], result["all"]
    points = {0.01: counts["tpr_at_fpr_1"], 0.001: counts["tpr_at_fpr_01"]}
    rates = ", ".join(f"{number_text(number)} at {per_cent(fpr)} %" for fpr, number in points.items())
    svg = plots.roc(curve, points, "ROC curve", f"True positive rate: {rates} false positive rate.")
    reals = curve["reals"]
    return _figure(
        svg,
        f"ROC: AUROC {number_text(counts['auroc'])}",
        "Fakes found, against reals called fake. Dots: 1 % and 0.1 %. Dotted line: guessing.",
        f"Hatched: rates below one in {reals:,} reals cannot be measured." if reals < 1.0 / MIN_FPR else "",
    )


def _reliability(result: Mapping[str, Any]) -> Figure:
    heading = f"Reliability: ECE {number_text(result['all']['ece'])}"
    bins = result["curves"]["reliability"]
    points = zip(bins["probability"], bins["fakes"], strict=True)
    shares = ", ".join(f"{per_cent(fakes)} % fakes at {probability:.2f}" for probability, fakes in points)
    return _figure(
        plots.reliability(bins, "Reliability diagram", f"{shares}."),
        heading,
        "Share of fakes among images of similar probability. On the dotted line, probabilities are calibrated.",
        "The diagram depends on the share of fakes among these images.",
    )


def _histogram(curves: Mapping[str, Any]) -> Figure:
    marks = []
    if curves["threshold"] is not None:
        marks.append(f"dashed: the threshold {curves['threshold']:.3g}")
    if curves["uncertain"]:
        low, high = curves["uncertain"]
        marks.append(f"grey: uncertain, {low:.2f} to {high:.2f}")
    note = "; ".join(marks)
    description = f"Shares of fakes upwards and of reals downwards, in 40 bins of the probability. {note}"
    return _figure(
        plots.histogram(curves, "Histogram of the probabilities", description),
        "Probabilities",
        "Fakes upwards, reals downwards, each as a share of its class.",
        note[:1].upper() + note[1:] + "." if note else "",
    )


def _precision(result: Mapping[str, Any]) -> Figure:
    curve, counts = result["curves"]["precision"], result["all"]
    values = ", ".join(f"{number_text(counts[f'precision_at_{rate}'])} at {rate} % fakes" for rate in (1, 10))
    return _figure(
        plots.precision(curve, "Precision against base rate", f"Share of alarms that are right: {values}."),
        "What an alarm is worth",
        "Share of alarms that are right, against the share of fakes. Dotted line: 1 % fakes.",
        f"Solid: {100 * curve['fpr']:.2f} % of reals called fake, as measured. Dashed: "
        f"{100 * curve['fpr_upper']:.2f} %, the 95 % upper bound with this number of reals.",
    )


def of_alignment(both: Mapping[str, Any]) -> list[Figure]:
    """Accuracy and AP of each generator raw and aligned, the largest loss first."""
    figures = []
    for metric, heading in (("acc", "Accuracy"), ("ap", "Average precision")):
        changes = both["difference"]["generators"]
        names = sorted(changes, key=lambda name: (changes[name][metric]["value"] is None,
                                                  changes[name][metric]["value"] or 0.0, name))  # fmt: skip
        rows = [
            (name, both["raw"]["generators"][name][metric], both["aligned"]["generators"][name][metric])
            for name in names
        ]
        described = "; ".join(
            f"{shown(name, NAME_WIDTH)} {number_text(raw)} raw, {number_text(aligned)} aligned"
            for name, raw, aligned in rows[:DESCRIBED]
        )
        svg = plots.pairs(f"aligned-{metric}", rows, f"{heading} raw and aligned", f"Largest loss first: {described}.")
        caption = "Circles: raw. Dots: aligned. The largest loss comes first."
        left_out = len(rows) - plots.MAX_ROWS
        note = f"{left_out} more generators are only in the table." if left_out > 0 else ""
        figures.append(_figure(svg, heading, caption, note))
    return figures


def of_robustness(result: Mapping[str, Any]) -> list[Figure]:
    """A plot for each kind of transform with several levels, and one for all other chains."""
    kinds: dict[str, list[str]] = {}
    for chain in result["robustness"]:
        if parsed := step(chain):
            kinds.setdefault(parsed[0], []).append(chain)
    several = {kind: chains for kind, chains in kinds.items() if len(chains) > 1}
    lowest = _lowest([baseline(result), *result["robustness"].values()])
    figures = [_levels(kind, chains, result, lowest) for kind, chains in several.items()]
    drawn = {chain for chains in several.values() for chain in chains}
    means = {chain: part["macro_mean"]["ap"] for chain, part in result["robustness"].items() if chain not in drawn}
    if means:
        plain = baseline(result)["macro_mean"]["ap"]
        rows = [("none", plain), *means.items()]
        svg = plots.forest(
            "others", rows, plain["value"], "AP under other transforms", _describe_rows(rows), SMALL_WIDTH
        )  # fmt: skip
        caption = "AP, mean over generators, with 95 % intervals; the dotted line is the untransformed level."
        figures.append(_figure(svg, "Other transforms" if figures else "Transforms", caption))
    return figures


def _lowest(parts: Sequence[Mapping[str, Any]]) -> float:
    """Lower end of the axis: a round number below all drawn values, the same for all plots to make them comparable."""
    drawn = [part["macro_mean"][metric]["low"] for part in parts for metric in ("ap", "acc")]
    drawn += [numbers["ap"]["value"] for part in parts for numbers in part["generators"].values()]
    return max(0.0, min([int(10 * value - 0.1) / 10 for value in drawn if value is not None], default=0.0))


def _levels(kind: str, chains: Sequence[str], result: Mapping[str, Any], lowest: float) -> Figure:
    """Plot of the levels of a kind; the untransformed images come first, or for resizing at the factor 1."""
    place = sum(float(chain.partition(":")[2]) < 1 for chain in chains) if kind == "resize" else 0
    parts = [(chain.partition(":")[2], result["robustness"][chain]) for chain in chains]
    parts.insert(place, ("none", baseline(result)))
    lines = {metric: [part["macro_mean"][metric] for _, part in parts] for metric in ("ap", "acc")}
    generators = result["generators"] if 1 < len(result["generators"]) <= MAX_THIN_LINES else {}
    thin = [[_ap(part, name) for _, part in parts] for name in generators]
    names = [name for name, _ in parts]
    values = "; ".join(f"{name} {number_text(number)}" for name, number in zip(names, lines["ap"], strict=True))
    svg = plots.levels(
        f"level-{kind}", names, lines, thin, place, lowest, KINDS[kind].meaning, f"Robustness against {kind}",
        f"AP: {values}.",
    )  # fmt: skip
    return _figure(svg, HEADINGS.get(kind, kind))


def _ap(part: Mapping[str, Any], generator: str) -> float | None:
    numbers = part["generators"].get(generator)  # None if none of its images was judged under the transform
    value: float | None = numbers["ap"]["value"] if numbers else None
    return value
