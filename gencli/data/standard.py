"""Standard image sets, read as they lie below a root folder in torchvision's layout.

The official train rows are divided into train and val by a fixed permutation; test is the official one. Archives are
read in memory: the folder is written to only to download what is missing, whole files whose checksum is known.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from gencli import files
from gencli.console import DataError, say
from gencli.contract import DataSpec
from gencli.data.source import Array, TensorSource, carve
from gencli.data.table import SetEntry

__all__ = ["Download", "fetch", "load_standard", "root_folder"]

MOST = 512 * 2**20  # no file of these sets is larger, packed or unpacked
Rows = tuple[Array, Array]  # uint8 (n, C, H, W), int64 (n,)


@dataclass(frozen=True)
class Download:
    """A file on the web: its address, its checksum ("sha256:..." or "md5:...") and, of a tar, the members wanted."""

    url: str
    checksum: str
    members: tuple[str, ...] = ()


def root_folder(root: Path | str | None) -> Path:
    """Where standard sets lie: ``root``, else ``$GENCLI_DATA``, else the user's cache folder."""
    return Path(root or os.environ.get("GENCLI_DATA") or files.cache_folder()).expanduser()


def load_standard(entry: SetEntry, name: str, split: str, root: Path | str | None) -> TensorSource:
    """One split of a standard set of images below ``root`` (see :func:`root_folder`).

    DataError, naming the folder looked in, where the files are neither there nor to be had from the web, or are bad.
    """
    folder = root_folder(root)
    train, val, test = entry.sizes or (0, 0, 0)
    x, label = _READERS[entry.name](folder, "test" if split == "test" else "train")
    if len(x) != (test if split == "test" else train + val):
        raise DataError(f"{folder}: {entry.name} holds {len(x)} rows, which is not its official number")
    if label.min() < 0 or label.max() >= len(entry.classes):
        raise DataError(f"{folder}: {entry.name} has labels outside 0 .. {len(entry.classes) - 1}")
    if split != "test":
        rows = carve(len(x), val, 0, entry.name, "split")[split]
        x, label = x[rows], label[rows]
    spec = DataSpec(name=name, kind="image", shape=entry.shape, levels=entry.levels, classes=entry.classes, size=train)
    return TensorSource(name, split, spec, torch.from_numpy(x), torch.from_numpy(label))


def _mnist(folder: str, url: str, checksums: dict[str, str]) -> Callable[[Path, str], Rows]:
    def read(root: Path, part: str) -> Rows:
        start = "t10k" if part == "test" else "train"
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            file = f"{start}-{kind}-ubyte"
            download = Download(f"{url}/{file}.gz", checksums[file])
            arrays.append(_idx(_find(root / folder / "raw", (file, f"{file}.gz"), f"{file}.gz", download)))
        x, label = arrays
        if x.shape[1:] != (28, 28) or label.shape != (len(x),):
            raise DataError(
                f"{root / folder / 'raw'}: images {x.shape} and labels {label.shape} do not belong together"
            )
        return x[:, None], label.astype(np.int64)

    return read


def _idx(path: Path) -> Array:
    """An IDX file of bytes: 0, 0, 8, number of dimensions, big-endian extents, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            data = f.read(MOST)
    except (OSError, EOFError) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e
    start = 4 + 4 * data[3] if len(data) > 4 else 4
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if data[:3] != b"\0\0\x08" or len(data) != start + math.prod(shape):
        raise DataError(f"{path}: not an IDX file of bytes, or cut off")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


def _cifar(
    folder: str, python: str, parts: dict[str, tuple[str, ...]], labels: int, download: Download
) -> Callable[[Path, str], Rows]:
    def read(root: Path, part: str) -> Rows:
        note = f" (the pickled version in {python} is never read)" if (root / python).is_dir() else ""
        rows = []
        for file in parts[part]:
            path = _find(root / folder, (file,), file, download, note)
            data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
            if data.size == 0 or data.size % (labels + 3072):
                raise DataError(f"{path}: not CIFAR's binary version, or cut off")
            rows.append(data.reshape(-1, labels + 3072))
        a = np.concatenate(rows)
        fine = a[:, labels - 1].astype(np.int64)  # CIFAR-100 puts the coarse label before it
        return a[:, labels:].reshape(-1, 3, 32, 32).copy(), fine

    return read


def _svhn(root: Path, part: str) -> Rows:
    from scipy.io import loadmat

    checksum = {"train": "md5:e26dedcc434d2e4c54c9b2d4a06d8373", "test": "md5:eb5a983be6a315427106f1b164d9cef3"}[part]
    file = f"{part}_32x32.mat"
    path = _find(root, (file,), file, Download(f"https://ufldl.stanford.edu/housenumbers/{file}", checksum))
    try:
        mat = loadmat(path, variable_names=["X", "y"])
        x, y = mat["X"].transpose(3, 2, 0, 1), mat["y"].reshape(-1)
    except Exception as e:  # loadmat raises what its parser happens to trip over
        raise DataError(f"{path}: not SVHN's cropped digits ({e})") from e
    return np.ascontiguousarray(x, dtype=np.uint8), y.astype(np.int64) % 10  # the file writes 10 for the digit 0


def _find(folder: Path, names: tuple[str, ...], fetched: str, download: Download, note: str = "") -> Path:
    """The first of ``names`` that lies in ``folder``; else ``fetched``, after the download."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    hint = "put the files there, or name the folder of all sets with --data-root or GENCLI_DATA"
    missing = f"{folder}: {fetched} is not there{note}"
    if not os.access(next(f for f in (folder, *folder.parents) if f.exists()), os.W_OK):
        raise DataError(f"{missing}, and cannot be put there: the folder is read-only", hint=hint)
    say(f"downloading {download.url} to {folder}")
    try:
        data = fetch(download, hint=hint)
    except (OSError, HTTPException) as e:
        raise DataError(f"{missing}, and cannot be downloaded ({e})", hint=hint) from e
    try:
        for name, content in _unpacked(folder.name, fetched, download, data):
            files.write_bytes(folder / name, content)
    except OSError as e:
        raise DataError(f"{missing}, and cannot be put there ({e})", hint=hint) from e
    return folder / fetched


def fetch(download: Download, most: int = MOST, hint: str = "") -> bytes:
    """The file on the web, of at most ``most`` bytes. DataError if another file than the known one came."""
    with urllib.request.urlopen(download.url, timeout=20) as response:
        data: bytes = response.read(most + 1)
    algorithm, _, expected = download.checksum.partition(":")
    if len(data) > most or hashlib.new(algorithm, data).hexdigest() != expected:
        raise DataError(f"{download.url}: what came is not the known file ({algorithm} differs)", hint=hint)
    return data


def _unpacked(folder: str, fetched: str, download: Download, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The files in ``data``: itself, or the wanted members of a tar, by names of ours (its own are not trusted)."""
    if not download.members:
        yield fetched, data
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in download.members:
            content = tar.extractfile(f"{folder}/{member}")
            if content is not None:
                yield member, content.read()


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_READERS: dict[str, Callable[[Path, str], Rows]] = {
    "mnist": _mnist(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images-idx3-ubyte": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": _mnist(
        "FashionMNIST",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        {
            "train-images-idx3-ubyte": "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte": "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte": "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte": "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "kmnist": _mnist(
        "KMNIST",
        "https://codh.rois.ac.jp/kmnist/dataset/kmnist",
        {
            "train-images-idx3-ubyte": "md5:bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte": "md5:e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte": "md5:5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte": "md5:7320c461ea6c1c855c0b718fb2a4b134",
        },
    ),
    "cifar10": _cifar(
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        {"train": _BATCHES, "test": ("test_batch.bin",)},
        1,
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "md5:c32a1d4ab5d03f1284b67883e8d87530",
            (*_BATCHES, "test_batch.bin"),
        ),
    ),
    "cifar100": _cifar(
        "cifar-100-binary",
        "cifar-100-python",
        {"train": ("train.bin",), "test": ("test.bin",)},
        2,
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "md5:03b5dce01913d631647c71ecec9e9cb8",
            ("train.bin", "test.bin"),
        ),
    ),
    "svhn": _svhn,
}
