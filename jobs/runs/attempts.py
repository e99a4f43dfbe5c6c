"""Attempts of a run: each start of the command is an attempt, which does what earlier attempts left undone.

<out>/staging/<run_id>/manifest.parquet          the planned images
                       run.json                  settings of the run; missing if planning did not finish
                       attempt-<n>/              n: the lock's number, so that no two processes share one
                           accepted.json         files with finished rows of earlier attempts, frozen
                           todo/                 the rest of the manifest, with known captions
                           rows/                 verdict rows, as Ray Data writes them
                           checkpoint/           Ray Data's job checkpoint: names the write tasks that finished

Ray Data's checkpoint serves as a two-phase commit: a file of rows counts once the checkpoint file of its write task has
its final name. Each attempt has its own checkpoint. So tasks that outlive a dead driver commit into a folder that no
later attempt reads, and Ray's filter, which holds all finished ids in each of its actors, never starts.

Runs of several detectors in one pass have a manifest and settings each, and share the attempts in the staging of one of
them, their leader. Its files hold rows of all; `run_id` tells them apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.schema import IDS
from jobs.runs import names, removal
from jobs.storage import errors, listing, parquet, reading, uris, writing
from jobs.storage.database import Database, database
from jobs.storage.errors import Fault
from jobs.storage.uris import Uri
from nsnet.errors import StorageError

MANIFEST_FILE: Final = "manifest.parquet"
RUN_FILE: Final = "run.json"
ACCEPTED_FILE: Final = "accepted.json"
ID: Final = "image_id"
MIN_COMMIT_ROWS: Final = 128
MAX_COMMIT_ROWS: Final = 8192
COMMITS: Final = 1024
"""Approximate maximum number of files of rows per run."""
MIN_TASK_ROWS: Final = 128
"""The overhead of a task is about 25 ms, as much as four images."""
MAX_TASK_ROWS: Final = 1024
TASKS: Final = 2048
"""Approximate number of tasks per run, until tasks reach `MAX_TASK_ROWS`. It bounds the files that Ray reads and the
work that a lost task repeats."""


RUN_ID: Final = pa.field("run_id", pa.string())
MADE: Final = pa.schema([*IDS, RUN_ID])
"""What identifies a row that was made; the run is null in products whose rows do not name it."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    folder: str
    number: int
    """1, 2, … among the attempts of the run."""
    accepted: list[str]
    """Files with finished rows of earlier attempts."""
    runs: tuple[str, ...] = ()
    """Ids of the runs whose rows it makes, the leader first; the i-th has bit i in `schema.WANTED`."""
    count: int = 0
    """Images that this attempt has to do."""

    @property
    def todo(self) -> str:
        """Folder of the rows to do (`schema.TODO`), one file per task."""
        return uris.join(self.folder, "todo")

    @property
    def rows(self) -> str:
        """Folder of the rows that this attempt writes."""
        return uris.join(self.folder, "rows")

    @property
    def checkpoint(self) -> str:
        """Folder of Ray Data's job checkpoint."""
        return uris.join(self.folder, "checkpoint")

    def committed(self) -> list[str]:
        """Files that this attempt finished, sorted."""
        checkpoints, files = (listing.names_below(folder).files for folder in (self.checkpoint, self.rows))
        tasks = {match["task"] for name in checkpoints if (match := names.COMMITTED.fullmatch(name))}
        finished = [name for name in files if (match := names.ROWS.fullmatch(name)) and match["task"] in tasks]
        return [uris.join(self.rows, name) for name in finished]

    def files(self) -> list[str]:
        """All files with finished rows, of this attempt and earlier ones; of all runs of the pass."""
        return self.accepted + self.committed()


def unfinished(out: Uri) -> dict[str, dict[str, Any]]:
    """Run id -> `run.json` of the runs that were planned and not published. Removes runs whose planning did not finish.

    Foreign files stay and are named in a line. The caller must hold the lock.
    """
    staging = uris.join(out, "staging")
    below = listing.names_below(staging)
    runs: dict[str, dict[str, Any]] = {}
    foreign: list[str] = [uris.join(staging, name) for name in below.files + below.others]
    for name in below.folders:
        folder = uris.join(staging, name)
        if not names.is_run_id(name):
            foreign.append(f"{folder}/")
            continue
        try:
            runs[name] = planned(folder)
        except FileNotFoundError:
            # only names show that a folder is ours; next to a foreign file they prove nothing
            others = removal.remove(folder, names.STAGED, dry=True).foreign
            foreign += others or removal.remove(folder, names.STAGED).foreign
    if foreign:
        say(removal.left_alone(foreign))
    return runs


def planned(staging: str) -> dict[str, Any]:
    """`run.json` of a run. Raises `FileNotFoundError`, and `StorageError` if it is damaged."""
    uri, remedy = uris.join(staging, RUN_FILE), _plan_remedy(staging)
    values: dict[str, Any] = reading.read_json(uri, {"settings": dict, "published": list, "plan": dict}, remedy)
    plan = {"unread": [], "unread_count": 0, **values["plan"]}  # plans of older versions lack unread
    for name, kind in {"count": int, "left_out": dict, "states": dict, "unread": list, "unread_count": int}.items():
        if type(plan.get(name)) is not kind:
            raise reading.damaged(uri, f"{name} in its plan is not of type {kind.__name__}", remedy)
    if not all(type(line) is str for line in plan["unread"]):
        raise reading.damaged(uri, "unread in its plan is not a list of texts", remedy)
    if not all(names.is_run_id(run_id) for run_id in values["published"]):
        raise reading.damaged(uri, "published is not a list of run ids", remedy)
    return {**values, "plan": plan}


def planned_rows(manifest: str, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Columns of a run's manifest. Raises `StorageError` if it is missing or damaged."""
    remedy = _plan_remedy(manifest.rpartition("/")[0])
    try:
        yield from parquet.read(manifest, columns)
    except FileNotFoundError as error:
        raise StorageError(f"{manifest} is missing: {remedy}") from error
    except (OSError, KeyError, pa.ArrowException) as error:
        if _is_store_fault(error):
            raise
        raise reading.damaged(manifest, errors.reason(error), remedy) from error


def _plan_remedy(staging: str) -> str:
    return f"restore it, or remove {staging} while no run writes here to plan its images again"


def led(stagings: Iterable[str]) -> list[str]:
    """These stagings of runs of one pass, the leader first: one with attempts, whose rows would be lost otherwise."""
    return sorted(stagings, key=lambda staging: not _attempts(staging))


def _attempts(staging: str) -> list[str]:
    return [name for name in listing.subfolders(staging) if names.ATTEMPT.fullmatch(name)]


def begin(
    stagings: Sequence[str], lock_number: int, known: Iterable[pa.RecordBatch] = (), captioner_id: str = ""
) -> Attempt:
    """Begin the next attempt: freeze the finished files, write the rows to do. The caller must hold the lock.

    `stagings`: of the runs of a pass, the leader's first. `known`: published captions (`schema.CAPTIONED`), of which
    those of the captioner are reused.
    """
    staging, runs = stagings[0], tuple(staging.rpartition("/")[2] for staging in stagings)
    manifests = [uris.join(staging, MANIFEST_FILE) for staging in stagings]
    attempts = _attempts(staging)
    earlier = [name for name in attempts if int(name.removeprefix("attempt-")) <= lock_number]
    own = f"attempt-{lock_number:08d}"
    if own in earlier:  # lock numbers only grow, unless the lock files were removed
        raise StorageError(
            f"{uris.join(staging, own)} exists already because the folder locks/ was removed: remove {staging} while "
            "no run writes here to plan its images again"
        )
    accepted: list[str] = []
    for number, name in reversed(list(enumerate(earlier, start=1))):
        try:
            frozen = _frozen(staging, name)
        except FileNotFoundError:  # it stopped before it froze its files, so it has no rows
            continue
        folder = uris.join(staging, name)
        accepted = _usable(dict(zip(runs, manifests, strict=True)), Attempt(folder, number, frozen).files())
        break
    attempt = Attempt(uris.join(staging, own), len(earlier) + 1, accepted, runs)
    count = write_todo(dict(zip(runs, manifests, strict=True)), attempt.todo, accepted, known, captioner_id)
    frozen = [name.removeprefix(f"{staging}/") for name in accepted]
    writing.write_json(uris.join(attempt.folder, ACCEPTED_FILE), frozen)
    return replace(attempt, count=count)


def _frozen(staging: str, attempt: str) -> list[str]:
    """Finished files that an attempt accepted. Refuses paths outside its run, which another writer may have added."""
    uri, remedy = uris.join(staging, attempt, ACCEPTED_FILE), _plan_remedy(staging)
    files = reading.read_json(uri, remedy=remedy)
    if type(files) is not list:
        raise reading.damaged(uri, f"it holds a {type(files).__name__} instead of a list", remedy)
    for file in files:
        if type(file) is not str or not names.ACCEPTED.fullmatch(file):
            raise reading.damaged(uri, f"{str(file)[:80]!r} is not a file of rows of this run", remedy)
    return [uris.join(staging, file) for file in files]


def commit_rows(count: int) -> int:
    """Rows per commit: the most that a crash costs per write task."""
    return min(MAX_COMMIT_ROWS, max(MIN_COMMIT_ROWS, count // COMMITS))


def write_todo(
    manifests: Mapping[str, str],
    folder: str,
    accepted: Sequence[str] = (),
    known: Iterable[pa.RecordBatch] = (),
    captioner_id: str = "",
) -> int:
    """Write the rows of the manifests that no accepted file has, in order, one file per task; returns their number.

    `manifests`: URIs by run id. An image that several runs want is written once, and says which ones (`schema.WANTED`).
    A known caption is reused from the same version of the image, else from one with the same file name and size:
    a copy, or a file that was only touched. The content hash is compared after the image is fetched. A transformed
    image counts as another image.
    """
    name = "hash(regexp_extract(uri, '[^/]*$'))"
    with database() as rows:
        rows.execute("create sequence numbers")
        identified = f"{ID}::uuid as {ID}"
        _load_manifests(rows, manifests, f"nextval('numbers') as n, {name} as name, ", schema.MANIFEST)
        rows.create("done", f"{identified}, {_run_of_row(manifests)} as run", MADE)
        rows.insert("done", parquet.read_small(accepted, MADE, optional=[RUN_ID.name]))
        rows.execute(
            f"create table left_over as select m.* exclude (run), wanted from manifest m join "
            f"(select min(n) as n, bit_or(1::bigint << run) as wanted from manifest anti join done using ({ID}, run) "
            f"group by {ID}) using (n)"
        )
        # keep only captions that may be used: there may be far more captions than images to do
        rows.create(
            "captions",
            f"nextval('numbers') as c, {identified}, {name} as name, size_bytes, caption as known_caption, "
            "content_hash as known_hash, caption_run_id as known_run_id, transform is null as plain",
            schema.CAPTIONED,
            where=f"starts_with(caption_id, '{captioner_id}-') and ({ID}::uuid in (select {ID} from left_over) "
            f"or ({name}, size_bytes) in (select (name, size_bytes) from left_over))",
        )
        rows.insert("captions", known)
        # keep the first caption of each key by its number, because captions themselves may not fit into memory
        for table, key, which in (("same", ID, "true"), ("alike", "name, size_bytes", "plain")):
            rows.execute(
                f"create table {table} as select {key}, min(c) as c from captions where {which} group by {key}"
            )
        batches = rows.select(
            f"select l.* replace (replace(l.{ID}::varchar, '-', '') as {ID}), known_caption, known_hash, known_run_id "
            f"from left_over l left join same on l.{ID} = same.{ID} "
            "left join alike on l.name = alike.name and l.size_bytes = alike.size_bytes and l.transform is null "
            "left join captions k on k.c = coalesce(same.c, alike.c) order by n"
        )
        task_rows = max(MIN_TASK_ROWS, min(MAX_TASK_ROWS, rows.number("select count(*) from left_over") // TASKS))
        return parquet.write_many(batches, schema.TODO, folder, task_rows)


def _load_manifests(rows: Database, manifests: Mapping[str, str], columns: str, read: pa.Schema) -> None:
    """Create the table `manifest` of the planned images of several runs, with `run`, the number of each row's run."""
    numbered = pa.schema([*read, pa.field("run", pa.int64())])
    rows.create("manifest", f"{columns}* replace ({ID}::uuid as {ID})", numbered)
    for number, uri in enumerate(manifests.values()):
        for batch in planned_rows(uri, read):
            rows.insert("manifest", [batch.append_column("run", pa.array([number] * len(batch), pa.int64()))])


def _run_of_row(runs: Iterable[str]) -> str:
    """SQL: number of the run of a row of `MADE`; null for a run that is not among these. Only verdicts name a run."""
    cases = " ".join(f"when '{run_id}' then {number}" for number, run_id in enumerate(runs))
    return f"case when {RUN_ID.name} is null then 0 else (case {RUN_ID.name} {cases} end) end"


def _usable(manifests: Mapping[str, str], files: list[str]) -> list[str]:
    """The files that are readable and hold only planned images that no earlier file holds. A retried task may have been
    killed while it rewrote its file, or may have split its rows differently from its first try.

    Rows of runs that are not among the manifests (run id -> URI) do not count: another command continues those.
    """
    numbered = pa.schema([pa.field("n", pa.int64()), *MADE])
    with database() as rows:
        _load_manifests(rows, manifests, "", IDS)
        rows.create("every", f"n, {ID}::uuid as {ID}, {_run_of_row(manifests)} as run", numbered)
        damaged = set()
        for n, ids in enumerate(_ids(files)):
            if ids is None:
                damaged.add(n)
            else:
                rows.insert("every", ids.add_column(0, numbered.field("n"), pa.array([n] * len(ids))).to_batches())
        rows.execute("create view found as select * from every where run is not null")
        repeated = rows.execute(
            f"select n from (select n, row_number() over (partition by {ID}, run order by n) as k from found) "
            f"where k > 1 union select n from found anti join manifest using ({ID}, run)"
        )
    useless = damaged | {n for (n,) in repeated}
    for n in sorted(useless):
        reason = "is damaged" if n in damaged else "holds rows that another file holds, or that were not planned"
        say(f"warning: {files[n]} {reason}, its rows are made again")
    return [uri for n, uri in enumerate(files) if n not in useless]


def _ids(files: list[str]) -> Iterator[pa.Table | None]:
    """The ids in each file, in order; None for an unreadable file."""

    def read(uri: Uri) -> pa.Table | None:
        try:
            return pa.Table.from_batches(parquet.read(uri, MADE, optional=[RUN_ID.name]), MADE)
        except (OSError, pa.ArrowInvalid) as error:
            if _is_store_fault(error):
                raise
            return None

    with ThreadPoolExecutor(parquet.READERS) as pool:
        for start in range(0, len(files), parquet.READERS):  # limits read-ahead, and so memory
            yield from pool.map(read, files[start : start + parquet.READERS])


def _is_store_fault(error: Exception) -> bool:
    """Whether the store caused an error, so that the file may be sound."""
    return errors.kind(error) in (Fault.TRANSIENT, Fault.CREDENTIALS, Fault.DENIED)
