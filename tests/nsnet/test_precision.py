"""Arithmetic of the towers: half precision stays close to fp32, and its preparations change nothing by themselves."""

import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from nsnet import precision as module
from nsnet.configuration import Precision, resolved
from nsnet.detector import Detector
from nsnet.precision import dtype_of, speed_up, to_device
from tests.support import models

CPU = torch.device("cpu")
WORDS = ["a red tree", "two old cats", "a boat on a lake", "the moon"]


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cpu", "fp32"), ("auto", "cuda", "fp16"), ("fp32", "cuda", "fp32"), ("bf16", "cpu", "bf16"),
        ("fp16", "cuda", "fp16"),
    ],
)  # fmt: skip
def test_automatic_precision_is_fp16_on_a_gpu_only(precision: Precision, device: str, expected: Precision) -> None:
    assert resolved(precision, device) == expected
    assert dtype_of(precision, torch.device(device)) is module.DTYPES[expected]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.01)])
def test_half_precision_is_close_to_fp32_and_is_not_it(precision: Precision, tolerance: float, tmp_path: Path) -> None:
    models.as_if_trained().save(tmp_path / "bundle")
    exact = Detector.load(tmp_path / "bundle", captioner=False)
    half = Detector.load(tmp_path / "bundle", captioner=False, precision=precision)
    assert (exact.precision, half.precision) == ("fp32", precision)
    mosaics = models.mosaics(16)
    expected, scores = (detector.score(mosaics, WORDS * 4).logit for detector in (exact, half))
    difference = np.abs(scores - expected)
    assert 0 < difference.max() < tolerance * expected.std()
    assert half.network.mapper is not None
    assert {p.dtype for p in [*half.network.mapper.parameters(), *half.network.head.parameters()]} == {torch.float32}


def test_fp32_towers_stay_as_they_are() -> None:
    tower = open_clip.CLIP(**models.ARCHITECTURE, quick_gelu=True)
    before = copy.deepcopy(tower.state_dict())
    speed_up(tower, "fp32", CPU)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_weights_of_products_are_converted_and_norms_are_not() -> None:
    tower = open_clip.CLIP(**models.ARCHITECTURE).visual
    speed_up(tower, "bf16", CPU)
    dtypes = {name: value.dtype for name, value in tower.named_parameters()}
    assert dtypes["transformer.resblocks.0.attn.in_proj_weight"] == torch.bfloat16
    assert dtypes["transformer.resblocks.0.attn.out_proj.weight"] == torch.bfloat16
    assert dtypes["transformer.resblocks.0.mlp.c_fc.bias"] == torch.bfloat16
    assert dtypes["conv1.weight"] == torch.bfloat16
    assert dtypes["transformer.resblocks.0.ln_1.weight"] == dtypes["class_embedding"] == torch.float32


def test_folding_the_constants_of_quick_gelu_changes_no_feature() -> None:
    tower = open_clip.CLIP(**models.ARCHITECTURE, quick_gelu=True).visual.eval()
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = tower(pixels)
        module._fold_quick_gelu(tower)
        folded = tower(pixels)
    assert not any(type(part).__name__ == "QuickGELU" for part in tower.modules())
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=1e-5)
    other = open_clip.CLIP(**models.ARCHITECTURE).visual
    module._fold_quick_gelu(other)
    assert sum(isinstance(part, torch.nn.GELU) for part in other.modules()) == 2


def test_array_becomes_a_tensor_without_a_copy_unless_it_is_read_only() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    tensor = to_device(array, CPU)
    array[0, 0] = 99
    assert tensor[0, 0] == 99
    array.flags.writeable = False
    copied = to_device(array, CPU)
    copied[0, 0] = 1
    assert array[0, 0] == 99
