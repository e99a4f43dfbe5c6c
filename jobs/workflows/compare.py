"""Compare the verdicts that two detectors published in an output, as after a shadow run."""

import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from jobs.console import output, tables
from jobs.evaluation import flips
from jobs.evaluation.flips import CLASSES
from jobs.runs import catalog
from jobs.storage import parquet, probes, uris, writing
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError, SourceError

EXAMPLES: Final = 20
MAX_NAMED: Final = 8
"""Detectors that a message names."""
MAX_CAPTION_LETTERS: Final = 60
COMPARISON_FILE: Final = "compare.json"
FLIPS_FILE: Final = "flips.parquet"


def compare_detectors(
    out: Uri, detectors: Sequence[str] = (), *, examples: int = EXAMPLES, report: Uri | None = None
) -> dict[str, Any]:
    """The comparison (`flips.compare`) of two detectors of an output; JSON-ready.

    `detectors`: ids or unique beginnings of ids, the one in use first; none: the two that there are, the older first.
    `report`: folder for `COMPARISON_FILE` and all flips. Raises `SourceError` if there are no verdicts, `ConfigError`
    if the detectors are not two of its detectors.
    """
    probes.reachable(out)
    if report is not None:
        probes.check_output(report)
    present = list(
        dict.fromkeys(str(run["detector_id"]) for run in catalog.runs(out) if run["files"] and "detector_id" in run)
    )
    if not present:
        raise SourceError(f"{out} holds no published verdicts")
    one, two = _chosen(out, present, detectors)
    with tempfile.TemporaryDirectory(prefix="nsnet-compare-") as scratch:
        written = Path(scratch) / FLIPS_FILE

        def write(rows: Iterable[pa.RecordBatch]) -> None:
            if report is not None:
                parquet.write(rows, flips.FLIPS, str(written))

        result = {
            "output": out,
            "detectors": {"a": one, "b": two},
            "compared_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **flips.compare(
                catalog.newest(out, flips.READ, detector_id=one),
                catalog.newest(out, flips.READ, detector_id=two),
                catalog.published(out, flips.SHOWN, detector_id=two),
                examples=examples,
                write=write,
            ),
        }
        if not result["images"]["both"]:
            raise SourceError(f"{out}: {one} and {two} have judged no image both: score with both in one pass")
        if report is not None:  # nothing is written there before the comparison is complete
            writing.upload_file(written, uris.join(report, FLIPS_FILE))
            writing.write_json(uris.join(report, COMPARISON_FILE), result)
    return result


def _chosen(out: Uri, present: Sequence[str], wanted: Sequence[str]) -> tuple[str, str]:
    shown = ", ".join(present[:MAX_NAMED]) + (f" and {len(present) - MAX_NAMED} more" * (len(present) > MAX_NAMED))
    if not wanted and len(present) == 2:
        return present[0], present[1]
    if len(wanted) != 2:
        raise ConfigError(f"{out} holds verdicts of {shown}: choose two with --detectors A,B")
    found = []
    for name in wanted:
        matches = [one for one in present if one == name] or [one for one in present if name and one.startswith(name)]
        if len(matches) != 1:
            problem = "begins several detectors" if matches else "is no detector"
            raise ConfigError(f"--detectors: {name!r} {problem} of {out}, which holds verdicts of {shown}")
        found.append(matches[0])
    if found[0] == found[1]:
        raise ConfigError(f"--detectors: both name {found[0]}: give two detectors")
    return found[0], found[1]


def as_text(result: dict[str, Any]) -> str:
    """The comparison for the console."""
    images, all_flips, agreement = result["images"], result["flips"], result["agreement"]
    lines = [
        *(f"{which.upper()}: {output.printable(name)}" for which, name in result["detectors"].items()),
        f"images: {images['both']:,} judged by both, {images['only_a']:,} by A alone, {images['only_b']:,} by B alone",
        f"flips: {all_flips['flips']:,} ({_percent(all_flips['share'])})",
        f"agreement of images that both scored: {_percent(agreement['share'])}, Cohen's kappa "
        f"{_interval(agreement, 'kappa', _number)}",
        "",
        *_flip_table(all_flips["table"]),
        "",
        *_rates(result),
        "",
        *_shifts(result["shift"]),
        _same_share(result),
    ]
    if result["labelled"] is not None:
        lines += ["", *_groups(result)]
    if result["examples"]:
        lines += ["", f"the {len(result['examples'])} largest flips:", *_examples(result["examples"])]
    return "\n".join(lines)


def _flip_table(table: dict[str, dict[str, int]]) -> list[str]:
    rows = [("A \\ B", *CLASSES), *((said, *(f"{table[said][other]:,}" for other in CLASSES)) for said in CLASSES)]
    return tables.aligned(rows)


def _rates(result: dict[str, Any]) -> list[str]:
    named = {"called fake": result["flagged"]}
    if labelled := result["labelled"]:
        named |= {"accuracy": labelled["accuracy"], "fakes found": labelled["tpr"], "reals flagged": labelled["fpr"]}
    rows = [("share of images", "A", "B", "B - A", "p")]
    for name, rate in named.items():
        rows.append(
            (
                name, _interval(rate["a"]), _interval(rate["b"]), _interval(rate["difference"]),
                tables.UNDEFINED if rate["p_value"] is None else f"{rate['p_value']:.2g}",
            )
        )  # fmt: skip
    return tables.aligned(rows)


def _shifts(shift: dict[str, Any]) -> list[str]:
    quantiles = [f"{q * 100:g} %" for q in flips.QUANTILES]
    rows = [("B - A", "mean", "mean size", *quantiles)]
    for name, values in shift.items():
        numbers = [
            values["mean"],
            values["mean_absolute"],
            *(values["quantiles"].get(f"{q:g}") for q in flips.QUANTILES),
        ]
        rows.append((name, *map(_number, numbers)))
    return tables.aligned(rows)


def _same_share(result: dict[str, Any]) -> str:
    same = result["same_share"]
    if same["threshold"] is None:
        return "no threshold of B flags as few images as A"
    return (
        f"B flags no more images than A from the threshold {same['threshold']:.4f} on: {same['flagged']:,}, "
        f"where A flags {same['flagged_by_a']:,}"
    )


def _groups(result: dict[str, Any]) -> list[str]:
    rows = [("flips by", "images", "flips", "share", "real to fake", "fake to real")]
    for name, group in [*result["by_label"].items(), *result["by_generator"].items()]:
        table = group["table"]
        rows.append(
            (
                tables.short_name(name), f"{group['images']:,}", f"{group['flips']:,}", _percent(group["share"]),
                f"{table['real']['fake']:,}", f"{table['fake']['real']:,}",
            )
        )  # fmt: skip
    return tables.aligned(rows)


def _examples(examples: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in examples:
        said = [f"{row[f'said_{which}']} {_number(row[f'prob_fake_{which}'])}" for which in "ab"]
        caption = (row["caption"] or "")[:MAX_CAPTION_LETTERS]
        transform = f" [{row['transform']}]" if row["transform"] else ""
        lines.append(f"  {said[0]} -> {said[1]}  {row['uri']}{transform}" + (f"  ({caption})" if caption else ""))
    return [output.printable(line) for line in lines]  # a caption or a name may hold line breaks


def _percent(value: float | None) -> str:
    return tables.UNDEFINED if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return tables.UNDEFINED if value is None else f"{value:.3f}"


def _interval(values: dict[str, Any], name: str = "value", show: Any = _percent) -> str:
    """A value with its interval."""
    if values[name] is None:
        return tables.UNDEFINED
    return f"{show(values[name])} ({show(values['low'])} to {show(values['high'])})"
