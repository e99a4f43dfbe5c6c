"""Chooses the arithmetic of the towers: fp32, or half of its bits on the matrix units of a GPU.

Under bf16 or fp16, matrix products and convolutions of the towers compute in it (autocast), with sums in fp32. Layer
norms, the projection, mapper and head stay in fp32.
"""

from contextlib import AbstractContextManager
from typing import Any, Final, cast

import numpy.typing as npt
import torch
from torch import nn

from nsnet.configuration import Precision, resolved

DTYPES: Final[dict[str, torch.dtype | None]] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """As `dtype_of`, but `auto` is bf16 on a GPU: its range needs no scaling of the loss."""
    return DTYPES["bf16" if precision == "auto" and device.type == "cuda" else resolved(precision, device.type)]


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast on a device; None: fp32 without autocast."""
    return DTYPES[resolved(precision, device.type)]


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a tower computes on a device; None: fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def use_matrix_units(device: torch.device) -> None:
    """Let fp32 matrix products of a GPU use TF32, which has the range of fp32 and 10 bits of its mantissa.

    The setting is the whole process's, so each model sets it when it is loaded: its results must not depend on which
    other models are there.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def speed_up(tower: nn.Module, precision: Precision, device: torch.device) -> None:
    """Prepare a frozen tower for half precision, in place; fp32 towers stay as they are.

    Weights of matrix products are converted once, instead of by autocast in each call.
    """
    dtype = dtype_of(precision, device)
    if dtype is None:
        return
    _fold_quick_gelu(tower)
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device; a copy to a GPU does not wait for its earlier work."""
    tensor = torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _ScaledSilu(nn.Module):
    """QuickGELU times 1.702, of an input that is scaled by 1.702: one operation instead of three."""

    def forward(self, scaled: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(scaled)


def _fold_quick_gelu(tower: nn.Module) -> None:
    """Move the constants of x · sigmoid(1.702 x) = silu(1.702 x) / 1.702 into the linear layers around it."""
    for block in tower.modules():
        mlp = getattr(block, "mlp", None)
        if mlp is None or type(getattr(mlp, "gelu", None)).__name__ != "QuickGELU":
            continue
        before, after = cast(nn.Linear, mlp.c_fc), cast(nn.Linear, mlp.c_proj)
        before.weight.data *= 1.702
        before.bias.data *= 1.702
        after.weight.data /= 1.702
        mlp.gelu = _ScaledSilu()
