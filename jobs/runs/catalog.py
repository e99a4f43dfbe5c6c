"""Catalog of published runs: their records and rows, for this program and external readers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.runs.products import VERDICTS, Product
from jobs.runs.records import effective, runs_of, stored
from jobs.runs.rows import read_rows
from jobs.storage import parquet, uris
from jobs.storage.database import last_of_each
from jobs.storage.uris import Uri
from nsnet import provenance
from nsnet.errors import SourceError

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset


def summary(record: dict[str, Any]) -> str:
    """A run's result in a few lines."""
    counts = record["counts"]
    parts = [f"{number} {verdict}" for verdict, number in counts["verdict"].items()]
    parts.append(f"{counts['status'].get('failed', 0)} failed")
    lines = [f"{record['rows']:,} rows in {record['seconds']:.1f} s: {', '.join(parts)}"]
    lines += [f"  failed with {name}: {number}" for name, number in counts["error_class"].items()]
    for name, of in (("digital_source_type", "stated as"), ("metadata_generator", "metadata of")):
        lines += [f"  {of} {value}: {number}" for value, number in counts.get(name, {}).items()]
    lines += [
        f"  content credentials {state}: {number}"
        for state, number in counts.get("c2pa_state", {}).items()
        if state != provenance.NONE
    ]
    if asked_again := record["store"]["asked_again"]:
        lines.append(f"  images fetched with retries: {asked_again}")
    if reused := record.get("captions", {}).get("reused"):
        lines.append(f"  captions of other runs: {reused}")
    lines += [f"  left out of the source, {reason}: {number}" for reason, number in record["left_out"].items()]
    return "\n".join(lines)


def records(out: Uri) -> list[dict[str, Any]]:
    """Records of all published runs of all products below an output, oldest first. Do not change them."""
    return runs_in(stored(out))


def runs_in(those: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all runs in stored records, oldest first, each once."""
    found = [run for record in effective(those) for run in runs_of(record)]
    return sorted(found, key=lambda run: str(run["run_id"]))


def runs(out: Uri, product: Product = VERDICTS) -> list[dict[str, Any]]:
    """Records of a product's published runs below an output, oldest first; a run with nothing to do has no files."""
    return [record for record in records(out) if record.get("product", VERDICTS.name) == product.name]


def run_ids(out: Uri, product: Product, maker: str) -> set[str]:
    """Ids of one maker's runs (such as a detector's) that published any rows."""
    return {record["run_id"] for record in runs(out, product) if record.get(product.maker) == maker and record["files"]}


def paths(out: Uri, records: Iterable[dict[str, Any]]) -> list[str]:
    """URIs of the files with the rows of these runs, each once: runs of a merged record share files."""
    return list(dict.fromkeys(uris.join(out, file["path"]) for record in records for file in record["files"]))


def verdicts(out: Uri) -> "Dataset":
    """The verdicts of all published runs, oldest first, as an Arrow dataset; raises `SourceError` if there are none.

    An image that was scored again (`--retry-failed`, `--rescore`, another detector) has a row in each run.
    """
    files = paths(out, runs(out))
    if not files:
        raise SourceError(f"{out} holds no published verdicts")
    return parquet.dataset(files, schema.VERDICTS)


def published(
    out: Uri, columns: pa.Schema, product: Product = VERDICTS, **keys: str | None
) -> Iterator[pa.RecordBatch]:
    """Stream columns of the published runs of a product, oldest first.

    `keys`: values that their records must have, such as `detector_id`; None: any value.
    """
    chosen = [
        record for record in runs(out, product) if all(value in (None, record.get(key)) for key, value in keys.items())
    ]
    yield from read_rows(out, chosen, columns)


def newest(out: Uri, columns: pa.Schema, product: Product = VERDICTS, **keys: str | None) -> Iterator[pa.RecordBatch]:
    """Stream columns of the newest published row of each image and maker.

    `keys`: as in `published`. A changed or transformed image has another `image_id`. Yields no batch if there is no
    run.
    """
    key = [name for name in ("image_id", product.maker) if name in product.columns.names]
    read = [*columns, *(product.columns.field(name) for name in key if name not in columns.names)]
    yield from last_of_each(published(out, pa.schema(read), product, **keys), pa.schema(read), key, columns.names)


def untransformed(out: Uri, columns: pa.Schema, product: Product, maker: str) -> Iterator[pa.RecordBatch]:
    """Stream a maker's published rows of untransformed images, oldest run first."""
    read = columns if "transform" not in product.columns.names else pa.schema([*columns, schema.TRANSFORM])
    for batch in published(out, read, product, **{product.maker: maker}):
        if "transform" in read.names:
            batch = batch.filter(pc.is_null(batch.column("transform")))
        yield batch.select(columns.names)
