"""Copies in a source: counted like by hand, in one split, in two, and under both labels."""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.auditing import duplicates, inventory
from jobs.auditing.duplicates import COPIES, count, groups
from nsnet.duplicates import DISTANCE

Rows = list[dict[str, Any]]

HASH = 0x0123456789ABCDEF


def image(number: int, content: str, looks: int | None, **values: Any) -> dict[str, Any]:
    """A row of `inventory.IMAGES`."""
    hashes = {"content_hash": content, "perceptual_hash": None if looks is None else f"{looks:016x}"}
    known = {"uri": f"/{number:04}.png", "status": "scored", **hashes, **values}
    return dict.fromkeys(inventory.IMAGES.names) | known


def table(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=inventory.IMAGES)


def drawn(n: int, seed: int) -> tuple[Rows, NDArray[np.int64]]:
    """Images in groups of 1 to some, with splits, labels, or neither."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, n // 2 + 1, n)
    splits, labels = rng.choice(["train", "val", "test", None], n), rng.choice([0, 1, None], n)
    return [image(i, str(i), None, split=splits[i], label=labels[i]) for i in range(n)], group


def by_hand(rows: Rows, group: NDArray[np.int64]) -> dict[str, Any]:
    members: dict[int, Rows] = defaultdict(list)
    for row, number in zip(rows, group.tolist(), strict=True):
        members[number].append(row)
    several = [some for some in members.values() if len(some) > 1]

    def over(name: str) -> list[Rows]:
        return [some for some in several if len({row[name] for row in some} - {None}) > 1]

    def number(which: list[Rows]) -> dict[str, int]:
        return {"groups": len(which), "pictures": sum(len(some) for some in which)}

    across = over("split")
    leaking = [row["split"] for some in across for row in some if row["split"]]
    return {
        **number(several),
        "within_a_split": number([some for some in several if some not in across]),
        "across_splits": number(across) | {"by_split": {name: leaking.count(name) for name in sorted(set(leaking))}},
        "across_labels": number(over("label")),
    }


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_counted_as_by_hand(seed: int) -> None:
    rows, group = drawn(n=(1, 2, 10, 60, 200, 200)[seed], seed=seed)
    found = count(table(rows), group)
    examples = {place: found[place].pop("examples") for place in ("across_splits", "across_labels")}
    assert found == by_hand(rows, group)
    known = {row["uri"]: (row, number) for row, number in zip(rows, group.tolist(), strict=True)}
    for place, name in (("across_splits", "split"), ("across_labels", "label")):
        assert len(examples[place]) == min(duplicates.EXAMPLES, found[place]["groups"])
        for one, other in examples[place]:
            assert known[one][1] == known[other][1]
            values = {known[one][0][name], known[other][0][name]}
            assert len(values) == 2 and None not in values


def test_no_images_have_no_copies() -> None:
    nothing = table([])
    contents, alike = groups(nothing)
    assert count(nothing, alike) == by_hand([], alike) | {
        "across_splits": {"groups": 0, "pictures": 0, "by_split": {}, "examples": []},
        "across_labels": {"groups": 0, "pictures": 0, "examples": []},
    }
    assert duplicates.copies(nothing, contents, alike) == COPIES.empty_table()


def test_equal_files_and_images_that_look_alike_are_told_apart() -> None:
    near, far = HASH ^ 0b1111, HASH ^ 0b11111
    rows = [
        image(0, "a", HASH, split="train", label=1), image(1, "b", ~HASH % 2**64),
        image(2, "a", HASH, split="test", label=0), image(3, "c", near, split="train", generator="g"),
        image(4, "d", None), image(5, "d", None), image(6, "e", None), image(7, "f", far << 20 & 2**64 - 1),
    ]  # fmt: skip
    seen = table(rows)
    contents, alike = groups(seen)
    found = duplicates.copies(seen, contents, alike)
    assert found.schema == COPIES
    assert [(row["group"], row["kind"], row["uri"]) for row in found.to_pylist()] == [
        (0, "exact", "/0000.png"), (0, "exact", "/0002.png"), (0, "near", "/0003.png"),
        (4, "exact", "/0004.png"), (4, "exact", "/0005.png"),
    ]  # fmt: skip
    by_uri = {row["uri"]: row for row in rows}
    for row in found.to_pylist():
        assert {name: row[name] for name in COPIES.names[2:]} == {
            name: by_uri[row["uri"]][name] for name in COPIES.names[2:]
        }
    assert count(seen, contents)["groups"] == 2 and count(seen, contents)["pictures"] == 4
    assert count(seen, alike)["pictures"] == 5 and count(seen, alike)["across_splits"]["pictures"] == 3


@pytest.mark.parametrize("distance", [0, DISTANCE, 8])
def test_distance_is_how_far_apart_alike_images_may_be(distance: int) -> None:
    rows = [image(bits, str(bits), HASH ^ (2**bits - 1)) for bits in (0, distance, 2 * distance + 1)]
    _, alike = groups(table(rows), distance)
    assert (alike == alike[0]).tolist() == [True, True, False]
