"""Near-duplicates: a hash of what an image looks like, and groups of images whose hashes are close.

Dimensions: H, W image sides; n images; m distinct hashes.

An image of several names, sizes and compressions must lie in one split, or the test measures memory. The hash follows
pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"): which of the lowest
frequencies of a small grey copy are strong. Re-encoding hardly changes that; a copy that is mirrored, turned or cropped
by more than some 2 % of its sides is not found.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb, pi
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

DISTANCE: Final = 4
"""Bits in which the hashes of near-duplicates differ at most.

Measured on 484 images (photographs, art, GAN, diffusion): all of their copies as JPEG 95, 75 and 50, and at 0.5, 0.75
and 2 times the size, lie within 2 bits; as JPEG 30 all but one do (8); cropped to 0.98 of their sides, 95 % lie within
4 and all within 8. None of the 116,886 pairs of different images lies within 12. Of 565 million pairs of crops from
different images, many of them sky or wall, 4 lie within 4 bits, 7 within 6 and 37 within 8: a wider distance would
find a few crops more and tie more strangers together. Half of the bits are set, so distances are even.
"""

BITS: Final = 64
SIDE: Final = 32
"""Side of the grey copy, in cells."""
ROWS: Final = 512
"""Of a taller image every second, third, … row is read, so many at least: 16 rows a cell tell its mean, and the time
grows with the width only."""

MIN_CONTRAST: Final = 4.0
"""Least mean distance of the cells from their median, in grey levels. Below, the image is plain, or plain but for a
small thing in it: then the hash tells where the thing is, and in the same corner all things are alike. The plainest of
564 whole images has 6.6."""
MIN_DETAIL: Final = 2.0
"""Least median distance of the coefficients from the threshold of the bits, in grey levels (orthonormal transform).
Below, as for a gradient, half of the bits are rounding: re-encoding changes a coefficient by 0.3 to 2."""
DECIMALS: Final = 3
"""Coefficients are rounded, for the last digits differ between processors: those that are 0 must be 0 everywhere."""

HASH: Final = re.compile(rf"[0-9a-fA-F]{{{BITS // 4}}}")

SORT_NANOSECONDS: Final = 150.0
PAIR_NANOSECONDS: Final = 10.0
"""Cost of sorting a hash and of comparing two, from which the number of bands is chosen; they change no result."""


def _lowest_frequencies() -> npt.NDArray[np.int64]:
    """(2, 64): down and right frequency of the coefficients, by their sum; the constant one is left out."""
    every = [(down, right) for down in range(SIDE) for right in range(SIDE) if down + right > 0]
    every.sort(key=lambda at: (at[0] + at[1], abs(at[0] - at[1]), at))
    return np.array(every[:BITS]).T


FREQUENCIES: Final = _lowest_frequencies()
WAVES: Final = np.cos(pi / SIDE * np.outer(np.arange(FREQUENCIES.max() + 1), np.arange(SIDE) + 0.5)) * (2 / SIDE) ** 0.5
WAVES[0] *= 0.5**0.5
"""(11, 32): the rows of the orthonormal DCT-II that are needed. SciPy's takes half a second to import."""


def perceptual_hash(pixels_hwc: npt.NDArray[np.uint8]) -> str | None:
    """Hash of an (H, W, 3) uint8 image: 64 bits as 16 hexadecimal digits; None where it is too plain for one.

    Bit i: coefficient i of the DCT-II of the image at 32 × 32 grey cells is above the median of the 64.
    """
    if pixels_hwc.ndim != 3 or pixels_hwc.shape[2] != 3 or pixels_hwc.dtype != np.uint8 or 0 in pixels_hwc.shape:
        raise ValueError(f"pixels must be (H, W, 3) uint8 with H, W ≥ 1, got {pixels_hwc.shape} {pixels_hwc.dtype}")
    # Whole blocks are averaged, down to 64 cells a side or more, and these by a triangle: by a box, too, sizes that 32
    # does not divide would shift the cells, and 1 in 20 copies of another size by 4 bits or more.
    thinned = pixels_hwc[:: max(1, len(pixels_hwc) // ROWS)]
    small = Image.fromarray(thinned).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    cells = np.asarray(small.convert("L"), dtype=np.float64)
    if np.abs(cells - np.median(cells)).mean() < MIN_CONTRAST:
        return None
    coefficients = (WAVES @ cells @ WAVES.T)[tuple(FREQUENCIES)].round(DECIMALS)
    above = coefficients - np.median(coefficients)
    if np.median(np.abs(above)) < MIN_DETAIL:
        return None
    return np.packbits(above > 0).tobytes().hex()


def near_duplicate_groups(
    content_hashes: Sequence[str], perceptual_hashes: Sequence[str | None], distance: int = DISTANCE
) -> Indices:
    """Group of each image -> (n,) int64: the smallest row of its group.

    Two images are in one group when their content hashes are equal, when their perceptual hashes differ in at most
    `distance` bits, or when a chain of such pairs leads from one to the other. Exact; `ValueError` where lengths differ
    or a hash is not 16 hexadecimal digits. Memory grows with n, not with the number of pairs.
    """
    if len(content_hashes) != len(perceptual_hashes):
        raise ValueError(f"{len(content_hashes)} content hashes and {len(perceptual_hashes)} perceptual hashes")
    if not 0 <= distance < BITS:
        raise ValueError(f"distance must be 0 to {BITS - 1} bits, got {distance}")
    n = len(content_hashes)
    parents = np.arange(n)
    first_of: dict[str, int] = {}
    same = (first_of.setdefault(content, row) for row, content in enumerate(content_hashes))
    _join(parents, parents.copy(), np.fromiter(same, np.int64, n))
    hashed = np.array([row for row, value in enumerate(perceptual_hashes) if value is not None], np.int64)
    values = _parse([value for value in perceptual_hashes if value is not None])
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    _join(parents, hashed, hashed[first[inverse]])
    for one, other in _near_pairs(distinct, distance):
        _join(parents, hashed[first[one]], hashed[first[other]])
    return _roots(parents, np.arange(n))


def _parse(hexadecimal: Sequence[str]) -> Hashes:
    """16 hexadecimal digits each -> (m,) uint64."""
    wrong = next((text for text in hexadecimal if not HASH.fullmatch(text)), None)
    if wrong is not None:
        raise ValueError(f"a perceptual hash must be {BITS // 4} hexadecimal digits, got {wrong!r}")
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), ">u8").astype(np.uint64)


def _near_pairs(hashes: Hashes, distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Every pair of the (m,) distinct hashes within the distance, at least once, in pieces of at most m pairs.

    The bits are dealt into distance + k bands: d differing bits spoil at most d bands, so that k are equal. For each
    choice of k bands the hashes are sorted by these, and neighbours with the same value are compared.
    """
    if distance == 0 or len(hashes) < 2:
        return
    for mask in _masks(len(hashes), distance):
        order = np.argsort(hashes & mask)
        ordered = hashes[order]
        bands = ordered & mask
        starts = np.flatnonzero(np.concatenate([[True], bands[1:] != bands[:-1]]))
        sizes = np.diff(np.append(starts, len(hashes)))
        end = np.repeat(starts + sizes, sizes)
        left = np.arange(len(hashes))
        for step in range(1, int(sizes.max())):
            left = left[left + step < end[left]]
            near = left[np.bitwise_count(ordered[left] ^ ordered[left + step]) <= distance]
            if len(near):
                yield order[near], order[near + step]


def _masks(count: int, distance: int) -> list[np.uint64]:
    """Bits that are compared at a time: for each choice of k of distance + k bands, with the k that costs least."""

    def cost(k: int) -> float:
        pairs_per_hash = count / float(2 ** (BITS * k / (distance + k)))
        return float(comb(distance + k, k)) * (SORT_NANOSECONDS + PAIR_NANOSECONDS * pairs_per_hash)

    equal = min(range(1, min(8, BITS - distance) + 1), key=cost)
    bands = distance + equal
    # Bits of neighbouring frequencies go to different bands: their signs depend on each other.
    values = [sum(1 << bit for bit in range(band, BITS, bands)) for band in range(bands)]
    return [np.uint64(sum(chosen)) for chosen in combinations(values, equal)]


# --- union-find over rows: a parent is a smaller row of the same group, a root is its own parent ----------------------


def _join(parents: Indices, one: Indices, other: Indices) -> None:
    """Unite the groups of one[i] and other[i]."""
    while True:
        roots = _roots(parents, one), _roots(parents, other)
        apart = roots[0] != roots[1]
        if not apart.any():
            return
        one, other = roots[0][apart], roots[1][apart]
        # A root that is joined to several keeps the smallest; the next pass joins the rest.
        np.minimum.at(parents, np.maximum(one, other), np.minimum(one, other))


def _roots(parents: Indices, rows: Indices) -> Indices:
    """Root of each row, the smallest row of its group. Each step shortens the way for the next, so they are few."""
    while True:
        above = parents[rows]
        beyond = parents[above]
        if np.array_equal(above, beyond):
            return above
        parents[rows] = beyond
