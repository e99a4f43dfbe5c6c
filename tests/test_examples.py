"""Training examples: every picture once per epoch for any number of workers, and mosaics that are pure functions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from jobs import schema
from jobs.examples import Examples, epoch_rows, is_validation, load, part_of, read_labels, steps_per_epoch
from nsnet.patches import SCORING_SEED, PatchConfig, assemble_mosaic

PATCHES = PatchConfig(patch_px=8, mosaic_px=32)
SHAPE = (16, 8, 8, 3)
FEATURES = 6
COUNT = 23
SCHEMA = pa.schema(
    [
        *schema.SOURCE, *schema.PICTURE, *schema.OUTCOME, *schema.LABELS, schema.MANIFEST.field("split"),
        pa.field("patches", pa.binary()), schema.text_features(),
    ]
)  # fmt: skip


def epoch(rows: NDArray[np.int64], world_size: int, **options: Any) -> list[list[tuple[list[int], list[bool]]]]:
    """Steps of an epoch -> workers -> (rows, valid)."""
    settings = {"batch_size": 7, "seed": 0, "epoch": 0} | options
    workers = [list(epoch_rows(rows, rank=rank, world_size=world_size, **settings)) for rank in range(world_size)]
    assert len({len(worker) for worker in workers}) == 1  # every worker takes part in every step
    return [[(part.tolist(), valid.tolist()) for part, valid in step] for step in zip(*workers, strict=True)]


def used(step: list[tuple[list[int], list[bool]]]) -> list[int]:
    """The rows of a step that count, over all workers."""
    return [row for part, valid in step for row, counts in zip(part, valid, strict=True) if counts]


# Order and parts.


@pytest.mark.parametrize("count", [1, 2, 7, 40, 101])
@pytest.mark.parametrize("batch_size", [2, 7, 16, 64, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_epoch_uses_every_row_once_in_equal_parts(count: int, batch_size: int, world_size: int) -> None:
    rows = np.random.default_rng(count).permutation(1000)[:count]
    steps = epoch(rows, world_size, batch_size=batch_size)
    assert sorted(row for step in steps for row in used(step)) == sorted(rows.tolist())
    assert len(steps) == steps_per_epoch(count, batch_size) == int(np.ceil(count / batch_size))
    for i, step in enumerate(steps):
        sizes = {len(part) for part, _ in step} | {len(valid) for _, valid in step}
        expected = min(batch_size, count - i * batch_size)
        assert sizes == {int(np.ceil(expected / world_size))}
        assert len(used(step)) == expected
        assert all(row in rows for part, _ in step for row in part)  # padding can be loaded, too


def test_batch_of_a_step_does_not_depend_on_the_number_of_workers() -> None:
    rows = np.arange(101)
    alone = [used(step) for step in epoch(rows, 1)]
    for world_size in (2, 3, 4, 7, 16):
        assert [used(step) for step in epoch(rows, world_size)] == alone


def test_order_differs_between_epochs_and_seeds_and_is_repeatable() -> None:
    rows = np.arange(100)
    orders = [
        [row for step in epoch(rows, 2, seed=seed, epoch=number) for row in used(step)]
        for seed in range(3)
        for number in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9
    assert orders[0] == [row for step in epoch(rows, 2) for row in used(step)]
    moved = [sum(one == other for one, other in zip(orders[0], order, strict=True)) for order in orders[1:]]
    assert max(moved) < 10  # it is a shuffle, not a rotation of a few


def test_part_of_fewer_rows_than_workers_is_padding() -> None:
    parts = [part_of(np.array([5, 6]), rank, 4) for rank in range(4)]
    assert [(part.tolist(), valid.tolist()) for part, valid in parts] == [
        ([5], [True]), ([6], [True]), ([5], [False]), ([5], [False])
    ]  # fmt: skip


# Validation.


def test_validation_takes_its_share_by_content() -> None:
    hashes = [f"{i:064x}" for i in range(4000)]
    for share in (0.05, 0.15, 0.5):
        chosen = [is_validation(name, 0, share) for name in hashes]
        assert abs(np.mean(chosen) - share) < 4 * np.sqrt(share * (1 - share) / 4000)
        assert chosen == [is_validation(name, 0, share) for name in hashes]
    smaller, larger = ({name for name in hashes if is_validation(name, 0, share)} for share in (0.05, 0.15))
    assert smaller < larger
    assert {name for name in hashes if is_validation(name, 1, 0.15)} != larger
    assert not any(is_validation(name, 0, 0.0) for name in hashes) and all(is_validation(n, 0, 1.0) for n in hashes)


# From Parquet.


def example(i: int, **values: Any) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    return {
        "image_id": f"{(i * 7) % COUNT:032x}",
        "uri": f"/{i}",
        "status": "scored",
        "content_hash": f"{i}",
        "label": i % 2,
        "patches": rng.integers(0, 256, SHAPE, dtype=np.uint8).tobytes(),
        "text_features": rng.normal(size=FEATURES).astype(np.float32).tolist(),
        **values,
    }


BAD = {"status": "failed", "error_stage": "decode", "error_class": "E", "error_message": "m"}
ROWS = [
    *(example(i) for i in range(COUNT)),
    example(100, image_id="00bad", patches=None, text_features=None, **BAD),
    example(101, image_id="00test", split="test"),
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Examples in three files of several row groups, bad ones among them."""
    (tmp_path / "examples" / "b").mkdir(parents=True)
    order = np.random.default_rng(3).permutation(len(ROWS))
    for name, part in zip(("b/2.parquet", "1.parquet", "b/1.parquet"), np.array_split(order, 3), strict=True):
        table = pa.Table.from_pylist([ROWS[i] for i in part], schema=SCHEMA)
        pq.write_table(table, tmp_path / "examples" / name, row_group_size=3)
    (tmp_path / "examples" / "notes.txt").write_text("no examples")
    return str(tmp_path / "examples")


@pytest.fixture
def data(folder: str, tmp_path: Path) -> Examples:
    return load(folder, {f"{i:032x}" for i in (2, 3, 11)}, PATCHES, tmp_path / "cache", write=True)


def original(data: Examples, row: int) -> dict[str, Any]:
    return next(row_ for row_ in ROWS if row_["image_id"] == data.image_ids[row])


def test_examples_are_those_of_the_files_in_the_order_of_their_ids(data: Examples) -> None:
    assert data.image_ids == [f"{i:032x}" for i in range(COUNT)]
    for i in range(COUNT):
        row = original(data, i)
        assert data.labels[i] == row["label"]
        np.testing.assert_array_equal(data.text_features[i], np.float32(row["text_features"]))
        assert data.patches[data.place[i]].tobytes() == row["patches"]
    assert np.flatnonzero(data.validation).tolist() == [2, 3, 11]
    assert data.labels.dtype == np.int64 and data.text_features.dtype == np.float32


def test_failed_examples_and_those_for_testing_are_left_out(data: Examples) -> None:
    assert len(data.labels) == len(data.patches) == len(data.place) == COUNT
    assert "00bad" not in data.image_ids and "00test" not in data.image_ids


def test_process_that_does_not_write_sees_the_same(data: Examples, folder: str, tmp_path: Path) -> None:
    before = (tmp_path / "cache").stat()
    other = load(folder, {f"{i:032x}" for i in (2, 3, 11)}, PATCHES, tmp_path / "cache", write=False)
    after = (tmp_path / "cache").stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    for name, value in vars(data).items():
        np.testing.assert_array_equal(getattr(other, name), value, err_msg=name)


def test_patches_stay_readable_when_the_file_loses_its_name(data: Examples, tmp_path: Path) -> None:
    (tmp_path / "cache").unlink()
    assert data.patches[data.place[5]].tobytes() == original(data, 5)["patches"]


def test_light_columns_hold_all_rows(folder: str) -> None:
    rows = read_labels(folder)
    assert sorted(row["image_id"] for row in rows) == sorted(row["image_id"] for row in ROWS)
    assert {row["image_id"]: row["error_class"] for row in rows if row["status"] == "failed"} == {"00bad": "E"}
    assert "patches" not in rows[0]


def mosaics(data: Examples, shuffle: str | None) -> NDArray[np.uint8]:
    rows = np.arange(COUNT)
    return data.batch(rows, rows >= 0, shuffle).mosaics.numpy()


def test_batch_holds_the_asked_rows(data: Examples) -> None:
    rows, valid = np.array([4, 0, 4, 22]), np.array([True, True, True, False])
    batch = data.batch(rows, valid, "0/0")
    assert batch.mosaics.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(batch.labels.numpy(), data.labels[rows])
    np.testing.assert_array_equal(batch.text_features.numpy(), data.text_features[rows])
    np.testing.assert_array_equal(batch.valid.numpy(), valid)
    np.testing.assert_array_equal(batch.mosaics[0].numpy(), batch.mosaics[2].numpy())
    np.testing.assert_array_equal(batch.mosaics.numpy(), mosaics(data, "0/0")[rows])


def test_mosaics_without_a_shuffle_are_those_of_scoring(data: Examples) -> None:
    for i, mosaic in enumerate(mosaics(data, None)):
        patches = np.frombuffer(original(data, i)["patches"], np.uint8).reshape(SHAPE)
        np.testing.assert_array_equal(mosaic, assemble_mosaic(patches, SCORING_SEED))


def slots(patches: NDArray[np.uint8], mosaic: NDArray[np.uint8]) -> list[int]:
    """Which patch lies in each slot."""
    cut = mosaic.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(SHAPE)
    return [int(np.flatnonzero((patches == patch).all(axis=(1, 2, 3)))[0]) for patch in cut]


def test_slots_are_shuffled_anew_for_each_picture_and_epoch(data: Examples) -> None:
    orders = [
        tuple(slots(data.patches[data.place[i]], mosaic))
        for shuffle in ("0/0", "0/1", "1/0")
        for i, mosaic in enumerate(mosaics(data, shuffle))
    ]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(set(orders)) == len(orders) == 3 * COUNT
    np.testing.assert_array_equal(mosaics(data, "0/0"), mosaics(data, "0/0"))
