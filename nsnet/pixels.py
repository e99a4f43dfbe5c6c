"""Pillow's images of any mode to upright RGB arrays of 8 bits on white.

Dimensions: H height, W width; sRGB order R, G, B.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet.errors import ImageCorruptError

BACKGROUND: Final = (255, 255, 255)
"""Transparent images are flattened on white: their hidden colours are not what a viewer sees."""
ORIENTATION_TAG: Final = 0x0112
TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Orientation in EXIF -> what undoes it."""
ROWS_AT_ONCE: Final = 64
"""Rows that are scaled at a time: what is in the processor's cache is not fetched for each step again."""
WHOLE_RANGE: Final = ("HEIF", "PNG", "PPM", "JPEG2000")
"""Formats whose 16-bit samples use all 16 bits."""


def to_rgb(
    image: Image.Image, box: tuple[int, int, int, int] | None = None, full_scale: int | None = None
) -> npt.NDArray[np.uint8]:
    """An (H, W, 3) uint8 array of a loaded image, upright, on white.

    `box`: where the first frame lies in the canvas, which is white around it. `full_scale`: see `limits.Inspected`.
    Raises `ImageCorruptError` where the range of its samples is not known.
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
    return np.array(image, dtype=np.uint8)


def _flat(image: Image.Image, full_scale: int | None) -> Image.Image:
    """RGB, on white where it is transparent."""
    if image.mode == "L" and full_scale is not None and full_scale < 255 and "transparency" in image.info:
        image = image.copy()  # the file gives the transparent grey in its own levels, the pixels are in 256
        image.info["transparency"] = image.info["transparency"] * (255 // full_scale)
    if image.has_transparency_data and not _alpha_is_unused(image):
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, BACKGROUND)
        image.paste(layer, mask=layer.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _alpha_is_unused(image: Image.Image) -> bool:
    """Whether the alpha of a bitmap is 0 everywhere: writers that know no alpha leave the byte empty."""
    return image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation where it can be read; damaged EXIF is not a reason to lose an image."""
    image.load()  # a TIFF turns itself upright then
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # EXIF parsers raise struct.error, SyntaxError, ValueError and more
        return 1
    return int(orientation) if orientation in TURNS else 1


def _to_8_bits(
    values: npt.NDArray[np.generic], image_format: str | None, full_scale: int | None
) -> npt.NDArray[np.uint8]:
    """Scale an (H, W) array of more than 8 bits to uint8; Pillow's own conversion saturates it to white.

    PNG, PGM, JPEG 2000 and HEIC (as pillow-heif gives it) use the whole range of 16 bits. A TIFF, or an array in
    memory, may hold fewer bits in 16 or 32: there the range is the smallest of the usual depths that holds the
    brightest sample. Floating point up to 1.0 is taken as [0, 1], above it as 8 or 16 bits if it reaches their upper
    half. Samples below zero have no black, and are refused.
    """
    brightest, darkest = float(values.max(initial=0)), float(values.min(initial=0))
    if not np.isfinite(brightest) or not np.isfinite(darkest):
        raise ImageCorruptError("the samples hold NaN or infinity")
    if darkest < 0:
        raise ImageCorruptError(f"the samples reach from {darkest:g} to {brightest:g}: which of them is black is open")
    if np.issubdtype(values.dtype, np.floating):
        tops = [1.0, *(top for top in (255.0, 65535.0) if brightest > top / 2)]
        full = next((top for top in tops if brightest <= top), 0.0)
        if not full:
            raise ImageCorruptError(f"the samples are floating point up to {brightest:g}: which is white is open")
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
