"""Catalog of published runs: their records and rows, for this program and external readers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.runs import names
from jobs.runs.products import PRODUCTS, VERDICTS, Product, final_folder
from jobs.storage import errors, listing, parquet, reading, uris
from jobs.storage.database import last_of_each
from jobs.storage.uris import Uri
from nsnet import provenance
from nsnet.errors import SourceError, StorageError

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
    """Records of all published runs of all products below an output, oldest first."""
    folder = uris.join(out, "runs")
    below = listing.names_below(folder)
    record_names = [name for name in below.files + below.others if names.RECORD.fullmatch(name)]  # includes links
    with ThreadPoolExecutor(parquet.READERS) as pool:
        return list(pool.map(_record, [uris.join(folder, name) for name in sorted(record_names)]))


def runs(out: Uri, product: Product = VERDICTS) -> list[dict[str, Any]]:
    """Records of a product's published runs below an output, oldest first; a run with nothing to do has no files."""
    return [record for record in records(out) if record.get("product", VERDICTS.name) == product.name]


def run_ids(out: Uri, product: Product, maker: str) -> set[str]:
    """Ids of one maker's runs (such as a detector's) that published any rows."""
    return {record["run_id"] for record in runs(out, product) if record.get(product.maker) == maker and record["files"]}


def _record(uri: str) -> dict[str, Any]:
    """A validated record. Others may write to the bucket, so a record must name only files of its own run."""
    remedy = "restore it from a copy, or remove it and its files to judge their images again"
    record: dict[str, Any] = reading.read_json(uri, {"run_id": str, "files": list}, remedy)
    run_id, product = record["run_id"], record.get("product", VERDICTS.name)
    if not names.is_run_id(run_id) or not uri.endswith(f"/{run_id}.json"):
        raise reading.damaged(uri, f"it belongs to the run {run_id!r}", remedy)
    if type(product) is not str:
        raise reading.damaged(uri, f"its product is {product!r}", remedy)
    if product in PRODUCTS:  # other products come from other versions and are not read
        for name in ("counts", "settings", "versions"):
            if type(record.get(name, {})) is not dict:
                raise reading.damaged(uri, f"its {name} is a {type(record[name]).__name__} instead of a dict", remedy)
        folder = f"{final_folder(product, run_id)}/"
        for file in record["files"]:
            if type(file) is not dict:
                raise reading.damaged(uri, f"one of its files is {file!r}", remedy)
            path = file.get("path")
            if type(path) is not str or not path.startswith(folder) or not _is_name(path.removeprefix(folder)):
                raise reading.damaged(uri, f"it names {path!r}, which is not a file of its run", remedy)
    return record


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not {"/", "\0"} & set(text)


def verdicts(out: Uri) -> "Dataset":
    """The verdicts of all published runs, oldest first, as an Arrow dataset; raises `SourceError` if there are none.

    An image that was scored again (`--retry-failed`, `--rescore`, another detector) has a row in each run.
    """
    paths = [uris.join(out, file["path"]) for record in runs(out) for file in record["files"]]
    if not paths:
        raise SourceError(f"{out} holds no published verdicts")
    return parquet.dataset(paths, schema.VERDICTS)


def published(
    out: Uri, columns: pa.Schema, product: Product = VERDICTS, **keys: str | None
) -> Iterator[pa.RecordBatch]:
    """Stream columns of the published runs of a product, oldest first.

    `keys`: values that their records must have, such as `detector_id`; None: any value.
    """
    for record in runs(out, product):
        if any(value not in (None, record.get(key)) for key, value in keys.items()):
            continue
        yield from rows_of(out, record, columns)


def newest(out: Uri, columns: pa.Schema, product: Product = VERDICTS, **keys: str | None) -> Iterator[pa.RecordBatch]:
    """Stream columns of the newest published row of each image and maker.

    `keys`: as in `published`. A changed or transformed image has another `image_id`. Yields no batch if there is no
    run.
    """
    key = [name for name in ("image_id", product.maker) if name in product.columns.names]
    read = [*columns, *(product.columns.field(name) for name in key if name not in columns.names)]
    yield from last_of_each(published(out, pa.schema(read), product, **keys), pa.schema(read), key, columns.names)


def rows_of(out: Uri, record: dict[str, Any], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Columns of a published run, null where a file lacks them. Raises `StorageError` for a missing or damaged file."""
    for file in record["files"]:
        uri = uris.join(out, file["path"])
        try:
            yield from parquet.read(uri, columns, optional=columns.names)
        except FileNotFoundError as error:
            raise StorageError(
                f"{uri} is missing, but its record runs/{record['run_id']}.json exists: remove the record as well"
            ) from error
        except pa.ArrowInvalid as error:
            raise reading.damaged(
                uri,
                errors.reason(error),
                f"restore it from a copy, or remove it and its record runs/{record['run_id']}.json to do its images "
                "again",
            ) from error


def untransformed(out: Uri, columns: pa.Schema, product: Product, maker: str) -> Iterator[pa.RecordBatch]:
    """Stream a maker's published rows of untransformed images, oldest run first."""
    read = columns if "transform" not in product.columns.names else pa.schema([*columns, schema.TRANSFORM])
    for batch in published(out, read, product, **{product.maker: maker}):
        if "transform" in read.names:
            batch = batch.filter(pc.is_null(batch.column("transform")))
        yield batch.select(columns.names)
