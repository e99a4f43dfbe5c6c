"""The dearest small files of each format: what they cost to decode bounds what one upload can cost.

Each builder takes a size in pixels and gives the bytes of one file.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Builder = Callable[[int, int], bytes]


def marker(kind: int, body: bytes) -> bytes:
    return bytes((0xFF, kind)) + struct.pack(">H", len(body) + 2) + body


def bits_as_bytes(bits: str) -> bytes:
    """Bits of a JPEG scan, filled with ones, with stuffed zeros."""
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0") if bits else b""


def progressive_jpeg(width: int, height: int, scans: int = 100) -> bytes:
    """Grey: one scan of zeros for the means, all others of runs of 32,767 blocks without any coefficient."""
    blocks = -(-width // 8) * -(-height // 8)
    runs, rest = divmod(blocks, 32767)
    body = "".join(f"0{32767 - (1 << 14):014b}" for _ in range(runs))
    # what is left over, as runs of single blocks of a code of their own: symbol 0 ends one block
    body += "10" * rest
    table = bytes((0x10, 1, 1, *[0] * 14, 0xE0, 0x00))
    means = marker(0xC4, bytes((0x00, 1, *[0] * 15, 0x00)))
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    head = b"\xff\xd8" + marker(0xDB, bytes(1) + bytes([16] * 64)) + marker(0xC2, frame) + means + marker(0xC4, table)
    first = marker(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8) + bits_as_bytes("0" * (blocks % 8))
    other = marker(0xDA, b"\1\1\0\1\x3f\0") + bits_as_bytes(body)
    return head + first + other * (scans - 1) + b"\xff\xd9"


def saved(mode: str, file_format: str, colour: Any = 0, **options: Any) -> Builder:
    """A plain image of one colour, by Pillow's encoder."""

    def build(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (width, height), colour).save(buffer, file_format, **options)
        return buffer.getvalue()

    return build


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, colour_type: int, *, interlaced: bool = False, extra: bytes = b"") -> Builder:
    """A PNG of zeros, whose compressed data is a thousandth of them."""

    def build(width: int, height: int) -> bytes:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
        passes = [(0, 0, 1, 1)] if not interlaced else [
            (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
        ]  # fmt: skip
        size = sum(
            len(range(y, height, down)) * (1 + -(-len(range(x, width, right)) * channels * depth // 8))
            for x, y, right, down in passes
        )
        deflate = zlib.compressobj(9)
        parts = [deflate.compress(bytes(min(1 << 24, size - at))) for at in range(0, size, 1 << 24)]
        data = b"".join([*parts, deflate.flush()])
        header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
        return (
            b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", header)
            + extra
            + png_chunk(b"IDAT", data)
            + png_chunk(b"IEND", b"")
        )

    return build


def tiff(photometric: int, bits: int, samples: int, rows: int, *, compression: int = 8) -> Builder:
    """A TIFF of zeros whose strips all lie in the same place."""

    def build(width: int, height: int) -> bytes:
        strip = zlib.compress(bytes(rows * (-(-width * bits * samples // 8))), 9)
        count = -(-height // rows)
        tags = {
            256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * samples), 259: (3, [compression]),
            262: (3, [photometric]), 273: (4, [8] * count), 277: (3, [samples]), 278: (4, [rows]),
            279: (4, [len(strip)] * count),
        }  # fmt: skip
        if bits == 32:
            tags[339] = (3, [3])
        start = 8 + len(strip) + len(strip) % 2
        room = start + 2 + 12 * len(tags) + 4
        entries, beyond = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            body = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
            place = body.ljust(4, b"\0") if len(body) <= 4 else struct.pack("<I", room + len(beyond))
            entries += struct.pack("<HHI", tag, kind, len(values)) + place
            beyond += body if len(body) > 4 else b""
        head = b"II*\0" + struct.pack("<I", start) + strip + bytes(len(strip) % 2)
        return head + struct.pack("<H", len(tags)) + entries + bytes(4) + beyond

    return build


def bmp_of_runs(row: bytes) -> Builder:
    """A run-length coded BMP of 8 bits, the same bytes in each row."""

    def build(width: int, height: int) -> bytes:
        palette, body = bytes(index % 251 for index in range(1024)), row * height
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + palette + body

    return build


def qoi_of_steps(width: int, height: int) -> bytes:
    """A QOI whose pixels all differ from the one before by the longest of the short codes."""
    return b"qoif" + struct.pack(">II", width, height) + b"\3\0" + b"\x80\x11" * (width * height)


def dds_of_masks(width: int, height: int) -> bytes:
    """An uncompressed DirectDraw surface of 16 bits a pixel."""
    head = struct.pack("<7I", 124, 0x1007, height, width, 0, 0, 0) + bytes(44)
    head += struct.pack("<8I", 32, 0x40, 0, 16, 0xF800, 0x7E0, 0x1F, 0) + struct.pack("<5I", 0x1000, 0, 0, 0, 0)
    return b"DDS " + head + bytes(2 * width * height)


def plain_ppm(width: int, height: int) -> bytes:
    """A portable map in digits."""
    return b"P3 %d %d 255 " % (width, height) + b"7 " * (3 * width * height)


def comments_in_ppm(width: int, height: int) -> bytes:
    """A portable map in digits with a comment after each."""
    return b"P2 %d %d 255 " % (width, height) + b"7#\n" * (width * height)


def odd_ppm(width: int, height: int) -> bytes:
    """A binary portable map whose greatest sample is 254."""
    return b"P6 %d %d 254 " % (width, height) + bytes(3 * width * height)


def gif_of_blocks(width: int, height: int) -> bytes:
    """A GIF whose comment, in blocks of one byte, comes before its only frame."""
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    at = buffer.getvalue().index(b",", 13 + 6)
    return buffer.getvalue()[:at] + b"!\xfe" + b"\1x" * (width * height) + b"\0" + buffer.getvalue()[at:]


def jpeg_of_metadata(width: int, height: int) -> bytes:
    """A JPEG with as many segments of EXIF as pixels fit into them."""
    exif = marker(0xE1, b"Exif\0\0" + bytes(65000))
    return b"\xff\xd8" + exif * (width * height // 65000) + saved("RGB", "JPEG")(8, 8)[2:]


def jpeg_of_junk(width: int, height: int) -> bytes:
    """A JPEG with a byte of junk for each pixel before its first marker."""
    return b"\xff\xd8\xff" + bytes(width * height) + saved("RGB", "JPEG")(8, 8)[2:]


def png_of_chunks(width: int, height: int) -> bytes:
    """A PNG with an empty chunk for each pixel."""
    whole = saved("RGB", "PNG")(8, 8)
    return whole[:33] + png_chunk(b"prVt", b"") * (width * height) + whole[33:]


def pages(width: int, height: int) -> bytes:
    """A TIFF with an empty directory for each pixel after its first page."""
    whole = bytearray(saved("RGB", "TIFF")(8, 8))
    link = 8 + 2 + 12 * int.from_bytes(whole[8:10], "little")
    at = len(whole) + len(whole) % 2
    whole[link : link + 4] = struct.pack("<I", at)
    whole += bytes(len(whole) % 2)
    offsets = at + 6 * np.arange(1, width * height + 1, dtype="<u4")
    empty = np.zeros((width * height, 6), np.uint8)
    empty[:, 2:] = offsets.view(np.uint8).reshape(-1, 4)
    return bytes(whole) + empty.tobytes()


LARGEST = (10_950, 10_950)
SLOW = (2048, 2048)
POISONS: dict[str, tuple[Builder, tuple[int, int]]] = {
    "JPEG progressive, 100 scans": (progressive_jpeg, (4376, 4376)),
    "JPEG progressive, 16 scans": (lambda w, h: progressive_jpeg(w, h, 16), LARGEST),
    "JPEG baseline": (saved("RGB", "JPEG", quality=20), LARGEST),
    "JPEG CMYK": (saved("CMYK", "JPEG", quality=20), LARGEST),
    "JPEG of metadata": (jpeg_of_metadata, LARGEST),
    "JPEG of junk": (jpeg_of_junk, LARGEST),
    "PNG RGB": (png(8, 2), LARGEST),
    "PNG RGBA": (png(8, 6), LARGEST),
    "PNG RGBA 16 bits": (png(16, 6), LARGEST),
    "PNG RGBA interlaced": (png(8, 6, interlaced=True), LARGEST),
    "PNG grey 16 bits": (png(16, 0), LARGEST),
    "PNG of chunks": (png_of_chunks, (3000, 3000)),
    "GIF": (saved("P", "GIF"), LARGEST),
    "GIF of blocks": (gif_of_blocks, (8000, 8000)),
    "TIFF RGB": (tiff(2, 8, 3, 64), LARGEST),
    "TIFF rows": (tiff(1, 8, 1, 1), (1200, 99_000)),
    "TIFF Lab": (tiff(8, 8, 3, 64), LARGEST),
    "TIFF CMYK": (tiff(5, 8, 4, 64), LARGEST),
    "TIFF float": (tiff(1, 32, 1, 64), LARGEST),
    "TIFF G4": (saved("1", "TIFF", compression="group4"), LARGEST),
    "TIFF of pages": (pages, (4000, 5000)),
    "WebP lossless": (saved("RGBA", "WEBP", lossless=True), (16_383, 7_324)),
    "WebP lossy": (saved("RGB", "WEBP", quality=10, method=0), (16_383, 7_324)),
    "JPEG 2000": (saved("RGB", "JPEG2000"), LARGEST),
    "JPEG 2000 irreversible": (saved("RGB", "JPEG2000", irreversible=True, quality_layers=[1000]), LARGEST),
    "JPEG 2000 of layers": (saved("L", "JPEG2000", quality_layers=[1000] * 90, precinct_size=(64, 64)), LARGEST),
    "JPEG 2000 of tiles": (saved("L", "JPEG2000", tile_size=(64, 64)), LARGEST),
    "JPEG 2000 of small blocks": (saved("L", "JPEG2000", codeblock_size=(16, 16), precinct_size=(64, 64)), LARGEST),
    "AVIF": (saved("RGB", "AVIF", speed=10, quality=1), LARGEST),
    "HEIC": (saved("RGB", "HEIF", quality=1), (4000, 4000)),
    "BMP of runs": (bmp_of_runs(b"\1\5\0\0"), SLOW),
    "BMP of pixels": (bmp_of_runs(b"\1\5" * 2048 + b"\0\0"), SLOW),
    "QOI of steps": (qoi_of_steps, SLOW),
    "DDS of masks": (dds_of_masks, (8000, 8000)),
    "DDS DXT1": (saved("RGBA", "DDS", pixel_format="DXT1"), LARGEST),
    "PPM in digits": (plain_ppm, (4700, 4700)),
    "PPM of comments": (comments_in_ppm, (6000, 6000)),
    "PPM of 254": (odd_ppm, (6600, 6600)),
    "PCX": (saved("RGB", "PCX"), LARGEST),
    "SGI": (saved("RGB", "SGI"), (6600, 6600)),
}  # fmt: skip
"""Name -> what builds it, and the size that costs most within the default limits."""
