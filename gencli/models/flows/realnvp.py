"""Real NVP: affine couplings; for images with checkerboard and channel masks, and latents that leave at every scale.

    y = b x + (1 - b) (x exp(s(b x)) + t(b x)),   log|det dy/dx| = sum (1 - b) s(b x)                    (eqs. 4, 6, 9)
    h0 = x;  (z_i, h_i) = f_i(h_{i-1});  z = (z_1, ..., z_L)                                          (eqs. 13 to 16)

f_i of an image: couplings with a checkerboard as b, a squeeze of 2 x 2 pixels into channels, couplings between halves
of the channels, and half of the channels leave; the last scale is four checkerboard couplings (sections 3.4 to 3.6).
For points: multi-layer perceptrons between the dimensions with an odd and with an even place.

Departures: actnorm (Glow, 1807.03039) stands before each coupling in place of batch normalisation, whose running
averages can make test likelihoods explode, and s is bounded by 2 tanh(s / 2) without a learned factor.

Reference: Density estimation using Real NVP, Dinh, Sohl-Dickstein, Bengio, 2016, arXiv 1605.08803.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn.bijections import ActNorm, Bijection, Chain
from gencli.nn.couplings import (
    AffineCoupling,
    Mask,
    MaskedCoupling,
    MultiScale,
    ResidualNet,
    Squeeze,
    check_squeezes,
    mask,
    zeroed,
)
from gencli.nn.dropout import name_layers
from gencli.nn.flow import Flow, FlowConfig
from gencli.nn.mlp import Activation, mlp

__all__ = ["RealNVP", "RealNVPConfig"]


class RealNVPConfig(FlowConfig):
    """``scales``, ``channels``, ``blocks`` and ``masks`` are for images, ``couplings``, ``hidden``, ``activation`` for
    points."""

    scales: int = Field(2, ge=1, description="L: resolutions; each but the last squeezes once")
    channels: int = Field(64, ge=1, description="of the residual networks; twice as many after each squeeze")
    blocks: int = Field(8, ge=0, description="residual blocks in each s and t")
    masks: Mask = Field("checkerboard", description="between pixels: checkerboard, or the upper and lower halves")
    couplings: int = Field(6, ge=2, description="coupling layers")
    hidden: tuple[int, ...] = Field((64, 64), description="widths of the perceptrons' hidden layers")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="part of the hidden units dropped")


class RealNVP(Flow):
    """Couplings over images of any even size, or points."""

    Config = RealNVPConfig

    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind not in ("image", "points"):
            raise UsageError(f"realnvp is for images and points, and {spec.name} is {spec.kind}")
        self.flow: Bijection = self._of_points(spec.dims) if spec.kind == "points" else self._of_images(spec.shape)
        name_layers(self)

    def _of_points(self, D: int) -> Bijection:
        c = self.config
        if D < 2:
            raise UsageError(f"a coupling needs at least 2 dimensions, and {self.spec.name} has {D}: try cdf-flow")

        def layer(i: int) -> Chain:
            n_1, n_2 = (D // 2, (D + 1) // 2) if i % 2 else ((D + 1) // 2, D // 2)
            net = mlp(n_1, c.hidden, 2 * n_2, c.activation, c.dropout)
            zeroed(net[-1])
            return Chain([ActNorm(D), AffineCoupling(net, swap=i % 2 == 1, even=True)])

        return Chain(layer(i) for i in range(c.couplings))

    def _of_images(self, shape: tuple[int, ...]) -> Bijection:
        C, H, W = shape
        c, scales, shapes = self.config, [], []
        check_squeezes(c.scales - 1, self.spec.name, shape, "scales")

        def between_pixels(i: int, channels: int) -> Chain:
            net = ResidualNet(C, 2 * C, channels, c.blocks, c.dropout)
            return Chain([ActNorm(C), MaskedCoupling(mask(c.masks, H, W, i % 2 == 1), net)])

        def between_channels(i: int, channels: int) -> Chain:
            net = ResidualNet(2 * C, 4 * C, channels, c.blocks, c.dropout)
            return Chain([ActNorm(4 * C), AffineCoupling(net, swap=i % 2 == 1)])

        for scale in range(c.scales):
            channels = c.channels << scale
            if scale + 1 == c.scales:
                scales.append(Chain(between_pixels(i, channels) for i in range(4)))
                shapes.append((C, H, W))
                break
            pixels = [between_pixels(i, channels) for i in range(3)]
            scales.append(Chain([*pixels, Squeeze(), *(between_channels(i, 2 * channels) for i in range(3))]))
            shapes.append((4 * C, H // 2, W // 2))
            C, H, W = 2 * C, H // 2, W // 2
        return MultiScale(scales, shapes)

    def f(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow(x)
        return z, log_det

    def f_inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.flow.inverse(z)
