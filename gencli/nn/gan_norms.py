"""Normalisations that a generator may have: by the batch, by class, by a reference batch.

References:
    Improved Techniques for Training GANs, Salimans et al., 2016, arXiv 1606.03498 (virtual batch norm, section 3.5)
    A Learned Representation For Artistic Style, Dumoulin, Shlens, Kudlur, 2016, arXiv 1610.07629 (by class, eq. 5)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gencli.nn.norm import BatchNorm

__all__ = ["ConditionalBatchNorm", "LayerNorm", "Norm", "Stack", "VirtualBatchNorm", "batch_norms", "normalisation"]

Norm = Literal["batch", "virtual", "layer", "none"]


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift are those of each example's class: (n, features, ...), labels (n,)."""

    takes_labels = True

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm(features, affine=False)
        self.weight = nn.Parameter(torch.ones(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes, features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        extra = [1] * (x.dim() - 2)
        weight, bias = (p[labels].view(*p[labels].shape, *extra) for p in (self.weight, self.bias))
        return self.norm(x) * weight + bias


class VirtualBatchNorm(nn.Module):
    """The first ``reference`` rows of the input, a fixed batch, are normalised by their own statistics.

    Every other row x^i is by those of the reference batch and of itself, as one of R + 1 examples:

        mean_i = E[x^i] / (R + 1) + R E[ref] / (R + 1),  and so the mean of squares

    with E over positions, and over the rows of ref.

    So an example depends on no other of its batch. Inputs (R + n, features, ...); as for batch norm, a layer before it
    needs no bias.
    """

    def __init__(self, features: int, reference: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.reference, self.eps = reference, eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        R = self.reference
        y = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2) if x.dim() > 2 else x[:, :, None]
        ref, own = y[:R], y[R:]
        m, centred = ref.mean((0, 2)), ref - ref.mean((0, 2))[:, None]
        v = centred.square().mean((0, 2))
        # about the reference's mean, so that no digits are lost: E[x^2] - E[x]^2 of both together
        d = own.mean(2) - m
        mean = m + d / (R + 1)
        var = ((own - m[:, None]).square().mean(2) + R * v) / (R + 1) - (d / (R + 1)).square()
        ref = centred * (v + self.eps).rsqrt()[:, None]
        own = (own - mean[:, :, None]) * (var + self.eps).rsqrt()[:, :, None]
        z = torch.cat([ref, own]) * self.weight[:, None] + self.bias[:, None]
        return z.view(x.shape).to(x.dtype)


class LayerNorm(nn.GroupNorm):
    """Each example by the mean and variance of all its features and positions; a scale and a shift a feature."""

    def __init__(self, features: int) -> None:
        super().__init__(1, features)


class Stack(nn.Sequential):
    """Layers one after the other, with labels (n,) for those that take them."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, labels) if getattr(layer, "takes_labels", False) else layer(x)
        return x


def normalisation(norm: Norm, features: int, classes: int = 0, reference: int = 0) -> list[nn.Module]:
    """The layer ``norm`` for ``features`` in a list, by class where there are ``classes``; an empty list for none."""
    if norm == "batch":
        return [ConditionalBatchNorm(features, classes) if classes else BatchNorm(features)]
    if norm == "virtual":
        return [VirtualBatchNorm(features, reference)]
    return [LayerNorm(features)] if norm == "layer" else []


def batch_norms(net: nn.Module) -> list[BatchNorm]:
    """The layers in ``net`` that couple a batch and keep running averages."""
    return [layer for layer in net.modules() if isinstance(layer, BatchNorm)]
