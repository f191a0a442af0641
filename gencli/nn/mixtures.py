"""A mixture of discretised logistics over the colours of a pixel, each colour's means shifted by the colours before it.

    p(x) = sum_m pi_m prod_c P(x_c | mu_mc + sum_{k < c} a_mck x_k, s_mc)                             (eqs. 1 to 3)

One mixture index serves all colours of a pixel. P is a logistic's mass on the bin of a level, see
:func:`gencli.nn.likelihoods.discretised_logistic`; the first and last bins reach to infinity, so that masses sum to 1.

Reference: PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications,
Salimans, Karpathy, Chen, Kingma, 2017, arXiv 1701.05517 (sections 2.1 and 2.2).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.nn.causal import invert_cdf
from gencli.nn.likelihoods import MIN_LOG_SCALE, discretised_logistic

__all__ = ["LogLikelihood", "LogisticMixture", "openai_discretised_logistic"]

LogLikelihood = Literal["exact", "openai"]


class LogisticMixture:
    """p(x | theta) of pixels of ``channels`` colours and ``levels`` levels, by ``mixtures`` components.

    Features stand in dimension 1, before any dimensions of positions: ``theta (n, parameters, ...)``.
    ``log_likelihood``: the logistics' exact masses, or the approximation of OpenAI's code.
    """

    def __init__(self, channels: int, levels: int, mixtures: int, log_likelihood: LogLikelihood = "exact") -> None:
        self.channels, self.levels, self.mixtures = channels, levels, mixtures
        self.mass = discretised_logistic if log_likelihood == "exact" else openai_discretised_logistic
        self.pairs = [(c, k) for c in range(channels) for k in range(c)]  # colour c is shifted by colour k
        self.parameters = mixtures * (1 + 2 * channels + len(self.pairs))

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of pi (n, M, ...), mu and log s (n, C, M, ...), a (n, pairs, M, ...), in float32 or better."""
        theta = theta.to(torch.promote_types(theta.dtype, torch.float32)).unflatten(1, (-1, self.mixtures))
        logits, mean, log_scale, a = theta.split([1, self.channels, self.channels, len(self.pairs)], 1)
        return logits[:, 0], mean, log_scale.clamp_min(MIN_LOG_SCALE), a.tanh()

    def scaled(self, x: Tensor, like: Tensor) -> Tensor:
        """Levels to [-1, 1]."""
        return x.to(like.dtype) * (2 / (self.levels - 1)) - 1

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | theta) of each pixel (n, ...) in nats: levels ``x (n, C, ...)``, ``theta (n, parameters, ...)``."""
        logits, mean, log_scale, a = self.split(theta)
        y = self.scaled(x, mean)[:, :, None]
        means = list(mean.unbind(1))
        for p, (c, k) in enumerate(self.pairs):
            means[c] = means[c] + a[:, p] * y[:, k]  # y: the true colours, in training too
        masses = self.mass(x[:, :, None], torch.stack(means, 1), log_scale, self.levels)  # (n, C, M, ...)
        return (logits.log_softmax(1) + masses.sum(1)).logsumexp(1)

    def sample(self, theta: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        """Levels (n, C), int64, of one pixel: ``theta (n, parameters)``, uniforms ``u (n, 1 + C)``.

        u[:, 0] picks the component, the others invert the logistics' cdfs; rounding to the nearest level, within range,
        gives each bin its mass. ``temperature`` divides the mixture's logits and multiplies the logistics' scales.
        """
        logits, mean, log_scale, a = self.split(theta.to(torch.promote_types(theta.dtype, u.dtype)))
        m = invert_cdf(logits, u[:, 0], temperature)[:, None, None]
        mean, log_scale, a = (t.gather(2, m.expand(-1, t.shape[1], -1))[:, :, 0] for t in (mean, log_scale, a))
        noise = log_scale.exp() * u[:, 1:].logit() * temperature  # (n, C)
        if not self.pairs:
            return self._nearest(mean + noise)
        levels: list[Tensor] = []
        shifts = a.unbind(1)
        for c in range(self.channels):
            value = mean[:, c] + noise[:, c]
            for p, (to, k) in enumerate(self.pairs):
                if to == c:
                    value = value + shifts[p] * self.scaled(levels[k], value)
            levels.append(self._nearest(value))
        return torch.stack(levels, 1)

    def _nearest(self, y: Tensor) -> Tensor:
        half = (self.levels - 1) / 2
        return (y * half + half).round_().clamp_(0, self.levels - 1).long()


def openai_discretised_logistic(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """As :func:`discretised_logistic`, with the approximation of OpenAI's code, for comparison with its numbers.

    Where the mass of an inner bin is at most 1e-5, the density at the bin's centre times the bin's width stands for
    it: too little by w / 2 + log(1 - e^-w) - log w far in the tails, w the width over the scale: 2.15 nats at 256
    levels and log-scale -7, 0.06 at -5.
    """
    y = x.to(mean.dtype) * (2 / (levels - 1)) - 1
    inv_s = (-log_scale).exp()
    centre = (y - mean) * inv_s
    a, b = centre + inv_s / (levels - 1), centre - inv_s / (levels - 1)
    mass = a.sigmoid() - b.sigmoid()
    density = centre - log_scale - 2 * F.softplus(centre) - math.log((levels - 1) / 2)
    inner = torch.where(mass > 1e-5, mass.clamp_min(1e-12).log(), density)
    return torch.where(x == 0, F.logsigmoid(a), torch.where(x == levels - 1, F.logsigmoid(-b), inner))
