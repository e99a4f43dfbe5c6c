"""Compares `nsnet.training.training_step` with a loop that a researcher would write by hand, at the same work.

    python -m benchmarks.training_step --work /tmp/step

The rival: forward, the same objective, backward, clipping and AdamW on the same network, without gathering, dropout
per row, micro-batches or checks. Both take steps in turn on copies of one network, with the batch on the device.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch

from nsnet import recipes
from nsnet.detector import Detector
from nsnet.losses import objective
from nsnet.network import Network
from nsnet.training import Batch, build_optimizer, training_step

RECIPES: Final = {"tiny": 32, "ViT-B-32-quickgelu": 16}
"""Recipe -> images per step."""


def by_hand(network: Network, batch: Batch, recipe: recipes.Recipe) -> Callable[[], None]:
    """A step of a plain loop."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.training.head_lr, fused=batch.mosaics.is_cuda)
    dtype = torch.bfloat16 if batch.mosaics.is_cuda else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.mosaics.device.type, dtype=dtype, enabled=dtype is not None):
            out = network(batch.mosaics, batch.text_features)
        loss = objective(out.features, out.logit, out.image, out.semantic, batch.labels, recipe.detector.loss)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.training.clip_norm)
        optimizer.step()

    return step


def compare_steps(
    recipe: recipes.Recipe, size: int, rounds: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of the rival's, in turn."""
    detector = Detector.build(recipe.detector)
    network = detector.network.to(device).train()
    side = recipe.detector.patches.mosaic_px
    dice = torch.Generator().manual_seed(0)
    batch = Batch(
        mosaics=torch.randint(0, 256, (size, side, side, 3), generator=dice, dtype=torch.uint8).to(device),
        text_features=torch.randn(size, detector.clip.embed_dim, generator=dice).to(device),
        labels=(torch.arange(size) % 2).to(device),
        valid=torch.ones(size, dtype=torch.bool, device=device),
    )
    optimizer = build_optimizer(network, recipe.training)
    plain = by_hand(copy.deepcopy(network), batch, recipe)

    def ours() -> None:
        training_step(network, batch, optimizer, recipe.detector.loss, recipe.training)

    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for step, spent in zip((ours, plain), times, strict=True):
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 1:
                spent.append(time.perf_counter() - started)
    return times


def compare(name: str, size: int, rounds: int, device: torch.device) -> str:
    """A row of the table."""
    recipe = recipes.get(name)
    recipe = replace(recipe, detector=replace(recipe.detector, clip=replace(recipe.detector.clip, pretrained=None)))
    times = compare_steps(recipe, size, rounds, device)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    speeds = " | ".join(f"{size / statistics.median(spent):.1f}" for spent in times)
    return f"| {name}, {size} images | {speeds} | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    """Run the benchmark."""
    from benchmarks import measure  # needs packages that a lent GPU may lack; `benchmarks.gpu` uses this module

    arguments = measure.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"On {device.type}, one thread, {options.rounds} steps of both in turn. Ratio: median, with the tenth and "
        "ninetieth percentile.",
        "",
        "| recipe | training_step, images/s | by hand, images/s | ratio |",
        "|---|---|---|---|",
        *(compare(name, size, options.rounds, device) for name, size in RECIPES.items()),
    ]
    measure.write_result(options.results, "training_step", lines)


if __name__ == "__main__":
    main()
