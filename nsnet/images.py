"""Decodes image files to RGB arrays, safely.

Dimensions: H height, W width, C = 3 channels (sRGB order R, G, B), uint8.

Input may be hostile. Decoding has three steps: an inspector for the format (`jpeg`, `png`, `tiff`, `rasters`) reads the
headers, limits the cost of decoding and refuses, by name, layouts that are not known to decode correctly; Pillow
decodes; `pixels` converts the result. Formats that start other programs (EPS) or have no signature (TGA) are not tried.
Every exception of a decoder becomes an `ImageError`. A decoder that hangs or crashes cannot be stopped in the same
process; jobs therefore decode in a guarded child process (`jobs.isolation.guard`).
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    DdsImagePlugin,
    GifImagePlugin,
    IcnsImagePlugin,
    IcoImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    PsdImagePlugin,
    QoiImagePlugin,
    SgiImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from nsnet import decoders, jpeg, pixels, png, rasters, samples, tiff
from nsnet.errors import (
    ImageCorruptError,
    ImageEmptyError,
    ImageError,
    ImageTooLargeError,
    ImageUnidentifiedError,
)
from nsnet.kernels import compiled, with_whole_rows
from nsnet.limits import DecodeLimits, Inspected, check_pixels
from nsnet.provenance import exif_texts

INSPECTORS: Final[dict[str, Callable[[bytes, DecodeLimits], Inspected]]] = {
    **rasters.INSPECTORS, "JPEG": jpeg.inspect, "PNG": png.inspect, "TIFF": tiff.inspect,
}  # fmt: skip
MODES: Final[dict[str, tuple[str, ...]]] = {
    "AVIF": ("L", "LA", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "DDS": ("L", "LA", "P", "RGB", "RGBA"),
    "DIB": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P"),
    "HEIF": ("L", "LA", "RGB", "RGBA", "I;16", "I;16L"),
    "ICNS": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "ICO": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "JPEG2000": ("L", "LA", "P", "RGB", "RGBA", "I;16"),
    "MPO": ("L", "RGB", "CMYK"),
    "PCX": ("1", "L", "P", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I", "F"),
    "PSD": ("L", "P", "RGB", "CMYK", "LAB"),
    "QOI": ("RGB", "RGBA"),
    "SGI": ("L", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F"),
    "WEBP": ("RGB", "RGBA"),
}
"""Format -> Pillow's modes that are known to convert correctly. The inspector checks the layouts of a format."""
FORMATS: Final = tuple(name for name in MODES if name != "MPO")
"""Pillow's names of the formats that are tried, by content and not by file name. JPEG includes MPO, its multi-image
variant; HEIF is HEIC."""
COUNTED: Final = ("GIF", "PNG", "PSD", "TIFF")
"""Formats whose frames the inspector counts; Pillow counts those of other formats when it opens a file."""
NAMED: Final = {
    b"IIRO": "camera raw", b"IIRS": "camera raw", b"MMOR": "camera raw", b"IIU\0": "camera raw",
    b"FUJIFILMCCD-RAW": "camera raw", b"FOVb": "camera raw", b"\0MRM": "camera raw",
    b"II\x1a\0\0\0HEAPCCDR": "camera raw", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\2\0\0\0\0\0": "Targa", b"\0\0\x0a\0\0\0\0\0": "Targa", b"\0\0\2\0": "cursor",
    b"%!PS": "PostScript", b"%PDF": "PDF", b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance", b"SIMPLE  =": "FITS",
}  # fmt: skip
"""First bytes -> name of a format that is not decoded."""
LOSSLESS: Final = frozenset({"BMP", "DIB", "GIF", "ICO", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI"})
"""Formats that keep all pixels. TIFF and WebP do so in some files; the others count as lossy."""
LOSSY_TIFF: Final = frozenset({"jpeg", "tiff_jpeg", "webp"})
"""Pillow's names of lossy compressions of TIFF."""
MIN_BYTES: Final = 9
"""Shorter files hold at most a signature."""

decoders.register()
pillow_heif.register_heif_opener(thumbnails=False)
pillow_heif.options.DECODE_THREADS = 1  # one thread per decoder; images are decoded in parallel
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
PLUGINS: Final = (
    BmpImagePlugin, DdsImagePlugin, GifImagePlugin, IcnsImagePlugin, IcoImagePlugin, Jpeg2KImagePlugin, JpegImagePlugin,
    MpoImagePlugin, PcxImagePlugin, PngImagePlugin, PpmImagePlugin, PsdImagePlugin, QoiImagePlugin, SgiImagePlugin,
    TiffImagePlugin, WebPImagePlugin,
)  # fmt: skip
"""Imported to register their formats, so that decoding imports nothing."""


__all__ = ["DecodeLimits", "DecodedImage", "decode", "decode_image", "image_to_rgb", "preload", "thumbnail"]


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image as a viewer shows it: first frame, upright, on a white background."""

    pixels: npt.NDArray[np.uint8]
    """(H, W, 3) uint8, read-only: Pillow's own copy."""
    format: str
    """Pillow's name of the format, from the content."""
    frames: int
    """Number of frames or pages that could be counted in the file; only one is decoded."""
    quality: int | None
    """Estimated quality of a JPEG on libjpeg's scale, 1 to 100; None for other formats."""
    remark: str | None = None
    """Defect of a file that was decoded anyway; None: no defect."""
    texts: tuple[str, ...] = ()
    """Texts of EXIF in which generators leave traces (`provenance.exif_texts`)."""
    lossless: bool = False
    """The file keeps all pixels, as a PNG does; False also if this is not known."""

    @property
    def width(self) -> int:
        """Width in pixels, after the EXIF orientation."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels, after the EXIF orientation."""
        return int(self.pixels.shape[0])


def decode(data: bytes, limits: DecodeLimits | None = None) -> npt.NDArray[np.uint8]:
    """Decode an image file to a new (H, W, 3) uint8 array; see `decode_image` for the details and errors."""
    return decode_image(data, limits).pixels.copy()


def decode_image(data: bytes, limits: DecodeLimits | None = None) -> DecodedImage:
    """Decode an image file: first frame, EXIF orientation applied, flattened on white, 8 bits a channel.

    Raises an `ImageError`: `ImageEmptyError`, `ImageTooLargeError`, `ImageUnidentifiedError` or `ImageCorruptError`.
    """
    limits = limits or DecodeLimits()
    if not data:
        raise ImageEmptyError("the file holds 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data):,} bytes, the limit is {limits.max_bytes:,} (--max-bytes)")
    error: ImageError = _unidentified(data)
    for name in _candidates(data):  # several if the signature is ambiguous: HEIC and AVIF, or a weak one
        try:
            return _decode_as(name, data, limits)
        except ImageTooLargeError:
            raise
        except ImageUnidentifiedError:
            continue
        except ImageError as reason:
            error = reason
    raise error


def image_to_rgb(image: Image.Image, limits: DecodeLimits | None = None) -> npt.NDArray[np.uint8]:
    """Convert a Pillow image of any mode to an upright, read-only (H, W, 3) uint8 array on a white background.

    Raises an `ImageError`, as `decode_image` does.
    """
    with _image_errors():
        check_pixels(image.width, image.height, limits or DecodeLimits())
        return pixels.to_rgb(image)


def preload() -> None:
    """Decode one image of each format, so that libraries load and open now what they need on first use.

    For processes that may not open files, sockets or processes afterwards. Takes a tenth of a second. Raises the errors
    of `decode_image` if a library cannot decode its own format.
    """
    for _, data in samples.samples():
        decode_image(data)


def thumbnail(array: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 to (side_px, side_px, 3) uint8, bicubic, aspect ratio not kept: the input of BLIP."""
    if compiled is None:
        image = Image.fromarray(array)
        return np.array(image.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.uint8)
    resized = np.empty((side_px, side_px, 3), np.uint8)
    compiled.resize(with_whole_rows(array), resized, side_px)
    return resized


def _candidates(data: bytes) -> list[str]:
    """Formats whose signature the file has."""
    if len(data) < MIN_BYTES:
        return []
    return [name for name in FORMATS if (accepts := Image.OPEN[name][1]) is None or accepts(data[:16])]


def _decode_as(name: str, data: bytes, limits: DecodeLimits) -> DecodedImage:
    with _image_errors(), _pillow_limit(limits.max_pixels):
        inspected = INSPECTORS[name](data, limits)
        image = _open(name, inspected.data)
        with image:
            check_pixels(image.width, image.height, limits)
            quality = jpeg.quality(image)
            rgb = _rgb(image, inspected, limits)
            if name == "PNG" and _may_end_early(image) and png.ends_early(inspected.data):
                raise ImageCorruptError("a PNG whose image data end before the last pixel")
            frames = inspected.frames if name in COUNTED else getattr(image, "n_frames", 1)
            image_format = image.format or name
            texts = exif_texts(image)
            lossless = is_lossless(image, inspected.data)
            is_doubtful = inspected.remark is not None or (name == "JPEG" and jpeg.may_be_cut(image))
        if is_doubtful:
            with _open(name, jpeg.other_end(inspected.data)) as other:
                if not np.array_equal(rgb, _rgb(other, inspected, limits)):
                    raise ImageCorruptError("a JPEG that is truncated in its image data")
    return DecodedImage(
        pixels=rgb, format=image_format, frames=frames, quality=quality, remark=inspected.remark, texts=texts,
        lossless=lossless,
    )  # fmt: skip


def is_lossless(image: Image.Image, data: bytes) -> bool:
    """Whether an image's file keeps all pixels; `data`: the file."""
    if image.format == "TIFF":
        return image.info.get("compression") not in LOSSY_TIFF
    if image.format == "WEBP":
        return rasters.is_lossless_webp(data)
    return image.format in LOSSLESS


def _open(name: str, data: bytes) -> Image.Image:
    """Read the headers with one plugin of Pillow; unlike `Image.open`, it raises the cause of a failure."""
    return Image.OPEN[name][0](io.BytesIO(data), "")


def _rgb(image: Image.Image, inspected: Inspected, limits: DecodeLimits) -> npt.NDArray[np.uint8]:
    image.load()
    image_format = image.format or ""
    if image.mode not in MODES.get(image_format, ()):
        raise ImageCorruptError(
            f"a {image_format} of Pillow's mode {image.mode}, which is not known to decode correctly"
        )
    check_pixels(image.width, image.height, limits)  # an icon may be larger than its directory states
    return pixels.to_rgb(image, inspected.box, inspected.full_scale)


def _may_end_early(image: Image.Image) -> bool:
    """Whether the last row is black, or the rows are not stored in order (interlaced)."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or last.getbbox(alpha_only=False) is None


def _unidentified(data: bytes) -> ImageUnidentifiedError:
    known = next((kind for start, kind in NAMED.items() if data.startswith(start)), None)
    if data[4:12] == b"ftypcrx ":
        known = "camera raw"
    content = "not an image in a supported format" if known is None else f"a {known} file, which is not decoded"
    return ImageUnidentifiedError(f"{content} (first bytes {data[:8].hex(' ')}); supported: {', '.join(FORMATS)}")


@contextmanager
def _image_errors() -> Iterator[None]:
    """Convert Pillow's exceptions inside the block to `ImageError` and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about unusual metadata, which is harmless, and about the limit of pixels that is set here.
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
    """Raise Pillow's own limit of pixels, which also covers inner frames, if `max_pixels` is larger."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(before or 0, max_pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
