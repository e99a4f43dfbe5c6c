"""Spectral entropy, patch choice and mosaic, against the full transform written out."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nsnet import patches, recipes
from nsnet.entropy import MARGIN, channel_sum, spectral_entropy
from nsnet.errors import ConfigError
from nsnet.patches import (
    PatchConfig,
    assemble_mosaic,
    center_crop,
    select_mosaic,
    select_patches,
    split_patches,
    squash,
)
from tests.nsnet.test_entropy import naive_entropy

Pixels = NDArray[np.uint8]

# SHA-256 of select_mosaic(golden_image(), seed=7). Made with:
#   python -c "from tests.nsnet.test_patches import *; print(checksum(select_mosaic(golden_image(), seed=7)))"
GOLDEN_MOSAIC = "2d95b3129ed7f120050794eca2c4026dd6035eef8f2f728d7f4b17c41ccc8338"


def golden_image() -> Pixels:
    """400 × 520 px in integer arithmetic: flat, slow, fast and periodic areas, so that no two patches nearly tie."""
    row, column = np.mgrid[:400, :520]
    hashed = (row * 7919 + column * 104_729 + row * column * 31) % 65_521
    amplitude = 1 + (row // 32 * 17 + column // 32) * 256 // 221
    grey = (row + column) // 8 + hashed % amplitude
    return np.stack([(grey * gain // 4) % 256 for gain in (2, 3, 4)], axis=2).astype(np.uint8)


def checksum(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def naive_patches(image: Pixels, side: int) -> list[Pixels]:
    height, width = (max(side, length) for length in image.shape[:2])
    grown = np.zeros((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            grown[row, column] = image[min(row, image.shape[0] - 1), min(column, image.shape[1] - 1)]
    corners = [(r, c) for r in range(0, height - side + 1, side) for c in range(0, width - side + 1, side)]
    return [grown[r : r + side, c : c + side] for r, c in corners]


def naive_selection(image: Pixels, config: PatchConfig) -> list[Pixels]:
    cut = naive_patches(image, config.patch_px)
    weights = {"mean": [1 / 3, 1 / 3, 1 / 3], "luma": [0.299, 0.587, 0.114]}[config.grey]
    entropy = [naive_entropy(patch.astype(np.float64) @ weights, config.spectrum) for patch in cut]
    # what ties in exact arithmetic does so here only up to rounding
    ranked = sorted(range(len(cut)), key=lambda i: (-round(entropy[i], 9), i))
    slots = config.slots
    if len(ranked) < slots and config.fill == "repeat":
        return [cut[ranked[k % len(ranked)]] for k in range(slots)]
    chosen = [cut[i] for i in ranked[: (slots + 1) // 2] + ranked[max(0, len(ranked) - slots // 2) :]]
    return chosen + [np.zeros_like(cut[0])] * (slots - len(chosen))


def tiles(mosaic: Pixels, side: int) -> list[bytes]:
    across = len(mosaic) // side
    return [
        mosaic[r * side : (r + 1) * side, c * side : (c + 1) * side].tobytes()
        for r in range(across)
        for c in range(across)
    ]


@pytest.mark.parametrize("side", [8, 15, 32])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (70, 45), (33, 31), (5, 100), (1, 1), (100, 7)])
def test_patches_are_cut_row_by_row_with_cropped_and_replicated_edges(height: int, width: int, side: int) -> None:
    image = noise(height, width)
    cut, expected = split_patches(image, side), naive_patches(image, side)
    assert cut.dtype == np.uint8 and cut.shape == (len(expected), side, side, 3)
    np.testing.assert_array_equal(cut, np.stack(expected))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 40), "u1"), ((40, 40, 4), "u1"), ((40, 40, 3), "f8"), ((0, 40, 3), "u1")]
)
def test_array_that_is_no_image_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="uint8"):
        split_patches(np.zeros(shape, dtype))


CONFIGS = [
    PatchConfig(),
    PatchConfig(spectrum="power"),
    PatchConfig(patch_px=16, mosaic_px=64),
    PatchConfig(patch_px=15, mosaic_px=45),
    recipes.DGS_NET.detector.patches,
    PatchConfig(patch_px=15, mosaic_px=45, grey="luma", fill="black"),
]
IDS = ["paper", "power", "even slots", "odd side", "dgs-net", "luma at an odd side"]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (260, 300), (400, 520), (90, 70), (20, 300), (1, 1)])
def test_selection_equals_the_naive_one(height: int, width: int, config: PatchConfig) -> None:
    row, column = np.mgrid[:height, :width]
    amplitude = 1 + (row // 15 + column // 15 * 3) % 250
    image = (noise(height, width) % amplitude[..., None]).astype(np.uint8)
    selected = select_patches(image, config)
    assert selected.shape == (config.slots, config.patch_px, config.patch_px, 3)
    np.testing.assert_array_equal(selected, np.stack(naive_selection(image, config)))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_selection_does_not_depend_on_the_errors_of_estimates(
    config: PatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many patches within the margin of each other: with any errors up to it, exact entropies decide."""
    rng = np.random.default_rng(9)
    image = noise(480, 480)
    image[:, 240:] %= 4  # 256 noisy patches, and as many of low entropy
    expected = np.stack(naive_selection(image, config))
    exact = spectral_entropy(channel_sum(split_patches(image, config.patch_px), config.grey), config.spectrum)
    assert np.diff(np.sort(exact)[-30:]).min() < MARGIN, "the image is too easy"
    for sign in (1, -1, 0):
        errors = (
            np.where(rng.random(len(exact)) < 0.5, 1, -1) if sign == 0 else sign * np.sign(exact - np.median(exact))
        )
        monkeypatch.setattr(patches, "estimate_entropy", lambda *_, errors=errors: exact + errors * MARGIN)
        np.testing.assert_array_equal(select_patches(image, config), expected)


def test_selection_computes_few_exact_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(
        patches, "spectral_entropy", lambda batch, kind: computed.append(len(batch)) or spectral_entropy(batch, kind)
    )
    image = noise(640, 640)
    image[320:] = 255  # 200 patches of one level
    select_patches(image)
    assert 25 <= sum(computed) < 50


def test_selection_of_50_megapixels_holds_little_more_than_the_image() -> None:
    """Costs 1 s. Also the worst case: every patch ties, so that none is left out by its estimate."""
    for image in (noise(5000, 1000).repeat(10, axis=1), np.tile(noise(32, 32), (312, 156, 1))):
        tracemalloc.start()
        select_patches(image)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 * 2**20


def ladder(count: int) -> Pixels:
    """`count` patches in a row with noise of falling amplitude: patch i is a flat level i plus its noise."""
    rng = np.random.default_rng(4)
    row = []
    for i in range(count):
        amplitude = (count - i) * 240 // count
        row.append(i % 16 + (rng.random((32, 32, 1)) * (amplitude + 1)).astype(np.uint8).repeat(3, axis=2))
    return np.concatenate(row, axis=1).astype(np.uint8)


def test_mosaic_takes_25_highest_and_24_lowest() -> None:
    image = ladder(120)
    grey = split_patches(image)[..., 0]
    order = np.argsort(-spectral_entropy(grey))
    chosen = [list(map(bytes, split_patches(image))).index(bytes(patch)) for patch in select_patches(image)]
    assert chosen[:25] == order[:25].tolist()
    assert chosen[25:] == order[-24:].tolist()
    assert len(set(chosen)) == 49


def test_ties_are_broken_by_position() -> None:
    """60 patches of one entropy (one pattern at 60 scales) keep their order, though rounding sets them apart."""
    pattern = (np.add.outer(np.arange(32), np.arange(32)) % 2).astype(np.uint8)
    image = np.concatenate([pattern[..., None].repeat(3, axis=2) * np.uint8(i + 1) for i in range(60)], axis=1)
    levels = select_patches(image)[:, 0, 1, 0].tolist()
    assert levels == [*range(1, 26), *range(37, 61)]


def test_flat_patches_tie_whatever_their_level() -> None:
    levels = np.random.default_rng(5).permutation(np.arange(60)).astype(np.uint8)
    image = np.tile(levels.repeat(32)[None, :, None], (32, 1, 3))
    assert select_patches(image)[:, 0, 0, 0].tolist() == [*levels[:25], *levels[-24:]]


@pytest.mark.parametrize("count", [100, 1000])
def test_many_ties_of_two_kinds_keep_their_order(count: int) -> None:
    """Flat patches among checkerboards, each marked by its level: an unstable sort would mix them."""
    rng = np.random.default_rng(6)
    flat = rng.random(count) < 0.5
    pattern = (np.add.outer(np.arange(32), np.arange(32)) % 2).astype(np.uint8)
    levels = rng.integers(1, 256, count).astype(np.uint8)
    row = [np.full((32, 32), level) if even else pattern * level for even, level in zip(flat, levels, strict=True)]
    image = np.repeat(np.concatenate(row, axis=1)[..., None], 3, axis=2)
    expected = [*levels[~flat][:25], *levels[flat][-24:]]
    assert select_patches(image)[:, 0, 1, 0].tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 7, 48])
def test_few_patches_repeat_cyclically_in_rank_order(count: int) -> None:
    image = ladder(count)
    cut = split_patches(image)
    ranked = cut[np.argsort(-spectral_entropy(cut[..., 0]), kind="stable")]
    np.testing.assert_array_equal(select_patches(image), np.stack([ranked[k % count] for k in range(49)]))


@pytest.mark.parametrize("count", [1, 7, 24, 25, 30, 48, 49])
def test_few_patches_are_twice_there_and_the_rest_is_black_if_it_is_filled(count: int) -> None:
    """As in DGS-Net: up to 25 of highest and up to 24 of lowest entropy, whether or not they are the same."""
    image = np.maximum(ladder(count), 1)
    config = PatchConfig(fill="black")
    selected = select_patches(image, config)
    cut = split_patches(image)
    ranked = cut[np.argsort(-spectral_entropy(cut[..., 0]), kind="stable")]
    expected = [*ranked[:25], *ranked[-24:]]
    black = 49 - 2 * count if count < 25 else 0
    assert len(expected) == 49 - black
    np.testing.assert_array_equal(selected[: len(expected)], np.stack(expected))
    assert selected.shape == (49, 32, 32, 3) and not selected[len(expected) :].any()
    mosaic = assemble_mosaic(selected, config.slot_seed(3))
    assert sum(not any(tile) for tile in tiles(mosaic, 32)) == black


def test_grey_decides_which_patches_are_chosen() -> None:
    """Noise in blue alone is dark to the eye: its luma has less entropy than weaker noise in green, its mean more."""
    rng = np.random.default_rng(8)
    image = np.full((32, 32 * 60, 3), 128, np.uint8)
    image[:, : 32 * 30, 2] = rng.integers(68, 189, (32, 32 * 30))
    image[:, 32 * 30 :, 1] = rng.integers(98, 159, (32, 32 * 30))
    for grey, blue in (("mean", 25), ("luma", 0)):
        highest = select_patches(image, PatchConfig(grey=grey))[:25]  # type: ignore[arg-type]
        assert sum(int(np.ptp(patch[..., 2]) > 0) for patch in highest) == blue, grey


def test_49_patches_are_all_chosen_once() -> None:
    image = ladder(49)
    assert sorted(map(bytes, select_patches(image))) == sorted(map(bytes, split_patches(image)))


@pytest.mark.parametrize(
    ("height", "width"), [(255, 255), (225, 260), (33, 1000), (20, 20), (5, 700), (700, 5), (1, 1)]
)
def test_selection_never_takes_padding(height: int, width: int) -> None:
    image = np.maximum(noise(height, width), 1)
    assert select_patches(image).min() > 0
    short_side = np.maximum(noise(height, width) // 2, 1)
    assert set(np.unique(select_patches(short_side))) <= set(np.unique(short_side))


def test_pixels_beyond_the_last_whole_patch_change_nothing() -> None:
    image = noise(255, 287)
    other = image.copy()
    other[224:], other[:, 256:] = 0, 255
    np.testing.assert_array_equal(select_mosaic(image), select_mosaic(other))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_mosaic_is_a_permutation_of_the_selected_patches(config: PatchConfig) -> None:
    image = noise(300, 333)
    mosaic = select_mosaic(image, seed=3, config=config)
    assert mosaic.shape == (config.mosaic_px, config.mosaic_px, 3) and mosaic.dtype == np.uint8
    selected = select_patches(image, config)
    assert sorted(tiles(mosaic, config.patch_px)) == sorted(map(bytes, selected))
    np.testing.assert_array_equal(mosaic, assemble_mosaic(selected, 3))


def test_mosaic_puts_the_permuted_patches_row_by_row() -> None:
    selected = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    mosaic = assemble_mosaic(selected, seed=5)
    order = np.random.Generator(np.random.PCG64(5)).permutation(9)
    np.testing.assert_array_equal(mosaic[::4, ::4, 0].ravel(), order)


def test_shuffle_is_a_pure_function_of_the_seed() -> None:
    image = noise(300, 300)
    np.random.seed(0)
    first = select_mosaic(image, seed=11)
    np.random.seed(1)
    np.testing.assert_array_equal(select_mosaic(image, seed=11), first)
    shuffled = {checksum(select_mosaic(image, seed=seed)) for seed in range(20)}
    assert len(shuffled) == 20
    np.testing.assert_array_equal(select_mosaic(image), select_mosaic(image, seed=0))


def test_equal_pixels_give_the_same_mosaic() -> None:
    image = noise(300, 260)
    strided = np.zeros((600, 520, 3), np.uint8)
    strided[::2, ::2] = image
    expected = select_mosaic(image)
    for equal in (image.copy(), np.asfortranarray(image), strided[::2, ::2]):
        np.testing.assert_array_equal(select_mosaic(equal), expected)


def test_slot_order_depends_on_the_seed_and_not_on_the_pixels() -> None:
    one, other = (np.arange(49, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 32, 32, 3), np.uint8) + shift
                  for shift in (np.uint8(0), np.uint8(100)))  # fmt: skip
    np.testing.assert_array_equal(assemble_mosaic(other, 4), assemble_mosaic(one, 4) + np.uint8(100))


def test_selection_leaves_its_input_alone() -> None:
    image = noise(100, 100)
    before = image.copy()
    select_mosaic(image)
    np.testing.assert_array_equal(image, before)


def test_mosaic_has_its_golden_checksum() -> None:
    image = golden_image()
    entropy = np.sort(spectral_entropy(split_patches(image).astype(np.float64).mean(axis=3)))
    assert np.diff(entropy).min() > 1e-7, "near ties would make the checksum depend on the machine"
    assert checksum(select_mosaic(image, seed=7)) == GOLDEN_MOSAIC


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_px": 0}, {"patch_px": 1}, {"patch_px": -32}, {"patch_px": 30}, {"patch_px": 256}, {"mosaic_px": 0},
        {"mosaic_px": 225}, {"mosaic_px": -224}, {"spectrum": "log"}, {"selection": "corner"}, {"grey": "Luma"},
        {"fill": "white"},
    ],
)  # fmt: skip
def test_impossible_geometry_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings.values()))}"):
        PatchConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("patch_px", "mosaic_px", "slots"), [(32, 224, 49), (16, 224, 196), (224, 224, 1), (14, 28, 4)]
)
def test_slots_are_the_square_of_patches_across(patch_px: int, mosaic_px: int, slots: int) -> None:
    assert PatchConfig(patch_px=patch_px, mosaic_px=mosaic_px).slots == slots


# --- the middle of the image


def torchvision_crop(image: Pixels, side: int) -> Pixels:
    from torchvision.transforms import CenterCrop  # seconds to import

    return np.asarray(CenterCrop(side)(Image.fromarray(image)))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
@example(31, 31, 32)
@example(32, 32, 32)
@example(33, 33, 32)
@example(35, 37, 32)
@example(34, 36, 31)
@example(31, 45, 32)
@example(60, 29, 32)
@example(1, 1, 40)
@example(30, 31, 15)
@settings(max_examples=150, deadline=None)
def test_center_crop_equals_torchvisions(height: int, width: int, side: int) -> None:
    image = np.maximum(noise(height, width), 1)
    cropped = center_crop(image, side)
    assert cropped.shape == (side, side, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, torchvision_crop(image, side))


@pytest.mark.parametrize(("height", "width"), [(223, 224), (224, 224), (255, 300), (200, 401), (500, 97)])
def test_center_crop_at_full_size_equals_torchvisions(height: int, width: int) -> None:
    image = noise(height, width)
    np.testing.assert_array_equal(center_crop(image, 224), torchvision_crop(image, 224))


CENTER = [
    PatchConfig(selection="center"),
    PatchConfig(patch_px=16, mosaic_px=64, selection="center"),
    PatchConfig(patch_px=15, mosaic_px=45, selection="center"),
    PatchConfig(patch_px=64, mosaic_px=64, selection="center", spectrum="power"),
]


@pytest.mark.parametrize("config", CENTER, ids=["paper", "even slots", "odd side", "one patch"])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 261), (40, 300), (30, 31), (1, 1)])
def test_mosaic_of_the_center_is_the_center_crop_whatever_the_seed(
    height: int, width: int, config: PatchConfig
) -> None:
    image = noise(height, width)
    before = image.copy()
    expected = torchvision_crop(image, config.mosaic_px)
    selected = select_patches(image, config)
    assert selected.shape == (config.slots, config.patch_px, config.patch_px, 3)
    for seed in (0, 1, 12345):
        np.testing.assert_array_equal(select_mosaic(image, seed, config), expected)
        np.testing.assert_array_equal(assemble_mosaic(selected, config.slot_seed(seed)), expected)
    np.testing.assert_array_equal(image, before)


# --- the whole image, squashed


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (223, 225), (1, 1), (31, 500), (500, 31), (900, 640), (100, 90)]
)
@pytest.mark.parametrize(("side", "patch_px"), [(224, 32), (64, 16), (45, 15)])
def test_squashed_image_is_pillows_and_torchvisions(height: int, width: int, side: int, patch_px: int) -> None:
    from torchvision.transforms import Resize  # seconds to import

    image = noise(height, width)
    before = image.copy()
    picture = Image.fromarray(image)
    expected = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(squash(image, side), expected)
    np.testing.assert_array_equal(np.asarray(Resize((side, side))(picture)), expected)
    config = PatchConfig(patch_px=patch_px, mosaic_px=side, selection="resize")
    for seed in (0, 12345):
        np.testing.assert_array_equal(select_mosaic(image, seed, config), expected)
    np.testing.assert_array_equal(squash(np.asfortranarray(image), side), expected)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("seed", [0, 1, 2**60])
def test_patches_of_highest_entropy_are_shuffled_by_the_seed_and_the_center_is_not(seed: int) -> None:
    assert PatchConfig().slot_seed(seed) == seed
    assert PatchConfig(selection="center").slot_seed(seed) is None
    assert PatchConfig(selection="resize").slot_seed(seed) is None


def test_patches_without_a_seed_stay_as_they_come() -> None:
    numbered = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    assert assemble_mosaic(numbered, None)[::4, ::4, 0].ravel().tolist() == list(range(9))
    assert assemble_mosaic(numbered, 0)[::4, ::4, 0].ravel().tolist() != list(range(9))
