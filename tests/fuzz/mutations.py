"""Damage to files: pure functions of a random generator and the bytes, so that a seed tells a case for ever."""

import random
import struct
import zlib
from collections.abc import Callable
from typing import Final

MAX_BYTES: Final = 2**21
"""A mutated file is cut there."""
EXTREMES: Final = (
    0, 1, 2, 7, 8, 9, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 10_950, 65_500, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
GARBAGE: Final = (
    b"\0", b"\xff", b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"Exif\0\0II*\0\x08\0\0\0", b"\x21\xff\x0b",
    b"ICC_PROFILE\0\1\1", b"IDAT", b"acTL", b"ftypavif", b"meta", b"moov", b"\xff\x4f\xff\x51", b"GIF89a",
    b"http://ns.adobe.com/xap/1.0/\0<x",    b"../../etc/passwd", b"%s%n", b"\r\n", b"\xf0\x9f\x92\xa9",
)  # fmt: skip

Mutator = Callable[[random.Random, bytes, bytes], bytes]
"""(random generator, the file, another file) -> a damaged file."""


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The file after one to eight mutations; `other`: a file to take pieces of."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 8))):
        data = rng.choice(MUTATORS)(rng, data, other)[:MAX_BYTES] or b"\0"
    return data


def place(rng: random.Random, data: bytes) -> int:
    """A position: in the first bytes, at the beginning of a piece, or anywhere."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randrange(min(len(data), 64))
    if kind < 0.7:
        starts = [0]
        for piece in pieces(data)[:2000]:
            starts.append(starts[-1] + len(piece))
        return min(len(data) - 1, rng.choice(starts) + rng.randrange(24))
    return rng.randrange(len(data))


def flip_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        found[place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(found)


def run_of_one_byte(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = place(rng, data), rng.choice((1, 2, 4, 16, 256, 4096))
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) * min(
        length, len(data) - at
    ) + data[at + length :]  # fmt: skip


def cut_short(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: place(rng, data)]


def insert(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, data)
    new = rng.choice((rng.choice(GARBAGE) * rng.choice((1, 1, 50)), rng.randbytes(rng.choice((1, 3, 200)))))
    return data[:at] + new + data[at:]


def delete(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 12, 100, 1000)) :]


def extreme_integer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One field of 1, 2, 4 or 8 bytes gets an extreme value, or one near the size of the file."""
    width = rng.choice((1, 2, 2, 4, 4, 4, 8))
    value = rng.choice((rng.choice(EXTREMES), len(data) + rng.randrange(-9, 9), rng.randrange(4096)))
    field = (value % 2 ** (8 * width)).to_bytes(width, rng.choice(("big", "little")))
    at = place(rng, data)
    return (data[:at] + field + data[at + width :])[: max(len(data), width)]


def rearrange(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Pieces of the format are dropped, repeated, exchanged, shuffled, or taken from another file."""
    found = pieces(data)
    at, to = rng.randrange(len(found)), rng.randrange(len(found))
    kind = rng.randrange(6)
    if kind == 0:
        del found[at]
    elif kind == 1:
        found[at:at] = [found[at]] * rng.choice((1, 1, 3, 100))
    elif kind == 2:
        found[at], found[to] = found[to], found[at]
    elif kind == 3:
        rng.shuffle(found)
    elif kind == 4:
        found.insert(at, found.pop(to))
    else:
        found.insert(at, rng.choice(pieces(other)))
    return b"".join(found)


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: place(rng, data)] + other[place(rng, other) :]


def repair(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Check sums and outer lengths are made right, so that a decoder looks further."""
    if data.startswith(PNG):
        found = pieces(data)
        whole = [p for p in found[1:] if len(p) >= 12]
        return PNG + b"".join(
            struct.pack(">I", len(p) - 12) + p[4:-4] + struct.pack(">I", zlib.crc32(p[4:-4])) for p in whole
        )
    if data.startswith(b"RIFF") and len(data) > 12:
        return b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:]
    if data[257:262] == b"ustar":
        return b"".join(checked(block) for block in pieces(data))
    return data


MUTATORS: Final[tuple[Mutator, ...]] = (
    flip_bits, flip_bits, run_of_one_byte, cut_short, insert, delete, extreme_integer, extreme_integer, extreme_integer,
    rearrange, rearrange, splice, repair, repair,
)  # fmt: skip

PNG: Final = b"\x89PNG\r\n\x1a\n"


def pieces(data: bytes) -> list[bytes]:
    """The file as chunks, segments, boxes, directory entries or blocks; together they are the file."""
    if data.startswith(PNG):
        return _chunks(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big"))
    if data.startswith(b"\xff\xd8"):
        return _chunks(data, 2, lambda at: _jpeg_segment(data, at))
    if data[4:8] in (b"ftyp", b"jP  "):
        return _chunks(data, 0, lambda at: int.from_bytes(data[at : at + 4], "big"))
    if data.startswith(b"RIFF"):
        return _chunks(data, 12, lambda at: 8 + -(-int.from_bytes(data[at + 4 : at + 8], "little") // 2) * 2)
    if data.startswith((b"II*\0", b"MM\0*")):
        order = "little" if data.startswith(b"II") else "big"
        start = int.from_bytes(data[4:8], order) + 2  # type: ignore[arg-type]
        entries = int.from_bytes(data[start - 2 : start], order)  # type: ignore[arg-type]
        end = start + 12 * min(entries, 100)
        return _chunks(data, start, lambda at: 12 if at < end else len(data))
    if data[257:262] == b"ustar":
        return _chunks(data, 0, lambda at: 512)
    step = max(1, len(data) // 16)
    return _chunks(data, 0, lambda at: step)


def _chunks(data: bytes, at: int, length: Callable[[int], int]) -> list[bytes]:
    """The first bytes, then pieces of the lengths that the file says."""
    found = [data[:at]] if data[:at] else []
    while at < len(data):
        end = at + max(1, length(at)) if len(found) < 20_000 else len(data)
        found.append(data[at:end])
        at = end
    return found or [data]


def _jpeg_segment(data: bytes, at: int) -> int:
    """A marker with its length; the data of a scan goes up to the next marker."""
    if data[at] == 0xFF and data[at + 1 : at + 2] not in (b"\0", b""):
        return 2 if 0xD0 <= data[at + 1] <= 0xD9 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    following = at + 1
    while (following := data.find(b"\xff", following)) >= 0 and data[following + 1 : following + 2] == b"\0":
        following += 2
    return (following if following > at else len(data)) - at


def checked(block: bytes) -> bytes:
    """A block of a tar with the check sum of a header, if it looks like one."""
    if len(block) < 512 or block[257:262] != b"ustar":
        return block
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]
