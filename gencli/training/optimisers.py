"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["build", "factor"]


def build(groups: list[dict[str, Any]], part: Any) -> torch.optim.Optimizer:
    """The optimiser that ``part`` (a resolved train or phase part of a recipe) asks for.

    Each group holds "params" and "multiple", its learning rate relative to the recipe's. Fused kernels where torch
    has them.
    """
    common: dict[str, Any] = {"lr": part.lr, "weight_decay": part.weight_decay}
    match part.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, momentum=part.momentum, fused=True, **common)
        case "adam":
            return torch.optim.Adam(groups, betas=tuple(part.betas), fused=True, **common)
        case "adamw":
            return torch.optim.AdamW(groups, betas=tuple(part.betas), fused=True, **common)
        case "adamax":
            return torch.optim.Adamax(groups, betas=tuple(part.betas), **common)
        case "rmsprop":
            return torch.optim.RMSprop(groups, momentum=part.momentum, **common)
    raise ValueError(part.optimizer)


def factor(schedule: str, train: Any, step: int) -> float:
    """What multiplies the learning rate at ``step`` (from 0): linear warm-up times the schedule."""
    scale = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    after = min(1.0, max(0, step - train.warmup) / max(1, train.steps - train.warmup))
    match schedule:
        case "linear":
            return scale * (1 - after)
        case "cosine":
            return scale * 0.5 * (1 + math.cos(math.pi * after))
        case "exponential":
            return scale * train.decay**step
    return scale
