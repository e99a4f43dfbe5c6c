"""What only a GPU can show; skips by itself without one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nsnet import recipes
from nsnet.captioner import save_tiny_captioner
from nsnet.configuration import TrainingConfig
from nsnet.detector import Detector
from nsnet.precision import dtype_of
from nsnet.training import Batch, build_optimizer, training_step

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
    assert dtype_of(training.precision, torch.device("cuda")) is torch.bfloat16
    optimizer = build_optimizer(network, training)
    data = batch(32, 224, detector.clip.embed_dim, "cuda")
    losses = [
        float(training_step(network, data, optimizer, recipes.TINY.detector.loss, training)[0].total) for _ in range(30)
    ]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
