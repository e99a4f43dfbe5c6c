"""Removes the semantic part of an image feature by null-space projection (eq. 15 and 16).

Dimensions: B images, D embedding, n captions, R rank of the semantic subspace.

Projections run in at least fp32, also under autocast: in bf16, ũ·v has errors of several percent. No D×D matrix is
formed.
"""

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from nsnet.errors import NullSpaceError

EPSILON: Final = 1e-8
"""Lower bound of ‖v‖² as a divisor (paper, section V-9)."""

DEPENDENT: Final = 1e-5
"""A direction is dependent if its part outside the span of earlier directions is shorter than this share of it."""

BLOCK_ROWS: Final = 8192
"""Captions factorised at a time, which limits the memory for a large block."""


def _at_least_fp32(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to fp32, except fp64, which stays fp64."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def project_per_sample(u: Tensor, v: Tensor, eps: float = EPSILON) -> Tensor:
    """Remove from each row of u (B, D) its component along the same row of v (B, D) -> (B, D), fp32 (fp64 for fp64).

    ũ = u − (u·v) v / max(‖v‖², ε), which is u (I − vᵀv/‖v‖²) of eq. 16 in O(D) per image. v = 0 gives u.
    """
    if u.shape != v.shape or u.ndim != 2:
        raise ValueError(f"u and v must both be (B, D), got {tuple(u.shape)} and {tuple(v.shape)}")
    with torch.autocast(u.device.type, enabled=False):
        u, v = _at_least_fp32(u, v)
        along = (u * v).sum(dim=1, keepdim=True) / v.square().sum(dim=1, keepdim=True).clamp_min(eps)
        return u - along * v


def project_rank_k(u: Tensor, directions: Tensor) -> Tensor:
    """Remove from each row of u (B, D) the span of its own k directions (B, k, D) -> (B, D), fp32 (fp64 for fp64).

    Not in the paper: a small subspace per image (mapped and raw caption, or the nearest caption directions). Uses
    Gram-Schmidt and orthogonalises each direction twice; ignores zero and dependent directions.
    """
    if u.ndim != 2 or directions.ndim != 3 or (directions.shape[0], directions.shape[2]) != tuple(u.shape):
        raise ValueError(f"need u (B, D), directions (B, k, D), got {tuple(u.shape)}, {tuple(directions.shape)}")
    with torch.autocast(u.device.type, enabled=False):
        u, directions = _at_least_fp32(u, directions)
        basis: list[Tensor] = []
        for k in range(directions.shape[1]):
            direction = directions[:, k]
            outside = direction
            for earlier in basis + basis:
                outside = outside - (outside * earlier).sum(dim=1, keepdim=True) * earlier
            squared = outside.square().sum(dim=1, keepdim=True)
            kept = squared > (DEPENDENT**2 * direction.square().sum(dim=1, keepdim=True)).clamp_min(EPSILON**2)
            # the inner `where` keeps the gradient of the square root finite for ignored directions
            length = torch.where(kept, squared, torch.ones_like(squared)).sqrt()
            basis.append(torch.where(kept, outside / length, torch.zeros_like(outside)))
        for unit in basis:
            u = u - (u * unit).sum(dim=1, keepdim=True) * unit
        return u


def project_global(u: Tensor, semantic_basis: Tensor) -> Tensor:
    """Remove from u (B, D) the span of the orthonormal columns of W (D, R) -> (B, D), fp32 (fp64 for fp64).

    ũ = u P with P = I − W Wᵀ (eq. 15 and G), computed as u − (u W) Wᵀ.
    """
    if u.ndim != 2 or semantic_basis.ndim != 2 or u.shape[1] != semantic_basis.shape[0]:
        raise ValueError(f"need u (B, D), W (D, R), got {tuple(u.shape)} and {tuple(semantic_basis.shape)}")
    with torch.autocast(u.device.type, enabled=False):
        u, semantic_basis = _at_least_fp32(u, semantic_basis)
        return u - (u @ semantic_basis) @ semantic_basis.T


@dataclass(frozen=True, kw_only=True)
class SemanticSpectrum:
    """Singular values and right singular vectors of all captions, from which `basis` chooses."""

    singular_values: Tensor
    """(min(n, D),) fp64, descending."""
    directions: Tensor
    """(min(n, D), D) fp64, orthonormal rows, in the order of the values."""

    def basis(self, *, rank: int | None = None, tau: float | None = None, energy: float | None = None) -> Tensor:
        """Return the semantic basis W (D, R) fp64, orthonormal columns, by exactly one rule, as in `BasisRule`.

        Raises `NullSpaceError` if the basis would leave nothing of the image feature.
        """
        if sum(rule is not None for rule in (rank, tau, energy)) != 1:
            raise ValueError("choose exactly one of rank, tau and energy")
        values = self.singular_values
        largest = float(values[0]) if len(values) else 0.0
        present = int((values > largest * values.new_tensor(1e-12)).sum()) if largest > 0 else 0
        if tau is not None:
            rank = int((values > largest * tau).sum()) if largest > 0 else 0
        elif energy is not None:
            if not 0.0 < energy <= 1.0:
                raise ValueError(f"energy must be in (0, 1], got {energy}")
            share = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
            rank = min(int((share < energy - 1e-12).sum()) + 1, present)
        assert rank is not None
        dim = self.directions.shape[1]
        if not 1 <= rank <= present or rank >= dim:
            raise NullSpaceError(
                f"a semantic basis of rank {rank} is not possible: the captions span {present} of {dim} dimensions, "
                f"which allows ranks 1 to {min(present, dim - 1)} (a full-rank basis leaves no null space): set the "
                "rank, or choose it by energy < 1"
            )
        return self.directions[:rank].T.contiguous()


class StreamingSVD:
    """Computes singular values and right singular vectors of any number of captions in D×D memory; shards can merge.

    Stores only the triangular factor R of V = Q R: VᵀV = RᵀR, so R has the same values and vectors (QR-merge).
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.triangle = torch.zeros(0, dim, dtype=torch.float64)
        """R (≤ D, D) fp64, the only stored data of the captions."""

    @classmethod
    def from_triangle(cls, triangle: Tensor, count: int) -> Self:
        """Rebuild the state of a shard from its `triangle` and `count`."""
        svd = cls(triangle.shape[1])
        svd.triangle, svd.count = triangle.to("cpu", torch.float64), count
        return svd

    def update(self, captions: Tensor) -> Self:
        """Add a block of caption features (n, D), any floating dtype."""
        if captions.ndim != 2 or captions.shape[1] != self.dim:
            raise ValueError(f"captions must be (n, {self.dim}), got {tuple(captions.shape)}")
        for block in torch.split(captions.detach(), BLOCK_ROWS):
            stacked = torch.cat([self.triangle, block.to("cpu", torch.float64)])
            self.triangle = torch.linalg.qr(stacked, mode="r").R
        self.count += len(captions)
        return self

    def merge(self, other: Self) -> Self:
        """Add all captions of another shard."""
        count = self.count + other.count
        self.update(other.triangle)
        self.count = count
        return self

    def spectrum(self) -> SemanticSpectrum:
        """Compute the spectrum of all captions added so far."""
        _, values, directions = torch.linalg.svd(self.triangle, full_matrices=False)
        return SemanticSpectrum(singular_values=values, directions=directions)
