"""Records of an output: read, validated, and each run once although a compaction may have replaced its record.

A record is stored as `<out>/runs/<run_id>.json`. A *merged* record (`jobs.runs.compaction`) stands for many runs: its
`runs` hold what their records said, oldest first, except `files`; `common` the values that all of them share. Its files
hold the rows of these runs in the same order, so the rows of a run are a slice, which its number of rows gives. It also
lists as `supersedes` the stored records that it replaces, for readers that do not know `runs`.

A run's own record stays beside the merged one for a while. `effective` chooses one of them, so that a reader sees each
row once, whatever a compaction does meanwhile.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from jobs.runs import names
from jobs.runs.products import PRODUCTS, VERDICTS, final_folder
from jobs.storage import filesystems, listing, reading, uris
from jobs.storage.uris import Uri
from nsnet.digest import is_digest
from nsnet.errors import StorageError

Record = dict[str, Any]

LISTINGS: Final = 3
"""Tries to read the records that a listing names, while a compaction removes some of them."""
REMEDY: Final = "restore it from a copy, or remove it and its files to judge their images again"
"""Default remedy for a damaged record."""
_last_read: dict[Uri, dict[str, tuple[str, Record]]] = {}
"""Output -> URI -> version and content of each record of its last listing: a run looks at them several times, and they
do not change."""


def stored(out: Uri) -> list[Record]:
    """The records below an output as they are stored, by name; of all products. Do not change them.

    Raises `StorageError` for a damaged record, or if records vanish again and again while they are read.
    """
    folder = uris.join(out, "runs")
    for _ in range(LISTINGS):
        versions = listing.versions_below(folder)
        found = {uris.join(folder, name): versions[name] for name in versions if names.RECORD.fullmatch(name)}
        known = _last_read.get(out, {})
        # a version is "" if the listing does not tell it
        new = [uri for uri, version in found.items() if not version or known.get(uri, ("",))[0] != version]
        try:
            with ThreadPoolExecutor(filesystems.LISTING_THREADS) as pool:
                fresh = dict(zip(new, pool.map(read, new), strict=True))
        except FileNotFoundError:
            continue
        records = {uri: fresh[uri] if uri in fresh else known[uri][1] for uri in found}
        _last_read[out] = {uri: (found[uri], record) for uri, record in records.items()}
        return [*records.values()]
    raise StorageError(
        f"records in {folder} were removed while they were read, {LISTINGS} times in a row: start the command again "
        "when nothing removes records there"
    )


def effective(records: Sequence[Record]) -> list[Record]:
    """The stored records to read, oldest first: each run is in exactly one of them.

    If a run has its own record and is also in a merged record, the merged one is chosen. Of merged records that share a
    run, first those that hold a run which no other record has, then those of more runs. Raises `StorageError` if a run
    would be left out.
    """
    holders = Counter(run_id for record in records for run_id in run_ids(record))

    def rank(record: Record) -> tuple[bool, int, str]:
        return min(holders[run_id] for run_id in run_ids(record)) == 1, len(run_ids(record)), record["run_id"]

    chosen: list[Record] = []
    covered: set[str] = set()
    merged = [record for record in records if is_merged(record)]
    for record in sorted(merged, key=rank, reverse=True):
        if covered.isdisjoint(run_ids(record)):
            chosen.append(record)
            covered |= run_ids(record)
    own = [record for record in records if not is_merged(record) and record["run_id"] not in covered]
    covered |= {record["run_id"] for record in own}
    for record in merged:
        if not covered.issuperset(run_ids(record)):
            other = next(one for one in chosen if not run_ids(one).isdisjoint(run_ids(record)))
            raise StorageError(
                f"the records {record['run_id']} and {other['run_id']} both hold the run "
                f"{min(run_ids(record) & run_ids(other))}, and neither can be left out: restore the records and files "
                "of their runs from a copy, or remove one of the two and its files to do the images that only it holds "
                "again"
            )
    return sorted([*chosen, *own], key=lambda record: str(record["run_id"]))


def is_merged(record: Record) -> bool:
    """Whether a stored record stands for several runs."""
    return record.get("product", VERDICTS.name) in PRODUCTS and "runs" in record


def run_ids(record: Record) -> set[str]:
    """Ids of the runs in a stored record."""
    return {run["run_id"] for run in record["runs"]} if is_merged(record) else {record["run_id"]}


def runs_of(record: Record) -> Iterator[Record]:
    """The records of the runs in a stored record. A file of a merged record has `start`: the rows before the run's."""
    if not is_merged(record):
        yield record
        return
    files = iter(record["files"])
    file, start = None, 0
    for run in record["runs"]:
        own, left = [], run["rows"]
        while left:
            if file is None or start == file["rows"]:
                file, start = next(files), 0
            taken = min(left, file["rows"] - start)
            if taken:
                own.append({**file, "rows": taken, "start": start})
            start, left = start + taken, left - taken
        yield {**record["common"], **run, "files": own}


def read(uri: str, remedy: str = REMEDY) -> Record:
    """A validated record. Others may write to the bucket, so a record must name only files of its own run.

    Raises `FileNotFoundError`, and `StorageError` for a damaged one.
    """
    record: Record = reading.read_json(uri, {"run_id": str, "files": list}, remedy)
    run_id, product = record["run_id"], record.get("product", VERDICTS.name)
    if not names.is_run_id(run_id) or not uri.endswith(f"/{run_id}.json"):
        raise reading.damaged(uri, f"it belongs to the run {run_id!r}", remedy)
    if type(product) is not str:
        raise reading.damaged(uri, f"its product is {product!r}", remedy)
    if product in PRODUCTS:  # other products come from other versions and are not read
        if reason := _flaw(record, run_id, product):
            raise reading.damaged(uri, reason, remedy)
        if is_merged(record) and (reason := _flaw_of_merged(record)):
            raise reading.damaged(uri, reason, remedy)
    return record


def _flaw(record: Record, run_id: str, product: str) -> str | None:
    """What this program cannot have written in a record; None: nothing."""
    if reason := _flaw_of_values(record):
        return reason
    folder = f"{final_folder(product, run_id)}/"
    for file in record["files"]:
        if type(file) is not dict:
            return f"one of its files is {file!r}"
        path = file.get("path")
        if type(path) is not str or not path.startswith(folder) or not _is_name(path.removeprefix(folder)):
            return f"it names {path!r}, which is not a file of its run"
    return None


def _flaw_of_values(record: Record) -> str | None:
    for name in ("counts", "settings", "versions"):
        if type(record.get(name, {})) is not dict:
            return f"its {name} is a {type(record[name]).__name__} instead of a dict"
    return None


def _flaw_of_merged(record: Record) -> str | None:
    """What a compaction cannot have written; None: nothing."""
    runs, common = record["runs"], record.get("common")
    if type(runs) is not list or not runs or type(common) is not dict or not all(type(run) is dict for run in runs):
        return "its runs are not a list of objects with a common one"
    seen: set[str] = set()
    for run in runs:
        run_id = run.get("run_id")
        if not names.is_run_id(run_id) or run_id in seen or "files" in run:
            return f"the run {run_id!r} in it is not valid, or is there twice"
        seen.add(run_id)
        if reason := _flaw_of_values({**common, **run}):
            return f"of the run {run_id} in it, {reason}"
    for file in record["files"]:
        if type(file.get("size_bytes")) is not int or not is_digest(file.get("sha256")):
            return f"it does not say the size or the SHA-256 of {file['path']}"
    rows = [part.get("rows") for parts in (runs, record["files"]) for part in parts]
    if not all(type(number) is int and number >= 0 for number in rows) or "files" in common:
        return "a number of rows in it is not valid"
    if sum(run["rows"] for run in runs) != sum(file["rows"] for file in record["files"]):
        return "its files do not hold as many rows as its runs"
    return None


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not {"/", "\0"} & set(text)
