"""Towers of open_clip and timm with their real modules, but few and narrow blocks, and random weights."""

from typing import Any, Final

import open_clip
from timm.models import convnext, eva, generate_default_cfgs, register_model, vision_transformer
from torch import nn

from nsnet.configuration import ClipConfig

SIDE_PX: Final = 64

_VIT: Final = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": SIDE_PX}
REDUCED: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "pe_core_reduced": (eva.vit_pe_core_base_patch16_224, _VIT),
    "siglip2_reduced": (vision_transformer.vit_base_patch32_siglip_256, _VIT),
    "dinov3_reduced": (eva.vit_small_patch16_dinov3, _VIT),
    "dinov3_biases_reduced": (eva.vit_small_patch16_dinov3_qkvb, _VIT),
    "eva02_reduced": (eva.eva02_base_patch16_clip_224, _VIT),
    "convnext_reduced": (convnext.convnext_tiny, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 48)}),
}
"""timm's name here -> timm's function, and settings that reduce its model."""

default_cfgs = generate_default_cfgs(
    {
        f"{name}.none": {
            "input_size": (3, SIDE_PX, SIDE_PX), "mean": (0.4, 0.3, 0.2), "std": (0.3, 0.2, 0.1), "classifier": "head",
            "hf_hub_id": "nobody/",
        }
        for name in REDUCED
    }
)  # fmt: skip
"""timm looks for the settings of registered models under this name."""


def _register(name: str, make: Any, reduction: dict[str, Any]) -> None:
    def entry(pretrained: bool = False, **settings: Any) -> nn.Module:
        own = {key: value for key, value in settings.items() if key in ("num_classes", "global_pool")}
        model: nn.Module = make(pretrained=pretrained, **reduction, **own)
        return model

    entry.__name__ = name
    register_model(entry)


for _name, (_make, _reduction) in REDUCED.items():
    _register(_name, _make, _reduction)


def _open_clip(name: str, vision: dict[str, Any], **text: Any) -> ClipConfig:
    """A model of open_clip whose towers are narrow and shallow."""
    config = open_clip.get_model_config(name)
    sizes = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}  # of open_clip's own tokenizer
    tower, captions = {**config["vision_cfg"], **vision}, {**config["text_cfg"], **sizes, **text}
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):  # the hub is out of reach
        captions.pop(key, None)
    architecture = {**config, "embed_dim": 48, "vision_cfg": tower, "text_cfg": captions}
    return ClipConfig(model=name, pretrained=None, architecture=architecture)


CLIPS: Final = {
    "PE-Core-B-16": _open_clip("PE-Core-B-16", {"timm_model_name": "pe_core_reduced", "image_size": SIDE_PX}),
    "ViT-B-32-SigLIP2-256": _open_clip(
        "ViT-B-32-SigLIP2-256", {"timm_model_name": "siglip2_reduced", "image_size": SIDE_PX}
    ),
    "ViT-H-14-worldwide": _open_clip(  # MetaCLIP2; its caption ends with another token than open_clip's tokenizer has
        "ViT-H-14-worldwide",
        {"image_size": SIDE_PX, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
        eos_id=49407,
    ),
}  # fmt: skip
"""open_clip's name -> the reduced model; their captions are tokenised as OpenAI's."""


def timm_clip(name: str, seed: int = 0) -> ClipConfig:
    """The settings of a reduced tower of timm with random weights."""
    return ClipConfig(model=f"timm/{name}", pretrained=None, seed=seed)
