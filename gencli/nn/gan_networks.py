"""Generators and discriminators: perceptrons for points and small images, and for images DCGAN's and SNGAN's.

A generator maps (n, inputs) to (n, *shape) without a last squashing; a discriminator's body maps (n, *shape) to
features (n, outputs), and :class:`Head` those to d (n,). Image networks begin and end at a map of at most 8 pixels a
side, which is doubled from layer to layer: sizes b 2^k. 8x8 images begin at 2x2, 28x28 at 7x7, 32x32 at 4x4.

References:
    Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks, Radford, Metz,
    Chintala, 2015, arXiv 1511.06434
    Improved Techniques for Training GANs, Salimans et al., 2016, arXiv 1606.03498 (minibatch discrimination,
    section 3.2)
    Spectral Normalization for Generative Adversarial Networks, Miyato et al., 2018, arXiv 1802.05957 (residual
    networks, appendix B.4)
    cGANs with Projection Discriminator, Miyato, Koyama, 2018, arXiv 1802.05637 (eq. 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from gencli import rng
from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn import grey
from gencli.nn.gan_norms import Norm, Stack, normalisation
from gencli.nn.mlp import Activation, activation
from gencli.nn.spectral_norm import SNConv2d, SNEmbedding, SNLinear

__all__ = ["Head", "MinibatchDiscrimination", "Network", "NormD", "body", "generator", "halvings", "initialise"]

Network = Literal["mlp", "dcgan", "resnet"]
NormD = Literal["batch", "layer", "spectral", "none"]


def halvings(name: str, shape: tuple[int, ...]) -> int:
    """How often the sides of an image are halved, to a map of 8 pixels a side at most; UsageError if they cannot be."""
    _, H, W = shape
    k = 0
    while H % 2 == W % 2 == 0 and min(H, W) > 2 and (k < 2 or max(H, W) >= 8):
        H, W, k = H // 2, W // 2, k + 1
    if k and max(H, W) <= 8:
        return k
    near = [b << j for b in (4, 5, 6, 7) for j in range(1, 9)]
    fits = min(near, key=lambda side: abs(side - max(shape[1:])))
    raise UsageError(
        f"the images of {name} are {shape[1]}x{shape[2]}; this network makes sides of b 2^k, such as {fits}x{fits}",
        hint=f"a folder of images can be cropped and reduced: --data PATH:{fits}",
    )


@dataclass(frozen=True)
class _Kit:
    """The layers of a network that differ with its normalisation."""

    norm: Norm
    act: Activation = "relu"
    spectral: bool = False
    classes: int = 0
    reference: int = 0

    @property
    def bias(self) -> bool:
        """Not where a normalisation over the batch follows, be it blocks later: its gradient would be rounding."""
        return self.norm not in ("batch", "virtual")

    def linear(self, n_in: int, n_out: int, bias: bool = True) -> nn.Module:
        return SNLinear(n_in, n_out, bias) if self.spectral else nn.Linear(n_in, n_out, bias)

    def conv(
        self, n_in: int, n_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> nn.Module:
        if self.spectral:
            return SNConv2d(n_in, n_out, kernel, stride, padding)
        return grey.Conv2d(n_in, n_out, kernel, stride, padding, bias=bias)

    def normed(self, features: int) -> list[nn.Module]:
        """Normalisation, if any, and the nonlinearity."""
        norms = normalisation(self.norm, features, self.classes, self.reference)
        return [*norms, nn.LeakyReLU(0.2) if self.act == "leaky-relu" else activation(self.act)]


# ---------------------------------------------------------------------------------------------- generators


def generator(
    network: Network,
    inputs: int,
    spec: DataSpec,
    *,
    hidden: tuple[int, ...],
    channels: int,
    norm: Norm,
    classes: int = 0,
    reference: int = 0,
) -> Stack:
    """(n, inputs), and labels (n,) if ``classes``, -> (n, *shape). ``channels``: of the map next to the image.

    ``reference``: rows of virtual batch norm's batch, which come first.
    """
    kit = _Kit(norm, classes=classes, reference=reference)
    if network == "mlp":
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width, kit.bias), *kit.normed(width)]
            inputs = width
        return Stack(*layers, nn.Linear(inputs, spec.dims), nn.Unflatten(1, spec.shape))
    k = halvings(spec.name, spec.shape)
    C, H, W = spec.shape
    small = (H >> k, W >> k)
    return (_deconvolutions if network == "dcgan" else _residual_up)(kit, inputs, C, k, small, channels)


class _Map(nn.Unflatten):
    """(n, features H W) -> (n, features, H, W), with its channels last where those of ``next_one``'s weights are.

    A convolution would turn it itself, but the normalisation before it takes five times as long the other way round.
    """

    def __init__(self, shape: tuple[int, ...], next_one: nn.Module) -> None:
        super().__init__(1, shape)
        self._next = (next_one,)  # not a part of this

    def forward(self, x: Tensor) -> Tensor:
        weight = self._next[0].weight
        last = isinstance(weight, Tensor) and weight.is_contiguous(memory_format=torch.channels_last)
        return super().forward(x).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _deconvolutions(kit: _Kit, inputs: int, C: int, k: int, small: tuple[int, int], channels: int) -> Stack:
    """DCGAN, figure 1: from ``channels`` 2^(k - 1) features, halved at each transposed convolution, to the image."""
    n = channels << (k - 1)
    first = nn.Linear(inputs, n * math.prod(small), kit.bias)
    layers: list[nn.Module] = []
    shape = (n, *small)
    for _ in range(k - 1):
        layers += [*kit.normed(n), nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=kit.bias)]
        n //= 2
    layers += [*kit.normed(n), grey.ConvTranspose2d(n, C, 4, 2, 1)]
    convolution = next(layer for layer in layers if isinstance(layer, nn.ConvTranspose2d))
    return Stack(first, _Map(shape, convolution), *layers)


class _Up(nn.Module):
    """Norm, ReLU, twice the size, 3x3 convolution, norm, ReLU, 3x3 convolution; beside a 1x1 convolution, doubled."""

    takes_labels = True

    def __init__(self, kit: _Kit, n_in: int, n_out: int) -> None:
        super().__init__()
        double = nn.Upsample(scale_factor=2)
        first = nn.Conv2d(n_in, n_out, 3, padding=1, bias=kit.bias)
        self.F = Stack(
            *kit.normed(n_in), double, first, *kit.normed(n_out), nn.Conv2d(n_out, n_out, 3, padding=1, bias=kit.bias)
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(n_in, n_out, 1, bias=kit.bias), double
        )  # the same, before or after, and cheaper

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.F(x, labels) + self.shortcut(x)


def _residual_up(kit: _Kit, inputs: int, C: int, k: int, small: tuple[int, int], channels: int) -> Stack:
    """SNGAN, table 4: k blocks of equal width; above three of them the last ones, near the image, have half each."""
    widths = [channels << max(0, k - 3 - i) for i in range(k + 1)]
    first = nn.Linear(inputs, widths[0] * math.prod(small), kit.bias)
    blocks = [_Up(kit, n_in, n_out) for n_in, n_out in pairwise(widths)]
    last = [*kit.normed(channels), nn.Conv2d(channels, C, 3, padding=1)]
    return Stack(first, _Map((widths[0], *small), last[-1]), *blocks, *last)


# ---------------------------------------------------------------------------------------------- discriminators


def body(
    network: Network, spec: DataSpec, *, hidden: tuple[int, ...], channels: int, norm: NormD, act: Activation
) -> tuple[nn.Sequential, int]:
    """(n, *shape) -> features (n, outputs), and ``outputs``. ``channels``: of the first map. The first has no norm."""
    kit = _Kit("none" if norm == "spectral" else norm, act, spectral=norm == "spectral")
    plain = _Kit("none", act, spectral=kit.spectral)
    if network == "mlp":
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = spec.dims
        for i, width in enumerate(hidden):
            here = kit if i else plain
            layers += [kit.linear(inputs, width, here.bias), *here.normed(width)]
            inputs = width
        return nn.Sequential(*layers), inputs
    k = halvings(spec.name, spec.shape)
    C, H, W = spec.shape
    if network == "resnet":
        return _residual_down(kit, C, k, channels)
    layers = [kit.conv(C, channels, 4, 2, 1), *plain.normed(channels)]
    n = channels
    for _ in range(k - 1):
        layers += [kit.conv(n, 2 * n, 4, 2, 1, kit.bias), *kit.normed(2 * n)]
        n *= 2
    return nn.Sequential(*layers, nn.Flatten()), n * (H >> k) * (W >> k)


class _Down(nn.Module):
    """Norm, ReLU, 3x3 convolution, norm, ReLU, 3x3 convolution, half the size; beside a 1x1 convolution, halved.

    The first of all has no norm and ReLU before it. A block that neither halves nor widens has the identity beside it.
    """

    def __init__(self, kit: _Kit, n_in: int, n_out: int, halve: bool, first: bool = False) -> None:
        super().__init__()
        pool = [nn.AvgPool2d(2)] if halve else []
        self.F = nn.Sequential(
            *([] if first else kit.normed(n_in)),
            kit.conv(n_in, n_out, 3, padding=1, bias=kit.bias),
            *kit.normed(n_out),
            kit.conv(n_out, n_out, 3, padding=1, bias=kit.bias),
            *pool,
        )
        same = n_in == n_out and not halve
        self.shortcut = nn.Identity() if same else nn.Sequential(*pool, kit.conv(n_in, n_out, 1, bias=kit.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.F(x) + self.shortcut(x)


class _Sum(nn.Module):
    """(n, features, H, W) -> (n, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


def _residual_down(kit: _Kit, C: int, k: int, channels: int) -> tuple[nn.Sequential, int]:
    """SNGAN, table 4: halved to 8x8 or 4x4, two blocks more, ReLU, and the sum over positions."""
    downs = max(1, k - 1)
    widths = [C, *(channels << max(0, i - 2) for i in range(downs))]
    layers: list[nn.Module] = [
        _Down(kit, n_in, n_out, halve=True, first=i == 0) for i, (n_in, n_out) in enumerate(pairwise(widths))
    ]
    n = widths[-1]
    layers += [_Down(kit, n, n, halve=False) for _ in range(2)]
    return nn.Sequential(*layers, *kit.normed(n), _Sum()), n


class MinibatchDiscrimination(nn.Module):
    """Features that tell how near an example is to the others of its batch (section 3.2).

        M_i = T f(x_i),   c_b(i, j) = exp(-||M_i,b - M_j,b||_1),   o(x_i)_b = sum_j c_b(i, j)

    (n, inputs) -> (n, inputs + kernels): f and o. The sum is over the global batch, of real data or of samples alone.
    """

    def __init__(self, inputs: int, kernels: int, dims: int = 5) -> None:
        super().__init__()
        self.T = nn.Parameter(0.05 * torch.randn(inputs, kernels, dims))

    def forward(self, f: Tensor) -> Tensor:
        M = torch.einsum("na,abc->nbc", f, self.T)
        M = M.to(torch.promote_types(M.dtype, torch.float32))
        everyone = rng.ambient().gather(M)
        distances = torch.cdist(M.transpose(0, 1), everyone.transpose(0, 1), p=1)  # (kernels, n, all)
        return torch.cat([f, (-distances).exp().sum(2).T.to(f.dtype)], 1)


class Head(nn.Module):
    """Features (n, inputs) -> d (n,): linear, plus the projection on its class's vector where there are ``classes``."""

    def __init__(self, inputs: int, *, spectral: bool = False, classes: int = 0) -> None:
        super().__init__()
        self.linear = SNLinear(inputs, 1) if spectral else nn.Linear(inputs, 1)
        embedding: Callable[[int, int], nn.Module] = SNEmbedding if spectral else nn.Embedding
        self.V = embedding(classes, inputs) if classes else None

    def forward(self, f: Tensor, labels: Tensor | None = None) -> Tensor:
        d = self.linear(f)[:, 0]
        return d if self.V is None else d + (self.V(labels) * f).sum(1)


# ---------------------------------------------------------------------------------------------- initial weights


@torch.no_grad()
def initialise(net: nn.Module, network: Network, normed: bool) -> None:
    """He et al.'s uniform weights in perceptrons, as torch's own are too small for ReLU, but in their last layer, and
    N(0, 0.02) in a DCGAN whose layers are normalised, as its paper has it; Glorot's in residual networks, as SNGAN's
    code has them. Biases are torch's: with biases of 0 a perceptron of few inputs would be linear along every ray."""
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    for layer in net.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding) or weight is None:
            continue
        if isinstance(layer, nn.Embedding) or network == "resnet":
            nn.init.xavier_uniform_(weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
        elif network == "dcgan" and normed:
            nn.init.normal_(weight, 0, 0.02)
        elif network == "dcgan" or layer is not last:
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", mode=mode)
            if isinstance(layer, nn.ConvTranspose2d):  # a share of 1 / stride^2 of its kernel meets each output
                weight.mul_(layer.stride[0])
