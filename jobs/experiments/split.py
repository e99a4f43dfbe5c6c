"""Who is trained on, validated and tested on: a source's images, with what is known of them, to a stored split."""

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
"""What a split asks of published facts or captions."""
LISTED_COLUMNS: Final = pa.schema([*schema.MANIFEST, *list(KNOWN_COLUMNS)[1:]])
UNREADABLE: Final = ("uri", "error_class", "error_message")
MAX_NAMED: Final = 10
"""Images that a message names at most."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a source is split."""

    seed: int = 0
    validation_share: float = 0.15
    """Share of the images that are free for it, in (0, 1)."""
    test_share: float = 0.15
    """Likewise, in [0, 1); only of a source without any split, and where no generator is left out."""
    leave_out: str | None = None
    """Generator of which all images, real and fake, are kept for the test."""
    lost_share: float = 0.05
    """Share of images that may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, and what is worth telling of it."""

    table: pa.Table
    """Rows of `examples.SPLIT`; `split` is null where an image is used for nothing."""
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """URI and error of images that are not in it."""

    @property
    def leaking(self) -> int:
        """Images of validation and test that are near-duplicates of what was trained on, or chosen by."""
        pairs = list(
            zip(self.table.column("split").to_pylist(), self.table.column("group").to_pylist(), strict=True)
        )  # fmt: skip
        trained, chosen = ({group for name, group in pairs if name == which} for which in ("train", "val"))
        seen = {"val": trained, "test": trained | chosen}
        return sum(group in seen.get(name, ()) for name, group in pairs)

    def counts(self) -> dict[str, Any]:
        """Split -> generator -> [real, fake]."""
        found: dict[str, Any] = {}
        columns = (self.table.column(name).to_pylist() for name in ("split", "generator", "label"))
        for (split, generator, label), number in sorted(
            Counter(zip(*columns, strict=True)).items(), key=lambda item: [str(part) for part in item[0]]
        ):
            pair = found.setdefault(split or "unused", {}).setdefault(generator or "(none)", [0, 0])
            pair[label] += number
        return found


def known_images(manifest: str, facts: Uri, product: Product, maker: str) -> pa.Table:
    """The manifest's rows with what a maker published of them (`LISTED_COLUMNS`), ordered by id; of several the newest.

    Raises `SourceError` for rows that nothing is known of.
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
        found = [batch.select(LISTED_COLUMNS.names).cast(LISTED_COLUMNS) for batch in batches]
    return pa.Table.from_batches(found, LISTED_COLUMNS)


def make(listed: pa.Table, config: SplitConfig) -> Split:
    """Split what `known_images` gave: the source's own splits are kept, what they lack is drawn from the rest.

    No near-duplicate group is cut by what is drawn. Raises `SourceError` where the images do not suffice.
    """
    table, unreadable = _readable(listed, config.lost_share)
    groups = near_duplicate_groups(
        table.column("content_hash").to_pylist(), table.column("perceptual_hash").to_pylist()
    )
    names = _assigned(table, groups, config)
    table = table.set_column(table.schema.get_field_index("split"), schema.SPLIT_COLUMN, pa.array(names, pa.string()))
    table = table.append_column(SPLIT.field("group"), pa.array(groups))
    at = table.schema.get_field_index("expected_hash")  # what was looked at is what will be trained on
    table = table.set_column(at, SPLIT.field("expected_hash"), table.column("content_hash"))
    split = Split(table=table.select(SPLIT.names).cast(SPLIT), unreadable=unreadable)
    check(split.table)
    return split


def check(table: pa.Table) -> None:
    """Raise `SourceError` unless training and validation both have real and fake images."""
    for name, what in (("train", "training"), ("val", "validation")):
        labels = table.filter(pc.equal(table.column("split"), name)).column("label").to_pylist()
        real, fake = labels.count(0), labels.count(1)
        if not real or not fake:
            raise SourceError(f"the {what} part has {real} real and {fake} fake images; both are needed")


def _readable(listed: pa.Table, lost_share: float) -> tuple[pa.Table, list[dict[str, Any]]]:
    good = pc.equal(listed.column("status"), "scored")
    lost: list[dict[str, Any]] = listed.filter(pc.invert(good)).select(UNREADABLE).to_pylist()
    for row in lost[:MAX_NAMED]:
        say(f"  unreadable: {row['uri']}: {row['error_class']}: {row['error_message']}")
    _check_lost(lost, listed.num_rows, lost_share)
    return listed.filter(good), lost


def _check_lost(lost: list[dict[str, Any]], count: int, lost_share: float) -> None:
    """Raise `SourceError` where too many images are unreadable, or one is whole and could not be captioned."""
    if silent := [row["uri"] for row in lost if row["error_class"] == CaptionError.__name__]:
        raise SourceError(
            f"{len(silent)} images have no caption, though they can be read, such as {silent[0]}: run nsnet caption "
            "--retry-failed"
        )
    if len(lost) > lost_share * count:
        changed = sum(row["error_class"] == "ObjectChangedError" for row in lost)
        hint = f"; {changed} are not what the split says: it no longer matches its source" if changed else ""
        raise SourceError(
            f"{len(lost)} of {count} training images are unreadable, more than {lost_share:.0%} "
            f"(--max-failed), such as {lost[0]['uri']} ({lost[0]['error_class']}): mend the source{hint}"
        )


def _assigned(table: pa.Table, groups: np.ndarray[Any, np.dtype[np.int64]], config: SplitConfig) -> list[str | None]:
    """The split of each row; None: used for nothing."""
    given: list[str | None] = table.column("split").to_pylist()
    generators: list[str | None] = table.column("generator").to_pylist()
    names = list(given)
    fixed = np.array([name in ("val", "test") for name in given])
    if config.leave_out is not None:
        held_out, beside = splits.leave_out(groups, generators, config.leave_out)
        for i in np.flatnonzero(held_out):
            names[i] = "test"
        for i in np.flatnonzero(beside):  # an image's twin would tell of it
            names[i] = None if names[i] != "test" else "test"
        fixed = fixed | held_out | beside
    if "train" in given:  # what stands beside a training set of its source is not for training: it may be anything
        fixed = fixed | np.array([name is None for name in given])
    # what was left out is the test: images of known generators would hide how little is known of it
    test_share = 0.0 if any(given) or config.leave_out is not None else config.test_share
    # what is drawn must not be a copy of what the source keeps for validation and test
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
    """A stored split over a source as it is now; so large a share of its images may be unreadable.

    Raises `SourceError` where the two no longer match.
    """
    table = examples.read_split(stored)
    now = dict(zip(listed.column("uri").to_pylist(), listed.to_pylist(), strict=True))
    rows, strange, lost = [], [], []
    for row in table.to_pylist():
        found = now.get(row["uri"])
        if found is not None and found["status"] != "scored" and found["error_class"] != "ObjectChangedError":
            lost.append({name: found[name] for name in UNREADABLE})
        elif found is None or found["content_hash"] != row["content_hash"]:
            strange.append(f"{row['uri']} ({'gone' if found is None else 'changed'})")
        else:
            rows.append({**found, "split": row["split"], "group": row["group"], "expected_hash": row["content_hash"]})
    if strange:
        raise SourceError(
            f"the split {stored} no longer matches its source: {len(strange)} of {table.num_rows} images are gone or "
            f"changed, such as {', '.join(strange[:3])}; make a new split, or restore the images"
        )
    _check_lost(lost, table.num_rows, lost_share)
    if beyond := len(now) - len(rows) - len(lost):
        say(f"  {beyond} images of the source are not in the split and are not used")
    kept = pa.Table.from_pylist(rows, schema=SPLIT).sort_by("image_id")
    check(kept)
    return Split(table=kept, unreadable=lost)


def describe(split: Split) -> list[str]:
    """A split in lines for a person."""
    sizes = Counter(split.table.column("split").to_pylist())
    lines = [
        f"split: {sizes['train']} training, {sizes['val']} validation and {sizes['test']} test images"
        + (f", {sizes[None]} used for nothing" if sizes[None] else "")
    ]
    if split.leaking:
        lines.append(
            f"warning: {split.leaking} images of validation and test are near-duplicates of images that are "
            "trained on or chosen by, as the source splits them: their numbers flatter; nsnet audit lists them"
        )
    return lines
