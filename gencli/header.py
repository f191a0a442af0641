"""The header of a safetensors file, read with suspicion and without torch.

The library accepts headers of 100 MB (which take it a minute and 2 GB), duplicate keys and unknown fields. Here a
file that gencli did not write, or that anything has touched since, is refused before a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from math import prod
from pathlib import Path
from typing import Any

from gencli.console import DataError

__all__ = ["DTYPES", "MAX_HEADER", "MAX_TENSORS", "Header", "parse_json", "read_header", "short"]

MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS = 100_000
MAX_DIMS = 64  # torch's own limit

Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype as in DTYPES, shape)

# dtype as the format names it -> (bytes an element, torch's name)
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
}


def short(name: object, length: int = 60) -> str:
    """``name`` quoted for a one-line message, however long or strange it is."""
    text = repr(name)
    return text if len(text) <= length else f"{text[:length]}..."


def parse_json(text: str) -> Any:
    """JSON without duplicate keys, NaN or infinities; ValueError with a short reason otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"duplicate key {short(key)}")
            found[key] = value
        return found

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def real(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            raise ValueError(f"the number {short(digits)} is too large")
        return number

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=real)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _layout(entries: dict[str, Any], data: int) -> Header:
    """Check every entry against the ``data`` bytes that follow the header; ValueError with the reason."""
    tensors: Header = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        where = f"tensor {short(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{where} has unknown dtype {short(dtype)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_natural, shape)):
            raise ValueError(f"{where} has a bad shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
            raise ValueError(f"{where} has bad offsets")
        if offsets[1] - offsets[0] != prod(shape) * DTYPES[dtype][0]:
            raise ValueError(f"{where} has offsets that do not fit its shape")
        tensors[name] = (dtype, tuple(shape))
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"a {'hole' if start > end else 'overlap'} before tensor {short(name)}")
        end = stop
    if end != data:
        raise ValueError(f"{abs(data - end)} bytes {'too many' if data > end else 'missing'} at the end")
    return tensors


def _read(path: Path) -> tuple[dict[str, Any], Header]:
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a FIFO would wait for ever
        raise ValueError("is a folder, not a file" if path.is_dir() else "is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10:
            raise ValueError(f"too short for a safetensors file ({size} bytes)")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes, more than the {MAX_HEADER} that gencli reads")
        if length > size - 8:
            raise ValueError("truncated in its header")
        raw = file.read(length)
    if (count := raw.count(b'"dtype"')) > MAX_TENSORS:  # cheaper than to parse them; escapes evade it, up to MAX_HEADER
        raise ValueError(f"{count} tensors, more than the {MAX_TENSORS} that gencli reads")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None
    entries = parse_json(text)
    if not isinstance(entries, dict) or not text.startswith("{"):
        raise ValueError("the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the header's __metadata__ is not text")
    tensors = _layout(entries, size - 8 - length)
    if "gencli" not in metadata:
        raise ValueError("not written by gencli (no 'gencli' in its metadata)")
    try:
        meta = parse_json(metadata["gencli"])
    except ValueError as error:
        raise ValueError(f"gencli metadata: {error}") from None
    if not isinstance(meta, dict):
        raise ValueError("gencli metadata: not a JSON object")
    return meta, tensors


def read_header(path: Path | str) -> tuple[dict[str, Any], Header]:
    """The gencli metadata of a safetensors file, and its tensors (:data:`Header`).

    Reads no tensor. DataError, naming the file and the reason, for whatever is not exactly a file of gencli's.
    """
    path = Path(path)
    try:
        return _read(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", hint="gencli runs") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
