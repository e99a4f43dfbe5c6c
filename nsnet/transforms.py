"""Transforms images: recompression, blur, scaling, noise, cropping, a screenshot.

Dimensions: H, W image sides; σ a standard deviation.

All transforms work at native resolution on (H, W, 3) uint8 RGB: on training images before patch selection, and on test
images for robustness curves. A chain is written as text, such as `resize:0.5+jpeg:75`, which also labels its rows in
results: every chain has exactly one text, and every valid text exactly one chain. A step such as `lossless:jpeg:96` is
applied only to the image of a file that keeps all pixels, such as a PNG.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from nsnet.errors import ConfigError, ImageTooLargeError

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of transform, and the range of its value."""

    meaning: str
    """Meaning of the value, with its unit."""
    low: float
    high: float
    above_low: bool = False
    """`low` itself is not allowed."""
    whole: bool = False
    """Whole numbers only."""
    max_side_px: int | None = None
    """Longest side that its codec can hold, in pixels."""

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a number"
        return f"{self.meaning}, {number} {'>' if self.above_low else '≥'} {self.low:g} and ≤ {self.high:g}"

    def holds(self, value: float) -> bool:
        """Whether a value is in the range; NaN is not."""
        in_range = self.low <= value <= self.high and not (self.above_low and value == self.low)
        return in_range and not (self.whole and value != int(value))


KINDS: Final = {
    "jpeg": Kind(meaning="quality", low=1, high=100, whole=True, max_side_px=65_500),
    "blur": Kind(meaning="standard deviation in px", low=0, high=20, above_low=True),
    "resize": Kind(meaning="factor of both sides", low=0.1, high=4),
    "noise": Kind(meaning="standard deviation in levels of 255", low=0, high=255, above_low=True),
    "crop": Kind(meaning="share of each side that is kept", low=0, high=1, above_low=True),
    "screenshot": Kind(meaning="factor at which it is shown", low=0.1, high=4, max_side_px=16_383),
    "centre": Kind(meaning="longest side of the central part that is kept, in px", low=1, high=65_500, whole=True),
}
"""Name -> meaning and range of its value; `_STEPS` holds the functions."""

ROBUSTNESS: Final[tuple[str, ...]] = tuple(
    "jpeg:95 jpeg:90 jpeg:80 jpeg:70 jpeg:60 jpeg:50 jpeg:40 jpeg:30 blur:0.5 blur:1 blur:2 blur:3 "
    "resize:0.5 resize:0.75 resize:1.5 resize:2 noise:2 noise:5 noise:10 crop:0.9 crop:0.75 crop:0.5 "
    "screenshot:0.75".split()
)
"""Chains of the standard robustness curves."""

SOCIAL_SEEDS: Final = range(5)
"""Seeds of the chains `SOCIAL`."""
LOSSLESS: Final = "lossless:"
"""First letters of a step for lossless files only."""
MESSENGER_QUALITY: Final = 80
"""WebP quality of a screenshot, as re-encoded by a messenger."""
BLUR_REACH: Final = 4.0
"""The Gaussian is truncated at this many σ, as in scipy.ndimage; 0.006 % of its weight is outside."""
GRID_PX: Final = 16
"""Side of the largest blocks of a JPEG, with 4:2:0 chroma subsampling."""
BLOCK_SAMPLES: Final = 1 << 17
"""Samples to blur or add noise to at a time: half a megabyte of float32 stays in a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """One step of a chain: kind and value. Raises `ConfigError` for an unknown name or an invalid value."""

    name: str
    """One of `KINDS`."""
    value: float
    """A value in the kind's range, with at most six significant digits, so that its text is exact."""
    lossless_only: bool = False
    """Apply the step only to the image of a lossless file."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ConfigError(f"unknown transform {self.name!r}: choose {', '.join(KINDS)}")
        if not KINDS[self.name].holds(self.value):
            raise ConfigError(f"{self.name} takes a {KINDS[self.name]}; got {self.value}: choose one in this range")
        if float(f"{self.value:g}") != self.value:
            raise ConfigError(
                f"{self.name} takes at most 6 significant digits, got {self.value!r}: round it to {self.value:g}"
            )

    def __str__(self) -> str:
        return f"{LOSSLESS if self.lossless_only else ''}{self.name}:{self.value:g}"


def parse(text: str) -> tuple[Transform, ...]:
    """Parse a chain: steps `NAME:VALUE` joined by `+`, in the order of application; "" is the empty chain.

    Raises `ConfigError` for any text that `to_text` does not write, including other spellings of a number.
    """
    return tuple(_parse_step(step) for step in text.split("+")) if text else ()


def to_text(chain: Sequence[Transform]) -> str:
    """Write a chain as text; `parse` reads the same chain from it."""
    return "+".join(map(str, chain))


def applicable(chain: Sequence[Transform], *, lossless: bool) -> tuple[Transform, ...]:
    """The steps to apply to the image of a file; `lossless`: the file keeps all pixels."""
    return tuple(step for step in chain if lossless or not step.lossless_only)


def apply(pixels: Pixels, chain: Sequence[Transform], *, seed: int, max_pixels: int) -> Pixels:
    """Apply a chain to (H, W, 3) uint8, without changing it -> a new contiguous (H', W', 3) uint8 array.

    Which steps a file gets is decided before (`applicable`): all of them are applied.

    A pure function of its arguments. The seed, a whole number ≥ 0, determines noise and the position of a crop. The
    random numbers do not depend on the value, so that the points of a robustness curve differ only by it, but differ
    between steps. Raises `ImageTooLargeError` before the first step if any step would give more than `max_pixels`
    pixels, or a side that is too long for its codec.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 with H, W ≥ 1, got {pixels.shape} {pixels.dtype}")
    _check_sizes(pixels.shape[0], pixels.shape[1], chain, max_pixels)
    result = np.array(pixels, order="C")
    for position, transform in enumerate(chain):
        rng = np.random.Generator(np.random.PCG64([position, seed]))
        result = _STEPS[transform.name](result, transform.value, rng)
    return result


AUGMENTED: Final = ("resize", "crop", "blur", "jpeg")
"""Kinds of `AugmentationConfig` in the order of application, in which an image is edited and then stored."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random transforms of training images; off by default.

    UniversalFakeDetect (arXiv 2302.10174) trains with shares of 0.5 for blur and JPEG, at the ranges given here.
    """

    resize_share: float = 0.0
    """Probability that an image is resized."""
    resize_range: tuple[float, ...] = (0.5, 1.5)
    """Minimum and maximum factor; uniform."""
    crop_share: float = 0.0
    """Probability that an image is cropped."""
    crop_range: tuple[float, ...] = (0.5, 1.0)
    """Minimum and maximum remaining share of each side; uniform."""
    blur_share: float = 0.0
    """Probability that an image is blurred."""
    blur_range: tuple[float, ...] = (0.0, 3.0)
    """Minimum and maximum standard deviation, in pixels; uniform; 0 does not change the image."""
    jpeg_share: float = 0.0
    """Probability that an image is re-encoded as JPEG."""
    jpeg_range: tuple[float, ...] = (30.0, 100.0)
    """Minimum and maximum quality; every whole number in this range is equally likely."""

    def __post_init__(self) -> None:
        for name in AUGMENTED:
            share, bounds = self.setting(name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}_share must be a probability in [0, 1], got {share}; 0 switches it off")
            if len(bounds) != 2 or not bounds[0] <= bounds[1]:
                raise ConfigError(f"{name}_range must be two numbers, the least and the largest value, got {bounds}")
            for bound in bounds:
                if not (name == "blur" and bound == 0):
                    _check_bound(name, bound)

    def setting(self, name: str) -> tuple[float, tuple[float, ...]]:
        """Return share and range of a kind."""
        return getattr(self, f"{name}_share"), getattr(self, f"{name}_range")


def draw(config: AugmentationConfig, seed: int) -> tuple[Transform, ...]:
    """Draw a chain for one image: a pure function of the configuration and the seed, a whole number ≥ 0.

    Each kind has its own random numbers, so its draw does not depend on the settings of other kinds. Values are rounded
    to four significant digits and stay in their range.
    """
    numbers = np.random.Generator(np.random.PCG64(seed)).random((len(AUGMENTED), 2)).tolist()
    chain = []
    for name, (chance, fraction) in zip(AUGMENTED, numbers, strict=True):
        share, (low, high) = config.setting(name)
        if KINDS[name].whole:
            value = low + math.floor(fraction * (high - low + 1))
        else:
            value = min(max(float(f"{low + fraction * (high - low):.4g}"), low), high)
        if chance < share and value > 0:
            chain.append(Transform(name=name, value=value))
    return tuple(chain)


def social(seed: int) -> str:
    """A chain like a picture that was posted on one platform and shared on another: each scales it down and compresses.

    A pure function of the seed, a whole number ≥ 0. Factors of 0.5 to 0.95 and qualities of 70 to 90 are assumptions;
    platforms do not publish theirs.
    """
    rng = np.random.Generator(np.random.PCG64([seed]))
    steps = []
    for _ in range(2):
        steps.append(Transform(name="resize", value=round(float(rng.uniform(0.5, 0.95)), 2)))
        steps.append(Transform(name="jpeg", value=int(rng.integers(70, 91))))
    return to_text(steps)


SOCIAL: Final[tuple[str, ...]] = tuple(map(social, SOCIAL_SEEDS))
"""Chains of robustness to social media."""


def _parse_step(text: str) -> Transform:
    name, _, number = text.removeprefix(LOSSLESS).partition(":")
    try:
        transform = Transform(name=name, value=float(number), lossless_only=text.startswith(LOSSLESS))
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a transform: write NAME:VALUE, as in resize:0.5+jpeg:75") from error
    if str(transform) != text:
        raise ConfigError(f"transform {text!r} has another spelling, {str(transform)!r}: write that one")
    return transform


def _check_bound(name: str, bound: float) -> None:
    try:
        Transform(name=name, value=bound)
    except ConfigError as error:
        raise ConfigError(f"{name}_range: {error}") from error


def _check_sizes(height: int, width: int, chain: Sequence[Transform], max_pixels: int) -> None:
    for transform in chain:
        if transform.name in ("resize", "crop", "screenshot"):
            height, width = _scaled(height, transform.value), _scaled(width, transform.value)
        if transform.name == "centre":
            height, width = min(height, int(transform.value)), min(width, int(transform.value))
        if height * width > max_pixels:
            raise ImageTooLargeError(
                f"{transform} would give {width} × {height} px, the limit is {max_pixels:,} pixels (--max-pixels)"
            )
        longest = KINDS[transform.name].max_side_px
        if longest is not None and max(height, width) > longest:
            raise ImageTooLargeError(
                f"{transform} would encode {width} × {height} px, its codec allows sides of up to {longest:,} px: "
                f"resize or crop first"
            )


def _scaled(side_px: int, factor: float) -> int:
    """Multiply a side by a factor and round half up, at least 1 px."""
    return max(1, math.floor(side_px * factor + 0.5))


def _jpeg(pixels: Pixels, quality: float, _rng: np.random.Generator) -> Pixels:
    return _decode(_jpeg_file(pixels, quality), JpegImageFile)


def _jpeg_file(pixels: Pixels, quality: float) -> bytes:
    """Encode as JPEG with Pillow's defaults (baseline, 4:2:0 chroma subsampling)."""
    return _encode(pixels, "JPEG", int(quality))


def _blur(pixels: Pixels, sigma_px: float, _rng: np.random.Generator) -> Pixels:
    """Convolve each channel with a sampled Gaussian, with the image mirrored at its edges (c b a | a b c).

    Equal to scipy.ndimage's `gaussian_filter` up to the rounding of ties, in half the time. Pillow's `GaussianBlur` is
    as fast, but a different filter: up to 3.8 levels off at σ = 3, and 0.5 too dark on average at σ = 1 (measured on 12
    noisy megapixels).
    """
    reach = int(BLUR_REACH * sigma_px + 0.5)
    sampled = [math.exp(-0.5 * (k / sigma_px) ** 2) for k in range(reach + 1)]
    total = sampled[0] + 2 * sum(sampled[1:])
    weights = np.array([weight / total for weight in sampled], dtype=np.float32)
    height, width = pixels.shape[:2]
    columns = _mirrored(-reach, width + reach, width)
    result = np.empty_like(pixels)
    for top, bottom in _strips(height, width):
        strip = pixels[_mirrored(top - reach, bottom + reach, height)].astype(np.float32)
        strip = _convolve_rows(strip, weights)[:, columns]
        # With columns as the first axis, the shifted slices are contiguous.
        strip = _convolve_rows(strip.swapaxes(0, 1), weights).swapaxes(0, 1)
        result[top:bottom] = np.rint(strip)
    return result


def _resize(pixels: Pixels, factor: float, _rng: np.random.Generator) -> Pixels:
    """Scale both sides, bicubic, antialiased when reducing."""
    return _rescale(pixels, factor, Image.Resampling.BICUBIC)


def _noise(pixels: Pixels, std_levels: float, rng: np.random.Generator) -> Pixels:
    """Add independent Gaussian noise to each sample, round, and clip to [0, 255]."""
    result = np.empty_like(pixels)
    for top, bottom in _strips(*pixels.shape[:2]):
        strip = rng.standard_normal((bottom - top, *pixels.shape[1:]), dtype=np.float32)
        strip *= np.float32(std_levels)
        strip += pixels[top:bottom]
        result[top:bottom] = np.clip(np.rint(strip), 0, 255)
    return result


def _crop(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Crop to a share of each side, at a uniformly random position."""
    height, width = (_scaled(side, share) for side in pixels.shape[:2])
    down, right = rng.random(2)
    top = int(down * (pixels.shape[0] - height + 1))
    left = int(right * (pixels.shape[1] - width + 1))
    return pixels[top : top + height, left : left + width].copy()


def _screenshot(pixels: Pixels, factor: float, _rng: np.random.Generator) -> Pixels:
    return _decode(_screenshot_file(pixels, factor), WebPImageFile)


def _screenshot_file(pixels: Pixels, factor: float) -> bytes:
    """Simulate a screenshot: displayed at another size, captured without loss, re-encoded by a messenger.

    Scales bilinearly, as viewers do (antialiased when reducing), then encodes as WebP of quality 80, also 4:2:0.
    """
    return _encode(_rescale(pixels, factor, Image.Resampling.BILINEAR), "WEBP", MESSENGER_QUALITY)


def _centre(pixels: Pixels, side_px: float, _rng: np.random.Generator) -> Pixels:
    """Keep the central part, of at most `side_px` a side; shorter sides stay as they are.

    It starts at a multiple of `GRID_PX`, up to 15 px off the centre: the blocks of a JPEG file would otherwise lie
    elsewhere in each size of image, and tell the sizes apart after all.
    """
    height, width = (min(side, int(side_px)) for side in pixels.shape[:2])
    top, left = ((pixels.shape[i] - side) // 2 // GRID_PX * GRID_PX for i, side in enumerate((height, width)))
    return pixels[top : top + height, left : left + width].copy()


_STEPS: Final[dict[str, Callable[[Pixels, float, np.random.Generator], Pixels]]] = {
    "jpeg": _jpeg, "blur": _blur, "resize": _resize, "noise": _noise, "crop": _crop, "screenshot": _screenshot,
    "centre": _centre,
}  # fmt: skip
_FILES: Final[dict[str, Callable[[Pixels, float], bytes]]] = {"jpeg": _jpeg_file, "screenshot": _screenshot_file}
ENCODERS: Final = tuple(_FILES)
"""Kinds that end in a file."""


def to_file(pixels: Pixels, chain: Sequence[Transform], *, seed: int, max_pixels: int) -> bytes:
    """The file that the last step of a chain makes, one of `ENCODERS`; decoded, it is what `apply` returns.

    Raises `ImageTooLargeError` as `apply` does.
    """
    *steps, last = chain
    _check_sizes(pixels.shape[0], pixels.shape[1], chain, max_pixels)
    return _FILES[last.name](apply(pixels, steps, seed=seed, max_pixels=max_pixels), last.value)


def _encode(pixels: Pixels, codec: str, quality: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, codec, quality=quality)
    return encoded.getvalue()


def _decode(encoded: bytes, reader: type[JpegImageFile] | type[WebPImageFile]) -> Pixels:
    # Not `Image.open`, which warns if the image is above Pillow's own limit of pixels.
    try:
        with reader(io.BytesIO(encoded)) as image:
            return np.array(image.convert("RGB"), dtype=np.uint8)
    except Image.DecompressionBombError as error:  # the WebP reader itself has twice that limit, 179 million
        raise ImageTooLargeError(f"{reader.format} made by a transform: {error}") from error


def _rescale(pixels: Pixels, factor: float, resampling: Image.Resampling) -> Pixels:
    height, width = (_scaled(side, factor) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), resampling), dtype=np.uint8)


def _strips(height: int, width: int) -> list[tuple[int, int]]:
    """Divide the rows into blocks (first, past the last) that limit the memory."""
    rows = max(1, BLOCK_SAMPLES // (3 * width))
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def _mirrored(first: int, last: int, length: int) -> npt.NDArray[np.intp]:
    """Return the indices in [first, last); those outside of [0, length) are reflected, at any distance."""
    index = np.arange(first, last) % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


def _convolve_rows(values: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Convolve along the first axis with a symmetric kernel, given from its centre outwards; drops 2 · reach rows."""
    reach = len(weights) - 1
    rows = len(values) - 2 * reach
    total: npt.NDArray[np.float32] = values[reach : reach + rows] * weights[0]
    pair = np.empty_like(total)
    for k in range(1, reach + 1):
        np.add(values[reach - k : reach - k + rows], values[reach + k : reach + k + rows], out=pair)
        pair *= weights[k]
        total += pair
    return total
