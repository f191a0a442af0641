"""Exploiting Similarities among Languages for Machine Translation.

The first map between word vectors of two languages: any matrix, by least squares over the pairs of a dictionary,

    min_W sum_i |W x_i - z_i|^2                                                                   (3)

which the paper minimises by stochastic gradient descent. It may map between dimensions (the paper's best go from 800
to 200). In closed form it is ordinary least squares; with ``penalty`` |W|^2 is added, which is ridge regression.
Translations are the words whose vectors have the largest cosine with W x.

Reference: Tomas Mikolov, Quoc V. Le, Ilya Sutskever, 2013, arXiv 1309.4168. Ridge: Georgiana Dinu, Angeliki Lazaridou,
Marco Baroni, Improving zero-shot learning by mitigating the hubness problem, 2015, arXiv 1412.6568.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

__all__ = ["Linear"]

Array = np.ndarray[Any, Any]


class Linear:
    """A map W with W x_i near z_i in the sense of least squares."""

    class Config(BaseModel, frozen=True, extra="forbid"):
        solver: Literal["exact", "sgd"] = Field("exact", description="in closed form, or as in the paper")
        penalty: float = Field(
            0.0, ge=0, allow_inf_nan=False, description="of |W|^2, beside the sum over the pairs; above 0: ridge"
        )
        epochs: int = Field(50, ge=1, description="sgd: passes over the dictionary")
        batch: int = Field(16, ge=1, description="sgd: pairs a step")
        rate: float = Field(
            0.5, gt=0, allow_inf_nan=False, description="sgd: first step size, of one over the mean |x|^2; falls to 0"
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @staticmethod
    def gradient(W: Array, X: Array, Z: Array, penalty: float = 0.0) -> Array:
        """d/dW of sum_i |W x_i - z_i|^2 + penalty |W|^2: 2 sum_i (W x_i - z_i) x_i^T + 2 penalty W, (d', d)."""
        return 2 * ((X @ W.T - Z).T @ X + penalty * W)

    def fit(self, X: Array, Z: Array, rng: np.random.Generator) -> Array:
        """W (d', d) for pairs of rows of ``X`` (n, d) and ``Z`` (n, d'), in float64; of many, the least.

        ``rng`` orders the pairs of stochastic gradient descent.
        """
        X, Z = X.astype(np.float64), Z.astype(np.float64)
        if self.config.solver == "sgd":
            return self._descend(X, Z, rng)
        if self.config.penalty:
            # the normal equations are well-conditioned by the penalty
            return np.linalg.solve(X.T @ X + self.config.penalty * np.eye(X.shape[1]), X.T @ Z).T
        return np.linalg.lstsq(X, Z, rcond=None)[0].T

    def _descend(self, X: Array, Z: Array, rng: np.random.Generator) -> Array:
        n, c = len(X), self.config
        W = np.zeros((Z.shape[1], X.shape[1]))
        rate = c.rate / max(np.square(X).sum(1).mean(), np.finfo(float).tiny)
        steps, done = c.epochs * -(-n // c.batch), 0
        for _ in range(c.epochs):
            order = rng.permutation(n)
            for start in range(0, n, c.batch):
                i = order[start : start + c.batch]
                # the mean over the batch, with its share of the penalty; half, as the rate is for the square's half
                W -= rate * (1 - done / steps) * self.gradient(W, X[i], Z[i], c.penalty * len(i) / n) / (2 * len(i))
                done += 1
        return W
