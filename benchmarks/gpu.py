"""Measures what one GPU does, beside plain code on the same GPU, and writes rates for `nsnet plan-cluster`.

    python -m benchmarks.gpu --work /tmp/gpu --out /tmp/gpu/results

In blocks: the ceilings (a matrix product, a copy); the image tower and the text tower in each precision; captioning
beside transformers' `generate`; the two actors of scoring alone and both on the GPU at once, on tables as in a run; the
whole way from JPEG files, with decoding processes; one training step beside a plain loop; verdicts that flip.
ViT-L/14 at 224 px and BLIP base, with seeded random weights. Needs no Ray and no network. Each block adds its rows to
`gpu.json` when it ends, so that an interrupted run keeps what it measured. `--small` runs all blocks on small models in
a minute, also on a CPU: a test of this script, not a measurement.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from jobs.dataset import schema
from jobs.pipeline.actors import Caption, ResultCache
from jobs.pipeline.models import Models
from jobs.pipeline.rows import ProgressReporter
from jobs.pipeline.scoring import Judge, Score
from jobs.storage.uris import Uri
from nsnet import recipes
from nsnet.captioner import Captioner
from nsnet.clip import load_clip
from nsnet.config import to_dict
from nsnet.configuration import CaptionerConfig, DetectorConfig, Precision
from nsnet.detector import Detector
from nsnet.precision import autocast, dtype_of, speed_up, use_matrix_units

GFLOP: Final = {"image tower": 162.0, "text tower, 77 tokens": 13.3, "step": 486.0}
"""Per image or caption, of ViT-L/14 at 224 px: matrix products only; a step is forward and twice that backward."""
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "bf16", "fp16")
COLUMNS: Final = pa.schema(
    [*schema.SOURCE, *schema.IMAGE, *schema.CAPTION, *schema.OUTCOME, *schema.LABELS, schema.TRANSFORM]
)


@dataclass
class Bench:
    """One run of this script."""

    work: Path
    out: Path
    device: torch.device
    small: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, block: str, name: str, **values: Any) -> None:
        """Keep a row, write all rows, and show it."""
        self.rows.append({"block": block, "name": name, **values})
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps({"machine": machine(self.device), "rows": self.rows}, indent=1))
        shown = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in values.items())  # fmt: skip
        print(f"{block}: {name}: {shown}", flush=True)

    def wait(self) -> None:
        """Wait until the GPU has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], rounds: int = 7, warm: int = 3) -> float:
        """Median seconds of a call."""
        for _ in range(warm):
            run()
        taken = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    @cached_property
    def config(self) -> DetectorConfig:
        """ViT-L/14 or `tiny`, with random weights."""
        config = recipes.get("tiny" if self.small else "vit-l-14").detector
        return replace(config, clip=replace(config.clip, pretrained=None))

    @cached_property
    def bundle(self) -> Path:
        """A bundle of this configuration, with its captioner."""
        folder = self.work / f"bundle-{'small' if self.small else 'large'}"
        if not folder.exists():
            Detector.build(self.config).save(folder)
        return folder

    @cached_property
    def captioner(self) -> Path | None:
        """A folder of BLIP base, or None for the tiny one."""
        if self.small:
            return None
        from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

        folder = self.work / "blip"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            text = {"num_attention_heads": 12, "initializer_range": 0.05}
            BlipForConditionalGeneration(
                BlipConfig(text_config=text, vision_config={"image_size": 384})
            ).save_pretrained(folder)
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30_519))]
            (folder / "vocab.txt").write_text("\n".join(words) + "\n")
            BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
            size = {"height": 384, "width": 384}
            described = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            (folder / "preprocessor_config.json").write_text(json.dumps(described))
        return folder

    def pixels(self, count: int, side: int, seed: int = 0) -> npt.NDArray[np.uint8]:
        """Random images (count, side, side, 3) uint8."""
        return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that are compared."""
        return (4,) if self.small else (32, 128, 256)

    @property
    def batch(self) -> int:
        """The batch size of the actors."""
        return 4 if self.small else 128


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, the command, and the versions."""
    packages = {}
    for name in ("torch", "open_clip_torch", "transformers", "peft", "numpy", "pillow", "pyarrow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "unknown"
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    return {
        "gpu": gpu, "cores": os.cpu_count(), "python": platform.python_version(), "versions": packages,
        "command": " ".join(sys.argv), "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def ceilings(bench: Bench) -> None:
    """A matrix product of random numbers in each precision, and a copy within the device's memory."""
    side = 256 if bench.small else 8192
    use_matrix_units(bench.device)
    for precision in PRECISIONS:
        dtype = dtype_of(precision, bench.device) or torch.float32
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        taken = bench.seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        bench.add("ceilings", f"matrix product, {precision}", tflops=2 * side**3 / taken / 1e12)
    source = torch.randn(side * side, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.seconds(lambda: target.copy_(source))
    bench.add("ceilings", "copy", gb_per_s=2 * source.numel() * 4 / taken / 1e9)


def ceiling(bench: Bench, precision: str) -> float:
    """TFLOP/s of the matrix product."""
    return float(next(row["tflops"] for row in bench.rows if row["name"] == f"matrix product, {precision}"))


def towers(bench: Bench) -> None:
    """Image tower and text tower, as today (fp32 without TF32) and in each precision."""
    side = bench.config.patches.mosaic_px
    variants: list[tuple[str, Precision, bool]] = [("fp32, no TF32", "fp32", False)]
    variants += [(precision, precision, False) for precision in PRECISIONS]
    variants += [("fp16, compiled", "fp16", True)] if bench.device.type == "cuda" else []
    for name, precision, compiled in variants:
        clip = load_clip(bench.config.clip)
        clip.model.to(bench.device)
        torch.set_float32_matmul_precision("highest" if "no TF32" in name else "high")
        speed_up(clip.model, precision, bench.device)
        clip.precision = precision
        if compiled:
            clip.visual.compile(dynamic=False)
        for size in bench.batches:
            images = torch.randn(size, 3, side, side, device=bench.device)

            def run(images: torch.Tensor = images, clip: Any = clip, precision: Precision = precision) -> None:
                with torch.inference_mode(), autocast(dtype_of(precision, bench.device), bench.device):
                    clip.visual(images)

            speed = size / bench.seconds(run)
            share = speed * GFLOP["image tower"] / 1e3 / ceiling(bench, precision)
            bench.add("image tower", f"{name}, batch {size}", images_per_s=speed, share_of_ceiling=share)
        captions = [f"a {word} of {i} things" for i in range(bench.batch) for word in ("picture",)]
        context = clip._tokens(captions).shape[1]
        for length in (context, 16):
            speed = len(captions) / bench.seconds(partial(clip.encode_text, captions, length))
            bench.add("text tower", f"{name}, {length} tokens", captions_per_s=speed)
        del clip


def captioning(bench: Bench) -> None:
    """Captions of a fixed length, beside transformers' `generate` on the same thumbnails."""
    tokens, size = (4, 4) if bench.small else (20, 128)
    config = CaptionerConfig(model=None, max_new_tokens=tokens)
    baseline = None
    for name, settings in {
        "fp32, no graphs": {"precision": "fp32", "graphs": False}, "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"}, "fp16, compiled": {"precision": "fp16", "compile_vision": True},
    }.items():  # fmt: skip
        if "compiled" in name and bench.device.type != "cuda":
            continue
        captioner = Captioner(bench.captioner, config, str(bench.device), **settings)  # type: ignore[arg-type]
        thumbnails = bench.pixels(size, captioner.thumbnail_px)
        if baseline is None and bench.captioner is not None:
            baseline = size / bench.seconds(plain_generate(bench, thumbnails, tokens), rounds=3)
            bench.add("captioning", "transformers, fp32", captions_per_s=baseline)
        speed = size / bench.seconds(partial(captioner.caption, thumbnails), rounds=3)
        bench.add("captioning", name, captions_per_s=speed, times_transformers=speed / baseline if baseline else 0.0)
        del captioner


def plain_generate(bench: Bench, thumbnails: npt.NDArray[np.uint8], tokens: int) -> Callable[[], object]:
    """Transformers' own captioning, as its documentation shows it."""
    from transformers import BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(bench.captioner).to(bench.device).eval()

    def run() -> None:
        pixels = torch.tensor(thumbnails).to(bench.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.inference_mode():
            model.generate(pixels, max_new_tokens=tokens, do_sample=False, num_beams=1).cpu()

    return run


def table(bench: Bench, count: int, first: int) -> pa.Table:
    """Prepared images as the stage before captioning makes them."""
    mosaic_px, thumbnail_px = bench.config.patches.mosaic_px, 64 if bench.small else 384
    mosaics, thumbnails = bench.pixels(count, mosaic_px, first), bench.pixels(count, thumbnail_px, first)
    rows = [
        dict.fromkeys(COLUMNS.names)
        | {"image_id": f"{first + i:032x}", "uri": f"{first + i}.jpg", "status": "scored", "requests": 1,
           "content_hash": f"{first + i:064x}", "mosaic": mosaics[i].tobytes(), "thumbnail": thumbnails[i].tobytes()}
        for i in range(count)
    ]  # fmt: skip
    fields = [*COLUMNS, pa.field("mosaic", pa.binary()), pa.field("thumbnail", pa.binary())]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def scoring_stages(bench: Bench, precision: Precision = "auto") -> tuple[Caption, Score]:
    """The two stages of an actor that scores."""
    models = Models(
        detector=Uri(str(bench.bundle)), device=bench.device.type, precision=precision, run_id="bench",
        captioner=Uri(str(bench.captioner)) if bench.captioner else None, captioner_id="bench", reuse=False,
    )  # fmt: skip
    captioner = CaptionerConfig(model=None, max_new_tokens=4 if bench.small else 20)
    keep = pa.schema([*COLUMNS, pa.field("mosaic", pa.binary())])
    report = ProgressReporter()
    judge = Judge(detector=models.detector, detector_id=None, run_id=models.run_id)
    return Caption(models, captioner, keep, bench.batch, report), Score(models, [judge], bench.batch, report)


def memories(*stages: Caption | Score) -> list[ResultCache]:
    """The caches of stages."""
    holders = [scorer for stage in stages for scorer in (stage.scorers if isinstance(stage, Score) else [stage])]
    return [holder.memory for holder in holders]


def actor_loop(bench: Bench, kind: str, seconds: float, ready: Any, go: Any, done: Any) -> None:
    """A process that runs stages over prepared tables for some seconds; puts its images per second."""
    caption, score = scoring_stages(bench)
    tables = [table(bench, bench.batch, i * bench.batch) for i in range(3)]
    if kind == "score":
        tables = [one.drop_columns("thumbnail") for one in tables]
        words = [f"a picture of {i} things" for i in range(bench.batch)]
        at = tables[0].column_names.index("caption")
        tables = [one.set_column(at, "caption", pa.array(words)) for one in tables]
    chain = {"caption": [caption], "score": [score], "both": [caption, score]}[kind]
    for memory in memories(*chain):
        memory.entries = 0  # every image is new

    def process(one: pa.Table) -> None:
        for stage in chain:
            one = stage(one)

    for one in tables:
        process(one)
    ready.put(kind)
    go.wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        process(tables[count % len(tables)])
        count += 1
    done.put(count * bench.batch / (time.perf_counter() - started))


def stages(bench: Bench) -> None:
    """Each stage alone, both in one process, and two such processes on one GPU, as in a stream."""
    _ = bench.bundle, bench.captioner
    context = multiprocessing.get_context("spawn")
    seconds = 1.0 if bench.small else 15.0
    for name, kinds in CHAINS.items():
        ready, done, go = context.Queue(), context.Queue(), context.Event()
        processes = [context.Process(target=actor_loop, args=(bench, kind, seconds, ready, go, done)) for kind in kinds]
        for process in processes:
            process.start()
        for _ in processes:
            ready.get(timeout=300)
        go.set()
        speed = sum(done.get(timeout=120) for _ in processes)
        for process in processes:
            process.join()
        bench.add("actors", name, images_per_s=speed)


CHAINS: Final = {
    "caption, alone": ["caption"],
    "score, alone": ["score"],
    "caption and score, one actor": ["both"],
    "caption and score, two actors": ["both", "both"],
}
"""Name -> the stages of each process."""


def prepared_row(data: bytes, thumbnail_px: int) -> tuple[bytes, bytes]:
    """Mosaic and thumbnail of a file; runs in a decoding process."""
    from nsnet.patches import SCORING_SEED
    from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare

    config = PreparationConfig(thumbnail_px=thumbnail_px)
    prepared = prepare(data, config)
    return assemble_mosaics(prepared.patches, config, SCORING_SEED)[0].tobytes(), prepared.thumbnail.tobytes()


def stream(bench: Bench) -> None:
    """From JPEG files of 1024 × 1024 px to verdicts, with a decoding process for each core but two."""
    from io import BytesIO

    from PIL import Image

    files = []
    for seed in range(8):
        smooth = Image.fromarray(bench.pixels(1, 32, seed)[0]).resize((1024, 1024), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(seed).normal(0, 10, (1024, 1024, 3))
        stored = BytesIO()
        Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).save(stored, "JPEG", quality=90)
        files.append(stored.getvalue())
    thumbnail_px, workers = 64 if bench.small else 384, max(1, (os.cpu_count() or 1) - 2)
    caption, score = scoring_stages(bench)
    template = table(bench, bench.batch, 0)
    for memory in memories(caption, score):
        memory.entries = 0
    score(caption(template))
    count, seconds = 0, 1.0 if bench.small else 20.0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(prepared_row, files * workers, [thumbnail_px] * len(files) * workers))
        started = time.perf_counter()
        waiting: list[Any] = []
        while time.perf_counter() - started < seconds:
            while len(waiting) < 4 * bench.batch:
                waiting.append(pool.submit(prepared_row, files[len(waiting) % len(files)], thumbnail_px))
            batch, waiting = [item.result() for item in waiting[: bench.batch]], waiting[bench.batch :]
            filled = template
            for column, name in enumerate(("mosaic", "thumbnail")):
                values = pa.array([row[column] for row in batch], pa.binary())
                filled = filled.set_column(filled.column_names.index(name), name, values)
            score(caption(filled))
            count += bench.batch
        taken = time.perf_counter() - started
        for item in waiting:
            item.cancel()
    bench.add("stream", f"JPEG files, {workers} decoding processes", images_per_s=count / taken)


def training(bench: Bench) -> None:
    """A step of LoRA training on 64 images, beside a loop by hand."""
    from benchmarks.training_step import compare_steps

    size = 4 if bench.small else 64
    recipe = replace(recipes.get("tiny" if bench.small else "vit-l-14"), detector=bench.config)
    ours, theirs = compare_steps(recipe, size, 3 if bench.small else 10, bench.device)
    speed = size / statistics.median(ours)
    share = speed * GFLOP["step"] / 1e3 / ceiling(bench, "bf16")
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    bench.add("training", f"step of {size} images, bf16", images_per_s=speed, share_of_ceiling=share, by_hand=ratio)


def flips(bench: Bench) -> None:
    """Verdicts of half precision that differ from those of fp32, with the threshold at the median."""
    count = 8 if bench.small else 1000
    mosaics = bench.pixels(count, bench.config.patches.mosaic_px)
    captions = [f"a picture of {i} things" for i in range(count)]
    logits = {}
    for precision in PRECISIONS:
        detector = Detector.load(bench.bundle, device=str(bench.device), precision=precision, captioner=False)
        if precision == "fp32":
            torch.set_float32_matmul_precision("highest")
        size = bench.batch
        parts = [detector.score(mosaics[i : i + size], captions[i : i + size]).logit for i in range(0, count, size)]
        logits[precision] = np.concatenate(parts)
    exact = logits["fp32"]
    middle = np.median(exact)
    for precision in PRECISIONS[1:]:
        error = np.abs(logits[precision] - exact)
        bench.add(
            "flips", precision, images=count, flipped=int(((logits[precision] > middle) != (exact > middle)).sum()),
            largest_error=float(error.max()), median_error=float(np.median(error)), spread=float(exact.std()),
        )  # fmt: skip


def write_rates(bench: Bench) -> None:
    """Write `rates.json` for `nsnet plan-cluster --rates`: this GPU's rates, the other rates of the release."""
    from jobs.planning.rates import load

    speeds = {row["name"]: row["images_per_s"] for row in bench.rows if row["block"] == "actors"}
    if bench.small or speeds.keys() != CHAINS.keys():
        return
    known, about = load(), machine(bench.device)
    caption, score, *both = (speeds[name] for name in CHAINS)
    gpu = {
        "caption_images_per_s": caption, "score_images_per_s": score,
        "both_images_per_s": max(both) if max(both) < min(caption, score) else None,
    }  # fmt: skip
    file = replace(
        known,
        machine=f"GPU: {about['gpu']}; other rates: {known.machine}"[:200],
        date=about["date"],
        precision="fp16",
        versions=about["versions"],
        measured=tuple(dict.fromkeys([*known.measured, *gpu])),
        rates=replace(known.rates, **gpu),
    )
    (bench.out / "rates.json").write_text(json.dumps(to_dict(file), indent=2) + "\n")


BLOCKS: Final[dict[str, Callable[[Bench], None]]] = {
    "ceilings": ceilings, "towers": towers, "captioning": captioning, "actors": stages, "stream": stream,
    "training": training, "flips": flips,
}  # fmt: skip


@contextmanager
def named(block: str) -> Iterator[None]:
    """Show how long a block took; a block that fails does not stop the others."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:  # the next blocks may still work; the run's exit code tells
        print(f"{block}: failed: {type(error).__name__}: {error}", flush=True)
        FAILED.append(block)
    print(f"{block}: {time.perf_counter() - started:.0f} s", flush=True)


FAILED: Final[list[str]] = []


def main() -> None:
    """Run the benchmark."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, required=True, help="Folder for models.")
    arguments.add_argument("--out", type=Path, required=True, help="Folder for gpu.json.")
    arguments.add_argument("--small", action="store_true", help="Small models, to test this script.")
    arguments.add_argument("--only", choices=BLOCKS, action="append", help="Run these blocks.")
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        arguments.error("this machine has no GPU that torch can use; --small tests the script without one")
    bench = Bench(options.work, options.out, device, options.small)
    for name, block in BLOCKS.items():
        if name == "ceilings" or options.only is None or name in options.only:
            with named(name):
                block(bench)
    write_rates(bench)
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
