"""How many modes of a drawn mixture a model's samples cover.

A mode is covered when at least 20 of 2,500 samples lie within three standard deviations of it (in proportion for
larger counts); the share of samples near any mode is told beside it, since a model can cover all modes and still put
much of its mass between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gencli.console import UsageError
from gencli.contract import Model
from gencli.sampling import draw

__all__ = ["SAMPLES", "covered", "modes"]

SAMPLES = 2_500


def covered(samples: np.ndarray[Any, Any], centres: np.ndarray[Any, Any], sd: float) -> tuple[int, float]:
    """The number of ``centres`` (k, 2) covered by ``samples`` (n, 2), and the share of samples near any centre."""
    distance = np.linalg.norm(samples[:, None].astype(np.float64) - centres[None], axis=-1)  # (n, k)
    near = distance.min(1) <= 3 * sd
    counts = np.bincount(distance.argmin(1)[near], minlength=len(centres))
    return int((counts >= 20 * len(samples) / SAMPLES).sum()), float(near.mean())


def modes(model: Model, data: str, *, n: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """One row of results; UsageError if the data set has no known modes or the model draws no points."""
    from gencli.data import points

    centres, sd = points.modes(data)
    if not hasattr(model, "sample") or model.spec.shape != centres.shape[1:]:
        raise UsageError(f"this model draws no points like those of {data}, which have shape {list(centres.shape[1:])}")
    if n < SAMPLES:
        raise UsageError(f"{n} samples are too few to tell whether a mode is covered: -n {SAMPLES} or more")
    samples = np.concatenate([chunk.x for chunk in draw(model, n, seed=seed)])
    count, share = covered(samples, centres, sd)
    return {"metric": "modes", "data": data, "covered": count, "of": len(centres), "near_share": share, "samples": n}
