"""Rows of all training processes, with gradient: what `nsnet.losses` asks of a `Gather`."""

import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, cat


class DistributedGather:
    """All-gather over the default process group, in rank order; every process passes the same number of rows.

    Backward sums the gradients that all processes have for a row and hands them to the process that owns it.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def __call__(self, local: Tensor) -> Tensor:
        if local.requires_grad:
            return cat(list(differentiable.all_gather(local)))  # type: ignore[no-untyped-call]
        parts = [local.new_empty(local.shape) for _ in range(self.world_size)]
        dist.all_gather(parts, local.contiguous())
        return cat(parts)
