"""The demo's bucket: a pure function of (seed, scene), classes alike in all but the trace of up-sampling."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.dataset import synthetic

SCENES = range(60)
SEED = 5


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    return pixels.astype(np.float64) @ [0.299, 0.587, 0.114]


def grid_strength(pixels: NDArray[np.uint8]) -> float:
    """Luma levels at the three frequencies of a period-2 grid, the brute-force way: the means over its four phases."""
    height, width = (side // 32 * 32 for side in pixels.shape[:2])
    grey = luma(pixels)[:height, :width]
    a, b, c, d = (grey[i::2, j::2].mean() for i in (0, 1) for j in (0, 1))
    return float(np.sqrt((a + b - c - d) ** 2 + (a - b + c - d) ** 2 + (a - b - c + d) ** 2) / 4)


def auroc(real: NDArray[np.float64], fake: NDArray[np.float64]) -> float:
    """P(fake > real) + P(fake = real) / 2 over all pairs."""
    difference = fake[:, None] - real[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[bytes, bytes]]:
    return [synthetic.make_pair(scene, seed=SEED, size_px=128) for scene in SCENES]


@pytest.fixture(scope="module")
def pixels(pairs: list[tuple[bytes, bytes]]) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    return [(np.asarray(Image.open(io.BytesIO(r))), np.asarray(Image.open(io.BytesIO(f)))) for r, f in pairs]


@pytest.mark.parametrize("size_px", [32, 97, 128])
def test_scene_and_photograph_have_stated_shape_dtype_and_range(size_px: int) -> None:
    rng = np.random.default_rng(1)
    scene = synthetic.draw_scene(rng, size_px)
    assert scene.shape == (size_px, size_px, 3) and scene.dtype == np.float32
    assert scene.min() >= 0 and scene.max() <= 1 and scene.std() > 0.02
    photo = synthetic.camera(scene, rng)
    assert photo.shape == scene.shape and photo.dtype == np.uint8
    assert photo.max() - photo.min() > 50


def test_scene_below_one_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 px.* got 31"):
        synthetic.draw_scene(np.random.default_rng(0), 31)


@pytest.mark.parametrize("shape", [(64, 64), (65, 66), (67, 96), (4, 5)])
def test_decoder_keeps_size_whatever_the_remainder(shape: tuple[int, int]) -> None:
    photo = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    fake = synthetic.upsampling_decoder(photo, np.random.default_rng(3))
    assert fake.shape == photo.shape and fake.dtype == np.uint8


def test_transposed_convolution_equals_zero_insertion_and_sum() -> None:
    rng = np.random.default_rng(4)
    low, kernel = rng.random((5, 6, 3), np.float32), rng.random((4, 4, 3))
    scaled = 4 * kernel / kernel.sum(axis=(0, 1))
    padded = np.pad(low, ((1, 1), (1, 1), (0, 0)), mode="edge")
    expected = np.zeros((2 * 7 + 2, 2 * 8 + 2, 3))
    for row, column in np.ndindex(7, 8):
        expected[2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += padded[row, column] * scaled
    np.testing.assert_allclose(synthetic._transposed(low, kernel), expected[3:13, 3:15], rtol=1e-5)


def test_pair_is_a_pure_function_of_seed_and_scene(pairs: list[tuple[bytes, bytes]]) -> None:
    assert synthetic.make_pair(7, seed=SEED, size_px=128) == pairs[7]
    assert synthetic.make_pair(7, seed=SEED + 1, size_px=128) != pairs[7]
    assert len({image for pair in pairs for image in pair}) == 2 * len(pairs)


def test_pair_shares_size_and_content(pixels: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    for real, fake in pixels:
        assert real.shape == fake.shape and all(112 <= side <= 160 for side in real.shape[:2])
        blocks = [
            luma(image)[: s0 * 16, : s1 * 16].reshape(s0, 16, s1, 16).mean(axis=(1, 3)).ravel()
            for image in (real, fake)
            for s0, s1 in [(image.shape[0] // 16, image.shape[1] // 16)]
        ]
        assert np.corrcoef(*blocks)[0, 1] > 0.95
    assert len({real.shape for real, _ in pixels}) > 30


def test_classes_have_one_distribution_of_formats_and_trivial_statistics(
    pairs: list[tuple[bytes, bytes]], pixels: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
) -> None:
    rows = np.empty((2, len(pairs), 6))
    for scene, label in np.ndindex(len(pairs), 2):
        file, image = Image.open(io.BytesIO(pairs[scene][label])), pixels[scene][label]
        assert file.format == "JPEG" and file.mode == "RGB"
        grey = luma(image)
        around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        coarseness, subsampled = np.mean(file.quantization[0]), file.layer[0][1] == 2  # type: ignore[attr-defined]
        rows[label, scene] = (
            grey.mean(),
            grey.std(),
            np.var(around - 4 * grey[1:-1, 1:-1]),
            len(pairs[scene][label]) / grey.size,
            coarseness,
            subsampled,
        )
    # The images are fixed by SEED, hence so are these numbers; equal distributions would give 0.5 +- 0.05.
    areas = [auroc(rows[0, :, column], rows[1, :, column]) for column in range(6)]
    assert max(abs(area - 0.5) for area in areas) < 0.15, areas
    assert all(len(np.unique(rows[label, :, 4])) > 8 and 0.3 < rows[label, :, 5].mean() < 0.7 for label in (0, 1))


def test_fakes_show_the_upsampling_grid_and_reals_do_not(
    pixels: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
) -> None:
    real, fake = (np.array([grid_strength(pair[label]) for pair in pixels]) for label in (0, 1))
    assert auroc(real, fake) > 0.97
    assert np.median(fake) > 5 * np.median(real)


def test_spectrum_of_fakes_peaks_at_nyquist(pixels: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    spectra = []
    for label in (0, 1):
        patches = np.stack([luma(pair[label])[32:64, 32:64] for pair in pixels])
        spectra.append(np.log(np.abs(np.fft.fft2(patches)) + 1).mean(axis=0))
    excess = spectra[1] - spectra[0]
    assert min(excess[0, 16], excess[16, 0]) > 0.7
    # Elsewhere the energy is matched, so that the classes do not differ by blur.
    assert abs(np.median(excess)) < 0.5


def test_bucket_is_the_same_from_one_process_or_two(tmp_path: Path) -> None:
    done: list[int] = []
    assert synthetic.write_bucket(tmp_path / "a", range(3, 6), seed=SEED, size_px=64, progress=done.append) == 6
    assert synthetic.write_bucket(tmp_path / "b", range(3, 6), seed=SEED, size_px=64, processes=1) == 6
    assert done == [1, 2, 3]
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(name) for name in names] == [
        f"upsampler/{label}/scene_{scene:05d}.jpg" for label in ("0_real", "1_fake") for scene in (3, 4, 5)
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize(("scenes", "seed"), [([1, 1], 0), ([-1], 0), ([1], -1)])
def test_bucket_refuses_repeated_or_negative_ids(tmp_path: Path, scenes: list[int], seed: int) -> None:
    with pytest.raises(ValueError, match="distinct and >= 0"):
        synthetic.write_bucket(tmp_path, scenes, seed=seed)
    assert not list(tmp_path.iterdir())
