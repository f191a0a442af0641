"""Flow in one dimension: the map is a learned distribution function.

    F(x) = sum_k pi_k K((x - m_k) / s_k)                             a mixture, K the normal or logistic CDF
    z = F(x),             p(x) = F'(x)                               onto a uniform base
    z = Phi^-1(F(x)),     p(x) = phi(z) dz/dx = F'(x)                onto a normal base

Both bases give one density; the latents differ. With logistic K and the logit for Phi^-1 this is the paper's deep
sigmoidal flow of one layer (eq. 8), with parameters of its own in place of a network's. Samples invert F by Newton's
method, and by bisection where that goes astray.

Reference: Neural Autoregressive Flows, Huang, Krueger, Lacoste, Courville, 2018, arXiv 1804.00779.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn.flow import Flow, FlowConfig
from gencli.nn.monotone import Kernel, MixtureCDF, logit_of_normal, normal_of_logit
from gencli.rng import Rng

__all__ = ["CDFFlow", "CDFFlowConfig"]


class CDFFlowConfig(FlowConfig):
    """The hyper-parameters of the flow."""

    components: int = Field(8, ge=1, description="of the mixture")
    kernel: Kernel = Field("normal", description="K, the components' distribution: normal or logistic")
    base: Literal["normal", "uniform"] = Field("normal", description="the density of z")


class CDFFlow(Flow):
    """A density on the line, and the increasing map that makes it uniform or normal."""

    Config = CDFFlowConfig

    config: CDFFlowConfig

    def __init__(self, config: CDFFlowConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.dims != 1:
            raise UsageError(f"cdf-flow is for one dimension, and {spec.name} has {spec.dims}: try maf")
        self.cdf = MixtureCDF(config.components, config.kernel)
        self.theta = nn.Parameter(self.cdf.initial()[:, None])  # (P, 1)

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, log_slope = self.cdf.logit(x.flatten(1), self.theta)  # F = sigmoid(t)
        if self.config.base == "uniform":
            z, more = t.sigmoid(), F.logsigmoid(t) + F.logsigmoid(-t)
        else:
            z, more = normal_of_logit(t)
        return z, (log_slope + more).sum(1)

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        t = z.logit(torch.finfo(z.dtype).eps) if self.config.base == "uniform" else logit_of_normal(z)
        return self.cdf.quantile(t, self.theta).reshape(-1, *self.spec.shape)

    def log_base(self, z: Tensor) -> Tensor:
        """log p_z in nats: ``(n, 1)`` -> ``(n,)``."""
        return z.new_zeros(len(z)) if self.config.base == "uniform" else super().log_base(z)

    def prior(self, rng: Rng) -> Tensor:
        """z, ``(rng.n, 1)``."""
        return rng.uniform("z", (rng.n, 1)) if self.config.base == "uniform" else super().prior(rng)

    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """``rng.n`` points ``(n, 1)``. ``temperature`` multiplies normal latents."""
        if self.config.base == "uniform" and temperature != 1:
            raise UsageError("temperature is for normal latents, and these are uniform: model.base=normal")
        return super().sample(rng, labels, temperature=temperature)
