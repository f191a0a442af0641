"""Randomness as a function of a key, never of history.

Every draw is keyed by (seed, scope, purpose, k-th draw of that purpose), so a resumed run, a run on more processes
and sample number *i* of any request see exactly the numbers that they would have seen otherwise.

Two kinds of source:

- :class:`Rng` serves training. It draws for the *global* batch and hands out this process's rows of it.
- :class:`SampleRng` serves samplers and evaluation. It keys every row by its own example index.

On the CPU the numbers come from numpy's PCG64, seeded with the whole key: ``torch.Generator.manual_seed`` keeps only
the low 32 bits of its seed there, and with 50,000 samples two of them would share their noise in one run of four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli.keyed import digest, generator

__all__ = ["Keys", "Rng", "SampleRng", "ambient", "digest", "generator", "seeded", "using"]


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Give torch's global generator a seed inside the block (parameter initialisation) and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(digest(*key) >> 64)
        yield


def _key_tensor(*key: object) -> Tensor:
    number = digest(*key)
    return torch.tensor([number >> 64, number & (2**63 - 1)])


def _drawn(
    key: Tensor,
    purpose: str,
    nth: int,
    kind: str,
    high: int,
    shape: Sequence[int],
    offset: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    word = digest(purpose) >> 65
    full = [shape[0] * stride, *shape[1:]]
    if device.type == "cuda":
        g = torch.Generator(device).manual_seed(digest(*key.tolist(), word, nth) >> 64)
        if kind == "permutation":
            return torch.randperm(high, generator=g, device=device)
        if kind == "normal":
            x = torch.randn(full, generator=g, dtype=dtype, device=device)
        elif kind == "uniform":
            x = torch.rand(full, generator=g, dtype=dtype, device=device)
        else:
            x = torch.randint(high, full, generator=g, device=device)
        return x[offset::stride].clone()
    h = np.random.Generator(np.random.PCG64([*key.tolist(), word, nth]))
    real = np.float64 if dtype == torch.float64 else np.float32
    a: np.ndarray[Any, Any]
    if kind == "permutation":
        a = h.permutation(high)
    elif kind == "normal":
        a = h.standard_normal(full, dtype=real)
    elif kind == "uniform":
        a = h.random(full, dtype=real)
    else:
        a = h.integers(high, size=full)
    if kind != "permutation":
        a = a[offset::stride].copy() if stride > 1 else a
    x = torch.from_numpy(a)
    return x.to(device, dtype) if kind in ("normal", "uniform") else x.to(device)


# As an operator torch.compile calls it as it stands instead of tracing numpy; else the call alone is the faster.
_operator = torch.library.custom_op("gencli::draw", _drawn, mutates_args=())


@_operator.register_fake
def _(
    key: Tensor,
    purpose: str,
    nth: int,
    kind: str,
    high: int,
    shape: Sequence[int],
    offset: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if kind == "permutation":
        return torch.empty(high, dtype=torch.long, device=device)
    return torch.empty(shape, dtype=dtype if kind in ("normal", "uniform") else torch.long, device=device)


class Rng:
    """The draws of one scope: one (seed, phase, step, repeat).

    The first dimension of every shape counts examples of this process; row ``i`` is row ``offset + i * stride`` of
    the draw for the global batch. ``purpose`` names what a draw is for; the second draw with the same purpose in a
    scope differs from the first.
    """

    def __init__(
        self, key: Tensor, offset: int = 0, stride: int = 1, device: torch.device | str = "cpu", n: int = 0
    ) -> None:
        self.key, self.offset, self.stride, self.device, self.n = key, offset, stride, torch.device(device), n
        self._count: dict[str, int] = {}

    def _next(self, purpose: str) -> int:
        nth = self._count.get(purpose, 0)
        self._count[purpose] = nth + 1
        return nth

    def _draw(self, kind: str, purpose: str, shape: Sequence[int], high: int = 0) -> Tensor:
        draw = _operator if torch.compiler.is_compiling() else _drawn
        return draw(
            self.key,
            purpose,
            self._next(purpose),
            kind,
            high,
            list(shape),
            self.offset,
            self.stride,
            torch.get_default_dtype(),
            self.device,
        )

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of ``shape`` in torch's default dtype."""
        return self._draw("normal", purpose, shape)

    def uniform(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Numbers of ``shape``, uniform in [0, 1)."""
        return self._draw("uniform", purpose, shape)

    def integers(self, purpose: str, high: int, shape: Sequence[int]) -> Tensor:
        """Integers (int64) of ``shape``, uniform in 0 .. high - 1."""
        return self._draw("integers", purpose, shape, high)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """A permutation of 0 .. n - 1, the same on every process."""
        return self._draw("permutation", purpose, [n], n)

    @property
    def whole(self) -> Rng:
        """The same scope for draws that all processes share (shape = the global shape)."""
        shared = Rng(self.key, 0, 1, self.device, self.n)
        shared._count = self._count
        return shared


class SampleRng(Rng):
    """Draws keyed by example index, for samplers and evaluation.

    ``rows`` are the indices of the examples; every shape's first dimension is ``n = len(rows)``. Row ``i`` depends on
    (seed, scope, rows[i], purpose) alone and is drawn on the CPU, so every device sees the same noise.
    """

    def __init__(
        self, seed: int, rows: Sequence[int], scope: str = "sample", device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(torch.zeros(2, dtype=torch.long), 0, 1, device, len(rows))
        self.seed, self.scope, self.rows = seed, scope, [int(r) for r in rows]

    def _draw(self, kind: str, purpose: str, shape: Sequence[int], high: int = 0) -> Tensor:
        if kind == "permutation":
            raise RuntimeError("a sampler has no draw that its examples share: sample i must not depend on -n")
        if shape[0] != self.n:
            raise ValueError(f"draw {purpose!r}: the first dimension must be the {self.n} examples, got {shape[0]}")
        nth, real = self._next(purpose), torch.get_default_dtype()
        kind_dtype = np.float64 if real == torch.float64 else np.float32
        rows: list[np.ndarray[Any, Any]] = []
        for row in self.rows:
            g = generator(self.seed, self.scope, row, purpose, nth)
            if kind == "normal":
                rows.append(g.standard_normal(tuple(shape[1:]), dtype=kind_dtype))
            elif kind == "uniform":
                rows.append(g.random(tuple(shape[1:]), dtype=kind_dtype))
            else:
                rows.append(g.integers(high, size=tuple(shape[1:])))
        return torch.from_numpy(np.stack(rows)).to(self.device)

    @property
    def whole(self) -> Rng:
        raise RuntimeError("a sampler has no draw that its examples share: sample i must not depend on -n")


class Keys:
    """Opens scopes for one run and refuses to open the same one twice within a step."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, device
        self._opened: set[tuple[object, ...]] = set()

    def open(self, *scope: object, offset: int = 0, stride: int = 1) -> Rng:
        """An :class:`Rng` for ``scope``; RuntimeError if that scope is open already: its numbers would repeat."""
        mark = (*scope, "rows", offset, stride)
        if mark in self._opened:
            raise RuntimeError(f"random scope {scope} opened twice: both draws would be equal")
        self._opened.add(mark)
        return Rng(_key_tensor(self.seed, *scope), offset, stride, self.device)

    def forget(self) -> None:
        """Call once a step: the next step's scopes carry another number."""
        self._opened.clear()


_AMBIENT: list[Any] = []


@contextmanager
def using(step: Any) -> Iterator[None]:
    """Make ``step`` (a ``contract.Step``) what layers that draw or couple a batch see inside the block."""
    _AMBIENT.append(step)
    try:
        yield
    finally:
        _AMBIENT.pop()


def ambient() -> Any:
    """The step under way, for layers such as dropout; RuntimeError outside of one."""
    if not _AMBIENT:
        raise RuntimeError("a layer that draws was called outside a step: wrap the call in gencli.rng.using(step)")
    return _AMBIENT[-1]
