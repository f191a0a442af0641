"""What an extractor sees of samples that come as a stream: moments, features, classes, or the samples themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli.console import DataError
from gencli.contract import DataSpec
from gencli.data.source import Array, Source
from gencli.metrics.extractors import Extractor, features
from gencli.metrics.frechet import Moments
from gencli.metrics.likelihood import rows_of
from gencli.streams import Samples

__all__ = ["Seen", "Subject", "rows_seen", "see"]


@dataclass
class Subject:
    """Samples that are judged: chunks that can be read once, and what a row says of where they come from."""

    name: str
    spec: DataSpec
    chunks: Iterable[Samples]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What was seen of ``n`` rows; only what was asked for is there."""

    n: int
    spec: DataSpec
    moments: Moments | None = None
    x: Tensor | None = None  # (n, d) features
    logits: Tensor | None = None
    labels: Array | None = None
    rows: Array | None = None  # raw


def rows_seen(source: Source) -> Subject:
    """All rows of ``source``, with their labels."""
    chunks = (Samples(f["x"].numpy(), f["label"].numpy() if "label" in f else None) for f in rows_of(source))
    return Subject(f"{source.name}@{source.split}", source.spec, chunks)


def see(extractor: Extractor, subject: Subject, keep: Collection[str]) -> Seen:
    """Read ``subject`` once and keep of it what ``keep`` names: "moments", "x", "logits", "rows".

    With "moments" alone memory does not grow with the number of rows.
    """
    extractor.check(subject.spec, subject.name)
    labels: list[Array | None] = []
    rows: list[Array] = []

    def arrays() -> Iterator[Array]:
        for chunk in subject.chunks:
            labels.append(chunk.label)
            if "rows" in keep:
                rows.append(chunk.x)
            yield chunk.x

    seen, xs, logits = Seen(0, subject.spec), list[Tensor](), list[Tensor]()
    for found in features(extractor, arrays(), subject.spec):
        seen.n += len(found.x)
        if "moments" in keep:
            seen.moments = seen.moments or Moments(found.x.shape[1])
            seen.moments.add(found.x)
        if "x" in keep:
            xs.append(found.x)
        if "logits" in keep and found.logits is not None:
            logits.append(found.logits)
    if not seen.n:
        raise DataError(f"{subject.name} holds no samples")
    seen.x = torch.cat(xs) if xs else None
    seen.logits = torch.cat(logits) if logits else None
    seen.rows = np.concatenate(rows) if rows else None
    known = [y for y in labels if y is not None]
    seen.labels = np.concatenate(known) if len(known) == len(labels) else None
    return seen
