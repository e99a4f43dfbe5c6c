"""Adapters on q, k, v of image towers: split, added, saved and merged, against stock open_clip and peft."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from nsnet import lora, recipes, timm_towers
from nsnet.configuration import LoraSettings
from nsnet.errors import ConfigError, WeightsError
from tests.support import models, towers
from tests.support.models import close, features, pixels


def layer_scaled() -> nn.Module:
    vision = {
        "image_size": 32, "patch_size": 8, "layers": 3, "width": 48, "head_width": 16, "ls_init_value": 0.5
    }  # fmt: skip
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=models.ARCHITECTURE["text_cfg"])


def vit_b_32() -> nn.Module:
    """ViT-B/32 of three blocks: its width and heads, at a quarter of its cost."""
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert config["vision_cfg"].pop("layers") == 12
    return open_clip.CLIP(
        embed_dim=config["embed_dim"],
        quick_gelu=config["quick_gelu"],
        vision_cfg={**config["vision_cfg"], "layers": 3},
        text_cfg=models.ARCHITECTURE["text_cfg"],
    )


def timm_tower(name: str) -> nn.Module:
    tower = timm_towers.ImageTower(towers.timm_clip(name))
    models.randomise(tower, 4, only="gamma", std=0.5)  # DINOv3 starts at 1e-5, which hides what the blocks do
    return tower


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "tiny-recipe": lambda: open_clip.CLIP(**recipes.TINY.detector.clip.architecture),
    "layer-scale": layer_scaled,
    "ViT-B-32-quickgelu": vit_b_32,
    "siglip": models.siglip,
    **{name: partial(timm_tower, name) for name in towers.REDUCED if name != "convnext_reduced"},
}


@pytest.fixture(scope="module", params=TOWERS)
def stock(request: pytest.FixtureRequest) -> nn.Module:
    """open_clip's own image tower, frozen, with biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tower: nn.Module = TOWERS[request.param]().visual  # type: ignore[assignment]
    models.randomise(tower, 1, only="bias")
    return tower.eval().requires_grad_(False)


def test_split_tower_gives_the_features_of_stock_open_clip(stock: nn.Module) -> None:
    tower = copy.deepcopy(stock)
    images = pixels(stock)
    assert lora.split_attention(tower) >= 2
    names = {name.rpartition(".")[2] for name, _ in tower.named_modules()}
    assert names >= set(lora.PROJECTIONS) and "qkv" not in {
        name.rpartition(".")[2] for name, module in tower.named_modules() if isinstance(module, nn.Linear)
    }
    assert features(stock, images).std() > 0.01
    close(features(tower, images), features(stock, images))


def test_fused_again_is_the_stock_tower_bit_for_bit(stock: nn.Module) -> None:
    tower = copy.deepcopy(stock)
    lora.split_attention(tower)
    lora.fuse_attention(tower)
    assert [type(module) for module in tower.modules()] == [type(module) for module in stock.modules()]
    assert list(tower.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), stock.state_dict().values(), strict=True))
    images = pixels(stock, 1)
    assert torch.equal(features(tower, images), features(stock, images))


def test_adapters_at_start_change_nothing(stock: nn.Module) -> None:
    split, adapted, images = copy.deepcopy(stock), copy.deepcopy(stock), pixels(stock)
    lora.split_attention(split)
    with_lora = lora.add_lora(adapted, LoraSettings(rank=6, alpha=6.0))
    assert torch.equal(features(with_lora, images), features(split, images))
    close(features(with_lora, images), features(stock, images))


def merged(adapted: PeftModel, stock: nn.Module, folder: Path) -> nn.Module:
    """A copy of a tower with these adapters, saved and merged."""
    tower = copy.deepcopy(stock)
    lora.save_lora(adapted, folder)
    lora.merge_lora(tower, folder)
    return tower


def test_merged_adapters_equal_unmerged_ones_in_stock_modules(stock: nn.Module, tmp_path: Path) -> None:
    images = pixels(stock)
    torch.manual_seed(0)  # of the adapters' A
    adapted = lora.add_lora(copy.deepcopy(stock), LoraSettings(rank=4, alpha=8.0))
    models.randomise(adapted, 2, only="lora_B", std=0.3)
    unmerged = features(adapted, images)
    assert (unmerged - features(stock, images)).abs().max() > 1e-3, "the adapters do nothing, the test proves nothing"
    tower = merged(adapted, stock, tmp_path)
    assert [type(module) for module in tower.modules()] == [type(module) for module in stock.modules()]
    assert list(tower.state_dict()) == list(stock.state_dict())
    close(features(tower, images), unmerged)
    pefts: nn.Module = adapted.merge_and_unload()
    lora.fuse_attention(pefts)
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), pefts.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["tiny-recipe", "siglip"])
def test_merged_weights_are_the_weights_plus_scaled_b_times_a(kind: str, tmp_path: Path) -> None:
    tower: nn.Module = TOWERS[kind]().visual  # type: ignore[assignment]
    stock = copy.deepcopy(tower)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    adapted = lora.add_lora(tower, LoraSettings(rank=2, alpha=6.0))
    models.randomise(adapted, 5, only="lora_")
    factors = {name: tensor.clone() for name, tensor in adapted.named_parameters() if "lora_" in name}
    after = merged(adapted, stock, tmp_path).state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == len(factors) // 6 > 1
    for name in changed:
        block = name.removesuffix("in_proj_weight").removesuffix("qkv.weight")
        update = []
        for letter in "qkv":
            a, b = (
                next(factors[key] for key in factors if f"{block}" in key and f"{letter}_proj.lora_{side}" in key)
                for side in "AB"
            )
            update.append(3.0 * b.double() @ a.double())
        close(after[name].double(), before[name].double() + torch.cat(update))


def test_only_adapters_get_gradients(stock: nn.Module) -> None:
    adapted = lora.add_lora(copy.deepcopy(stock), LoraSettings(rank=2))
    models.randomise(adapted, 2, only="lora_B")
    adapted.train()(pixels(stock, 2)).square().sum().backward()
    with_gradient = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in adapted.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    assert with_gradient == expected
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in expected} == set(lora.PROJECTIONS)
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapted.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("rank", "expected"), [(6, 884_736), (1, 147_456)])
def test_vit_l_14_has_the_papers_number_of_adapter_parameters(rank: int, expected: int) -> None:
    with torch.device("meta"):
        tower = open_clip.create_model("ViT-L-14-quickgelu", device="meta").visual
    adapted = lora.add_lora(tower.requires_grad_(True), LoraSettings(rank=rank))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == expected
    assert len(trainable) == 24 * 3 * 2


def test_dropout_of_the_adapters_acts_in_training_only() -> None:
    tower = open_clip.CLIP(**models.ARCHITECTURE).visual
    adapted = lora.add_lora(tower, LoraSettings(rank=4, dropout=0.5))
    models.randomise(adapted, 0, only="lora_B")
    images = pixels(tower)
    assert torch.equal(features(adapted, images), features(adapted, images))
    adapted.train()
    assert not torch.equal(adapted(images), adapted(images))


def test_saved_adapters_load_again_in_pefts_format(stock: nn.Module, tmp_path: Path) -> None:
    images = pixels(stock)
    adapted = lora.add_lora(copy.deepcopy(stock), LoraSettings(rank=3, alpha=5.0, dropout=0.1))
    models.randomise(adapted, 4, only="lora_")
    adapted.save_pretrained(str(tmp_path))
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(described["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 3, 5.0)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora_A" in name or "lora_B" in name for name in saved)
    split = copy.deepcopy(stock)
    lora.split_attention(split)
    loaded = PeftModel.from_pretrained(split, str(tmp_path))
    assert torch.equal(features(loaded, images), features(adapted, images))


@pytest.mark.parametrize("change", ["missing", "unknown", "other rank"])
def test_adapters_that_do_not_fit_are_refused(change: str, stock: nn.Module, tmp_path: Path) -> None:
    lora.save_lora(lora.add_lora(copy.deepcopy(stock), LoraSettings(rank=3)), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = min(state)
    if change == "missing":
        del state[name]
    elif change == "unknown":
        state[f"{name}.other"] = state[name].clone()
    else:
        state[name] = state[name][:2].clone()
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="does not fit the image tower"):
        lora.merge_lora(copy.deepcopy(stock), tmp_path)


def test_attention_weights_are_refused_not_left_out() -> None:
    fused = nn.MultiheadAttention(8, 2, batch_first=True)
    tokens = torch.randn(1, 3, 8)
    with pytest.raises(NotImplementedError, match="attention weights"):
        lora.SplitAttention(fused)(tokens, tokens, tokens, need_weights=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_split_attention_gives_values_and_gradients_of_the_fused_one(bias: bool, masked: bool) -> None:
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double()
    models.randomise(fused, 0)
    split = lora.SplitAttention(fused)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1) if masked else None
    outputs, gradients = [], []
    for module in (fused, split):
        tokens = torch.linspace(-1, 1, 2 * 5 * 12, dtype=torch.float64).reshape(2, 5, 12).sin().requires_grad_()
        attended, _ = module(tokens, tokens, tokens, need_weights=False, attn_mask=mask)
        attended.square().sum().backward()
        outputs.append(attended)
        gradients.append(tokens.grad)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "fused",
    [
        nn.MultiheadAttention(8, 2),
        nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1),
        nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4),
        nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
    ],
    ids=["sequence-first", "dropout", "separate-widths", "bias-kv"],
)
def test_attention_that_cannot_be_split_is_refused(fused: nn.MultiheadAttention) -> None:
    with pytest.raises(ConfigError, match="LoRA needs"):
        lora.SplitAttention(fused)


@pytest.mark.parametrize("kind", ["convolutional", "biases-outside-the-projection"])
def test_tower_without_a_block_that_can_be_split_is_refused(kind: str) -> None:
    if kind == "convolutional":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
        tower = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=models.ARCHITECTURE["text_cfg"]).visual
    else:  # BEiT adds the biases of q and v itself and reads `qkv.weight`: three linears cannot stand in for it
        tower = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(ConfigError, match="LoRA needs a vision transformer") as caught:
        lora.add_lora(tower, LoraSettings())
    assert type(tower).__name__ in models.one_line(caught.value)


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"alpha": 0.0}, {"alpha": -1.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_adapter_setting_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="need rank ≥ 0") as caught:
        LoraSettings(**wrong)
    assert str(next(iter(wrong.values()))) in models.one_line(caught.value)
