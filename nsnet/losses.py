"""Computes the objective L = γ L_ctr + α L_BCE + β L_align (eq. 18 to 21) + δ L_dec (not in the paper).

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

LEAST_HSIC: Final = 1e-4
"""Lower bound of HSIC₁(K, K), for features whose mean squared length is 1: with few rows the estimate may be ≤ 0. An
isotropic feature of 1000 dimensions has 1e-3."""


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


def decorrelation(
    projected: Tensor, text: Tensor, valid: Tensor | None = None, gather: Gather = SINGLE_PROCESS
) -> Tensor:
    """Linear dependence of ũ[B, D] and the caption features t[B, D] -> scalar: 1 if equal, 0 expected if there is none.

    CKA without bias, HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L)) with the linear kernels K = ũũᵀ and L = t tᵀ over the
    valid rows of all processes, with gradients to ũ. HSIC₁ (Song et al., JMLR 13, 2012) is the estimate without
    bias of ‖Cov(ũ, t)‖²: with 64 images of 768 dimensions the plain one says 0.9 of independent features. So it is
    below 0 in some batches. ũ cannot lower it by its length, by a rotation or by its mean. 0 with fewer than 4 rows,
    and if all captions are equal. Every process returns the same value, which is its mean over processes. Computed in
    at least fp32.
    """
    with torch.autocast(projected.device.type, enabled=False):
        valid = torch.ones(len(projected), dtype=torch.bool, device=projected.device) if valid is None else valid
        rows = gather(valid)
        x, t = (_standardised(gather(_at_least_fp32(value)), rows) for value in (projected, text.detach()))
        others = (rows[:, None] & rows[None, :]).fill_diagonal_(False)
        k, m = (value @ value.T * others for value in (x, t))
        n = rows.sum().to(k.dtype)
        own = _hsic(k, k, n).clamp_min(LEAST_HSIC) * _hsic(m, m, n).clamp_min(LEAST_HSIC)
        return torch.where(n >= 4, _hsic(k, m, n) / own.sqrt(), torch.zeros_like(n))


def _at_least_fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _standardised(features: Tensor, rows: Tensor) -> Tensor:
    """Features (G, D) minus their mean over the rows that count, with a mean squared length of 1; other rows are 0."""
    weights = rows[:, None].to(features.dtype)
    count = weights.sum().clamp_min(1)
    centred = (features - (features * weights).sum(dim=0) / count) * weights
    return centred / (centred.detach().square().sum() / count).sqrt().clamp_min(1e-12)


def _hsic(k: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """HSIC₁ of n rows from kernels k, m (G, G), whose diagonal and other rows are 0; n < 4 gives a finite value."""
    n = n.clamp_min(4)
    trace = (k * m).sum()
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    products = 2 / (n - 2) * (k.sum(dim=0) * m.sum(dim=0)).sum()
    return (trace + sums - products) / (n * (n - 3))


class Losses(NamedTuple):
    """This process's share of each loss, times the number of processes; scalars."""

    total: Tensor
    contrastive: Tensor
    bce: Tensor
    alignment: Tensor
    decorrelation: Tensor
    """0 without a weight or without captions."""


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
    projected: Tensor | None = None,
    text: Tensor | None = None,
) -> Losses:
    """Compute L = γ L_ctr + α L_BCE + β L_align (eq. 21, where γ = 1) + δ L_dec.

    Inputs: f[B, F], logit[B], u[B, D], mapped v[B, D], labels y[B] in {0, 1}; v is None without a mapper, which omits
    the alignment. ũ `projected`[B, D] and caption features `text`[B, D]: for L_dec, which is omitted without them or
    without a weight. `valid`[B] bool: False marks padding; B must be the same on every process.
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
        decorrelated = bce.new_zeros(())
        if config.decorrelation_weight > 0 and projected is not None and text is not None:
            decorrelated = decorrelation(projected, text, valid, gather)
            weighted = weighted + config.decorrelation_weight * decorrelated
        return Losses(weighted, contrastive, bce, aligned, decorrelated)
