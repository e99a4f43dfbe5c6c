"""Spectral entropy, exact and estimated, against the full transform written out."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsnet import entropy
from nsnet.entropy import MARGIN, Grey, Spectrum, channel_sum, estimate_entropy, spectral_entropy
from nsnet.patches import split_patches

Pixels = NDArray[np.uint8]


def naive_entropy(patch: NDArray[np.generic], spectrum: Spectrum) -> float:
    """Eq. 13 over every frequency, one after the other."""
    weight = np.abs(np.fft.fft2(patch.astype(np.float64)))
    if spectrum == "power":
        weight = weight**2
    total = weight.sum() + 1e-8
    log = math.log2 if spectrum == "power" else math.log
    return -math.fsum(float(w) / total * log(w / total) for w in weight.ravel() if w > 0)


def impulse(side: int = 32) -> NDArray[np.float64]:
    patch = np.zeros((side, side))
    patch[5 % side, 9 % side] = 200.0
    return patch


def checkerboard(side: int = 32) -> NDArray[np.float64]:
    return 255.0 * (np.add.outer(np.arange(side), np.arange(side)) % 2)


@pytest.mark.parametrize("level", [0, 1, 128, 255])
@pytest.mark.parametrize("spectrum", ["magnitude", "power"])
def test_entropy_of_a_constant_patch_is_zero(level: int, spectrum: Spectrum) -> None:
    assert abs(spectral_entropy(np.full((1, 32, 32), level), spectrum)[0]) < 1e-6


@pytest.mark.parametrize(
    ("patch", "spectrum", "expected"),
    [
        (impulse(), "magnitude", 6.931472), (checkerboard(), "magnitude", 0.693147),
        (impulse(), "power", 10.0), (checkerboard(), "power", 1.0),
    ],
)  # fmt: skip
def test_entropy_has_its_known_values(patch: NDArray[np.float64], spectrum: Spectrum, expected: float) -> None:
    assert spectral_entropy(patch[None], spectrum)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("side", [2, 3, 8, 15, 28, 32])
@pytest.mark.parametrize("spectrum", ["magnitude", "power"])
def test_entropy_equals_the_full_transform(side: int, dtype: type, spectrum: Spectrum) -> None:
    batch: NDArray[Any] = np.random.default_rng(side).integers(0, 256, (6, side, side)).astype(dtype)
    expected = [naive_entropy(patch, spectrum) for patch in batch]
    np.testing.assert_allclose(spectral_entropy(batch, spectrum), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [3, 8, 32])
@pytest.mark.parametrize(("spectrum", "log"), [("magnitude", math.log), ("power", math.log2)])
def test_entropy_stays_within_its_range(side: int, spectrum: Spectrum, log: Callable[[float], float]) -> None:
    rng = np.random.default_rng(1)
    sparse = [
        rng.integers(0, 256, (side, side)) * (rng.random((side, side)) < share) for share in np.linspace(0, 1, 40)
    ]
    batch: NDArray[np.float64] = np.stack([*sparse, impulse(side), checkerboard(side)])
    entropy = spectral_entropy(batch, spectrum)
    assert (entropy >= 0).all() and (entropy <= log(side**2) + 1e-9).all()
    assert entropy.max() > 0.8 * log(side**2) and entropy.min() < 1e-6


@pytest.mark.parametrize("spectrum", ["magnitude", "power"])
@pytest.mark.parametrize("scale", [1 / 3, 3.0, 1000.0])
def test_entropy_ignores_scale_shift_and_mirroring(scale: float, spectrum: Spectrum) -> None:
    batch = np.random.default_rng(2).random((5, 32, 32)) * 255
    entropy = spectral_entropy(batch, spectrum)
    for same in (batch * scale, np.roll(batch, (3, 7), axis=(1, 2)), batch[:, ::-1], batch.swapaxes(1, 2)):
        np.testing.assert_allclose(spectral_entropy(same, spectrum), entropy, rtol=0, atol=1e-9)


def test_entropy_of_no_patches_is_empty() -> None:
    assert spectral_entropy(np.zeros((0, 32, 32), np.uint8)).shape == (0,)


@pytest.mark.parametrize("shape", [(32, 32), (2, 32, 31), (2, 32, 32, 3)])
def test_entropy_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        spectral_entropy(np.zeros(shape))


def hard_patches() -> Iterator[tuple[str, Pixels]]:
    """Kinds of patches, (40, 32, 32, 3) each: what rounding in fp32 could hurt most is bright and almost flat."""
    rng = np.random.default_rng(7)
    count, some = 40, np.arange(40)
    rows, columns = rng.integers(0, 32, (2, count))
    for level in (0, 1, 100, 254, 255):
        flat = np.full((count, 32, 32, 3), level, np.uint8)
        for amplitude in (0, 1, 60):
            noise = flat + rng.integers(-amplitude, amplitude + 1, flat.shape)
            yield f"noise of {amplitude} around {level}", np.clip(noise, 0, 255).astype(np.uint8)
        for name, place, change in (
            ("one sample", (some, rows, columns, 0), 1), ("a pixel", (some, rows, columns), 255),
            ("the first row", (some, 0), 255), ("the first column", (some, slice(None), 0), 255),
            ("stripes", (some, slice(None, None, 2)), 255),
        ):  # fmt: skip
            changed = flat.copy()
            changed[place] ^= np.uint8(change)
            yield f"{name} differs from {level}", changed
    down, across = np.mgrid[:32, :32]
    waves = rng.integers(0, 17, (2, count, 1, 1)) * 2 * np.pi / 32
    yield "waves", grey(128 + rng.random((count, 1, 1)) * 127 * np.cos(waves[0] * down + waves[1] * across))
    slopes = rng.random((2, count, 1, 1)) * 8
    yield "ramps", grey(slopes[0] * down + slopes[1] * across)


def grey(levels: NDArray[np.float64]) -> Pixels:
    return np.clip(levels, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(entropy, "compiled", None)
    elif entropy.compiled is None:
        pytest.skip("the kernels are not compiled")
    return str(request.param)


@pytest.mark.parametrize("grey", ["mean", "luma"])
@pytest.mark.parametrize("spectrum", ["magnitude", "power"])
@pytest.mark.parametrize(
    ("implementation", "side"), [("C", 32), *(("numpy", side) for side in (2, 3, 8, 15, 28, 32, 64))],
    indirect=["implementation"],
)  # fmt: skip
def test_estimates_are_within_a_tenth_of_the_margin(
    implementation: str, side: int, spectrum: Spectrum, grey: Grey
) -> None:
    for name, pixels in hard_patches():
        image = np.concatenate(list(pixels), axis=1)
        image = np.concatenate([image, image[::-1]])
        patches = channel_sum(split_patches(image, side), grey)
        exact, estimate = spectral_entropy(patches, spectrum), estimate_entropy(image, side, spectrum, grey)
        assert np.abs(estimate - exact).max() < MARGIN / 10, name
        is_flat = (patches == patches[:, :1, :1]).all(axis=(1, 2))
        np.testing.assert_array_equal(estimate == 0.0, is_flat, err_msg=name)


def test_levels_are_the_sum_of_the_channels_or_a_thousand_times_the_luma_of_bt_601() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [3, 2, 1], [0, 0, 0]], np.uint8)
    assert channel_sum(colours).tolist() == [255, 255, 255, 765, 6, 0]
    assert channel_sum(colours, "luma").tolist() == [76_245, 149_685, 29_070, 255_000, 2185, 0]


def test_kernels_of_an_older_installation_are_not_asked_for_luma(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would return the entropies of the mean."""
    image = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)
    expected = estimate_entropy(image, 32, "power", "luma")
    assert np.abs(expected - estimate_entropy(image, 32, "power")).max() > MARGIN
    monkeypatch.setattr(entropy, "compiled", SimpleNamespace(PATCH_PX=32, entropy=lambda *_: pytest.fail("asked")))
    np.testing.assert_allclose(estimate_entropy(image, 32, "power", "luma"), expected, rtol=0, atol=MARGIN / 10)


@pytest.mark.parametrize("implementation", ["C", "numpy"], indirect=True)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (96, 32 * 300), (32 * 300, 64)])
def test_estimates_come_row_by_row(height: int, width: int, implementation: str) -> None:
    levels = np.random.default_rng(8).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = (levels % (1 + np.arange(width) // 32 % 200)[:, None]).astype(np.uint8)
    exact = spectral_entropy(channel_sum(split_patches(image)))
    np.testing.assert_allclose(estimate_entropy(image, 32), exact, rtol=0, atol=MARGIN / 10)
    part = image[:, :32]  # rows that are not contiguous in memory
    np.testing.assert_allclose(estimate_entropy(part, 32), exact[:: width // 32], rtol=0, atol=MARGIN / 10)
