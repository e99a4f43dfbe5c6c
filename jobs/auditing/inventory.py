"""Inventory of a source: its images with published facts, counted and described by generator and class.

Dimensions: n images.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import benchmarks, schema
from jobs.dataset.labels import NO_GENERATOR
from jobs.storage.database import database, last_of_each
from nsnet.splits import Indices

LISTED_COLUMNS: Final = pa.schema(
    [schema.FACTS.field(name) for name in ("image_id", "uri", "label", "generator", "split", "transform")]
)
"""Columns that a listing must have."""
KNOWN_COLUMNS: Final = pa.schema(
    [
        schema.FACTS.field(name)
        for name in (
            "image_id", "size_bytes", "width", "height", "format", "jpeg_quality", "content_hash", "perceptual_hash",
            "status", "error_class",
        )
    ]
)  # fmt: skip
"""Columns that published facts must have."""
IMAGES: Final = pa.schema([*list(LISTED_COLUMNS)[1:], *list(KNOWN_COLUMNS)[1:]])
"""Columns of a listed image with its facts; with a transform, of the file that an alignment would make of it."""

CLASSES: Final = ("real", "fake", "unlabelled")
"""Names of label 0, label 1 and no label."""
NO_SPLIT: Final = "(none)"


def images(listing: Iterable[pa.RecordBatch], facts: Iterable[pa.RecordBatch]) -> tuple[pa.Table, int]:
    """(rows of `IMAGES` ordered by URI, number of listed images without facts; aligned forms do not count).

    `listing`: rows of `LISTED_COLUMNS`. `facts`: rows of `KNOWN_COLUMNS`, oldest run first; the newest row of an image
    counts, and images that are not listed are ignored.
    """
    with database() as rows:
        rows.create("listed", "* replace (image_id::uuid as image_id)", LISTED_COLUMNS)
        rows.insert("listed", listing)
        rows.create("known", "* replace (image_id::uuid as image_id)", KNOWN_COLUMNS)
        rows.insert("known", last_of_each(facts, KNOWN_COLUMNS, ["image_id"]))
        found = rows.select(
            f"select {', '.join(IMAGES.names)} from listed join known using (image_id) order by uri, image_id"
        )
        table = pa.Table.from_batches((batch.cast(IMAGES) for batch in found), IMAGES)
        unknown = rows.number("select count(*) from listed where transform is null")
        unknown -= table.column("transform").null_count
    return table.combine_chunks(), unknown


def forms(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of `IMAGES` on images as they are, and those on the aligned forms of these images."""
    raw = table.filter(pc.is_null(table.column("transform"))).combine_chunks()
    aligned = table.filter(pc.is_valid(table.column("transform")))
    return raw, aligned.filter(pc.is_in(aligned.column("uri"), raw.column("uri").combine_chunks())).combine_chunks()


def readable(table: pa.Table) -> pa.Table:
    """The images whose decoding did not fail."""
    return table.filter(pc.equal(table.column("status"), "scored")).combine_chunks()


def by_generator(table: pa.Table) -> Iterator[tuple[str, Indices]]:
    """Yield each generator with its row numbers, ordered by name."""
    names = table.column("generator").combine_chunks().fill_null(NO_GENERATOR).dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(codes) else []
    present = {names.dictionary[int(codes[part[0]])].as_py(): part for part in parts}
    yield from sorted(present.items())


def lent_reals(parts: Mapping[str, Indices], numbers: Indices) -> dict[str, tuple[str, Indices]]:
    """Generator without reals -> the generator whose reals its benchmark uses, and the rows of those reals.

    `parts`: rows of each generator; `numbers`: `class_numbers` of all rows.
    """
    reals = {name: rows[numbers[rows] == 0] for name, rows in parts.items()}
    pairs = benchmarks.paired_reals(list(parts))
    return {fake: (real, reals[real]) for fake, real in pairs.items() if not len(reals[fake]) and len(reals[real])}


def class_numbers(table: pa.Table) -> Indices:
    """(n,) index of each image's class in `CLASSES`."""
    return np.asarray(table.column("label").fill_null(2).to_numpy(), dtype=np.int64)


def failures(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Error class -> number of images and an example URI; the most frequent class first."""
    failed = table.filter(pc.not_equal(table.column("status"), "scored"))
    by_class = failed.group_by("error_class").aggregate([("uri", "count"), ("uri", "min")]).to_pylist()
    by_class.sort(key=lambda row: (-row["uri_count"], str(row["error_class"])))
    return {str(row["error_class"]): {"pictures": row["uri_count"], "example": row["uri_min"]} for row in by_class}


def splits(table: pa.Table) -> dict[str, dict[str, dict[str, int]]]:
    """Split -> generator -> class -> number of images; empty if no image has a split."""
    if table.column("split").null_count == table.num_rows:
        return {}
    keys = ["split", "generator", "label"]
    by_split: dict[str, dict[str, dict[str, int]]] = {}
    for row in (
        table.group_by(keys).aggregate([("uri", "count")]).sort_by([(key, "ascending") for key in keys]).to_pylist()
    ):
        by_name = by_split.setdefault(row["split"] or NO_SPLIT, {})
        counts = by_name.setdefault(row["generator"] or NO_GENERATOR, dict.fromkeys(CLASSES, 0))
        counts[CLASSES[2 if row["label"] is None else row["label"]]] += row["uri_count"]
    return by_split


def describe(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Class -> description of its images, for classes that have images."""
    numbers = class_numbers(table)
    by_class = ((name, np.flatnonzero(numbers == i)) for i, name in enumerate(CLASSES))
    return {name: _describe(table.take(rows)) for name, rows in by_class if len(rows)}


def _describe(table: pa.Table) -> dict[str, Any]:
    """Counts cover all images, other values only readable ones; None if there are none."""
    seen = readable(table)
    width, height = (seen.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
    area = np.maximum(width * height, 1)
    formats = seen.column("format").value_counts().to_pylist()
    quality = seen.column("jpeg_quality").drop_null().to_numpy()
    return {
        "pictures": table.num_rows,
        "failed": table.num_rows - seen.num_rows,
        "formats": {str(item["values"]): item["counts"] for item in sorted(formats, key=lambda item: -item["counts"])},
        "width": _quantiles(width, (0.0, 0.5, 1.0)),
        "height": _quantiles(height, (0.0, 0.5, 1.0)),
        "most_common_size": _most_common(width, height),
        "bytes_per_pixel": _quantiles(seen.column("size_bytes").to_numpy() / area, (0.25, 0.5, 0.75)),
        "jpeg_quality": _quantiles(quality, (0.25, 0.5, 0.75)),
    }


def _quantiles(values: npt.NDArray[Any], levels: tuple[float, ...]) -> list[float] | None:
    return [float(value) for value in np.quantile(values, levels)] if len(values) else None


def _most_common(width: Indices, height: Indices) -> dict[str, Any] | None:
    if not len(width):
        return None
    sizes, counts = np.unique(np.stack([width, height]), axis=1, return_counts=True)
    most = int(np.argmax(counts))
    return {"width": int(sizes[0, most]), "height": int(sizes[1, most]), "share": float(counts[most] / len(width))}
