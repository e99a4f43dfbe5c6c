"""The stages, called as Ray calls them: a row for every row, in order, and what has failed stays as it is."""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import schema, stages
from jobs.stages import Caption, Embed, Models, Prepare, Score, StageReport
from nsnet.detector import Detector
from nsnet.images import DecodeLimits
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig, prepare
from tests.models import FROZEN
from tests.tables import manifest_row, manifest_table, one_thread, picture_file, put, save_bundle

REPORT = StageReport()
LIMITS = DecodeLimits(max_bytes=20_000, max_seconds=20.0)
CONFIG = PreparationConfig(thumbnail_px=64, patches=FROZEN.patches, limits=LIMITS)
COLUMNS = [*schema.SOURCE, *schema.PICTURE, *schema.OUTCOME, *schema.LABELS]
MOSAIC, PATCHES, THUMBNAIL = (pa.field(name, pa.binary()) for name in ("mosaic", "patches", "thumbnail"))
PREPARED = pa.schema([*COLUMNS, MOSAIC, THUMBNAIL])
CAPTIONED = pa.schema([*COLUMNS, MOSAIC])
PIXELS = {"mosaic", "patches", "thumbnail"}

FILES = {
    "a.png": picture_file(1),
    "text.jpg": b"no picture",
    "b.jpg": picture_file(2, "JPEG", 90, 70),
    "cut.png": picture_file(3, "PNG", 80, 80)[:3000],
    "empty.png": b"",
    "large.png": picture_file(4, "PNG", 100, 100),
    "c.webp": picture_file(5, "WEBP"),
    "d.gif": picture_file(6, "GIF"),
    "large with unknown size.png": picture_file(4, "PNG", 100, 100),
    "e.png": picture_file(7, "PNG", 10, 10),
}
OUTCOMES: dict[str, tuple[str | None, str | None]] = {
    "a.png": (None, None), "text.jpg": ("decode", "ImageUnidentifiedError"), "b.jpg": (None, None),
    "cut.png": ("decode", "ImageCorruptError"), "empty.png": ("decode", "ImageEmptyError"),
    "large.png": ("decode", "ImageTooLargeError"), "c.webp": (None, None), "d.gif": (None, None),
    "large with unknown size.png": ("decode", "ImageTooLargeError"), "e.png": (None, None),
    "missing.png": ("fetch", "FetchError"), "folder": ("fetch", "FetchError"),
}  # fmt: skip
GOOD = [name for name, outcome in OUTCOMES.items() if outcome == (None, None)]


@pytest.fixture(scope="module", autouse=True)
def decoders() -> Iterator[None]:
    """The decoding children end with this module."""
    with one_thread():
        yield
    stages._decoder(CONFIG).close()
    stages._decoder.cache_clear()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("pictures")
    put(str(folder), FILES)
    (folder / "folder").mkdir()
    rows = []
    for i, name in enumerate(OUTCOMES):
        size = len(FILES[name]) if name in FILES and "unknown" not in name else None
        rows.append(manifest_row(folder / name, etag=f"v{i}", size_bytes=size, label=i % 2, generator=f"g{i}"))
    return manifest_table(*rows)


@pytest.fixture(scope="module")
def prepared(manifest: pa.Table) -> pa.Table:
    return Prepare(config=CONFIG, schema=PREPARED)(manifest)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def models(bundle: Path) -> Models:
    return Models(detector=str(bundle), threads=1)


@pytest.fixture(scope="module")
def captioner(models: Models) -> Caption:
    return Caption(models, FROZEN.captioner, CAPTIONED, 4, REPORT)


@pytest.fixture(scope="module")
def captioned(captioner: Caption, prepared: pa.Table) -> pa.Table:
    return captioner(prepared)


@pytest.fixture(scope="module")
def scorer(models: Models) -> Score:
    return Score(models, "run", 4, REPORT)


@pytest.fixture(scope="module")
def embedder(models: Models) -> Embed:
    return Embed(models, FROZEN.clip, CAPTIONED.append(schema.text_features()), 4, REPORT)


@pytest.fixture(scope="module")
def all_failed(manifest: pa.Table) -> pa.Table:
    """What is prepared of pictures that are not there."""
    rows = [{**row, "uri": row["uri"] + ".absent"} for row in manifest.to_pylist()]
    return Prepare(config=CONFIG, schema=PREPARED)(manifest_table(*rows))


def names(table: pa.Table) -> list[str]:
    return [Path(uri).name for uri in table.column("uri").to_pylist()]


def by_name(table: pa.Table) -> dict[str, dict[str, Any]]:
    return dict(zip(names(table), table.to_pylist(), strict=True))


def like(stage: Any, **changes: Any) -> Any:
    """A stage that shares its models with another; loading them takes a second."""
    other = copy.copy(stage)
    vars(other).update(changes)
    return other


def assert_failed_rows_are_untouched(before: pa.Table, after: pa.Table) -> None:
    kept = [name for name in before.column_names if name in after.column_names and name not in PIXELS]
    assert len(kept) >= len(COLUMNS)
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
        assert (row["mosaic"] is not None) == (row["thumbnail"] is not None) == (name in GOOD)
        assert (row["error_message"] is None) == (name in GOOD)
        assert row["error_message"] is None or "\n" not in row["error_message"]


def test_prepared_pixels_and_facts_are_those_of_the_picture(prepared: pa.Table) -> None:
    rows = by_name(prepared)
    for name in GOOD:
        expected, row = prepare(FILES[name], CONFIG), rows[name]
        assert row["mosaic"] == assemble_mosaic(expected.patches, SCORING_SEED).tobytes()
        assert row["thumbnail"] == expected.thumbnail.tobytes()
        facts = (expected.width, expected.height, expected.format, expected.frames)
        assert (row["width"], row["height"], row["format"], row["frames"]) == facts
        assert row["size_bytes"] == len(FILES[name])


def test_hash_is_of_the_whole_file_or_is_not_given(prepared: pa.Table) -> None:
    for name, row in by_name(prepared).items():
        whole = name in FILES and not name.startswith("large")
        assert row["content_hash"] == (hashlib.sha256(FILES[name]).hexdigest() if whole else None)
    assert by_name(prepared)["large with unknown size.png"]["size_bytes"] is None
    assert by_name(prepared)["large.png"]["size_bytes"] == len(FILES["large.png"])


def test_patches_are_kept_in_rank_order_where_they_are_asked_for(manifest: pa.Table) -> None:
    wanted = pa.schema([*COLUMNS, PATCHES, THUMBNAIL])
    rows = by_name(Prepare(config=CONFIG, schema=wanted)(manifest))
    for name in GOOD:
        assert rows[name]["patches"] == prepare(FILES[name], CONFIG).patches.tobytes()


def test_pictures_in_a_container_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "x.bin.tar").write_bytes(b"12345" + FILES["a.png"] + b"more")
    size = len(FILES["a.png"])
    row = manifest_row("x#a", container=str(tmp_path / "x.bin.tar"), position=5, size_bytes=size)
    (done,) = Prepare(config=CONFIG, schema=PREPARED)(manifest_table(row)).to_pylist()
    assert done["status"] == "scored" and done["content_hash"] == hashlib.sha256(FILES["a.png"]).hexdigest()


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


def test_captions_for_publishing_say_whose_they_are(captioner: Caption, prepared: pa.Table) -> None:
    done = like(captioner, schema=schema.CAPTIONS)(prepared)
    assert done.schema.equals(schema.CAPTIONS)
    assert set(done.column("captioner_id").to_pylist()) == {captioner.captioner_id} != {""}


def test_picture_without_a_caption_fails_there(captioner: Caption, prepared: pa.Table) -> None:
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
    assert done.schema.equals(CAPTIONED.append(schema.text_features()))
    assert done.drop_columns("text_features").equals(captioned)
    rows = by_name(done)
    expected = embedder.clip.encode_text([rows[name]["caption"] for name in GOOD]).numpy()
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


def test_tables_in_pieces_give_the_same(captioner: Caption, prepared: pa.Table, captioned: pa.Table) -> None:
    pieces = pa.concat_tables([prepared.slice(i, 5) for i in (0, 5, 10)])
    assert captioner(pieces).equals(captioned)
    assert captioner(prepared.slice(2, 6)).equals(captioned.slice(2, 6))


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
    assert embedder(described).schema.equals(CAPTIONED.append(schema.text_features()))
    done = scorer(described)
    assert done.schema.equals(schema.VERDICTS)
    assert table.num_rows == described.num_rows == done.num_rows == (0 if empty else len(OUTCOMES))
    assert set(done.column("error_class").to_pylist()) == (set() if empty else {"FetchError", "ImageTooLargeError"})


def test_message_of_any_length_fits(manifest: pa.Table) -> None:
    row = manifest.to_pylist()[0]
    long = stages.failed(row, stages.FetchError("x" * 5000))
    assert (long["status"], long["error_stage"], len(long["error_message"])) == ("failed", "fetch", 1000)
    assert row.get("status") is None  # the given row is left as it is
