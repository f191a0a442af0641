"""Data larger than a machine: tar shards with an index, in a folder or behind a URL.

::

    shards.json          what the rows are and which shards hold them; written last, so that a folder with it is whole
    train-000000.tar     00000000.png (.npy for what no PNG can hold) and 00000000.cls, the label: tar and WebDataset
    train-000000.index   a record of 40 bytes for each row of that shard (also val-..., test-...)

A record is four little-endian fields: the offset (uint64) and length (uint64) of the row's data in the tar, the label
(int64, -1 for none) and the first 16 bytes of the data's SHA-256. Records are of one size, so an index can be read by
memory map. ``shards.json`` holds the SHA-256 of every index and each index that of its rows, so the digest of a source
stands for all bytes that are ever decoded.

Rows are read where they lie; nothing is extracted. val and test keep the order of their source. train is packed in
strides of the golden ratio, so that every shard is a fair sample of the source: a few shards at a time are what
training mixes (:mod:`gencli.training.batches`), and sources are often sorted by class.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import stat
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gencli import archives, pictures
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data.images import decode
from gencli.data.source import Array, Epoch, checked
from gencli.data.table import SPLITS

__all__ = [
    "Manifest",
    "Shard",
    "ShardSource",
    "encode",
    "ending",
    "fault_of",
    "holds_shards",
    "load_shards",
    "open_at",
    "row_dtype",
]

MANIFEST = "shards.json"
RECORD = struct.Struct("<QQq16s")
ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8"), ("label", "<i8"), ("sha256", "V16")])
MOST_ROWS, MOST_MANIFEST = 1 << 20, 64 << 20  # what is believed of a shard's rows and of the manifest's bytes
OPEN, HELD = 64, 1 << 17  # shards that are open at once, and rows of their indexes in memory: two windows of training
LOCAL, REMOTE = min(8, os.cpu_count() or 1), 32  # threads that decode, and that wait for a network


# ---------------------------------------------------------------------------------------------- the manifest


class Shard(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    bytes: Annotated[int, Field(ge=1, le=2**60)]
    index_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["gencli shards 1"] = "gencli shards 1"
    spec: DataSpec
    shards: dict[str, list[Shard]]


def _parsed(data: bytes, where: str) -> Manifest:
    try:
        found = Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {archives.shown(place + ': ' if place else '')}{first['msg'][:200]}") from None
    if fault := fault_of(found):
        raise DataError(f"{where}: {fault}")
    return found


def fault_of(manifest: Manifest) -> str | None:
    """Why no packer can have written ``manifest``."""
    spec = manifest.spec
    if not 1 <= len(spec.shape) <= 4 or min(spec.shape) < 1 or math.prod(spec.shape) > archives.MEMBER:
        return f"rows of shape {archives.shown(str(spec.shape))}"
    if (spec.levels is None) != (spec.kind == "points") or not 2 <= (spec.levels or 2) <= 2**15:
        return f"{spec.kind} of {archives.shown(str(spec.levels))} levels"
    if spec.kind == "image" and len(spec.shape) != 3:
        return "images have three dimensions: channels, height and width"
    if spec.vocabulary and len(spec.vocabulary) != spec.levels:
        return f"a vocabulary of {len(spec.vocabulary)} for {spec.levels} levels"
    if spec.rate is not None and spec.rate < 1:
        return f"a rate of {spec.rate}"
    for split, shards in manifest.shards.items():
        if split not in SPLITS:
            return f"a split {archives.shown(repr(split))}"
        for i, shard in enumerate(shards):
            if shard.file != f"{split}-{i:06}.tar":  # so no name leads out of the folder
                return f"shard {i} of {split} is called {archives.shown(shard.file)} and not {split}-{i:06}.tar"
    if spec.size != sum(shard.rows for shard in manifest.shards.get("train", ())):
        return "its shards do not add up to the rows that it says there are in train"
    return None


# ---------------------------------------------------------------------------------------------- files


class _File(Protocol):
    """What a shard is read through; any number of threads may."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from ``offset`` on, fewer than ``length`` at the end of the file."""
        ...


class _Local:
    """A regular file, held open as long as somebody holds this; a link could lead out of the folder and is refused."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _Remote:
    """A file behind a URL, read in ranges."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._system, self._path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            hint = "pip install 'gencli[remote]', and the package that the error names"
            raise UsageError(f"{url}: {_reason(error)}", hint=hint) from None
        self.size = int(self._system.size(self._path))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._system.cat_file(self._path, start=offset, end=offset + length))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link, which could lead out of the folder"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return archives.shown(" ".join(text.split())) or type(error).__name__


def open_at(root: str, name: str) -> _File:
    """The file ``name`` of the folder ``root``: a path, or a URL that fsspec knows, such as ``s3://bucket/shards``.

    DataError if it cannot be opened, UsageError if fsspec or what it needs for such a URL is not installed.
    """
    where = f"{root.rstrip('/')}/{name}"
    try:
        return _Remote(where) if "://" in root else _Local(where)
    except (DataError, UsageError):
        raise
    except Exception as error:  # every kind of storage has errors of its own
        raise DataError(f"{where}: {_reason(error)}") from error


def _read(file: _File, where: str, offset: int, length: int) -> bytes:
    """Exactly ``length`` bytes."""
    try:
        data = file.read(offset, length)
    except Exception as error:  # as above
        raise DataError(f"{where}: cannot be read: {_reason(error)}") from error
    if len(data) != length:
        raise DataError(f"{where}: cut off: {len(data)} bytes of {length}")
    return data


# ---------------------------------------------------------------------------------------------- rows to bytes and back


def row_dtype(spec: DataSpec) -> np.dtype[Any]:
    if spec.levels is None:
        return np.dtype("<f4")
    return np.dtype("<i2" if spec.levels > 256 or spec.kind == "text" else "u1")


def _pictured(spec: DataSpec) -> bool:
    """Whether a row fits a PNG of 8 bits."""
    return spec.kind == "image" and (spec.levels or 0) in range(2, 257) and spec.shape[0] in (1, 3)


def ending(spec: DataSpec) -> str:
    return ".png" if _pictured(spec) else ".npy"


def encode(x: Array, spec: DataSpec) -> bytes:
    if _pictured(spec):
        b = pictures.to_bytes(x, spec.levels or 256)
        return pictures.png(b[0] if len(b) == 1 else b.transpose(1, 2, 0))
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(x, row_dtype(spec)), allow_pickle=False)
    return file.getvalue()


def _decode(data: bytes, spec: DataSpec, where: str) -> Array:
    """The row that :func:`encode` made ``data`` from; DataError if ``data`` is none of ``spec``."""
    if _pictured(spec):
        height, width = spec.shape[1:]
        if data[:4] != b"\x89PNG" or data[16:24] != struct.pack(">II", width, height):  # before memory is taken for it
            raise DataError(f"{where}: no PNG of {width} x {height} pixels")
        x = decode(data, where)
        if x.shape != spec.shape:
            raise DataError(f"{where}: {x.shape[0]} channels instead of {spec.shape[0]}")
        levels = spec.levels or 256
        return x if levels == 256 else np.rint(x * ((levels - 1) / 255)).astype(np.uint8)
    x = archives.array(data, where)
    if x.shape != spec.shape or x.dtype != row_dtype(spec):
        raise DataError(f"{where}: {x.dtype} {x.shape} instead of {row_dtype(spec)} {spec.shape}")
    if spec.levels is None:
        if not np.isfinite(x).all():
            raise DataError(f"{where}: values that are not finite")
    elif x.min() < 0 or x.max() >= spec.levels:
        raise DataError(f"{where}: values from {x.min()} to {x.max()} do not fit {spec.levels} levels")
    return x


# ---------------------------------------------------------------------------------------------- reading


class _Opened(NamedTuple):
    file: _File
    entries: Array  # ENTRY, one a row


class ShardSource:
    """Rows that lie in shards and are read, verified and decoded when they are asked for. Threads may share one.

    ``windows`` are the ends of its shards, the last being ``size``: rows that lie together, see
    :class:`gencli.training.batches.Batches`.
    """

    slow = True

    def __init__(self, root: str, name: str, split: str, manifest: Manifest, digest: str) -> None:
        self.root, self.name, self.split, self.digest = root, name, split, digest
        self.spec = manifest.spec.model_copy(update={"name": name})
        self._shards = manifest.shards.get(split, [])
        self.windows = np.cumsum([shard.rows for shard in self._shards], dtype=np.int64)
        self.size = int(self.windows[-1])
        self._open: dict[int, _Opened] = {}  # the one used last comes last
        self._lock = threading.Lock()
        self._threads = REMOTE if "://" in root else LOCAL

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`gencli.data.source.Source.rows`.

        DataError naming shard and member where a file is gone or cut off, or data is not what was packed.
        """
        places = checked(index, self.size).numpy()
        shards = np.searchsorted(self.windows, places, side="right")
        x = np.empty((len(places), *self.spec.shape), row_dtype(self.spec))
        label = np.empty(len(places), np.int64)

        def read(part: Array) -> None:
            for i in part.tolist():
                x[i], label[i] = self._row(int(shards[i]), int(places[i]))

        order = np.argsort(places, kind="stable")  # shard after shard, from front to back
        parts = [part for part in np.array_split(order, self._threads) if len(part)]
        if len(parts) == 1:
            read(parts[0])
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(read, parts))
        fields = {"x": torch.from_numpy(x)}
        return fields | {"label": torch.from_numpy(label)} if self.spec.classes else fields

    def _row(self, s: int, place: int) -> tuple[Array, int]:
        """(x, label) of row ``place``, which is in shard ``s``."""
        opened = self._opened(s)
        entry = opened.entries[place - int(self.windows[s]) + self._shards[s].rows]
        where = f"{self.root}/{self._shards[s].file}: {place:08}{ending(self.spec)}"
        data = _read(opened.file, where, int(entry["offset"]), int(entry["length"]))
        if hashlib.sha256(data).digest()[:16] != entry["sha256"].tobytes():
            raise DataError(f"{where} is damaged: its SHA-256 is not the index's")
        return _decode(data, self.spec, where), int(entry["label"])

    def _opened(self, s: int) -> _Opened:
        with self._lock:
            # one that falls out is closed when the last thread that reads from it lets go
            opened = self._open.pop(s, None) or self._checked(s)
            self._open[s] = opened
            while len(self._open) > 1 and (
                len(self._open) > OPEN or sum(self._shards[other].rows for other in self._open) > HELD
            ):
                del self._open[next(iter(self._open))]
            return opened

    def _checked(self, s: int) -> _Opened:
        """Shard ``s``, opened, with an index that can be trusted to stay inside of it."""
        shard = self._shards[s]
        name = Path(shard.file).with_suffix(".index").name
        file, index, where = open_at(self.root, shard.file), open_at(self.root, name), f"{self.root}/{name}"
        self._whole(shard, file)
        if index.size != shard.rows * RECORD.size:
            raise DataError(f"{where} has {index.size} bytes, and {shard.rows} rows make {shard.rows * RECORD.size}")
        data = _read(index, where, 0, index.size)
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise DataError(f"{where} is damaged: its SHA-256 is not that of {MANIFEST}")
        entries = np.frombuffer(data, ENTRY)
        offset, length, label = entries["offset"], entries["length"], entries["label"]
        if offset.max() > shard.bytes or length.max() > archives.MEMBER or length.min() < 1:
            raise DataError(f"{where}: rows outside of {shard.file}, empty, or of more than {archives.MEMBER >> 20} MB")
        end = offset + length
        if end[-1] > shard.bytes or offset[0] < archives.BLOCK or (end[:-1] > offset[1:]).any():
            raise DataError(f"{where}: rows that overlap or lie outside of {shard.file}")
        low, high = (0, len(self.spec.classes) - 1) if self.spec.classes else (-1, -1)
        if label.min() < low or label.max() > high:
            raise DataError(f"{where}: labels from {label.min()} to {label.max()} instead of {low} to {high}")
        return _Opened(file, entries)

    def _whole(self, shard: Shard, file: _File) -> None:
        if file.size != shard.bytes:
            raise DataError(f"{self.root}/{shard.file} has {file.size} bytes, and {MANIFEST} says {shard.bytes}")

    def check(self) -> None:
        """DataError if a shard is missing or of another size than it was packed with: before a run begins."""
        for shard in self._shards:
            self._whole(shard, open_at(self.root, shard.file))


def holds_shards(path: Path) -> bool:
    """Whether ``path`` is a folder of shards, finished or not."""
    return any((path / name).is_file() for name in (MANIFEST, "train-000000.tar"))


def load_shards(root: str, name: str, split: str) -> ShardSource:
    """The rows of ``split`` in the packed folder ``root``, a path or a URL.

    Raises DataError if the manifest is missing (the packing was cut off) or bad, or a shard is not as long as it says;
    a URL's shards are looked at one by one when their turn comes.
    """
    local = "://" not in root
    root = os.path.abspath(root) if local else root.rstrip("/")
    where = f"{root}/{MANIFEST}"
    if local and not os.path.lexists(where):
        raise DataError(
            f"{root} has shards but no {MANIFEST}: its packing was cut off, or another program wrote it",
            hint="delete it, and gencli data pack again",
        )
    file = open_at(root, MANIFEST)
    if file.size > MOST_MANIFEST:
        raise DataError(f"{where} has more than {MOST_MANIFEST >> 20} MB")
    data = _read(file, where, 0, file.size)
    manifest = _parsed(data, where)
    if not manifest.shards.get(split):
        raise DataError(f"{root} has no rows for {split}")
    source = ShardSource(root, name, split, manifest, hashlib.sha256(split.encode() + b"|" + data).hexdigest()[:16])
    if local:
        source.check()
    return source
