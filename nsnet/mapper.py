"""The semantic mapper (eq. 14): caption features to the semantic directions that are removed.

Dimensions: B captions, D embedding, h hidden.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from nsnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """Size and dropout of the semantic mapper."""

    hidden_dim: int = 1024
    """Width h of the hidden layer."""
    dropout: float = 0.1
    """Dropout after the hidden activation, in [0, 1). The paper has none, its published code 0.1."""

    def __post_init__(self) -> None:
        if self.hidden_dim < 1 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"need hidden_dim ≥ 1 and 0 ≤ dropout < 1, got {self.hidden_dim} and {self.dropout}")


class SemanticMapper(nn.Module):
    """M(v) = LayerNorm(v + W2 ReLU(W1 v + b1) + b2), (B, D) -> (B, D)."""

    def __init__(self, dim: int, config: MapperConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, config.hidden_dim)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text_features: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.inner(text_features)))
        mapped: Tensor = self.norm(text_features + self.outer(hidden))
        return mapped
