"""Inspects TIFF files before they are decoded: selects the page and checks that its layout decodes correctly.

Tags: TIFF 6.0, its supplements 1 and 2, DNG 1.7. Layouts that `_Layout` does not support are refused by name: Pillow
opens many of them and returns wrong pixels.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from nsnet.errors import ImageCorruptError, ImageError, ImageTooLargeError
from nsnet.limits import DecodeLimits, Inspected, check_pixels

MAX_PAGES: Final = 1_000
"""Maximum number of directories that are read to select a page."""
MAX_COUNTED_PAGES: Final = 100_000
"""Maximum number of directories that are counted."""
MAX_TAGS: Final = 1_000
MAX_STRIPS: Final = 100_000
"""Maximum number of strips or tiles: each costs decoding time, even if all have the same offset."""
MAX_SCANS_PER_STRIP: Final = 20
"""Maximum number of JPEG scans per strip or tile, on average."""

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
FILL_ORDER, MAKE, STRIPS, SAMPLES, STRIP_ROWS, STRIP_BYTES = 266, 271, 273, 277, 278, 279
PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 284, 317, 320, 322, 323, 324, 325
SUB_IFDS, INK_SET, DOT_RANGE, EXTRA, FORMAT, JPEG_TABLES = 330, 332, 336, 338, 339, 347
COEFFICIENTS, SUBSAMPLING, BLACK_WHITE, CFA_SIZE, CFA, DNG, DNG_BACKWARD = 529, 530, 532, 33421, 33422, 50706, 50707
INTEGERS: Final = frozenset({
    SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIPS, SAMPLES, STRIP_ROWS,
    STRIP_BYTES, PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, INK_SET, EXTRA, FORMAT,
    SUBSAMPLING,
})  # fmt: skip
"""Tags that determine the pixels: if they have another type, readers interpret them differently."""
RATIONAL, RATIONALS = 5, (COEFFICIENTS, BLACK_WHITE)

PROGRESSIVE: Final = re.compile(rb"\xff\xc2\0[\x0b\x11\x14]\x08")
"""Start of the header of a progressive JPEG of 8 bits and 1, 3 or 4 components."""

TYPE_SIZES: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
"""Integer types of tags -> their formats in `struct`."""
REDUCED, MASK = 1, 4
"""Bits of NewSubfileType."""

PHOTOMETRICS: Final = {
    0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 4: "transparency mask", 5: "CMYK", 6: "YCbCr",
    8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "CFA", 32844: "LogL", 32845: "LogLuv", 34892: "LinearRaw",
}  # fmt: skip
FORMATS: Final = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "undefined", 5: "complex integer", 6: "complex"}
EXTRAS: Final[dict[tuple[int, int], tuple[tuple[int, ...], ...]]] = {
    (1, 8): ((0,), (2,)),
    (2, 8): ((0,), (0, 0), (0, 0, 0), (1,), (1, 0), (1, 0, 0), (2,), (2, 0), (2, 0, 0), (999,)),
    (2, 16): ((0,), (1,), (2,)),
    (3, 8): ((0,), (2,)),
    (5, 8): ((0,), (0, 0)),
}
"""Photometric interpretation and bits -> allowed ExtraSamples: 0 unspecified, 1 premultiplied alpha, 2 alpha. Corel
writes 999 for alpha. RGB of 4 samples without the tag also has alpha."""
COLOURS: Final = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
"""Photometric interpretations that are decoded -> their samples."""
UNCOMPRESSED, JPEG, CCITT, PREDICTED = 1, 7, (2, 3, 4), (5, 8, 32946, 34925, 50000)
COMPRESSIONS: Final = {
    1: "none", 2: "CCITT RLE", 3: "CCITT G3", 4: "CCITT G4", 5: "LZW", 7: "JPEG", 8: "Deflate", 32773: "PackBits",
    32946: "Deflate", 34925: "LZMA", 50000: "Zstandard",
}  # fmt: skip
"""Compressions that are decoded."""
RAW_COMPRESSIONS: Final = frozenset({32767, 32769, 32770, 34713, 34892, 65000, 65535})
"""Compressions of Sony, Epson, Samsung, Nikon, lossy DNG, Kodak and Pentax."""


@dataclass
class Directory:
    """One image file directory: its offset and its tags of integer types; fractions have two numbers each."""

    offset: int
    tags: dict[int, tuple[int, ...]] = field(default_factory=dict)
    odd_tags: list[int] = field(default_factory=list)
    """Tags of `INTEGERS` that have another type."""
    following: int = 0

    def one(self, tag: int, default: int) -> int:
        """Return the first value of a tag."""
        values = self.tags.get(tag)
        return values[0] if values else default

    @property
    def is_reduced(self) -> bool:
        """Whether it is a reduced version of another image, or a mask, by the new or the old tag."""
        return bool(self.one(SUBFILE, 0) & (REDUCED | MASK)) or self.one(OLD_SUBFILE, 1) == 2

    @property
    def is_mask(self) -> bool:
        """Whether it is a transparency mask of another image."""
        return bool(self.one(SUBFILE, 0) & MASK) or self.one(PHOTOMETRIC, 1) == 4

    @property
    def is_raw(self) -> bool:
        """Whether it holds raw sensor data, or belongs to a file that does."""
        raw = self.one(PHOTOMETRIC, 1) in (32803, 34892) or self.one(COMPRESSION, 1) in RAW_COMPRESSIONS
        return raw or any(tag in self.tags for tag in (DNG, DNG_BACKWARD, CFA, CFA_SIZE))

    @property
    def pixels(self) -> int:
        """Width × height."""
        return self.one(WIDTH, 0) * self.one(HEIGHT, 0)


class _Reader:
    """The directories of a TIFF, classic or big, of either byte order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        self.big = 43 in (data[2], data[3])
        # Pillow treats a version in the other byte order as that of big-endian files
        if data[:4] in (b"II\0*", b"MM*\0"):
            raise ImageCorruptError("a TIFF whose byte order and version contradict each other")
        if self.big and self.order == ">":
            raise ImageCorruptError("a BigTIFF of big-endian numbers, which is not decoded")
        self.first = self._number(8 if self.big else 4, "Q" if self.big else "I")

    def _number(self, at: int, kind: str) -> int:
        try:
            return int(struct.unpack_from(self.order + kind, self.data, at)[0])
        except struct.error as error:
            raise ImageCorruptError("a TIFF that is truncated in a directory") from error

    def chain(self) -> Iterator[Directory]:
        """Yield the directories in order until one cannot be read, at most `MAX_PAGES`."""
        at, seen = self.first, set[int]()
        while at and at not in seen and len(seen) < MAX_PAGES:
            seen.add(at)
            try:
                directory = self.directory(at)
            except ImageError:
                if len(seen) == 1:
                    raise
                return
            yield directory
            at = directory.following

    def count(self) -> int:
        """Count the directories in the chain until one cannot be read."""
        size, skip, kind, link = (20, 8, "Q", "Q") if self.big else (12, 2, "H", "I")
        at, seen = self.first, set[int]()
        while at and at not in seen and len(seen) < MAX_COUNTED_PAGES:
            try:
                following = self._number(at + skip + size * self._number(at, kind), link)
            except ImageError:
                break
            seen.add(at)
            at = following
        return max(1, len(seen))

    def directory(self, at: int) -> Directory:
        """Read the directory at an offset. Raises an `ImageError` if it cannot be read or has too many tags."""
        size, skip, kind, link = (20, 8, "Q", "Q") if self.big else (12, 2, "H", "I")
        count = self._number(at, kind)
        if count > MAX_TAGS:
            raise ImageTooLargeError(f"a TIFF with {count:,} tags in a directory, the limit is {MAX_TAGS:,}")
        directory = Directory(at, following=self._number(at + skip + size * count, link))
        for entry in range(at + skip, at + skip + size * count, size):
            tag, type_, length = struct.unpack_from(self.order + ("HHQ" if self.big else "HHI"), self.data, entry)
            if tag not in directory.tags and type_ in TYPE_SIZES:
                directory.tags[tag] = self._values(entry + size - (8 if self.big else 4), TYPE_SIZES[type_], length)
            elif tag not in directory.tags and tag in RATIONALS and type_ == RATIONAL:
                directory.tags[tag] = self._values(entry + size - (8 if self.big else 4), "I", 2 * length)
            elif tag == MAKE:
                directory.tags[tag] = (length,)
            elif tag not in directory.tags and tag in INTEGERS:
                directory.odd_tags.append(tag)
        return directory

    def _values(self, at: int, kind: str, length: int) -> tuple[int, ...]:
        room = 8 if self.big else 4
        if struct.calcsize(kind) * length > room:
            at = self._number(at, "Q" if self.big else "I")
        length = min(length, MAX_STRIPS + 1)
        if at + struct.calcsize(kind) * length > len(self.data):
            return ()
        return struct.unpack_from(f"{self.order}{length}{kind}", self.data, at)

    def starting_at(self, offset: int) -> bytes:
        """Return the file with the directory at this offset as its first one."""
        at, kind = (8, "Q") if self.big else (4, "I")
        field_ = struct.pack(self.order + kind, offset)
        return self.data[:at] + field_ + self.data[at + len(field_) :]


def inspect(data: bytes, limits: DecodeLimits) -> Inspected:
    """Select the page that is the image. Raises an `ImageError` for camera raw and for unsupported layouts."""
    reader = _Reader(data)
    if data[8:10] == b"CR" or data[8:12] in (b"IIII", b"MMMM"):  # marks of Canon and Phase One
        raise ImageCorruptError("a camera raw file, which is not decoded")
    page = _page(reader)
    check_pixels(page.one(WIDTH, 0), page.one(HEIGHT, 0), limits)
    full_scale = _layout(page, data)
    _check_cost(page, data)
    if page.offset != reader.first:
        data = reader.starting_at(page.offset)
    return Inspected(data=data, frames=reader.count(), full_scale=full_scale)


def _page(reader: _Reader) -> Directory:
    """Return the first page if it has full resolution, else the largest page of full resolution."""
    chain = reader.chain()
    first = next(chain, None)
    if first is None:
        raise ImageCorruptError("a TIFF without a directory")
    inner = [directory for directory in _sub_directories(reader, first)]
    if first.is_raw or any(directory.is_raw for directory in inner):
        raise ImageCorruptError("a camera raw file, which is not decoded; its first image is only a preview")
    if not first.is_reduced and not first.is_mask:
        return first
    others = [*inner]
    for page in chain:
        others += [page, *_sub_directories(reader, page)]
        if len(others) > MAX_PAGES:
            break
    if any(page.is_raw for page in others):
        raise ImageCorruptError("a camera raw file, which is not decoded; its first image is only a preview")
    full_resolution = [page for page in others if not page.is_reduced and not page.is_mask]
    if full_resolution:
        return max(full_resolution, key=lambda page: page.pixels)
    if MAKE in first.tags:
        raise ImageCorruptError("a camera raw file of which only previews can be read")
    if first.is_mask or others:
        raise ImageCorruptError("a TIFF that holds only masks and images of reduced resolution")
    return first  # a single page that is marked as reduced is the only image


def _sub_directories(reader: _Reader, page: Directory) -> Iterator[Directory]:
    for offset in page.tags.get(SUB_IFDS, ())[:MAX_PAGES]:
        try:
            yield reader.directory(offset)
        except ImageError:
            continue


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The layout of a page's samples."""

    photometric: int
    samples: int
    bits: int
    sample_format: int
    extra: tuple[int, ...]
    planes: bool
    """Each channel is stored in a separate plane."""
    lone_plane: bool
    """A single uncompressed channel is marked as planar, for which Pillow ignores the format of the samples."""
    compression: int
    little_endian: bool

    def __str__(self) -> str:
        return (
            f"a TIFF of {self.samples} × {self.bits} bits, {FORMATS.get(self.sample_format, 'unknown')}, "
            f"{PHOTOMETRICS.get(self.photometric, self.photometric)}, {'planes' if self.planes else 'contiguous'}, "
            f"compression {COMPRESSIONS.get(self.compression, self.compression)}"
        )

    @property
    def is_deep_grey(self) -> bool:
        """Whether it is grey of more than 8 bits, which `pixels` scales instead of Pillow."""
        known = {(1, 16), (3, 32)} | ({(1, 12), (1, 32)} if self.little_endian else set())
        return (self.photometric, self.samples) == (1, 1) and (self.sample_format, self.bits) in known

    def refusal(self) -> str | None:
        """The reason why the layout is not decoded; None: tests compare its pixels with samples read by hand."""
        colours = COLOURS.get(self.photometric)
        if self.compression not in COMPRESSIONS:
            return "this compression is not decoded"
        if colours is None:
            return "these colours are not decoded"
        has_undeclared_alpha = (self.photometric, self.samples, self.extra) == (2, 4, ())
        if self.samples != colours + len(self.extra) and not has_undeclared_alpha:
            return f"its colours need {colours} samples and it declares {len(self.extra)} extra samples"
        if self.extra and self.extra not in EXTRAS.get((self.photometric, self.bits), ()):
            return f"extra samples of kind {', '.join(map(str, self.extra))} are not decoded in this layout"
        return self._refusal_of_grey() if self.is_deep_grey else self._refusal_of_levels()

    def _refusal_of_grey(self) -> str | None:
        if self.bits == 12 and self.compression != UNCOMPRESSED:
            return "12 bits are decoded without compression only"
        return "a single plane of more than 8 bits is not decoded" if self.lone_plane else None

    def _refusal_of_levels(self) -> str | None:
        plain = not self.extra or (self.photometric, self.extra, self.compression) == (2, (2,), UNCOMPRESSED)
        if self.sample_format != 1 or self.bits not in (1, 2, 4, 8, 16):
            return "only unsigned samples of up to 16 bits, and grey of 32, are decoded"
        if self.bits == 16 and self.photometric not in (2, 5):
            return "16 bits are decoded as grey from black, RGB and CMYK only"
        if self.bits < 8 and (self.photometric not in (0, 1, 3) or self.samples > 1):
            return "fewer than 8 bits are decoded as grey or palette only"
        if self.planes and not (plain and self.bits == 8 and self.photometric in (2, 5)):
            return "planes are decoded in RGB and CMYK of 8 bits only"
        if self.lone_plane and (self.bits < 8 or self.photometric != 1):
            return "a single plane is decoded as grey of 8 bits only"
        return None


def _layout(page: Directory, data: bytes) -> int | None:
    """Refuse a layout that is not known to decode correctly; returns the white sample if the depth determines it."""
    all_bits, formats = page.tags.get(BITS) or (1,), page.tags.get(FORMAT) or (1,)
    samples, compression = page.one(SAMPLES, 1), page.one(COMPRESSION, UNCOMPRESSED)
    is_planar = page.one(PLANAR, 1) == 2
    layout = _Layout(
        photometric=page.one(PHOTOMETRIC, 0),
        samples=samples,
        bits=all_bits[0],
        sample_format=formats[0],
        extra=page.tags.get(EXTRA, ()),
        planes=is_planar and samples > 1,
        lone_plane=is_planar and samples == 1 and compression == UNCOMPRESSED,
        compression=compression,
        little_endian=data[:2] == b"II",
    )
    reason = layout.refusal()
    if len(set(all_bits)) > 1 or len(set(formats)) > 1:
        reason = "samples of different kinds are not decoded"
    reason = reason or _refusal_of_tags(page, layout)
    if reason is not None:
        raise ImageCorruptError(f"{layout}: {reason}")
    return 4095 if layout.bits == 12 else None


def _refusal_of_tags(page: Directory, layout: _Layout) -> str | None:
    if page.odd_tags:
        return f"its tag {page.odd_tags[0]} is not an integer"
    bilevel = layout.bits == 1 and not layout.planes and layout.compression in (UNCOMPRESSED, *CCITT)
    if page.one(FILL_ORDER, 1) != 1 and not bilevel:
        return "fill order 2 is decoded in images of one bit only"
    if layout.photometric == 6 and layout.compression != JPEG and page.tags.get(SUBSAMPLING, (2, 2)) != (1, 1):
        return "YCbCr is decoded only without subsampling, or in JPEG"
    if layout.photometric == 5 and (page.one(INK_SET, 1) != 1 or page.one(DOT_RANGE, 0) != 0):
        return "other inks than CMYK, or inverted ones, are not decoded"
    if page.one(PREDICTOR, 1) != 1 and layout.compression not in PREDICTED:
        return "a predictor is decoded with LZW, Deflate, LZMA and Zstandard only"
    if PHOTOMETRIC not in page.tags and layout.compression not in CCITT:
        return "its photometric interpretation is missing, so the value of black is unknown"
    if layout.photometric == 6 and layout.compression != JPEG and not _is_usual_ycbcr(page):
        return "YCbCr is decoded only in its full range and with the coefficients of Rec. 601"
    palette = page.tags.get(COLOUR_MAP, ())
    if layout.photometric == 3 and 0 < max(palette, default=1) < 256:
        return "its palette is missing, or has 8 bits instead of 16"
    return None


def _is_usual_ycbcr(page: Directory) -> bool:
    """Whether the range and coefficients of YCbCr are the usual ones, which apply without tags."""
    for tag, usual in ((COEFFICIENTS, (0.299, 0.587, 0.114)), (BLACK_WHITE, (0, 255, 128, 255, 128, 255))):
        numbers = page.tags.get(tag, ())
        values = [above / (below or 1) for above, below in zip(numbers[::2], numbers[1::2], strict=True)]
        if values and (len(values) != len(usual) or any(abs(a - b) > 0.01 for a, b in zip(values, usual, strict=True))):
            return False
    return True


def _check_cost(page: Directory, data: bytes) -> None:
    """Limit the number of strips and of the JPEG scans in them."""
    offsets = page.tags.get(TILES) or page.tags.get(STRIPS, ())
    if len(offsets) > MAX_STRIPS:
        raise ImageTooLargeError(f"a TIFF of more than {MAX_STRIPS:,} strips or tiles")
    if page.one(COMPRESSION, UNCOMPRESSED) == JPEG:
        lengths = page.tags.get(TILE_BYTES) or page.tags.get(STRIP_BYTES, ())
        if sum(lengths) > len(data):
            raise ImageTooLargeError("a TIFF whose JPEG strips overlap")
        if PROGRESSIVE.search(data):
            raise ImageCorruptError("a TIFF of progressive JPEG, which TIFF does not allow")
        if data.count(b"\xff\xda") > MAX_SCANS_PER_STRIP * max(1, len(offsets)):
            raise ImageTooLargeError(f"a TIFF with more than {MAX_SCANS_PER_STRIP} JPEG scans per strip or tile")
