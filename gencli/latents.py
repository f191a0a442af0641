"""Ways through a latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencli.console import UsageError, nearest
from gencli.given import read_images
from gencli.rng import SampleRng
from gencli.sampling import scope

__all__ = ["PATHS", "between", "bilinear", "ends", "lerp", "slerp", "walk"]


def lerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """The straight line: ``(1 - t) z0 + t z1`` for one latent ``z0`` and ``t`` (k, 1, ...)."""
    return (1 - t) * z0 + t * z1


def slerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """The great circle (Shoemake 1985), which keeps the norm that a Gaussian's draws have in many dimensions.

    Ends of different length are joined by the arc of their directions with the length changing evenly; nearly
    (anti)parallel ends by the straight line, where the arc is not defined.
    """
    n0, n1 = z0.norm(), z1.norm()
    if n0 == 0 or n1 == 0:
        return lerp(z0, z1, t)
    u0, u1 = z0 / n0, z1 / n1
    omega = torch.arccos((u0 * u1).sum().clamp(-1, 1))
    if omega.sin().abs() < 1e-4:
        return lerp(z0, z1, t)
    direction = (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()
    return direction * ((1 - t) * n0 + t * n1)


PATHS = {"lerp": lerp, "slerp": slerp}


def between(model: Any, z0: Tensor, z1: Tensor, t: Tensor, path: str) -> Tensor:
    """Points at ``t`` (k,) on the ``path`` from one latent to another; "model" is the model's own."""
    t = t.to(z0).reshape(-1, *[1] * z0.dim())
    if path == "model":
        if not hasattr(model, "path"):
            raise UsageError("this model has no path of its own: --path is slerp or lerp")
        return model.path(z0, z1, t)
    if path not in PATHS:
        raise UsageError(f"unknown path {path!r}{nearest(path, PATHS)}: it is slerp, lerp or model")
    return PATHS[path](z0, z1, t)


def walk(model: Any, z0: Tensor, z1: Tensor, steps: int, path: str) -> Tensor:
    """``steps`` latents from ``z0`` to ``z1``, both ends among them."""
    return between(model, z0, z1, torch.linspace(0, 1, steps), path)


def bilinear(model: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor, steps: int, path: str) -> Tensor:
    """``steps * steps`` latents of a square with the corners ``a b`` above ``c d``, row by row."""
    left, right = walk(model, a, c, steps, path), walk(model, b, d, steps, path)
    return torch.cat([walk(model, left[i], right[i], steps, path) for i in range(steps)])


def ends(model: Any, n: int, images: Sequence[str], *, seed: int) -> Tensor:
    """``n`` latents drawn from the prior, or those of ``images``."""
    device = next(model.parameters()).device
    rows = range(len(images) or n)
    with scope(SampleRng(seed, rows, "interpolate", device)) as rng:
        if not images:
            return model.prior(rng)
        if not hasattr(model, "encode"):
            raise UsageError("this model has no encoder: leave out --from and --to")
        x = read_images(images, model.spec)
        if len(x) != len(images):
            raise UsageError(f"{' and '.join(images)} hold {len(x)} pictures: a walk has one at either end")
        return model.encode(torch.from_numpy(x).to(device), rng)
