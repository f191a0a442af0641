"""Negative log-likelihood and lower bounds of the likelihood, with their protocol, and the baseline of independent
values.

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

__all__ = ["ENDLESS", "baseline", "bound", "chunks_of", "nll", "per_character", "rows_of"]

ENDLESS = 10_000  # fresh examples that stand for a data set without end
DRAWS = 100  # of z an example, where nll is a bound by draws and nobody says how many
WEIGHTED = 1000  # the same of iwae
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


def nll(model: Model, source: Any, *, seed: int = 0, limit: int | None = None, k: int | None = None) -> dict[str, Any]:
    """The negative log-likelihood of ``source`` under ``model``: one row of results.

    Where the model's likelihood is a lower bound and an importance-weighted one is to be had, that of ``k`` draws
    (:data:`DRAWS` without it), which is the tighter. Raises UsageError if the model has no likelihood, or if ``k`` is
    given and there is nothing to draw.
    """
    if model.likelihood is None or not hasattr(model, "log_prob"):
        raise UsageError("this model has no likelihood", hint="gencli models lists what each can do")
    weighted = model.likelihood == "lower bound" and hasattr(model, "iwae")
    if k is not None and not weighted:
        raise UsageError(f"the likelihood of this model is no bound by draws of z ({model.likelihood}): it takes no -k")
    if weighted:
        how, nats = {"bound": "iwae", "k": k or DRAWS}, -_each(model, source, "iwae", seed, limit, k=k or DRAWS)
    else:
        how, nats = {}, -_each(model, source, "log_prob", seed, limit)
    kind = "upper bound" if model.likelihood == "lower bound" else model.likelihood  # -log p <= -ELBO
    return {"metric": "nll", "data": f"{source.name}@{source.split}", "kind": kind} | how | _summary(nats, model)


def bound(
    metric: str, model: Model, source: Any, *, seed: int = 0, limit: int | None = None, k: int | None = None
) -> dict[str, Any]:
    """A lower bound of log p of ``source`` under ``model``, in nats; its code length in bits a dimension beside it.

    ``elbo``: one draw of z an example. ``iwae``: the importance-weighted bound of ``k`` draws (1,000 without it), whose
    expectation rises with ``k`` (Burda et al. 2015, arXiv:1509.00519). Raises UsageError if the model has neither, or
    if ``k`` is given to ``elbo``.
    """
    if not hasattr(model, metric):
        raise UsageError(f"this model has no {metric}", hint="gencli models lists which have bounds")
    if metric == "elbo" and k is not None:
        raise UsageError("elbo is of one draw: -k is for iwae")
    how = {"k": k or WEIGHTED} if metric == "iwae" else {}
    row = _summary(_each(model, source, metric, seed, limit, **how), model)
    if "bits_per_dim" in row:
        row["bits_per_dim"] *= -1
    return {"metric": metric, "data": f"{source.name}@{source.split}", "kind": "lower bound"} | how | row


def _each(model: Model, source: Any, method: str, seed: int, limit: int | None, **options: Any) -> Tensor:
    """Nats of each example by ``method``, in float64. Several processes share the chunks out, and each has all."""
    _check_knows(model, source)
    device = next(model.parameters()).device
    if model.conditional and not source.spec.classes:
        raise UsageError(f"the model is class-conditional, and {source.name} has no labels")

    def one(rows: range) -> np.ndarray[Any, Any]:
        fields = source.rows(torch.tensor(rows))
        labels = fields["label"].to(device) if model.conditional else None
        with scope(SampleRng(seed, rows, f"eval-{source.split}", device)) as rng:
            nats: Tensor = getattr(model, method)(fields["x"].to(device), rng, labels=labels, **options)
            return nats.double().cpu().numpy()

    return torch.from_numpy(np.concatenate(list(processes.shared(chunks_of(source, limit, model.chunk), one))))


def _check_knows(model: Model, source: Any) -> None:
    """UsageError if ``model`` knows other data."""
    if (source.spec.shape, source.spec.levels) != (model.spec.shape, model.spec.levels):
        raise UsageError(
            f"the model knows {model.spec.name} {list(model.spec.shape)} with {model.spec.levels} levels, and "
            f"{source.name} is {list(source.spec.shape)} with {source.spec.levels}"
        )
    if (source.spec.vocabulary, source.spec.rate) != (model.spec.vocabulary, model.spec.rate):
        what = "symbols" if source.spec.kind == "text" else "samples a second"
        raise UsageError(f"the {what} of {source.name} are not those of {model.spec.name}, which the model knows")


def _summary(nats: Tensor, model: Model) -> dict[str, Any]:
    """Mean and standard error, in each unit."""
    mean, error = nats.mean().item(), (nats.std() / math.sqrt(len(nats))).item() if len(nats) > 1 else math.nan
    row: dict[str, Any] = {"nats": mean, "nats_stderr": error, "nats_per_dim": mean / model.spec.dims}
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
