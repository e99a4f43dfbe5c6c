"""Defines the trainable network: image tower, mapper, projection, head.

Dimensions: B images, M mosaic side, D embedding of images, D' of captions (D' = D, unless a separate text tower encodes
them), F head feature, R rank of a global semantic basis, N captions of a bank.
"""

from typing import Any, Final, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from nsnet.clip import Clip
from nsnet.configuration import HeadConfig, MapperConfig, Normalisation, ProjectionConfig
from nsnet.errors import ConfigError, NullSpaceError
from nsnet.head import ProjectionHead
from nsnet.mapper import SemanticMapper
from nsnet.nullspace import project_global, project_per_sample, project_rank_k

BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SAME_CAPTION: Final = 1.0 - 1e-5
"""Smallest cosine at which two captions count as the same."""
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue, in [0, 1], as in torchvision."""
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
"""Their standard deviation."""


class Features(NamedTuple):
    """The network's output for a batch."""

    logit: Tensor
    """(B,) before calibration."""
    features: Tensor
    """f (B, F), unit length."""
    image: Tensor
    """u (B, D), the image tower's feature."""
    semantic: Tensor | None
    """v (B, D), the mapped caption; None without a mapper."""
    projected: Tensor
    """ũ (B, D)."""


class Network(nn.Module):
    """Maps mosaics and caption features to logits. The frozen text tower is not part: its features are an input."""

    def __init__(
        self,
        visual: nn.Module,
        clip: Clip,
        projection: ProjectionConfig,
        mapper: MapperConfig,
        head: HeadConfig,
        normalisation: Normalisation = "clip",
        text_dim: int | None = None,
    ) -> None:
        """`text_dim`: dimension of the captions' features if a separate text tower makes them; None: D."""
        super().__init__()
        if not projection.fitted:
            raise ConfigError(f"the {projection.kind} projection has no basis or bank yet: compute it first")
        dim = clip.embed_dim
        if projection.rank >= dim:
            raise NullSpaceError(
                f"removing {projection.rank} directions leaves nothing of an image feature with {dim} dimensions: "
                f"choose at most {dim - 1}"
            )
        self.projection = projection
        self.visual = visual
        mapped = projection.needs_captions and mapper.hidden_dim > 0
        self.mapper = SemanticMapper(dim, mapper, text_dim) if mapped else None
        self.mapper_detached = mapper.detached
        self.head = ProjectionHead(dim, head)
        basis = torch.eye(dim, projection.rank) if projection.kind == "global" else torch.zeros(dim, 0)
        self.register_buffer("semantic_basis", basis)
        self.register_buffer("caption_bank", torch.zeros(projection.bank, text_dim or dim))
        mean, std = (clip.mean, clip.std) if normalisation == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but keep batch norms of the image tower in evaluation mode.

        Statistics of a batch would differ between processes and are in no checkpoint.
        """
        super().train(mode)
        for module in self.visual.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def forward(self, mosaics: Tensor, text_features: Tensor | None = None) -> Features:
        """Mosaics (B, M, M, 3) uint8 and, where the projection needs captions, their features (B, D') -> `Features`."""
        return self.judge(self.encode_image(mosaics), text_features)

    def encode_image(self, mosaics: Tensor) -> Tensor:
        """Mosaics (B, M, M, 3) uint8 -> the image tower's features u (B, D)."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        pixels = mosaics.permute(0, 3, 1, 2).to(mean.dtype)  # a copy, which is normalised in place
        encoded = self.visual(pixels.div_(255.0).sub_(mean).div_(std))
        return cast(Tensor, encoded[0] if isinstance(encoded, tuple) else encoded)

    def judge(self, image: Tensor, text_features: Tensor | None = None) -> Features:
        """Image features u (B, D) and, where the projection needs captions, their features (B, D') -> `Features`."""
        semantic = None
        if self.projection.needs_captions:
            assert text_features is not None
            directions = self._directions(text_features)
            mapped = self.mapper(directions) if self.mapper is not None else directions
            semantic = mapped[:, 0] if self.mapper is not None else None
            removed = mapped.detach() if self.mapper_detached else mapped
            if self.projection.kind == "per_sample":
                projected = project_per_sample(image, removed[:, 0])
            elif self.projection.kind == "mapped_and_raw":
                projected = project_rank_k(image, torch.cat([removed, directions], dim=1))
            else:
                projected = project_rank_k(image, removed)
        elif self.projection.kind == "global":
            projected = project_global(image, cast(Tensor, self.semantic_basis))
        else:
            projected = image
        features, logit = self.head(projected)
        return Features(logit=logit, features=features, image=image, semantic=semantic, projected=projected)

    def _directions(self, text_features: Tensor) -> Tensor:
        """Caption features (B, D') -> directions to remove, before the mapper: (B, 1, D'); rank_k: (B, k, D')."""
        own = text_features[:, None]
        if self.projection.kind != "rank_k":
            return own
        bank = cast(Tensor, self.caption_bank)
        similarity = normalize(text_features.float(), dim=1) @ normalize(bank.float(), dim=1).T
        # skip the image's own caption, if the bank contains it: it adds nothing
        similarity = similarity.masked_fill(similarity > SAME_CAPTION, -torch.inf)
        nearest = similarity.topk(self.projection.rank - 1, dim=1).indices
        return torch.cat([own, bank[nearest].to(own.dtype)], dim=1)

    def heads_state(self) -> dict[str, Any]:
        """Return all weights except the image tower's and its adapters': mapper, head, semantic basis, bank."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("visual.")}


def residual_energy(features: Features) -> Tensor:
    """‖ũ‖/‖u‖ per image -> (B,). Near 0, the projection has removed everything and the verdict has no meaning."""
    before: Tensor = features.image.detach().float().norm(dim=1)
    after: Tensor = features.projected.detach().float().norm(dim=1)
    return after / before.clamp_min(1e-12)
