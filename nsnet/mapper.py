"""Defines the semantic mapper (eq. 14): maps caption features to the semantic directions that are removed.

Dimensions: B captions of this process, G of all processes (the global batch), D embedding, h hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsnet.configuration import MapperConfig


@dataclass(frozen=True, kw_only=True)
class RowsOfBatch:
    """The rows of a global batch that a process has; random choices depend on the row, not on the process."""

    seed: int
    """Seed of the step; any whole number."""
    first: int
    """Index of its first row in the global batch."""
    total: int
    """G, including padding."""


class RowDropout(nn.Module):
    """Dropout over (B, ..., h) whose mask depends on a row's index in the global batch, not on the process.

    The loss of a step therefore depends neither on the number of processes nor on the size of micro-batches. Without
    `rows` it is plain dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.rows: RowsOfBatch | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or self.rows is None:
            return functional.dropout(hidden, self.p, self.training)
        # drawn on the CPU, where the first rows do not depend on the number of rows
        generator = torch.Generator().manual_seed(self.rows.seed % 2**63)
        drawn = torch.rand((self.rows.total, *hidden.shape[1:]), generator=generator)
        kept = drawn[self.rows.first : self.rows.first + len(hidden)] >= self.p
        return hidden * kept.to(hidden.device) / (1.0 - self.p)


class SemanticMapper(nn.Module):
    """M(v) = LayerNorm(v + W2 ReLU(W1 v + b1) + b2), (B, ..., D) -> (B, ..., D).

    Captions of a separate text tower lie in another space, of dimension `text_dim`. A learned W0 v then replaces the
    summand v: (B, ..., text_dim) -> (B, ..., D).
    """

    def __init__(self, dim: int, config: MapperConfig, text_dim: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(text_dim or dim, config.hidden_dim)
        self.activation = nn.ReLU()
        self.dropout = RowDropout(config.dropout)
        self.outer = nn.Linear(config.hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.skip = nn.Linear(text_dim, dim, bias=False) if text_dim is not None else nn.Identity()

    def forward(self, text_features: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.inner(text_features)))
        mapped: Tensor = self.norm(self.skip(text_features) + self.outer(hidden))
        return mapped
