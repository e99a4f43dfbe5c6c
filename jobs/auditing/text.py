"""Format an audit's result as tables and sentences for a terminal; names from the source are made printable."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from jobs.auditing import inventory, metadata_bias
from jobs.console.output import printable
from jobs.console.tables import UNDEFINED, aligned, short_name

Row = list[str]

FORMATS: Final = 3
"""Maximum number of formats per class to show."""


def as_text(result: dict[str, Any]) -> str:
    """The report; its last line is the conclusion on metadata."""
    parts = [_head(result), _contents(result), _splits(result), _copies(result["duplicates"]), _metadata(result)]
    parts += [_aligned(result, result["alignment"])] if result["alignment"] else []
    shown = [lines for part in parts if (lines := list(part))]
    return "\n\n".join("\n".join(lines) for lines in [*shown, [conclusion(result)]])


def conclusion(result: dict[str, Any]) -> str:
    """One line that names the generators whose labels metadata alone reveal, and the causes; after an alignment too."""
    aligned = result["alignment"]
    return _separable(result) + (f"; after {aligned['transform']}: {_separable(aligned)}" if aligned else "")


def _separable(result: dict[str, Any]) -> str:
    measured = {name: group["metadata"] for name, group in result["generators"].items()}
    judged = {name: metadata for name, metadata in measured.items() if metadata["biased"] is not None}
    biased = sorted((name for name in judged if judged[name]["biased"]), key=lambda name: -judged[name]["auroc"])
    sentence = f"{len(biased)} of {len(judged)} generators are separable by metadata alone"
    if biased:
        sentence += ": " + ", ".join(f"{short_name(name)} ({_causes(judged[name])})" for name in biased)
    if len(judged) < len(measured):
        sentence += f"; {len(measured) - len(judged)} cannot be judged"
    together = result["everything"]["metadata"]
    if together["biased"] and not biased:
        sentence += f"; all together, real and fake are separable by metadata alone ({_causes(together)})"
    return sentence


def _causes(measured: dict[str, Any]) -> str:
    return ", ".join(measured["told_by"]) or "several together"


def _head(result: dict[str, Any]) -> Iterator[str]:
    counts = [f"{seen['pictures']:,} {name}" for name, seen in result["everything"]["classes"].items()]
    failed = sum(error["pictures"] for error in result["failed"].values())
    summary = ", ".join([*counts, f"{failed:,} failed"])
    yield f"{result['pictures']:,} images of {printable(result['source'])}: {summary}"
    yield from _failed(result)
    if result["not_examined"]:
        yield f"  {result['not_examined']:,} more were not examined and are not counted below"


def _failed(result: dict[str, Any]) -> Iterator[str]:
    for name, error in result["failed"].items():
        yield f"  failed with {printable(name)}: {error['pictures']:,}, such as {printable(error['example'])}"


def _contents(result: dict[str, Any]) -> Iterator[str]:
    names = ("generator", "class", "images", "failed", "format", "width", "height", "most common size", "bytes/px")
    rows = [
        [short_name(generator), kind, *_content(seen)]
        for generator, group in result["generators"].items()
        for kind, seen in group["classes"].items()
    ]
    yield from aligned([[*names, "JPEG quality"], *rows], left=2)
    yield "width, height: minimum/median/maximum; bytes per pixel, JPEG quality: quartiles; one number if all are equal"


def _content(seen: dict[str, Any]) -> Row:
    formats, common = seen["formats"], seen["most_common_size"]
    total = sum(formats.values())
    shares = [f"{printable(name)} {count / total:.0%}" for name, count in list(formats.items())[:FORMATS]]
    shares += ["…"] if len(formats) > FORMATS else []
    return [
        f"{seen['pictures']:,}",
        f"{seen['failed']:,}",
        " ".join(shares) or UNDEFINED,
        _span(seen["width"], 0),
        _span(seen["height"], 0),
        f"{common['width']}×{common['height']} {common['share']:.0%}" if common else UNDEFINED,
        _span(seen["bytes_per_pixel"], 2),
        _span(seen["jpeg_quality"], 0),
    ]


def _span(values: Sequence[float] | None, decimals: int) -> str:
    shown = [f"{value:.{decimals}f}" for value in values or ()]
    return "/".join(shown[:1] if len(set(shown)) == 1 else shown) or UNDEFINED


def _splits(result: dict[str, Any]) -> Iterator[str]:
    if result["splits"]:
        rows = [
            [short_name(split), short_name(generator), *(f"{count:,}" for count in counts.values())]
            for split, generators in result["splits"].items()
            for generator, counts in generators.items()
        ]
        yield from aligned([["split", "generator", *inventory.CLASSES], *rows], left=2)


def _copies(counted: dict[str, Any]) -> Iterator[str]:
    kinds = {"equal files": counted["exact"], f"alike (≤ {counted['distance']} bits)": counted["alike"]}
    rows = [
        [words, *(f"{number:,}" for number in (seen["groups"], seen["pictures"]))]
        + [f"{seen[place]['groups']:,}" for place in ("within_a_split", "across_splits", "across_labels")]
        for words, seen in kinds.items()
    ]
    yield from aligned([["copies", "groups", "images", "within a split", "across splits", "real and fake"], *rows])
    yield "alike includes equal files; the last three columns count groups"
    across = counted["alike"]["across_splits"]
    for split, count in across["by_split"].items():
        yield f"{short_name(split)}: {count:,} images have a copy in another split"
    for words, seen in (("in two splits", across), ("real and fake", counted["alike"]["across_labels"])):
        for one, other in seen["examples"]:
            yield f"  {words}: {printable(one)} and {printable(other)}"


def _metadata(result: dict[str, Any]) -> Iterator[str]:
    groups = {name: group["metadata"] for name, group in result["generators"].items()}
    lenders = {name: group["reals_of"] for name, group in result["generators"].items() if group["reals_of"]}
    rows = [[short_name(name), *_measured(measured)] for name, measured in groups.items()]
    rows.append(["all generators", *_measured(result["everything"]["metadata"])])
    yield "how well metadata alone separate real from fake (cross-validated AUROC), and each single value:"
    heading = ["generator", "real", "fake", "AUROC", "95 %", *map(_heading, metadata_bias.SINGLE), "causes"]
    yield from aligned([heading, *rows])
    yield f"causes: metadata that suffice alone, if the interval lies above {metadata_bias.BOUND}"
    for lender in sorted(set(lenders.values())):
        borrowers = ", ".join(short_name(name) for name in lenders if lenders[name] == lender)
        yield f"compared with the reals of {short_name(lender)}, as its benchmark does: {borrowers}"
    reasons = {name: measured["undefined"] for name, measured in groups.items() if measured["undefined"]}
    for reason in sorted(set(reasons.values())):
        yield f"{UNDEFINED}: {reason}: {', '.join(short_name(name) for name in reasons if reasons[name] == reason)}"
    if matched := [
        short_name(name) for name, measured in groups.items() if measured["interval"] and measured["interval"][1] < 0.5
    ]:
        yield (
            "AUROC below 0.5: the rule does not generalise (for example, each real has a fake of the same size); treat "
            f"as no signal: {', '.join(matched)}"
        )


def _aligned(result: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Metadata of the files that an alignment makes, beside those of the files as they are."""
    measured = {name: (result["generators"][name], group) for name, group in after["generators"].items()}
    measured["all generators"] = (result["everything"], after["everything"])
    rows = [
        [short_name(name), *_auroc(raw["metadata"]), *_measured(group["metadata"])[2:]]
        for name, (raw, group) in measured.items()
    ]
    yield f"the same for the files that {after['transform']} makes of the images, beside the files as they are (raw):"
    heading = ["generator", "raw", "95 %", "AUROC", "95 %", *map(_heading, metadata_bias.SINGLE), "causes"]
    yield from aligned([heading, *rows])
    yield from _failed(after)
    if after["not_examined"]:
        yield f"  {after['not_examined']:,} images were not examined under it and are not counted in it"


def _auroc(measured: dict[str, Any]) -> Row:
    interval = measured["interval"]
    return [_number(measured["auroc"]), f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else UNDEFINED]


def _measured(measured: dict[str, Any]) -> Row:
    return [
        f"{measured['real']:,}",
        f"{measured['fake']:,}",
        *_auroc(measured),
        *(_number(measured["single"][name]) for name in metadata_bias.SINGLE),
        _causes(measured) if measured["biased"] else "",
    ]


def _heading(name: str) -> str:
    return {"bytes per pixel": "bytes/px", "JPEG quality": "quality"}.get(name, name)


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}"
