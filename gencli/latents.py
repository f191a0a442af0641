"""Ways through a latent space, and what data says of it: where classes lie and which dimensions are in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli import console
from gencli.console import DataError, UsageError, nearest
from gencli.data.source import Array, Source
from gencli.rng import SampleRng
from gencli.sampling import raw, scope

__all__ = [
    "PATHS",
    "activity",
    "between",
    "bilinear",
    "class_means",
    "decoded",
    "drawn",
    "encode",
    "encodings",
    "lerp",
    "of_seeds",
    "principal_axes",
    "slerp",
    "through",
    "traversal",
    "walk",
]

MOST = 50_000  # rows of a data set that are looked at
READ = 1024  # of them at once


# ---------------------------------------------------------------------------------------------- paths


def lerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """The straight line: ``(1 - t) z0 + t z1`` for one latent ``z0`` and ``t`` (k, 1, ...)."""
    return (1 - t) * z0 + t * z1


def slerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """The great circle (Shoemake 1985), which keeps the norm that a Gaussian's draws have in many dimensions.

    Ends of different length are joined by the arc of their directions with the length changing evenly; nearly
    (anti)parallel ends by the straight line, where the arc is not defined. At t = 0 and 1 the ends come back exactly.
    """
    n0, n1 = z0.norm(), z1.norm()
    if n0 == 0 or n1 == 0:
        return lerp(z0, z1, t)
    u0, u1 = z0 / n0, z1 / n1
    omega = 2 * torch.atan2((u0 - u1).norm(), (u0 + u1).norm())  # arccos loses half its digits near both its ends
    if omega.sin().abs() < 1e-4:
        return lerp(z0, z1, t)
    direction = (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()
    arc = direction * ((1 - t) * n0 + t * n1)
    return torch.where(t == 0, z0, torch.where(t == 1, z1, arc))


PATHS = {"lerp": lerp, "slerp": slerp}


def between(model: Any, z0: Tensor, z1: Tensor, t: Tensor, path: str | None = None) -> Tensor:
    """Points at ``t`` (k,) on the ``path`` from one latent to another.

    "model" is the model's own path, and the default where it has one; slerp is where not.
    """
    t = t.to(z0).reshape(-1, *[1] * z0.dim())
    own = hasattr(model, "path")
    if path == "model" and not own:
        raise UsageError("this model has no path of its own: --path is slerp or lerp")
    if path == "model" or (path is None and own):
        return model.path(z0, z1, t)
    if path is not None and path not in PATHS:
        raise UsageError(f"unknown path {path!r}{nearest(path, PATHS)}: it is slerp, lerp or model")
    return PATHS[path or "slerp"](z0, z1, t)


def walk(model: Any, z0: Tensor, z1: Tensor, steps: int, path: str | None = None) -> Tensor:
    """``steps`` latents from ``z0`` to ``z1``, both ends among them."""
    return between(model, z0, z1, torch.linspace(0, 1, steps), path)


def through(model: Any, keys: Tensor, steps: int, path: str | None = None, loop: bool = False) -> Tensor:
    """Latents along the keyframes ``keys (k, ...)``, ``steps`` from each to the next, both among them.

    Each keyframe comes once: ``(k - 1) (steps - 1) + 1`` latents. A ``loop`` goes back to the first one, which is
    then the last latent too.
    """
    stops = [*keys, keys[0]] if loop else [*keys]
    legs = [walk(model, a, b, steps, path) for a, b in pairwise(stops)]
    return torch.cat([legs[0], *(leg[1:] for leg in legs[1:])])


def bilinear(model: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor, steps: int, path: str | None = None) -> Tensor:
    """``steps * steps`` latents of a square with the corners ``a b`` above ``c d``, row by row."""
    left, right = walk(model, a, c, steps, path), walk(model, b, d, steps, path)
    return torch.cat([walk(model, left[i], right[i], steps, path) for i in range(steps)])


def traversal(z: Tensor, dims: Sequence[int], values: Tensor) -> Tensor:
    """One latent ``z (...)`` with entry ``dims[i]`` of its flat form set to ``values[k]``: ``(dims, values, ...)``."""
    rows = z.flatten().repeat(len(dims), len(values), 1)
    rows[torch.arange(len(dims)), :, list(dims)] = values.to(rows)
    return rows.reshape(len(dims), len(values), *z.shape)


# ---------------------------------------------------------------------------------------------- latents of a model


def drawn(model: Any, n: int, *, seed: int) -> Tensor:
    """``n`` latents drawn from the prior."""
    with scope(SampleRng(seed, range(n), "interpolate", _device(model))) as rng:
        return model.prior(rng)


def of_seeds(model: Any, seeds: Sequence[int]) -> Tensor:
    """The latent of the first sample that each seed gives."""
    found = []
    for seed in seeds:
        with scope(SampleRng(seed, [0], "sample", _device(model))) as rng:
            found.append(model.prior(rng))
    return torch.cat(found)


def encode(
    model: Any, x: Array | Tensor, *, seed: int, labels: Tensor | None = None, rows: Sequence[int] | None = None
) -> Tensor:
    """The latents of raw ``x (n, ...)``, of ``labels`` (n,) where the model encodes by class.

    Where an encoder draws, example i does so as number ``rows[i]`` of all that are encoded; without them, as i.
    """
    device, numbers, parts = _device(model), rows or range(len(x)), []
    for start in range(0, len(x), model.chunk):
        mine = slice(start, start + model.chunk)
        given = {} if labels is None else {"labels": labels[mine].to(device)}
        with scope(SampleRng(seed, numbers[mine], "encode", device)) as rng:
            parts.append(model.encode(torch.as_tensor(x[mine]).to(device), rng, **given))
    return torch.cat(parts)


def decoded(model: Any, z: Tensor, labels: Tensor | None = None) -> Iterator[Array]:
    """The raw examples of latents ``z (n, ...)``, of ``labels`` (n,) where the model decodes by class, in chunks."""
    for first in range(0, len(z), model.chunk):
        mine = slice(first, first + model.chunk)
        given = {} if labels is None else {"labels": labels[mine].to(z.device)}
        with torch.no_grad():
            x = raw(model.decode(z[mine], **given), model.spec)
        yield x


def encodings(
    model: Any, source: Source, n: int = MOST, *, seed: int, classes: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Latents and labels of the first ``n`` rows of ``source``, some at a time; of ``classes`` alone where given.

    DataError where there are no labels to choose by.
    """
    n = n if source.size is None else min(n, source.size)
    with console.Progress(n, "encode", unit="example") as progress:
        for start in range(0, n, READ):
            index = torch.arange(start, min(start + READ, n))
            fields = source.rows(index)
            x, y = fields["x"], fields.get("label")
            if classes is not None:
                if y is None:
                    raise DataError(f"{source.name}@{source.split} does not say which class an example is of")
                keep = torch.isin(y, torch.tensor(classes))
                x, y, index = x[keep], y[keep], index[keep]
            if len(x):
                labels = y if model.conditional else None
                yield encode(model, x, seed=seed, labels=labels, rows=index.tolist()), y
            progress.update(start + len(fields["x"]))


def class_means(model: Any, source: Source, classes: Sequence[int], *, seed: int) -> tuple[Tensor, list[int]]:
    """The mean latent of each of ``classes`` over the first rows of ``source``, ``(k, ...)``, and of how many rows.

    Summed in float64. DataError for a class that has no rows there.
    """
    total: dict[int, Tensor] = {}
    counts = dict.fromkeys(classes, 0)
    for z, y in encodings(model, source, seed=seed, classes=classes):
        for k in counts if y is not None else ():
            mine = z.cpu()[y == k]  # not every device has float64
            total[k] = total.get(k, 0) + mine.sum(0, dtype=torch.float64)
            counts[k] += len(mine)
    for k, count in counts.items():
        if not count:
            raise DataError(f"{source.name}@{source.split} has no example of class {source.spec.classes[k]!r}")
    means = torch.stack([total[k] / counts[k] for k in classes])
    return means.to(_device(model), next(model.parameters()).dtype), [counts[k] for k in classes]


def activity(model: Any, source: Source, n: int = 1000) -> tuple[Tensor, int]:
    """The mean KL to the prior of each latent dimension, in nats ``(J,)``, over the first rows of ``source``: how many.

    Of a model that tells it (``kl_per_dimension``).
    """
    n = n if source.size is None else min(n, source.size)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, n, model.chunk):
        fields = source.rows(torch.arange(start, min(start + model.chunk, n)))
        labels = fields["label"].to(_device(model)) if model.conditional else None
        with torch.no_grad():
            total = total + model.kl_per_dimension(fields["x"].to(_device(model)), labels).double().sum(0).cpu()
    return total / n, n


def principal_axes(z: Array) -> tuple[Array, float]:
    """Points ``z (n, J)`` on the two axes along which they vary most, ``(n, 2)``, and the axes' share of the variance.

    An axis points to where its largest weight is positive.
    """
    centred = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(1)[:, None], 1))
    share = float((size[:2] ** 2).sum() / max((size**2).sum(), np.finfo(float).tiny))
    return centred @ axes.T, share


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
