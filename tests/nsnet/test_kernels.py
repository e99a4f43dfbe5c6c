"""The compiled kernels: equal to Pillow, on every processor; arrays that they refuse."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nsnet import images
from nsnet.entropy import MARGIN
from nsnet.images import thumbnail
from nsnet.kernels import compiled
from tests.nsnet.test_entropy import hard_patches

needs_kernels = pytest.mark.skipif(compiled is None, reason="the kernels are not compiled")
SIZES = [
    (1, 1), (1, 500), (500, 1), (7, 5), (31, 33), (63, 64), (64, 64), (65, 64), (64, 65), (66, 65), (67, 65),
    (383, 385), (385, 383), (400, 900), (900, 400), (1000, 40), (40, 1000),
]  # fmt: skip
"""Heights and widths on both sides of the side of a thumbnail, and of the rule for the order of the passes."""


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Noise of all levels, half of it black and white, for which bicubic weights go far beyond 0 and 255."""
    levels = np.random.default_rng(height * 1009 + width).integers(0, 256, (height, width, 3), np.uint8)
    levels[: height // 2] = np.where(levels[: height // 2] > 127, 255, 0)
    return levels


@needs_kernels
@pytest.mark.parametrize("side", [1, 3, 64, 384])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_thumbnails_equal_pillows(height: int, width: int, side: int) -> None:
    image = pixels(height, width)
    expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(thumbnail(image, side), expected)
    portable = np.empty((side, side, 3), np.uint8)
    compiled.resize(image, portable, side, True)  # the code for processors without AVX2
    np.testing.assert_array_equal(portable, expected)


def test_thumbnails_without_kernels_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = thumbnail(pixels(200, 300), 64)
    monkeypatch.setattr(images, "compiled", None)
    np.testing.assert_array_equal(thumbnail(pixels(200, 300), 64), with_kernels)


@pytest.mark.parametrize("turn", [lambda a: a[::2, ::2], lambda a: a.transpose(1, 0, 2), lambda a: a[::-1], np.fliplr])
def test_thumbnail_of_a_view_is_that_of_its_copy(turn: Callable[[Any], Any]) -> None:
    view = turn(pixels(200, 300))
    np.testing.assert_array_equal(thumbnail(view, 64), thumbnail(view.copy(), 64))


@needs_kernels
def test_estimates_of_every_processor_are_within_a_tenth_of_the_margin() -> None:
    image = np.concatenate([np.concatenate(list(patches), axis=1) for _, patches in hard_patches()])
    for is_power, is_luma in itertools.product((False, True), repeat=2):
        fast, portable = np.empty((2, image.shape[0] // 32, image.shape[1] // 32))
        compiled.entropy(image, fast, is_power, False, is_luma)
        compiled.entropy(image, portable, is_power, True, is_luma)
        assert np.abs(fast - portable).max() < MARGIN / 10


IMAGE = np.zeros((64, 96, 3), np.uint8)


@needs_kernels
@pytest.mark.parametrize(
    "image",
    [
        IMAGE.astype(np.uint16), IMAGE[:, ::2], IMAGE[..., ::-1], IMAGE[..., 0], np.zeros((64, 96, 4), np.uint8),
        IMAGE.transpose(1, 0, 2),
    ],
    ids=["16 bits", "gaps between pixels", "BGR", "grey", "four channels", "turned"],
)  # fmt: skip
def test_other_images_are_refused(image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
        compiled.entropy(image, np.empty((2, 3)), False)
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
        compiled.resize(image, np.empty((64, 64, 3), np.uint8), 64)


@needs_kernels
def test_other_results_are_refused() -> None:
    for wrong in (np.empty((2, 2)), np.empty((2, 6), np.float32), np.empty(0)):
        with pytest.raises(ValueError, match="6 items of 8 bytes"):
            compiled.entropy(IMAGE, wrong, False)
    for other in (np.empty((64, 64, 4), np.uint8), np.empty((64, 64, 3), np.uint16)):
        with pytest.raises(ValueError, match="12288 items of 1 bytes"):
            compiled.resize(IMAGE, other, 64)
    read_only = np.empty((2, 3))
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        compiled.entropy(IMAGE, read_only, False)
    with pytest.raises(TypeError):
        compiled.entropy(IMAGE.tolist(), np.empty((2, 3)), False)


@needs_kernels
@pytest.mark.parametrize("side", [0, -1, 20_000])
def test_other_sides_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="side 1 to"):
        compiled.resize(IMAGE, np.empty(0, np.uint8), side)
    with pytest.raises(ValueError, match="must not be empty"):
        compiled.resize(IMAGE[:0], np.empty((64, 64, 3), np.uint8), 64)
