"""Selects patches of an RGB array by spectral entropy and arranges them in a mosaic (eq. 13).

Dimensions: H, W image sides; P patches; N patch side in pixels; K mosaic slots; M mosaic side in pixels, M = N·√K.

Selection works at native resolution: resizing first would destroy the traces that it detects.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet.config import added
from nsnet.entropy import (
    MARGIN,
    MAX_ESTIMATED_PX,
    PATCHES_AT_ONCE,
    Grey,
    Spectrum,
    channel_sum,
    estimate_entropy,
    spectral_entropy,
)
from nsnet.errors import ConfigError

Selection = Literal["entropy", "center", "resize"]
Fill = Literal["repeat", "black"]

SCORING_SEED: Final = 0
"""Seed of the patch order in scoring; fixed, so that an image always gets the same score."""

TIE_DECIMALS: Final = 9
"""Entropies that differ only after this decimal tie: rounding errors, which depend on the processor, must not rank."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Geometry of the mosaic. In the paper: 32 px patches in a 224 px mosaic, 7 × 7 = 49 slots."""

    patch_px: int = 32
    """Side of a patch N, in pixels."""
    mosaic_px: int = 224
    """Side of the mosaic M, in pixels; the input size of the image tower."""
    spectrum: Spectrum = "magnitude"
    """`magnitude`: |F| and natural logarithm (the paper). `power`: |F|² and log2 (the authors' later code)."""
    selection: Selection = "entropy"
    """`entropy`: the paper's. `center`: the M × M px in the middle, unchanged (UniversalFakeDetect's input). `resize`:
    the whole image, squashed to M × M px (UniversalFakeDetect's input in AIGIBench)."""
    grey: Grey = added("mean")
    """What entropies are of. `mean`: of the channels (the published code). `luma`: BT.601 (the authors' later code)."""
    fill: Fill = added("repeat")
    """Of an image with fewer than K patches. `repeat`: all of them, cyclically. `black`: those of highest and those of
    lowest entropy, even if some are both, then black (the authors' later code)."""

    def __post_init__(self) -> None:
        if self.patch_px < 2 or self.mosaic_px < self.patch_px or self.mosaic_px % self.patch_px:
            raise ConfigError(
                f"mosaic_px ({self.mosaic_px}) must be a positive multiple of patch_px ({self.patch_px}) and patch_px "
                f"at least 2; choose a patch size that divides the image tower's input"
            )
        for name, kind in (("spectrum", Spectrum), ("selection", Selection), ("grey", Grey), ("fill", Fill)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ConfigError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, got {value!r}")

    @property
    def slots(self) -> int:
        """Number of patches in the mosaic, K."""
        return (self.mosaic_px // self.patch_px) ** 2

    def slot_seed(self, seed: int) -> int | None:
        """The seed for `assemble_mosaic`; None, for no shuffling, if the patches are one picture: middle or whole."""
        return seed if self.selection == "entropy" else None


def split_patches(image_hwc: npt.NDArray[np.uint8], patch_px: int = 32) -> npt.NDArray[np.uint8]:
    """Cut (H, W, 3) uint8 into (P, N, N, 3) uint8, row by row from the top left corner.

    The remainder at the right and bottom edge is cropped: the published code pads it with black, which has the lowest
    entropy, so padding is always selected. A side shorter than N is padded to N by replicating its edge.
    """
    patches = _grid(_whole_patches(image_hwc, patch_px), patch_px)
    return np.ascontiguousarray(patches).reshape(-1, patch_px, patch_px, 3)


def _whole_patches(image_hwc: npt.NDArray[np.uint8], patch_px: int) -> npt.NDArray[np.uint8]:
    """The image with sides that are multiples of the patch's: cropped, or padded if shorter than a patch."""
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.dtype != np.uint8 or 0 in image_hwc.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 with H, W ≥ 1, got {image_hwc.shape} {image_hwc.dtype}")
    height, width = image_hwc.shape[:2]
    if height < patch_px or width < patch_px:
        missing_rows, missing_columns = max(0, patch_px - height), max(0, patch_px - width)
        image_hwc = np.pad(image_hwc, ((0, missing_rows), (0, missing_columns), (0, 0)), mode="edge")
    rows, columns = image_hwc.shape[0] // patch_px, image_hwc.shape[1] // patch_px
    return image_hwc[: rows * patch_px, : columns * patch_px]


def _grid(image_hwc: npt.NDArray[np.uint8], patch_px: int) -> npt.NDArray[np.uint8]:
    """View of an image of whole patches as (rows, columns, N, N, 3)."""
    height, width = image_hwc.shape[:2]
    return image_hwc.reshape(height // patch_px, patch_px, width // patch_px, patch_px, 3).swapaxes(1, 2)


def select_patches(image_hwc: npt.NDArray[np.uint8], config: PatchConfig | None = None) -> npt.NDArray[np.uint8]:
    """Select the K patches of an (H, W, 3) uint8 image for the mosaic, in rank order -> (K, N, N, 3) uint8.

    Rank: the ⌈K/2⌉ of highest entropy, highest first, then the ⌊K/2⌋ of lowest; ties by position. An image with fewer
    than K patches gives all of them, highest first, repeated cyclically; with `black` see `PatchConfig.fill`. `center`,
    `resize`: the middle of the image, or the whole, row by row.
    """
    config = config or PatchConfig()
    if config.selection != "entropy":
        fit = center_crop if config.selection == "center" else squash
        return split_patches(fit(image_hwc, config.mosaic_px), config.patch_px)
    image_hwc = _whole_patches(image_hwc, config.patch_px)
    grid = _grid(image_hwc, config.patch_px)
    columns = grid.shape[1]
    candidates, entropy = _candidates(image_hwc, grid, config)
    order = candidates[np.argsort(-entropy.round(TIE_DECIMALS), kind="stable")]
    if len(order) < config.slots and config.fill == "repeat":
        chosen = np.resize(order, config.slots)
    else:
        highest, lowest = (config.slots + 1) // 2, config.slots // 2
        chosen = np.concatenate([order[:highest], order[max(0, len(order) - lowest) :]])
    selected: npt.NDArray[np.uint8] = grid[chosen // columns, chosen % columns]
    missing = config.slots - len(chosen)
    return np.pad(selected, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else selected


def _candidates(
    image_hwc: npt.NDArray[np.uint8], grid: npt.NDArray[np.uint8], config: PatchConfig
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Positions of the patches among which the chosen ones are, ascending, and their exact entropies.

    Estimates leave out patches that are beyond both cut-offs by more than the error of two estimates.
    """
    rows, columns = grid.shape[:2]
    highest, lowest = (config.slots + 1) // 2, config.slots // 2
    candidates = varying = np.arange(rows * columns)
    if config.slots < len(candidates) and config.patch_px <= MAX_ESTIMATED_PX:
        estimate = estimate_entropy(image_hwc, config.patch_px, config.spectrum, config.grey)
        ascending = np.sort(estimate)
        at_least, at_most = ascending[-highest] - 2 * MARGIN, ascending[max(0, lowest - 1)] + 2 * MARGIN
        candidates = np.flatnonzero((estimate >= at_least) | (estimate <= at_most))
        varying = candidates[estimate[candidates] > 0]  # others are of one level: their entropy is 0
    entropy = np.zeros(rows * columns)
    for start in range(0, len(varying), PATCHES_AT_ONCE):
        part = varying[start : start + PATCHES_AT_ONCE]
        levels = channel_sum(grid[part // columns, part % columns], config.grey)
        entropy[part] = spectral_entropy(levels, config.spectrum)
    return candidates, entropy[candidates]


def center_crop(image_hwc: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """Crop the middle of an (H, W, 3) uint8 image -> (side, side, 3) uint8; a shorter side is padded with black.

    Equal to torchvision's `CenterCrop`, with which UniversalFakeDetect (arXiv 2302.10174) is tested.
    """
    missing = [max(0, side_px - length) for length in image_hwc.shape[:2]]
    if any(missing):
        image_hwc = np.pad(image_hwc, [*((short // 2, (short + 1) // 2) for short in missing), (0, 0)])
    top, left = (int(round((length - side_px) / 2.0)) for length in image_hwc.shape[:2])
    return image_hwc[top : top + side_px, left : left + side_px]


def squash(image_hwc: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """Resize an (H, W, 3) uint8 image to (side, side, 3) uint8, whatever its shape.

    Equal to torchvision's `Resize((side, side))` of a Pillow image, with which AIGIBench tests UniversalFakeDetect:
    bilinear, over the area of a pixel where the image shrinks.
    """
    resized = Image.fromarray(np.ascontiguousarray(image_hwc)).resize((side_px, side_px), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def assemble_mosaic(
    patches_knnc: npt.NDArray[np.uint8], seed: int | None, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Arrange (K, N, N, 3) uint8 patches in an (M, M, 3) uint8 mosaic, shuffled by the seed; None: in their order.

    `out`: contiguous array to write to and return; None: a new one.
    """
    slots, side = len(patches_knnc), patches_knnc.shape[1]
    across = int(round(slots**0.5))
    if out is None:
        out = np.empty((across * side, across * side, 3), np.uint8)
    if seed is not None:
        patches_knnc = patches_knnc[_slot_order(slots, seed)]
    grid = out.reshape(across, side, across, side, 3).swapaxes(1, 2)
    grid[...] = patches_knnc.reshape(across, across, side, side, 3)
    return out


@lru_cache(64)
def _slot_order(slots: int, seed: int) -> npt.NDArray[np.int64]:
    """The shuffled order of slots. Cached: the generator costs more than the shuffling, and seeds are few."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(slots)


def select_mosaic(
    image_hwc: npt.NDArray[np.uint8], seed: int = 0, config: PatchConfig | None = None
) -> npt.NDArray[np.uint8]:
    """Make the mosaic (M, M, 3) uint8 of an (H, W, 3) uint8 image, a pure function of the pixels and the seed.

    The published code shuffles without a seed, so the score of an image changes each time. Here scoring uses one fixed
    seed; training derives the seed from epoch and image. The slot order depends only on the seed, not on a hash of the
    pixels: two encodings of an image that differ by rounding must get the same order.
    """
    config = config or PatchConfig()
    return assemble_mosaic(select_patches(image_hwc, config), config.slot_seed(seed))
