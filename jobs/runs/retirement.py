"""Remove records that merged ones have replaced: those of a compaction whose readers have had their time, and merged
records whose files are missing.

Guards of a replaced record: the caller holds the lock; a merged record with all of its runs has been stored for the
grace, by the store's clock, so that whoever listed the records since does not use this one; and the merged records that
readers use instead are stored, with files whose content is as they say. That is checked before the first removal.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import pyarrow as pa

from jobs.console.output import say
from jobs.runs import names, removal, rows
from jobs.runs.products import PRODUCTS, VERDICTS, final_folder
from jobs.runs.records import Record, effective, is_merged, runs_of
from jobs.storage import errors, listing, reading, uris, writing
from jobs.storage.uris import Uri


def retire(out: Uri, records: Sequence[Record], grace_seconds: float, check: Callable[[], None]) -> tuple[int, int]:
    """Remove what merged records have replaced for longer than the grace: each record first, then its files.

    `records`: as they are stored now. Returns the numbers of removed records and files. A file that stays behind is an
    orphan, which the next run removes.
    """
    by_id = {record["run_id"]: record for record in records}
    runs = {record["run_id"]: _runs(record) for record in records if is_merged(record)}

    @cache
    def is_old(run_id: str) -> bool:
        return not grace_seconds or writing.age_seconds(_uri(out, run_id)) >= grace_seconds

    @cache
    def is_intact(run_id: str) -> bool:
        if reason := next(filter(None, (_difference(out, file) for file in by_id[run_id]["files"])), None):
            say(f"warning: what {_uri(out, run_id)} replaced stays, since {reason}: restore the file from a copy")
        return reason is None

    def is_due(record: Record) -> bool:
        own = _runs(record)
        return any(run_id != record["run_id"] and own <= held and is_old(run_id) for run_id, held in runs.items())

    removed_records = removed_files = 0
    due = [(record, used) for record, used in replaced(records) if is_due(record)]
    for record, used in due:
        if not all(map(is_intact, used)):
            continue
        check()
        if not all(listing.exists(_uri(out, run_id)) for run_id in used):
            continue  # a compaction that had lost the lock has removed its record meanwhile
        writing.remove_file(_uri(out, record["run_id"]))
        folder = uris.join(out, final_folder(record.get("product", VERDICTS.name), record["run_id"]))
        removed = removal.remove(folder, names.PARTS)
        removed_records, removed_files = removed_records + 1, removed_files + len(removed.removed)
        if removed.foreign:
            say(removal.left_alone(removed.foreign))
    return removed_records, removed_files


def replaced(records: Sequence[Record]) -> list[tuple[Record, list[str]]]:
    """The stored records that readers do not use, each with the ids of the merged records that they use instead."""
    used = effective(records)
    place = {run: record["run_id"] for record in used if is_merged(record) for run in _runs(record)}
    ids_of_used = {record["run_id"] for record in used}
    return [
        (record, sorted({place[run] for run in runs}))
        for record in records
        if record["run_id"] not in ids_of_used and (runs := _runs(record)) <= place.keys()
    ]


def remove_broken(out: Uri, records: Sequence[Record], check: Callable[[], None]) -> list[Record]:
    """Remove merged records whose files are missing, if other records with files hold all of their runs; returns the
    records that are left.

    A compaction that lost the lock may leave such a record: it was created after the next holder had listed the
    records, so that its files were orphans. The caller holds the lock.
    """
    by_id = {record["run_id"]: record for record in records}

    @cache
    def is_there(run_id: str) -> bool:
        return _are_there(out, by_id[run_id]["files"])

    broken = [record for record in records if is_merged(record) and not is_there(record["run_id"])]
    holders: dict[str, list[str]] = defaultdict(list)
    for record in records if broken else ():
        for run in _runs(record):
            holders[run].append(record["run_id"])
    for record in broken:
        if all(any(map(is_there, holders[run])) for run in _runs(record)):
            check()
            say(f"removed: {_uri(out, record['run_id'])}, whose files are missing; other records hold its runs")
            writing.remove_file(_uri(out, record["run_id"]))
            del by_id[record["run_id"]]
    return [*by_id.values()]


def _uri(out: Uri, run_id: str) -> str:
    return uris.join(out, "runs", f"{run_id}.json")


def _runs(record: Record) -> set[str]:
    """The runs of a record as texts that are equal only for the same run, maker and number of rows."""
    product = record.get("product", VERDICTS.name)
    maker = record.get(PRODUCTS[product].maker) if product in PRODUCTS else None
    return {repr((product, maker, run["run_id"], run.get("rows"))) for run in runs_of(record)}


def _are_there(out: Uri, files: Sequence[dict[str, Any]]) -> bool:
    """Whether the files of a record are there, with the sizes that it says, if it does."""
    for folder, some in groupby(files, key=lambda file: str(file["path"]).rpartition("/")[0]):
        sizes = {entry.uri: entry.size_bytes for entry in listing.list_files(uris.join(out, folder))}
        for file in some:
            size_bytes = sizes.get(uris.join(out, file["path"]))
            if size_bytes is None or file.get("size_bytes", size_bytes) != size_bytes:
                return False
    return True


def _difference(out: Uri, file: dict[str, Any]) -> str | None:
    """In what a file is not as its record says; None: nothing. Reads it once."""
    uri = uris.join(out, file["path"])
    try:
        with reading.local_copy(uri) as path:
            reason = rows.difference(path, file)
    except FileNotFoundError:
        reason = "it is missing"
    except pa.ArrowInvalid as error:
        reason = errors.reason(error)
    return reason and f"of {uri}, {reason}"
