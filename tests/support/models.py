"""Small real models and images, shared by the tests of CLIP, captions, bundle and detector."""

import io
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nsnet.calibration import Calibration
from nsnet.configuration import CaptionerConfig, ClipConfig, DetectorConfig, HeadConfig, LoraSettings, MapperConfig
from nsnet.detector import Detector
from nsnet.patches import PatchConfig

# open_clip reads 49,000 merges of its tokenizer for each model: 0.17 s, and a tenth of the time of all unit tests.
open_clip.factory.SimpleTokenizer = lru_cache(open_clip.SimpleTokenizer)

SIDE_PX = 64

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE_PX, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

FROZEN = DetectorConfig(
    clip=ClipConfig(model="small", pretrained=None, architecture=ARCHITECTURE),
    captioner=CaptionerConfig(model=None, max_new_tokens=6),
    patches=PatchConfig(patch_px=32, mosaic_px=SIDE_PX),
    lora=LoraSettings(rank=3, alpha=6.0),
    mapper=MapperConfig(hidden_dim=48),
    head=HeadConfig(hidden_dim=40, feature_dim=24),
)
"""A frozen backbone with adapters, as the paper trains it, in the smallest size."""

NAMED = replace(FROZEN, clip=replace(FROZEN.clip, model="ViT-B-32-quickgelu", pretrained="openai"))
"""The same, but with weights that have a name: a bundle refers to them instead of holding them."""


@register_model
def siglip_for_tests(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """timm's SigLIP architecture (no class token, attention pooling), two blocks deep."""
    del pretrained
    own = {key: value for key, value in settings.items() if key in ("num_classes", "global_pool")}
    return VisionTransformer(
        img_size=224, patch_size=32, embed_dim=48, depth=2, num_heads=3, class_token=False, init_values=0.5, **own
    )


def siglip() -> nn.Module:
    """A small SigLIP-like model: open_clip's wrapper around a timm tower."""
    vision = {"image_size": 224, "timm_model_name": "siglip_for_tests", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CustomTextCLIP(embed_dim=48, vision_cfg=vision, text_cfg=text)


def randomise(module: nn.Module, seed: int, only: str = "", std: float = 0.1) -> None:
    """Add noise to the parameters whose name contains `only`: biases and adapters start at zero, and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def as_if_trained(config: DetectorConfig = FROZEN, seed: int = 0, clip_weights: Path | None = None) -> Detector:
    """A detector whose adapters, mapper and head have all left their starting values, ready to score."""
    detector = Detector.build(config, clip_weights, seed=seed)
    randomise(detector.network, seed, only="lora_")
    randomise(detector.network, seed, only="mapper.")
    randomise(detector.network, seed, only="head.", std=0.3)
    detector.set_calibration(Calibration(temperature=0.5, threshold=0.4, fitted_on=10))
    detector.network.eval()
    return detector


def image(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """An image of its own for every seed: smooth below, noise on top."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    noise = rng.normal(0, 12, (height, width, 3)) * (np.arange(height)[:, None, None] < height // 2)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def file_bytes(image: Image.Image, format: str = "PNG") -> bytes:
    """An image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def mosaics(count: int, side_px: int = SIDE_PX, seed: int = 0) -> NDArray[np.uint8]:
    """Random mosaics (count, M, M, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8)


def huggingface_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP under the names of Hugging Face's `CLIPModel`."""
    flat = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }
    in_block = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in flat:
            converted[flat[name]] = tensor
        elif name in ("text_projection", "visual.proj"):
            converted["text_projection.weight" if name == "text_projection" else "visual_projection.weight"] = tensor.T
        else:
            tower, _, rest = name.partition("transformer.resblocks.")
            number, _, part = rest.partition(".")
            block = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{block}.self_attn.{letter}_proj.{kind}"] = third
            else:
                module, _, kind = part.rpartition(".")
                converted[f"{block}.{in_block[module]}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def huggingface_clip_config(architecture: Mapping[str, Any]) -> Any:
    """Hugging Face's configuration of an open_clip architecture with quick GELU."""
    from transformers import CLIPConfig

    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    return CLIPConfig(
        projection_dim=architecture["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "quick_gelu",
            "projection_dim": architecture["embed_dim"],
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "hidden_act": "quick_gelu",
            "projection_dim": architecture["embed_dim"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
    )


def close(a: Tensor, b: Tensor) -> None:
    """Assert that two tensors are equal but for rounding."""
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def pixels(tower: nn.Module, count: int = 3) -> Tensor:
    """Random normalised images of an image tower's size."""
    return torch.randn((count, 3, *tower.image_size), generator=torch.Generator().manual_seed(0))  # type: ignore[misc]


@torch.no_grad()
def features(tower: nn.Module, images: Tensor) -> Tensor:
    """Features of an image tower, in evaluation."""
    encoded = tower.eval()(images)
    return encoded[0] if isinstance(encoded, tuple) else encoded


def cosine(a: Tensor, b: Tensor) -> float:
    """Smallest cosine between rows of a[B, D] and b[B, D]."""
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=1).min())


def one_line(error: BaseException) -> str:
    """The message of an error, which must be one line that says something."""
    message = str(error)
    assert message and "\n" not in message and len(message) < 800, message
    return message


def closed_address() -> str:
    """A local address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def hub_at(address: str, cache: Path) -> Iterator[None]:
    """Let the Hugging Face client talk to another address, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()
