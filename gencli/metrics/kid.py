"""Kernel Inception Distance: the squared maximum mean discrepancy of two sets of features, without bias.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(a, b) = (a . b / d + 1)^3                  (eq. 4, section 4)

All rows are compared with all others: a mean over subsets estimates the same number with more noise. The standard error
is that of this estimate, not a spread over subsets, which shrinks with their number and not with that of the samples.
By Hoeffding's decomposition k(a, b) = mean + g(a) + h(b) + r(a, b) into uncorrelated parts

    Var MMD^2 = 4 V_x / n + 4 V_y / m + 2 R_xx / (n (n - 1)) + 2 R_yy / (m (m - 1)) + 4 R_xy / (n m)

where V_x is the variance of what a row x adds, E k(x, x') - E k(x, y), and R that of r; each has an unbiased estimate
by least squares. For equal distributions V is 0 and the rest is all there is: estimates of V alone, and the jackknife,
are wrong there. (V is taken to be 0 or more, which makes the error up to a fifth too large in that case.)

References:
    Demystifying MMD GANs, Binkowski, Sutherland, Arbel, Gretton, 2018, arXiv 1801.01401
    A Kernel Two-Sample Test, Gretton et al., 2012, JMLR 13 (lemma 6: the unbiased estimate)
    A Class of Statistics with Asymptotically Normal Distribution, Hoeffding, 1948, Annals of Mathematical Statistics 19
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencli.console import DataError
from gencli.metrics.nearest import check_rows

__all__ = ["kid"]

TABLE = 2**23  # kernels that are in memory at once: 64 MB


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """MMD^2 of rows ``x (n, d)`` and ``y (m, d)``, and its standard error; slightly negative values are right.

    DataError with fewer than 4 rows on a side, for other dimensions, or rows that are not finite.
    """
    x, y = (check_rows(rows, what).double() for rows, what in ((x, "the samples"), (y, "the reference")))
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions have no distance")
    n, m = len(x), len(y)
    if min(n, m) < 4:
        raise DataError(f"{n} samples and {m} rows of the reference: kid needs 4 on a side, better 1,000")
    value, V_x, V_y, rest = _parts(x, y)
    variance = 4 * V_x.clamp_min(0) / n + 4 * V_y.clamp_min(0) / m + rest
    return value.item(), math.sqrt(max(0.0, variance.item()))


def _parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MMD^2, and without bias V_x, V_y and the sum of the terms of Var MMD^2 that have an R."""
    n, m = len(x), len(y)
    (xx, R_xx), (yy, R_yy) = _among(x), _among(y)  # sums over the other rows, (n,) and (m,)
    xy, yx, squares = _between(x, y)
    T = xy.sum()
    R_xy = (squares - xy.square().sum() / m - yx.square().sum() / n + T * T / (n * m)) / ((n - 1) * (m - 1))
    V_x = (xx / (n - 2) - xy / m).var() - R_xx / (n - 2) - R_xy / m
    V_y = (yy / (m - 2) - yx / n).var() - R_yy / (m - 2) - R_xy / n
    rest = 2 * R_xx / (n * (n - 1)) + 2 * R_yy / (m * (m - 1)) + 4 * R_xy / (n * m)
    value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * T / (n * m)
    return value, V_x, V_y, rest


def _between(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernels of all rows of ``a`` with all of ``b``: sums over b, sums over a, and the sum of squares."""
    over_b, over_a, squares = [], a.new_zeros(len(b)), a.new_zeros(())
    for part in a.split(_rows(b)):
        k = _kernel(part, b)
        over_b.append(k.sum(1))
        over_a += k.sum(0)
        squares += k.square().sum()
    return torch.cat(over_b), over_a, squares


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def _rows(b: Tensor) -> int:
    """How many rows are compared with all of ``b`` at once."""
    return max(1, TABLE // len(b))


def _among(a: Tensor) -> tuple[Tensor, Tensor]:
    """Of the kernels of each row with the others: their sums ``(n,)``, and R, the mean square of what is left of them
    when the best mean + g_i + g_j is taken off (n (n - 3) / 2 degrees of freedom)."""
    n, own = len(a), (a.square().sum(1) / a.shape[1] + 1) ** 3
    sums, squares, start = -own, -own.square().sum(), 0
    for part in a.split(_rows(a)):  # with all from here on: k(b, a) = k(a, b)
        k, size = _kernel(part, a[start:]), len(part)
        sums[start : start + size] += k.sum(1)
        sums[start + size :] += k[:, size:].sum(0)
        squares += k.square_().sum() + k[:, size:].sum()
        start += size
    mean = sums.sum() / (n * (n - 1))
    g = (sums - (n - 1) * mean) / (n - 2)
    rest = squares / 2 - n * (n - 1) / 2 * mean**2 - (n - 2) * g.square().sum()
    return sums, rest.clamp_min(0) / (n * (n - 3) / 2)
