"""Image towers of timm, which have no text tower, such as DINOv3.

Dimensions: B images, M image side in pixels, D features of an image after pooling, without the classifier.

timm takes seconds to import: functions import it where they need it (`nsnet.imports`).
"""

from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from nsnet import imports
from nsnet.clip_weights import timm_settings
from nsnet.configuration import TIMM, ClipConfig
from nsnet.errors import ConfigError, WeightsError
from nsnet.lora import split_attention

VISUAL: Final = "visual."
"""Prefix of the weights in files that this package writes, as in open_clip's; files of timm have none."""


class ImageTower(nn.Module):
    """Takes the place of an open_clip model: its only part is `visual`, normalised (B, 3, M, M) float -> (B, D)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        settings = timm_settings(config)
        name = config.model.removeprefix(TIMM)
        _, height, width = settings.input_size
        if height != width:
            raise ConfigError(f"{config.model} takes images of {width} × {height} px; only square ones are supported")
        tagged = f"{name}.{settings.tag}" if settings.tag else name
        visual = imports.timm().create_model(tagged, pretrained=False, num_classes=0)
        visual.image_size = (height, width)
        visual.preprocess_cfg = {"mean": settings.mean, "std": settings.std}
        self.visual = visual
        self.nsnet_architecture = {
            "embed_dim": int(getattr(visual, "head_hidden_size", visual.num_features)),
            "vision_cfg": {"timm_model_name": name, "image_size": height},
        }
        """Like open_clip's `model_cfg`, without `text_cfg`."""

    def load(self, path: Path) -> None:
        """Load weights in timm's format, or from a file that this package wrote; a classifier is left out.

        Raises an exception of torch, safetensors or open_clip for other or damaged files. Nothing is unpickled.
        """
        state: dict[str, Tensor] = imports.open_clip().factory.load_state_dict(str(path))
        state = {name.removeprefix(VISUAL): tensor for name, tensor in state.items()}
        classifier = self.visual.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
        own = self.visual.state_dict().keys()
        self.visual.load_state_dict(
            {name: tensor for name, tensor in state.items() if name in own or not name.startswith(heads)}
        )


class Facts(NamedTuple):
    """What a recipe needs to know of a tower."""

    image_px: int
    """M."""
    embed_dim: int
    """D."""
    has_attention: bool
    """Whether it has blocks for adapters."""


def facts(config: ClipConfig) -> Facts:
    """Facts of a tower from its name: its modules are made, but without weights and memory for them.

    Raises `ConfigError` for a name or tag that timm does not know.
    """
    with torch.device("meta"):
        tower = ImageTower(config)
    described: dict[str, Any] = tower.nsnet_architecture
    try:
        has_attention = split_attention(cast(nn.Module, tower.visual)) > 0
    except ConfigError:
        has_attention = False
    return Facts(described["vision_cfg"]["image_size"], described["embed_dim"], has_attention)


def build(config: ClipConfig, weights: Path | None) -> ImageTower:
    """The tower with the weights of a file, or random ones; raises as `ImageTower.load` does."""
    tower = ImageTower(config)
    if weights is not None:
        try:
            tower.load(weights)
        except RuntimeError as error:  # of torch: missing, unexpected or other tensors
            if "Error(s) in loading state_dict" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(
                f"{weights} does not hold weights of {config.model} in timm's format, such as its model.safetensors on "
                f"the hub: {reason}"
            ) from error
    return tower
