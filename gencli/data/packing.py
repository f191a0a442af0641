"""Any data set as tar shards with an index: what :mod:`gencli.data.shards` reads.

val and test keep the order of their source; train is packed in strides of the golden ratio, so that every shard is a
fair sample of it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from gencli import archives, files
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data.shards import (
    LOCAL,
    MANIFEST,
    RECORD,
    Manifest,
    Shard,
    encode,
    ending,
    fault_of,
    holds_shards,
    row_dtype,
)
from gencli.data.source import Array, Source

__all__ = ["pack", "vacant"]

ROWS = 1 << 14  # rows at which a shard is full however small they are: its index stays below a megabyte
CHUNK, CHUNK_BYTES = 256, 32 << 20  # rows that the packer takes at once end at whichever comes first
GOLDEN = (math.sqrt(5) - 1) / 2


def vacant(folder: Path) -> None:
    """UsageError unless ``folder`` can become a folder of shards: it is not there, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.is_dir() and holds_shards(folder) and not (folder / MANIFEST).exists():
        raise UsageError(f"{folder} holds a packing that was cut off", hint=f"delete it first: rm -r {folder}")
    if os.path.lexists(folder):
        raise UsageError(f"{folder} is there already and not empty", hint="name a new folder")


def pack(sources: Iterable[Source], folder: Path, shard_bytes: int, tick: Callable[[], None]) -> None:
    """Write all rows of ``sources``, a split each and train first, as shards of at most ``shard_bytes`` (or one row).

    A shard has at most 16,384 rows. Rows are taken a few at a time, so memory does not depend on how many there are;
    equal rows make equal files. ``tick`` is called for each. If anything fails nothing is left; a process
    that is killed leaves a folder that no reader takes for whole.

    Raises UsageError if ``folder`` is not empty or a source has no end.
    """
    vacant(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shards: dict[str, list[Shard]] = {}
        spec: DataSpec | None = None
        for source in sources:
            if source.size is None:
                raise UsageError(f"{source.name} is drawn and never ends: there is nothing to pack")
            spec = spec or source.spec.model_copy(update={"size": source.size})
            shards[source.split] = []
            for shard in _shards(source, spec, folder, shard_bytes, tick):
                shards[source.split].append(shard)
        if spec is None:
            raise ValueError("no sources to pack")
        manifest = Manifest(spec=spec, shards=shards)
        if fault := fault_of(manifest):
            raise UsageError(f"{spec.name} cannot be packed: {fault}")
        files.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    except BaseException:
        with suppress(OSError):
            for path in folder.iterdir():
                path.unlink()
            if made:
                folder.rmdir()
        raise


def _shards(
    source: Source, spec: DataSpec, folder: Path, shard_bytes: int, tick: Callable[[], None]
) -> Iterator[Shard]:
    """Write the rows of ``source``, a shard at a time."""
    rows = _encoded(source, spec)
    row, done, number = next(rows, None), 0, 0
    while row is not None:
        stem, index = f"{source.split}-{number:06}", bytearray()
        with files.writing(folder / f"{stem}.tar") as out:
            while row is not None and len(index) < ROWS * RECORD.size:
                data, label = row
                cls = b"" if label < 0 else b"%d" % label
                needed = sum(archives.BLOCK - len(part) // -archives.BLOCK * archives.BLOCK for part in (data, cls))
                if index and out.tell() + needed + 2 * archives.BLOCK > shard_bytes:
                    break
                if len(data) > archives.MEMBER:
                    raise DataError(f"{source.name}@{source.split}: a row of more than {archives.MEMBER >> 20} MB")
                offset = out.tell() + archives.BLOCK
                archives.write_member(out, f"{done:08}{ending(spec)}", data)
                if cls:
                    archives.write_member(out, f"{done:08}.cls", cls)
                index += RECORD.pack(offset, len(data), label, hashlib.sha256(data).digest()[:16])
                done += 1
                tick()
                row = next(rows, None)
            archives.write_end(out)
            size = out.tell()
        files.write_bytes(folder / f"{stem}.index", bytes(index))
        count, number = len(index) // RECORD.size, number + 1
        yield Shard(file=f"{stem}.tar", rows=count, bytes=size, index_sha256=hashlib.sha256(index).hexdigest())


def _encoded(source: Source, spec: DataSpec) -> Iterator[tuple[bytes, int]]:
    """(data, label) of every row, in the order of packing."""
    n, stride = source.size or 0, _stride(source)
    step = max(1, min(CHUNK, CHUNK_BYTES // (spec.dims * row_dtype(spec).itemsize)))

    def encoded(part: Array) -> list[bytes]:
        return [encode(x, spec) for x in part]

    with ThreadPoolExecutor(LOCAL) as pool:
        for start in range(0, n, step):
            fields = source.rows(torch.arange(start, min(start + step, n)) * stride % n)
            x = fields["x"].numpy()
            if x.shape[1:] != spec.shape:
                raise DataError(f"{source.name}@{source.split}: rows of shape {x.shape[1:]}, in train {spec.shape}")
            label = fields["label"].tolist() if spec.classes else [-1] * len(x)
            yield from zip(chain.from_iterable(pool.map(encoded, np.array_split(x, LOCAL))), label)


def _stride(source: Source) -> int:
    """Row ``i * stride % n`` is packed as row i: 1 but for train, there coprime to n and near n times the golden ratio.

    No stretch of such a sequence leaves a gap in 0 .. n - 1 that is much wider than another.
    """
    n = source.size or 1
    if source.split != "train":
        return 1
    near = max(1, round(n * GOLDEN))
    return next(a for k in range(n + 1) for a in (near + k, near - k) if a > 0 and math.gcd(a, n) == 1)
