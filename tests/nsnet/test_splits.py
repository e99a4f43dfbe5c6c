"""Splits: whole groups, shares as near as groups allow, a function of the set of rows and the seed alone."""

from collections import Counter
from collections.abc import Hashable, Sequence
from hashlib import blake2b, sha256
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsnet.errors import ConfigError
from nsnet.splits import SPLITS, assign, leave_out

USUAL = {"train": 0.8, "val": 0.1, "test": 0.1}


class Row(NamedTuple):
    """An image; `group` has a meaning only beside the other rows."""

    group: int
    stratum: Hashable
    key: str


def key(*of: Any) -> str:
    return sha256(repr(of).encode()).hexdigest()


def split(rows: Sequence[Row], shares: dict[str, float] | None = None, seed: int = 0) -> list[str]:
    groups = np.array([row.group for row in rows], np.int64)
    strata, keys = [row.stratum for row in rows], [row.key for row in rows]
    return assign(groups, strata, keys, shares=USUAL if shares is None else shares, seed=seed)


def singles(count: int, stratum: Hashable = "a") -> list[Row]:
    return [Row(group, stratum, key(stratum, group)) for group in range(count)]


def sizes(rows: Sequence[Row], found: Sequence[str]) -> dict[Hashable, list[int]]:
    """Stratum -> rows in train, val and test."""
    counts = Counter((row.stratum, name) for row, name in zip(rows, found, strict=True))
    return {row.stratum: [counts[row.stratum, name] for name in SPLITS] for row in rows}


def own_groups(rows: Sequence[Row]) -> dict[Hashable, list[int]]:
    """Stratum -> rows of each group that lies wholly in it."""
    strata: dict[int, set[Hashable]] = {}
    for row in rows:
        strata.setdefault(row.group, set()).add(row.stratum)
    found: dict[Hashable, list[int]] = {row.stratum: [] for row in rows}
    for group, count in Counter(row.group for row in rows).items():
        if len(strata[group]) == 1:
            found[next(iter(strata[group]))].append(count)
    return found


@st.composite
def tables(draw: st.DrawFn, strata: int = 3, across: bool = True, at_most: int = 20) -> list[Row]:
    """Rows in groups of 1 to 6; without `across`, each group lies in one stratum. Some rows have equal keys."""
    rows: list[Row] = []
    for group in range(draw(st.integers(0, at_most))):
        home = draw(st.integers(0, strata - 1))
        for number in range(draw(st.sampled_from([1, 1, 1, 2, 3, 6]))):
            stratum = draw(st.integers(0, strata - 1)) if across and draw(st.booleans()) else home
            same_bytes = number == 1 and draw(st.booleans())
            rows.append(Row(group, ("generator", stratum), key(group, 0 if same_bytes else number)))
    return draw(st.permutations(rows))


@st.composite
def some_shares(draw: st.DrawFn) -> dict[str, float]:
    weights = draw(st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any))
    return {name: weight / sum(weights) for name, weight in zip(SPLITS, weights, strict=True)}


def naive(rows: Sequence[Row], shares: dict[str, float], seed: int) -> list[str]:
    """The rules word by word."""
    names = [name for name in SPLITS if shares[name] > 0]
    groups = {row.group: [other for other in rows if other.group == row.group] for row in rows}
    given: dict[int, str] = {}

    def place(group: int) -> tuple[bool, int, bytes]:
        smallest = min(row.key for row in groups[group])
        digest = blake2b(f"{seed} {smallest}".encode(), digest_size=16).digest()
        return len({row.stratum for row in groups[group]}) == 1, -len(groups[group]), digest

    for group in sorted(groups, key=place):
        strata = {row.stratum for row in groups[group]}
        wants: dict[str, tuple[int, float]] = {name: (0, 0.0) for name in names}
        for name in names:
            missing, want = 0, 0.0
            for stratum in strata:
                there = [row for row in rows if row.stratum == stratum]
                has = {other: sum(given.get(row.group) == other for row in there) for other in names}
                left = {row.group for row in there} - given.keys()
                missing += has[name] == 0 and len(left) <= sum(count == 0 for count in has.values())
                here = sum(row.stratum == stratum for row in groups[group])
                want += here * (shares[name] * len(there) - has[name])
            wants[name] = missing, round(want, 9)
        given[group] = max(names, key=lambda name: wants[name])
    return [given[row.group] for row in rows]


@settings(max_examples=60, deadline=None)
@given(tables(at_most=12), st.integers(0, 2**40))
def test_splits_equal_the_rules_word_by_word(rows: list[Row], seed: int) -> None:
    shares = {"train": 0.75, "val": 0.125, "test": 0.125}  # exact in binary: rounding must not break ties
    assert split(rows, shares, seed) == naive(rows, shares, seed)


@settings(max_examples=50, deadline=None)
@given(tables(), some_shares(), st.integers(0, 100))
def test_no_group_lies_in_two_splits(rows: list[Row], shares: dict[str, float], seed: int) -> None:
    found = split(rows, shares, seed)
    split_of: dict[int, str] = {}
    for row, name in zip(rows, found, strict=True):
        assert split_of.setdefault(row.group, name) == name and shares[name] > 0


@settings(max_examples=50, deadline=None)
@given(tables(), some_shares(), st.data())
def test_order_of_the_rows_and_numbers_of_the_groups_change_nothing(
    rows: list[Row], shares: dict[str, float], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    numbers = data.draw(st.permutations(range(1000, 1050)))
    moved = [rows[at]._replace(group=numbers[rows[at].group]) for at in order]
    found = split(rows, shares)
    assert split(moved, shares) == [found[at] for at in order]


@settings(max_examples=60, deadline=None)
@given(tables(), some_shares())
def test_stratum_with_enough_groups_of_its_own_has_rows_in_every_split(
    rows: list[Row], shares: dict[str, float]
) -> None:
    found = sizes(rows, split(rows, shares))
    names = [number for number, name in enumerate(SPLITS) if shares[name] > 0]
    for stratum, own in own_groups(rows).items():
        if len(own) >= len(names):
            assert all(found[stratum][number] > 0 for number in names), (stratum, found[stratum], own)


@settings(max_examples=60, deadline=None)
@given(tables(strata=2, across=False, at_most=40), some_shares())
def test_shares_of_a_stratum_are_met_within_one_group(rows: list[Row], shares: dict[str, float]) -> None:
    found = sizes(rows, split(rows, shares))
    wanted = [shares[name] for name in SPLITS]
    k = sum(share > 0 for share in wanted)
    for stratum, own in own_groups(rows).items():
        n, largest = sum(own), max(own)
        off = max(abs(size - share * n) for size, share in zip(found[stratum], wanted, strict=True))
        if min(share * n for share in wanted if share > 0) >= largest:
            assert off <= largest * (k - 1) / k + 1e-9, (found[stratum], wanted, own)
        else:  # a split may have to take a group of which it wants less than one row
            assert off <= 2 * largest, (found[stratum], wanted, own)


@pytest.mark.parametrize("shares", [USUAL, {"train": 0.7, "val": 0.2, "test": 0.1}, dict.fromkeys(SPLITS, 1 / 3)])
def test_single_images_are_shared_out_within_one(shares: dict[str, float]) -> None:
    for count in (10, 11, 57, 100, 1999):
        rows = singles(count)
        found = sizes(rows, split(rows, shares))["a"]
        assert sum(found) == count
        assert all(abs(size - shares[name] * count) < 1 for size, name in zip(found, SPLITS, strict=True)), found


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (10, [8, 1, 1])]
)
def test_small_stratum_gives_an_image_to_every_split_while_there_is_one(count: int, expected: list[int]) -> None:
    rows = singles(count) + [row._replace(group=row.group + count) for row in singles(1000, "large")]
    assert sizes(rows, split(rows)) == {"a": expected, "large": [800, 100, 100]}


def test_large_group_goes_where_there_is_room_and_the_rest_evens_it_out() -> None:
    rows = singles(100) + [
        Row(100 + number, "a", key("copies", number, copy)) for number in range(3) for copy in range(20)
    ]
    found = split(rows)
    assert set(found[100:]) == {"train"}
    assert sizes(rows, found)["a"] == [128, 16, 16]


def test_groups_over_several_strata_are_evened_out_by_the_others() -> None:
    """The same real images lie beside each of four generators, and some of them are labelled fake."""
    rows: list[Row] = []
    for number in range(200):
        rows += [Row(number, (generator, "real"), key(number)) for generator in "abcd"]
        rows += [Row(number, ("a", "fake"), key(number))] * (number % 20 == 0)
    rows += [Row(1000 + number, ("a", "fake"), key("fake", number)) for number in range(90)]
    for stratum, found in sizes(rows, split(rows)).items():
        assert found == ([80, 10, 10] if stratum == ("a", "fake") else [160, 20, 20])


def test_few_groups_that_all_lie_in_the_same_strata_reach_every_split() -> None:
    rows = [Row(number, stratum, key(number)) for number in range(3) for stratum in "abcd"]
    assert set(map(tuple, sizes(rows, split(rows)).values())) == {(1, 1, 1)}


@settings(max_examples=40, deadline=None)
@given(tables(across=False), some_shares())
def test_strata_that_share_no_group_are_split_independently(rows: list[Row], shares: dict[str, float]) -> None:
    found = split(rows, shares)
    for stratum in {row.stratum for row in rows}:
        chosen = [at for at, row in enumerate(rows) if row.stratum == stratum]
        assert split([rows[at] for at in chosen], shares) == [found[at] for at in chosen]


def test_seed_draws_other_images() -> None:
    rows = singles(2000)
    drawn = [{row.key for row, name in zip(rows, split(rows, seed=seed), strict=True) if name == "test"}
             for seed in range(6)]  # fmt: skip
    for one, other in pairwise(drawn):
        assert len(one) == len(other) == 200
        assert len(one & other) < 45  # 20 by chance, with a standard deviation of 4


def test_split_is_drawn_from_the_whole_range_of_keys() -> None:
    """Neither the keys' order nor the rows' decides."""
    rows = sorted(singles(2000), key=lambda row: row.key)
    places = [at for at, name in enumerate(split(rows)) if name == "test"]
    assert 900 < np.mean(places) < 1100 and min(places) < 100 and max(places) > 1900


def test_splits_are_those_of_earlier_versions() -> None:
    """A trained detector's test images must stay its test images."""
    found = split(singles(24), {"train": 0.5, "val": 0.25, "test": 0.25}, seed=7)
    assert "".join({"train": ".", "val": "v", "test": "t"}[name] for name in found) == "t.....vtv.vt.ttt.v..v..v"


@pytest.mark.parametrize("shares", [{"train": 1.0}, {"train": 0, "test": 1}, {"train": 0.9, "val": 0.1, "test": 0.0}])
def test_split_without_a_share_is_empty(shares: dict[str, float]) -> None:
    rows = singles(100)
    counts = Counter(split(rows, shares))
    assert counts == {name: round(share * 100) for name, share in shares.items() if share}


def test_no_rows_have_no_splits() -> None:
    assert split([]) == []


@pytest.mark.parametrize(
    "shares",
    [
        {}, {"train": 0.8}, {"train": 0.8, "val": 0.1, "test": 0.2}, {"train": 1.2, "val": -0.2},
        {"train": float("nan")}, {"train": float("inf")}, {"train": 0.8, "validation": 0.2},
        {"train": 0.33, "val": 0.33, "test": 0.33},
    ],
)  # fmt: skip
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="share"):
        split(singles(10), shares)


def test_rows_of_one_key_in_two_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="two groups"):
        split([Row(0, "a", "same"), Row(1, "a", "same")])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups, 1 strata and 2 keys"):
        assign(np.array([0, 1]), ["a"], ["b", "c"], shares=USUAL, seed=0)
    with pytest.raises(ValueError, match="2 groups and 1 generators"):
        leave_out(np.array([0, 1]), ["a"], "a")


image_lists = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["sd", "dalle", "progan", None])), max_size=40)


@settings(max_examples=50, deadline=None)
@given(image_lists)
def test_left_out_rows_and_their_near_duplicates_are_found(images: list[tuple[int, str | None]]) -> None:
    images = [*images, (3, "sd")]
    groups = np.array([group for group, _ in images], np.int64)
    held_out, excluded = leave_out(groups, [generator for _, generator in images], "sd")
    touched = {group for group, generator in images if generator == "sd"}
    assert held_out.dtype == excluded.dtype == np.bool_
    assert held_out.tolist() == [generator == "sd" for _, generator in images]
    assert excluded.tolist() == [generator != "sd" and group in touched for group, generator in images]


def left_out_message(generators: Sequence[str | None], name: str) -> str:
    groups: NDArray[np.int64] = np.arange(len(generators))
    with pytest.raises(ConfigError) as caught:
        leave_out(groups, generators, name)
    return str(caught.value)


def test_unknown_generator_is_refused_with_the_known_ones() -> None:
    assert left_out_message(["b", None, "a", "b"], "c").endswith(
        "generator 'c': it has no image; choose one of the generators: a, b"
    )
    assert left_out_message([None, None], "a").endswith("choose one of the generators: none")
    assert left_out_message([], "a").endswith("choose one of the generators: none")


def test_many_known_generators_are_cut_short() -> None:
    names = [f"g{number:02}" for number in reversed(range(23))]
    message = left_out_message(names, "other")
    assert message.endswith(", ".join(sorted(names)[:20]) + " and 3 more") and "g20" not in message
    assert left_out_message(names[:20], "other").endswith(names[0])
