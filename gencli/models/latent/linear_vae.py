"""The linear VAE, whose likelihood is a Gaussian in closed form: how loose each bound is, measured.

Reference:
    Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse. J. Lucas, G. Tucker, R. Grosse, M. Norouzi,
    2019. arXiv:1911.02469 (eqs. 1 to 6). The model itself: Probabilistic Principal Component Analysis. M. E. Tipping,
    C. M. Bishop, 1999. Draws weighted by p / q: Burda, Grosse, Salakhutdinov, 2015. arXiv:1509.00519.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.importance import Estimator, log_mean_weight
from gencli.rng import Rng

__all__ = ["LinearVAE", "LinearVAEConfig"]


class LinearVAEConfig(Config):
    """``estimator``: what training takes for log p(x)."""

    latents: int = Field(8, ge=1, description="J, the dimensions of z")
    estimator: Estimator = Field("elbo", description="training by log p(x), or by what stands in for it")
    k: int = Field(10, ge=1, description="of prior and importance: draws of z an example")


class LinearVAE(Model):
    """p(x|z) = N(W z + b, sigma^2 I), p(z) = N(0, I); so p(x) = N(b, W W^T + sigma^2 I).

    The likelihood is always that; ``estimator`` changes the training loss, and q with it:

    - exact: log p(x). q is the posterior p(z|x), and the bounds are the likelihood.
    - prior: log 1/k sum_i p(x|z_i), z_i ~ p(z). q is the prior.
    - importance: log 1/k sum_i p(x, z_i) / q(z_i|x), z_i ~ q(z|x) = N(V (x - b), diag S).
    - elbo: the ELBO of that q, in closed form.

    Data of levels is taken for points of [-1, 1]: a density, no code length.
    """

    likelihood = "density"

    Config = LinearVAEConfig

    config: LinearVAEConfig

    def __init__(self, config: LinearVAEConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        D, J = spec.dims, config.latents
        self.W = nn.Parameter(nn.init.normal_(torch.empty(D, J), std=1 / math.sqrt(D)))
        self.b = nn.Parameter(torch.zeros(D))
        self.log_sigma = nn.Parameter(torch.zeros(()))
        self.V = self.log_S = None
        if config.estimator in ("importance", "elbo"):
            self.V = nn.Parameter(torch.zeros(J, D))
            self.log_S = nn.Parameter(torch.zeros(J))

    # ------------------------------------------------------------------ training

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus what stands in for log p(x), in nats a dimension; ``gap``: how far it is below log p(x), in nats."""
        exact = self.log_prob(b.x, s.rng)
        match self.config.estimator:
            case "exact":
                value = exact
            case "elbo":
                value = self.elbo(b.x, s.rng)
            case _:
                value = self.iwae(b.x, s.rng, self.config.k).to(exact.dtype)
        nats = -exact.detach().mean()
        return {"loss": -value.mean() / self.spec.dims, "nats": nats, "gap": -value.detach().mean() - nats}

    # ------------------------------------------------------------------ the distributions

    def centred(self, x: Tensor) -> Tensor:
        """x - b of raw ``x (n, ...)``, ``(n, D)``."""
        return self.spec.scale(x).flatten(1) - self.b

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(z|x) = N(mu, L L^T) of the centred ``x (n, D)``: ``mu (n, J)``, lower triangular ``L (J, J)``."""
        I = torch.eye(self.config.latents, dtype=x.dtype, device=x.device)  # noqa: E741
        if self.config.estimator == "prior":
            return x.new_zeros(len(x), len(I)), I
        if self.V is not None and self.log_S is not None:
            return x @ self.V.T, (0.5 * self.log_S).exp().diag()
        sigma2 = (2 * self.log_sigma).exp()
        M = self.W.T @ self.W + sigma2 * I  # p(z|x) = N(M^-1 W^T (x - b), sigma^2 M^-1)
        mu = torch.linalg.solve(M, self.W.T @ x.T).T
        return mu, torch.linalg.cholesky(sigma2 * torch.linalg.inv(M))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of the centred ``x (n, D)`` and ``z (n, m, J)``, ``(n, m)``."""
        # |x - W z|^2 = |x|^2 - 2 z.(W^T x) + z.(W^T W z): no array of D numbers for every draw
        square = x.square().sum(1, keepdim=True) - 2 * (z @ (x @ self.W)[:, :, None])[..., 0]
        square = square + ((z @ (self.W.T @ self.W)) * z).sum(2)
        return -0.5 * square * (-2 * self.log_sigma).exp() - self._constant

    @property
    def _constant(self) -> Tensor:
        return self.spec.dims * (self.log_sigma + 0.5 * math.log(2 * math.pi))

    # ------------------------------------------------------------------ the likelihood and its bounds

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log N(x; b, W W^T + sigma^2 I): raw ``x (n, ...)`` -> nats ``(n,)``. Draws nothing."""
        x, sigma2 = self.centred(x), (2 * self.log_sigma).exp()
        C = self.W @ self.W.T + sigma2 * torch.eye(self.spec.dims, dtype=x.dtype, device=x.device)
        L = torch.linalg.cholesky(C)
        standard = torch.linalg.solve_triangular(L, x.T, upper=False)  # (D, n)
        return -0.5 * (standard.square().sum(0) + self.spec.dims * math.log(2 * math.pi)) - L.diagonal().log().sum()

    def elbo(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """E_q[log p(x|z)] - KL(q || p(z)), both in closed form: raw ``x (n, ...)`` -> nats ``(n,)``. Draws nothing."""
        x = self.centred(x)
        mu, L = self.posterior(x)
        spread = (self.W @ L).square().sum()  # tr(W^T W L L^T)
        square = (x - mu @ self.W.T).square().sum(1) + spread
        kl = 0.5 * (L.square().sum() + mu.square().sum(1) - len(L)) - L.diagonal().log().sum()
        return -0.5 * square * (-2 * self.log_sigma).exp() - self._constant - kl

    def iwae(self, x: Tensor, rng: Rng, k: int, labels: Tensor | None = None) -> Tensor:
        """log mean_i p(x, z_i) / q(z_i|x) over ``k`` draws: raw ``x (n, ...)`` -> nats ``(n,)`` in float64."""
        x = self.centred(x)
        mu, L = self.posterior(x)

        def draw(m: int) -> Tensor:
            e = rng.normal("epsilon", (len(x), m, self.config.latents))
            z = mu[:, None] + e @ L.T
            log_ratio = 0.5 * (e.square() - z.square()).sum(2) + L.diagonal().log().sum()  # log p(z) / q(z|x)
            return self.log_likelihood(x, z) + log_ratio

        return log_mean_weight(draw, k)

    # ------------------------------------------------------------------ samples and latents

    def prior(self, rng: Rng) -> Tensor:
        """z ~ N(0, I), ``(n, J)``."""
        return rng.normal("z", (rng.n, self.config.latents))

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z]: ``z (n, J)`` -> floats ``(n, *shape)``, of levels in [-1, 1]."""
        x = z @ self.W.T + self.b
        return (x if self.spec.levels is None else x.clamp(-1, 1)).unflatten(1, self.spec.shape)

    def encode(self, x: Tensor, rng: Rng) -> Tensor:
        """The mean of q(z|x): raw ``x (n, ...)`` -> ``(n, J)``. Draws nothing."""
        return self.posterior(self.centred(x))[0]

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """``rng.n`` draws of x ``(n, *shape)``; of levels to the nearest."""
        z = self.prior(rng)
        x = z @ self.W.T + self.b + self.log_sigma.exp() * rng.normal("epsilon", (rng.n, self.spec.dims))
        return self.spec.unscale(x.unflatten(1, self.spec.shape))
