"""Explain how to read an evaluation, in plain words, with its own numbers as examples."""

from collections.abc import Callable, Mapping
from typing import Any, Final

STREAM: Final = 100_000
"""Number of images in the example of rare fakes."""
STREAM_FAKES: Final = 0.01

METRIC_WORDS: Final = {"acc": "accuracy", "ap": "AP", "auroc": "AUROC", "tpr_at_fpr_1": "TPR at 1 % FPR"}
"""Metrics of an alignment, as in a sentence."""

ALARMS: Final = {"first_view": "the first view decides", "agreeing": "no alarm if the views disagree"}
"""Forms of `evaluation.views.stability`."""
CLAIMS: Final = {
    "c2pa_state": "content credentials", "digital_source_type": "source type", "metadata_generator": "metadata",
}  # fmt: skip
"""Columns of `evaluation.claims.stated`."""

Explanation = tuple[str, list[str]]
"""A heading and its paragraphs."""


def per_cent(share: float) -> str:
    """A share in per cent with one decimal, or more digits so that only 1 gives 100.0 and only 0 gives 0.0."""
    text = f"{100 * share:.1f}"
    if (text == "100.0" and share < 1.0) or (text == "0.0" and share > 0.0):
        return f"{100 * share:.2f}" if 0.0001 <= share <= 0.9999 else (">99.99" if share > 0.5 else "<0.01")
    return text


def alarms(result: Mapping[str, Any]) -> str | None:
    """A sentence or two on the precision of alarms if fakes are rare; None if it is undefined."""
    precision, counts = result["curves"]["precision"], result["all"]["confusion"]["fake"]
    if precision is None:
        return None
    found = round(STREAM * STREAM_FAKES * counts["fake"] / sum(counts.values()))
    reals = STREAM * (1.0 - STREAM_FAKES)
    total = found + round(reals * precision["fpr"])
    if not found:
        return None
    sentence = (
        f"Of {STREAM:,} images, {100 * STREAM_FAKES:.0f} % of them fake, the detector would flag about {total:,}, and "
        f"{found:,} of these would be fake: {per_cent(found / total)} % of the alarms are right."
    )
    if precision["fpr"] > 0:
        return sentence
    upper = precision["fpr_upper"]
    return (
        f"{sentence} But this number of reals cannot rule out that {per_cent(upper)} % of reals are flagged, and then "
        f"{per_cent(found / (found + reals * upper))} % are right."
    )


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def parting(aligned: Mapping[str, Any], quoted: Callable[[str], str]) -> str:
    """A sentence that says where raw and aligned images part; `quoted`: how a generator is named in it."""
    generators, parted = aligned["difference"]["generators"], aligned["parted"]
    start = f"Raw and aligned ({aligned['transform']}) "
    if not parted:
        return f"{start}part at none of the {len(generators)} generators: each difference may be 0."
    places = []
    for name, names in parted.items():
        changes = (f"{METRIC_WORDS[metric]} {points(generators[name][metric]['value'])}" for metric in names)
        places.append(f"{quoted(name)} ({', '.join(changes)})")
    others = len(generators) - len(parted)
    end = f"; at the other {others}, each difference may be 0" if others else ""
    return f"{start}part at {len(parted)} of {len(generators)} generators, in points: {', '.join(places)}{end}."


def explanations(result: Mapping[str, Any]) -> list[Explanation]:
    """The paragraphs of the section "How to read this"."""
    return [
        ("The two kinds of numbers", [
            f"Accuracies measure the verdicts, at {_threshold(result)}: nothing was tuned on these images. AP, AUROC "
            "and the rates at a fixed false positive rate use the probabilities: they measure how well the detector "
            "ranks fakes above reals, independent of the threshold. High AP with low accuracy means that the "
            "threshold does not suit this generator.",
        ]),
        ("The mean over generators", [
            "Each generator has the same weight. A good mean can hide a generator that is never detected: read the "
            "worst one first. The mean says nothing about generators that are not in the table.",
        ]),
        ("Where fakes are rare", [
            _rare(result),
            "AP and accuracy do not show this, because about half of a benchmark's images are fake. TPR at 1 % FPR "
            "does: the share of fakes that are found when one real in a hundred is flagged.",
        ]),
        ("Intervals", [
            "The reals and the fakes of each generator are resampled with replacement; an interval contains 95 % of "
            "the samples. It shows the effect of sampling, not of another source of images, another training or a new "
            "generator.",
            "An interval of zero width is not certainty. If none of n images was judged wrongly, up to about 3/n of "
            "all such images may be: 3 % after 100, 0.3 % after 1,000.",
            "The ECE has no interval: resampling adds noise to each bin, and the interval would lie above the number. "
            "A TPR at 1 % (0.1 %) FPR with fewer than 100 (1,000) reals has none either, because the one real that "
            "scores highest decides it; such a TPR is also too high on average.",
        ]),
        ("Undefined", [
            "Without reals there are no false alarms to count, and without fakes there is nothing to find: such "
            "numbers are undefined, not 0. The means leave them out. Precision is undefined if nothing was flagged.",
        ]),
        ("Uncertain verdicts", [
            "A detector may be set to answer \"uncertain\" near its threshold. Accuracies count this as wrong; "
            "otherwise a detector could look better by answering less. It is not an alarm either.",
        ]),
        ("What this does not prove", [
            "A verdict is a probability with errors in both directions. Nobody should be judged by one alone. On "
            "images that were edited, recompressed or made by a generator that is not in this table, the detector may "
            "do worse than all numbers here.",
        ]),
    ]  # fmt: skip


def _threshold(result: Mapping[str, Any]) -> str:
    if result["threshold"] is None:
        return "the detector's own threshold"
    return f"the requested threshold of {result['threshold']:g}"


def _rare(result: Mapping[str, Any]) -> str:
    start = "Most images that people see are real, so even few false alarms outnumber the fakes that are found. "
    return start + (alarms(result) or "Here, one class is missing or nothing was flagged, so there is no example.")
