"""Compaction: merge the records and files of many small runs into one record and one file, without a moment in which a
reader sees a row twice or misses one.

1. The files of the runs are compared with their records. Their rows are written as a new file, in the order of the
   runs, and read back and compared.
2. A merged record is created (`jobs.runs.records`). From here on readers of records use it instead of the old ones.
3. The old records, then their files, stay for a grace period, for readers that listed the records before. The first
   compaction after that removes them, when it has found the files that readers use now intact (`jobs.runs.retirement`).

Whatever happens between two steps leaves files that no record names, which the next run removes, or two records of a
run, of which readers use one. A process that loses the lock removes the record that it has just created, since the next
holder may have removed its files; if it cannot, the next run does. The merged record is named after its newest run, so
that it takes its place in the order of runs, and by a digest of its runs, so that two processes that merge the same
runs create the same record.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.runs import attempts, catalog, lock, publication, records, rows
from jobs.runs.attempts import RUN_ID
from jobs.runs.products import PRODUCTS, VERDICTS, Product
from jobs.runs.publication import Run, VerificationError
from jobs.runs.records import Record, effective, run_ids, runs_of, stored
from jobs.runs.retirement import remove_broken, replaced, retire
from jobs.runs.rows import read_rows
from jobs.storage import listing, parquet, reading, uris, writing
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError, LockedError, SourceError, StorageError

MAX_RECORD_BYTES: Final = reading.MAX_JSON_BYTES // 4
"""JSON of the runs of a merged record, at most; it is less in the record, which holds what all have in common once."""
GRACE_SECONDS: Final = 24 * 3600.0
"""How long merged records and files stay for readers that began before."""
SUMMED: Final = ("rows", "seconds", "counts", "distributions", "store", "captions")
"""Keys of a merged record that are sums over its runs, for readers that do not know `runs`."""
NOT_MERGED: Final = ("attempts", "arithmetic", "listing")
"""Keys that say nothing about several runs together."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Records of one maker, with no rows of another run of it between theirs, that become one."""

    product: Product
    records: tuple[Record, ...]
    """As they are stored, oldest first."""

    @property
    def runs(self) -> list[Record]:
        """Their runs, oldest first."""
        return catalog.runs_in(self.records)

    @property
    def rows(self) -> int:
        """Number of their rows."""
        return sum(run["rows"] for run in self.runs)

    @property
    def run_id(self) -> str:
        """Id of the merged record."""
        ids = [run["run_id"] for run in self.runs]
        return f"{ids[-1][:16]}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:6]}"

    def describe(self) -> dict[str, Any]:
        """What is merged; JSON-ready."""
        runs, files = self.runs, [file for record in self.records for file in record["files"]]
        return {
            "run_id": self.run_id,
            "product": self.product.name,
            self.product.maker: runs[-1].get(self.product.maker),
            "first_run": runs[0]["run_id"],
            "last_run": runs[-1]["run_id"],
            "runs": len(runs),
            "rows": self.rows,
            "records": len(self.records),
            "files": len(files),
        }


@dataclass
class Result:
    """What a compaction did, or would do."""

    merged: list[dict[str, Any]] = field(default_factory=list)
    """`Merge.describe` of each, and `files_after` and `bytes_after`."""
    removed_records: int = 0
    removed_files: int = 0
    waiting_records: int = 0
    """Records that were merged and stay until their grace is over."""


def compact(
    out: Uri,
    *,
    products: Sequence[Product] = tuple(PRODUCTS.values()),
    before: str | None = None,
    target_rows: int | None = None,
    grace_seconds: float = GRACE_SECONDS,
    wait: bool = False,
    dry_run: bool = False,
) -> Result:
    """Merge small runs of an output, and remove what was merged longer ago than the grace.

    `before`: only runs whose id sorts before this text, such as a date `20260102`. `target_rows`: about the largest
    number of rows of a merged file; None: of the product's files. Runs of half of it are left as they are. `dry_run`:
    only tell. Raises `LockedError` while a run writes to the output, unless `wait`.
    """
    if target_rows is not None and target_rows < 2:
        raise ConfigError(f"--target-rows must be at least 2, got {target_rows}")
    if grace_seconds < 0:
        raise ConfigError(f"--grace must not be negative, got {grace_seconds:g} s")

    def planned(found: Sequence[Record]) -> list[Merge]:
        return [merge for product in products for merge in merges(found, product, before, target_rows)]

    found = stored(out)
    if not found:
        raise SourceError(f"{out} holds no published runs")
    result = Result()
    if dry_run:
        result.merged = [merge.describe() for merge in planned(found)]
        result.waiting_records = len(replaced(found))
        return result
    with lock.hold(out, wait=wait) as held:
        found = remove_broken(out, stored(out), held.check)
        publication.remove_orphans(out, found, attempts.unfinished(out))
        for merge in planned(found):
            described = merge.describe()
            say(f"merging {described['runs']:,} runs of {merge.product.name}: {described['rows']:,} rows")
            result.merged.append(described | merge_runs(out, merge, held.check))
        result.removed_records, result.removed_files = retire(out, stored(out), grace_seconds, held.check)
        result.waiting_records = len(replaced(stored(out)))
    return result


def merges(
    found: Sequence[Record], product: Product, before: str | None = None, target_rows: int | None = None
) -> list[Merge]:
    """The merges of a product's stored records; see `compact`.

    A record of half the target's rows ends a merge, so it is written once. Smaller ones are written again when more
    have come. Records without rows that are alone between two such records are merged with each other.
    """
    full = (target_rows or product.rows_per_file) // 2
    of_product = [record for record in effective(found) if record.get("product", VERDICTS.name) == product.name]
    makers = dict.fromkeys(record[product.maker] for record in of_product if type(record.get(product.maker)) is str)
    groups: list[list[Record]] = []
    for maker in makers:
        by_rows = [*_groups([record for record in of_product if record.get(product.maker) == maker], full, before)]
        alone = [group[0] for group in by_rows if len(group) == 1 and not group[0]["files"]]
        groups += [*by_rows, *_groups(alone, full, before)]
    return [Merge(product=product, records=tuple(group)) for group in groups if len(group) > 1]


def _groups(found: Sequence[Record], full: int, before: str | None) -> Iterator[list[Record]]:
    """Records of one maker that follow each other and together make a file of `full` rows, or all that there are."""
    group: list[Record] = []
    json_bytes = 0
    for record in found:
        if not _is_small(record, full) or (before is not None and max(run_ids(record)) >= before):
            yield group
            group, json_bytes = [], 0
            continue
        own_bytes = sum(len(json.dumps(run)) for run in runs_of(record))
        captioners = {one.get("captioner_id") for one in [*group, record] if one["files"]}
        if len(captioners) > 1 or json_bytes + own_bytes > MAX_RECORD_BYTES:
            yield group
            group, json_bytes = [], 0
        group, json_bytes = [*group, record], json_bytes + own_bytes
        if sum(one["rows"] for one in group) >= full:
            yield group
            group, json_bytes = [], 0
    yield group


def _is_small(record: Record, full: int) -> bool:
    """Whether a record has fewer rows than this; of a record that does not say how many, nobody knows."""
    numbers = [record.get("rows"), *(file.get("rows") for file in record["files"])]
    are_valid = all(type(number) is int and number >= 0 for number in numbers)
    return are_valid and numbers[0] == sum(numbers[1:]) and numbers[0] < full


def merge_runs(out: Uri, merge: Merge, check: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Write the merged file and create its record; returns `files_after` and `bytes_after`.

    Raises `StorageError` for a file that is not as its record says; `VerificationError` if the rows read back differ,
    or if another record has the name; and what `check` raises.
    """
    product, runs = merge.product, merge.runs
    run = Run(out=out, product=product, run_id=merge.run_id)
    whole = replace(product, rows_per_file=max(1, merge.rows))
    files: list[dict[str, Any]] = []
    encoded = b""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            near = _check_files(out, merge, scratch)
            own = _of_runs(read_rows(near, runs, product.columns), runs, out)
            for file in publication.write_parts(own, whole, run.final):
                files.append({**file, "path": file["path"].removeprefix(out + "/")})
            new = read_rows(out, [{"files": files}], product.columns)
            if not _same_rows(read_rows(near, runs, product.columns), new):
                raise VerificationError(f"{run.final} does not hold the rows that were merged: nothing was changed")
            record = writing.encode_json(_merged_record(merge, files), indent=None)
            _check_record(record, f"{scratch}/{run.run_id}.json")
        check()
        encoded = record
        publication.create_record(run.record, encoded)
        check()
    except (VerificationError, LockedError, lock.LockLost):
        # the next holder may have removed the files as orphans, so the record must go; but not if it relied on both
        if _are_stored(out, merge.records):
            publication.withdraw_record(run.record, encoded)
            for file in files:
                writing.remove_file(uris.join(out, file["path"]))
        raise
    return {"files_after": len(files), "bytes_after": sum(file["size_bytes"] for file in files)}


def _check_files(out: Uri, merge: Merge, scratch: str) -> Uri:
    """Raise `StorageError` for a file that is not as its record says, or that a newer release wrote: its further
    columns would be lost. Returns an output that has the files: `out`, or `scratch` with copies, so that a store is
    read once.
    """
    near = out if uris.is_local(out) else Uri(scratch)

    def check(named: tuple[Record, dict[str, Any]]) -> None:
        record, file = named
        uri, path = uris.join(out, file["path"]), Path(near, file["path"])
        remedy = f"restore it from a copy, or remove it and its record {record['run_id']} to do its images again"
        with rows.naming(uri, uris.join(out, "runs", f"{record['run_id']}.json")):
            if near != out:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(reading.read_bytes(uri))
            if reason := rows.difference(path, file):
                raise reading.damaged(uri, reason, remedy)
            with parquet.opened(str(path)) as opened:
                unknown = sorted({*opened.schema.names} - {*merge.product.columns.names})
        if unknown:
            raise StorageError(
                f"{uri} has columns that this release does not know ({', '.join(unknown)[:100]}): compact with the "
                "release that wrote it"
            )

    with ThreadPoolExecutor(parquet.READERS) as pool:
        list(pool.map(check, [(record, file) for record in merge.records for file in record["files"]]))
    return near


def _of_runs(batches: Iterator[pa.RecordBatch], runs: Sequence[Record], out: Uri) -> Iterator[pa.RecordBatch]:
    """The batches, if they hold the rows of these runs in their order. Raises `StorageError`."""
    ends = np.cumsum([run["rows"] for run in runs])
    ids = np.array([run["run_id"] for run in runs])
    at = 0
    for batch in batches:
        if RUN_ID.name in batch.schema.names and at + len(batch) <= ends[-1]:
            expected = ids[np.searchsorted(ends, np.arange(at, at + len(batch)), side="right")]
            differs = pc.fill_null(pc.not_equal(batch.column(RUN_ID.name), pa.array(expected)), True)
            if pc.any(differs).as_py():
                run_id = expected[pc.index(differs, True).as_py()]
                raise StorageError(
                    f"the files of the run {run_id} in {out} hold rows of another run: restore them from a copy, or "
                    "remove the run's record and files to do its images again"
                )
        at += len(batch)
        yield batch
    if at != ends[-1]:
        raise StorageError(f"the files of {len(runs):,} runs in {out} hold {at:,} rows, and their records {ends[-1]:,}")


def _check_record(encoded: bytes, path: str) -> None:
    """Raise `VerificationError` for a record that readers would refuse. `path`: of a scratch file with its name."""
    writing.write_bytes(path, encoded)
    try:
        records.read(path, remedy="nothing was changed, leave its runs out with --before")
    except StorageError as error:
        raise VerificationError(f"readers would refuse the merged record: {error}") from error


def _are_stored(out: Uri, found: Sequence[Record]) -> bool:
    """Whether these records are stored now."""
    stored_now = listing.versions_below(uris.join(out, "runs"))
    return all(f"{record['run_id']}.json" in stored_now for record in found)


def _same_rows(one: Iterator[pa.RecordBatch], other: Iterator[pa.RecordBatch]) -> bool:
    """Whether two streams hold the same rows in the same order, however they are cut into batches."""
    first, second = (parquet.portions(batches, parquet.BATCH_ROWS) for batches in (one, other))
    while True:
        left, right = next(first, None), next(second, None)
        if left is None or right is None:
            return left is None and right is None
        # NaN differs from itself, but not its text
        if not left.equals(right) and repr(left.to_pylist()) != repr(right.to_pylist()):
            return False


def _merged_record(merge: Merge, files: list[dict[str, Any]]) -> Record:
    """The record of a merge. Its top level reads like that of one run, for readers that do not know `runs`."""
    runs = [{name: value for name, value in run.items() if name != "files"} for run in merge.runs]
    with_rows = next((run for run in reversed(merge.runs) if run["files"]), {})  # only these name a captioner
    kept = {name: value for name, value in {**with_rows, **runs[-1]}.items() if name not in (*SUMMED, *NOT_MERGED)}
    sums = {name: _sum([run[name] for run in runs if name in run]) for name in SUMMED}
    common = {
        name: value
        for name, value in runs[0].items()
        if name not in ("run_id", "rows") and all(name in run and _equal(run[name], value) for run in runs)
    }
    supersedes = {record["run_id"] for record in merge.records} | {run["run_id"] for run in runs}
    for record in merge.records:
        supersedes |= {str(name) for name in record.get("supersedes", ())}
    return {
        **kept,
        **{name: value for name, value in sums.items() if value is not None},
        "run_id": merge.run_id,
        "product": merge.product.name,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
        "supersedes": sorted(supersedes),
        "common": common,
        "runs": [{name: value for name, value in run.items() if name not in common} for run in runs],
    }


def _equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, types included: 1, 1.0 and true are not."""
    return json.dumps(one) == json.dumps(other)


def _sum(values: Sequence[Any]) -> Any:
    """The sum of numbers, or of lists or objects of numbers, element by element; None if they do not match."""
    kinds = {type(value) for value in values}
    if kinds and kinds <= {int, float}:
        total = sum(values)
        return round(total, 1) if isinstance(total, float) else total
    if kinds == {list} and len({len(value) for value in values}) == 1:
        return [_sum(column) for column in zip(*values, strict=True)]
    if kinds == {dict}:
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _sum([value[key] for value in values if key in value]) for key in keys}
    return None
