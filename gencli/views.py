"""What a model of points has learned, as pictures of the whole: its density, and its map from latents to points.

A density is seen beside the data, and its integral over the picture's window is told: near 1, unless the model puts
mass elsewhere, or what it gives is a bound. A map shows how it bends space: in two dimensions a grid of latents and
what becomes of it, in one dimension the curve z over x, for uniform latents the distribution function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli import plots
from gencli.console import UsageError, nearest
from gencli.contract import Model
from gencli.rng import SampleRng
from gencli.sampling import scope

__all__ = ["VIEWS", "check", "draw"]

Array = np.ndarray[Any, Any]

VIEWS = {"density": ("log_prob",), "map": ("prior", "decode")}  # and the methods that they take
CHUNK = 4096  # points at once: no bit of a picture is promised
BINS = 200  # of a density, along each side
LINES, FINE = 21, 201  # of a grid along each axis, and points along each line


def check(view: str) -> None:
    """UsageError if there is no such view."""
    if view not in VIEWS:
        known = (*VIEWS, "progress")
        raise UsageError(f"unknown view {view!r}{nearest(view, known)}: --view is {', '.join(VIEWS)} or progress")


def draw(
    view: str, model: Model, data: Array | None = None, *, seed: int = 0, labels: Sequence[int] | None = None
) -> tuple[Array, dict[str, Any]]:
    """The picture ``(H, W, 3)`` and what to say of it. ``data (n, D)`` lie beside or beneath and set the window.

    A class-conditional model shows the one class in ``labels``. Raises UsageError for what has no such view.
    """
    check(view)
    spec = model.spec
    if spec.kind != "points" or spec.dims > 2:
        what = f"points of {spec.dims} dimensions" if spec.kind == "points" else f"{spec.kind} data"
        raise UsageError(f"a view is of points of one or two dimensions, and the model knows {what}")
    if not all(hasattr(model, method) for method in VIEWS[view]):
        why = "it has no likelihood" if view == "density" else "it has no latents"
        raise UsageError(f"this model has no {view} to view: {why}", hint="gencli models lists what each can do")
    if labels and not model.conditional:
        raise UsageError("this model is not class-conditional: it takes no labels")
    if model.conditional and (view == "map" or len(labels or ()) != 1):
        one = "the map of a class-conditional model" if view == "map" else "a density of all classes at once"
        raise UsageError(f"there is no view of {one}", hint="--view density --labels 0")
    if view == "density":
        return _density(model, data, seed, labels)
    return _map(model, data, seed)


def _chunks(n: int, seed: int, device: Any) -> Iterator[tuple[slice, SampleRng]]:
    for start in range(0, n, CHUNK):
        rows = range(start, min(start + CHUNK, n))
        with scope(SampleRng(seed, rows, "view", device)) as rng:
            yield slice(rows.start, rows.stop), rng


def _density(model: Model, data: Array | None, seed: int, labels: Sequence[int] | None) -> tuple[Array, dict[str, Any]]:
    device = next(model.parameters()).device
    if data is None:
        raise UsageError("the data of the run are not at hand, and they say where to look")
    limits = plots.frame(data, data)[: data.shape[1]]
    area = math.prod(high - low for low, high in limits)
    integral = math.nan

    def log_prob(where: Array) -> Array:
        nonlocal integral
        x, found = torch.from_numpy(where).to(device), np.empty(len(where))
        for rows, rng in _chunks(len(x), seed, device):
            y = torch.full((rng.n,), labels[0], device=device) if labels else None
            found[rows] = model.log_prob(x[rows], rng, labels=y).double().cpu().numpy()
        integral = area * float(np.exp(found).mean())  # by the midpoints of equal cells
        return found

    image = plots.density(log_prob, data, bins=BINS)
    window = [[round(end, 4) for end in span] for span in limits]
    return image, {"kind": model.likelihood, "window": window, "integral": integral}


def _map(model: Model, data: Array | None, seed: int) -> tuple[Array, dict[str, Any]]:
    device, D = next(model.parameters()).device, model.spec.dims
    with scope(SampleRng(seed, range(2000), "view", device)) as rng:
        z = model.prior(rng).flatten(1).cpu().numpy()
    if z.shape[1] != D:
        raise UsageError(f"a map to view is from {D} to {D} dimensions, and this model's latents have {z.shape[1]}")
    low, high = np.percentile(z, [0.5, 99.5], axis=0).astype(float)  # (D,)
    if D == 1:
        grid = np.linspace(low, high, 4 * FINE)  # (m, 1)
    else:
        places, along = np.linspace(low, high, LINES), np.linspace(low, high, FINE)
        upright = np.stack(np.meshgrid(places[:, 0], along[:, 1], indexing="ij"), -1)
        level = np.stack(np.meshgrid(along[:, 0], places[:, 1], indexing="xy"), -1)
        grid = np.stack([upright, level])  # (2, lines, m, 2)
    flat = torch.from_numpy(grid.reshape(-1, D).astype(np.float32)).to(device)
    x: Tensor = torch.cat([model.decode(flat[rows]) for rows, _ in _chunks(len(flat), seed, device)])
    image = plots.warp(grid, x.cpu().numpy().reshape(grid.shape), data)
    return image, {"latents": [[round(float(a), 4), round(float(b), 4)] for a, b in zip(low, high)]}
