"""Transforms of images, against the dumbest reference of each, and the chains that training draws."""

import functools
import hashlib
import io
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nsnet import transforms
from nsnet.config import from_dict, override, to_dict
from nsnet.errors import ConfigError, ImageTooLargeError
from nsnet.transforms import AUGMENTED, KINDS, ROBUSTNESS, AugmentationConfig, Transform, apply, draw, parse, to_text

Pixels = NDArray[np.uint8]

REPO_ROOT = Path(__file__).parents[2]
MANY = 10**9
EVERY = ("jpeg:60", "blur:1.5", "resize:0.5", "resize:1.5", "noise:5", "crop:0.75", "screenshot:0.75", "centre:24")

# SHA-256 of golden(). Made with:
#   python -c "from tests.nsnet.test_transforms import *; print(checksum(golden()))"
GOLDEN = "216ee45866f7dc576a9765a6cd9eec7b03cee47f063b6bd11877e0febae48895"


def random_image(height: int, width: int, low: int = 0, high: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)


def smooth_image(height: int = 96, width: int = 128) -> Pixels:
    small = Image.fromarray(random_image(7, 9))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def run(pixels: Pixels, text: str, seed: int = 0, max_pixels: int = MANY) -> Pixels:
    return apply(pixels, parse(text), seed=seed, max_pixels=max_pixels)


def golden() -> Pixels:
    row, column = np.mgrid[:120, :150]
    image = np.stack([(row * gain + column * 5 + row * column // 7) % 256 for gain in (2, 3, 4)], axis=2)
    return run(image.astype(np.uint8), "crop:0.75+blur:1.5+noise:5", seed=7)


def checksum(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def through_pillow(pixels: Pixels, codec: str, **how: Any) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, codec, **how)
    return np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB"), dtype=np.uint8)


def naive_blur(pixels: Pixels, sigma: float) -> NDArray[np.float64]:
    """The two-dimensional sum at every pixel, twice as far out as the module goes, mirrored step by step."""

    def inside(i: int, length: int) -> int:
        while not 0 <= i < length:
            i = -1 - i if i < 0 else 2 * length - 1 - i
        return i

    height, width = pixels.shape[:2]
    reach = math.ceil(8 * sigma)
    blurred = np.zeros(pixels.shape)
    for row in range(height):
        for column in range(width):
            total = 0.0
            for down in range(-reach, reach + 1):
                for right in range(-reach, reach + 1):
                    weight = math.exp(-(down**2 + right**2) / (2 * sigma**2))
                    total += weight
                    blurred[row, column] += weight * pixels[inside(row + down, height), inside(column + right, width)]
            blurred[row, column] /= total
    return blurred


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, which Pillow's bicubic is."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def scaling(before: int, after: int) -> NDArray[np.float64]:
    """(after, before): each output pixel as weights of the input pixels, the kernel widened when reducing."""
    ratio = before / after
    wide = max(ratio, 1.0)
    weights = np.array([[cubic(((i + 0.5) - (o + 0.5) * ratio) / wide) for i in range(before)] for o in range(after)])
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@st.composite
def transform(draw_from: st.DrawFn) -> Transform:
    name = draw_from(st.sampled_from(sorted(KINDS)))
    kind, lossless_only = KINDS[name], draw_from(st.booleans())
    if kind.whole:
        value: float = draw_from(st.integers(int(kind.low), int(kind.high)))
    else:
        numbers = st.floats(kind.low, kind.high, exclude_min=kind.above_low, allow_subnormal=False)
        value = draw_from(numbers.map(lambda value: float(f"{value:.6g}")).filter(kind.holds))
    return Transform(name=name, value=value, lossless_only=lossless_only)


CHAINS = st.lists(transform(), max_size=4).map(tuple)


# What every transform keeps


@pytest.mark.parametrize("text", ["", *EVERY, "resize:0.5+noise:5+jpeg:60", *ROBUSTNESS])
def test_result_is_a_contiguous_image_of_its_own(text: str) -> None:
    pixels = random_image(40, 56)
    before = pixels.copy()
    result = run(pixels, text)
    assert result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3
    assert result.flags.c_contiguous and result.flags.writeable and not np.shares_memory(result, pixels)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("text", ["", "resize:1", "crop:1", "blur:0.1", "noise:0.01"])
def test_transform_that_does_nothing_gives_the_same_pixels(text: str) -> None:
    pixels = random_image(31, 17)
    result = run(pixels, text)
    np.testing.assert_array_equal(result, pixels)
    assert not np.shares_memory(result, pixels)


@pytest.mark.parametrize("text", ROBUSTNESS)
def test_every_standard_transform_changes_the_image(text: str) -> None:
    pixels = random_image(40, 56)
    result = run(pixels, text)
    assert result.shape != pixels.shape or (result != pixels).mean() > 0.2


@pytest.mark.parametrize("text", ["jpeg:90", "blur:3", "resize:0.3", "resize:4", "crop:0.01", "screenshot:1.5"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 20)])
def test_constant_image_stays_constant(text: str, shape: tuple[int, int]) -> None:
    for level in (0, 77, 128, 255):
        result = run(np.full((*shape, 3), level, dtype=np.uint8), text)
        assert np.abs(result.astype(int) - level).max() <= (0 if text[0] in "brc" else 1), "codecs may round grey"


@pytest.mark.parametrize("text", ["blur:2", "resize:0.5", "resize:1.7", "noise:9", "crop:0.4"])
def test_channels_do_not_mix(text: str) -> None:
    pixels = random_image(30, 41)
    other = pixels.copy()
    other[..., 1] = 255 - other[..., 1]
    one, two = run(pixels, text), run(other, text)
    np.testing.assert_array_equal(one[..., [0, 2]], two[..., [0, 2]])
    assert (one[..., 1] != two[..., 1]).any()


@pytest.mark.parametrize("text", EVERY)
def test_strided_reversed_and_read_only_images_are_taken_as_they_look(text: str) -> None:
    pixels = random_image(20, 28)
    expected = run(pixels, text, seed=3)
    wide = np.zeros((40, 56, 3), dtype=np.uint8)
    wide[::2, ::2] = pixels
    backwards = np.ascontiguousarray(pixels[::-1, :, ::-1])[::-1, :, ::-1]
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for equal in (wide[::2, ::2], np.asfortranarray(pixels), backwards, frozen):
        np.testing.assert_array_equal(run(equal, text, seed=3), expected)


@pytest.mark.parametrize("text", EVERY)
def test_result_is_a_pure_function_of_its_arguments(text: str) -> None:
    pixels = smooth_image(60, 80)
    np.random.seed(0)
    first = run(pixels, text, seed=11)
    np.random.seed(1)
    np.testing.assert_array_equal(run(pixels, text, seed=11), first)
    others = {checksum(run(pixels, text, seed=seed)) for seed in range(6)}
    assert len(others) == (6 if text.startswith(("noise", "crop")) else 1)


@settings(max_examples=60, deadline=None)
@given(chain=CHAINS, height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**64 - 1))
def test_any_chain_gives_an_image_of_the_computed_size(
    chain: tuple[Transform, ...], height: int, width: int, seed: int
) -> None:
    expected = [height, width]
    for step in chain:
        if step.name in ("resize", "crop", "screenshot"):
            expected = [max(1, int(side * step.value + 0.5)) for side in expected]
        if step.name == "centre":
            expected = [min(side, int(step.value)) for side in expected]
    result = apply(random_image(height, width), chain, seed=seed, max_pixels=MANY)
    assert result.shape == (*expected, 3) and result.dtype == np.uint8


def test_steps_of_a_chain_are_applied_in_order() -> None:
    pixels = random_image(40, 50)
    for text in ("blur:1+resize:0.5", "resize:0.5+blur:1", "jpeg:50+resize:2+jpeg:90", "resize:0.5+screenshot:0.5"):
        one_by_one = pixels
        for step in text.split("+"):
            one_by_one = run(one_by_one, step)
        np.testing.assert_array_equal(run(pixels, text), one_by_one)
    assert (run(pixels, "blur:1+resize:0.5") != run(pixels, "resize:0.5+blur:1")).any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 5), (5, 5, 4), (5, 5, 1), (1, 5, 5, 3)])
def test_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        run(np.zeros(shape, dtype=np.uint8), "jpeg:75")


def test_array_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        run(np.zeros((5, 5, 3)), "jpeg:75")  # type: ignore[arg-type]


def test_pixels_have_their_golden_checksum() -> None:
    assert checksum(golden()) == GOLDEN


# What each one does


@pytest.mark.parametrize("quality", [1, 30, 75, 95, 100])
def test_jpeg_is_pillows_with_half_as_many_colours_per_side(quality: int) -> None:
    pixels = random_image(37, 50)
    result = run(pixels, f"jpeg:{quality}")
    np.testing.assert_array_equal(result, through_pillow(pixels, "JPEG", quality=quality))
    np.testing.assert_array_equal(result, through_pillow(pixels, "JPEG", quality=quality, subsampling="4:2:0"))
    assert (result != through_pillow(pixels, "JPEG", quality=quality, subsampling="4:4:4")).any()


def test_lower_jpeg_quality_is_farther_from_the_image() -> None:
    pixels = random_image(64, 64)
    errors = [np.abs(run(pixels, f"jpeg:{q}").astype(int) - pixels).mean() for q in (95, 80, 60, 40, 20, 5)]
    assert errors == sorted(errors) and errors[0] < errors[-1]


@pytest.mark.parametrize("sigma", [0.1, 0.13, 0.4, 1.0, 2.2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 3), (7, 5)])
def test_blur_is_the_sum_over_a_gaussian(sigma: float, shape: tuple[int, int]) -> None:
    """Half a level is rounding; the tail beyond 4 σ that is cut off moves what is left by less than 0.06 levels."""
    pixels = random_image(*shape, seed=shape[1])
    error = np.abs(run(pixels, f"blur:{sigma:g}") - naive_blur(pixels, sigma))
    assert error.max() <= 0.5 + 0.06


@pytest.mark.parametrize("sigma", [0.5, 1, 3, 20])
def test_blur_equals_scipys_up_to_ties(sigma: float) -> None:
    pixels = random_image(70, 311)
    exact = scipy.ndimage.gaussian_filter(pixels.astype(np.float64), (sigma, sigma, 0), mode="reflect", truncate=4.0)
    assert np.abs(run(pixels, f"blur:{sigma}") - exact).max() <= 0.5 + 1e-3


def test_blurred_point_has_the_variance_that_was_asked_for() -> None:
    for sigma in (1.0, 1.5, 2.0):
        image = np.zeros((41, 41, 3), dtype=np.uint8)
        image[:, 20] = 255
        profile = run(image, f"blur:{sigma:g}")[20, :, 0].astype(float)
        variance = (profile * (np.arange(41) - 20) ** 2).sum() / profile.sum()
        assert variance == pytest.approx(sigma**2, rel=0.03)


@pytest.mark.parametrize("block", [1, 500, 5000])
@pytest.mark.parametrize("text", ["blur:1.5", "noise:20"])
def test_blocks_do_not_show(text: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_image(45, 37)
    whole = run(pixels, text, seed=2)
    monkeypatch.setattr(transforms, "BLOCK_SAMPLES", block)
    np.testing.assert_array_equal(run(pixels, text, seed=2), whole)


def test_image_larger_than_a_block_is_done_as_a_whole() -> None:
    pixels = random_image(300, 400)
    assert pixels.size > 2 * transforms.BLOCK_SAMPLES
    exact = scipy.ndimage.gaussian_filter(pixels.astype(np.float64), (2, 2, 0))
    assert np.abs(run(pixels, "blur:2") - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.5, 0.75, 1.5, 2, 4])
@pytest.mark.parametrize("shape", [(24, 31), (1, 17), (17, 1), (1, 1)])
def test_resize_is_bicubic_with_antialiasing(factor: float, shape: tuple[int, int]) -> None:
    """Within about 1 level: Pillow rounds after each direction. Mid greys, so that no overshoot is clipped between."""
    pixels = random_image(*shape, low=90, high=166)
    height, width = (max(1, int(side * factor + 0.5)) for side in shape)
    exact = np.einsum("ah,hwc,bw->abc", scaling(shape[0], height), pixels, scaling(shape[1], width))
    result = run(pixels, f"resize:{factor}")
    assert result.shape == (height, width, 3)
    assert np.abs(result - exact).max() <= 1.1


@pytest.mark.parametrize(
    ("side", "factor", "expected"),
    [(10, 0.5, 5), (3, 0.5, 2), (5, 0.5, 3), (1, 0.1, 1), (4, 0.1, 1), (5, 4, 20), (7, 0.75, 5), (100, 0.333, 33)],
)
def test_sides_are_rounded_half_up_and_hold_a_pixel(side: int, factor: float, expected: int) -> None:
    for name in ("resize", "screenshot", *(["crop"] if factor <= 1 else [])):
        assert run(random_image(side, 2 * side), f"{name}:{factor}").shape[0] == expected


@pytest.mark.parametrize("std", [0.5, 2, 5, 10, 30])
def test_noise_has_the_standard_deviation_that_was_asked_for(std: float) -> None:
    """Rounded as it is: Σ k² P(k - 0.5 < noise < k + 0.5). An estimate from 120,000 samples is within 1 %."""

    def below(value: float) -> float:
        return 0.5 * math.erf(value / std / math.sqrt(2))

    added = run(np.full((200, 200, 3), 128, dtype=np.uint8), f"noise:{std}") - 128.0
    rounded = math.sqrt(sum(k**2 * (below(k + 0.5) - below(k - 0.5)) for k in range(-127, 128)))
    assert added.std() == pytest.approx(rounded, rel=0.01)
    assert abs(added.mean()) < 4 * std / math.sqrt(added.size) + 1e-9
    if std >= 5:
        assert np.mean(np.abs(added) <= std) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.05)
        assert np.abs(added).max() > 3.5 * std, "a Gaussian has tails"


def test_noise_of_neighbours_and_channels_is_independent() -> None:
    added = run(np.full((200, 200, 3), 128, dtype=np.uint8), "noise:20") - 128.0
    pairs = [(added[1:], added[:-1]), (added[:, 1:], added[:, :-1]), (added[..., 1:], added[..., :-1])]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_noise_is_clipped_and_does_not_wrap() -> None:
    assert run(np.full((50, 50, 3), 3, dtype=np.uint8), "noise:10").max() < 80
    assert run(np.full((50, 50, 3), 252, dtype=np.uint8), "noise:10").min() > 175


def test_second_noise_of_a_chain_is_other_noise() -> None:
    """Twice the same would add up to 2 σ, twice another to √2 σ."""
    added = run(np.full((100, 100, 3), 128, dtype=np.uint8), "noise:10+noise:10", seed=5) - 128.0
    assert added.std() == pytest.approx(10 * math.sqrt(2), rel=0.02)


def test_noise_of_one_seed_grows_in_place_along_its_curve() -> None:
    grey = np.full((60, 60, 3), 128, dtype=np.uint8)
    little, much = (run(grey, f"noise:{std}", seed=9) - 128.0 for std in (5, 20))
    assert np.abs(4 * little - much).max() <= 2.5


def places_of(part: Pixels, whole: Pixels) -> list[tuple[int, int]]:
    (height, width), (rows, columns) = part.shape[:2], whole.shape[:2]
    corners = [(top, left) for top in range(rows - height + 1) for left in range(columns - width + 1)]
    return [(y, x) for y, x in corners if np.array_equal(whole[y : y + height, x : x + width], part)]


@pytest.mark.parametrize(("share", "height", "width"), [(0.9, 18, 22), (0.5, 10, 12), (0.05, 1, 1), (0.001, 1, 1)])
def test_crop_is_an_exact_part_of_the_image(share: float, height: int, width: int) -> None:
    pixels = np.arange(20 * 24 * 3).reshape(20, 24, 3).astype(np.uint8)
    pixels[..., 1] = (np.arange(20 * 24) // 256).reshape(20, 24)
    for seed in range(5):
        part = run(pixels, f"crop:{share}", seed=seed)
        assert part.shape == (height, width, 3)
        assert len(places_of(part, pixels)) == 1


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(24, 24, 0, 0), (40, 24, 0, 0), (56, 57, 16, 16), (90, 300, 32, 128), (20, 90, 0, 32), (10, 9, 0, 0)],
)
def test_central_part_starts_on_the_blocks_of_a_jpeg(height: int, width: int, top: int, left: int) -> None:
    pixels = random_image(height, width)
    np.testing.assert_array_equal(run(pixels, "centre:24"), pixels[top : top + 24, left : left + 24])


@pytest.mark.parametrize("text", ["jpeg:60", "screenshot:0.75", "noise:5+crop:0.7+jpeg:90", "centre:16+screenshot:2"])
def test_file_of_a_chain_holds_what_the_chain_returns(text: str) -> None:
    pixels, chain = smooth_image(), parse(text)
    file = transforms.to_file(pixels, chain, seed=7, max_pixels=MANY)
    read = np.array(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.uint8)
    np.testing.assert_array_equal(read, run(pixels, text, seed=7))
    with pytest.raises(ImageTooLargeError):
        transforms.to_file(pixels, chain, seed=7, max_pixels=10)


def test_steps_for_lossless_files_are_left_out_for_others() -> None:
    chain = parse("lossless:jpeg:96+blur:1+lossless:noise:2")
    assert to_text(chain) == "lossless:jpeg:96+blur:1+lossless:noise:2"
    assert transforms.applicable(chain, lossless=True) == chain
    assert to_text(transforms.applicable(chain, lossless=False)) == "blur:1"


def test_crop_takes_every_place_as_often() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(4, 9, 1).repeat(3, axis=2)
    shares = Counter(int(run(pixels, "crop:0.75", seed=seed)[0, 0, 0]) for seed in range(1800))
    # 3 × 7 px of 4 × 9: two places down, three across
    assert sorted(shares) == [0, 1, 2, 9, 10, 11]
    assert all(abs(count - 300) < 5 * math.sqrt(300) for count in shares.values())


@pytest.mark.parametrize("factor", [0.5, 0.75, 1, 1.5])
def test_screenshot_is_a_bilinear_resize_and_a_webp_of_quality_80(factor: float) -> None:
    pixels = smooth_image()
    size = (int(128 * factor + 0.5), int(96 * factor + 0.5))
    shown = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)
    result = run(pixels, f"screenshot:{factor}")
    np.testing.assert_array_equal(result, through_pillow(shown, "WEBP", quality=80))
    assert result.shape == (size[1], size[0], 3)
    error = np.abs(result.astype(int) - shown)
    assert 0.2 < error.mean() < 8, "re-encoded with loss, but still the image"


# Limits


@pytest.mark.parametrize(
    ("text", "pixels"),
    [("resize:2", 400), ("resize:0.5+resize:4", 400), ("jpeg:75", 100), ("screenshot:1.5", 225), ("crop:0.5", 25)],
)
def test_pixel_limit_is_inclusive(text: str, pixels: int) -> None:
    image = random_image(10, 10)
    run(image, text, max_pixels=pixels)
    with pytest.raises(ImageTooLargeError, match=rf"px, the limit is {pixels - 1:,} pixels \(--max-pixels\)"):
        run(image, text, max_pixels=pixels - 1)


def test_pixel_limit_holds_for_every_step_and_is_checked_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in KINDS:
        monkeypatch.setitem(transforms._STEPS, name, lambda *_, name=name: done.append(name))
    with pytest.raises(ImageTooLargeError, match="resize:4 would give 40 × 80 px, the limit is 3,199 pixels"):
        run(random_image(20, 10), "jpeg:75+resize:4+resize:0.1", max_pixels=3199)
    assert done == []


@pytest.mark.parametrize(("text", "longest"), [("jpeg:75", 65_500), ("screenshot:1", 16_383)])
def test_side_that_a_codec_cannot_hold_is_refused(text: str, longest: int) -> None:
    strip = np.zeros((1, longest + 1, 3), dtype=np.uint8)
    assert run(strip[:, 1:], text).shape == (1, longest, 3)
    for image in (strip, strip.swapaxes(0, 1)):
        with pytest.raises(ImageTooLargeError, match=f"sides of up to {longest:,} px: resize or crop first"):
            run(image, text)
    assert run(strip, f"resize:0.5+{text}").shape == (1, longest // 2 + 1, 3)


def test_jpeg_meets_no_limit_of_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above this number, and fails above twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert run(random_image(20, 20), "jpeg:75").shape == (20, 20, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_webp_above_pillows_own_limit_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert run(random_image(20, 20), "screenshot:1").shape == (20, 20, 3)
    with pytest.raises(ImageTooLargeError, match=r"WEBP made by a transform: Image size \(420 pixels\) exceeds limit"):
        run(random_image(20, 21), "screenshot:1")


# Texts


@settings(max_examples=150, deadline=None)
@given(chain=CHAINS)
def test_chain_survives_its_text(chain: tuple[Transform, ...]) -> None:
    assert parse(to_text(chain)) == chain


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.from_regex(r"(jpeg|blur|crop|noise):[0-9.e+_-]{1,8}", fullmatch=True)))
def test_text_is_refused_or_read_to_the_letter(text: str) -> None:
    try:
        chain = parse(text)
    except ConfigError as error:
        assert str(error)
    else:
        assert to_text(chain) == text


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("", []), ("jpeg:75", [("jpeg", 75.0)]), ("blur:1.5", [("blur", 1.5)]), ("crop:1", [("crop", 1.0)]),
        ("resize:0.5+jpeg:75", [("resize", 0.5), ("jpeg", 75.0)]), ("noise:5+noise:5", [("noise", 5.0)] * 2),
        ("screenshot:0.75", [("screenshot", 0.75)]), ("noise:1e-05", [("noise", 1e-5)]),
    ],
)  # fmt: skip
def test_text_has_the_form_that_is_documented(text: str, chain: list[tuple[str, float]]) -> None:
    assert [(step.name, step.value) for step in parse(text)] == chain
    assert to_text([Transform(name=name, value=value) for name, value in chain]) == text


@pytest.mark.parametrize(
    "text",
    [
        "jpeg", "jpeg:", ":75", "75", "jpeg:high", "jpeg:75+", "+jpeg:75", "jpeg:75++blur:1", "+", " ", "jpeg=75",
        "jpeg:75:80", "jpeg:75,blur:1", "jpeg:75 +blur:1", "jpeg: 75", "JPEG:75", "sharpen:1", "jpeg:075", "jpeg:75.0",
        "jpeg:7_5", "jpeg:+75", "blur:.5", "blur:1.50", "blur:nan", "blur:inf", "blur:1.2345678", "noise:1e1",
        "noise:٣",
    ],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_refusal_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"'jpeg:high' is not a transform: write NAME:VALUE, as in resize:0\.5"):
        parse("jpeg:high")
    with pytest.raises(ConfigError, match=r"unknown transform 'sharpen': choose jpeg, blur, .*screenshot"):
        parse("sharpen:1")
    with pytest.raises(ConfigError, match=r"'blur:\.5' has another spelling, 'blur:0\.5': write that one"):
        parse("blur:.5")
    with pytest.raises(ConfigError, match=r"jpeg takes a quality, a whole number ≥ 1 and ≤ 100; got 101\.0: choose"):
        parse("jpeg:101")
    with pytest.raises(ConfigError, match=r"at most 6 significant digits, got 0\.1234567: round it to 0\.123457"):
        parse("crop:0.1234567")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("jpeg", [1, 30.0, 100], [0, 101, 75.5, -3]), ("blur", [1e-6, 0.1, 20], [0, -1, 20.0001]),
        ("resize", [0.1, 1, 4], [0.0999, 4.001, 0, -1]), ("noise", [0.001, 255], [0, -5, 255.1]),
        ("crop", [1e-4, 0.5, 1], [0, 1.0001, -0.5]), ("screenshot", [0.1, 1, 4], [0.09, 4.1, 0]),
    ],
)  # fmt: skip
def test_values_have_their_range(name: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        assert parse(str(Transform(name=name, value=value)))[0].value == value
    for value in [*bad, math.nan, math.inf, -math.inf]:
        with pytest.raises(ConfigError, match=f"^{name} takes a .*got {value}: choose one in this range"):
            Transform(name=name, value=value)


def test_robustness_curves_are_the_standard_ones() -> None:
    steps = [parse(text) for text in ROBUSTNESS]
    assert all(len(chain) == 1 for chain in steps)
    curves = {name: [chain[0].value for chain in steps if chain[0].name == name] for name in KINDS}
    assert curves == {
        "jpeg": [95, 90, 80, 70, 60, 50, 40, 30], "blur": [0.5, 1, 2, 3], "resize": [0.5, 0.75, 1.5, 2],
        "noise": [2, 5, 10], "crop": [0.9, 0.75, 0.5], "screenshot": [0.75], "centre": [],
    }  # fmt: skip
    assert len(ROBUSTNESS) == 23


# Augmentation


HALF = AugmentationConfig(resize_share=0.5, crop_share=0.5, blur_share=0.5, jpeg_share=0.5)
ALL = AugmentationConfig(resize_share=1.0, crop_share=1.0, blur_share=1.0, jpeg_share=1.0)
SEEDS = range(2000)


def changed(config: AugmentationConfig, **values: Any) -> AugmentationConfig:
    return replace(config, **values)


def only(name: str, config: AugmentationConfig) -> AugmentationConfig:
    return changed(config, **{f"{other}_share": 0.0 for other in AUGMENTED if other != name})


@functools.cache
def chains(config: AugmentationConfig) -> list[dict[str, float]]:
    """Name -> value of what is drawn, for each seed."""
    return [{step.name: step.value for step in draw(config, seed)} for seed in SEEDS]


def drawn(name: str, config: AugmentationConfig) -> list[float | None]:
    """The value of a kind for each seed; None where it is not drawn."""
    return [chain.get(name) for chain in chains(config)]


def test_nothing_is_drawn_by_default() -> None:
    assert all(draw(AugmentationConfig(), seed) == () for seed in range(200))


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("name", AUGMENTED)
def test_images_get_a_kind_as_often_as_was_asked_for(name: str, turn: int) -> None:
    shares = dict(zip(AUGMENTED, np.roll([0.05, 0.3, 0.5, 0.9], turn).tolist(), strict=True))
    values = drawn(name, changed(AugmentationConfig(), **{f"{other}_share": share for other, share in shares.items()}))
    share = shares[name]
    count = sum(value is not None for value in values)
    assert abs(count - 2000 * share) < 4.5 * math.sqrt(2000 * share * (1 - share))


def test_kinds_are_drawn_independently() -> None:
    chosen = np.array([[value is not None for value in drawn(name, HALF)] for name in AUGMENTED], dtype=float)
    values = np.array([drawn(name, ALL) for name in AUGMENTED], dtype=float)
    together = np.corrcoef(np.concatenate([chosen, values]))
    assert np.abs(together - np.eye(8)).max() < 4.5 / math.sqrt(2000)


@pytest.mark.parametrize("name", AUGMENTED)
def test_draw_of_a_kind_does_not_depend_on_the_others(name: str) -> None:
    assert drawn(name, only(name, HALF)) == drawn(name, HALF)
    others = {f"{other}_range": HALF.setting(other)[1][:1] * 2 for other in AUGMENTED if other != name}
    assert drawn(name, changed(HALF, **others)) == drawn(name, HALF)


@pytest.mark.parametrize("name", AUGMENTED)
def test_larger_share_keeps_what_a_smaller_one_drew(name: str) -> None:
    pairs = zip(drawn(name, HALF), drawn(name, ALL), strict=True)
    assert all(half in (None, whole) for half, whole in pairs)


@pytest.mark.parametrize("name", ["resize", "crop", "blur"])
def test_values_are_uniform_in_their_range(name: str) -> None:
    low, high = ALL.setting(name)[1]
    values = np.array(drawn(name, ALL), dtype=float)
    assert low <= values.min() and values.max() <= high
    quarters = np.histogram(values, bins=4, range=(low, high))[0]
    assert np.abs(quarters - 500).max() < 4.5 * math.sqrt(500 * 0.75)


def test_jpeg_quality_is_any_whole_number_of_its_range() -> None:
    values = drawn("jpeg", ALL)
    assert set(values) == {float(quality) for quality in range(30, 101)}
    counts = np.array(list(Counter(drawn("jpeg", changed(ALL, jpeg_range=(90, 93)))).values()))
    assert len(counts) == 4 and np.abs(counts - 500).max() < 4.5 * math.sqrt(500 * 0.75)


def test_steps_are_applied_in_their_order() -> None:
    assert all([step.name for step in draw(ALL, seed)] == ["resize", "crop", "blur", "jpeg"] for seed in range(50))
    for seed in range(200):
        names = [step.name for step in draw(HALF, seed)]
        assert names == [name for name in AUGMENTED if name in names]


def test_draw_is_a_pure_function_of_the_seed() -> None:
    np.random.seed(0)
    first = [draw(HALF, seed) for seed in range(100)]
    np.random.seed(1)
    assert [draw(HALF, seed) for seed in range(100)] == first
    assert len({draw(ALL, seed) for seed in range(1000)}) == 1000
    assert draw(ALL, 2**63 - 1) != draw(ALL, 2**64 - 1)


def test_drawn_chain_survives_its_text() -> None:
    for seed in SEEDS:
        chain = draw(ALL, seed)
        assert parse(to_text(chain)) == chain


@pytest.mark.parametrize("bounds", [(0.123456, 0.123457), (0.123456, 0.123456), (0.99999, 1.0), (1e-5, 2e-5)])
def test_rounded_values_stay_in_a_narrow_range(bounds: tuple[float, float]) -> None:
    values = [draw(AugmentationConfig(crop_share=1.0, crop_range=bounds), seed)[0].value for seed in range(50)]
    assert bounds[0] <= min(values) and max(values) <= bounds[1]


def test_drawn_blur_of_nothing_is_left_out() -> None:
    config = AugmentationConfig(blur_share=1.0, blur_range=(0.0, 0.0), jpeg_share=1.0)
    assert all([step.name for step in draw(config, seed)] == ["jpeg"] for seed in range(50))


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_share_that_is_no_probability_is_refused(name: str, share: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}_share must be a probability in \[0, 1\], got {share}"):
        changed(AugmentationConfig(), **{f"{name}_share": share})


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize("bounds", [(), (1.0,), (1.0, 1.0, 1.0), (1.0, 0.5), (math.nan, 1.0), (1.0, math.nan)])
def test_range_that_is_no_pair_is_refused(name: str, bounds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{name}_range must be two numbers, the least and the largest value"):
        changed(AugmentationConfig(), **{f"{name}_range": bounds})


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("jpeg", (0, 90)), ("jpeg", (30, 101)), ("jpeg", (30.5, 90)), ("blur", (-1, 3)), ("blur", (0, 21)),
        ("resize", (0.05, 1)), ("resize", (1, 5)), ("crop", (0, 1)), ("crop", (0.5, 1.5)), ("crop", (0.1234567, 1)),
    ],
)  # fmt: skip
def test_range_outside_of_its_transforms_is_refused(name: str, bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{name}_range: {name} takes a"):
        changed(AugmentationConfig(), **{f"{name}_range": bounds})


def test_augmentation_survives_json() -> None:
    own = AugmentationConfig(
        resize_share=0.1, resize_range=(0.25, 3.0), crop_share=0.2, crop_range=(0.3, 0.9), blur_share=0.3,
        blur_range=(0.5, 2.0), jpeg_share=0.4, jpeg_range=(50.0, 95.0),
    )  # fmt: skip
    assert all(value != getattr(AugmentationConfig(), name) for name, value in to_dict(own).items())
    for config in (AugmentationConfig(), own):
        stored = json.dumps(to_dict(config), allow_nan=False)
        again = from_dict(AugmentationConfig, json.loads(stored))
        assert again == config and hash(again) == hash(config)
        assert [draw(again, seed) for seed in range(20)] == [draw(config, seed) for seed in range(20)]


def test_augmentation_is_checked_and_overridden_as_other_settings_are() -> None:
    assert override(AugmentationConfig(), "jpeg_range", "[50, 90]").jpeg_range == (50.0, 90.0)
    with pytest.raises(ConfigError, match=r"^AugmentationConfig\.blur_range must be float, got '1'"):
        override(AugmentationConfig(), "blur_range", '["1", 2]')
    with pytest.raises(ConfigError, match="crop_range: crop takes a share"):
        override(AugmentationConfig(), "crop_range", "[0, 1]")


def test_decoding_processes_load_no_scipy_for_it() -> None:
    code = "import sys, nsnet.transforms; print(sorted({'scipy', 'torch'} & {*sys.modules}))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
