"""Causal convolutions over images in raster order, cropped to the pixels that they may see.

A masked k x k kernel never looks below its centre row, so no kernel here has those rows: the rows above are one
convolution (:class:`VerticalConv2d`), the pixels to the left another (:class:`HorizontalConv2d`), and the masked
convolution of a plain PixelCNN (:class:`CausalConv2d`) is both in one. Only the centre pixel of images whose colours
depend on each other needs a mask, :func:`centre`.

:class:`Rows`, :class:`Line` and :class:`Chain` keep what a sampler has computed already, so that each new pixel costs
one small matrix product a layer instead of a pass over the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CausalConv2d",
    "Chain",
    "ColourNorm",
    "HorizontalConv2d",
    "Line",
    "Naive",
    "Network",
    "Rows",
    "VerticalConv2d",
    "by_colour",
    "centre",
    "concat_elu",
    "draw_pixels",
    "invert_cdf",
]


def colour_of(channels: int, colours: int) -> Tensor:
    """The colour that each of ``channels`` features belongs to: ``colours`` contiguous groups, in order."""
    return torch.arange(channels) * colours // channels


def centre(n_in: int, n_out: int, colours: int, strict: bool = False, gates: int = 1) -> bool | Tensor:
    """What a pixel's features see of the same pixel's: the centre of mask A (``strict``) or B.

    True for everything, False for nothing; with several colours a mask (gates * n_out, n_in): features of a colour
    see those of earlier colours and, under mask B, of their own. ``gates`` counts copies of the n_out features.
    """
    if colours == 1:
        return not strict
    mine, theirs = colour_of(n_out, colours)[:, None], colour_of(n_in, colours)
    return (mine > theirs if strict else mine >= theirs).repeat(gates, 1)


def _uniform(tensor: Tensor | None, fan_in: int) -> None:
    if tensor is not None:  # as nn.Conv2d does, but over the taps that live
        nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    """ELU of x and of -x, side by side along ``dim``."""
    if not x.is_cpu:
        return F.elu(torch.cat([x, -x], dim))
    # F.elu's expm1 is not vectorised on the CPU; exp is, and forward and backward take a third of the time
    p, q = x.relu(), (-x).relu()
    return torch.cat([p + (-q).exp(), q + (-p).exp()], dim) - 1


class VerticalConv2d(nn.Module):
    """Pixel (i, j) sees rows i - k // 2 .. i (``strict``: .. i - 1), columns j - k // 2 .. j + k // 2; k is odd."""

    bias: Tensor | None

    def __init__(self, n_in: int, n_out: int, k: int, strict: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.k, self.strict, self.height = k, strict, k // 2 + (not strict)
        self.weight = nn.Parameter(torch.empty(n_out, n_in, self.height, k))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_out)) if bias else None)
        for tensor in (self.weight, self.bias):
            _uniform(tensor, self.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, H, W) to (n, n_out, H, W)."""
        x = F.pad(x, (0, 0, self.k // 2, -1 if self.strict else 0))
        return F.conv2d(x, self.weight, self.bias, padding=(0, self.k // 2))


class HorizontalConv2d(nn.Module):
    """Pixel (i, j) sees columns j - k // 2 .. j - 1 of row i and of itself what ``centre`` says; k is odd.

    ``centre``: what :func:`centre` returns. k = 1 is a 1x1 convolution.
    """

    mask: Tensor | None

    def __init__(self, n_in: int, n_out: int, k: int, centre: bool | Tensor = True) -> None:
        super().__init__()
        self.k, self.strict = k, centre is False
        self.weight = nn.Parameter(torch.empty(n_out, n_in, 1, k // 2 + (centre is not False)))
        self.bias = nn.Parameter(torch.empty(n_out))
        for tensor in (self.weight, self.bias):
            _uniform(tensor, max(self.weight[0].numel(), 1))
        mask = torch.ones(self.weight.shape) if isinstance(centre, Tensor) else None
        if mask is not None:
            mask[:, :, 0, -1] = torch.as_tensor(centre, dtype=mask.dtype)
        self.register_buffer("mask", mask, persistent=False)

    def kernel(self) -> Tensor:
        """The weight (n_out, n_in, 1, taps) without what the mask hides."""
        return self.weight if self.mask is None else self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, H, W) to (n, n_out, H, W)."""
        if self.k > 1:
            x = F.pad(x, (self.k // 2, -1 if self.strict else 0))
        return F.conv2d(x, self.kernel(), self.bias)


class CausalConv2d(nn.Module):
    """The masked k x k convolution: all pixels before (i, j) in raster order within k // 2 of it, and ``centre``.

    ``centre`` is what :func:`centre` returns: strict for mask A of the papers, not for mask B.
    """

    def __init__(self, n_in: int, n_out: int, k: int, centre: bool | Tensor = True) -> None:
        super().__init__()
        self.k = k
        self.above = VerticalConv2d(n_in, n_out, k, strict=True, bias=False)
        self.left = HorizontalConv2d(n_in, n_out, k, centre)
        for tensor in (self.above.weight, self.left.weight, self.left.bias):
            _uniform(tensor, self.above.weight[0].numel() + self.left.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, H, W) to (n, n_out, H, W)."""
        left = self.left.kernel()
        weight = torch.cat([self.above.weight, F.pad(left, (0, self.k - left.shape[-1]))], 2)
        return F.conv2d(F.pad(x, (0, 0, self.k // 2, 0)), weight, self.left.bias, padding=(0, self.k // 2))


class ColourNorm(nn.Module):
    """LayerNorm of each pixel's features, those of each colour by themselves: no colour may learn of a later one.

    Layer Normalization, Ba, Kiros, Hinton, 2016, arXiv 1607.06450.
    """

    def __init__(self, channels: int, colours: int) -> None:
        super().__init__()
        if channels % colours:
            raise ValueError(f"{channels} channels do not divide among {colours} colours, as LayerNorm needs")
        self.colours = colours
        self.weight = nn.Parameter(torch.ones(channels // colours))
        self.bias = nn.Parameter(torch.zeros(channels // colours))

    def one(self, x: Tensor) -> Tensor:
        """Features (..., features of one colour), normalised."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) to the same."""
        return self.one(x.permute(0, 2, 3, 1).unflatten(-1, (self.colours, -1))).flatten(-2).permute(0, 3, 1, 2)


class Rows:
    """All that a sampler knows so far of the input (n, n_in, H, W) of a :class:`VerticalConv2d`, row by row."""

    def __init__(self, conv: VerticalConv2d, n: int, height: int, width: int) -> None:
        self.conv, self.width = conv, width
        # rows in channels-last order, so that a row of activations is copied as it lies; zeros are the padding
        self.x = conv.weight.new_zeros(n, conv.k // 2 + height, width, conv.weight.shape[1])

    def put(self, i: int, row: Tensor) -> None:
        """Row i: ``row`` (n, W, n_in)."""
        self.x[:, self.conv.k // 2 + i] = row

    def output(self, i: int) -> Tensor:
        """The convolution's row i (n, W, n_out); it reads rows up to i, or up to i - 1 if strict."""
        x = self.x[:, i : i + self.conv.height].permute(0, 3, 1, 2)
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=(0, self.conv.k // 2))
        return y[:, :, 0].transpose(1, 2)


class Line:
    """The row under way at the input of a :class:`HorizontalConv2d`, and the convolution pixel by pixel.

    ``pixels[g][j]`` (n, features of colour g) is where the input of pixel j belongs. Outputs are ordered by colour:
    output f of :meth:`add` is output ``order[f]`` of the convolution, and its bias ``bias[f]`` is left to the caller,
    who writes whole rows at once.
    """

    def __init__(self, conv: HorizontalConv2d, n: int, width: int, colours: int, gates: int = 1) -> None:
        kernel = conv.kernel()[:, :, 0].detach()
        n_out, n_in, taps = kernel.shape
        left = conv.k // 2
        self.row = kernel.new_zeros(n, left + width, n_in)
        self.x = self.row[:, left:]
        # the taps of pixel j lie side by side: a view of shape (n, taps * n_in)
        self.windows = [self.row[:, j : j + taps].flatten(1) for j in range(width)]
        colour = colour_of(n_out // gates, colours).repeat(gates).to(kernel.device)
        self.order = colour.argsort(stable=True)
        flat = kernel.permute(2, 1, 0).flatten(0, 1)
        self.weights = [flat[:, colour == g].contiguous() for g in range(colours)]
        self.bias = conv.bias.detach()[self.order]
        self.pixels = by_colour(self.x, colours)

    def add(self, out: Tensor, j: int, g: int) -> None:
        """Add the outputs of colour g at pixel j to ``out`` (n, outputs of colour g), in place."""
        out.addmm_(self.windows[j], self.weights[g])


class Chain:
    """Convolutions with ReLUs between them, in a sampler: a row at a time for the rows above, the rest pixel by pixel.

    ``extra``: what to add to the first convolutions' biases (n, 1, n_out); ``norms``: what stands between the first
    convolutions and their ReLUs. ``lines[0]`` holds the input and ``pixels[g][j]`` (n, outputs of colour g) the output.
    """

    def __init__(
        self,
        convs: Sequence[CausalConv2d | HorizontalConv2d],
        n: int,
        height: int,
        width: int,
        colours: int,
        extra: Sequence[Tensor] = (),
        norms: Sequence[ColourNorm] = (),
    ) -> None:
        horizontal = [c.left if isinstance(c, CausalConv2d) else c for c in convs]
        self.rows = [Rows(c.above, n, height, width) if isinstance(c, CausalConv2d) else None for c in convs]
        self.lines = [Line(c, n, width, colours) for c in horizontal]
        self.bias = [line.bias + extra[k] if k < len(extra) else line.bias for k, line in enumerate(self.lines)]
        self.norms = [*norms, *[None] * (len(convs) - len(norms))]
        self.out = self.lines[0].row.new_empty(n, width, len(horizontal[-1].bias))
        self.pixels = by_colour(self.out, colours)

    def start(self, i: int) -> None:
        """Row i begins, all of row i - 1 is there: compute what the rows above add to row i."""
        if i > 0:
            for rows, line in zip(self.rows, self.lines):
                if rows is not None:
                    rows.put(i - 1, line.x)
        outs = [*(line.x for line in self.lines[1:]), self.out]
        for rows, bias, out in zip(self.rows, self.bias, outs):
            out.copy_(bias if rows is None else rows.output(i) + bias)

    def pixel(self, j: int, g: int) -> None:
        """All features of colour g at pixel j of the row."""
        for (line, below), norm in zip(pairwise(self.lines), self.norms):
            x = below.pixels[g][j]
            line.add(x, j, g)
            if norm is not None:
                x.copy_(norm.one(x))
            x.relu_()
        self.lines[-1].add(self.pixels[g][j], j, g)


def by_colour(row: Tensor, colours: int, gates: int = 1) -> list[list[Tensor]]:
    """Views [colour][pixel] of a row (n, W, features) whose features (``gates`` of each) are ordered by colour."""
    sizes = colour_of(row.shape[-1] // gates, colours).bincount(minlength=colours) * gates
    return [list(part.unbind(1)) for part in row.split(sizes.tolist(), -1)]


def invert_cdf(logits: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Levels (int64) of the shape of ``u``, drawn from softmax(logits / temperature), logits (..., K), by uniforms."""
    logits = logits.to(u.dtype) if temperature == 1 else logits.to(u.dtype) / temperature
    cdf = logits.softmax(-1).cumsum(-1)
    return (cdf[..., :-1] <= u.unsqueeze(-1) * cdf[..., -1:]).sum(-1)


class Network(Protocol):
    """What :func:`draw_pixels` draws from. ``i``, ``j``, ``g``: row, column and group of colours drawn at once."""

    def logits(self, i: int, j: int, g: int) -> Tensor:
        """Logits (n, colours of the group, levels), asked for in order, when everything earlier has been put."""
        ...

    def put(self, i: int, j: int, g: int, level: Tensor) -> None:
        """The levels (n, colours of the group) that were drawn."""
        ...


def draw_pixels(
    network: Network,
    u: Tensor,
    groups: int,
    temperature: float = 1.0,
    given: Tensor | None = None,
    known: int = 0,
    invert: Callable[[Tensor, Tensor, float], Tensor] = invert_cdf,
) -> Tensor:
    """Levels (int64) of the shape of ``u`` (n, C, H, W), uniforms, in raster order, ``groups`` draws a pixel.

    The first ``known`` pixels are those of ``given`` (n, C, H, W) instead. ``invert`` makes levels of what the network
    gives, uniforms and the temperature; if it takes more uniforms than one a level, ``given`` must have levels' shape.
    """
    _, _, height, width = u.shape
    given = torch.zeros_like(u) if given is None else given
    u, x = (t.unflatten(1, (groups, -1)).permute(3, 4, 1, 0, 2) for t in (u, given))
    u, x = u.contiguous(), x.long().clone(memory_format=torch.contiguous_format)
    for i, j, g in product(range(height), range(width), range(groups)):
        logits = network.logits(i, j, g)  # for known pixels too: later ones see what it leaves behind
        if i * width + j >= known:
            x[i, j, g] = invert(logits, u[i, j, g], temperature)
        network.put(i, j, g, x[i, j, g])
    return x.permute(3, 2, 4, 0, 1).flatten(1, 2)


class Naive:
    """A :class:`Network` that runs the whole model for every draw: the oracle of cached ones, and the slow baseline.

    ``model``: levels (n, C, H, W) to logits (n, C, H, W, levels).
    """

    def __init__(self, model: Callable[[Tensor], Tensor], like: Tensor, groups: int) -> None:
        self.model, self.groups = model, groups
        self.x = torch.zeros_like(like, dtype=torch.long)

    def logits(self, i: int, j: int, g: int) -> Tensor:
        return self.model(self.x).unflatten(1, (self.groups, -1))[:, g, :, i, j]

    def put(self, i: int, j: int, g: int, level: Tensor) -> None:
        self.x.unflatten(1, (self.groups, -1))[:, g, :, i, j] = level
