"""LoRA adapters from peft on q, k, v of an image tower: added for training, saved, merged for inference.

Dimensions: B images, T tokens in a block, E block width.

open_clip keeps q, k, v in one fused matrix, whose parts LoRA adapters cannot target; peft's own wrapper for
`nn.MultiheadAttention` merges and unmerges its weights in every forward pass. Training therefore splits the fused
projection into three linears with the same weights (`split_attention`). Inference merges the adapters into the tower's
own modules (`merge_lora`), without peft, which takes seconds to import.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from nsnet import model_files
from nsnet.configuration import LoraSettings
from nsnet.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from peft import PeftModel


ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` (batch first, self-attention) with q, k, v as three linears; (B, T, E) -> (B, T, E)."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if not fused.batch_first or fused.in_proj_weight is None or fused.bias_k is not None or fused.dropout:
            raise ConfigError("LoRA needs attention blocks with one fused projection, batch first, without dropout")
        self.num_heads = fused.num_heads
        weights = fused.in_proj_weight.detach().chunk(3)
        biases = fused.in_proj_bias.detach().chunk(3) if fused.in_proj_bias is not None else (None,) * 3
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(fused.out_proj.weight.detach(), fused.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if need_weights:
            raise NotImplementedError("attention weights are not available")
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def fuse(self) -> nn.MultiheadAttention:
        """Return the original kind of module with the same weights."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = self.q_proj.weight
        fused = nn.MultiheadAttention(  # on "meta": initialising takes seconds and uses random numbers
            weight.shape[1], self.num_heads, bias=self.q_proj.bias is not None, batch_first=True,
            device="meta", dtype=weight.dtype,
        ).to_empty(device=weight.device)  # fmt: skip
        with torch.no_grad():
            fused.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            if self.q_proj.bias is not None:
                fused.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        fused.out_proj.load_state_dict(self.out_proj.state_dict())
        return fused


class SplitQkv(nn.Module):
    """timm's fused `qkv` linear as three linears; (B, T, E) -> (B, T, 3E). Used by SigLIP, PE and DINOv3."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = fused.bias.detach().chunk(3) if fused.bias is not None else (None,) * 3
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(fused.weight.detach().chunk(3), biases, strict=True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens)], dim=-1)

    def fuse(self) -> nn.Linear:
        """Return one fused linear with the same weights."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        bias = torch.cat([part.bias.detach() for part in parts]) if self.q_proj.bias is not None else None
        return _linear(torch.cat([part.weight.detach() for part in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _attention_slots(visual: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) of the self-attention projections of every block; pooling layers are not blocks.

    Blocks are left out that keep biases of q and v outside `qkv` and read its weight directly.
    """
    return [
        (parent, name)
        for parent in visual.modules()
        for name, child in parent.named_children()
        if isinstance(child, kinds)
        and (
            (name == "attn" and hasattr(parent, "mlp"))
            or (name == "qkv" and isinstance(child, nn.Linear | SplitQkv) and getattr(parent, "q_bias", None) is None)
        )
    ]


def _timm_blocks(visual: nn.Module) -> list[Any]:
    """Attention modules of timm whose code can use three linears, `PROJECTIONS`, instead of `qkv` (None)."""
    from timm.layers.attention import AttentionRope  # slow to import, but only before the first tower was built
    from timm.models.eva import EvaAttention

    return [module for module in visual.modules() if isinstance(module, EvaAttention | AttentionRope)]


def _eva_blocks(visual: nn.Module) -> list[Any]:
    """Those of them that keep biases outside `qkv`."""
    return [block for block in _timm_blocks(visual) if getattr(block, "k_bias", None) is not None]


def _split_eva(attention: Any) -> None:
    """Give an EVA block the three linears that timm's own code uses if there is no `qkv`; k has no bias."""
    biases = (attention.q_bias, None, attention.v_bias)
    for name, weight, bias in zip(PROJECTIONS, attention.qkv.weight.detach().chunk(3), biases, strict=True):
        setattr(attention, name, _linear(weight, bias))
    attention.qkv = attention.q_bias = attention.v_bias = None


def _fuse_eva(attention: Any) -> None:
    """Undo `_split_eva`."""
    attention.qkv = _linear(torch.cat([getattr(attention, name).weight.detach() for name in PROJECTIONS]), None)
    attention.q_bias, attention.v_bias = attention.q_proj.bias, attention.v_proj.bias
    for name in PROJECTIONS:
        setattr(attention, name, None)


def split_attention(visual: nn.Module) -> int:
    """Split the fused q, k, v projections of an image tower, in place; features stay equal.

    Returns the number of blocks with three projections. Raises `ConfigError` if there are none.
    """
    slots = _attention_slots(visual, (nn.MultiheadAttention, nn.Linear))
    for parent, name in slots:
        fused = getattr(parent, name)
        setattr(parent, name, SplitQkv(fused) if isinstance(fused, nn.Linear) else SplitAttention(fused))
    for attention in _eva_blocks(visual):
        _split_eva(attention)
    # a few towers of timm have three linears from the start
    blocks = len(slots) + sum(block.qkv is None for block in _timm_blocks(visual))
    if not blocks:
        raise ConfigError(
            f"LoRA needs a vision transformer; {type(visual).__name__} has no attention block that can be split: set "
            "detector.lora.rank=0"
        )
    return blocks


def fuse_attention(visual: nn.Module) -> None:
    """Undo `split_attention`, in place, with the current weights."""
    for parent, name in _attention_slots(visual, (SplitAttention, SplitQkv)):
        setattr(parent, name, getattr(parent, name).fuse())
    for attention in _eva_blocks(visual):
        _fuse_eva(attention)


def add_lora(visual: nn.Module, settings: LoraSettings) -> "PeftModel":
    """Freeze an image tower and add adapters to q, k, v of each block. B starts at zero: features stay equal.

    The paper's ViT-L/14 at rank 6: 24 blocks × 3 × 2 × 6 × 1024 = 884,736 trainable parameters.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import; not needed for the text tower

    split_attention(visual)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=list(PROJECTIONS),
        bias="none",
    )
    return cast("PeftModel", get_peft_model(cast(Any, visual), lora))


def has_lora(visual: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether an image tower has adapters."""
    return hasattr(visual, "peft_config")


def save_lora(adapted: "PeftModel", folder: Path) -> None:
    """Write the adapters in peft's format; equal adapters give equal files with every release of peft."""
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    described = json.loads((folder / ADAPTER_CONFIG).read_text())
    kept = {name: value for name, value in described.items() if name not in ("auto_mapping", "peft_version")}
    kept["target_modules"] = sorted(kept["target_modules"])  # peft writes a set
    (folder / ADAPTER_CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def merge_lora(visual: nn.Module, adapter: Path) -> LoraSettings:
    """Add saved adapters (peft's format) to the weights of an image tower, in place; returns their settings.

    W += alpha / rank · B A (arXiv 2106.09685). peft does not read the files: its settings can name classes to import
    and models to download. Only three numbers of them are used. Raises `WeightsError`.
    """
    try:
        described = model_files.read_json(adapter, "lora", ADAPTER_CONFIG)
        settings = LoraSettings(
            rank=described["r"], alpha=described["lora_alpha"], dropout=described.get("lora_dropout", 0.0)
        )
        state = load_file(model_files.inside(adapter, ADAPTER_WEIGHTS))
    except (OSError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{adapter} holds no LoRA adapters: {type(error).__name__}: {error}") from error
    split_attention(visual)
    with torch.no_grad():
        for name, module in visual.named_modules():
            if name.rpartition(".")[2] not in PROJECTIONS:
                continue
            weight = cast(nn.Linear, module).weight
            a, b = (state.pop(f"base_model.model.{name}.lora_{factor}.weight", None) for factor in "AB")
            shapes = ((settings.rank, weight.shape[1]), (weight.shape[0], settings.rank))
            if a is None or b is None or (a.shape, b.shape) != shapes:
                raise WeightsError(f"{adapter} does not fit the image tower: {name}")
            weight += (b.to(weight.dtype) @ a.to(weight.dtype)) * (settings.alpha / settings.rank)
    if state:
        raise WeightsError(f"{adapter} does not fit the image tower: {next(iter(state))}")
    fuse_attention(visual)
    return settings
