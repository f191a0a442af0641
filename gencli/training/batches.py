"""Which rows the k-th batch holds: a function of (seed, phase, stream, k), so there is no cursor to lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gencli.console import UsageError
from gencli.contract import Batch, Phase, Stream
from gencli.rng import generator

__all__ = ["Batches", "match"]


def match(model: str, streams: dict[str, Stream], source: Any) -> None:
    """UsageError if ``source`` lacks what the model's streams ask for."""
    for stream in streams.values():
        if stream.rows != "all":
            raise UsageError(f"{model} needs {stream.rows} rows, and the data set {source.name!r} has no such part")
        if "label" in stream.fields and not source.spec.classes:
            raise UsageError(
                f"{model} needs labels, and the data set {source.name!r} has none",
                hint="a folder per class, or y beside x in an .npz, gives labels",
            )


class Batches:
    """Batches of one training source, for every phase and stream of a model."""

    def __init__(
        self,
        source: Any,
        streams: dict[str, Stream],
        *,
        seed: int,
        size: int,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self.source, self.streams, self.seed, self.size = source, streams, seed, size
        self.device, self.channels_last = device, channels_last
        self._orders: dict[tuple[str, str, int], np.ndarray[Any, Any]] = {}

    def index(self, phase: str, stream: str, size: int, k: int) -> torch.Tensor:
        """The rows of the k-th global batch: every epoch is a permutation of its own, and no row is left out."""
        position = np.arange(k * size, (k + 1) * size)
        n = self.source.size
        if n is None:
            return torch.from_numpy(position)
        epoch, place = position // n, position % n
        rows = np.empty_like(position)
        for e in np.unique(epoch):
            order = self._order(phase, stream, int(e), n)
            rows[epoch == e] = order[place[epoch == e]]
        return torch.from_numpy(rows)

    def epoch(self, size: int, k: int) -> torch.Tensor:
        """Which pass over the data each row of the k-th global batch belongs to: some sources draw anew in each."""
        return torch.arange(k * size, (k + 1) * size) // (self.source.size or 2**62)

    def _order(self, phase: str, stream: str, epoch: int, n: int) -> np.ndarray[Any, Any]:
        key = (phase, stream, epoch)
        if key not in self._orders:
            for old in [o for o in self._orders if o[:2] == key[:2] and o[2] < epoch - 1]:
                del self._orders[old]
            self._orders[key] = generator(self.seed, "order", phase, stream, epoch).permutation(n)
        return self._orders[key]

    def sizes(self, phase: Phase, stride: int) -> Mapping[str, int]:
        """Rows of each stream in a global batch of ``phase``; UsageError if ``stride`` parts would differ in size."""
        sizes = phase.batch
        if sizes is None:
            sizes = {name: round(self.size * s.ratio) for name, s in self.streams.items()}
        for size in sizes.values() or [self.size]:
            if size % stride:
                raise UsageError(f"a batch of {size} rows does not divide into {stride} parts (processes x accumulate)")
        return sizes

    def get(self, phase: Phase, k: int, offset: int = 0, stride: int = 1) -> Batch:
        """Rows ``offset::stride`` of the k-th batch of ``phase``, as its loss receives them."""
        parts = {}
        for name, size in self.sizes(phase, stride).items():
            index = self.index(phase.name, name, size, k)[offset::stride]
            row = self.source.rows(index, self.epoch(size, k)[offset::stride])
            fields = {f: self._place(row[f]) for f in self.streams[name].fields}
            parts[name] = Batch(**fields, index=index.to(self.device), n=len(index))
        if not parts:
            return Batch(n=self.size // stride)
        return next(iter(parts.values())) if len(self.streams) == 1 else Batch(**parts)

    def _place(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x
