"""FFJORD: a flow in continuous time, whose dynamics may be any network.

    dz/dt = f(z(t), t; theta),   z(t0) ~ N(0, I),   x = z(t1)
    log p(x) = log p(z(t0)) - integral from t0 to t1 of Tr(df/dz) dt                                  (section 2.2)
    Tr(df/dz) = E[e^T (df/dz) e]   for noise e of mean 0 and covariance I                             (section 3.1)

One e serves all of a solve: were it drawn anew in each evaluation, an adaptive solver would follow noise.
In few dimensions the trace is exact. Here df/dz is never made by reverse differentiation: the network carries tangents
along, (z, v) -> (f, (df/dz) v), for v = e or all unit vectors, which leaves a single backward pass to training.

RNODE's penalties keep paths straight and dynamics easy to solve, whatever the data's dimension D:

    loss = -log p(x) / D + kinetic / D integral of |f|^2 dt + jacobian / D integral of |df/dz|_F^2 dt

where |df/dz|_F^2 = E |(df/dz) e|^2 by the same e (there e^T df/dz, which has the same norm in expectation).

Training by a few steps of rk4 and backpropagation through them is fastest on small problems: an adjoint solve would
cost as much again and be less exact, and the memory of all steps is small. But where the dynamics grow too fast for
the steps, errors of the solver look like likelihood, more of it than the data has. So what is reported comes from
dopri5, and penalties, or more steps, keep the two together.

References:
    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models, Grathwohl, Chen, Bettencourt,
        Sutskever, Duvenaud, 2018, arXiv 1810.01367
    How to train your neural ODE: the world of Jacobian and kinetic regularization, Finlay, Jacobsen, Nurbekyan,
        Oberman, 2020, arXiv 2002.02798 (the penalties; fixed steps of rk4 in training)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import DataSpec, Step
from gencli.nn.bijections import wide
from gencli.nn.flow import Flow, FlowConfig
from gencli.nn.ode import Method, solve
from gencli.rng import Rng

__all__ = ["FFJORD", "Dynamics", "FFJORDConfig"]

FEW = 8  # dimensions up to which an evaluation takes the exact trace, whatever training does
T0, T1 = 0.0, 1.0


class FFJORDConfig(FlowConfig):
    """``solver`` and ``trace`` are training's. Samples and likelihoods are ``evaluation``'s."""

    hidden: tuple[int, ...] = Field((64, 64, 64), description="widths of the perceptron, channels of convolutions")
    activation: Literal["tanh", "softplus"] = "tanh"
    solver: Method = Field("rk4", description="in training: rk4 in equal steps, or dopri5, which chooses its steps")
    evaluation: Method = Field("dopri5", description="the solver of samples and likelihoods")
    steps: int = Field(8, ge=1, description="of rk4; each evaluates the dynamics four times")
    tolerance: float = Field(1e-6, gt=0, description="of dopri5, relative and absolute, in each step")
    trace: Literal["exact", "hutchinson"] = Field(
        "exact", description="exact costs one tangent a dimension, hutchinson one: an estimate without bias"
    )
    noise: Literal["gaussian", "rademacher"] = Field("rademacher", description="hutchinson's; signs vary less")
    kinetic: float = Field(0.0, ge=0, description="RNODE's weight of the kinetic energy")
    jacobian: float = Field(0.0, ge=0, description="RNODE's weight of the Jacobian's Frobenius norm")


class ConcatSquash(nn.Module):
    """y = (W z + b) sigmoid(g t + c) + h t, with a matrix or a 3x3 convolution as W: the paper's code's layer."""

    def __init__(self, n_in: int, n_out: int, image: bool) -> None:
        super().__init__()
        self.layer: Any = nn.Conv2d(n_in, n_out, 3, padding=1) if image else nn.Linear(n_in, n_out)
        shape = (n_out, 1, 1) if image else (n_out,)
        self.g, self.c, self.h = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        nn.init.normal_(self.g)

    def forward(self, t: float | Tensor, z: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z ``(n, ...)`` and tangents ``(k, n or 1, ...)`` through the layer."""
        gate = torch.sigmoid(self.g * t + self.c)
        y = self.layer(z) * gate + self.h * t
        if v is None:
            return y, None
        W = self.layer.weight
        u = F.linear(v, W) if W.dim() == 2 else F.conv2d(v.flatten(0, 1), W, padding=1).unflatten(0, v.shape[:2])
        return y, u * gate


class Dynamics(nn.Module):
    """f(z, t; theta): layers with a smooth activation between them."""

    def __init__(self, sizes: Sequence[int], activation: str, image: bool) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(ConcatSquash(a, b, image) for a, b in pairwise(sizes))

    def forward(self, t: float | Tensor, z: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """f at z ``(n, *shape)``, and (df/dz) v for tangents v ``(k, n or 1, *shape)`` -> ``(k, n, *shape)``."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                if self.activation == "tanh":
                    z = z.tanh()
                    v = None if v is None else v * (1 - z.square())
                else:
                    v = None if v is None else v * z.sigmoid()
                    z = F.softplus(z)
            z, v = layer(t, z, v)
        return z, v


class FFJORD(Flow):
    """Points, and small images by convolutions of one size.

    With ``trace: hutchinson`` in more than ``FEW`` dimensions the log-likelihood of an example is an estimate, whose
    expectation over the noise is the solver's log p(x), or its bound: means over examples estimate without bias.
    """

    Config = FFJORDConfig
    chunk = 256

    config: FFJORDConfig

    def __init__(self, config: FFJORDConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind not in ("image", "points"):
            raise UsageError(f"ffjord is for images and points, and {spec.name} is {spec.kind}")
        ends = spec.shape[0]
        self.dynamics = Dynamics((ends, *config.hidden, ends), config.activation, spec.kind == "image")

    @property
    def likelihood(self) -> Literal["lower bound", "density", "estimate"]:  # type: ignore[override]
        kind = super().likelihood
        bits = self.spec.levels is None or kind == "lower bound"  # levels without noise: a density, and no bits/dim
        return kind if not bits or self.config.trace == "exact" or self.spec.dims <= FEW else "estimate"

    # ------------------------------------------------------------------ through time

    def integrate(
        self, z: Tensor, start: float, end: float, v: Tensor | None, energies: bool = False
    ) -> tuple[Tensor, int]:
        """From ``z (n, *shape)`` at ``start``, with tangents v -> at ``end``, and the evaluations that it took.

        The result is ``(n, D)`` without tangents, else ``(n, D + 1)``, the last the integral of the trace; with
        ``energies`` ``(n, D + 3)``, the last two those of |f|^2 and |df/dz|_F^2.
        """
        c, n, D = self.config, len(z), self.spec.dims

        def field(t: float | Tensor, y: Tensor) -> Tensor:
            f, Jv = self.dynamics(t, y[:, :D].view(z.shape), v)
            f = wide(f).flatten(1)
            if v is None or Jv is None:
                return f
            Jv, e = wide(Jv).flatten(2), v.flatten(2)  # (k, n, D), (k, n or 1, D)
            parts = [f, (e * Jv).sum((0, 2)).expand(n)[:, None]]  # of a linear f it is one number
            if energies:
                parts += [f.square().sum(1, keepdim=True), Jv.square().sum((0, 2)).expand(n)[:, None]]
            return torch.cat(parts, 1)

        more = 0 if v is None else 3 if energies else 1
        y = torch.cat([z.flatten(1), z.new_zeros(n, more)], 1)
        method = c.solver if self.training else c.evaluation
        return solve(field, y, start, end, method, steps=c.steps, tolerance=c.tolerance, judged=D + min(more, 1))

    def tangents(self, x: Tensor, rng: Rng) -> Tensor:
        """The v of x ``(n, *shape)``: unit vectors ``(D, 1, *shape)``, or one draw of e, ``(1, n, *shape)``."""
        if self.config.trace == "exact" or (not self.training and self.spec.dims <= FEW):
            return self.units(x)
        if self.config.noise == "gaussian":
            return rng.normal("e", x.shape)[None]
        return (2 * rng.integers("e", 2, x.shape) - 1).to(x.dtype)[None]

    def units(self, x: Tensor) -> Tensor:
        """All unit vectors, ``(D, 1, *shape)``."""
        return torch.eye(self.spec.dims, dtype=x.dtype, device=x.device).view(-1, 1, *self.spec.shape)

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """With the exact trace, in any dimension."""
        D = self.spec.dims
        y, _ = self.integrate(x, T1, T0, self.units(x))
        return y[:, :D], y[:, D]

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        shaped = z.view(-1, *self.spec.shape)
        return self.integrate(shaped, T0, T1, None)[0].view(shaped.shape)

    # ------------------------------------------------------------------ what needs no trace, or an estimate of it

    def encode(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self.integrate(self.to_real(x, rng)[0], T1, T0, None)[0]

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self._log_prob(x, rng)[0]

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Nats a dimension and the penalties; how often the dynamics were evaluated is logged."""
        c, D = self.config, self.spec.dims
        energies = c.kinetic > 0 or c.jacobian > 0
        log_p, y, evaluations = self._log_prob(b.x, s.rng, energies)
        nats = loss = -log_p.mean() / D
        out: dict[str, Any] = {}
        if energies:
            # time runs backwards, from T1 to T0, and so does the integral
            kinetic, jacobian = -y[:, D + 1 :].mean(0) / D
            loss = nats + c.kinetic * kinetic + c.jacobian * jacobian
            out = {"nats_per_dim": nats, "kinetic": kinetic, "jacobian": jacobian}
        if self.spec.levels is not None and self.likelihood != "density":
            out["bits_per_dim"] = nats / math.log(2)
        return {"loss": loss, **out, "evaluations": evaluations}

    def _log_prob(self, x: Tensor, rng: Rng, energies: bool = False) -> tuple[Tensor, Tensor, int]:
        """Of raw ``x (n, *shape)``: log p(x) ``(n,)``, and what :meth:`integrate` returns."""
        D = self.spec.dims
        real, preprocessing = self.to_real(x, rng)
        y, evaluations = self.integrate(real, T1, T0, self.tangents(real, rng), energies)
        return self.log_base(y[:, :D]) + y[:, D] + preprocessing, y, evaluations
