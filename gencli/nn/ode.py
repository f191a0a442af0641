"""Initial value problems dy/dt = f(t, y), differentiable by backpropagation through the solver.

    rk4       the classical method of order 4 in equal steps: what happens to a row does not depend on the others
    dopri5    Dormand and Prince's method of order 5, which chooses its steps; torchdiffeq's

References:
    Solving Ordinary Differential Equations I, Hairer, Nørsett, Wanner, 1993 (sections II.1 and II.5)
    Neural Ordinary Differential Equations, Chen, Rubanova, Bettencourt, Duvenaud, 2018, arXiv 1806.07366 (torchdiffeq)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gencli.console import Diverged

__all__ = ["Method", "solve"]

Method = Literal["rk4", "dopri5"]
Field = Callable[[float | Tensor, Tensor], Tensor]  # t, y (n, d) -> dy/dt (n, d)

MOST = 1000  # steps of dopri5: a field that asks for more is broken


def solve(
    f: Field,
    y: Tensor,
    start: float,
    end: float,
    method: Method = "rk4",
    *,
    steps: int = 8,
    tolerance: float = 1e-5,
    judged: int | None = None,
) -> tuple[Tensor, int]:
    """y at ``end`` from ``y (n, d)`` at ``start``, which may lie after it, and how often ``f`` was evaluated.

    ``steps`` are rk4's. dopri5 takes the same steps for all rows, and they are as short as the worst row asks for: the
    root mean square of the first ``judged`` numbers of its error, all by default, is at most ``tolerance * (1 + |y|)``
    in each step. Raises Diverged if dopri5 finds no steps that are short enough.
    """
    if method == "rk4":
        h = (end - start) / steps
        for i in range(steps):
            t = start + i * h
            k1 = f(t, y)
            k2 = f(t + h / 2, y + h / 2 * k1)
            k3 = f(t + h / 2, y + h / 2 * k2)
            k4 = f(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        return y, 4 * steps
    from torchdiffeq import odeint

    evaluations, length = 0, end - start

    def field(s: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return length * f(start + length * s, y)

    def norm(error: Tensor) -> Tensor:
        return error[:, :judged].square().mean(1).max().sqrt()

    # the last step ends at 1, as beyond it the solver would interpolate, which is less exact
    options: dict[str, Any] = {"norm": norm, "max_num_steps": MOST, "step_t": torch.ones(1, device=y.device)}
    options["dtype"] = torch.float32 if y.device.type == "mps" else torch.float64  # of time
    times = torch.tensor([0.0, 1.0], device=y.device)
    try:
        y = odeint(field, y, times, rtol=tolerance, atol=tolerance, method="dopri5", options=options)[1]
    except AssertionError as error:  # a step that underflows, too many of them, or a state that is not finite
        why = str(error).partition("(")[0].partition(":")[0].strip()
        raise Diverged(f"dopri5 cannot follow the dynamics: {why}", hint="a smaller --lr, or train.clip=1") from None
    return y, evaluations
