"""Inspects PNG files before they are decoded, and removes chunks that no pixel needs.

Chunks and their order: PNG specification, third edition, chapters 5 and 11; animation: chapter 11.3.6.
"""

import zlib
from typing import Final, NamedTuple

from nsnet.errors import ImageCorruptError, ImageTooLargeError
from nsnet.limits import DecodeLimits, Inspected, check_pixels

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
DECISIVE: Final = frozenset({b"IHDR", b"PLTE", b"IDAT", b"tRNS"})
"""Chunks that determine the pixels."""
PALETTE: Final = 3
"""Colour type."""
CHANNELS: Final = {0: 1, 2: 3, PALETTE: 1, 4: 2, 6: 4}
"""Colour type -> samples per pixel."""
DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Colour type -> allowed bits per sample."""
PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Left, top, horizontal step, vertical step of each pass of an interlaced image."""
TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
COMPRESSED: Final = frozenset({b"iCCP", b"zTXt", b"iTXt"})
ORIENTING: Final = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Starts of the texts in which Pillow looks for an orientation."""
MAX_CHUNKS: Final = 10_000
"""Maximum chunks, in addition to one per `MIN_CHUNK_BYTES` of the file: even an empty chunk costs decoding time."""
MIN_CHUNK_BYTES: Final = 256
FREE_TEXT_BYTES: Final = 4 << 20
TEXT_BYTES_PER_PIXEL: Final = 16
"""Compressed text and profiles may inflate to `FREE_TEXT_BYTES` plus this number per pixel; more counts as a bomb."""
MAX_TEXT_BYTES: Final = 512 * 1024
"""Longest inflated text that is searched for an orientation."""


class Chunk(NamedTuple):
    """One chunk: its kind, and its start and end in the file."""

    kind: bytes
    start: int
    end: int


def inspect(data: bytes, limits: DecodeLimits) -> Inspected:
    """Read the chunks of a PNG. Raises an `ImageError` if a chunk that pixels need is damaged."""
    chunks = read_chunks(data)
    if not chunks or chunks[0].kind != b"IHDR" or chunks[0].end - chunks[0].start < 25:
        apple = chunks and chunks[0].kind == b"CgBI"
        raise ImageCorruptError(
            "a PNG rewritten for Apple's devices (CgBI), which is not decoded" if apple else "a PNG without a header"
        )
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    depth, colour = data[24], data[25]
    check_pixels(width, height, limits)
    if depth not in DEPTHS.get(colour, ()):
        raise ImageCorruptError(f"a PNG of colour type {colour} with {depth} bits, which the format does not have")
    view = memoryview(data)
    room = FREE_TEXT_BYTES + TEXT_BYTES_PER_PIXEL * width * height
    kept: list[Chunk] = []
    _check_order([chunk.kind for chunk in chunks], colour)
    for chunk in chunks:
        inflated = _inflated_bytes(view, chunk, room) if chunk.kind in COMPRESSED else 0
        room -= inflated
        if chunk.kind in DECISIVE:
            if not _is_whole(view, chunk):
                raise ImageCorruptError(f"a PNG with a wrong checksum in {chunk.kind.decode()}")
            if chunk.kind == b"tRNS" and (depth, colour) == (16, 2):
                raise ImageCorruptError("a PNG of 16 bits with a transparent colour, which 8 bits cannot represent")
            kept.append(chunk)
        elif _is_orientation(view, chunk, inflated) or (chunk.kind == b"IEND" and _is_whole(view, chunk)):
            kept.append(chunk)
    if len(kept) < len(chunks):
        data = b"".join([SIGNATURE, *(view[chunk.start : chunk.end] for chunk in kept)])
    return Inspected(data=data, frames=_frames(chunks), full_scale=2**depth - 1)


def ends_early(inspected: bytes) -> bool:
    """Whether the image data of a decoded PNG end before the last pixel; the decoder leaves the rest black."""
    width, height = (int.from_bytes(inspected[at : at + 4], "big") for at in (16, 20))
    bits = inspected[24] * CHANNELS[inspected[25]]
    rows = 0
    for left, top, across, down in PASSES if inspected[28] else ((0, 0, 1, 1),):
        columns = -(-(width - left) // across)
        rows += -(-(height - top) // down) * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    inflater, count = zlib.decompressobj(), 0
    for chunk in read_chunks(inspected):
        stream = inspected[chunk.start + 8 : chunk.end - 4] if chunk.kind == b"IDAT" else b""
        while stream and not inflater.eof and count < rows:
            count += len(inflater.decompress(stream, 1 << 18))
            stream = inflater.unconsumed_tail
    return count < rows


def _check_order(kinds: list[bytes], colour: int) -> None:
    """Raise if the order or number of chunks lets readers differ in the use of a palette or transparent colour."""
    image = kinds.index(b"IDAT") if b"IDAT" in kinds else len(kinds)
    for kind in (b"PLTE", b"tRNS"):
        if kinds.count(kind) > 1 or kind in kinds[image:]:
            raise ImageCorruptError(f"a PNG with {kind.decode()} twice, or after its image data")
    if colour == PALETTE and b"PLTE" not in kinds:
        raise ImageCorruptError("a PNG without its palette")
    if colour == PALETTE and b"tRNS" in kinds[: kinds.index(b"PLTE")]:
        raise ImageCorruptError("a PNG with tRNS before its palette")


def read_chunks(data: bytes) -> list[Chunk]:
    """Return all chunks up to IEND; the last one ends where the file ends."""
    chunks: list[Chunk] = []
    at, most = len(SIGNATURE), MAX_CHUNKS + len(data) // MIN_CHUNK_BYTES
    while at + 8 <= len(data):
        kind, length = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4], "big")
        chunks.append(Chunk(kind, at, min(at + 12 + length, len(data))))
        at += 12 + length
        if kind == b"IEND":
            break
        if len(chunks) > most:
            raise ImageTooLargeError(f"a PNG of more than {most:,} chunks")
    return chunks


def _is_whole(view: memoryview, chunk: Chunk) -> bool:
    """Whether the checksum is correct. Truncated image data pass: decoding shows whether they are enough."""
    body, end = view[chunk.start + 4 : chunk.end - 4], chunk.end
    if end - chunk.start < 12 + int.from_bytes(view[chunk.start : chunk.start + 4], "big"):
        return chunk.kind == b"IDAT"
    return zlib.crc32(body) == int.from_bytes(view[end - 4 : end], "big")


def _is_orientation(view: memoryview, chunk: Chunk, inflated: int) -> bool:
    """Whether an ancillary chunk may hold the orientation and is undamaged."""
    if chunk.kind in TEXTS:
        length = chunk.end - chunk.start
        is_orienting = bytes(view[chunk.start + 8 : chunk.start + 40]).startswith(ORIENTING)
        return is_orienting and max(length, inflated) <= MAX_TEXT_BYTES and _is_whole(view, chunk)
    return chunk.kind == b"eXIf" and _is_whole(view, chunk)


def _inflated_bytes(view: memoryview, chunk: Chunk, room: int) -> int:
    """Inflated size of a chunk's text or profile, up to the first damage. Raises if it exceeds `room`.

    iCCP, zTXt: keyword, 0, method, stream. iTXt: keyword, 0, compression flag, method, language, 0, keyword, 0, text.
    """
    _, _, rest = bytes(view[chunk.start + 8 : chunk.end - 4]).partition(b"\0")
    stream = rest[1:]
    if chunk.kind != b"iTXt" and rest[:1] > b"\0":
        raise ImageCorruptError(f"a PNG with compression method {rest[0]}, which no version of the format has")
    if chunk.kind == b"iTXt":
        if rest[:1] != b"\1":
            return 0
        stream = rest[2:].split(b"\0", 2)[-1]
    inflater, count = zlib.decompressobj(), 0
    try:
        while stream and not inflater.eof:
            count += len(inflater.decompress(stream, 1 << 18))
            stream = inflater.unconsumed_tail
            if count > room:
                raise ImageCorruptError(f"a PNG with text or a profile that inflates to {count:,} bytes or more")
    except zlib.error:
        return count
    return count


def _frames(chunks: list[Chunk]) -> int:
    """Number of frames of an animation, including a default image that is not one of them."""
    kinds = [chunk.kind for chunk in chunks if chunk.kind in (b"acTL", b"fcTL", b"IDAT")]
    if b"acTL" not in kinds or b"fcTL" not in kinds or b"IDAT" not in kinds:
        return 1
    return kinds.count(b"fcTL") + (kinds.index(b"IDAT") < kinds.index(b"fcTL"))
