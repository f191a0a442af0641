"""Nearest training rows of samples, and whether a model copies them.

C. Meehan, K. Chaudhuri, S. Dasgupta: A Non-Parametric Test to Detect Data-Copying in Generative Models, AISTATS 2020,
arXiv 2004.05675. Samples that are nearer to the training set than fresh test rows are have been copied from it.

Distances are Euclidean, in the units of what is compared: pixels in [-1, 1] or features, summed over dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gencli import pictures
from gencli.console import DataError, UsageError
from gencli.data.source import Array

__all__ = ["Memorisation", "Neighbours", "check_rows", "mann_whitney", "memorisation", "nearest", "sheet"]

TABLE = 2**25  # entries of the table of distances: 128 MB
PIECE = 2**22  # numbers of other intermediate results: 32 MB
WIDEST = 2**14  # dimensions up to which float32 tells near from far


class Neighbours(NamedTuple):
    """``rows`` int64 and ``distances`` float64, both ``(n, k)``: nearest first, then the smaller row."""

    rows: Tensor
    distances: Tensor


class Memorisation(NamedTuple):
    """How far samples lie from their nearest training rows, beside how far test rows do.

    ``nearer``: the probability that a sample is nearer than a test row, 0.5 for a perfect model; ``z``: its
    Mann-Whitney z, negative = copying. ``close``: the share of samples nearer than all but 5 % of the test rows, which
    shows copies of a part even where the rest of the samples is far off. ``copies``: rows at distance 0.
    """

    nearer: float
    z: float
    close: float
    median: float
    test_median: float
    copies: int
    test_copies: int


def check_rows(x: Tensor, what: str) -> Tensor:
    """``x`` as ``(n, d)``; DataError, naming ``what``, if it has no rows or a row that is not finite."""
    if x.ndim < 2 or not x.numel():
        raise DataError(f"{what}: no rows to compare, got shape {list(x.shape)}")
    x = x.flatten(1)
    finite = x.isfinite().all(1)
    if not finite.all():
        raise DataError(f"{what}: row {int(finite.long().argmin())} is not finite")
    return x


def nearest(samples: Tensor, train: Tensor, k: int = 1, *, chunk: int | None = None) -> Neighbours:
    """The ``k`` nearest rows of ``train`` ``(m, ...)`` to each of ``samples`` ``(n, ...)``; no row is approximate.

    ``chunk`` samples are compared at once, without it as many as keep the table of distances below 128 MB. DataError
    for no rows, other dimensions, or values that are not finite or too large; UsageError if ``train`` has fewer than
    ``k`` rows.
    """
    x, t = check_rows(samples, "the samples"), check_rows(train, "the training rows")
    d, m = x.shape[1], len(t)
    if t.shape[1] != d:
        raise DataError(f"the samples have {d} dimensions and the training rows {t.shape[1]}")
    if not 1 <= k <= m:
        raise UsageError(f"{k} nearest rows were asked for, of {m}: 1 to {m}")
    # |x - t|^2 = |x|^2 - 2 x.t + |t|^2, in which near rows drown: it only rules out the far ones, with a bound on its
    # error. Within the bound the differences themselves are squared, in float64.
    exact = all(v.dtype == torch.float32 or v.dtype.itemsize <= 2 for v in (x, t))
    narrow = exact and d <= WIDEST and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if narrow else torch.float64
    blocks = t.split(max(1, PIECE // d))
    centre = blocks[0].to(dtype).mean(0)  # any point would do; this one makes norms, and so errors, small
    found = []
    for part in x.split(chunk or max(1, TABLE // max(m, d))):
        a = part.to(dtype) - centre
        left = torch.cat([-2 * a, a.new_ones(len(a), 1)], 1)
        table, widest, start = a.new_empty(len(a), m), a.new_zeros(()), 0
        for block in blocks:
            b = block.to(dtype) - centre
            norm = b.square().sum(1, keepdim=True)
            table[:, start : start + len(b)] = left @ torch.cat([b, norm], 1).T
            widest, start = torch.maximum(widest, norm.max()), start + len(b)
        # an inner product of d terms errs by at most d units in the last place of the product of the norms
        scale, fine = widest + 2 * (widest * a.square().sum(1)).sqrt(), torch.finfo(dtype)
        error = (2 * d + 8) * (fine.eps * scale + fine.tiny)
        limit = table.topk(k, largest=False).values[:, -1] + 2 * error
        if not limit.isfinite().all():
            raise DataError("the values are too large to be compared: their squares overflow")
        found.append(_closest(part, t, k, *(table <= limit[:, None]).nonzero().T))
    return Neighbours(*map(torch.cat, zip(*found)))


def _closest(x: Tensor, t: Tensor, k: int, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of the pairs (``row`` of x, ``column`` of t), which come in order of rows, then columns."""
    size = max(1, PIECE // x.shape[1])
    pieces = zip(row.split(size), column.split(size))
    distance = torch.cat([(x[i].double() - t[j].double()).square().sum(1).sqrt() for i, j in pieces])
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then distance, then column
    first = row.bincount(minlength=len(x)).cumsum(0).roll(1)
    first[0] = 0
    best = order[first[:, None] + torch.arange(k, device=x.device)]
    return column[best], distance[best]


def mann_whitney(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The probability that a number of ``a`` is below one of ``b`` (an equal one counts half), and z of U.

    z is U(a > b), less its mean and over its standard deviation if ``a`` and ``b`` have one distribution: negative
    where ``a`` is smaller. Corrected for ties, not for continuity; the paper's Z_U. 0 if all numbers are equal.
    """
    m, n = len(a), len(b)
    ordered = b.sort().values
    below, upto = torch.searchsorted(ordered, a), torch.searchsorted(ordered, a, right=True)
    u = (below + upto).sum().item() / 2
    ties = torch.cat([a, b]).unique(return_counts=True)[1].double()
    variance = m * n / 12 * (m + n + 1 - (ties**3 - ties).sum().item() / ((m + n) * (m + n - 1)))
    z = (u - m * n / 2) / math.sqrt(variance) if len(ties) > 1 else 0.0
    return 1 - u / (m * n), z


def memorisation(samples: Tensor, train: Tensor, test: Tensor) -> tuple[Memorisation, Neighbours]:
    """Whether ``samples`` are copies of rows of ``train``, judged by ``test``, rows that no model has seen.

    Also the nearest training row of each sample. z is the paper's statistic with the whole space as one cell: copies
    here and poor samples there can cancel (Bhattacharjee, Dasgupta, Chaudhuri 2023, arXiv 2302.13181), and blurred
    samples lie near everything, so it is read together with ``close``, ``copies`` and the picture. Errors as of
    :func:`nearest`.
    """
    check_rows(test, "the test rows")
    neighbours = nearest(samples, train)
    ours, theirs = neighbours.distances[:, 0], nearest(test, train).distances[:, 0]
    nearer, z = mann_whitney(ours, theirs)
    typical = theirs.sort().values[len(theirs) // 20]
    row = Memorisation(
        nearer=nearer,
        z=z,
        close=(ours < typical).double().mean().item(),
        median=ours.quantile(0.5).item(),
        test_median=theirs.quantile(0.5).item(),
        copies=int((ours == 0).sum()),
        test_copies=int((theirs == 0).sum()),
    )
    return row, neighbours


def sheet(samples: Array, neighbours: Array, levels: int, distances: Array) -> Array:
    """A picture of pairs: each sample, and right of it its nearest training image with its distance below.

    Raw images ``(n, C, H, W)`` both, and their ``n`` distances; uint8 ``(H', W', 3)``.
    """
    if samples.shape != neighbours.shape:
        raise DataError(f"samples are {list(samples.shape)} and their neighbours {list(neighbours.shape)}")
    n, *shape = samples.shape
    pairs = torch.stack([torch.from_numpy(samples), torch.from_numpy(neighbours)], 1).reshape(2 * n, *shape).numpy()
    labels = [text for distance in distances for text in ("sample", f"{distance:.3g}")]
    return pictures.grid(pairs, levels, columns=2 * math.ceil(math.sqrt(n / 2)), labels=labels)
