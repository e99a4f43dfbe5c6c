"""What is to be done: a source's listing, less what was published before, as a manifest Parquet.

Listing and history meet in a database on disk, so that neither has to fit into the driver's memory.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import pyarrow as pa

from jobs import parquet, schema
from jobs.console import say
from jobs.database import Database, database
from jobs.sources import Source
from nsnet.errors import ConfigError, SourceError, UsageError

TOLD_SECONDS: Final = 5.0
"""Between lines about the progress of a listing."""

NEW: Final = "new"
CHANGED: Final = "changed"
FAILED: Final = "failed before"
SCORED: Final = "scored before"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pictures of a source are to be done."""

    include: tuple[str, ...] = ()
    """Globs over the path below the source, of which a picture must match one; none: all are taken."""
    exclude: tuple[str, ...] = ()
    """Globs of which it must match none."""
    limit: int | None = None
    """Most pictures: the first that are found, in no order."""
    shuffle_seed: int | None = None
    """Do them in a random order; with `limit`, a random sample."""
    retry_failed: bool = False
    """Do again what failed before."""
    rescore: bool = False
    """Do everything again."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")

    def states(self) -> set[str]:
        """The states of pictures that are to be done."""
        if self.rescore:
            return {NEW, CHANGED, FAILED, SCORED}
        return {NEW, CHANGED} | ({FAILED} if self.retry_failed else set())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A written manifest."""

    uri: str
    """The manifest Parquet."""
    count: int
    """Pictures in it."""
    left_out: dict[str, int]
    """Reason -> objects of the source that are not in it."""
    labels: dict[int | None, int]
    """Label -> pictures in it."""
    states: dict[str, int] = field(default_factory=dict)
    """New, changed, failed before, scored before -> pictures of the listing, in the manifest or not."""

    def describe(self) -> str:
        """One line for the console."""
        told = [f"{count:,} {state}" for state, count in self.states.items() if set(self.states) != {NEW}]
        told += [f"{count:,} left out: {reason}" for reason, count in sorted(self.left_out.items())]
        return f"{self.count:,} pictures to do" + (f" ({'; '.join(told)})" if told else "")


def write_manifest(
    source: str, uri: str, selection: Selection | None = None, published: Iterable[pa.RecordBatch] = ()
) -> Plan:
    """List a source into a manifest (`schema.MANIFEST`), which may come out empty where everything was done before.

    `published`: what was done before (`schema.DONE`). Raises `SourceError` when the source holds no picture; nothing is
    left behind then.
    """
    selection = selection or Selection()
    listing = Source(source, selection.include, selection.exclude)
    if uri.startswith(listing.uri.rstrip("/") + "/"):
        raise UsageError(f"--out lies inside the source {listing.uri}, which would list it: choose a place beside it")
    wanted = _quoted(selection.states())
    with database() as rows:
        _load_history(rows, published)
        _load_listing(rows, listing, selection, wanted)
        states = dict(rows.execute("select state, count(*) from planned group by 1"))
        if not states:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(listing.left_out.items()))
            raise SourceError(f"{listing.uri} holds no pictures" + (f" ({reasons})" if reasons else ""))
        if repeated := rows.number("select count(*) from listed") - sum(states.values()):
            listing.left_out["listed twice"] += repeated
        chosen = rows.select(
            "select listed.* replace (replace(image_id::varchar, '-', '') as image_id) from planned join listed using "
            f"(n) where state in ({wanted}) order by {_order(selection.shuffle_seed)} {_limit(selection.limit)}"
        )
        labels: Counter[int | None] = Counter()
        count = parquet.write(_counted(chosen, labels), schema.MANIFEST, uri)
    return Plan(
        uri=uri,
        count=count,
        left_out=dict(listing.left_out),
        labels=dict(labels),
        states={state: states[state] for state in (NEW, CHANGED, FAILED, SCORED) if state in states},
    )


def _order(shuffle_seed: int | None) -> str:
    return "n" if shuffle_seed is None else f"hash(image_id::varchar || '/{shuffle_seed}'), image_id"


def _limit(limit: int | None) -> str:
    return "" if limit is None else f"limit {limit}"


def _load_history(rows: Database, published: Iterable[pa.RecordBatch]) -> None:
    """Tables of what was done before: `seen` pictures, and `known` URIs in any version."""
    rows.create("done", "image_id::uuid as image_id, hash(uri) as uri, status = 'scored' as scored", schema.DONE)
    rows.insert("done", published)
    rows.execute("create table seen as select image_id, bool_or(scored) as scored from done group by 1")
    rows.execute("create table known as select distinct uri from done")


def _load_listing(rows: Database, source: Source, selection: Selection, wanted: str) -> None:
    """Table `listed`, and table `planned` of each of its pictures once, by number and state.

    Listing stops early once enough pictures to do are found, which is asked each time the listing has doubled.
    """
    numbered = pa.schema([pa.field("n", pa.int64()), *schema.MANIFEST])
    rows.create("listed", "* replace (image_id::uuid as image_id)", numbered)
    rows.execute(
        f"create view judged as select l.n, case when s.scored then '{SCORED}' when s.scored is not null then "
        f"'{FAILED}' when k.uri is not null then '{CHANGED}' else '{NEW}' end as state from listed l "
        "semi join (select min(n) as n from listed group by image_id) f on l.n = f.n "
        "left join seen s on l.image_id = s.image_id left join known k on hash(l.uri) = k.uri"
    )
    limit = selection.limit if selection.shuffle_seed is None else None
    listing = enumerate(source.rows())
    listed, portion = 0, limit
    while True:
        rows.insert("listed", _batches(listing if portion is None else islice(listing, portion), numbered))
        before, listed = listed, rows.number("select count(*) from listed")
        if limit is None or portion is None or listed - before < portion:
            break
        if rows.number(f"select count(*) from judged where state in ({wanted})") >= limit:
            break
        portion = listed
    rows.execute("create table planned as select n, state from judged")


def _batches(listing: Iterator[tuple[int, dict[str, Any]]], numbered: pa.Schema) -> Iterator[pa.RecordBatch]:
    told = time.monotonic()
    while some := [{"n": n, **row} for n, row in islice(listing, parquet.BATCH_ROWS)]:
        yield pa.RecordBatch.from_pylist(some, schema=numbered)
        if time.monotonic() > told + TOLD_SECONDS:
            told = time.monotonic()
            say(f"listing: {some[-1]['n'] + 1:,} pictures so far")


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _counted(batches: Iterator[pa.RecordBatch], labels: Counter[int | None]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        labels.update(batch.column("label").to_pylist())
        yield batch
