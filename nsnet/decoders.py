"""Replaces five of Pillow's decoders, which take seconds or more per megapixel.

Pillow still reads the headers and passes their values to the decoders (`args`).
"""

import re
from array import array
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

PIXELS_AT_ONCE: Final = 1 << 20
MAX_COMMENTS: Final = 1_000
"""Maximum number of comments among the digits of a portable map, where comments are unusual."""
WHITESPACE: Final = b" \t\n\v\f\r"


class _Decoder(ImageFile.PyDecoder):
    """Reads the whole file, starting at its pixels."""

    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:
        """Decode everything at once; returns -1, which means that no more data is needed."""
        assert self.fd is not None
        self.fill(self.fd.read(), self.state.xsize, self.state.ysize)
        return -1, 0

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Decode `data` and set the image. Raises `ValueError` or `IndexError` if it is damaged."""
        raise NotImplementedError


class DdsMasks(_Decoder):
    """Uncompressed DirectDraw surfaces: a channel is the bits of a pixel under its mask, scaled to 8 bits."""

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Apply the masks to `PIXELS_AT_ONCE` pixels at a time."""
        bits, masks = self.args
        size = bits // 8
        stored = np.frombuffer(data, np.uint8, width * height * size).reshape(-1, size)
        channels = np.zeros((width * height, len(masks)), np.uint8)
        for start in range(0, width * height, PIXELS_AT_ONCE):
            block = stored[start : start + PIXELS_AT_ONCE]
            values = np.zeros((len(block), 4), np.uint8)
            values[:, :size] = block
            numbers = values.view("<u4")[:, 0]
            for channel, mask in enumerate(masks):
                if mask:
                    shift = (mask & -mask).bit_length() - 1
                    levels = (numbers & np.uint32(mask)) >> np.uint32(shift)
                    channels[start : start + len(block), channel] = levels / (mask >> shift) * 255
        self.set_as_raw(channels.tobytes())


class PortableMap(_Decoder):
    """Binary portable maps whose maximum sample is neither 255 nor 65535."""

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Decode samples, big-endian above 8 bits; colours become 8 bits, grey 16 bits."""
        top = self.args[-1]
        count = width * height * Image.getmodebands(self.mode)
        samples = np.frombuffer(data, np.uint8 if top < 256 else ">u2", count)
        self.set_scaled(samples, top)

    def set_scaled(self, samples: npt.NDArray[Any], top: int) -> None:
        """Scale so that `top` is white."""
        full = 65535 if self.mode == "I" else 255
        levels = np.rint(np.arange(top + 1) / top * full)
        levels = levels.astype("<i4" if self.mode == "I" else np.uint8)
        self.set_as_raw(levels[np.minimum(samples, top)].tobytes(), "I;32" if self.mode == "I" else self.mode)


class PlainPortableMap(PortableMap):
    """Portable maps in ASCII digits."""

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Decode decimal samples; comments reach from # to the end of the line."""
        if data.count(b"#") > MAX_COMMENTS:
            raise ValueError(f"a portable map with more than {MAX_COMMENTS:,} comments among its digits")
        text = re.sub(rb"#[^\r\n]*", b" ", data) if b"#" in data else data
        if text.translate(None, b"0123456789" + WHITESPACE):
            raise ValueError("a portable map in digits holds other characters")
        count = width * height * Image.getmodebands(self.mode)
        if self.mode == "1":
            ink = np.frombuffer(text.translate(None, WHITESPACE), np.uint8)[:count] - ord("0")
            if len(ink) < count or ink.max(initial=0) > 1:
                raise ValueError("a bitmap in digits is truncated, or holds other digits than 0 and 1")
            self.set_as_raw(((1 - ink) * np.uint8(255)).tobytes(), "1;8")
            return
        samples = np.fromstring(text, np.int64, sep=" ")[:count]  # with a count, the rest would be uninitialised
        if len(samples) < count or samples.max(initial=0) > self.args[-1] or samples.min(initial=0) < 0:
            raise ValueError("a portable map in digits is truncated, or holds samples above its maximum")
        self.set_scaled(samples, self.args[-1])


class RunLengths(_Decoder):
    """Run-length coded bitmaps of 4 or 8 bits; skipped pixels have the first colour of the palette."""

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Decode two-byte commands: a run, or 0 and an end of line, end of image, jump, or count of literal pixels."""
        nibbles = self.args[1]
        pairs = [(value >> 4, value & 15) if nibbles else (value, value) for value in range(256)]
        runs = [bytes(pair) * 128 for pair in pairs]
        rows = bytearray(width * height)
        x = y = at = 0
        while y < height and (y < height - 1 or x < width):
            count, value = data[at], data[at + 1]
            at += 2
            if count:
                run = runs[value]
            elif value > 2:
                count, length = value, (value + 1) // 2 if nibbles else value
                run = data[at : at + length]
                if len(run) < length:
                    raise ValueError("a run-length coded bitmap is truncated")
                at += length + length % 2
                if nibbles:
                    run = bytes(level for byte in run for level in pairs[byte])
            elif value == 1:
                break
            else:
                right, up = (data[at], data[at + 1]) if value else (-x, 1)
                at += value
                x, y = min(x + right, width), y + up
                continue
            if count > width - x:
                count = width - x
            start = y * width + x
            rows[start : start + count] = run[:count]
            x += count
        if y < height - 1 or (y == height - 1 and x < width):
            raise ValueError("a run-length coded bitmap ends before its last pixel")
        self.set_as_raw(bytes(rows), "L" if self.mode in ("1", "L") else "P", (0, self.args[-1]))


class QuiteOk(_Decoder):
    """QOI (qoiformat.org): pixels are stored as values, as differences, as entries of an index of 64, or as runs."""

    def fill(self, data: bytes, width: int, height: int) -> None:
        """Decode to one number per pixel, with red in the lowest byte and alpha in the highest."""
        index, out = [0] * 64, array("I", bytes(4 * width * height))
        red, green, blue, alpha = 0, 0, 0, 255
        pixel, at, place, count = 0xFF000000, 0, 0, width * height
        while place < count:
            code = data[at]
            at += 1
            if code >= 0xC0:
                if code < 0xFE:
                    run = code - 0xBF
                    out[place : place + run] = array("I", (pixel,)) * min(run, count - place)
                    place += run
                    index[(red * 3 + green * 5 + blue * 7 + alpha * 11) & 63] = pixel
                    continue
                red, green, blue = data[at : at + 3]
                at += 3
                if code == 0xFF:
                    alpha = data[at]
                    at += 1
            elif code < 0x40:
                pixel = index[code]
                red, green, blue, alpha = pixel & 255, pixel >> 8 & 255, pixel >> 16 & 255, pixel >> 24
                out[place] = pixel
                place += 1
                continue
            elif code < 0x80:
                red = red + (code >> 4 & 3) - 2 & 255
                green = green + (code >> 2 & 3) - 2 & 255
                blue = blue + (code & 3) - 2 & 255
            else:
                more, step = data[at], code - 0xA0
                at += 1
                red = red + step + (more >> 4) - 8 & 255
                green = green + step & 255
                blue = blue + step + (more & 15) - 8 & 255
            pixel = red | green << 8 | blue << 16 | alpha << 24
            index[(red * 3 + green * 5 + blue * 7 + alpha * 11) & 63] = pixel
            out[place] = pixel
            place += 1
        self.set_as_raw(out.tobytes(), "RGBX" if self.mode == "RGB" else "RGBA")


def register() -> None:
    """Replace Pillow's decoders with these, for the whole process."""
    for name, decoder in (
        ("dds_rgb", DdsMasks),
        ("ppm", PortableMap),
        ("ppm_plain", PlainPortableMap),
        ("bmp_rle", RunLengths),
        ("qoi", QuiteOk),
    ):
        Image.register_decoder(name, decoder)
