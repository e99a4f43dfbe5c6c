"""The stages, called as Ray calls them: a row for every row, in order, and what has failed stays as it is."""

import copy
import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from jobs.cluster.shares import rows_per_block
from jobs.dataset import fetching, schema
from jobs.dataset.source import Source
from jobs.pipeline import outages, preparing, rows
from jobs.pipeline.actors import Caption, Embed, ResultCache
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.models import Models, caption_id
from jobs.pipeline.patience import Patience
from jobs.pipeline.pixels import pixel_bytes
from jobs.pipeline.preparing import Prepare, transform_seed
from jobs.pipeline.rows import ProgressReporter
from jobs.pipeline.scoring import Judge, Score
from jobs.storage import errors, probes
from nsnet.captioner import Captioner
from nsnet.detector import Detector
from nsnet.errors import BundleError, FetchError, OutageError
from nsnet.images import DecodeLimits
from nsnet.patches import SCORING_SEED
from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
from tests.support.models import FROZEN
from tests.support.proxy import PASS, Action, Always, FaultyProxy, Script
from tests.support.tables import image_file, new_bucket, put, save_bundle, todo_row, todo_table

REPORT = ProgressReporter()
CAPTIONER_ID = "c" * 16
LIMITS = DecodeLimits(max_bytes=20_000, max_seconds=20.0)
CONFIG = PreparationConfig(thumbnail_px=64, patches=(FROZEN.patches,), limits=LIMITS)
BLOCK_ROWS = rows_per_block(pixel_bytes(CONFIG))
COLUMNS = [*schema.SOURCE, *schema.IMAGE, *schema.CAPTION, *schema.OUTCOME, schema.WANTED, *schema.LABELS]
MOSAIC, THUMBNAIL = (pa.field(name, pa.binary()) for name in ("mosaic", "thumbnail"))
PREPARED = pa.schema([*COLUMNS, MOSAIC, THUMBNAIL])
CAPTIONED = pa.schema([*COLUMNS, MOSAIC])
PIXELS = {"mosaic", "thumbnail"}

FILES = {
    "a.png": image_file(1),
    "text.jpg": b"no image",
    "b.jpg": image_file(2, "JPEG", 90, 70),
    "cut.png": image_file(3, "PNG", 80, 80)[:3000],
    "empty.png": b"",
    "large.png": image_file(4, "PNG", 100, 100),
    "c.webp": image_file(5, "WEBP"),
    "d.gif": image_file(6, "GIF"),
    "large with unknown size.png": image_file(4, "PNG", 100, 100),
    "e.png": image_file(7, "PNG", 10, 10),
}
OUTCOMES: dict[str, tuple[str | None, str | None]] = {
    "a.png": (None, None), "text.jpg": ("decode", "ImageUnidentifiedError"), "b.jpg": (None, None),
    "cut.png": ("decode", "ImageCorruptError"), "empty.png": ("decode", "ImageEmptyError"),
    "large.png": ("decode", "ImageTooLargeError"), "c.webp": (None, None), "d.gif": (None, None),
    "large with unknown size.png": ("decode", "ImageTooLargeError"), "e.png": (None, None),
    "missing.png": ("fetch", "ObjectMissingError"), "folder": ("fetch", "FetchError"),
}  # fmt: skip
GOOD = [name for name, outcome in OUTCOMES.items() if outcome == (None, None)]
GOOD_BYTES = sum(len(FILES[name]) for name in GOOD)


@pytest.fixture(scope="module", autouse=True)
def decoders() -> Iterator[None]:
    """The decoding children end with this module."""
    made: list[GuardedDecoder] = []

    @cache
    def patience(config: PreparationConfig, board_name: str | None) -> Patience:
        made.append(GuardedDecoder(config))
        return Patience(made[-1], ProgressReporter(board_name=board_name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_patience", patience)
        yield
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("pictures")
    put(str(folder), FILES)
    (folder / "folder").mkdir()
    rows = []
    for i, name in enumerate(OUTCOMES):
        size = len(FILES[name]) if name in FILES and "unknown" not in name else None
        rows.append(todo_row(folder / name, etag=f"v{i}", size_bytes=size, label=i % 2, generator=f"g{i}"))
    return todo_table(*rows)


@pytest.fixture(scope="module")
def prepared(manifest: pa.Table) -> pa.Table:
    return Prepare(config=CONFIG, schema=PREPARED)(manifest)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def models(bundle: Path) -> Models:
    return Models(detector=str(bundle), threads=1, run_id="run", captioner_id=CAPTIONER_ID)


@pytest.fixture(scope="module")
def captioner(models: Models) -> Caption:
    return Caption(models, FROZEN.captioner, CAPTIONED, 4, REPORT)


@pytest.fixture(scope="module")
def captioned(captioner: Caption, prepared: pa.Table) -> pa.Table:
    return captioner(prepared)


class Alone(Score):
    """The stage with one detector."""

    def __init__(self, models: Models, batch_size: int, report: ProgressReporter) -> None:
        judge = Judge(detector=models.detector, detector_id=models.detector_id, run_id=models.run_id)
        super().__init__(models, [judge], batch_size, report)

    @property
    def detector(self) -> Any:
        return self.scorers[0].detector


@pytest.fixture(scope="module")
def scorer(models: Models) -> Score:
    return Alone(models, 4, REPORT)


@pytest.fixture(scope="module")
def embedder(models: Models) -> Embed:
    return Embed(models, FROZEN, CAPTIONED.append(schema.TEXT_FEATURES), 4, REPORT)


@pytest.fixture(scope="module")
def all_failed(manifest: pa.Table) -> pa.Table:
    """What is prepared of images that are not there."""
    rows = [{**row, "uri": row["uri"] + ".absent"} for row in manifest.to_pylist()]
    return Prepare(config=CONFIG, schema=PREPARED)(todo_table(*rows))


def names(table: pa.Table) -> list[str]:
    return [Path(uri).name for uri in table.column("uri").to_pylist()]


def by_name(table: pa.Table) -> dict[str, dict[str, Any]]:
    return dict(zip(names(table), table.to_pylist(), strict=True))


def like(stage: Any, **changes: Any) -> Any:
    """A stage that shares its models with another, but not its memory; loading them takes a second."""
    other = copy.copy(stage)
    if isinstance(stage, Alone):
        other.scorers = [like(stage.scorers[0], **changes)]
    else:
        vars(other).update({"memory": ResultCache()} | changes)
    return other


@dataclass(frozen=True, kw_only=True)
class Counts(ProgressReporter):
    """What a stage tells of its progress, kept."""

    total: Counter[str] = field(default_factory=Counter)

    seconds: Counter[str] = field(default_factory=Counter)

    images: Counter[tuple[str, str]] = field(default_factory=Counter)

    def _add(self, counts: dict[str, int], images: dict[tuple[str, str], int]) -> None:
        self.total.update(counts)
        self.images.update(images)

    def spend(self, images: int = 0, /, **seconds: float) -> None:
        self.seconds.update(seconds)


class Watched:
    """A model that keeps what it is called with."""

    def __init__(self, model: Any, method: str) -> None:
        self._model, self._method = model, method
        self.calls: list[NDArray[np.uint8]] = []

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._model, name)

        def call(images: Any, *arguments: Any) -> Any:
            self.calls.append(np.array(images[0] if isinstance(images, list) else images))
            return getattr(self._model, name)(images, *arguments)

        return call

    @property
    def distinct(self) -> int:
        """How many different images it was shown."""
        return len({image.tobytes() for call in self.calls for image in call})


def watched(captioner: Caption, scorer: Score, **changes: Any) -> tuple[Any, Any]:
    """The two stages with models that are watched."""
    return (
        like(captioner, captioner=Watched(captioner.captioner, "caption"), **changes),
        like(scorer, detector=Watched(scorer.detector, "score_views"), **changes),
    )


def assert_failed_rows_are_untouched(before: pa.Table, after: pa.Table) -> None:
    kept = [name for name in before.column_names if name in after.column_names and name not in PIXELS]
    assert len(kept) >= len(COLUMNS) - 1  # verdicts lack `wanted`
    for old, new in zip(before.to_pylist(), after.to_pylist(), strict=True):
        if old["status"] == "failed":
            assert {name: new[name] for name in kept} == {name: old[name] for name in kept}


# Preparation.


def test_preparing_gives_every_row_its_outcome_in_order(manifest: pa.Table, prepared: pa.Table) -> None:
    assert prepared.schema.equals(PREPARED)
    assert names(prepared) == list(OUTCOMES)
    for name in ("image_id", "uri", "etag", "label", "generator"):
        assert prepared.column(name).to_pylist() == manifest.column(name).to_pylist()
    rows = by_name(prepared)
    assert {name: (row["error_stage"], row["error_class"]) for name, row in rows.items()} == OUTCOMES
    for name, row in rows.items():
        assert row["status"] == ("scored" if name in GOOD else "failed")
        assert any(row["mosaic"]) == any(row["thumbnail"]) == (name in GOOD)
        assert (row["error_message"] is None) == (name in GOOD)
        assert row["error_message"] is None or "\n" not in row["error_message"]


def test_prepared_pixels_and_facts_are_those_of_the_image(prepared: pa.Table) -> None:
    rows = by_name(prepared)
    for name in GOOD:
        expected, row = prepare(FILES[name], CONFIG), rows[name]
        assert row["mosaic"] == assemble_mosaics(expected.patches, CONFIG, SCORING_SEED)[0].tobytes()
        assert row["thumbnail"] == expected.thumbnail.tobytes()
        facts = (expected.width, expected.height, expected.format, expected.frames)
        assert (row["width"], row["height"], row["format"], row["frames"]) == facts
        assert row["size_bytes"] == len(FILES[name])


def test_pixels_of_a_block_belong_to_their_rows_wherever_a_fetch_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good and bad images, with and without a known caption, in turn. A failed row has as many pixels as a good one."""
    monkeypatch.setattr(outages, "ROWS_AT_ONCE", 3)
    files = {f"{i:02}.png": b"no image" if i % 4 == 1 else image_file(i, "PNG", 40, 40) for i in range(16)}
    put(str(tmp_path), files)
    known = {name: {"known_hash": hashlib.sha256(files[name]).hexdigest()} for name in list(files)[::4]}
    known |= {name: {"known_hash": "f" * 64} for name in list(files)[1::8]}
    rows = [todo_row(f"{tmp_path}/{name}") | known.get(name, {}) for name in files]
    made = Prepare(config=CONFIG, schema=PREPARED)(todo_table(*rows))
    for (name, content), row in zip(files.items(), made.to_pylist(), strict=True):
        if content == b"no image":
            assert row["mosaic"] == bytes(3 * FROZEN.patches.mosaic_px**2) and row["status"] == "failed"
            assert row["thumbnail"] == (None if name in known else bytes(3 * CONFIG.thumbnail_px**2))
            continue
        expected = prepare(content, CONFIG)
        assert row["mosaic"] == assemble_mosaics(expected.patches, CONFIG, SCORING_SEED)[0].tobytes()
        assert row["thumbnail"] == (None if name in known else expected.thumbnail.tobytes())


def test_hash_is_of_the_whole_file_or_is_not_given(prepared: pa.Table) -> None:
    for name, row in by_name(prepared).items():
        whole = name in FILES and not name.startswith("large")
        assert row["content_hash"] == (hashlib.sha256(FILES[name]).hexdigest() if whole else None)
    assert by_name(prepared)["large with unknown size.png"]["size_bytes"] is None
    assert by_name(prepared)["large.png"]["size_bytes"] == len(FILES["large.png"])


def test_facts_alone_make_no_pixels(manifest: pa.Table) -> None:
    config = replace(CONFIG, thumbnail_px=0, patches=(), fingerprint=True)
    rows = by_name(Prepare(config=config, schema=schema.FACTS)(manifest))
    for name in GOOD:
        expected = prepare(FILES[name], config)
        facts = (expected.width, expected.height, expected.quality, expected.perceptual_hash)
        assert tuple(rows[name][key] for key in ("width", "height", "jpeg_quality", "perceptual_hash")) == facts
    assert rows["b.jpg"]["jpeg_quality"] == 75 and rows["a.png"]["jpeg_quality"] is None
    assert {row["error_class"] for name, row in rows.items() if name not in GOOD} == {
        kind for _, kind in OUTCOMES.values() if kind is not None
    }


def test_row_is_shown_transformed_and_in_its_own_order(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES["large.png"])
    config = PreparationConfig(thumbnail_px=64, patches=(FROZEN.patches,))
    columns = pa.schema([*PREPARED, schema.TRANSFORM])
    row = {**todo_row(str(tmp_path / "a.png")), "transform": "crop:0.5+jpeg:30", "slot_seed": 7}
    table = todo_table({name: value for name, value in row.items() if name != "slot_seed"})
    (done,) = Prepare(config=config, schema=columns)(
        table.append_column("slot_seed", pa.array([7], pa.int64()))
    ).to_pylist()  # fmt: skip
    seed = transform_seed(row["image_id"], 7)
    expected = prepare(FILES["large.png"], config, "crop:0.5+jpeg:30", seed)
    assert done["mosaic"] == assemble_mosaics(expected.patches, config, 7)[0].tobytes()
    assert done["thumbnail"] == expected.thumbnail.tobytes()
    assert (done["width"], done["height"], done["transform"]) == (100, 100, "crop:0.5+jpeg:30")
    assert done["content_hash"] == hashlib.sha256(FILES["large.png"]).hexdigest()
    assert transform_seed(row["image_id"], 8) != seed != transform_seed("another", 7)


def test_image_that_is_not_what_its_manifest_says_fails(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES["a.png"])
    right, wrong = hashlib.sha256(FILES["a.png"]).hexdigest(), "0" * 64
    rows = [todo_row(str(tmp_path / "a.png"), expected_hash=digest) for digest in (right, wrong)]
    first, second = Prepare(config=CONFIG, schema=PREPARED)(todo_table(*rows)).to_pylist()
    assert first["status"] == "scored"
    assert (second["status"], second["error_class"]) == ("failed", "ObjectChangedError")


def test_what_was_captioned_under_a_transform_has_an_id_of_its_own() -> None:
    ids = {caption_id(CAPTIONER_ID, "a" * 64, transform) for transform in (None, "jpeg:50", "jpeg:30")}
    assert len(ids) == 3 and caption_id(CAPTIONER_ID, "a" * 64) == f"{CAPTIONER_ID}-{'a' * 16}"
    models = Models()
    row = {"content_hash": "a", "caption": None}
    keys = {models.key({**row, "transform": transform}) for transform in (None, "jpeg:50", "jpeg:30")}
    assert len(keys) == 3


def test_images_in_a_container_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "x.bin.tar").write_bytes(b"12345" + FILES["a.png"] + b"more")
    size = len(FILES["a.png"])
    row = todo_row("x#a", container=str(tmp_path / "x.bin.tar"), position=5, size_bytes=size)
    (done,) = Prepare(config=CONFIG, schema=PREPARED)(todo_table(row)).to_pylist()
    assert done["status"] == "scored" and done["content_hash"] == hashlib.sha256(FILES["a.png"]).hexdigest()


def test_long_table_leaves_in_blocks_as_they_are_done(tmp_path: Path) -> None:
    count = 2 * BLOCK_ROWS + 3
    put(str(tmp_path), {f"{i:03}.png": FILES["a.png"] for i in range(count)})
    table = todo_table(*(todo_row(f"{tmp_path}/{i:03}.png") for i in range(count)))
    stage = Prepare(config=CONFIG, schema=PREPARED, source=str(tmp_path))
    blocks = stage.in_blocks(table)
    first = next(blocks)
    assert set(first.column("status").to_pylist()) == {"scored"}
    for i in range(2 * BLOCK_ROWS, count - 1):
        os.unlink(f"{tmp_path}/{i:03}.png")  # not fetched yet, unlike the next block
    rest = list(blocks)
    assert [block.num_rows for block in (first, *rest)] == [BLOCK_ROWS, BLOCK_ROWS, 3]
    assert pa.concat_tables([first, *rest]).column("uri").equals(table.column("uri"))
    assert set(rest[0].column("status").to_pylist()) == {"scored"}
    assert rest[1].column("status").to_pylist() == ["failed", "failed", "scored"]


def test_block_ends_where_its_files_would_take_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "BYTES_PER_BLOCK", 100)
    monkeypatch.setattr(preparing, "UNKNOWN_BYTES", 40)
    limit = CONFIG.limits.max_bytes
    sizes = [50, 50, 1, 99, 101, None, limit + 1, 100, limit, limit, 3]
    table = todo_table(*(todo_row(f"{tmp_path}/{i}.png", size_bytes=size) for i, size in enumerate(sizes)))
    blocks = list(Prepare(config=CONFIG, schema=PREPARED).in_blocks(table))
    assert [block.num_rows for block in blocks] == [2, 2, 1, 2, 1, 1, 1, 1]
    assert pa.concat_tables(blocks).column("uri").equals(table.column("uri"))


def test_images_are_held_up_to_a_limit_whatever_sizes_a_manifest_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(FILES["a.png"])
    put(str(tmp_path), {f"{i}.png": FILES["a.png"] for i in range(10)})
    rows = todo_table(*(todo_row(f"{tmp_path}/{i}.png", size_bytes=1) for i in range(10)))
    monkeypatch.setattr(outages, "BYTES_AT_ONCE", 3 * size)
    fetcher = outages.Fetcher(max_bytes=CONFIG.limits.max_bytes, source=None, outage_seconds=0.0)
    assert len(fetcher.fetch(rows.to_pylist())) == 4
    monkeypatch.setattr(outages.uris, "is_local", lambda uri: False)  # as from a store: some are under way
    assert 4 <= len(fetcher._fetch_all(rows.to_pylist(), 3 * size)) <= 3 + outages.FETCH_THREADS
    monkeypatch.undo()
    monkeypatch.setattr(outages, "BYTES_AT_ONCE", 3 * size)
    made = Prepare(config=CONFIG, schema=PREPARED)(rows)
    assert made.column("uri").equals(rows.column("uri")) and set(made.column("status").to_pylist()) == {"scored"}


def test_rows_of_a_repeated_task_fall_into_the_same_blocks_whatever_fails(tmp_path: Path) -> None:
    from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption

    count = 8 * BLOCK_ROWS
    put(str(tmp_path), {f"{i:03}.png": FILES["a.png"] for i in range(count)})
    table = todo_table(*(todo_row(f"{tmp_path}/{i:03}.png") for i in range(count)))
    stage = Prepare(config=CONFIG, schema=PREPARED, source=str(tmp_path))

    def rows_of_blocks() -> list[int]:
        buffer = BlockOutputBuffer(OutputBlockSizeOption.of(target_max_block_size=BLOCK_ROWS * pixel_bytes(CONFIG)))
        blocks = []
        for table_of_block in stage.in_blocks(table):
            buffer.add_block(table_of_block)
            while buffer.has_next():
                blocks.append(buffer.next().num_rows)
        buffer.finalize()
        while buffer.has_next():
            blocks.append(buffer.next().num_rows)
        return blocks

    before = rows_of_blocks()
    for i in (*range(8), *range(100, 180)):
        os.unlink(f"{tmp_path}/{i:03}.png")
    assert len(before) > 2 and rows_of_blocks() == before


def test_progress_of_preparing_is_counted(manifest: pa.Table) -> None:
    report = Counts()
    Prepare(config=CONFIG, schema=PREPARED, report=report)(manifest)
    decoded = [name for name, (stage, error) in OUTCOMES.items() if stage != "fetch" and error != "ImageTooLargeError"]
    assert report.total == {
        "prepared": len(OUTCOMES),
        "failed": len(OUTCOMES) - len(GOOD),
        "requests_repeated": 0,
        "fetched_bytes": sum(len(FILES[name]) for name in decoded),
    }
    errors = Counter(error for _, error in OUTCOMES.values() if error)
    assert report.images == {("preparing", ""): len(GOOD)} | {("preparing", error): n for error, n in errors.items()}


@pytest.mark.parametrize("slow", ["fetching", "decoding"])
def test_preparing_reports_how_long_it_waited_for_bytes_and_how_long_it_decoded(
    slow: str, manifest: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, owner = {"fetching": ("fetch", preparing.Fetcher), "decoding": ("_rows", Prepare)}[slow]
    method = getattr(owner, name)

    def sleep_first(*arguments: Any) -> Any:
        time.sleep(0.25)  # fetching starts a moment before it is waited for
        return method(*arguments)

    monkeypatch.setattr(owner, name, sleep_first)
    report, started = Counts(), time.monotonic()
    Prepare(config=CONFIG, schema=PREPARED, report=report)(manifest)
    assert report.seconds[slow] >= 0.2
    assert 0.0 < sum(report.seconds.values()) <= time.monotonic() - started


# Stores that fail.


class Store:
    """Images in a place that can go away and come back."""

    def __init__(self, place: str, leave: Callable[[], None], come_back: Callable[[], None]) -> None:
        self.place, self.leave, self.come_back = place, leave, come_back
        self.table = todo_table(*(todo_row(uri) for uri in self.uris()))
        self.report = Counts()

    def uris(self) -> list[str]:
        return [f"{self.place}/{name}" for name in GOOD]

    def prepare(self, outage_seconds: float, table: pa.Table | None = None) -> list[dict[str, Any]]:
        stage = Prepare(
            config=CONFIG, schema=PREPARED, report=self.report, source=self.place, outage_seconds=outage_seconds
        )
        rows: list[dict[str, Any]] = stage(self.table if table is None else table).to_pylist()
        return rows


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(outages, "OUTAGE_POLL_SECONDS", 0.05)
    images = {name: FILES[name] for name in GOOD}
    if request.param == "disk":
        source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
        put(str(source), images)
        yield Store(str(source), lambda: os.rename(source, elsewhere), lambda: os.rename(elsewhere, source))
        return
    network: FaultyProxy = request.getfixturevalue("proxy")
    yield Store(put(new_bucket() + "/source", images), network.stop, network.start)
    network.stop()
    network.start()


def on_question(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> list[str]:
    """Do something when a stage asks for the n-th time whether a store answers; returns what it asked."""
    asked: list[str] = []
    answers = probes.store_is_up

    def ask(uri: str, source: str | None) -> bool:
        asked.append(uri)
        if len(asked) == number:
            action()
        return answers(uri, source)

    monkeypatch.setattr(probes, "store_is_up", ask)
    return asked


def test_store_that_stays_away_stops_the_run_and_fails_no_image(store: Store) -> None:
    store.leave()
    with pytest.raises(OutageError, match=r"has not answered for 0\.2 s .* run the same command again") as caught:
        store.prepare(0.2)
    assert "\n" not in str(caught.value) and store.place in str(caught.value)
    assert store.report.total == {}
    store.come_back()
    assert {row["status"] for row in store.prepare(0.2)} == {"scored"}
    assert store.report.total == {
        "prepared": len(GOOD), "failed": 0, "requests_repeated": 0, "fetched_bytes": GOOD_BYTES
    }  # fmt: skip


def test_store_that_comes_back_costs_no_image(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.leave()
    asked = on_question(monkeypatch, 3, store.come_back)
    rows = store.prepare(3600.0)
    assert len(asked) == 3
    assert [row["uri"] for row in rows] == store.uris()
    assert [row["content_hash"] for row in rows] == [hashlib.sha256(FILES[name]).hexdigest() for name in GOOD]
    assert {row["status"] for row in rows} == {"scored"} and store.report.total["failed"] == 0


@pytest.mark.parametrize("store", ["disk"], indirect=True)
def test_fetch_ahead_ends_with_its_task(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage would keep its thread for an hour."""
    fetch, leaving = outages.Fetcher.fetch, Event()

    def leave_then_fetch(self: outages.Fetcher, rows: list[dict[str, Any]]) -> Any:
        if rows and rows[0]["uri"] == store.uris()[1]:
            store.leave()
            leaving.set()
        return fetch(self, rows)

    monkeypatch.setattr(preparing, "rows_per_block", lambda image_bytes: 1)
    monkeypatch.setattr(outages, "OUTAGE_POLL_SECONDS", 3600.0)
    monkeypatch.setattr(outages.Fetcher, "fetch", leave_then_fetch)
    before = set(threading.enumerate())
    blocks = Prepare(config=CONFIG, schema=PREPARED, source=store.place, outage_seconds=3600.0).in_blocks(store.table)
    assert next(blocks).column("uri").to_pylist() == store.uris()[:1]
    assert leaving.wait(60.0)
    (ahead,) = set(threading.enumerate()) - before
    blocks.close()
    ahead.join(60.0)
    assert not ahead.is_alive()


def test_store_that_went_away_in_the_middle_costs_no_image(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that came before are not fetched again; those that are really gone are found out afterwards."""
    fetch, fetched, one_thread = fetching.fetch, Counter[str](), ThreadPoolExecutor(1)
    missing = f"{store.place}/missing.png"

    def leave_then_fetch(row: dict[str, Any], *others: Any) -> Any:
        if row["uri"] == store.uris()[2] and not fetched[row["uri"]]:
            store.leave()
        fetched[row["uri"]] += 1
        return fetch(row, *others)

    monkeypatch.setattr(outages, "_threads", lambda: one_thread)
    monkeypatch.setattr(fetching, "fetch", leave_then_fetch)
    on_question(monkeypatch, 2, store.come_back)
    rows = store.prepare(3600.0, pa.concat_tables([store.table, todo_table(todo_row(missing))]))
    assert [row["status"] for row in rows] == ["scored"] * len(GOOD) + ["failed"]
    assert rows[-1]["error_class"] == "ObjectMissingError"
    assert [fetched[uri] for uri in store.uris()] == [1, 1] + [2] * (len(GOOD) - 2)


@pytest.mark.s3
def test_store_that_is_back_before_it_is_asked_costs_no_image(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of as long as a fetch is tried, and no longer."""
    place = put(new_bucket(), {name: FILES[name] for name in GOOD})
    on_question(monkeypatch, 1, proxy.start)
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    stage = Prepare(config=CONFIG, schema=PREPARED, source=place)
    proxy.stop()
    try:
        rows = stage(table).to_pylist()
    finally:
        proxy.stop()
        proxy.start()
    assert [row["error_class"] for row in rows] == [None] * len(GOOD)


def test_missing_image_fails_at_once_where_its_source_is_there(store: Store) -> None:
    table = pa.concat_tables([store.table, todo_table(todo_row(f"{store.place}/missing.png"))])
    rows = store.prepare(0.0, table)  # an outage would end the run without a wait
    assert [row["status"] for row in rows] == ["scored"] * len(GOOD) + ["failed"]
    assert (rows[-1]["error_stage"], rows[-1]["error_class"]) == ("fetch", "ObjectMissingError")
    assert store.report.images == {("preparing", ""): len(GOOD), ("preparing", "ObjectMissingError"): 1}


def test_all_images_missing_fail_where_their_source_holds_others(store: Store) -> None:
    rows = store.prepare(0.0, todo_table(*(todo_row(f"{store.place}/gone/{i}.png") for i in range(20))))
    assert {row["error_class"] for row in rows} == {"ObjectMissingError"} and len(rows) == 20


def test_source_whose_mount_point_is_left_empty_is_an_outage(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(str(source), {name: FILES[name] for name in GOOD})
    table = todo_table(*(todo_row(source / name) for name in GOOD))
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(OutageError):
        Prepare(config=CONFIG, schema=PREPARED, source=str(source), outage_seconds=0.1)(table)


def test_replaced_image_fails_and_the_others_do_not(store: Store) -> None:
    rows = [{**dict.fromkeys(schema.TODO.names), **row} for row in Source(store.place).rows()]
    put(store.place, {"a.png": FILES["e.png"]})
    done = {Path(row["uri"]).name: row for row in store.prepare(0.0, todo_table(*rows))}
    assert sorted(done) == sorted(GOOD)
    failed = {name: row["error_class"] for name, row in done.items() if row["status"] == "failed"}
    assert failed == {"a.png": "ObjectChangedError"}
    assert done["a.png"]["content_hash"] is None


@pytest.mark.s3
def test_denied_image_fails_and_the_others_do_not(proxy: FaultyProxy) -> None:
    place = put(new_bucket(), {name: FILES[name] for name in GOOD})
    proxy.policy = Always(Action("refuse"), wanted="/b.jpg")
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    rows = by_name(Prepare(config=CONFIG, schema=PREPARED, source=place, outage_seconds=0.0)(table))
    failed = {name: row["error_class"] for name, row in rows.items() if row["status"] == "failed"}
    assert failed == {"b.jpg": "ObjectDeniedError"}


@pytest.mark.s3
def test_image_that_was_asked_for_again_says_so(proxy: FaultyProxy) -> None:
    place, report = put(new_bucket(), {name: FILES[name] for name in GOOD}), Counts()
    proxy.policy = Script(Action("slow_down"), Action("slow_down"), wanted="GET " + place.removeprefix("s3:/") + "/b")
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    rows = by_name(Prepare(config=CONFIG, schema=PREPARED, report=report, source=place)(table))
    assert {name: row["requests"] for name, row in rows.items()} == dict.fromkeys(GOOD, 1) | {"b.jpg": 3}
    assert (report.total["requests_repeated"], report.total["failed"]) == (2, 0)


@pytest.mark.s3
def test_all_requests_for_an_image_are_counted_also_those_before_an_outage(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put(new_bucket(), {name: FILES[name] for name in GOOD})
    monkeypatch.setattr(errors, "ATTEMPTS", 2)
    refuse = Action("refuse", status=500, code="InternalError")
    # more than a fetch asks for, fewer than two
    proxy.policy = Script(*[refuse] * 8, wanted="GET " + place.removeprefix("s3:/") + "/b")
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    rows = by_name(Prepare(config=CONFIG, schema=PREPARED, source=place)(table))
    assert rows["b.jpg"]["status"] == "scored"
    assert rows["b.jpg"]["requests"] == proxy.requests("GET " + place.removeprefix("s3:/") + "/b") == 9


@pytest.mark.s3
@pytest.mark.parametrize("ordinary", ["missing", "denied"])
def test_store_that_fails_for_many_and_gives_none_is_away_whatever_else_it_answers(
    ordinary: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(outages.OUTAGE_FAILURES)]
    place = put(new_bucket(), dict.fromkeys([*names, "denied.png"], FILES["a.png"]))
    monkeypatch.setattr(outages, "OUTAGE_POLL_SECONDS", 0.05)
    monkeypatch.setattr(errors, "ATTEMPTS", 1)
    actions = dict.fromkeys(names, Action("refuse", status=500, code="InternalError")) | {
        "denied.png": Action("refuse")
    }
    proxy.policy = lambda request: actions.get(request.path.rpartition("/")[2], PASS)
    table = todo_table(*(todo_row(f"{place}/{name}") for name in [*names, f"{ordinary}.png"]))
    with pytest.raises(OutageError):
        Prepare(config=CONFIG, schema=PREPARED, source=place, outage_seconds=0.1)(table)


@pytest.mark.s3
def test_one_image_that_the_store_cannot_give_fails_and_the_others_do_not(proxy: FaultyProxy) -> None:
    place = put(new_bucket(), {name: FILES[name] for name in GOOD})
    proxy.policy = Always(Action("refuse", status=500, code="InternalError"), wanted="/b.jpg")
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    rows = by_name(Prepare(config=CONFIG, schema=PREPARED, source=place, outage_seconds=0.0)(table))
    failed = {name: row["error_class"] for name, row in rows.items() if row["status"] == "failed"}
    assert failed == {"b.jpg": "FetchError"}
    assert "InternalError" in rows["b.jpg"]["error_message"] and rows["b.jpg"]["requests"] > 1


@pytest.mark.s3
def test_keys_that_expire_for_good_are_an_outage(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    place = put(new_bucket(), {name: FILES[name] for name in GOOD})
    monkeypatch.setattr(outages, "OUTAGE_POLL_SECONDS", 0.05)
    proxy.policy = Always(Action("refuse", status=400, code="ExpiredToken"))
    table = todo_table(*(todo_row(f"{place}/{name}") for name in GOOD))
    with pytest.raises(OutageError):
        Prepare(config=CONFIG, schema=PREPARED, source=place, outage_seconds=0.1)(table)


# Captions that are known.


def with_known(manifest: pa.Table, known: dict[str, tuple[str, str]]) -> pa.Table:
    """The manifest with captions that were published: name -> (caption, content for which)."""
    rows = []
    for row in manifest.to_pylist():
        if (name := Path(row["uri"]).name) in known:
            caption, content = known[name]
            row |= {"known_caption": caption, "known_hash": content, "known_run_id": "earlier"}
        rows.append(row)
    return todo_table(*rows)


def content_of(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def test_known_caption_of_the_same_content_needs_no_thumbnail_and_no_captioner(
    manifest: pa.Table, captioner: Caption, scorer: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: (f"a known caption of {name}", content_of(name)) for name in GOOD}
    prepared = Prepare(config=CONFIG, schema=PREPARED)(with_known(manifest, known))
    assert not any(any(thumbnail or b"") for thumbnail in prepared.column("thumbnail").to_pylist())
    monkeypatch.setattr(Captioner, "load", lambda *_: pytest.fail("the captioner was loaded"))
    stage = Caption(captioner.models, FROZEN.captioner, CAPTIONED, 4, REPORT)
    done = by_name(stage(prepared))
    for name in GOOD:
        assert (done[name]["caption"], done[name]["caption_run_id"]) == (known[name][0], "earlier")
        assert done[name]["caption_id"] == f"{CAPTIONER_ID}-{content_of(name)[:16]}"
        assert done[name]["status"] == "scored"
    assert all(done[name]["caption"] is None for name in OUTCOMES if name not in GOOD)
    scored = by_name(like(scorer)(stage(prepared)))
    assert {name: scored[name]["caption"] for name in GOOD} == {name: known[name][0] for name in GOOD}


def test_known_caption_of_another_content_is_made_anew(
    manifest: pa.Table, captioner: Caption, captioned: pa.Table
) -> None:
    other = "0" * 64
    known = {name: ("of what was there before", other if i % 2 else content_of(name)) for i, name in enumerate(GOOD)}
    prepared = by_name(Prepare(config=CONFIG, schema=PREPARED)(with_known(manifest, known)))
    assert {name: prepared[name]["thumbnail"] is None for name in GOOD} == {
        name: i % 2 == 0 for i, name in enumerate(GOOD)
    }
    stage = like(captioner, captioner=Watched(captioner.captioner, "caption"))
    done = by_name(stage(Prepare(config=CONFIG, schema=PREPARED)(with_known(manifest, known))))
    for i, name in enumerate(GOOD):
        expected = (by_name(captioned)[name]["caption"], "run") if i % 2 else (known[name][0], "earlier")
        assert (done[name]["caption"], done[name]["caption_run_id"]) == expected
    assert stage.captioner.distinct == len(GOOD) // 2


def test_known_caption_does_not_save_an_image_that_cannot_be_read(manifest: pa.Table, captioner: Caption) -> None:
    known = {name: ("known", content_of(name) if name in FILES else "0" * 64) for name in OUTCOMES}
    done = by_name(captioner(Prepare(config=CONFIG, schema=PREPARED)(with_known(manifest, known))))
    outcomes = {name: (row["error_stage"], row["error_class"]) for name, row in done.items()}
    assert outcomes == OUTCOMES
    assert {row["caption"] for name, row in done.items() if name not in GOOD} == {None}


# Contents that repeat, and numbers that must not depend on the neighbours.


def prepared_of(folder: Path, seeds: list[int]) -> pa.Table:
    """Images by these seeds, equal ones where they are equal, under a name of their own each."""
    put(str(folder), {f"{i:03}.png": image_file(seed, "PNG", 60, 50) for i, seed in enumerate(seeds)})
    rows = [todo_row(folder / f"{i:03}.png") for i in range(len(seeds))]
    return Prepare(config=CONFIG, schema=PREPARED)(todo_table(*rows))


SEEDS = [0, 1, 0, 2, 3, 1, 0, 4, 5, 5, 6, 7, 0]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return prepared_of(tmp_path_factory.mktemp("repeated"), SEEDS)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Different images, one after the other."""
    return prepared_of(tmp_path_factory.mktemp("several"), list(range(11)))


NUMBERS = ("caption", "logit", "prob_fake", "verdict", "residual_energy")


def numbers(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in NUMBERS) for row in table.to_pylist()]


def test_models_of_a_process_are_loaded_one_after_the_other(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw their random weights from torch's only generator."""
    loading, found = [], []

    def load(*_: Any, **__: Any) -> Any:
        loading.append(None)
        time.sleep(0.2)
        found.append(len(loading))
        loading.pop()
        raise BundleError("enough")

    for model in (Captioner, Detector):
        monkeypatch.setattr(model, "load", load)
    captioner, scorer = Caption(models, FROZEN.captioner, CAPTIONED, 4, REPORT), Alone(models, 4, REPORT)
    for access in (lambda: captioner.captioner, lambda: scorer.detector):
        with pytest.raises(BundleError, match="enough"):
            access()
    assert found == [1, 1]


def test_content_that_repeats_in_a_table_is_computed_once(
    captioner: Caption, scorer: Score, repeated: pa.Table
) -> None:
    caption, score = watched(captioner, scorer)
    done = score(caption(repeated))
    assert len(caption.captioner.calls) == len(score.detector.calls) == 2  # 8 contents, 4 in a batch
    assert caption.captioner.distinct == score.detector.distinct == len(set(SEEDS)) == 8
    by_seed: dict[int, tuple[Any, ...]] = {}
    for seed, found in zip(SEEDS, numbers(done), strict=True):
        assert by_seed.setdefault(seed, found) == found
    assert len(set(by_seed.values())) == 8
    assert {*done.column("status").to_pylist()} == {"scored"} and len({*done.column("image_id").to_pylist()}) == 13


def test_content_that_repeats_over_tables_is_computed_once(
    captioner: Caption, scorer: Score, repeated: pa.Table
) -> None:
    caption, score = watched(captioner, scorer)
    tables = [score(caption(repeated.slice(i, 3))) for i in range(0, len(SEEDS), 3)]
    assert caption.captioner.distinct == score.detector.distinct == 8
    assert len(caption.captioner.calls) == len(score.detector.calls) == 4  # the last table holds nothing new
    assert numbers(pa.concat_tables(tables)) == numbers(like(scorer)(like(captioner)(repeated)))


def test_verdict_is_of_the_caption_that_its_row_states(scorer: Score, captioned: pa.Table) -> None:
    """Captions that were known may differ for one content: they came from other machines."""
    (row,) = captioned.filter(pa.compute.field("caption").is_valid()).slice(0, 1).to_pylist()
    others = [{**row, "caption": caption} for caption in (row["caption"], "a red boat", "a tower", "a red boat")]
    together = numbers(like(scorer)(pa.Table.from_pylist(others, schema=CAPTIONED)))
    alone = [numbers(like(scorer)(pa.Table.from_pylist([other], schema=CAPTIONED)))[0] for other in others]
    assert together == alone and len(set(alone)) == 3


def test_without_reuse_every_image_is_computed(captioner: Caption, scorer: Score, repeated: pa.Table) -> None:
    models = replace(captioner.models, reuse=False)
    caption, score = watched(captioner, scorer, models=models)
    done = score(caption(repeated))
    assert len(caption.captioner.calls) == len(score.detector.calls) == 4  # 13 images, 4 in a batch
    assert numbers(done) == numbers(like(scorer)(like(captioner)(repeated)))


def test_failure_of_a_content_is_that_of_all_its_images(scorer: Score, captioner: Caption, repeated: pa.Table) -> None:
    score = like(scorer, detector=copy.deepcopy(scorer.detector))
    for parameter in score.detector.network.head.parameters():
        parameter.data.fill_(float("nan"))
    captioned = like(captioner)(repeated)
    for _ in range(2):  # the second time from memory
        done = score(captioned)
        assert done.column("error_class").to_pylist() == ["ScoreError"] * len(SEEDS)


@pytest.mark.parametrize("size", [1, 3, 4, 32])
def test_every_call_of_a_model_has_the_same_number_of_images(
    size: int, captioner: Caption, scorer: Score, prepared: pa.Table, several: pa.Table
) -> None:
    caption, score = watched(captioner, scorer, batch_size=size)
    for table in (prepared, several, several.slice(0, 1), prepared.slice(1, 1)):
        score(caption(table))
    for model in (caption.captioner, score.detector):
        assert model.calls and {len(call) for call in model.calls} == {size}


def test_results_are_the_same_to_the_last_bit_in_any_table(
    captioner: Caption, scorer: Score, several: pa.Table
) -> None:
    count = several.num_rows
    expected = numbers(like(scorer)(like(captioner)(several)))
    assert len(set(expected)) == count
    rng = np.random.default_rng(0)
    for trial in range(12):
        order = rng.permutation(count)
        ends = [0, *sorted(rng.choice(np.arange(1, count), rng.integers(0, 6), replace=False).tolist()), count]
        caption, score = like(captioner), like(scorer)
        for start, end in zip(ends, ends[1:], strict=False):
            chosen = order[start:end]
            found = numbers(score(caption(several.take(chosen))))
            assert found == [expected[i] for i in chosen], (trial, chosen)


def test_result_alone_is_the_same_to_the_last_bit(captioner: Caption, scorer: Score, several: pa.Table) -> None:
    expected = numbers(like(scorer)(like(captioner)(several)))
    for i in range(several.num_rows):
        assert numbers(like(scorer)(like(captioner)(several.slice(i, 1)))) == [expected[i]]


def test_memory_forgets_the_oldest_and_holds_a_whole_batch_meanwhile(
    captioner: Caption, scorer: Score, several: pa.Table
) -> None:
    caption, score = watched(captioner, scorer)
    (scorer,) = score.scorers
    caption.memory, scorer.memory = ResultCache(3), ResultCache(3)
    first = numbers(score(caption(several)))
    assert len(caption.memory._values) == len(scorer.memory._values) == 3
    contents = several.column("content_hash").to_pylist()
    for memory in (caption.memory, scorer.memory):
        assert [key.split()[0] for key in memory._values] == contents[-3:]
    calls = len(caption.captioner.calls)
    assert numbers(score(caption(several.slice(8)))) == first[8:]
    assert len(caption.captioner.calls) == calls  # remembered
    assert numbers(score(caption(several.slice(0, 3)))) == first[:3]
    assert len(caption.captioner.calls) == calls + 1  # forgotten


# Captioning.


def test_captioning_keeps_rows_and_mosaics_and_drops_thumbnails(
    captioner: Caption, prepared: pa.Table, captioned: pa.Table
) -> None:
    assert captioned.schema.equals(CAPTIONED)
    assert names(captioned) == list(OUTCOMES)
    assert captioned.column("mosaic").equals(prepared.column("mosaic"))
    thumbnails = np.stack([prepare(FILES[name], CONFIG).thumbnail for name in GOOD])
    expected = dict(zip(GOOD, captioner.captioner.caption(thumbnails), strict=True))
    assert {name: row["caption"] for name, row in by_name(captioned).items()} == {
        name: expected.get(name) for name in OUTCOMES
    }
    assert len(set(expected.values())) > 1
    assert_failed_rows_are_untouched(prepared, captioned)


def test_caption_says_whose_it_is_and_of_which_content(captioner: Caption, prepared: pa.Table) -> None:
    done = like(captioner, schema=schema.CAPTIONS)(prepared)
    assert done.schema.equals(schema.CAPTIONS)
    for name, row in by_name(done).items():
        if name in GOOD:
            content = hashlib.sha256(FILES[name]).hexdigest()
            assert row["caption_id"] == f"{CAPTIONER_ID}-{content[:16]}" and row["caption_run_id"] == "run"
        else:
            assert row["caption_id"] is row["caption_run_id"] is None


def test_image_without_a_caption_fails_there(captioner: Caption, prepared: pa.Table) -> None:
    stage = like(captioner, captioner=copy.deepcopy(captioner.captioner))
    bias = dict(stage.captioner.model.named_parameters())["text_decoder.cls.predictions.bias"]
    with torch.no_grad():
        bias[3] = 1e5  # the end of the text comes first
    done = by_name(stage(prepared))
    assert list(done) == list(OUTCOMES)
    for name in GOOD:
        assert (done[name]["status"], done[name]["error_stage"], done[name]["error_class"]) == (
            "failed", "caption", "CaptionError"
        )  # fmt: skip
        assert done[name]["width"] is not None and done[name]["caption"] is None


# Text features.


def test_embedding_adds_the_features_of_the_captions(embedder: Embed, captioned: pa.Table) -> None:
    done = embedder(captioned)
    assert done.schema.equals(CAPTIONED.append(schema.TEXT_FEATURES))
    assert done.drop_columns("text_features").equals(captioned)
    rows = by_name(done)
    expected = embedder.features.clip.encode_text([rows[name]["caption"] for name in GOOD]).numpy()
    assert len(np.unique(expected, axis=0)) > 1
    for name, feature in zip(GOOD, expected, strict=True):
        np.testing.assert_allclose(rows[name]["text_features"], feature, atol=1e-5)
    assert all((row["text_features"] is None) == (name not in GOOD) for name, row in rows.items())


# Scoring.


def test_scores_are_those_of_the_detector(scorer: Score, captioned: pa.Table, bundle: Path) -> None:
    done = scorer(captioned)
    assert done.schema.equals(schema.VERDICTS)
    assert names(done) == list(OUTCOMES)
    assert_failed_rows_are_untouched(captioned, done)
    detector, rows = Detector.load(bundle), by_name(done)
    for name, expected in zip(GOOD, detector.predict([FILES[name] for name in GOOD]), strict=True):
        row = rows[name]
        assert row["prob_fake"] == pytest.approx(expected.prob_fake, abs=1e-5)
        assert row["logit"] == pytest.approx(expected.logit, abs=1e-4)
        assert row["residual_energy"] == pytest.approx(expected.residual_energy, abs=1e-5)
        assert (row["verdict"], row["caption"], row["status"]) == (expected.verdict, expected.caption, "scored")
    assert len({round(rows[name]["prob_fake"], 4) for name in GOOD}) == len(GOOD)
    for name, row in rows.items():
        assert (row["detector_id"], row["run_id"]) == (detector.detector_id, "run")
        assert row["threshold"] == detector.calibration.threshold
        if name not in GOOD:
            assert {row[key] for key in ("logit", "prob_fake", "verdict", "residual_energy", "caption")} == {None}


@pytest.mark.parametrize("size", [1, 8, 64])
def test_batch_size_does_not_change_a_verdict(
    size: int, captioner: Caption, prepared: pa.Table, captioned: pa.Table, scorer: Score
) -> None:
    again = like(captioner, batch_size=size)(prepared)
    assert again.equals(captioned)
    one, other = by_name(scorer(captioned)), by_name(like(scorer, batch_size=size)(again))
    for name in GOOD:
        assert one[name]["prob_fake"] == pytest.approx(other[name]["prob_fake"], abs=1e-5)
        assert one[name]["verdict"] == other[name]["verdict"]


def test_table_of_several_pieces_gives_the_same(captioner: Caption, prepared: pa.Table, captioned: pa.Table) -> None:
    pieces = pa.concat_tables([prepared.slice(i, 5) for i in (0, 5, 10)])
    assert like(captioner)(pieces).equals(captioned)
    assert like(captioner)(prepared.slice(2, 6)).equals(captioned.slice(2, 6))


def test_actor_whose_bundle_was_replaced_is_refused(models: Models, scorer: Score) -> None:
    same = Alone(replace(models, detector_id=scorer.detector.detector_id), 4, REPORT)
    assert "detector" not in vars(same.scorers[0])  # of errors in `__init__` Ray passes on the text alone
    assert same.detector
    with pytest.raises(BundleError, match="was replaced during the run"):
        Alone(replace(models, detector_id="another"), 4, REPORT).detector  # noqa: B018


def test_logit_that_is_no_number_fails_there(scorer: Score, captioned: pa.Table) -> None:
    stage = like(scorer, detector=copy.deepcopy(scorer.detector))
    for parameter in stage.detector.network.head.parameters():
        parameter.data.fill_(float("nan"))
    done = stage(captioned)
    assert done.schema.equals(schema.VERDICTS)
    rows = by_name(done)
    for name in GOOD:
        assert (rows[name]["error_stage"], rows[name]["error_class"]) == ("score", "ScoreError")
        assert rows[name]["status"] == "failed" and rows[name]["logit"] is rows[name]["verdict"] is None
        assert rows[name]["caption"] == by_name(captioned)[name]["caption"]
    assert_failed_rows_are_untouched(captioned, done)


# Nothing to do.


@pytest.mark.parametrize("empty", [False, True])
def test_stages_without_a_living_row_still_give_their_tables(
    empty: bool, manifest: pa.Table, all_failed: pa.Table, captioner: Caption, embedder: Embed, scorer: Score
) -> None:
    table = Prepare(config=CONFIG, schema=PREPARED)(manifest.slice(0, 0)) if empty else all_failed
    assert table.schema.equals(PREPARED) and set(table.column("status").to_pylist()) <= {"failed"}
    described = captioner(table)
    assert described.schema.equals(CAPTIONED)
    assert embedder(described).schema.equals(CAPTIONED.append(schema.TEXT_FEATURES))
    done = scorer(described)
    assert done.schema.equals(schema.VERDICTS)
    assert table.num_rows == described.num_rows == done.num_rows == (0 if empty else len(OUTCOMES))
    expected = {"ObjectMissingError", "ImageTooLargeError"}
    assert set(done.column("error_class").to_pylist()) == (set() if empty else expected)


def test_message_of_any_length_fits(manifest: pa.Table) -> None:
    row = manifest.to_pylist()[0]
    long = rows.failed(row, FetchError("x" * 5000))
    assert (long["status"], long["error_stage"], len(long["error_message"])) == ("failed", "fetch", 1000)
    assert row.get("status") is None  # the given row is left as it is
