"""Invertible layers: what they are, one after another, and activation normalisation.

Reference: Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma, Dhariwal, 2018, arXiv 1807.03039 (actnorm).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ActNorm", "Bijection", "Chain", "initialise", "wide"]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or better, whatever precision a network ran in: scales and log-determinants are sums."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Bijection(nn.Module):
    """An invertible layer of examples (n, ...)."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, of as many numbers as ``x``, and log|det dy/dx| (n,) in nats."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """x from y, without the determinant: samples need none."""


class Chain(Bijection):
    """Layers one after another."""

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, more = layer(x)
            log_det = log_det + more
        return x, log_det

    def inverse(self, y: Tensor) -> Tensor:
        layer: Any
        for layer in reversed(self.layers):
            y = layer.inverse(y)
        return y


class ActNorm(Bijection):
    """y = (x + b) exp(log_s) for each feature of (n, features, ...), set by the first batch (Glow, section 3.1).

    It needs no mark that says whether it has seen that batch: :func:`initialise` is called in ``Model.prepare``, once
    a run, and what it sets are parameters, saved like all others.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.b, self.log_s = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x + along(self.b, x)) * along(self.log_s.exp(), x)
        return y, (x[0, 0].numel() * self.log_s.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * along((-self.log_s).exp(), y) - along(self.b, y)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set b and log_s: zero mean and unit variance of ``x``. A feature that is constant is centred alone."""
        sd, mean = torch.std_mean(x, [0, *range(2, x.dim())], correction=0)
        self.b.copy_(-mean)
        self.log_s.copy_(-torch.where(sd > 1e-3, sd, 1).log())


def initialise(model: nn.Module, run: Callable[[], Any]) -> None:
    """Set every :class:`ActNorm` in ``model``, each by what reaches it from those before it, in one ``run()``."""
    layers = [m for m in model.modules() if isinstance(m, ActNorm)]
    hooks = [layer.register_forward_pre_hook(lambda m, args: m.fit(*args)) for layer in layers]
    try:
        if layers:
            with torch.no_grad():
                run()
    finally:
        for hook in hooks:
            hook.remove()


def along(features: Tensor, x: Tensor) -> Tensor:
    """One number a feature (F,), shaped to go with ``x`` (n, F, ...)."""
    return features.view(-1, *[1] * (x.dim() - 2))
