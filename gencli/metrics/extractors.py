"""What turns images into the features that sample-quality metrics compare.

``inception``: the network of the Fréchet Inception Distance. ``domain``: a classifier of the reference's own classes.
``pixels``: the values themselves. Any run whose model has ``features``. Metrics that rest on another network than
Inception carry its name (``fd-domain``): their figures compare with those of the same extractor alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gencli import pictures, processes
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec, Model
from gencli.data.source import Array
from gencli.rng import SampleRng
from gencli.sampling import scope
from gencli.streams import like, requantised

__all__ = ["DIGITS", "Extractor", "Features", "Network", "OfInception", "Pixels", "features", "file_digest"]

DIGITS = Path(__file__).parent / "digits.safetensors"  # gencli train classifier
BLOCK = 64  # rows that a network sees at once, always, so that no bit depends on how samples came


class Features(NamedTuple):
    """Of some rows: ``x`` float32 ``(n, d)``, and ``logits`` float32 ``(n, classes)`` where the extractor has any."""

    x: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """``name`` is part of a metric's name, ``about`` of its protocol; ``digest`` stands for weights and rules.

    ``classes``: those of its logits, empty where it has none.
    """

    name: str
    digest: str
    classes: tuple[str, ...]

    @property
    def about(self) -> dict[str, Any]: ...

    def check(self, spec: DataSpec, what: str) -> None:
        """DataError, naming ``what``, if its rows are none that this extractor can see."""

    def __call__(self, x: Array, spec: DataSpec) -> Features:
        """Features of raw rows ``x`` of data like ``spec``."""
        ...


@dataclass
class Pixels:
    """The raw values in [-1, 1], or points as they are."""

    name: str = "pixels"
    digest: str = "pixels"
    classes: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """Nothing was learned, nothing is resized."""
        return {"extractor": "pixels"}

    def check(self, spec: DataSpec, what: str) -> None:
        """Everything but text has values that can be averaged."""
        if spec.kind == "text":
            raise DataError(f"{what}: text has no features")

    def __call__(self, x: Array, spec: DataSpec) -> Features:
        """See :class:`Extractor`."""
        return Features(spec.scale(torch.from_numpy(x)).flatten(1).float(), None)


class Network:
    """A model of gencli's own with ``features`` and perhaps ``classify``; it sees its own number of levels."""

    def __init__(self, model: Model, name: str, digest: str, about: dict[str, Any]) -> None:
        if not hasattr(model, "features"):
            raise UsageError(f"{name} has no features", hint="gencli models lists what each model can do")
        self.model, self.name, self.digest = model.eval(), name, digest
        self.about = about | {"sha256": digest[:12], "resize": "none"}
        self.classes = model.spec.classes if hasattr(model, "classify") else ()

    def check(self, spec: DataSpec, what: str) -> None:
        """Images of the model's own size and colours."""
        mine = self.model.spec
        if spec.shape != mine.shape or (spec.levels is None) != (mine.levels is None):
            of = f"{self.name} extractor of {mine.name}"
            raise DataError(f"{what}: samples are {like(spec.shape)}, but the {of} knows {like(mine.shape)}")

    def __call__(self, x: Array, spec: DataSpec) -> Features:
        """See :class:`Extractor`."""
        mine = self.model.spec
        if spec.levels is not None and mine.levels is not None:
            x = requantised(x, spec.levels, mine.levels)
        device = next(self.model.parameters()).device
        rows = torch.from_numpy(x).to(device)
        with scope(SampleRng(0, range(len(x)), "features", device)):
            found = self.model.features(rows).flatten(1).float().cpu()  # type: ignore[operator]
            logits = self.model.classify(rows).float().cpu() if self.classes else None  # type: ignore[operator]
        return Features(found, logits)


class OfInception:
    """The Inception network of 2015, on images of 256 levels and three colours."""

    name = "inception"

    def __init__(self, net: Any) -> None:
        self.net, self.digest = net.eval(), net.digest
        self.about = {"extractor": "inception-2015-12-05", "sha256": net.digest[:12], "resize": net.resize}
        self.classes = tuple(map(str, range(1008)))

    def check(self, spec: DataSpec, what: str) -> None:
        """Grey or colour images."""
        if spec.kind != "image" or spec.levels is None or spec.shape[0] not in (1, 3):
            raise DataError(f"{what}: the Inception network sees images, not {spec.kind} of shape {like(spec.shape)}")

    def __call__(self, x: Array, spec: DataSpec) -> Features:
        """See :class:`Extractor`."""
        rows = torch.from_numpy(np.ascontiguousarray(pictures.to_bytes(x, spec.levels or 256)))
        with torch.no_grad():
            found, logits = self.net(rows.expand(-1, 3, -1, -1).to(next(self.net.parameters()).device))
        return Features(found.float().cpu(), logits.float().cpu())


def _blocks(chunks: Iterable[Array]) -> Iterator[tuple[Array, int]]:
    """The rows regrouped by ``BLOCK``, and how many of a block count: the last is filled up with its last row."""
    held: list[Array] = []
    n = 0
    for chunk in chunks:
        held.append(chunk)
        n += len(chunk)
        if n < BLOCK:
            continue
        rows = np.concatenate(held)
        whole = n - n % BLOCK
        for start in range(0, whole, BLOCK):
            yield rows[start : start + BLOCK], BLOCK
        held, n = [rows[whole:]], n - whole
    if n:
        rows = np.concatenate(held)
        yield np.concatenate([rows, np.repeat(rows[-1:], BLOCK - n, 0)]), n


def features(extractor: Extractor, chunks: Iterable[Array], spec: DataSpec) -> Iterator[Features]:
    """Features of raw rows that come in chunks of any size; several processes share the work, and each has all.

    No bit depends on the size of the chunks, nor on the number of processes.
    """

    def one(block: tuple[Array, int]) -> Array:
        x, count = block
        found = extractor(x, spec)
        both = [found.x] if found.logits is None else [found.x, found.logits]
        return torch.cat(both, 1)[:count].numpy()

    for rows in map(torch.from_numpy, processes.shared(_blocks(chunks), one)):
        d = rows.shape[1] - len(extractor.classes)
        yield Features(rows[:, :d], rows[:, d:] if extractor.classes else None)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
