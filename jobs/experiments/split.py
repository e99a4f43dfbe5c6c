"""Split a source's images, with their published facts, into training, validation and test."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.schema import SPLIT
from jobs.runs import catalog
from jobs.runs.products import Product
from jobs.storage import parquet
from jobs.storage.database import database, last_of_each
from jobs.storage.uris import Uri
from jobs.training import examples
from nsnet import splits
from nsnet.duplicates import near_duplicate_groups
from nsnet.errors import CaptionError, SourceError

KNOWN_COLUMNS: Final = pa.schema(
    [schema.FACTS.field(name) for name in ("image_id", "content_hash", "perceptual_hash", "status", "error_class")]
    + [schema.FACTS.field("error_message")]
)
"""Columns of published facts or captions that a split needs."""
KNOWN_IMAGES: Final = pa.schema([*schema.MANIFEST, *list(KNOWN_COLUMNS)[1:]])
UNREADABLE_COLUMNS: Final = ("uri", "error_class", "error_message")
MAX_NAMED: Final = 10
"""Maximum number of images that messages name."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Settings of a split."""

    seed: int = 0
    validation_share: float = 0.15
    """Share of the free images for validation, in (0, 1)."""
    test_share: float = 0.15
    """Share of the free images for test, in [0, 1); only if the source has no split and no generator is left out."""
    leave_out: str | None = None
    """Generator whose images, real and fake, are all kept for the test."""
    lost_share: float = 0.05
    """Share of images that may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, and the images that it lacks."""

    table: pa.Table
    """Rows of `schema.SPLIT`; `split` is null for an unused image."""
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """URI and error of unreadable images, which are not in the table."""

    @property
    def leaking(self) -> int:
        """Number of validation images with a near-duplicate in training, plus test images with one in either part."""
        pairs = list(
            zip(self.table.column("split").to_pylist(), self.table.column("group").to_pylist(), strict=True)
        )  # fmt: skip
        training, validation = ({group for name, group in pairs if name == part} for part in ("train", "val"))
        seen = {"val": training, "test": training | validation}
        return sum(group in seen.get(name, ()) for name, group in pairs)

    def counts(self) -> dict[str, Any]:
        """Split -> generator -> [real, fake]."""
        counts: dict[str, Any] = {}
        columns = (self.table.column(name).to_pylist() for name in ("split", "generator", "label"))
        for (split, generator, label), number in sorted(
            Counter(zip(*columns, strict=True)).items(), key=lambda item: [str(part) for part in item[0]]
        ):
            pair = counts.setdefault(split or "unused", {}).setdefault(generator or "(none)", [0, 0])
            pair[label] += number
        return counts


def known_images(manifest: str, facts: Uri, product: Product, maker: str) -> pa.Table:
    """The manifest's rows with a maker's newest published facts (`KNOWN_IMAGES`), ordered by id.

    Raises `SourceError` for rows without published facts.
    """
    with database() as rows:
        rows.create("manifest", "*", schema.MANIFEST)
        rows.insert("manifest", parquet.read(manifest, schema.MANIFEST))
        rows.create("known", "*", KNOWN_COLUMNS)
        rows.insert(
            "known",
            last_of_each(catalog.untransformed(facts, KNOWN_COLUMNS, product, maker), KNOWN_COLUMNS, ["image_id"]),
        )
        missing = rows.execute(
            "select uri from manifest anti join known using (image_id) order by uri limit "
            f"{MAX_NAMED}"
        )  # fmt: skip
        if missing:
            number = rows.number("select count(*) from manifest anti join known using (image_id)")
            raise SourceError(
                f"{number} images of the source are not in {facts}, such as {missing[0][0]}: run nsnet caption for "
                "them first, or give --caption-missing"
            )
        batches = rows.select("select * from manifest join known using (image_id) order by image_id")
        listed = [batch.select(KNOWN_IMAGES.names).cast(KNOWN_IMAGES) for batch in batches]
    return pa.Table.from_batches(listed, KNOWN_IMAGES)


def make(listed: pa.Table, config: SplitConfig) -> Split:
    """Split the result of `known_images`: keep the source's own splits, and draw missing ones from the other images.

    Drawn splits keep each near-duplicate group together. Raises `SourceError` if there are too few images.
    """
    table, unreadable = _readable(listed, config.lost_share)
    groups = near_duplicate_groups(
        table.column("content_hash").to_pylist(), table.column("perceptual_hash").to_pylist()
    )
    names = _assigned(table, groups, config)
    table = table.set_column(table.schema.get_field_index("split"), schema.SPLIT_COLUMN, pa.array(names, pa.string()))
    table = table.append_column(SPLIT.field("group"), pa.array(groups))
    position = table.schema.get_field_index("expected_hash")  # training then refuses changed images
    table = table.set_column(position, SPLIT.field("expected_hash"), table.column("content_hash"))
    split = Split(table=table.select(SPLIT.names).cast(SPLIT), unreadable=unreadable)
    check(split.table)
    return split


def check(table: pa.Table) -> None:
    """Raise `SourceError` unless training and validation both have real and fake images."""
    for name, part in (("train", "training"), ("val", "validation")):
        labels = table.filter(pc.equal(table.column("split"), name)).column("label").to_pylist()
        real, fake = labels.count(0), labels.count(1)
        if not real or not fake:
            raise SourceError(f"the {part} part has {real} real and {fake} fake images; both are needed")


def _readable(listed: pa.Table, lost_share: float) -> tuple[pa.Table, list[dict[str, Any]]]:
    good = pc.equal(listed.column("status"), "scored")
    unreadable: list[dict[str, Any]] = listed.filter(pc.invert(good)).select(UNREADABLE_COLUMNS).to_pylist()
    for row in unreadable[:MAX_NAMED]:
        say(f"  unreadable: {row['uri']}: {row['error_class']}: {row['error_message']}")
    _check_unreadable(unreadable, listed.num_rows, lost_share)
    return listed.filter(good), unreadable


def _check_unreadable(unreadable: list[dict[str, Any]], count: int, lost_share: float) -> None:
    """Raise `SourceError` if too many images are unreadable, or if a readable image has no caption."""
    if uncaptioned := [row["uri"] for row in unreadable if row["error_class"] == CaptionError.__name__]:
        raise SourceError(
            f"{len(uncaptioned)} readable images have no caption, such as {uncaptioned[0]}: run nsnet caption "
            "--retry-failed"
        )
    if len(unreadable) > lost_share * count:
        changed = sum(row["error_class"] == "ObjectChangedError" for row in unreadable)
        hint = f"; {changed} differ from the split, which no longer matches its source" if changed else ""
        raise SourceError(
            f"{len(unreadable)} of {count} training images are unreadable, more than {lost_share:.0%} "
            f"(--max-failed), such as {unreadable[0]['uri']} ({unreadable[0]['error_class']}): repair the source{hint}"
        )


def _assigned(table: pa.Table, groups: np.ndarray[Any, np.dtype[np.int64]], config: SplitConfig) -> list[str | None]:
    """The split of each row; None: unused."""
    given: list[str | None] = table.column("split").to_pylist()
    generators: list[str | None] = table.column("generator").to_pylist()
    names = list(given)
    fixed = np.array([name in ("val", "test") for name in given])
    if config.leave_out is not None:
        held_out, beside = splits.leave_out(groups, generators, config.leave_out)
        for i in np.flatnonzero(held_out):
            names[i] = "test"
        for i in np.flatnonzero(beside):  # near-duplicates of test images must not be trained on
            names[i] = None if names[i] != "test" else "test"
        fixed = fixed | held_out | beside
    if "train" in given:  # images outside the source's own splits may be anything, so they are not used
        fixed = fixed | np.array([name is None for name in given])
    # the left-out generator is the whole test: images of trained generators would raise its result
    test_share = 0.0 if any(given) or config.leave_out is not None else config.test_share
    # drawn images must not be near-duplicates of the source's own validation and test images
    fixed = fixed | (np.isin(groups, groups[fixed]) & np.array([name is None for name in given]))
    share = 0.0 if "val" in given else config.validation_share
    free = np.flatnonzero(~fixed)
    strata = list(zip(generators, table.column("label").to_pylist(), strict=True))
    hashes: list[str] = table.column("content_hash").to_pylist()
    drawn = splits.assign(
        groups[free], [strata[i] for i in free], [hashes[i] for i in free],
        shares={"train": 1.0 - share - test_share, "val": share, "test": test_share}, seed=config.seed,
    )  # fmt: skip
    for i, name in zip(free, drawn, strict=True):
        names[i] = name
    return names


def reuse(stored: str, listed: pa.Table, lost_share: float = 0.0) -> Split:
    """Apply a stored split to the current source; at most a share `lost_share` of its images may be unreadable.

    Raises `SourceError` if the two no longer match.
    """
    table = examples.read_split(stored)
    by_uri = dict(zip(listed.column("uri").to_pylist(), listed.to_pylist(), strict=True))
    rows, mismatched, unreadable = [], [], []
    for row in table.to_pylist():
        current = by_uri.get(row["uri"])
        if current is not None and current["status"] != "scored" and current["error_class"] != "ObjectChangedError":
            unreadable.append({name: current[name] for name in UNREADABLE_COLUMNS})
        elif current is None or current["content_hash"] != row["content_hash"]:
            mismatched.append(f"{row['uri']} ({'missing' if current is None else 'changed'})")
        else:
            rows.append({**current, "split": row["split"], "group": row["group"], "expected_hash": row["content_hash"]})
    if mismatched:
        raise SourceError(
            f"the split {stored} no longer matches its source: {len(mismatched)} of {table.num_rows} images are "
            f"missing or changed, such as {', '.join(mismatched[:3])}; make a new split, or restore the images"
        )
    _check_unreadable(unreadable, table.num_rows, lost_share)
    if unused := len(by_uri) - len(rows) - len(unreadable):
        say(f"  {unused} images of the source are not in the split and are not used")
    kept = pa.Table.from_pylist(rows, schema=SPLIT).sort_by("image_id")
    check(kept)
    return Split(table=kept, unreadable=unreadable)


def describe(split: Split) -> list[str]:
    """A split as lines for the console."""
    sizes = Counter(split.table.column("split").to_pylist())
    lines = [
        f"split: {sizes['train']} training, {sizes['val']} validation and {sizes['test']} test images"
        + (f", {sizes[None]} unused" if sizes[None] else "")
    ]
    if split.leaking:
        lines.append(
            f"warning: {split.leaking} validation and test images are near-duplicates of images in training or "
            "validation, as the source splits them, so the metrics are too high; nsnet audit lists them"
        )
    return lines
