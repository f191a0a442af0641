"""Warnings of a training that goes wrong without diverging: what a model says of its logs and samples, once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gencli.contract import Model
from gencli.data.source import Source
from gencli.streams import Samples

__all__ = ["Worries", "spread"]

FEWEST = 8  # samples that a spread is computed from


def spread(x: np.ndarray[Any, Any], data: np.ndarray[Any, Any]) -> float:
    """How much samples ``x (n, ...)`` differ from one another: the mean over dimensions of their standard deviation,
    as a share of that of ``data (m, ...)``; 1 where the data itself does not vary."""
    own, real = (float(a.reshape(len(a), -1).astype(np.float64).std(0).mean()) for a in (x, data))
    return own / real if real > 0 else 1.0


class Worries:
    """Asks ``model`` (:meth:`gencli.contract.Model.worry`) and passes on by ``tell`` what it has not said before.

    Nothing is said before step ``since``: the samples of random weights are all alike, and no reason to worry.
    """

    def __init__(self, model: Model, data: Source, tell: Callable[[str], None], since: int = 0) -> None:
        self.model, self.data, self.tell, self.since = model, data, tell, since
        self._told: set[str] = set()

    def about(self, step: int, signs: Mapping[str, float]) -> None:
        """``signs``: what was logged, by its name there, or "spread"."""
        for what, text in self.model.worry(signs).items():
            if what not in self._told and step >= self.since:
                self._told.add(what)
                self.tell(f"step {step}: {text}")

    def about_samples(self, step: int, chunks: Sequence[Samples]) -> None:
        """Samples of one picture, beside as many rows of the data."""
        n = sum(len(chunk.x) for chunk in chunks)
        if n < FEWEST or self.model.spec.kind not in ("image", "points"):
            return
        rows = torch.arange(n if self.data.size is None else min(n, self.data.size))
        data = self.data.rows(rows)["x"].numpy()
        self.about(step, {"spread": spread(np.concatenate([chunk.x for chunk in chunks]), data)})
