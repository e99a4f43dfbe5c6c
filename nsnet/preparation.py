"""Prepares images for the models: ranked patches and the captioner's thumbnail. One pass, without torch.

Dimensions: K mosaic slots, N patch side in pixels, S thumbnail side in pixels.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet import alignment, images, jpeg, provenance, transforms
from nsnet.duplicates import perceptual_hash
from nsnet.images import DecodedImage, decode_image, image_to_rgb, thumbnail
from nsnet.limits import DecodeLimits, check_pixels
from nsnet.patches import PatchConfig, select_patches
from nsnet.provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """Selects the products that are made from an image."""

    thumbnail_px: int = 0
    """Side S of the captioner's thumbnail, in pixels; 0: none is made."""
    patches: PatchConfig | None = field(default_factory=PatchConfig)
    """Geometry of the mosaic; None: no patches are chosen."""
    fingerprint: bool = False
    """Compute the perceptual hash."""
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    """Limits of decoding one image."""
    provenance: bool = False
    """Read what the file says about its origin."""
    anchors: str = ""
    """Certificates of the trust list of content credentials, in PEM; empty: no signer is trusted."""
    aligned: bool = False
    """Take the facts from the file that a transform makes of the image: an alignment (`alignment.parse`)."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One image, ready for the models."""

    patches: npt.NDArray[np.uint8]
    """(K, N, N, 3) uint8 in rank order, for `patches.assemble_mosaic`; (0, 0, 0, 3) if none are requested."""
    thumbnail: npt.NDArray[np.uint8]
    """(S, S, 3) uint8; S = 0 if none is requested."""
    width: int
    """Width and height in pixels of the file's image, before any transform that is no alignment."""
    height: int
    format: str
    frames: int
    quality: int | None = None
    """Estimated quality of a JPEG file, 1 to 100."""
    remark: str | None = None
    """Defect of a file that was decoded anyway; None: no defect."""
    perceptual_hash: str | None = None
    """64 bits as hexadecimal digits; None if it is not requested or the image is too plain."""
    provenance: Provenance | None = None
    """What the file says about its origin, content credentials not read yet; None if it is not requested."""
    size_bytes: int | None = None
    """Bytes of the file that an alignment made; None: the image is in the file that was given."""


def shapes(config: PreparationConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the patches and of the thumbnail from `prepare`."""
    patches = config.patches
    patches_shape = (patches.slots, patches.patch_px, patches.patch_px, 3) if patches is not None else (0, 0, 0, 3)
    return patches_shape, (config.thumbnail_px, config.thumbnail_px, 3)


def preload(config: PreparationConfig) -> None:
    """Decode and prepare sample images, so that `prepare` imports and opens nothing afterwards."""
    images.preload()
    noise = Image.effect_noise((256, 256), 64)
    for transform in ("", "jpeg:90", "blur:1", "resize:0.5", "noise:2", "crop:0.9", "screenshot:0.75", "centre:128"):
        prepare(noise, config, transform)


def prepare(given: bytes | Image.Image, config: PreparationConfig, transform: str = "", seed: int = 0) -> Prepared:
    """Decode, transform, select patches, make the thumbnail. Raises an `ImageError`; see `images.decode_image`.

    `transform`: a chain of `nsnet.transforms`, with random choices from `seed`. The returned width, height, format,
    quality, remark and hash are those of the image before it; if `config.aligned`, width, height, format and quality
    are those of the file that it makes.
    """
    if isinstance(given, Image.Image):
        quality = jpeg.quality(given)
        pixels = image_to_rgb(given, config.limits)
        lossless = images.is_lossless(given, b"")
        image = DecodedImage(
            pixels=pixels, format=given.format or "memory", frames=1, quality=quality, lossless=lossless
        )
        origin = None
    else:
        image = decode_image(given, config.limits)
        origin = provenance.read(given, image.texts) if config.provenance else None
    pixels, stored, size_bytes = image.pixels, image, None
    chain = transforms.applicable(transforms.parse(transform), lossless=image.lossless)
    if chain and config.aligned:
        stored, size_bytes = alignment.stored(image, chain, seed=seed, limits=config.limits)
        pixels = stored.pixels
    elif chain:
        pixels = transforms.apply(pixels, chain, seed=seed, max_pixels=config.limits.max_pixels)
        check_pixels(pixels.shape[1], pixels.shape[0], config.limits)  # patch selection pads short sides
    no_patches, no_thumbnail = (np.empty(shape, dtype=np.uint8) for shape in ((0, 0, 0, 3), (0, 0, 3)))
    return Prepared(
        patches=select_patches(pixels, config.patches) if config.patches is not None else no_patches,
        thumbnail=thumbnail(pixels, config.thumbnail_px) if config.thumbnail_px else no_thumbnail,
        width=stored.width,
        height=stored.height,
        format=stored.format,
        frames=image.frames,
        quality=stored.quality,
        remark=image.remark,
        perceptual_hash=perceptual_hash(image.pixels) if config.fingerprint else None,
        provenance=origin,
        size_bytes=size_bytes,
    )
