"""The variational autoencoder.

Reference:
    Auto-Encoding Variational Bayes. D. P. Kingma, M. Welling, 2013. arXiv:1312.6114.
    The importance-weighted bound: Importance Weighted Autoencoders. Y. Burda, R. Grosse, R. Salakhutdinov, 2015.
    arXiv:1509.00519. Free bits: Improving Variational Inference with Inverse Autoregressive Flow. D. P. Kingma et al.,
    2016. arXiv:1606.04934. Conditioning on the class: Semi-Supervised Learning with Deep Generative Models. D. P.
    Kingma et al., 2014. arXiv:1406.5298.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.conditional import Conditional
from gencli.nn.convnets import ConvDecoder, ConvEncoder
from gencli.nn.dropout import name_layers
from gencli.nn.importance import log_mean_weight
from gencli.nn.likelihoods import HeadName, head
from gencli.nn.mlp import Activation, mlp
from gencli.rng import Rng

__all__ = ["VAE", "Posterior", "VAEConfig", "kl_to_standard_normal"]

# sigma^2 in [e^-20, e^20]: a posterior beyond that overflows, and no data needs one
LOG_VAR = 20.0
AT_ONCE = 2**20  # numbers in the decoder's widest layer while a bound is computed: 4 MB of float32
# nats: a latent dimension with less KL than this says nothing of x. Counted an example, as a mean over processes is
# the mean over the batch then
COLLAPSED = 0.01


def kl_to_standard_normal(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, one number a latent dimension (appendix B)."""
    return -0.5 * (1 + log_var - mu**2 - log_var.exp())


class Posterior(NamedTuple):
    """q(z|x) = N(mu, S): ``mu`` and the log of S's diagonal ``(n, J)``; a full S = L L^T, ``L (n, J, J)``."""

    mu: Tensor
    log_var: Tensor
    L: Tensor | None = None

    def at(self, epsilon: Tensor) -> Tensor:
        """z = mu + sigma epsilon, or mu + L epsilon (eq. 4), of ``epsilon (n, J)`` or ``(n, k, J)``."""
        mu, sigma = self.mu, (0.5 * self.log_var).exp()
        if epsilon.dim() == 3:
            mu, sigma = mu[:, None], sigma[:, None]
        return mu + (sigma * epsilon if self.L is None else torch.einsum("nij,n...j->n...i", self.L, epsilon))

    @property
    def log_det(self) -> Tensor:
        """log det S^(1/2), ``(n,)``."""
        if self.L is None:
            return 0.5 * self.log_var.sum(1)
        return self.L.diagonal(dim1=1, dim2=2).log().sum(1)

    @property
    def kl_j(self) -> Tensor:
        """KL to N(0, 1) of each latent dimension's marginal, in nats, ``(n, J)``."""
        return kl_to_standard_normal(self.mu, self.log_var)

    @property
    def kl(self) -> Tensor:
        """KL to N(0, I) in nats, ``(n,)``."""
        if self.L is None:
            return self.kl_j.sum(1)
        return 0.5 * (self.L.square().sum((1, 2)) + self.mu.square().sum(1) - self.mu.shape[1]) - self.log_det


class VAEConfig(Config):
    """``free_bits`` and ``kl_warmup`` are off at 0."""

    latents: int = Field(16, ge=1, description="J, the dimensions of z")
    network: Literal["mlp", "conv", "residual"] = Field("mlp", description="both networks: layers, or convolutions")
    hidden: tuple[int, ...] = Field((256, 256), description="of mlp: the encoder's widths; the decoder's reversed")
    channels: int = Field(32, ge=1, description="of conv and residual: channels at the image's own size")
    blocks: int = Field(1, ge=1, description="of residual: blocks after each change of size")
    decoder: HeadName = Field("categorical", description="the family of p(x|z)")
    posterior: Literal["diagonal", "full"] = Field("diagonal", description="the covariance of q(z|x)")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="of mlp: part of the hidden units dropped, in both networks")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL term; 1 is the ELBO")
    kl_warmup: float = Field(0.0, ge=0, le=1, description="part of training in which that weight rises from 0")
    free_bits: float = Field(0.0, ge=0, description="lambda: nats of KL that each latent dimension has for free")
    conditional: bool = Field(False, description="condition both networks on the class")


class VAE(Conditional, Model):
    """p(x) = integral of p(x|z) N(z; 0, I) dz, with neural networks for q(z|x) and p(x|z).

    ``log_prob`` is the evidence lower bound (ELBO) with one draw of z, ``iwae`` the tighter importance-weighted bound.
    Both are bounds of the likelihood itself: the KL weight, free bits and warm-up change the training loss alone.
    """

    likelihood = "lower bound"

    Config = VAEConfig

    config: VAEConfig
    centre: Tensor  # of the encoder's input, (*shape)

    def __init__(self, config: VAEConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        c, D, J = config, spec.dims, config.latents
        self.check_classes()
        if c.posterior == "full" and c.free_bits:
            raise UsageError("model.free_bits counts latent dimensions one by one: it wants model.posterior=diagonal")
        K = len(spec.classes) if c.conditional else 0
        self.p_x = head(c.decoder, spec.levels)
        self.register_buffer("centre", torch.zeros(spec.shape))
        outputs = 2 * J if c.posterior == "diagonal" else J + J * (J + 1) // 2
        self.encoder: nn.Module
        self.decoder: nn.Module
        if c.network == "mlp":
            self.body: nn.Module = nn.Flatten()
            self.encoder = mlp(D + K, c.hidden, outputs, c.activation, c.dropout)
            self.decoder = mlp(J + K, c.hidden[::-1], D * self.p_x.parameters, c.activation, c.dropout)
            inner = max(c.hidden, default=0)
        else:
            if spec.kind != "image":
                raise UsageError(f"model.network={c.network} is for images, and {spec.name} is {spec.kind}: use mlp")
            if c.dropout:
                raise UsageError(f"model.dropout is for model.network=mlp, not {c.network}")
            blocks = c.blocks if c.network == "residual" else 0
            self.body = trunk = ConvEncoder(spec.shape, c.channels, blocks, c.activation)
            self.encoder = nn.Linear(trunk.outputs + K, outputs)
            out, size = spec.shape[0] * self.p_x.parameters, (spec.shape[1], spec.shape[2])
            self.decoder = ConvDecoder(J + K, out, size, c.channels, blocks, c.activation)
            inner = 2 * c.channels * size[0] * size[1]  # maps of twice the channels, just doubled
        self.width = max(inner, D * self.p_x.parameters)  # numbers in the decoder's widest layer
        name_layers(self)

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def prepare(self, b: Any, s: Step) -> None:
        """The encoder sees data less the first batch's mean: a black border, -1 everywhere, would drown the rest."""
        self.centre.copy_(self.spec.scale(b.x).mean(0))

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus the ELBO in nats a dimension, so that learning rates carry over between models and data sets."""
        D, J = self.spec.dims, self.config.latents
        labels = b.label if self.conditional else None
        q = self.posterior(b.x, labels)
        z = q.at(s.rng.normal("epsilon", (b.x.shape[0], J)))
        reconstruction = -self.log_likelihood(b.x, z, labels).mean()
        kl_j, kl = q.kl_j, q.kl.mean()
        cost = kl
        if self.config.free_bits:
            cost = s.gather(kl_j).mean(0).clamp_min(self.config.free_bits).sum()
        weight = self.config.kl_weight * self._warm(s.progress)
        out = {"loss": (reconstruction + weight * cost) / D, "reconstruction": reconstruction, "kl": kl}
        out["collapsed"] = (kl_j.detach() < COLLAPSED).to(kl.dtype).sum(1).mean()
        if self.spec.levels is not None:
            out["bits_per_dim"] = (reconstruction + kl) / (D * math.log(2))
        return out

    def _warm(self, progress: Tensor) -> Tensor | float:
        return (progress / self.config.kl_warmup).clamp_max(1) if self.config.kl_warmup else 1.0

    # ------------------------------------------------------------------ the two distributions

    def posterior(self, x: Tensor, labels: Tensor | None = None) -> Posterior:
        """q(z|x) of raw ``x (n, ...)``."""
        J, y = self.config.latents, self.one_hot(labels)
        h = self.body(self.spec.scale(x) - self.centre)
        h = self.encoder(h if y is None else torch.cat([h, y], 1)).to(torch.get_default_dtype())
        if self.config.posterior == "diagonal":
            mu, log_var = h.chunk(2, -1)
            return Posterior(mu, log_var.clamp(-LOG_VAR, LOG_VAR))
        mu, log_diagonal, below = h.split([J, J, J * (J - 1) // 2], 1)
        L = torch.diag_embed((0.5 * log_diagonal.clamp(-LOG_VAR, LOG_VAR)).exp())
        row, column = torch.tril_indices(J, J, -1, device=h.device)
        L = L.index_put((torch.arange(len(h), device=h.device)[:, None], row[None], column[None]), below)
        return Posterior(mu, L.square().sum(2).log(), L)

    def theta(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The parameters of p(x|z): ``z (..., J)`` -> ``(..., D, parameters of the head)``; labels ``(n,)``."""
        y = self.one_hot(labels)
        if y is not None:
            z = torch.cat([z, (y if z.dim() == 2 else y[:, None]).expand(*z.shape[:-1], -1)], -1)
        D, parameters = self.spec.dims, self.p_x.parameters
        if self.config.network == "mlp":
            return self.decoder(z).unflatten(-1, (D, parameters))
        h = self.decoder(z.flatten(0, -2)).unflatten(1, (-1, parameters))  # (n, C, parameters, H, W)
        return h.movedim(2, -1).reshape(*z.shape[:-1], D, parameters)

    def log_likelihood(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x|z) in nats: raw ``x (n, ...)`` and ``z (n, J)`` -> ``(n,)``, or ``z (n, k, J)`` -> ``(n, k)``."""
        x = x.flatten(1)
        if z.dim() == 3:
            x = x[:, None].expand(-1, z.shape[1], -1)
        return self.p_x.log_prob(x, self.theta(z, labels)).sum(-1)

    # ------------------------------------------------------------------ bounds on the likelihood

    def elbo(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """The ELBO (eq. 10) with one draw of z and the KL in closed form: raw ``x (n, ...)`` -> nats ``(n,)``."""
        q = self.posterior(x, labels)
        return self.log_likelihood(x, q.at(rng.normal("epsilon", q.mu.shape)), labels) - q.kl

    log_prob = elbo

    def iwae(self, x: Tensor, rng: Rng, k: int, labels: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """log mean_i p(x, z_i) / q(z_i|x) over ``k`` draws: raw ``x (n, ...)`` -> nats ``(n,)`` in float64.

        Its expectation is a lower bound of log p(x) that rises with ``k``. ``chunk`` draws an example pass through the
        decoder at once, as many as keep it small without it; the draws are those of any other chunk, and those of a
        smaller ``k`` are the first of them.
        """
        q, J = self.posterior(x, labels), self.config.latents
        size = chunk or max(1, AT_ONCE // (len(x) * self.width))

        def log_w(e: Tensor) -> Tensor:
            z = q.at(e)
            # log N(z; 0, I) - log N(z; mu, S): the constants cancel
            log_ratio = 0.5 * (e**2 - z**2).sum(-1) + q.log_det[:, None]
            return self.log_likelihood(x, z, labels) + log_ratio

        def draw(m: int) -> Tensor:
            return torch.cat([log_w(e) for e in rng.normal("epsilon", (len(x), m, J)).split(size, 1)], 1)

        return log_mean_weight(draw, k)

    def kl_per_dimension(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """KL to the prior of each latent dimension, in nats: raw ``x (n, ...)`` -> ``(n, J)``."""
        return self.posterior(x, labels).kl_j

    # ------------------------------------------------------------------ samples and latents

    def prior(self, rng: Rng) -> Tensor:
        """z ~ N(0, I), ``(n, J)``."""
        return rng.normal("z", (rng.n, self.config.latents))

    def encode(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """The mean of q(z|x): raw ``x (n, ...)`` -> ``(n, J)``. Draws nothing."""
        return self.posterior(x, labels).mu

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x|z]: ``z (n, J)`` -> floats ``(n, *shape)``, levels in [-1, 1].

        The mean, not the likeliest level: it moves smoothly with z, which is what interpolation shows.
        """
        return self.p_x.mean(self.theta(z, labels)).reshape(-1, *self.spec.shape)

    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """``rng.n`` draws from the model: levels or points ``(n, *shape)``.

        Pixels are drawn from p(x|z), each on its own, so pictures carry that noise: it is part of what the model's
        likelihood describes. ``mean`` shows E[x|z] instead, as papers do. ``temperature`` multiplies the standard
        deviation of z.
        """
        z = temperature * self.prior(rng)
        if mean:
            return self.decode(z, labels)
        return self.p_x.sample(self.theta(z, labels), rng).reshape(-1, *self.spec.shape)
