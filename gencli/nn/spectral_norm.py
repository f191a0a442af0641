"""Layers whose weight W is divided by an estimate of its largest singular value, by power iteration.

    v <- W^T u / ||W^T u||,   u <- W v / ||W v||,   sigma = u^T W v,   W_SN = W / sigma          (algorithm 1, eq. 8)

W is a kernel reshaped to (outputs, the rest), as in the paper. This bounds the slope of a linear layer by 1; that of a
convolution, whose patches overlap, only by the root of its kernel's area, and less where the stride is above 1.

u and v are buffers, and nothing moves them but :func:`iterate`: a model calls it once after each update of the weights
(and a few times after drawing them), never in a forward pass, so that evaluation, penalties and the other player's
turn see one and the same function. sigma is differentiated with u and v held fixed, exact where they have converged.

Reference: Spectral Normalization for Generative Adversarial Networks, Miyato, Kataoka, Koyama, Yoshida, 2018, arXiv
1802.05957.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.nn import grey

__all__ = ["SNConv2d", "SNEmbedding", "SNLinear", "SpectralNorm", "iterate"]


class SpectralNorm:
    """For a layer with a ``weight`` (outputs, ...): call :meth:`begin` at the end of ``__init__``."""

    weight: Tensor
    u: Tensor
    v: Tensor

    def begin(self) -> None:
        W = self.weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(W.shape[0]), dim=0))  # type: ignore[attr-defined]
        self.register_buffer("v", F.normalize(W.T @ self.u, dim=0))  # type: ignore[attr-defined]

    def sigma(self) -> Tensor:
        """u^T W v, a scalar, as exact as W where products are of bfloat16."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.dot(self.u, self.weight.flatten(1) @ self.v)

    def W_SN(self) -> Tensor:
        """The weight that the layer applies, of the weight's shape."""
        return self.weight / self.sigma()

    def step(self) -> None:
        """One power iteration."""
        W = self.weight.detach().flatten(1)
        self.v.copy_(F.normalize(W.T @ self.u, dim=0))
        self.u.copy_(F.normalize(W @ self.v, dim=0))


@torch.no_grad()
def iterate(net: nn.Module, times: int = 1) -> None:
    """``times`` power iterations of every layer in ``net``."""
    for layer in net.modules():
        if isinstance(layer, SpectralNorm):
            for _ in range(times):
                layer.step()


class SNLinear(SpectralNorm, nn.Linear):
    """(..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.begin()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_SN(), self.bias)


class SNConv2d(SpectralNorm, grey.Conv2d):
    """(n, n_in, H, W) -> (n, n_out, H', W')."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(n_in, n_out, kernel, stride, padding)
        self.begin()

    def forward(self, x: Tensor) -> Tensor:
        return self.by(self.W_SN(), x)


class SNEmbedding(SpectralNorm, nn.Embedding):
    """Labels (n,) -> (n, features); the norm is that of the whole table."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__(classes, features)
        self.begin()

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.W_SN())
