"""Audit a source: collect facts of its images, analyse them, and write the report."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.auditing import duplicates, inventory, metadata_bias
from jobs.auditing.text import as_text
from jobs.console import output, summary
from jobs.console.output import say
from jobs.dataset.plan import Selection, write_manifest
from jobs.runs import catalog, products
from jobs.storage import parquet, uris, writing
from jobs.storage.uris import Uri
from jobs.workflows.examine import FACTS_ID, examine
from nsnet import alignment
from nsnet.duplicates import BITS, DISTANCE
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits
from nsnet.splits import Indices

AUDIT_FILE: Final = "audit.json"
REPORT_FILE: Final = "audit.txt"
COPIES_FILE: Final = "duplicates.parquet"


def audit(
    source: Uri,
    *,
    out: Uri | None = None,
    selection: Selection | None = None,
    align: str | None = None,
    distance: int = DISTANCE,
    seed: int = 0,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Audit a source, print the report, and store it if `out` is given; returns the result.

    `align`: a chain of `nsnet.alignment`; the metadata of the files that it makes are measured as well.
    """
    if not 0 <= distance < BITS or not 0 <= seed < 2**32:
        raise ConfigError(
            f"--distance must be 0 to {BITS - 1} bits and --seed 0 to {2**32 - 1}, got {distance} and {seed}"
        )
    if align is not None:
        alignment.parse(align)
    selection = selection or Selection()
    with _place(out) as place:
        record = examine(
            source, out=place, selection=selection, align=align or "", limits=limits, address=address
        )  # fmt: skip
        table, unknown = _images(source, place, selection, align, listed_anew=out is not None)
        found, twins = findings(table, distance=distance, seed=seed)
        left_out = {name: record[name] for name in ("left_out", "unread", "unread_count")}
        result = {"source": source, "not_examined": unknown, **left_out, **found}
        text = as_text(result)
        if out is not None:
            parquet.write_whole(twins.to_batches(), duplicates.COPIES, uris.join(place, COPIES_FILE))
            writing.write_bytes(uris.join(place, REPORT_FILE), (text + "\n").encode())
            writing.write_json(uris.join(place, AUDIT_FILE), result)
            say(f"report: {uris.join(place, AUDIT_FILE)}")
    output.show(text)
    summary.note(
        audit=None if out is None else uris.join(out, AUDIT_FILE), images=result["pictures"],
        failed=sum(error["pictures"] for error in result["failed"].values()), unread=result["unread_count"],
    )  # fmt: skip
    return result


@contextmanager
def _place(out: Uri | None) -> Iterator[Uri]:
    """The output, or else a temporary folder, to publish facts in."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="nsnet-audit-") as folder:
        yield Uri(folder)


def _images(
    source: Uri, place: Uri, selection: Selection, align: str | None, listed_anew: bool
) -> tuple[pa.Table, int]:
    """The source's current images with their facts, in all forms, and the number of images without facts.

    An existing output may also hold facts of deleted images, so the source is listed again; a temporary one holds only
    current images.
    """
    facts = catalog.published(place, inventory.KNOWN_COLUMNS, products.FACTS, facts_id=FACTS_ID)
    if not listed_anew:
        listing = catalog.published(place, inventory.LISTED_COLUMNS, products.FACTS, facts_id=FACTS_ID)
        return inventory.images(listing, facts)
    whole = Selection(include=selection.include, exclude=selection.exclude, columns=selection.columns)
    with tempfile.TemporaryDirectory(prefix="nsnet-audit-") as folder:
        manifest = uris.join(folder, "manifest.parquet")
        write_manifest(source, manifest, whole, transforms=("", align) if align else ())
        return inventory.images(parquet.read(manifest, inventory.LISTED_COLUMNS), facts)


def findings(table: pa.Table, *, distance: int = DISTANCE, seed: int = 0) -> tuple[dict[str, Any], pa.Table]:
    """JSON-ready findings on rows of `inventory.IMAGES`, and the images that have a copy (`duplicates.COPIES`)."""
    table, aligned = inventory.forms(table)
    seen = inventory.readable(table)
    say(f"comparing {seen.num_rows:,} images with each other")
    contents, alike = duplicates.groups(seen, distance)
    groups = np.full(table.num_rows, metadata_bias.UNREADABLE)
    groups[pc.equal(table.column("status"), "scored").to_numpy()] = alike
    found = {
        "pictures": table.num_rows,
        "failed": inventory.failures(table),
        "splits": inventory.splits(table),
        **_metadata(table, groups, seed),
        "alignment": _aligned(aligned, table, groups, seed) if aligned.num_rows else None,
        "duplicates": {
            "distance": distance, "exact": duplicates.count(seen, contents), "alike": duplicates.count(seen, alike)
        },
        "seed": seed,
    }  # fmt: skip
    return found, duplicates.copies(seen, contents, alike)


def _aligned(aligned: pa.Table, table: pa.Table, groups: Indices, seed: int) -> dict[str, Any]:
    """Findings on the files that an alignment makes of the images of `table`, whose near-duplicate groups these are."""
    own = groups[pc.index_in(aligned.column("uri"), table.column("uri").combine_chunks()).to_numpy()]
    own[pc.not_equal(aligned.column("status"), "scored").to_numpy()] = metadata_bias.UNREADABLE
    return {
        "transform": aligned.column("transform")[0].as_py(),
        "not_examined": table.num_rows - aligned.num_rows,
        "failed": inventory.failures(aligned),
        **_metadata(aligned, own, seed),
    }


def _metadata(table: pa.Table, groups: Indices, seed: int) -> dict[str, Any]:
    """Classes and metadata bias of all images and of each generator."""
    parts = dict(inventory.by_generator(table))
    lent = inventory.lent_reals(parts, inventory.class_numbers(table))
    return {
        "everything": _described(table, np.arange(table.num_rows), groups, seed, "all generators"),
        "generators": {
            name: _described(table, rows, groups, seed, name, lent.get(name)) for name, rows in parts.items()
        },
    }


def _described(
    table: pa.Table, rows: Indices, groups: Indices, seed: int, generator: str,
    lent: tuple[str, Indices] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Classes and metadata bias of these rows. `lent`: another generator's name and reals to compare the fakes with."""
    say(f"metadata of {generator}: {len(rows):,} images")
    reals_of, compared = (None, rows) if lent is None else (lent[0], np.concatenate([rows, lent[1]]))
    return {
        "classes": inventory.describe(table.take(rows)),
        "reals_of": reals_of,
        "metadata": metadata_bias.measure(metadata_bias.metadata(table.take(compared), groups[compared]), seed),
    }
