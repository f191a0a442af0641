"""Noise within each level, which makes discrete data real: x + u with u ~ q(u|x) on [0, 1)^D.

    log P(x) = log integral of p(x + u) du >= E_q(u|x) [log p(x + u) - log q(u|x)]             (Ho et al., section 3.1)

References:
    RNADE: The real-valued neural autoregressive density-estimator, Uria, Murray, Larochelle, 2013, arXiv 1306.0186
        (uniform noise)
    Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design, Ho, Chen,
        Srinivas, Duan, Abbeel, 2019, arXiv 1902.00275 (q learned)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.nn.bijections import wide
from gencli.nn.couplings import MaskedCoupling, ResidualNet, mask
from gencli.rng import Rng

if TYPE_CHECKING:
    from gencli.contract import DataSpec

__all__ = ["Centre", "Dequantization", "Uniform", "Variational", "dequantizer"]

Dequantization = Literal["uniform", "variational", "none"]


class Uniform(nn.Module):
    """q(u|x) = 1."""

    def forward(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Levels as floats ``(n, *shape)`` -> u of that shape in [0, 1), and log q(u|x) ``(n,)`` in nats."""
        return rng.uniform("dequantization", x.shape), x.new_zeros(len(x))


class Centre(nn.Module):
    """No noise: u = 1/2, at the centre of each level, and nothing that a bound could be made of."""

    def forward(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """As :class:`Uniform`; the second is 0."""
        return x.new_full(x.shape, 0.5), x.new_zeros(len(x))


class Variational(nn.Module):
    """u = sigmoid(w), w = exp(a) r(e; x) + c, e ~ N(0, I): ``COUPLINGS`` affine couplings r that see the levels x.

    It starts near the uniform distribution: a logistic variable's sigmoid is uniform, and 1.7 e is almost logistic.
    """

    COUPLINGS = 4

    def __init__(self, shape: tuple[int, ...], levels: int, width: int) -> None:
        super().__init__()
        C, H, W = shape
        self.levels = levels
        self.given = nn.Sequential(nn.Conv2d(C, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.r = nn.ModuleList(
            MaskedCoupling(mask("checkerboard", H, W, i % 2 == 1), ResidualNet(C + width, 2 * C, width, 1))
            for i in range(self.COUPLINGS)
        )
        self.a = nn.Parameter(torch.full((C, 1, 1), math.log(1.7)))
        self.c = nn.Parameter(torch.zeros(C, 1, 1))

    def forward(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """As :class:`Uniform`."""
        w = rng.normal("dequantization", x.shape)
        log_q = (-0.5 * w.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        given = wide(self.given(2 / (self.levels - 1) * x - 1))
        for r in self.r:
            w, log_det = r(w, given)
            log_q = log_q - log_det
        w = self.a.exp() * w + self.c
        log_q = log_q - self.a.expand_as(x[0]).sum() + (F.softplus(w) + F.softplus(-w)).flatten(1).sum(1)
        return w.sigmoid(), log_q


def dequantizer(kind: Dequantization, spec: DataSpec, width: int) -> nn.Module:
    """The noise ``kind`` for data of ``spec``. UsageError if the two do not match."""
    if kind == "variational" and (spec.kind != "image" or spec.levels is None):
        raise UsageError(f"variational dequantization is for images, and {spec.name} is {spec.kind}: use uniform")
    if kind == "none" or spec.levels is None:
        return Centre()
    return Variational(spec.shape, spec.levels, width) if kind == "variational" else Uniform()
