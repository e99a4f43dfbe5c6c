"""Format an evaluation as tables and sentences for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from jobs.console.tables import UNDEFINED, aligned, short_name
from jobs.evaluation.comparison import baseline
from jobs.report.wording import ALARMS, CLAIMS, METRIC_WORDS, parting

HEADINGS: Final = {
    "acc": "acc", "real_acc": "real_acc", "fake_acc": "fake_acc", "ap": "AP", "auroc": "AUROC",
    "tpr_at_fpr_1": "TPR@1%FPR",
}  # fmt: skip
WITH_INTERVAL: Final = ("acc", "ap")
TARGETS: Final = {"class": "object_class", "cluster": "caption_cluster"}
SIGNS: Final = {"u": "u", "ũ": "projected", "v": "caption"}
LABEL: Final = "label, v"
VIEWS_HEADINGS: Final = {"tpr_at_fpr_1": "TPR@1%FPR", "tpr_at_fpr_01": "TPR@0.1%FPR"}
MAX_COLUMNS: Final = 120
"""Table width above which intervals are left out."""


def as_text(result: Mapping[str, Any]) -> str:
    """The table, worst accuracy first, then the mean, then notes on images that are not counted."""
    lines = _table(result, WITH_INTERVAL)
    if len(lines[0]) > MAX_COLUMNS:
        lines = _table(result, ())
    lines += _notes(result)
    if result.get("alignment"):
        lines += ["", *_alignment(result["alignment"])]
    if result.get("robustness"):
        lines += ["", *_robustness(result)]
    if result.get("views"):
        lines += ["", *_views(result["views"])]
    if result.get("provenance"):
        lines += ["", *_claims(result["provenance"])]
    if result.get("leakage"):
        lines += ["", *leakage_lines({"detector": result["leakage"]})]
    return "\n".join(lines)


def leakage_lines(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the probes of `nsnet.leakage.leakage`, by the name of a detector, and notes on how to read it.

    u: image feature; ũ: what the projection leaves of it; v: caption feature.
    """
    probed = {f"{target}, {sign}": (key, feature) for target, key in TARGETS.items() for sign, feature in SIGNS.items()}
    rows = [["leakage", "‖ũ‖/‖u‖", *probed, LABEL]]
    for name, numbers in measured.items():
        cells = [_probe(numbers[key][feature], feature != "caption") for key, feature in probed.values()]
        energy = UNDEFINED if numbers["residual_energy"] is None else f"{numbers['residual_energy']:.3f}"
        rows.append([short_name(name), energy, *cells, _probe(numbers["label"], True)])
    return [*aligned(rows), *_leakage_notes(measured)]


def _leakage_notes(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Chance and permuted classes of each target, or why it is undefined."""
    lines = [
        f"balanced accuracy of a linear probe, cross-validated on {min(n['images'] for n in measured.values())} images"
    ]
    first = next(iter(measured.values()))
    for target, probe in [*((t, first[key]["u"]) for t, key in TARGETS.items()), (LABEL, first["label"])]:
        if probe["value"] is None:
            lines.append(f"{target}: {UNDEFINED}: {probe['reason']}")
        else:
            lines.append(
                f"{target}: {probe['classes']} classes, chance {probe['chance']:.3f}, with permuted classes "
                f"{probe['permuted']:.3f}"
            )
    return lines


def _probe(probe: Mapping[str, Any], with_interval: bool) -> str:
    if probe["value"] is None:
        return UNDEFINED
    return f"{probe['value']:.2f}" + (f" ({probe['low']:.2f}-{probe['high']:.2f})" if with_interval else "")


def worst_first(generators: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Generators by ascending accuracy, undefined ones last."""
    items = [(numbers["acc"]["value"], name, numbers) for name, numbers in generators.items()]
    ranked = sorted(items, key=lambda item: (item[0] is None, item[0] or 0.0, item[1]))
    return [(name, numbers) for _, name, numbers in ranked]


def _table(result: Mapping[str, Any], with_interval: Sequence[str]) -> list[str]:
    rows = [["generator", "real", "fake", *HEADINGS.values()]]
    groups = worst_first(result["generators"])
    for name, numbers in [*groups, ("macro mean", result["macro_mean"]), ("all images", result["all"])]:
        counts = [str(numbers.get(label, "")) for label in ("real", "fake")]
        cells = [_cell(numbers[metric], metric in with_interval) for metric in HEADINGS]
        rows.append([short_name(name), *counts, *cells])
    return aligned(rows)


def _alignment(both: Mapping[str, Any]) -> list[str]:
    """Each metric raw and aligned, with a mark where they part, and the sentence that says so."""
    rows = [["generator", *(text for metric in METRIC_WORDS for text in (HEADINGS[metric], "aligned"))]]
    forms = ("raw", "aligned")
    named = [(name, [both[form]["generators"][name] for form in forms]) for name in both["raw"]["generators"]]
    for name, numbers in [*named, ("macro mean", [both[form]["macro_mean"] for form in forms])]:
        marks = both["parted"].get(name, ()) if name in both["difference"]["generators"] else ()
        cells = [
            text
            for metric in METRIC_WORDS
            for text in (_cell(numbers[0][metric], False), _cell(numbers[1][metric], False) + " *"[metric in marks])
        ]
        rows.append([short_name(name), *cells])
    lines = [
        f"raw, and aligned by {both['transform']}; {both['images']:,} images were judged both ways",
        *aligned(rows),
        "*: the 95 % interval of the difference, of the same images, is without 0; by chance one of 20 is",
        parting(both, short_name),
    ]
    if both["unpaired"]:
        lines.insert(-1, f"{both['unpaired']:,} images were judged in one way only and are not counted in this table")
    return lines


def _views(views: Mapping[str, Any]) -> list[str]:
    """What is found at a rate of false alarms, with and without images whose views disagree."""
    rows = [["views, all images", *VIEWS_HEADINGS.values()]]
    for form, name in ALARMS.items():
        rows.append([name, *(_cell(views[form][metric], True) for metric in VIEWS_HEADINGS)])
    shares = ", ".join(f"{views['disagree'][name]:,} of {views['images'][name]:,} {name}s" for name in ("real", "fake"))
    return [*aligned(rows), f"views disagree on {shares}"]


def _claims(stated: Sequence[Mapping[str, Any]]) -> list[str]:
    """What files state about their origin, apart from the numbers above, which do not depend on it."""
    counts = ("real", "fake", "unknown", "called_fake")
    rows = [["files state", "", "real", "fake", "no label", "called fake"]]
    rows += [[CLAIMS[one["column"]], one["value"], *(f"{one[name]:,}" for name in counts)] for one in stated]
    return aligned(rows, left=2)


def _robustness(result: Mapping[str, Any]) -> list[str]:
    parts = {"none": baseline(result), **result["robustness"]}
    after = f" after {result['alignment']['transform']}" if result.get("alignment") else ""
    rows = [[f"transform{after}, macro mean", *(HEADINGS[metric] for metric in METRIC_WORDS)]]
    for chain, part in parts.items():
        rows.append([short_name(chain), *(_cell(part["macro_mean"][metric], True) for metric in METRIC_WORDS)])
    return aligned(rows)


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if result["failed"]:
        notes.append(f"{result['failed']} labelled images failed and are not counted above")
    if result["without_label"]:
        notes.append(f"{result['without_label']} images have no label and are not counted above")
    if uncertain := result["all"]["uncertain"]:
        decided = _cell(result["macro_mean"]["acc_decided"], False)
        notes.append(f"{uncertain} verdicts are uncertain: acc counts them as wrong; without them it is {decided}")
    groups = [result["macro_mean"], result["all"], *result["generators"].values()]
    if any(numbers[metric]["value"] is None for numbers in groups for metric in HEADINGS):
        notes.append(f"{UNDEFINED}: undefined, one class only")
    return notes


def _cell(number: Mapping[str, Any], with_interval: bool) -> str:
    if number["value"] is None:
        return UNDEFINED
    if with_interval and number["low"] is not None:
        return f"{number['value']:.4f} ({number['low']:.3f}-{number['high']:.3f})"
    return f"{number['value']:.4f}"
