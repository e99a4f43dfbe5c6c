"""What only a GPU can show; skips by itself without one."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from nsnet import recipes
from nsnet.captioner import save_tiny_captioner
from nsnet.configuration import TrainingConfig
from nsnet.detector import Detector
from nsnet.precision import training_dtype
from nsnet.training import Batch, build_optimizer, training_step
from tests.nsnet.test_blip import STEPS, VARIANTS, Pair, end_often

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(size: int, mosaic_px: int, dim: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        mosaics=torch.randint(0, 256, (size, mosaic_px, mosaic_px, 3), generator=generator, dtype=torch.uint8).to(
            device
        ),
        text_features=torch.randn(size, dim, generator=generator).to(device),
        labels=(torch.arange(size) % 2).to(device),
        valid=torch.ones(size, dtype=torch.bool, device=device),
    )


def test_scores_on_the_gpu_equal_those_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "captioner").mkdir()
    save_tiny_captioner(tmp_path / "captioner", seed=0)
    Detector.build(recipes.TINY.detector).save(tmp_path / "bundle", captioner=tmp_path / "captioner")
    mosaics = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    captions = [f"an image of {i} things" for i in range(16)]
    on_cpu, on_gpu = (
        Detector.load(tmp_path / "bundle", device=device).score(mosaics, captions) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu.prob_fake, on_cpu.prob_fake, atol=1e-4)


def test_tiny_learns_a_batch_in_bf16() -> None:
    detector = Detector.build(recipes.TINY.detector)
    network = detector.network.to("cuda")
    training = TrainingConfig(batch_size=32, head_lr=1e-3, backbone_lr=1e-3)
    assert training_dtype(training.precision, torch.device("cuda")) is torch.bfloat16
    optimizer = build_optimizer(network, training)
    data = batch(32, 224, detector.clip.embed_dim, "cuda")
    losses = [
        float(training_step(network, data, optimizer, recipes.TINY.detector.loss, training)[0].total) for _ in range(30)
    ]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("graphs", [False, True])
def test_captions_on_the_gpu_are_those_of_the_cpu(graphs: bool, tmp_path: Path) -> None:
    """Calls of several sizes: the second of each captures graphs, the third replays them; rows end at many steps."""
    pair = Pair(tmp_path / "blip", *VARIANTS["as the tiny one"], seed=1)
    end_often(pair, pair.pixels(32))
    on_gpu = pair.loaded.to("cuda").fuse(graphs=graphs)
    for count in (32, 32, 32, 9, 9, 9, 40, 32, 32, 40):
        pixels = pair.pixels(count)
        expected = pair.ours.generate(pixels, STEPS)
        tokens = on_gpu.generate(pixels.to("cuda"), STEPS).cpu()
        steps = expected.shape[1]
        assert (tokens[:, :steps] == expected).float().mean() > 0.99, "all but near-ties"
        assert (tokens[:, steps:] == pair.ours.settings.text.pad_token_id).all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_graphs_change_no_token(dtype: torch.dtype | None, tmp_path: Path) -> None:
    pair = Pair(tmp_path / "blip", *VARIANTS["as the tiny one"], seed=1)
    end_often(pair, pair.pixels(32))
    model = pair.loaded.to("cuda")
    plain, captured = (copy.deepcopy(model).fuse(dtype, graphs=graphs) for graphs in (False, True))
    for seed in range(6):
        pixels = pair.pixels(32, seed).to("cuda")
        assert torch.equal(plain.generate(pixels, STEPS), captured.generate(pixels, STEPS))


def test_compiled_vision_transformer_gives_the_same_features(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "blip", *VARIANTS["as the tiny one"])
    compiled = pair.loaded.to("cuda").fuse(compile_vision=True)
    pixels = pair.pixels(4)
    with torch.inference_mode():
        features = compiled.vision_model(pixels.to("cuda")).cpu()
        torch.testing.assert_close(features, pair.ours.vision_model(pixels), atol=1e-3, rtol=1e-3)
