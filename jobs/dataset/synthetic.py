"""A labelled bucket of drawn images for the demo and the tests: no download, no licence, the same bytes every time.

A scene is drawn in linear light, photographed by a simulated camera (`camera`, label real = 0), and the photograph is
passed through a small encoder and up-sampling decoder (`upsampling_decoder`, label fake = 1), after the artefact
simulation of AutoGAN (Zhang, Karaman and Chang 2019, arXiv:1907.06515). Both classes thus share content, size and JPEG
settings; what differs is the trace of up-sampling. These fakes stand in for no present-day generator.

Dimension legend: H, W = height, width in px; 3 = red, green, blue; N = corners of a polygon as (x, y) in px.
"""

import functools
import io
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SUPERSAMPLE = 3
"""Sub-pixels per pixel and axis when the coverage of a shape is counted."""
GENERATOR = "upsampler"
"""Folder of the bucket, named as the other buckets are: for the model that made the fakes."""
CLASS_FOLDERS = ("0_real", "1_fake")
JPEG_QUALITY = (85, 98)
"""Lowest and highest JPEG quality, both included; drawn for each image on its own, alike for both classes."""

LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)
BLUR = (0.25, 0.5, 0.25)
BILINEAR = (0.25, 0.75, 0.75, 0.25)
"""Taps of x2 linear interpolation as a stride-2 transposed convolution; each output phase sums to one."""
FEATURE_BIAS = np.float32(0.35)
"""Feature maps of a decoder are not zero where the image is black; its grid shows in shadows too."""
# The family's trained 4x4 kernel = bilinear + these offsets. Their sums over the four output phases are uneven: the
# checkerboard of transposed convolution (Odena, Dumoulin and Olah 2016, distill.pub/2016/deconv-checkerboard).
# At 0.002 the grid is about 2 of 255 levels strong, enough to survive JPEG at quality 85.
FAMILY_OFFSETS = 0.002 * np.array([[3, -1, 1, -1], [-1, 0, -1, -1], [1, 0, 2, 0], [0, -2, 1, -1]], dtype=np.float32)


def draw_scene(rng: np.random.Generator, size_px: int) -> Floats:
    """Draw one scene: sky, ridges, ground, then houses, trees, balls and striped boards from far to near, then lamps.

    rng: consumed; the same state gives the same scene. size_px: side of the square, >= 32.
    Returns float32[size_px, size_px, 3], linear light in [0, 1], edges anti-aliased by area coverage.
    """
    if size_px < 32:
        raise ValueError(f"size_px must be at least 32 px, one patch of the detector, got {size_px}")
    fine, coarse = _fractal(rng, size_px, 0.9), _fractal(rng, size_px, 1.7)
    horizon = float(rng.choice([0.0, rng.uniform(0.25, 0.7)], p=[0.2, 0.8])) * size_px
    scene = _backdrop(rng, size_px, horizon, fine, coarse)
    drawers = (_house, _tree, _ball, _board)
    favourite = int(rng.integers(len(drawers)))
    for foot in np.sort(rng.uniform(max(horizon, 0.15 * size_px), 1.05 * size_px, rng.integers(4, 12))):
        # Nearer things stand lower in the image and are larger.
        height = size_px * rng.uniform(0.1, 0.25) * (0.4 + 1.6 * (foot - horizon) / size_px)
        texture = np.roll(fine, rng.integers(0, size_px, 2), (0, 1))
        pick = favourite if rng.random() < 0.5 else int(rng.integers(len(drawers)))
        drawers[pick](scene, rng, float(rng.uniform(0, size_px)), float(foot), float(height), texture)
    y, x = np.mgrid[:size_px, :size_px].astype(np.float32)
    for _ in range(rng.integers(0, 4)):
        distance_px = np.hypot(x - rng.uniform(0, size_px), y - rng.uniform(0, size_px))
        glow = rng.uniform(0.3, 1.0) / (1 + (distance_px / (size_px * rng.uniform(0.01, 0.03))) ** 2)
        scene += glow[..., None] * _colour(rng, 0.9, 0.3)
    return np.clip(scene, 0, 1).astype(np.float32)


def _backdrop(rng: np.random.Generator, size_px: int, horizon: float, fine: Floats, coarse: Floats) -> Floats:
    """Sky with clouds above the horizon (a row in px), up to three hazy ridges, textured ground below."""
    row = np.arange(size_px, dtype=np.float32)[:, None, None]
    tint = np.array([0.8, 0.95, 1.2], np.float32)
    zenith, haze = _colour(rng, rng.uniform(0.1, 0.5), 0.4) * tint, _colour(rng, rng.uniform(0.4, 0.9), 0.2)
    scene = np.repeat(zenith + (haze - zenith) * np.clip(row / max(horizon, 1), 0, 1), size_px, axis=1)
    cloud = np.clip(coarse * rng.uniform(0.2, 0.6) - rng.uniform(-0.2, 0.5), 0, 0.9)[..., None]
    scene += cloud * (rng.uniform(0.6, 0.95) - scene)
    column = np.linspace(-2, size_px + 1, 48)
    for depth in range(rng.integers(0, 4) if horizon else 0):
        steps = np.cumsum(rng.normal(0, 0.012 * size_px, 48))
        ridge = np.column_stack([column, horizon - (0.14 - 0.04 * depth) * size_px - steps + steps.mean()])
        outline = np.vstack([ridge, [[size_px + 1, size_px], [-2, size_px]]])
        colour = haze + (_colour(rng, 0.15, 0.4) - haze) * (0.3 + 0.2 * depth)
        _paint(scene, [outline], colour * (1 + 0.12 * fine[..., None]))
    near, far = _colour(rng, rng.uniform(0.08, 0.5), 0.35) / tint, _colour(rng, rng.uniform(0.15, 0.5), 0.3)
    fall = np.clip((row - horizon) / (size_px - horizon), 0, 1)
    rough = rng.uniform(0.05, 0.3) * fine + rng.uniform(0, 0.25) * coarse
    ground = np.array([[-2, horizon], [size_px + 1, horizon], [size_px + 1, size_px + 1], [-2, size_px + 1]])
    _paint(scene, [ground], (far + (near - far) * fall) * np.clip(1 + rough, 0.2, 2)[..., None])
    return scene


def _house(scene: Floats, rng: np.random.Generator, x: float, foot: float, height: float, texture: Floats) -> None:
    """A front with rows of windows, a side in shadow and, on some, a roof."""
    width, wall = height * rng.uniform(0.5, 1.3), _colour(rng, rng.uniform(0.15, 0.7), 0.3)
    height *= rng.uniform(0.8, 1.8)
    plaster = (1 + rng.uniform(0.02, 0.15) * texture)[..., None]
    _paint(scene, [_box(x + width, foot - height, 0.3 * width, height)], 0.45 * wall * plaster)
    _paint(scene, [_box(x, foot - height, width, height)], wall * plaster)
    if rng.random() < 0.5:
        top, eaves = foot - height - 0.4 * width, foot - height
        roof = np.array([[x - 0.06 * width, eaves], [x + 0.5 * width, top], [x + 1.36 * width, eaves]])
        _paint(scene, [roof], _colour(rng, 0.2, 0.5) * (1 + 0.2 * texture)[..., None])
    columns, rows = rng.integers(2, 6), rng.integers(2, 7)
    cell_w, cell_h = width / columns, height / rows
    cells = [(x + (c + 0.25) * cell_w, foot - (r + 0.8) * cell_h) for r in range(rows) for c in range(columns)]
    windows = [_box(left, top, 0.5 * cell_w, 0.55 * cell_h) for left, top in cells]
    lit = rng.random(len(windows)) < rng.uniform(0, 0.6)
    for state, colour in ((False, _colour(rng, 0.06, 0.4)), (True, _colour(rng, 0.8, 0.3))):
        _paint(scene, [window for window, on in zip(windows, lit, strict=True) if on == state], colour)


def _tree(scene: Floats, rng: np.random.Generator, x: float, foot: float, height: float, texture: Floats) -> None:
    """A trunk under two or three ragged crowns, lit from above."""
    _paint(scene, [_box(x - 0.04 * height, foot - height, 0.08 * height, height)], _colour(rng, 0.08, 0.4))
    leaf = _colour(rng, rng.uniform(0.08, 0.3), 0.4) * np.array([0.8, 1.2, 0.6], np.float32)
    for lift, spread in ((0.7, 0.42), (1.0, 0.34), (1.3, 0.22))[: rng.integers(2, 4)]:
        crown = _disc(x + rng.normal(0, 0.08 * height), foot - lift * height, spread * height * rng.uniform(0.8, 1.2))
        centre = crown.mean(axis=0)
        crown = centre + (crown - centre) * rng.uniform(0.75, 1.2, (len(crown), 1))
        _paint(scene, [crown], leaf * (0.5 + 0.5 * lift) * np.clip(1 + 0.45 * texture, 0.2, 2.5)[..., None])


def _ball(scene: Floats, rng: np.random.Generator, x: float, foot: float, height: float, texture: Floats) -> None:
    """A ball with diffuse shading and a highlight above its cast shadow."""
    radius, shadow = 0.5 * height, _disc(0.0, 0.0, 0.5 * height)
    _paint(scene, [shadow * [1.2, 0.3] + [x + 0.4 * radius, foot]], np.full(3, 0.03, np.float32), opacity=0.6)
    y_grid, x_grid = np.ogrid[: scene.shape[0], : scene.shape[1]]
    nx, ny = (x_grid - x) / radius, (y_grid - (foot - radius)) / radius
    nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0, 1))
    light = np.clip(-0.45 * nx - 0.55 * ny + 0.7 * nz, 0, 1).astype(np.float32)
    skin = _colour(rng, rng.uniform(0.2, 0.7), 0.6) * (1 + rng.uniform(0, 0.25) * texture)[..., None]
    _paint(scene, [_disc(x, foot - radius, radius)], skin * (0.15 + light[..., None]) + 0.6 * light[..., None] ** 30)


def _board(scene: Floats, rng: np.random.Generator, x: float, foot: float, height: float, texture: Floats) -> None:
    """A turned board with stripes across it."""
    angle, across = rng.uniform(0, np.pi), np.linspace(-0.5, 0.5, 2 * int(rng.integers(2, 8)) + 1)
    turn = height * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre, grain = np.array([x, foot - 0.5 * height]), (1 + 0.08 * texture)[..., None]
    stripes = [_box(left, -0.4, across[1] - across[0], 0.8) @ turn + centre for left in across[:-1:2]]
    _paint(scene, [_box(-0.5, -0.4, 1.0, 0.8) @ turn + centre], _colour(rng, rng.uniform(0.1, 0.8), 0.5) * grain)
    _paint(scene, stripes, _colour(rng, rng.uniform(0.1, 0.8), 0.5) * grain)


def _paint(scene: Floats, polygons: Sequence[NDArray[np.float64]], colour: Floats, opacity: float = 1.0) -> None:
    """Blend colour[3] or [H, W, 3] over the area that float64[N, 2] polygons cover; in place."""
    size_px = scene.shape[0]
    if not polygons:
        return
    corners = np.concatenate(polygons)
    (x0, y0) = np.clip(np.floor(corners.min(axis=0)), 0, size_px).astype(int)
    (x1, y1) = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, size_px).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    stencil = Image.new("L", (int(x1 - x0) * SUPERSAMPLE, int(y1 - y0) * SUPERSAMPLE))
    pen = ImageDraw.Draw(stencil)
    for polygon in polygons:
        pen.polygon(((polygon - [x0, y0]) * SUPERSAMPLE).ravel().tolist(), fill=255)
    alpha = np.asarray(stencil.reduce(SUPERSAMPLE), dtype=np.float32)[..., None] * (opacity / 255)
    inside = scene[y0:y1, x0:x1]
    inside += alpha * ((colour if colour.ndim == 1 else colour[y0:y1, x0:x1]) - inside)


def _box(left: float, top: float, width: float, height: float) -> NDArray[np.float64]:
    return np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]], np.float64)


def _disc(x: float, y: float, radius: float) -> NDArray[np.float64]:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.column_stack([x + radius * np.cos(turn), y + radius * np.sin(turn)])


def _colour(rng: np.random.Generator, brightness: float, saturation: float) -> Floats:
    return (brightness * (1 + saturation * rng.uniform(-1, 1, 3))).astype(np.float32)


def _fractal(rng: np.random.Generator, size_px: int, slope: float) -> Floats:
    """Noise with amplitude 1/f**slope: float32[size_px, size_px], mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px))
    frequency[0, 0] = np.inf
    phases = rng.standard_normal((2, *frequency.shape), dtype=np.float32)
    field = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency**slope, s=(size_px, size_px))
    unit: Floats = (field / field.std()).astype(np.float32)
    return unit


def camera(scene: Floats, rng: np.random.Generator) -> Pixels:
    """Photograph a scene: lens blur, sensor noise, Bayer mosaic, bilinear demosaic, white balance, tone, sharpening.

    scene: float32[H, W, 3], linear light in [0, 1]; H, W >= 2. rng: consumed.
    Returns uint8[H, W, 3], gamma-encoded.
    """
    side = rng.uniform(0.04, 0.16)
    exposure = rng.uniform(0.75, 0.98) / max(float(np.percentile(scene, 98)), 0.05)
    light = exposure * _filter(scene, (side, 1 - 2 * side, side))
    sensitivity = np.array([rng.uniform(0.5, 0.7), 1, rng.uniform(0.55, 0.8)], np.float32)
    mosaic, mask = light * sensitivity, np.zeros(scene.shape, np.float32)
    gain, read = rng.uniform(2e-4, 1.5e-3), rng.uniform(1e-3, 4e-3)
    noise = rng.standard_normal(scene.shape[:2], dtype=np.float32)[..., None]
    mosaic = np.clip(mosaic + noise * np.sqrt(gain * mosaic + read**2), 0, 1)
    row, column = rng.integers(0, 2, 2)
    for channel, (dy, dx) in ((0, (0, 0)), (1, (0, 1)), (1, (1, 0)), (2, (1, 1))):
        mask[(row + dy) % 2 :: 2, (column + dx) % 2 :: 2, channel] = 1
    # Normalised convolution: the mean of the known neighbours, also at the border; known pixels keep their value.
    guess = _filter(mosaic * mask, BLUR) / _filter(mask, BLUR)
    balance = rng.uniform(0.94, 1.06, 3).astype(np.float32) / sensitivity
    linear = np.clip(np.where(mask > 0, mosaic, guess) * balance, 0, 1)
    tone = linear ** (1 / rng.uniform(2.0, 2.4))
    tone += rng.uniform(0, 0.5) * tone * (1 - tone) * (tone - 0.5)
    return _quantise(tone + rng.uniform(0.2, 0.8) * (tone - _filter(tone, BLUR)))


def upsampling_decoder(image_uint8: Pixels, rng: np.random.Generator) -> Pixels:
    """Rebuild a photograph as a generator would: encode at 1/2 or 1/4 size, up-sample with a decoder, add fine detail.

    Each stage is a stride-2 transposed convolution, the first of two with a skip connection; the weights are one
    family's, jittered for each call. The detail is noise that goes through the decoder as the image does, as strong
    as it takes to give the fake the photograph's Laplacian energy: no class is the blurred one.
    image_uint8: uint8[H, W, 3], H, W >= 4. rng: consumed.
    Returns uint8[H, W, 3]; the phase of the up-sampling grid is fixed at the top-left corner.
    """
    height, width = image_uint8.shape[:2]
    padded = np.pad(image_uint8, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="symmetric")
    photo = padded.astype(np.float32) / np.float32(255)
    low = _halve(photo)
    kernel = np.outer(BILINEAR, BILINEAR)[..., None] + FAMILY_OFFSETS[..., None] + rng.normal(0, 0.001, (4, 4, 3))
    if rng.random() < 0.5:
        coarse = _transposed(_halve(low) + FEATURE_BIAS, kernel) - FEATURE_BIAS
        low += np.float32(rng.uniform(0.4, 0.7)) * (coarse - low)
    low += np.float32(rng.uniform(0.5, 0.9)) * (low - _filter(low, BLUR))
    mix = np.eye(3) + rng.normal(0, 0.02, (3, 3))
    low = low @ (mix / mix.sum(axis=1, keepdims=True)).T.astype(np.float32)
    plain = _transposed(low + FEATURE_BIAS, kernel) - FEATURE_BIAS
    wanted = _halve(_laplacian(photo) ** 2)
    # Detail is strongest where the photograph had it; the cap keeps hard edges from turning into heaps of noise.
    local = _filter(_filter(np.minimum(wanted, 4 * wanted.mean()), BLUR), BLUR)
    grain = rng.standard_normal((*low.shape[:2], 1), np.float32) + 0.4 * rng.standard_normal(low.shape, np.float32)
    detail = _transposed(grain * np.sqrt(local), kernel)
    missing = max(float(wanted.mean() - np.mean(_laplacian(plain) ** 2)), 0.0)
    return _quantise(plain + np.sqrt(missing / np.mean(_laplacian(detail) ** 2 + 1e-12)) * detail)[:height, :width]


def _transposed(low: Floats, kernel: NDArray[np.float64]) -> Floats:
    """Stride-2 transposed convolution, channel by channel: [H, W, 3] and a [4, 4, 3] kernel give [2H, 2W, 3]."""
    kernel = 4 * kernel / kernel.sum(axis=(0, 1))
    height, width = low.shape[:2]
    padded, high = np.pad(low, ((1, 1), (1, 1), (0, 0)), mode="edge"), np.zeros((2 * height, 2 * width, 3), np.float32)
    for i, j in np.ndindex(4, 4):
        # Tap i carries input row r to output row 2r + i - 1; output phase (i + 1) % 2 starts at row first - 1.
        first, left = 2 - (i + 1) // 2, 2 - (j + 1) // 2
        source = padded[first : first + height, left : left + width]
        high[(i + 1) % 2 :: 2, (j + 1) % 2 :: 2] += kernel[i, j].astype(np.float32) * source
    return high


def _halve(image: Floats) -> Floats:
    """Anti-aliased x1/2: [2H, 2W, C] to [H, W, C], the mean of 2x2 px."""
    total: Floats = image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]
    return total / np.float32(4)


def _laplacian(image: Floats) -> Floats:
    """Of the luma: [H, W, 3] to [H, W, 1]; the border repeats."""
    grey = np.pad((image @ LUMA)[..., 0], 1, mode="edge")
    around: Floats = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return around[..., None]


def _filter(image: Floats, taps: Sequence[float] | NDArray[np.float64]) -> Floats:
    """The three taps along both axes of [H, W, C]; the border repeats."""
    before, at, after = np.asarray(taps, np.float32)
    rows = np.pad(image, ((1, 1), (0, 0), (0, 0)), mode="edge")
    rows = before * rows[:-2] + at * rows[1:-1] + after * rows[2:]
    columns = np.pad(rows, ((0, 0), (1, 1), (0, 0)), mode="edge")
    blended: Floats = before * columns[:, :-2] + at * columns[:, 1:-1] + after * columns[:, 2:]
    return blended


def _quantise(image: Floats) -> Pixels:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def make_pair(scene: int, *, seed: int, size_px: int = 256) -> tuple[bytes, bytes]:
    """The real and the fake image of one scene as JPEG bytes, a pure function of the arguments.

    scene, seed: >= 0. Both images are H x W px, each side drawn from 7/8 to 10/8 of size_px.
    """
    rng = np.random.default_rng([seed, scene])
    height, width = (int(side) for side in rng.integers(size_px * 7 // 8, size_px * 10 // 8 + 1, 2))
    photo = camera(draw_scene(rng, max(height, width))[:height, :width], rng)
    return _jpeg(photo, rng), _jpeg(upsampling_decoder(photo, rng), rng)


def _jpeg(pixels: Pixels, rng: np.random.Generator) -> bytes:
    """Quality and chroma sub-sampling (4:4:4 or 4:2:0) are drawn per image, alike for both classes."""
    buffer = io.BytesIO()
    quality, subsampling = int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)), int(rng.choice([0, 2]))
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def write_bucket(
    folder: Path,
    scenes: Iterable[int],
    *,
    seed: int,
    size_px: int = 256,
    processes: int = 2,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write <folder>/upsampler/{0_real,1_fake}/scene_00012.jpg for each scene id; returns the number of files written.

    scenes: distinct ids >= 0. Split by id, never by image: the two images of one id share their content.
    size_px: nominal side, see `make_pair`. processes: 1 = in this process, else a pool of spawned ones.
    progress: called with the number of scenes done so far. A file appears whole or not at all; an old one is replaced.
    """
    ids = [int(scene) for scene in scenes]
    distinct, lowest = len(set(ids)), min(ids, default=0)
    if distinct < len(ids) or lowest < 0 or seed < 0 or processes < 1:
        raise ValueError(
            "scene ids must be distinct and >= 0, seed >= 0 and processes >= 1, "
            f"got {len(ids)} ids of which {distinct} distinct, {lowest=}, {seed=}, {processes=}"
        )
    for name in CLASS_FOLDERS:
        (folder / GENERATOR / name).mkdir(parents=True, exist_ok=True)
    work = functools.partial(_write_pair, folder=folder / GENERATOR, seed=seed, size_px=size_px)
    # The pool starts its processes at the first task, so that with one process none is started.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(map(work, ids) if processes == 1 else pool.map(work, ids, chunksize=4), start=1):
            if progress is not None:
                progress(done)
    return len(CLASS_FOLDERS) * len(ids)


def _write_pair(scene: int, *, folder: Path, seed: int, size_px: int) -> None:
    for name, data in zip(CLASS_FOLDERS, make_pair(scene, seed=seed, size_px=size_px), strict=True):
        path = folder / name / f"scene_{scene:05d}.jpg"
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        partial.write_bytes(data)
        os.replace(partial, path)
