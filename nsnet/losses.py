"""Computes the objective L = γ L_ctr + α L_BCE + β L_align (eq. 18 to 21).

Dimensions: B images of this process, G images of all processes (the global batch), F head feature, D embedding.

Every loss is a mean over the global batch. A process has only its own B rows, so it returns its share times the number
of processes: the mean over processes, which DDP computes for the gradients, is then the global loss.
"""

from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nsnet.configuration import LossConfig

MASKED: Final = -1e9
"""Replaces −∞ in a masked log-sum-exp, where −∞ would give NaN gradients."""


class Gather(Protocol):
    """Collects the rows of all processes."""

    rank: int
    world_size: int

    def __call__(self, local: Tensor) -> Tensor:
        """Concatenate (B, ...) of every process, in rank order -> (G, ...); gradients flow to every process."""
        ...


class SingleProcess:
    """The only process: its batch is the global batch."""

    rank = 0
    world_size = 1

    def __call__(self, local: Tensor) -> Tensor:
        return local


SINGLE_PROCESS: Final = SingleProcess()


def supervised_contrastive(
    f: Tensor, y: Tensor, temperature: float = 0.07, valid: Tensor | None = None, gather: Gather = SINGLE_PROCESS
) -> Tensor:
    """Supervised contrastive loss over f[B, F] (unit length), labels y[B] -> scalar (eq. 18; Khosla, arXiv 2004.11362).

    For anchor i: −1/|P_i| Σ_{p∈P_i} log( exp(f_i·f_p/τ) / Σ_{j≠i} exp(f_i·f_j/τ) ), where P_i are all other rows of its
    label. Returns the mean over anchors with a positive, or 0 if there are none. Positives and negatives come from all
    processes, with gradients. `valid`[B] bool: False marks padding. Computed in at least fp32.
    """
    with torch.autocast(f.device.type, enabled=False):
        f = f if f.dtype == torch.float64 else f.float()
        valid = torch.ones_like(y, dtype=torch.bool) if valid is None else valid
        all_features, labels, all_valid = gather(f), gather(y), gather(valid)
        anchor = gather.rank * len(f) + torch.arange(len(f), device=f.device)
        itself = anchor[:, None] == torch.arange(len(all_features), device=f.device)[None, :]
        similarity = f @ all_features.T / temperature
        others = all_valid[None, :] & ~itself
        log_sum = torch.logsumexp(similarity.masked_fill(~others, MASKED), dim=1)
        positive = others & (y[:, None] == labels[None, :])
        positives = positive.sum(dim=1)
        per_anchor = -((similarity - log_sum[:, None]) * positive).sum(dim=1) / positives.clamp_min(1)
        usable = valid & (positives > 0)
        # Every process has all labels, so it can count the usable anchors without communication.
        same_label = (labels[:, None] == labels[None, :]) & all_valid[None, :]
        total = (all_valid & (same_label.sum(dim=1) > 1)).sum().clamp_min(1)
        return (per_anchor * usable).sum() * gather.world_size / total


def binary_cross_entropy(logit: Tensor, y: Tensor, valid: Tensor, total: Tensor) -> Tensor:
    """Sum of −[y log σ(s) + (1 − y) log(1 − σ(s))] over valid rows of logit[B], divided by total (eq. 19)."""
    losses = functional.binary_cross_entropy_with_logits(logit, y.to(logit.dtype), reduction="none")
    return (losses * valid).sum() / total


def alignment(v: Tensor, u: Tensor, valid: Tensor, total: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Sum of ‖M(v) − u.detach()‖² over valid rows of v, u [B, D], divided by total (eq. 20); `mean`: also by D."""
    squared = (v - u.detach()).square()
    per_row = squared.mean(dim=1) if reduction == "mean" else squared.sum(dim=1)
    return (per_row * valid).sum() / total


class Losses(NamedTuple):
    """This process's share of each loss, times the number of processes; scalars."""

    total: Tensor
    contrastive: Tensor
    bce: Tensor
    alignment: Tensor


def objective(
    f: Tensor,
    logit: Tensor,
    u: Tensor,
    v: Tensor | None,
    y: Tensor,
    config: LossConfig,
    *,
    valid: Tensor | None = None,
    gather: Gather = SINGLE_PROCESS,
) -> Losses:
    """Compute L = γ L_ctr + α L_BCE + β L_align (eq. 21, where γ = 1).

    Inputs: f[B, F], logit[B], u[B, D], mapped v[B, D], labels y[B] in {0, 1}; v is None without a mapper, which omits
    the alignment. `valid`[B] bool: False marks padding; B must be the same on every process.
    """
    with torch.autocast(f.device.type, enabled=False):
        u = u if u.dtype == torch.float64 else u.float()
        logit = logit if logit.dtype == torch.float64 else logit.float()
        valid = torch.ones_like(y, dtype=torch.bool) if valid is None else valid
        total = gather(valid).sum().clamp_min(1).to(u.dtype) / gather.world_size
        contrastive = supervised_contrastive(f, y, config.temperature, valid, gather)
        bce = binary_cross_entropy(logit, y, valid, total)
        aligned = (
            alignment(v.to(u.dtype), u, valid, total, config.alignment_reduction)
            if v is not None
            else bce.new_zeros(())
        )
        weighted = (
            config.contrastive_weight * contrastive
            + config.bce_weight * bce
            + config.alignment_weight * aligned
        )  # fmt: skip
        return Losses(weighted, contrastive, bce, aligned)
