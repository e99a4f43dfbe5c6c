"""Images that a source holds more than once: byte for byte, or so alike that they are one image to the eye.

Dimensions: n images.

An image in two splits makes a test measure memory; one that is called real here and fake there teaches nothing.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.dataset import schema
from nsnet.duplicates import DISTANCE, near_duplicate_groups

Indices = npt.NDArray[np.int64]

COPIES: Final = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),  # images that are alike, in whatever bytes
        pa.field("kind", pa.string(), nullable=False),  # exact: another one has the same bytes; near: only looks alike
        *(schema.FACTS.field(name) for name in ("uri", "label", "generator", "split")),
        *(schema.FACTS.field(name) for name in ("content_hash", "perceptual_hash")),
    ]
)
"""An image that has a copy."""
EXAMPLES: Final = 3
"""Groups that a report shows of each kind."""


def groups(table: pa.Table, distance: int = DISTANCE) -> tuple[Indices, Indices]:
    """(number of the content, number of the near-duplicate group) of each image, (n,) int64 each.

    `table`: columns `content_hash` and `perceptual_hash` of images that could be read. Equal contents are in one
    near-duplicate group, too.
    """
    contents = table.column("content_hash").combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    alike = near_duplicate_groups(
        table.column("content_hash").to_pylist(), table.column("perceptual_hash").to_pylist(), distance
    )
    return contents.astype(np.int64), alike


def copies(table: pa.Table, contents: Indices, alike: Indices) -> pa.Table:
    """Rows of `COPIES`, group by group: the images whose near-duplicate group has two or more."""
    rows = np.flatnonzero(_sizes(alike) > 1)
    rows = rows[np.argsort(alike[rows], kind="stable")]
    kinds = np.where(_sizes(contents)[rows] > 1, "exact", "near").tolist()
    chosen = table.select(COPIES.names[2:]).take(rows)
    return pa.table([pa.array(alike[rows]), pa.array(kinds, pa.string()), *chosen.columns], schema=COPIES)


def count(table: pa.Table, group: Indices) -> dict[str, Any]:
    """Groups of two or more images and the images in them, within a split and across, and across labels.

    `group`: (n,) numbers as `groups` gives them. `table`: columns `uri`, `label` and `split`. An image without split
    or label is on no side of either.
    """
    sizes = _sizes(group)
    repeated = sizes > 1
    over = {what: _several(group, _codes(table, what)) for what in ("split", "label")}
    split = np.asarray(table.column("split").to_pylist(), dtype=object)
    leaking, numbers = np.unique(split[over["split"] & (_codes(table, "split") >= 0)].astype(str), return_counts=True)
    return {
        **_number(group, repeated),
        "within_a_split": _number(group, repeated & ~over["split"]),
        "across_splits": {
            **_number(group, over["split"]),
            "by_split": dict(zip(leaking.tolist(), numbers.tolist(), strict=True)),
            "examples": _examples(table, group, over["split"], "split"),
        },
        "across_labels": {
            **_number(group, over["label"]),
            "examples": _examples(table, group, over["label"], "label"),
        },
    }


def _sizes(group: Indices) -> Indices:
    """(n,) images of each image's group."""
    return np.asarray(np.bincount(group)[group] if len(group) else group)


def _codes(table: pa.Table, name: str) -> Indices:
    """(n,) number of each image's value; -1: none."""
    indices = table.column(name).combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _several(group: Indices, codes: Indices) -> npt.NDArray[np.bool_]:
    """(n,) whether an image's group has two or more different values."""
    pairs = np.unique(np.stack([group, codes])[:, codes >= 0], axis=1)
    different = np.bincount(pairs[0], minlength=int(group.max(initial=-1)) + 1)
    return np.asarray(different[group] > 1)


def _number(group: Indices, which: npt.NDArray[np.bool_]) -> dict[str, int]:
    return {"groups": len(np.unique(group[which])), "pictures": int(which.sum())}


def _examples(table: pa.Table, group: Indices, which: npt.NDArray[np.bool_], differ: str) -> list[list[str]]:
    """URIs of two images each that differ in this, of the first groups."""
    codes, found = _codes(table, differ), []
    for number in np.unique(group[which])[:EXAMPLES]:
        rows = np.flatnonzero((group == number) & (codes >= 0))
        _, first = np.unique(codes[rows], return_index=True)
        found.append([table.column("uri")[int(row)].as_py() for row in sorted(rows[first])[:2]])
    return found
