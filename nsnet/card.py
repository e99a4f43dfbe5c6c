"""Writes the model card of a bundle, in Markdown, from the record of its training.

Text from data, such as the names of generators, is escaped, because the card is opened in browsers.
"""

import html
import json
import re
from typing import Any, Final

SHOWN: Final = {"acc": "acc", "ap": "AP", "auroc": "AUROC", "tpr_at_fpr_1": "TPR at 1 % FPR"}
"""Metrics of the card -> displayed names."""
MAX_NAME_LETTERS: Final = 60
MAX_TEXT_LETTERS: Final = 400
UNDEFINED: Final = "undefined"


def model_card(detector_id: str, config: dict[str, Any], calibration: dict[str, Any], training: dict[str, Any]) -> str:
    """Return the card. `training`: the record of a training (`result.json`) or of an import, or {}."""
    parts = [
        f"# AI-generated image detector `{detector_id}`",
        _method(config),
        _parts(config, calibration),
        "## Limits\n" + _limits(config, training),
    ]
    if "split" in training:
        parts.append("## Data\n" + _data(training))
    for part, title in (("test", "Test"), ("validation", "Validation")):
        if training.get(part):
            parts.append(f"## {title}\n" + _notes(training, part) + _numbers(training[part]))
    if training:
        shown = {key: value for key, value in training.items() if key not in ("test", "validation", "history", "split")}
        parts.append(f"## Training\n{_fenced(json.dumps(shown, indent=2, ensure_ascii=False))}")
    return "\n\n".join(parts) + "\n"


def _method(config: dict[str, Any]) -> str:
    if config["projection"]["kind"] == "none":
        return "A classifier on CLIP image features."
    return (
        "Null-space projection of CLIP image features by their captions, after arXiv 2508.01248 and its successor "
        "Advanced NS-Net."
    )


def _tower(config: dict[str, Any]) -> str:
    return f"{config['model']}, weights {config['pretrained'] or 'seeded random'}"


def _parts(config: dict[str, Any], calibration: dict[str, Any]) -> str:
    clip, captioner, projection = config["clip"], config["captioner"], config["projection"]
    captions = projection["kind"] in ("per_sample", "mapped_and_raw", "rank_k")
    rows = [
        ("image and text towers", " + ".join(_tower(tower) for tower in (clip, config.get("text")) if tower)),
        ("projection", _projection(config)),
        (
            "captioner",
            (captioner["model"] or "tiny BLIP with random weights, captions without meaning") if captions else "none",
        ),
        (
            "temperature, threshold",
            f"{calibration['temperature']:.4g}, {calibration['threshold']:.4g} "
            + (
                f"(fitted on {calibration['fitted_on']} validation images)"
                if calibration["fitted_on"]
                else "(not fitted)"
            ),
        ),
        ("operating point", _point(calibration)),
    ]
    return _table(["part", ""], [[name, _text(value, longest=MAX_TEXT_LETTERS)] for name, value in rows])


def _projection(config: dict[str, Any]) -> str:
    projection = config["projection"]
    caption = "the mapped caption" if config["mapper"]["hidden_dim"] else "the caption"
    return {
        "per_sample": f"of {caption} of each image",
        "mapped_and_raw": "of the mapped caption of each image and of its unmapped feature",
        "rank_k": f"of {caption} of each image and its {projection['rank'] - 1} nearest of {projection['bank']}",
        "global": f"of a basis of many captions, rank {projection['rank']}",
        "none": "none",
    }.get(str(projection["kind"]), "unknown")


def _point(calibration: dict[str, Any]) -> str:
    point = calibration.get("point") or {"rule": "accuracy"}
    if point["rule"] == "fpr":
        aim = f"at most {point['fpr']:.3%} of real images called fake"
        if point.get("confidence"):
            aim += f", with a confidence of {point['confidence']:.1%}"
    elif point["rule"] == "cost":
        aim = (
            f"a false alarm costs {point['false_alarm_cost']:g}, a miss {point['miss_cost']:g}, at "
            f"{point['base_rate']:.2%} fakes"
        )
    else:
        aim = "most correct verdicts"
    band = f", uncertain within ±{calibration['uncertain_margin']:.3g}" if calibration["uncertain_margin"] else ""
    return f"{aim}{band}; version {calibration.get('version', 1)}"


def _limits(config: dict[str, Any], training: dict[str, Any]) -> str:
    lines = [
        "This detector was trained from random weights: it knows only the artefacts of its training images."
        if config["clip"]["pretrained"] is None
        else "Fakes by generators that are not in the training data are found less often than fakes by those that are."
    ]
    if training.get("leave_out"):
        lines.append(f"Training used no image of {_text(training['leave_out'])}: it represents a new generator.")
    if training.get("leaking"):
        lines.append(
            f"In the splits of the source, {training['leaking']} images of validation and test are near-duplicates of "
            "images used for training or for selection: the numbers are too optimistic."
        )
    lines.append(
        "A verdict is a probability with errors in both directions. It is not proof: do not judge a person by it "
        "alone. Where fakes are rare, most alarms are false: read the true positive rate at 1 % false positives."
    )
    return "\n".join(lines)


def _data(training: dict[str, Any]) -> str:
    """The source, and images per split and generator."""
    split: dict[str, dict[str, list[int]]] = training["split"]
    names = [name for name in ("train", "val", "test", "unused") if name in split]
    generators = sorted({generator for name in names for generator in split[name]})
    rows = []
    for generator in generators:
        pairs = [split[name].get(generator, [0, 0]) for name in names]
        rows.append([_text(generator), *(f"{real} + {fake}" for real, fake in pairs)])
    source = _text(str(training.get("source", "")), longest=MAX_TEXT_LETTERS)
    return (
        f"Source: {source}; variant {_text(str(training.get('variant')))}, seed {training.get('seed')}. Images, "
        "real + fake:\n\n" + _table(["generator", *names], rows)
    )


def _notes(training: dict[str, Any], part: str) -> str:
    """Remarks that are needed to read the numbers of a part."""
    note = ""
    if part == "validation":
        note += "The threshold was chosen on these images: accuracies are too optimistic.\n\n"
    if "calibrated_from" in training:
        note += f"Accuracies are at the threshold of detector {_text(str(training['calibrated_from']))}.\n\n"
    return note


def _numbers(compared: dict[str, Any]) -> str:
    """Metrics with their 95 % bootstrap intervals, worst generator first."""

    def accuracy(item: tuple[str, dict[str, Any]]) -> tuple[bool, float, str]:
        value = _value(item[1].get("acc"))
        return value is None, value or 0.0, item[0]

    groups = sorted(compared["generators"].items(), key=accuracy)
    rows = [
        [_text(name), str(group["real"]), str(group["fake"]), *(_cell(group.get(metric)) for metric in SHOWN)]
        for name, group in groups
    ]
    macro = compared["macro_mean"]
    rows.append(["macro mean", "", "", *(_cell(macro.get(metric)) for metric in SHOWN)])
    return _table(["generator", "real", "fake", *SHOWN.values()], rows)


def _value(number: Any) -> float | None:
    value: float | None = number["value"] if isinstance(number, dict) else number
    return value


def _cell(number: Any) -> str:
    value = _value(number)
    if value is None:
        return UNDEFINED
    if isinstance(number, dict) and number.get("low") is not None:
        return f"{value:.3f} ({number['low']:.3f} to {number['high']:.3f})"
    return f"{value:.3f}"


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(name: str, longest: int = MAX_NAME_LETTERS) -> str:
    """Escape a name that may be hostile for a Markdown table: no markup, no link, no line break."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    shown = html.escape(shown, quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~#!$:]|(?<=www)\.)", r"\\\1", shown, flags=re.IGNORECASE)
    return re.sub("@+", r"`\g<0>`", escaped)  # GitHub turns addresses into links even if they are escaped


def _fenced(text: str) -> str:
    """Format text as a code block with a fence that the text does not contain; unprintable letters are escaped."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    return f"{fence}json\n{shown}\n{fence}"
