"""What a source holds: the newest facts of what is listed now, counted and described as by hand."""

from collections import Counter
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.auditing import inventory
from jobs.auditing.inventory import CLASSES, IMAGES, KNOWN_COLUMNS, LISTED_COLUMNS, describe, images
from jobs.dataset.labels import NO_GENERATOR
from jobs.dataset.manifest import image_id
from tests.support.tables import batches

Rows = list[dict[str, Any]]


def listed(uri: str, **values: Any) -> dict[str, Any]:
    return {"image_id": image_id(uri, ""), "uri": uri, "label": None, "generator": None, "split": None,
            "transform": None, **values}  # fmt: skip


def known(uri: str, **values: Any) -> dict[str, Any]:
    facts = {"width": 30, "height": 20, "format": "PNG", "size_bytes": 900, "status": "scored", "content_hash": uri}
    return dict.fromkeys(KNOWN_COLUMNS.names) | {"image_id": image_id(uri, "")} | facts | values


def failed(uri: str, error_class: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("width", "height", "format"))
    return known(uri, status="failed", error_class=error_class, **nothing)


def table(listing: Rows, facts: Rows) -> pa.Table:
    found, unknown = images(batches(listing, LISTED_COLUMNS), batches(facts, KNOWN_COLUMNS))
    assert unknown == 0
    return found


# Images and their facts.


def test_listed_images_get_the_newest_facts_of_them() -> None:
    listing = [listed("/c", label=1, generator="g"), listed("/a", split="val"), listed("/b"), listed("/new")]
    old = [failed("/a", "FetchError"), known("/b", size_bytes=1), known("/gone"), known("/c", size_bytes=3)]
    new = [known("/a", size_bytes=7, jpeg_quality=80), failed("/c", "ImageCorruptError")]
    found, unknown = images(
        batches(listing, LISTED_COLUMNS, size=2), [*batches(old, KNOWN_COLUMNS), *batches(new, KNOWN_COLUMNS)]
    )
    assert unknown == 1 and found.schema == IMAGES
    rows = {row["uri"]: row for row in found.to_pylist()}
    assert list(rows) == ["/a", "/b", "/c"]
    expected = {**known("/a", size_bytes=7, jpeg_quality=80), **listed("/a", split="val")}
    assert rows["/a"] == {name: expected[name] for name in IMAGES.names}
    assert rows["/b"]["size_bytes"] == 1
    assert (rows["/c"]["status"], rows["/c"]["error_class"], rows["/c"]["label"]) == ("failed", "ImageCorruptError", 1)


def test_many_batches_keep_their_order() -> None:
    listing = [listed(f"/{i:05}") for i in range(3000)]
    facts = [known(row["uri"], size_bytes=run) for run in range(3) for row in listing]
    found, unknown = images(batches(listing, LISTED_COLUMNS, size=700), batches(facts, KNOWN_COLUMNS, size=700))
    assert unknown == 0 and found.column("uri").to_pylist() == [row["uri"] for row in listing]
    assert set(found.column("size_bytes").to_pylist()) == {2}


def test_nothing_listed_is_nothing_found() -> None:
    found, unknown = images([], batches([known("/gone")], KNOWN_COLUMNS))
    assert (found.num_rows, unknown) == (0, 0)
    assert describe(found) == {} and list(inventory.by_generator(found)) == []
    assert inventory.failures(found) == inventory.splits(found) == {}


# Counts.


def drawn(n: int = 200, seed: int = 0) -> tuple[Rows, pa.Table]:
    """Images of all kinds, as rows and as a table in another order."""
    rng = np.random.default_rng(seed)
    listing, facts = [], []
    for i in range(n):
        uri = f"/{rng.integers(10**9)}-{i}"
        generator, split = rng.choice(["g", "h", "x", None]), rng.choice(["train", "test", None])
        listing.append(listed(uri, label=rng.choice([0, 1, None]), generator=generator, split=split))
        sizes = {"width": int(rng.integers(1, 5)) * 100, "height": int(rng.integers(1, 3)) * 100}
        quality = None if rng.random() < 0.5 else int(rng.integers(60, 100))
        kind = {"size_bytes": int(rng.integers(1000, 9000)), "format": rng.choice(["PNG", "JPEG", "GIF"])}
        good = known(uri, **sizes, **kind, jpeg_quality=quality)
        facts.append(good if rng.random() < 0.8 else failed(uri, str(rng.choice(["FetchError", "ImageCorruptError"]))))
    rows = [{**fact, **row} for row, fact in zip(listing, facts, strict=True)]
    return rows, table(listing, facts)


def kind(row: dict[str, Any]) -> str:
    return {0: "real", 1: "fake", None: "unlabelled"}[row["label"]]


def test_rows_of_each_generator_are_its_own() -> None:
    rows, found = drawn()
    parts = dict(inventory.by_generator(found))
    assert list(parts) == sorted({row["generator"] or NO_GENERATOR for row in rows})
    for name, numbers in parts.items():
        expected = {row["uri"] for row in rows if (row["generator"] or NO_GENERATOR) == name}
        assert set(found.column("uri").take(numbers).to_pylist()) == expected and len(numbers) == len(expected)


def test_failures_are_counted_by_their_class_with_one_of_them() -> None:
    rows, found = drawn()
    counts = Counter(row["error_class"] for row in rows if row["error_class"])
    failures = inventory.failures(found)
    assert {name: failure["pictures"] for name, failure in failures.items()} == counts
    assert [failure["pictures"] for failure in failures.values()] == sorted(counts.values(), reverse=True)
    for name, failure in failures.items():
        assert failure["example"] in {row["uri"] for row in rows if row["error_class"] == name}


def test_splits_are_counted_by_generator_and_class() -> None:
    rows, found = drawn()
    expected = Counter((row["split"] or "(none)", row["generator"] or NO_GENERATOR, kind(row)) for row in rows)
    splits = inventory.splits(found)
    assert {
        (s, g, c): n for s, by in splits.items() for g, counts in by.items() for c, n in counts.items() if n
    } == expected
    assert all(list(counts) == list(CLASSES) for by in splits.values() for counts in by.values())
    without = found.set_column(found.schema.get_field_index("split"), "split", pa.nulls(found.num_rows, pa.string()))
    assert inventory.splits(without) == {}


def test_classes_are_described_as_by_hand() -> None:
    rows, found = drawn()
    described = describe(found)
    assert list(described) == list(CLASSES)
    for name, group in described.items():
        own = [row for row in rows if kind(row) == name]
        good = [row for row in own if row["status"] == "scored"]
        assert (group["pictures"], group["failed"]) == (len(own), len(own) - len(good))
        assert group["formats"] == Counter(row["format"] for row in good)
        assert list(group["formats"].values()) == sorted(group["formats"].values(), reverse=True)
        for side in ("width", "height"):
            values = [row[side] for row in good]
            assert group[side] == [min(values), median(values), max(values)]
        bytes_per_pixel = [row["size_bytes"] / (row["width"] * row["height"]) for row in good]
        qualities = [row["jpeg_quality"] for row in good if row["jpeg_quality"] is not None]
        for key, values in (("bytes_per_pixel", bytes_per_pixel), ("jpeg_quality", qualities)):
            assert group[key] == pytest.approx(np.percentile(values, [25, 50, 75]))
        sizes = Counter((row["width"], row["height"]) for row in good)
        most = group["most_common_size"]
        assert sizes[most["width"], most["height"]] == max(sizes.values())
        assert most["share"] == pytest.approx(max(sizes.values()) / len(good))


def test_class_whose_images_all_failed_has_counts_only() -> None:
    found = table([listed("/a", label=1), listed("/b", label=1)], [failed("/a", "E"), failed("/b", "E")])
    nothing = dict.fromkeys(("width", "height", "most_common_size", "bytes_per_pixel", "jpeg_quality"))
    assert describe(found) == {"fake": {"pictures": 2, "failed": 2, "formats": {}, **nothing}}
