"""What one image may cost, and what is known of its file before a decoder sees it."""

from dataclasses import dataclass
from typing import Final

from nsnet.errors import ConfigError, ImageTooLargeError

MIN_SIDE_PX: Final = 32
"""Patch selection replicates the edge of a shorter side up to this length; the pixel limit counts those pixels too."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one image may cost."""

    max_bytes: int = 128 * 2**20
    """Largest file, in bytes."""
    max_pixels: int = 120_000_000
    """Largest width × height, in pixels: a 108-megapixel phone photograph passes."""
    max_seconds: float = 30.0
    """Longest decoding time, in seconds; enforced where decoding runs in a guarded process."""
    max_memory_bytes: int = 4 * 2**30
    """Most address space a guarded decoding process may add to itself, in bytes."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_seconds", "max_memory_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A file whose headers were read and believed as far as this says."""

    data: bytes
    """What the decoder is given: the file, without the parts that could cost a good image, or the part that counts."""
    frames: int = 1
    """Frames or pages in the file, as far as they were counted."""
    remark: str | None = None
    """What is wrong with a file that is decoded all the same."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the first frame, in pixels of the canvas; None: it covers the canvas."""
    full_scale: int | None = None
    """The sample that is white, where samples have more than 8 bits and the file says it; None: it does not."""


def check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    """Raise `ImageTooLargeError` where an image, its short sides widened to a patch, has more pixels than allowed."""
    padded = max(width, MIN_SIDE_PX) * max(height, MIN_SIDE_PX)
    if padded > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width} × {height} px, the limit is {limits.max_pixels:,} pixels with short sides counted as "
            f"{MIN_SIDE_PX} px (--max-pixels)"
        )
