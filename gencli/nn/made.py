"""Masked autoregressive networks, and the invertible layers that they make.

    theta_i = theta_i(x_1, ..., x_{i-1})                                  one pass of a network with masked weights
    u_i = g(x_i; theta_i),   log|det du/dx| = sum_i log g'(x_i; theta_i)  a triangular Jacobian

u comes from x in one pass. x from u needs x_1 before theta_2, and so on: D steps, or a fixed-point iteration
x <- g^-1(u; theta(x)), which sets one more dimension right in every pass, and usually nearly all of them in a few.

References:
    MADE: Masked Autoencoder for Distribution Estimation, Germain, Gregor, Murray, Larochelle, 2015, arXiv 1502.03509
    Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv 1705.07057
    Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, Song, Meng, Liao, Ermon, 2020,
        arXiv 2002.03629 (the iteration, and its blocks)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.nn.bijections import Bijection
from gencli.nn.mlp import Activation, activation
from gencli.nn.monotone import Monotone

__all__ = ["MADE", "Autoregressive", "MaskedLinear"]

BLOCK = 16  # dimensions that are solved for at once


class MaskedLinear(nn.Linear):
    """W x + b with ``W * mask`` for W (eq. 8 of MADE): a unit of degree d sees those of degree <= d, or < d."""

    mask: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor, strict: bool = False, together: int = 1) -> None:
        """``inputs``, ``outputs``: the units' degrees. ``together``: so many rows in a row are kept in one part."""
        super().__init__(len(inputs), len(outputs))
        sees = outputs[:, None] > inputs if strict else outputs[:, None] >= inputs
        self.register_buffer("mask", sees.to(self.weight.dtype), persistent=False)
        # Units sorted by degree see a part of the columns: of a large layer the product is taken in two halves of the
        # rows, each with the columns that it sees, a quarter less work than in one.
        halves = torch.arange(len(outputs)).view(-1, together).chunk(2 if self.weight.numel() >= 2**15 else 1)
        self.parts = [(int(rows.min()), int(rows.max()) + 1, *_span(sees[rows.flatten()])) for rows in halves]

    def masked(self) -> Tensor:
        """W * mask."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        W = self.masked()
        if len(self.parts) == 1:
            return F.linear(x, W, self.bias)
        return torch.cat([F.linear(x[:, c:d], W[a:b, c:d], self.bias[a:b]) for a, b, c, d in self.parts], 1)


def _span(sees: Tensor) -> tuple[int, int]:
    """The first and one past the last column of ``sees`` (rows, columns) with any entry."""
    columns = sees.any(0).nonzero().flatten().tolist()
    return (columns[0], columns[-1] + 1) if columns else (0, 0)


class MADE(nn.Module):
    """``x (n, D)`` -> ``theta (n, P, D)``: P parameters of each dimension, by those before it in ``order`` alone.

    ``order``: a permutation of 0 ... D - 1, the dimension that comes first first; the natural one by default. The
    degrees of hidden units are spread evenly over 1 ... D - 1 and sorted. ``initial`` (P,) is the theta of every
    dimension at first: the last layer's weights begin at zero.
    """

    def __init__(
        self,
        D: int,
        hidden: Sequence[int],
        initial: Tensor,
        order: Tensor | None = None,
        activation_name: Activation = "relu",
    ) -> None:
        super().__init__()
        self.D, self.P = D, len(initial)
        place = torch.arange(D) if order is None else order.argsort()
        self.degrees = [torch.arange(H) * (D - 1) // H + 1 for H in hidden]
        below = [place + 1, *self.degrees]
        self.hidden = nn.ModuleList(MaskedLinear(a, b) for a, b in zip(below, self.degrees))
        self.out = MaskedLinear(
            below[-1], (place + 1).repeat_interleave(self.P), strict=True, together=self.P
        )  # rows (D, P)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.copy_(initial.repeat(D))
        self.activation = activation(activation_name)
        if isinstance(self.activation, nn.ReLU):
            self.activation.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = self.activation(layer(x))
        # rows (P, D), so that each parameter of all dimensions lies in one piece of memory
        W, b = self.out.masked().view(self.D, self.P, -1), self.out.bias.view(self.D, self.P)
        parts = []
        for first, last, c, d in self.out.parts:
            dims = slice(first // self.P, last // self.P)
            rows = W[dims, :, c:d].transpose(0, 1).flatten(0, 1)
            parts.append(F.linear(x[:, c:d], rows, b[dims].T.flatten()).unflatten(1, (self.P, -1)))
        return torch.cat(parts, 2)


class Autoregressive(Bijection):
    """u_i = g(x_i; theta_i) for every dimension of ``x (n, D)``, g a monotone map, theta of a MADE."""

    order: Tensor
    place: Tensor

    def __init__(
        self,
        g: Monotone,
        D: int,
        hidden: Sequence[int],
        order: Tensor | None = None,
        activation_name: Activation = "relu",
    ) -> None:
        super().__init__()
        self.g = g
        order = torch.arange(D) if order is None else order
        self.made = MADE(D, hidden, g.initial(), order, activation_name)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u and log|det du/dx|, in one pass."""
        u, log_slope = self.g.forward(x, self.made(x))
        return u, log_slope.sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """x from u, by :meth:`solve`; differentiable, at the cost of as many passes backwards.

        With J = du/dx the gradient g of x is that of u times J^-T: w = J^-T g solves a triangular system, by an
        iteration like the other. No pass of :meth:`solve` is kept in memory.
        """
        x, _ = self.solve(y.detach())
        if not torch.is_grad_enabled():
            return x
        v = x.requires_grad_()
        u, log_slope = self.g.forward(v, self.made(v))
        scale = (-log_slope).detach().exp()  # the diagonal of J^-1

        def solved(g: Tensor) -> Tensor:
            w = g * scale
            for _ in range(v.shape[1] - 1):
                step = (g - torch.autograd.grad(u, v, w, retain_graph=True)[0]) * scale
                w = w + step
                if _small(step, w):
                    break
            return w

        residual = y - u  # zero: here for its gradient
        if residual.requires_grad:
            residual.register_hook(solved)
        return x.detach() + (residual - residual.detach())

    @torch.no_grad()
    def solve(self, u: Tensor, block: int = BLOCK) -> tuple[Tensor, int]:
        """x from ``u (n, D)``, and the passes that it took, at most D. ``block`` 1: one dimension after another.

        Dimensions are solved for in blocks, in their order. Of the network, a pass computes no more than the units
        that see the block; those before it are done and those after it do not matter. So all blocks together cost
        little more than one pass through the whole network. A block's iteration stops when nothing moves any more
        than float arithmetic would make it, or after as many passes as the block has dimensions, when it is exact.
        """
        made, (n, D) = self.made, u.shape
        P, layers = made.P, [*made.hidden, made.out]
        W, b = [layer.masked() for layer in layers], [layer.bias for layer in layers]
        # dimensions in their order: columns of the first layer, rows of the last
        W[0] = W[0][:, self.order]
        W[-1], b[-1] = W[-1].view(D, P, -1)[self.order].flatten(0, 1), b[-1].view(D, P)[self.order].flatten()
        u, passes = u[:, self.order], 0
        h = [u.new_zeros(n, w.shape[1]) for w in W]  # what each layer sees: x, hidden units
        counts = [torch.searchsorted(d, torch.arange(D + 1), right=True).tolist() for d in made.degrees]
        known = [list(k) for k in zip(range(D + 1), *counts)]  # of each, after k dimensions
        for k in range(0, D, block):
            end = min(k + block, D)
            done, ready = known[k], known[end]
            rows = [slice(*ends) for ends in zip(done[1:], ready[1:])] + [slice(P * k, P * end)]
            here = [x[:, i:j] for x, i, j in zip(h, done, ready)]  # views: what the block sets
            before = [torch.addmm(b[i][r], h[i][:, : done[i]], W[i][r, : done[i]].T) for i, r in enumerate(rows)]
            within = [W[i][r, done[i] : ready[i]].T for i, r in enumerate(rows)]
            for _ in range(end - k):
                self._hidden(here, before, within)
                theta = torch.addmm(before[-1], here[-1], within[-1]).unflatten(1, (end - k, P)).mT
                x = self.g.inverse(u[:, k:end], theta)
                step = x - here[0]
                here[0].copy_(x)
                passes += 1
                if _small(step, x):
                    break
            self._hidden(here, before, within)  # of the last x, for the blocks to come
        return h[0][:, self.place], passes

    def _hidden(self, here: list[Tensor], before: list[Tensor], within: list[Tensor]) -> None:
        """A block's hidden units, layer by layer, in place."""
        for i, units in enumerate(here[1:]):
            units.copy_(self.made.activation(torch.addmm(before[i], here[i], within[i])))


def _small(step: Tensor, x: Tensor) -> bool:
    """Whether ``step`` is no more than rounding errors of what is as large as ``x`` or 1."""
    return bool(step.abs().max() <= torch.finfo(step.dtype).eps * x.abs().max().clamp_min(1))
