"""What is to be done: a source's listing, less what was published before, as a manifest Parquet.

Listing and history meet in a database on disk, so that neither has to fit into the driver's memory.
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
from nsnet.errors import ConfigError, ImageBudgetError, SourceError, UsageError

UPDATE_SECONDS: Final = 5.0
"""Between lines about the progress of a listing."""
MAX_FOLDERS: Final = 50_000
"""Folders of a source that are compared with each other for its labels: a bucket may have millions."""

LISTED_COLUMNS: Final = pa.schema(
    [pa.field("n", pa.int64()), *schema.MANIFEST, pa.field("folder", pa.string()), pa.field(SERIES, pa.string())]
)
"""What a source lists, numbered, with the folder or the series of containers that its labels come from."""
CLASSES: Final = pa.schema([pa.field(SERIES, pa.string())])
FORMS: Final = pa.schema([pa.field("form", pa.int64()), schema.TRANSFORM])
"""Forms in which each image is done, in their order: as it is, or under a transform."""
FOLDERS: Final = pa.schema([pa.field("folder", pa.string()), *schema.LABELS, schema.SPLIT_COLUMN])
"""What folders say in the layout of their source: with a label, where their own path does not say one."""

TOO_MANY_FOLDERS: Final = (
    f"there are more than {MAX_FOLDERS:,} folders with labels: they are not compared, each says what its name says"
)

PLAIN_ID: Final = "replace(l.image_id::varchar, '-', '')"
"""Identity of an image `l`, as text."""
FORM_ID: Final = (
    f"case when f.transform is null then {PLAIN_ID} else left(sha256({PLAIN_ID} || '/' || f.transform), 32) end"
)
"""Its identity in a form `f`."""

NEW: Final = "new"
CHANGED: Final = "changed"
FAILED: Final = "failed before"
SCORED: Final = "scored before"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which images of a source are to be done."""

    include: tuple[str, ...] = ()
    """Globs over the path below the source, of which an image must match one; none: all are taken."""
    exclude: tuple[str, ...] = ()
    """Globs of which it must match none."""
    limit: int | None = None
    """Most images, each in all its forms: the first that are found, in no order."""
    shuffle_seed: int | None = None
    """Do them in a random order; with `limit`, a random sample."""
    columns: tuple[str, ...] = ()
    """`KEY=NAME` each: what columns of Parquet files are called that are not called as usual (`tables.KEYS`)."""
    retry_failed: bool = False
    """Do again what failed before."""
    rescore: bool = False
    """Do everything again."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        self.named_columns()

    def named_columns(self) -> dict[str, str]:
        """What is looked for -> name of the column. Raises `ConfigError`."""
        named = {}
        for text in self.columns:
            key, separator, name = text.partition("=")
            if not separator or not name or key not in KEYS:
                raise ConfigError(f"--column {text}: give KEY=NAME, where KEY is one of {', '.join(KEYS)}")
            named[key] = name
        return named

    def states(self) -> set[str]:
        """The states of images that are to be done."""
        if self.rescore:
            return {NEW, CHANGED, FAILED, SCORED}
        return {NEW, CHANGED} | ({FAILED} if self.retry_failed else set())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A written manifest."""

    uri: str
    """The manifest Parquet."""
    count: int
    """Images in it, each counted in each of its forms; so below."""
    left_out: dict[str, int]
    """Reason -> objects of the source that are not in it."""
    labels: dict[int | None, int]
    """Label -> images in it."""
    states: dict[str, int] = field(default_factory=dict)
    """New, changed, failed before, scored before -> images of the listing, in the manifest or not."""
    layout: str | None = None
    """The benchmark that the source was recognised as; None: none."""
    forms: int = 1
    """Forms of each image: as it is, or under a transform."""
    unread: int = 0
    """Folders and containers of the source that could not be read, or not to their end, whatever they hold."""
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


def write_manifest(
    source: Uri,
    uri: str,
    selection: Selection | None = None,
    published: Iterable[pa.RecordBatch] = (),
    transforms: Sequence[str] = (),
) -> Plan:
    """List a source into a manifest (`schema.MANIFEST`), which may come out empty where everything was done before.

    `published`: what was done before (`schema.DONE`). `transforms`: chains of `nsnet.transforms`, of which each image
    is done under each, as a row with an identity of its own beside its others; "": as it is. Raises `SourceError` when
    the source holds no image; nothing is left behind then.
    """
    selection = selection or Selection()
    listing = Source(source, selection.include, selection.exclude, selection.named_columns())
    if uri.startswith(listing.uri.rstrip("/") + "/"):
        raise UsageError(f"--out lies inside the source {listing.uri}, which would list it: choose a place beside it")
    forms = list(dict.fromkeys(transform or None for transform in transforms)) or [None]
    wanted = _quoted(selection.states())
    with database() as rows:
        _load(rows, "forms", {"form": range(len(forms)), "transform": forms}, FORMS)
        _load_history(rows, published)
        _load_listing(rows, listing, selection, wanted)
        states = dict(rows.execute("select state, count(*) from planned group by 1"))
        if not states:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(listing.left_out.items()))
            what = "holds no images" + (f" ({reasons})" if reasons else "")
            if unread := listing.left_out.unread:
                what = f"{what}, as far as it can be read; not read: {first_named(unread, listing.left_out.named)}"
            raise SourceError(f"{listing.uri} {what}")
        if repeated := rows.number("select count(*) from listed") - sum(states.values()) // len(forms):
            listing.left_out["listed twice"] += repeated
        _load(rows, "classes", {SERIES: sorted(listing.classes)}, CLASSES)
        layout = _recognise(rows, listing.uri)
        _merge(rows)
        labels: Counter[int | None] = Counter()
        count = parquet.write(_counted(_chosen(rows, selection, wanted), labels), schema.MANIFEST, uri)
    return Plan(
        uri=uri,
        count=count,
        left_out=dict(listing.left_out),
        labels=dict(labels),
        states={state: states[state] for state in (NEW, CHANGED, FAILED, SCORED) if state in states},
        layout=layout.name,
        forms=len(forms),
        unread=listing.left_out.unread,
        unread_named=tuple(listing.left_out.named),
    )


def _recognise(rows: Database, source: Uri) -> Layout:
    """View `labelled` of what is listed, with what its folders say together."""
    found = rows.execute(f"select distinct folder from listed where folder is not null limit {MAX_FOLDERS + 1}")
    few = len(found) <= MAX_FOLDERS
    layout = (
        benchmarks.recognise([folder for (folder,) in found], source) if few else Layout(remarks=(TOO_MANY_FOLDERS,))
    )
    folders = sorted({*layout.labels, *layout.decided})
    generators, splits = ([layout.labels.get(folder, (None, None))[i] for folder in folders] for i in (0, 1))
    labels = [layout.decided.get(folder) for folder in folders]
    columns = {"folder": folders, "label": labels, "generator": generators, "split": splits}
    _load(rows, "folders", columns, FOLDERS)
    # a join, since an update would write the whole listing anew; what a column says goes before what folders decide
    said = ", ".join(
        f"case when d.folder is null then l.{name} when d.label is null then d.{name} "
        f"else coalesce(l.{name}, d.{name}) end as {name}"
        for name in ("generator", "split")
    )
    rows.execute(
        f"create view labelled as select l.* exclude (folder, {SERIES}) replace ("
        f"case when c.{SERIES} is null then coalesce(l.label, d.label) end as label, {said}) "
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
    """Remarks on images without a label that lie beside folders of one label only."""
    path = "case when container is null then uri else substr(uri, length(container) + 2) end"
    found = rows.execute(
        f"select regexp_replace({path}, '[^/]*$', ''), count(*) from labelled where label is null group by 1 "
        f"limit {MAX_FOLDERS}"
    )
    prefix = source.rstrip("/") + "/"
    return beside(layout.lone, {folder.removeprefix(prefix): count for folder, count in found})


def _merge(rows: Database) -> None:
    """Table `repeated` of images that are listed more than once: what their rows say together.

    Labels that contradict each other are none; of generators and splits, the first that is said counts.
    """
    rows.execute(
        "create table repeated as select image_id, min(label) as label, max(label) as other, "
        "arg_min(generator, n) as generator, arg_min(split, n) as split from labelled "
        "semi join (select image_id from listed group by 1 having count(*) > 1) using (image_id) group by 1"
    )
    if contradicting := rows.number("select count(*) from repeated where label <> other"):
        say(f"warning: {contradicting:,} images are listed twice with labels that contradict each other and have none")


def _chosen(rows: Database, selection: Selection, wanted: str) -> Iterator[pa.RecordBatch]:
    """The manifest's rows."""
    seed = selection.shuffle_seed
    order = "n" if seed is None else f"hash(l.image_id::varchar || '/{seed}'), l.image_id"
    first = "" if selection.limit is None else (
        f"and n in (select n from planned join listed l using (n) where state in ({wanted}) group by n, l.image_id "
        f"order by {order} limit {selection.limit})"
    )  # fmt: skip
    return rows.select(
        f"select l.* replace ({FORM_ID} as image_id, f.transform as transform, "
        "case when r.image_id is null then l.label when r.label = r.other then r.label end as label, "
        "coalesce(r.generator, l.generator) as generator, coalesce(r.split, l.split) as split) "
        "from planned join labelled l using (n) join forms f using (form) "
        "left join repeated r on l.image_id = r.image_id "
        f"where state in ({wanted}) {first} order by {order}, form"
    )


def _load(rows: Database, table: str, columns: dict[str, Any], of: pa.Schema) -> None:
    rows.create(table, "*", of)
    rows.insert(table, pa.table(columns, schema=of).to_batches())


def _load_history(rows: Database, published: Iterable[pa.RecordBatch]) -> None:
    """Tables of what was done before: `seen` images, and `known` URIs in any version.

    Those that a run had no time for were not done.
    """
    done = "image_id::uuid as image_id, hash(uri) as uri, status = 'scored' as scored"
    rows.create("done", done, schema.DONE, where=f"error_class is distinct from '{ImageBudgetError.__name__}'")
    rows.insert("done", published)
    rows.execute("create table seen as select image_id, bool_or(scored) as scored from done group by 1")
    rows.execute("create table known as select distinct uri from done")


def _load_listing(rows: Database, source: Source, selection: Selection, wanted: str) -> None:
    """Table `listed`, and table `planned` of each of its images once in each form, by number, form and state.

    Listing stops early once enough images to do are found, which is asked each time the listing has doubled. Under a
    transform an image is new until it was done under it, whatever became of the file.
    """
    rows.create("listed", "* replace (image_id::uuid as image_id)", LISTED_COLUMNS)
    rows.execute(
        f"create view judged as select l.n, f.form, case when s.scored then '{SCORED}' when s.scored is not null then "
        f"'{FAILED}' when k.uri is not null then '{CHANGED}' else '{NEW}' end as state from listed l "
        "semi join (select min(n) as n from listed group by image_id) a on l.n = a.n cross join forms f "
        f"left join seen s on case when f.transform is null then l.image_id else ({FORM_ID})::uuid end = s.image_id "
        "left join known k on case when f.transform is null then hash(l.uri) end = k.uri"
    )
    limit = selection.limit if selection.shuffle_seed is None else None
    listing = enumerate(source.rows())
    listed, portion = 0, limit
    while True:
        rows.insert("listed", _batches(listing if portion is None else islice(listing, portion)))
        before, listed = listed, rows.number("select count(*) from listed")
        if limit is None or portion is None or listed - before < portion:
            break
        if rows.number(f"select count(distinct n) from judged where state in ({wanted})") >= limit:
            break
        portion = listed
    rows.execute("create table planned as select n, form, state from judged")


def _batches(listing: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[pa.RecordBatch]:
    last_update = time.monotonic()
    while some := [{"n": n, **row} for n, row in islice(listing, parquet.BATCH_ROWS)]:
        yield pa.RecordBatch.from_pylist(some, schema=LISTED_COLUMNS)
        if time.monotonic() > last_update + UPDATE_SECONDS:
            last_update = time.monotonic()
            say(f"listing: {some[-1]['n'] + 1:,} images so far")


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _counted(batches: Iterator[pa.RecordBatch], labels: Counter[int | None]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        labels.update(batch.column("label").to_pylist())
        yield batch
