"""Negative log-likelihood, with its protocol, beside the baseline of independent values.

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

__all__ = ["ENDLESS", "baseline", "chunks_of", "nll", "per_character", "rows_of"]

ENDLESS = 10_000  # fresh examples that stand for a data set without end
COUNTED = 100_000  # rows of each side that a baseline is made of at most: a set may be larger than a machine


def chunks_of(source: Any, limit: int | None = None, chunk: int = 256) -> Iterator[range]:
    """The row numbers of ``source`` (at most ``limit``), in order, in chunks."""
    n = (limit or ENDLESS) if source.size is None else min(source.size, limit or source.size)
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
    if (source.spec.vocabulary, source.spec.rate) != (model.spec.vocabulary, model.spec.rate):
        what = "symbols" if source.spec.kind == "text" else "samples a second"
        raise UsageError(f"the {what} of {source.name} are not those of {model.spec.name}, which the model knows")
    device = next(model.parameters()).device
    if model.conditional and not source.spec.classes:
        raise UsageError(f"the model is class-conditional, and {source.name} has no labels")

    def one(rows: range) -> np.ndarray[Any, Any]:
        fields = source.rows(torch.tensor(rows))
        labels = fields["label"].to(device) if model.conditional else None
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
    if model.spec.levels is not None and model.likelihood != "density":
        bits = 1 / (model.spec.dims * math.log(2))
        row |= {"bits_per_dim": mean * bits, "bits_per_dim_stderr": error * bits}
    return row | {"examples": len(nats)}


def baseline(train: Any, test: Any) -> tuple[str, float]:
    """What is compared with: its name and its bits/dim on ``test``, histograms of ``train`` with one added to a count.

    "independent_pixels": images, a histogram a pixel. "unigram" (text) and "histogram" (sound): one for all places,
    which have no meaning of their own there.
    """
    levels, pooled = train.spec.levels, train.spec.kind in ("text", "audio")
    dims = 1 if pooled else train.spec.dims

    def columns(source: Any) -> Iterator[Tensor]:  # (dims, n)
        return (fields["x"].reshape(-1, dims).T.long() for fields in rows_of(source, COUNTED))

    counts = torch.ones(dims, levels, dtype=torch.float64)
    for x in columns(train):
        counts.scatter_add_(1, x, torch.ones(x.shape, dtype=torch.float64))
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    total, n = 0.0, 0
    for x in columns(test):
        total -= log_p.gather(1, x).sum().item()
        n += x.numel()
    return {"text": "unigram", "audio": "histogram"}.get(train.spec.kind, "independent_pixels"), total / n


def per_character(row: dict[str, Any], source: Any) -> dict[str, float]:
    """For text, from a row of :func:`nll` on ``source``: bits a character, and the perplexity of a symbol.

    Characters are those of the decoded text, so words and characters compare; an unknown symbol counts as one
    character and costs what "unknown" costs, not what it would take to spell it.
    """
    from gencli.data.text import characters

    n = sum(characters(fields["x"].numpy(), source.spec.vocabulary) for fields in rows_of(source, row["examples"]))
    bits = row["nats"] * row["examples"] / n / math.log(2)
    return {"bits_per_char": bits, "perplexity": math.exp(row["nats_per_dim"])}
