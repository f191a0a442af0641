"""What all flows share: from raw data to real numbers and back, the density, its bound for levels, samples, latents.

A flow is an invertible map f from data to noise z of the same dimension, with a known density:

    log p(y) = log p_z(f(y)) + log|det df/dy|

Data of K levels becomes real by noise u within each level and, if the config says so, by a logit:

    v = (x + u) / K,  u in [0, 1)^D        y = logit(a + (1 - 2 a) v),  or  y = v - 1/2 without a
    log P(x) >= E_q(u|x) [log p(y) + log|det dy/dx~| - log q(u|x)],   x~ = x + u

Every term is counted, the factor 1/K too, so the bound is one on the probability of the levels, and its negative over
D log 2 is bits/dim. Without noise the same formula gives a density at the levels' centres, which no bits/dim follow
from: it grows without bound as a flow learns that all data lies on a grid.

References:
    A note on the evaluation of generative models, Theis, van den Oord, Bethge, 2016, arXiv 1511.01844 (the bound)
    Density estimation using Real NVP, Dinh, Sohl-Dickstein, Bengio, 2016, arXiv 1605.08803 (the logit, section 4.1)
    Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv 1705.07057 (its form)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.bijections import initialise
from gencli.nn.dequantization import Dequantization, dequantizer
from gencli.rng import Rng

__all__ = ["Base", "Flow", "FlowConfig"]

Base = Literal["normal", "logistic"]


class FlowConfig(Config):
    """What every flow's config has. Real-valued data passes as it is: none of this is for it."""

    dequantization: Dequantization = Field(
        "uniform",
        description="noise within each level: uniform, learned (variational), or none: a density, no bits/dim",
    )
    dequantization_width: int = Field(32, ge=1, description="channels of the networks of variational dequantization")
    logit: float | None = Field(
        None, gt=0, lt=0.5, description="a: levels, as v in [0, 1], become logit(a + (1 - 2 a) v); v - 1/2 without it"
    )


class Flow(Model):
    """A flow has :meth:`f` and :meth:`f_inverse`; everything else follows.

    Latents are always flat, ``(n, D)``, and their density is ``base``, of independent dimensions: learned priors are
    whitened inside f, so that z is noise, on which temperature and interpolation act. A config with ``conditional``
    has labels reach f.
    """

    config: FlowConfig
    base: Base = "normal"

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.levels is None and config.logit is not None:
            raise UsageError(f"model.logit is for levels, and {spec.name} is real-valued: leave it out")
        self.dequantizer = dequantizer(config.dequantization, spec, config.dequantization_width)

    @abstractmethod
    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Real numbers ``(n, *shape)``, labels (n,) or None -> z ``(n, D)`` and log|det dz/dx| ``(n,)`` in nats."""

    @abstractmethod
    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z ``(n, D)`` -> real numbers ``(n, *shape)``."""

    @property
    def likelihood(self) -> Literal["lower bound", "density"]:  # type: ignore[override]
        """A bound where noise was added to levels; a density of real-valued data, and of levels without noise."""
        noisy = self.spec.levels is not None and self.config.dequantization != "none"
        return "lower bound" if noisy else "density"

    # ------------------------------------------------------------------ training

    def prepare(self, b: Any, s: Step) -> None:
        """The first batch sets what normalises activations."""
        y, _ = self.to_real(b.x, s.rng)
        initialise(self, lambda: self.f(y, self._labels(b)))

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Minus log p in nats a dimension, so that learning rates carry over between data sets."""
        nats = -self.log_prob(b.x, s.rng, self._labels(b)).mean() / self.spec.dims
        return {"loss": nats} | ({"bits_per_dim": nats / math.log(2)} if self.likelihood == "lower bound" else {})

    def _labels(self, b: Any) -> Tensor | None:
        return b.label if self.conditional else None

    # ------------------------------------------------------------------ raw data and real numbers

    def to_real(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Raw ``x (n, *shape)`` -> y of that shape, and log|det dy/dx~| - log q(u|x) ``(n,)`` in nats."""
        x, K, a = x.to(torch.get_default_dtype()), self.spec.levels, self.config.logit
        if K is None:
            return x, x.new_zeros(len(x))
        u, log_q = self.dequantizer(x, rng)
        scaled = -log_q - self.spec.dims * math.log(K)
        if a is None:
            return (x + u) / K - 0.5, scaled
        # both v and 1 - v from the level, as near 1 the latter would lose its digits
        log_s, log_1_s = ((a + (1 - 2 * a) / K * v).log() for v in (x + u, (K - x) - u))
        return log_s - log_1_s, scaled + (math.log(1 - 2 * a) - log_s - log_1_s).flatten(1).sum(1)

    def from_real(self, y: Tensor) -> Tensor:
        """y ``(n, *shape)`` -> x~ of that shape, in [0, K] where the data has K levels: the level is its floor."""
        K, a = self.spec.levels, self.config.logit
        if K is None:
            return y
        v = y + 0.5 if a is None else (y.sigmoid() - a) / (1 - 2 * a)
        return (K * v).clamp(0, K)

    # ------------------------------------------------------------------ likelihood

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x), or its bound with one draw of the noise: raw ``x (n, *shape)`` -> nats ``(n,)``."""
        y, preprocessing = self.to_real(x, rng)
        z, log_det = self.f(y, labels)
        return self.log_base(z) + log_det + preprocessing

    def log_base(self, z: Tensor) -> Tensor:
        """log p_z in nats: ``(n, D)`` -> ``(n,)``."""
        if self.base == "logistic":
            return -(F.softplus(z) + F.softplus(-z)).sum(1)
        return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    # ------------------------------------------------------------------ samples and latents

    def prior(self, rng: Rng) -> Tensor:
        """z, ``(rng.n, D)``."""
        shape = (rng.n, self.spec.dims)
        if self.base == "logistic":  # a uniform number may be 0
            return rng.uniform("z", shape).clamp_min(2**-25).logit()
        return rng.normal("z", shape)

    def encode(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """f of raw ``x (n, *shape)``, with noise in its levels -> z ``(n, D)``. :meth:`decode` gives x back."""
        return self.f(self.to_real(x, rng)[0], labels)[0]

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z ``(n, D)`` -> floats ``(n, *shape)``, levels in [-1, 1]."""
        x = self.from_real(self.f_inverse(z, labels))
        K = self.spec.levels
        return x if K is None else ((x - 0.5) * (2 / (K - 1)) - 1).clamp(-1, 1)

    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """``rng.n`` draws: levels or points ``(n, *shape)``. ``temperature`` multiplies z: below 1, likelier draws."""
        x = self.from_real(self.f_inverse(temperature * self.prior(rng), labels))
        return x if self.spec.levels is None else x.floor().clamp_max(self.spec.levels - 1).long()
