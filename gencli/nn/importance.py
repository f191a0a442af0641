"""Bounds by importance sampling, and the four ways to train by them where the likelihood itself is known.

With z_i ~ q(z|x) and w_i = p(x, z_i) / q(z_i|x), E[log mean_i w_i] <= log p(x), and it rises with the number of draws.

Reference: Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015, arXiv 1509.00519 (eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BLOCK", "Estimator", "log_mean_weight"]

# What stands in for log p(x) in training: itself; k draws from the prior; k draws from q(z|x); the ELBO.
Estimator = Literal["exact", "prior", "importance", "elbo"]

BLOCK = 128  # draws of z an example that are made together


def log_mean_weight(log_w: Callable[[int], Tensor], k: int) -> Tensor:
    """log mean_i w_i over ``k`` draws, nats ``(n,)`` in float64.

    ``log_w(m)`` makes the next ``m`` draws and returns their log-weights ``(n, m)``. It is asked for one block after
    another, so memory does not grow with ``k``, and where an example's draws follow its index (``SampleRng``), those of
    a smaller ``k`` are the first of them.
    """
    blocks = [log_w(min(BLOCK, k - first)).double().logsumexp(1) for first in range(0, k, BLOCK)]
    return torch.stack(blocks).logsumexp(0) - math.log(k)
