"""Implements training in one process: parameter groups, schedule, optimisation step.

Dimensions: B images of this process, G of all processes, M mosaic side, D embedding.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsnet.configuration import LossConfig, TrainingConfig
from nsnet.errors import ConfigError
from nsnet.losses import SINGLE_PROCESS, Gather, Losses, objective
from nsnet.mapper import RowDropout, RowsOfBatch
from nsnet.network import Features, Network, residual_energy
from nsnet.precision import autocast, training_dtype


class Batch(NamedTuple):
    """The rows of a step in one process."""

    mosaics: Tensor
    """(B, M, M, 3) uint8."""
    text_features: Tensor | None
    """(B, D) fp32; None if the network needs no captions."""
    labels: Tensor
    """(B,) int64: real = 0, fake = 1."""
    valid: Tensor
    """(B,) bool: False marks padding."""


def use_activation_checkpointing(network: Network) -> None:
    """Make the image tower recompute activations in the backward pass. Raises `ConfigError` if it cannot."""
    set_grad_checkpointing = getattr(network.visual, "set_grad_checkpointing", None)
    if set_grad_checkpointing is not None:
        set_grad_checkpointing(True)
    # open_clip's ResNets and some of timm's towers accept the call and ignore it
    if not any(getattr(module, "grad_checkpointing", False) for module in network.visual.modules()):
        raise ConfigError(
            f"{type(network.visual).__name__} does not support activation checkpointing: set "
            "activation_checkpointing=false"
        )


def build_optimizer(network: Network, config: TrainingConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters: separate rates for image tower and heads, decay on matrices only."""
    groups: list[dict[str, Any]] = []
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
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, total_steps: int) -> None:
    """Set the rate for a step, counted from 0: linear warm-up, then the configured schedule."""
    warmup_steps = max(1, round(config.warmup * total_steps))
    if step < warmup_steps:
        factor = (step + 1) / warmup_steps
    elif config.schedule == "constant":
        factor = 1.0
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
    seed: int = 0,
) -> tuple[Losses, Tensor]:
    """Forward, objective, backward, step. Returns the detached losses and the sum of ‖ũ‖/‖u‖ over valid rows.

    If the gradient is not finite, the weights stay unchanged and the returned total loss is NaN, so that the caller can
    report this batch. `seed`: seed of the step's dropout, the same on every process.
    """
    optimizer.zero_grad(set_to_none=True)
    size = len(batch.labels)
    micro_batch = config.micro_batch or size
    parts = [slice(start, min(start + micro_batch, size)) for start in range(0, size, micro_batch)]

    def forward(part: slice) -> Features:
        return _forward(model, batch, part, config, RowsOfBatch(seed=seed, first=gather.rank * size + part.start,
                                                                total=gather.world_size * size))  # fmt: skip

    def judge(out: Features) -> Losses:
        return objective(
            out.features, out.logit, out.image, out.semantic, batch.labels, loss, valid=batch.valid, gather=gather,
            projected=out.projected, text=batch.text_features,
        )  # fmt: skip

    if len(parts) == 1:
        out = forward(parts[0])
        losses = judge(out)
        losses.total.backward()  # type: ignore[no-untyped-call]
    else:
        out, losses = _in_parts(model, parts, forward, judge)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    _step_if_finite(optimizer, norm)
    losses = losses._replace(total=torch.where(torch.isfinite(norm), losses.total, torch.nan))
    energy = (residual_energy(out) * batch.valid).sum()
    return Losses(*(value.detach() for value in losses)), energy


def _step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Step unless the gradient's norm, which is the same on every process, is not finite."""
    if optimizer.defaults.get("fused"):  # its kernel reads this tensor, so that nothing waits for the GPU
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()


def _forward(model: nn.Module, batch: Batch, part: slice, config: TrainingConfig, rows: RowsOfBatch) -> Features:
    """Apply the network to a part of a process's rows, with random choices that depend on the rows."""
    for module in model.modules():
        if isinstance(module, RowDropout):
            module.rows = rows
    device = batch.mosaics.device
    text_features = batch.text_features[part] if batch.text_features is not None else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the caller's state stays
        torch.manual_seed((rows.seed * 1_000_003 + rows.first) % 2**63)  # for dropout in the adapters
        with autocast(training_dtype(config.precision, device), device):
            features: Features = model(batch.mosaics[part], text_features)
    return features


def _in_parts(model: nn.Module, parts: list[slice], forward: Any, judge: Any) -> tuple[Features, Losses]:
    """Compute the gradients of the whole batch while storing the activations of one part at a time.

    First computes all features without storing activations, and the objective's gradients with respect to them; then
    runs each part again and backpropagates these gradients from its features.
    """
    with torch.no_grad():
        outputs = [forward(part) for part in parts]
    joined: list[Any] = [
        torch.cat(tensors) if tensors[0] is not None else None for tensors in zip(*outputs, strict=True)
    ]
    whole = Features(*joined)
    detached: list[Any] = [value.detach().requires_grad_() if value is not None else None for value in whole]
    leaves = Features(*detached)
    losses = judge(leaves)
    losses.total.backward()
    for i, part in enumerate(parts):
        no_sync = getattr(model, "no_sync", contextlib.nullcontext) if i < len(parts) - 1 else contextlib.nullcontext
        with no_sync():
            pairs = [
                (value, leaf.grad[part])
                for value, leaf in zip(forward(part), leaves, strict=True)
                if leaf is not None and leaf.grad is not None and value.requires_grad
            ]
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
    return whole, losses
