"""An RGB array to a mosaic of patches, chosen by spectral entropy (eq. 13).

Dimensions: H, W image sides; P patches; N patch side in pixels; K mosaic slots; M mosaic side in pixels, M = N·√K.

Selection works at native resolution: resizing first would destroy the traces that it looks for.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import scipy.fft

from nsnet.errors import ConfigError

Spectrum = Literal["magnitude", "power"]
Selection = Literal["entropy", "center"]

EPSILON: Final = 1e-8
SCORING_SEED: Final = 0
"""Seed of the patch order when scoring: fixed, so that an image scores the same everywhere and for ever."""

CHUNK_PATCHES: Final = 4096
"""Patches transformed at a time: bounds the memory of a large image to about 50 MB."""
TIE_DECIMALS: Final = 9
"""Entropies that differ only beyond this decimal tie: rounding, which differs between processors, must not rank."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Geometry of the mosaic. The paper's: 32 px patches in a 224 px mosaic, 7 × 7 = 49 slots."""

    patch_px: int = 32
    """Side of a patch N, in pixels."""
    mosaic_px: int = 224
    """Side of the mosaic M, in pixels; the input size of the image tower."""
    spectrum: Spectrum = "magnitude"
    """`magnitude`: |F| and natural logarithm (the paper). `power`: |F|² and log2 (the authors' later code)."""
    selection: Selection = "entropy"
    """`entropy`: the paper's. `center`: the M × M px in the middle, as they are: UniversalFakeDetect's input."""

    def __post_init__(self) -> None:
        if self.patch_px < 2 or self.mosaic_px < self.patch_px or self.mosaic_px % self.patch_px:
            raise ConfigError(
                f"mosaic_px ({self.mosaic_px}) must be a positive multiple of patch_px ({self.patch_px}) and patch_px "
                f"at least 2; choose a patch size that divides the image tower's input"
            )
        if self.spectrum not in ("magnitude", "power"):
            raise ConfigError(f"spectrum must be 'magnitude' or 'power', got {self.spectrum!r}")
        if self.selection not in ("entropy", "center"):
            raise ConfigError(f"selection must be 'entropy' or 'center', got {self.selection!r}")

    @property
    def slots(self) -> int:
        """Number of patches in the mosaic, K."""
        return (self.mosaic_px // self.patch_px) ** 2

    def slot_seed(self, seed: int) -> int | None:
        """What `assemble_mosaic` is to shuffle by: the seed, or nothing where the patches are an image's middle."""
        return seed if self.selection == "entropy" else None


def split_patches(image_hwc: npt.NDArray[np.uint8], patch_px: int = 32) -> npt.NDArray[np.uint8]:
    """Cut (H, W, 3) uint8 into (P, N, N, 3) uint8, row by row from the top left corner.

    What is left over at the right and bottom edge is cropped: the published code pads it with black, whose entropy is
    the lowest of all, so that padding is always selected. A side shorter than N is replicated at its edge up to N.
    """
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.dtype != np.uint8 or 0 in image_hwc.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 with H, W ≥ 1, got {image_hwc.shape} {image_hwc.dtype}")
    height, width = image_hwc.shape[:2]
    if height < patch_px or width < patch_px:
        short_rows, short_columns = max(0, patch_px - height), max(0, patch_px - width)
        image_hwc = np.pad(image_hwc, ((0, short_rows), (0, short_columns), (0, 0)), mode="edge")
    rows, columns = image_hwc.shape[0] // patch_px, image_hwc.shape[1] // patch_px
    cropped = image_hwc[: rows * patch_px, : columns * patch_px]
    grid = cropped.reshape(rows, patch_px, columns, patch_px, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(rows * columns, patch_px, patch_px, 3)


def spectral_entropy(patches_pnn: npt.NDArray[np.generic], spectrum: Spectrum = "magnitude") -> npt.NDArray[np.float64]:
    """Spectral entropy of (P, N, N) grey patches -> (P,) float64.

    S = −Σ_k p_k log p_k with p_k = |F_k| / (Σ |F| + ε) over all N² frequencies, the constant one included (eq. 13).
    `magnitude`: natural logarithm, range [0, ln N²]. `power`: |F|² and log2, range [0, log2 N²].
    """
    if patches_pnn.ndim != 3 or patches_pnn.shape[1] != patches_pnn.shape[2]:
        raise ValueError(f"patches must be (P, N, N), got {patches_pnn.shape}")
    side = patches_pnn.shape[1]
    # The transform of real input is symmetric: half of the columns suffice, those with a mirror image count twice.
    twice = np.full(side // 2 + 1, 2.0)
    twice[0] = 1.0
    if side % 2 == 0:
        twice[-1] = 1.0
    entropy = np.empty(len(patches_pnn))
    for start in range(0, len(patches_pnn), CHUNK_PATCHES):
        chunk = patches_pnn[start : start + CHUNK_PATCHES].astype(np.float64)
        weight = np.abs(scipy.fft.rfft2(chunk))
        if spectrum == "power":
            weight *= weight
        total = (weight @ twice).sum(axis=1) + EPSILON
        # −Σ p log p = −(Σ w log w)/T + log T · (Σ w)/T saves a division per frequency; w = 0 contributes 0.
        logs = np.log(weight, out=np.zeros_like(weight), where=weight > 0)
        log_total = np.log(total)
        entropy[start : start + CHUNK_PATCHES] = (
            log_total * ((total - EPSILON) / total) - ((weight * logs) @ twice).sum(axis=1) / total
        )
    entropy = np.maximum(entropy, 0.0)
    return entropy / np.log(2.0) if spectrum == "power" else entropy


def select_patches(image_hwc: npt.NDArray[np.uint8], config: PatchConfig | None = None) -> npt.NDArray[np.uint8]:
    """The K patches of an (H, W, 3) uint8 image that go into the mosaic, in rank order -> (K, N, N, 3) uint8.

    Rank: the ⌈K/2⌉ of highest entropy, highest first, then the ⌊K/2⌋ of lowest; ties by position. Fewer than K
    patches: all of them, highest first, repeated cyclically. `center` takes the middle of the image, row by row.
    """
    config = config or PatchConfig()
    if config.selection == "center":
        return split_patches(center_crop(image_hwc, config.mosaic_px), config.patch_px)
    patches = split_patches(image_hwc, config.patch_px)
    # 3 × the channel mean: entropy ignores the scale. Channel by channel is 10 times as fast as `sum(axis=3)`.
    grey = patches[..., 0].astype(np.uint16) + patches[..., 1] + patches[..., 2]
    order = np.argsort(-spectral_entropy(grey, config.spectrum).round(TIE_DECIMALS), kind="stable")
    if len(order) < config.slots:
        chosen = np.resize(order, config.slots)
    else:
        highest, lowest = (config.slots + 1) // 2, config.slots // 2
        chosen = np.concatenate([order[:highest], order[len(order) - lowest :]])
    return patches[chosen]


def center_crop(image_hwc: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """The middle of an (H, W, 3) uint8 image -> (side, side, 3) uint8; a shorter side is padded with black.

    To the pixel what torchvision's `CenterCrop` does, with which UniversalFakeDetect (arXiv 2302.10174) is tested.
    """
    missing = [max(0, side_px - length) for length in image_hwc.shape[:2]]
    if any(missing):
        image_hwc = np.pad(image_hwc, [*((short // 2, (short + 1) // 2) for short in missing), (0, 0)])
    top, left = (int(round((length - side_px) / 2.0)) for length in image_hwc.shape[:2])
    return image_hwc[top : top + side_px, left : left + side_px]


def assemble_mosaic(patches_knnc: npt.NDArray[np.uint8], seed: int | None) -> npt.NDArray[np.uint8]:
    """Arrange (K, N, N, 3) uint8 patches in an (M, M, 3) uint8 mosaic, in an order that is a pure function of the seed;
    None: as they come.
    """
    slots, side = len(patches_knnc), patches_knnc.shape[1]
    across = int(round(slots**0.5))
    if seed is not None:
        patches_knnc = patches_knnc[np.random.Generator(np.random.PCG64(seed)).permutation(slots)]
    grid = patches_knnc.reshape(across, across, side, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(across * side, across * side, 3)


def select_mosaic(
    image_hwc: npt.NDArray[np.uint8], seed: int = 0, config: PatchConfig | None = None
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 image -> (M, M, 3) uint8 mosaic, a pure function of the pixels and the seed.

    The published code shuffles without a seed, so that one image scores differently each time. Here scoring keeps one
    seed; training puts the epoch and the image into it. The slot order depends on the seed alone and not on a hash of
    the pixels: two encodings of one image, equal but for rounding, must not be shuffled apart.
    """
    config = config or PatchConfig()
    return assemble_mosaic(select_patches(image_hwc, config), config.slot_seed(seed))
