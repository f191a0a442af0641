"""A Gaussian with a diagonal covariance: the smallest model that trains, samples and has a likelihood.

Reference:
    A model's docstring cites its paper here: title, authors, year, arXiv id.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.contract import Config, DataSpec, Model, Step
from gencli.rng import Rng

__all__ = ["Gaussian", "GaussianConfig"]


class GaussianConfig(Config):
    """The keys of ``model:`` in a recipe."""

    log_sigma: float = Field(0.0, description="log sigma before training")


class Gaussian(Model):
    """p(x) = N(mu, diag(sigma^2)) of points ``(n, D)``."""

    Config = GaussianConfig
    likelihood = "density"

    def __init__(self, config: GaussianConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.mu = nn.Parameter(torch.zeros(spec.shape))
        self.log_sigma = nn.Parameter(torch.full(spec.shape, config.log_sigma))

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x) in nats: ``x (n, D)`` -> ``(n,)``."""
        e = (x - self.mu) * (-self.log_sigma).exp()
        return (-0.5 * e**2 - self.log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus the log-likelihood in nats."""
        return {"loss": -self.log_prob(b.x, s.rng).mean()}

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """Points ``(rng.n, D)``."""
        return self.mu + self.log_sigma.exp() * rng.normal("x", (rng.n, *self.spec.shape))
