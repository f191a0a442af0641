"""The Fréchet distance from the statistics of 2,048 features, against the two usual routes.

Baselines, written down here as their tools have them: ``scipy.linalg.sqrtm(S_1 S_2)`` (pytorch-fid, clean-fid,
stylegan3) and the eigenvalues of S_1 S_2, which is not symmetric (torch-fidelity 0.4, torchmetrics 1.9). All start from
the means and covariances (from moments); the time to make those is in neither. 4,000 rows against 4,000, of one
variance in all directions and of variances k^-1.5 as networks have them, and 24 against 24. The truth is the sum of
the singular values of R_1 R_2^T, R from the QR factorisation of the centred rows, which squares nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits
from torch import Tensor

from gencli.metrics.frechet import Moments, distance

D = 2048


def rows(n: int, power: float, seed: int) -> Tensor:
    """Features (n, D) whose k-th variance is k^-power, in directions of their own, and whose means depend on seed."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((n, D))) * torch.arange(1, D + 1).double() ** (-power / 2)
    v = torch.from_numpy(np.random.default_rng(0).standard_normal(D))
    return x - torch.outer(x @ v, v) * (2 / (v @ v)) + 0.01 * seed


def truth(x: Tensor, y: Tensor) -> float:
    R, S = (torch.linalg.qr(v - v.mean(0), "r")[1] / math.sqrt(len(v) - 1) for v in (x, y))
    cross = torch.linalg.svdvals(R @ S.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + R.square().sum() + S.square().sum() - 2 * cross).item()


def by_root(mu: Tensor, S: Tensor, nu: Tensor, T: Tensor) -> float:
    root = np.trace(sqrtm((S @ T).numpy())).real
    return ((mu - nu).square().sum() + S.trace() + T.trace() - 2 * root).item()


def by_eigenvalues(mu: Tensor, S: Tensor, nu: Tensor, T: Tensor) -> float:
    root = torch.linalg.eigvals(S @ T).sqrt().real.sum()
    return ((mu - nu).square().sum() + S.trace() + T.trace() - 2 * root).item()


def timed(times: int, f: Callable[..., float], *args: Moments | Tensor) -> tuple[float, float]:
    """The best time of some, and the value."""
    best, value = math.inf, 0.0
    for _ in range(times):
        start = time.perf_counter()
        value = f(*args)
        best = min(best, time.perf_counter() - start)
    return best, value


def compare(n: int, power: float, threads: int, root: bool) -> None:
    """Print the times of the routes, how many times gencli's they are, and how far off the values."""
    torch.set_num_threads(threads)
    x, y = rows(n, power, 1), rows(n, power, 2)
    a, b = Moments(D), Moments(D)
    a.add(x)
    b.add(y)
    usual = (x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    exact = truth(x, y)
    with threadpool_limits(threads):
        routes = {"gencli": timed(3, distance, a, b), "eigvals": timed(1, by_eigenvalues, *usual)}
        if root:
            routes["sqrtm"] = timed(1, by_root, *usual)
    fall = f"k^-{power}" if power else "even"
    print(f"{n} against {n}, variances {fall}, {threads} thread{'s' * (threads > 1)}: true {exact:.12g}")
    for route, (seconds, value) in routes.items():
        times = f"{seconds / routes['gencli'][0]:8.1f} x"
        print(f"  {route:8} {seconds:9.4f} s {times}  relative error {(value - exact) / exact:.1e}", flush=True)


def main() -> None:
    """One thread first: on a machine that does other work two wait for each other."""
    compare(24, 0.0, 1, root=True)
    compare(4000, 0.0, 1, root=True)
    compare(4000, 1.5, 1, root=False)
    compare(4000, 0.0, 2, root=False)


if __name__ == "__main__":
    main()
