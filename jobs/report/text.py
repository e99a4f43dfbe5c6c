"""Format an evaluation as tables and sentences for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from jobs.console.tables import UNDEFINED, aligned, short_name

HEADINGS: Final = {
    "acc": "acc", "real_acc": "real_acc", "fake_acc": "fake_acc", "ap": "AP", "auroc": "AUROC",
    "tpr_at_fpr_1": "TPR@1%FPR",
}  # fmt: skip
WITH_INTERVAL: Final = ("acc", "ap")
TARGETS: Final = {"class": "object_class", "cluster": "caption_cluster"}
SIGNS: Final = {"u": "u", "ũ": "projected", "v": "caption"}
LABEL: Final = "label, v"
MAX_COLUMNS: Final = 120
"""Table width above which intervals are left out."""


def as_text(result: Mapping[str, Any]) -> str:
    """The table, worst accuracy first, then the mean, then notes on images that are not counted."""
    lines = _table(result, WITH_INTERVAL)
    if len(lines[0]) > MAX_COLUMNS:
        lines = _table(result, ())
    lines += _notes(result)
    if result.get("robustness"):
        lines += ["", *_robustness(result)]
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


def _robustness(result: Mapping[str, Any]) -> list[str]:
    shown = ("acc", "ap", "auroc", "tpr_at_fpr_1")
    means = {"none": result["macro_mean"], **{c: part["macro_mean"] for c, part in result["robustness"].items()}}
    rows = [["transform, macro mean", *(HEADINGS[metric] for metric in shown)]]
    rows += [[short_name(chain), *(_cell(mean[metric], True) for metric in shown)] for chain, mean in means.items()]
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
