"""Images: samples of all formats, larger ones and poisons, through the guarded decoder."""

import io
import random
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageCms

from jobs.pipeline.decoding import GuardedDecoder
from nsnet.errors import DecoderCrashError, ImageError
from nsnet.limits import DecodeLimits
from nsnet.patches import PatchConfig
from nsnet.preparation import PreparationConfig
from nsnet.samples import samples
from tests.fuzz.mutations import mutated
from tests.support.poisons import POISONS

CONFIG: Final = PreparationConfig(
    thumbnail_px=16, patches=(PatchConfig(patch_px=8, mosaic_px=16),), fingerprint=True,
    limits=DecodeLimits(max_seconds=3.0, max_memory_bytes=2**30),
)  # fmt: skip
SAVED: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("RGB", "JPEG", {"quality": 90}), ("RGB", "JPEG", {"progressive": True, "subsampling": 0}), ("L", "JPEG", {}),
    ("CMYK", "JPEG", {"restart_marker_rows": 1}), ("RGB", "MPO", {"save_all": True}), ("RGB", "PNG", {}),
    ("P", "PNG", {"transparency": 3}), ("LA", "PNG", {}), ("RGB", "PNG", {"save_all": True}), ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"save_all": True, "lossless": True}), ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    ("RGB", "TIFF", {"compression": "jpeg"}), ("RGB", "TIFF", {"compression": "packbits", "save_all": True}),
    ("CMYK", "TIFF", {"compression": "tiff_adobe_deflate"}), ("1", "TIFF", {"compression": "group3"}),
    ("P", "GIF", {"save_all": True}), ("RGBA", "AVIF", {"speed": 10}), ("RGB", "AVIF", {"speed": 10, "save_all": True}),
    ("RGB", "HEIF", {}), ("RGBA", "JPEG2000", {}), ("RGB", "JPEG2000", {"irreversible": True, "tile_size": (64, 64)}),
    ("RGB", "BMP", {}), ("RGBA", "ICO", {}), ("RGBA", "ICNS", {}), ("RGBA", "DDS", {"pixel_format": "DXT5"}),
)  # fmt: skip
"""Modes, formats and options of images that look like photographs; all that can have EXIF, ICC and XMP do."""


@cache
def corpus() -> list[bytes]:
    """Whole files of all formats."""
    ramp = np.linspace(0, 200, 160 * 120 * 4).reshape(120, 160, 4)
    pixels = (ramp + np.random.default_rng(0).integers(0, 55, ramp.shape)).astype(np.uint8)
    photo = Image.fromarray(pixels, "RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0comment"
    facts = {
        "exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
    }  # fmt: skip
    found = [data for _, data in samples()]
    for mode, name, options in SAVED:
        image = photo.convert(mode) if mode != "CMYK" else photo.convert("RGB").convert(mode)
        more = facts if name in ("JPEG", "PNG", "WEBP", "AVIF", "HEIF") else {}
        more = more | ({"append_images": [image.rotate(180)]} if "save_all" in options else {})
        buffer = io.BytesIO()
        image.save(buffer, name, **more | options)
        found.append(buffer.getvalue())
    return found + [build(48, 40) for build, _ in POISONS.values()]


def write(seed: int, folder: Path) -> None:
    """The file of a case."""
    rng = random.Random(f"images {seed}")
    (folder / "image").write_bytes(mutated(rng, rng.choice(corpus()), rng.choice(corpus())))


@cache
def decoder() -> GuardedDecoder:
    """One for all cases: a crash or a timeout must not be seen by the next."""
    return GuardedDecoder(CONFIG)


def run(folder: Path) -> str:
    """Prepare the image: it is prepared, or an `ImageError` says why not."""
    try:
        done = decoder().prepare((folder / "image").read_bytes())
        assert [array.shape for array in done.patches] == [(4, 8, 8, 3)] and done.thumbnail.shape == (16, 16, 3)
        return "prepared"
    except DecoderCrashError as error:
        return f"{type(error).__name__}: {error}"
    except ImageError as error:
        return type(error).__name__


def close() -> None:
    """End the processes."""
    decoder().close()
    decoder()._zygote.close()
