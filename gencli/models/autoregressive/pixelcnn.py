"""PixelCNN: an image's likelihood as a product over its pixels, each from a softmax that sees the pixels before it.

    p(x) = prod_i p(x_i | x_1, ..., x_{i-1})                      in raster order, colours R, G, B in turn  (eq. 1)
    y = tanh(W_f * x + V_f^T h) . sigmoid(W_g * x + V_g^T h)      the gated unit, h a class in one-hot form (eq. 4)

A vertical stack sees all rows above, a horizontal one the pixels to the left and, at each layer, the vertical stack:
together they see everything that came before, where the single stack of masked convolutions has a blind spot.

References:
    Conditional Image Generation with PixelCNN Decoders, van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves,
    Kavukcuoglu, 2016, arXiv 1606.05328 (``stacks="gated"``, section 2)
    Pixel Recurrent Neural Networks, van den Oord, Kalchbrenner, Kavukcuoglu, 2016, arXiv 1601.06759
    (``stacks="single"``, section 3.4; masks A and B and the order of colours, section 3.3)
    Fast Generation for Convolutional Autoregressive Models, Ramachandran et al., 2017, arXiv 1704.06001 (sampling)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step
from gencli.nn.causal import (
    CausalConv2d,
    Chain,
    ColourNorm,
    HorizontalConv2d,
    Line,
    Naive,
    Network,
    Rows,
    VerticalConv2d,
    by_colour,
    centre,
    draw_pixels,
)
from gencli.nn.conditional import Conditional
from gencli.nn.dropout import Dropout, name_layers
from gencli.rng import Rng

__all__ = ["PixelCNN", "PixelCNNConfig"]


class PixelCNNConfig(Config):
    """The hyper-parameters of a PixelCNN."""

    stacks: Literal["gated", "single"] = Field(
        "gated", description="vertical and horizontal gated stacks, or one stack of masked convolutions with ReLUs"
    )
    channels: int = Field(64, ge=1, description="features p of each layer")
    layers: int = Field(5, ge=0, description="layers after the first: gated blocks, or masked B convolutions")
    first_kernel: int = Field(7, ge=3, description="width of the first layer's kernel (mask A), odd")
    kernel: int = Field(3, ge=1, description="width of the other layers' kernels, odd")
    head: int | None = Field(None, ge=1, description="features between the two last 1x1 convolutions; null = channels")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the outputs of all gates (or ReLUs)")
    layer_norm: bool = Field(False, description="LayerNorm before the ReLUs of the single stack, as the course has it")
    conditional: bool = Field(False, description="condition on the class by V^T h in every layer (eq. 4)")
    colours: Literal["joint", "independent"] = Field(
        "joint", description="G sees R and B sees R and G of its pixel, or colours are independent given earlier pixels"
    )

    @field_validator("first_kernel", "kernel")
    @classmethod
    def _odd(cls, k: int) -> int:
        if k % 2 == 0:
            raise ValueError("should be odd: a kernel has a centre")
        return k


def gate(a: Tensor, dim: int = 1) -> Tensor:
    """Eq. 2: tanh of the first half of the features times sigmoid of the second."""
    f, g = a.chunk(2, dim)
    return f.tanh() * g.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2). The first sees the image: strictly above and, by mask A, to the left."""

    def __init__(self, n_in: int, c: PixelCNNConfig, colours: int, classes: int, first: bool) -> None:
        super().__init__()
        p, k = c.channels, c.first_kernel if first else c.kernel
        self.first = first
        self.vertical = VerticalConv2d(n_in, 2 * p, k, strict=first)
        self.horizontal = HorizontalConv2d(n_in, 2 * p, k, centre(n_in, p, colours, strict=first, gates=2))
        self.link = nn.Conv2d(2 * p, 2 * p, 1, bias=False)
        self.out = HorizontalConv2d(p, p, 1, centre(p, p, colours))
        self.V = nn.Linear(classes, 4 * p, bias=False) if classes else None
        self.dropout = Dropout(c.dropout)

    def forward(self, v: Tensor, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the vertical and the horizontal stack, and classes h, to both stacks' features (n, p, H, W)."""
        a = self.vertical(v)
        b = self.horizontal(x) + self.link(a)
        if self.V is not None:
            to_v, to_x = self.V(h)[:, :, None, None].chunk(2, 1)
            a, b = a + to_v, b + to_x
        out = self.out(self.dropout(gate(b)))
        return self.dropout(gate(a)), out if self.first else x + out


class GatedStacks(nn.Module):
    """The vertical and the horizontal stack."""

    def __init__(self, c: PixelCNNConfig, n_in: int, colours: int, classes: int) -> None:
        super().__init__()
        self.colours = colours
        widths = [n_in] + [c.channels] * c.layers
        self.layers = nn.ModuleList(GatedLayer(n, c, colours, classes, i == 0) for i, n in enumerate(widths))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        """Scaled images (n, C, H, W) and one-hot classes (n, classes) to features (n, p, H, W)."""
        v = x
        for layer in self.layers:
            v, x = layer(v, x, h)
        return x.relu()


class GatedCache:
    """The gated stacks in a sampler: the vertical one a row at a time, the horizontal one a pixel at a time."""

    def __init__(self, net: GatedStacks, top: Line, height: int, h: Tensor | None) -> None:
        n, width, _ = top.x.shape
        self.layers: list[Any] = list(net.layers)
        # V^T h of both gates, (n, 1, 2p) beside rows (n, W, 2p)
        self.label = [(0.0, 0.0) if h is None else layer.V(h)[:, None].chunk(2, 2) for layer in self.layers]
        self.rows = [Rows(layer.vertical, n, height, width) for layer in self.layers]
        self.lines = [Line(layer.horizontal, n, width, net.colours, gates=2) for layer in self.layers]
        self.gated = [Line(layer.out, n, width, net.colours) for layer in self.layers]
        self.next = [*self.lines[1:], top]
        self.b = [line.row.new_empty(n, width, len(line.order)) for line in self.lines]
        parts = [by_colour(b, net.colours, gates=2) for b in self.b]
        self.parts = [[[(part, *part.chunk(2, 1)) for part in colour] for colour in layer] for layer in parts]

    def start(self, i: int) -> None:
        """Row i begins, row i - 1 of the image is complete: compute all of row i that the rows above decide."""
        if i > 0:
            self.rows[0].put(i - 1, self.lines[0].x)
        for k, (layer, line, (to_v, to_x)) in enumerate(zip(self.layers, self.lines, self.label)):
            a = self.rows[k].output(i)
            self.b[k].copy_((F.linear(a, layer.link.weight[:, :, 0, 0]) + to_x)[..., line.order] + line.bias)
            self.next[k].x.copy_(self.gated[k].bias)
            if k + 1 < len(self.rows):
                self.rows[k + 1].put(i, gate(a + to_v, 2))

    def pixel(self, j: int, g: int) -> None:
        """Features of colour g at pixel j of the row."""
        for k, line in enumerate(self.lines):
            b, tanh, sigmoid = self.parts[k][g][j]
            line.add(b, j, g)
            torch.mul(tanh.tanh_(), sigmoid.sigmoid_(), out=self.gated[k].pixels[g][j])
            x = self.next[k].pixels[g][j]
            self.gated[k].add(x, j, g)
            if k > 0:
                x += line.pixels[g][j]
        x.relu_()


class SingleStack(nn.Module):
    """Masked convolutions, one A and then B, with ReLUs between them (and, from the later paper, V^T h)."""

    def __init__(self, c: PixelCNNConfig, n_in: int, colours: int, classes: int) -> None:
        super().__init__()
        self.colours, p = colours, c.channels
        widths, ks = [n_in] + [p] * c.layers, [c.first_kernel] + [c.kernel] * c.layers
        self.convs = nn.ModuleList(
            CausalConv2d(n, p, k, centre(n, p, colours, strict=i == 0)) for i, (n, k) in enumerate(zip(widths, ks))
        )
        self.V = nn.ModuleList(nn.Linear(classes, p, bias=False) for _ in widths if classes)
        self.norms = nn.ModuleList(ColourNorm(p, colours) for _ in range(c.layers if c.layer_norm else 0))
        self.dropout = nn.ModuleList(Dropout(c.dropout) for _ in widths)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        """As :meth:`GatedStacks.forward`."""
        for i, conv in enumerate(self.convs):
            x = conv(x) if h is None else conv(x) + self.V[i](h)[:, :, None, None]
            if i < len(self.norms):
                x = self.norms[i](x)
            x = self.dropout[i](x.relu())
        return x


class PixelCNN(Conditional, Model):
    """Gated PixelCNN, or the plain one: exact likelihood, exact samples."""

    Config = PixelCNNConfig
    likelihood = "exact"
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind != "image" or spec.levels is None:
            raise UsageError(f"pixelcnn models images of integer levels, and {spec.name} has none")
        self.check_classes()
        C, p, head = spec.shape[0], config.channels, config.head or config.channels
        self.levels = spec.levels
        self.colours = C if config.colours == "joint" else 1  # how many are drawn one after another
        if min(p, head) < self.colours:
            raise UsageError(f"model.channels and model.head must be at least {self.colours}, one for each colour")
        stack = GatedStacks if config.stacks == "gated" else SingleStack
        self.stack = stack(config, C, self.colours, len(spec.classes) if config.conditional else 0)
        self.head = HorizontalConv2d(p, head, 1, centre(p, head, self.colours))
        self.last = HorizontalConv2d(head, C * spec.levels, 1, centre(head, C * spec.levels, self.colours))
        name_layers(self)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (n, C, H, W, levels) of raw images (n, C, H, W)."""
        return self.network(self.spec.scale(x), self.one_hot(labels))

    def network(self, x: Tensor, h: Tensor | None) -> Tensor:
        """Logits of scaled images (n, C, H, W) and one-hot classes; convolutions are fastest in channels-last order."""
        z = self.last(self.head(self.stack(x.contiguous(memory_format=torch.channels_last), h)).relu())
        return z.unflatten(1, (x.shape[1], -1)).permute(0, 1, 3, 4, 2)

    def nll(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log p(x_i | x_1 .. x_{i-1}) in nats, (n, H, W, C), in float32 or better."""
        z, x = self(x, labels).permute(0, 2, 3, 1, 4), x.permute(0, 2, 3, 1)
        z = z.reshape(-1, self.levels).to(torch.get_default_dtype())
        return F.cross_entropy(z, x.reshape(-1).long(), reduction="none").view(x.shape)

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Nats a dimension."""
        nats = self.nll(b.x, b.label if self.conditional else None).mean()
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2)}

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | label), in nats: (n,) for raw images (n, C, H, W)."""
        return -self.nll(x, labels).sum((1, 2, 3))

    @torch.no_grad()
    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Raw images (n, C, H, W), drawn exactly; ``temperature`` divides the logits."""
        return self._draw(rng, lambda u: Cached(self, rng.n, self.one_hot(labels)), temperature)

    @torch.no_grad()
    def complete(
        self, x: Tensor, known: int, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Raw images (n, C, H, W): the first ``known`` pixels, in raster order, of raw ``x``, the others drawn."""
        return self._draw(rng, lambda u: Cached(self, rng.n, self.one_hot(labels)), temperature, x, known)

    @torch.no_grad()
    def sample_naive(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """The same images by a pass over the whole image for every draw: oracle and baseline of :meth:`sample`."""
        return self._draw(rng, lambda u: Naive(lambda x: self(x, labels), u, self.colours), temperature)

    def _draw(self, rng: Rng, network: Callable[[Tensor], Network], temperature: float, *given: Any) -> Tensor:
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        u = rng.uniform("pixel", (rng.n, *self.spec.shape))
        x = draw_pixels(network(u), u, self.colours, temperature, *given)
        return x.to(torch.uint8 if self.levels <= 256 else torch.int16)


class Cached:
    """The network in a sampler (a ``nn.causal.Network``): every feature of every pixel is computed once."""

    def __init__(self, model: PixelCNN, n: int, h: Tensor | None) -> None:
        _, H, W = model.spec.shape
        self.scaled = model.spec.scale(torch.arange(model.levels)).to(model.head.weight)
        stack, head = model.stack, [model.head, model.last]
        self.parts: list[Any]
        if isinstance(stack, GatedStacks):
            tail = Chain(head, n, H, W, model.colours)
            self.parts = [GatedCache(stack, tail.lines[0], H, h), tail]
        else:
            labels, norms = [V(h)[:, None] for V in stack.V], cast("list[ColourNorm]", list(stack.norms))
            self.parts = [Chain([*stack.convs, *head], n, H, W, model.colours, labels, norms)]

    def logits(self, i: int, j: int, g: int) -> Tensor:
        for part in self.parts:
            if j == g == 0:
                part.start(i)
            part.pixel(j, g)
        return self.parts[-1].pixels[g][j].unflatten(1, (-1, len(self.scaled)))

    def put(self, i: int, j: int, g: int, level: Tensor) -> None:
        self.parts[0].lines[0].pixels[g][j].copy_(self.scaled[level])
