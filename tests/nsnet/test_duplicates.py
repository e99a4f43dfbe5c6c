"""Perceptual hashes: the same for copies, another for strangers, none for plain images; groups as brute force finds
them."""

import csv
import io
import tracemalloc
from itertools import combinations
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nsnet import duplicates
from nsnet.duplicates import DISTANCE, near_duplicate_groups, perceptual_hash
from nsnet.images import decode

Pixels = NDArray[np.uint8]

DEV = Path(__file__).parents[3] / "shared/data/dev"
GOLDEN_HASH = "99e0047e7b47a5d1"


def scene(seed: int, height: int = 240, width: int = 320) -> Pixels:
    """An image with large and small things in it: rectangles of random colours."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    for size in np.geomspace(0.7, 0.05, 40):
        top, left = int(rng.uniform(-0.2, 1) * height), int(rng.uniform(-0.2, 1) * width)
        rows = slice(max(0, top), max(0, top + int(size * height)))
        columns = slice(max(0, left), max(0, left + int(size * width)))
        image[rows, columns] = rng.integers(0, 256, 3)
    return image


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = (round(side * factor) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def cropped(pixels: Pixels, share: float) -> Pixels:
    height, width = pixels.shape[:2]
    top, left = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
    return pixels[top : height - top, left : width - left]


def grey(cells: NDArray[np.int64]) -> Pixels:
    return np.repeat(cells.astype(np.uint8)[..., None], 3, axis=2)


def bits_apart(one: str | None, other: str | None) -> int:
    assert one is not None and other is not None
    return (int(one, 16) ^ int(other, 16)).bit_count()


def naive_hash(cells: NDArray[np.int64]) -> str:
    """Of 32 × 32 grey cells, by the definition of the DCT-II."""
    wave = [[cos(pi * k * (2 * x + 1) / 64) * (1 if k else 0.5**0.5) for x in range(32)] for k in range(32)]
    order = sorted(
        ((down, right) for down in range(32) for right in range(32) if down or right),
        key=lambda at: (at[0] + at[1], abs(at[0] - at[1]), at),
    )[:64]
    coefficients = []
    for down, right in order:
        total = 0.0
        for y in range(32):
            for x in range(32):
                total += int(cells[y, x]) * wave[down][y] * wave[right][x]
        coefficients.append(total)
    middle = sum(sorted(coefficients)[31:33]) / 2
    return f"{int(''.join('1' if value > middle else '0' for value in coefficients), 2):016x}"


@pytest.mark.parametrize("seed", range(5))
def test_hash_of_32_by_32_grey_pixels_equals_the_definition(seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 256, (32, 32))
    assert perceptual_hash(grey(cells)) == naive_hash(cells)


def test_hash_has_its_golden_value() -> None:
    assert perceptual_hash(scene(0)) == GOLDEN_HASH


def test_half_of_the_bits_are_set() -> None:
    assert {int(perceptual_hash(scene(seed)) or "", 16).bit_count() for seed in range(20)} == {32}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(240, 320), (500, 333), (1100, 400)])
def test_copies_of_an_image_are_near_it(seed: int, size: tuple[int, int]) -> None:
    image = scene(seed, *size)
    copies = [jpeg(image, quality) for quality in (95, 75, 50, 30)]
    copies += [resized(image, factor) for factor in (0.5, 0.75, 2.0)]
    own = perceptual_hash(image)
    assert max(bits_apart(own, perceptual_hash(copy)) for copy in copies) <= DISTANCE
    assert bits_apart(own, perceptual_hash(cropped(image, 0.98))) <= 3 * DISTANCE


def test_tall_image_has_the_hash_of_its_rows() -> None:
    """Every row shows once, whatever is skipped: a row that is repeated changes nothing."""
    image = scene(1, 600, 300)
    assert perceptual_hash(np.repeat(image, 3, axis=0)) == perceptual_hash(image)


def test_different_images_are_far_apart() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(60)]
    distances = [bits_apart(one, other) for one, other in combinations(hashes, 2)]
    assert min(distances) > 2 * DISTANCE and abs(np.mean(distances) - 32) < 2


def test_mirrored_image_is_another() -> None:
    assert bits_apart(perceptual_hash(scene(0)), perceptual_hash(scene(0)[:, ::-1])) > 2 * DISTANCE


def test_brighter_or_weaker_image_has_the_same_hash_and_its_negative_the_opposite() -> None:
    cells = np.random.default_rng(1).integers(0, 100, (32, 32))
    own = perceptual_hash(grey(cells))
    assert own is not None
    assert perceptual_hash(grey(cells + 100)) == perceptual_hash(grey(cells * 2)) == own
    assert bits_apart(own, perceptual_hash(grey(255 - cells))) == 64


def test_symmetric_image_has_equal_bits_where_its_coefficients_are_zero() -> None:
    """Rounding would set them at random, otherwise on each machine."""
    half = np.random.default_rng(2).integers(0, 256, (32, 16))
    own = perceptual_hash(grey(np.concatenate([half, half[:, ::-1]], axis=1)))
    assert own is not None
    odd = [int(bit) for bit, right in zip(f"{int(own, 16):064b}", duplicates.FREQUENCIES[1], strict=True) if right % 2]
    assert len(odd) > 20 and len(set(odd)) == 1


def test_hash_is_of_the_pixels_whatever_their_layout() -> None:
    image = scene(3)
    wide = np.zeros((480, 640, 3), np.uint8)
    wide[::2, ::2] = image
    own = perceptual_hash(image)
    assert perceptual_hash(np.asfortranarray(image)) == perceptual_hash(wide[::2, ::2]) == own
    before = image.copy()
    perceptual_hash(image)
    np.testing.assert_array_equal(image, before)


def ramp(height: int, width: int, along: int) -> Pixels:
    down, right = np.mgrid[:height, :width]
    return grey((down * 255 // max(1, height - 1)) if along == 0 else (right * 255 // max(1, width - 1)))


def plain(level: int, noise: int = 0, side: int = 128) -> Pixels:
    added = np.random.default_rng(level).integers(-noise, noise + 1, (side, side, 3))
    return np.clip(level + added, 0, 255).astype(np.uint8)


def spot(top: int, left: int, side: int = 12) -> Pixels:
    image = plain(250)
    image[top : top + side, left : left + side] = 0
    return image


PLAIN = {
    "black": plain(0), "white": plain(255), "grey": plain(127), "noise": plain(90, 8), "one pixel": plain(3, side=1),
    "ramp down": ramp(200, 300, 0), "ramp right": ramp(200, 300, 1), "spot in the corner": spot(116, 116),
    "spot": spot(40, 70), "strip": np.full((1, 900, 3), 8, np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_image_has_no_hash(name: str) -> None:
    assert perceptual_hash(PLAIN[name]) is None
    assert perceptual_hash(jpeg(PLAIN[name], 75)) is None


@pytest.mark.parametrize(("share", "hashed"), [(0.02, False), (0.07, False), (0.1, True), (1.0, True)])
def test_faint_image_has_a_hash_while_its_contrast_is_enough(share: float, hashed: bool) -> None:
    cells = np.random.default_rng(4).integers(-100, 101, (32, 32)) * share
    found = perceptual_hash(grey((128 + np.rint(cells)).astype(np.int64)))
    assert (found is not None) == hashed, np.abs(cells).mean()


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (3, 5), (31, 33), (2000, 40)])
def test_image_of_any_size_has_a_hash(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(5).choice(np.array([0, 255], np.uint8), shape)
    found = perceptual_hash(np.repeat(image[..., None], 3, axis=2))
    # a row of noise is the same in each of 32 rows: only the 10 frequencies along it are not zero
    assert (found is None) == (1 in shape)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 40), "u1"), ((40, 40, 4), "u1"), ((40, 40, 3), "f8"), ((0, 40, 3), "u1")]
)
def test_array_that_is_no_image_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="uint8"):
        perceptual_hash(np.zeros(shape, dtype))


def test_real_images_are_near_their_copies_and_far_from_each_other() -> None:
    if not DEV.is_dir():
        pytest.skip(f"{DEV} is not here")
    with (DEV / "manifest.csv").open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)][::25]
    images = [decode((DEV / path).read_bytes()) for path in paths]
    hashes = [perceptual_hash(image) for image in images]
    copies = [perceptual_hash(jpeg(resized(image, 0.75), 75)) for image in images]
    assert len(hashes) >= 15
    assert max(map(bits_apart, hashes, copies)) <= DISTANCE
    assert min(bits_apart(one, other) for one, other in combinations(hashes, 2)) > 2 * DISTANCE


# --- groups -----------------------------------------------------------------------------------------------------------


def hexadecimal(values: NDArray[np.uint64] | list[int]) -> list[str | None]:
    return [f"{int(value):016x}" for value in values]


def unlike(count: int) -> list[str]:
    return [f"content {row}" for row in range(count)]


def brute_force(contents: list[str], hashes: list[str | None], distance: int) -> list[int]:
    """Every pair is compared, and the smaller number spreads until nothing changes."""
    n = len(contents)
    values = [None if text is None else int(text, 16) for text in hashes]
    near: list[list[int]] = [[] for _ in range(n)]
    for i, j in combinations(range(n), 2):
        one, other = values[i], values[j]
        alike = one is not None and other is not None and (one ^ other).bit_count() <= distance
        if alike or contents[i] == contents[j]:
            near[i].append(j)
            near[j].append(i)
    groups, changed = list(range(n)), True
    while changed:
        changed = False
        for i in range(n):
            smallest = min([groups[i], *(groups[j] for j in near[i])])
            changed |= smallest != groups[i]
            groups[i] = smallest
    return groups


def planted(count: int, seed: int) -> tuple[list[str], list[str | None]]:
    """Random hashes, some a few bits from an earlier one, some missing; some images with the bytes of another."""
    rng = np.random.default_rng(seed)
    values = [int(value) for value in rng.integers(0, 2**64, count, dtype=np.uint64)]
    for row in range(1, count):
        if rng.random() < 0.6:
            flipped = rng.choice(64, rng.integers(0, 14), replace=False)
            values[row] = values[rng.integers(row)] ^ sum(1 << int(bit) for bit in flipped)
    hashes = [text if rng.random() > 0.1 else None for text in hexadecimal(values)]
    contents = [f"content {rng.integers(row + 1) if rng.random() < 0.05 else row}" for row in range(count)]
    return contents, hashes


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 6, 8, 12])
def test_groups_equal_brute_force(distance: int) -> None:
    contents, hashes = planted(400, distance)
    groups = near_duplicate_groups(contents, hashes, distance)
    assert groups.dtype == np.int64
    assert groups.tolist() == brute_force(contents, hashes, distance)
    assert 20 < len(set(groups.tolist())) < 400


@pytest.mark.parametrize("nanoseconds", [1e-6, 1e9])
def test_number_of_bands_changes_no_group(nanoseconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    contents, hashes = planted(300, 99)
    usual = duplicates._masks(300, 4)
    monkeypatch.setattr(duplicates, "SORT_NANOSECONDS", nanoseconds)
    assert nanoseconds > 1 or len(duplicates._masks(300, 4)) > 10 * len(usual)
    assert near_duplicate_groups(contents, hashes, 4).tolist() == brute_force(contents, hashes, 4)


@pytest.mark.parametrize("count", [100, 144_000, 1_000_000, 10**8])
@pytest.mark.parametrize("distance", [1, 2, 4, 8])
def test_some_bands_are_equal_whichever_bits_differ(distance: int, count: int) -> None:
    masks = np.array(duplicates._masks(count, distance))
    rng = np.random.default_rng(distance)
    flips = [rng.choice(64, distance, replace=False) for _ in range(3000)]
    differing = np.array([sum(1 << int(bit) for bit in flip) for flip in flips], np.uint64)
    assert ((differing[:, None] & masks) == 0).any(axis=1).all()
    assert (masks != 0).all() and np.bitwise_or.reduce(masks) == np.uint64(2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 2**64 - 1),
    flips=st.lists(st.sets(st.integers(0, 63), max_size=6), min_size=1, max_size=12),
    distance=st.integers(0, 8),
)
def test_chain_of_steps_is_one_group_as_far_as_each_is_near(start: int, flips: list[set[int]], distance: int) -> None:
    values = [start]
    for bits in flips:
        values.append(values[-1] ^ sum(1 << bit for bit in bits))
    hashes = hexadecimal(values)
    assert near_duplicate_groups(unlike(len(values)), hashes, distance).tolist() == brute_force(
        unlike(len(values)), hashes, distance
    )


def test_one_bit_more_than_the_distance_is_another_group() -> None:
    for distance in (0, 1, 4, 7):
        hashes = hexadecimal([0, 2**distance - 1, (2 ** (distance + 1) - 1) << 40])
        assert near_duplicate_groups(unlike(3), hashes, distance).tolist() == [0, 0, 2]


@pytest.mark.parametrize("order", ["up", "down", "random"])
def test_long_chain_is_one_group(order: str) -> None:
    """Each 4 bits from the next, the ends of it 32 bits apart and more."""
    rng = np.random.default_rng(0)
    values = [int(rng.integers(0, 2**64, dtype=np.uint64))]
    for _ in range(2999):
        values.append(values[-1] ^ sum(1 << int(bit) for bit in rng.choice(64, 4, replace=False)))
    rows = {"up": np.arange(3000), "down": np.arange(3000)[::-1], "random": rng.permutation(3000)}[order]
    hashes = hexadecimal([values[row] for row in rows])
    assert (near_duplicate_groups(unlike(3000), hashes, 4) == 0).all()


def test_distance_of_the_module_is_used() -> None:
    hashes = hexadecimal([0, 2**DISTANCE - 1, (2 ** (DISTANCE + 1) - 1) << 30])
    assert near_duplicate_groups(unlike(3), hashes).tolist() == [0, 0, 2]


def test_images_without_a_hash_are_grouped_by_their_bytes_only() -> None:
    contents = ["a", "b", "a", "c", "b"]
    assert near_duplicate_groups(contents, [None] * 5).tolist() == [0, 1, 0, 3, 1]


def test_bytes_and_looks_link_together() -> None:
    hashes = [*hexadecimal([7, 2**64 - 1, 0]), None]
    assert near_duplicate_groups(["a", "b", "c", "a"], hashes).tolist() == [0, 1, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_groups_do_not_depend_on_the_order_but_for_their_numbers(seed: int, distance: int) -> None:
    contents, hashes = planted(60, seed)
    groups = near_duplicate_groups(contents, hashes, distance)
    assert (groups <= np.arange(60)).all() and (groups[groups] == groups).all()
    order = np.random.default_rng(seed).permutation(60)
    moved = near_duplicate_groups([contents[row] for row in order], [hashes[row] for row in order], distance)
    together = groups[order][:, None] == groups[order]
    np.testing.assert_array_equal(moved[:, None] == moved, together)
    assert (moved <= np.arange(60)).all() and (moved[moved] == moved).all()


@pytest.mark.parametrize("shared", ["high", "low", "every fifth"])
def test_hashes_that_share_most_of_their_bits_are_grouped_exactly(shared: str) -> None:
    rng = np.random.default_rng(6)
    free = {"high": range(16), "low": range(48, 64), "every fifth": range(0, 64, 5)}[shared]
    values = [sum(1 << bit for bit in free if rng.random() < 0.5) for _ in range(250)]
    for distance in (0, 1, 2):
        found = near_duplicate_groups(unlike(250), hexadecimal(values), distance).tolist()
        assert found == brute_force(unlike(250), hexadecimal(values), distance)


def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    """2048 hashes with the same value in most bands: 2 million pairs, of which 0.12 million are near."""
    hashes, contents = hexadecimal(list(range(2048))), unlike(2048)
    tracemalloc.start()
    groups = near_duplicate_groups(contents, hashes, 2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (groups == 0).all() and peak_bytes < 2**20


def test_a_hundred_thousand_images_are_grouped_in_seconds() -> None:
    rng = np.random.default_rng(8)
    n = 100_000
    values = rng.integers(0, 2**64, n, dtype=np.uint64)
    values[n // 2 : n // 2 + 1000] = values[:1000] ^ np.uint64(0b1001 << 30) ^ np.uint64(1 << 63 | 1)
    expected = np.arange(n)
    expected[n // 2 : n // 2 + 1000] = np.arange(1000)
    found = near_duplicate_groups(unlike(n), hexadecimal(values), 4)
    np.testing.assert_array_equal(found, expected)


def test_no_images_are_no_groups_and_one_is_one() -> None:
    assert near_duplicate_groups([], []).shape == (0,)
    assert near_duplicate_groups(["a"], ["0" * 16]).tolist() == [0]
    assert near_duplicate_groups(["a"], [None]).tolist() == [0]


@pytest.mark.parametrize(
    "wrong", ["", "0" * 15, "0" * 17, "0" * 8 + " " + "0" * 7, "g" * 16, "0x" + "0" * 14, "٣" * 16]
)
def test_hash_that_is_not_16_hexadecimal_digits_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="16 hexadecimal digits"):
        near_duplicate_groups(["a", "b"], ["0" * 16, wrong])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 content hashes and 1 perceptual"):
        near_duplicate_groups(["a", "b"], [None])


@pytest.mark.parametrize("distance", [-1, 64, 100])
def test_distance_that_a_hash_cannot_have_is_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="0 to 63"):
        near_duplicate_groups(["a"], [None], distance)
