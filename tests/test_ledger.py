"""Publishing: all planned rows, each once, or nothing; and a run is there for readers once its record is."""

import hashlib
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from jobs import ledger, schema, storage
from jobs.ledger import Run, VerificationError
from nsnet.errors import SourceError
from tests.tables import manifest_row, manifest_table, verdict_row, verdict_table

URIS = [f"/pictures/{i}.jpg" for i in range(10)]


@pytest.fixture
def out(place: str) -> str:
    return place


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(out=str(tmp_path / "out"))


def write(uri: str, table: pa.Table, **options: Any) -> None:
    system, path = storage.arrow_filesystem(uri)
    if storage.is_local(uri):
        storage.make_folder(str(Path(path).parent))
    pq.write_table(table, path, filesystem=system, **options)


def stage(run: Run, *parts: list[dict[str, Any]], planned: list[str] = URIS) -> str:
    """Stage rows, one file per part, as the pipeline does; returns the manifest."""
    manifest = f"{run.staging}/manifest.parquet"
    write(manifest, manifest_table(*(manifest_row(uri) for uri in planned)))
    for i, rows in enumerate(parts):
        rows = [{**row, "run_id": run.run_id} for row in rows]
        write(f"{run.staged_rows}/part-{i}.parquet", verdict_table(*rows))
    return manifest


def rows_for(uris: list[str], failed: int = 0) -> list[dict[str, Any]]:
    return [verdict_row(uri, None if i < failed else i / len(uris)) for i, uri in enumerate(uris)]


def files_below(place: str) -> list[str]:
    return sorted(entry.uri.removeprefix(place + "/") for entry in storage.list_files(place))


# What is published.


def test_published_run_is_its_staged_rows(out: str) -> None:
    run = Run(out=out, run_id="20260102T030405Z-abcdef")
    manifest = stage(run, rows_for(URIS[:4], failed=2), rows_for(URIS[4:]))
    record = run.publish(manifest, {"seconds": 1.5, "source": "s"})
    part = "verdicts/run_date=2026-01-02/run_id=20260102T030405Z-abcdef/part-00000.parquet"
    assert files_below(out) == ["runs/20260102T030405Z-abcdef.json", part]
    assert storage.read_json(run.record) == record
    assert record["run_id"] == run.run_id and (record["seconds"], record["source"]) == (1.5, "s")
    assert record["rows"] == 10
    assert record["counts"] == {
        "status": {"failed": 2, "scored": 8}, "verdict": {"fake": 5, "real": 3},
        "error_class": {"ImageCorruptError": 2},
    }  # fmt: skip
    (file,) = record["files"]
    content = storage.read_bytes(f"{out}/{file['path']}")
    assert file["path"] == part
    assert (file["rows"], file["size_bytes"]) == (10, len(content))
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    expected = {row["uri"]: {**row, "run_id": run.run_id} for row in [*rows_for(URIS[:4], 2), *rows_for(URIS[4:])]}
    assert {row["uri"]: row for row in ledger.verdicts(out).to_table().to_pylist()} == expected
    assert ledger.runs(out) == [record]


def test_files_lie_where_query_engines_look_for_them(tmp_path: Path) -> None:
    run = Run(out=str(tmp_path), run_id="20260102T030405Z-abcdef")
    assert run.final == f"{tmp_path}/verdicts/run_date=2026-01-02/run_id=20260102T030405Z-abcdef"
    run.publish(stage(run, rows_for(URIS)), {})
    assert files_below(str(tmp_path / "verdicts")) == [
        "run_date=2026-01-02/run_id=20260102T030405Z-abcdef/part-00000.parquet"
    ]
    partitions = pads.partitioning(pa.schema([("run_date", pa.date32()), ("run_id", pa.string())]), flavor="hive")
    found = pads.dataset(tmp_path / "verdicts", partitioning=partitions).to_table()
    assert set(found.column("run_date").to_pylist()) == {date(2026, 1, 2)} and found.num_rows == 10


def test_run_ids_are_utc_times_that_differ() -> None:
    made = [ledger.new_run_id() for _ in range(50)]
    assert len(set(made)) == 50
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", name) for name in made)
    written = datetime.strptime(made[0][:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60


def test_columns_that_are_all_null_keep_their_types(run: Run) -> None:
    rows = [{**row, "caption": None, "format": None} for row in rows_for(URIS, failed=10)]
    run.publish(stage(run, rows), {})
    written = pq.read_schema(f"{run.final}/part-00000.parquet")
    assert written.names == schema.VERDICTS.names and written.types == schema.VERDICTS.types
    assert written.field("logit").type == pa.float64() and written.field("label").type == pa.int8()


def test_files_are_closed_at_their_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ROWS_PER_FILE", 4)
    monkeypatch.setattr(ledger, "BATCH_ROWS", 2)
    record = run.publish(stage(run, rows_for(URIS[:5]), rows_for(URIS[5:])), {})
    sizes = [file["rows"] for file in record["files"]]
    assert sum(sizes) == 10 and len(sizes) >= 2 and all(4 <= size < 6 for size in sizes[:-1])
    names = [f"part-{i:05d}.parquet" for i in range(len(sizes))]
    assert [Path(file["path"]).name for file in record["files"]] == names == files_below(run.final)
    for file in record["files"]:
        assert pq.read_metadata(f"{run.out}/{file['path']}").num_rows == file["rows"]
        assert file["sha256"] == hashlib.sha256(Path(run.out, file["path"]).read_bytes()).hexdigest()
    assert sorted(ledger.verdicts(run.out).to_table().column("uri").to_pylist()) == URIS


# What is refused.


@pytest.mark.parametrize(
    ("staged", "message"),
    [
        (URIS[:9], "10 pictures were planned and 9 rows came: 1 missing, 0 surplus, 0 doubled"),
        ([*URIS, URIS[3]], "10 pictures were planned and 11 rows came: 0 missing, 0 surplus, 1 doubled"),
        ([*URIS, "/other.jpg"], "10 pictures were planned and 11 rows came: 0 missing, 1 surplus, 0 doubled"),
        ([*URIS[1:], URIS[1]], "10 pictures were planned and 10 rows came: 1 missing, 0 surplus, 1 doubled"),
        ([*URIS[1:], "/other.jpg"], "10 pictures were planned and 10 rows came: 1 missing, 1 surplus, 0 doubled"),
        ([], "10 pictures were planned and 0 rows came: 10 missing, 0 surplus, 0 doubled"),
    ],
)
def test_rows_that_are_not_the_planned_ones_are_not_published(staged: list[str], message: str, out: str) -> None:
    run = Run(out=out)
    manifest = stage(run, rows_for(staged[:6]), rows_for(staged[6:]))
    before = files_below(out)
    with pytest.raises(VerificationError, match=f"^{message}; nothing was published"):
        run.publish(manifest, {})
    assert files_below(out) == before
    assert not storage.exists(f"{out}/verdicts") and not storage.exists(f"{out}/runs")
    assert ledger.runs(out) == []


def test_run_without_any_staged_file_is_not_published(out: str) -> None:
    run = Run(out=out)
    with pytest.raises(VerificationError, match="no row of run .* was staged"):
        run.publish(stage(run), {})
    assert ledger.runs(out) == []


def test_publishing_that_stops_before_the_record_is_no_run(run: Run) -> None:
    manifest = stage(run, rows_for(URIS))
    Path(run.out, "runs", f"{run.run_id}.json", "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        run.publish(manifest, {})
    assert files_below(run.final) == ["part-00000.parquet"]  # the files come first
    assert (Path(run.staged_rows) / "part-0.parquet").exists()  # and nothing is lost
    with pytest.raises(SourceError, match="holds no published run"):
        ledger.verdicts(run.out)


# What readers see.


def test_readers_see_published_runs_only_in_their_order(out: str) -> None:
    assert ledger.runs(out) == []
    with pytest.raises(SourceError, match="holds no published run"):
        ledger.verdicts(out)
    for run_id, uris in (("20260103T000000Z-000000", URIS[5:]), ("20260102T000000Z-ffffff", URIS[:5])):
        run = Run(out=out, run_id=run_id)
        run.publish(stage(run, rows_for(uris), planned=uris), {})
    unfinished = Run(out=out, run_id="20260104T000000Z-000000")
    stage(unfinished, rows_for(["/not yet"]), planned=["/not yet"])
    write(f"{unfinished.final}/part-00000.parquet", verdict_table(verdict_row("/not yet", 0.1)))
    assert [record["run_id"] for record in ledger.runs(out)] == ["20260102T000000Z-ffffff", "20260103T000000Z-000000"]
    assert sorted(ledger.verdicts(out).to_table().column("uri").to_pylist()) == URIS


def test_publishing_leaves_the_staging_of_others_alone(run: Run) -> None:
    other = Run(out=run.out)
    stage(other, rows_for(URIS))
    run.publish(stage(run, rows_for(URIS)), {})
    assert not Path(run.staging).exists()
    assert (Path(other.staged_rows) / "part-0.parquet").exists()
