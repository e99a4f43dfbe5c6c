"""Splits: disjoint, stratified, stored, used again; captions that training reads."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.dataset import schema
from jobs.experiments import split
from jobs.experiments.split import KNOWN_IMAGES, Split, SplitConfig, describe, make, reuse
from jobs.runs.products import CAPTIONS, FACTS, Product
from jobs.runs.publication import Run
from jobs.storage import parquet
from jobs.training import examples
from nsnet.errors import ConfigError, SourceError
from tests.support.tables import batches, manifest_row

GENERATORS = ("progan", "sdv1.4", "dalle")


def listed(count: int = 60, **columns: list[Any]) -> pa.Table:
    """Images of three generators, real and fake, each of a content of its own and of no visible likeness."""
    rows = []
    for i in range(count):
        row = {
            **dict.fromkeys(KNOWN_IMAGES.names),
            **manifest_row(f"/p/{i:04d}.png", label=i % 2, generator=GENERATORS[i // 2 % 3]),
            "content_hash": f"{i:064x}", "perceptual_hash": None, "status": "scored",
        }  # fmt: skip
        rows.append(row | {name: values[i] for name, values in columns.items()})
    return pa.Table.from_pylist(rows, schema=KNOWN_IMAGES).sort_by("image_id")


def by_uri(found: Split | pa.Table) -> dict[str, dict[str, Any]]:
    table = found.table if isinstance(found, Split) else found
    return {row["uri"]: row for row in table.to_pylist()}


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_pool_is_split_in_three_with_every_generator_and_class_in_each() -> None:
    found = make(listed(120), SplitConfig(validation_share=0.2, test_share=0.2))
    sizes = Counter(row["split"] for row in by_uri(found).values())
    assert sizes == {"train": 72, "val": 24, "test": 24}
    assert found.counts()["val"] == dict.fromkeys(sorted(GENERATORS), [4, 4])
    assert all(row["expected_hash"] == row["content_hash"] for row in by_uri(found).values())
    assert found.leaking == 0 and found.unreadable == []


def test_what_stands_beside_a_given_training_set_is_used_for_nothing() -> None:
    given = [["train", None, "test"][i % 3] for i in range(120)]
    found = make(listed(120, split=given), SplitConfig(validation_share=0.2))
    rows = by_uri(found)
    assert {rows[f"/p/{i:04d}.png"]["split"] for i in range(120) if given[i] is None} == {None}
    assert sum(row["split"] == "val" for row in rows.values()) == 8
    assert "40 unused" in describe(found)[0]
    # without a training set they are what there is for it
    given = [None if name == "train" else name for name in given]
    rows = by_uri(make(listed(120, split=given), SplitConfig(validation_share=0.2)))
    assert Counter(row["split"] for row in rows.values()) == {"train": 64, "val": 16, "test": 40}


def test_copy_of_a_given_test_image_is_not_drawn_for_training() -> None:
    given = ["test" if i < 40 else None for i in range(120)]
    contents = [f"{i if i < 60 else i - 60:064x}" for i in range(120)]  # 60 to 99 are copies of the test's
    rows = by_uri(make(listed(120, split=given, content_hash=contents), SplitConfig()))
    assert {rows[f"/p/{i:04d}.png"]["split"] for i in range(60, 100)} == {None}
    assert {rows[f"/p/{i:04d}.png"]["split"] for i in range(40, 60)} == {"train", "val"}


def test_left_out_generator_is_the_whole_test() -> None:
    rows = by_uri(make(listed(120), SplitConfig(leave_out=GENERATORS[0], test_share=0.3))).values()
    assert {row["generator"] for row in rows if row["split"] == "test"} == {GENERATORS[0]}
    assert sum(row["split"] == "test" for row in rows) == 40


def test_copies_and_near_duplicates_stay_together() -> None:
    contents = [f"{i - i % 4:064x}" for i in range(60)]  # two reals and two fakes share a content
    hashes = [None if i < 40 else f"{i // 5:016x}" for i in range(60)]
    for seed in range(5):
        found = make(listed(60, content_hash=contents, perceptual_hash=hashes), SplitConfig(seed=seed, test_share=0.3))
        rows = by_uri(found).values()
        for key in ("content_hash", "group"):
            places: dict[Any, set[str]] = {}
            for row in rows:
                places.setdefault(row[key], set()).add(row["split"])
            assert all(len(names) == 1 for names in places.values())
        assert len({row["group"] for row in rows}) < 15 and found.leaking == 0


def test_split_is_of_the_seed_and_not_of_the_order() -> None:
    table = listed(60)
    first = make(table, SplitConfig(seed=1))
    shuffled = table.take(np.random.default_rng(0).permutation(60))
    names = {uri: row["split"] for uri, row in by_uri(first).items()}
    assert {uri: row["split"] for uri, row in by_uri(make(shuffled, SplitConfig(seed=1))).items()} == names
    assert {uri: row["split"] for uri, row in by_uri(make(table, SplitConfig(seed=2))).items()} != names


# --- what is given ---------------------------------------------------------------------------------------------------


def test_splits_of_the_source_are_kept() -> None:
    given = [("train", "train", "val", "test")[i // 6 % 4] for i in range(60)]
    found = by_uri(make(listed(60, split=given), SplitConfig()))
    assert [found[f"/p/{i:04d}.png"]["split"] for i in range(60)] == given


def test_what_a_source_lacks_is_drawn_from_its_training_part() -> None:
    given = ["test" if i < 12 else "train" for i in range(60)]
    found = by_uri(make(listed(60, split=given), SplitConfig(validation_share=0.25, test_share=0.5)))
    sizes = Counter(row["split"] for row in found.values())
    assert sizes == {"test": 12, "train": 36, "val": 12}  # no further test
    assert {uri for uri, row in found.items() if row["split"] == "test"} == {f"/p/{i:04d}.png" for i in range(12)}


def test_leaks_of_given_splits_are_counted_and_reported() -> None:
    given = ["train" if i < 40 else "val" if i < 50 else "test" for i in range(60)]
    contents = [f"{i:064x}" for i in range(60)]
    contents[45] = contents[3]
    contents[55] = contents[4]
    contents[56] = contents[46]  # by which epoch and threshold are chosen
    found = make(listed(60, split=given, content_hash=contents), SplitConfig())
    assert found.leaking == 3
    assert any("3 validation and test images are near-duplicates" in line for line in split.describe(found))


@pytest.mark.parametrize("given", [None, "splits"])
def test_generator_that_is_left_out_is_tested_on_and_never_trained_on(given: str | None) -> None:
    contents = [f"{i:064x}" for i in range(60)]
    contents[0] = contents[2]  # one of progan is one of sdv1.4
    splits_given = [("train", "val", "test")[i // 6 % 3] for i in range(60)] if given else [None] * 60
    config = SplitConfig(leave_out="sdv1.4")
    found = by_uri(make(listed(60, split=splits_given, content_hash=contents), config))
    for row in found.values():
        if row["generator"] == "sdv1.4":
            assert row["split"] == "test"
    assert found["/p/0000.png"]["split"] is None  # it would tell of its twin
    assert {row["generator"] for row in found.values() if row["split"] == "train"} == {"progan", "dalle"}
    assert "unused" in make(listed(60, content_hash=contents), config).counts()


def test_generator_that_is_not_there_cannot_be_left_out() -> None:
    with pytest.raises(ConfigError, match=r"dalle, progan, sdv1\.4"):
        make(listed(60), SplitConfig(leave_out="midjourney"))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_listed_up_to_a_share() -> None:
    status = ["failed" if i < 3 else "scored" for i in range(60)]
    errors = ["ImageCorruptError" if i < 3 else None for i in range(60)]
    table = listed(60, status=status, error_class=errors)
    found = make(table, SplitConfig(lost_share=0.05))
    assert sorted(row["uri"] for row in found.unreadable) == [f"/p/{i:04d}.png" for i in range(3)]
    assert found.unreadable[0]["error_class"] == "ImageCorruptError" and found.table.num_rows == 57
    with pytest.raises(SourceError, match=r"3 of 60 training images are unreadable, more than 4%"):
        make(table, SplitConfig(lost_share=0.04))


def test_images_that_are_not_what_a_split_says_are_counted_by_reason() -> None:
    status = ["failed" if i < 6 else "scored" for i in range(60)]
    errors = ["ObjectChangedError" if i < 6 else None for i in range(60)]
    with pytest.raises(SourceError, match="6 differ from the split, which no longer matches its source"):
        make(listed(60, status=status, error_class=errors), SplitConfig())


@pytest.mark.parametrize(("label", "counts"), [(0, "real and 0 fake"), (1, "0 real and")])
def test_one_class_only_is_refused(label: int, counts: str) -> None:
    with pytest.raises(SourceError, match=f"the training part has.* {counts}"):
        make(listed(60, label=[label] * 60), SplitConfig())


def test_validation_without_a_class_is_refused() -> None:
    given = ["val" if i % 2 and i < 10 else "train" for i in range(60)]
    with pytest.raises(SourceError, match="the validation part has 0 real and 5 fake images"):
        make(listed(60, split=given), SplitConfig())


# --- used again ------------------------------------------------------------------------------------------------------


def stored(tmp_path: Path, table: pa.Table) -> str:
    uri = str(tmp_path / "split.parquet")
    examples.write_split(make(table, SplitConfig(seed=3)).table, uri)
    return uri


def test_stored_split_is_used_again_whatever_the_source_says_now(tmp_path: Path) -> None:
    table = listed(60)
    uri = stored(tmp_path, table)
    expected = by_uri(examples.read_split(uri))
    more = pa.concat_tables([table, listed(64).slice(0, 64).filter(pc.greater(listed(64)["uri"], "/p/0059"))])
    found = by_uri(reuse(uri, more))
    assert {name: row["split"] for name, row in found.items()} == {name: row["split"] for name, row in expected.items()}
    assert {row["group"] for row in found.values()} == {row["group"] for row in expected.values()}


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_stored_split_that_no_longer_matches_is_refused(what: str, tmp_path: Path) -> None:
    table = listed(60)
    uri = stored(tmp_path, table)
    if what == "missing":
        table = table.filter(pc.not_equal(table["uri"], "/p/0007.png"))
    else:
        contents = ["f" * 64 if name == "/p/0007.png" else old for name, old in
                    zip(table["uri"].to_pylist(), table["content_hash"].to_pylist(), strict=True)]  # fmt: skip
        table = table.set_column(table.schema.get_field_index("content_hash"), "content_hash", pa.array(contents))
    with pytest.raises(SourceError, match=rf"no longer matches its source: 1 of 60 .* /p/0007\.png \({what}\)"):
        reuse(uri, table)


def changed(table: pa.Table, uris: list[str], **values: Any) -> pa.Table:
    rows = [row | values if row["uri"] in uris else row for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=KNOWN_IMAGES)


def test_images_of_a_stored_split_may_be_unreadable_up_to_a_share(tmp_path: Path) -> None:
    uri = stored(tmp_path, listed(60))
    lost = ["/p/0007.png", "/p/0008.png"]
    failed = {"status": "failed", "error_class": "ImageCorruptError", "error_message": "cut off", "content_hash": None}
    found = reuse(uri, changed(listed(60), lost, **failed), 0.05)
    assert sorted(row["uri"] for row in found.unreadable) == lost and not {*lost} & by_uri(found).keys()
    assert found.table.num_rows == 58
    with pytest.raises(SourceError, match=r"2 of 60 training images are unreadable, more than 1%"):
        reuse(uri, changed(listed(60), lost, **failed), 0.01)
    with pytest.raises(SourceError, match=r"no longer matches .* 2 of 60 .*0007.png \(changed\)"):
        reuse(uri, changed(listed(60), lost, **failed | {"error_class": "ObjectChangedError"}), 0.05)


def test_image_that_could_not_be_captioned_is_named_whatever_may_be_lost(tmp_path: Path) -> None:
    uri = stored(tmp_path, listed(60))
    silent = changed(listed(60), ["/p/0007.png"], status="failed", error_class="CaptionError", error_message="empty")
    for use in (lambda: make(silent, SplitConfig(lost_share=0.5)), lambda: reuse(uri, silent, 0.5)):
        with pytest.raises(
            SourceError, match=r"1 readable images have no caption, such as /p/0007.png: .*--retry-failed"
        ):
            use()


def test_split_is_stored_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver leaves that dies while it writes must not look like a split."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.storage.parquet.pq.ParquetWriter.write_table", die)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, listed(60))
    assert not (tmp_path / "split.parquet").exists()


# --- what is known of images ---------------------------------------------------------------------------------------

NUMBERS = iter(range(100))


def publish(out: str, product: Product, rows: list[dict[str, Any]], maker: str = "m") -> None:
    run = Run(out=out, run_id=f"20260102T{next(NUMBERS):06d}Z-000000", product=product)
    full = [dict.fromkeys(product.columns.names) | {"status": "scored", "requests": 1} | row for row in rows]
    parquet.write(batches(full, product.columns), product.columns, f"{run.staging}/rows.parquet")
    manifest = [manifest_row(row["uri"]) | {"image_id": row["image_id"]} for row in full]
    parquet.write(batches(manifest, schema.MANIFEST), schema.MANIFEST, f"{run.staging}/manifest.parquet")
    run.publish(f"{run.staging}/manifest.parquet", [f"{run.staging}/rows.parquet"], {product.maker: maker})


def facts_of(number: int, **values: Any) -> dict[str, Any]:
    row = manifest_row(f"/p/{number}.png", label=number % 2)
    return {name: row[name] for name in ("image_id", "uri", "label")} | {"content_hash": f"{number:064x}"} | values


def write_listing(tmp_path: Path, numbers: range) -> str:
    uri = str(tmp_path / "manifest.parquet")
    rows = [manifest_row(f"/p/{number}.png", label=number % 2) for number in numbers]
    parquet.write(batches(rows, schema.MANIFEST), schema.MANIFEST, uri)
    return uri


def test_newest_facts_of_each_listed_image_are_known(tmp_path: Path) -> None:
    out = str(tmp_path / "facts")
    publish(out, FACTS, [facts_of(i) for i in range(5)])
    publish(out, FACTS, [facts_of(2, content_hash="f" * 64)])
    publish(out, FACTS, [facts_of(1, content_hash="e" * 64)], maker="another")
    found = split.known_images(write_listing(tmp_path, range(4)), out, FACTS, "m")
    assert found.schema == KNOWN_IMAGES
    known = {row["uri"]: row["content_hash"] for row in found.to_pylist()}
    assert known == {f"/p/{i}.png": "f" * 64 if i == 2 else f"{i:064x}" for i in range(4)}
    assert found["image_id"].to_pylist() == sorted(found["image_id"].to_pylist())


def test_images_that_nothing_is_known_of_are_named(tmp_path: Path) -> None:
    out = str(tmp_path / "facts")
    publish(out, FACTS, [facts_of(i) for i in range(3)])
    with pytest.raises(SourceError, match=r"2 images of the source are not in .*, such as /p/3\.png.*--caption-m"):
        split.known_images(write_listing(tmp_path, range(5)), out, FACTS, "m")


def test_text_features_are_those_of_the_newest_caption_of_the_image_as_it_is(tmp_path: Path) -> None:
    out = str(tmp_path / "captions")

    def captioned(number: int, value: float, **values: Any) -> dict[str, Any]:
        features = [value, number, 1.0]
        return facts_of(number, caption="a cat", caption_id="c", text_features=features) | values

    publish(out, CAPTIONS, [captioned(i, 0.5) for i in range(4)])
    publish(out, CAPTIONS, [captioned(2, 9.0)])
    publish(out, CAPTIONS, [captioned(3, 7.0, transform="jpeg:50")])
    publish(out, CAPTIONS, [captioned(1, 8.0)], maker="another")
    publish(out, CAPTIONS, [captioned(0, 0.0, text_features=None, status="failed")])
    rows = [manifest_row(f"/p/{i}.png") for i in (3, 1, 2, 0, 5)]
    table = pa.Table.from_pylist([dict.fromkeys(schema.SPLIT.names) | row for row in rows], schema=schema.SPLIT)
    table = table.sort_by("image_id")
    features = examples.load_text_features(out, "m", table)
    found = dict(zip(table["uri"].to_pylist(), features.tolist(), strict=True))
    assert found["/p/1.png"] == [0.5, 1, 1] and found["/p/2.png"] == [9.0, 2, 1] and found["/p/3.png"] == [0.5, 3, 1]
    assert found["/p/0.png"] == [0.5, 0, 1] and np.isnan(found["/p/5.png"]).all()
    assert [row["uri"] for row in examples.without_captions(table, features)] == ["/p/5.png"]
    nothing = examples.load_text_features(out, "nobody", table)
    assert len(examples.without_captions(table, nothing)) == 5


def test_counts_of_a_split_name_what_is_not_used() -> None:
    found = make(listed(60), SplitConfig())
    names = [None if i == 0 else name for i, name in enumerate(found.table["split"].to_pylist())]
    at = found.table.schema.get_field_index("split")
    one = replace(found, table=found.table.set_column(at, "split", pa.array(names, pa.string())))
    assert sum(sum(pair) for pair in one.counts()["unused"].values()) == 1
    assert "1 unused" in split.describe(one)[0]
