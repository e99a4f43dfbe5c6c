"""Attempts: each image of a manifest is done by exactly one of them, whatever dies and whoever wakes up late."""

import errno
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import schema
from jobs.dataset.manifest import image_id
from jobs.pipeline import models
from jobs.runs import attempts, names, removal
from jobs.runs.attempts import COMMITS, MAX_COMMIT_ROWS, MIN_COMMIT_ROWS, Attempt, begin, commit_rows, unfinished
from jobs.storage import filesystems, listing, parquet, reading, writing
from jobs.storage.database import Database
from nsnet.errors import StorageError
from tests.support.tables import (
    WRITE,
    batches,
    manifest_row,
    put,
    read_rows,
    rows_file,
    unmarked,
    verdict_row,
    verdict_table,
)

Rows = list[dict[str, Any]]
URIS = [f"/pictures/{i}.jpg" for i in range(12)]


@pytest.fixture
def staging(place: str) -> str:
    return f"{place}/staging/20260102T000000Z-000000"


@pytest.fixture
def on_disk(tmp_path: Path) -> str:
    return str(tmp_path / "staging" / "20260102T000000Z-000000")


def plan(staging: str, *rows: dict[str, Any]) -> None:
    """The manifest of a run; with no rows those of `URIS`."""
    planned = rows or tuple(manifest_row(uri) for uri in URIS)
    parquet.write(batches(planned, schema.MANIFEST), schema.MANIFEST, f"{staging}/manifest.parquet")


def begin_next(staging: str, known: Iterable[pa.RecordBatch] = (), captioner_id: str = "") -> Attempt:
    """The attempt of the next holder of the lock. Its number leaves a gap: other runs held the lock in between."""
    highest = max((int(name.removeprefix("attempt-")) for name in listing.subfolders(staging)), default=5)
    return begin([staging], highest + 2, known, captioner_id)


def write_rows(attempt: Attempt, task: int, uris: list[str], write: str = WRITE) -> str:
    """The file of a write task, under the name that Ray Data gives it."""
    uri = f"{attempt.rows}/{write}_{task:06d}-0.parquet"
    rows = verdict_table(*(verdict_row(uri, 0.5, run_id=attempt.runs[0]) for uri in uris))
    parquet.write(rows.to_batches(), schema.VERDICTS, uri)
    return uri


def checkpoint(attempt: Attempt, task: int, ending: str = "", write: str = WRITE) -> None:
    """The checkpoint of a write task; `ending`: `.pending`, until its rows are written."""
    writing.write_bytes(f"{attempt.checkpoint}/{write}_{task:06d}{ending}.parquet", b"ids")


def commit(attempt: Attempt, task: int, uris: list[str], write: str = WRITE) -> str:
    """What a write task leaves that ended well."""
    uri = write_rows(attempt, task, uris, write)
    checkpoint(attempt, task, write=write)
    return uri


def todo_files(attempt: Attempt) -> list[str]:
    """The files of what an attempt has to do, in their order."""
    names = listing.list_files(attempt.todo) if listing.exists(attempt.todo) else ()
    return sorted(entry.uri for entry in names)


def todo(attempt: Attempt) -> Rows:
    """What an attempt has to do, in its order."""
    rows = [row for uri in todo_files(attempt) for row in read_rows(uri)]
    assert attempt.count == len(rows)
    return rows


def left_for(attempt: Attempt) -> list[str]:
    """URIs of what an attempt has to do, in their order."""
    return [row["uri"] for row in todo(attempt)]


def finished(attempt: Attempt) -> list[str]:
    """URIs of the rows of an attempt and of those before it, sorted."""
    return sorted(row["uri"] for uri in attempt.files() for row in read_rows(uri))


# What is left.


def test_first_attempt_has_the_whole_manifest_in_its_order(staging: str) -> None:
    rows = [manifest_row(uri, etag="v", size_bytes=i, label=i % 2, listed=True) for i, uri in enumerate(URIS[::-1])]
    plan(staging, *rows)
    attempt = begin_next(staging)
    assert (attempt.number, attempt.count, attempt.accepted, attempt.files()) == (1, 12, [], [])
    assert todo(attempt) == [dict.fromkeys(schema.TODO.names) | row | {"wanted": 1} for row in rows]


def test_order_of_a_manifest_of_many_batches_is_kept(on_disk: str) -> None:
    uris = [f"/{i * 7919 % 9001}" for i in range(9001)]
    plan(on_disk, *(manifest_row(uri) for uri in uris))
    first = begin_next(on_disk)
    assert left_for(first) == uris
    commit(first, 0, uris[100:8500])
    assert left_for(begin_next(on_disk)) == uris[:100] + uris[8500:]


@pytest.mark.parametrize(("count", "rows"), [(1, 32), (32, 32), (33, 32), (100, 32), (132, 33), (1000, 50)])
def test_what_is_left_lies_in_a_file_per_task(
    count: int, rows: int, on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TASKS": 4, "MIN_TASK_ROWS": 32, "MAX_TASK_ROWS": 50}.items():
        monkeypatch.setattr(attempts, name, value)
    plan(on_disk, *(manifest_row(f"/{i}") for i in range(count)))
    sizes = [pq.read_metadata(uri).num_rows for uri in todo_files(begin_next(on_disk))]
    assert sizes == [rows] * (count // rows) + [count % rows] * (count % rows > 0)


def test_next_attempt_leaves_out_exactly_what_was_committed(staging: str) -> None:
    plan(staging)
    first = begin_next(staging)
    files = [commit(first, 3, [URIS[7], URIS[1]]), commit(first, 11, [URIS[4]])]
    second = begin_next(staging)
    assert second.number == 2 and second.accepted == files
    assert left_for(second) == [uri for i, uri in enumerate(URIS) if i not in (1, 4, 7)]
    assert finished(second) == [URIS[1], URIS[4], URIS[7]]


def test_all_files_of_a_task_count(on_disk: str) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    write_rows(first, 3, URIS[:2])
    Path(first.rows, f"{WRITE}_000003-0.parquet").rename(Path(first.rows, f"{WRITE}_000003-1.parquet"))
    commit(first, 3, URIS[2:4])
    assert left_for(begin_next(on_disk)) == URIS[4:]


def test_pending_checkpoint_does_not_count(staging: str) -> None:
    plan(staging)
    first = begin_next(staging)
    write_rows(first, 0, URIS[:3])
    checkpoint(first, 0, ".pending")
    commit(first, 1, URIS[3:5])
    checkpoint(first, 1, ".pending")  # a checkpoint is copied to its final name before the pending one goes
    second = begin_next(staging)
    assert left_for(second) == URIS[:3] + URIS[5:]
    assert finished(second) == URIS[3:5]


def test_rows_without_a_checkpoint_do_not_count(on_disk: str) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    write_rows(first, 0, URIS[:3])
    commit(first, 1, URIS[3:5])
    write_rows(first, 1, URIS[5:7], write=f"{WRITE[:-8]}00000000")
    assert left_for(begin_next(on_disk)) == URIS[:3] + URIS[5:]


def test_checkpoint_without_rows_does_not_count(on_disk: str) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    checkpoint(first, 0)
    second = begin_next(on_disk)
    assert second.accepted == [] and left_for(second) == URIS


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_damaged_file_is_said_and_its_rows_are_made_again(
    kept: float, staging: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(staging)
    first = begin_next(staging)
    whole, damaged = commit(first, 0, URIS[:3]), commit(first, 1, URIS[3:6])
    content = reading.read_bytes(damaged)
    writing.write_bytes(damaged, content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    second = begin_next(staging)
    assert second.accepted == [whole] and left_for(second) == URIS[3:]
    assert f"warning: {damaged} is damaged, its rows are made again" in capsys.readouterr().err


def test_file_that_a_busy_store_does_not_give_is_not_taken_for_damaged(
    on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    rows, read = commit(first, 0, URIS[:3]), parquet.read

    def busy(uri: str, columns: pa.Schema, **more: Any) -> Iterator[pa.RecordBatch]:
        if uri == rows:
            raise OSError(errno.EIO, "busy")
        return read(uri, columns, **more)

    monkeypatch.setattr(parquet, "read", busy)
    with pytest.raises(OSError, match="busy"):
        begin_next(on_disk)
    monkeypatch.setattr(parquet, "read", read)
    assert begin_next(on_disk).accepted == [rows]


def test_other_files_beside_the_rows_are_no_rows(on_disk: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    file = commit(first, 0, URIS[:3])
    name = f"{WRITE}_000000"
    put(first.rows, {f"{name}-0.parquet.partial-17": b"", f"{name}.txt": b"", f".{name}-0.parquet.crc": b"x"})
    assert begin_next(on_disk).accepted == [file]
    assert capsys.readouterr().err == ""


def test_attempts_in_a_row_accumulate(staging: str) -> None:
    plan(staging)
    first = begin_next(staging)
    commit(first, 0, URIS[:3])
    second = begin_next(staging)
    commit(second, 0, URIS[6:8])  # tasks are numbered from 0 in every attempt, and rows come in any order
    commit(second, 1, URIS[3:5])
    third = begin_next(staging)
    assert left_for(third) == [URIS[5], *URIS[8:]]
    commit(third, 0, [URIS[5], *URIS[8:]])
    assert finished(third) == sorted(URIS)
    last = begin_next(staging)
    assert (last.number, last.count, left_for(last)) == (4, 0, [])
    assert finished(last) == sorted(URIS)


def test_last_attempt_sees_what_it_committed_itself(on_disk: str) -> None:
    plan(on_disk)
    attempt = begin_next(on_disk)
    commit(attempt, 1, URIS[6:])
    assert finished(attempt) == sorted(URIS[6:])
    commit(attempt, 0, URIS[:6])
    assert finished(attempt) == sorted(URIS)


# Damage.


def test_frozen_file_that_is_damaged_afterwards_is_made_again(staging: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(staging)
    first = begin_next(staging)
    whole, damaged = commit(first, 0, URIS[:3]), commit(first, 1, URIS[3:6])
    second = begin_next(staging)
    assert second.accepted == [whole, damaged]
    writing.write_bytes(damaged, reading.read_bytes(damaged)[:-1])
    made = commit(second, 0, URIS[6:8])
    third = begin_next(staging)
    assert third.accepted == [whole, made] and left_for(third) == URIS[3:6] + URIS[8:]
    assert f"warning: {damaged} is damaged, its rows are made again" in capsys.readouterr().err


def test_frozen_file_that_is_gone_is_made_again(staging: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(staging)
    gone = commit(begin_next(staging), 0, URIS[:3])
    assert begin_next(staging).accepted == [gone]
    writing.remove_file(gone)
    third = begin_next(staging)
    assert third.accepted == [] and left_for(third) == URIS
    assert f"warning: {gone} is damaged" in capsys.readouterr().err


def test_file_that_was_made_again_stays_made_again(on_disk: str) -> None:
    plan(on_disk)
    damaged = commit(begin_next(on_disk), 0, URIS[:3])
    content = reading.read_bytes(damaged)
    begin_next(on_disk)
    writing.write_bytes(damaged, content[:-1])
    third = begin_next(on_disk)
    commit(third, 0, URIS[:3])
    writing.write_bytes(damaged, content)  # the file is whole again, but its rows have other rows in their place
    fourth = begin_next(on_disk)
    assert Counter(finished(fourth)) == Counter(URIS[:3]) and left_for(fourth) == URIS[3:]


def test_file_that_holds_what_another_holds_is_made_again(staging: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A task that was repeated may have cut its rows into other files than the first time."""
    plan(staging)
    first = begin_next(staging)
    files = [commit(first, 0, URIS[:3]), commit(first, 1, URIS[2:5]), commit(first, 2, URIS[6:8])]
    second = begin_next(staging)
    assert second.accepted == [files[0], files[2]] and left_for(second) == URIS[3:6] + URIS[8:]
    assert f"warning: {files[1]} holds rows that another file holds" in capsys.readouterr().err
    commit(second, 0, URIS[3:6] + URIS[8:])
    assert finished(begin_next(staging)) == sorted(URIS)


def test_file_with_rows_that_were_not_planned_or_twice_is_made_again(on_disk: str) -> None:
    plan(on_disk, *(manifest_row(uri) for uri in URIS[:6]))
    first = begin_next(on_disk)
    commit(first, 0, [URIS[0], URIS[7]])
    commit(first, 1, [URIS[1], URIS[1]])
    whole = commit(first, 2, [URIS[2]])
    second = begin_next(on_disk)
    assert second.accepted == [whole] and left_for(second) == [*URIS[:2], *URIS[3:6]]


def test_attempt_believes_its_own_files(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(on_disk)
    attempt = begin_next(on_disk)
    file = commit(attempt, 0, URIS[:3])
    monkeypatch.setattr(parquet, "read", lambda uri, columns: pytest.fail("it was read"))
    assert attempt.committed() == attempt.files() == [file]  # publishing reads them all anyway


# Who holds the lock.


def test_attempts_are_named_by_the_lock_and_counted_in_their_run(staging: str) -> None:
    plan(staging)
    begun = [begin([staging], lock_number) for lock_number in (3, 4, 120, 10**8 - 1)]
    names = ["attempt-00000003", "attempt-00000004", "attempt-00000120", "attempt-99999999"]
    assert [attempt.folder for attempt in begun] == [f"{staging}/{name}" for name in names]
    assert [attempt.number for attempt in begun] == [1, 2, 3, 4]


def test_attempt_of_a_newer_holder_is_ignored_by_an_older_one(staging: str) -> None:
    plan(staging)
    commit(begin([staging], 3), 0, URIS[:3])
    newer = begin([staging], 9)
    commit(newer, 0, URIS[3:6])
    older = begin([staging], 8)  # it held the lock before, and wakes up late
    assert older.number == 2 and older.folder != newer.folder
    assert finished(older) == URIS[:3] and left_for(older) == URIS[3:]


def test_attempt_whose_lock_was_there_before_is_refused(staging: str) -> None:
    plan(staging)
    commit(begin([staging], 1), 0, URIS[:3])
    with pytest.raises(StorageError, match="attempt-00000001 exists already because the folder locks/ was removed"):
        begin([staging], 1)
    assert Counter(finished(begin([staging], 2))) == Counter(URIS[:3])


def test_newer_holder_does_not_take_over_what_an_older_one_commits_later(staging: str) -> None:
    plan(staging)
    newer = begin([staging], 9)
    older = begin([staging], 8)
    commit(older, 0, URIS[:3])
    assert newer.files() == [] and left_for(newer) == URIS
    commit(newer, 0, URIS)
    third = begin([staging], 10)
    assert Counter(finished(third)) == Counter(URIS) and left_for(third) == []


def test_older_holder_that_wakes_up_leaves_the_newer_one_alone(staging: str) -> None:
    plan(staging)
    newer = begin([staging], 9)
    before = {entry.uri: reading.read_bytes(entry.uri) for entry in listing.list_files(newer.folder)}
    commit(begin([staging], 8), 0, URIS[:3])
    assert {entry.uri: reading.read_bytes(entry.uri) for entry in listing.list_files(newer.folder)} == before


# Who wakes up late, and who was cut.


def test_files_of_a_dead_attempt_that_come_late_are_ignored_for_ever(staging: str) -> None:
    plan(staging)
    first = begin_next(staging)
    commit(first, 0, URIS[:3])
    write_rows(first, 1, URIS[3:6])
    checkpoint(first, 1, ".pending")
    second = begin_next(staging)
    checkpoint(first, 1)  # a task that outlived its driver
    commit(first, 2, URIS[6:9])
    assert left_for(second) == URIS[3:] and finished(second) == URIS[:3]
    commit(second, 0, URIS[3:8])
    third = begin_next(staging)
    assert left_for(third) == URIS[8:]
    commit(third, 0, URIS[8:])
    assert Counter(finished(third)) == Counter(URIS)  # each once


def test_file_of_an_attempt_before_the_last_is_frozen_even_where_the_last_made_none(on_disk: str) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    second = begin_next(on_disk)
    commit(first, 0, URIS[:3])
    third = begin_next(on_disk)
    assert third.accepted == [] and left_for(third) == URIS == left_for(second)


def test_attempt_that_was_cut_before_it_froze_its_files_is_ignored(
    staging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(staging)
    first = begin_next(staging)
    commit(first, 0, URIS[:3])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_json", lambda uri, value: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                begin_next(staging)
    assert listing.subfolders(staging) == ["attempt-00000007", "attempt-00000009", "attempt-00000011"]
    commit(replace(first, folder=f"{staging}/attempt-00000011"), 0, URIS[5:7])  # nothing can have written there for us
    fourth = begin_next(staging)
    assert fourth.number == 4
    assert left_for(fourth) == URIS[3:] and finished(fourth) == URIS[:3]


def test_attempt_begins_only_once_its_rest_is_written(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(on_disk)
    written = []
    real = writing.write_json

    def write_json(uri: str, value: Any) -> None:
        written.append((Path(uri).name, sorted(path.name for path in Path(uri).parent.iterdir())))
        real(uri, value)

    monkeypatch.setattr(writing, "write_json", write_json)
    begin_next(on_disk)
    assert written == [("accepted.json", ["todo"])]


def test_accepted_files_are_found_where_the_output_was_moved(on_disk: str, tmp_path: Path) -> None:
    plan(on_disk)
    commit(begin_next(on_disk), 0, URIS[:3])
    commit(begin_next(on_disk), 0, URIS[3:5])
    (tmp_path / "staging").rename(tmp_path / "moved")
    third = begin_next(str(tmp_path / "moved" / Path(on_disk).name))
    assert len(third.accepted) == 2 and left_for(third) == URIS[5:]
    assert all(uri.startswith(f"{tmp_path}/moved/") for uri in third.accepted)


# Known captions.

CAPTIONER = "blip-base-00112233"
SAME = manifest_row("/a/cat.jpg", etag="1", size_bytes=10)


def captioned(uri: str, etag: str = "1", size_bytes: int | None = 10, **values: Any) -> dict[str, Any]:
    """A published row with a caption."""
    of_content = {"caption": f"caption of {uri} {etag}", "content_hash": f"hash of {uri} {etag}"}
    row = {"caption_run_id": "earlier", **of_content, **values}
    if row["caption"] is not None and row["content_hash"] is not None:  # else a row is published without one
        row.setdefault("caption_id", models.caption_id(CAPTIONER, row["content_hash"]))
    return verdict_row(uri, 0.5, etag=etag, image_id=image_id(uri, etag), size_bytes=size_bytes, **row)


def known(staging: str, planned: Rows, published: Rows) -> list[tuple[str | None, str | None, str | None]]:
    """(caption, hash, run) that is known of each planned row."""
    plan(staging, *planned)
    attempt = begin_next(staging, batches(published, schema.CAPTIONED, size=3), CAPTIONER)
    rows = todo(attempt)
    assert [row["uri"] for row in rows] == [row["uri"] for row in planned]
    return [(row["known_caption"], row["known_hash"], row["known_run_id"]) for row in rows]


def of(uri: str, etag: str = "1") -> tuple[str, str, str]:
    return f"caption of {uri} {etag}", f"hash of {uri} {etag}", "earlier"


NOTHING = (None, None, None)


def test_caption_of_the_same_version_is_known(staging: str) -> None:
    assert known(staging, [SAME], [captioned("/a/cat.jpg"), captioned("/a/dog.jpg")]) == [of("/a/cat.jpg")]


def test_caption_of_a_copy_is_known_by_file_name_and_size(on_disk: str) -> None:
    planned = [manifest_row("s3://b/moved/here/cat.jpg", etag="x", size_bytes=10)]
    assert known(on_disk, planned, [captioned("/a/cat.jpg")]) == [of("/a/cat.jpg")]


def test_caption_of_a_touched_file_is_known(on_disk: str) -> None:
    assert known(on_disk, [{**SAME, "image_id": image_id("/a/cat.jpg", "2")}], [captioned("/a/cat.jpg")]) == [
        of("/a/cat.jpg")
    ]


@pytest.mark.parametrize(
    "published",
    [
        captioned("/b/cat.jpg", size_bytes=11),
        captioned("/b/cat.jpg", size_bytes=None),
        captioned("/a/dog.jpg"),
        captioned("/b/a cat.jpg"),
        captioned("/a/cat.jpg/x"),
        captioned("/a/cat.jpg", caption=None),
        captioned("/b/cat.jpg", caption=None),
        captioned("/a/cat.jpg", content_hash=None),
        captioned("/a/cat.jpg", caption_id=models.caption_id("git-base-44556677", "hash of cat")),
        captioned("/a/cat.jpg", caption_id=models.caption_id(f"{CAPTIONER}9", "hash of cat")),
        captioned("/a/cat.jpg", caption_id=models.caption_id(f"x{CAPTIONER}", "hash of cat")),
        captioned("/a/cat.jpg", caption_id=None),
    ],
    ids=[
        "other size", "unknown size", "other name", "longer name", "folder of that name", "no caption",
        "copy without caption", "no hash", "other captioner", "captioner with a longer name",
        "captioner with a longer beginning", "no captioner",
    ],
)  # fmt: skip
def test_other_captions_are_not_known(published: dict[str, Any], on_disk: str) -> None:
    assert known(on_disk, [SAME], [published]) == [NOTHING]


def test_unknown_size_is_like_no_size(on_disk: str) -> None:
    planned = [manifest_row("/b/cat.jpg", size_bytes=None)]
    assert known(on_disk, planned, [captioned("/a/cat.jpg", size_bytes=None)]) == [NOTHING]


def test_same_version_goes_before_a_copy(on_disk: str) -> None:
    published = [captioned(f"/{i}/cat.jpg") for i in range(10)] + [captioned("/a/cat.jpg")]
    assert known(on_disk, [SAME], published) == [of("/a/cat.jpg")]


def test_copy_helps_where_the_same_version_has_no_caption(on_disk: str) -> None:
    published = [captioned("/a/cat.jpg", caption=None), captioned("/b/cat.jpg")]
    assert known(on_disk, [SAME], published) == [of("/b/cat.jpg")]


def test_image_captioned_by_several_runs_is_planned_once(on_disk: str) -> None:
    published = [captioned("/a/cat.jpg"), captioned("/a/cat.jpg"), captioned("/b/cat.jpg")]
    assert known(on_disk, [SAME], published) == [of("/a/cat.jpg")]


def test_captions_are_of_nobody_where_no_captioner_is_named(on_disk: str) -> None:
    plan(on_disk, SAME)
    (row,) = todo(begin_next(on_disk, batches([captioned("/a/cat.jpg")], schema.CAPTIONED)))
    assert row["known_caption"] is None


def test_caption_of_the_captioner_is_found_behind_one_of_another(on_disk: str) -> None:
    other = models.caption_id("git-base-44556677", "hash of cat")
    published = [captioned("/a/cat.jpg", caption="by another", caption_id=other), captioned("/b/cat.jpg")]
    assert known(on_disk, [SAME], published) == [of("/b/cat.jpg")]


def test_captions_that_fit_nothing_are_not_kept(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    class Watched(Database):
        def insert(self, table: str, batches: Iterable[pa.RecordBatch]) -> None:
            super().insert(table, batches)
            if table == "captions":
                kept.append(self.number("select count(*) from captions"))

    monkeypatch.setattr("jobs.storage.database.Database", Watched)
    many = [captioned(f"/many/{i}.jpg") for i in range(5000)]
    done, planned = manifest_row("/done.jpg", size_bytes=10), [SAME, manifest_row("/b/dog.jpg", size_bytes=10)]
    plan(on_disk, done, *planned)
    commit(begin_next(on_disk), 0, ["/done.jpg"])
    published = [*many, captioned("/done.jpg", etag=""), captioned("/a/cat.jpg"), captioned("/c/dog.jpg"), *many]
    second = begin_next(on_disk, batches(published, schema.CAPTIONED), CAPTIONER)
    assert [row["known_caption"] for row in todo(second)] == [of("/a/cat.jpg")[0], of("/c/dog.jpg")[0]]
    assert kept == [0, 2]  # captions of images that are done already are of no use either


def test_caption_hash_and_run_are_of_one_image_among_many_alike(on_disk: str) -> None:
    uris = [f"/{i}/{i % 3}.jpg" for i in range(30_000)]
    captions = {f"caption {i}": (f"hash {i * 7919 % 30_011}", f"run {i * 104_729 % 30_011}") for i in range(len(uris))}
    published = (
        captioned(uri, caption=caption, content_hash=content_hash, caption_run_id=run_id)
        for uri, (caption, (content_hash, run_id)) in zip(uris, captions.items(), strict=True)
    )
    plan(on_disk, *(manifest_row(f"/new/{i}.jpg", size_bytes=10) for i in range(3)))
    for row in todo(begin_next(on_disk, batches(published, schema.CAPTIONED), CAPTIONER)):
        assert (row["known_hash"], row["known_run_id"]) == captions[row["known_caption"]]


def test_known_captions_add_no_row_and_leave_out_none(on_disk: str) -> None:
    plan(on_disk)
    first = begin_next(on_disk, batches([captioned(uri) for uri in URIS], schema.CAPTIONED), CAPTIONER)
    commit(first, 0, URIS[:3])
    published = [captioned(uri, etag="") for uri in URIS[:6]] + [captioned("/not/planned.jpg")]
    second = begin_next(on_disk, batches(published, schema.CAPTIONED), CAPTIONER)
    assert left_for(second) == URIS[3:]
    assert [row["known_run_id"] for row in todo(second)] == ["earlier"] * 3 + [None] * 6


# Runs that were not published.


PLAN = {"count": 1, "left_out": {}, "states": {}, "unread": [], "unread_count": 0}


def run_json(**values: Any) -> dict[str, Any]:
    return {"product": "verdicts", "settings": {"of": "this"}, "published": [], "plan": PLAN, **values}


NOT_OURS = "since no run of this program made it"
IDS_OF_RUNS = [f"2026010{i}T000000Z-00000{i}" for i in range(1, 6)]


def test_unfinished_runs_are_those_that_were_planned(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert unfinished(place) == {}
    first, second, cut = IDS_OF_RUNS[:3]
    for run_id in (first, second):
        writing.write_json(f"{place}/staging/{run_id}/run.json", run_json())
        put(f"{place}/staging/{run_id}", {"attempt-00000007/rows/x": b""})
    put(f"{place}/staging/{cut}", {"manifest.parquet": b"m", "run.json.partial-0a1b2c3d": b"{"})
    put(place, {f"runs/{cut}.json": b"{}", f"verdicts/run_id={cut}/part.parquet": b""})
    assert unfinished(place) == {first: run_json(), second: run_json()}
    assert listing.subfolders(f"{place}/staging") == [first, second]
    assert listing.exists(f"{place}/staging/{first}/attempt-00000007/rows/x")
    assert listing.exists(f"{place}/runs/{cut}.json") and listing.exists(f"{place}/verdicts/run_id={cut}/part.parquet")
    assert capsys.readouterr().err == ""


def test_folders_of_others_stay_and_are_named_in_one_line(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--out` may be a folder that others use as well, with a folder `staging` of their own."""
    files = {
        "customer/invoice.pdf": b"x",
        "notes.txt": b"x",
        f"{IDS_OF_RUNS[0]}/photo.jpg": b"x",
        f"{IDS_OF_RUNS[1]}/manifest.parquet": b"x",  # of ours, or not: nothing says so
        f"{IDS_OF_RUNS[1]}/photo.jpg": b"x",
        "20261399T000000Z-000000/manifest.parquet": b"x",
    }
    put(f"{place}/staging", files)
    for _ in range(2):
        assert unfinished(place) == {}
        (line,) = unmarked(capsys.readouterr().err).splitlines()
        assert line.startswith(f"left alone, {NOT_OURS}: ") and line.endswith(" and 2 more")
    assert {entry.uri.removeprefix(f"{place}/staging/") for entry in listing.list_files(f"{place}/staging")} == {*files}


def test_link_that_is_named_like_a_run_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere, out = put(str(tmp_path / "elsewhere"), {"manifest.parquet": b"x"}), tmp_path / "out"
    (out / "staging").mkdir(parents=True)
    (out / "staging" / IDS_OF_RUNS[0]).symlink_to(elsewhere)
    assert unfinished(str(out)) == {}
    assert Path(elsewhere, "manifest.parquet").exists() and (out / "staging" / IDS_OF_RUNS[0]).is_symlink()
    assert (
        f"left alone, since no run of this program made it: {out}/staging/{IDS_OF_RUNS[0]}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte"),
        (b"[" * 10_000, "nested deeper than 32"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[]", "holds a list instead of an object"),
        (b"{}", "has no settings"),
        (json.dumps(run_json(settings=[])).encode(), "its settings is a list instead of a dict"),
        (json.dumps(run_json(published={})).encode(), "its published is a dict instead of a list"),
        (json.dumps(run_json(published=[1])).encode(), "published is not a list of run ids"),
        (json.dumps(run_json(published=[["a"]])).encode(), "published is not a list of run ids"),
        (json.dumps(run_json(plan={})).encode(), "count in its plan is not of type int"),
        (json.dumps(run_json(plan={**PLAN, "unread": [1]})).encode(), "unread in its plan is not a list of texts"),
        (
            json.dumps(run_json(plan={"count": "1", "left_out": {}, "states": {}})).encode(),
            "count in its plan is not of type int",
        ),
    ],
)
def test_damaged_settings_of_a_run_are_named_with_what_to_do(content: bytes, reason: str, tmp_path: Path) -> None:
    folder = f"{tmp_path}/staging/{IDS_OF_RUNS[0]}"
    put(folder, {"run.json": content, "manifest.parquet": b"m"})
    with pytest.raises(StorageError) as caught:
        unfinished(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{folder}/run.json is damaged (") and reason in message and "\n" not in message
    assert message.endswith(f"remove {folder} while no run writes here to plan its images again")
    assert listing.exists(f"{folder}/manifest.parquet")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{}", "holds a dict instead of a list"),
        (b"[1]", "'1' is not a file of rows"),
        (b"[", "Expecting value"),
        (b'["../../elsewhere/x.parquet"]', "is not a file of rows of this run"),
        (b'["/etc/passwd"]', "is not a file of rows of this run"),
        (b'["s3://other/attempt-00000007/rows/x.parquet"]', "is not a file of rows of this run"),
        (json.dumps([rows_file("attempt-00000007/../attempt-00000007")]).encode(), "is not a file of rows of this run"),
        (json.dumps([rows_file("attempt-00000007") + "\n"]).encode(), "is not a file of rows of this run"),
    ],
)
def test_damaged_list_of_finished_files_is_named_and_nothing_is_planned_without_it(
    content: bytes, reason: str, on_disk: str
) -> None:
    plan(on_disk)
    first = begin_next(on_disk)
    commit(first, 0, URIS[:3])
    put(first.folder, {"accepted.json": content})
    with pytest.raises(StorageError) as caught:
        begin_next(on_disk)
    message = str(caught.value)
    assert message.startswith(f"{first.folder}/accepted.json is damaged (") and reason in message
    assert f"remove {on_disk} while no run writes here" in message and "\n" not in message
    assert listing.subfolders(on_disk) == [Path(first.folder).name]


@pytest.mark.parametrize("damage", ["gone", "cut", "no Parquet", "other columns"])
def test_damaged_manifest_is_named(damage: str, on_disk: str) -> None:
    plan(on_disk)
    path = Path(on_disk, "manifest.parquet")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "other columns":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(content[:-10] if damage == "cut" else b"no Parquet at all")
    with pytest.raises(
        StorageError, match=f"{path} is {'missing' if damage == 'gone' else 'damaged'}.*plan its images again"
    ):
        begin_next(on_disk)


def test_folders_of_others_beside_the_attempts_are_none(on_disk: str) -> None:
    plan(on_disk)
    put(on_disk, {"notes/x": b"", "attempt-x/accepted.json": b"[]", "attempt-1/accepted.json": b"[]"})
    commit(begin([on_disk], 3), 0, URIS[:3])
    assert left_for(begin([on_disk], 4)) == URIS[3:]


# How much is committed at a time.


@pytest.mark.parametrize("count", [0, 1, 1000, 10**5, 10**6, 10**7, 10**9])
def test_rows_of_a_commit_are_bounded_and_so_is_the_number_of_commits(count: int) -> None:
    rows = commit_rows(count)
    assert MIN_COMMIT_ROWS <= rows <= MAX_COMMIT_ROWS
    assert rows == MAX_COMMIT_ROWS or count / (rows + 1) < COMMITS  # not more commits than that
    assert rows == MIN_COMMIT_ROWS or count / rows >= COMMITS  # and not more to lose than needed for it


# With Ray Data itself.


def test_write_of_ray_data_that_dies_is_continued(cluster: None, staging: str) -> None:
    import ray.data

    from jobs.cluster import resources
    from jobs.pipeline.datasource import ParquetFiles

    planned = [manifest_row(f"/{i}.jpg", position=i) for i in range(400)]
    plan(staging, *planned)

    def write(attempt: Attempt, poisoned: int | None) -> None:
        def check(table: pa.Table) -> pa.Table:
            if poisoned in table.column("position").to_pylist():
                end = time.monotonic() + 240
                while not attempt.committed() and time.monotonic() < end:  # it dies in the middle, however many cores
                    time.sleep(0.1)
                raise ValueError("poison")
            return table

        files = sorted(entry.uri for entry in listing.list_files(attempt.todo))
        rows = ray.data.read_datasource(ParquetFiles(files, schema.TODO), override_num_blocks=len(files))
        rows.context.checkpoint_config = resources.job_checkpoint(attempt.checkpoint)
        system, path = filesystems.arrow_filesystem(attempt.rows)
        rows.map_batches(check, batch_format="pyarrow", batch_size=20).write_parquet(
            path, filesystem=system, min_rows_per_file=40
        )

    first = begin_next(staging)
    with pytest.raises(Exception, match="poison"):
        write(first, poisoned=390)
    second = begin_next(staging)
    done = set(finished(second))
    assert left_for(second) == [row["uri"] for row in planned if row["uri"] not in done]
    # a write that was under way when its dataset died may commit later: its rows are done again
    assert done and {*second.accepted} <= {*first.committed()}
    write(second, poisoned=None)
    assert finished(second) == sorted(row["uri"] for row in planned)
    assert ray.data.DataContext.get_current().checkpoint_config is None  # other datasets of the process have none
    assert removal.remove(staging, names.STAGED).foreign == []  # whatever Ray Data wrote, and left where it died


# Runs of several detectors in one pass.

OTHER = "20260102T000000Z-111111"


def plan_pass(leader: str, wanted: dict[str, list[str]]) -> list[str]:
    """Stagings of runs that want these images, by run id; the first is the leader's."""
    stagings = [leader, *(leader.rpartition("/")[0] + f"/{run_id}" for run_id in list(wanted)[1:])]
    for staging, uris in zip(stagings, wanted.values(), strict=True):
        plan(staging, *(manifest_row(uri) for uri in uris))
    return stagings


def commit_of(attempt: Attempt, task: int, rows: list[tuple[str, str]]) -> str:
    """A finished file with rows of runs: run id and image."""
    uri = f"{attempt.rows}/{WRITE}_{task:06d}-0.parquet"
    table = verdict_table(*(verdict_row(image, 0.5, run_id=run_id) for run_id, image in rows))
    parquet.write(table.to_batches(), schema.VERDICTS, uri)
    checkpoint(attempt, task)
    return uri


def test_pass_does_each_image_once_and_says_which_runs_want_it(on_disk: str) -> None:
    stagings = plan_pass(on_disk, {"": URIS[:3], OTHER: [URIS[4], *URIS[1:3]]})
    attempt = begin(stagings, 1)
    assert attempt.runs == (on_disk.rpartition("/")[2], OTHER) and attempt.folder.startswith(on_disk)
    assert [(row["uri"], row["wanted"]) for row in todo(attempt)] == [
        (URIS[0], 1), (URIS[1], 3), (URIS[2], 3), (URIS[4], 2)
    ]  # fmt: skip


def test_pass_goes_on_with_what_each_run_lacks(on_disk: str) -> None:
    stagings = plan_pass(on_disk, {"": URIS[:4], OTHER: URIS[:4]})
    first = begin(stagings, 1)
    leader, other = first.runs
    file = commit_of(first, 0, [(leader, URIS[0]), (other, URIS[0]), (leader, URIS[1])])
    second = begin(stagings, 2)
    assert second.accepted == [file]
    assert [(row["uri"], row["wanted"]) for row in todo(second)] == [(URIS[2], 3), (URIS[3], 3), (URIS[1], 2)]


def test_run_of_a_pass_that_goes_on_alone_keeps_its_rows_and_ignores_those_of_others(on_disk: str) -> None:
    stagings = plan_pass(on_disk, {"": URIS[:3], OTHER: URIS[3:6]})
    first = begin(stagings, 1)
    leader, other = first.runs
    file = commit_of(first, 0, [(leader, URIS[0]), (other, URIS[3])])
    alone = begin(stagings[:1], 2)
    assert alone.accepted == [file] and left_for(alone) == URIS[1:3]
    assert left_for(begin(stagings[1:], 3)) == URIS[3:6]  # its rows lie in the staging of the leader


def test_row_that_its_own_run_did_not_plan_makes_its_file_useless(on_disk: str) -> None:
    stagings = plan_pass(on_disk, {"": URIS[:3], OTHER: URIS[3:6]})
    first = begin(stagings, 1)
    leader, other = first.runs
    commit_of(first, 0, [(leader, URIS[0]), (other, URIS[0])])
    assert begin(stagings, 2).accepted == []


def test_run_with_attempts_leads_the_pass(on_disk: str) -> None:
    stagings = plan_pass(on_disk, {"": URIS[:3], OTHER: URIS[:3]})
    assert attempts.led(stagings) == stagings
    begin(stagings[1:], 1)
    assert attempts.led(stagings) == stagings[::-1]
