"""The weights of the Inception network: found, downloaded, converted.

They are kept as safetensors in the user's cache folder. Files of ``torch.save`` are read as data (``pickles.py``).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from torch import Tensor

from gencli import files, pickles, processes
from gencli.archives import content, shown
from gencli.console import DataError, say
from gencli.data.standard import Download, fetch
from gencli.header import MAX_HEADER

__all__ = ["ADDRESSES", "cached", "inception_weights", "packed"]

MOST = 512 << 20  # bytes of a file of weights
SIZE = 95_628_359  # bytes of the file at these addresses
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADDRESSES = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
HINT = f"download {ADDRESSES[0]} elsewhere and name it: --extractor-weights FILE"


def cached() -> Path:
    """Where the weights are kept once they have been downloaded."""
    return files.cache_folder() / "inception-2015-12-05.safetensors"


def inception_weights(file: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, float32, and their SHA-256: that of the file that gencli keeps, whatever format they came in.

    ``file`` is a ``.safetensors`` file or one of ``torch.save``; without it the cached file is read, and made of a
    download where it is missing. Counters of batches are left out. DataError, naming the file, for what cannot be had
    or is bad.
    """
    path = file or Path(processes.first(_kept))
    if not path.exists():
        raise DataError(f"{path}: no such file", hint=HINT)
    data = content(path, MOST)
    tensors = _safetensors(data, path) if path.suffix == ".safetensors" else pickles.tensors(data, str(path))
    weights = _plain(tensors, path)
    return weights, hashlib.sha256(packed(weights)).hexdigest()


def _plain(tensors: Mapping[str, Tensor], name: object) -> dict[str, Tensor]:
    weights = {k: t.float().contiguous() for k, t in tensors.items() if not k.endswith("num_batches_tracked")}
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise DataError(f"{name}: {shown(key)} is not finite")
    return weights


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of float32 tensors; written here so that no version of a library changes a byte of it."""
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(weights):
        start, end = end, end + 4 * weights[name].numel()
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [start, end]}
    head = files.canonical(header).encode()
    head = head.ljust(len(head) + -len(head) % 8)
    values = (weights[name].contiguous().numpy().tobytes() for name in sorted(weights))
    return b"".join([struct.pack("<Q", len(head)), head, *values])


def _safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if int.from_bytes(data[:8], "little") > MAX_HEADER:  # the library would parse 100 MB
        raise DataError(f"{path}: not a safetensors file, or one with a header of more than {MAX_HEADER >> 20} MB")
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {shown(str(error))}") from None


def _kept() -> str:
    """The path of the cached weights, which are there."""
    path = cached()
    if not path.is_file():
        missing = f"{path}: the Inception network's weights are not there"
        if not os.access(next(f for f in path.parents if f.exists()), os.W_OK):
            raise DataError(f"{missing}, and cannot be put there: the folder is read-only", hint=HINT)
        data = packed(_plain(pickles.tensors(*_downloaded(missing)), path))
        try:
            files.write_bytes(path, data)
        except OSError as error:
            raise DataError(f"{missing}, and cannot be put there ({error.strerror or error})", hint=HINT) from error
    return str(path)


def _downloaded(missing: str) -> tuple[bytes, str]:
    """The published file and the address that it came from."""
    for address in ADDRESSES:
        say(f"downloading {address} ({SIZE / 1e6:.0f} MB, once)")
        try:
            return fetch(Download(address, f"sha256:{SHA256}"), SIZE, HINT), address
        except (OSError, HTTPException) as error:
            fault: Exception = error
    hosts = " and ".join(ADDRESSES)
    raise DataError(f"{missing}, and cannot be downloaded from {hosts} ({fault})", hint=HINT) from fault
