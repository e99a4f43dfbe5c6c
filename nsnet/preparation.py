"""Picture bytes to what the models are fed: ranked patches and the captioner's thumbnail. One pass, no torch.

Dimensions: K mosaic slots, N patch side in pixels, S thumbnail side in pixels.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet.images import DecodedImage, DecodeLimits, decode_image, image_to_rgb, thumbnail
from nsnet.patches import PatchConfig, select_patches


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """How a picture is prepared."""

    thumbnail_px: int
    """Side S of the captioner's thumbnail, in pixels."""
    patches: PatchConfig = field(default_factory=PatchConfig)
    """Geometry of the mosaic."""
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    """What one picture may cost."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One picture, ready for the models."""

    patches: npt.NDArray[np.uint8]
    """(K, N, N, 3) uint8 in rank order; `patches.assemble_mosaic` shuffles them."""
    thumbnail: npt.NDArray[np.uint8]
    """(S, S, 3) uint8."""
    width: int
    height: int
    format: str
    frames: int


def prepare(picture: bytes | Image.Image, config: PreparationConfig) -> Prepared:
    """Decode, select patches, make the thumbnail. Raises an `ImageError`; see `images.decode_image`."""
    if isinstance(picture, Image.Image):
        pixels = image_to_rgb(picture, config.limits)
        image = DecodedImage(pixels=pixels, format=picture.format or "memory", frames=1)
    else:
        image = decode_image(picture, config.limits)
    return Prepared(
        patches=select_patches(image.pixels, config.patches),
        thumbnail=thumbnail(image.pixels, config.thumbnail_px),
        width=image.width,
        height=image.height,
        format=image.format,
        frames=image.frames,
    )
