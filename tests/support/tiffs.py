"""TIFF files laid out sample by sample, in any layout the format has, without Pillow."""

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKBITS, DEFLATE, NONE = 32773, 8, 1
KINDS = {1: "u", 2: "i", 3: "f"}
LETTERS = {1: "B", 2: "B", 3: "H", 4: "I"}


def compressed(data: bytes, compression: int) -> bytes:
    if compression == DEFLATE:
        return zlib.compress(data)
    if compression == PACKBITS:  # literal runs only
        return b"".join(
            bytes([len(part) - 1]) + part for part in (data[at : at + 128] for at in range(0, len(data), 128))
        )
    return data


def packed(samples: NDArray[Any], bits: int, sample_format: int, order: str) -> bytes:
    """Rows of samples as bytes, each row filled to a whole one."""
    if bits in (8, 16, 32, 64):
        return samples.astype(f"{order}{KINDS[sample_format]}{bits // 8}").tobytes()
    shifts = np.arange(bits - 1, -1, -1)
    ones = (samples.reshape(len(samples), -1, 1).astype(int) >> shifts & 1).reshape(len(samples), -1)
    return np.packbits(ones.astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: NDArray[Any],
    photometric: int,
    bits: int,
    *,
    sample_format: int = 1,
    planar: int = 1,
    compression: int = NONE,
    order: str = "<",
    extra: Sequence[int] = (),
    tile: int = 0,
    big: bool = False,
    tags: dict[int, tuple[int, Sequence[int]]] | None = None,
) -> bytes:
    """One page of (H, W, C) samples, in strips of 8 rows, or in tiles."""
    height, width, channels = samples.shape
    planes = [samples[:, :, [at]] for at in range(channels)] if planar == 2 else [samples]
    blocks = []
    for plane in planes:
        if tile:
            filled = np.zeros((-(-height // tile) * tile, -(-width // tile) * tile, plane.shape[2]), plane.dtype)
            filled[:height, :width] = plane
            blocks += [
                filled[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)
            ]
        else:
            blocks += [plane[y : y + 8] for y in range(0, height, 8)]
    stored = [compressed(packed(block, bits, sample_format, order), compression) for block in blocks]
    fields: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * channels), 259: (3, [compression]),
        262: (3, [photometric]), 277: (3, [channels]), 284: (3, [planar]), 339: (3, [sample_format] * channels),
    }  # fmt: skip
    if extra:
        fields[338] = (3, extra)
    if tile:
        fields |= {322: (4, [tile]), 323: (4, [tile])}
    return file([(fields | (tags or {}), stored, 324 if tile else 273)], order=order, big=big)


def file(
    pages: Sequence[tuple[dict[int, tuple[int, Sequence[int]]], Sequence[bytes], int]],
    *,
    order: str = "<",
    big: bool = False,
    inner: Sequence[int] = (),
) -> bytes:
    """Pages of tags, blocks of samples, and the tag that tells where those lie; `inner` ones hang on the first page."""
    word, count_word, limit = ("Q", "Q", 8) if big else ("I", "H", 4)
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42))
    out += struct.pack(f"{order}HHQ", 8, 0, 0) if big else struct.pack(f"{order}I", 0)
    offsets, links = [], []
    for number in reversed(range(len(pages))):
        fields, blocks, place = pages[number]
        positions = []
        for block in blocks:
            positions.append(len(out))
            out += block + bytes(len(block) % 2)
        fields = dict(fields)
        if blocks:
            fields |= {place: (4, positions), place + (1 if place == 324 else 6): (4, [len(block) for block in blocks])}
            if place == 273:
                fields[278] = (4, [8])
        if number == 0 and inner:
            fields[330] = (4, [offset for page, offset in offsets if page in inner])
        bodies = {}
        for tag, (kind, values) in fields.items():
            bodies[tag] = struct.pack(f"{order}{len(values)}{LETTERS[kind]}", *values)
        beyond = {}
        for tag, body in bodies.items():
            if len(body) > limit:
                beyond[tag] = len(out)
                out += body + bytes(len(body) % 2)
        offsets.append((number, len(out)))
        out += struct.pack(order + count_word, len(fields))
        for tag, (kind, values) in sorted(fields.items()):
            out += struct.pack(f"{order}HH{word}", tag, kind, len(values))
            out += struct.pack(order + word, beyond[tag]) if tag in beyond else bodies[tag].ljust(limit, b"\0")
        links.append((number, len(out)))
        out += bytes(limit)
    chain = [(page, offset) for page, offset in sorted(offsets) if page not in inner]
    at = dict(links)
    for (page, _), (_, following) in zip(chain, chain[1:], strict=False):
        struct.pack_into(order + word, out, at[page], following)
    struct.pack_into(order + word, out, 8 if big else 4, chain[0][1])
    return bytes(out)
