"""What a data source is, and the ones that hold their rows in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.rng import generator

__all__ = ["Array", "Epoch", "Requantised", "Source", "TensorSource", "Whole", "carve", "checked", "content_digest"]

Array = np.ndarray[Any, np.dtype[Any]]
Epoch = int | Tensor  # one number for all rows, or an int64 tensor with one a row


class Source(Protocol):
    """One split of a data set.

    ``size``: rows of this split, None where they never end (``spec.size`` counts the rows of *train*). ``digest``: 16
    hex digits over content and split; equal digests mean equal rows. A source whose rows are not in memory says
    ``slow = True``, and ``windows`` (int64, the ends of its shards) if rows are faster to read where they lie together.
    """

    name: str
    split: str
    spec: DataSpec

    @property
    def size(self) -> int | None: ...

    @property
    def digest(self) -> str: ...

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """Rows ``index`` (int64, ``(n,)``): "x" raw, contiguous, and "label" (int64, ``(n,)``) where there are any.

        A pure function of index (and, for variants that draw anew every epoch, of ``epoch``).
        IndexError for an index out of range.
        """
        ...


def checked(index: Tensor, size: int | None) -> Tensor:
    """``index`` if every entry is a row; IndexError otherwise (negative ones too: they do not count from the end)."""
    if index.numel() and (int(index.min()) < 0 or (size is not None and int(index.max()) >= size)):
        raise IndexError(f"rows {int(index.min())} .. {int(index.max())} of a source of {size or 'endless'} rows")
    return index


def content_digest(split: str, fields: Mapping[str, Tensor]) -> str:
    """16 hex digits over the split's name and every field's name, dtype, shape and bytes."""
    h = hashlib.sha256(split.encode())
    for name, value in fields.items():
        h.update(f"|{name} {value.dtype} {tuple(value.shape)}|".encode())
        h.update(value.contiguous().numpy().data)
    return h.hexdigest()[:16]


def carve(n: int, val: int, test: int, *key: object) -> dict[str, Array]:
    """Row numbers of train, val and test: a permutation of ``0 .. n - 1`` keyed by ``key``, cut and sorted.

    DataError if that leaves no row to train on.
    """
    if n <= val + test:
        raise DataError(f"{n} rows are too few to set {val} aside for val and {test} for test")
    order = generator(*key).permutation(n)
    parts = {"train": order[: n - val - test], "val": order[n - val - test : n - test], "test": order[n - test :]}
    return {split: np.sort(rows) for split, rows in parts.items()}


class TensorSource:
    """Rows held in memory: ``x`` raw ``(n, ...)`` and, if given, ``label`` int64 ``(n,)``."""

    def __init__(self, name: str, split: str, spec: DataSpec, x: Tensor, label: Tensor | None = None) -> None:
        self.name, self.split, self.spec, self.size = name, split, spec, len(x)
        self._fields = {"x": x.contiguous()}
        if label is not None:
            self._fields["label"] = label.long()
        self._digest = ""

    @property
    def digest(self) -> str:
        """Over the bytes of all rows, computed once."""
        self._digest = self._digest or content_digest(self.split, self._fields)
        return self._digest

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`Source.rows`."""
        checked(index, self.size)
        return {name: value[index] for name, value in self._fields.items()}


class Requantised:
    """Another source's images at fewer levels.

    ``threshold``: 1 where a level is above the middle (above 127 of 255). ``dynamic``: 1 with probability
    level / (levels - 1) (Salakhutdinov and Murray 2008), drawn by (split, epoch, index): the same at every visit
    of val and test, and anew each epoch of train if the caller passes ``epoch``. ``Nbit``: the N highest bits.
    """

    def __init__(self, source: Source, depth: str) -> None:
        levels = source.spec.levels
        if source.spec.kind != "image" or levels is None:
            raise UsageError(f"{source.name}: only images have levels to make fewer")
        bits = int(depth[0]) if depth.endswith("bit") else 1
        if depth.endswith("bit") and levels != 256:
            raise UsageError(f"{source.name}: {depth} wants 256 levels, and these images have {levels}")
        self.source, self.depth, self._shift = source, depth, 8 - bits
        self.name, self.split, self.size = source.name, source.split, source.size
        self.slow, self.windows = getattr(source, "slow", False), getattr(source, "windows", None)
        self.spec = source.spec.model_copy(update={"levels": 2**bits})

    @property
    def digest(self) -> str:
        """Over the other source's digest and the depth."""
        return hashlib.sha256(f"{self.source.digest} {self.depth}".encode()).hexdigest()[:16]

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`Source.rows`."""
        rows = self.source.rows(index, epoch)
        top = (self.source.spec.levels or 2) - 1
        if self.depth == "threshold":
            rows["x"] = (rows["x"] > top // 2).to(torch.uint8)
        elif self.depth == "dynamic":
            epochs = torch.as_tensor(epoch).expand(len(index)).tolist() if self.split == "train" else [0] * len(index)
            draws = [
                generator("dynamic", self.split, e, i).integers(top, size=self.spec.shape)
                for e, i in zip(epochs, index.tolist())
            ]
            rows["x"] = (torch.from_numpy(np.array(draws)).reshape(rows["x"].shape) < rows["x"]).to(torch.uint8)
        else:
            rows["x"] = rows["x"] >> self._shift
        return rows


class Whole:
    """All splits of a data set as one, in order: a reference that nothing is held back from."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        first = sources[0]
        self.name, self.split, self.spec = first.name, "all", first.spec
        self.slow = any(getattr(source, "slow", False) for source in sources)
        sizes = [source.size for source in sources]
        self.size = None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def digest(self) -> str:
        """Over the splits' digests."""
        return hashlib.sha256(" ".join(source.digest for source in self.sources).encode()).hexdigest()[:16]

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`Source.rows`."""
        checked(index, self.size)
        if self.size is None:
            return self.sources[0].rows(index, epoch)
        found: dict[str, Tensor] = {}
        start = 0
        for source in self.sources:
            mine = (index >= start) & (index < start + (source.size or 0))
            if mine.any():
                for name, value in source.rows(index[mine] - start, epoch).items():
                    found.setdefault(name, value.new_zeros((len(index), *value.shape[1:])))[mine] = value
            start += source.size or 0
        return found
