"""What features know of the classes: a linear probe, a k-NN probe, and the few labels that they may learn from.

A probe is an offline measure: the encoder is frozen and in evaluation mode, and nothing of the test split decides
anything. The k-NN vote is that of Z. Wu, Y. Xiong, S. Yu, D. Lin: Unsupervised Feature Learning via Non-Parametric
Instance Discrimination, CVPR 2018, arXiv 1805.01978.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.console import DataError, UsageError
from gencli.metrics.nearest import check_rows, nearest
from gencli.rng import Rng

__all__ = ["Accuracy", "LinearProbe", "accuracy", "few_labels", "knn", "linear_probe"]

L2S = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each is the start of the next
SLOPE = 1e-4  # largest derivative where penalties are compared; times l2 in the end, so that W is near its minimum


class Accuracy(NamedTuple):
    """A share of ``examples`` that are right, its standard error, and its 95 % interval (E. B. Wilson 1927)."""

    accuracy: float
    stderr: float
    low: float
    high: float
    examples: int


@dataclass(frozen=True)
class LinearProbe:
    """Logits ``x @ weight.T + bias`` of features as they come; float64 ``(classes, d)`` and ``(classes,)``.

    ``l2`` is the penalty that was used. A class without training rows has bias -inf.
    """

    weight: Tensor
    bias: Tensor
    l2: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probabilities (nats) of the classes, ``(n, classes)``."""
        x = check_rows(x, "the features")
        if x.shape[1] != self.weight.shape[1]:
            raise DataError(f"the probe knows {self.weight.shape[1]} features, not {x.shape[1]}")
        return (x.double() @ self.weight.T + self.bias).log_softmax(1)

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class of each row, ``(n,)``; the lowest of equal ones."""
        return self.log_prob(x).argmax(1)


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    classes: int,
    *,
    l2: float | None = None,
    val: tuple[Tensor, Tensor] | None = None,
) -> LinearProbe:
    """Multinomial logistic regression: the minimum of mean cross-entropy (nats) + l2 / 2 |W|^2.

    ``train_x`` ``(n, d)`` is standardised by its own mean and deviation, ``train_y`` ``(n,)`` holds classes below
    ``classes``. scikit-learn's C is 1 / (l2 n) (2 / (l2 n) for two classes, of which it has one row of weights), and
    the bias is free as it is there. Without ``l2`` it is the one of ``L2S`` with the best accuracy on ``val``
    (features and labels), then the smallest cross-entropy; without ``val`` it is 1 / n. The labels of ``val`` count as
    labels that were used. L-BFGS in float64, until no derivative is above 1e-4 min(0.1, l2).

    DataError for no rows, values that are not finite, labels that do not fit, or fewer than two classes of rows.
    """
    x, y = _labelled(train_x, train_y, classes, "the training features")
    seen, target = y.unique(return_inverse=True)
    if len(seen) < 2:
        raise DataError(f"all {len(y)} training labels are {int(seen[0])}: a probe needs two classes or more")
    if l2 is not None and not 0 < l2 < math.inf:
        raise UsageError(f"l2 = {l2}: a penalty is above 0")
    z = x.to(torch.float64, copy=True)
    mean, deviation = z.mean(0), z.std(0, correction=0)
    deviation[deviation <= 1e-6 * mean.abs()] = 1  # constant but for rounding
    z.sub_(mean).div_(deviation)

    def probe(w: Tensor, l2: float) -> LinearProbe:
        weight, bias = w.new_zeros(classes, x.shape[1]), w.new_full((classes,), -math.inf)
        weight[seen] = w[:, :-1] / deviation
        bias[seen] = w[:, -1] - weight[seen] @ mean
        return LinearProbe(weight, bias, l2)

    w = z.new_zeros(len(seen), x.shape[1] + 1)
    if l2 is not None or val is None:
        l2 = 1 / len(y) if l2 is None else l2
        return probe(_minimum(z, target, l2, w, SLOPE * min(0.1, l2)), l2)
    val_x, val_y = _labelled(val[0], val[1], classes, "the validation features")
    tried = []
    for l2 in L2S:
        w = _minimum(z, target, l2, w, SLOPE)
        log_p = probe(w, l2).log_prob(val_x)
        right = (log_p.argmax(1) == val_y).double().mean().item()
        tried.append((right, -F.nll_loss(log_p, val_y).item(), l2, w))
    _, _, l2, w = max(tried, key=lambda one: one[:3])
    return probe(_minimum(z, target, l2, w, SLOPE * min(0.1, l2)), l2)


def _minimum(z: Tensor, y: Tensor, l2: float, start: Tensor, slope: float) -> Tensor:
    """Weights and, in the last column, biases ``(classes, d + 1)`` where no derivative exceeds ``slope``."""
    from scipy.optimize import minimize

    n, rows = len(z), torch.arange(len(z), device=z.device)

    def loss(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        w = torch.from_numpy(flat).to(z.device).view_as(start)
        log_p = torch.addmm(w[:, -1:], w[:, :-1], z.T).log_softmax(0)  # (classes, n): faster than (n, classes)
        value = -log_p[y, rows].mean() + l2 / 2 * w[:, :-1].square().sum()
        g = log_p.exp_()  # d cross-entropy / d logits = p - one-hot
        g[y, rows] -= 1
        g /= n
        slopes = torch.cat([g @ z + l2 * w[:, :-1], g.sum(1, keepdim=True)], 1)
        return value.item(), slopes.flatten().cpu().numpy()

    options = {"maxiter": 10_000, "maxfun": 20_000, "gtol": slope, "ftol": 0.0}
    found = minimize(loss, start.flatten().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).to(z.device).view_as(start)


def knn(
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    k: int,
    classes: int,
    *,
    temperature: float | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Tensor:
    """The class ``(n,)`` of each row of ``x``, voted by its ``k`` nearest rows of ``train_x``.

    Every neighbour has one vote; with a ``temperature`` T exp(-d^2 / 2T) of one, which for the cosine, where vectors
    have length 1, is exp(cos / T) but for a constant: the vote of Wu et al., who take k = 200 and T = 0.07 (k = 20 is
    usual, too). Equally distant neighbours: the smaller row first; equal votes: the lowest class. A vector of
    length 0 is as near to all.

    DataError as of :func:`gencli.metrics.nearest.nearest` and for labels that do not fit; UsageError for a ``k`` above
    the number of rows, a temperature that is not above 0, or another metric.
    """
    if temperature is not None and not 0 < temperature < math.inf:
        raise UsageError(f"temperature = {temperature}: a temperature is above 0")
    if metric not in ("cosine", "euclidean"):
        raise UsageError(f"metric {metric!r}: there is cosine, euclidean")
    train_x, y = _labelled(train_x, train_y, classes, "the training features")
    x = check_rows(x, "the features")
    if metric == "cosine":
        train_x, x = (F.normalize(v if v.dtype == torch.float64 else v.float(), dim=1) for v in (train_x, x))
    rows, distances = nearest(x, train_x, k)
    weight = torch.ones_like(distances)
    if temperature is not None:
        square = distances.square()
        weight = ((square[:, :1] - square) / (2 * temperature)).exp()  # of the nearest: 1, so that none underflows
    return weight.new_zeros(len(x), classes).scatter_add_(1, y[rows], weight).argmax(1)


def accuracy(predicted: Tensor, y: Tensor) -> Accuracy:
    """How many of ``predicted`` are ``y``, both ``(n,)``; DataError if there are none or their numbers differ."""
    if predicted.shape != y.shape or y.ndim != 1 or not len(y):
        raise DataError(f"predictions {list(predicted.shape)} for labels {list(y.shape)}: one each is needed")
    n, p, z = len(y), (predicted == y).double().mean().item(), 1.959963984540054
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return Accuracy(p, math.sqrt(p * (1 - p) / n), max(0.0, low), min(1.0, high), n)


def few_labels(y: Tensor, classes: int, n: int, rng: Rng) -> Tensor:
    """Rows ``(n,)``, in order, that keep their labels: as many of each class; which ones ``rng`` draws.

    Where ``classes`` does not divide ``n``, drawn classes have one more. Fewer rows of the same key are among more.
    UsageError if ``n`` is less than one a class; DataError if a class has too few rows.
    """
    y = _labels(y, classes, "the labels").cpu()
    if n < classes:
        raise UsageError(f"{n} labels for {classes} classes: {classes} or more, one of each class")
    counts = y.bincount(minlength=classes)
    scarce = int(counts.argmin())
    if counts[scarce] < -(-n // classes):
        raise DataError(f"class {scarce} has {int(counts[scarce])} rows, too few for {n} labels of {classes} classes")
    drawn = rng.permutation("labels", len(y)).cpu()
    by_class = drawn[y[drawn].argsort(stable=True)]
    rank = torch.cat([torch.arange(int(count)) for count in counts])  # a row's place in its class
    place = torch.empty_like(drawn)
    place[by_class] = rank
    return drawn[place[drawn].argsort(stable=True)][:n].sort().values


def _labelled(x: Tensor, y: Tensor, classes: int, what: str) -> tuple[Tensor, Tensor]:
    x, y = check_rows(x, what), _labels(y, classes, what)
    if len(x) != len(y):
        raise DataError(f"{what}: {len(x)} rows and {len(y)} labels")
    return x, y.to(x.device)


def _labels(y: Tensor, classes: int, what: str) -> Tensor:
    if y.ndim != 1 or not len(y) or y.is_floating_point() or y.is_complex():
        raise DataError(f"{what}: labels are integers, one a row, not {y.dtype} of shape {list(y.shape)}")
    y = y.long()
    if y.min() < 0 or y.max() >= classes:
        raise DataError(f"{what}: label {int(y.min() if y.min() < 0 else y.max())} is none of {classes} classes")
    return y
