"""Alignments: which chains are some, which files they encode, and the facts of the files that they make."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nsnet import alignment, transforms
from nsnet.errors import ConfigError, ImageTooLargeError
from nsnet.images import DecodeLimits, decode, decode_image, thumbnail
from nsnet.preparation import PreparationConfig, Prepared, prepare

Pixels = NDArray[np.uint8]
FACTS = PreparationConfig(patches=(), thumbnail_px=48, aligned=True)


def scene(height: int = 90, width: int = 120, seed: int = 0) -> Pixels:
    """Smooth, with a little noise, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def encode(pixels: Pixels, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def facts(prepared: Prepared) -> tuple[Any, ...]:
    return prepared.format, prepared.quality, prepared.width, prepared.height, prepared.size_bytes


PNG, JPEG = encode(scene(), "PNG"), encode(scene(), "JPEG", quality=70)


# Which chains.


@pytest.mark.parametrize("text", ["jpeg:96", "centre:256+jpeg:96", "lossless:jpeg:96", "resize:0.5+screenshot:1",
                                  "lossless:centre:8+lossless:jpeg:1", "lossless:blur:1+jpeg:96"])  # fmt: skip
def test_chain_that_ends_in_a_file_is_an_alignment(text: str) -> None:
    assert transforms.to_text(alignment.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not end in a file: end it with jpeg or screenshot, as in centre:256"),
        ("resize", "is not a transform: write NAME:VALUE"), ("resize:0.5", "does not end in a file"),
        ("jpeg:96+centre:256", "does not end in a file"), ("jpeg:0", "jpeg takes a quality, a whole number ≥ 1"),
        ("jpeg:96.0", "has another spelling, 'jpeg:96'"), ("swirl:3", "unknown transform 'swirl': choose jpeg, blur"),
        ("lossless:", "is not a transform"), ("lossless:lossless:jpeg:96", "is not a transform"),
        ("lossy:jpeg:96", "is not a transform"),
        ("centre:256+lossless:jpeg:96", "changes lossy files and does not encode them: write lossless: before each"),
    ],
)  # fmt: skip
def test_other_chain_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        alignment.parse(text)
    assert reason in str(raised.value) and str(raised.value).startswith("--align ")
    assert "\n" not in str(raised.value)


# What becomes of an image.


@pytest.mark.parametrize("file", [PNG, JPEG], ids=["png", "jpeg"])
def test_aligned_image_is_the_one_that_is_read_from_the_encoded_file(file: bytes) -> None:
    encoded = encode(decode(file), "JPEG", quality=96)
    prepared = prepare(file, FACTS, "jpeg:96")
    np.testing.assert_array_equal(prepared.thumbnail, thumbnail(decode(encoded), 48))
    assert facts(prepared) == ("JPEG", 96, 120, 90, len(encoded))
    judged = prepare(file, PreparationConfig(thumbnail_px=48), "jpeg:96")  # as scoring prepares it
    np.testing.assert_array_equal(judged.thumbnail, prepared.thumbnail)
    assert facts(judged) == facts(prepare(file, FACTS))  # of the file as it is


def test_step_for_lossless_files_leaves_others_as_they_are() -> None:
    assert facts(prepare(JPEG, FACTS, "lossless:jpeg:96")) == ("JPEG", 70, 120, 90, None)
    np.testing.assert_array_equal(prepare(JPEG, FACTS, "lossless:jpeg:96").thumbnail, prepare(JPEG, FACTS).thumbnail)
    changed, always = prepare(PNG, FACTS, "lossless:jpeg:96"), prepare(PNG, FACTS, "jpeg:96")
    assert facts(changed) == facts(always) and facts(changed)[:2] == ("JPEG", 96)
    np.testing.assert_array_equal(changed.thumbnail, always.thumbnail)


def test_facts_are_of_the_file_that_the_whole_chain_makes() -> None:
    assert facts(prepare(PNG, FACTS, "centre:64+jpeg:75"))[:4] == ("JPEG", 75, 64, 64)
    assert facts(prepare(JPEG, FACTS, "screenshot:0.5"))[:4] == ("WEBP", None, 60, 45)
    assert facts(prepare(JPEG, FACTS, "lossless:jpeg:30+jpeg:90"))[:2] == ("JPEG", 90)


def test_file_that_would_be_too_large_is_refused() -> None:
    config = PreparationConfig(patches=(), aligned=True, limits=DecodeLimits(max_pixels=120 * 90))
    with pytest.raises(ImageTooLargeError, match="resize:2 would give 240 × 180 px"):
        prepare(PNG, config, "resize:2+jpeg:96")


# Which files are lossless.


@pytest.mark.parametrize(
    ("file_format", "options", "lossless"),
    [
        ("PNG", {}, True), ("BMP", {}, True), ("GIF", {}, True), ("PPM", {}, True), ("JPEG", {"quality": 100}, False),
        ("TIFF", {}, True), ("TIFF", {"compression": "tiff_adobe_deflate"}, True),
        ("TIFF", {"compression": "jpeg"}, False), ("WEBP", {}, False), ("WEBP", {"lossless": True}, True),
        ("WEBP", {"exif": b"Exif\0\0VP8L" * 3}, False), ("WEBP", {"lossless": True, "exif": b"VP8 " * 9}, True),
        ("WEBP", {"icc_profile": b"VP8L" * 40}, False), ("AVIF", {}, False),
    ],
)  # fmt: skip
def test_lossless_files_are_known_by_their_content(file_format: str, options: dict[str, Any], lossless: bool) -> None:
    assert decode_image(encode(scene(), file_format, **options)).lossless is lossless


@pytest.mark.parametrize("lossless", [True, False])
def test_first_frame_of_an_animation_decides(lossless: bool) -> None:
    frames = [Image.fromarray(scene(seed=seed)) for seed in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=lossless)
    assert decode_image(buffer.getvalue()).lossless is lossless
