"""Glow: steps of actnorm, an invertible 1x1 convolution and an affine coupling, at several scales.

    y = (x + b) exp(log_s)                                  actnorm, set by the first batch            (section 3.1)
    y_ij = W x_ij,  W = P L (U + diag(s)),   log|det| = H W sum log|s|                                (eqs. 9 to 11)
    x_a, x_b = split(x);  (log s, t) = NN(x_b);  y = (s x_a + t, x_b)                                       (table 1)

K steps follow a squeeze at each of L scales, and half of the channels leave between scales with a mean and a scale
that the other half predicts (figure 2; learned priors as in the paper's code). P and the signs of s are fixed. All
priors are whitened, so z is standard noise: temperature multiplies it, and interpolation moves in it.

Departures: log s is bounded, by 2 tanh(log s / 2), where the paper's code has a sigmoid that can underflow, after
which samples are infinite; the coupling's networks hold no actnorm of their own.

Reference: Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma, Dhariwal, 2018, arXiv 1807.03039.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn.bijections import ActNorm, Chain
from gencli.nn.conditional import Conditional
from gencli.nn.couplings import AffineCoupling, MultiScale, Squeeze, bounded, check_squeezes, zeroed
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.flow import Flow, FlowConfig

__all__ = ["Glow", "GlowConfig", "Invertible1x1"]


class GlowConfig(FlowConfig):
    """The hyper-parameters of a Glow."""

    scales: int = Field(3, ge=1, description="L: resolutions, each after a squeeze")
    depth: int = Field(32, ge=1, description="K: steps at each scale")
    width: int = Field(512, ge=1, description="channels of the coupling's networks")
    dropout: float = Field(0.0, ge=0, lt=1, description="part of the networks' hidden units dropped")
    conditional: bool = Field(False, description="the last scale's prior depends on the class")


class Invertible1x1(ActNorm):
    """Actnorm and the invertible 1x1 convolution after it: W ((x + b) exp(log_s)) at every pixel of (n, C, H, W).

    W is kept as its LU decomposition (eq. 10), and is a rotation at the start. The two layers are one product with
    W diag(exp(log_s)), which costs half of their time or less.
    """

    P: Tensor
    sign: Tensor

    def __init__(self, C: int) -> None:
        super().__init__(C)
        P, L, U = torch.linalg.lu(nn.init.orthogonal_(torch.empty(C, C)))
        s = U.diagonal()
        self.register_buffer("P", P)
        self.register_buffer("sign", s.sign())
        self.log_diagonal = nn.Parameter(s.abs().log())
        self.L, self.U = nn.Parameter(L.tril(-1)), nn.Parameter(U.triu(1))

    def W(self) -> Tensor:
        """W (C, C)."""
        L, U = self.L.tril(-1) + torch.eye(len(self.P)).to(self.L), self.U.triu(1)
        return self.P @ L @ (U + torch.diag(self.sign * self.log_diagonal.exp()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, C, H, W = x.shape
        log_det = H * W * (self.log_s.sum() + self.log_diagonal.sum())
        with torch.autocast(x.device.type, enabled=False):  # in bf16 the layer would not be invertible
            A = self.W() * self.log_s.exp()
            y = torch.baddbmm((A @ self.b)[:, None].expand(n, C, 1), A.expand(n, C, C), x.flatten(2))
        return y.view(n, C, H, W), log_det.expand(n)

    def inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            A_inverse = torch.linalg.inv((self.W() * self.log_s.exp()).double()).to(y.dtype)
            return (A_inverse @ y.flatten(2) - self.b[:, None]).view(y.shape)


def network(n_in: int, n_out: int, width: int, dropout: float) -> nn.Sequential:
    """NN: (n, n_in, H, W) -> (n, n_out, H, W), 0 at the start (section 3.3)."""
    return nn.Sequential(
        nn.Conv2d(n_in, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1),
        nn.ReLU(inplace=True),
        Dropout(dropout),
        zeroed(nn.Conv2d(width, n_out, 3, padding=1)),
    )


class Glow(Conditional, Flow):
    """Multi-scale flow over images whose sides can be halved ``scales`` times."""

    Config = GlowConfig

    config: GlowConfig

    def __init__(self, config: GlowConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind != "image":
            raise UsageError(f"glow is for images, and {spec.name} is {spec.kind}: try realnvp")
        self.check_classes()
        check_squeezes(config.scales, spec.name, spec.shape, "scales")
        C, H, W = spec.shape
        scales, shapes, priors = [], [], []
        for _ in range(config.scales):
            C, H, W = 4 * C, H // 2, W // 2
            scales.append(Chain([Squeeze(), *(self._step(C) for _ in range(config.depth))]))
            shapes.append((C, H, W))
            priors.append(zeroed(nn.Conv2d(C // 2, C, 3, padding=1)))
            C = C // 2
        self.flow = MultiScale(scales, shapes, priors[:-1])
        # the last scale's prior: mean and log-scale of each channel, and of each class
        self.top_shape = shapes[-1]
        self.top = nn.Parameter(torch.zeros(2 * shapes[-1][0]))
        self.of_class = nn.Linear(len(spec.classes), len(self.top), bias=False) if config.conditional else None
        if self.of_class is not None:
            zeroed(self.of_class)
        name_layers(self)

    def _step(self, C: int) -> Chain:
        half = C // 2
        net = network(half, 2 * half, self.config.width, self.config.dropout)
        return Chain([Invertible1x1(C), AffineCoupling(net, swap=True)])

    def _top(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of the last scale's latents, both ``(n or 1, D_L)``."""
        _, H, W = self.top_shape
        h, y = self.top[None], self.one_hot(labels)
        if self.of_class is not None:
            h = h + self.of_class(y).to(h.dtype)
        mu, log_sigma = h.repeat_interleave(H * W, 1).chunk(2, 1)
        return mu, bounded(log_sigma)

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow(x)
        mu, log_sigma = self._top(labels)
        rest, top = z.tensor_split([z.shape[1] - mu.shape[1]], 1)
        return torch.cat([rest, (top - mu) * (-log_sigma).exp()], 1), log_det - log_sigma.sum(1)

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        mu, log_sigma = self._top(labels)
        rest, top = z.tensor_split([z.shape[1] - mu.shape[1]], 1)
        return self.flow.inverse(torch.cat([rest, top * log_sigma.exp() + mu], 1))
