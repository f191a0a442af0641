"""Points that never end, drawn from known densities.

A set is a mixture of parts; every part can be sampled and has a log-density, in closed form or, for noisy curves, by
Gauss-Legendre quadrature along the curve, exact to about 1e-9 nats near the data. So a model's gap to the truth can be
measured. Densities are in nats, of the whole point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from scipy.special import i0e, logsumexp
from torch import Tensor

from gencli.console import UsageError, nearest
from gencli.contract import DataSpec
from gencli.data.source import Array, Epoch, checked, content_digest
from gencli.data.table import SETS
from gencli.rng import generator

__all__ = ["POINTS", "Mixture", "PointSource", "density", "modes"]

BLOCK = 4096


class Part(Protocol):
    """One component of a mixture."""

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        """``(n, D)`` float64 draws."""
        ...

    def log_prob(self, x: Array) -> Array:
        """Log-density (nats) of ``x`` ``(n, D)`` -> ``(n,)``."""
        ...


def _log_normal(d2: Array, sd: float, dims: int) -> Array:
    """Log-density of an isotropic Gaussian at squared distance ``d2`` from its mean."""
    return -d2 / (2 * sd**2) - dims * np.log(sd * np.sqrt(2 * np.pi))


@dataclass(frozen=True)
class Gaussian:
    """N(mean, sd^2 I)."""

    mean: tuple[float, ...]
    sd: float

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        return np.array(self.mean) + self.sd * rng.standard_normal((n, len(self.mean)))

    def log_prob(self, x: Array) -> Array:
        return _log_normal(((x - np.array(self.mean)) ** 2).sum(1), self.sd, x.shape[1])


@dataclass(frozen=True)
class Square:
    """Uniform on a square with sides of length ``side``, lower left corner at ``low``."""

    low: tuple[float, float]
    side: float

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        return np.array(self.low) + self.side * rng.random((n, 2))

    def log_prob(self, x: Array) -> Array:
        place = (x - np.array(self.low)) / self.side
        return np.where(((place >= 0) & (place < 1)).all(1), -2 * np.log(self.side), -np.inf)


@dataclass(frozen=True)
class Ring:
    """A circle about the origin, uniform in angle, plus N(0, sd^2 I): the radial law is Rice's."""

    radius: float
    sd: float

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        t = 2 * np.pi * rng.random(n)
        return self.radius * np.c_[np.cos(t), np.sin(t)] + self.sd * rng.standard_normal((n, 2))

    def log_prob(self, x: Array) -> Array:
        r = np.hypot(x[:, 0], x[:, 1])
        return _log_normal((r - self.radius) ** 2, self.sd, 2) + np.log(i0e(r * self.radius / self.sd**2))


@dataclass(frozen=True)
class Curve:
    """A point ``path(v)``, v in [0, 1] with density ``power * v^(power - 1)``, plus N(0, sd^2 I)."""

    path: Callable[[Array], Array]
    sd: float
    power: int = 1
    nodes: int = 200

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        v = rng.random(n) ** (1 / self.power)
        return self.path(v) + self.sd * rng.standard_normal((n, 2))

    def log_prob(self, x: Array) -> Array:
        node, weight = np.polynomial.legendre.leggauss(self.nodes)
        v = (node + 1) / 2
        points = self.path(v)
        # |x - c|^2 expanded: one matrix product, and what depends on the node alone is added once
        log_weight = np.log(weight / 2 * self.power * v ** (self.power - 1))
        bias = _log_normal((points**2).sum(1), self.sd, 2) + log_weight
        out = []
        for piece in np.array_split(x, len(x) // 1024 + 1):  # 100,000 points x 600 nodes would be half a gigabyte
            z = piece @ (points.T / self.sd**2) + bias
            top = z.max(1, keepdims=True)
            out.append(top[:, 0] + np.log(np.exp(z - top).sum(1)) - (piece**2).sum(1) / (2 * self.sd**2))
        return np.concatenate(out)


@dataclass(frozen=True)
class Mixture:
    """A set of points: parts, each a class of its own, with their weights (equal by default)."""

    parts: tuple[Part, ...]
    weights: tuple[float, ...] = field(default=())

    @property
    def _p(self) -> Array:
        return np.array(self.weights) if self.weights else np.full(len(self.parts), 1 / len(self.parts))

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """``(n, D)`` float64 points and ``(n,)`` int64 labels."""
        label = rng.choice(len(self.parts), n, p=self._p)
        draws = [part.sample(rng, int((label == k).sum())) for k, part in enumerate(self.parts)]
        x = np.empty((n, draws[0].shape[1]))
        for k, draw in enumerate(draws):
            x[label == k] = draw
        return x, label

    def log_prob(self, x: Array) -> Array:
        """Log-density (nats) of ``x`` ``(n, D)`` -> ``(n,)``, float64; -inf where a bounded density is zero."""
        x = np.asarray(x, dtype=np.float64)
        return logsumexp([part.log_prob(x) + np.log(p) for part, p in zip(self.parts, self._p)], axis=0)


def _arc(x: float, y: float, rx: float, ry: float) -> Callable[[Array], Array]:
    """The half ellipse ``(x + rx cos t, y + ry sin t)``, t = pi v."""
    return lambda v: np.c_[x + rx * np.cos(np.pi * v), y + ry * np.sin(np.pi * v)]


def _spiral(sign: int) -> Callable[[Array], Array]:
    """An Archimedean arm of one turn and a half that ends at radius pi."""
    return lambda v: sign * np.pi * v[:, None] * np.c_[-np.cos(3 * np.pi * v), np.sin(3 * np.pi * v)]


# Entropies in nats, by quadrature: smiley 1.334, moons 1.008, checkerboard log 32 = 3.466, spirals 2.541, rings 2.623,
# 25-gaussians -2.014, mixture-1d 1.010, peaks-1d 0.215. Smiley and moons are the course's: eyes and mouth with sd 0.2,
# scikit-learn's moons. The 25 Gaussians are those of WGAN-GP (Gulrajani et al. 2017): steps of 2, sd 0.05, all divided
# by 2.828, so that the whole has unit variance.
GRID = 2.828
POINTS: dict[str, Mixture] = {
    "points/smiley": Mixture((Gaussian((-1.5, 2.5), 0.2), Gaussian((1.5, 2.5), 0.2), Curve(_arc(0, 0, 2, -1), 0.2))),
    "points/moons": Mixture((Curve(_arc(0, 0, 1, 1), 0.1), Curve(_arc(1, 0.5, -1, -1), 0.1))),
    "points/checkerboard": Mixture(
        tuple(Square((2.0 * i - 4, 2.0 * j - 4), 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0)
    ),
    # density proportional to the radius along the arm, nearly constant by length
    "points/spirals": Mixture(tuple(Curve(_spiral(sign), 0.1, power=2, nodes=600) for sign in (1, -1))),
    "points/rings": Mixture(tuple(Ring(radius, 0.08) for radius in (0.75, 1.5, 2.25, 3.0))),
    "points/25-gaussians": Mixture(
        tuple(Gaussian((2 * i / GRID, 2 * j / GRID), 0.05 / GRID) for i in range(-2, 3) for j in range(-2, 3))
    ),
    "points/mixture-1d": Mixture((Gaussian((-1.0,), 0.25), Gaussian((0.5,), 0.5))),
    "points/peaks-1d": Mixture(
        (Gaussian((-1.5,), 0.1), Gaussian((0.0,), 0.2), Gaussian((1.0,), 0.05)), weights=(0.5, 0.3, 0.2)
    ),
}


def density(name: str) -> Mixture:
    """The density behind the set ``name`` ("points/moons"). UsageError if it is no set of points."""
    if name not in POINTS:
        raise UsageError(
            f"{name} is not drawn from a known density{nearest(name, POINTS)}",
            hint="gencli data ls shows the points/ sets",
        )
    return POINTS[name]


def modes(name: str) -> tuple[Array, float]:
    """Centres ``(K, D)`` and the common sd of a set made of equal Gaussians. UsageError for any other set."""
    parts = density(name).parts
    gaussians = [part for part in parts if isinstance(part, Gaussian)]
    if len(gaussians) < len(parts) or len({g.sd for g in gaussians}) > 1:
        raise UsageError(
            f"{name} has no modes to count: it is not made of equal Gaussians", hint="--data points/25-gaussians"
        )
    return np.array([g.mean for g in gaussians]), gaussians[0].sd


class PointSource:
    """Endless draws of one set. Row i is the same for ever, and the splits are streams of their own."""

    def __init__(self, name: str, split: str) -> None:
        self.name, self.split = name, split
        self.size: int | None = None
        entry = SETS[name]
        self.spec = DataSpec(name=name, kind="points", shape=entry.shape, classes=entry.classes)
        self.density = density(name)
        self._block = lru_cache(maxsize=16)(self._draw)

    def _draw(self, block: int) -> tuple[Tensor, Tensor]:
        x, label = self.density.sample(generator("points", self.name, self.split, block), BLOCK)
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(label)

    @property
    def digest(self) -> str:
        """Over the first 4,096 rows."""
        x, label = self._block(0)
        return content_digest(f"{self.name} {self.split}", {"x": x, "label": label})

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`gencli.data.source.Source.rows`; ``x`` is float32 ``(n, D)``."""
        checked(index, None)
        x = torch.empty(len(index), *self.spec.shape, dtype=torch.float32)
        label = torch.empty(len(index), dtype=torch.long)
        block, place = index // BLOCK, index % BLOCK
        for b in block.unique().tolist():
            here = block == b
            points, labels = self._block(b)
            x[here], label[here] = points[place[here]], labels[place[here]]
        return {"x": x, "label": label}
