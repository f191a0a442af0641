"""The variational autoencoder.

Reference:
    Auto-Encoding Variational Bayes. D. P. Kingma, M. Welling, 2013. arXiv:1312.6114.
    The importance-weighted bound: Importance Weighted Autoencoders. Y. Burda, R. Grosse, R. Salakhutdinov, 2015.
    arXiv:1509.00519. Free bits: Improving Variational Inference with Inverse Autoregressive Flow. D. P. Kingma et al.,
    2016. arXiv:1606.04934.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.dropout import name_layers
from gencli.nn.likelihoods import HeadName, head
from gencli.nn.mlp import Activation, mlp
from gencli.rng import Rng

__all__ = ["VAE", "VAEConfig", "kl_to_standard_normal"]

# sigma^2 in [e^-20, e^20]: a posterior beyond that overflows, and no data needs one
LOG_VAR = 20.0


def kl_to_standard_normal(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, one number a latent dimension (appendix B)."""
    return -0.5 * (1 + log_var - mu**2 - log_var.exp())


class VAEConfig(Config):
    """``free_bits`` and ``kl_warmup`` are off at 0."""

    latents: int = Field(16, ge=1, description="J, the dimensions of z")
    hidden: tuple[int, ...] = Field((256, 256), description="widths of the encoder's layers; the decoder's reversed")
    decoder: HeadName = Field("categorical", description="the family of p(x|z)")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="part of the hidden units dropped, in both networks")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL term; 1 is the ELBO")
    kl_warmup: float = Field(0.0, ge=0, le=1, description="part of training in which that weight rises from 0")
    free_bits: float = Field(0.0, ge=0, description="lambda: nats of KL that each latent dimension has for free")


class VAE(Model):
    """p(x) = integral of p(x|z) N(z; 0, I) dz with multi-layer perceptrons q(z|x) and p(x|z).

    ``log_prob`` is the evidence lower bound (ELBO) with one draw of z, ``iwae`` the tighter importance-weighted bound.
    Both are bounds of the likelihood itself: the KL weight, free bits and warm-up change the training loss alone.
    """

    likelihood = "lower bound"

    Config = VAEConfig

    config: VAEConfig

    def __init__(self, config: VAEConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        D, J = spec.dims, config.latents
        self.p_x = head(config.decoder, spec.levels)
        self.encoder = mlp(D, config.hidden, 2 * J, config.activation, config.dropout)
        self.decoder = mlp(J, config.hidden[::-1], D * self.p_x.parameters, config.activation, config.dropout)
        name_layers(self)

    # ------------------------------------------------------------------ training

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus the ELBO in nats a dimension, so that learning rates carry over between models and data sets."""
        D, J = self.spec.dims, self.config.latents
        mu, log_var = self.posterior(b.x)
        z = mu + (0.5 * log_var).exp() * s.rng.normal("epsilon", (b.x.shape[0], J))  # eq. 4
        reconstruction = -self.log_likelihood(b.x, z).mean()
        kl_j = kl_to_standard_normal(mu, log_var)  # (n, J)
        kl = kl_j.sum(1).mean()
        cost = kl
        if self.config.free_bits:
            cost = s.gather(kl_j).mean(0).clamp_min(self.config.free_bits).sum()
        weight = self.config.kl_weight * self._warm(s.progress)
        out = {"loss": (reconstruction + weight * cost) / D, "reconstruction": reconstruction, "kl": kl}
        if self.spec.levels is not None:
            out["bits_per_dim"] = (reconstruction + kl) / (D * math.log(2))
        return out

    def _warm(self, progress: Tensor) -> Tensor | float:
        return (progress / self.config.kl_warmup).clamp_max(1) if self.config.kl_warmup else 1.0

    # ------------------------------------------------------------------ the two distributions

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x): raw ``x (n, ...)`` -> two of ``(n, J)``."""
        mu, log_var = self.encoder(self.spec.scale(x).flatten(1)).to(torch.get_default_dtype()).chunk(2, -1)
        return mu, log_var.clamp(-LOG_VAR, LOG_VAR)

    def theta(self, z: Tensor) -> Tensor:
        """The parameters of p(x|z): ``z (..., J)`` -> ``(..., D, parameters of the head)``."""
        return self.decoder(z).unflatten(-1, (self.spec.dims, self.p_x.parameters))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats: raw ``x (n, ...)`` and ``z (n, J)`` -> ``(n,)``, or ``z (n, k, J)`` -> ``(n, k)``."""
        x = x.flatten(1)
        if z.dim() == 3:
            x = x[:, None].expand(-1, z.shape[1], -1)
        return self.p_x.log_prob(x, self.theta(z)).sum(-1)

    # ------------------------------------------------------------------ bounds on the likelihood

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """The ELBO (eq. 10) with one draw of z and the KL in closed form: raw ``x (n, ...)`` -> nats ``(n,)``."""
        mu, log_var = self.posterior(x)
        z = mu + (0.5 * log_var).exp() * rng.normal("epsilon", mu.shape)
        return self.log_likelihood(x, z) - kl_to_standard_normal(mu, log_var).sum(1)

    def iwae(self, x: Tensor, rng: Rng, k: int, chunk: int = 100) -> Tensor:
        """log mean_i p(x, z_i) / q(z_i|x) over ``k`` draws: raw ``x (n, ...)`` -> nats ``(n,)`` in float64.

        Its expectation is a lower bound of log p(x) that rises with ``k``. ``chunk`` draws at a time pass through the
        decoder; the draws themselves, ``n * k * J`` numbers, are those of any other chunk size, and those of a
        smaller ``k`` are the first of them.
        """
        mu, log_var = self.posterior(x)
        sigma = (0.5 * log_var).exp()[:, None]
        epsilon = rng.normal("epsilon", (x.shape[0], k, self.config.latents))
        total = torch.full((x.shape[0],), -math.inf, dtype=torch.float64, device=x.device)
        for e in epsilon.split(chunk, 1):
            z = mu[:, None] + sigma * e
            # log N(z; 0, I) - log N(z; mu, sigma^2): the constants cancel
            log_ratio = 0.5 * (e**2 - z**2 + log_var[:, None]).sum(-1)
            log_w = self.log_likelihood(x, z) + log_ratio
            total = torch.logaddexp(total, log_w.double().logsumexp(1))
        return total - math.log(k)

    # ------------------------------------------------------------------ samples and latents

    def prior(self, rng: Rng) -> Tensor:
        """z ~ N(0, I), ``(n, J)``."""
        return rng.normal("z", (rng.n, self.config.latents))

    def encode(self, x: Tensor, rng: Rng) -> Tensor:
        """The mean of q(z|x): raw ``x (n, ...)`` -> ``(n, J)``. Draws nothing."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z]: ``z (n, J)`` -> floats ``(n, *shape)``, levels in [-1, 1].

        The mean, not the likeliest level: it moves smoothly with z, which is what interpolation shows.
        """
        return self.p_x.mean(self.theta(z)).reshape(-1, *self.spec.shape)

    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """``rng.n`` draws from the model: levels or points ``(n, *shape)``.

        Pixels are drawn from p(x|z), each on its own, so pictures carry that noise: it is part of what the model's
        likelihood describes. ``mean`` shows E[x|z] instead, as papers do. ``temperature`` multiplies the standard
        deviation of z.
        """
        z = temperature * self.prior(rng)
        if mean:
            return self.decode(z)
        return self.p_x.sample(self.theta(z), rng).reshape(-1, *self.spec.shape)
