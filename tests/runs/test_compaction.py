"""Compaction: every reader gives the same answers before, during and after, whatever is interrupted."""

import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from jobs.dataset import schema
from jobs.dataset.manifest import image_id
from jobs.runs import (
    catalog,
    compaction,
    execution,
    failures,
    lock,
    products,
    publication,
    records,
    removal,
    retirement,
)
from jobs.runs.compaction import compact
from jobs.runs.execution import Request
from jobs.runs.publication import VerificationError
from jobs.storage import listing, parquet, reading, uris, writing
from jobs.storage.uris import Uri
from jobs.workflows.history import history
from nsnet.errors import ConfigError, LockedError, SourceError, StorageError
from tests.support.nights import CAPTIONER, night_rows, publish, run_id
from tests.support.swift import REPO_ROOT
from tests.support.tables import run_command

ONE, TWO = "1" * 16, "2" * 16
LIMITS = {"max_bytes": 1}


@pytest.fixture
def out(tmp_path: Path) -> str:
    """An output on disk, for what does not depend on the store; other tests take `place`."""
    return str(tmp_path / "out")


def settings(detector: str) -> dict[str, Any]:
    return {
        "detector_id": detector, "settings": {"limits": LIMITS, "detector": {"name": detector}},
        "versions": {"pillow": version("pillow"), "nsnet": "1"},
    }  # fmt: skip


def add_random_history(out: str, nights: int, seed: int) -> None:
    """Nights of two detectors and of facts: new, changed, retried and remembered images, and nights without work."""
    dice = random.Random(seed)
    failed: dict[str, list[dict[str, Any]]] = {ONE: [], TWO: []}
    for night in range(nights):
        for number, detector in enumerate((ONE, TWO)):
            if dice.random() < 0.2:
                continue
            count = dice.choice([0, 1, 3, 150])
            rows = night_rows(night, count, detector)
            for row in rows:
                if dice.random() < 0.1:
                    row |= {"image_id": image_id(row["uri"], "changed"), "etag": "changed"}
                if row["status"] == "failed" and dice.random() < 0.5:
                    row |= {"error_class": "ImageTimeoutError", "error_message": "slow"}
            if failed[detector] and dice.random() < 0.5:  # --retry-failed
                again, failed[detector] = failed[detector], []
                rows += [row | {"status": "scored", "verdict": "real", "prob_fake": 0.25} for row in again]
            failed[detector] += [row for row in rows if row["status"] == "failed"]
            captioner = CAPTIONER if night < nights // 2 else "e" * 16
            given = settings(detector) | {"captioner_id": captioner, "night": night}
            publish(out, run_id(night, number), rows, **given)
        if dice.random() < 0.3:
            facts = [{name: row.get(name) for name in schema.FACTS.names} for row in night_rows(night, 5)]
            publish(out, run_id(night, 2), facts, products.FACTS, facts_id="f")


def a_request(out: str) -> Request:
    return Request(
        source=Uri("s3://in"), out=Uri(out), product=products.VERDICTS, maker=ONE, settings={"limits": LIMITS}
    )


def answers(out: str) -> dict[str, Any]:
    """What every reader says, but for the places of files."""

    def rows(batches: Iterator[Any]) -> list[dict[str, Any]]:
        return [row for batch in batches for row in batch.to_pylist()]

    def without_files(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in one.items() if key != "files"} for one in found]

    dataset = catalog.verdicts(out).to_table()
    return {
        "records": without_files(catalog.records(out)),
        "runs": {product.name: without_files(catalog.runs(out, product)) for product in products.PRODUCTS.values()},
        "ids": [sorted(catalog.run_ids(out, products.VERDICTS, maker)) for maker in (ONE, TWO)],
        "all": rows(catalog.published(out, schema.VERDICTS)),
        "captions": rows(catalog.published(out, schema.CAPTIONED, captioner_id=CAPTIONER)),
        "of one": rows(catalog.published(out, schema.DONE, detector_id=ONE)),
        "facts": rows(catalog.published(out, schema.FACTS, products.FACTS, facts_id="f")),
        "newest": rows(catalog.newest(out, schema.VERDICTS)),
        "dataset": sorted(map(repr, dataset.to_pylist())),
        "history": history(Uri(out)),
        "remembered": failures.remembered(a_request(out)),
    }


def files_below(out: str) -> list[str]:
    return sorted(entry.uri.removeprefix(f"{out}/") for entry in listing.list_files(out) if "/locks/" not in entry.uri)


def test_every_reader_gives_the_same_answers_before_and_after(out: str) -> None:
    check_random_history(out, 8, 0)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_more_histories_give_the_same_answers_before_and_after(seed: int, tmp_path: Path) -> None:
    check_random_history(str(tmp_path), 14, seed)


def check_random_history(out: str, nights: int, seed: int) -> None:
    add_random_history(out, nights, seed)
    before = answers(out)
    assert before["remembered"] and len(before["newest"]) < len(before["all"])
    first = compact(out, before=run_id(nights // 2))
    assert first.merged and not first.removed_records and first.waiting_records
    assert answers(out) == before
    second = compact(out, grace_seconds=0.0)
    assert second.merged and second.removed_records and not second.waiting_records
    assert answers(out) == before
    stored = records.stored(out)
    assert len(stored) == len(records.effective(stored)) < len(before["records"]) / 2
    named = {file["path"] for record in stored for file in record["files"]}
    assert {name for name in files_below(out) if name.endswith(".parquet")} == named
    again = compact(out, grace_seconds=0.0)
    assert again.merged == [] and again.removed_records == 0
    add_random_history_after(out)
    third = answers(out)
    compact(out, grace_seconds=0.0)
    assert answers(out) == third


def add_random_history_after(out: str) -> None:
    for night in (20, 21):
        publish(out, run_id(night), night_rows(night, 3, ONE), **settings(ONE))


def test_files_get_the_target_size_and_full_ones_are_left_as_they_are(place: str) -> None:
    for night, count in enumerate([3, 3, 3, 3, 12, 3, 3]):
        publish(place, run_id(night), night_rows(night, count, ONE), **settings(ONE))
    merged = compact(place, target_rows=12, grace_seconds=0.0).merged
    assert [(one["first_run"], one["last_run"], one["rows"]) for one in merged] == [
        (run_id(0), run_id(1), 6), (run_id(2), run_id(3), 6), (run_id(5), run_id(6), 6)
    ]  # fmt: skip
    assert compact(place, target_rows=12).merged == []
    assert [record["rows"] for record in records.stored(place)] == [6, 6, 12, 6]


def test_runs_of_another_captioner_are_not_merged(out: str) -> None:
    """Captions are found by the captioner that the record names."""
    for night, captioner in enumerate(["a", "a", "b", "b"]):
        publish(out, run_id(night), night_rows(night, 2, ONE), **settings(ONE) | {"captioner_id": captioner})
    merged = compact(out).merged
    assert [(one["first_run"], one["last_run"]) for one in merged] == [
        (run_id(0), run_id(1)), (run_id(2), run_id(3))
    ]  # fmt: skip


def nights(out: str, count: int = 6) -> dict[str, Any]:
    for night in range(count):
        publish(out, run_id(night), night_rows(night, 3, ONE), **settings(ONE))
        publish(out, run_id(night, 1), night_rows(night, 3, TWO), **settings(TWO))
    return answers(out)


def test_older_release_reads_each_row_once_when_the_old_records_are_gone(out: str) -> None:
    """It sees a merged record as the one of a run: its files are in the folder of its own id, its counts are sums."""
    before = nights(out)
    compact(out, grace_seconds=0.0)
    rows = []
    for record in records.stored(out):
        folder = products.final_folder("verdicts", record["run_id"])
        assert all(file["path"].startswith(f"{folder}/part-") for file in record["files"])
        assert record["counts"]["status"] == {"failed": 6, "scored": 12} and record["rows"] == 18
        assert sum(record["distributions"]["prob_fake"]) == 12 and record["seconds"] == 60.0
        assert record["captioner_id"] == CAPTIONER and record["settings"] == settings(record["detector_id"])["settings"]
        for file in record["files"]:
            rows += [
                row for batch in parquet.read(f"{out}/{file['path']}", schema.VERDICTS) for row in batch.to_pylist()
            ]
    assert sorted(map(repr, rows)) == sorted(map(repr, before["all"]))


# Interruptions.


class Killed(BaseException):
    """Ends a compaction as a kill would: nothing is tidied up."""


def kill_after(calls: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the process die before its n-th change of the store; the returned function says how many there were."""
    done = 0

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            if "/locks/" not in str(arguments) and (change is not remove or "/run_id=" in arguments[0]):
                if done == calls:
                    raise Killed
                done += 1
            return change(*arguments)

        return call

    remove = removal.remove
    patch.setattr(removal, "remove", watched(remove))
    for name in ("create", "upload_file", "remove_file"):
        patch.setattr(writing, name, watched(getattr(writing, name)))
    return lambda: done


def test_kill_before_any_change_of_the_store_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, kills = 0, 0
    for night in range(3):
        publish(str(tmp_path / "nights"), run_id(night), night_rows(night, 3, ONE), **settings(ONE))
    before_all = answers(str(tmp_path / "nights"))
    while True:
        out = str(tmp_path / f"{steps}")
        shutil.copytree(tmp_path / "nights", out)
        before = before_all
        with monkeypatch.context() as patch:
            kill_after(steps, patch)
            try:
                compact(out, grace_seconds=0.0)
                break
            except Killed:
                kills += 1
        assert answers(out) == before
        if steps % 2:
            publish(out, run_id(9), night_rows(9, 3, ONE), **settings(ONE))  # a night comes first
            publication.remove_orphans(out, records.stored(out), ())
            before = answers(out)
        compact(out, grace_seconds=0.0)
        assert answers(out) == before
        stored = records.stored(out)
        named = {file["path"] for record in stored for file in record["files"]}
        assert {name for name in files_below(out) if name.endswith(".parquet")} == named and len(stored) <= 2
        steps += 1
    assert kills == steps == 2 + 2 * 3  # a file, a record, and three records and folders to remove


def test_lock_lost_before_the_record_leaves_all_as_it_was(place: str) -> None:
    nights(place, 3)
    before = files_below(place)
    (merge, _) = compaction.merges(records.stored(place), products.VERDICTS)

    def check() -> None:
        raise LockedError("lost")

    with pytest.raises(LockedError):
        compaction.merge_runs(place, merge, check)
    assert files_below(place) == before


def orphans_of_an_older_listing(out: str, stored: list[dict[str, Any]]) -> list[str]:
    """What a new holder of the lock removes that listed the records before the last one was created."""
    return publication.remove_orphans(Uri(out), stored, ())


def lose_at(moment: str, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the lock be lost at a moment of `merge_runs`; the returned function is its `check`."""
    create, read, asked = writing.create, reading.read_bytes, [0]

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: str, *rest: Any) -> Any:
            result = function(uri, *rest)
            if asked == [1]:
                asked[0] += 1
                raise lock.LockLost
            return result

        return call

    def check() -> None:
        asked[0] += 1
        if asked == [2] and moment == "check":
            raise LockedError("lost")

    if moment == "create":
        patch.setattr(writing, "create", interrupted(create))
    if moment == "read":
        patch.setattr(reading, "read_bytes", interrupted(read))
    return check


@pytest.mark.parametrize("moment", ["create", "read", "check"])
def test_record_that_came_after_the_lock_was_lost_is_removed(
    moment: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next holder may have listed the records before, and may still remove the files as orphans."""
    before, files, stored = nights(out, 3), files_below(out), records.stored(out)
    (merge, _) = compaction.merges(stored, products.VERDICTS)
    with monkeypatch.context() as patch, pytest.raises((LockedError, lock.LockLost)):
        compaction.merge_runs(Uri(out), merge, lose_at(moment, patch))
    assert files_below(out) == files and orphans_of_an_older_listing(out, stored) == []
    assert answers(out) == before


def test_record_that_came_after_the_lock_was_lost_stays_if_old_records_were_removed(out: str) -> None:
    before = nights(out, 3)
    (merge, _) = compaction.merges(records.stored(out), products.VERDICTS)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:  # the next holder listed the new record
            assert retirement.retire(Uri(out), records.stored(out), 0.0, lambda: None) == (3, 3)
            raise LockedError("lost")

    with pytest.raises(LockedError):
        compaction.merge_runs(Uri(out), merge, check)
    assert answers(out) == before


@pytest.mark.parametrize("holder", ["compaction", "run"])
def test_next_holder_removes_a_merged_record_without_files(holder: str, place: str) -> None:
    """As a kill leaves it, right after a record that came after the lock was lost."""
    before, stored = nights(place, 3), records.stored(place)
    (merge, _) = compaction.merges(stored, products.VERDICTS)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:
            assert orphans_of_an_older_listing(place, stored)
            raise Killed

    with pytest.raises(Killed):
        compaction.merge_runs(Uri(place), merge, check)
    with pytest.raises(StorageError, match="is missing, but its record"):
        list(catalog.published(place, schema.DONE))
    if holder == "compaction":
        compact(Uri(place))
    else:
        execution._unfinished([a_request(place)])
    assert answers(place) == before


@pytest.mark.parametrize("elsewhere", ["in no record", "in a record without files", "in another merged record"])
def test_merged_record_without_files_stays_if_its_runs_are_not_elsewhere(elsewhere: str, out: str) -> None:
    nights(out, 3)
    compact(Uri(out), grace_seconds=0.0 if elsewhere == "in no record" else compaction.GRACE_SECONDS)
    if elsewhere == "in another merged record":
        publish(out, run_id(3), night_rows(3, 3, ONE), **settings(ONE))
        compact(Uri(out))
        compact(Uri(out), grace_seconds=0.0, products=[products.FACTS])
        publish(out, run_id(4), night_rows(4, 3, ONE), **settings(ONE))
        compact(Uri(out))
    stored = records.stored(out)
    *_, broken = [record for record in stored if records.is_merged(record) and record["detector_id"] == ONE]
    writing.remove_file(f"{out}/{broken['files'][0]['path']}")
    if elsewhere == "in a record without files":
        writing.remove_file(f"{out}/{stored[0]['files'][0]['path']}")
    left = retirement.remove_broken(Uri(out), records.stored(out), lambda: None)
    is_removed = elsewhere == "in another merged record"
    assert (broken in left) != is_removed and listing.exists(f"{out}/runs/{broken['run_id']}.json") != is_removed


def test_record_that_the_store_created_though_it_says_no_is_kept(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first try was lost, and the second one met a conflict (409)."""
    before, create = nights(place, 3), writing.create

    def conflicting(uri: str, data: bytes) -> bool:
        assert create(uri, data)
        return "/locks/" in uri

    with monkeypatch.context() as patch:
        patch.setattr(writing, "create", conflicting)
        assert len(compact(Uri(place)).merged) == 2
    assert answers(place) == before and len(records.effective(records.stored(place))) == 2


def test_two_processes_that_merge_the_same_runs_leave_one_record(place: str) -> None:
    before = nights(place, 3)
    (merge, _) = compaction.merges(records.stored(place), products.VERDICTS)
    compaction.merge_runs(place, merge)
    files = files_below(place)
    with pytest.raises(VerificationError, match="was published already, by another process"):
        compaction.merge_runs(place, merge)
    assert files_below(place) == files and answers(place) == before


def test_overlapping_merges_show_each_run_once(out: str) -> None:
    """As two processes may leave them, of which one had lost the lock."""
    before = nights(out, 4)
    stored = records.stored(out)
    for last in (2, 3):
        some = [record for record in stored if record["run_id"] <= run_id(last)]
        (merge, _) = compaction.merges(some, products.VERDICTS)
        compaction.merge_runs(out, merge)
        assert answers(out) == before
    compact(out, grace_seconds=0.0)
    assert answers(out) == before and len(records.stored(out)) == 2


def test_rows_that_read_back_differ_change_nothing(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nights(out, 3)
    before = files_below(out)
    monkeypatch.setattr(compaction.publication, "write_parts", cut_parts(publication.write_parts))
    with pytest.raises(VerificationError, match="does not hold the rows"):
        compact(out)
    assert files_below(out) == before


def cut_parts(write: Callable[..., Any]) -> Callable[..., Any]:
    def cut(batches: Any, *rest: Any) -> Any:
        return write((batch.slice(1) for batch in batches), *rest)

    return cut


@pytest.mark.parametrize("damage", ["missing", "cut", "of the same size"])
def test_old_files_stay_if_the_merged_file_is_not_as_its_record_says(damage: str, out: str) -> None:
    nights(out, 3)
    compact(out)
    merged = [record for record in records.stored(out) if records.is_merged(record)]
    for record in merged:
        uri = f"{out}/{record['files'][0]['path']}"
        data = reading.read_bytes(uri)
        if damage == "missing":
            writing.remove_file(uri)
        else:
            writing.write_bytes(uri, data[:-10] if damage == "cut" else data[:1000] + b"?" + data[1001:])
    assert retirement.retire(Uri(out), records.stored(out), 0.0, lambda: None) == (0, 0)
    assert len(records.stored(out)) == 6 + 2


def test_grace_is_kept(place: str) -> None:
    nights(place, 3)
    assert compact(place).waiting_records == 6
    assert compact(place, grace_seconds=3600.0).removed_records == 0
    assert compact(place, grace_seconds=0.0).removed_records == 6


def age(out: str, seconds: float) -> None:
    """Let all records of an output on a disk be older by so much."""
    for entry in listing.list_files(f"{out}/runs"):
        os.utime(entry.uri, (entry.modified_at.timestamp() - seconds,) * 2)


@pytest.mark.parametrize(("every", "waiting", "copies"), [(7, 7 + 1, 2), (1, 2 + 2, 3)], ids=["weekly", "daily"])
def test_schedule_keeps_few_generations(every: int, waiting: int, copies: int, tmp_path: Path) -> None:
    """The newest merged record is always new: what counts is how long any has held the runs of an old one."""
    out, most = str(tmp_path), []
    for night in range(30):
        publish(out, run_id(night), night_rows(night, 3, ONE), **settings(ONE))
        if night % every == every - 1:
            most.append(compact(Uri(out)).waiting_records)
            in_files = sum(file["rows"] for record in records.stored(out) for file in record["files"])
            assert in_files <= copies * 3 * (night + 1)
        age(out, 24 * 3600 - 3)  # a schedule is not exact
    assert max(most) == waiting
    assert sum(len(batch) for batch in catalog.published(out, schema.DONE)) == 90 and len(catalog.runs(out)) == 30
    named = {file["path"] for record in records.stored(out) for file in record["files"]}
    assert {name for name in files_below(out) if name.endswith(".parquet")} == named


def test_lock_is_checked_between_the_check_of_the_files_and_the_removal(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights(out, 2)
    compact(Uri(out))
    steps: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(retirement.rows, "difference", noting("compare", retirement.rows.difference))
    monkeypatch.setattr(removal, "remove", noting("remove", removal.remove))
    retirement.retire(Uri(out), records.stored(out), 0.0, lambda: steps.append("lock"))
    one_by_one = ["compare", "lock", "remove"] * 2 + ["lock", "remove"] * 2
    assert steps == one_by_one


def test_nothing_is_removed_if_its_merged_record_vanished_meanwhile(out: str) -> None:
    """A process that had lost the lock removes the record that it has just created."""
    before, late = nights(out, 2), []
    compact(Uri(out))

    def check() -> None:
        for record in records.stored(out):
            if records.is_merged(record):
                writing.remove_file(f"{out}/runs/{record['run_id']}.json")
                late.append(record)

    assert retirement.retire(Uri(out), records.stored(out), 0.0, check) == (0, 0) and len(late) == 2
    assert answers(out) == before


def test_nights_without_images_between_large_ones_become_one_record(out: str) -> None:
    for night in range(10):
        publish(out, run_id(night), night_rows(night, 0 if night % 2 else 12, ONE), **settings(ONE))
    before = answers(out)
    (merged,) = compact(Uri(out), target_rows=12, grace_seconds=0.0).merged
    assert (merged["runs"], merged["rows"], merged["files_after"]) == (5, 0, 0)
    assert len(records.stored(out)) == 5 + 1 and answers(out) == before
    for night in (10, 11):
        publish(out, run_id(night), night_rows(night, 0 if night % 2 else 12, ONE), **settings(ONE))
    before = answers(out)
    compact(Uri(out), target_rows=12, grace_seconds=0.0)
    assert len(records.stored(out)) == 6 + 1 and answers(out) == before


def test_compaction_and_a_run_exclude_each_other(out: str) -> None:
    nights(out, 2)
    with lock.hold(out), pytest.raises(LockedError):
        compact(out)


# Readers meanwhile.


def test_reader_sees_every_row_once_while_nights_are_published_and_merged(place: str) -> None:
    """One reads over and over; another began before the first compaction and reads on after old files are gone."""
    nights(place, 4)
    slow = catalog.published(place, schema.DONE, detector_id=ONE)
    rows_of_slow = len(next(slow))
    held = catalog.verdicts(place)
    rows_held = held.count_rows()
    problems: list[str] = []
    rounds, stop = [0], threading.Event()

    def read() -> None:
        last = 0
        while not stop.is_set():
            try:
                found = [row["image_id"] for batch in catalog.published(place, schema.DONE, detector_id=ONE)
                         for row in batch.to_pylist()]  # fmt: skip
                newest = sum(len(batch) for batch in catalog.newest(place, schema.DONE, detector_id=ONE))
            except Exception as error:
                problems.append(repr(error))
                return
            if len(found) != len(set(found)) or len(found) < last or newest < last:
                problems.append(f"{len(found)} rows, {len(set(found))} images, {last} before")
            last = len(found)
            rounds[0] += 1

    def wait_for_readers() -> None:
        """Until each reader that may have listed the records before now has ended."""
        begun = rounds[0]
        while rounds[0] < begun + 2 and thread.is_alive():
            time.sleep(0.01)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        compact(place)
        wait_for_readers()
        assert rows_of_slow + sum(len(batch) for batch in slow) == 12 and held.count_rows() == rows_held == 24
        removed = 0
        for night in range(4, 9):
            removed += compact(place, products=[products.FACTS], grace_seconds=0.0).removed_records
            publish(place, run_id(night), night_rows(night, 3, ONE), **settings(ONE))
            compact(place)
            wait_for_readers()
    finally:
        stop.set()
        thread.join()
    assert problems == [] and removed == 8 + 2 * 4
    assert sum(len(batch) for batch in catalog.published(place, schema.DONE, detector_id=ONE)) == 3 * 9


def test_reader_that_took_longer_than_the_grace_is_told(out: str) -> None:
    for night in range(40):  # more than are read ahead
        publish(out, run_id(night), night_rows(night, 1, ONE), **settings(ONE))
    slow = catalog.published(out, schema.DONE)
    next(slow)
    compact(out, grace_seconds=0.0)
    with pytest.raises(
        StorageError, match="removed while they were read: start the command again. `nsnet compact` removes"
    ):
        list(slow)


def test_record_that_is_removed_between_listing_and_reading_is_looked_for_again(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = nights(place, 3)
    listed = listing.versions_below
    calls = 0

    def late(uri: str) -> dict[str, str]:
        nonlocal calls
        calls += 1
        names = listed(uri)
        if calls == 1:
            with monkeypatch.context() as patch:
                patch.setattr(listing, "versions_below", listed)
                compact(place, grace_seconds=0.0)
            records._last_read.clear()
        return names

    monkeypatch.setattr(listing, "versions_below", late)
    assert len(catalog.records(place)) == len(before["records"]) and calls == 2


def test_documented_query_reads_each_row_once_with_its_run(tmp_path: Path) -> None:
    """Beside the old records, and after they are gone; the folder of a merged file is not named after its runs."""
    out = str(tmp_path)
    before = nights(out, 4)
    text = (REPO_ROOT / "docs/reference/storage.md").read_text(encoding="utf-8")
    sql = text.split("```sql\n")[1].split("```")[0].replace("'verdicts/", f"'{out}/")
    for grace in (None, compaction.GRACE_SECONDS, 0.0):
        if grace is not None:
            compact(out, grace_seconds=grace)
        with duckdb.connect() as connection:
            connection.execute("set timezone = 'UTC'")
            statements = connection.extract_statements(sql)
            connection.execute(statements[0])
            found = connection.sql(statements[1].query).select("image_id", "detector_id", "run_id").fetchall()
        assert sorted(found) == sorted((row["image_id"], row["detector_id"], row["run_id"]) for row in before["newest"])


# What is refused.


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": "x"},
        {"runs": ["x"]},
        {"common": None},
        {"runs": [{"run_id": "x", "rows": 6}]},
        {"runs": [{"run_id": run_id(0), "rows": 3}, {"run_id": run_id(0), "rows": 3}]},
        {"runs": [{"run_id": run_id(0), "rows": 7}]},
        {"runs": [{"run_id": run_id(0), "rows": -1}, {"run_id": run_id(1), "rows": 7}]},
        {"runs": [{"run_id": run_id(0), "rows": 6, "files": []}]},
        {"runs": [{"run_id": run_id(0), "rows": 6, "counts": []}]},
        {"runs": []},
        {"common": {"files": []}},
        {"runs": [{"run_id": run_id(0), "rows": True}]},
    ],
)  # fmt: skip
def test_merged_record_that_this_program_cannot_have_written_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path)
    nights(out, 2)
    compact(out)
    (uri, record), _ = [(f"{out}/runs/{one['run_id']}.json", one) for one in records.stored(out) if "runs" in one]
    writing.write_json(uri, {**record, **changes})
    with pytest.raises(StorageError, match="is damaged") as caught:
        catalog.records(out)
    assert uri in str(caught.value)


@pytest.mark.parametrize("changes", [{"size_bytes": None}, {"sha256": None}, {"sha256": "x"}, {"size_bytes": "1"}])
def test_merged_record_without_size_or_hash_of_a_file_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path)
    nights(out, 2)
    compact(Uri(out))
    record = next(one for one in records.stored(out) if records.is_merged(one))
    (file,) = record["files"]
    changed = {key: value for key, value in {**file, **changes}.items() if value is not None}
    writing.write_json(f"{out}/runs/{record['run_id']}.json", {**record, "files": [changed]})
    with pytest.raises(StorageError, match="is damaged .it does not say the size or the SHA-256 of verdicts/"):
        catalog.records(out)


def rewrite(out: str, number: int, change: Callable[[Any], Any], *, with_record: bool) -> str:
    """Change the rows of a stored record's file, and what the record says about its bytes; returns the file's URI."""
    record = records.stored(out)[number]
    (file,) = record["files"]
    uri = f"{out}/{file['path']}"
    (batch,) = parquet.read(uri, schema.VERDICTS)
    changed = change(batch)
    parquet.write([changed], changed.schema, uri)
    if with_record:
        data = reading.read_bytes(uri)
        said = {**file, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        writing.write_json(f"{out}/runs/{record['run_id']}.json", {**record, "files": [said]})
    return uri


@pytest.mark.parametrize(
    ("with_record", "reason"), [(False, "it has .* bytes, and"), (True, "it has 2 rows, and 3 in its record")]
)
def test_part_that_is_not_as_its_record_says_is_not_merged(with_record: bool, reason: str, out: str) -> None:
    nights(out, 3)
    uri = rewrite(out, 0, lambda batch: batch.slice(1), with_record=with_record)
    files = files_below(out)
    with pytest.raises(StorageError, match=f"is damaged .{reason}") as caught:
        compact(Uri(out))
    assert uri in str(caught.value) and files_below(out) == files


def test_part_with_other_bytes_of_the_same_size_is_not_merged(out: str) -> None:
    nights(out, 3)
    uri = f"{out}/{records.stored(out)[0]['files'][0]['path']}"
    data = reading.read_bytes(uri)
    writing.write_bytes(uri, data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    with pytest.raises(StorageError, match="is damaged .its SHA-256 is not that in its record"):
        compact(Uri(out))


@pytest.mark.parametrize("other", [run_id(7), None])
def test_rows_of_another_run_are_not_merged(other: str | None, out: str) -> None:
    """Their number is right, so only their own run_id tells."""
    nights(out, 3)
    of_another = pa.array([run_id(0)] * 2 + [other])

    def change(batch: Any) -> Any:
        return batch.set_column(batch.schema.get_field_index("run_id"), "run_id", of_another)

    rewrite(out, 0, change, with_record=True)
    files = files_below(out)
    with pytest.raises(StorageError, match=f"the files of the run {run_id(0)} in .* hold rows of another run"):
        compact(Uri(out))
    assert records.stored(out) and [name for name in files_below(out) if name.startswith("runs/")] == files[:6]


@pytest.mark.parametrize("reason", ["is nested deeper than", "is larger than"])
def test_merged_record_that_readers_would_refuse_is_not_created(
    reason: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: Any = 1
    for _ in range(30 if reason == "is nested deeper than" else 0):
        deep = [deep]
    for night in range(3):
        publish(out, run_id(night), night_rows(night, 3, ONE), **settings(ONE), deep=[deep, night])
    files = files_below(out)
    if reason == "is larger than":
        largest = max(len(reading.read_bytes(f"{out}/{name}")) for name in files if name.startswith("runs/"))
        monkeypatch.setattr(reading, "MAX_JSON_BYTES", largest)
    with pytest.raises(VerificationError, match=f"readers would refuse the merged record: .*{reason}"):
        compact(Uri(out))
    assert files_below(out) == files


def test_runs_whose_record_would_be_too_large_become_several(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = nights(out, 6)
    of_a_run = len(json.dumps(records.stored(out)[0]))
    monkeypatch.setattr(compaction, "MAX_RECORD_BYTES", 3 * of_a_run + 100)
    assert [one["runs"] for one in compact(Uri(out)).merged] == [3, 3, 3, 3]
    assert compact(Uri(out)).merged == [] and answers(out) == before


def test_files_of_a_newer_release_are_left_to_it(out: str) -> None:
    nights(out, 2)
    rewrite(out, 0, lambda batch: batch.append_column("later", batch.column("uri")), with_record=True)
    with pytest.raises(StorageError, match="has columns that this release does not know \\(later\\)"):
        compact(Uri(out))


@pytest.mark.parametrize("options", [{"target_rows": 1}, {"grace_seconds": -1.0}])
def test_settings_out_of_range_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        compact(str(tmp_path), **options)


def test_output_without_runs_is_left_alone(out: str) -> None:
    with pytest.raises(SourceError, match="holds no published runs"):
        compact(out)
    assert not listing.exists(uris.join(out, "locks"))


# The command.


def test_command_says_what_it_would_do_and_did(tmp_path: Path) -> None:
    out = str(tmp_path)
    nights(out, 4)
    before = files_below(out)
    code, text, _ = run_command("compact", out, "--dry-run")
    assert code == 0 and files_below(out) == before
    assert [line.split()[:4] for line in text.splitlines()] == [["would", "merge", "4", "runs"]] * 2
    code, text, _ = run_command("compact", out, "--before", "2026-01-03", "--product", "verdicts")
    assert (
        code == 0 and text.count("merged 2 runs of verdicts") == 2 and "4 merged records and their files stay" in text
    )
    code, text, _ = run_command("compact", out, "--older-than", "1d", "--grace", "0", "--json")
    result = json.loads(text)
    assert [one["records"] for one in result["merged"]] == [3, 3] and result["removed_records"] == 4 + 2 + 4
    assert run_command("compact", out)[1] == "nothing to merge\n"
    for wrong in (["--grace", "soon"], ["--before", "2026-01-03", "--older-than", "1d"], ["--target-rows", "1"]):
        code, text, err = run_command("compact", out, *wrong)
        assert code == 2 and text == "" and "rror" in err
