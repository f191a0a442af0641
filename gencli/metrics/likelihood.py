"""Negative log-likelihood, with its protocol, beside the baseline of independent pixels.

Units: nats an example (summed over dimensions), nats and bits a dimension; bits/dim for discrete data alone. The mean
over examples is taken in float64 and comes with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli import processes
from gencli.console import UsageError
from gencli.contract import Model
from gencli.rng import SampleRng
from gencli.sampling import scope

__all__ = ["ENDLESS", "chunks_of", "independent_pixels", "nll", "rows_of"]

ENDLESS = 10_000  # fresh examples that stand for a data set without end


def chunks_of(source: Any, limit: int | None = None, chunk: int = 256) -> Iterator[range]:
    """The row numbers of ``source`` (at most ``limit``), in order, in chunks."""
    n = source.size if source.size is not None else ENDLESS
    n = min(n, limit) if limit else n
    for start in range(0, n, chunk):
        yield range(start, min(start + chunk, n))


def rows_of(source: Any, limit: int | None = None, chunk: int = 256) -> Iterator[dict[str, Tensor]]:
    """The rows of ``source`` (at most ``limit``), in order, in chunks."""
    for rows in chunks_of(source, limit, chunk):
        yield source.rows(torch.tensor(rows))


def nll(model: Model, source: Any, *, seed: int = 0, limit: int | None = None) -> dict[str, Any]:
    """The negative log-likelihood of ``source`` under ``model``: one row of results.

    Several processes share the chunks out, and each has the whole result. Raises UsageError if the model has no
    likelihood or knows other data.
    """
    if model.likelihood is None or not hasattr(model, "log_prob"):
        raise UsageError("this model has no likelihood", hint="gencli models lists what each can do")
    if (source.spec.shape, source.spec.levels) != (model.spec.shape, model.spec.levels):
        raise UsageError(
            f"the model knows {model.spec.name} {list(model.spec.shape)} with {model.spec.levels} levels, and "
            f"{source.name} is {list(source.spec.shape)} with {source.spec.levels}"
        )
    device = next(model.parameters()).device
    conditional = bool(getattr(model.config, "conditional", False))
    if conditional and not source.spec.classes:
        raise UsageError(f"the model is class-conditional, and {source.name} has no labels")

    def one(rows: range) -> np.ndarray[Any, Any]:
        fields = source.rows(torch.tensor(rows))
        labels = fields["label"].to(device) if conditional else None
        with scope(SampleRng(seed, rows, f"eval-{source.split}", device)) as rng:
            return -model.log_prob(fields["x"].to(device), rng, labels=labels).double().cpu().numpy()

    nats = torch.from_numpy(np.concatenate(list(processes.shared(chunks_of(source, limit, model.chunk), one))))
    mean, error = nats.mean().item(), (nats.std() / math.sqrt(len(nats))).item() if len(nats) > 1 else math.nan
    row: dict[str, Any] = {
        "metric": "nll",
        "data": f"{source.name}@{source.split}",
        "kind": "upper bound" if model.likelihood == "lower bound" else model.likelihood,  # -log p <= -ELBO
        "nats": mean,
        "nats_stderr": error,
        "nats_per_dim": mean / model.spec.dims,
    }
    if model.spec.levels is not None:
        bits = 1 / (model.spec.dims * math.log(2))
        row |= {"bits_per_dim": mean * bits, "bits_per_dim_stderr": error * bits}
    return row | {"examples": len(nats)}


def independent_pixels(train: Any, test: Any) -> float:
    """Bits/dim on ``test`` of a histogram a pixel, fitted on ``train``, one added to every count."""
    levels, dims = train.spec.levels, train.spec.dims
    counts = torch.ones(dims, levels, dtype=torch.float64)
    for fields in rows_of(train):
        x = fields["x"].flatten(1).long()
        counts.scatter_add_(1, x.T, torch.ones(x.T.shape, dtype=torch.float64))
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    total, n = 0.0, 0
    for fields in rows_of(test):
        x = fields["x"].flatten(1).long()
        total -= log_p.gather(1, x.T).sum().item()
        n += len(x)
    return total / n / dims
