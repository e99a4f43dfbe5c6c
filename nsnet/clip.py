"""CLIP towers from open_clip, with LoRA from peft on q, k, v of the image tower.

Dimensions: B images or texts, M image side in pixels, D embedding, T tokens in a block, E block width.

open_clip keeps q, k, v in one fused matrix, which a LoRA adapter cannot target separately; peft's own wrapper for
`nn.MultiheadAttention` merges and unmerges its weights at every forward. So for training the fused projection is split
into three linears with the same weights (`split_attention`), and for inference the adapters are merged and the three
are fused back (`merge_lora`): inference runs open_clip's own modules.

open_clip takes seconds to import (it brings torchvision): functions import it where they need it, so that a driver
which only reads configurations does not wait for it.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from nsnet import hub, model_files, model_settings, weight_formats
from nsnet.digest import file_digest, weights_digest
from nsnet.errors import ConfigError, NsnetError, WeightsError
from nsnet.model_size import ModelSize

if TYPE_CHECKING:
    from peft import PeftModel

PINNED_REVISIONS: Final = {"timm/vit_large_patch14_clip_224.openai": "18d0535469bb561bf468d76c1d73aa35156c922b"}
"""Hub repository -> commit. Other repositories are taken at `main`, and the digest of their weights is recorded."""

WEIGHTS_FILE: Final = "open_clip_model.safetensors"
CONFIG_FILE: Final = "open_clip_config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP model, and where its weights come from."""

    model: str = "ViT-L-14-quickgelu"
    """open_clip's name of the architecture. OpenAI weights need a `-quickgelu` one: without, features are others."""
    pretrained: str | None = "openai"
    """open_clip's tag of the weights; None: seeded random weights."""
    architecture: dict[str, Any] | None = None
    """open_clip model configuration that replaces the one of that name (`embed_dim`, `vision_cfg`, `text_cfg`)."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        for name in ("model", "pretrained"):  # "hf-hub:…" and "local-dir:…" would have open_clip load what lies there
            if not re.fullmatch(r"[\w.-]+", getattr(self, name) or "none"):
                raise ConfigError(f"{name} must be a name that open_clip knows, got {getattr(self, name)[:100]!r}")
        if self.architecture is not None and (
            found := model_settings.complaint(self.architecture, model_settings.ARCHITECTURE)
        ):
            raise ConfigError(f"architecture: {found[:400]}; it may neither fetch anything nor choose code")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters of the image tower."""

    rank: int = 6
    """Rank R; 0: no adapters."""
    alpha: float = 6.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"need rank ≥ 0, alpha > 0 and 0 ≤ dropout < 1, got {self.rank}, {self.alpha}, {self.dropout}"
            )


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
            raise NotImplementedError("attention weights are not kept")
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def fuse(self) -> nn.MultiheadAttention:
        """The stock module with the same weights."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = self.q_proj.weight
        fused = nn.MultiheadAttention(  # on "meta": random weights would cost seconds and disturb other random numbers
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
        """The stock linear with the same weights."""
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

    EVA blocks, which keep the biases of q and v beside `qkv` and read its weight themselves, are left out.
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
    """Replace the fused q, k, v projections of an image tower, in place; features stay equal. Number replaced."""
    slots = _attention_slots(visual, (nn.MultiheadAttention, nn.Linear))
    for parent, name in slots:
        fused = getattr(parent, name)
        setattr(parent, name, SplitQkv(fused) if isinstance(fused, nn.Linear) else SplitAttention(fused))
    if not slots:
        raise ConfigError(
            f"LoRA needs a vision transformer; {type(visual).__name__} has no attention block it can split"
        )
    return len(slots)


def fuse_attention(visual: nn.Module) -> None:
    """Undo `split_attention`, in place, keeping the present weights."""
    for parent, name in _attention_slots(visual, (SplitAttention, SplitQkv)):
        setattr(parent, name, getattr(parent, name).fuse())


def add_lora(visual: nn.Module, settings: LoraSettings) -> "PeftModel":
    """Freeze an image tower and put adapters on q, k, v of each block. B starts at zero: features stay equal.

    The paper's ViT-L/14 at rank 6: 24 blocks × 3 × 2 × 6 × 1024 = 884,736 trainable parameters.
    """
    from peft import LoraConfig, get_peft_model  # seconds to import, and not needed for the text tower

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
    """Whether an image tower carries adapters."""
    return hasattr(visual, "peft_config")


def load_lora(visual: nn.Module, adapter: Path) -> "PeftModel":
    """Put saved adapters (peft's format) on an image tower. Raises `WeightsError`.

    peft reads nothing itself: its settings choose classes to import and models to fetch, and here three numbers do.
    """
    from peft import set_peft_model_state_dict

    try:
        described = model_files.read_json(adapter, "lora", ADAPTER_CONFIG)
        settings = LoraSettings(
            rank=described["r"], alpha=described["lora_alpha"], dropout=described.get("lora_dropout", 0.0)
        )
        state = load_file(model_files.inside(adapter, ADAPTER_WEIGHTS))
    except (OSError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{adapter} holds no LoRA adapters: {type(error).__name__}: {error}") from error
    adapted = add_lora(visual, settings)
    report: Any = set_peft_model_state_dict(adapted, state)
    missing = [name for name in report.missing_keys if "lora_" in name]
    if missing or report.unexpected_keys:
        raise WeightsError(f"{adapter} does not fit the image tower: {(missing + report.unexpected_keys)[0]}")
    return adapted.requires_grad_(False)


def lora_settings(adapted: "PeftModel") -> tuple[int, float]:
    """Rank and alpha of the adapters that an image tower carries."""
    found = cast(Any, adapted.peft_config["default"])
    return int(found.r), float(found.lora_alpha)


def save_lora(adapted: "PeftModel", folder: Path) -> None:
    """Write the adapters in peft's format; equal adapters give equal files, whichever release of peft wrote them."""
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    described = json.loads((folder / ADAPTER_CONFIG).read_text())
    kept = {name: value for name, value in described.items() if name not in ("auto_mapping", "peft_version")}
    kept["target_modules"] = sorted(kept["target_modules"])  # peft writes a set
    (folder / ADAPTER_CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def merge_lora(visual: "PeftModel") -> nn.Module:
    """Add the adapters into the weights and return open_clip's own image tower."""
    merged = cast(nn.Module, visual.merge_and_unload())
    fuse_attention(merged)
    return merged


class Clip:
    """An open_clip model with its tokenizer and the facts read from it."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: ClipConfig) -> None:
        import open_clip

        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
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

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Features of captions by the frozen text tower -> (B, D) fp32, not normalised."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(captions)).to(device)
        return cast(Tensor, cast(Any, self.model).encode_text(tokens)).float()

    def digest(self) -> str:
        """SHA-256 over names, shapes and values of all weights: tells equal weights whatever file they came from."""
        return weights_digest(self.model.state_dict())

    def save(self, folder: Path) -> None:
        """Write the model in open_clip's `local-dir` format; the image tower must be merged."""
        import open_clip

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
    import open_clip

    found = config.architecture or getattr(clip.model, "nsnet_architecture", None)
    if found is None:
        found = open_clip.get_model_config(config.model)
    if found is None:
        raise ConfigError(f"open_clip knows no model {config.model!r}")
    return dict(found)


def known_models() -> list[str]:
    """Names of all architectures that open_clip can build."""
    import open_clip

    return list(open_clip.list_models())


def activation_fits(model: str, tag: str) -> bool:
    """Whether weights were trained with the activation of an architecture (quick_gelu or not); else features differ."""
    import open_clip

    wanted = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu")
    return bool(wanted) == bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))


def find_weights(config: ClipConfig, weights: Path | None = None) -> Path | None:
    """The file or folder to load weights from: as given, or from the hub's cache or the hub; None: seeded random.

    Raises `WeightsError` with the command that fetches what is missing. Nothing is loaded yet.
    """
    import open_clip

    if weights is not None:
        if not weights.exists():
            raise WeightsError(f"--clip-weights {weights} does not exist")
        if weights.is_dir() and not (weights / CONFIG_FILE).is_file():
            theirs = "transformers' format: " if (weights / "config.json").is_file() else ""
            raise WeightsError(
                f"--clip-weights {weights} is a folder without {CONFIG_FILE} (open_clip's format); {theirs}give a "
                f"folder or file in open_clip's, such as the {WEIGHTS_FILE} of the same model on the hub"
            )
        return weights
    if config.pretrained is None:
        return None
    source = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not source:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.model)) or "none"
        raise ConfigError(f"open_clip has no weights {config.pretrained!r} for {config.model}; its tags: {tags}")
    if not activation_fits(config.model, config.pretrained):
        raise ConfigError(
            f"the weights {config.pretrained!r} and the architecture {config.model} differ in their activation "
            f"(quick_gelu): features would silently be others; choose the model with or without '-quickgelu'"
        )
    repository, _, filename = str(source.get("hf_hub") or "").rpartition("/")  # "owner/name/" or "owner/name/file"
    if not repository:
        raise WeightsError(
            f"the weights {config.pretrained!r} of {config.model} are not on the hub; download them and pass "
            "--clip-weights"
        )
    revision, wanted = PINNED_REVISIONS.get(repository), filename or WEIGHTS_FILE

    def download(local_files_only: bool) -> Path:
        import huggingface_hub  # slow to import, and needed only for weights by name

        return Path(
            huggingface_hub.hf_hub_download(repository, wanted, revision=revision, local_files_only=local_files_only)
        )

    return hub.fetch(download, repository, revision, probe=wanted, wanted=wanted, option="--clip-weights with the file")


def text_tower_id(config: ClipConfig, weights: Path | None) -> str:
    """Identity of a frozen text tower, 16 hexadecimal digits: equal ids give a caption equal features.

    `weights`: what `find_weights` found. Loads nothing; about 1 s per GB.
    """
    files = sorted(path for path in weights.iterdir() if path.is_file()) if weights and weights.is_dir() else [weights]
    read = [[path.name, file_digest(path)] for path in files if path is not None]
    what = [config.model, config.architecture, read or config.seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def load_clip(config: ClipConfig, weights: Path | None = None) -> Clip:
    """Build the towers on the CPU in fp32 with the weights that `find_weights` names, or seeded random ones."""
    import open_clip

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
            # a file does not say how its model wants images normalised; the name of its weights does (SigLIP: 0.5)
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
            f"CLIP {config.model} could not be built from {weights}: the file holds more than tensors, or is damaged; "
            "for safety only tensors are read"
        ) from error
    except Exception as error:  # a damaged file makes torch, safetensors and open_clip raise almost anything
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if "vision_model." in str(error):
            message = (
                "it holds weights of transformers' CLIPModel or SiglipModel; give those in open_clip's format, such as "
                f"the {WEIGHTS_FILE} of the same model on the hub"
            )
        raise WeightsError(f"CLIP {config.model} could not be built from {weights or 'a seed'}: {message}") from error


def _load_folder(folder: Path, config: ClipConfig) -> Clip:
    """Build the towers from a checked folder in open_clip's format."""
    import open_clip

    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, pretrained_text=False, require_pretrained=True)
    model.nsnet_architecture = json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]
    own_tokenizer = model.nsnet_architecture["text_cfg"].get("hf_tokenizer_name")
    closed = {"trust_remote_code": False, "local_files_only": True} if own_tokenizer else {}
    return Clip(model, open_clip.get_tokenizer(name, **closed), config)
