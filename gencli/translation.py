"""A map between the word vectors of two languages: fitted, refined, saved, applied. Imports no torch.

Before it is fitted, both sides are normalised by steps: ``unit`` makes every vector's length 1, so that the product of
two is their cosine; ``centre`` makes the mean over the words 0; ``whiten`` makes the dimensions uncorrelated, of
variance 1. Unit, centre: Mikel Artetxe, Gorka Labaka, Eneko Agirre, Learning principled bilingual mappings of word
embeddings while preserving monolingual invariance, EMNLP 2016; lengths made 1 again, or products would be no cosines
any more. Whitening: the same, Generalizing and Improving Bilingual Word Embedding Mappings with a Multi-Step Framework
of Linear Transformations, AAAI 2018.

A map's file holds ``W`` (d', d), float64, with W x near z for normalised source and target vectors x and z, and what
their normalisations learned: all that a use of the same vectors needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gencli import files, keyed
from gencli.console import DataError, UsageError, nearest
from gencli.header import read_header
from gencli.metrics.translation import ranked
from gencli.models import MAPS
from gencli.vectors import Vectors
from gencli.words import unit, unit_

__all__ = ["STEPS", "Map", "Normalisation", "configured", "digest", "fit", "load", "mutual", "pairs", "parse"]

Array = np.ndarray[Any, Any]
STEPS = ("unit", "centre", "whiten")
CHUNK = 1 << 14  # rows at once where float64 is needed
FREQUENT = 10_000  # words of each side among which a refinement looks for pairs


def parse(text: str) -> tuple[str, ...]:
    """``unit,centre,unit`` as steps, ``none`` as no steps; UsageError for an unknown one."""
    steps = () if text == "none" else tuple(text.split(","))
    for step in steps:
        if step not in STEPS:
            raise UsageError(
                f"unknown step {step!r}{nearest(step, STEPS)}: --normalise takes {', '.join(STEPS)}, or none"
            )
    return steps


@dataclass(frozen=True)
class Normalisation:
    """The steps with what they learned of the vectors they were fitted on: ``state[i]`` belongs to ``steps[i]``.

    A mean (d,), or a matrix (d, d), float64; an empty array for ``unit``.
    """

    steps: tuple[str, ...]
    state: tuple[Array, ...]

    @classmethod
    def fit(cls, steps: Sequence[str], x: Array) -> tuple[Normalisation, Array]:
        """The normalisation that ``x`` (n, d), float32, defines, and ``x`` normalised.

        DataError where vectors to be whitened do not span their dimensions.
        """
        state = []
        x = x.copy()
        for step in steps:
            state.append(_learn(step, x))
            x = _take(step, state[-1], x)
        return cls(tuple(steps), tuple(state)), x

    def __call__(self, x: Array) -> Array:
        """``x`` (n, d) normalised, float32."""
        x = x.copy()
        for step, state in zip(self.steps, self.state):
            x = _take(step, state, x)
        return x


def _learn(step: str, x: Array) -> Array:
    if step == "centre":
        return x.mean(0, dtype=np.float64)
    if step == "unit":
        return np.empty(0)
    S = np.zeros((x.shape[1],) * 2)  # second moments (d, d)
    for i in range(0, len(x), CHUNK):
        part = x[i : i + CHUNK].astype(np.float64)
        S += part.T @ part
    variance, V = np.linalg.eigh(S / len(x))
    if not variance[0] > 1e-10 * variance[-1]:
        raise DataError(f"{len(x)} vectors do not span their {x.shape[1]} dimensions: they cannot be whitened")
    return (V * variance**-0.5) @ V.T  # S^(-1/2)


def _take(step: str, state: Array, x: Array) -> Array:
    """One step, in place where it can be."""
    if step == "unit":
        unit_(x)
    elif step == "centre":
        x -= state.astype(x.dtype)
    else:
        x = x @ state.astype(x.dtype)
    return x


# ---------------------------------------------------------------------------------------------- the map


@dataclass(frozen=True)
class Map:
    """W (d', d), float64, the normalisations of both sides, and what is said of it (``about``)."""

    W: Array
    source: Normalisation
    target: Normalisation
    about: dict[str, Any]

    def mapped(self, x: Array) -> Array:
        """Normalised source vectors (n, d) in the target's space, of length 1, float32."""
        return unit_(x @ self.W.T.astype(np.float32))

    def save(self, path: Path | str) -> None:
        """Write it as safetensors, whole or not at all."""
        from safetensors.numpy import save

        tensors = {"W": self.W}
        for name, side in (("source", self.source), ("target", self.target)):
            tensors |= {f"{name}.{i}": state for i, state in enumerate(side.state)}
        tensors = {name: np.ascontiguousarray(tensor, np.float64) for name, tensor in tensors.items()}
        files.write_bytes(path, save(tensors, {"gencli": files.canonical(self.about)}))


def load(path: Path | str) -> Map:
    """The map in a file. DataError for whatever is not exactly one."""
    from safetensors import SafetensorError, safe_open

    about, header = read_header(path)
    shapes = {name: shape for name, (_, shape) in header.items()}
    steps: Any = about.get("normalise")
    known = about.get("kind") == "map" and isinstance(steps, list) and all(step in STEPS for step in steps)
    known = known and isinstance(about.get("map"), str) and isinstance(about.get("pairs"), int)
    known = known and isinstance(about.get("files", {}), dict)
    if not known or len(shapes.get("W", ())) != 2 or any(dtype != "F64" for dtype, _ in header.values()):
        raise DataError(f"{path} is no map of word vectors", hint="gencli translate-embeddings ... -o MAP makes one")
    d = dict(zip(("target", "source"), shapes["W"]))
    state = {side: [f"{side}.{i}" for i in range(len(steps))] for side in d}
    for side, names in state.items():
        for name, step in zip(names, steps):
            if shapes.pop(name, None) != {"unit": (0,), "centre": (d[side],), "whiten": (d[side],) * 2}[step]:
                raise DataError(f"{path}: {name} does not fit a map of {d['source']} to {d['target']} dimensions")
    if set(shapes) != {"W"}:
        raise DataError(f"{path} holds more than a map")
    try:
        with safe_open(path, "numpy") as file:
            tensor = {name: file.get_tensor(name) for name in header}
    except SafetensorError as error:
        raise DataError(f"{path}: {error}") from None
    if not all(np.isfinite(t).all() for t in tensor.values()):
        raise DataError(f"{path}: a number in it is not finite")
    sides = {side: Normalisation(tuple(steps), tuple(tensor[n] for n in names)) for side, names in state.items()}
    return Map(tensor["W"], sides["source"], sides["target"], about)


# ---------------------------------------------------------------------------------------------- fitting


def configured(name: str, options: Mapping[str, Any]) -> Any:
    """The map ``name`` of the table with its ``options``; UsageError for what it does not have."""
    from pydantic import ValidationError

    if name not in MAPS:
        raise UsageError(f"no map {name!r}{nearest(name, MAPS)}: --map is {' or '.join(MAPS)}", hint="gencli models")
    module, _, attribute = MAPS[name].path.partition(":")
    made = getattr(import_module(module), attribute)
    fields = made.Config.model_fields
    for key in options:
        if key not in fields:
            raise UsageError(f"{name} has no option {key!r}{nearest(key, fields)}: it has {', '.join(fields)}")
    try:
        return made(made.Config(**options))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{name}: {first['loc'][0]}={first['input']}: {first['msg']}") from None


def pairs(dictionary: Mapping[str, Sequence[str]], source: Vectors, target: Vectors, name: str) -> Array:
    """Rows of source and target of each pair that both have, (n, 2). DataError for none, naming the dictionary."""
    found = [
        (source.index[word], target.index[meaning])
        for word, meanings in dictionary.items()
        if word in source.index
        for meaning in meanings
        if meaning in target.index
    ]
    if not found:
        first = next(iter(dictionary), "")
        raise DataError(
            f"{name}: none of its {len(dictionary)} words, such as {first!r}, is in {source.name} with a translation "
            f"in {target.name}",
            hint="is it the other direction, or in another case?",
        )
    return np.array(found)


def fit(
    name: str,
    options: Mapping[str, Any],
    steps: Sequence[str],
    x: Array,
    z: Array,
    pairs: Array,
    refine: int = 0,
    seed: int = 0,
) -> tuple[Map, Array, Array]:
    """A map for vectors ``x`` (n, d) and ``z`` (m, d') from ``pairs`` of their rows; both sides, mapped, of length 1.

    ``refine`` times it is fitted again to the pairs that are each other's nearest by CSLS, among the first 10,000 words
    of both sides: files hold the most frequent words first.
    """
    model = configured(name, options)
    source, x = Normalisation.fit(steps, x)
    target, z = Normalisation.fit(steps, z)
    W, y = _solved(model, x, z, pairs, seed), z if steps and steps[-1] == "unit" else unit(z)
    used = len(pairs)
    for _ in range(refine):
        found = mutual(unit(x[:FREQUENT] @ W.T.astype(np.float32)), y[:FREQUENT])
        if len(found):
            W, used = _solved(model, x, z, found, seed), len(found)
    about = {"kind": "map", "map": name, "normalise": list(steps), "pairs": used, "refine": refine, "seed": seed}
    made = Map(W, source, target, about | {"config": model.config.model_dump()})
    return made, made.mapped(x), y


def _solved(model: Any, x: Array, z: Array, pairs: Array, seed: int) -> Array:
    with np.errstate(all="ignore"):
        W: Array = model.fit(x[pairs[:, 0]], z[pairs[:, 1]], keyed.generator("map", seed))
    if not np.isfinite(W).all():
        raise UsageError("the map is not finite: a smaller rate may help")
    return W


def mutual(x: Array, y: Array) -> Array:
    """Rows (n, 2) of ``x`` and ``y``, of length 1, that are each other's nearest by CSLS."""
    there, back = ranked("csls", x, y, x, 1)[1][:, 0], ranked("csls", y, x, y, 1)[1][:, 0]
    rows = np.flatnonzero(back[there] == np.arange(len(x)))
    return np.stack([rows, there[rows]], 1)


def digest(path: Path | str) -> str | None:
    """The SHA-256 of a file of vectors; None where ``path`` is none, such as a run."""
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
