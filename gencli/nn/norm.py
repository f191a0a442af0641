"""Batch normalisation whose statistics are those of the global batch, on any number of processes.

Reference: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift, Ioffe, Szegedy,
2015, arXiv 1502.03167 (algorithm 1; running averages, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli import rng
from gencli.console import UsageError

__all__ = ["BatchNorm"]


class BatchNorm(nn.Module):
    """(x - E[x]) / sqrt(Var[x] + eps) * weight + bias for each of ``features``, of inputs (n, features, ...).

    E and Var are over the global batch and all positions; in evaluation they are the running averages, into which
    each batch goes with weight ``momentum`` (its variance by n - 1, as torch has it). Differentiable to any order on
    the CPU too, where torch's own layer for several processes is not. A layer before it needs no bias: its gradient
    would be zero but for rounding, which Adam blows up.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(n, features, ...) normalised; UsageError where micro-batches of ``train.accumulate`` are too early."""
        s = rng.ambient() if self.training else None
        if s is None or s.stride == 1:
            if s is not None and x.numel() == x.shape[1]:
                raise UsageError("batch norm of one value alone, which has no variance: train.batch_size=2 or more")
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, s is not None, self.momentum, self.eps
            )
        over = [0, *range(2, x.dim())]
        n = x.numel() // x.shape[1] * s.stride
        wide = x.to(torch.promote_types(x.dtype, self.running_mean.dtype))
        mean = s.total(wide.sum(over)) / n
        centred = wide - _along(mean, x)
        var = s.total(centred.square().sum(over)) / n  # about the mean: no digits are lost
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * (n / max(n - 1, 1)), self.momentum)
        y = centred * _along((var + self.eps).rsqrt(), x)
        if self.weight is not None and self.bias is not None:
            y = y * _along(self.weight, x) + _along(self.bias, x)
        return y.to(x.dtype)


def _along(features: Tensor, x: Tensor) -> Tensor:
    return features.view(-1, *[1] * (x.dim() - 2))
