"""Gather rows of all training processes with gradient; implements `Gather` of `nsnet.losses`.

Dimensions: B rows of one process, G rows of all.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nsnet.losses import SINGLE_PROCESS, Gather


class DistributedGather:
    """All-gather over the default process group, in rank order; all processes must pass the same number of rows."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def __call__(self, local: Tensor) -> Tensor:
        return cast(Tensor, _AllGather.apply(local))


class _AllGather(torch.autograd.Function):
    """(B, ...) of every process -> (G, ...). The gradient of a row is the sum of its gradients on all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of each value over all processes; with one process, the values themselves."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def gather() -> Gather:
    """The gather of this process: distributed if there are several processes."""
    return DistributedGather() if dist.is_initialized() and dist.get_world_size() > 1 else SINGLE_PROCESS
