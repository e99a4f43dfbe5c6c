"""Defines the projection head and the classifier (eq. 17 and 19).

Dimensions: B images, D embedding, F head feature.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsnet.configuration import HeadConfig


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
