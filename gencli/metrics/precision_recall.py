"""Precision and recall of samples by balls around features that reach to the k-th nearest neighbour of their own set.

Precision: the share of samples inside a ball of a real row; recall: the share of real rows inside a ball of a sample.
Density counts the real balls that a sample lies in, over k, so that one outlier's large ball weighs less; coverage is
the share of real balls that hold a sample.

Copies of real rows lie just on the rims of balls. So distances are compared in float64 and balls reach further by the
bound on their rounding, about 1e-12 of the square: what is equal counts as equal, in whatever order rows come.

References:
    Improved Precision and Recall Metric for Assessing Generative Models, Kynkäänniemi, Karras, Laine, Lehtinen, Aila,
    2019, arXiv 1904.06991 (k = 3)
    Reliable Fidelity and Diversity Metrics for Generative Models, Naeem, Oh, Uh, Choi, Yoo, 2020, arXiv 2002.09797
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencli.console import DataError
from gencli.metrics.nearest import check_rows

__all__ = ["PrecisionRecall", "precision_recall"]

CHUNK = 512  # rows of a table of distances that are in memory at once
EPS = torch.finfo(torch.float64).eps


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]; density may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances ``(len(a), len(b))`` by products of matrices, which in float32 lose near rows' digits.

    Rounding is at most 2 d EPS (|a|^2 + |b|^2), and they may be negative by it.
    """
    return (a @ b.T).mul_(-2).add_(b.square().sum(1)).add_(a.square().sum(1, keepdim=True))


def _radii(x: Tensor, k: int) -> Tensor:
    """The squared distance r^2 of each row to its k-th nearest other row, and for rounding a little more.

    Rows on the rim have squared norms of at most 2 (|x|^2 + r^2), and two distances are compared.
    """
    parts = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        d = _squares(part, x)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf  # not itself
        r = d.kthvalue(k, 1).values.clamp_min(0)
        parts.append(r + 12 * x.shape[1] * EPS * (part.square().sum(1) + r))
    return torch.cat(parts)


def precision_recall(real: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Of features ``real (m, d)`` and ``samples (n, d)``; a row on the rim of a ball is inside.

    DataError with ``k`` rows or fewer on a side, for other dimensions, or rows that are not finite.
    """
    real, samples = check_rows(real, "the reference"), check_rows(samples, "the samples")
    if real.shape[1] != samples.shape[1]:
        raise DataError(f"features of {samples.shape[1]} and of {real.shape[1]} dimensions cannot be compared")
    if min(len(real), len(samples)) <= k:
        few = f"{len(samples)} samples and {len(real)} rows of the reference"
        raise DataError(f"{few} are too few for precision and recall: {k + 1} on a side, better 1,000")
    centre = real.double().mean(0)  # any point would do; this one makes norms, and so rounding, small
    real, samples = real.double() - centre, samples.double() - centre
    around_real, around_samples = _radii(real, k), _radii(samples, k)
    precise, inside = 0, 0.0
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for start in range(0, len(samples), CHUNK):
        d = _squares(samples[start : start + CHUNK], real)
        within = d <= around_real
        precise += int(within.any(1).sum())
        inside += float(within.sum())
        covered |= within.any(0)
        recalled |= (d <= around_samples[start : start + CHUNK, None]).any(0)
    n, m = len(samples), len(real)
    return PrecisionRecall(precise / n, int(recalled.sum()) / m, inside / (k * n), int(covered.sum()) / m)
