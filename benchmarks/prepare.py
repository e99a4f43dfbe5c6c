"""Compares choosing patches, decoding and thumbnails with the plain way of each, in one thread.

    python -m benchmarks.prepare --work /tmp/prepare

Rivals: a loop over patches with numpy's FFT (selection); Pillow's decoding alone (decoding and selection, with and
without the captioner's thumbnail of 384 px); Pillow's resizing (thumbnail). All run in turn, round by round, in one
child with the guard's environment, as in a decoding process. Also the peak memory of choosing patches of 50 megapixels.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import measure
from jobs.isolation.guard import ENVIRONMENT
from nsnet.images import decode_image, thumbnail
from nsnet.kernels import compiled
from nsnet.patches import select_patches
from nsnet.preparation import PreparationConfig, prepare

SIZES: Final = ((512, 512, 40), (1024, 1024, 25), (4000, 3000, 5))
"""Width, height, rounds."""
PATCH_PX: Final = 32
THUMBNAIL_PX: Final = 384

Pixels = npt.NDArray[np.uint8]


def drawn(width: int, height: int) -> Pixels:
    """A picture with the spectrum of photographs, 1/f^1.2, and noise."""
    dice = np.random.default_rng([width, height])
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = np.maximum(np.hypot(down, across), 1 / max(width, height)) ** -1.2
    channels = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * dice.random(amplitude.shape))
        smooth = np.fft.irfft2(amplitude * phase, s=(height, width))
        channels.append(128 + 50 * smooth / smooth.std() + dice.normal(0, 8, (height, width)))
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def loop_over_patches(image: Pixels) -> npt.NDArray[np.intp]:
    """The straightforward selection: eq. 13 for one patch after the other."""
    entropy = []
    for top in range(0, image.shape[0] - PATCH_PX + 1, PATCH_PX):
        for left in range(0, image.shape[1] - PATCH_PX + 1, PATCH_PX):
            grey = image[top : top + PATCH_PX, left : left + PATCH_PX].mean(axis=2)
            magnitude = np.abs(np.fft.fft2(grey))
            share = magnitude / (magnitude.sum() + 1e-8)
            entropy.append(-(share * np.log(share + 1e-12)).sum())
    order = np.argsort(entropy)[::-1]
    return np.concatenate([order[:25], order[-24:]])


def opened(data: bytes) -> Image.Image:
    """Decode with Pillow alone."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def compare(width: int, height: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each variant in each round."""
    pixels = drawn(width, height)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=90)
    data = stored.getvalue()
    variants: dict[str, Callable[[], object]] = {
        "loop": lambda: loop_over_patches(pixels),
        "select": lambda: select_patches(pixels),
        "Pillow": lambda: opened(data),
        "Pillow, array": lambda: np.asarray(opened(data)),
        "decode": lambda: decode_image(data),
        "prepare": lambda: prepare(data, PreparationConfig()),
        "prepare, thumbnail": lambda: prepare(data, PreparationConfig(thumbnail_px=THUMBNAIL_PX)),
        "Pillow's resize": lambda: Image.fromarray(pixels).resize((THUMBNAIL_PX,) * 2, Image.Resampling.BICUBIC),
        "thumbnail": lambda: thumbnail(pixels, THUMBNAIL_PX),
    }
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {"size": f"{width} × {height}", "times": times}


def peak_of_50_megapixels() -> float:
    """MiB that choosing patches holds beside the image, at most."""
    image = np.tile(drawn(1000, 1000), (5, 10, 1))
    tracemalloc.start()
    select_patches(image)
    _, peak = tracemalloc.get_traced_memory()
    return peak / 2**20


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Median of the rounds' ratios, with the tenth and ninetieth percentile."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--child", action="store_true", help="Measure in this process and print JSON.")
    options = arguments.parse_args()
    if options.child:
        sizes = [compare(*size) for size in SIZES]
        print(json.dumps({"sizes": sizes, "peak": peak_of_50_megapixels(), "compiled": compiled is not None}))
        return
    Path(options.work).mkdir(parents=True, exist_ok=True)
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.prepare", "--work", str(options.work), "--child"],
        env={**os.environ, **ENVIRONMENT}, cwd=measure.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = json.loads(child.stdout)
    kernels = "the compiled kernels" if measured["compiled"] else "numpy and Pillow: the kernels are not compiled"
    lines = [
        f"One thread, with {kernels}. Medians of the rounds' ratios, with their tenth and ninetieth percentile.",
        "",
        "| JPEG | loop over patches / selection | decode + select / Pillow's decoding | the same to an array |"
        " with a thumbnail of 384 px / Pillow's decoding | Pillow's resizing / thumbnail |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured["sizes"]:
        times = row["times"]
        pairs = (
            ("loop", "select"), ("prepare", "Pillow"), ("prepare", "Pillow, array"), ("prepare, thumbnail", "Pillow"),
            ("Pillow's resize", "thumbnail"),
        )  # fmt: skip
        lines.append(f"| {row['size']} | {' | '.join(ratio(times[a], times[b]) for a, b in pairs)} |")
    names = list(measured["sizes"][0]["times"])
    lines += ["", "Medians in ms:", "", f"| JPEG | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in measured["sizes"]:
        medians = [f"{statistics.median(row['times'][name]):.2f}" for name in names]
        lines.append(f"| {row['size']} | {' | '.join(medians)} |")
    lines += ["", f"Choosing patches of 50 megapixels holds {measured['peak']:.0f} MiB beside the image, at most."]
    measure.write_result(options.results, "prepare", lines)


if __name__ == "__main__":
    main()
