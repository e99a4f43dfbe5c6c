"""Evaluate verdicts, or a source that is scored first, against labels; write JSON, a table and an HTML report."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.console import output, summary
from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, write_manifest
from jobs.evaluation import groups, verdicts
from jobs.evaluation.alignment import compare_aligned
from jobs.evaluation.claims import stated
from jobs.evaluation.comparison import SAMPLES, compare, long_table
from jobs.evaluation.curves import curves
from jobs.evaluation.filters import decided, of_chains, of_detector, of_split
from jobs.evaluation.verdicts import NoVerdictsError
from jobs.evaluation.views import stability
from jobs.pipeline.models import Models
from jobs.report.text import as_text
from jobs.storage import bundles, parquet, probes, uris, writing
from jobs.storage.uris import Uri
from jobs.workflows import leakage as sample
from jobs.workflows.score import score
from nsnet import alignment, bundle, transforms
from nsnet.errors import ConfigError, SourceError

SETS: Final = {"standard": (*transforms.ROBUSTNESS, *transforms.SOCIAL), "social": transforms.SOCIAL}
"""Name -> its chains of transforms."""
STANDARD: Final = "standard"
AUTO: Final = "auto"
Pairs = Mapping[str, str] | Literal["auto"]


def parse_pairs(texts: Sequence[str]) -> Pairs:
    """Parse pairs, each `FAKE=REAL`, or `auto` alone."""
    if list(texts) == [AUTO]:
        return "auto"
    parts = {text: text.partition("=") for text in texts}
    for text, (fake, _, real) in parts.items():
        if not fake or not real:
            raise ConfigError(f"--pair {text}: give FAKE=REAL, or auto alone")
    pairs = {fake: real for fake, _, real in parts.values()}
    if len(pairs) < len(texts):
        raise ConfigError("--pair: a generator can have one partner only: give each FAKE once")
    return pairs


def parse_chains(text: str) -> tuple[str, ...]:
    """Parse chains of transforms and names of `SETS`, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    chains = tuple(dict.fromkeys(chain for part in parts for chain in SETS.get(part, (part,))))
    if "" in chains:
        raise ConfigError(
            f"--robustness {text!r}: give {' or '.join(SETS)}, or chains such as jpeg:75,resize:0.5+jpeg:75"
        )
    for chain in chains:
        transforms.parse(chain)
    return chains


def evaluate(
    verdicts_or_source: Uri,
    *,
    out: Uri,
    detector: Uri | None = None,
    detector_id: str | None = None,
    detector_sha256: str | None = None,
    align: str | None = None,
    robustness: str | None = None,
    pairs: Pairs | None = None,
    split: str | None = None,
    threshold: float | None = None,
    samples: int = SAMPLES,
    leakage: int = 0,
    views: int | None = None,
    columns: tuple[str, ...] = (),
    clip_weights: Uri | None = None,
    text_weights: Uri | None = None,
    captioner: Uri | None = None,
    weights: Uri | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluate, write the result and return it. Raises `SourceError` if there is nothing to compare.

    `align`: a chain of `nsnet.alignment`; images are compared raw and aligned, and `robustness` follows it. `leakage`:
    images of the source by which it is measured what the features say of their content; 0: it is not. `views`: as in
    `score`.
    """
    if leakage and detector is None:
        raise ConfigError(f"--leakage {leakage}: verdicts hold no features; give a source of images and --detector")
    if detector_sha256 is not None and detector is None:
        raise ConfigError("--detector-sha256: it pins the bundle of --detector; give that as well")
    if views and detector is None:
        raise ConfigError(f"--views {views}: verdicts are made already; give a source of images and --detector")
    chains = parse_chains(robustness) if robustness is not None else ()
    if align is not None:
        alignment.parse(align)
        chains = (align, *(f"{align}+{chain}" for chain in chains))
    uri = verdicts_or_source
    probes.reachable(uri)
    probes.check_output(out)
    if detector is not None:
        bundle_id = _bundle_id(detector, detector_sha256)
        if detector_id not in (None, bundle_id):
            raise ConfigError(f"--detector {detector} is {bundle_id}, not {detector_id}: give one of them")
        detector_id = bundle_id
    source = None
    unread: dict[str, Any] = {"unread": [], "unread_count": 0}
    measured = {}
    try:
        table = verdicts.read(uri)
    except NoVerdictsError as error:
        if detector is None or detector_id is None:
            raise SourceError(f"{error}; to score its images first, give --detector") from error
        settings = {
            "clip_weights": clip_weights, "text_weights": text_weights, "captioner": captioner, "address": address,
            "views": views, "weights": weights, "pin": detector_sha256,
        }  # fmt: skip
        selection = Selection(columns=columns)
        source = uri
        place = uris.join(out, f"scored-{views}-views" if views else "scored")  # images are judged once below a place
        with tempfile.TemporaryDirectory(prefix="nsnet-evaluate-") as folder:
            manifest = uris.join(folder, "manifest.parquet")
            table, unread = _score(uri, detector, place, chains, selection, settings, manifest)
            table, rows = of_split(of_detector(table, detector_id, uri), split, uri)
            if leakage:
                models = Models(
                    detector=detector, detector_sha256=detector_sha256, clip_weights=clip_weights,
                    text_weights=text_weights, weights=weights,
                )  # fmt: skip
                drawn = sample.draw(table, leakage)
                say(f"leakage: encoding {len(drawn):,} images again, in this process")
                measured = {"leakage": sample.measure(manifest, drawn, uri, place, detector_id, models)}
    else:
        if views:
            raise ConfigError(f"--views {views}: {uri} holds verdicts, which are made already; give their source")
        if leakage:
            raise ConfigError(f"--leakage {leakage}: {uri} holds verdicts, which hold no features; give their source")
        table, rows = of_split(of_detector(table, detector_id, uri), split, uri)
    if chains:
        table = of_chains(table, chains, uri)
    if threshold is not None:
        table = decided(table, threshold)
    partners = groups.find_pairs(table) if pairs == AUTO else dict(pairs or {})
    names = pc.unique(table.column("detector_id")).to_pylist()
    result = {
        "verdicts": uri,
        "source": source,
        **unread,
        "detector_id": names[0] if names else None,
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "threshold": threshold,
        **compare(table, samples=samples, pairs=partners, align=align or ""),
        "alignment": compare_aligned(table, align, samples=samples, pairs=partners) if align else None,
        "curves": curves(table),
        "views": stability(table, samples=samples),
        "provenance": stated(table),
        **measured,
    }
    _write(result, out)
    return result


def _bundle_id(detector: Uri, pin: str | None) -> str:
    folder = bundles.fetch_bundle(detector, bundle.DESCRIPTION, pin)
    return bundle.read(folder, pin).detector_id


def _score(
    source: Uri,
    detector: Uri,
    out: Uri,
    chains: Sequence[str],
    selection: Selection,
    settings: dict[str, Any],
    manifest: str,
) -> tuple[pa.Table, dict[str, Any]]:
    """Verdicts on the source's current images, and its unreadable folders and containers."""
    record = score(source, detector=detector, out=out, transforms=chains, selection=selection, **settings)
    unread = {name: record[name] for name in ("unread", "unread_count")}
    return _as_listed(verdicts.read(out), source, chains, selection, manifest), unread


def _as_listed(table: pa.Table, source: Uri, chains: Sequence[str], selection: Selection, manifest: str) -> pa.Table:
    """The verdicts on the source's current images, with its current labels, generators and splits.

    `manifest`: local file for its list.
    """
    columns = pa.schema([schema.MANIFEST.field(name) for name in ("image_id", "label", "generator", "split")])
    write_manifest(source, manifest, selection, transforms=("", *chains))
    listed = pa.Table.from_batches(parquet.read(manifest, columns), columns)
    kept = [name for name in table.column_names if name == "image_id" or name not in columns.names]
    return table.select(kept).join(listed, keys="image_id", join_type="inner")


def _write(result: dict[str, Any], out: Uri) -> None:
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
    summary.note(
        evaluation=uris.join(out, "evaluation.json"), report=uris.join(out, "report.html"),
        detector_id=result["detector_id"], rows=result["rows"], failed=result["failed"],
        **{name: result["all"].get(name) for name in ("real", "fake", "ap", "auroc", "acc")},
    )  # fmt: skip
