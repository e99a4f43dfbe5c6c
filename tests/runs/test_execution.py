"""Which run a night continues, gives up or plans, without Ray: no image is ever published twice by a detector."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from jobs.cluster import resources
from jobs.dataset import schema
from jobs.dataset.plan import Plan, Selection, write_manifests
from jobs.runs import attempts, catalog, execution, lock, products, publication
from jobs.runs.execution import Planned, Request, Work
from jobs.runs.publication import Run
from jobs.storage import listing, parquet, reading, writing
from nsnet.config import to_dict
from nsnet.errors import LockedError, StorageError
from nsnet.images import DecodeLimits
from tests.support.tables import WRITE, batches, put, read_rows, rows_file, verdict_row

NAMES = [f"{i}.jpg" for i in range(5)]


def write_rows(attempt: attempts.Attempt, run_id: str, most: int | None = None) -> None:
    """Finish what is left for an attempt, or so many images of it."""
    todo = [row for entry in listing.list_files(attempt.todo) for row in read_rows(entry.uri)] if attempt.count else []
    rows = [verdict_row(row["uri"], 0.5, image_id=row["image_id"], run_id=run_id) for row in todo[:most]]
    parquet.write(batches(rows, schema.VERDICTS), schema.VERDICTS, rows_file(attempt.folder))
    writing.write_bytes(f"{attempt.checkpoint}/{WRITE}_000000.parquet", b"ids")


ARITHMETIC = {"device": "cpu", "precision": "fp32", "batch_size": 32}


@dataclass(frozen=True)
class Verdicts:
    """Stands for the pipeline: verdicts out of thin air."""

    attempt: attempts.Attempt
    run_id: str

    def write(self, *_: Any) -> None:
        write_rows(self.attempt, self.run_id)

    def arithmetic(self) -> dict[str, Any]:
        return ARITHMETIC


def work_of(run: Run) -> Work:
    """How images become rows here."""
    return Work(title="score", stages=("scored",), stream=lambda attempt: cast(Any, Verdicts(attempt, run.run_id)))


def killed_at_work(run: Run) -> Work:
    """The process dies once its run is planned."""
    raise Killed(run)


class Killed(Exception):
    """With the run that was planned."""


class Nights:
    """Starts of `nsnet score` one after another, over one source and output, with verdicts out of thin air."""

    def __init__(self, folder: str) -> None:
        self.source, self.out = put(f"{folder}/pictures", dict.fromkeys(NAMES, b"x")), f"{folder}/out"

    def request(self, changes: dict[str, Any] | None = None, **selection: Any) -> Request:
        """What a run is asked to do, as `score` puts it together."""
        settings = {"limits": to_dict(DecodeLimits()), "clip_weights": None, "captioner": None, **(changes or {})}
        return Request(
            source=settings.pop("source", self.source),
            out=self.out,
            product=products.VERDICTS,
            maker=settings.pop("detector_id", "one"),
            settings=settings,
            selection=Selection(**selection),
        )

    def killed(self, changes: dict[str, Any] | None = None, **selection: Any) -> Run:
        """A night that is killed once it was planned."""
        with pytest.raises(Killed) as caught:
            execution.carry_out(self.request(changes, **selection), killed_at_work)
        run: Run = caught.value.args[0]
        return run

    def whole(self, changes: dict[str, Any] | None = None, **selection: Any) -> dict[str, Any] | None:
        """A night that publishes -> its record; None: it found nothing to do."""
        record = execution.carry_out(self.request(changes, **selection), work_of)
        return record if record["files"] else None

    def work(self, run: Run, lock_number: int, most: int | None = None) -> attempts.Attempt:
        """An attempt that does what is left, or so many images of it."""
        attempt = attempts.begin([run.staging], lock_number)
        write_rows(attempt, run.run_id, most)
        return attempt

    def staged(self) -> list[str]:
        """Ids of the runs that have a staging folder."""
        return listing.subfolders(f"{self.out}/staging")

    def published(self) -> Counter[str]:
        """How often each image of the source was published, by its name."""
        uris = catalog.verdicts(self.out).to_table(columns=["uri"]).column("uri").to_pylist()
        return Counter(uri.removeprefix(f"{self.source}/") for uri in uris)


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.setattr(resources, "connect", lambda address: None)
    numbers = count()
    monkeypatch.setattr(
        publication, "new_run_id", lambda: f"20260102T{next(numbers):06d}Z-000000"
    )  # in order within a second
    return Nights(str(tmp_path))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines for the person who runs the command."""
    lines: list[str] = []
    monkeypatch.setattr(execution, "say", lines.append)
    return lines


# What is continued.


def test_run_with_equal_settings_is_continued(nights: Nights, said: list[str]) -> None:
    selection: dict[str, Any] = {
        "limit": 3,
        "include": ("*.jpg", "*.png"),
        "shuffle_seed": 1,
    }  # tuples are lists in JSON
    first = nights.killed(**selection)
    manifest = reading.read_bytes(f"{first.staging}/{attempts.MANIFEST_FILE}")
    said.clear()
    assert nights.killed(**selection) == first
    assert reading.read_bytes(f"{first.staging}/{attempts.MANIFEST_FILE}") == manifest
    assert nights.staged() == [first.run_id] and said == []
    record = nights.whole(**selection)
    assert record is not None and record["run_id"] == first.run_id and record["rows"] == 3
    assert nights.staged() == []


def test_run_that_is_continued_keeps_what_was_finished(nights: Nights) -> None:
    run = nights.killed()
    with lock.hold(nights.out) as held:
        first = nights.work(run, held.number, most=2)
    record = nights.whole()
    assert (first.count, record and record["attempts"]) == (5, 2)
    assert nights.published() == Counter(NAMES)


def test_continued_run_does_not_see_images_that_came_since(nights: Nights) -> None:
    nights.killed()
    put(nights.source, {"new.jpg": b"x"})
    nights.whole()
    assert nights.published() == Counter(NAMES)
    nights.whole()
    assert nights.published() == Counter([*NAMES, "new.jpg"])


def test_run_of_another_detector_that_was_published_since_changes_nothing(nights: Nights) -> None:
    run = nights.killed()
    nights.whole({"detector_id": "two"})
    assert nights.killed() == run


def test_runs_that_were_published_before_change_nothing(nights: Nights) -> None:
    nights.whole(limit=2)
    run = nights.killed()
    assert nights.killed() == run
    nights.whole()
    assert nights.published() == Counter(NAMES)


def test_of_two_unfinished_runs_the_newer_is_continued_and_the_other_given_up(nights: Nights, said: list[str]) -> None:
    with lock.hold(nights.out) as held:  # as of two processes of which one lost the lock too late
        first, second = (execution._plan([nights.request()], held)["one"].run for _ in range(2))
    record = nights.whole()
    assert record is not None and record["run_id"] == second.run_id
    assert nights.staged() == [first.run_id]
    said.clear()
    assert nights.whole() is None
    assert nights.staged() == [] and nights.published() == Counter(NAMES)
    assert (
        said[0] == f"given up: the unfinished run {first.run_id}, since other runs were published after it was planned"
    )


# What is given up.


def test_run_that_was_overtaken_is_planned_anew(nights: Nights, said: list[str]) -> None:
    first = nights.killed(limit=3)
    nights.whole()
    assert nights.staged() == [first.run_id]  # it has other settings, and its turn may come
    assert nights.whole(limit=3) is None  # and finds nothing to do
    assert nights.staged() == [] and nights.published() == Counter(NAMES)
    assert f"given up: the unfinished run {first.run_id}, since other runs were published after it was planned" in said


def test_run_that_was_overtaken_in_part_is_planned_anew(nights: Nights) -> None:
    first = nights.killed()
    nights.whole(limit=3)
    record = nights.whole()
    assert record is not None and record["run_id"] != first.run_id and record["rows"] == 2
    assert nights.staged() == [] and nights.published() == Counter(NAMES)


def test_finished_rows_of_a_run_that_was_overtaken_are_given_up(nights: Nights) -> None:
    run = nights.killed(limit=3)
    with lock.hold(nights.out) as held:
        nights.work(run, held.number, most=2)
    nights.whole()
    assert nights.whole(limit=3) is None
    assert nights.published() == Counter(NAMES)


def test_run_goes_on_although_the_record_of_an_older_one_was_removed(nights: Nights) -> None:
    """Retention removes old runs whenever it comes to it."""
    old = nights.whole(limit=2)
    run = nights.killed()
    assert old is not None
    writing.remove_file(f"{nights.out}/runs/{old['run_id']}.json")
    record = nights.whole()
    assert record is not None and (record["run_id"], record["rows"]) == (run.run_id, 3)


def test_parts_of_a_publication_that_was_cut_and_overtaken_are_removed(nights: Nights) -> None:
    run = nights.killed()
    writing.write_bytes(f"{run.final}/part-00000-0a1b2c3d.parquet", b"of a publication that was cut")
    nights.whole(limit=3)
    nights.whole()
    assert not listing.exists(run.final) and nights.published() == Counter(NAMES)


def test_run_that_was_overtaken_by_one_over_another_source_is_planned_anew(nights: Nights, tmp_path: Path) -> None:
    first = nights.killed()
    other = put(f"{tmp_path}/other", {"0.jpg": b"x"})  # it may hold the same images: nobody looks
    nights.whole({"source": other})
    record = nights.whole()
    assert record is not None and record["run_id"] != first.run_id and record["rows"] == 5


def test_run_that_rescores_is_planned_anew_as_well(nights: Nights) -> None:
    first = nights.killed(rescore=True)
    nights.whole()
    record = nights.whole(rescore=True)
    assert record is not None and record["run_id"] != first.run_id
    assert nights.published() == Counter(NAMES * 2)


# What is left alone.


@pytest.mark.parametrize(
    ("changes", "selection", "named"),
    [
        ({}, {"limit": 4}, "selection"),
        ({"source": "s3://bucket/elsewhere"}, {"limit": 3}, "source"),
        ({"detector_id": "two"}, {"limit": 3}, "detector_id"),
        ({"limits": {"max_pixels": 7}, "captioner": "/tiny"}, {"limit": 3}, "captioner, limits"),
        ({"clip_weights": "/clip"}, {"limit": 3, "rescore": True}, "clip_weights, selection"),
    ],
)
def test_run_with_other_settings_is_left_alone_and_they_are_named(
    changes: dict[str, Any], selection: dict[str, Any], named: str, nights: Nights, said: list[str]
) -> None:
    run = nights.killed(limit=3)
    before = [(entry.uri, reading.read_bytes(entry.uri)) for entry in listing.list_files(run.staging)]
    said.clear()
    assert execution._unfinished([nights.request(changes, **selection)]) == []
    assert said == [f"left alone: the unfinished run {run.run_id} has other settings ({named}): {run.staging}"]
    assert [(entry.uri, reading.read_bytes(entry.uri)) for entry in listing.list_files(run.staging)] == before


def test_run_is_continued_beside_one_with_other_settings(nights: Nights, said: list[str]) -> None:
    first, second = nights.killed(limit=3), nights.killed()
    said.clear()
    assert nights.killed() == second and nights.killed(limit=3) == first
    assert [line.partition(" has ")[0] for line in said] == [
        f"left alone: the unfinished run {run.run_id}" for run in (first, second)
    ]


# What was published already.


def killed_after_its_record(nights: Nights, monkeypatch: pytest.MonkeyPatch, **selection: Any) -> dict[str, Any]:
    """A night that is killed between its record and tidying up, over a publication that was cut; its record."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "tidy", lambda run, record: None)
        record = nights.whole(**selection)
    assert record is not None and nights.staged() == [record["run_id"]]
    run = Run(out=nights.out, run_id=record["run_id"])
    writing.write_bytes(f"{run.final}/part-00000-0a1b2c3d.parquet", b"of a publication that was cut")
    return record


@pytest.mark.parametrize("selection", [{}, {"limit": 3}], ids=["equal settings", "other settings"])
def test_remains_of_a_run_that_was_published_are_removed(
    selection: dict[str, Any], nights: Nights, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = killed_after_its_record(nights, monkeypatch)
    run = Run(out=nights.out, run_id=record["run_id"])
    said.clear()
    assert execution._unfinished([nights.request(**selection)]) == []
    assert nights.staged() == [] and said == []
    assert [entry.uri for entry in listing.list_files(run.final)] == [f"{nights.out}/{record['files'][0]['path']}"]
    assert catalog.runs(nights.out) == [record] and nights.published() == Counter(NAMES)


def test_run_that_was_published_is_not_done_again(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_after_its_record(nights, monkeypatch)
    assert nights.whole() is None
    assert nights.published() == Counter(NAMES)


# What is planned.


def test_record_tells_the_arithmetic_of_its_rows(nights: Nights) -> None:
    first, second = (execution.carry_out(nights.request(), work_of) for _ in range(2))
    assert first["arithmetic"] == ARITHMETIC
    assert "arithmetic" not in second, "nothing was computed"


def test_plan_tells_its_settings_and_what_was_published(nights: Nights) -> None:
    published = [nights.whole(limit=1), nights.whole(limit=1), nights.whole({"detector_id": "two"}, limit=1)]
    run = nights.killed(retry_failed=True)
    settings = reading.read_json(f"{run.staging}/{attempts.RUN_FILE}")
    selection = json.loads(json.dumps(to_dict(Selection(retry_failed=True))))
    assert "columns" not in selection  # none are named, as in the settings of older runs
    assert (
        settings
        == {
            "product": "verdicts",
            "settings": {
                "source": nights.source,
                "detector_id": "one",
                "selection": selection,
                "limits": to_dict(DecodeLimits()),
                "clip_weights": None,
                "captioner": None,
            },  # fmt: skip
            "published": [record["run_id"] for record in published[:2] if record],
            "plan": {
                "count": 3,
                "left_out": {},
                "unread": [],
                "unread_count": 0,
                "states": {"new": 3, "scored before": 2},
            },
        }
    )


def test_nothing_to_do_leaves_a_record_and_nothing_else(nights: Nights) -> None:
    nights.whole()
    record = execution.carry_out(nights.request(), lambda run: pytest.fail("there was nothing to work on"))
    assert (record["rows"], record["files"], record["listing"]) == (0, [], {"scored before": 5})
    assert record["counts"] == dict.fromkeys(publication.COUNTED, {})
    assert nights.staged() == [] and catalog.runs(nights.out)[1:] == [record]
    assert nights.published() == Counter(NAMES)


def test_published_runs_are_reported_without_the_lock(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may begin meanwhile, and the loss of the lock means nothing any more."""
    reported: list[str] = []

    def report(out: str, _: Any, records: Sequence[dict[str, Any]], __: str | None) -> None:
        with lock.hold(out):
            reported.extend(record["run_id"] for record in records)

    monkeypatch.setattr(execution.reporting, "report", report)
    nights.whole()
    nights.whole()  # nothing to do
    assert reported == [record["run_id"] for record in catalog.runs(nights.out)]


def test_process_that_lost_the_lock_while_it_listed_plans_nothing(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_slowly(*arguments: Any) -> list[Plan]:
        writing.write_bytes(f"{nights.out}/locks/00000002.json", b'{"token": "of another"}')
        return write_manifests(*arguments)

    with monkeypatch.context() as patch, lock.hold(nights.out) as held:
        patch.setattr(execution, "write_manifests", write_slowly)
        with pytest.raises(LockedError, match="was lost"):
            execution._plan([nights.request()], held)
    assert [listing.exists(f"{nights.out}/staging/{run_id}/run.json") for run_id in nights.staged()] == [False]
    assert execution._unfinished([nights.request()]) == []  # and what it left goes
    assert nights.staged() == []


# What of the source could not be read.


def cut_tar(source: str, name: str = "cut.tar") -> str:
    """A container that ends too early; its URI."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 2000
            tar.addfile(member, io.BytesIO(bytes(2000)))
    put(source, {name: buffer.getvalue()[:4000]})
    return f"{source}/{name}"


def test_record_names_what_could_not_be_read_also_where_there_is_nothing_to_do(nights: Nights) -> None:
    uri = cut_tar(nights.source)
    for rows in (5, 0):
        record = execution.carry_out(nights.request(), work_of)
        assert (record["rows"], record["unread_count"], record["left_out"]) == (
            rows,
            1,
            {".tar that cannot be read": 1},
        )
        (named,) = record["unread"]
        assert named.startswith(f"{uri} ") and record in catalog.runs(nights.out)


def test_run_that_is_continued_names_what_its_plan_could_not_read(nights: Nights) -> None:
    uri = cut_tar(nights.source)
    run = nights.killed()
    writing.remove_file(uri)
    record = nights.whole()
    assert record is not None and (record["run_id"], record["unread_count"]) == (run.run_id, 1)


def test_run_that_an_older_version_planned_is_continued(nights: Nights) -> None:
    run = nights.killed()
    planned = reading.read_json(f"{run.staging}/run.json")
    for name in ("unread", "unread_count"):
        del planned["plan"][name]
    writing.write_json(f"{run.staging}/run.json", planned)
    record = nights.whole()
    assert record is not None and (record["run_id"], record["unread"], record["unread_count"]) == (run.run_id, [], 0)


def test_run_that_found_nothing_to_do_overtakes_nobody(nights: Nights) -> None:
    nights.whole()
    run = nights.killed(rescore=True)
    assert nights.whole() is None and len(catalog.runs(nights.out)) == 2
    assert nights.killed(rescore=True) == run


def test_record_that_cannot_be_written_leaves_nothing_to_continue(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next night would continue a run of nothing, and look at no new image."""
    nights.whole()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the store is away"):
        patch.setattr(writing, "create", lambda *_: (_ for _ in ()).throw(OSError("the store is away")))
        nights.whole()
    put(nights.source, {"new.jpg": b"x"})
    nights.whole()
    assert nights.published() == Counter([*NAMES, "new.jpg"]) and nights.staged() == []


# Who was overtaken.


def overtake(nights: Nights) -> None:
    """Another run takes the lock over, and does all that this one planned."""
    number = max(int(name[:8]) for name in listing.names_below(f"{nights.out}/locks").files) + 1
    writing.write_json(f"{nights.out}/locks/{number:08d}.json", {"released": True})
    assert nights.whole() is not None


FAILURES: dict[str, Callable[[str], Exception]] = {
    "rows that are gone": lambda place: FileNotFoundError(2, "No such file or directory", place),
    "a cluster that failed": lambda place: StorageError(f"the cluster failed: {place}"),
    "damaged Parquet": lambda place: pa.ArrowInvalid(f"{place}: Parquet magic bytes not found"),
    "a bug": lambda place: KeyError(place),
    "Ctrl-C": lambda place: cast(Exception, KeyboardInterrupt()),
}


@pytest.mark.parametrize("failure", [None, *FAILURES])
def test_run_that_was_overtaken_at_its_work_ends_as_locked_however_it_fails(
    failure: str | None, nights: Nights
) -> None:
    class Overtaken(Verdicts):
        def write(self, *_: Any) -> None:
            super().write()
            overtake(nights)
            if failure is not None:
                raise FAILURES[failure](self.attempt.rows)

    def work(run: Run) -> Work:
        return Work(title="score", stages=(), stream=lambda attempt: cast(Any, Overtaken(attempt, run.run_id)))

    with pytest.raises(LockedError, match=r"locks/00000001\.json was lost: .*; nothing was published") as caught:
        execution.carry_out(nights.request(), work)
    assert caught.value.exit_code == 4
    assert nights.published() == Counter(NAMES)


def test_part_of_a_run_that_was_overtaken_is_removed_by_the_next_one(
    nights: Nights, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped between its parts and its record, and killed later."""
    upload = writing.upload_file

    def stop(path: Path, uri: str) -> None:
        monkeypatch.setattr(writing, "upload_file", upload)
        overtake(nights)
        upload(path, uri)
        raise Killed

    monkeypatch.setattr(writing, "upload_file", stop)
    with pytest.raises((Killed, LockedError)):
        execution.carry_out(nights.request(), work_of)
    rows = [row for path in Path(nights.out, "verdicts").rglob("*.parquet") for row in read_rows(str(path))]
    assert len(rows) == 2 * len(NAMES)
    said.clear()
    assert nights.whole() is None  # there is nothing to do, and all the same
    rows = [row for path in Path(nights.out, "verdicts").rglob("*.parquet") for row in read_rows(str(path))]
    assert len(rows) == len(NAMES) and nights.published() == Counter(NAMES)
    assert any(line.startswith("removed: 1 files of interrupted or overtaken publications, such as") for line in said)


def test_part_of_a_run_that_was_never_recorded_is_removed_for_every_product(nights: Nights) -> None:
    nights.whole(limit=1)
    for product in products.PRODUCTS.values():
        run = Run(out=nights.out, run_id="20990101T000000Z-ffffff", product=product)
        put(run.final, {"part-00000-0a1b2c3d.parquet": b"x", "photo.jpg": b"x"})
    nights.whole()
    left = [path.name for path in Path(nights.out).rglob("*") if "ffffff" in str(path) and path.is_file()]
    assert left == ["photo.jpg"] * 3


def test_part_of_an_unfinished_run_with_other_settings_stays(nights: Nights) -> None:
    run = nights.killed(limit=3)
    put(run.final, {"part-00000-0a1b2c3d.parquet": b"x"})
    nights.whole({"detector_id": "two"})
    assert listing.exists(f"{run.final}/part-00000-0a1b2c3d.parquet")


def test_damaged_plan_ends_the_night_and_nothing_is_planned_anew(nights: Nights) -> None:
    run = nights.killed()
    writing.write_bytes(f"{run.staging}/run.json", b"{")
    with pytest.raises(StorageError, match=f"{run.staging}/run.json is damaged"):
        nights.whole()
    assert nights.staged() == [run.run_id]


# Several detectors in one pass.


@dataclass(frozen=True)
class PassVerdicts:
    """Stands for the pipeline of a pass: verdicts out of thin air, for most of the images of each run."""

    attempt: attempts.Attempt
    most: int | None = None

    def write(self, *_: Any) -> None:
        todo = [row for entry in listing.list_files(self.attempt.todo) for row in read_rows(entry.uri)]
        rows = [
            verdict_row(row["uri"], 0.5, image_id=row["image_id"], run_id=run_id)
            for row in todo[: self.most]
            for bit, run_id in enumerate(self.attempt.runs)
            if row["wanted"] >> bit & 1
        ]
        parquet.write(batches(rows, schema.VERDICTS), schema.VERDICTS, rows_file(self.attempt.folder))
        writing.write_bytes(f"{self.attempt.checkpoint}/{WRITE}_000000.parquet", b"ids")
        if self.most is not None:
            raise Killed

    def arithmetic(self) -> dict[str, Any]:
        return ARITHMETIC


def pass_of(nights: Nights, *detectors: str, most: int | None = None) -> list[dict[str, Any]]:
    """A pass of these detectors; it is killed when it has made rows of `most` images."""

    def work(planned: Sequence[Planned]) -> Work:
        details = {one.run.run_id: {"captioner_id": one.request.maker} for one in planned}
        return Work(
            title="score", stages=(), stream=lambda attempt: cast(Any, PassVerdicts(attempt, most)), details=details
        )

    requests = [nights.request({"detector_id": detector}) for detector in detectors]
    return execution.carry_out_together(requests, work)


def by_detector(nights: Nights) -> dict[str, Counter[str]]:
    """How often each detector published each image."""
    return {
        detector: Counter(
            row["uri"].rpartition("/")[2]
            for batch in catalog.published(nights.out, schema.DONE, detector_id=detector)
            for row in batch.to_pylist()
        )
        for detector in ("one", "two", "three")
    }


def test_pass_publishes_a_run_of_each_detector(nights: Nights) -> None:
    records = pass_of(nights, "one", "two", "three")
    assert [record["detector_id"] for record in records] == ["one", "two", "three"]
    assert [record["rows"] for record in records] == [5, 5, 5]
    assert [record["captioner_id"] for record in records] == ["one", "two", "three"]
    assert [record["settings"]["detector_id"] for record in records] == ["one", "two", "three"]
    assert by_detector(nights) == dict.fromkeys(("one", "two", "three"), Counter(NAMES))
    assert nights.staged() == []


def test_pass_does_for_each_detector_what_it_lacks(nights: Nights) -> None:
    nights.whole(limit=2)
    put(nights.source, {"new.jpg": b"x"})
    records = pass_of(nights, "one", "two")
    assert [(record["rows"], record["listing"]) for record in records] == [
        (4, {"new": 4, "scored before": 2}), (6, {"new": 6})
    ]  # fmt: skip
    assert [record["files"] for record in pass_of(nights, "two", "one")] == [[], []]
    assert by_detector(nights)["one"] == by_detector(nights)["two"] == Counter([*NAMES, "new.jpg"])


def test_pass_that_was_killed_is_continued(nights: Nights, said: list[str]) -> None:
    with pytest.raises(Killed):
        pass_of(nights, "one", "two", most=2)
    said.clear()
    records = pass_of(nights, "one", "two")
    assert any(line.startswith("continuing run") and "3 of 5 images are left" in line for line in said)
    assert [(record["rows"], record["attempts"]) for record in records] == [(5, 2), (5, 2)]
    assert nights.staged() == []


@pytest.mark.parametrize("detector", ["one", "two"])
def test_detector_of_a_pass_that_was_killed_goes_on_alone_and_the_others_later(nights: Nights, detector: str) -> None:
    with pytest.raises(Killed):
        pass_of(nights, "one", "two", most=2)
    assert [record["rows"] for record in pass_of(nights, detector)] == [5]
    pass_of(nights, "one", "two", "three")
    assert by_detector(nights) == dict.fromkeys(("one", "two", "three"), Counter(NAMES))
    assert nights.staged() == []


def test_pass_that_dies_between_two_publications_loses_nothing(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        publish, published = Run.publish, list[str]()

        def publish_one(run: Run, *arguments: Any, **more: Any) -> Any:
            if published:
                raise Killed
            published.append(run.run_id)
            return publish(run, *arguments, **more)

        patch.setattr(Run, "publish", publish_one)
        with pytest.raises(Killed):
            pass_of(nights, "one", "two")
    assert len(nights.staged()) == 1
    records = pass_of(nights, "one", "two")
    assert sorted(record["rows"] for record in records) == [0, 5]
    assert sorted(record["attempts"] for record in records) == [0, 2]
    assert by_detector(nights)["one"] == by_detector(nights)["two"] == Counter(NAMES)
