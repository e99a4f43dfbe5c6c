"""Provides one tiny file of each format, which a process decodes before it loses access to files."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final

from PIL import Image

ENCODED: Final = {
    "AVIF": (
        "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joBBR6nZtaksgAAYoZKTlFUDZDQWZyCQMa4CvILMkFsxiBWC4zJz8ZxHEB8RkhoozC"
        "QFodiDUyM/PS4GqlgJxUJigvsczA0Dk/Jx9sV1ZmQVEBkPbOLEjOB9IimcUFqVD7HKBYoCCzIhMkwMzBwQGkeBLLDJ0bGXhAQsLJ+TlF"
        "eck5FUCTeRnYGoBC4pkFuTA/AR3GwsjUzAJk6uemJJYIMXBxSojW/13EJMXLYSQh/729VfT+//+Pzh9gOH9K8wCHodHT4D3tOQAxFDy5"
    ),
    "HEIF": (
        "eNpjYGCQSSupLMhIzUxmAILczDRDEDs3MzGNgYExLDe1JJEBAhQzUnKKoGyGgszkEgY0oJSZkw82xMWBgREIgYCxCkIDgRgQK2dm5qWB"
        "eSBRUSAnlQnKyyhLNgQx+QoyS3LhSq5lFhQVAOntmQXJ+UC6AqjMmZEZJDQBrEjuA8Ofvz9+MDDwMycAdUg4MPIw/v8PUsAMUsEMQnK7"
        "mBwSgZLaToyMaDILFBpZp73y1FyXxyTFwwESOgEiOBySgOrZXRgPFm1QcgBaI5ycn1OUl5xTARTmZWBrAAqJZBYXpEL95gDFAgWZFZkg"
        "AWYODqBpDOKZBbmw4AOGCEsjEzMLyNG5KYmg0BPSYFzPKvHXWnXV/ktH1N++5dR4AgBC4Ehm"
    ),
}
"""64 × 64 px of one colour, deflated; stored because their encoders take a quarter of a second and start threads."""

SAVED: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("RGB", "BMP", {}), ("RGBA", "DDS", {}), ("RGB", "DIB", {}), ("P", "GIF", {"save_all": True}), ("RGBA", "ICO", {}),
    ("RGB", "JPEG", {}), ("CMYK", "JPEG", {"progressive": True}), ("RGB", "JPEG2000", {}), ("RGB", "MPO", {}),
    ("RGB", "PCX", {}), ("I;16", "PNG", {}), ("RGBA", "PNG", {}), ("F", "PPM", {}), ("RGBA", "QOI", {}),
    ("RGB", "SGI", {}), ("1", "TIFF", {"compression": "group4"}), ("LAB", "TIFF", {}), ("F", "TIFF", {}),
    ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "TIFF", {"compression": "jpeg"}),
    ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}),
)  # fmt: skip
"""Modes, formats and options of the samples that Pillow's encoders write."""


def samples() -> Iterator[tuple[str, bytes]]:
    """Yield format and bytes of each sample."""
    for name, text in ENCODED.items():
        yield name, zlib.decompress(base64.b64decode(text))
    for mode, name, options in SAVED:
        image = Image.new(mode, (16, 16))
        if name in ("JPEG", "TIFF", "WEBP", "PNG"):
            exif = Image.Exif()
            exif[0x0112] = 6
            options = {**options, "exif": exif}
        if name in ("MPO", "GIF"):
            options = {"save_all": True, "append_images": [Image.new(mode, (16, 16), 1)], **options}
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        yield name, buffer.getvalue()
    icon = io.BytesIO()
    Image.new("RGBA", (128, 128)).save(icon, "PNG")
    block = b"ic07" + struct.pack(">I", len(icon.getvalue()) + 8) + icon.getvalue()
    yield "ICNS", b"icns" + struct.pack(">I", len(block) + 8) + block
    yield "PSD", b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3) + bytes(14) + bytes(3 * 16 * 16)
    yield "PPM", b"P3 16 16 9 " + b"1 " * 768
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 1, 4, 0, 0, 2, 0)
    yield "BMP", b"BM" + struct.pack("<IHHI", 0, 0, 0, 62) + header + bytes(4) + b"\xff\0\0\0" + b"\4\0\0\1"
