"""Checkpoints: safetensors written whole, verified before a number of them is believed. Imports no torch by itself.

A checkpoint is a folder ``step-000500`` with ``model.safetensors``, ``training.safetensors`` and ``manifest.json``
(SHA-256 of both, written last). It is built under a hidden name and renamed, so a folder of that name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencli import console, files
from gencli.console import DataError, Diverged, GencliError
from gencli.header import DTYPES, Header, parse_json, read_header, short

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gencli.contract import Model

__all__ = [
    "Loaded",
    "State",
    "best",
    "latest",
    "load",
    "load_state",
    "load_training",
    "mark_best",
    "prune",
    "resolve",
    "save",
    "steps",
    "sweep",
    "verify",
]

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.safetensors", "manifest.json"
_META = {"model": str, "config": dict, "spec": dict, "step": int, "chunk": int}


@dataclass(frozen=True)
class Loaded:
    """A model ready to use. ``weights`` is what it holds: "ema", or "raw" also where the run averaged nothing."""

    model: Model
    meta: dict[str, Any]
    path: Path
    step: int
    weights: str


@dataclass(frozen=True)
class State:
    """What training goes on from, beside the weights: see :func:`load_state`."""

    meta: dict[str, Any]
    ema: dict[str, Tensor]
    training: dict[str, Tensor]
    training_meta: dict[str, Any]


# ---------------------------------------------------------------------- writing


def _serialise(tensors: Mapping[str, Tensor], meta: dict[str, Any], what: str) -> bytes:
    import torch
    from safetensors.torch import save as to_bytes

    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise Diverged(f"{what} {name!r} is not finite: no checkpoint written")
    # Fresh copies: the library refuses tensors that share memory, as tied weights do.
    copies = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    # One key of metadata only: with more, the order of keys and so the bytes differ from process to process.
    return to_bytes(copies, metadata={"gencli": files.canonical(meta)})


def save(
    folder: Path | str,
    model: nn.Module,
    *,
    meta: dict[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Tensor],
    training_meta: dict[str, Any],
) -> None:
    """Write checkpoint ``folder`` (``.../checkpoints/step-000500``) whole or not at all; equal state, equal bytes.

    ``meta`` has model, config, spec, recipe, step, chunk and versions; ``ema`` maps names of parameters to averages,
    and of buffers to what they are with these.
    Diverged, before anything is written, if a number is not finite; GencliError if the disk is full, say. An older
    checkpoint of that name is replaced.
    """
    folder = Path(folder)
    weights = {**model.state_dict(), **{f"ema/{name}": t for name, t in (ema or {}).items()}}
    contents = {
        MODEL: _serialise(weights, meta, "weight"),
        TRAINING: _serialise(training, training_meta, "training state"),
    }
    facts = {name: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for name, b in contents.items()}
    manifest = {"step": meta["step"], "files": facts}
    if folder.exists():
        with contextlib.suppress(DataError):
            verify(folder)
            if _manifest(folder) == facts:
                return
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        files.sync_folder(folder.parent.parent)
    new, old = (folder.parent / f".{folder.name}.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    try:
        new.mkdir()
        for name, data in contents.items():
            files.write_bytes(new / name, data)
        files.write_json(new / MANIFEST, manifest)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        files.sync_folder(folder.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where this fails as well, sweep does it
            if old.exists() and not folder.exists():
                os.rename(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise GencliError(f"cannot write checkpoint {folder}: {error.strerror or error}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep(checkpoints: Path | str) -> None:
    """Clear up after a killed run, whose lock the caller holds: leftovers go, damaged checkpoints are set aside."""
    folder = Path(checkpoints)
    if not folder.is_dir():
        return
    for leftover in sorted(folder.glob(".*")):
        found = re.fullmatch(r"\.(step-\d+)\.(tmp|old|trash)-\d+", leftover.name)
        if found and found[2] == "old" and not (folder / found[1]).exists():
            os.rename(leftover, folder / found[1])  # killed between the two renames of a replacement
        elif found:
            shutil.rmtree(leftover)
        elif leftover.name.endswith(".tmp") and leftover.is_file():
            leftover.unlink()
    for step, path in steps(folder.parent):
        try:
            verify(path)
        except DataError as error:
            # Out of the way of prune, which would keep it in place of a good one.
            aside = next(p for i in range(10**6) if not (p := folder / f"damaged-{step:06d}-{i}").exists())
            console.say(f"{error}; set aside as {aside.name}")
            os.rename(path, aside)
    files.sync_folder(folder)


def prune(run: Path | str, keep: int, protect: Collection[int] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints of ``run``, the best one, and those of the steps ``protect``."""
    record = _best_record(Path(run))
    kept = {*protect, *([record["step"]] if record else [])}
    for step, folder in steps(run)[: -max(keep, 1)]:
        if step not in kept:
            trash = folder.with_name(f".{folder.name}.trash-{os.getpid()}")
            os.rename(folder, trash)  # so that no half-deleted folder ever passes for a checkpoint
            shutil.rmtree(trash)


def mark_best(run: Path | str, step: int, metric: str, value: float) -> None:
    """Name the checkpoint of ``step`` as the one that verbs use, and why."""
    files.write_json(Path(run) / "checkpoints" / "best.json", {"step": step, "metric": metric, "value": value})


# ---------------------------------------------------------------------- finding


def steps(run: Path | str) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder, oldest first, unverified."""
    folder = Path(run) / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [(int(m[1]), folder / name) for name in names if (m := re.fullmatch(r"step-(\d{6,18})", name))]
    return sorted(found)


def _line(error: object) -> str:
    """The first line of an error's text, fit for a terminal whatever a hostile file has put into it."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in first[:200])


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading ``path`` into one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", hint="gencli runs") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    with _named(path):
        if os.path.getsize(path) > 2**16:
            raise ValueError("too large for a manifest")
        content = parse_json(path.read_text(encoding="utf-8"))
        facts = content.get("files") if isinstance(content, dict) else None
        if not isinstance(facts, dict) or set(facts) != {MODEL, TRAINING}:
            raise ValueError(f"must list exactly {MODEL} and {TRAINING}")
        if not all(isinstance(f, dict) and set(f) == {"sha256", "bytes"} for f in facts.values()):
            raise ValueError("every file must have exactly sha256 and bytes")
        if not all(type(f["bytes"]) is int for f in facts.values()):
            raise ValueError("bytes must be a number")
        return facts


def _verify_file(path: Path, fact: dict[str, Any]) -> None:
    with _named(path):
        size = os.path.getsize(path)
        if size != fact["bytes"]:
            raise ValueError(f"damaged: {size} bytes, not {fact['bytes']} as its manifest says")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != fact["sha256"]:
                raise ValueError("damaged: its SHA-256 is not that of its manifest")


def verify(folder: Path | str) -> None:
    """DataError unless both files of checkpoint ``folder`` are, byte for byte, those of its manifest."""
    for name, fact in _manifest(Path(folder)).items():
        _verify_file(Path(folder) / name, fact)


def latest(run: Path | str, missing_ok: bool = False) -> Path | None:
    """The newest checkpoint of ``run`` that verifies, with a word on stderr for each that does not.

    None if there is no checkpoint and ``missing_ok``; DataError if there is none, or none that verifies.
    """
    found = steps(run)
    for _, folder in reversed(found):
        try:
            verify(folder)
        except DataError as error:
            console.say(f"{error}; using the checkpoint before it")
        else:
            return folder
    if missing_ok and not found:
        return None
    raise DataError(f"{run}: {'every checkpoint is damaged' if found else 'no checkpoint yet'}", hint="gencli runs")


def _best_record(run: Path) -> dict[str, Any] | None:
    path = run / "checkpoints" / "best.json"
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        return record if isinstance(record["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best(run: Path | str) -> Path | None:
    """The checkpoint that :func:`mark_best` named, if it is there and verifies."""
    record = _best_record(Path(run))
    folder = dict(steps(run)).get(record["step"]) if record else None
    if folder is not None:
        try:
            verify(folder)
        except DataError as error:
            console.say(f"{error}; using the latest checkpoint")
            return None
    return folder


def resolve(what: Path | str) -> Path:
    """The ``model.safetensors`` meant by a run folder (its best checkpoint, else its latest), a checkpoint or a file.

    DataError if there is none.
    """
    path = Path(what)
    with _named(path):
        if not path.is_dir():
            os.stat(path)  # raises what is wrong with it
            return path
        if (path / MODEL).exists():
            return path / MODEL
        if (path / MANIFEST).exists():
            raise DataError(f"{path / MODEL}: no such file", hint="gencli runs")
        if not (path / "checkpoints").is_dir() and not (path / "run.json").exists():
            raise DataError(f"{path} is neither a run nor a checkpoint", hint="gencli runs")
        folder = best(path) or latest(path)
        assert folder is not None
        return folder / MODEL


# ---------------------------------------------------------------------- reading


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file whose header has been checked; ValueError if one is not finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(_line(error)) from error
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {short(name)} is not finite")
    return tensors


def _compare(model: nn.Module, header: Header, double: bool = False) -> None:
    """ValueError unless ``header`` has exactly the model's tensors, and averages of some of them.

    ``double``: the file was trained in float64 and the model, built in torch's default dtype, is for use.
    """
    import torch

    def facts(t: Tensor) -> tuple[Any, tuple[int, ...]]:
        wide = double and t.dtype == torch.get_default_dtype()
        return torch.float64 if wide else t.dtype, tuple(t.shape)

    wanted = {name: facts(t) for name, t in model.state_dict().items()}
    averages = {f"ema/{name}": fact for name, fact in wanted.items() if fact[0].is_floating_point}
    for name in wanted:
        if name not in header:
            raise ValueError(f"tensor {short(name)} is missing")
    for name, (dtype, shape) in header.items():
        want = wanted.get(name) or averages.get(name)
        if want is None:
            raise ValueError(f"tensor {short(name)} is none of this model's")
        kind = getattr(torch, DTYPES[dtype][1])
        if (kind, shape) != want:
            found = f"{kind} {short(list(shape))}"
            raise ValueError(f"tensor {short(name)} is {found}, the model's is {want[0]} {list(want[1])}")


def _fill(model: nn.Module, path: Path, header: Header, double: bool = False) -> dict[str, Tensor]:
    """Copy the raw weights of ``path`` into ``model`` and return the averaged ones, by name."""
    _compare(model, header, double)
    tensors = _tensors(path)
    averages = {name[4:]: tensors.pop(name) for name in list(tensors) if name.startswith("ema/")}
    model.load_state_dict(tensors)
    return averages


@contextlib.contextmanager
def _budget(header: Header) -> Iterator[None]:
    """Stop a constructor that registers far more than the file holds: a hostile config must not fill the memory."""
    from torch.nn.modules import module as hooks

    count, numbers = 4 * len(header) + 1000, 4 * sum(prod(shape) for _, shape in header.values()) + 2**24

    def spend(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal count, numbers
        count, numbers = count - 1, numbers - (0 if tensor is None else tensor.numel())
        if min(count, numbers) < 0:
            raise ValueError("its config asks for a far larger model than the file holds")

    handles = [
        hooks.register_module_parameter_registration_hook(spend),
        hooks.register_module_buffer_registration_hook(spend),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _build(meta: dict[str, Any], header: Header) -> Model:
    """The untrained model that ``meta`` describes; ValueError with a one-line reason if it describes none."""
    from pydantic import ValidationError

    from gencli.contract import DataSpec
    from gencli.models import model_class
    from gencli.rng import seeded

    for key, kind in _META.items():
        if type(meta.get(key)) is not kind:
            raise ValueError(f"gencli metadata: {key!r} is missing or no {kind.__name__}")
    if not 0 < meta["chunk"] <= 2**20:
        raise ValueError("gencli metadata: 'chunk' out of range")
    cls = model_class(meta["model"])
    try:
        config, spec = cls.Config.model_validate(meta["config"]), DataSpec.model_validate(meta["spec"])
        with seeded(0, "init"), _budget(header):
            return cls(config, spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = short(".".join(map(str, first["loc"])))
        raise ValueError(f"{error.title} {where}: {_line(first['msg'])}") from error
    except Exception as error:  # whatever a model's constructor says to a config that nobody would train with
        raise ValueError(f"cannot build {meta['model']}: {_line(error)}") from error


def _precision(meta: dict[str, Any]) -> Any:
    for key in ("recipe", "train", "precision"):
        meta = meta.get(key, {}) if isinstance(meta, dict) else {}
    return meta


def load(what: Path | str, weights: str = "ema", device: Any = "cpu") -> Loaded:
    """The model of a run, a checkpoint or a file, for use: evaluation mode, no gradients, on ``device``.

    ``weights``: "ema" takes averaged weights where there are some, "raw" never. Nothing in the file is believed: its
    header, its manifest if it has one, its config, and every tensor's name, dtype, shape and finiteness are checked.
    DataError, naming the file and the reason.
    """
    import torch

    path = resolve(what)
    meta, header = read_header(path)
    if (path.parent / MANIFEST).exists() and path.name in (MODEL, TRAINING):
        _verify_file(path, _manifest(path.parent)[path.name])
    with _named(path):
        try:
            model = _build(meta, header)
        except GencliError as error:
            raise DataError(f"{path}: {error}", hint=error.hint) from error
        averages = _fill(model, path, header, double=_precision(meta) == "float64")
    averaged = weights == "ema" and bool(averages)
    if averaged:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in averages:
                    tensor.copy_(averages[name])
    model.requires_grad_(False).eval().to(device)
    return Loaded(model, meta, path, meta["step"], "ema" if averaged else "raw")


def load_training(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training state of checkpoint ``folder`` as :func:`save` was given it: (tensors, meta)."""
    path = Path(folder) / TRAINING
    meta, _ = read_header(path)
    _verify_file(path, _manifest(path.parent)[TRAINING])
    with _named(path):
        return _tensors(path), meta


def load_state(folder: Path | str, model: nn.Module) -> State:
    """Copy the raw weights of checkpoint ``folder`` into ``model`` (of the same config) and return the rest."""
    folder = Path(folder)
    verify(folder)
    path = folder / MODEL
    meta, header = read_header(path)
    with _named(path):
        averages = _fill(model, path, header)
    return State(meta, averages, *load_training(folder))
