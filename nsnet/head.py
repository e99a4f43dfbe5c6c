"""Defines the projection head and the classifier (eq. 17 and 19).

Dimensions: B images, D embedding, F head feature.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Kind and sizes of the projection head."""

    kind: Literal["mlp", "linear"] = "mlp"
    """`mlp`: the paper's. `linear`: the logit directly from ũ, UniversalFakeDetect's probe (arXiv 2302.10174)."""
    hidden_dim: int = 768
    """Width of the hidden layer."""
    feature_dim: int = 512
    """Dimension d_f of the unit-length feature f."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "linear"):
            raise ConfigError(f"the head's kind must be 'mlp' or 'linear', got {self.kind!r}")
        if self.hidden_dim < 1 or self.feature_dim < 1:
            raise ConfigError(f"head sizes must be positive, got {self.hidden_dim} and {self.feature_dim}")


class ProjectionHead(nn.Module):
    """f = H(ũ)/‖H(ũ)‖ with a two-layer H, then logit = w·f + b: (B, D) -> f (B, F) unit length, logit (B,).

    The logit is computed from the unit-length f (eq. 19); the published code uses the un-normalised feature.
    A linear head has no H: logit = w·ũ + b, and f = ũ/‖ũ‖ is (B, D).
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        if config.kind == "linear":
            self.layers = nn.Sequential()
            self.classifier = nn.Linear(dim, 1)
            return
        self.layers = nn.Sequential(
            nn.Linear(dim, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, config.feature_dim)
        )
        self.classifier = nn.Linear(config.feature_dim, 1)

    def forward(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(projected)
        # compute the length in at least fp32, also under autocast
        features = functional.normalize(hidden if hidden.dtype == torch.float64 else hidden.float(), dim=1)
        logit: Tensor = self.classifier(features if len(self.layers) else projected).squeeze(1)
        return features, logit
