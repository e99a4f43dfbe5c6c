"""Converts Pillow images of any mode to upright 8-bit RGB arrays on a white background.

Dimensions: H height, W width; sRGB order R, G, B.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet.errors import ImageCorruptError

BACKGROUND: Final = (255, 255, 255)
"""Transparent images are flattened on white, because a viewer does not see their hidden colours."""
ORIENTATION_TAG: Final = 0x0112
TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> operation that turns the image upright."""
ROWS_AT_ONCE: Final = 64
"""Rows that are scaled at a time, so that they stay in the processor's cache."""
WHOLE_RANGE: Final = ("HEIF", "PNG", "PPM", "JPEG2000")
"""Formats whose 16-bit samples use all 16 bits."""


def to_rgb(
    image: Image.Image, box: tuple[int, int, int, int] | None = None, full_scale: int | None = None
) -> npt.NDArray[np.uint8]:
    """Convert a loaded image to a read-only (H, W, 3) uint8 array, upright, on white.

    `box`: the first frame's box in the canvas, which is white around it. `full_scale`: see `limits.Inspected`.
    Raises `ImageCorruptError` if the range of its samples is not known.
    """
    orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image)
        if image.format == "TIFF" and image.mode == "I":
            samples = samples.view(np.uint32)
        grey = _to_8_bits(samples, image.format, full_scale)
        if "transparency" in image.info:  # the one grey value that a PNG declares transparent
            grey[samples == image.info["transparency"]] = BACKGROUND[0]
        image = Image.merge("RGB", [Image.fromarray(grey)] * 3)
    image = _flat(image, full_scale)
    if box is not None and box != (0, 0, *image.size):
        canvas = Image.new("RGB", image.size, BACKGROUND)
        canvas.paste(image.crop(box), box[:2])
        image = canvas
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return np.asarray(image)


def _flat(image: Image.Image, full_scale: int | None) -> Image.Image:
    """Convert to RGB, with white behind transparent pixels."""
    if image.mode == "L" and full_scale is not None and full_scale < 255 and "transparency" in image.info:
        image = image.copy()  # the transparent grey is in the file's levels, the pixels have 256
        image.info["transparency"] = image.info["transparency"] * (255 // full_scale)
    if image.has_transparency_data and not _alpha_is_unused(image):
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, BACKGROUND)
        image.paste(layer, mask=layer.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _alpha_is_unused(image: Image.Image) -> bool:
    """Whether the alpha of a bitmap is 0 everywhere: writers without support for alpha write 0."""
    return image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if EXIF is damaged, which must not make the image fail."""
    image.load()  # Pillow turns a TIFF upright when it loads it
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # EXIF parsers raise struct.error, SyntaxError, ValueError and more
        return 1
    return int(orientation) if orientation in TURNS else 1


def _to_8_bits(
    values: npt.NDArray[np.generic], image_format: str | None, full_scale: int | None
) -> npt.NDArray[np.uint8]:
    """Scale an (H, W) array of more than 8 bits to uint8; Pillow's own conversion saturates it to white.

    PNG, PGM, JPEG 2000 and HEIC (as decoded by pillow-heif) use the whole range of 16 bits. A TIFF, or an array in
    memory, may hold fewer bits in 16 or 32: the range is then the smallest usual depth that holds the brightest sample.
    Floating point up to 1.0 counts as [0, 1], above it as 8 or 16 bits if it reaches their upper half. Samples below
    zero are refused, because black is not defined.
    """
    brightest, darkest = float(values.max(initial=0)), float(values.min(initial=0))
    if not np.isfinite(brightest) or not np.isfinite(darkest):
        raise ImageCorruptError("the samples hold NaN or infinity")
    if darkest < 0:
        raise ImageCorruptError(f"the samples range from {darkest:g} to {brightest:g}: the value of black is unknown")
    if np.issubdtype(values.dtype, np.floating):
        tops = [1.0, *(top for top in (255.0, 65535.0) if brightest > top / 2)]
        full = next((top for top in tops if brightest <= top), 0.0)
        if not full:
            raise ImageCorruptError(
                f"the samples are floating point up to {brightest:g}: the value of white is unknown"
            )
    elif full_scale is not None and full_scale > 255:
        full = float(full_scale)
    else:
        depths = (16, 32) if image_format in WHOLE_RANGE else (8, 10, 12, 14, 16, 32)
        full = float(next((2**bits - 1 for bits in depths if brightest <= 2**bits - 1), brightest))
    scale, levels = np.float32(255.0 / full), np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS_AT_ONCE):
        samples = values[start : start + ROWS_AT_ONCE].astype(np.float32) * scale
        np.rint(np.clip(samples, 0.0, 255.0, out=samples), out=samples)
        levels[start : start + ROWS_AT_ONCE] = samples
    return levels
