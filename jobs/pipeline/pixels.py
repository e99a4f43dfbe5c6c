"""Pixel columns of the blocks between stages: uint8 RGB as binary values of one length, written and read in place."""

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nsnet.preparation import PreparationConfig

PIXEL_COLUMNS: Final = ("mosaic", "thumbnail")


def sides(config: PreparationConfig) -> dict[str, int]:
    """Pixel columns that this preparation makes, and the sides of their square images in pixels."""
    made = {"mosaic": config.patches.mosaic_px if config.patches is not None else 0, "thumbnail": config.thumbnail_px}
    return {name: side for name, side in made.items() if side}


def with_pixels(columns: pa.Schema, config: PreparationConfig) -> pa.Schema:
    """These columns and the pixel columns that this preparation makes."""
    return pa.schema([*columns, *(pa.field(name, pa.binary()) for name in sides(config))])


class PixelColumn:
    """A pixel column under construction: rows write into one buffer, which Arrow takes without a copy."""

    def __init__(self, rows: int, side: int) -> None:
        self._bytes_per_row = 3 * side * side
        self._buffer = pa.allocate_buffer(rows * self._bytes_per_row)
        self._pixels = np.frombuffer(self._buffer, np.uint8).reshape(rows, side, side, 3)
        self._is_null = np.ones(rows, bool)

    def row(self, i: int) -> npt.NDArray[np.uint8]:
        """The (side, side, 3) pixels of a row, to be written; the row is null until then."""
        self._is_null[i] = False
        pixels: npt.NDArray[np.uint8] = self._pixels[i]
        return pixels

    def to_arrow(self) -> pa.Array:
        """The column; its buffer must not be written any more."""
        ends = np.arange(len(self._is_null) + 1) * self._bytes_per_row
        full = pa.Array.from_buffers(
            pa.binary(), len(self._is_null), [None, pa.py_buffer(ends.astype(np.int32)), self._buffer]
        )
        if not self._is_null.any():
            return full
        return full.take(pa.array(np.arange(len(ends) - 1), mask=self._is_null))  # null rows hold no bytes


def gather(table: pa.Table, name: str, rows: list[int], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Values of a pixel column in these rows as one uint8 array, padded to the shape with the first of them."""
    column, batch = table.column(name), np.empty(shape, np.uint8)
    for position, row in enumerate(rows):
        batch[position] = np.frombuffer(column[row].as_buffer(), np.uint8).reshape(shape[1:])
    batch[len(rows) :] = batch[0]
    return batch
