"""Tensors out of a file of ``torch.save``, whose pickle is read as data and never run.

A pickle is a program for a small machine that can import and call anything. Here its instructions are listed by
``pickletools`` and the few that a plain dictionary of tensors needs are carried out by hand: nothing is imported, and
no name in the file leads to a call but two that are known. Whatever else a file asks for ends the reading with its
name. Both formats are known: the zip archive, and before torch 1.6 pickles and raw numbers one after another.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencli.archives import shown
from gencli.console import DataError

__all__ = ["tensors"]

MOST = 512 << 20  # bytes of all tensors together
PICKLE, STEPS = 4 << 20, 100_000  # bytes and instructions of one pickle
MEMBERS = 20_000  # of an archive
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format
HINT = (
    "if you trust it, convert it once: python -c 'import sys, torch, safetensors.torch as s; "
    "s.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])' FILE FILE.safetensors"
)
DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


@dataclass(frozen=True, eq=False)
class _Name:
    """A name that stands for itself: nothing is imported."""

    text: str


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _View:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize


def tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors, by their names, of the file ``name`` with the bytes ``data``.

    DataError, naming the file and what it asks for, unless it is a plain dictionary of tensors.
    """
    try:
        return _archive(data) if data[:2] == b"PK" else _stacked(data)
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, KeyError, OSError) as error:
        raise DataError(f"{name} is damaged: {shown(str(error)) or type(error).__name__}", hint=HINT) from None
    except (ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{name}: {shown(str(error))}", hint=HINT) from None


def _archive(data: bytes) -> dict[str, Tensor]:
    """A zip archive: ``NAME/data.pkl`` and one uncompressed ``NAME/data/KEY`` for each storage."""
    if data.count(b"PK\1\2") > MEMBERS:  # before the library makes an object of each
        raise ValueError(f"an archive of more than {MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:

        def member(name: str, size: int | None = None) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise ValueError(f"{name} is compressed, which torch.save never does")
            content = archive.read(info)
            if size not in (None, len(content)):
                raise ValueError(f"{name} has {len(content)} bytes, not {size}")
            return content

        roots = [n.removesuffix("/data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} members data.pkl: not an archive of torch.save")
        root, storages = roots[0], _Storages(len(data))
        if f"{root}/byteorder" in archive.namelist() and member(f"{root}/byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        value, _ = _value(member(f"{root}/data.pkl"), 0, storages)
        views = _views(value)
        return _tensors(views, {s: member(f"{root}/data/{s.key}", s.bytes) for s in storages.values()})


def _stacked(data: bytes) -> dict[str, Tensor]:
    """Pickles one after another: a magic number, a version, the machine, the value, keys; then the storages."""
    if data[:2] not in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
        raise ValueError("not a file of torch.save")
    magic, at = _value(data, 0)
    if magic != MAGIC:
        raise ValueError("a pickle, but not of torch.save")
    version, at = _value(data, at)
    if version != PROTOCOL:
        raise ValueError("not the format of torch.save that is known")
    machine, at = _value(data, at)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    storages = _Storages(len(data))
    value, at = _value(data, at, storages)
    views = _views(value)
    keys, at = _value(data, at)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise ValueError("its list of storages is not that of its tensors")
    raw = {}
    for key in keys:
        storage, at = storages[key], at + 8
        end = at + storage.bytes
        if int.from_bytes(data[at - 8 : at], "little") != storage.numel or end > len(data):
            raise ValueError(f"cut off, or damaged, at storage {key}")
        raw[storage], at = data[at:end], end
    return _tensors(views, raw)


class _Storages(dict[str, _Storage]):
    """The storages that a pickle names, which together are no larger than its file."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def __call__(self, said: Any) -> _Storage:
        """What a persistent id means: ("storage", type, key, device, number of elements[, None])."""
        if type(said) is not tuple or len(said) not in (5, 6) or said[5:] not in ((), (None,)):
            raise ValueError("a persistent id that is no storage")
        kind, dtype, key, _, numel = said[:5]
        if kind != "storage" or type(dtype) is not _Name or dtype.text not in DTYPES:
            raise ValueError("a persistent id that is no storage")
        if type(key) is not str or not _natural(numel):
            raise ValueError("a persistent id that is no storage")
        storage = _Storage(key, DTYPES[dtype.text], numel)
        before = self.setdefault(key, storage)
        if (before.dtype, before.numel) != (storage.dtype, numel):
            raise ValueError(f"storage {key} is said to be two different things")
        if before is storage:
            self.room -= storage.bytes
        if self.room < 0:
            raise ValueError(f"cut off: storage {key} is larger than what the file holds")
        return before


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _view(said: Any) -> _View:
    """The arguments (storage, offset, size, stride, requires_grad, hooks[, metadata]) as a view inside its storage."""
    if type(said) is not tuple or len(said) not in (6, 7) or type(said[0]) is not _Storage:
        raise ValueError("a tensor made of something else than a storage")
    storage, offset, size, stride = said[:4]
    lists = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= 64
    if not lists or not all(map(_natural, (offset, *size, *stride))):
        raise ValueError("a tensor with a bad shape")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if numel else -1
    if last >= storage.numel or numel > storage.numel:
        raise ValueError("a tensor beyond its storage")
    return _View(storage, offset, size, stride)


def _views(value: Any) -> dict[str, _View]:
    if type(value) is not dict or not value or not all(type(view) is _View for view in value.values()):
        raise ValueError("not a plain dictionary of tensors")
    if not all(name.isprintable() for name in value):
        raise ValueError("a tensor whose name is no text")
    if sum(view.bytes for view in value.values()) > MOST:
        raise ValueError(f"tensors of more than {MOST >> 20} MB")
    return value


def _tensors(views: dict[str, _View], raw: dict[_Storage, bytes]) -> dict[str, Tensor]:
    made = {
        storage: torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
        for storage, data in raw.items()
    }
    return {name: made[v.storage].as_strided(v.size, v.stride, v.offset) for name, v in views.items()}


def _nothing(said: Any) -> Any:
    raise ValueError("a persistent id where none belongs")


def _value(data: bytes, at: int, storage: Callable[[Any], Any] = _nothing) -> tuple[Any, int]:
    """The value of the pickle that begins at ``at``, and where it ends. ValueError names what is not allowed."""
    window = io.BytesIO(data[at : at + PICKLE])
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(n: int) -> list[Any]:
        if not 0 <= n <= len(stack) - (marks[-1] if marks else 0):
            raise ValueError("a damaged pickle: it takes what is not there")
        taken = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return taken

    def since_mark() -> list[Any]:
        return take(len(stack) - marks.pop() if marks else -1)

    def of(kind: type) -> Any:
        """The value on top, which stays."""
        if not stack or type(stack[-1]) is not kind:
            raise ValueError(f"a damaged pickle: no {kind.__name__} where one belongs")
        return stack[-1]

    for step, (op, arg, _) in enumerate(pickletools.genops(window)):
        if step >= STEPS:
            raise ValueError(f"a pickle of more than {STEPS} instructions")
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return take(1)[0], at + window.tell()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = 0 if op.name == "EMPTY_TUPLE" else int(op.name[-1])
                stack.append(tuple(take(n)))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = take(1) if op.name == "APPEND" else since_mark()
                of(list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = take(2) if op.name == "SETITEM" else since_mark()
                if len(items) % 2 or not all(type(key) is str for key in items[::2]):
                    raise ValueError("a dictionary whose keys are not text")
                of(dict).update(zip(items[::2], items[1::2]))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if arg is None else arg] = stack[-1] if stack else take(1)
            case "BINGET" | "LONG_BINGET":
                if arg not in memo:
                    raise ValueError("a damaged pickle: it recalls what it never kept")
                stack.append(memo[arg])
            case "GLOBAL" | "STACK_GLOBAL":
                name = str(arg) if op.name == "GLOBAL" else " ".join(p if type(p) is str else "?" for p in take(2))
                if name not in DTYPES and name not in (DICT, REBUILD):
                    raise ValueError(f"its pickle asks for {shown(name.replace(' ', '.'))}, which is not run")
                stack.append(_Name(name))
            case "BINPERSID":
                stack.append(storage(take(1)[0]))
            case "REDUCE":
                function, given = take(2)
                if type(function) is not _Name or function.text not in (DICT, REBUILD):
                    raise ValueError("its pickle calls what is no known function (REDUCE)")
                if function.text == DICT and given != ():
                    raise ValueError("its pickle calls OrderedDict with arguments (REDUCE)")
                stack.append({} if function.text == DICT else _view(given))
            case "BUILD":  # a module's state has the versions of its parts as an attribute, which are not needed
                take(1)
                of(dict)
            case _:
                raise ValueError(f"its pickle has the instruction {op.name}, which a dictionary of tensors needs not")
    raise ValueError("a damaged pickle")
