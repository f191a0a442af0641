"""Normalized Word Embedding and Orthogonal Transform for Bilingual Word Translation.

Word vectors of two languages are much the same picture, turned. So the map between them is orthogonal: it keeps
lengths and angles, and with them what the vectors say about their own language. On unit vectors the least squares of
Mikolov et al. are then the largest sum of cosines,

    max_W sum_i (W x_i)^T z_i    with W^T W = I,

whose solution is W = U V^T, from the singular values U S V^T of M = sum_i z_i x_i^T (Schoenemann 1966). The paper
climbs the gradient, which is M itself, and makes W orthogonal again after every step: its min |W - W'| has the answer
U V^T of W. Both are here; they meet where M has full rank. The paper also normalises vectors while they are learned,
which is no matter of the map.

Reference: Chao Xing, Dong Wang, Chao Liu, Yiye Lin, 2015, NAACL (N15-1104; not on arXiv). The closed form in this use:
Samuel L. Smith et al., Offline bilingual word vectors, orthogonal transformations and the inverted softmax, 2017,
arXiv 1702.03859.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from gencli.console import DataError

__all__ = ["Procrustes", "orthogonal"]

Array = np.ndarray[Any, Any]


def orthogonal(M: Array) -> Array:
    """The orthogonal matrix (d, d) nearest to ``M``: U V^T of its singular value decomposition."""
    U, _, Vt = np.linalg.svd(M)
    return U @ Vt


class Procrustes:
    """An orthogonal map W with W x_i near z_i."""

    class Config(BaseModel, frozen=True, extra="forbid"):
        solver: Literal["svd", "gradient"] = Field("svd", description="in closed form, or climbing as in the paper")
        steps: int = Field(500, ge=1, description="gradient: steps at most; it stops when they change nothing")
        rate: float = Field(
            1.0,
            gt=0,
            allow_inf_nan=False,
            description="gradient: a step's length, of one over M's largest singular value",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @staticmethod
    def gradient(X: Array, Z: Array) -> Array:
        """d/dW sum_i (W x_i)^T z_i = sum_i z_i x_i^T = M, (d, d), whatever W is."""
        return Z.T @ X

    def fit(self, X: Array, Z: Array, rng: np.random.Generator) -> Array:
        """W (d, d) for pairs of rows of ``X`` and ``Z`` (n, d), in float64. DataError if the dimensions differ."""
        if X.shape[1] != Z.shape[1]:
            raise DataError(
                f"an orthogonal map keeps the dimension, but the source has {X.shape[1]} and the target {Z.shape[1]}",
                hint="--map linear maps between dimensions",
            )
        M = self.gradient(X.astype(np.float64), Z.astype(np.float64))
        if self.config.solver == "svd":
            return orthogonal(M)
        step = self.config.rate * M / max(np.linalg.norm(M, 2), np.finfo(float).tiny)
        W = np.eye(len(M))
        W[-1, -1] = np.linalg.slogdet(M)[0] or 1.0  # turns and mirrors are apart: start among those of M's kind
        for _ in range(self.config.steps):
            W, before = orthogonal(W + step), W
            if np.abs(W - before).max() < 1e-9:
                break
        return W
