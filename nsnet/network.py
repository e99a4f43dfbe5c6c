"""The trainable network: image tower, mapper, projection, head.

Dimensions: B images, M mosaic side, D embedding, F head feature, R rank of a global semantic basis.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from nsnet.clip import Clip
from nsnet.errors import ConfigError
from nsnet.head import HeadConfig, ProjectionHead
from nsnet.mapper import MapperConfig, SemanticMapper
from nsnet.nullspace import project_global, project_per_sample


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """What is removed from the image feature."""

    kind: Literal["per_sample", "global", "none"] = "per_sample"
    """`per_sample`: the mapped caption (eq. 16); `global`: a basis of many captions (eq. 15); `none`: nothing."""
    rank: int = 0
    """R of the global basis."""

    def __post_init__(self) -> None:
        if self.kind not in ("per_sample", "global", "none") or (self.kind == "global") != (self.rank > 0):
            raise ConfigError(f"a global projection needs a rank ≥ 1, any other rank 0; got {self.kind}, {self.rank}")


class Features(NamedTuple):
    """What the network computes for a batch."""

    logit: Tensor
    """(B,) before calibration."""
    features: Tensor
    """f (B, F), unit length."""
    image: Tensor
    """u (B, D), the image tower's feature."""
    semantic: Tensor | None
    """v (B, D), the mapped caption; None without per-sample projection."""
    projected: Tensor
    """ũ (B, D)."""


class Network(nn.Module):
    """Mosaics and caption features to logits. The frozen text tower is not part of it: its features are input."""

    def __init__(
        self,
        visual: nn.Module,
        clip: Clip,
        projection: ProjectionConfig,
        mapper: MapperConfig,
        head: HeadConfig,
    ) -> None:
        super().__init__()
        dim = clip.embed_dim
        self.projection = projection
        self.visual = visual
        self.mapper = SemanticMapper(dim, mapper) if projection.kind == "per_sample" else None
        self.head = ProjectionHead(dim, head)
        basis = torch.eye(dim, projection.rank) if projection.kind == "global" else torch.zeros(dim, 0)
        self.register_buffer("semantic_basis", basis)
        self.register_buffer("mean", torch.tensor(clip.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(clip.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, mosaics: Tensor, text_features: Tensor) -> Features:
        """Mosaics (B, M, M, 3) uint8 and text features (B, D) -> `Features`."""
        pixels = mosaics.permute(0, 3, 1, 2).float() / 255.0
        encoded = self.visual((pixels - cast(Tensor, self.mean)) / cast(Tensor, self.std))
        image = encoded[0] if isinstance(encoded, tuple) else encoded
        semantic = None
        if self.mapper is not None:
            semantic = self.mapper(text_features)
            projected = project_per_sample(image, semantic)
        elif self.projection.kind == "global":
            projected = project_global(image, cast(Tensor, self.semantic_basis))
        else:
            projected = image
        features, logit = self.head(projected)
        return Features(logit=logit, features=features, image=image, semantic=semantic, projected=projected)

    def heads_state(self) -> dict[str, Any]:
        """The weights that are neither the image tower's nor its adapters': mapper, head, semantic basis."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("visual.")}


def residual_energy(features: Features) -> Tensor:
    """‖ũ‖/‖u‖ per image -> (B,). Near 0 the projection has removed everything and the verdict means nothing."""
    before: Tensor = features.image.detach().float().norm(dim=1)
    after: Tensor = features.projected.detach().float().norm(dim=1)
    return after / before.clamp_min(1e-12)
