"""Inception Score: exp of the mutual information between a sample and its class, as a classifier sees them.

    IS = exp(E_x KL(p(y|x) || p(y))) = exp(H(y) - E_x H(y|x))

The field's protocol is the mean and the deviation over 10 splits of the samples, each with a p(y) of its own; samples
are shuffled before, since classes may come in order. The two entropies are those of all samples: variety, and how sure
the classifier is of each.

References:
    Improved Techniques for Training GANs, Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, 2016, arXiv 1606.03498
    A Note on the Inception Score, Barratt, Sharma, 2018, arXiv 1801.01973 (what it does not say)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencli.console import DataError
from gencli.metrics.nearest import check_rows
from gencli.rng import Rng

__all__ = ["InceptionScore", "inception_score"]


class InceptionScore(NamedTuple):
    """``mean`` and ``std`` over ``splits``; ``h_y`` and ``h_y_x`` in nats, of all rows."""

    mean: float
    std: float
    splits: int
    h_y: float
    h_y_x: float


def _entropies(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """H(y) and E H(y|x) in nats, of log p(y|x) ``(n, classes)``."""
    p = log_p.exp()
    marginal = p.mean(0)
    return -torch.special.xlogy(marginal, marginal).sum(), -(p * log_p).sum(1).mean()


def inception_score(logits: Tensor, rng: Rng, splits: int = 10) -> InceptionScore:
    """The score of samples by their ``logits (n, classes)``; DataError for fewer rows than ``splits``."""
    log_p = check_rows(logits, "the logits").double().log_softmax(1)
    n = len(log_p)
    if n < splits:
        raise DataError(f"{n} samples are too few for an inception score over {splits} splits: {splits} at least")
    order = rng.permutation("splits", n).to(log_p.device)
    scores = []
    for k in range(splits):
        h_y, h_y_x = _entropies(log_p[order[k * n // splits : (k + 1) * n // splits]])
        scores.append((h_y - h_y_x).exp())
    found = torch.stack(scores)
    h_y, h_y_x = _entropies(log_p)
    return InceptionScore(found.mean().item(), found.std(correction=0).item(), splits, h_y.item(), h_y_x.item())
