"""How exactly a flow is inverted: from data to latents and back, and from latents to data and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli import processes
from gencli.contract import Model
from gencli.metrics.likelihood import chunks_of
from gencli.rng import SampleRng
from gencli.sampling import scope

__all__ = ["EXAMPLES", "inverse"]

EXAMPLES = 1_000  # an error is the largest of so many


def inverse(model: Model, source: Any, *, seed: int = 0, limit: int | None = None) -> dict[str, Any]:
    """The largest errors of ``f_inverse(f(y)) - y`` over rows of ``source``, and of ``f(f_inverse(z)) - z`` over as
    many latents from the prior: one row of results.

    ``y`` is what the flow sees of data: points, or pixels as real numbers. "value" and "latents" are in the precision
    that the model computes in, "value_float64" and "latents_float64" in double precision, where the device has it:
    their difference says whether a large error is the map's or rounding's. "off" is the share of pixels whose level
    is not that of the data after the way there and back. Several processes share the chunks.
    """
    double = copy.deepcopy(model).double() if next(model.parameters()).device.type != "mps" else None

    def one(rows: range) -> np.ndarray[Any, Any]:
        fields = source.rows(torch.tensor(rows))
        return np.array(list(_errors(model, double, fields, rows, seed)), np.float64)

    found = np.stack(list(processes.shared(chunks_of(source, limit or EXAMPLES, model.chunk), one)))
    names = ("value", "latents", "value_float64", "latents_float64")
    row: dict[str, Any] = {"metric": "inverse", "data": f"{source.name}@{source.split}"}
    row |= dict(zip(names, found[:, 2:].max(0).tolist()))
    n = found[:, 0].sum()
    if model.spec.levels is not None:
        row["off"] = float(found[:, 1].sum() / (n * model.spec.dims))
    return row | {"examples": int(n)}


def _errors(model: Model, double: Model | None, fields: Any, rows: range, seed: int) -> Iterator[float]:
    """Rows, pixels off, and the largest error of each way, in the model's own precision and in double."""
    device, levels = next(model.parameters()).device, model.spec.levels
    x = fields["x"].to(device)
    labels = fields["label"].to(device) if model.conditional else None
    with scope(SampleRng(seed, rows, "inverse", device)) as rng:
        y, _ = model.to_real(x, rng)
        z = model.prior(rng)
        back = _there_and_back(model, y, labels)
        yield len(x)
        yield 0 if levels is None else (model.from_real(back).floor().clamp_max(levels - 1) != x).sum().item()
        for net, dtype in ((model, y.dtype), (double, torch.float64)):
            if net is None:
                return
            y, z = y.to(dtype), z.to(dtype)
            yield (_there_and_back(net, y, labels) - y).abs().max().item()
            yield (net.f(net.f_inverse(z, labels), labels)[0] - z).abs().max().item()


def _there_and_back(net: Model, y: Tensor, labels: Tensor | None) -> Tensor:
    return net.f_inverse(net.f(y, labels)[0], labels)
