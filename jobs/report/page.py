"""Render an evaluation as one self-contained HTML file for browsers, phones and printers.

The page makes no requests and runs no scripts; its content security policy forbids both. Text from data, such as
generator names, is cut to one short line (`plots.shown`) and escaped.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from jobs.evaluation import views
from jobs.evaluation.comparison import baseline
from jobs.report import figures
from jobs.report.plots import NAME_WIDTH, Number, shown
from jobs.report.text import worst_first
from jobs.report.wording import ALARMS, CLAIMS, alarms, explanations, parting, per_cent, points

TEMPLATE: Final = "page.html.jinja"
MAX_TEXT_LETTERS: Final = 60
"""Maximum columns of a name in the page."""
MAX_SOURCE_LETTERS: Final = 200

TILES: Final = {
    "ap": "Average precision", "acc": "Accuracy at its threshold", "auroc": "AUROC",
    "tpr_at_fpr_1": "Fakes found at 1 % false alarms", "precision_at_1": "Right alarms at 1 % fakes",
}  # fmt: skip
COLUMNS: Final = {
    "acc": "Accuracy", "real_acc": "Reals right", "fake_acc": "Fakes right", "ap": "AP", "auroc": "AUROC",
    "tpr_at_fpr_1": "TPR at 1 % FPR", "precision_at_1": "Precision at 1 % fakes",
}  # fmt: skip
MORE_COLUMNS: Final = {
    "tpr_at_fpr_01": "TPR at 0.1 % FPR", "precision_at_10": "Precision at 10 % fakes",
    "precision_at_01": "Precision at 0.1 % fakes", "ece": "ECE",
}  # fmt: skip
ROBUSTNESS_COLUMNS: Final = {"acc": "Accuracy", "ap": "AP", "auroc": "AUROC", "tpr_at_fpr_1": "TPR at 1 % FPR"}
VIEWS_COLUMNS: Final = {name: COLUMNS[name] if name in COLUMNS else MORE_COLUMNS[name] for name in views.METRICS}
BARS: Final = ("acc", "ap")
CONTENTS: Final = {"Object class": "object_class", "Group of captions": "caption_cluster"}
OF: Final = {"the image feature u": "u", "what the projection leaves, ũ": "projected", "the caption": "caption"}


def render(result: Mapping[str, Any]) -> str:
    """The HTML page of a result of `workflows.evaluate` (evaluation.json); the same result gives the same page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("jobs.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    groups = worst_first(result["generators"])
    return template.render(
        detector=shown(result["detector_id"] or "unknown", MAX_TEXT_LETTERS),
        facts=_facts(result),
        summary=_summary(result),
        tiles=[_tile(label, result["macro_mean"][metric]) for metric, label in TILES.items()],
        says=_says(result, groups),
        notes=_notes(result, groups),
        generator_charts=figures.of_generators(result),
        generator_tables=_generator_tables(result, groups),
        alignment=_alignment(result["alignment"]) if result.get("alignment") else None,
        curve_charts=figures.of_all(result),
        robustness=_robustness(result) if result["robustness"] else None,
        views=_views(result["views"]) if result.get("views") else None,
        claims=_claims(result.get("provenance") or []),
        leakage=_leakage(result["leakage"]) if "leakage" in result else None,
        explanations=explanations(result),
        footer=_footer(result),
    )


# Text.


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, rows = result["all"], result["rows"]
    facts = [
        ("Data", shown(result["verdicts"], MAX_SOURCE_LETTERS)),
        ("Date", str(result["evaluated_at"])[:16].replace("T", " ") + " UTC"),
        ("Images", f"{counts['real']:,} real, {counts['fake']:,} fake"),
        ("Generators", f"{len(result['generators']):,}"),
    ]
    if rows["split"] is not None:
        facts.append(
            (
                "Split",
                f"{shown(rows['split'], MAX_TEXT_LETTERS)}; {rows['left_out']:,} rows of other splits are left out",
            )
        )
    if (threshold := result["curves"]["threshold"]) is not None:
        facts.append(("Threshold", f"fake from a probability of {threshold:.3g}"))
    return facts


def _summary(result: Mapping[str, Any]) -> str:
    number = len(result["generators"])
    means = "Means over all generators, each with the same weight" if number > 1 else "There is one generator"
    return f"{means}. Below each number is its 95 % interval, which holds for other images of the same kinds."


def _says(result: Mapping[str, Any], groups: Sequence[tuple[str, Any]]) -> list[str]:
    """The most important results, as sentences."""
    lines = []
    ranked = [(name, numbers["acc"]) for name, numbers in groups if numbers["real"] and numbers["fake"]]
    if len(ranked) > 1:
        (worst, low), (best, high) = ranked[0], ranked[-1]
        lines.append(
            f"Worst generator: {_quoted(worst)}, with an accuracy of {_spelled(low)}. Best: {_quoted(best)}, with "
            f"{_spelled(high)}."
        )
    if sentence := alarms(result):
        lines.append(sentence)
    if result.get("alignment"):
        lines.append(parting(result["alignment"], _quoted))
    drops = [
        (part["macro_mean"]["ap"]["value"], chain)
        for chain, part in result["robustness"].items()
        if part["macro_mean"]["ap"]["value"] is not None
    ]
    plain = baseline(result)["macro_mean"]["ap"]["value"]
    if drops and plain is not None:
        value, chain = min(drops)
        before = per_cent(plain)
        lines.append(
            f"The transform with the lowest AP is {_quoted(chain)}: AP goes from {before} % to {per_cent(value)} %."
        )
    return lines


def _quoted(name: str) -> str:
    """A name for use in a sentence, with its text direction isolated."""
    return f"\N{FIRST STRONG ISOLATE}{shown(name, MAX_TEXT_LETTERS)}\N{POP DIRECTIONAL ISOLATE}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(_quoted, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _spelled(number: Number) -> str:
    interval = _interval(number)
    return figures.number_text(number) + (f" ({interval})" if interval else "")


def _notes(result: Mapping[str, Any], groups: Sequence[tuple[str, Any]]) -> list[str]:
    """Caveats that the numbers do not show."""
    counts, notes = result["all"], []
    if seen := result["rows"]["seen"]:
        notes.append(
            f"Images of the split {' and '.join(seen)} are included. They were used in training, or to choose the "
            "threshold, so the numbers are too high."
        )
    if result["failed"]:
        notes.append(f"{result['failed']:,} labelled images failed and are not counted.")
    if result["without_label"]:
        notes.append(f"{result['without_label']:,} images have no label and are not counted.")
    if counts["uncertain"]:
        notes.append(
            f"{counts['uncertain']:,} verdicts are uncertain. Accuracies count them as wrong; without them the "
            f"mean accuracy is {_spelled(result['macro_mean']['acc_decided'])}."
        )
    one_class = [name for name, numbers in groups if not numbers["real"] or not numbers["fake"]]
    if one_class:
        notes.append(
            f"One class only, so most numbers are undefined and left out of the means: {_listed(one_class)}. "
            "A generator without reals can be compared with the reals of another (--pair)."
        )
    few = [name for name, numbers in groups if 0 < numbers["real"] < 100 or 0 < numbers["fake"] < 100]
    if few:
        notes.append(f"Fewer than 100 reals or fakes, too few to measure a rate of 1 %: {_listed(few)}.")
    if result["threshold"] is not None:
        notes.append(f"Verdicts use the requested threshold of {result['threshold']:g}, not the detector's own.")
    return notes


def _footer(result: Mapping[str, Any]) -> str:
    bootstrap = result["bootstrap"]
    return (
        f"Intervals: {bootstrap['samples']:,} bootstrap samples, seed {bootstrap['seed']}, "
        f"{100 * bootstrap['confidence']:.0f} % percentiles. "
        "The same numbers are in evaluation.json, and as rows in evaluation.parquet."
    )


# Numbers.


def _interval(number: Number) -> str | None:
    if number["low"] is None:
        return None
    return f"{per_cent(number['low'])} to {per_cent(number['high'])}"


def _share(value: float) -> float:
    """A share as per cent for CSS, in [0, 100]."""
    return round(100 * min(1.0, max(0.0, value)), 2)


def _tile(label: str, number: Number) -> dict[str, Any]:
    if number["value"] is None:
        return {"label": label, "value": None}
    low, high = number["low"], number["high"]
    return {
        "label": label,
        "value": per_cent(number["value"]),
        "interval": _interval(number),
        "share": _share(number["value"]),
        "range": None if low is None else (_share(low), round(_share(high) - _share(low), 2)),
    }


def _cells(numbers: Mapping[str, Number], metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    cells = []
    for metric in metrics:
        value = numbers[metric]["value"]
        cells.append(
            {
                "value": None if value is None else per_cent(value),
                "interval": _interval(numbers[metric]),
                "share": None if value is None else _share(value),
                "bar": metric in BARS,
            }
        )
    return cells


def _counts(numbers: Mapping[str, Any]) -> list[str]:
    return [f"{numbers[name]:,}" for name in ("real", "fake", "uncertain", "failed")]


def _generator_tables(result: Mapping[str, Any], groups: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Two tables with all metrics of all generators: the main ones with image counts, and the others."""
    order = "worst accuracy first: per cent, with 95 % intervals"
    return [
        _generator_table(result, groups, COLUMNS, "all-generators", f"All generators, {order}, and numbers of images."),
        _generator_table(
            result,
            groups,
            MORE_COLUMNS,
            "more-numbers",
            f"Metrics at lower false alarm rates, and calibration; {order}.",
        ),
    ]


def _generator_table(
    result: Mapping[str, Any], groups: Sequence[tuple[str, Any]], columns: Mapping[str, str], name: str, caption: str
) -> dict[str, Any]:
    with_counts = columns is COLUMNS
    totals = {"Mean over generators": result["macro_mean"], "All images": result["all"]}
    return {
        "id": name,
        "caption": caption,
        "headings": [*columns.values(), *(("Real", "Fake", "Uncertain", "Failed") if with_counts else ())],
        "rows": [
            {
                "name": shown(name, MAX_TEXT_LETTERS),
                "pair": shown(result["pairs"][name], MAX_TEXT_LETTERS) if name in result["pairs"] else None,
                "numbers": _cells(numbers, columns),
                "counts": _counts(numbers) if with_counts else [],
            }
            for name, numbers in groups
        ],
        "totals": [
            {
                "name": name,
                "numbers": _cells(numbers, columns),
                "counts": (_counts(numbers) if numbers is result["all"] else [""] * 4) if with_counts else [],
            }
            for name, numbers in totals.items()
        ],
    }


def _alignment(both: Mapping[str, Any]) -> dict[str, Any]:
    """Each metric of each generator raw, aligned, and the difference, marked where they part."""
    forms = ("raw", "aligned", "difference")
    rows: list[tuple[str, list[Mapping[str, Number]], Collection[str]]] = [
        (
            shown(name, MAX_TEXT_LETTERS),
            [both[form]["generators"][name] for form in forms],
            both["parted"].get(name, ()),
        )
        for name in both["raw"]["generators"]
    ]
    rows.append(("Mean over generators", [both[form]["macro_mean"] for form in forms], ()))
    return {
        "transform": both["transform"],
        "says": parting(both, _quoted),
        "images": f"{both['images']:,}",
        "unpaired": f"{both['unpaired']:,}" if both["unpaired"] else None,
        "charts": figures.of_alignment(both),
        "headings": [*ROBUSTNESS_COLUMNS.values()],
        "rows": [
            {"name": name, "numbers": [_triple(metric, numbers, marks) for metric in ROBUSTNESS_COLUMNS]}
            for name, numbers, marks in rows
        ],
    }


def _triple(metric: str, numbers: Sequence[Mapping[str, Number]], parted: Collection[str]) -> dict[str, Any]:
    """Cells of a metric: raw, aligned, and their difference in points."""
    raw, aligned, difference = numbers
    change = difference[metric]
    interval = None if change["low"] is None else f"{points(change['low'])} to {points(change['high'])}"
    return {
        "forms": [cells for numbers in (raw, aligned) for cells in _cells(numbers, {metric: ""})],
        "change": {"value": None if change["value"] is None else points(change["value"]), "interval": interval},
        "parted": metric in parted,
    }


def _robustness(result: Mapping[str, Any]) -> dict[str, Any]:
    parts = {"none": baseline(result), **result["robustness"]}
    return {
        "after": result["alignment"]["transform"] if result.get("alignment") else None,
        "charts": figures.of_robustness(result),
        "headings": [*ROBUSTNESS_COLUMNS.values(), "Failed", "Lowest AP"],
        "rows": [_robustness_row(chain, part) for chain, part in parts.items()],
    }


def _robustness_row(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    by_ap = [(numbers["ap"]["value"], generator) for generator, numbers in part["generators"].items()]
    worst = min([item for item in by_ap if item[0] is not None], default=None)
    return {
        "name": shown(name, MAX_TEXT_LETTERS),
        "numbers": _cells(part["macro_mean"], ROBUSTNESS_COLUMNS),
        "failed": f"{part['failed']:,}",
        "worst": None if worst is None else (per_cent(worst[0]), shown(worst[1], NAME_WIDTH)),
    }


def _views(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "disagree": [(name, f"{found['disagree'][name]:,}", f"{found['images'][name]:,}") for name in ("real", "fake")],
        "headings": [*VIEWS_COLUMNS.values()],
        "rows": [{"name": name, "numbers": _cells(found[form], VIEWS_COLUMNS)} for form, name in ALARMS.items()],
    }


def _claims(stated: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts = ("real", "fake", "unknown", "called_fake")
    return [
        {
            "name": f"{CLAIMS[one['column']]}: {shown(one['value'], MAX_TEXT_LETTERS)}",
            "counts": [f"{one[name]:,}" for name in counts],
        }
        for one in stated
    ]


def _leakage(measured: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        (f"{name}, from {feature}", measured[key][of]) for name, key in CONTENTS.items() for feature, of in OF.items()
    ]
    rows.append(("Real or fake, from the caption alone", measured["label"]))
    return {
        "images": f"{measured['images']:,}",
        "rows": [
            {
                "name": name,
                "numbers": _cells({"value": probe}, {"value": ""}),
                "references": ["–" if probe[key] is None else per_cent(probe[key]) for key in ("chance", "permuted")],
                "classes": probe["classes"],
            }
            for name, probe in rows
        ],
    }
