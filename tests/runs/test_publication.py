"""Publishing: all planned rows, each once, or nothing; and a run is there for readers once its record is."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from jobs.dataset import schema
from jobs.runs import catalog, products, publication, removal
from jobs.runs.lock import LockLost
from jobs.runs.publication import Run, VerificationError
from jobs.runs.rows import read_rows
from jobs.storage import filesystems, listing, parquet, reading, uris, writing
from jobs.storage.uris import Uri
from nsnet.errors import LockedError, SourceError, StorageError
from tests.support.tables import manifest_row, manifest_table, put, rows_file, unmarked, verdict_row, verdict_table

URIS = [f"/pictures/{i}.jpg" for i in range(10)]
DETAILS = {"detector_id": "d" * 16, "captioner_id": "c" * 16}


@pytest.fixture
def out(place: str) -> str:
    return place


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(out=str(tmp_path / "out"))


def write(uri: str, table: pa.Table, **options: Any) -> None:
    system, path = filesystems.arrow_filesystem(uri)
    if uris.is_local(uri):
        filesystems.make_folder(str(Path(path).parent))
    pq.write_table(table, path, filesystem=system, **options)


def stage(run: Run, *parts: list[dict[str, Any]], planned: list[str] = URIS) -> tuple[str, list[str]]:
    """Stage rows, one file per part, as the pipeline does; returns the manifest and those files."""
    manifest = f"{run.staging}/manifest.parquet"
    write(manifest, manifest_table(*(manifest_row(uri) for uri in planned)))
    files = [rows_file(f"{run.staging}/attempt-00000001", i) for i in range(len(parts))]
    for uri, rows in zip(files, parts, strict=True):
        write(uri, verdict_table(*({**row, "run_id": run.run_id} for row in rows)))
    return manifest, files


def publish(out: str, run_id: str, rows: list[dict[str, Any]], **details: Any) -> dict[str, Any]:
    """A published run of these rows; returns its record."""
    run = Run(out=out, run_id=run_id)
    return run.publish(*stage(run, rows, planned=[row["uri"] for row in rows]), {**DETAILS, **details})


def rows_for(names: list[str], failed: int = 0) -> list[dict[str, Any]]:
    return [verdict_row(uri, None if i < failed else i / len(names)) for i, uri in enumerate(names)]


def files_below(place: str) -> list[str]:
    if not listing.exists(place):  # S3 has no empty folders
        return []
    return sorted(entry.uri.removeprefix(place + "/") for entry in listing.list_files(place))


def contents(place: str) -> dict[str, bytes]:
    """The content of every file below a place."""
    return {name: reading.read_bytes(f"{place}/{name}") for name in files_below(place)}


def part_names(record: dict[str, Any]) -> list[str]:
    """Names of the final files that a record names."""
    return [Path(file["path"]).name for file in record["files"]]


# What is published.


def test_published_run_is_its_staged_rows(out: str) -> None:
    run = Run(out=out, run_id="20260102T030405Z-abcdef")
    manifest, staged = stage(run, rows_for(URIS[:4], failed=2), rows_for(URIS[4:]))
    record = run.publish(manifest, staged, {"seconds": 1.5, "source": "s"})
    assert files_below(out) == ["runs/20260102T030405Z-abcdef.json", record["files"][0]["path"]]  # staging is gone
    assert reading.read_json(run.record) == record
    assert record["run_id"] == run.run_id and (record["seconds"], record["source"]) == (1.5, "s")
    assert record["rows"] == 10
    assert record["counts"] == dict.fromkeys(publication.COUNTED, {}) | {
        "status": {"failed": 2, "scored": 8}, "verdict": {"fake": 5, "real": 3},
        "error_class": {"ImageCorruptError": 2},
    }  # fmt: skip
    (file,) = record["files"]
    content = reading.read_bytes(f"{out}/{file['path']}")
    folder = "verdicts/run_date=2026-01-02/run_id=20260102T030405Z-abcdef"
    assert re.fullmatch(rf"{folder}/part-00000-[0-9a-f]{{8}}\.parquet", file["path"])
    assert (file["rows"], file["size_bytes"]) == (10, len(content))
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    expected = {row["uri"]: {**row, "run_id": run.run_id} for row in [*rows_for(URIS[:4], 2), *rows_for(URIS[4:])]}
    assert {row["uri"]: row for row in catalog.verdicts(out).to_table().to_pylist()} == expected
    assert catalog.runs(out) == [record]


def test_files_lie_where_query_engines_look_for_them(tmp_path: Path) -> None:
    run = Run(out=str(tmp_path), run_id="20260102T030405Z-abcdef")
    assert run.final == f"{tmp_path}/verdicts/run_date=2026-01-02/run_id=20260102T030405Z-abcdef"
    record = run.publish(*stage(run, rows_for(URIS)), {})
    assert files_below(str(tmp_path / "verdicts")) == [
        f"run_date=2026-01-02/run_id=20260102T030405Z-abcdef/{part_names(record)[0]}"
    ]


ONE, TWO = "20260102T030405Z-aaaaaa", "20260103T030405Z-bbbbbb"
READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "pandas": lambda folder: pd.read_parquet(folder).astype({"run_id": str}).to_dict("records"),
    "pyarrow": lambda folder: pq.read_table(folder).to_pylist(),
    "pyarrow's datasets": lambda folder: pads.dataset(
        folder, partitioning=pads.HivePartitioning.discover(infer_dictionary=True)
    ).to_table().to_pylist(),
    "DuckDB": lambda folder: of_duckdb(f"'{folder}/**/*.parquet'"),
    "DuckDB, by folders": lambda folder: of_duckdb(f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"),
    "DuckDB, by files": lambda folder: of_duckdb(f"read_parquet('{folder}/**/*.parquet', hive_partitioning = false)"),
}  # fmt: skip


def of_duckdb(table: str) -> list[dict[str, Any]]:
    with duckdb.connect() as connection:
        rows: list[dict[str, Any]] = connection.sql(f"select * from {table}").to_arrow_table().to_pylist()
    return rows


@pytest.mark.parametrize("reader", READERS)
def test_readers_by_pattern_find_each_row_with_its_run(reader: str, tmp_path: Path) -> None:
    """The folder and the file both say which run it is; for pandas they must say so in the same type."""
    out = str(tmp_path)
    for run_id, some in ((ONE, URIS[:4]), (TWO, URIS[4:])):
        publish(out, run_id, rows_for(some))
    found = {row["uri"]: row["run_id"] for row in READERS[reader](f"{out}/verdicts")}
    assert found == dict.fromkeys(URIS[:4], ONE) | dict.fromkeys(URIS[4:], TWO)


def test_single_file_says_which_run_it_is_of(tmp_path: Path) -> None:
    (file,) = publish(str(tmp_path), ONE, rows_for(URIS))["files"]
    for frame in (pd.read_parquet(tmp_path / file["path"]), pads.dataset(tmp_path / file["path"]).to_table()):
        assert set(frame["run_id"].to_pylist() if isinstance(frame, pa.Table) else frame["run_id"]) == {ONE}


def test_runs_of_an_older_version_are_read_beside_newer_ones(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "stored", lambda columns: columns)  # the run's name was a text in the file as well
        publish(out, ONE, rows_for(URIS[:4]))
    publish(out, TWO, rows_for(URIS[4:]))
    table = catalog.verdicts(out).to_table()
    assert table.schema.equals(schema.VERDICTS)
    assert Counter(table.column("run_id").to_pylist()) == {ONE: 4, TWO: 6}
    rows = [row for batch in catalog.published(out, schema.VERDICTS) for row in batch.to_pylist()]
    assert [row["run_id"] for row in rows] == [ONE] * 4 + [TWO] * 6
    newest = catalog.verdicts(out).to_table(filter=pads.field("run_id") == TWO)
    assert sorted(newest.column("uri").to_pylist()) == URIS[4:]


def test_run_ids_are_utc_times_that_differ() -> None:
    made = [publication.new_run_id() for _ in range(50)]
    assert len(set(made)) == 50
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", name) for name in made)
    written = datetime.strptime(made[0][:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60


def test_columns_that_are_all_null_keep_their_types(run: Run) -> None:
    rows = [{**row, "caption": None, "format": None} for row in rows_for(URIS, failed=10)]
    record = run.publish(*stage(run, rows), {})
    written = pq.read_schema(f"{run.final}/{part_names(record)[0]}")
    assert written.names == schema.VERDICTS.names and written.types == schema.stored(schema.VERDICTS).types
    assert written.field("logit").type == pa.float64() and written.field("label").type == pa.int8()


def in_small_files(run: Run) -> Run:
    """The same run, publishing files of four rows."""
    return replace(run, product=replace(products.VERDICTS, rows_per_file=4))


def test_files_are_closed_at_their_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = in_small_files(run)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    record = run.publish(*stage(run, rows_for(URIS[:5]), rows_for(URIS[5:])), {})
    sizes = [file["rows"] for file in record["files"]]
    assert sum(sizes) == 10 and len(sizes) >= 2 and all(4 <= size < 6 for size in sizes[:-1])
    names = part_names(record)
    assert names == files_below(run.final)
    (token,) = {name[11:19] for name in names}  # one of this publication
    assert names == [f"part-{i:05d}-{token}.parquet" for i in range(len(sizes))]
    for file in record["files"]:
        assert pq.read_metadata(f"{run.out}/{file['path']}").num_rows == file["rows"]
        assert file["sha256"] == hashlib.sha256(Path(run.out, file["path"]).read_bytes()).hexdigest()
    assert sorted(catalog.verdicts(run.out).to_table().column("uri").to_pylist()) == URIS


# What is refused.


@pytest.mark.parametrize(
    ("staged", "message"),
    [
        (URIS[:9], "10 images were planned, but 9 rows were made: 1 missing, 0 surplus, 0 doubled"),
        ([*URIS, URIS[3]], "10 images were planned, but 11 rows were made: 0 missing, 0 surplus, 1 doubled"),
        ([*URIS, "/other.jpg"], "10 images were planned, but 11 rows were made: 0 missing, 1 surplus, 0 doubled"),
        ([*URIS[1:], URIS[1]], "10 images were planned, but 10 rows were made: 1 missing, 0 surplus, 1 doubled"),
        ([*URIS[1:], "/other.jpg"], "10 images were planned, but 10 rows were made: 1 missing, 1 surplus, 0 doubled"),
        ([], "10 images were planned, but 0 rows were made: 10 missing, 0 surplus, 0 doubled"),
    ],
)
def test_rows_that_are_not_the_planned_ones_are_not_published(staged: list[str], message: str, out: str) -> None:
    run = Run(out=out)
    manifest, files = stage(run, rows_for(staged[:6]), rows_for(staged[6:]))
    before = files_below(out)
    with pytest.raises(VerificationError, match=f"^{message}; nothing was published"):
        run.publish(manifest, files, {})
    assert files_below(out) == before
    assert not listing.exists(f"{out}/verdicts") and not listing.exists(f"{out}/runs")
    assert catalog.runs(out) == []


def test_run_without_any_staged_file_is_not_published(out: str) -> None:
    run = Run(out=out)
    with pytest.raises(VerificationError, match="10 images were planned, but 0 rows were made: 10 missing"):
        run.publish(*stage(run), {})
    assert catalog.runs(out) == []


def test_staged_file_that_is_gone_stops_publishing(out: str) -> None:
    run = Run(out=out)
    manifest, files = stage(run, rows_for(URIS))
    with pytest.raises(FileNotFoundError):
        run.publish(manifest, [*files, f"{run.staging}/gone.parquet"], {})
    assert catalog.runs(out) == []


class TakenOver(Exception):
    """Another process holds the lock."""


def refuse_after(times: int) -> Callable[[], None]:
    """A check that passes so many times."""
    passes = iter(range(times))

    def check() -> None:
        if next(passes, None) is None:
            raise TakenOver

    return check


def test_process_that_lost_the_lock_changes_nothing(run: Run) -> None:
    manifest, files = stage(run, rows_for(URIS))
    before = files_below(run.out)
    with pytest.raises(TakenOver):
        run.publish(manifest, files, {}, refuse_after(0))
    assert files_below(run.out) == before


def test_published_run_is_not_published_again(out: str) -> None:
    run = Run(out=out)
    run.publish(*stage(run, rows_for(URIS)), {})
    before = contents(f"{out}/runs") | contents(f"{out}/verdicts")
    with pytest.raises(VerificationError, match=f"run {run.run_id} was published already"):
        run.publish(*stage(run, rows_for(URIS)), {"seconds": 7})
    after = contents(f"{out}/runs") | contents(f"{out}/verdicts")
    assert before.items() <= after.items()  # its own files are left, which no record names
    assert len(catalog.runs(out)) == 1 and catalog.verdicts(out).count_rows() == 10


def test_publishing_that_stops_before_the_record_is_no_run(run: Run) -> None:
    manifest, files = stage(run, rows_for(URIS))
    with pytest.raises(TakenOver):
        run.publish(manifest, files, {}, refuse_after(1))
    assert len(files_below(run.final)) == 1  # the files come first
    assert Path(manifest).exists() and Path(files[0]).exists()  # and nothing is lost
    with pytest.raises(SourceError, match="holds no published verdicts"):
        catalog.verdicts(run.out)


def cut(run: Run, manifest: str, staged: list[str], after: int) -> list[str]:
    """A publication that is cut after so many of its files; returns their names."""
    uploaded: list[str] = []

    def upload(path: Path, uri: str) -> None:
        if len(uploaded) == after:
            raise OSError("the network is gone")
        uploaded.append(uri)
        writing.write_bytes(uri, path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "upload_file", upload)
        with pytest.raises(OSError, match="the network is gone"):
            in_small_files(run).publish(manifest, staged, {})
    return [uri.rpartition("/")[2] for uri in uploaded]


def test_publication_that_was_cut_is_done_again(out: str) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS[:4]), rows_for(URIS[4:8]), rows_for(URIS[8:]))
    assert cut(run, *staged, after=2) == files_below(run.final)
    assert catalog.runs(out) == []
    record = run.publish(*staged, {})  # in files of another size
    assert files_below(run.final) == part_names(record)
    assert [file["rows"] for file in record["files"]] == [record["rows"]] == [10]
    assert sorted(catalog.verdicts(out).to_table().column("uri").to_pylist()) == URIS


def test_nothing_is_removed_before_the_record(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS[:5]), rows_for(URIS[5:]))
    left = set(cut(run, *staged, after=1))
    before = contents(run.staging)

    def create(uri: str, data: bytes) -> bool:
        assert uri == run.record and left < set(files_below(run.final)) and contents(run.staging) == before
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "create", create)
        with pytest.raises(OSError, match="the network is gone"):
            run.publish(*staged, {})
    assert left < set(files_below(run.final)) and contents(run.staging) == before
    assert part_names(run.publish(*staged, {})) == files_below(run.final)


class Sleeper:
    """A check that sleeps the so-manieth time it is asked, while another process publishes the whole run."""

    def __init__(self, run: Run, manifest: str, staged: list[str], sleeps: int) -> None:
        self.run, self.manifest, self.staged, self.sleeps = run, manifest, staged, sleeps
        self.asked = 0
        self.left: dict[str, bytes] = {}
        """What the other process left, until this one wakes up."""

    def __call__(self) -> None:
        self.asked += 1
        if self.asked == self.sleeps:
            record = self.run.publish(self.manifest, self.staged, {"of": "the other"})
            self.left = contents(self.run.out)
            assert sorted(self.left) == sorted([f"runs/{self.run.run_id}.json", record["files"][0]["path"]])


def test_process_that_wakes_up_before_its_record_changes_nothing(out: str) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS))
    sleeper = Sleeper(run, *staged, sleeps=2)
    with pytest.raises(VerificationError, match="was published already, by another process"):
        run.publish(*staged, {"of": "the late one"}, sleeper)
    assert contents(out) == sleeper.left
    assert [record["of"] for record in catalog.runs(out)] == ["the other"]


def test_process_that_wakes_up_before_its_files_changes_nothing(out: str) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS))
    sleeper = Sleeper(run, *staged, sleeps=1)
    with pytest.raises(FileNotFoundError):  # the staged rows are gone
        run.publish(*staged, {"of": "the late one"}, sleeper)
    assert contents(out) == sleeper.left


def test_of_two_that_publish_at_a_time_one_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = stage(run, rows_for(URIS))
    monkeypatch.setattr(Run, "tidy", lambda run, record: None)  # else the other one's rows may be gone too early
    ready = threading.Barrier(2)

    def publish_once(name: str) -> dict[str, Any] | None:
        asked = count()

        def check() -> None:
            if next(asked) == 1:  # before the record
                ready.wait(60)

        try:
            return run.publish(*staged, {"of": name}, check)
        except VerificationError:
            return None

    with ThreadPoolExecutor(2) as pool:
        (record,) = filter(None, pool.map(publish_once, ("one", "two")))
    assert catalog.runs(run.out) == [record] and catalog.verdicts(run.out).count_rows() == 10


def test_store_that_lets_two_create_the_record_believes_the_one_that_is_there(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS))

    def create(uri: str, data: bytes) -> bool:
        """Both get a success; the other one's record is the one that stays."""
        writing.write_json(uri, {"run_id": run.run_id, "files": []})
        return True

    monkeypatch.setattr(writing, "create", create)
    with pytest.raises(VerificationError, match="was published already, by another process"):
        run.publish(*staged, {})
    assert list(listing.list_files(f"{out}/verdicts")) == []


def test_record_that_the_store_created_though_it_says_no_is_kept(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first try was lost, and the second one met a conflict (409)."""
    run, create = Run(out=Uri(out)), writing.create
    staged = stage(run, rows_for(URIS))
    monkeypatch.setattr(writing, "create", lambda uri, data: create(uri, data) and False)
    record = run.publish(*staged, {})
    assert catalog.runs(out) == [record] and catalog.verdicts(out).count_rows() == 10


def test_conflict_without_a_record_leaves_the_files_to_the_record_that_may_come(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(out=Uri(out))
    staged = stage(run, rows_for(URIS))
    monkeypatch.setattr(writing, "create", lambda uri, data: False)
    with pytest.raises(StorageError, match="was not created, though the store has no such record: start the command"):
        run.publish(*staged, {})
    assert len(list(listing.list_files(run.final))) == 1 and listing.exists(staged[0])


@pytest.mark.parametrize("is_ours", [True, False])
def test_lock_that_is_lost_while_the_record_is_created_takes_it_back_if_it_is_ours(
    is_ours: bool, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next holder may have listed the records before, and removed the files as orphans."""
    run, create = Run(out=Uri(out)), writing.create
    staged = stage(run, rows_for(URIS))

    def interrupted(uri: str, data: bytes) -> bool:
        create(uri, data if is_ours else writing.encode_json({"run_id": run.run_id, "files": []}))
        raise LockLost

    monkeypatch.setattr(writing, "create", interrupted)
    with pytest.raises(LockLost):
        run.publish(*staged, {})
    assert listing.exists(run.record) != is_ours and list(listing.list_files(run.final)) == []


@pytest.mark.parametrize("moment", ["before the record", "with the record"])
def test_run_that_a_later_plan_overtakes_takes_itself_back(
    moment: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept after its last look at the lock: meanwhile its images were planned anew and published."""
    run, earlier = Run(out=out), publish(out, "20260101T000000Z-aaaaaa", rows_for(URIS[:1]))
    publish(out, "20260103T000000Z-dddddd", rows_for(URIS[:1]), detector_id="another")
    staged, create = stage(run, rows_for(URIS)), writing.create

    def overtake() -> None:
        monkeypatch.setattr(writing, "create", create)
        publish(out, "20260102T000000Z-bbbbbb", rows_for(URIS))

    def create_late(uri: str, data: bytes) -> bool:
        overtake()
        return create(uri, data)

    if moment == "before the record":
        overtake()
        monkeypatch.setattr(writing, "create", None)  # no reader may see the record, not for a moment
    else:
        monkeypatch.setattr(writing, "create", create_late)
    before = {record["run_id"] for record in catalog.runs(out)} | {"20260102T000000Z-bbbbbb"}
    with pytest.raises(VerificationError, match="since 20260102T000000Z-bbbbbb was published after it was planned"):
        run.publish(*staged, DETAILS, planned_after=[earlier["run_id"]])
    assert {record["run_id"] for record in catalog.runs(out)} == before
    assert list(listing.list_files(run.final)) == []  # and what is staged stays
    assert all(listing.exists(uri) for uri in (staged[0], *staged[1]))


def test_run_whose_staging_cannot_be_removed_is_published(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(out=out)
    staged = stage(run, rows_for(URIS))

    def remove(*_: Any) -> removal.Removal:
        raise OSError("the store went away")

    monkeypatch.setattr(removal, "remove", remove)
    record = run.publish(*staged, {})
    assert catalog.runs(out) == [record] and catalog.verdicts(out).count_rows() == 10
    assert f"warning: {run.staging} was not removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("\udcff", "is damaged"),
        ('{"files": []}', "has no run_id"),
        ("{}", "has no run_id"),
    ],
)
def test_damaged_record_is_named(content: str, reason: str, out: str) -> None:
    publish(out, "20260101T000000Z-aaaaaa", rows_for(URIS))
    uri = f"{out}/runs/20260102T000000Z-bbbbbb.json"
    writing.write_bytes(uri, content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StorageError, match=f"{re.escape(uri)} .*{reason}"):
        catalog.runs(out)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": 7}, "its run_id is a int instead of a str"),
        ({"run_id": "20260102T000000Z-cccccc"}, "it belongs to the run '20260102T000000Z-cccccc'"),
        ({"run_id": "../../x"}, "it belongs to the run '../../x'"),
        ({"files": {}}, "its files is a dict instead of a list"),
        ({"files": ["{final}/x.parquet"]}, "/x.parquet'"),
        ({"counts": None}, "its counts is a NoneType instead of a dict"),
        ({"settings": []}, "its settings is a list instead of a dict"),
        ({"versions": "3"}, "its versions is a str instead of a dict"),
        ({"files": [{"path": 7}]}, "it names 7, which"),
        ({"files": [{}]}, "it names None, which"),
        ({"files": [{"path": "/etc/passwd"}]}, "it names '/etc/passwd', which"),
        ({"files": [{"path": "s3://another/x.parquet"}]}, "it names 's3://another/x.parquet', which"),
        ({"files": [{"path": "{final}/../../x.parquet"}]}, "x.parquet', which is not a file of its run"),
        ({"files": [{"path": "{final}/.."}]}, "..', which is not a file of its run"),
        ({"files": [{"path": "{final}/"}]}, "/', which is not a file of its run"),
        ({"files": [{"path": "captions/run_date=2026-01-02/run_id=20260102T000000Z-bbbbbb/x"}]}, "which is not a file"),
        ({"product": ["verdicts"]}, "its product is ['verdicts']"),
    ],
)
def test_record_that_this_program_cannot_have_written_is_named(changes: Any, reason: str, tmp_path: Path) -> None:
    """Whoever may write to a bucket must not have files of other places read, or removed."""
    out, run_id = str(tmp_path), "20260102T000000Z-bbbbbb"
    final = f"verdicts/run_date=2026-01-02/run_id={run_id}"
    record = {"run_id": run_id, "product": "verdicts", "files": [], "rows": 0, **changes}
    put(f"{out}/runs", {f"{run_id}.json": json.dumps(record).replace("{final}", final).encode()})
    with pytest.raises(StorageError) as caught:
        catalog.runs(out)
    message = str(caught.value)
    assert message.startswith(f"{out}/runs/{run_id}.json is damaged (") and reason in message
    assert "restore it from a copy" in message and "\n" not in message


def test_other_files_beside_the_records_are_none(out: str) -> None:
    record = publish(out, ONE, rows_for(URIS))
    others = {"notes.txt": b"x", "notes.json": b"{", f"old/{TWO}.json": b"{", f"{TWO}.json.bak": b"{"}
    put(f"{out}/runs", others)
    assert catalog.records(out) == catalog.runs(out) == [record]
    assert sorted(files_below(f"{out}/runs")) == sorted([f"{ONE}.json", *others])


def test_record_of_a_product_of_another_version_is_left_to_its_readers(out: str) -> None:
    writing.write_json(f"{out}/runs/{TWO}.json", {"run_id": TWO, "product": "spectra", "files": ["anything"]})
    record = publish(out, ONE, rows_for(URIS))
    assert catalog.runs(out) == [record] and publication.remove_orphans(out, catalog.records(out), ()) == []


def test_damaged_published_file_is_named(tmp_path: Path) -> None:
    out = str(tmp_path)
    (file,) = publish(out, ONE, rows_for(URIS))["files"]
    (tmp_path / file["path"]).write_bytes(b"no Parquet")
    with pytest.raises(StorageError, match=f"{out}/{file['path']} is damaged .*and its record runs/{ONE}.json"):
        list(catalog.published(out, schema.DONE))


@pytest.mark.parametrize("name", ["ü #1? %20+&=", "run_date=x/a b", "[0-9]*"])
def test_files_that_the_record_names_stay_whatever_the_output_is_called(name: str, out: str) -> None:
    run = Run(out=f"{out}/{name}")
    staged = stage(run, rows_for(URIS[:5]), rows_for(URIS[5:]))
    cut(run, *staged, after=1)
    assert part_names(run.publish(*staged, {})) == files_below(run.final)


# Files that no record names.


PART = "part-00000-0a1b2c3d.parquet"


def orphan(out: str, product: str, run_id: str, name: str = PART) -> str:
    """A file of a publication that was cut; its URI."""
    uri = f"{Run(out=out, run_id=run_id, product=products.PRODUCTS[product]).final}/{name}"
    writing.write_bytes(uri, b"of a publication that was cut")
    return uri


@pytest.mark.parametrize("product", list(products.PRODUCTS))
def test_orphans_of_every_product_are_removed(product: str, out: str) -> None:
    """Else a reader by pattern counts rows twice, or rows that nobody published."""
    publish(out, ONE, rows_for(URIS))
    before = contents(out)
    orphans = [
        orphan(out, product, ONE),
        orphan(out, product, TWO),
        orphan(out, product, TWO, f"{PART}.partial-00112233"),
    ]
    assert sorted(publication.remove_orphans(out, catalog.records(out), ())) == sorted(orphans)
    assert contents(out) == before and publication.remove_orphans(out, catalog.records(out), ()) == []


def test_files_stay_whose_records_are_lost(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(publish(out, ONE, rows_for(URIS))["files"])
    writing.remove_file(f"{out}/runs/{ONE}.json")
    for _ in range(2):
        before = contents(out)
        assert publication.remove_orphans(out, catalog.records(out), ()) == [] and contents(out) == before
        assert f"holds {count} files of runs that are older than all records" in capsys.readouterr().err
        if not catalog.records(out):
            publish(out, TWO, rows_for(URIS))


def test_orphans_of_unfinished_runs_stay_until_their_end(out: str) -> None:
    orphan(out, "verdicts", TWO)
    before = contents(out)
    assert publication.remove_orphans(out, [], [TWO]) == [] and contents(out) == before


@pytest.mark.parametrize(
    "name",
    [
        f"verdicts/run_date=2026-01-02/run_id={ONE}/photo.jpg",
        f"verdicts/run_date=2026-01-02/run_id={ONE}/part-0.parquet",
        f"verdicts/run_date=2026-01-02/run_id={ONE}/deeper/{PART}",
        f"verdicts/run_date=2026-01-02/run_id=mine/{PART}",
        f"verdicts/run_date=today/run_id={ONE}/{PART}",
        f"verdicts/run_id={ONE}/{PART}",
        f"verdicts/{PART}",
        f"others/run_date=2026-01-02/run_id={ONE}/{PART}",
        f"run_date=2026-01-02/run_id={ONE}/{PART}",
    ],
)
def test_files_of_others_are_no_orphans(name: str, out: str) -> None:
    put(out, {name: b"x"})
    assert publication.remove_orphans(out, catalog.records(out), ()) == []
    assert files_below(out) == [name]


def test_files_of_others_stay_beside_a_run_that_is_published_or_given_up(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (Run(out=out, run_id=ONE), Run(out=out, run_id=TWO)):
        staged = stage(run, rows_for(URIS))
        orphan(out, "verdicts", run.run_id)
        theirs = {f"{run.final}/photo.jpg": b"x", f"{run.staging}/photo.jpg": b"y"}
        for uri, content in theirs.items():
            writing.write_bytes(uri, content)
        if run.run_id == ONE:
            run.publish(*staged, {})
        else:
            run.abandon()
        assert {uri: reading.read_bytes(uri) for uri in theirs} == theirs
        left = [entry.uri for folder in (run.final, run.staging) for entry in listing.list_files(folder)]
        assert len(left) == 2 + (run.run_id == ONE)
        (line,) = unmarked(capsys.readouterr().err).splitlines()
        assert line == f"left alone, since no run of this program made it: {', '.join(sorted(theirs))}"


def lost(after: int) -> Callable[[], None]:
    """A lock that is lost once it was asked for so many times."""
    asked = count()

    def check() -> None:
        if next(asked) >= after:
            raise LockedError("the lock was lost")

    return check


@pytest.mark.parametrize("moment", [1, 2], ids=["before the record", "with the record"])
def test_process_that_loses_the_lock_while_it_publishes_takes_its_files_back(moment: int, out: str) -> None:
    """Whoever holds the lock by then takes files that no record names for orphans: the record may not come later."""
    run = Run(out=out)
    staged = stage(run, rows_for(URIS))
    before = contents(out)
    with pytest.raises(LockedError):
        run.publish(*staged, DETAILS, lost(after=moment))
    assert contents(out) == before


# What readers see.


def test_readers_see_published_runs_only_in_their_order(out: str) -> None:
    assert catalog.runs(out) == []
    with pytest.raises(SourceError, match="holds no published verdicts"):
        catalog.verdicts(out)
    for run_id, some in (("20260103T000000Z-000000", URIS[5:]), ("20260102T000000Z-ffffff", URIS[:5])):
        publish(out, run_id, rows_for(some))
    unfinished = Run(out=out, run_id="20260104T000000Z-000000")
    stage(unfinished, rows_for(["/not yet"]), planned=["/not yet"])
    write(f"{unfinished.final}/part-00000-0a1b2c3d.parquet", verdict_table(verdict_row("/not yet", 0.1)))
    assert [record["run_id"] for record in catalog.runs(out)] == [
        "20260102T000000Z-ffffff",
        "20260103T000000Z-000000",
    ]
    assert sorted(catalog.verdicts(out).to_table().column("uri").to_pylist()) == URIS


def test_run_that_found_nothing_to_do_is_there_and_disturbs_nobody(out: str) -> None:
    publish(out, ONE, [])
    assert [record["rows"] for record in catalog.runs(out)] == [0]
    assert catalog.run_ids(out, products.VERDICTS, DETAILS["detector_id"]) == set()
    assert list(catalog.published(out, schema.DONE)) == []
    with pytest.raises(SourceError, match="holds no published verdicts"):
        catalog.verdicts(out)
    publish(out, TWO, rows_for(URIS))
    assert catalog.run_ids(out, products.VERDICTS, DETAILS["detector_id"]) == {TWO}
    assert sorted(catalog.verdicts(out).to_table().column("uri").to_pylist()) == URIS


def test_publishing_removes_the_staging_of_its_run_only(out: str) -> None:
    run, other = Run(out=out), Run(out=out)
    stage(other, rows_for(URIS))
    staged = stage(run, rows_for(URIS))
    before = contents(other.staging)
    run.publish(*staged, {})
    assert listing.subfolders(f"{out}/staging") == [other.run_id] and contents(other.staging) == before


def test_files_of_other_runs_stay(out: str) -> None:
    publish(out, "20260102T000000Z-000000", rows_for(URIS[:5]))
    unfinished = Run(out=out, run_id="20260102T000000Z-000001")
    cut(unfinished, *stage(unfinished, rows_for(URIS[:5]), rows_for(URIS[5:])), after=1)
    before = contents(f"{out}/verdicts")
    publish(out, "20260102T000000Z-000002", rows_for(URIS[5:]))
    assert before.items() < contents(f"{out}/verdicts").items()


# What a record counts.


def test_record_counts_the_requests_that_the_store_was_sent(run: Run) -> None:
    requests = [1, 1, 1, 2, 5, None, 1, 1, 3, 0]  # none where the row failed before anything was asked for
    rows = [{**row, "requests": n} for row, n in zip(rows_for(URIS), requests, strict=True)]
    record = run.publish(*stage(run, rows[:4], rows[4:]), {})
    assert record["store"] == {"requests": 15, "asked_again": 3}


def test_record_counts_captions_that_were_made_and_reused(run: Run) -> None:
    makers = [run.run_id] * 3 + ["earlier"] * 4 + ["much earlier"] + [None] * 2
    rows = [{**row, "caption_run_id": maker} for row, maker in zip(rows_for(URIS), makers, strict=True)]
    record = run.publish(*stage(run, rows[:2], rows[2:]), {})
    assert record["captions"] == {"made": 3, "reused": 5}


def test_record_of_rows_without_captions_and_requests_counts_none(run: Run) -> None:
    record = run.publish(*stage(run, rows_for(URIS, failed=10)), {})
    assert record["captions"] == {"made": 0, "reused": 0} and record["store"] == {"requests": 0, "asked_again": 0}
    assert record["counts"]["verdict"] == {} and record["counts"]["status"] == {"failed": 10}


# What later runs ask of published ones.


def asked(out: str, columns: pa.Schema, **whose: str) -> list[dict[str, Any]]:
    return [row for batch in catalog.published(out, columns, **whose) for row in batch.to_pylist()]


def test_published_rows_of_a_detector_come_oldest_run_first(out: str) -> None:
    publish(out, "20260104T000000Z-000000", rows_for(["/d"]), detector_id="one")
    publish(out, "20260103T000000Z-000000", rows_for(["/c"]), detector_id="two")
    publish(out, "20260102T000000Z-000000", rows_for(["/a", "/b"], failed=1), detector_id="one")
    rows = asked(out, schema.DONE, detector_id="one")
    assert [(row["uri"], row["status"]) for row in rows] == [("/a", "failed"), ("/b", "scored"), ("/d", "scored")]
    assert all(list(row) == schema.DONE.names for row in rows)
    assert [row["uri"] for row in asked(out, schema.DONE, detector_id="two")] == ["/c"]
    assert asked(out, schema.DONE, detector_id="three") == []
    assert [row["uri"] for row in asked(out, schema.DONE)] == ["/a", "/b", "/c", "/d"]


def test_published_captions_of_a_captioner_come_whatever_the_detector(out: str) -> None:
    rows = [{**row, "caption": f"an image of {row['uri']}"} for row in rows_for(["/a", "/b", "/c"])]
    publish(out, "20260102T000000Z-000000", rows[:1], detector_id="one", captioner_id="blip")
    publish(out, "20260103T000000Z-000000", rows[1:2], detector_id="two", captioner_id="blip")
    publish(out, "20260104T000000Z-000000", rows[2:], detector_id="two", captioner_id="other")
    found = asked(out, schema.CAPTIONED, captioner_id="blip")
    assert [row["caption"] for row in found] == ["an image of /a", "an image of /b"]
    assert [row["uri"] for row in asked(out, schema.DONE, detector_id="two", captioner_id="blip")] == ["/b"]


def test_run_that_named_no_captioner_is_of_none(run: Run) -> None:
    run.publish(*stage(run, rows_for(URIS)), {"detector_id": "d"})
    assert asked(run.out, schema.CAPTIONED, captioner_id="blip") == []
    assert len(asked(run.out, schema.DONE, detector_id="d")) == 10


def test_output_without_runs_has_nothing_published(out: str) -> None:
    assert asked(out, schema.DONE, detector_id="d") == []


def test_published_file_that_is_gone_is_named(out: str) -> None:
    publish(out, "20260102T000000Z-000000", rows_for(["/a"]))
    record = publish(out, "20260103T000000Z-000000", rows_for(["/b"]))
    writing.remove_file(f"{out}/{record['files'][0]['path']}")
    stream = catalog.published(out, schema.DONE)
    assert next(stream).column("uri").to_pylist() == ["/a"]  # one file is opened after the other, not all before
    with pytest.raises(StorageError) as caught:
        next(stream)
    assert f"run_id=20260103T000000Z-000000/{part_names(record)[0]} is missing" in str(caught.value)
    assert "its record runs/20260103T000000Z-000000.json" in str(caught.value)


def test_files_older_than_a_column_give_nulls(out: str) -> None:
    run = Run(out=out, run_id="20260102T000000Z-000000")
    old = verdict_table(verdict_row("/old", 0.2, caption="a cat", caption_run_id="r", requests=1))
    write(f"{run.final}/part-00000-0a1b2c3d.parquet", old.drop_columns(["caption_run_id", "caption_id", "requests"]))
    files = [{"path": f"{run.final.removeprefix(out + '/')}/part-00000-0a1b2c3d.parquet", "rows": 1}]
    writing.write_json(run.record, {"run_id": run.run_id, "files": files, **DETAILS})
    publish(out, "20260103T000000Z-000000", [verdict_row("/new", 0.2, caption="a dog", caption_run_id="s", requests=2)])
    rows = asked(out, schema.CAPTIONED, captioner_id=DETAILS["captioner_id"])
    assert [(row["caption"], row["caption_run_id"]) for row in rows] == [("a cat", None), ("a dog", "s")]
    table = catalog.verdicts(out).to_table()
    assert table.schema.equals(schema.VERDICTS)
    requests = dict(zip(table.column("uri").to_pylist(), table.column("requests").to_pylist(), strict=True))
    assert requests == {"/old": None, "/new": 2}


def test_facts_that_an_older_release_staged_are_published(out: str) -> None:
    """They lack `transform`: an unfinished run is continued by a newer release."""
    run = Run(out=out, product=products.FACTS)
    manifest, (staged, *_) = stage(run, rows_for(URIS))
    older = pa.schema([field for field in schema.FACTS if field.name not in schema.LATER])
    rows = [dict.fromkeys(older.names) | {"image_id": row["image_id"], "uri": row["uri"], "status": "scored"}
            for row in rows_for(URIS)]  # fmt: skip
    parquet.write(pa.Table.from_pylist(rows, schema=older).to_batches(), older, staged)
    assert run.publish(manifest, [staged], {})["rows"] == len(URIS)
    (found,) = read_rows(out, catalog.runs(out, products.FACTS), pa.schema([schema.TRANSFORM]))
    assert found.column("transform").null_count == len(URIS)
