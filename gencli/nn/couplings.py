"""Coupling layers, the ways to split what they couple, and several scales one after another.

A coupling leaves one part of x alone and changes the other by numbers that it computes from the first: its Jacobian is
triangular, and its inverse costs what it costs.

    y_1 = x_1,   y_2 = x_2 exp(s(x_1)) + t(x_1)                                       (affine; additive where s = 0)

References:
    NICE: Non-linear Independent Components Estimation, Dinh, Krueger, Bengio, 2014, arXiv 1410.8516 (additive)
    Density estimation using Real NVP, Dinh, Sohl-Dickstein, Bengio, 2016, arXiv 1605.08803 (affine, masks, squeezing)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.nn.bijections import Bijection, wide
from gencli.nn.dropout import Dropout

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Mask",
    "MaskedCoupling",
    "MultiScale",
    "ResidualNet",
    "Squeeze",
    "bounded",
    "mask",
    "zeroed",
]

Mask = Literal["checkerboard", "halves"]

# |s| of one coupling. Unbounded, a scale underflows and its inverse divides by it: with the sigmoid of Glow's code
# samples become infinite. e^2 a layer is more than trained flows use.
MAX_LOG_SCALE = 2.0


def bounded(s: Tensor) -> Tensor:
    """A log-scale in (-2, 2), near 0 the identity."""
    return MAX_LOG_SCALE * torch.tanh(s / MAX_LOG_SCALE)


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with zero weights and biases: a coupling whose network ends so begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ---------------------------------------------------------------------------------------------- couplings


class Split(Bijection):
    """Two parts of the features (n, features, ...): every second one ("even"), or the first and the last half.

    ``swap``: which part is changed, the second or the first.
    """

    def __init__(self, net: nn.Module, swap: bool = False, even: bool = False) -> None:
        super().__init__()
        self.net, self.swap, self.even = net, swap, even

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_1, that stays, and x_2."""
        a, b = (x[:, ::2], x[:, 1::2]) if self.even else x.tensor_split([(x.shape[1] + 1) // 2], 1)
        return (b, a) if self.swap else (a, b)

    def whole(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        """The inverse of :meth:`parts`."""
        a, b = (x_2, x_1) if self.swap else (x_1, x_2)
        if not self.even:
            return torch.cat([a, b], 1)
        y = a.new_empty(len(a), a.shape[1] + b.shape[1], *a.shape[2:])
        y[:, ::2], y[:, 1::2] = a, b
        return y


class AdditiveCoupling(Split):
    """y_2 = x_2 + m(x_1): ``net`` maps x_1 to numbers of the shape of x_2. The determinant is 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_1, x_2 = self.parts(x)
        return self.whole(x_1, x_2 + wide(self.net(x_1))), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        y_1, y_2 = self.parts(y)
        return self.whole(y_1, y_2 - wide(self.net(y_1)))


class AffineCoupling(Split):
    """y_2 = x_2 exp(s(x_1)) + t(x_1): ``net`` maps x_1 to s and t, one after the other along the features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_1, x_2 = self.parts(x)
        s, t = wide(self.net(x_1)).chunk(2, 1)
        s = bounded(s)
        return self.whole(x_1, x_2 * s.exp() + t), s.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        y_1, y_2 = self.parts(y)
        s, t = wide(self.net(y_1)).chunk(2, 1)
        return self.whole(y_1, (y_2 - t) * (-bounded(s)).exp())


class MaskedCoupling(Bijection):
    """y = b x + (1 - b) (x exp(s(b x)) + t(b x)) with a mask b (1, H, W) (Real NVP, eq. 9).

    ``net`` maps b x, with ``given`` (n, ., H, W) as further channels where there is some, to s and t.
    """

    b: Tensor

    def __init__(self, b: Tensor, net: nn.Module) -> None:
        super().__init__()
        self.register_buffer("b", b, persistent=False)
        self.net = net

    def _s_t(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = self.b * x
        s, t = wide(self.net(kept if given is None else torch.cat([kept, given], 1))).chunk(2, 1)
        return bounded(s) * (1 - self.b), t * (1 - self.b)

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, t = self._s_t(x, given)
        return x * s.exp() + t, s.flatten(1).sum(1)

    def inverse(self, y: Tensor, given: Tensor | None = None) -> Tensor:
        s, t = self._s_t(y, given)
        return (y - t) * (-s).exp()


def mask(kind: Mask, height: int, width: int, swap: bool = False) -> Tensor:
    """b (1, H, W) of ones and zeros: a checkerboard, or the upper and the lower half; ``swap`` exchanges the two."""
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    b = (i + j) % 2 == 0 if kind == "checkerboard" else i < height // 2
    return (b ^ swap)[None].to(torch.get_default_dtype())


class ResidualNet(nn.Sequential):
    """(n, n_in, H, W) -> (n, n_out, H, W) by ``blocks`` residual blocks of ``channels``; 0 at the start."""

    def __init__(self, n_in: int, n_out: int, channels: int, blocks: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(n_in, channels, 3, padding=1),
            *(_Residual(channels, dropout) for _ in range(blocks)),
            nn.ReLU(),
            zeroed(nn.Conv2d(channels, n_out, 3, padding=1)),
        )


class _Residual(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            Dropout(dropout),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out


# ---------------------------------------------------------------------------------------------- scales


class Squeeze(Bijection):
    """(n, C, H, W) -> (n, 4 C, H / 2, W / 2): each 2 x 2 square becomes channels, its diagonal the first half of them.

    So half of the channels are a checkerboard of the pixels.
    """

    PLACES = ((0, 0), (1, 1), (0, 1), (1, 0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x[:, :, i::2, j::2] for i, j in self.PLACES], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        n, C, H, W = y.shape
        x = y.new_empty(n, C // 4, 2 * H, 2 * W)
        for (i, j), part in zip(self.PLACES, y.chunk(4, 1)):
            x[:, :, i::2, j::2] = part
        return x


class MultiScale(Bijection):
    """Scales one after another; after each but the last, half of the channels leave as latents (Real NVP, eqs. 14-16).

    ``scales``: bijections of images. ``shapes``: (C, H, W) that each of them gives. ``priors``, where given, map the
    half that goes on to mean and log-scale (along the channels) of the half that leaves, which leaves as noise:
    (z - mu) / sigma (Glow's learned priors). Images (n, C, H, W) -> z (n, D), the last scale's latents last.
    """

    def __init__(
        self,
        scales: Sequence[Bijection],
        shapes: Sequence[tuple[int, int, int]],
        priors: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.scales, self.shapes = nn.ModuleList(scales), list(shapes)
        self.priors = nn.ModuleList(priors) if priors is not None else None

    def _prior(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.priors is not None
        mu, log_sigma = wide(self.priors[i](x)).chunk(2, 1)
        return mu, bounded(log_sigma)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = [], x.new_zeros(len(x))
        for i, scale in enumerate(self.scales):
            x, more = scale(x)
            log_det = log_det + more
            if i + 1 < len(self.scales):
                x, out = x.chunk(2, 1)
                if self.priors is not None:
                    mu, log_sigma = self._prior(i, x)
                    out, log_det = (out - mu) * (-log_sigma).exp(), log_det - log_sigma.flatten(1).sum(1)
                z.append(out.flatten(1))
        return torch.cat([*z, x.flatten(1)], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        last = len(self.scales) - 1
        sizes = [C * H * W // (2 if i < last else 1) for i, (C, H, W) in enumerate(self.shapes)]
        parts = z.split(sizes, 1)
        x = parts[-1].unflatten(1, self.shapes[-1])
        for i in range(last, -1, -1):
            if i < last:
                C, H, W = self.shapes[i]
                out = parts[i].unflatten(1, (C // 2, H, W))
                if self.priors is not None:
                    mu, log_sigma = self._prior(i, x)
                    out = out * log_sigma.exp() + mu
                x = torch.cat([x, out], 1)
            scale = self.scales[i]
            assert isinstance(scale, Bijection)
            x = scale.inverse(x)
        return x


def check_squeezes(times: int, name: str, shape: Sequence[int], key: str) -> None:
    """UsageError unless images of ``shape`` can be squeezed ``times`` times, as the config's ``key`` asks for."""
    sides = 2**times
    if shape[1] % sides or shape[2] % sides:
        most = 0
        while shape[1] % 2 ** (most + 1) == 0 and shape[2] % 2 ** (most + 1) == 0:
            most += 1
        raise UsageError(
            f"{name} is {shape[1]} x {shape[2]}: {times} squeezes need sides divisible by {sides}, "
            f"and {most or 'none'} fit{'s' * (most <= 1)} (model.{key})"
        )
