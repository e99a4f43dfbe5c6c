"""`nsnet evaluate`: verdicts against labels, per generator and as the unweighted mean over generators, as a report."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.console import main, output, parameters
from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, write_manifest
from jobs.evaluation import groups, verdicts
from jobs.evaluation.comparison import SAMPLES, compare, long_table
from jobs.evaluation.curves import curves
from jobs.evaluation.verdicts import NoVerdictsError
from jobs.report.text import as_text
from jobs.storage import bundles, parquet, probes, uris, writing
from nsnet import transforms
from nsnet.errors import ConfigError, SourceError

STANDARD: Final = "standard"
AUTO: Final = "auto"
EVERY_SPLIT: Final = "all"

Pairs = Mapping[str, str] | Literal["auto"]


@click.command()
@click.argument("verdicts_or_source", metavar="VERDICTS_OR_SOURCE")
@click.option("--out", required=True, help="Folder for evaluation.json, .txt and .parquet, and for report.html.")
@click.option("--detector", default=None, help="Bundle that scores the pictures, when a labelled source is given.")
@click.option("--detector-id", default=None, help="Only verdicts of this detector, where several have scored.")
@click.option(
    "--robustness", is_flag=False, flag_value=STANDARD, default=None, metavar="[standard|CHAIN,…]",
    help="Score each picture under these transforms as well, such as jpeg:75,resize:0.5+jpeg:75.",
)  # fmt: skip
@click.option(
    "--pair", "pairs", multiple=True, metavar="FAKE=REAL",
    help="Compare a generator with fakes only with the reals of another; several; auto: as benchmarks do.",
)  # fmt: skip
@click.option("--split", default=None, help="Rows of this split, or all. Default: test, where there is one.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=None,
    help="Call fake from this probability on, as benchmarks do with 0.5, whatever the detector said.",
)  # fmt: skip
@click.option("--samples", default=SAMPLES, show_default=True, help="Bootstrap samples of the intervals.")
@parameters.max_failed_option
@parameters.column_option
@parameters.max_left_out_option
@parameters.weights_options
@parameters.address_option
def command(
    verdicts_or_source: str, out: str, pairs: tuple[str, ...], max_failed: float, max_left_out: int, **options: Any
) -> int:
    """Compare published verdicts (an output of `nsnet score`, or a Parquet file of it) with their labels.

    Given a labelled source of pictures instead, with --detector, scores it first, below OUT; the same command
    continues. Labels, generators and splits are then those that the source gives now. The predictions of a training
    (OUT.training/predictions.parquet) are verdicts as well.
    """
    result = evaluate(verdicts_or_source, out=out, pairs=parse_pairs(pairs), **options)
    if result["source"] is None:  # whoever scored was told
        return 0
    failed, all_scored = result["failed"], result["all"]["real"] + result["all"]["fake"]
    failed_code = main.exit_code({"status": {"failed": failed}}, all_scored + failed, max_failed)
    return max(failed_code, main.left_out_code(result, max_left_out))


def parse_pairs(texts: Sequence[str]) -> Pairs:
    """`FAKE=REAL` each, or `auto` alone."""
    if list(texts) == [AUTO]:
        return "auto"
    parts = {text: text.partition("=") for text in texts}
    for text, (fake, _, real) in parts.items():
        if not fake or not real:
            raise ConfigError(f"--pair {text}: give FAKE=REAL, or auto alone")
    pairs = {fake: real for fake, _, real in parts.values()}
    if len(pairs) < len(texts):
        raise ConfigError("--pair: a generator is given twice, it can have one partner only")
    return pairs


def parse_chains(text: str) -> tuple[str, ...]:
    """Chains of transforms, separated by commas, or those of `standard`."""
    if text == STANDARD:
        return transforms.ROBUSTNESS
    chains = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in chains:
        raise ConfigError(f"--robustness {text!r}: give {STANDARD}, or chains such as jpeg:75,resize:0.5+jpeg:75")
    for chain in chains:
        transforms.parse(chain)
    return chains


def evaluate(
    verdicts_or_source: str,
    *,
    out: str,
    detector: str | None = None,
    detector_id: str | None = None,
    robustness: str | None = None,
    pairs: Pairs | None = None,
    split: str | None = None,
    threshold: float | None = None,
    samples: int = SAMPLES,
    columns: tuple[str, ...] = (),
    clip_weights: str | None = None,
    captioner: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluate and write the result; returns it. Raises `SourceError` where there is nothing to compare."""
    chains = parse_chains(robustness) if robustness is not None else ()
    uri, out = uris.absolute(verdicts_or_source), uris.absolute(out)
    probes.reachable(uri)
    probes.check_output(out)
    if detector is not None:
        own = _id_of(detector)
        if detector_id not in (None, own):
            raise ConfigError(f"--detector {detector} is {own}, not {detector_id}: give one of them")
        detector_id = own
    source = None
    unread: dict[str, Any] = {"unread": [], "unread_count": 0}
    try:
        table = verdicts.read(uri)
    except NoVerdictsError as error:
        if detector is None:
            raise SourceError(f"{error}; to score its pictures first, give --detector") from error
        settings = {"clip_weights": clip_weights, "captioner": captioner, "address": address}
        selection = Selection(columns=columns)
        source = uri
        table, unread = _score(uri, detector, uris.join(out, "scored"), chains, selection, settings)
    table = _of_detector(table, detector_id, uri)
    table, rows = _of_split(table, split, uri)
    if chains:
        table = _of_chains(table, chains, uri)
    if threshold is not None:
        table = _decided(table, threshold)
    found = groups.find_pairs(table) if pairs == AUTO else dict(pairs or {})
    names = pc.unique(table.column("detector_id")).to_pylist()
    result = {
        "verdicts": uri,
        "source": source,
        **unread,
        "detector_id": names[0] if names else None,
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "threshold": threshold,
        **compare(table, samples=samples, pairs=found),
        "curves": curves(table),
    }
    _write(result, out)
    return result


def _id_of(detector: str) -> str:
    from nsnet import bundle

    folder = bundles.fetch_bundle(uris.absolute(detector), bundle.DESCRIPTION)
    return bundle.read(folder).detector_id


def _score(
    source: str, detector: str, out: str, chains: Sequence[str], selection: Selection, settings: dict[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """Verdicts on the pictures that a source holds now, and what of it could not be read."""
    from jobs.score import score

    record = score(source, detector=detector, out=out, transforms=chains, selection=selection, **settings)
    unread = {name: record[name] for name in ("unread", "unread_count")}
    return _as_listed(verdicts.read(out), source, chains, selection), unread


def _as_listed(table: pa.Table, source: str, chains: Sequence[str], selection: Selection) -> pa.Table:
    """The verdicts of those pictures that a source holds now, with the labels, generators and splits it gives now."""
    columns = pa.schema([schema.MANIFEST.field(name) for name in ("image_id", "label", "generator", "split")])
    with tempfile.TemporaryDirectory(prefix="nsnet-evaluate-") as folder:
        manifest = uris.join(uris.absolute(folder), "manifest.parquet")
        write_manifest(source, manifest, selection, transforms=("", *chains))
        listed = pa.Table.from_batches(parquet.read(manifest, columns), columns)
    kept = [name for name in table.column_names if name == "image_id" or name not in columns.names]
    return table.select(kept).join(listed, keys="image_id", join_type="inner")


def _of_detector(table: pa.Table, detector_id: str | None, uri: str) -> pa.Table:
    """The verdicts of one detector."""
    if detector_id is not None:
        table = table.filter(pc.equal(table.column("detector_id"), detector_id))
        if table.num_rows == 0:
            raise ConfigError(f"{uri} holds no verdict of detector {detector_id}")
    detectors = sorted(pc.unique(table.column("detector_id")).to_pylist(), key=str)
    if len(detectors) > 1:
        raise ConfigError(
            f"verdicts of several detectors ({', '.join(map(str, detectors))}): choose one with --detector-id"
        )
    return table


def _of_split(table: pa.Table, split: str | None, uri: str) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of a split, and what is told of them. What was trained on, or chosen by, says little of a detector."""
    splits = table.column("split") if "split" in table.column_names else pa.array([None] * table.num_rows)
    present: set[Any] = set(pc.unique(splits).to_pylist())
    named = sorted(present - {None})
    chosen = ("test" if "test" in named else EVERY_SPLIT) if split is None else split
    if chosen == EVERY_SPLIT:
        # a benchmark may have no more than one: then that is what these rows are of
        alone = named[0] if present == {*named} and len(named) == 1 else None
        return table, {"split": alone, "used": table.num_rows, "left_out": 0, "seen": _seen(named)}
    if chosen not in named:
        there = f"there are {', '.join(named)}" if named else "its rows have no split"
        raise ConfigError(f"{uri} holds no verdict of the split {chosen}: {there}")
    kept = table.filter(pc.equal(splits, chosen))
    say(f"rows: {kept.num_rows:,} of the split {chosen}; {table.num_rows - kept.num_rows:,} others are left out")
    left_out = table.num_rows - kept.num_rows
    return kept, {"split": chosen, "used": kept.num_rows, "left_out": left_out, "seen": _seen([chosen])}


def _seen(splits: Sequence[str]) -> list[str]:
    """Those that a training, or the choice of its threshold, has seen."""
    return [name for name in splits if name in ("train", "val")]


def _decided(table: pa.Table, threshold: float) -> pa.Table:
    """The same rows with the verdicts of a threshold; none is uncertain."""
    said = pc.if_else(pc.greater_equal(table.column("prob_fake"), threshold), "fake", "real")
    table = table.set_column(table.schema.get_field_index("verdict"), "verdict", said)
    thresholds = pa.array([threshold] * table.num_rows, pa.float64())
    kept = table.drop_columns("threshold") if "threshold" in table.column_names else table
    return kept.append_column("threshold", thresholds)


def _of_chains(table: pa.Table, chains: Sequence[str], uri: str) -> pa.Table:
    """The rows of pictures as they are, and under these transforms, which must all be there."""
    present = groups.transforms_of(table)
    missing = [chain for chain in chains if chain not in set(pc.unique(present).to_pylist())]
    if missing:
        raise ConfigError(
            f"--robustness: {uri} holds no verdicts under {', '.join(missing)}; give the source of the pictures, and "
            "--detector to score them"
        )
    return table.filter(pc.is_in(present, pa.array([groups.UNTRANSFORMED, *chains])))


def _write(result: dict[str, Any], out: str) -> None:
    from jobs.report.page import render  # matplotlib takes a second to import

    text, page = as_text(result), render(result)
    writing.write_json(uris.join(out, "evaluation.json"), result)
    writing.write_bytes(uris.join(out, "evaluation.txt"), (text + "\n").encode())
    rows = io.BytesIO()
    pq.write_table(long_table(result), rows)
    writing.write_bytes(uris.join(out, "evaluation.parquet"), rows.getvalue())
    writing.write_bytes(uris.join(out, "report.html"), page.encode())
    output.show(text)
    say(f"table: {uris.join(out, 'evaluation.json')}\nreport: {uris.join(out, 'report.html')}")


if __name__ == "__main__":
    main.run(command, "nsnet evaluate")
