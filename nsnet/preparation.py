"""Prepares images for the models: ranked patches and the captioner's thumbnail. One pass, without torch.

Dimensions: K mosaic slots, N patch side, M mosaic side, S thumbnail side, in pixels.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet import alignment, images, jpeg, provenance, transforms
from nsnet.duplicates import perceptual_hash
from nsnet.errors import ConfigError, ImageTooLargeError
from nsnet.images import DecodedImage, decode_image, image_to_rgb, thumbnail
from nsnet.limits import MAX_VIEWS, DecodeLimits, check_pixels
from nsnet.patches import PatchConfig, assemble_mosaic, select_patches
from nsnet.provenance import Provenance

REENCODINGS: Final = ("jpeg:90", "resize:0.9")
"""Chains of the views after the first, in turn: mild changes, as an upload makes them."""


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """Selects the products that are made from an image."""

    thumbnail_px: int = 0
    """Side S of the captioner's thumbnail, in pixels; 0: none is made."""
    patches: tuple[PatchConfig, ...] = (PatchConfig(),)
    """Geometries of the mosaics, which are made in one decoding; empty: no patches are chosen."""
    views: int = 1
    """Mosaics per geometry. Those after the first have another slot order, and show the image re-encoded."""
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

    def __post_init__(self) -> None:
        if not 1 <= self.views <= MAX_VIEWS:
            raise ConfigError(f"the number of views must be from 1 to {MAX_VIEWS}, got {self.views}")

    @property
    def chains(self) -> list[str]:
        """The re-encoding of each view, as chains of `nsnet.transforms`."""
        return ["", *(REENCODINGS[i % len(REENCODINGS)] for i in range(self.views - 1))]

    @property
    def mosaics(self) -> list[PatchConfig]:
        """The geometry of each mosaic, in the order of `Prepared.patches`: by geometry, then by view."""
        return [patches for patches in self.patches for _ in range(self.views)]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One image, ready for the models."""

    patches: tuple[npt.NDArray[np.uint8], ...]
    """(K, N, N, 3) uint8 in rank order, one array for each of `PreparationConfig.mosaics`; see `assemble_mosaics`."""
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


def shapes(config: PreparationConfig) -> list[tuple[int, ...]]:
    """Shapes of the arrays of patches from `prepare`, and of the thumbnail, which is last."""
    patches = [(geometry.slots, geometry.patch_px, geometry.patch_px, 3) for geometry in config.mosaics]
    return [*patches, (config.thumbnail_px, config.thumbnail_px, 3)]


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
    return Prepared(
        patches=_patches(pixels, config, seed),
        thumbnail=thumbnail(pixels, config.thumbnail_px) if config.thumbnail_px else np.empty((0, 0, 3), np.uint8),
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


def _patches(pixels: npt.NDArray[np.uint8], config: PreparationConfig, seed: int) -> tuple[npt.NDArray[np.uint8], ...]:
    """The patches of each mosaic. Views with the same re-encoding have the same patches, in another order."""
    if not config.patches:
        return ()
    by_chain = {}
    for chain in dict.fromkeys(config.chains):
        view = pixels
        if chain:
            with suppress(ImageTooLargeError):  # for JPEG: this view shows the image itself, in its own slot order
                steps = transforms.parse(chain)
                view = transforms.apply(pixels, steps, seed=seed, max_pixels=config.limits.max_pixels)
        by_chain[chain] = [select_patches(view, geometry) for geometry in config.patches]
    return tuple(by_chain[chain][i] for i in range(len(config.patches)) for chain in config.chains)


def assemble_mosaics(
    patches: Sequence[npt.NDArray[np.uint8]],
    config: PreparationConfig,
    seed: int,
    out: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> list[npt.NDArray[np.uint8]]:
    """Arrange `Prepared.patches` in mosaics, (M, M, 3) uint8 each. `seed`: slot order of the first view.

    `out`: contiguous arrays to write to and return; None: new ones.
    """
    return [
        assemble_mosaic(ranked, geometry.slot_seed(seed + i % config.views), None if out is None else out[i])
        for i, (ranked, geometry) in enumerate(zip(patches, config.mosaics, strict=True))
    ]
