"""Find images that a source holds more than once: equal files, and near-duplicates that look the same.

Dimensions: n images.

A test with images of another split measures memory; an image that is labelled both real and fake teaches nothing.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.dataset import schema
from nsnet.duplicates import DISTANCE, near_duplicate_groups
from nsnet.splits import Indices

COPIES: Final = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),  # near-duplicates, including equal files
        pa.field("kind", pa.string(), nullable=False),  # exact: equal bytes exist; near: others only look alike
        *(schema.FACTS.field(name) for name in ("uri", "label", "generator", "split")),
        *(schema.FACTS.field(name) for name in ("content_hash", "perceptual_hash")),
    ]
)
"""Columns of an image that has a copy."""
EXAMPLES: Final = 3
"""Groups of each kind that a report shows."""


def groups(table: pa.Table, distance: int = DISTANCE) -> tuple[Indices, Indices]:
    """(content number, near-duplicate group number) of each image, (n,) int64 each.

    `table`: columns `content_hash` and `perceptual_hash` of readable images. Equal contents are also in one
    near-duplicate group.
    """
    contents = table.column("content_hash").combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    alike = near_duplicate_groups(
        table.column("content_hash").to_pylist(), table.column("perceptual_hash").to_pylist(), distance
    )
    return contents.astype(np.int64), alike


def copies(table: pa.Table, contents: Indices, alike: Indices) -> pa.Table:
    """Rows of `COPIES`, ordered by group: images whose near-duplicate group has two or more images."""
    rows = np.flatnonzero(_sizes(alike) > 1)
    rows = rows[np.argsort(alike[rows], kind="stable")]
    kinds = np.where(_sizes(contents)[rows] > 1, "exact", "near").tolist()
    chosen = table.select(COPIES.names[2:]).take(rows)
    return pa.table([pa.array(alike[rows]), pa.array(kinds, pa.string()), *chosen.columns], schema=COPIES)


def count(table: pa.Table, group: Indices) -> dict[str, Any]:
    """Numbers of groups of two or more images, and of their images: in total, within a split, across splits and labels.

    `group`: (n,) group numbers from `groups`. `table`: columns `uri`, `label` and `split`. An image without split or
    label counts for no split or label.
    """
    sizes = _sizes(group)
    repeated = sizes > 1
    across = {name: _several(group, _codes(table, name)) for name in ("split", "label")}
    split = np.asarray(table.column("split").to_pylist(), dtype=object)
    leaking, numbers = np.unique(split[across["split"] & (_codes(table, "split") >= 0)].astype(str), return_counts=True)
    return {
        **_number(group, repeated),
        "within_a_split": _number(group, repeated & ~across["split"]),
        "across_splits": {
            **_number(group, across["split"]),
            "by_split": dict(zip(leaking.tolist(), numbers.tolist(), strict=True)),
            "examples": _examples(table, group, across["split"], "split"),
        },
        "across_labels": {
            **_number(group, across["label"]),
            "examples": _examples(table, group, across["label"], "label"),
        },
    }


def _sizes(group: Indices) -> Indices:
    """(n,) number of images in each image's group."""
    return np.asarray(np.bincount(group)[group] if len(group) else group)


def _codes(table: pa.Table, name: str) -> Indices:
    """(n,) code of each image's value; -1: no value."""
    indices = table.column(name).combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _several(group: Indices, codes: Indices) -> npt.NDArray[np.bool_]:
    """(n,) whether an image's group has two or more distinct values."""
    pairs = np.unique(np.stack([group, codes])[:, codes >= 0], axis=1)
    different = np.bincount(pairs[0], minlength=int(group.max(initial=-1)) + 1)
    return np.asarray(different[group] > 1)


def _number(group: Indices, mask: npt.NDArray[np.bool_]) -> dict[str, int]:
    return {"groups": len(np.unique(group[mask])), "pictures": int(mask.sum())}


def _examples(table: pa.Table, group: Indices, mask: npt.NDArray[np.bool_], differ: str) -> list[list[str]]:
    """For each of the first groups, URIs of two images that differ in the column `differ`."""
    codes, examples = _codes(table, differ), []
    for number in np.unique(group[mask])[:EXAMPLES]:
        rows = np.flatnonzero((group == number) & (codes >= 0))
        _, first = np.unique(codes[rows], return_index=True)
        examples.append([table.column("uri")[int(row)].as_py() for row in sorted(rows[first])[:2]])
    return examples
