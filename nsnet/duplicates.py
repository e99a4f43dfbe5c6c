"""Finds near-duplicates: computes perceptual hashes and groups images whose hashes are close.

Dimensions: H, W image sides; n images; m distinct hashes.

All copies of an image, with other names, sizes or compressions, must be in one split, or the test measures memory. The
hash follows pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"): its bits mark
the strong ones among the lowest frequencies of a small grey copy. Re-encoding changes few bits; a copy that is
mirrored, rotated or cropped by more than about 2 % of its sides is not found.
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
"""Largest number of bits in which the hashes of near-duplicates differ.

Measured on 484 images (photographs, art, GAN, diffusion): all copies as JPEG 95, 75 and 50, and at 0.5, 0.75 and 2
times the size, are within 2 bits; as JPEG 30 all but one (8); cropped to 0.98 of their sides, 95 % are within 4 and all
within 8. None of the 116,886 pairs of different images is within 12. Of 565 million pairs of crops from different
images, many of them sky or wall, 4 are within 4 bits, 7 within 6 and 37 within 8: a larger distance would find a few
more crops and join more unrelated images. Half of the bits are set, so distances are even.
"""

BITS: Final = 64
SIDE: Final = 32
"""Side of the grey copy, in cells."""
ROWS: Final = 512
"""Minimum number of rows that are read: of a taller image, only every second, third, … row. 16 rows per cell are enough
for its mean, and the time then grows with the width only."""

MIN_CONTRAST: Final = 4.0
"""Minimum mean distance of the cells from their median, in grey levels. Below it, the image is plain, possibly with one
small object: the hash then encodes only the object's position. The plainest of 564 whole images has 6.6."""
MIN_DETAIL: Final = 2.0
"""Minimum median distance of the coefficients from the threshold of the bits, in grey levels (orthonormal transform).
Below it, as for a gradient, half of the bits are noise: re-encoding changes a coefficient by 0.3 to 2."""
DECIMALS: Final = 3
"""Decimals to which coefficients are rounded: further digits differ between processors, and 0 must be 0 on all."""

HASH: Final = re.compile(rf"[0-9a-fA-F]{{{BITS // 4}}}")

SORT_NANOSECONDS: Final = 150.0
PAIR_NANOSECONDS: Final = 10.0
"""Costs of sorting a hash and of comparing two. They determine the number of bands, not the result."""


def _lowest_frequencies() -> npt.NDArray[np.int64]:
    """(2, 64): vertical and horizontal frequency of the coefficients, by their sum, without the constant one."""
    frequencies = [(down, right) for down in range(SIDE) for right in range(SIDE) if down + right > 0]
    frequencies.sort(key=lambda pair: (pair[0] + pair[1], abs(pair[0] - pair[1]), pair))
    return np.array(frequencies[:BITS]).T


FREQUENCIES: Final = _lowest_frequencies()
WAVES: Final = np.cos(pi / SIDE * np.outer(np.arange(FREQUENCIES.max() + 1), np.arange(SIDE) + 0.5)) * (2 / SIDE) ** 0.5
WAVES[0] *= 0.5**0.5
"""(11, 32): the needed rows of the orthonormal DCT-II. SciPy's DCT takes half a second to import."""


def perceptual_hash(pixels_hwc: npt.NDArray[np.uint8]) -> str | None:
    """Hash an (H, W, 3) uint8 image: 64 bits as 16 hexadecimal digits; None if the image is too plain.

    Bit i is set if coefficient i of the DCT-II of the image, at 32 × 32 grey cells, is above the median of the 64.
    """
    if pixels_hwc.ndim != 3 or pixels_hwc.shape[2] != 3 or pixels_hwc.dtype != np.uint8 or 0 in pixels_hwc.shape:
        raise ValueError(f"pixels must be (H, W, 3) uint8 with H, W ≥ 1, got {pixels_hwc.shape} {pixels_hwc.dtype}")
    # Reduce by whole blocks to at least 64 cells per side, then with a triangle filter. With a box filter there too,
    # sizes that 32 does not divide would shift the cells and change 4 or more bits in 1 of 20 resized copies.
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
    """Return the group of each image -> (n,) int64: the smallest row of its group.

    Two images are in one group if their content hashes are equal, if their perceptual hashes differ in at most
    `distance` bits, or if a chain of such pairs connects them. The result is exact. Raises `ValueError` if lengths
    differ or a hash is not 16 hexadecimal digits. Memory grows with n, not with the number of pairs.
    """
    if len(content_hashes) != len(perceptual_hashes):
        raise ValueError(f"{len(content_hashes)} content hashes and {len(perceptual_hashes)} perceptual hashes")
    if not 0 <= distance < BITS:
        raise ValueError(f"distance must be 0 to {BITS - 1} bits, got {distance}")
    n = len(content_hashes)
    parents = np.arange(n)
    first_of: dict[str, int] = {}
    first_rows = (first_of.setdefault(content, row) for row, content in enumerate(content_hashes))
    _join(parents, parents.copy(), np.fromiter(first_rows, np.int64, n))
    hashed = np.array([row for row, value in enumerate(perceptual_hashes) if value is not None], np.int64)
    values = _parse([value for value in perceptual_hashes if value is not None])
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    _join(parents, hashed, hashed[first[inverse]])
    for one, other in _near_pairs(distinct, distance):
        _join(parents, hashed[first[one]], hashed[first[other]])
    return _roots(parents, np.arange(n))


def _parse(hexadecimal: Sequence[str]) -> Hashes:
    """Parse hashes of 16 hexadecimal digits -> (m,) uint64."""
    wrong = next((text for text in hexadecimal if not HASH.fullmatch(text)), None)
    if wrong is not None:
        raise ValueError(f"a perceptual hash must be {BITS // 4} hexadecimal digits, got {wrong!r}")
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), ">u8").astype(np.uint64)


def _near_pairs(hashes: Hashes, distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield every pair of the (m,) distinct hashes within the distance, at least once, in blocks of at most m pairs.

    The bits are divided into distance + k bands: d differing bits change at most d bands, so at least k bands are
    equal. For each choice of k bands, the hashes are sorted by them and those with equal values are compared.
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
    """Bit masks of each choice of k of distance + k bands, for the k of least cost."""

    def cost(k: int) -> float:
        pairs_per_hash = count / float(2 ** (BITS * k / (distance + k)))
        return float(comb(distance + k, k)) * (SORT_NANOSECONDS + PAIR_NANOSECONDS * pairs_per_hash)

    equal = min(range(1, min(8, BITS - distance) + 1), key=cost)
    bands = distance + equal
    # Bits of neighbouring frequencies are correlated: put them into different bands.
    values = [sum(1 << bit for bit in range(band, BITS, bands)) for band in range(bands)]
    return [np.uint64(sum(chosen)) for chosen in combinations(values, equal)]


# --- union-find over rows: a parent is a smaller row of the same group, a root is its own parent ----------------------


def _join(parents: Indices, one: Indices, other: Indices) -> None:
    """Merge the groups of one[i] and other[i]."""
    while True:
        roots = _roots(parents, one), _roots(parents, other)
        separate = roots[0] != roots[1]
        if not separate.any():
            return
        one, other = roots[0][separate], roots[1][separate]
        # A root with several partners gets the smallest as its parent; the next pass joins the others.
        np.minimum.at(parents, np.maximum(one, other), np.minimum(one, other))


def _roots(parents: Indices, rows: Indices) -> Indices:
    """Root of each row: the smallest row of its group. Each step shortens the paths, so few steps are needed."""
    while True:
        parent = parents[rows]
        grandparent = parents[parent]
        if np.array_equal(parent, grandparent):
            return parent
        parents[rows] = grandparent
