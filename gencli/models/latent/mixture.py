"""A mixture of Gaussians, whose z can be enumerated: the likelihood itself beside what stands in for it elsewhere.

Reference:
    Variational Inference: A Review for Statisticians. D. M. Blei, A. Kucukelbir, J. D. McAuliffe, 2016.
    arXiv:1601.00670 (the mixture is its example, section 2.1). Draws weighted by p / q: Importance Weighted
    Autoencoders. Y. Burda, R. Grosse, R. Salakhutdinov, 2015. arXiv:1509.00519.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.importance import Estimator, log_mean_weight
from gencli.nn.mlp import mlp
from gencli.rng import Rng

__all__ = ["Mixture", "MixtureConfig"]

LOG_SD = -6.0  # sigma is at least e^-6: a component on a single point has no likelihood


class MixtureConfig(Config):
    """``estimator``: what training takes for log p(x)."""

    components: int = Field(50, ge=1, description="K, the values of z; each has the probability 1 / K")
    estimator: Estimator = Field("exact", description="training by log p(x), or by what stands in for it")
    k: int = Field(5, ge=1, description="of prior and importance: draws of z an example")
    hidden: tuple[int, ...] = Field((64, 64), description="of importance and elbo: the widths of the network q(z|x)")


class Mixture(Model):
    """p(x) = 1/K sum_z N(x; mu_z, sigma_z^2), a point's D dimensions independent given z.

    The likelihood is always the sum over z; ``estimator`` changes the training loss, and q with it:

    - exact: log p(x). q is the posterior p(z|x), and the bounds are the likelihood.
    - prior: log 1/k sum_i p(x|z_i), z_i ~ p(z). q is the prior.
    - importance: log 1/k sum_i p(x, z_i) / q(z_i|x), z_i ~ q(z|x), a network that learns by the ELBO.
    - elbo: sum_z q(z|x) log p(x, z) / q(z|x), for both.
    """

    likelihood = "density"

    Config = MixtureConfig

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.levels is not None:
            raise UsageError(f"mixture is a density of points, and {spec.name} has {spec.levels} levels: points/smiley")
        K, D = config.components, spec.dims
        self.mu = nn.Parameter(torch.zeros(K, D))
        self.log_sigma = nn.Parameter(torch.zeros(K, D))
        self.q = mlp(D, config.hidden, K) if config.estimator in ("importance", "elbo") else None

    @torch.no_grad()
    def prepare(self, b: Any, s: Step) -> None:
        """The components start at examples of the first batch, repeated if there are not enough."""
        x = self.spec.scale(b.x).flatten(1)[s.rng.permutation("mu", len(b.x))]
        self.mu.copy_(x[torch.arange(self.config.components, device=x.device) % len(x)])

    # ------------------------------------------------------------------ training

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus what stands in for log p(x), in nats; ``gap``: how far it is below log p(x) on this batch."""
        log_p_xz, estimator = self.log_joint(b.x), self.config.estimator
        log_p = log_p_xz.logsumexp(1)
        log_q = self.log_q(b.x, log_p_xz)
        if estimator == "exact":
            value = log_p
        elif estimator == "elbo":
            value = _elbo(log_p_xz, log_q)
        else:  # z has no gradient: q learns by the ELBO, p by the weights
            value = self._weighted(log_p_xz, log_q.detach(), s.rng, self.config.k).to(log_p.dtype)
        loss = -value.mean()
        if estimator == "importance":
            loss = loss - _elbo(log_p_xz.detach(), log_q).mean()
        nats = -log_p.detach().mean()
        return {"loss": loss, "nats": nats, "gap": -value.detach().mean() - nats}

    # ------------------------------------------------------------------ the distributions

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z) of ``x (n, D)`` and every z, ``(n, K)``."""
        log_sigma = self.log_sigma.clamp_min(LOG_SD)
        standard = (x.flatten(1)[:, None] - self.mu) * (-log_sigma).exp()  # (n, K, D)
        constant = 0.5 * self.spec.dims * math.log(2 * math.pi) + math.log(self.config.components)
        return -0.5 * standard.square().sum(2) - log_sigma.sum(1) - constant

    def log_q(self, x: Tensor, log_p_xz: Tensor) -> Tensor:
        """log q(z|x), ``(n, K)``."""
        if self.q is not None:
            return self.q(x.flatten(1)).log_softmax(1)
        if self.config.estimator == "prior":
            return torch.full_like(log_p_xz, -math.log(self.config.components))
        return log_p_xz.log_softmax(1)

    # ------------------------------------------------------------------ the likelihood and its bounds

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x), the sum over every z: ``x (n, D)`` -> nats ``(n,)``. Draws nothing."""
        return self.log_joint(x).logsumexp(1)

    def elbo(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """sum_z q(z|x) log p(x, z) / q(z|x): ``x (n, D)`` -> nats ``(n,)``. Draws nothing."""
        log_p_xz = self.log_joint(x)
        return _elbo(log_p_xz, self.log_q(x, log_p_xz))

    def iwae(self, x: Tensor, rng: Rng, k: int, labels: Tensor | None = None) -> Tensor:
        """log mean_i p(x, z_i) / q(z_i|x) over ``k`` draws: ``x (n, D)`` -> nats ``(n,)`` in float64."""
        log_p_xz = self.log_joint(x)
        return self._weighted(log_p_xz, self.log_q(x, log_p_xz), rng, k)

    def _weighted(self, log_p_xz: Tensor, log_q: Tensor, rng: Rng, k: int) -> Tensor:
        cdf, log_w = log_q.exp().cumsum(1), log_p_xz - log_q  # (n, K)

        def draw(m: int) -> Tensor:
            z = torch.searchsorted(cdf, rng.uniform("z", (len(cdf), m)), right=True)
            return log_w.gather(1, z.clamp_max(self.config.components - 1))  # the cdf ends at 1 but for rounding

        return log_mean_weight(draw, k)

    # ------------------------------------------------------------------ samples

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """``rng.n`` points ``(n, D)``."""
        z = rng.integers("z", self.config.components, (rng.n,))
        epsilon = rng.normal("epsilon", (rng.n, self.spec.dims))
        return (self.mu[z] + self.log_sigma.clamp_min(LOG_SD).exp()[z] * epsilon).unflatten(1, self.spec.shape)


def _elbo(log_p_xz: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_p_xz - log_q)).sum(1)
