"""Preparation: the same image gives the same models' input, whichever way it comes."""

import io
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from nsnet import recipes, transforms
from nsnet.duplicates import perceptual_hash
from nsnet.errors import ConfigError, ImageCorruptError, ImageEmptyError, ImageTooLargeError
from nsnet.images import DecodeLimits, decode, thumbnail
from nsnet.patches import PatchConfig, select_mosaic, select_patches
from nsnet.preparation import PreparationConfig, Prepared, assemble_mosaics, prepare, shapes

REPO_ROOT = Path(__file__).parents[2]
CONFIG = PreparationConfig(thumbnail_px=48, patches=(PatchConfig(patch_px=16, mosaic_px=64),))


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


IMAGES = {
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
@pytest.mark.parametrize("name", IMAGES)
def test_bytes_and_the_opened_image_prepare_alike(name: str, loaded: bool) -> None:
    with Image.open(io.BytesIO(IMAGES[name])) as image:
        if loaded:
            image.load()
        assert_equal(prepare(image, CONFIG), prepare(IMAGES[name], CONFIG))


def test_image_that_never_was_a_file_prepares_like_its_bytes() -> None:
    image = Image.fromarray(noise(70, 50))
    from_memory, from_file = prepare(image, CONFIG), prepare(encode(image, "PNG"), CONFIG)
    np.testing.assert_array_equal(from_memory.patches, from_file.patches)
    np.testing.assert_array_equal(from_memory.thumbnail, from_file.thumbnail)
    assert (from_memory.format, from_file.format) == ("memory", "PNG")


@pytest.mark.parametrize("name", IMAGES)
def test_prepared_image_is_its_pixels_patches_and_thumbnail(name: str) -> None:
    pixels, prepared = decode(IMAGES[name]), prepare(IMAGES[name], CONFIG)
    np.testing.assert_array_equal(prepared.patches[0], select_patches(pixels, CONFIG.patches[0]))
    np.testing.assert_array_equal(prepared.thumbnail, thumbnail(pixels, CONFIG.thumbnail_px))
    assert prepared.patches[0].shape == (16, 16, 16, 3) and prepared.thumbnail.shape == (48, 48, 3)
    assert (prepared.height, prepared.width) == pixels.shape[:2] and prepared.frames == 1


def test_image_over_the_limits_is_refused_either_way() -> None:
    config = PreparationConfig(thumbnail_px=48, limits=DecodeLimits(max_pixels=90 * 120 - 1))
    with Image.open(io.BytesIO(IMAGES["rgb"])) as image, pytest.raises(ImageTooLargeError):
        prepare(image, config)
    with pytest.raises(ImageTooLargeError):
        prepare(IMAGES["rgb"], config)


def test_damaged_image_is_an_image_error_either_way() -> None:
    cut = IMAGES["rgb"][:5000]
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


# --- what is made, and what is not


def scene(width: int = 200, height: int = 160, seed: int = 0) -> Image.Image:
    """Large soft shapes under noise, so that there is something to fingerprint."""
    coarse = Image.fromarray(noise(5, 6, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)
    grain = noise(height, width, seed=seed + 1).astype(np.int16) // 8
    return Image.fromarray(np.clip(np.asarray(coarse).astype(np.int16) + grain, 0, 255).astype(np.uint8))


JPEG = encode(scene(), "JPEG", quality=83)
FULL = replace(CONFIG, fingerprint=True)
CONFIGS = {
    "everything": FULL,
    "no patches": replace(FULL, patches=()),
    "no thumbnail": replace(FULL, thumbnail_px=0),
    "no fingerprint": CONFIG,
    "facts only": PreparationConfig(patches=()),
    "two geometries": replace(FULL, patches=(*FULL.patches, PatchConfig(patch_px=8, mosaic_px=32, spectrum="power"))),
    "center": replace(FULL, patches=(PatchConfig(patch_px=15, mosaic_px=45, selection="center"),)),
    "resize": replace(FULL, patches=(PatchConfig(patch_px=15, mosaic_px=45, selection="resize"),)),
    "dgs-net": replace(FULL, patches=(recipes.DGS_NET.detector.patches,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_is_wanted_is_made_and_the_rest_stays_the_same(name: str) -> None:
    config, pixels = CONFIGS[name], decode(JPEG)
    prepared = prepare(JPEG, config)
    assert [array.shape for array in (*prepared.patches, prepared.thumbnail)] == shapes(config)
    assert {array.dtype for array in (*prepared.patches, prepared.thumbnail)} == {np.dtype(np.uint8)}
    assert len(prepared.patches) == len(config.patches)
    for patches, geometry in zip(prepared.patches, config.patches, strict=True):
        np.testing.assert_array_equal(patches, select_patches(pixels, geometry))
    if config.thumbnail_px == 0:
        assert prepared.thumbnail.shape == (0, 0, 3)
    else:
        np.testing.assert_array_equal(prepared.thumbnail, thumbnail(pixels, config.thumbnail_px))
    assert prepared.perceptual_hash == (perceptual_hash(pixels) if config.fingerprint else None)
    assert (prepared.width, prepared.height, prepared.format) == (200, 160, "JPEG")
    assert (prepared.frames, prepared.quality) == (1, 83)


def test_fingerprint_is_there_where_there_is_something_to_see() -> None:
    hashed = prepare(JPEG, FULL).perceptual_hash
    assert hashed is not None and len(hashed) == 16
    assert prepare(encode(Image.new("RGB", (90, 90), (9, 80, 200)), "PNG"), FULL).perceptual_hash is None


def test_images_without_thumbnails_can_be_stacked() -> None:
    config = PreparationConfig(patches=())
    both = [prepare(encode(scene(seed=seed), "PNG"), config) for seed in range(2)]
    assert np.stack([one.thumbnail for one in both]).shape == (2, 0, 0, 3)


# --- views


def test_views_have_other_slot_orders_and_mild_reencodings() -> None:
    geometries = (*CONFIG.patches, PatchConfig(patch_px=8, mosaic_px=32))
    config = replace(CONFIG, patches=geometries, views=4)
    pixels, prepared = decode(JPEG), prepare(JPEG, config)
    expected = []
    for geometry in geometries:
        for seed, chain in enumerate(["", "jpeg:90", "resize:0.9", "jpeg:90"]):
            steps = transforms.parse(chain) if chain else ()
            view = transforms.apply(pixels, steps, seed=0, max_pixels=10**6)
            expected.append(select_mosaic(view, 7 + seed, geometry))
    mosaics = assemble_mosaics(prepared.patches, config, 7)
    assert len(mosaics) == len(expected) == 8
    for mosaic, wanted in zip(mosaics, expected, strict=True):
        np.testing.assert_array_equal(mosaic, wanted)
    np.testing.assert_array_equal(mosaics[0], select_mosaic(pixels, 7, geometries[0]))  # the first view is as ever
    assert len({mosaic.tobytes() for mosaic in mosaics}) == 8


def test_view_of_an_image_that_no_jpeg_holds_is_the_image_in_another_order() -> None:
    wide = encode(Image.fromarray(noise(16, 66_000)), "PNG")  # a JPEG's side is at most 65,535 px
    prepared = prepare(wide, replace(CONFIG, views=2))
    np.testing.assert_array_equal(prepared.patches[0], prepared.patches[1])


@pytest.mark.parametrize("views", [-1, 0, 10])
def test_number_of_views_has_limits(views: int) -> None:
    with pytest.raises(ConfigError, match=f"the number of views must be from 1 to 9, got {views}"):
        PreparationConfig(views=views)


# --- transforms

CHAINS = ["resize:0.5", "jpeg:30", "blur:2", "noise:10", "crop:0.5", "screenshot:0.75", "crop:0.7+resize:1.3+jpeg:60"]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_transform_comes_before_patches_and_thumbnail_and_after_the_facts(chain: str, opened: bool) -> None:
    image = Image.open(io.BytesIO(JPEG)) if opened else JPEG
    plain, changed = prepare(JPEG, FULL), prepare(image, FULL, chain, seed=5)
    pixels = transforms.apply(decode(JPEG), transforms.parse(chain), seed=5, max_pixels=10**6)
    np.testing.assert_array_equal(changed.patches[0], select_patches(pixels, FULL.patches[0]))
    np.testing.assert_array_equal(changed.thumbnail, thumbnail(pixels, FULL.thumbnail_px))
    assert not np.array_equal(changed.patches[0], plain.patches[0])
    assert not np.array_equal(changed.thumbnail, plain.thumbnail)
    facts = ("width", "height", "format", "frames", "quality", "perceptual_hash")
    assert [getattr(changed, fact) for fact in facts] == [getattr(plain, fact) for fact in facts]


@pytest.mark.parametrize("chain", ["noise:10", "crop:0.5"])
def test_seed_decides_what_is_random_in_a_transform_and_nothing_else_does(chain: str) -> None:
    np.random.seed(0)
    first = prepare(JPEG, FULL, chain, seed=5)
    np.random.seed(1)
    assert_equal(prepare(JPEG, FULL, chain, seed=5), first)
    assert not np.array_equal(prepare(JPEG, FULL, chain, seed=6).patches[0], first.patches[0])


def test_without_a_transform_the_seed_changes_nothing() -> None:
    assert_equal(prepare(JPEG, FULL, "", seed=1), prepare(JPEG, FULL))
    assert_equal(prepare(JPEG, FULL, "resize:0.5", seed=1), prepare(JPEG, FULL, "resize:0.5", seed=2))


def test_transform_beyond_the_limit_of_pixels_is_refused() -> None:
    config = replace(FULL, limits=DecodeLimits(max_pixels=200 * 160 * 4))
    assert prepare(JPEG, config, "resize:2").width == 200
    with pytest.raises(ImageTooLargeError):
        prepare(JPEG, config, "resize:2.1")
    with Image.open(io.BytesIO(JPEG)) as image, pytest.raises(ImageTooLargeError):
        prepare(image, config, "resize:2.1")


def test_strip_that_is_too_long_after_a_transform_is_refused() -> None:
    """Patch selection widens a short side to a patch: 2,400 × 19 px are within the limit, and 2,400 × 32 px are not."""
    strip, config = encode(Image.new("RGB", (2000, 16)), "PNG"), replace(FULL, limits=DecodeLimits(max_pixels=64_000))
    assert prepare(strip, config, "resize:0.9").width == 2000
    with pytest.raises(ImageTooLargeError, match="2400 × 19 px"):
        prepare(strip, config, "resize:1.2")


@pytest.mark.parametrize("chain", ["sharpen:3", "resize", "resize:0", "resize:0.5+", "+"])
def test_transform_that_is_none_is_refused(chain: str) -> None:
    with pytest.raises(ConfigError):
        prepare(JPEG, FULL, chain)
