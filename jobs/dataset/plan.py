"""Plan a run: write the images of a source that were not published before as a manifest Parquet.

The listing and the history are joined in a database on disk, so that neither must fit into the driver's memory.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import pyarrow as pa

from jobs.console.output import say
from jobs.dataset import benchmarks, schema
from jobs.dataset.benchmarks import Layout
from jobs.dataset.folders import beside
from jobs.dataset.manifest import SERIES
from jobs.dataset.source import Source
from jobs.dataset.tables import KEYS
from jobs.storage import parquet
from jobs.storage.database import Database, database
from jobs.storage.left_out import first_named
from jobs.storage.uris import Uri
from nsnet.config import added
from nsnet.errors import ConfigError, ImageBudgetError, SourceError, UsageError

UPDATE_SECONDS: Final = 5.0
"""Interval between progress lines of a listing."""
MAX_FOLDERS: Final = 50_000
"""Maximum folders of a source that are compared to find labels: a bucket may have millions."""

PLANNED_COLUMNS: Final = pa.schema(
    [pa.field("n", pa.int64()), *schema.MANIFEST, pa.field("folder", pa.string()), pa.field(SERIES, pa.string())]
)
"""Listed rows, numbered, with the folder or the series of containers that their labels come from."""
CLASSES: Final = pa.schema([pa.field(SERIES, pa.string())])
FORMS: Final = pa.schema([pa.field("form", pa.int64()), schema.TRANSFORM])
"""Forms of each image, in order: unchanged, or under a transform."""
FOLDERS: Final = pa.schema([pa.field("folder", pa.string()), *schema.LABELS, schema.SPLIT_COLUMN])
"""Generator and split of folders in their source's layout; with a label if their own path has none."""

TOO_MANY_FOLDERS: Final = (
    f"there are more than {MAX_FOLDERS:,} folders with labels: each is labelled by its own name, without comparison"
)

PLAIN_ID: Final = "replace(l.image_id::varchar, '-', '')"
"""SQL: id of an image `l`, as text."""
FORM_ID: Final = (
    f"case when f.transform is null then {PLAIN_ID} else left(sha256({PLAIN_ID} || '/' || f.transform), 32) end"
)
"""SQL: id of an image `l` in a form `f`."""

HISTORY: Final = pa.field("history", pa.int64())
"""Number of the earlier results that decide a manifest."""

NEW: Final = "new"
CHANGED: Final = "changed"
FAILED: Final = "failed before"
SCORED: Final = "scored before"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The images of a source to process."""

    include: tuple[str, ...] = ()
    """Globs over the path below the source; an image must match one of them; none: all images."""
    exclude: tuple[str, ...] = ()
    """Globs that an image must not match."""
    limit: int | None = None
    """Maximum images, each in all its forms: the first listed, in no order."""
    shuffle_seed: int | None = None
    """Random order; with `limit`, a random sample."""
    columns: tuple[str, ...] = added(())
    """`KEY=NAME` each: the name of the Parquet column for a key of `tables.KEYS`."""
    retry_failed: bool = False
    """Process images again that failed before."""
    rescore: bool = False
    """Process all images again."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        self.named_columns()

    def named_columns(self) -> dict[str, str]:
        """Key -> name of its column. Raises `ConfigError`."""
        named = {}
        for text in self.columns:
            key, separator, name = text.partition("=")
            if not separator or not name or key not in KEYS:
                raise ConfigError(f"--column {text}: give KEY=NAME, where KEY is one of {', '.join(KEYS)}")
            named[key] = name
        return named

    def states(self) -> set[str]:
        """The states of images to process."""
        if self.rescore:
            return {NEW, CHANGED, FAILED, SCORED}
        return {NEW, CHANGED} | ({FAILED} if self.retry_failed else set())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A written manifest."""

    uri: str
    """The manifest Parquet."""
    count: int
    """Rows: each image counts once in each of its forms, also below."""
    left_out: dict[str, int]
    """Reason -> number of objects of the source that are not in the manifest."""
    labels: dict[int | None, int]
    """Label -> images in the manifest."""
    states: dict[str, int] = field(default_factory=dict)
    """New, changed, failed before, scored before -> listed images, in the manifest or not."""
    layout: str | None = None
    """The recognised benchmark of the source; None: none."""
    forms: int = 1
    """Number of forms of each image: unchanged, or under a transform."""
    unread: int = 0
    """Number of folders and containers of the source that could not be read completely."""
    unread_named: tuple[str, ...] = ()
    """The first of them, each with its reason."""

    def describe(self) -> str:
        """One line for the console."""
        parts = [f"layout {self.layout}"] if self.layout else []
        parts += [f"each counted in {self.forms} forms"] if self.forms > 1 else []
        parts += [f"{count:,} {state}" for state, count in self.states.items() if set(self.states) != {NEW}]
        parts += [f"{count:,} left out: {reason}" for reason, count in sorted(self.left_out.items())]
        parts += [f"not read: {first_named(self.unread, self.unread_named)}"] if self.unread else []
        return f"{self.count:,} images to do" + (f" ({'; '.join(parts)})" if parts else "")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A manifest to write."""

    uri: str
    published: Iterable[pa.RecordBatch] = ()
    """Earlier results (`schema.DONE`), which decide what it holds."""


def write_manifest(
    source: Uri,
    uri: str,
    selection: Selection | None = None,
    published: Iterable[pa.RecordBatch] = (),
    transforms: Sequence[str] = (),
) -> Plan:
    """As `write_manifests`, for one manifest."""
    (plan,) = write_manifests(source, [Target(uri=uri, published=published)], selection, transforms)
    return plan


def write_manifests(
    source: Uri, targets: Sequence[Target], selection: Selection | None = None, transforms: Sequence[str] = ()
) -> list[Plan]:
    """List a source once and write manifests (`schema.MANIFEST`); empty ones if all images were processed before.

    `transforms`: chains of `nsnet.transforms`; each image gets one row with its own id per chain ("": unchanged).
    Raises `SourceError`, and writes nothing, if the source holds no image.
    """
    selection = selection or Selection()
    listing = Source(source, selection.include, selection.exclude, selection.named_columns())
    if any(target.uri.startswith(listing.uri.rstrip("/") + "/") for target in targets):
        raise UsageError(f"--out is inside the source {listing.uri}, which would list it: choose a folder outside")
    forms = list(dict.fromkeys(transform or None for transform in transforms)) or [None]
    wanted = _quoted(selection.states())
    with database() as rows:
        _load(rows, "forms", {"form": range(len(forms)), "transform": forms}, FORMS)
        _load_histories(rows, [target.published for target in targets])
        _load_listing(rows, listing, selection, wanted)
        states: list[dict[str, int]] = [
            dict(rows.execute(f"select state, count(*) from planned where history = {i} group by 1"))
            for i in range(len(targets))
        ]
        if not states[0]:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(listing.left_out.items()))
            problem = "holds no images" + (f" ({reasons})" if reasons else "")
            if unread := listing.left_out.unread:
                problem = f"{problem} in its readable part; not read: {first_named(unread, listing.left_out.named)}"
            raise SourceError(f"{listing.uri} {problem}")
        if repeated := rows.number("select count(*) from listed") - sum(states[0].values()) // len(forms):
            listing.left_out["listed twice"] += repeated
        _load(rows, "classes", {SERIES: sorted(listing.classes)}, CLASSES)
        layout = _recognise(rows, listing.uri)
        _merge(rows)
        plans = []
        for i, target in enumerate(targets):
            labels: Counter[int | None] = Counter()
            batches = _counted(_chosen(rows, i, selection, wanted), labels)
            plans.append(
                Plan(
                    uri=target.uri,
                    count=parquet.write(batches, schema.MANIFEST, target.uri),
                    left_out=dict(listing.left_out),
                    labels=dict(labels),
                    states={state: states[i][state] for state in (NEW, CHANGED, FAILED, SCORED) if state in states[i]},
                    layout=layout.name,
                    forms=len(forms),
                    unread=listing.left_out.unread,
                    unread_named=tuple(listing.left_out.named),
                )
            )
    return plans


def _recognise(rows: Database, source: Uri) -> Layout:
    """Create the view `labelled`: the listed rows with the labels that all folders together give them."""
    folder_rows = rows.execute(f"select distinct folder from listed where folder is not null limit {MAX_FOLDERS + 1}")
    is_compared = len(folder_rows) <= MAX_FOLDERS
    layout = (
        benchmarks.recognise([folder for (folder,) in folder_rows], source)
        if is_compared
        else Layout(remarks=(TOO_MANY_FOLDERS,))
    )
    folders = sorted({*layout.labels, *layout.decided})
    generators, splits = ([layout.labels.get(folder, (None, None))[i] for folder in folders] for i in (0, 1))
    labels = [layout.decided.get(folder) for folder in folders]
    columns = {"folder": folders, "label": labels, "generator": generators, "split": splits}
    _load(rows, "folders", columns, FOLDERS)
    # a join, because an update would rewrite the whole listing; values from columns take precedence over folders
    generator_and_split = ", ".join(
        f"case when d.folder is null then l.{name} when d.label is null then d.{name} "
        f"else coalesce(l.{name}, d.{name}) end as {name}"
        for name in ("generator", "split")
    )
    rows.execute(
        f"create view labelled as select l.* exclude (folder, {SERIES}) replace ("
        f"case when c.{SERIES} is null then coalesce(l.label, d.label) end as label, {generator_and_split}) "
        f"from listed l left join folders d on l.folder = d.folder left join classes c on l.{SERIES} = c.{SERIES}"
    )
    if classes := rows.number(f"select count(*) from listed semi join classes using ({SERIES})"):
        say(
            f"warning: {source}: {classes:,} images have the numbers 0 and 1 where other files of their series hold "
            "more classes: they have no label"
        )
    for remark in (*layout.remarks, *(_beside(rows, source, layout) if layout.lone else [])):
        say(f"warning: {source}: {remark}")
    return layout


def _beside(rows: Database, source: Uri, layout: Layout) -> list[str]:
    """Remarks about images without a label beside folders of only one label."""
    path = "case when container is null then uri else substr(uri, length(container) + 2) end"
    counts = rows.execute(
        f"select regexp_replace({path}, '[^/]*$', ''), count(*) from labelled where label is null group by 1 "
        f"limit {MAX_FOLDERS}"
    )
    prefix = source.rstrip("/") + "/"
    return beside(layout.lone, {folder.removeprefix(prefix): count for folder, count in counts})


def _merge(rows: Database) -> None:
    """Create the table `repeated` of images that are listed more than once, with merged labels.

    Contradictory labels give no label; of generators and splits, the first non-null value counts.
    """
    rows.execute(
        "create table repeated as select image_id, min(label) as label, max(label) as other, "
        "arg_min(generator, n) as generator, arg_min(split, n) as split from labelled "
        "semi join (select image_id from listed group by 1 having count(*) > 1) using (image_id) group by 1"
    )
    if contradicting := rows.number("select count(*) from repeated where label <> other"):
        say(f"warning: {contradicting:,} images are listed twice with contradictory labels: they have no label")


def _chosen(rows: Database, history: int, selection: Selection, wanted: str) -> Iterator[pa.RecordBatch]:
    """Select the rows of a manifest, by the number of its history."""
    seed = selection.shuffle_seed
    order = "n" if seed is None else f"hash(l.image_id::varchar || '/{seed}'), l.image_id"
    first = "" if selection.limit is None else (
        f"and n in (select n from planned join listed l using (n) where state in ({wanted}) and history = {history} "
        f"group by n, l.image_id order by {order} limit {selection.limit})"
    )  # fmt: skip
    return rows.select(
        f"select l.* replace ({FORM_ID} as image_id, f.transform as transform, "
        "case when r.image_id is null then l.label when r.label = r.other then r.label end as label, "
        "coalesce(r.generator, l.generator) as generator, coalesce(r.split, l.split) as split) "
        "from planned join labelled l using (n) join forms f using (form) "
        "left join repeated r on l.image_id = r.image_id "
        f"where state in ({wanted}) and history = {history} {first} order by {order}, form"
    )


def _load(rows: Database, table: str, columns: dict[str, Any], columns_schema: pa.Schema) -> None:
    rows.create(table, "*", columns_schema)
    rows.insert(table, pa.table(columns, schema=columns_schema).to_batches())


def _load_histories(rows: Database, histories: Sequence[Iterable[pa.RecordBatch]]) -> None:
    """Create tables of images that were processed before, per history: `seen` ids, and `known` URIs in any version.

    Images that failed because a run's time budget was used up do not count as processed.
    """
    numbered = pa.schema([*schema.DONE, HISTORY])
    done = "image_id::uuid as image_id, hash(uri) as uri, status = 'scored' as scored, history"
    rows.create("done", done, numbered, where=f"error_class is distinct from '{ImageBudgetError.__name__}'")
    for number, published in enumerate(histories):
        rows.insert(
            "done",
            (batch.append_column(HISTORY, pa.array([number] * len(batch), HISTORY.type)) for batch in published),
        )
    rows.execute("create table seen as select history, image_id, bool_or(scored) as scored from done group by 1, 2")
    rows.execute("create table known as select distinct history, uri from done")
    _load(rows, "histories", {"history": range(len(histories))}, pa.schema([HISTORY]))


def _load_listing(rows: Database, source: Source, selection: Selection, wanted: str) -> None:
    """Create the tables `listed` and `planned`; the latter has each image once in each form, with the state that each
    history gives it.

    Listing stops early when it has enough images to process, which is tested each time the listing has doubled. Under
    a transform an image is new until it was processed under it, even if the file changed.
    """
    rows.create("listed", "* replace (image_id::uuid as image_id)", PLANNED_COLUMNS)
    rows.execute(
        f"create view judged as select l.n, f.form, h.history, case when s.scored then '{SCORED}' "
        f"when s.scored is not null then '{FAILED}' when k.uri is not null then '{CHANGED}' else '{NEW}' end as state "
        "from listed l semi join (select min(n) as n from listed group by image_id) a on l.n = a.n cross join forms f "
        "cross join histories h left join seen s on h.history = s.history and "
        f"case when f.transform is null then l.image_id else ({FORM_ID})::uuid end = s.image_id "
        "left join known k on h.history = k.history and case when f.transform is null then hash(l.uri) end = k.uri"
    )
    limit = selection.limit if selection.shuffle_seed is None else None
    listing = enumerate(source.rows())
    listed, portion, histories = 0, limit, rows.number("select count(*) from histories")
    while True:
        rows.insert("listed", _batches(listing if portion is None else islice(listing, portion)))
        before, listed = listed, rows.number("select count(*) from listed")
        if limit is None or portion is None or listed - before < portion:
            break
        enough = f"select count(distinct n) as images from judged where state in ({wanted}) group by history"
        if rows.number(f"select count(*) from ({enough}) where images >= {limit}") == histories:
            break
        portion = listed
    rows.execute("create table planned as select n, form, history, state from judged")


def _batches(listing: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[pa.RecordBatch]:
    last_update = time.monotonic()
    while batch := [{"n": n, **row} for n, row in islice(listing, parquet.BATCH_ROWS)]:
        yield pa.RecordBatch.from_pylist(batch, schema=PLANNED_COLUMNS)
        if time.monotonic() > last_update + UPDATE_SECONDS:
            last_update = time.monotonic()
            say(f"listing: {batch[-1]['n'] + 1:,} images so far")


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _counted(batches: Iterator[pa.RecordBatch], labels: Counter[int | None]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        labels.update(batch.column("label").to_pylist())
        yield batch
