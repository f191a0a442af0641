"""Samples of a model in chunks of one fixed size, so that sample i has the same bits whatever is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from gencli import processes
from gencli.console import UsageError, nearest
from gencli.contract import DataSpec, Model, Step
from gencli.rng import SampleRng, using
from gencli.streams import Samples

__all__ = ["check_options", "class_of", "completions", "draw", "labels_for", "parse_labels", "picture", "raw", "scope"]


@contextmanager
def scope(rng: SampleRng) -> Iterator[SampleRng]:
    """No gradient, and ``rng`` as the ambient source for layers that draw even now."""
    with torch.no_grad(), using(Step(0, 1, rng, torch.ones(()))):
        yield rng


def raw(x: Tensor, spec: DataSpec) -> np.ndarray[Any, Any]:
    """What ``sample`` or ``decode`` returned, as raw levels (uint8, int16 above 256) or points on the CPU."""
    if x.is_floating_point():
        return spec.unscale(x).cpu().numpy()
    return x.to(torch.uint8 if spec.levels is not None and spec.levels <= 256 else torch.int16).cpu().numpy()


def labels_for(spec: DataSpec, rows: Sequence[int], wanted: Sequence[int] | None, device: Any = "cpu") -> Tensor:
    """The labels of sample rows: ``wanted`` repeated, or every class in turn."""
    cycle = list(wanted) if wanted else list(range(len(spec.classes)))
    return torch.tensor([cycle[r % len(cycle)] for r in rows], device=device)


def class_of(word: str, spec: DataSpec, what: str = "an unknown class") -> int:
    """The class that ``word``, a name or a number, stands for; UsageError that calls it ``what`` if it is none."""
    names = spec.classes
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    some = f"the classes are {', '.join(names[:20])}" if names else f"{spec.name} has no classes"
    raise UsageError(f"{word!r} is {what}{nearest(word, names)}: {some}{', ...' if len(names) > 20 else ''}")


def parse_labels(text: str | None, model: Model) -> list[int] | None:
    """The classes of ``3``, ``0,1,2`` or names; UsageError for an unknown one, or where the model is told no class."""
    if text is None:
        return None
    found = [class_of(word, model.spec) for word in text.split(",")]
    _check_conditional(model)
    return found


def _check_conditional(model: Model) -> None:
    if not model.conditional:
        raise UsageError("this model is not class-conditional: it takes no labels")


def check_options(method: Any, options: Mapping[str, Any]) -> None:
    """UsageError if ``options`` holds what ``method`` has no keyword for, or a value of another type."""
    parameters = inspect.signature(method, eval_str=True).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            have = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"unknown sampling option {name!r}{nearest(name, known)}: {have}")
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Input ")
            raise UsageError(f"sampling option {name!r} {what}, not {value!r}") from None


def draw(
    model: Model,
    n: int,
    *,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    chunk: int | None = None,
) -> Iterator[Samples]:
    """Samples 0 .. n - 1 of ``model``, a chunk at a time; several processes share the chunks out, and each has all.

    The last chunk is computed whole and trimmed: what it is filled up with are the next samples, so no bit of a
    sample depends on ``n``, nor on the number of processes. ``labels`` (for class-conditional models) are repeated;
    without them the classes take turns. Raises UsageError for an unknown option.
    """
    options = dict(options or {})
    check_options(model.sample, options)
    if labels:
        _check_conditional(model)
    device = next(model.parameters()).device
    size = chunk or model.chunk

    def classes(start: int) -> Tensor | None:
        return labels_for(model.spec, range(start, start + size), labels, device) if model.conditional else None

    def one(start: int) -> np.ndarray[Any, Any]:
        with scope(SampleRng(seed, range(start, start + size), "sample", device)) as rng:
            return raw(model.sample(rng, labels=classes(start), **options), model.spec)

    starts = range(0, n, size)
    for start, x in zip(starts, processes.shared(starts, one)):
        y, keep = classes(start), min(size, n - start)
        yield Samples(x[:keep], None if y is None else y.cpu().numpy()[:keep], start)


def completions(
    model: Model,
    heads: Sequence[np.ndarray[Any, Any]],
    *,
    each: int,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """``each`` completions of every head, raw ``(n, each, *spec.shape)``.

    A head is the beginning of a raw example: rows of an image (C, h, W), audio (1, t), text (t,). Completion k of head
    i is keyed by ``i * each + k`` and computed in whole chunks, as samples are. ``labels``, one a head, are repeated.
    """
    spec, device = model.spec, next(model.parameters()).device
    done = np.zeros((len(heads) * each, *spec.shape), np.uint8 if (spec.levels or 0) <= 256 else np.int16)
    known = np.array([head.size // (spec.shape[0] if spec.kind == "image" else 1) for head in heads]).repeat(each)
    for k in sorted(set(known.tolist())):
        mine = np.flatnonzero(known == k)
        for start in range(0, len(mine), model.chunk):
            keep = mine[start : start + model.chunk]
            rows = np.resize(keep, model.chunk).tolist()  # filled up
            x = np.zeros((len(rows), *spec.shape), done.dtype)
            for row, i in zip(x, rows):
                head = heads[i // each]
                row[tuple(slice(size) for size in head.shape)] = head
            y = None if labels is None else labels_for(spec, [i // each for i in rows], labels, device)
            with scope(SampleRng(seed, rows, "complete", device)) as rng:
                out = model.complete(torch.from_numpy(x).to(device), k, rng, labels=y, **(options or {}))
            done[keep] = raw(out, spec)[: len(keep)]
    return done.reshape(len(heads), each, *spec.shape)


def picture(chunks: Sequence[Samples], spec: DataSpec, beside: Any = None) -> np.ndarray[Any, Any]:
    """Samples as one picture (H, W, 3), as :mod:`gencli.streams` draws them; points (many: density) beside the data."""
    from gencli import plots, streams

    x = np.concatenate([chunk.x for chunk in chunks])
    if spec.kind == "points":
        rows = len(x) if beside is None or beside.size is None else min(len(x), beside.size)
        data = None if beside is None else beside.rows(torch.arange(rows))["x"].numpy()
        return (plots.scatter if len(x) < 1000 else plots.density)(x, data)
    return streams.picture(x, spec)
