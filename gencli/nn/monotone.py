"""Increasing maps of real numbers, one dimension at a time, with parameters that a network or nobody computes.

    affine:       u = (x - mu) exp(-alpha)
    mixture CDF:  u = Phi^-1(F(x)),   F(x) = sum_k pi_k K((x - m_k) / s_k)

Under the mixture's CDF the density of u becomes that of x: for a standard normal u, x has the density F'. K is the
distribution function of the standard normal or logistic distribution. F is handled as its logit, log F - log(1 - F),
both of them log-sums, so that neither tail loses digits.

References:
    Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv 1705.07057 (affine)
    Neural Autoregressive Flows, Huang, Krueger, Lacoste, Courville, 2018, arXiv 1804.00779 (mixtures of sigmoids)
    Flow++, Ho, Chen, Srinivas, Duan, Abbeel, 2019, arXiv 1902.00275 (mixture CDFs, inverted by bisection)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.nn.bijections import wide

__all__ = ["Affine", "Kernel", "MixtureCDF", "Monotone", "logit_of_normal", "normal_of_logit"]

Kernel = Literal["normal", "logistic"]

# Log-scales lie in (-5, 5): none overflows, and no inverse divides by zero.
MAX_LOG_SCALE = 5.0


def bounded(s: Tensor) -> Tensor:
    return s / (1 + s.abs() / MAX_LOG_SCALE)


class Monotone(ABC):
    """``parameters``: how many numbers, P, say which map it is in each of D dimensions: theta ``(..., P, D)``."""

    parameters: int

    @abstractmethod
    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """u and log du/dx in nats, of the shape of ``x (..., D)``."""

    @abstractmethod
    def inverse(self, u: Tensor, theta: Tensor) -> Tensor:
        """x from u ``(..., D)``."""

    def initial(self) -> Tensor:
        """The theta (P,) that a network starts from."""
        return torch.zeros(self.parameters)


class Affine(Monotone):
    """u = (x - mu) exp(-alpha); alpha is bounded."""

    parameters = 2

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        mu, alpha = self.split(theta)
        log_slope = -alpha
        return (x - mu) * log_slope.exp(), log_slope

    def inverse(self, u: Tensor, theta: Tensor) -> Tensor:
        mu, alpha = self.split(theta)
        return u * alpha.exp() + mu

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """mu and alpha."""
        mu, a = wide(theta).unbind(-2)
        return mu, bounded(a)


class MixtureCDF(Monotone):
    """u = Phi^-1(F(x)) for a mixture of ``components``: theta = (logits of pi, m, log s), ``components`` of each."""

    def __init__(self, components: int, kernel: Kernel = "logistic") -> None:
        self.components, self.kernel = components, kernel
        self.parameters = 3 * components

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        t, log_slope = self.logit(x, theta)
        u, more = normal_of_logit(t)
        return u, log_slope + more

    def inverse(self, u: Tensor, theta: Tensor) -> Tensor:
        return self.quantile(logit_of_normal(u), theta)

    def initial(self) -> Tensor:
        """Equal components at the quantiles of a standard normal, which their sum resembles: nearly the identity."""
        m = torch.special.ndtri((torch.arange(self.components) + 0.5) / self.components)
        s = (1 - m.square().mean()).sqrt() * (1 if self.kernel == "normal" else math.sqrt(3) / math.pi)
        log_s = s.log()
        raw = log_s / (1 - log_s.abs() / MAX_LOG_SCALE)  # bounded(raw) = log s
        return torch.cat([torch.zeros_like(m), m, raw.expand_as(m)])

    def logit(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """t = log F(x) - log(1 - F(x)), and log dt/dx in nats."""
        log_pi, m, log_s = self.split(theta)
        a = (x[..., None, :] - m) * (-log_s).exp()  # (..., components, D)
        if self.kernel == "logistic":
            below, above = F.logsigmoid(a), F.logsigmoid(-a)
            log_k = below + above
        else:
            below, above = torch.special.log_ndtr(a), torch.special.log_ndtr(-a)
            log_k = -0.5 * a.square() - 0.5 * math.log(2 * math.pi)
        log_F, log_1_F = (log_pi + below).logsumexp(-2), (log_pi + above).logsumexp(-2)
        return log_F - log_1_F, (log_pi + log_k - log_s).logsumexp(-2) - log_F - log_1_F

    @torch.no_grad()
    def quantile(self, t: Tensor, theta: Tensor) -> Tensor:
        """x whose logit is ``t (...)``, without a gradient: Newton's method, bisection where that goes astray.

        A mixture's quantile lies between the least and the greatest of its components', which begin the bracket.
        """
        _, m, log_s = self.split(theta)
        far = (t if self.kernel == "logistic" else normal_of_logit(t)[0]).abs()[..., None, :] * log_s.exp()
        low, high = (m - far).amin(-2), (m + far).amax(-2)
        x, step = 0.5 * (low + high), high - low
        tolerance = 4 * torch.finfo(x.dtype).eps
        for _ in range(200):  # a step in two halves the bracket, or the last step
            here, log_slope = self.logit(x, theta)
            low, high = torch.where(here < t, x, low), torch.where(here < t, high, x)
            newton = x - (here - t) * (-log_slope).exp()
            good = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * step)
            new = torch.where(good, newton, 0.5 * (low + high))
            step, x = (new - x).abs(), new
            if bool((step <= tolerance * (1 + x.abs())).all()):
                break
        return x

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi, m and log s, each (..., components, D)."""
        logits, m, s = wide(theta).unflatten(-2, (3, self.components)).unbind(-3)
        return logits.log_softmax(-2), m, bounded(s)


# ---------------------------------------------------------------------------------------------- Phi^-1 of a logit

# Beyond logits of +-64, probabilities of e^-64, the map to normal numbers goes on as a straight line, as there float32
# ends: it stays increasing, smooth and onto, so that densities stay exact.
T = 64.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
Z = -torch.special.ndtri(torch.tensor(-T, dtype=torch.float64).sigmoid()).item()
LOG_SLOPE = -T + 0.5 * Z**2 + HALF_LOG_2PI  # log dz/dt there


def normal_of_logit(t: Tensor) -> tuple[Tensor, Tensor]:
    """z = Phi^-1(sigmoid(t)), and log dz/dt in nats."""
    inner = t.clamp(-T, T)
    lower = torch.special.ndtri(torch.where(inner > 0, -inner, inner).sigmoid())  # from the tail that keeps its digits
    z = torch.where(inner > 0, -lower, lower)
    log_slope = F.logsigmoid(inner) + F.logsigmoid(-inner) + 0.5 * z.square() + HALF_LOG_2PI
    return z + math.exp(LOG_SLOPE) * (t - inner), log_slope


def logit_of_normal(z: Tensor) -> Tensor:
    """The inverse of :func:`normal_of_logit`."""
    inner = z.clamp(-Z, Z)
    return torch.special.log_ndtr(inner) - torch.special.log_ndtr(-inner) + math.exp(-LOG_SLOPE) * (z - inner)
