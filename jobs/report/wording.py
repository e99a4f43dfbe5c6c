"""How to read an evaluation, in plain words, with its own numbers as the examples."""

from collections.abc import Mapping
from typing import Any, Final

STREAM: Final = 100_000
"""Images of the example of what an alarm is worth."""
STREAM_FAKES: Final = 0.01

Explanation = tuple[str, list[str]]
"""A heading and its paragraphs."""


def per_cent(share: float) -> str:
    """A share in per cent, with one decimal or as many as it needs: 100.0 is said of all only, and 0.0 of none."""
    text = f"{100 * share:.1f}"
    if (text == "100.0" and share < 1.0) or (text == "0.0" and share > 0.0):
        return f"{100 * share:.2f}" if 0.0001 <= share <= 0.9999 else (">99.99" if share > 0.5 else "<0.01")
    return text


def alarms(result: Mapping[str, Any]) -> str | None:
    """What alarms are worth where fakes are rare, in a sentence or two; None where that is undefined."""
    precision, counts = result["curves"]["precision"], result["all"]["confusion"]["fake"]
    if precision is None:
        return None
    found = round(STREAM * STREAM_FAKES * counts["fake"] / sum(counts.values()))
    reals = STREAM * (1.0 - STREAM_FAKES)
    total = found + round(reals * precision["fpr"])
    if not found:
        return None
    sentence = (
        f"Of {STREAM:,} images of which {100 * STREAM_FAKES:.0f} % are fake it would flag about {total:,}, and "
        f"{found:,} of these would be fake: {per_cent(found / total)} % of the alarms are right."
    )
    if precision["fpr"] > 0:
        return sentence
    upper = precision["fpr_upper"]
    return (
        f"{sentence} But so few reals cannot rule out that {per_cent(upper)} % of reals are flagged, and then "
        f"{per_cent(found / (found + reals * upper))} % are right."
    )


def explanations(result: Mapping[str, Any]) -> list[Explanation]:
    """The section "How to read this"."""
    return [
        ("The two kinds of numbers", [
            f"Accuracies are of the verdicts, at {_threshold(result)}: nothing was tuned on these images. AP, AUROC "
            "and the rates at a fixed false positive rate are of the probabilities, and say how well fakes are ranked "
            "above reals, whatever the threshold. High AP with low accuracy means that the "
            "threshold does not suit this generator.",
        ]),
        ("The mean over generators", [
            "Each generator counts once, however many images it has. A good mean can hide a generator that is never "
            "found: read the worst one first. It says nothing of generators that are not here.",
        ]),
        ("Where fakes are rare", [
            _rare(result),
            "AP and accuracy do not show this, for about half of the images of a benchmark are fake. TPR at 1 % FPR "
            "does: the share of fakes that is found when one real in a hundred may be flagged.",
        ]),
        ("Intervals", [
            "Images are drawn anew, with replacement, reals and fakes of each generator for themselves; 95 % of the "
            "samples lie inside. They show what chance of the draw does, not what another source of images, another "
            "training or a new generator would.",
            "An interval without width is no certainty. Where none of n images was judged wrongly, up to about 3/n "
            "of all such images may be: 3 % after 100, 0.3 % after 1,000.",
            "The ECE has no interval: drawing adds noise to each bin, and it would lie above the number. Nor has a TPR "
            "at 1 % (0.1 %) FPR of fewer than 100 (1,000) reals, which is decided by the one real that scores highest; "
            "such a TPR is too high in the mean, too.",
        ]),
        ("Undefined", [
            "Without reals there is no false alarm to count, and without fakes nothing to find: such numbers are "
            "undefined, which is not 0. The means leave them out. Precision is undefined where nothing was flagged.",
        ]),
        ("Uncertain verdicts", [
            "A detector may be set to answer \"uncertain\" near its threshold. That is not a right answer: accuracies "
            "count it against the detector, or it could look better by answering less. It is no alarm either.",
        ]),
        ("What this is no proof of", [
            "A verdict is a probability with errors in both directions. Nobody should be judged by one alone. Images "
            "that were edited, recompressed or made by a generator that is not in this table may do worse than all "
            "numbers here.",
        ]),
    ]  # fmt: skip


def _threshold(result: Mapping[str, Any]) -> str:
    if result["threshold"] is None:
        return "the threshold that the detector brings along"
    return f"a threshold of {result['threshold']:g} that was asked for"


def _rare(result: Mapping[str, Any]) -> str:
    start = "Most of what people look at is real, so that even few false alarms outnumber the fakes that are found. "
    return start + (alarms(result) or "Here, one class is missing or nothing was flagged: there is no example to give.")
