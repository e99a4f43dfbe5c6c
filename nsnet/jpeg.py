"""Inspects JPEG files before they are decoded: process, scans, a missing end marker, quality.

Markers and processes: ITU-T T.81, annex B. Adobe's marker: Adobe technical note 5116, section 18.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

from nsnet.errors import ImageCorruptError, ImageTooLargeError
from nsnet.limits import DecodeLimits, Inspected, check_pixels

MAX_SCANS: Final = 100
"""Maximum number of scans of one JPEG. Cameras write 1, progressive encoders 10, optimisers at most 40."""
MAX_SCANNED_PIXELS: Final = 16
"""Maximum pixels over all scans, in units of the pixel limit: each scan visits all blocks of its components."""
MAX_SEGMENTS: Final = 10_000
"""Maximum number of marker segments. 128 MiB of metadata fill 2,048 segments of full length."""
MAX_JUNK_BYTES: Final = 64 * 1024
"""Maximum number of bytes outside of segments before the first scan: Pillow skips them one by one."""
MAX_METADATA_BYTES: Final = 1 << 20
"""Above this size, metadata is removed before Pillow reads it, which takes time quadratic in its length."""

SOI, EOI, SOS, DHT, DAC, APP1, APP14, COM = 0xD8, 0xD9, 0xDA, 0xC4, 0xCC, 0xE1, 0xEE, 0xFE
FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, DAC}
DECODED: Final = {0xC0: "baseline", 0xC1: "extended sequential", 0xC2: "progressive"}
REFUSED: Final = {0xC3: "a lossless JPEG", 0xC9: "a JPEG with arithmetic coding", 0xCA: "a JPEG with arithmetic coding"}
KEPT_METADATA: Final = (b"JFIF\0", b"Exif\0\0", b"Adobe", b"MPF\0")
"""First bytes of the metadata segments that are kept if there is too much metadata."""
STANDALONE: Final = frozenset({0x01, SOI, *range(0xD0, 0xD8)})
_MARKER: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""End of entropy-coded data: a marker that is neither a stuffed zero nor a restart."""
_SCAN_OR_TABLE: Final = re.compile(rb"\xff[\xda\xc4]")
TAILS: Final = (b"\0\0\xff\xd9", bytes((0xAA, *np.random.default_rng(0).integers(1, 255, 4096))) + b"\xff\xd9")
"""Two ends for a file without an end marker. They begin with different bits: if the last scan is truncated, its last
code and all that follows decode differently with each."""


class Segment(NamedTuple):
    """One marker segment: marker, offset, and the bytes after its length."""

    marker: int
    start: int
    body: bytes


class _Frame(NamedTuple):
    progressive: bool
    width: int
    height: int
    components: tuple[int, ...]


def inspect(data: bytes, limits: DecodeLimits) -> Inspected:
    """Read the markers of a JPEG. Raises an `ImageError` if its process, scans or metadata are not supported."""
    head, scan = _head(data)
    frame = _frame(head)
    check_pixels(frame.width, frame.height, limits)
    _check_scans(data, head[-1], frame, limits)
    metadata = sum(len(segment.body) for segment in head if segment.marker >= 0xE0)
    kept = _without_metadata(data, head, scan) if metadata > MAX_METADATA_BYTES else data
    if not data.endswith(b"\xff\xd9") and not _ends(data, scan):
        _check_whole(data, scan, frame)
        return Inspected(data=kept + TAILS[0], remark="the end marker is missing")
    if frame.progressive:
        _check_no_scan_is_missing(data, scan, frame)
    return Inspected(data=kept)


def may_be_cut(image: Image.Image) -> bool:
    """Whether a loaded image ends in the grey with which decoders fill missing data."""
    last = image.getpixel((image.width - 1, image.height - 1))
    return all(level in (127, 128) for level in (last if isinstance(last, tuple) else (last,)))


def other_end(inspected: bytes) -> bytes:
    """Return the file with other bytes before its end marker: it decodes equally if no image data are missing."""
    if inspected.endswith(TAILS[0]):
        return inspected[: -len(TAILS[0])] + TAILS[1]
    _, scan = _head(inspected)
    ends = (segment.start for segment in _segments(inspected, scan) if segment.marker == EOI)
    return inspected[: next(ends, len(inspected))] + TAILS[1]


def quality(image: Image.Image) -> int | None:
    """Quality whose luminance table is nearest to the file's, by the sum of absolute differences; None if damaged.

    Exact for tables on libjpeg's scale. Cameras and Photoshop use their own tables: there it is an estimate.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return None
    try:
        table = np.array(image.quantization[image.layer[0][3]])  # the first component is the luminance
        if table.shape != (64,) or table.min() < 1:
            return None
        # The tables end at 255, as in baseline files; the excess of a 16-bit value adds the same to all sums.
        return 1 + int(np.abs(LUMINANCE_TABLES - table).sum(axis=1).argmin())
    except Exception:  # the table or component is missing, or a later Pillow lacks the attribute
        return None


def _head(data: bytes) -> tuple[list[Segment], int]:
    """Return the segments up to and with the first scan's header, and its offset."""
    segments: list[Segment] = []
    at, junk = 2, 0
    while True:
        start = data.find(b"\xff", at)
        if start < 0 or start + 4 > len(data):
            raise ImageCorruptError("a JPEG that is truncated before its image data")
        junk += start - at
        marker = data[start + 1]
        if marker in (0x00, 0xFF):
            at = start + 1
            junk += 1
        elif marker in STANDALONE:
            at = start + 2
        else:
            length = int.from_bytes(data[start + 2 : start + 4], "big")
            segments.append(Segment(marker, start, data[start + 4 : start + 2 + length]))
            if marker == SOS:
                return segments, start
            at = start + 2 + max(length, 2)
        if junk > MAX_JUNK_BYTES or len(segments) > MAX_SEGMENTS:
            raise ImageCorruptError(
                f"a JPEG with more than {MAX_JUNK_BYTES:,} bytes of junk or {MAX_SEGMENTS:,} segments before its image"
            )


def _frame(head: list[Segment]) -> _Frame:
    frames = [segment for segment in head if segment.marker in FRAMES]
    if not frames or len(frames[0].body) < 6:
        raise ImageCorruptError("a JPEG without a frame header")
    marker, body = frames[0].marker, frames[0].body
    bits, count = body[0], body[5]
    if marker in REFUSED or marker not in DECODED:
        raise ImageCorruptError(f"{REFUSED.get(marker, 'a hierarchical JPEG')}, which is not decoded")
    if bits != 8:
        raise ImageCorruptError(f"a JPEG of {bits} bits per sample; only 8 bits are decoded")
    if count not in (1, 3, 4):
        raise ImageCorruptError(f"a JPEG of {count} components; only 1, 3 or 4 are decoded")
    if len(body) < 6 + 3 * count:
        raise ImageCorruptError("a JPEG whose frame header is truncated")
    if count == 4 and not any(segment.marker == APP14 and segment.body.startswith(b"Adobe") for segment in head):
        raise ImageCorruptError("a JPEG of 4 components without an Adobe marker: its inks may or may not be inverted")
    components = tuple(body[6 + 3 * index] for index in range(count))
    width, height = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
    if not width or not height:
        raise ImageCorruptError(f"a JPEG whose header states {width} × {height} px")
    return _Frame(marker == 0xC2, width, height, components)


def _check_scans(data: bytes, first: Segment, frame: _Frame, limits: DecodeLimits) -> None:
    """Limit the number of scans. Counting marker bytes first is fast and never counts too few scans."""
    if not frame.progressive and first.body[:1] == bytes([len(frame.components)]):
        return  # the first scan holds all components, and decoders stop after it
    most = min(MAX_SCANS, max(1, MAX_SCANNED_PIXELS * limits.max_pixels // (frame.width * frame.height)))
    if sum(1 for _ in _SCAN_OR_TABLE.finditer(data, first.start)) <= most:
        return
    scans = 0
    for index, segment in enumerate(_segments(data, first.start)):
        scans += segment.marker == SOS
        if scans > most or index > MAX_SEGMENTS:
            raise ImageTooLargeError(f"a JPEG of more than {most} scans of {frame.width} × {frame.height} px")


def _segments(data: bytes, scan: int) -> Iterator[Segment]:
    """Yield the segments from the first scan to the end marker."""
    at = scan
    while (match := _MARKER.search(data, at)) is not None:
        marker, start = match[1][0], match.end() - 2
        if marker == EOI:
            yield Segment(EOI, start, b"")
            return
        length = 0 if marker in STANDALONE else int.from_bytes(data[start + 2 : start + 4], "big")
        yield Segment(marker, start, data[start + 4 : start + 2 + length])
        at = start + 2 + length


def _ends(data: bytes, scan: int) -> bool:
    """Whether an end marker follows the image; other bytes may follow it."""
    if data.rfind(b"\xff\xd9") < scan:
        return False
    return any(segment.marker == EOI for segment in _segments(data, scan))


def _check_whole(data: bytes, scan: int, frame: _Frame) -> None:
    """Raise if a JPEG without an end marker also lacks whole scans."""
    if data.endswith(b"\xff"):  # the first byte of a marker or of a stuffed byte
        raise ImageCorruptError("a JPEG that is truncated within its last two bytes")
    _check_no_scan_is_missing(data, scan, frame)


def _check_no_scan_is_missing(data: bytes, scan: int, frame: _Frame) -> None:
    """Raise if the last bit of a coefficient is in no scan."""
    missing = {(component, index) for component in frame.components for index in range(64 if frame.progressive else 1)}
    for segment in _segments(data, scan):
        if segment.marker != SOS or not segment.body:
            continue
        count = segment.body[0]
        if len(segment.body) < 4 + 2 * count:
            break
        first, last, precision = segment.body[1 + 2 * count : 4 + 2 * count]
        if not frame.progressive:
            first = last = precision = 0
        if not precision & 15:  # the lowest bit of these coefficients is in this scan
            ids = segment.body[1 : 1 + 2 * count : 2]
            missing -= {(component, index) for component in ids for index in range(first, min(last, 63) + 1)}
    if missing:
        raise ImageCorruptError("a JPEG that is truncated: scans are missing")


def _without_metadata(data: bytes, head: list[Segment], scan: int) -> bytes:
    """Return the JPEG with only the first metadata segment of each of `KEPT_METADATA`."""
    parts, seen = [data[:2]], set()
    for segment in head:
        if segment.marker >= 0xE0 and segment.marker != SOS:
            kind = next((kind for kind in KEPT_METADATA if segment.body.startswith(kind)), None)
            if kind is None or kind in seen:
                continue
            seen.add(kind)
        if segment.start < scan:
            parts.append(data[segment.start : segment.start + 4 + len(segment.body)])
    return b"".join([*parts, data[scan:]])


def _luminance_tables() -> npt.NDArray[np.int64]:
    """(100, 64): quantisation of qualities 1 to 100, libjpeg's scaling of the standard's table (ITU-T T.81, K.1)."""
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
