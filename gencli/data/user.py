"""A user's own data, by path.

- A folder of images: :mod:`gencli.data.folders`. A folder that holds more ``.wav`` and ``.flac`` files than images:
  :mod:`gencli.data.audio`.
- ``.txt`` or ``.txt.gz``: :mod:`gencli.data.text`, or as ``:tokens`` :mod:`gencli.data.tokens`.
- A folder of strips: ``train-00.png``, ``train-01.png``, ... (and ``val-NN.png``, ``test-NN.png``), each a column of
  square pictures as wide as the strip, in the order of ``train-labels.npy`` (integers, ``(n,)``). Tens of thousands of
  small pictures in a few lossless files.
- A folder that ``gencli data pack`` wrote: :mod:`gencli.data.shards`.
- ``.npz``: arrays ``x`` (and ``y`` or ``label``), or ``x_train``, ``y_train``, ``x_val``, ..., ``x_test``, ...;
  optionally ``levels`` (a number) and ``classes`` (names). ``.npy``: ``x`` alone.

Arrays: uint8 ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` with C = 1 or 3 and 256 levels (or ``levels``); bool
images have 2 levels; floats ``(n, D)`` or ``(n,)`` are points. Splits that are not given are carved out of train by a
fixed permutation, 10 % each.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data import audio, text, tokens
from gencli.data.folders import count, load_folder
from gencli.data.images import SUFFIXES, decode, header
from gencli.data.shards import holds_shards, load_shards
from gencli.data.source import Array, Source, TensorSource, carve
from gencli.data.table import SPLITS

__all__ = ["load_path"]

Parts = dict[str, tuple[Array, Array | None]]  # split -> (x, labels)


def load_path(
    path: Path, name: str, split: str, *, size: int | None = None, unit: str | None = None, on_bad: str = "fail"
) -> Source:
    """The rows of ``split`` of the data at ``path``.

    ``size``: pixels of the sides of a folder's images, samples of an example of sound, symbols of one of text;
    ``unit``, "words" or "tokens", is for text alone.

    Raises DataError for data that is bad, UsageError for a kind of file that is no data.
    """
    if path.name.lower().endswith((".txt", ".txt.gz")) and not path.is_dir():
        if unit == "tokens":
            return tokens.load_file(path, name, split, length=size, on_bad=on_bad)
        return text.load_file(path, name, split, words=unit == "words", length=size, on_bad=on_bad)
    if unit:
        raise UsageError(f"{name}: only text has {unit}")
    strips = path.is_dir() and (path / "train-labels.npy").exists()
    packed = path.is_dir() and holds_shards(path)
    if path.is_dir() and not strips and not packed:
        if count(path, audio.SUFFIXES) > count(path, SUFFIXES):
            return audio.load_folder(path, name, split, length=size, on_bad=on_bad)
        if size is not None and size > 9999:
            raise UsageError(f"{name}: images of {size} x {size} pixels are too large to train on")
        return load_folder(path, name, split, size=size, on_bad=on_bad)
    if size is not None:
        raise UsageError(f"{name}: only a folder of images can be resized (:{size}), or of sounds or a text cut")
    if packed:
        return load_shards(str(path), name, split)
    if strips:
        return _source(path, name, split, _strips(path, split), None, ())
    if path.suffix not in (".npz", ".npy"):
        hint = "a folder of it is" if path.suffix.lower() in (*audio.SUFFIXES, *SUFFIXES) else "see gencli data ls"
        raise UsageError(f"{path}: not a folder, .npz, .npy or .txt file", hint=hint)
    arrays = _arrays(path)
    parts: Parts = {}
    for part, ending in (("train", ""), ("train", "_train"), ("val", "_val"), ("test", "_test")):
        if f"x{ending}" in arrays:
            labels = next((arrays[k + ending] for k in ("y", "label") if k + ending in arrays), None)
            parts[part] = (arrays[f"x{ending}"], labels)
    if "train" not in parts:
        names = ", ".join(arrays)[:200] or "nothing"
        raise DataError(f"{path}: holds {names if names.isprintable() else ascii(names)}, and neither x nor x_train")
    given = arrays.get("levels")
    if given is not None and (given.ndim or given.dtype.kind not in "iu"):
        raise DataError(f"{path}: levels must be one integer, not {given.dtype} {given.shape}")
    levels = None if given is None else int(given)
    if "classes" in arrays and arrays["classes"].ndim != 1:
        raise DataError(f"{path}: classes must be a list of names")
    return _source(path, name, split, parts, levels, tuple(str(c) for c in arrays.get("classes", ())))


def _arrays(path: Path) -> dict[str, Array]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            found = {key: loaded[key] for key in loaded.files}
            if strange := [key for key, a in found.items() if not isinstance(a, np.ndarray)]:
                raise ValueError(f"{strange[0]} is no array")
            return found
    except Exception as e:  # numpy parses an array's header as Python, and zip knows many ways to be bad
        reason = "".join(c if c.isprintable() else "?" for c in str(e)[:200]) or type(e).__name__
        if "pickle" in reason:
            reason = "it holds Python objects, which are never loaded"
        raise DataError(f"{path}: cannot be read as arrays: {reason}") from e


def _strips(root: Path, split: str) -> Parts:
    found = {
        part: sorted((int(m[1]), f) for f in root.iterdir() if (m := re.fullmatch(rf"{part}-(\d+)\.png", f.name)))
        for part in SPLITS
    }
    if not found["train"]:
        raise DataError(f"{root}: has train-labels.npy but no strip train-00.png")
    parts: Parts = {}
    for part in (part for part in SPLITS if found[part]):
        needed = part == split or (part == "train" and not found[split])
        pieces: list[Array] = []
        for _, file in found[part]:
            channels, height, side = header(file, str(file))
            if height % side:
                raise DataError(f"{file}: a strip {side} wide and {height} high is no column of squares")
            # of the other splits only the number of rows counts: seconds of decoding saved
            a = decode(file, str(file)) if needed else np.broadcast_to(np.uint8(0), (channels, height, side))
            pieces.append(a.reshape(channels, -1, side, side).transpose(1, 0, 2, 3))
            if pieces[-1].shape[1:] != pieces[0].shape[1:]:
                raise DataError(f"{file}: its pictures differ in size or colour from those of the strips before it")
        labels = root / f"{part}-labels.npy"
        parts[part] = (np.concatenate(pieces), _arrays(labels)["x"] if labels.exists() else None)
    return parts


def _source(
    path: Path, name: str, split: str, parts: Parts, levels: int | None, classes: tuple[str, ...]
) -> TensorSource:
    clean = {part: _rows(f"{path} ({part})", x, y, levels) for part, (x, y) in parts.items()}
    x, y, found = clean["train"]
    missing = [part for part in ("val", "test") if part not in clean]
    if missing:
        if len(x) <= len(missing):
            raise DataError(f"{path}: {len(x)} rows are too few to set some aside for {' and '.join(missing)}")
        tenth = max(1, len(x) // 10)
        cut = carve(len(x), tenth * ("val" in missing), tenth * ("test" in missing), "user", "split")
        for part in ("train", *missing):
            clean[part] = (x[cut[part]], None if y is None else y[cut[part]], found)
    for part, (px, py, plevels) in clean.items():
        if (px.shape[1:], px.dtype, plevels, py is None) != (x.shape[1:], x.dtype, found, y is None):
            raise DataError(f"{path}: the arrays of {part} differ from those of train in shape, type or labels")
    count = max((int(py.max()) + 1 for _, py, _ in clean.values() if py is not None), default=0)
    if classes and count > len(classes):
        raise DataError(f"{path}: labels go up to {count - 1}, but only {len(classes)} classes are named")
    spec = DataSpec(
        name=name,
        kind="points" if found is None else "image",
        shape=x.shape[1:],
        levels=found,
        classes=(classes or tuple(str(k) for k in range(count))) if count else (),
        size=len(clean["train"][0]),
    )
    sx, sy, _ = clean[split]
    return TensorSource(name, split, spec, torch.from_numpy(sx), None if sy is None else torch.from_numpy(sy))


def _rows(where: str, x: Array, y: Array | None, levels: int | None) -> tuple[Array, Array | None, int | None]:
    """``x`` as raw images ``(n, C, H, W)`` or points ``(n, D)``, labels as int64 ``(n,)``, and the number of levels."""
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"{where}: no rows")
    if y is not None:
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.shape != (len(x),) or y.dtype.kind not in "iub" or y.min() < 0 or y.max() >= 10**6:
            raise DataError(f"{where}: labels must be {len(x)} integers from 0 on, not {y.dtype} {y.shape}")
        y = y.astype(np.int64)
    if x.dtype.kind == "f" and x.ndim <= 2:
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
        if not np.isfinite(x).all():  # as float32: what float64 holds may be too large
            raise DataError(f"{where}: points that are not finite")
        return x, y, None
    if x.dtype not in (np.uint8, np.bool_) or x.ndim not in (3, 4):
        raise DataError(f"{where}: {x.dtype} {x.shape} is neither images (uint8, n x H x W [x C]) nor points (n x D)")
    levels = levels or (2 if x.dtype == np.bool_ else 256)
    if not 2 <= levels <= 256 or x.max() >= levels:
        raise DataError(f"{where}: values up to {int(x.max())} do not fit {levels} levels")
    if x.ndim == 3:
        x = x[:, None]
    else:
        first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first == last:
            raise DataError(f"{where}: cannot tell the channels of shape {x.shape}: exactly one end must be 1 or 3")
        x = x if first else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x, dtype=np.uint8), y, levels
