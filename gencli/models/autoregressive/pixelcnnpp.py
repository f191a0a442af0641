"""PixelCNN++: PixelCNN with a mixture of discretised logistics for each pixel, at three resolutions with shortcuts.

    nu ~ sum_m pi_m logistic(mu_m, s_m),  P(x) = sum_m pi_m [F((x + .5 - mu_m) / s_m) - F((x - .5 - mu_m) / s_m)]
                                                  the end levels' bins reach to infinity                (eqs. 1, 2)
    mu_G += alpha x_R,  mu_B += beta x_R + gamma x_G      colours in turn, one mixture index a pixel        (eq. 3)

Two streams as in the gated PixelCNN: ``u`` sees all rows above, ``ul`` those and the pixels to the left. Six blocks of
gated residual layers: three going down, at the resolutions 1, 1/2 and 1/4, three going up (figure 2), and each layer
going up sees its counterpart going down.

References:
    PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications, Salimans,
    Karpathy, Chen, Kingma, 2017, arXiv 1701.05517
    Weight Normalization, Salimans, Kingma, 2016, arXiv 1602.07868 (the first batch sets every layer's scale)
    Fast Generation for Convolutional Autoregressive Models, Ramachandran et al., 2017, arXiv 1704.06001 (sampling)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.causal import Naive, Network, concat_elu, draw_pixels
from gencli.nn.causal_cache import LevelCache, TwoRows
from gencli.nn.conditional import Conditional
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.mixtures import LogisticMixture, LogLikelihood
from gencli.nn.weightnorm import NormedConv2d, NormedConvTranspose2d, initialise
from gencli.rng import Rng

__all__ = ["PixelCNNPP", "PixelCNNPPConfig"]

LEVELS = 3  # resolutions


class PixelCNNPPConfig(Config):
    """The hyper-parameters of a PixelCNN++."""

    filters: int = Field(160, ge=1, description="features of each layer")
    layers: int = Field(5, ge=1, description="gated residual layers in each of the six blocks")
    mixtures: int = Field(10, ge=1, description="logistics in each pixel's mixture")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout within each residual layer")
    conditional: bool = Field(False, description="condition on the class, by a bias in every layer")
    log_likelihood: LogLikelihood = Field(
        "exact", description="the logistics' exact masses, or OpenAI's approximation where they are below 1e-5"
    )


def down(n_in: int, n_out: int, kernel: tuple[int, int] = (2, 3), shift: int = 0, **more: Any) -> NormedConv2d:
    """A convolution for u: the kernel's last row is the pixel's own, its columns are centred; ``shift`` rows up."""
    h, w = kernel
    return NormedConv2d(n_in, n_out, kernel, (w // 2, w // 2, h - 1 + shift, -shift), **more)


def down_right(n_in: int, n_out: int, kernel: tuple[int, int] = (2, 2), shift: int = 0, **more: Any) -> NormedConv2d:
    """A convolution for ul: the kernel's last row and column are the pixel's own; ``shift`` columns to the left."""
    h, w = kernel
    return NormedConv2d(n_in, n_out, kernel, (w - 1 + shift, -shift, h - 1, 0), **more)


class GatedResnet(nn.Module):
    """x + a sigmoid(b) with (a, b) from two convolutions of x; ``n_skip`` features come in by a 1x1 between them."""

    def __init__(self, conv: Callable[..., NormedConv2d], c: PixelCNNPPConfig, n_skip: int, classes: int) -> None:
        super().__init__()
        p = c.filters
        self.first = conv(2 * p, p)
        self.skip = NormedConv2d(2 * n_skip, p) if n_skip else None
        self.dropout = Dropout(c.dropout)
        self.second = conv(2 * p, 2 * p, init_scale=0.1)
        self.V = nn.Linear(classes, 2 * p, bias=False) if classes else None

    def forward(self, x: Tensor, skip: Tensor | None, h: Tensor | None) -> Tensor:
        """Features (n, p, H, W), what comes in (n, n_skip, H, W), one-hot classes (n, classes) to (n, p, H, W)."""
        c = self.first(concat_elu(x))
        if self.skip is not None and skip is not None:
            c = c + self.skip(concat_elu(skip))
        c = self.second(self.dropout(concat_elu(c)))
        if self.V is not None:
            c = c + self.V(h)[:, :, None, None]
        a, b = c.chunk(2, 1)
        return x + a * b.sigmoid()


class Layer(nn.Module):
    """A residual layer of both streams, going down (``shortcut=False``) or up."""

    def __init__(self, c: PixelCNNPPConfig, classes: int, shortcut: bool) -> None:
        super().__init__()
        p = c.filters
        self.u = GatedResnet(down, c, p * shortcut, classes)
        self.ul = GatedResnet(down_right, c, p + p * shortcut, classes)

    def forward(
        self, u: Tensor, ul: Tensor, h: Tensor | None, skips: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams' features, and those of the counterpart going down, to both streams' features."""
        if skips is None:
            u = self.u(u, None, h)
            return u, self.ul(ul, u, h)
        u = self.u(u, skips[0], h)
        return u, self.ul(ul, torch.cat([u, skips[1]], 1), h)


class Level(nn.Module):
    """All that happens at one resolution: a block going down, the coarser level within, a block going up."""

    def __init__(self, c: PixelCNNPPConfig, classes: int, coarser: int) -> None:
        super().__init__()
        p, coarsest = c.filters, coarser == 0
        self.down = nn.ModuleList(Layer(c, classes, False) for _ in range(c.layers))
        self.inner = None if coarsest else Level(c, classes, coarser - 1)
        if not coarsest:
            self.shrink = nn.ModuleList([down(p, p, stride=2), down_right(p, p, stride=2)])
            self.grow = nn.ModuleList(
                NormedConvTranspose2d(p, p, (2, k), ((k - 1) // 2, 0, 0, 0), stride=2) for k in (3, 2)
            )
        self.up = nn.ModuleList(Layer(c, classes, True) for _ in range(c.layers + (not coarsest)))

    def forward(self, u: Tensor, ul: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both streams' features (n, p, H, W) and one-hot classes to both streams' features."""
        skips = [(u, ul)]
        for layer in self.down:
            u, ul = layer(u, ul, h)
            skips.append((u, ul))
        if self.inner is None:
            skips.pop()
        else:
            u, ul = self.inner(*(conv(x) for conv, x in zip(self.shrink, (u, ul))), h)
            u, ul = (conv(x) for conv, x in zip(self.grow, (u, ul)))
        for layer in self.up:
            u, ul = layer(u, ul, h, skips.pop())
        return u, ul


class PixelCNNPP(Conditional, Model):
    """PixelCNN++: exact likelihood, exact samples."""

    Config = PixelCNNPPConfig
    likelihood = "exact"
    config: PixelCNNPPConfig

    def __init__(self, config: PixelCNNPPConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind != "image" or spec.levels is None:
            raise UsageError(f"pixelcnnpp models images of integer levels, and {spec.name} has none")
        self.check_classes()
        C, H, W = spec.shape
        if H % 4 or W % 4:
            raise UsageError(f"pixelcnnpp halves images twice: {spec.name} is {H}x{W}, and 4 should divide both")
        p, classes = config.filters, len(spec.classes) if config.conditional else 0
        self.mixture = LogisticMixture(C, spec.levels, config.mixtures, config.log_likelihood)
        # one channel more than colours: ones, which tell the image from its padding
        self.above = down(C + 1, p, shift=1)
        self.row_above = down(C + 1, p, (1, 3), shift=1)
        self.left = down_right(C + 1, p, (2, 1), shift=1)
        self.levels = Level(config, classes, LEVELS - 1)
        self.head = NormedConv2d(p, self.mixture.parameters)
        name_layers(self)

    def prepare(self, b: Any, s: Step) -> None:
        """Every layer's output has zero mean and unit variance over the first batch (section 3 of 1602.07868)."""
        initialise(self, lambda: self(b.x, self._labels(b)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mixtures' parameters (n, parameters, H, W) of raw images (n, C, H, W)."""
        return self.network(self.spec.scale(x), self.one_hot(labels))

    def network(self, x: Tensor, h: Tensor | None) -> Tensor:
        """As :meth:`forward`, of scaled images and one-hot classes."""
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1).contiguous(memory_format=torch.channels_last)
        _, ul = self.levels(self.above(x), self.row_above(x) + self.left(x), h)
        return self.head(F.elu(ul))

    def _labels(self, b: Any) -> Tensor | None:
        return b.label if self.conditional else None

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Nats a dimension."""
        nats = -self.mixture.log_prob(b.x, self(b.x, self._labels(b))).mean() / b.x.shape[1]
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2)}

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | label), in nats: (n,) for raw images (n, C, H, W)."""
        return self.mixture.log_prob(x, self(x, labels)).sum((1, 2))

    @torch.no_grad()
    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Raw images (n, C, H, W), drawn exactly, every feature of every pixel computed once.

        ``temperature`` divides the mixtures' logits and multiplies the logistics' scales.
        """
        return self._draw(rng, lambda x: Cached(self, len(x), self.one_hot(labels)), temperature)

    @torch.no_grad()
    def complete(
        self, x: Tensor, known: int, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Raw images (n, C, H, W): the first ``known`` pixels, in raster order, of raw ``x``, the others drawn."""
        return self._draw(rng, lambda x: Cached(self, len(x), self.one_hot(labels)), temperature, x, known)

    @torch.no_grad()
    def sample_naive(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """The same images by a pass over the whole image for every pixel: oracle and baseline of :meth:`sample`."""
        return self._draw(rng, lambda x: Naive(lambda x: self(x, labels), x, 1), temperature)

    def _draw(
        self,
        rng: Rng,
        network: Callable[[Tensor], Network],
        temperature: float,
        given: Tensor | None = None,
        known: int = 0,
    ) -> Tensor:
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        C, H, W = self.spec.shape
        u = rng.uniform("pixel", (rng.n, 1 + C, H, W))  # a pixel's component, then its colours
        given = torch.zeros_like(u[:, :C]) if given is None else given
        x = draw_pixels(network(given), u, 1, temperature, given, known, self.mixture.sample)
        return x.to(torch.uint8 if self.mixture.levels <= 256 else torch.int16)


class Cached:
    """The network in a sampler (a ``nn.causal.Network``): every feature of every pixel is computed once."""

    def __init__(self, model: PixelCNNPP, n: int, h: Tensor | None) -> None:
        C, _, W = model.spec.shape
        head, left = model.head.kernel()[:, :, 0, 0], model.left.kernel()
        self.scaled = model.spec.scale(torch.arange(model.mixture.levels)).to(head)
        self.level = LevelCache(model.levels, n, W, h)
        self.above, self.row_above = TwoRows(model.above, n, W), TwoRows(model.row_above, n, W)
        self.left_above, self.left, self.bias = left[:, :, 0, 0], left[:, :, 1, 0].T, model.left.b
        self.head, self.head_bias = head.T, model.head.b
        self.line = head.new_zeros(n, 1 + W, C + 1)  # the row of the image under way, after the padding
        self.line[:, 1:, C] = 1
        self.pixels, self.places = self.line.unbind(1), self.line[:, 1:, :C].unbind(1)
        self.first = head.new_empty(n, W, len(self.bias))
        self.firsts = self.first.unbind(1)

    def logits(self, i: int, j: int, g: int) -> Tensor:
        if j == 0:
            self._start(i)
        torch.addmm(self.firsts[j], self.pixels[j], self.left, out=self.level.x)
        self.level.pixel(i, j)
        return torch.addmm(self.head_bias, F.elu(self.level.x), self.head)

    def _start(self, i: int) -> None:
        if i > 0:
            for rows in (self.above, self.row_above):
                rows.put(self.line[:, 1:])
        self.first.copy_(self.row_above.output() + self.bias)
        if i > 0:
            self.first += F.linear(self.line[:, :-1], self.left_above)
        self.level.start(i, self.above.output())

    def put(self, i: int, j: int, g: int, level: Tensor) -> None:
        self.places[j].copy_(self.scaled[level])
