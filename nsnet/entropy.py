"""Spectral entropy of patches (eq. 13): exact in fp64, and an estimate in fp32 that costs a fraction of it.

Dimensions: H, W image sides; P patches; N patch side in pixels.

The estimate finds the patches whose exact entropies decide a selection. It is two matrix products per block of
patches, with a basis of cosines and sines instead of complex exponentials. Ranks come from exact entropies alone, so
that they are the same on every processor.
"""

from functools import cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from nsnet.kernels import compiled, with_whole_rows

Spectrum = Literal["magnitude", "power"]
Grey = Literal["mean", "luma"]

LUMA: Final = (299, 587, 114)
"""Weights of red, green and blue in thousandths (ITU-R BT.601), as integers: sums of them are exact everywhere."""
LUMA_SCALE: Final = np.float32(256)
"""What estimates divide such a sum by, exactly."""

EPSILON: Final = 1e-8
LOG_2: Final = float(np.log(2.0))
MARGIN: Final = 1e-3
"""Largest error of an estimate. Measured errors stay below a tenth of it (`tests/nsnet/test_entropy.py`)."""
MAX_ESTIMATED_PX: Final = 64
"""Largest patch side that is estimated. Above, a fast Fourier transform is cheaper than the matrix products."""
PATCHES_AT_ONCE: Final = 256
"""Patches whose entropies are computed at a time: their arrays stay in the processor's caches."""
LEAST_VARYING: Final = 1e-6
"""Sum of all frequencies but the constant one below which a patch is of one level. It is 0 then, but for `TINY`; one
level that differs by the least amount, 1 / `LUMA_SCALE`, contributes more."""
TINY: Final = np.float32(1e-30)
"""Added to each power in fp32, so that zero has a logarithm; it changes no sum."""


def spectral_entropy(patches_pnn: npt.NDArray[np.generic], spectrum: Spectrum = "magnitude") -> npt.NDArray[np.float64]:
    """Spectral entropy of (P, N, N) grey patches -> (P,) float64.

    S = −Σ_k p_k log p_k with p_k = |F_k| / (Σ |F| + ε) over all N² frequencies, including the constant one (eq. 13).
    `magnitude`: natural logarithm, range [0, ln N²]. `power`: |F|² and log2, range [0, log2 N²].
    """
    if patches_pnn.ndim != 3 or patches_pnn.shape[1] != patches_pnn.shape[2]:
        raise ValueError(f"patches must be (P, N, N), got {patches_pnn.shape}")
    import scipy.fft  # 3 times as fast as numpy.fft, but slow to import: only decoding processes need it

    side = patches_pnn.shape[1]
    # The transform of real input is symmetric: half of the columns suffice; columns with a mirror image count twice.
    multiplicity = np.full(side // 2 + 1, 2.0)
    multiplicity[0] = 1.0
    if side % 2 == 0:
        multiplicity[-1] = 1.0
    weight = np.abs(scipy.fft.rfft2(patches_pnn.astype(np.float64)))
    if spectrum == "power":
        weight *= weight
    total = (weight @ multiplicity).sum(axis=1) + EPSILON
    # −Σ p log p = −(Σ w log w)/T + log T · (Σ w)/T saves a division per frequency; w = 0 contributes 0.
    logs = np.log(weight, out=np.zeros_like(weight), where=weight > 0)
    weighted = ((weight * logs) @ multiplicity).sum(axis=1)
    entropy: npt.NDArray[np.float64] = np.maximum(np.log(total) * ((total - EPSILON) / total) - weighted / total, 0.0)
    return entropy / LOG_2 if spectrum == "power" else entropy


def estimate_entropy(
    image_hwc: npt.NDArray[np.uint8], patch_px: int, spectrum: Spectrum = "magnitude", grey: Grey = "mean"
) -> npt.NDArray[np.float64]:
    """Estimate the entropies of all patches of an (H, W, 3) uint8 image, row by row -> (P,) float64.

    Each is within `MARGIN` of `spectral_entropy` of the patch's channel sum; 0 means a patch of one level, exactly.
    """
    entropy = np.empty((len(image_hwc) // patch_px, image_hwc.shape[1] // patch_px))
    knows_grey = grey == "mean" or hasattr(compiled, "LUMA")  # a module of an older installation has no luma
    if compiled is not None and patch_px == compiled.PATCH_PX and knows_grey:
        further = (False, True) if grey == "luma" else ()
        compiled.entropy(with_whole_rows(image_hwc), entropy, spectrum == "power", *further)
    else:
        _estimate(image_hwc.reshape(len(image_hwc), -1), patch_px, spectrum, grey, entropy)
    return entropy.ravel() / (LOG_2 if spectrum == "power" else 1.0)


def _estimate(
    samples: npt.NDArray[np.uint8], side: int, spectrum: Spectrum, grey: Grey, entropy: npt.NDArray[np.float64]
) -> None:
    """Fill `entropy` (rows, columns), in nats, from the samples (H, 3W) of an image."""
    rows, columns = entropy.shape
    down, across = max(1, PATCHES_AT_ONCE // columns), min(columns, PATCHES_AT_ONCE)
    for row in range(0, rows, down):
        for column in range(0, columns, across):
            part = entropy[row : row + down, column : column + across]
            top, left = row * side, 3 * column * side
            block = samples[top : top + side * part.shape[0], left : left + 3 * side * part.shape[1]]
            part[:] = _estimate_block(_channel_sums(block, grey), side, spectrum).reshape(part.shape)


def channel_sum(
    patches_pnnc: npt.NDArray[np.uint8], grey: Grey = "mean"
) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
    """3 × the mean, or 1000 × the luma: entropy does not depend on the scale. (..., 3) uint8 -> (...) unsigned."""
    if grey == "luma":
        red, green, blue = (patches_pnnc[..., i].astype(np.uint32) * LUMA[i] for i in range(3))
        return red + green + blue
    return patches_pnnc[..., 0].astype(np.uint16) + patches_pnnc[..., 1] + patches_pnnc[..., 2]


def _channel_sums(samples: npt.NDArray[np.uint8], grey: Grey) -> npt.NDArray[np.float32]:
    """`channel_sum` of a block of samples, (h, 3w) -> (h, w). Of the mean: contiguous additions of neighbours, then one
    strided pass, in half the time."""
    if grey == "luma":  # scaled to the range of the mean: logarithms of large powers have large rounding errors
        return channel_sum(samples.reshape(len(samples), -1, 3), grey).astype(np.float32) / LUMA_SCALE
    wide = samples.astype(np.uint16)
    sums = wide[:, :-2] + wide[:, 1:-1]
    sums += wide[:, 2:]
    return sums[:, ::3].astype(np.uint16).astype(np.float32)  # a strided cast to fp32 takes twice the time of both


@cache
def _basis(side: int) -> npt.NDArray[np.float32]:
    """Real Fourier basis (N, N): cosines of frequencies 0 to ⌊N/2⌋, then sines of those that have a mirror image."""
    angles = 2.0 * np.pi / side * np.outer(np.arange(side // 2 + 1), np.arange(side))
    return np.concatenate([np.cos(angles), np.sin(angles)[1 : (side + 1) // 2]]).astype(np.float32)


def _estimate_block(grey: npt.NDArray[np.float32], side: int, spectrum: Spectrum) -> npt.NDArray[np.float64]:
    """Entropies in nats of the patches of a block of grey levels, (rows · N, columns · N) -> (rows · columns,).

    Each patch's first row, then its first column sum, is subtracted before a product and accounted for in the constant
    frequency. Otherwise the rounding errors of a bright, almost flat patch would exceed its other frequencies.
    """
    basis = _basis(side)
    rows, count = len(grey) // side, grey.size // side**2
    strips = grey.reshape(rows, side, -1)
    first = strips[:, 0].copy()
    strips -= first[:, None]
    vertical = np.empty((side, *first.shape), np.float32)  # (frequency, row of patches, pixel column)
    for i, strip in enumerate(strips):
        np.matmul(basis, strip, out=vertical[:, i])
    vertical[0] += side * first
    sums = vertical[0].reshape(count, side)
    base = sums[:, 0].copy()
    sums -= base[:, None]
    both = (basis @ vertical.reshape(side * count, side).T).reshape(side, side, count)  # (across, down, patch)
    both[0, 0] += side * base
    power, multiplicity = _powers(both)
    constant: npt.NDArray[np.float64] = power[0].astype(np.float64)
    multiplicity[0] = 0.0  # the constant frequency is added in fp64: it may exceed all others by far
    power += TINY
    logs = np.log(power)
    if spectrum == "magnitude":
        np.sqrt(power, out=power)
        np.sqrt(constant, out=constant)
        logs /= 2  # log √p = (log p) / 2
    varying = (multiplicity @ power).astype(np.float64)
    logs *= power
    weighted = (multiplicity @ logs).astype(np.float64)
    weighted += constant * np.log(constant, out=np.zeros(count), where=constant > 0)
    total = varying + constant + EPSILON
    entropy: npt.NDArray[np.float64] = np.maximum(np.log(total) - weighted / total, EPSILON)
    entropy[varying < LEAST_VARYING] = 0.0
    return entropy


def _powers(both: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """|F|² of the frequencies that differ, (K, patches), the constant one first; and how often each occurs, (K,).

    `both`: coefficients (across, down, patch) in the basis of `_basis`. F of a pair of frequencies is
    (cos·cos − sin·sin) − i(cos·sin + sin·cos), and with the other signs for the mirrored pair.
    """
    side, _, count = both.shape
    pairs = (side - 1) // 2
    edge = slice(0, side // 2 + 1, max(1, side // 2)) if side % 2 == 0 else slice(0, 1)  # without a mirror image
    edges = 2 - side % 2
    cosine, sine = slice(1, 1 + pairs), slice(side // 2 + 1, side)
    singles, halves, quarters = edges**2, edges * pairs, pairs**2
    power = np.empty((singles + 2 * halves + 2 * quarters, count), np.float32)
    power[:singles] = both[edge, edge].reshape(singles, count) ** 2
    across = power[singles : singles + halves].reshape(edges, pairs, count)
    down = power[singles + halves : singles + 2 * halves].reshape(pairs, edges, count)
    np.add(both[edge, cosine] ** 2, both[edge, sine] ** 2, out=across)
    np.add(both[cosine, edge] ** 2, both[sine, edge] ** 2, out=down)
    real = power[singles + 2 * halves :].reshape(2, pairs, pairs, count)
    imaginary = np.empty_like(real)
    np.subtract(both[cosine, cosine], both[sine, sine], out=real[0])
    np.add(both[cosine, cosine], both[sine, sine], out=real[1])
    np.add(both[cosine, sine], both[sine, cosine], out=imaginary[0])
    np.subtract(both[cosine, sine], both[sine, cosine], out=imaginary[1])
    real *= real
    imaginary *= imaginary
    real += imaginary
    return power, np.concatenate([np.ones(singles), np.full(len(power) - singles, 2.0)]).astype(np.float32)
