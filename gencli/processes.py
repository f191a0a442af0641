"""What the processes of one job do together; with one process everything here is the identity.

Process ``r`` of ``w`` holds rows ``r::w`` of the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "rank", "total", "world"]


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes."""
    return _Sum.apply(x) if world() > 1 else x


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in global order."""
    if world() == 1:
        return x
    z = x.new_zeros(x.shape[0] * world(), *x.shape[1:])
    z[rank() :: world()] = x
    return total(z)
