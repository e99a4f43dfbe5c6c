"""How a run survives: each start of the command is an attempt, which does what the attempts before it left.

<out>/staging/<run_id>/manifest.parquet          what was planned
                       run.json                  settings of the run; without it planning was not finished
                       attempt-<n>/accepted.json files with finished rows of earlier attempts, frozen
                                   todo/         the rest of the manifest, with captions that are known
                                   rows/         verdict rows, as Ray Data writes them
                                   checkpoint/   Ray Data's job checkpoint: a file of rows counts once it is there

Ray Data's checkpoint is used for its two-phase commit: a file of rows exists for us once the checkpoint file of its
write task has its final name. Each attempt has a checkpoint of its own, so tasks of a driver that died, which may live
on for a while, commit where nobody looks any more; and Ray's filter, which holds all finished ids in each of its
actors, never starts.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from jobs import parquet, schema, storage
from jobs.console import say
from jobs.database import Database, database

MANIFEST: Final = "manifest.parquet"
SETTINGS: Final = "run.json"
ID: Final = "image_id"
IDS: Final = pa.schema([schema.MANIFEST.field(ID)])
LEAST_COMMIT_ROWS: Final = 64
MOST_COMMIT_ROWS: Final = 8192
COMMITS: Final = 1024
"""About how many files of rows a run should write at most."""
LEAST_TASK_ROWS: Final = 32
MOST_TASK_ROWS: Final = 1024
TASKS: Final = 2048
"""About how many tasks a run should have at most: Ray reads as many files, and a task lost is a task done again."""
COMMITTED: Final = re.compile(r"(?P<task>.+_\d{6,})\.parquet")
DATA_FILE: Final = re.compile(r"(?P<task>.+_\d{6,})-\d+\.parquet")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    folder: str
    number: int
    """1, 2, …"""
    accepted: list[str]
    """Files with finished rows of earlier attempts."""
    count: int = 0
    """Pictures that are left for this attempt."""

    @property
    def todo(self) -> str:
        """Folder of what is left (`schema.TODO`), a file per task."""
        return storage.join(self.folder, "todo")

    @property
    def rows(self) -> str:
        """Folder of the rows that this attempt writes."""
        return storage.join(self.folder, "rows")

    @property
    def checkpoint(self) -> str:
        """Folder of Ray Data's job checkpoint."""
        return storage.join(self.folder, "checkpoint")

    def committed(self) -> list[str]:
        """Files that this attempt finished and that can be read, sorted."""
        tasks = {match["task"] for name in _names(self.checkpoint) if (match := COMMITTED.fullmatch(name))}
        files = [name for name in _names(self.rows) if (match := DATA_FILE.fullmatch(name)) and match["task"] in tasks]
        return _whole([storage.join(self.rows, name) for name in sorted(files)])

    def files(self) -> list[str]:
        """All files with finished rows, of this attempt and those before it."""
        return self.accepted + self.committed()


def unfinished(out: str) -> dict[str, dict[str, Any]]:
    """Run id -> `run.json` of the runs that were planned and not published; those whose planning was cut are removed.

    The caller must hold the lock.
    """
    staging = storage.join(out, "staging")
    found = {}
    for run_id in storage.subfolders(staging):
        folder = storage.join(staging, run_id)
        try:
            found[run_id] = storage.read_json(storage.join(folder, SETTINGS))
        except FileNotFoundError:
            storage.remove_folder(folder)
    return found


def begin(staging: str, known: Iterable[pa.RecordBatch]) -> Attempt:
    """Begin the next attempt: freeze what earlier ones finished, write what is left. The caller must hold the lock.

    `known`: captions that were published before (`schema.CAPTIONED`).
    """
    numbers = [int(name.removeprefix("attempt-")) for name in storage.subfolders(staging)]
    accepted: list[str] = []
    while numbers:  # an attempt that was cut before it froze its files had no rows of its own
        folder = storage.join(staging, f"attempt-{max(numbers):04d}")
        try:
            frozen = [storage.join(staging, name) for name in storage.read_json(storage.join(folder, "accepted.json"))]
        except FileNotFoundError:
            numbers.remove(max(numbers))
            continue
        accepted = Attempt(folder=folder, number=max(numbers), accepted=frozen).files()
        break
    number = max((int(name.removeprefix("attempt-")) for name in storage.subfolders(staging)), default=0) + 1
    attempt = Attempt(folder=storage.join(staging, f"attempt-{number:04d}"), number=number, accepted=accepted)
    count = write_todo(storage.join(staging, MANIFEST), attempt.todo, accepted, known)
    storage.write_json(
        storage.join(attempt.folder, "accepted.json"), [name.removeprefix(f"{staging}/") for name in accepted]
    )
    return replace(attempt, count=count)


def commit_rows(count: int) -> int:
    """Rows that are committed at a time: what a crash costs at most, per writing task."""
    return min(MOST_COMMIT_ROWS, max(LEAST_COMMIT_ROWS, count // COMMITS))


def write_todo(manifest: str, folder: str, accepted: Sequence[str] = (), known: Iterable[pa.RecordBatch] = ()) -> int:
    """Write the rows of the manifest that no accepted file has, in their order, a file per task; returns their number.

    A known caption is taken over from the same version of the picture, else from one of the same file name and size:
    a copy, or a file that was only touched. Its content's hash is compared once the picture was fetched.
    """
    others = ", ".join(name for name in schema.MANIFEST.names if name != ID)
    with database() as rows:
        _number(rows, manifest)
        rows.create("done", f"{ID}::uuid as {ID}", IDS)
        rows.insert("done", parquet.read_small(accepted, IDS))
        rows.create(
            "captions",
            f"{ID}::uuid as {ID}, hash({_file_name('uri')}) as name, size_bytes, "
            "{'caption': caption, 'hash': content_hash, 'run_id': caption_run_id} as known",
            schema.CAPTIONED,
        )
        rows.insert("captions", known)
        usable = "known.caption is not null and known.hash is not null"
        for table, key in (("same", ID), ("alike", "name, size_bytes")):
            rows.execute(
                f"create table {table} as select {key}, any_value(known) as known from captions where {usable} "
                f"group by {key}"
            )
        batches = rows.select(
            f"select replace({ID}::varchar, '-', '') as {ID}, {others}, known.caption as known_caption, "
            "known.hash as known_hash, known.run_id as known_run_id from ("
            "select m.*, coalesce(same.known, alike.known) as known "
            f"from manifest m anti join done on m.{ID} = done.{ID} left join same on m.{ID} = same.{ID} "
            f"left join alike on hash({_file_name('m.uri')}) = alike.name "
            "and m.size_bytes = alike.size_bytes) order by n"
        )
        left = rows.number(f"select count(*) from manifest anti join done using ({ID})")
        task_rows = min(MOST_TASK_ROWS, max(LEAST_TASK_ROWS, left // TASKS))
        return parquet.write_many(batches, schema.TODO, folder, task_rows)[0]


def _number(rows: Database, manifest: str) -> None:
    """Table `manifest`, its rows numbered by their order."""
    others = ", ".join(name for name in schema.MANIFEST.names if name != ID)
    rows.execute("create sequence numbers")
    rows.create("manifest", f"nextval('numbers') as n, {ID}::uuid as {ID}, {others}", schema.MANIFEST)
    rows.insert("manifest", parquet.read(manifest, schema.MANIFEST))


def _file_name(column: str) -> str:
    return f"regexp_extract({column}, '[^/]*$')"


def _names(folder: str) -> list[str]:
    if storage.is_local(folder) and not storage.exists(folder):
        return []
    return [entry.uri.rpartition("/")[2] for entry in storage.list_files(folder)]


def _whole(uris: list[str]) -> list[str]:
    """The files that can be read: a retried task may have been killed while it wrote its file again."""

    def is_whole(uri: str) -> bool:
        try:
            for _ in parquet.read(uri, IDS):
                pass
        except (OSError, pa.ArrowInvalid) as error:
            say(f"warning: {uri} is damaged, its rows are made again ({type(error).__name__})")
            return False
        return True

    with ThreadPoolExecutor(parquet.READERS) as pool:
        return [uri for uri, whole in zip(uris, pool.map(is_whole, uris), strict=True) if whole]
