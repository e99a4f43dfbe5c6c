"""Bytes to an RGB array, safely.

Dimensions: H height, W width, C = 3 channels (sRGB order R, G, B), uint8.

Hostile input is expected: every limit is checked before the cost is paid, formats that start other programs (EPS) or
carry no signature (TGA) are not tried, and whatever a decoder raises becomes an `ImageError`. A decoder that hangs or
crashes the process cannot be stopped from inside it; jobs therefore decode in a guarded child process (`jobs.guard`).
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from nsnet.errors import (
    ConfigError,
    ImageCorruptError,
    ImageEmptyError,
    ImageError,
    ImageTooLargeError,
    ImageUnidentifiedError,
)

FORMATS: Final = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI",
    "SGI", "TIFF", "WEBP",
)  # fmt: skip
"""Pillow's names of the formats that are tried, by content, not by name. JPEG covers MPO, its multi-picture kin; HEIF
is HEIC."""

pillow_heif.register_heif_opener(thumbnails=False)
pillow_heif.options.DECODE_THREADS = 1  # as other decoders: parallel are the pictures

BACKGROUND: Final = (255, 255, 255)
"""Transparent pictures are flattened on white: their hidden colours are not what a viewer sees."""

MIN_SIDE_PX: Final = 32
"""Patch selection replicates the edge of a shorter side up to this length; the pixel limit counts those pixels too."""

ORIENTATION_TAG: Final = 0x0112
WHOLE_RANGE: Final = ("HEIF", "PNG", "PPM", "JPEG2000")
"""Formats whose 16-bit samples use all 16 bits."""


def _luminance_tables() -> npt.NDArray[np.int64]:
    """(100, 64): quantisation of qualities 1 to 100, as libjpeg scales the standard's (ITU-T T.81, table K.1)."""
    standard = np.array([
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
        51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121,
        120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ])  # fmt: skip
    qualities = np.arange(1, 101)
    percent = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    tables: npt.NDArray[np.int64] = np.clip((standard * percent[:, None] + 50) // 100, 1, 255)
    return tables


LUMINANCE_TABLES: Final = _luminance_tables()


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one picture may cost."""

    max_bytes: int = 128 * 2**20
    """Largest file, in bytes."""
    max_pixels: int = 120_000_000
    """Largest width × height, in pixels: a 108-megapixel phone photograph passes."""
    max_seconds: float = 30.0
    """Longest decoding time, in seconds; enforced where decoding runs in a guarded process."""
    max_memory_bytes: int = 4 * 2**30
    """Most address space a guarded decoding process may add to itself, in bytes."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_seconds", "max_memory_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """A picture as a viewer would show it: first frame, upright, on a white background."""

    pixels: npt.NDArray[np.uint8]
    """(H, W, 3) uint8."""
    format: str
    """Pillow's name of the format, from the content."""
    frames: int
    """Number of frames or pages in the file; only the first is decoded."""
    quality: int | None
    """Estimated quality of a JPEG on libjpeg's scale, 1 to 100; None for other formats."""

    @property
    def width(self) -> int:
        """Width in pixels, after the EXIF orientation."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels, after the EXIF orientation."""
        return int(self.pixels.shape[0])


def decode(data: bytes, limits: DecodeLimits | None = None) -> npt.NDArray[np.uint8]:
    """Decode a picture file to an (H, W, 3) uint8 array; see `decode_image` for the details and errors."""
    return decode_image(data, limits).pixels


def decode_image(data: bytes, limits: DecodeLimits | None = None) -> DecodedImage:
    """Decode a picture file: first frame, EXIF orientation applied, flattened on white, 8 bits a channel.

    Raises an `ImageError`: `ImageEmptyError`, `ImageTooLargeError`, `ImageUnidentifiedError` or `ImageCorruptError`.
    """
    limits = limits or DecodeLimits()
    if not data:
        raise ImageEmptyError("the file holds 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data):,} bytes, the limit is {limits.max_bytes:,} (--max-bytes)")
    with _image_errors(), _pillow_limit(limits.max_pixels):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageUnidentifiedError(
                f"not a picture in a supported format (first bytes {data[:8].hex(' ')}); "
                f"supported: {', '.join(FORMATS)}"
            ) from error
        with image:
            check_pixels(image.width, image.height, limits)
            if image.format == "HEIF":
                _check_coded_pixels(data, limits)
            quality = jpeg_quality(image)  # before Pillow moves to another frame
            image.load()
            return DecodedImage(
                pixels=image_to_rgb(image, limits),
                format=image.format or "unknown",
                frames=_count_frames(image),
                quality=quality,
            )


def image_to_rgb(image: Image.Image, limits: DecodeLimits | None = None) -> npt.NDArray[np.uint8]:
    """Convert a Pillow image of any mode to an upright (H, W, 3) uint8 array on a white background.

    Raises an `ImageError`, as `decode_image` does.
    """
    with _image_errors():
        check_pixels(image.width, image.height, limits or DecodeLimits())
        return _to_rgb(_upright(image), image.format)


def thumbnail(pixels: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 to (side_px, side_px, 3) uint8, bicubic, aspect ratio not kept: what BLIP is shown."""
    image = Image.fromarray(pixels)
    return np.array(image.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.uint8)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Whatever Pillow raises inside becomes an `ImageError`, and its warnings are silent."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which costs nothing; its bomb warning is about the limit set here.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(_one_line(error)) from error
    # Decoders raise OSError, SyntaxError, ValueError, TypeError, struct.error, MemoryError and more on damaged data.
    except Exception as error:
        raise ImageCorruptError(f"{type(error).__name__}: {_one_line(error)}") from error


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit of pixels, which also guards inner frames, where a larger one than its default is wanted."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(before or 0, max_pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _count_frames(image: Image.Image) -> int:
    """Frames or pages of the file. Counting reads past the first one: damage there must not lose the picture."""
    try:
        return max(1, int(getattr(image, "n_frames", 1)))
    except Exception:  # struct.error, OSError, SyntaxError and more
        return 1


def jpeg_quality(image: Image.Image) -> int | None:
    """Quality whose luminance table is nearest to the file's, by the sum of absolute differences; None where damaged.

    Exact for what libjpeg's scale wrote. Cameras and Photoshop have tables of their own: there it is the likest.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return None
    try:
        table = np.array(image.quantization[image.layer[0][3]])  # of the first component, which is the luminance
        if table.shape != (64,) or table.min() < 1:
            return None
        # The tables stop at 255, as baseline files do: what is above, in one of 16 bits, adds the same to all sums.
        return 1 + int(np.abs(LUMINANCE_TABLES - table).sum(axis=1).argmin())
    except Exception:  # no table of this name, no component, and whatever a later Pillow leaves out
        return None


def check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    """Raise `ImageTooLargeError` where a picture, its short sides widened to a patch, has more pixels than allowed."""
    padded = max(width, MIN_SIDE_PX) * max(height, MIN_SIDE_PX)
    if padded > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width} × {height} px, the limit is {limits.max_pixels:,} pixels with short sides counted as "
            f"{MIN_SIDE_PX} px (--max-pixels)"
        )


def _check_coded_pixels(heif: bytes, limits: DecodeLimits) -> None:
    """The size that a HEIC tells is that of the part which it shows; all that it holds is decoded.

    Every coded picture, a tile or a whole, has an `ispe` box in the file's `meta` box: 4 bytes of version and flags,
    then width and height. The letters are looked for everywhere, also within another find: boxes of any kind may be put
    before one to hide it.
    """
    at = 0
    while at + 8 <= len(heif):
        length, kind = int.from_bytes(heif[at : at + 4], "big"), heif[at + 4 : at + 8]
        if length == 1:  # the length follows, in 8 bytes
            length = int.from_bytes(heif[at + 8 : at + 16], "big")
        end = at + max(length, 8) if length else len(heif)
        if kind == b"meta":
            for size in re.finditer(rb"(?=ispe.{4}(.{4})(.{4}))", heif[at:end], re.DOTALL):
                check_pixels(int.from_bytes(size[1], "big"), int.from_bytes(size[2], "big"), limits)
        at = end


def _to_rgb(image: Image.Image, image_format: str | None) -> npt.NDArray[np.uint8]:
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        samples = np.asarray(image)
        grey = _to_8_bits(samples, image_format)
        if "transparency" in image.info:  # the one grey value that a PNG declares transparent
            grey[samples == image.info["transparency"]] = BACKGROUND[0]
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, BACKGROUND)
        image.paste(layer, mask=layer.getchannel("A"))
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation where it can be read; damaged EXIF is not a reason to lose a picture."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # EXIF parsers raise struct.error, SyntaxError, ValueError and more
        return image
    if orientation not in range(2, 9):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the tag was readable, but rewriting the damaged block around it failed
        operation = {
            2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }[orientation]  # fmt: skip
        return image.transpose(operation)


def _to_8_bits(values: npt.NDArray[np.generic], image_format: str | None) -> npt.NDArray[np.uint8]:
    """Scale an (H, W) array of more than 8 bits to uint8; Pillow's own conversion saturates it to white.

    PNG, PGM, JPEG 2000 and HEIC (as pillow-heif gives it) use the whole range of 16 bits. A TIFF, or an array in
    memory, may hold fewer bits in 16: there the range is the smallest of the usual depths that holds the brightest
    sample. Floating point up to 1.0 is taken as [0, 1].
    """
    samples = values.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ImageCorruptError("the samples hold NaN or infinity")
    brightest = float(samples.max(initial=0.0))
    if np.issubdtype(values.dtype, np.floating) and brightest <= 1.0:
        full = 1.0
    else:
        depths = (16, 32) if image_format in WHOLE_RANGE else (8, 10, 12, 14, 16, 32)
        full = float(next((2**bits - 1 for bits in depths if brightest <= 2**bits - 1), brightest))
    samples *= 255.0 / full
    return np.rint(np.clip(samples, 0.0, 255.0, out=samples), out=samples).astype(np.uint8)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
