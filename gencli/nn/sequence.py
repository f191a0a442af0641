"""Examples as sequences: one value after another, each predicted from all that came before.

    p(x) = prod_t p(x_t | x_1, ..., x_{t-1})

Images are read in raster order with the colours of a pixel in turn (R, G, B), so that a sequence has D = H W C
values and every conditional sees all earlier ones; text and audio are sequences as they stand. What two models of
sequences share is here: the order (:func:`flatten`), what a network is fed (:class:`Inputs`), the likelihood and the
drawing (:class:`Sequences`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.nn.causal import invert_cdf
from gencli.nn.conditional import Conditional
from gencli.rng import Rng

if TYPE_CHECKING:
    from gencli.contract import DataSpec, Step

__all__ = ["Inputs", "Naive", "Network", "Sequences", "draw_sequence", "flatten", "unflatten"]


def flatten(x: Tensor) -> Tensor:
    """Raw images (n, C, H, W), audio (n, 1, T) or text (n, T) to sequences (n, D)."""
    return x if x.dim() == 2 else x.flatten(2).transpose(1, 2).flatten(1)


def unflatten(s: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`flatten`: sequences (n, D) to examples (n, *shape)."""
    return s if len(shape) == 1 else s.unflatten(1, (-1, shape[0])).transpose(1, 2).reshape(len(s), *shape)


def places(shape: tuple[int, ...]) -> Tensor:
    """Row and column of each value of an image (C, H, W), both in [-1, 1], and its colour in one-hot form if C > 1.

    (D, 2) or (D, 2 + C), in the order of :func:`flatten`.
    """
    C, *sides = shape
    axes = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in sides]
    where = torch.cartesian_prod(*axes).repeat_interleave(C, 0)
    return where if C == 1 else torch.cat([where, torch.eye(C).repeat(len(where) // C, 1)], 1)


class Inputs(nn.Module):
    """What a network is fed at position t: the value at t - 1 and, where wanted, the place of the value at t.

    Images and audio: the level in [-1, 1] and, of more than two levels, in one-hot form as well, with which both models
    learn faster. Text: a learned vector of each symbol. Before the first value there are zeros. The course feeds the
    place of the value at t - 1. That of t is as legal and says more: it is there for the first value too, and nothing
    has to learn where rows end.
    """

    looks: Tensor
    places: Tensor

    def __init__(self, spec: DataSpec, coordinates: bool, width: int) -> None:
        super().__init__()
        assert spec.levels is not None
        self.vectors = nn.Embedding(spec.levels, width) if spec.kind == "text" else None
        looks = spec.scale(torch.arange(spec.levels))[:, None]
        if spec.levels > 2 and self.vectors is None:
            looks = torch.cat([looks, torch.eye(spec.levels)], 1)
        self.register_buffer("looks", looks, persistent=False)
        where = places(spec.shape) if coordinates else torch.zeros(spec.dims, 0)
        self.register_buffer("places", where, persistent=False)
        self.width = self.values().shape[1] + self.places.shape[1]

    def values(self) -> Tensor:
        """What each level looks like: (levels, features)."""
        return self.looks if self.vectors is None else self.vectors.weight

    def shift(self, e: Tensor) -> Tensor:
        """Values (n, D, features) at their own positions to inputs (n, D, width): each at the next position."""
        return torch.cat([F.pad(e, (0, 0, 1, -1)), self.places.to(e).expand(len(e), -1, -1)], -1)

    def forward(self, s: Tensor) -> Tensor:
        """Sequences of levels (n, D) to inputs (n, D, width)."""
        return self.shift(F.embedding(s.long(), self.values()))


class Network(Protocol):
    """What :func:`draw_sequence` draws from."""

    def logits(self, t: int) -> Tensor:
        """Logits (n, levels) of position t, asked for in order, when everything earlier has been put."""
        ...

    def put(self, t: int, level: Tensor) -> None:
        """The levels (n,) that were drawn at position t."""
        ...


def draw_sequence(
    network: Network, u: Tensor, temperature: float = 1.0, given: Tensor | None = None, known: int = 0
) -> Tensor:
    """Levels (int64) of the shape of ``u`` (n, D), uniforms, one position after another.

    The first ``known`` positions are those of ``given`` (n, D) instead.
    """
    given = torch.zeros_like(u) if given is None else given
    x = given.t().long().clone(memory_format=torch.contiguous_format)
    for t, (level, u_t) in enumerate(zip(x.unbind(0), u.t().contiguous().unbind(0))):
        logits = network.logits(t)  # for known positions too: later ones see what it leaves behind
        if t >= known:
            level.copy_(invert_cdf(logits, u_t, temperature))
        network.put(t, level)
    return x.t().contiguous()


class Naive:
    """A :class:`Network` that runs the whole model for every draw: the oracle of cached ones, and the slow baseline.

    ``model``: levels (n, D) to logits (n, D, levels).
    """

    def __init__(self, model: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.model, self.x = model, torch.zeros_like(like, dtype=torch.long)

    def logits(self, t: int) -> Tensor:
        return self.model(self.x)[:, t]

    def put(self, t: int, level: Tensor) -> None:
        self.x[:, t] = level


class Sequences(Conditional, nn.Module):
    """Likelihood and drawing for a model of sequences, which adds ``network`` and ``cached``.

    The model's config has ``coordinates`` and ``conditional``.
    """

    inputs: Inputs

    def check(self, name: str) -> None:
        """UsageError if the data is not what model ``name`` with this config can model."""
        if self.spec.levels is None:
            raise UsageError(f"{name} models sequences of integer levels, and {self.spec.name} has none")
        if self.config.coordinates and self.spec.kind != "image":
            raise UsageError(
                f"model.coordinates are those of pixels, and {self.spec.name} is {self.spec.kind}",
                hint="model.coordinates=false",
            )
        self.check_classes()

    def network(self, inputs: Tensor, h: Tensor | None) -> Tensor:
        """Logits (n, D, levels) of inputs (n, D, width) and one-hot classes (n, classes)."""
        raise NotImplementedError

    def cached(self, n: int, h: Tensor | None) -> Network:
        """The network in a sampler of n sequences: everything is computed once."""
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (n, D, levels) of raw examples (n, ...), in the order of :func:`flatten`."""
        return self.network(self.inputs(flatten(x)), self.one_hot(labels))

    def nll(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log p(x_t | x_1 .. x_{t-1}) in nats, (n, D), in float32 or better."""
        z = self(x, labels).to(torch.get_default_dtype())
        return F.cross_entropy(z.flatten(0, 1), flatten(x).flatten().long(), reduction="none").view(z.shape[:2])

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Nats a dimension."""
        nats = self.nll(b.x, b.label if self.conditional else None).mean()
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2)}

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | label), in nats: (n,) for raw examples (n, ...)."""
        rows = max(1, 2**16 // self.spec.dims)  # long sequences shall need no more memory than short ones
        y = [None] * -(-len(x) // rows) if labels is None else labels.split(rows)
        return torch.cat([-self.nll(*part).sum(1) for part in zip(x.split(rows), y)])

    def sample(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Raw examples (n, ...), drawn exactly; ``temperature`` divides the logits."""
        return self._draw(rng, labels, temperature)

    def complete(
        self, x: Tensor, known: int, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Raw examples (n, ...): the first ``known`` pixels, symbols or audio samples are those of raw ``x``."""
        return self._draw(rng, labels, temperature, given=x, known=known)

    def sample_naive(self, rng: Rng, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """The same examples by a pass over whole sequences for every draw: oracle and baseline of :meth:`sample`."""
        return self._draw(rng, labels, temperature, naive=True)

    def _draw(
        self,
        rng: Rng,
        labels: Tensor | None,
        temperature: float,
        given: Tensor | None = None,
        known: int = 0,
        naive: bool = False,
    ) -> Tensor:
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        assert self.spec.levels is not None
        h, shape = self.one_hot(labels), self.spec.shape
        colours = self.spec.dims // math.prod(shape[1:] or shape)
        with torch.inference_mode():
            u = flatten(rng.uniform("value", (rng.n, *shape)))
            network = Naive(lambda s: self.network(self.inputs(s), h), u) if naive else self.cached(rng.n, h)
            s = draw_sequence(network, u, temperature, None if given is None else flatten(given), known * colours)
        return unflatten(s.clone(), shape).to(torch.uint8 if self.spec.levels <= 256 else torch.int16)
