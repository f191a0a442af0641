"""Masked autoregressive flow (MAF).

    x_i = u_i exp(alpha_i) + mu_i,   mu_i = f_mu_i(x_1 ... x_{i-1}),  alpha_i = f_alpha_i(x_1 ... x_{i-1})      (eq. 3)
    u_i = (x_i - mu_i) exp(-alpha_i)                                                                           (eq. 4)
    log|det du/dx| = -sum_i alpha_i                                                                            (eq. 5)

A stack of MADEs, each with the order of the one before reversed; the u of one layer are the x of the next. The density
takes one pass a layer, and samples take D steps, or a fixed-point iteration of fewer (gencli.nn.made). In place of the
affine map a layer can have u_i = Phi^-1(F_i(x_i)), F_i the distribution function of a mixture of logistics whose
parameters are functions of x_1 ... x_{i-1}: one such layer holds conditional densities of any shape.

Departures: actnorm (Glow, 1807.03039) for batch normalisation, and alpha is bounded, a / (1 + |a| / 5).

Reference: Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv 1705.07057.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gencli.contract import DataSpec
from gencli.nn.bijections import ActNorm, Chain
from gencli.nn.flow import Flow, FlowConfig
from gencli.nn.made import Autoregressive
from gencli.nn.mlp import Activation
from gencli.nn.monotone import Affine, MixtureCDF

__all__ = ["MAF", "MAFConfig"]


class MAFConfig(FlowConfig):
    """The hyper-parameters of MAF."""

    transforms: int = Field(5, ge=1, description="layers, each a MADE")
    hidden: tuple[int, ...] = Field((64, 64), description="widths of each MADE's hidden layers")
    activation: Activation = "relu"
    transform: Literal["affine", "mixture"] = Field("affine", description="of each u_i: affine, or a mixture's CDF")
    components: int = Field(10, ge=1, description="logistics in each mixture")


class MAF(Flow):
    """Data of any shape is a vector, in its own order (images: row by row)."""

    Config = MAFConfig

    config: MAFConfig

    def __init__(self, config: MAFConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        c, D = config, spec.dims
        natural = torch.arange(D)
        self.flow = Chain(
            layer
            for k in range(c.transforms)
            for layer in (
                ActNorm(D),
                Autoregressive(
                    Affine() if c.transform == "affine" else MixtureCDF(c.components),
                    D,
                    c.hidden,
                    natural.flip(0) if k % 2 else natural,
                    c.activation,
                ),
            )
        )

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, log_det = self.flow(x.flatten(1))
        return u, log_det

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.flow.inverse(z).reshape(-1, *self.spec.shape)
