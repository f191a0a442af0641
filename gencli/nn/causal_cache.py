"""What a sampler of two streams at several resolutions has computed already: every feature of every pixel once.

The stream that sees the rows above (``u``) is computed a row at a time, and with it all that a row of the other stream
(``ul``) takes from the row above; what is left is one small matrix product a convolution and pixel, over the pixel and
its left neighbour. A pixel of a coarser level is due when the first of the finer pixels below it is, and gives to all
of them. Rows are (n, W, features); the modules are those of ``models/autoregressive/pixelcnnpp``.

Fast Generation for Convolutional Autoregressive Models, Ramachandran et al., 2017, arXiv 1704.06001.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.nn.causal import concat_elu

__all__ = ["LevelCache", "TwoRows"]


class TwoRows:
    """The last two rows at the input of a convolution that sees the rows above, and its outputs for the last one."""

    def __init__(self, conv: Any, n: int, width: int) -> None:
        self.kernel, self.bias, self.stride = conv.kernel(), conv.b, conv.stride
        self.x = self.bias.new_zeros(n, 2, width, self.kernel.shape[1])
        height, columns = self.kernel.shape[2:]
        self.seen, self.pad = self.x[:, 2 - height :].permute(0, 3, 1, 2), (0, columns // 2)

    def put(self, row: Tensor) -> None:
        """The next row (n, W, n_in)."""
        self.x[:, 0] = self.x[:, 1]
        self.x[:, 1] = row

    def output(self) -> Tensor:
        """(n, W / stride, n_out)."""
        return _row(F.conv2d(self.seen, self.kernel, self.bias, self.stride, self.pad))


def _row(x: Tensor) -> Tensor:
    return x[:, :, 0].transpose(1, 2)


def _above(line: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """What a row takes from the one above it, ``line`` (n, 1 + W, n_in), by a kernel's first row."""
    return _row(F.conv2d(line[:, None].permute(0, 3, 1, 2), kernel[:, :, :1], stride=stride))


def _taps(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The taps (n_in, n_out) of a 2 x 2 kernel on the pixel to the left and on the pixel itself."""
    return kernel[:, :, 1, 0].T, kernel[:, :, 1, 1].T


class Elu:
    """concat_elu of ``pair[:, 0]`` (n, 2, ..., p), written by others, to ``outs`` of the same shape."""

    def __init__(self, pair: Tensor, *outs: Tensor) -> None:
        self.pair, self.x, self.minus = pair, pair[:, 0], pair[:, 1]
        self.t = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        self.one, self.ts = torch.ones_like(self.t), self.t[:, None]
        self.out, self.copies = outs[0], outs[1:]

    def __call__(self) -> None:
        # elu(x) = max(x, e^-|x| - 1), and -|x| = min(x, -x)
        torch.neg(self.x, out=self.minus)
        torch.minimum(self.x, self.minus, out=self.t)
        self.t.exp_().sub_(self.one)
        torch.maximum(self.pair, self.ts, out=self.out)
        for copy in self.copies:
            copy.copy_(self.out)


class RowLayer:
    """A gated residual layer of ``u``, a row at a time."""

    def __init__(self, net: Any, n: int, width: int, h: Tensor | None) -> None:
        self.first, self.second = TwoRows(net.first, n, width), TwoRows(net.second, n, width)
        self.skip = None if net.skip is None else (net.skip.kernel()[:, :, 0, 0], net.skip.b)
        self.label = 0.0 if h is None else net.V(h)[:, None]

    def row(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The next row (n, W, p) of the layer's output, by that of its input and of what comes in."""
        self.first.put(concat_elu(x, -1))
        c = self.first.output()
        if self.skip is not None and skip is not None:
            c = c + F.linear(concat_elu(skip, -1), *self.skip)
        self.second.put(concat_elu(c, -1))
        a, b = (self.second.output() + self.label).chunk(2, -1)
        return x + a * b.sigmoid()


class PixelLayer:
    """A gated residual layer of ``ul``, a pixel at a time.

    ``inputs[j]`` (n, 2, p) is where concat_elu of pixel j's input belongs, ``skips[j]`` that of its shortcut.
    """

    def __init__(self, net: Any, n: int, width: int, h: Tensor | None) -> None:
        k1, k2, k3 = net.first.kernel(), net.second.kernel(), net.skip.kernel()[:, :, 0, 0]
        p = len(k1)
        # what comes in is u, and going up a shortcut: (u, s, -u, -s) in concat_elu's order
        from_u, from_skip = (t.flatten(1) for t in k3.unflatten(1, (2, -1)).split([p, k3.shape[1] // 2 - p], 2))
        self.from_u, self.bias1 = from_u, net.first.b + net.skip.b
        self.bias2 = net.second.b if h is None else net.second.b + net.V(h)[:, None]
        self.above1, self.above2 = k1[:, :, :1], k2[:, :, :1]
        left, here = _taps(k1)
        self.w1, self.w2 = torch.cat([left, from_skip.T, here]), torch.cat(_taps(k2))
        # a pixel's shortcut lies before its input: the left input, the shortcut and the input lie side by side
        s, q = from_skip.shape[1], 2 * p
        line = left.new_zeros(n, 1 + width, s + q)
        self.x, self.inner = line[:, :, s:], left.new_zeros(n, 1 + width, q)
        self.inputs = self.x[:, 1:].unflatten(2, (2, p)).unbind(1)
        self.skips = line[:, 1:, :s].unflatten(2, (2, s // 2)).unbind(1)
        self.c2 = left.new_empty(n, width, q)
        self.steps = []
        for j in range(width):
            seen = line.flatten(1)[:, j * (s + q) + s : (j + 2) * (s + q)]
            m, c2 = self.inner[:, j : j + 2], self.c2[:, j]
            pair = m[:, 1].unflatten(1, (2, p))
            self.steps.append((seen, pair[:, 0], Elu(pair, pair), m.flatten(1), c2, *c2.chunk(2, 1)))

    def start(self, i: int, u: Tensor) -> None:
        """Row i begins: all that ``u`` (n, W, p) and the row above give to it."""
        c1, c2 = F.linear(concat_elu(u, -1), self.from_u) + self.bias1, self.bias2
        if i > 0:
            c1, c2 = c1 + _above(self.x, self.above1), c2 + _above(self.inner, self.above2)
        self.inner[:, 1:, : c1.shape[2]] = c1
        self.c2.copy_(c2)

    def pixel(self, j: int, x: Tensor) -> None:
        """Turn the layer's input ``x`` (n, p) at pixel j into its output, in place; inputs and skips are there."""
        seen, c1, elu, seen2, c2, a, b = self.steps[j]
        c1.addmm_(seen, self.w1)
        elu()
        c2.addmm_(seen2, self.w2)
        x.addcmul_(a, b.sigmoid_())


class LevelCache:
    """One resolution and those below it: a pixel's first features of ``ul`` are written to ``x`` (n, p), and its last
    ones are left there and in ``out`` (n, W, p)."""

    def __init__(self, level: Any, n: int, width: int, h: Tensor | None) -> None:
        self.u_down, self.u_up = ([RowLayer(m.u, n, width, h) for m in part] for part in (level.down, level.up))
        self.down, self.up = ([PixelLayer(m.ul, n, width, h) for m in part] for part in (level.down, level.up))
        p = self.up[0].inputs[0].shape[-1]
        pair = self.up[0].x.new_zeros(n, 2, p)
        self.x, self.out = pair[:, 0], pair.new_zeros(n, width, p)
        self.outs = self.out.unbind(1)
        # feature k is the input of layer k going down, and a shortcut to the last layer but k going up
        inputs = [m.inputs for m in (self.down if level.inner else [*self.down, self.up[0]])]
        targets = list(zip_longest(inputs, [m.skips for m in reversed(self.up)]))
        self.elu_down = [[Elu(pair, *(t[j] for t in ts if t)) for ts in targets] for j in range(width)]
        self.elu_up = [[Elu(pair, m.inputs[j]) for m in self.up[1:]] for j in range(width)]
        self.inner = Between(level, self.up[0], n, width, h) if level.inner else None

    def start(self, i: int, u: Tensor) -> Tensor:
        """Row i begins, with the first features of ``u`` (n, W, p): its last ones."""
        skips = [u]
        for row, pixels in zip(self.u_down, self.down):
            u = row.row(u)
            pixels.start(i, u)
            skips.append(u)
        u = skips.pop() if self.inner is None else self.inner.start(i, u)
        for row, pixels in zip(self.u_up, self.up):
            u = row.row(u, skips.pop())
            pixels.start(i, u)
        if self.inner is not None and i % 2:
            self.inner.odd_row()
        return u

    def pixel(self, i: int, j: int) -> None:
        """All features of ``ul`` at pixel (i, j)."""
        x = self.x
        elus = iter(self.elu_down[j])
        next(elus)()
        for layer, elu in zip(self.down, elus):
            layer.pixel(j, x)
            elu()
        if self.inner is not None:
            self.inner.pixel(i, j, x)
        self.up[0].pixel(j, x)
        for layer, elu in zip(self.up[1:], self.elu_up[j]):
            elu()
            layer.pixel(j, x)
        self.outs[j].copy_(x)


class Between:
    """The strided convolutions to the next coarser level, that level, and the transposed ones back from it."""

    def __init__(self, level: Any, up: PixelLayer, n: int, width: int, h: Tensor | None) -> None:
        self.level = LevelCache(level.inner, n, width // 2, h)
        conv_u, conv_ul = level.shrink
        kernel, self.bias, p = conv_ul.kernel(), conv_ul.b, len(conv_ul.b)
        self.shrink_u, self.above, self.shrink = TwoRows(conv_u, n, width), kernel[:, :, :1], torch.cat(_taps(kernel))
        self.line, self.shrunk = self.bias.new_zeros(n, 1 + width, p), self.bias.new_empty(n, width // 2, p)
        self.places = self.line[:, 1:].unbind(1)
        self.seen = [(self.shrunk[:, j // 2], self.line[:, j : j + 2].flatten(1)) for j in range(0, width, 2)]
        conv_u, conv_ul = level.grow
        self.grow_u, self.u = (conv_u.kernel(), conv_u.b), self.bias.new_empty(0)
        # a coarse pixel's (p, 2 p) to two fine ones, for even and odd rows
        self.grow = [w.permute(0, 2, 1).flatten(1) for w in conv_ul.kernel().unbind(2)]
        self.grow_bias = conv_ul.b.repeat(2)
        grown = self.bias.new_empty(n, 2, width, p)  # and minus that
        inputs = up.x[:, 1:].unflatten(2, (2, p)).transpose(1, 2)
        self.grown, self.row = grown[:, 0].unbind(1), grown[:, 0].view(n, width // 2, 2 * p)
        self.elu_row = Elu(grown, inputs)
        self.pairs = [
            (grown[:, 0, j : j + 2].flatten(1), Elu(grown[:, :, j : j + 2], inputs[:, :, j : j + 2]))
            for j in range(0, width, 2)
        ]

    def start(self, i: int, u: Tensor) -> Tensor:
        """Row i begins: from the last features of ``u`` going down (n, W, p) to the first going up."""
        self.shrink_u.put(u)
        if i % 2 == 0:
            self.shrunk.copy_(self.bias + _above(self.line, self.above, 2) if i > 0 else self.bias)
            self.u = self.level.start(i // 2, self.shrink_u.output())
        (kernel, bias), a = self.grow_u, i % 2
        x = self.u[:, None].permute(0, 3, 1, 2)
        return _row(F.conv_transpose2d(x, kernel[:, :, a : a + 1], bias, (1, 2), (0, 1), (0, 1)))

    def odd_row(self) -> None:
        """The coarser level's pixels give to a whole row at once, if it is the second of those that they give to."""
        self.row.copy_(F.linear(self.level.out, self.grow[1].T, self.grow_bias))
        self.elu_row()

    def pixel(self, i: int, j: int, x: Tensor) -> None:
        """From the last features going down at a pixel, ``x`` (n, p), to the first going up, in place."""
        self.places[j].copy_(x)
        if i % 2 == 0 and j % 2 == 0:
            level, (first, seen), (grown, elu) = self.level, self.seen[j // 2], self.pairs[j // 2]
            torch.addmm(first, seen, self.shrink, out=level.x)
            level.pixel(i // 2, j // 2)
            torch.addmm(self.grow_bias, level.x, self.grow[0], out=grown)
            elu()
        x.copy_(self.grown[j])
