"""Builds, loads and saves CLIP towers from open_clip, with LoRA from peft on q, k, v of the image tower.

Dimensions: B images or texts, M image side in pixels, D embedding, T tokens in a block, E block width.

open_clip keeps q, k, v in one fused matrix, whose parts LoRA adapters cannot target; peft's own wrapper for
`nn.MultiheadAttention` merges and unmerges its weights in every forward pass. Training therefore splits the fused
projection into three linears with the same weights (`split_attention`). Inference merges the adapters into open_clip's
own modules (`merge_lora`), without peft, which takes seconds to import.

open_clip takes seconds to import: functions import it where they need it (`nsnet.imports`).
"""

import json
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from nsnet import imports, model_files, weight_formats
from nsnet.clip_weights import CONFIG_FILE, WEIGHTS_FILE
from nsnet.configuration import ClipConfig, LoraSettings, Precision
from nsnet.digest import weights_digest
from nsnet.errors import ConfigError, NsnetError, WeightsError
from nsnet.model_size import ModelSize
from nsnet.precision import autocast, dtype_of

if TYPE_CHECKING:
    from peft import PeftModel


ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
TEXT_LENGTHS: Final = (16, 32)
"""Numbers of tokens to which captions are padded, if they are shorter than the context. Few, because each is a shape of
its own; most captions of BLIP have fewer than 16 tokens."""


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
    """timm's fused `qkv` linear as three linears; (B, T, E) -> (B, T, 3E). SigLIP towers are timm models."""

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

    EVA blocks are left out: they keep the biases of q and v outside `qkv` and read its weight directly.
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


def split_attention(visual: nn.Module) -> int:
    """Split the fused q, k, v projections of an image tower, in place; features stay equal. Returns their number."""
    slots = _attention_slots(visual, (nn.MultiheadAttention, nn.Linear))
    for parent, name in slots:
        fused = getattr(parent, name)
        setattr(parent, name, SplitQkv(fused) if isinstance(fused, nn.Linear) else SplitAttention(fused))
    if not slots:
        raise ConfigError(
            f"LoRA needs a vision transformer; {type(visual).__name__} has no attention block that can be split"
        )
    return len(slots)


def fuse_attention(visual: nn.Module) -> None:
    """Undo `split_attention`, in place, with the current weights."""
    for parent, name in _attention_slots(visual, (SplitAttention, SplitQkv)):
        setattr(parent, name, getattr(parent, name).fuse())


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


class Clip:
    """An open_clip model with its tokenizer, input size, normalisation and embedding size."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: ClipConfig) -> None:
        open_clip = imports.open_clip()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self.precision: Precision = "fp32"
        """Arithmetic of the text tower."""
        visual = cast(Any, model).visual
        size = visual.image_size
        self.image_px = int(size[0] if isinstance(size, Sequence) else size)
        preprocess = getattr(visual, "preprocess_cfg", {})
        self.mean = tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
        self.std = tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
        self.embed_dim = int(_model_config(config, self)["embed_dim"])

    @property
    def visual(self) -> nn.Module:
        """The image tower: normalised (B, 3, M, M) float -> (B, D)."""
        return cast(nn.Module, cast(Any, self.model).visual)

    @visual.setter
    def visual(self, tower: nn.Module) -> None:
        cast(Any, self.model).visual = tower

    def text_lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens for `encode_text` of each caption: the least of `TEXT_LENGTHS` that holds it, or the context."""
        if not captions:
            return []
        tokens = self._tokens(captions)
        context = tokens.shape[1]
        if not self._can_shorten:
            return [context] * len(captions)
        ends = (tokens.argmax(dim=1) + 1).tolist()  # the end of the text has the largest number
        return [min((length for length in TEXT_LENGTHS if end <= length < context), default=context) for end in ends]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str], length: int | None = None) -> Tensor:
        """Encode captions with the frozen text tower -> (B, D) fp32, not normalised.

        `length`: tokens of the longest caption, from `text_lengths`; None: computed. Attention is causal, so that
        padding after a caption's end changes no feature; shorter padding costs less.
        """
        length = max(self.text_lengths(captions)) if length is None else length
        device = next(self.model.parameters()).device
        tokens = self._tokens(captions)[:, :length].to(device)
        model = cast(Any, self.model)
        with autocast(dtype_of(self.precision, device), device):
            encoded = self._encode_short(tokens) if self._can_shorten else model.encode_text(tokens)
        return cast(Tensor, encoded).float()

    @cached_property
    def _can_shorten(self) -> bool:
        """Whether the text tower is causal and reads the feature at the end of the text: CLIP's own."""
        open_clip = imports.open_clip()
        model = cast(Any, self.model)
        return type(model) is open_clip.CLIP and model.attn_mask is not None and model.text_pool_type == "argmax"

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return cast(Tensor, self.tokenizer(list(captions)))

    def _encode_short(self, tokens: Tensor) -> Tensor:
        """`open_clip.CLIP.encode_text` for tokens (B, L) of fewer positions than the context."""
        model, length = cast(Any, self.model), tokens.shape[1]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        projection = model.text_projection
        if projection is None:
            return cast(Tensor, ends)
        return cast(Tensor, projection(ends) if isinstance(projection, nn.Linear) else ends @ projection)

    def digest(self) -> str:
        """SHA-256 over names, shapes and values of all weights; independent of the file they came from."""
        return weights_digest(self.model.state_dict())

    def save(self, folder: Path) -> None:
        """Write the model in open_clip's `local-dir` format; the image tower must be merged."""
        open_clip = imports.open_clip()
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "model_cfg": _model_config(self.config, self),
            "preprocess_cfg": {"mean": list(self.mean), "std": list(self.std)},
        }
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        state = {name: tensor.detach().contiguous().clone() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        if isinstance(self.tokenizer, open_clip.tokenizer.HFTokenizer):  # open_clip looks for it in the folder
            self.tokenizer.tokenizer.save_pretrained(folder)


def _model_config(config: ClipConfig, clip: "Clip") -> dict[str, Any]:
    open_clip = imports.open_clip()
    architecture = config.architecture or getattr(clip.model, "nsnet_architecture", None)
    if architecture is None:
        architecture = open_clip.get_model_config(config.model)
    if architecture is None:
        raise ConfigError(f"open_clip has no model {config.model!r}")
    return dict(architecture)


def load_clip(config: ClipConfig, weights: Path | None = None) -> Clip:
    """Build the towers on the CPU in fp32, with the weights from `find_weights` or seeded random ones."""
    open_clip = imports.open_clip()
    try:
        if weights is not None and not weights.is_dir():
            weight_formats.check(weights)
        size = ModelSize([weights]) if weights is not None else nullcontext()
        with torch.random.fork_rng(devices=[]), size:
            torch.manual_seed(config.seed)
            if weights is not None and weights.is_dir():
                with model_files.opened(weights, "clip") as folder:
                    return _load_folder(folder, config)
            if config.architecture is not None:
                model = open_clip.CLIP(**config.architecture)
                open_clip.set_model_preprocess_cfg(
                    model, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
                )
                if weights is not None:
                    open_clip.load_checkpoint(model, str(weights))
                context = config.architecture.get("text_cfg", {}).get("context_length")
                return Clip(model, open_clip.get_tokenizer("ViT-B-32", context_length=context), config)
            # a file does not contain the normalisation of images; the tag of its weights determines it (SigLIP: 0.5)
            named = open_clip.get_pretrained_cfg(config.model, config.pretrained) if config.pretrained else {}
            model = open_clip.create_model(
                config.model,
                pretrained=str(weights) if weights else None,
                require_pretrained=weights is not None,
                force_preprocess_cfg={key: named[key] for key in ("mean", "std") if key in named},
            )
        return Clip(model, open_clip.get_tokenizer(config.model), config)
    except NsnetError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"cannot build CLIP {config.model} from {weights}: the file is damaged or holds other objects than "
            "tensors, which are refused for safety"
        ) from error
    except Exception as error:  # for a damaged file torch, safetensors and open_clip raise many kinds of exceptions
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if "vision_model." in str(error):
            message = (
                "it holds weights of transformers' CLIPModel or SiglipModel; give weights in open_clip's format, such "
                f"as the {WEIGHTS_FILE} of the same model on the hub"
            )
        raise WeightsError(f"cannot build CLIP {config.model} from {weights or 'a seed'}: {message}") from error


def _load_folder(folder: Path, config: ClipConfig) -> Clip:
    """Build the towers from a checked folder in open_clip's format."""
    open_clip = imports.open_clip()
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, pretrained_text=False, require_pretrained=True)
    model.nsnet_architecture = json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]
    own_tokenizer = model.nsnet_architecture["text_cfg"].get("hf_tokenizer_name")
    restrictions = {"trust_remote_code": False, "local_files_only": True} if own_tokenizer else {}
    return Clip(model, open_clip.get_tokenizer(name, **restrictions), config)
