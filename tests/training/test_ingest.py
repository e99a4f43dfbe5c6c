"""Which images each process is given in each step, and that they arrive so."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import schema
from jobs.dataset.schema import SPLIT
from jobs.pipeline.preparing import transform_seed
from jobs.training import examples
from jobs.training.examples import Examples
from jobs.training.ingest import FETCHED, Arrival, Ingest
from jobs.training.order import Order, image_seed
from nsnet import transforms
from nsnet.errors import SourceError
from nsnet.patches import SCORING_SEED, PatchConfig
from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
from nsnet.transforms import AugmentationConfig
from tests.support.tables import image_file, manifest_row

COUNTS = [(20, 8), (7, 8), (8, 8), (1, 2), (33, 4)]
CONFIG = PreparationConfig(patches=(PatchConfig(patch_px=32, mosaic_px=64),))


def order(count: int, batch_size: int, rank: int = 0, world_size: int = 1, **values: Any) -> Order:
    rows = 3 * np.arange(count) + 1
    return Order(rows=rows, batch_size=batch_size, rank=rank, world_size=world_size, **({"seed": 5} | values))


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), COUNTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_image_is_used_once_in_every_epoch(count: int, batch_size: int, world_size: int) -> None:
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            one = order(count, batch_size, rank, world_size)
            for step in range(epoch * one.steps_per_epoch, (epoch + 1) * one.steps_per_epoch):
                assert one.epoch(step) == epoch
                rows, valid = one.part(step)
                seen.update(rows[valid].tolist())
        assert seen == Counter(order(count, batch_size).rows.tolist())


@pytest.mark.parametrize(("count", "batch_size"), COUNTS)
def test_step_does_not_depend_on_the_number_of_processes(count: int, batch_size: int) -> None:
    for step in range(2 * order(count, batch_size).steps_per_epoch):
        whole = order(count, batch_size).whole(step).tolist()
        for world_size in (1, 2, 4):
            parts = [order(count, batch_size, rank, world_size).part(step) for rank in range(world_size)]
            assert len({len(rows) for rows, _ in parts}) == 1  # equal sizes, as gathering needs
            assert [row for rows, valid in parts for row in rows[valid].tolist()] == whole
            padding = {row for rows, valid in parts for row in rows[~valid].tolist()}
            assert padding <= {whole[0]}


def test_order_is_of_seed_and_epoch_and_nothing_else() -> None:
    def steps(seed: int, epoch: int) -> list[int]:
        one = order(40, 8, seed=seed)
        return [row for step in range(5) for row in one.whole(5 * epoch + step).tolist()]

    assert steps(1, 0) == steps(1, 0)
    assert len({tuple(steps(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_order_that_is_not_shuffled_is_that_of_the_rows() -> None:
    one = order(10, 4, shuffled=False)
    assert [row for step in range(3) for row in one.whole(step).tolist()] == one.rows.tolist()


def test_seed_of_an_image_is_of_seed_epoch_and_image() -> None:
    seeds = {image_seed(*key) for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)


# --- what arrives ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, one of them damaged, one that is not there."""
    place = tmp_path_factory.mktemp("ingest")
    for i in range(9):
        (place / f"{i}.png").write_bytes(image_file(i, "PNG", 90 + i, 80))
    (place / "4.png").write_bytes(b"no image")
    return place


@pytest.fixture(scope="module")
def split(folder: Path) -> Examples:
    rows = [
        {**dict.fromkeys(SPLIT.names), **manifest_row(folder / f"{i}.png", label=i % 2, split="train"), "group": i}
        for i in range(10)
    ]
    table = pa.Table.from_pylist(rows, schema=SPLIT).sort_by("image_id")
    return Examples(table=table)


def ingest(split: Examples, folder: Path, augmentation: AugmentationConfig | None = None) -> Ingest:
    return Ingest(
        examples=split, preparation=CONFIG, source=str(folder), seed=5, task_cpus=0.5, cpus=1.0,
        augmentation=augmentation or AugmentationConfig(), memory_bytes=2**28,
    )  # fmt: skip


def expected_mosaic(split: Examples, row: int, slot_seed: int, chain: str = "") -> Any:
    record = split.table.slice(row, 1).to_pylist()[0]
    done = prepare(Path(record["uri"]).read_bytes(), CONFIG, chain, transform_seed(record["image_id"], slot_seed))
    return assemble_mosaics(done.patches, CONFIG, slot_seed)[0]


def check(arrival: Arrival, split: Examples, seeds: dict[int, int], chains: dict[int, str]) -> None:
    """Good images are what preparing them here gives; bad ones are not valid and named once."""
    for at, row in enumerate(arrival.rows.tolist()):
        if arrival.valid[at]:
            expected = expected_mosaic(split, row, seeds[row], chains[row])
            np.testing.assert_array_equal(arrival.mosaics[at], expected)
        else:
            assert not arrival.mosaics[at].any() or row == arrival.rows[0]


def test_steps_arrive_in_order_from_any_step_on(cluster: None, split: Examples, folder: Path) -> None:
    augmentation = AugmentationConfig(jpeg_share=0.5, crop_share=0.5)
    one = Order(rows=np.arange(10), batch_size=4, seed=5, rank=1, world_size=2)
    arrivals = list(ingest(split, folder, augmentation).stream(one, 2, 7))  # from inside an epoch into a third one
    assert len(arrivals) == 5
    for step, arrival in enumerate(arrivals, start=2):
        rows, valid = one.part(step)
        assert arrival.rows.tolist() == rows.tolist()
        seeds = {row: image_seed(5, one.epoch(step), split.image_ids[row]) for row in rows.tolist()}
        chains = {row: transforms.to_text(transforms.draw(augmentation, seed)) for row, seed in seeds.items()}
        check(arrival, split, seeds, chains)
        bad = {row for row, counts in zip(rows.tolist(), valid, strict=True) if counts and is_bad(split, row)}
        assert {row["image_id"] for row in arrival.failed} == {split.image_ids[row] for row in bad}
        assert {row["error_class"] for row in arrival.failed} <= {"ImageUnidentifiedError", "ObjectMissingError"}

    fixed = Order(rows=np.arange(10), batch_size=4, seed=5, rank=0, world_size=1, shuffled=False)
    arrivals = list(ingest(split, folder, augmentation).stream(fixed, 0, fixed.steps_per_epoch))
    assert sum(len(arrival.failed) for arrival in arrivals) == 2
    for arrival in arrivals:  # as for scoring: not augmented, in scoring's order
        check(arrival, split, dict.fromkeys(range(10), SCORING_SEED), dict.fromkeys(range(10), ""))
    assert list(ingest(split, folder).stream(fixed, 3, 3)) == []


def is_bad(split: Examples, row: int) -> bool:
    return split.table.column("uri")[row].as_py().endswith(("/4.png", "/9.png"))


# --- examples --------------------------------------------------------------------------------------------------------


def test_split_survives_storage(split: Examples, tmp_path: Path) -> None:
    examples.write_split(split.table, str(tmp_path / "split.parquet"))
    assert examples.read_split(str(tmp_path / "split.parquet")) == split.table
    assert split.image_ids == sorted(split.image_ids)
    assert split.rows("train").tolist() == list(range(10)) and split.rows("val").tolist() == []


def test_split_that_is_none_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"uri": ["a"]}), other)
    (tmp_path / "text.parquet").write_bytes(b"no Parquet")
    for uri in (other, tmp_path / "text.parquet", tmp_path / "nothing.parquet"):
        with pytest.raises(SourceError, match=uri.name):
            examples.read_split(str(uri))


def test_columns_that_images_are_fetched_by_are_in_a_split() -> None:
    assert set(FETCHED) <= set(SPLIT.names) and set(FETCHED) <= set(schema.MANIFEST.names)
