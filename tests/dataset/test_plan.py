"""The plan: a source as a manifest, each image once in each form, less what was done before, with the labels of its
benchmark; nothing left behind by a source without any image."""

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import plan, schema
from jobs.dataset.manifest import image_id
from jobs.dataset.plan import CHANGED, FAILED, NEW, SCORED, Plan, Selection, Target, write_manifest, write_manifests
from jobs.dataset.source import Source
from jobs.storage import filesystems, parquet
from nsnet.errors import ConfigError, SourceError, UsageError
from tests.support.swift import SwiftServer
from tests.support.tables import batches, new_bucket, parquet_bytes, put, tar_bytes

Rows = list[dict[str, Any]]


def manifest_of(uri: str) -> Rows:
    system, path = filesystems.arrow_filesystem(uri)
    table = pq.read_table(path, filesystem=system)
    assert table.schema.equals(schema.MANIFEST)
    return table.to_pylist()


def rows_of(source: str) -> Rows:
    """What a source lists, sorted: folders come in no order."""
    rows = [{name: row[name] for name in schema.MANIFEST.names} for row in Source(source).rows()]
    return sorted(rows, key=lambda row: row["uri"])


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def form_id(uri: str, etag: str, transform: str | None) -> str:
    """Identity of an image under a transform."""
    plain = image_id(uri, etag)
    return hashlib.sha256(f"{plain}/{transform}".encode()).hexdigest()[:32] if transform else plain


def done(*outcomes: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """What was published of (uri, etag, status) or (uri, etag, status, transform), in this order."""
    rows = (
        {"image_id": form_id(uri, etag, more[0] if more else None), "uri": uri, "status": status}
        for uri, etag, status, *more in outcomes
    )
    return batches(rows, schema.DONE, size=2)


def test_image_that_a_run_had_no_time_for_is_new(images: str, tmp_path: Path) -> None:
    first, second, *_ = rows_of(images)
    history = [
        {"image_id": row["image_id"], "uri": row["uri"], "status": "failed", "error_class": kind}
        for row, kind in ((first, "ImageBudgetError"), (second, "ImageTimeoutError"))
    ]
    published = batches(history, schema.DONE)
    plan = write_manifest(images, str(tmp_path / "manifest.parquet"), published=published)
    assert plan.states == {"new": 8, "failed before": 1}
    assert first["uri"] in {row["uri"] for row in manifest_of(plan.uri)}


@pytest.fixture
def images(tmp_path: Path) -> str:
    files = {f"0_real/{i}.jpg": b"x" for i in range(5)} | {f"1_fake/{i}.jpg": b"x" for i in range(3)}
    return put(str(tmp_path / "pictures"), {**files, "c.jpg": b"x", "README.md": b"", ".hidden": b""})


class Planner:
    """Plans over manifest Parquet, whose listing has an order, written into one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder / "manifest.parquet")

    def rows(self) -> Rows:
        """The manifest that was written last."""
        return manifest_of(self.uri)

    def __call__(
        self,
        listing: list[tuple[str, str]],
        *outcomes: tuple[str, ...],
        transforms: Sequence[str] = (),
        **selection: Any,
    ) -> tuple[Plan, list[tuple[str, str]]]:
        """Plan (uri, etag) pairs of which those outcomes were published -> the plan, and the pairs in the manifest."""
        source = write_parquet(
            self.folder / "source.parquet",
            {"uri": [uri for uri, _ in listing], "etag": [etag for _, etag in listing]},
        )
        written = write_manifest(source, self.uri, Selection(**selection), done(*outcomes), transforms)
        rows = self.rows()
        assert written.count == len(rows)
        return written, [(row["uri"], row["etag"]) for row in rows]


@pytest.mark.parametrize("limit", [None, 2])
def test_one_listing_gives_each_history_the_plan_that_it_has_alone(
    limit: int | None, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sorted(rows_of(images), key=lambda row: str(row["uri"]))
    histories: list[list[dict[str, Any]]] = [
        [],
        [{"image_id": row["image_id"], "uri": row["uri"], "status": "scored"} for row in rows],
        [{"image_id": row["image_id"], "uri": row["uri"], "status": "failed"} for row in rows[:3]]
        + [{"image_id": "f" * 32, "uri": rows[4]["uri"], "status": "scored"}],
    ]  # fmt: skip
    selection, listings = Selection(limit=limit), []
    listed = Source.rows
    monkeypatch.setattr(Source, "rows", lambda source: listings.append(source) or listed(source))
    uris = [str(tmp_path / f"{i}.parquet") for i in range(len(histories))]
    targets = [
        Target(uri=uri, published=batches(history, schema.DONE)) for uri, history in zip(uris, histories, strict=True)
    ]
    together = write_manifests(images, targets, selection)
    assert len(listings) == 1
    for written, history in zip(together, histories, strict=True):
        alone = write_manifest(images, str(tmp_path / "alone.parquet"), selection, batches(history, schema.DONE))
        assert written.count == alone.count
        if limit is None:  # a limited listing is in no order, and ends when each history has enough
            found, expected = (
                sorted(manifest_of(uri), key=lambda row: str(row["uri"])) for uri in (written.uri, alone.uri)
            )
            assert (written.labels, written.states, found) == (alone.labels, alone.states, expected)
    assert [written.count for written in together] == ([9, 0, 6] if limit is None else [2, 0, 2])


@pytest.fixture
def planned(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


# The listing.


def test_manifest_holds_the_rows_of_the_source(images: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "er" / "manifest.parquet")
    written = write_manifest(images, uri)
    assert sorted(manifest_of(uri), key=lambda row: row["uri"]) == rows_of(images)
    assert (written.uri, written.count, written.labels) == (uri, 9, {0: 5, 1: 3, None: 1})
    assert written.left_out == {".md is no picture": 1, "hidden file": 1}
    assert written.states == {NEW: 9}
    assert written.describe() == "9 images to do (1 left out: .md is no picture; 1 left out: hidden file)"


@pytest.mark.s3
def test_manifest_round_trips_through_a_bucket(s3_environment: SwiftServer) -> None:
    bucket = new_bucket()
    put(f"{bucket}/pictures", {"ü #1?.jpg": b"x", "1_fake/b.png": b"yy"})
    write_manifest(f"{bucket}/pictures", f"{bucket}/out/manifest.parquet")
    rows = manifest_of(f"{bucket}/out/manifest.parquet")
    assert sorted(rows, key=lambda row: row["uri"]) == rows_of(f"{bucket}/pictures")
    assert all(row["modified_at"] and row["listed"] for row in rows)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9])
def test_rows_are_all_written_whatever_the_batch(count: int, planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 4)
    listing = [(f"/{i}", "1") for i in range(9)]
    written, rows = planned(listing, limit=count)
    assert rows == listing[:count]
    assert written.count == count == sum(written.labels.values())


def test_object_listed_twice_is_planned_once_and_counted(planned: Planner) -> None:
    written, rows = planned([("/a", "1"), ("/b", "1"), ("/a", "1"), ("/a", "2"), ("/b", "1")])
    assert rows == [("/a", "1"), ("/b", "1"), ("/a", "2")]
    assert written.left_out == {"listed twice": 2} and written.states == {NEW: 3}


def test_source_without_images_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    put(str(tmp_path / "source"), {"a.txt": b"", "b.txt": b"", ".c": b""})
    with pytest.raises(SourceError) as caught:
        write_manifest(str(tmp_path / "source"), str(tmp_path / "out" / "m.parquet"))
    assert str(caught.value) == f"{tmp_path}/source holds no images (2: .txt is no picture; 1: hidden file)"
    assert os.listdir(tmp_path) == ["source"]


def test_missing_source_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no folder or prefix"):
        write_manifest(str(tmp_path / "absent"), str(tmp_path / "out" / "m.parquet"))
    assert os.listdir(tmp_path) == []


def test_output_inside_the_source_is_refused(images: str, tmp_path: Path) -> None:
    for place in (f"{images}/out/m.parquet", f"{images}/m.parquet"):
        with pytest.raises(UsageError, match="--out is inside the source"):
            write_manifest(images, place)
    assert len(rows_of(images)) == 9
    write_manifest(images, f"{images}-out/m.parquet")  # beside it, with the same beginning


# What was done before.

LISTING = [("/new", "1"), ("/changed", "2"), ("/failed", "1"), ("/scored", "1")]
OUTCOMES = [
    ("/changed", "1", "scored"),
    ("/failed", "1", "failed"),
    ("/scored", "1", "scored"),
    ("/gone", "1", "scored"),
]


def test_new_changed_failed_and_scored_images_are_told_apart(planned: Planner) -> None:
    written, rows = planned(LISTING, *OUTCOMES)
    assert rows == [("/new", "1"), ("/changed", "2")]
    assert list(written.states.items()) == [(NEW, 1), (CHANGED, 1), (FAILED, 1), (SCORED, 1)]
    assert written.describe() == "2 images to do (1 new; 1 changed; 1 failed before; 1 scored before)"


def test_retry_takes_what_failed_too(planned: Planner) -> None:
    _, rows = planned(LISTING, *OUTCOMES, retry_failed=True)
    assert rows == [("/new", "1"), ("/changed", "2"), ("/failed", "1")]


def test_rescore_takes_everything(planned: Planner) -> None:
    written, rows = planned(LISTING, *OUTCOMES, rescore=True)
    assert rows == LISTING
    assert written.states == {NEW: 1, CHANGED: 1, FAILED: 1, SCORED: 1}  # the states differ nevertheless


def test_replaced_file_is_planned_again_and_nothing_else(place: str) -> None:
    put(f"{place}/pictures", {"a.jpg": b"a", "b.jpg": b"b"})
    first = manifest_of(write_manifest(f"{place}/pictures", f"{place}/1.parquet").uri)
    outcomes = [(row["uri"], row["etag"], "scored") for row in first]
    put(f"{place}/pictures", {"b.jpg": b"bb"})
    written = write_manifest(f"{place}/pictures", f"{place}/2.parquet", published=done(*outcomes))
    assert [row["uri"] for row in manifest_of(written.uri)] == [f"{place}/pictures/b.jpg"]
    assert written.states == {CHANGED: 1, SCORED: 1}


def test_nothing_to_do_is_an_empty_manifest(planned: Planner) -> None:
    written, rows = planned([("/a", "1"), ("/b", "1")], ("/b", "1", "failed"), ("/a", "1", "scored"))
    assert rows == [] and written.labels == {}
    assert written.describe() == "0 images to do (1 failed before; 1 scored before)"


def test_image_published_in_several_versions_is_planned_once(planned: Planner) -> None:
    versions = [("/a", "1", "scored"), ("/a", "2", "failed"), ("/a", "3", "scored")]
    written, rows = planned([("/a", "4")], *versions)
    assert rows == [("/a", "4")] and written.states == {CHANGED: 1}


@pytest.mark.parametrize(("etag", "state"), [("1", SCORED), ("2", FAILED), ("3", SCORED), ("4", CHANGED)])
def test_each_version_has_an_outcome_of_its_own(etag: str, state: str, planned: Planner) -> None:
    written, _ = planned([("/a", etag)], ("/a", "1", "scored"), ("/a", "2", "failed"), ("/a", "3", "scored"))
    assert written.states == {state: 1}


@pytest.mark.parametrize("outcomes", [("failed", "scored"), ("scored", "failed"), ("failed", "scored", "failed")])
def test_image_that_was_ever_scored_counts_as_scored(outcomes: tuple[str, ...], planned: Planner) -> None:
    written, rows = planned([("/a", "1")], *(("/a", "1", status) for status in outcomes), retry_failed=True)
    assert rows == [] and written.states == {SCORED: 1}


def test_image_that_failed_twice_is_counted_once(planned: Planner) -> None:
    written, rows = planned([("/a", "1")], ("/a", "1", "failed"), ("/a", "1", "failed"), retry_failed=True)
    assert rows == [("/a", "1")] and written.states == {FAILED: 1} and written.left_out == {}


def test_published_rows_flow_by(tmp_path: Path) -> None:
    total, size = 100_000, 1000
    alive: set[int] = set()
    most = 0

    def batch(start: int) -> pa.RecordBatch:
        nonlocal most
        uris = [f"/{i}" for i in range(start, start + size)]
        rows = [{"image_id": image_id(uri, "1"), "uri": uri, "status": "scored"} for uri in uris]
        made = pa.RecordBatch.from_pylist(rows, schema=schema.DONE)
        alive.add(start)
        weakref.finalize(made, alive.discard, start)
        most = max(most, len(alive))
        return made

    source = write_parquet(
        tmp_path / "source.parquet", {"uri": ["/0", f"/{total - 1}", f"/{total}", "/5"], "etag": ["1", "1", "1", "2"]}
    )
    written = write_manifest(source, str(tmp_path / "m.parquet"), published=map(batch, range(0, total, size)))
    assert written.states == {NEW: 1, CHANGED: 1, SCORED: 2}
    assert [row["uri"] for row in manifest_of(written.uri)] == [f"/{total}", "/5"]
    assert most <= 3  # the one that is made, and those that the consumer still has in its hands


# What is selected.


class Drawn(Source):
    """A source that counts the rows that are drawn from it."""

    count = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in super().rows():
            Drawn.count += 1
            yield row


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> type[Drawn]:
    monkeypatch.setattr(Drawn, "count", 0)
    monkeypatch.setattr(plan, "Source", Drawn)
    return Drawn


MANY = [(f"/{i}", "1") for i in range(1000)]


def test_limit_stops_the_listing(planned: Planner, drawn: type[Drawn]) -> None:
    written, rows = planned(MANY, limit=10)
    assert rows == MANY[:10] and drawn.count == 10
    assert written.states == {NEW: 10}


def test_limit_counts_only_images_to_do(planned: Planner, drawn: type[Drawn]) -> None:
    outcomes = [(uri, etag, "scored") for uri, etag in MANY[:100]]
    _, rows = planned(MANY, *outcomes, limit=10)
    assert rows == MANY[100:110]
    assert 110 <= drawn.count <= 220  # asked each time the listing has doubled


def test_limit_beyond_the_source_takes_all(planned: Planner, drawn: type[Drawn]) -> None:
    _, rows = planned(MANY, ("/3", "1", "scored"), limit=999_999)
    assert rows == MANY[:3] + MANY[4:] and drawn.count == 1000


def test_limit_over_a_source_that_was_all_done_ends_with_nothing(planned: Planner, drawn: type[Drawn]) -> None:
    written, rows = planned(MANY, *((uri, etag, "scored") for uri, etag in MANY), limit=3)
    assert rows == [] and written.states == {SCORED: 1000} and drawn.count == 1000


def test_limit_does_not_count_what_is_listed_twice(planned: Planner) -> None:
    written, rows = planned([("/a", "1")] * 5 + [("/b", "1"), ("/c", "1")], limit=2)
    assert rows == [("/a", "1"), ("/b", "1")]
    assert written.left_out["listed twice"] == 4


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"--limit must be at least 1, got {limit}"):
        Selection(limit=limit)


def test_shuffled_rows_are_the_same_rows_in_another_order(planned: Planner) -> None:
    _, rows = planned(MANY, shuffle_seed=0)
    assert rows != MANY and sorted(rows) == sorted(MANY)
    moved = sum(a != b for a, b in zip(rows, MANY, strict=True))
    assert moved > 950  # a few stay by chance


def test_shuffled_order_depends_on_the_seed_and_not_on_the_listing(planned: Planner) -> None:
    _, first = planned(MANY, shuffle_seed=1)
    assert planned(MANY[::-1], shuffle_seed=1)[1] == first
    assert planned(MANY, shuffle_seed=2)[1] != first


def test_limit_of_a_shuffled_source_is_a_sample_of_all_of_it(planned: Planner, drawn: type[Drawn]) -> None:
    _, whole = planned(MANY, shuffle_seed=7)
    drawn.count = 0
    _, rows = planned(MANY, shuffle_seed=7, limit=50)
    assert rows == whole[:50] and drawn.count == 1000
    assert len({int(uri[1:]) // 100 for uri, _ in rows}) > 5  # from everywhere, not from the beginning


def test_sample_holds_only_images_to_do(planned: Planner) -> None:
    outcomes = [(uri, etag, "scored") for uri, etag in MANY[:990]]
    _, rows = planned(MANY, *outcomes, shuffle_seed=0, limit=10)
    assert sorted(rows) == sorted(MANY[990:])


@pytest.mark.parametrize(
    ("include", "exclude", "names", "left_out"),
    [
        (("0_real/*",), (), ["0_real/0.jpg", "0_real/1.jpg", "0_real/2.jpg", "0_real/3.jpg", "0_real/4.jpg"],
         {"not included": 4}),
        (("*/0.jpg", "c.*"), (), ["0_real/0.jpg", "1_fake/0.jpg", "c.jpg"], {"not included": 6}),
        ((), ("*_*/*",), ["c.jpg"], {"excluded": 8}),
        (("*/[01].jpg",), ("1_fake/*",), ["0_real/0.jpg", "0_real/1.jpg"], {"excluded": 3, "not included": 4}),
    ],
)  # fmt: skip
def test_globs_choose_images_and_the_rest_is_counted(
    include: tuple[str, ...], exclude: tuple[str, ...], names: list[str], left_out: dict[str, int], images: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    selection = Selection(include=include, exclude=exclude)
    written = write_manifest(images, str(tmp_path / "m.parquet"), selection)
    assert sorted(row["uri"].removeprefix(f"{images}/") for row in manifest_of(written.uri)) == names
    assert written.left_out == {".md is no picture": 1, "hidden file": 1, **left_out}
    assert written.states == {NEW: len(names)}


def test_globs_that_match_nothing_say_so(images: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no images .*9: not included"):
        write_manifest(images, str(tmp_path / "m.parquet"), Selection(include=("*.png",)))


# Benchmarks.


def labels_of(written: Plan, place: str) -> dict[str, tuple[int | None, str | None, str | None]]:
    """Name below a place -> label, generator and split in a manifest."""
    rows = manifest_of(written.uri)
    return {row["uri"][len(place) + 1 :]: (row["label"], row["generator"], row["split"]) for row in rows}


BENCHMARK = {
    **{f"train/{name}/{label}/x.y.PNG": (int(label[0]), "ProGAN" if name != "sdv1.4" else name, "train")
       for name in ("car", "cat", "chair", "horse", "sdv1.4") for label in ("0_real", "1_fake")},
    "test/ProGAN/1_fake/deeper/1.webp": (1, "ProGAN", "test"),
    "test/FLUX1-dev/0_real/1.jfif": (0, "FLUX1-dev", "test"),
    "extra/1.avif": (None, None, None),
}  # fmt: skip


def test_layout_of_a_benchmark_corrects_generators(place: str) -> None:
    source = put(f"{place}/mine", dict.fromkeys(BENCHMARK, b"x"))
    written = write_manifest(source, f"{place}/m.parquet")
    assert labels_of(written, source) == BENCHMARK
    assert written.layout == "AIGIBench"
    assert written.describe() == "13 images to do (layout AIGIBench)"
    assert written.labels == {0: 6, 1: 6, None: 1}


def test_class_train_of_a_benchmark_is_no_split(place: str) -> None:
    names = [f"{name}/{label}/1.png" for name in ("airplane", "train", "tvmonitor") for label in ("0_real", "1_fake")]
    source = put(f"{place}/progan", dict.fromkeys(names, b"x"))
    written = write_manifest(source, f"{place}/m.parquet")
    assert labels_of(written, source) == {name: (int("1_fake" in name), "progan", None) for name in names}
    assert written.layout == "ForenSynths"


def test_layout_is_that_of_tars_too_and_other_labels_are_never_changed(tmp_path: Path) -> None:
    members = {name: b"x" for name in BENCHMARK} | {"train/car/0_real/x.cls": b"1", "train/cat/0_real/z.PNG": b"x"}
    stored = pa.table({"bytes": [b"x"], "label": ["real"], "generator": ["car"], "split": ["test"]})
    sink = pa.BufferOutputStream()
    pq.write_table(stored, sink)
    files = {"a.tar": tar_bytes(members), "b.parquet": bytes(sink.getvalue()), "train/horse/1_fake/1.png": b"x"}
    source = put(str(tmp_path / "mine"), files)
    written = write_manifest(source, str(tmp_path / "m.parquet"))
    of_tar = {f"a.tar#{name}": labels for name, labels in BENCHMARK.items()}
    assert labels_of(written, source) == of_tar | {
        "a.tar#train/car/0_real/x.y.PNG": (1, "car", "train"),  # what its .cls says
        "a.tar#train/cat/0_real/z.PNG": (0, "ProGAN", "train"),
        "b.parquet#0": (0, "car", "test"),
        "train/horse/1_fake/1.png": (1, "ProGAN", "train"),
    }


def test_plain_source_has_no_layout(images: str, tmp_path: Path) -> None:
    assert write_manifest(images, str(tmp_path / "m.parquet")).layout is None


def test_source_with_too_many_labelled_folders_is_no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(str(tmp_path / "mine"), dict.fromkeys(BENCHMARK, b"x"))
    for most, layout in ((12, "AIGIBench"), (11, None)):
        monkeypatch.setattr(plan, "MAX_FOLDERS", most)
        assert write_manifest(source, str(tmp_path / "m.parquet")).layout == layout


# Folders that say labels together.


def test_words_beside_each_other_are_labels_of_folders_and_tars(place: str) -> None:
    expected = {
        "train/Human/1.jpg": (0, "mine", "train"), "train/AI/1.jpg": (1, "mine", "train"),
        "fake/sdxl/1.jpg": (1, "sdxl", None), "generated/adm/1.jpg": (1, "adm", None),
        "original/1.jpg": (0, "mine", None),
    }  # fmt: skip
    source = put(f"{place}/mine", dict.fromkeys(expected, b"x"))
    assert labels_of(write_manifest(source, f"{place}/m.parquet"), source) == expected
    tar = put(f"{place}/tars", {"mine.tar": tar_bytes(dict.fromkeys(expected, b"x"))}) + "/mine.tar"
    written = write_manifest(tar, f"{place}/m.parquet")
    assert {name: label for name, (label, *_) in labels_of(written, tar).items()} == {
        name: label for name, (label, *_) in expected.items()
    }


def test_label_partitions_are_labels_or_classes_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def labels(count: int) -> dict[int | None, int]:
        files = {f"label={i}/generator=a%20b/{j}.jpg": b"x" for i in range(count) for j in range(i + 1)}
        return write_manifest(put(str(tmp_path / str(count)), files), str(tmp_path / "m.parquet")).labels

    assert labels(2) == {0: 1, 1: 2} and capsys.readouterr().err == ""
    assert {row["generator"] for row in manifest_of(str(tmp_path / "m.parquet"))} == {"a b"}
    assert labels(3) == {None: 6}
    assert "folders label=0, label=1, label=2 are neither real nor fake" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["real/1.jpg", "deepfloyd/1.jpg", "deepfloyd/2.jpg"], "at the top of the source, only folders of real images"),
        (["sd/fake/1.jpg", "sd/coco/1.jpg", "sd/x/2.jpg"], "in sd, only folders of fake images are known: 2 images"),
        (["train/real/1.jpg", "test/unsure/1.jpg"], "only folders of real images are known: 1 images in unsure have"),
        (["real/1.jpg", "fake/1.jpg", "other/1.jpg"], None),
        (["sd/fake/1.jpg", "loose.jpg", "other/1.jpg"], None),
        (["sd/fake/1.jpg", "laion/real/1.jpg"], None),
        (["real/1.jpg", "generated/1.jpg"], None),
        (["human/1.jpg", "horse/1.jpg"], None),
    ],
)
@pytest.mark.parametrize("as_tar", [False, True])
def test_one_label_among_folders_without_any_is_warned_of(
    names: list[str], warned: str | None, as_tar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = dict.fromkeys(names, b"x")
    source = put(str(tmp_path / "mine"), {"a.tar": tar_bytes(files)} if as_tar else files)
    write_manifest(source, str(tmp_path / "m.parquet"))
    said = capsys.readouterr().err
    assert warned in said and f"warning: {source}: " in said if warned else said == ""


# Rows that contradict each other.


def test_image_listed_with_both_labels_has_none_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {
        "uri": ["/a", "/b", "/c", "/d", "/a", "/b", "/c"], "label": [0, 1, None, 1, 1, 1, 0],
        "generator": ["first", None, None, "d", "second", "b", "c"],
        "split": ["train", None, "val", None, "test", "test", None],
    }  # fmt: skip
    written = write_manifest(write_parquet(tmp_path / "source.parquet", columns), str(tmp_path / "m.parquet"))
    assert [tuple(row[name] for name in columns) for row in manifest_of(written.uri)] == [
        ("/a", None, "first", "train"),  # of generators and splits, the first counts
        ("/b", 1, "b", "test"),
        ("/c", 0, "c", "val"),  # what one row leaves out, another may say
        ("/d", 1, "d", None),
    ]
    assert written.labels == {None: 1, 1: 2, 0: 1} and written.left_out == {"listed twice": 3}
    assert "1 images are listed twice with contradictory labels: they have no label" in capsys.readouterr().err


def test_contradiction_counts_once_for_all_forms_and_before_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet(tmp_path / "source.parquet", {"uri": ["/a", "/a", "/b", "/b"], "label": [0, 1, 1, 1]})
    written = write_manifest(source, str(tmp_path / "m.parquet"), Selection(limit=2), transforms=FORMS)
    assert written.labels == {None: 3, 1: 3}
    assert "warning: 1 images are listed twice" in capsys.readouterr().err


# Forms of each image.

FORMS = ["", "jpeg:50", "blur:1+it's 'odd'; ü"]
HASHES = [("/a", "1"), ("/b", "1"), ("/c", "1")]


def forms_of(rows: Rows) -> list[tuple[str, str | None]]:
    return [(row["uri"], row["transform"]) for row in rows]


def test_image_has_a_row_per_form_beside_each_other(planned: Planner) -> None:
    written, _ = planned(HASHES, transforms=FORMS)
    rows = planned.rows()
    assert forms_of(rows) == [(uri, form or None) for uri, _ in HASHES for form in FORMS]
    assert [row["image_id"] for row in rows] == [form_id(row["uri"], "1", row["transform"]) for row in rows]
    assert len({row["image_id"] for row in rows}) == 9
    assert (written.count, written.states, written.labels, written.forms) == (9, {NEW: 9}, {None: 9}, 3)
    assert written.describe() == "9 images to do (each counted in 3 forms)"


def test_identity_under_a_transform_is_what_it_always_was(planned: Planner) -> None:
    """Published rows are matched by it: it may not change."""
    planned([("s3://b/a.jpg", "v")], transforms=["", "jpeg:50"])
    ids = ["9f22e9e08f77cb63132d9b1ebce76bec", "0dedd97e51ac40e1ff39aa7fe42009b7"]
    assert [row["image_id"] for row in planned.rows()] == ids


def test_form_that_is_not_asked_for_is_not_done(planned: Planner) -> None:
    planned(HASHES, transforms=["jpeg:50"])
    assert forms_of(planned.rows()) == [(uri, "jpeg:50") for uri, _ in HASHES]


def test_form_named_twice_is_done_once(planned: Planner) -> None:
    written, _ = planned(HASHES, transforms=["", "jpeg:50", "", "jpeg:50"])
    assert written.count == 6 and written.left_out == {}


def test_rows_of_an_image_differ_in_identity_and_transform_only(images: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "m.parquet")
    write_manifest(images, uri, transforms=FORMS)
    rows = manifest_of(uri)
    same = {name: None for name in ("image_id", "transform")}
    plain = {row["uri"]: row | same for row in rows_of(images)}
    assert all(row | same == plain[row["uri"]] for row in rows) and len(rows) == 3 * len(plain)
    assert sorted((row for row in rows if row["transform"] is None), key=lambda row: row["uri"]) == rows_of(images)


def test_each_form_has_a_history_of_its_own(planned: Planner) -> None:
    outcomes = [
        ("/a", "1", "scored"), ("/a", "1", "failed", "jpeg:50"), ("/b", "1", "scored", "jpeg:50"),
        ("/c", "0", "scored"),
    ]  # fmt: skip
    written, _ = planned(HASHES, *outcomes, transforms=["", "jpeg:50"])
    assert forms_of(planned.rows()) == [("/b", None), ("/c", None), ("/c", "jpeg:50")]
    # /b is known under a transform, /c in another version; under a transform what was never done is new
    assert written.states == {NEW: 1, CHANGED: 2, FAILED: 1, SCORED: 2}
    planned(HASHES, *outcomes, transforms=["", "jpeg:50"], retry_failed=True)
    assert forms_of(planned.rows())[0] == ("/a", "jpeg:50") and len(planned.rows()) == 4
    planned(HASHES, *outcomes, transforms=["", "jpeg:50"], rescore=True)
    assert len(planned.rows()) == 6


def test_history_without_a_form_does_not_do_for_it(planned: Planner) -> None:
    written, rows = planned(HASHES, *[(uri, etag, "scored") for uri, etag in HASHES], transforms=["jpeg:50"])
    assert rows == HASHES and written.states == {NEW: 3}


@pytest.mark.parametrize("seed", [None, 3])
def test_limit_is_one_of_images_with_all_their_forms(seed: int | None, planned: Planner) -> None:
    outcomes = [(uri, etag, "scored", form) for uri, etag in MANY[:10] for form in FORMS]
    outcomes += [(*MANY[10], "scored", "")]
    _, plain = planned(MANY, *[(uri, etag, "scored") for uri, etag in MANY[:10]], shuffle_seed=seed, limit=20)
    written, rows = planned(MANY, *outcomes, transforms=FORMS, shuffle_seed=seed, limit=20)
    lacking = MANY[10] in plain
    assert list(dict.fromkeys(rows)) == plain and written.count == 60 - lacking
    assert rows == [pair for pair in plain for form in FORMS if pair != MANY[10] or form]


def test_limit_stops_the_listing_of_forms_as_early(planned: Planner, drawn: type[Drawn]) -> None:
    planned(MANY, transforms=FORMS, limit=10)
    assert drawn.count == 10


def test_forms_of_an_image_stay_together_in_a_random_order(planned: Planner) -> None:
    _, whole = planned(MANY, shuffle_seed=5)
    _, rows = planned(MANY, transforms=FORMS, shuffle_seed=5)
    assert rows == [pair for pair in whole for _ in FORMS]
    assert [row["transform"] for row in planned.rows()] == [form or None for form in FORMS] * len(MANY)


def test_forms_of_what_is_listed_twice_are_planned_once(planned: Planner) -> None:
    written, rows = planned([*HASHES, *HASHES[:2]], transforms=FORMS)
    assert written.left_out == {"listed twice": 2} and len(rows) == 9


# What could not be read.


def with_broken_tars(folder: Path, count: int, **files: bytes) -> str:
    return put(str(folder), {f"{i}.tar": b"no tar" * 200 for i in range(count)} | files)


def test_containers_that_cannot_be_read_are_counted_and_named(tmp_path: Path) -> None:
    source = with_broken_tars(tmp_path / "source", 5, **{"a.jpg": b"x", "b.txt": b"x", ".hidden": b"x"})
    found = write_manifest(source, f"{tmp_path}/manifest.parquet")
    assert (found.count, found.unread, len(found.unread_named)) == (1, 5, 5)  # not what is left out by its name
    assert all(any(f"{source}/{i}.tar" in line for line in found.unread_named) for i in range(5))
    text = found.describe()
    assert "5 left out: .tar that cannot be read" in text and "\n" not in text
    named = text.partition("not read: ")[2]
    assert named.count(".tar ") == 3 and named.endswith("; and 2 more)")


def test_source_of_nothing_but_containers_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    source = with_broken_tars(tmp_path / "source", 2)
    with pytest.raises(SourceError) as caught:
        write_manifest(source, f"{tmp_path}/manifest.parquet")
    message = str(caught.value)
    assert f"{source} holds no images (2: .tar that cannot be read) in its readable part; not read: " in message
    assert f"{source}/0.tar" in message and f"{source}/1.tar" in message


def numbered(number: int, ending: str) -> bytes:
    """A container of two images of one class."""
    if ending == ".parquet":
        return parquet_bytes({"image": [b"x", b"y"], "label": [number, number]})
    return tar_bytes({f"{name}{end}": b"%d" % number for name in "ab" for end in (".jpg", ".cls")})


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
@pytest.mark.parametrize(("classes", "expected"), [((0, 1), {0: 2, 1: 2}), ((0, 1, 2), {None: 6})])
def test_numbers_of_files_sorted_by_class_mean_what_all_of_them_mean(
    ending: str, classes: tuple[int, ...], expected: dict[int | None, int], tmp_path: Path
) -> None:
    digests = ("6347f3d7b9e4bd5d", "0b1c8a7e55aa90ff", "ffeeddccbbaa9988")  # as `datasets` wrote names once
    files = {f"in/train-{number:05d}-{digests[number]}{ending}": numbered(number, ending) for number in classes}
    put(str(tmp_path), files)
    plan = write_manifest(str(tmp_path / "in"), str(tmp_path / "manifest.parquet"))
    assert plan.labels == expected


def test_classes_of_another_data_set_beside_cost_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"in/{name}.tar": numbered(number, ".tar") for name, number in (("a-0", 0), ("a-1", 1), ("objects", 7))}
    put(str(tmp_path), {**files, "in/named-0.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"fake"})})
    plan = write_manifest(str(tmp_path / "in"), str(tmp_path / "manifest.parquet"))
    assert plan.labels == {0: 2, 1: 3, None: 2}
    assert "of their series" not in capsys.readouterr().err
