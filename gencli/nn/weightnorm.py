"""Weight-normalised convolutions, set by the first batch so that what they give has zero mean and unit variance.

    w = g v / ||v||                                                                                          (eq. 2)
    g <- 1 / sd[t],  b <- -E[t] / sd[t]  with  t = v * x / ||v||  over the first batch                   (eqs. 5, 6)

Reference: Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks, Salimans,
Kingma, 2016, arXiv 1602.07868.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NormedConv2d", "NormedConvTranspose2d", "initialise"]


class NormedConv2d(nn.Module):
    """A convolution (n, n_in, H, W) to (n, n_out, H', W') after zero padding by ``pad``: left, right, top, bottom.

    Negative padding crops. ``init_scale``: the standard deviation that :func:`initialise` gives its outputs.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: tuple[int, int] = (1, 1),
        pad: tuple[int, int, int, int] = (0, 0, 0, 0),
        stride: int = 1,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.pad, self.stride, self.init_scale = pad, stride, init_scale
        self.v = nn.Parameter(0.05 * torch.randn(self.shape(n_in, n_out, *kernel)))
        self.g, self.b = nn.Parameter(torch.full((n_out,), init_scale)), nn.Parameter(torch.zeros(n_out))

    @staticmethod
    def shape(n_in: int, n_out: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of v and w."""
        return n_out, n_in, height, width

    def kernel(self) -> Tensor:
        """w, of the shape of v."""
        return self.v * (self.g / torch.linalg.vector_norm(self.v, dim=(1, 2, 3)))[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pad) if any(self.pad) else x, self.kernel(), self.b, self.stride)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set g and b by the outputs for ``x``. An output that is the same everywhere is centred alone."""
        self.g.fill_(1)
        self.b.zero_()
        sd, mean = torch.std_mean(self.forward(x), (0, 2, 3), correction=0)
        self.g.copy_(self.init_scale / torch.where(sd > 1e-3, sd, 1))
        self.b.copy_(-mean * self.g)


class NormedConvTranspose2d(NormedConv2d):
    """Its transpose: (n, n_in, H, W) to (n, n_out, stride H, stride W); ``pad`` crops left, right, top and bottom.

    What is cropped on the right and at the bottom follows from the shape.
    """

    @staticmethod
    def shape(n_in: int, n_out: int, height: int, width: int) -> tuple[int, int, int, int]:
        return n_in, n_out, height, width

    def kernel(self) -> Tensor:
        return self.v * (self.g / torch.linalg.vector_norm(self.v, dim=(0, 2, 3)))[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        left, _, top, _ = self.pad
        more = [self.stride - k + 2 * p for k, p in zip(self.v.shape[2:], (top, left))]
        return F.conv_transpose2d(x, self.kernel(), self.b, self.stride, (top, left), more)


def initialise(model: nn.Module, run: Callable[[], Any]) -> None:
    """Set the weight-normalised layers in ``model``, each by what reaches it from those before it, in one ``run()``."""
    convs = [m for m in model.modules() if isinstance(m, NormedConv2d)]
    hooks = [conv.register_forward_pre_hook(lambda m, args: m.fit(*args)) for conv in convs]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
