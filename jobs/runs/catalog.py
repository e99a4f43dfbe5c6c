"""What was published: records of runs, and the rows that they name, for this program and for readers from outside."""

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
from nsnet.errors import SourceError, StorageError

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset


def summary(record: dict[str, Any]) -> str:
    """What came out, in a few lines."""
    counts = record["counts"]
    parts = [f"{number} {verdict}" for verdict, number in counts["verdict"].items()]
    parts.append(f"{counts['status'].get('failed', 0)} failed")
    lines = [f"{record['rows']:,} rows in {record['seconds']:.1f} s: {', '.join(parts)}"]
    lines += [f"  failed with {name}: {number}" for name, number in counts["error_class"].items()]
    if asked_again := record["store"]["asked_again"]:
        lines.append(f"  the store had to be asked again for {asked_again} images")
    if reused := record.get("captions", {}).get("reused"):
        lines.append(f"  captions of earlier runs: {reused}")
    lines += [f"  left out of the source, {reason}: {number}" for reason, number in record["left_out"].items()]
    return "\n".join(lines)


def records(out: Uri) -> list[dict[str, Any]]:
    """Records of all published runs below an output, whatever they publish, oldest first."""
    folder = uris.join(out, "runs")
    below = listing.names_below(folder)
    found = [name for name in below.files + below.others if names.RECORD.fullmatch(name)]  # a link is read, too
    with ThreadPoolExecutor(parquet.READERS) as pool:
        return list(pool.map(_record, [uris.join(folder, name) for name in sorted(found)]))


def runs(out: Uri, product: Product = VERDICTS) -> list[dict[str, Any]]:
    """Records of all published runs of a product below an output, oldest first; one that did nothing has no files."""
    return [record for record in records(out) if record.get("product", VERDICTS.name) == product.name]


def run_ids(out: Uri, product: Product, maker: str) -> set[str]:
    """Ids of the runs of one maker, such as a detector, that published any rows."""
    return {record["run_id"] for record in runs(out, product) if record.get(product.maker) == maker and record["files"]}


def _record(uri: str) -> dict[str, Any]:
    """A record. A bucket that others may write must not make it name files of other places."""
    remedy = "restore it from a copy; without it, remove its files as well, and their images are judged anew"
    record: dict[str, Any] = reading.read_json(uri, {"run_id": str, "files": list}, remedy)
    run_id, product = record["run_id"], record.get("product", VERDICTS.name)
    if not names.is_run_id(run_id) or not uri.endswith(f"/{run_id}.json"):
        raise reading.damaged(uri, f"it is of the run {run_id!r}", remedy)
    if type(product) is not str:
        raise reading.damaged(uri, f"its product is {product!r}", remedy)
    if product in PRODUCTS:  # else it is of another version, and no reader here asks for it
        for name in ("counts", "settings", "versions"):
            if type(record.get(name, {})) is not dict:
                raise reading.damaged(uri, f"its {name} is a {type(record[name]).__name__} instead of a dict", remedy)
        folder = f"{final_folder(product, run_id)}/"
        for file in record["files"]:
            if type(file) is not dict:
                raise reading.damaged(uri, f"one of its files is {file!r}", remedy)
            path = file.get("path")
            if type(path) is not str or not path.startswith(folder) or not _is_name(path.removeprefix(folder)):
                raise reading.damaged(uri, f"it names {path!r}, which is no file of its run", remedy)
    return record


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not {"/", "\0"} & set(text)


def verdicts(out: Uri) -> "Dataset":
    """The verdicts of all published runs, oldest first, as an Arrow dataset; raises `SourceError` when there are none.

    An image that was done again (`--retry-failed`, `--rescore`, another detector) has a row of each run.
    """
    paths = [uris.join(out, file["path"]) for record in runs(out) for file in record["files"]]
    if not paths:
        raise SourceError(f"{out} holds no published verdicts")
    return parquet.dataset(paths, schema.VERDICTS)


def published(
    out: Uri, columns: pa.Schema, product: Product = VERDICTS, **whose: str | None
) -> Iterator[pa.RecordBatch]:
    """Some columns of the published runs of a product, oldest first, as a stream.

    `whose`: what their records must say, such as a `detector_id`; None: anything.
    """
    for record in runs(out, product):
        if any(wanted not in (None, record.get(key)) for key, wanted in whose.items()):
            continue
        yield from rows_of(out, record, columns)


def newest(out: Uri, columns: pa.Schema, product: Product = VERDICTS, **whose: str | None) -> Iterator[pa.RecordBatch]:
    """Some columns of published rows, as a stream; of several rows of an image by one maker, that of the newest run.

    `whose`: as in `published`. An image that was changed since, or transformed, has another `image_id`. Without a run,
    no batch comes.
    """
    key = [name for name in ("image_id", product.maker) if name in product.columns.names]
    asked = [*columns, *(product.columns.field(name) for name in key if name not in columns.names)]
    yield from last_of_each(published(out, pa.schema(asked), product, **whose), pa.schema(asked), key, columns.names)


def rows_of(out: Uri, record: dict[str, Any], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Some columns of one published run, null where a file lacks them. Raises `StorageError` for a file that is gone or
    damaged.
    """
    for file in record["files"]:
        uri = uris.join(out, file["path"])
        try:
            yield from parquet.read(uri, columns, optional=columns.names)
        except FileNotFoundError as error:
            raise StorageError(
                f"{uri} is gone, but not its record runs/{record['run_id']}.json: remove records with their files"
            ) from error
        except pa.ArrowInvalid as error:
            raise reading.damaged(
                uri,
                errors.reason(error),
                "restore it from a copy; without it, remove its record "
                f"runs/{record['run_id']}.json as well, and its images are done anew",
            ) from error


def untransformed(out: Uri, columns: pa.Schema, product: Product, maker: str) -> Iterator[pa.RecordBatch]:
    """Rows of untransformed images that a maker published, oldest run first."""
    wanted = columns if "transform" not in product.columns.names else pa.schema([*columns, schema.TRANSFORM])
    for batch in published(out, wanted, product, **{product.maker: maker}):
        if "transform" in wanted.names:
            batch = batch.filter(pc.is_null(batch.column("transform")))
        yield batch.select(columns.names)
