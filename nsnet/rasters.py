"""Inspects files of all formats except JPEG, PNG and TIFF before they are decoded: their layout and their cost.

Each function takes the file and the limits, and raises an `ImageError` that names a layout which is not supported.
"""

import re
import struct
from collections.abc import Callable
from typing import Final

from nsnet import png
from nsnet.errors import ImageCorruptError, ImageTooLargeError, ImageUnidentifiedError
from nsnet.limits import DecodeLimits, Inspected, check_pixels

MAX_SLOW_PIXELS: Final = 2048 * 2048
"""Maximum number of pixels of formats that are decoded in Python, at up to 1.2 s per million pixels."""
MAX_BLOCKS: Final = 100_000
"""Maximum number of blocks of a GIF that are read to find its first frame and to count its frames."""
MAX_ICONS: Final = 1_000
MAX_PACKETS: Final = 10_000
"""Maximum number of packets of a JPEG 2000 file, in addition to one per `MIN_PACKET_PIXELS`."""
MIN_PACKET_PIXELS: Final = 200


def inspect_bmp(data: bytes, limits: DecodeLimits, start: int = 14) -> Inspected:
    """Inspect a BMP, or with `start` 0 a DIB, which is a BMP without its file header."""
    width, height, bits, compression, colours = _bitmap(data, start)
    check_pixels(width, height, limits)
    if compression in (1, 2):
        _check_slow(width, height, "a run-length coded BMP")
    elif bits < 8 and bits not in (1, 4):
        raise ImageCorruptError(f"a BMP of {bits} bits per pixel, which is not decoded")
    elif bits in (4, 8) and colours and (colours <= 2 or bits == 4):
        # Pillow misreads the size of samples if the palette is a short grey one
        palette = data[start + _u32(data, start) :][: colours * (3 if _u32(data, start) == 12 else 4)]
        if _is_grey_ramp(palette, colours, 3 if _u32(data, start) == 12 else 4):
            raise ImageCorruptError(f"a BMP of {bits} bits per pixel with {colours} greys, which is not decoded")
    return Inspected(data=data)


def inspect_dib(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a BMP without its file header; its 4-byte signature also occurs in other files."""
    if len(data) < 16 or data[12:14] != b"\1\0" and data[8:10] != b"\1\0":
        raise ImageUnidentifiedError("not a bitmap")
    return inspect_bmp(data, limits, start=0)


def inspect_dds(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a DirectDraw surface: only one flat texture of colours or grey is allowed."""
    if len(data) < 128:
        raise ImageCorruptError("a DDS that is truncated in its header")
    height, width = struct.unpack_from("<II", data, 12)
    check_pixels(width, height, limits)
    flags, code, bits = struct.unpack_from("<I4sI", data, 80)
    caps = _u32(data, 112)
    if caps & 0xFE00 or caps & 0x200000:
        raise ImageCorruptError("a DDS of several faces or slices, which is not decoded")
    if flags & 0x40:
        if bits not in (8, 16, 24, 32):
            raise ImageCorruptError(f"a DDS of {bits} bits per pixel, which is not decoded")
        _check_size(data, 128, width * height * bits // 8, "DDS")
    elif flags & 4:
        kind = _u32(data, 128) if code == b"DX10" and len(data) >= 148 else 0
        if code == b"DX10" and (_u32(data, 132) != 3 or _u32(data, 136) & 4 or _u32(data, 140) != 1):
            raise ImageCorruptError("a DDS of several faces or slices, which is not decoded")
        if code == b"DX10" and _u32(data, 144) & 7 == 2:
            raise ImageCorruptError("a DDS whose colours are multiplied by alpha, which is not decoded")
        if code in (b"ATI2", b"BC5U", b"BC5S") or kind in (82, 83, 84):
            raise ImageCorruptError("a DDS of two channels (BC5), which is not decoded")
        if kind in (94, 95, 96):
            raise ImageCorruptError("a DDS of floating-point colours (BC6H), whose range is not known")
        has_small_blocks = code in (b"DXT1", b"ATI1", b"BC4U") or kind in (70, 71, 72, 79, 80, 81)
        block_bytes = -(-width // 4) * -(-height // 4) * (8 if has_small_blocks else 16)
        is_uncompressed = kind in (27, 28, 29)
        offset = 148 if code == b"DX10" else 128
        _check_size(data, offset, width * height * 4 if is_uncompressed else block_bytes, "DDS")
    return Inspected(data=data)


def inspect_gif(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a GIF: find the box of the first frame in the canvas and count frames, up to a limit of blocks."""
    if len(data) < 13:
        raise ImageCorruptError("a GIF that is truncated in its header")
    width, height = struct.unpack_from("<HH", data, 6)
    check_pixels(width, height, limits)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    blocks, frames, box = 0, 0, None
    while at < len(data) and blocks < MAX_BLOCKS and data[at] != 0x3B:
        if data[at] == 0x2C and at + 10 < len(data):
            left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
            if not frames:
                check_pixels(max(width, left + wide), max(height, top + high), limits)
                box = (left, top, left + wide, top + high)
            frames += 1
            at += 11 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 128 else 0)
        elif data[at] == 0x21:
            at += 2
        else:
            at, blocks = at + 1, blocks + 1
            continue
        while at < len(data) and data[at] and blocks < MAX_BLOCKS:
            at, blocks = at + 1 + data[at], blocks + 1
        at += 1
    if not frames and blocks >= MAX_BLOCKS:
        raise ImageTooLargeError(f"a GIF of more than {MAX_BLOCKS:,} blocks before its first frame")
    return Inspected(data=data, frames=max(1, frames), box=box)


def inspect_heif(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a HEIF or AVIF: check the size of every coded image, since decoding covers more than the displayed part.

    Every coded image, whether a tile or a whole image, has an `ispe` box in the file's `meta` box: 4 bytes of version
    and flags, then width and height. The search covers all bytes and overlapping matches, because other boxes can hide
    an `ispe` box.
    """
    at = 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if length == 1:  # the length follows, in 8 bytes
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + max(length, 8) if length else len(data)
        if kind == b"meta":
            for match in re.finditer(rb"(?=ispe.{4}(.{4})(.{4}))", data[at:end], re.DOTALL):
                check_pixels(int.from_bytes(match[1], "big"), int.from_bytes(match[2], "big"), limits)
        at = end
    return Inspected(data=data)


def inspect_icns(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect an Apple icon file: check the size of every icon before the best one is decoded."""
    at, icons = 8, 0
    while at + 8 <= len(data):
        length = max(8, int.from_bytes(data[at + 4 : at + 8], "big"))
        icon = data[at + 8 : min(at + length, at + 80)]
        icons += 1
        if icons > MAX_ICONS:
            raise ImageTooLargeError(f"an ICNS of more than {MAX_ICONS:,} icons")
        if icon.startswith(png.SIGNATURE) and len(icon) >= 24:
            check_pixels(int.from_bytes(icon[16:20], "big"), int.from_bytes(icon[20:24], "big"), limits)
        elif icon.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
            inspect_jpeg2000(data[at + 8 : at + length], limits)
        at += length
    return Inspected(data=data)


def inspect_ico(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a Windows icon file: keep only the largest icon and, of equal sizes, the one with most colours."""
    count = min(int.from_bytes(data[4:6], "little"), MAX_ICONS)
    entries = [data[6 + 16 * index : 22 + 16 * index] for index in range(count)]
    if not entries or len(entries[-1]) < 16:
        raise ImageCorruptError("an ICO that is truncated in its directory")
    entry = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), _u16(entry, 6)))
    length, offset = struct.unpack_from("<II", entry, 8)
    icon = data[offset : offset + length]
    if icon.startswith(png.SIGNATURE):
        icon = png.inspect(icon, limits).data
    elif len(icon) >= 40:
        width, height, bits, compression, _ = _bitmap(icon, 0)
        check_pixels(width, height, limits)
        if compression:
            raise ImageCorruptError("a compressed bitmap in an ICO, which is not decoded")
        pixels = icon[_u32(icon, 0) :][: width * (height // 2) * 4]
        if bits == 32 and not any(pixels[3::4]):
            raise ImageCorruptError("an ICO of 32 bits without alpha, which is not decoded")
    head = data[:4] + b"\1\0" + entry[:8] + struct.pack("<II", len(icon), 22)
    return Inspected(data=head + icon)


def inspect_jpeg2000(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a JPEG 2000: one size and depth for all components, sRGB or grey (ISO 15444-1, annexes A and I)."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 42 > len(data):
        raise ImageCorruptError("a JPEG 2000 file without its image data")
    x1, y1, x0, y0, tile_x, tile_y, tile_x0, tile_y0, count = struct.unpack_from(">8IH", data, start + 8)
    check_pixels(max(0, x1 - x0), max(0, y1 - y0), limits)
    components = [data[at : at + 3] for at in range(start + 42, start + 42 + 3 * min(count, 5), 3)]
    if count > 4 or not components or len(set(components)) > 1 or components[0][1:] != b"\1\1":
        raise ImageCorruptError("a JPEG 2000 file whose components differ, are subsampled or are more than 4")
    depth = (components[0][0] & 127) + 1
    if components[0][0] & 128 or not 8 <= depth <= 16:
        kind = "signed" if components[0][0] & 128 else "unsigned"
        raise ImageCorruptError(f"a JPEG 2000 file of {depth} bits, {kind}; only unsigned 8 to 16 bits are decoded")
    if not tile_x or not tile_y:
        raise ImageCorruptError("a JPEG 2000 file with tiles of size 0")
    tiles = -(-(x1 - tile_x0) // tile_x) * -(-(y1 - tile_y0) // tile_y)
    if tiles > 65_535:
        raise ImageTooLargeError("a JPEG 2000 file of more than 65,535 tiles")
    _check_coding(data, start, x1 - x0, y1 - y0, tiles, count)
    space = data.find(b"colr", 0, start)
    code = int.from_bytes(data[space + 7 : space + 11], "big")
    if space >= 0 and data[space + 4] == 1 and code not in (16, 17):
        raise ImageCorruptError(f"a JPEG 2000 file of colour space {code}; only sRGB and grey are decoded")
    return Inspected(data=data)


def inspect_pcx(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a Paintbrush file: run-length coded, with the line length that Pillow assumes."""
    if len(data) < 128 or data[2] > 1 or data[3] not in (1, 2, 4, 8):
        raise ImageUnidentifiedError("not a PCX")
    left, top, right, bottom = struct.unpack_from("<4H", data, 4)
    check_pixels(max(0, right - left + 1), max(0, bottom - top + 1), limits)
    bits, planes, stride = data[3], data[65], _u16(data, 66)
    min_stride = ((right - left + 1) * bits + 7) // 8
    if data[2] != 1 or stride not in (min_stride, min_stride + min_stride % 2):
        raise ImageCorruptError("a PCX without compression, or with padded lines, which is not decoded")
    if (bits, planes) == (1, 1) and data[16:22] not in (bytes(6), b"\0\0\0\xff\xff\xff"):
        raise ImageCorruptError("a PCX of two colours that are not black and white, which is not decoded")
    return Inspected(data=data)


def inspect_ppm(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a portable map: P1 to P6 and grey floating point; the variants of Pillow's own tests are refused."""
    gap = rb"(?:[ \t-\r]|#[^\r\n]*[\r\n])+"
    header = re.match(rb"(P[1-6]|Pf)" + gap + rb"(\d{1,10})" + gap + rb"(\d{1,10})[ \t-\r#]", data)
    if header is None:
        raise ImageUnidentifiedError("not a portable map of a supported kind")
    check_pixels(int(header[2]), int(header[3]), limits)
    return Inspected(data=data)


def inspect_psd(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a Photoshop file: keep the merged image, which has a white background; remove layers and resources."""
    if len(data) < 30 or _u16(data, 4, ">") != 1:
        raise ImageCorruptError("a Photoshop file of another version, or truncated in its header")
    channels, height, width, bits, mode = struct.unpack_from(">HIIHH", data, 12)
    check_pixels(width, height, limits)
    if bits != 8 or mode not in (1, 2, 3, 4, 8, 9):
        names = {0: "bitmap", 1: "grey", 2: "indexed", 3: "RGB", 4: "CMYK", 7: "multichannel", 8: "duotone", 9: "Lab"}
        raise ImageCorruptError(f"a Photoshop file of {bits} bits, {names.get(mode, mode)}, which is not decoded")
    at, layers = 26, 0
    sections = []
    for _ in range(3):
        length = int.from_bytes(data[at : at + 4], "big")
        sections.append(data[at : at + 4 + length])
        at += 4 + length
    if len(sections[2]) >= 10:
        layers = abs(int.from_bytes(sections[2][8:10], "big", signed=True))
    # keep three channels: a fourth is a selection, or the alpha of colours that already have a white background
    header = data[:12] + struct.pack(">H", 3) + data[14:26] if (mode, channels) == (3, 4) else data[:26]
    image = data[at:]
    if (mode, channels) == (3, 4) and image[:2] == b"\0\1":
        image = image[:2] + image[2 : 2 + 6 * height] + image[2 + 8 * height :]
    return Inspected(data=header + sections[0] + bytes(8) + image, frames=max(1, layers))


def inspect_qoi(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a QOI, whose decoder is written in Python."""
    if len(data) < 14 or data[12] not in (3, 4):
        raise ImageCorruptError("a QOI that is truncated in its header, or does not have 3 or 4 channels")
    width, height = struct.unpack_from(">II", data, 4)
    check_pixels(width, height, limits)
    _check_slow(width, height, "a QOI")
    return Inspected(data=data)


def inspect_sgi(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect an SGI image, whose samples must be colours, not indices."""
    if len(data) < 512:
        raise ImageCorruptError("an SGI image that is truncated in its header")
    width, height, channels = struct.unpack_from(">HHH", data, 6)
    check_pixels(width, height, limits)
    if _u32(data, 104, ">"):
        raise ImageCorruptError("an SGI image with a colour map, which is not decoded")
    if data[2] == 0:
        _check_size(data, 512, width * height * channels * data[3], "SGI image")
    return Inspected(data=data)


def inspect_webp(data: bytes, limits: DecodeLimits) -> Inspected:
    """Inspect a WebP: find the box of an animation's first frame in its canvas."""
    box, at = None, 12
    if data[12:16] == b"VP8X" and len(data) >= 30:
        check_pixels(1 + _u24(data, 24), 1 + _u24(data, 27), limits)
        if data[20] & 2:
            for _ in range(MAX_ICONS):
                if data[at : at + 4] == b"ANMF" and at + 20 <= len(data):
                    left, top, wide, high = (_u24(data, at + 8 + 3 * index) for index in range(4))
                    box = (2 * left, 2 * top, 2 * left + wide + 1, 2 * top + high + 1)
                    break
                at += 8 + _u32(data, at + 4) + (_u32(data, at + 4) & 1) if at + 8 <= len(data) else len(data)
    return Inspected(data=data, box=box)


def is_lossless_webp(data: bytes) -> bool:
    """Whether the first image of a WebP keeps all pixels."""
    at = 12
    for _ in range(MAX_ICONS):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        at += 24 if kind == b"ANMF" else 8 + size + (size & 1)  # a frame holds chunks of its own
    return False


INSPECTORS: Final[dict[str, Callable[[bytes, DecodeLimits], Inspected]]] = {
    "AVIF": inspect_heif, "BMP": inspect_bmp, "DDS": inspect_dds, "DIB": inspect_dib, "GIF": inspect_gif,
    "HEIF": inspect_heif, "ICNS": inspect_icns, "ICO": inspect_ico, "JPEG2000": inspect_jpeg2000, "PCX": inspect_pcx,
    "PPM": inspect_ppm, "PSD": inspect_psd, "QOI": inspect_qoi, "SGI": inspect_sgi, "WEBP": inspect_webp,
}  # fmt: skip


def _u16(data: bytes, at: int, order: str = "<") -> int:
    return int(struct.unpack_from(order + "H", data, at)[0])


def _u24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _u32(data: bytes, at: int, order: str = "<") -> int:
    return int(struct.unpack_from(order + "I", data, at)[0])


def _bitmap(data: bytes, start: int) -> tuple[int, int, int, int, int]:
    """Width, height, bits, compression and colours from a bitmap header of any version."""
    size = int.from_bytes(data[start : start + 4], "little")
    if size == 12 and len(data) >= start + 12:
        width, height, _, bits = struct.unpack_from("<4H", data, start + 4)
        return width, height, bits, 0, 1 << bits if bits <= 8 else 0
    if size < 40 or len(data) < start + 40:
        raise ImageCorruptError("a bitmap whose header is truncated or has an unknown size")
    width, height, _, bits, compression = struct.unpack_from("<IiHHI", data, start + 4)
    colours = _u32(data, start + 32)
    return width, abs(height), bits, compression, colours or (1 << bits if bits <= 8 else 0)


def _is_grey_ramp(palette: bytes, colours: int, size: int) -> bool:
    levels = (0, 255) if colours == 2 else range(colours)
    return all(palette[size * at : size * at + 3] == bytes([level % 256] * 3) for at, level in enumerate(levels))


def _check_slow(width: int, height: int, kind: str) -> None:
    if width * height > MAX_SLOW_PIXELS:
        raise ImageTooLargeError(f"{kind} of {width} × {height} px, the limit of its decoder is {MAX_SLOW_PIXELS:,} px")


def _check_size(data: bytes, offset: int, needed: int, kind: str) -> None:
    if len(data) - offset < needed:
        raise ImageCorruptError(f"a truncated {kind}: it has {len(data) - offset:,} of {needed:,} bytes of pixels")


def _check_coding(data: bytes, start: int, width: int, height: int, tiles: int, components: int) -> None:
    """Refuse a JPEG 2000 with too many packets for its pixels: even an empty packet costs decoding time."""
    at = start + 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0x90, 0xD9):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0x52 and length >= 12:
            layers, levels = int.from_bytes(data[at + 6 : at + 8], "big"), min(data[at + 9], 32)
            sizes = data[at + 14 : at + 2 + length] if data[at + 4] & 1 else b"\xff" * (levels + 1)
            precincts = 0
            for level, size in zip(range(levels, -1, -1), sizes, strict=False):
                across, down = -(-width >> level), -(-height >> level)
                precincts += max(tiles, -(-across >> (size & 15)) * -(-down >> (size >> 4)))
            if precincts * layers * components > MAX_PACKETS + width * height // MIN_PACKET_PIXELS:
                raise ImageTooLargeError(f"a JPEG 2000 file of {precincts:,} precincts in {layers:,} layers")
            if min(data[at + 10], data[at + 11]) < 2:
                raise ImageTooLargeError("a JPEG 2000 file of code blocks below 16 px")
        at += 2 + max(length, 2)
