"""A user's folder of images, and what folders of any files have in common.

Layouts: files directly in the folder; a folder per class; either of them inside ``train/`` and, if there are any,
``val/`` (or ``valid``, ``validation``, ``dev``) and ``test/``. Splits that the user does not give are carved out of
train by a hash of each file's relative name, 10 % each, so that new files move no old one to another split.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gencli.console import DataError, say
from gencli.contract import DataSpec
from gencli.data.images import SUFFIXES, decode, header
from gencli.data.source import Array, Epoch, Source, TensorSource, checked
from gencli.data.table import SPLITS

__all__ = ["FolderSource", "Item", "classes_of", "count", "inspected", "listed", "load_folder", "threads", "without"]

IN_MEMORY = 256 * 2**20  # bytes of decoded pixels up to which a split is held in memory
R = TypeVar("R")
S = TypeVar("S")
WORST = 0.1  # the share of bad images from which on "skip" gives up
_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Item:
    """One file: its path, its name relative to the folder, and its class."""

    path: Path
    name: str
    group: str | None


def load_folder(root: Path, name: str, split: str, *, size: int | None, on_bad: str) -> Source:
    """The images of ``split`` below ``root``; ``size`` crops and resizes them to squares.

    Raises DataError where there are no images, one is bad (``on_bad = "fail"``) or more than 10 % are ("skip"), or they
    differ in size while no ``size`` is asked for.
    """
    splits = listed(root, SUFFIXES, "images")
    everything = [picture for part in SPLITS for picture in splits[part]]
    shapes, bad = inspected(everything, header, decode if on_bad == "skip" else None)
    splits = without(root, splits, bad, on_bad, "images")
    if not splits[split]:
        raise DataError(
            f"{root}: no images for {split} ({len(everything)} in all)", hint=f"make a folder {split}/ there"
        )
    shape = _common_shape(root, name, shapes, size)
    classes = classes_of(root, splits)
    spec = DataSpec(name=name, kind="image", shape=shape, levels=256, classes=classes, size=len(splits["train"]))
    source = FolderSource(name, split, spec, splits[split], size)
    if len(splits[split]) * spec.dims > IN_MEMORY:
        return source
    rows = source.rows(torch.arange(source.size))
    return TensorSource(name, split, spec, rows["x"], rows.get("label"))


class FolderSource:
    """Images that are decoded when they are asked for."""

    slow = True

    def __init__(self, name: str, split: str, spec: DataSpec, pictures: Sequence[Item], size: int | None) -> None:
        self.name, self.split, self.spec, self.size = name, split, spec, len(pictures)
        self._pictures, self._resize = pictures, size
        number = {group: k for k, group in enumerate(spec.classes)}
        self._label = torch.tensor([number.get(p.group or "", -1) for p in pictures])

    @property
    def digest(self) -> str:
        """Over relative names, file sizes and times of change: a folder this large is not read for it."""
        h = hashlib.sha256(f"{self.split} {self._resize}".encode())
        for p in self._pictures:
            stat = p.path.stat()
            h.update(f"|{p.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return h.hexdigest()[:16]

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`gencli.data.source.Source.rows`. DataError at an image that cannot be read."""
        checked(index, self.size)
        pictures = [self._pictures[i] for i in index.tolist()]
        x = torch.empty(len(pictures), *self.spec.shape, dtype=torch.uint8)
        for i, a in enumerate(threads(self._decode, pictures)):
            x[i] = torch.from_numpy(a)
        return {"x": x, "label": self._label[index]} if self.spec.classes else {"x": x}

    def _decode(self, p: Item) -> Array:
        a = decode(p.path, str(p.path), channels=self.spec.shape[0], size=self._resize)
        if a.shape != self.spec.shape:
            raise DataError(f"{p.path}: {_extent(a.shape)}, but its header said {_extent(self.spec.shape)}")
        return a


def _extent(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"


def _common_shape(
    root: Path, name: str, shapes: dict[str, tuple[int, int, int]], size: int | None
) -> tuple[int, int, int]:
    """The shape of every row: RGB as soon as one image is."""
    channels = max(shape[0] for shape in shapes.values())
    if size is not None:
        return channels, size, size
    usual = Counter(shape[1:] for shape in shapes.values()).most_common(1)[0][0]
    for file, shape in shapes.items():
        if shape[1:] != usual:
            raise DataError(
                f"{root / file}: {_extent(shape)} pixels, while most images are {_extent(usual)}",
                hint=f"--data {name}:{int(np.min(usual))} crops and resizes all of them",
            )
    return channels, *usual


# ---------------------------------------------------------------------------------------------- any files


def count(root: Path, suffixes: tuple[str, ...]) -> int:
    """How many files below ``root`` have one of these endings."""
    return len(_walk(root, suffixes))


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Relative names ('/' between parts) of all files below ``root`` with these endings, sorted; no hidden ones."""
    names, seen = [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back up
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if "run.json" in files:  # a run that was trained here: its pictures are no data
            below.clear()
            continue
        below[:] = sorted(d for d in below if not d.startswith("."))
        for file in files:
            if file.lower().endswith(suffixes) and not file.startswith("."):
                names.append(Path(folder, file).relative_to(root).as_posix())
    return sorted(names)


def listed(root: Path, suffixes: tuple[str, ...], what: str) -> dict[str, list[Item]]:
    """The files (``what``: "images", say) of each split. DataError where there are none or a class is missing."""
    names = _walk(root, suffixes)
    if not names:
        raise DataError(f"{root}: no {what} in this folder", hint=f"files that end in {' '.join(suffixes)} count")
    top = {name.partition("/")[0] for name in names if "/" in name}
    given: dict[str, list[str]] = {part: [] for part in SPLITS}
    if "train" in top:
        for name in names:
            part, _, rest = name.partition("/")
            if not rest or part not in _ALIASES:
                raise DataError(f"{root}: {name} is in none of the folders train, val and test")
            given[_ALIASES[part]].append(name)
        depth = 1
    else:
        given["train"], depth = names, 0
    carved = _carve(given["train"], [part for part in ("val", "test") if not given[part]])
    splits = {part: [_item(root, n, depth) for n in sorted(carved.get(part, given[part]))] for part in SPLITS}
    grouped = {item.group is not None for part in SPLITS for item in splits[part]}
    if len(grouped) > 1:
        odd = next(item for part in SPLITS for item in splits[part] if item.group is None)
        raise DataError(f"{root}: {odd.name} is in no class folder while other {what} are")
    return splits


def _item(root: Path, name: str, depth: int) -> Item:
    parts = name.split("/")[depth:]
    return Item(root / name, name, parts[0] if len(parts) > 1 else None)


def _carve(names: list[str], missing: list[str]) -> dict[str, list[str]]:
    """``names`` divided into train and the ``missing`` splits, a tenth each, by the hash of the name."""
    rank = {n: int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") / 2**64 for n in names}
    parts: dict[str, list[str]] = {"train": [], **{part: [] for part in missing}}
    for n in names:
        tenth = int(rank[n] * 10)
        parts[missing[tenth] if tenth < len(missing) else "train"].append(n)
    if not all(parts.values()) and len(names) > len(missing):  # too few for chance: share them out by rank
        order = sorted(names, key=rank.__getitem__)
        parts = {part: [order[i]] for i, part in enumerate(missing)} | {"train": order[len(missing) :]}
    return parts


def threads(work: Callable[[Item], R], items: Sequence[Item]) -> list[R]:
    """``work`` on every item, in order; decoders release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def inspected(
    items: Sequence[Item], header: Callable[[Path, str], S], thorough: Callable[[Path, str], Any] | None
) -> tuple[dict[str, S], dict[str, str]]:
    """The headers of the good files and what is wrong with the bad ones, by name; ``thorough`` decodes all of each."""

    def look(item: Item) -> tuple[S | None, str]:
        try:
            if thorough is not None:
                thorough(item.path, str(item.path))
            return header(item.path, str(item.path)), ""
        except DataError as e:
            return None, str(e)

    found = dict(zip([item.name for item in items], threads(look, items)))
    heads = {name: head for name, (head, _) in found.items() if head is not None}
    return heads, {name: reason for name, (head, reason) in found.items() if head is None}


def without(
    root: Path, splits: dict[str, list[Item]], bad: dict[str, str], on_bad: str, what: str
) -> dict[str, list[Item]]:
    """``splits`` without the ``bad`` files. DataError if ``on_bad`` is "fail", or more than 10 % are bad."""
    if bad:
        first, reason = next(iter(bad.items()))
        total = sum(map(len, splits.values()))
        if on_bad == "fail" or len(bad) > WORST * total:
            hint = f"data.on_bad=skip leaves out up to 10 % of {what}" if on_bad == "fail" else "more than 10 % are bad"
            raise DataError(f"{reason} ({len(bad)} of {total} {what} in {root} are bad)", hint=hint)
        say(f"{root}: left out {len(bad)} of {total} {what}, the first {first}")
    return {part: [item for item in splits[part] if item.name not in bad] for part in SPLITS}


def classes_of(root: Path, splits: dict[str, list[Item]]) -> tuple[str, ...]:
    """The classes of train. DataError where another split has one that train has not."""
    classes = tuple(sorted({item.group for item in splits["train"] if item.group is not None}))
    for item in (item for part in SPLITS for item in splits[part]):
        if item.group is not None and item.group not in classes:
            raise DataError(f"{root}: the class {item.group!r} of {item.name} is not among the classes of train")
    return classes
