"""Likelihood heads: what a network's outputs say about p(x), one dimension at a time.

A head turns ``theta (..., parameters)``, the outputs of a network for each dimension of ``x (...)``, into log p(x) in
nats, samples and means. All of them are normalised: over ``levels`` values of raw discrete data, or as a density of
real-valued data. They compute in float32 or better whatever precision the network ran in.

Means and locations live where networks see data: levels scaled to [-1, 1], real values as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gencli.console import UsageError
from gencli.rng import Rng

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiscretisedLogistic",
    "Gaussian",
    "Head",
    "HeadName",
    "discretised_logistic",
    "head",
]

HeadName = Literal["bernoulli", "categorical", "discretised-logistic", "gaussian"]

# Below e^-7 all mass is on one of 256 levels, and an unbounded scale lets one outlier destroy a step
# (Salimans et al. 2017, 1701.05517).
MIN_LOG_SCALE = -7.0


class Head(ABC):
    """p(x | theta) of independent dimensions. ``parameters`` is the length of theta's last dimension."""

    parameters: int

    @abstractmethod
    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | theta) in nats, one number a dimension: ``x (...)``, ``theta (..., parameters)`` -> ``(...)``."""

    @abstractmethod
    def mean(self, theta: Tensor) -> Tensor:
        """E[x | theta], ``(...)``, on the scale of network inputs."""

    @abstractmethod
    def sample(self, theta: Tensor, rng: Rng, purpose: str = "x") -> Tensor:
        """One draw of x, ``(...)``: integer levels (int64) or real values."""


class Bernoulli(Head):
    """Two levels; theta is the log-odds of level 1."""

    parameters = 1

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        logit = _wide(theta)[..., 0]
        return x * logit - F.softplus(logit)

    def mean(self, theta: Tensor) -> Tensor:
        return 2 * _wide(theta)[..., 0].sigmoid() - 1

    def sample(self, theta: Tensor, rng: Rng, purpose: str = "x") -> Tensor:
        p = _wide(theta)[..., 0].sigmoid()
        return (rng.uniform(purpose, p.shape) < p).long()


class Categorical(Head):
    """``levels`` values without an order; theta holds their logits."""

    def __init__(self, levels: int) -> None:
        self.parameters = self.levels = levels

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        theta = _wide(theta)
        return theta.gather(-1, x.long()[..., None])[..., 0] - theta.logsumexp(-1)

    def mean(self, theta: Tensor) -> Tensor:
        p = _wide(theta).softmax(-1)
        return p @ torch.linspace(-1, 1, self.levels, dtype=p.dtype, device=p.device)

    def sample(self, theta: Tensor, rng: Rng, purpose: str = "x") -> Tensor:
        cdf = _wide(theta).softmax(-1).cumsum(-1)
        # the last entry is 1 but for rounding: never compare with it
        return (cdf[..., :-1] <= rng.uniform(purpose, cdf.shape[:-1])[..., None]).sum(-1)


class DiscretisedLogistic(Head):
    """A logistic density integrated over each of ``levels`` bins; theta = (mean, log-scale) on the [-1, 1] scale."""

    parameters = 2

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        mean, log_scale = _wide(theta).unbind(-1)
        return discretised_logistic(x, mean, log_scale.clamp_min(MIN_LOG_SCALE), self.levels)

    def mean(self, theta: Tensor) -> Tensor:
        mean, log_scale = _wide(theta).unbind(-1)
        scale = log_scale.clamp_min(MIN_LOG_SCALE).exp()
        # E[level] is the sum of P(level >= k); a loop, since bins times dimensions need not fit into memory
        level = torch.zeros_like(mean)
        for k in range(1, self.levels):
            level += ((mean - ((2 * k - 1) / (self.levels - 1) - 1)) / scale).sigmoid()
        return level * (2 / (self.levels - 1)) - 1

    def sample(self, theta: Tensor, rng: Rng, purpose: str = "x") -> Tensor:
        mean, log_scale = _wide(theta).unbind(-1)
        y = mean + log_scale.clamp_min(MIN_LOG_SCALE).exp() * rng.uniform(purpose, mean.shape).logit()
        return ((y + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()


class Gaussian(Head):
    """A density of real-valued data, with its constant; theta = (mean, log standard deviation)."""

    parameters = 2

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        mean, log_sd = _wide(theta).unbind(-1)
        log_sd = log_sd.clamp_min(MIN_LOG_SCALE)
        return -0.5 * ((x - mean) * (-log_sd).exp()) ** 2 - log_sd - 0.5 * math.log(2 * math.pi)

    def mean(self, theta: Tensor) -> Tensor:
        return _wide(theta)[..., 0]

    def sample(self, theta: Tensor, rng: Rng, purpose: str = "x") -> Tensor:
        mean, log_sd = _wide(theta).unbind(-1)
        return mean + log_sd.clamp_min(MIN_LOG_SCALE).exp() * rng.normal(purpose, mean.shape)


def discretised_logistic(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """The log of a logistic's mass on the bin of level ``x``, in nats; all arguments broadcast.

    ``mean`` and ``log_scale`` are on the scale where the levels lie in [-1, 1]. With a and b the standardised upper
    and lower edge of the bin, and s the logistic function,

        s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)),

    which in logs loses no digit however far in the tails x lies. Other code takes log(s(a) - s(b)) and falls back on
    the density at the bin's centre where that underflows; the masses then do not sum to 1. The first and the last bin
    reach to infinity, and keep one factor.
    """
    y = x.to(mean.dtype) * (2 / (levels - 1)) - 1
    inv_s = (-log_scale).exp()
    a = (y - mean + 1 / (levels - 1)) * inv_s
    b = (y - mean - 1 / (levels - 1)) * inv_s
    width = (-torch.expm1(-2 / (levels - 1) * inv_s)).log()
    first, last = x == 0, x == levels - 1
    # every branch is finite, so are the gradients of those not taken
    upper = torch.where(last, 0, F.logsigmoid(a))
    lower = torch.where(first, 0, F.logsigmoid(-b))
    return upper + lower + torch.where(first | last, 0, width)


def head(name: HeadName, levels: int | None) -> Head:
    """The head ``name`` for data of ``levels`` levels (None: real-valued). UsageError if the two do not match."""
    if levels is None and name != "gaussian":
        raise UsageError(f"decoder {name!r} is for discrete data, and this data is real-valued: use 'gaussian'")
    if levels is not None and name == "gaussian":
        raise UsageError(
            f"decoder 'gaussian' is a density, and this data has {levels} levels: "
            "use 'categorical' or 'discretised-logistic'" + (" or 'bernoulli'" if levels == 2 else "")
        )
    if name == "gaussian" or levels is None:
        return Gaussian()
    if name == "bernoulli" and levels != 2:
        raise UsageError(
            f"decoder 'bernoulli' needs data of 2 levels, and this data has {levels}: "
            "use 'categorical' or 'discretised-logistic'"
        )
    if name == "bernoulli":
        return Bernoulli()
    return Categorical(levels) if name == "categorical" else DiscretisedLogistic(levels)


def _wide(theta: Tensor) -> Tensor:
    return theta.float() if theta.dtype in (torch.bfloat16, torch.float16) else theta
