"""Builds, loads and saves CLIP towers from open_clip, and image towers without text (`timm_towers`).

Dimensions: B images or texts, M image side in pixels, D embedding.

open_clip takes seconds to import: functions import it where they need it (`nsnet.imports`).
"""

import json
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nsnet import imports, model_files, timm_towers, weight_formats
from nsnet.clip_weights import CONFIG_FILE, WEIGHTS_FILE
from nsnet.configuration import TIMM, ClipConfig, Precision
from nsnet.digest import weights_digest
from nsnet.errors import ConfigError, NsnetError, WeightsError
from nsnet.model_size import ModelSize
from nsnet.precision import autocast, dtype_of

if TYPE_CHECKING:
    pass


TEXT_LENGTHS: Final = (16, 32)
"""Numbers of tokens to which captions are padded, if they are shorter than the context. Few, because each is a shape of
its own; most captions of BLIP have fewer than 16 tokens."""


class Clip:
    """An open_clip model with its tokenizer, input size, normalisation and embedding size.

    An image tower of timm has neither text tower nor tokenizer (None): captions raise `ConfigError`.
    """

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
        if self.tokenizer is None:
            raise ConfigError(f"{self.config.model} has no text tower: choose a detector that needs no captions")
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


def describe_folder(config: ClipConfig) -> dict[str, Any]:
    """The `open_clip_config.json` of a folder in open_clip's format with the published weights of a model."""
    architecture = config.architecture or imports.open_clip().get_model_config(config.model)
    return {"model_cfg": architecture, "preprocess_cfg": _normalisation(config)}


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
                    return _load_folder(folder, config, origin=weights)
            if not config.has_text:
                return Clip(timm_towers.build(config, weights), None, config)
            preprocess = _normalisation(config)
            if config.architecture is not None:
                parts = dict(config.architecture)
                kind = open_clip.CustomTextCLIP if parts.pop("custom_text", False) else open_clip.CLIP
                model = kind(**parts)
                open_clip.set_model_preprocess_cfg(model, preprocess)
                if weights is not None:
                    open_clip.load_checkpoint(model, str(weights))
                context = config.architecture.get("text_cfg", {}).get("context_length")
                return Clip(model, open_clip.get_tokenizer("ViT-B-32", context_length=context), config)
            model = open_clip.create_model(
                config.model,
                pretrained=str(weights) if weights else None,
                require_pretrained=weights is not None,
                force_preprocess_cfg=preprocess,
            )
        return Clip(model, open_clip.get_tokenizer(config.model), config)
    except NsnetError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"cannot build {config.model} from {weights}: the file is damaged or holds other objects than "
            "tensors, which are refused for safety"
        ) from error
    except Exception as error:  # for a damaged file torch, safetensors and open_clip raise many kinds of exceptions
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if "vision_model." in str(error):
            message = (
                "it holds weights of transformers' CLIPModel or SiglipModel; give weights in open_clip's format, such "
                f"as the {WEIGHTS_FILE} of the same model on the hub"
            )
        raise WeightsError(f"cannot build {config.model} from {weights or 'a seed'}: {message}") from error


def _normalisation(config: ClipConfig) -> dict[str, Any]:
    """Mean and standard deviation of the images that the weights of a model were trained on (SigLIP, PE: 0.5).

    Neither a file of weights nor an architecture contains them; the tag of the weights determines them. Random weights
    take those of the model's first tag.
    """
    open_clip = imports.open_clip()
    tag = config.pretrained or next(iter(open_clip.list_pretrained_tags_by_model(config.model)), None)
    named = open_clip.get_pretrained_cfg(config.model, tag) if tag else {}
    return {
        "mean": named.get("mean", open_clip.OPENAI_DATASET_MEAN),
        "std": named.get("std", open_clip.OPENAI_DATASET_STD),
    }


def _load_folder(folder: Path, config: ClipConfig, origin: Path) -> Clip:
    """Build the towers from a checked folder in open_clip's format; `origin` is named in errors."""
    open_clip = imports.open_clip()
    described = json.loads((folder / CONFIG_FILE).read_text())
    model_cfg = described["model_cfg"]
    if not config.has_text:
        name = model_cfg["vision_cfg"].get("timm_model_name")
        if "text_cfg" in model_cfg or config.model != f"{TIMM}{name}":
            raise WeightsError(
                f"{origin} holds weights of {name or 'another model'}, not of {config.model}: give its folder"
            )
        tower = timm_towers.build(config, folder / WEIGHTS_FILE)
        open_clip.set_model_preprocess_cfg(tower, described["preprocess_cfg"])
        return Clip(tower, None, config)
    if "text_cfg" not in model_cfg:
        raise WeightsError(f"{origin} holds an image tower without text, not {config.model}: give its folder")
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, pretrained_text=False, require_pretrained=True)
    model.nsnet_architecture = model_cfg
    own_tokenizer = model.nsnet_architecture["text_cfg"].get("hf_tokenizer_name")
    restrictions = {"trust_remote_code": False, "local_files_only": True} if own_tokenizer else {}
    return Clip(model, open_clip.get_tokenizer(name, **restrictions), config)
