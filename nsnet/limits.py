"""Defines the limits of decoding an image, and the result of inspecting its headers."""

from dataclasses import dataclass
from typing import Final

from nsnet.errors import ConfigError, ImageTooLargeError

MIN_SIDE_PX: Final = 32
"""Patch selection pads a shorter side to this length; the pixel limit includes the padding."""
MAX_VIEWS: Final = 9
"""Each view costs as much as a further image in the image tower."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Limits of decoding one image."""

    max_bytes: int = 128 * 2**20
    """Largest file, in bytes."""
    max_pixels: int = 120_000_000
    """Largest width × height, in pixels; enough for a 108-megapixel phone photograph."""
    max_seconds: float = 30.0
    """Longest decoding time, in seconds; enforced only in a guarded process."""
    max_memory_bytes: int = 4 * 2**30
    """Largest address space that a guarded decoding process may add, in bytes."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_seconds", "max_memory_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Result of reading the headers of a file."""

    data: bytes
    """Input of the decoder: the file without parts that could make it fail, or only the part that is the image."""
    frames: int = 1
    """Number of frames or pages that were counted in the file."""
    remark: str | None = None
    """Defect of a file that is decoded anyway; None: no defect."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the first frame, in pixels of the canvas; None: it covers the canvas."""
    full_scale: int | None = None
    """Sample value of white, if the file states it; None: it does not."""


def check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    """Raise `ImageTooLargeError` if an image, with short sides padded to a patch, has more pixels than allowed."""
    padded = max(width, MIN_SIDE_PX) * max(height, MIN_SIDE_PX)
    if padded > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width} × {height} px, the limit is {limits.max_pixels:,} pixels with short sides counted as "
            f"{MIN_SIDE_PX} px (--max-pixels)"
        )
