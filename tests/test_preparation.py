"""Preparation: the same picture gives the same models' input, whichever way it comes."""

import io
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from nsnet.errors import ImageCorruptError, ImageEmptyError, ImageTooLargeError
from nsnet.images import DecodeLimits, decode, thumbnail
from nsnet.patches import PatchConfig, select_patches
from nsnet.preparation import PreparationConfig, Prepared, prepare

REPO_ROOT = Path(__file__).parents[1]
CONFIG = PreparationConfig(thumbnail_px=48, patches=PatchConfig(patch_px=16, mosaic_px=64))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = {
    "rgb": encode(Image.fromarray(noise(90, 120)), "PNG"),
    "jpeg turned": encode(Image.fromarray(noise(90, 120)), "JPEG", exif=rotated()),
    "webp turned": encode(Image.fromarray(noise(90, 120)), "WEBP", lossless=True, exif=rotated()),
    "alpha": encode(Image.fromarray(noise(90, 120, 4)), "PNG"),
    "palette": encode(Image.fromarray(noise(90, 120)).quantize(32), "GIF", transparency=3),
    "16 bits turned": encode(
        Image.fromarray(np.arange(90 * 120, dtype=np.uint16).reshape(90, 120) * np.uint16(6)), "PNG", exif=rotated()
    ),
    "12 bits turned": encode(
        Image.fromarray((np.arange(90 * 120) * 4095 // (90 * 120 - 1)).astype(np.uint16).reshape(90, 120)),
        "TIFF",
        exif=rotated(),
    ),
    "cmyk": encode(Image.frombytes("CMYK", (120, 90), noise(90, 120, 4).tobytes()), "TIFF"),
    "1 pixel": encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"),
}


def assert_equal(one: Prepared, other: Prepared) -> None:
    for (name, left), right in zip(asdict(one).items(), asdict(other).values(), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", PICTURES)
def test_bytes_and_the_opened_picture_prepare_alike(name: str, loaded: bool) -> None:
    with Image.open(io.BytesIO(PICTURES[name])) as image:
        if loaded:
            image.load()
        assert_equal(prepare(image, CONFIG), prepare(PICTURES[name], CONFIG))


def test_picture_that_never_was_a_file_prepares_like_its_bytes() -> None:
    image = Image.fromarray(noise(70, 50))
    from_memory, from_file = prepare(image, CONFIG), prepare(encode(image, "PNG"), CONFIG)
    np.testing.assert_array_equal(from_memory.patches, from_file.patches)
    np.testing.assert_array_equal(from_memory.thumbnail, from_file.thumbnail)
    assert (from_memory.format, from_file.format) == ("memory", "PNG")


@pytest.mark.parametrize("name", PICTURES)
def test_prepared_picture_is_its_pixels_patches_and_thumbnail(name: str) -> None:
    pixels, prepared = decode(PICTURES[name]), prepare(PICTURES[name], CONFIG)
    np.testing.assert_array_equal(prepared.patches, select_patches(pixels, CONFIG.patches))
    np.testing.assert_array_equal(prepared.thumbnail, thumbnail(pixels, CONFIG.thumbnail_px))
    assert prepared.patches.shape == (16, 16, 16, 3) and prepared.thumbnail.shape == (48, 48, 3)
    assert (prepared.height, prepared.width) == pixels.shape[:2] and prepared.frames == 1


def test_picture_over_the_limits_is_refused_either_way() -> None:
    config = PreparationConfig(thumbnail_px=48, limits=DecodeLimits(max_pixels=90 * 120 - 1))
    with Image.open(io.BytesIO(PICTURES["rgb"])) as image, pytest.raises(ImageTooLargeError):
        prepare(image, config)
    with pytest.raises(ImageTooLargeError):
        prepare(PICTURES["rgb"], config)


def test_damaged_picture_is_an_image_error_either_way() -> None:
    cut = PICTURES["rgb"][:5000]
    with Image.open(io.BytesIO(cut)) as image, pytest.raises(ImageCorruptError):
        prepare(image, CONFIG)
    with pytest.raises(ImageCorruptError):
        prepare(cut, CONFIG)
    with pytest.raises(ImageEmptyError):
        prepare(b"", CONFIG)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (384, 384), (600, 500), (1000, 37), (1, 1)])
def test_thumbnail_is_what_the_captioner_was_trained_with(height: int, width: int) -> None:
    """transformers' own processor of BLIP, before it normalises; its rounding may differ by a level."""
    image = noise(height, width)
    processor = BlipImageProcessorPil(do_normalize=False)
    expected = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"])[0] * 255
    ours = prepare(encode(Image.fromarray(image), "PNG"), PreparationConfig(thumbnail_px=384)).thumbnail
    assert ours.dtype == np.uint8 and ours.shape == (384, 384, 3)
    assert np.abs(ours.transpose(2, 0, 1).astype(np.float64) - expected).max() <= 1 + 1e-3


def test_thumbnail_keeps_the_sides_apart() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 150:, 0] = image[50:, :, 1] = 255
    small = thumbnail(image, 10)
    assert small[2, 2].tolist() == [0, 0, 0] and small[2, 8].tolist() == [255, 0, 0]
    assert small[8, 2].tolist() == [0, 255, 0]


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, nsnet.preparation; print(sorted({'torch', 'ray', 'transformers', 'open_clip'} & {*sys.modules}))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
