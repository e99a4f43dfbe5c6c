"""Pixel columns of the blocks between stages: uint8 RGB as binary values of one length, written and read in place."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nsnet.preparation import PreparationConfig

THUMBNAIL: Final = "thumbnail"
MOSAIC: Final = "mosaic"
"""Column of the first mosaic; a further one has its number behind it."""


def mosaic_column(number: int) -> str:
    """Column of a mosaic, by its place in `PreparationConfig.mosaics`."""
    return f"{MOSAIC}_{number}" if number else MOSAIC


def pixel_columns(names: Iterable[str]) -> list[str]:
    """The pixel columns among these."""
    return [name for name in names if name == THUMBNAIL or name.startswith(MOSAIC)]


def sides(config: PreparationConfig) -> dict[str, int]:
    """Pixel columns that this preparation makes, and the sides of their square images in pixels."""
    made = {mosaic_column(i): geometry.mosaic_px for i, geometry in enumerate(config.mosaics)}
    return made | ({THUMBNAIL: config.thumbnail_px} if config.thumbnail_px else {})


def with_pixels(columns: pa.Schema, config: PreparationConfig) -> pa.Schema:
    """These columns and the pixel columns that this preparation makes."""
    return pa.schema([*columns, *(pa.field(name, pa.binary()) for name in sides(config))])


def pixel_bytes(config: PreparationConfig) -> int:
    """Bytes of an image in all pixel columns."""
    return sum(3 * side * side for side in sides(config).values())


class PixelColumn:
    """A pixel column under construction: rows write into one buffer, which Arrow takes without a copy."""

    def __init__(self, rows: int, side: int) -> None:
        self._buffer = pa.allocate_buffer(3 * side * side * rows)
        self.pixels = np.frombuffer(self._buffer, np.uint8).reshape(rows, side, side, 3)
        """(B, S, S, 3) uint8, uninitialised."""
        self.is_null = np.zeros(rows, bool)
        """(B) bool: rows without pixels."""

    def to_arrow(self) -> pa.Array:
        """The column; its pixels must not be written any more."""
        rows, bytes_per_row = len(self.pixels), self.pixels[:1].nbytes
        ends = pa.py_buffer((np.arange(rows + 1) * bytes_per_row).astype(np.int32))
        column = pa.Array.from_buffers(pa.binary(), rows, [None, ends, self._buffer])
        if not self.is_null.any():
            return column
        return column.take(pa.array(np.arange(rows), mask=self.is_null))  # null rows hold no bytes


def gather(table: pa.Table, name: str, rows: list[int], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Values of a pixel column in these rows as one uint8 array, padded to the shape with the first of them."""
    column, batch = table.column(name), np.empty(shape, np.uint8)
    for position, row in enumerate(rows):
        batch[position] = np.frombuffer(column[row].as_buffer(), np.uint8).reshape(shape[1:])
    batch[len(rows) :] = batch[0]
    return batch
