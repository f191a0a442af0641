"""Inverse autoregressive flow (IAF), as a density.

    z_t = mu_t + sigma_t z_{t-1},   [mu_t, log sigma_t] = AutoregressiveNN_t(z_{t-1})                           (eq. 10)
    log q(z_T) = -sum_i [1/2 eps_i^2 + 1/2 log 2 pi + sum_t log sigma_{t,i}],   z_0 = eps                       (eq. 11)

The paper draws z_T, a VAE's latents, in one pass a layer, and needs the density of no others. Here z_T is data: x comes
from eps in one pass a layer, and the density of a given x needs eps, by the iteration that MAF samples with; training
takes it in every step, with the exact gradient of its fixed point (gencli.nn.made). MAF is this the other way round.

Departures: log sigma is bounded, s / (1 + |s| / 5), and actnorm (Glow, 1807.03039) stands between the layers.

Reference: Improving Variational Inference with Inverse Autoregressive Flow, Kingma, Salimans, Jozefowicz, Chen,
Sutskever, Welling, 2016, arXiv 1606.04934.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gencli.contract import DataSpec
from gencli.nn.bijections import ActNorm, Bijection, Chain
from gencli.nn.flow import Flow, FlowConfig
from gencli.nn.made import Autoregressive
from gencli.nn.mlp import Activation
from gencli.nn.monotone import Affine

__all__ = ["IAF", "IAFConfig"]


class IAFConfig(FlowConfig):
    """The hyper-parameters of IAF."""

    transforms: int = Field(5, ge=1, description="layers T, each with an autoregressive network")
    hidden: tuple[int, ...] = Field((64, 64), description="widths of each network's hidden layers")
    activation: Activation = "relu"


class ScaleShift(Affine):
    """Eq. 10: MAF's map with input and output exchanged, so that the network sees z_{t-1}."""

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_sigma = self.split(theta)
        return mu + log_sigma.exp() * x, log_sigma

    def inverse(self, u: Tensor, theta: Tensor) -> Tensor:
        mu, log_sigma = self.split(theta)
        return (u - mu) * (-log_sigma).exp()


class Layer(Bijection):
    """z_{t-1} from z_t: the direction of a flow, and the slow one."""

    def __init__(self, D: int, hidden: tuple[int, ...], order: Tensor, activation: Activation) -> None:
        super().__init__()
        self.step = Autoregressive(ScaleShift(), D, hidden, order, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.step.inverse(x)
        return z, -self.step(z)[1]

    def inverse(self, y: Tensor) -> Tensor:
        x, _ = self.step(y)
        return x


class IAF(Flow):
    """Data of any shape is a vector; every second network has the reversed order."""

    Config = IAFConfig

    config: IAFConfig

    def __init__(self, config: IAFConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        c, D = config, spec.dims
        natural = torch.arange(D)
        self.flow = Chain(
            layer
            for t in range(c.transforms)
            for layer in (ActNorm(D), Layer(D, c.hidden, natural.flip(0) if t % 2 else natural, c.activation))
        )

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow(x.flatten(1))
        return z, log_det

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.flow.inverse(z).reshape(-1, *self.spec.shape)
