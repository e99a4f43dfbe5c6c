"""Compares the speed of captioning with that of transformers' `generate`, for BLIP base with random weights.

    python -m benchmarks.captioning --work /tmp/captioning
    python -m benchmarks.captioning --work /tmp/captioning --device cpu --size tiny --batch 32 --tokens 8

Weights are random, and no caption ends early: each has all of its tokens. A round runs each variant once, in turn, on
the same pixels. The ratio is that of transformers' seconds to the variant's in the same round; transformers computes in
fp32, as by default. "tokens" is the share of transformers' tokens that a variant chooses too, where rounding decides.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from benchmarks import measure
from nsnet import blip_files, captioner

END: Final = 102
BASE: Final[dict[str, dict[str, Any]]] = {
    "text_config": {"num_attention_heads": 12, "initializer_range": 0.05, "sep_token_id": END},
    "vision_config": {"image_size": 384, "initializer_range": 0.03},
}
CONFIGS: Final = {"base": BASE, "tiny": captioner.TINY_CONFIG}


def main() -> None:
    """Run the benchmark."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--size", choices=CONFIGS, default="base")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=40)
    arguments.add_argument("--rounds", type=int, default=10)
    options = arguments.parse_args()
    on_cuda = torch.device(options.device).type == "cuda"
    folder = write_model(options.work / f"blip-{options.size}", CONFIGS[options.size])
    theirs = BlipForConditionalGeneration.from_pretrained(folder).to(options.device)
    loaded = blip_files.load(folder, str(folder)).to(options.device)
    side = loaded.settings.vision.image_size
    pixels = torch.randn(options.batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(options.device)

    def reference() -> torch.Tensor:
        with torch.inference_mode():
            tokens = theirs.generate(pixels, max_new_tokens=options.tokens, do_sample=False, num_beams=1)
        return torch.as_tensor(tokens)[:, 1:]

    variants: dict[str, Callable[[], torch.Tensor]] = {"transformers": reference}
    for name, settings in {
        "fp32": {"graphs": False},
        "fp32, graphs": {},
        "bf16": {"dtype": torch.bfloat16, "graphs": False},
        "bf16, graphs": {"dtype": torch.bfloat16},
        "bf16, graphs, compiled": {"dtype": torch.bfloat16, "compile_vision": True},
    }.items():
        if on_cuda or name == "fp32":
            model = copy.deepcopy(loaded).fuse(**settings)
            variants[name] = lambda model=model: model.generate(pixels, options.tokens)  # type: ignore[misc]
    del loaded
    tokens = {name: [run() for _ in range(3)][-1] for name, run in variants.items()}  # the third replays all graphs
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run().cpu()
            seconds[name].append(time.perf_counter() - started)
    lines = [
        f"BLIP {options.size} on {torch.cuda.get_device_name() if on_cuda else 'the CPU'}, {options.batch} images of "
        f"{side} px, {options.tokens} tokens, {torch.get_num_threads()} threads, {options.rounds} rounds.",
        "",
        "| variant | ms a batch | captions/s | tokens/s | ratio, median (least to most) | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        ratios = [first / own for first, own in zip(seconds["transformers"], taken, strict=True)]
        median, same = statistics.median(taken), (tokens[name] == tokens["transformers"]).float().mean()
        lines.append(
            f"| {name} | {1000 * median:.1f} | {options.batch / median:.0f} | "
            f"{options.batch * options.tokens / median:.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {same:.3f} |"
        )
    measure.write_result(options.results, "captioning", lines)


def write_model(folder: Path, config: dict[str, dict[str, Any]]) -> Path:
    """A transformers folder with random weights, which never choose the end of a caption."""
    if not folder.exists():
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(BlipConfig(**config))  # type: ignore[arg-type]
        with torch.no_grad():
            bias = dict(model.named_parameters())["text_decoder.cls.predictions.bias"]
            bias[model.config.text_config.sep_token_id] = -1e4
        model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
