"""NICE: additive couplings, which keep volume, and one scale for each dimension.

    y_1 = x_1,   y_2 = x_2 + m(x_1)                                       additive coupling layers        (section 3.2)
    h = S y,   log p(x) = sum_d [log p_H(h_d) + log S_dd]                 S_dd = exp(s_d)                 (section 3.3)

x_1 are the dimensions with an odd place and x_2 those with an even one, and their parts change from layer to layer;
p_H is the standard logistic or Gaussian distribution (section 3.4).

Departure: the first batch sets S and the last biases of m, so that h begins with the prior's mean and variance.

Reference: NICE: Non-linear Independent Components Estimation, Dinh, Krueger, Bengio, 2014, arXiv 1410.8516.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.contract import DataSpec, Step
from gencli.nn.bijections import Chain
from gencli.nn.couplings import AdditiveCoupling, zeroed
from gencli.nn.dropout import name_layers
from gencli.nn.flow import Base, Flow, FlowConfig
from gencli.nn.mlp import Activation, mlp

__all__ = ["NICE", "NICEConfig"]


class NICEConfig(FlowConfig):
    """The hyper-parameters of NICE."""

    couplings: int = Field(4, ge=2, description="additive coupling layers")
    hidden: tuple[int, ...] = Field((1000,) * 5, description="widths of each m's hidden layers")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="part of the hidden units dropped")
    base: Base = Field("logistic", description="p_H: logistic or normal")


class NICE(Flow):
    """Additive couplings between multi-layer perceptrons; data of any shape is a vector."""

    Config = NICEConfig

    config: NICEConfig

    def __init__(self, config: NICEConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        D = spec.dims
        if D < 2:
            raise UsageError(f"a coupling needs at least 2 dimensions, and {spec.name} has {D}: try cdf-flow")
        self.base = config.base

        def coupling(i: int) -> AdditiveCoupling:
            odd, even = (D + 1) // 2, D // 2
            m = mlp(*((even, config.hidden, odd) if i % 2 else (odd, config.hidden, even)), config.activation,
                    config.dropout)  # fmt: skip
            zeroed(m[-1])
            return AdditiveCoupling(m, swap=i % 2 == 1, even=True)

        self.couplings = Chain(coupling(i) for i in range(config.couplings))
        self.s = nn.Parameter(torch.zeros(D))
        name_layers(self)

    @torch.no_grad()
    def prepare(self, b: Any, s: Step) -> None:
        """The first batch has the prior's mean and variance in every dimension of h.

        Pixels that never change need an S of hundreds, which Adam's steps would take thousands of to reach.
        """
        y = self.to_real(b.x, s.rng)[0].flatten(1)
        mean, wanted = y.mean(0, keepdim=True), math.pi / math.sqrt(3) if self.base == "logistic" else 1.0
        last: Any = self.couplings.layers[-2:]
        for coupling in last:  # m = 0 so far: the last layer's bias alone moves its half
            coupling.net[-1].bias.copy_(-coupling.parts(mean)[1][0])
        self.s.copy_((wanted / y.std(0).clamp_min(1e-6)).log())

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.couplings(x.flatten(1))
        return self.s.exp() * y, self.s.sum().expand(len(x))

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.couplings.inverse((-self.s).exp() * z).reshape(-1, *self.spec.shape)
