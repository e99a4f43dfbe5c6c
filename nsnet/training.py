"""One process's part of training: parameter groups, schedule, optimisation step.

Dimensions: B images of this process, M mosaic side, D embedding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsnet.errors import ConfigError
from nsnet.losses import SINGLE_PROCESS, Gather, LossConfig, Losses, objective
from nsnet.network import Features, Network, residual_energy


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a detector is trained."""

    epochs: int = 2
    """Passes over the training pictures."""
    batch_size: int = 64
    """Images per optimisation step, over all processes: they are each other's positives and negatives."""
    head_lr: float = 2e-4
    """Highest learning rate of mapper and head."""
    backbone_lr: float = 1e-4
    """Highest learning rate of the adapters, and of the image tower where it is trained."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    warmup: float = 0.05
    """Share of the steps in which the rates rise; then they fall as a cosine to 0."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 on a GPU, fp32 on a CPU."""
    validation_share: float = 0.15
    """Share of a pool without a split that is kept for validation, in (0, 1)."""
    patience: int = 0
    """Epochs without a better validation AP after which training stops; 0: never early."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(f"need epochs ≥ 1 and batch_size ≥ 2, got {self.epochs} and {self.batch_size}")
        if not (self.head_lr > 0 and self.backbone_lr > 0 and self.weight_decay >= 0 and self.clip_norm > 0):
            raise ConfigError("learning rates and clip_norm must be positive, weight_decay at least 0")
        if not 0.0 <= self.warmup < 1.0 or not 0.0 < self.validation_share < 1.0:
            raise ConfigError(
                f"need 0 ≤ warmup < 1, 0 < validation_share < 1, got {self.warmup}, {self.validation_share}"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype of autocast on a device; None: fp32 throughout."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else None


class Batch(NamedTuple):
    """One process's rows of a step."""

    mosaics: Tensor
    """(B, M, M, 3) uint8."""
    text_features: Tensor
    """(B, D) fp32."""
    labels: Tensor
    """(B,) int64: real = 0, fake = 1."""
    valid: Tensor
    """(B,) bool: False marks padding."""


def build_optimizer(network: Network, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: separate rates for image tower and heads, decay on matrices only."""
    groups = []
    for is_backbone, lr in ((True, config.backbone_lr), (False, config.head_lr)):
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            members = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad
                and name.startswith("visual.") == is_backbone
                and (parameter.ndim > 1) == is_matrix
            ]
            if members:
                groups.append({"params": members, "lr": lr, "max_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, total_steps: int) -> None:
    """Linear warm-up, then a cosine to 0; `step` counts from 0."""
    warmup_steps = max(1, round(config.warmup * total_steps))
    if step < warmup_steps:
        factor = (step + 1) / warmup_steps
    else:
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        factor = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor


def training_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    loss: LossConfig,
    config: TrainingConfig,
    gather: Gather = SINGLE_PROCESS,
) -> tuple[Losses, float]:
    """Forward, objective, backward, step. Returns the losses, detached, and the mean residual energy ‖ũ‖/‖u‖."""
    dtype = config.autocast_dtype(batch.mosaics.device)
    with torch.autocast(batch.mosaics.device.type, dtype=dtype, enabled=dtype is not None):
        out: Features = model(batch.mosaics, batch.text_features)
    losses = objective(
        out.features, out.logit, out.image, out.semantic, batch.labels, loss, valid=batch.valid, gather=gather
    )
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    optimizer.step()
    # a process whose rows are all padding has no mean: 0, not NaN
    energy = (residual_energy(out) * batch.valid).sum() / batch.valid.sum().clamp_min(1)
    return Losses(*(value.detach() for value in losses)), float(energy)
