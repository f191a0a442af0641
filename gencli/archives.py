"""tar, npy, npz and safetensors, in order and in bounded memory. Imports no torch.

What is read may come from anyone: nothing is extracted, no pickle is read, sizes are checked before memory is taken,
and every fault is a DataError of one line. What is written has no dates and no owner: equal values make equal bytes.
"""

from __future__ import annotations

import io
import math
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from gencli import files
from gencli.console import DataError

__all__ = [
    "MEMBER",
    "SIDECAR",
    "Table",
    "array",
    "content",
    "members",
    "shown",
    "table",
    "write_end",
    "write_member",
    "write_npz",
    "write_safetensors",
]

Array = np.ndarray[Any, Any]
MEMBER, SIDECAR = 64 << 20, 1 << 20  # bytes that one image, array or row may have, and one sidecar or header
ROWS = 10**8  # samples of one array
BLOCK = 512  # bytes of a tar block
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that zip knows
Rows = Iterable[tuple[Array, Array | None]]  # chunks of samples and their labels


def shown(name: str) -> str:
    """A name out of an archive, fit for a message of one line whatever a hostile writer has put into it."""
    if len(name) <= 200 and name.isprintable():
        return name
    text = "".join(c if c.isprintable() else "?" for c in name[:200])
    return text if len(name) <= 200 else f"{text}..."


def content(path: Path, most: int) -> bytes:
    """All of a regular file of at most ``most`` bytes."""
    if not path.is_file():
        raise DataError(f"{path} is no regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise DataError(f"{path} has more than {most >> 20} MB")
    return data


# ---------------------------------------------------------------------------------------------- tar


def members(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of an archive, read once from front to back; nothing is extracted.

    A reader of its own, since ``tarfile`` takes an archive that is cut off between members for a whole one and reads
    extended headers of any size.
    """
    last = long_name = ""
    while True:
        block = file.read(BLOCK)
        if not block and not last:
            hint = "samples come from gencli sample RUN -o - | ..."
            raise DataError(f"{name} is empty: whatever should have written it wrote nothing", hint=hint)
        if len(block) == BLOCK and not any(block):
            second = file.read(BLOCK)
            if len(second) < BLOCK:
                raise _cut(name, last or "its beginning")
            if any(second) or any(file.read(1 << 20)):  # all of the padding, so that its writer can end in peace
                raise DataError(f"{name}: more comes after its end; are these several archives in one?")
            return
        if len(block) < BLOCK and last:
            raise _cut(name, last)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if last:
                raise DataError(f"{name} is damaged after {last}") from None
            raise DataError(f"{name} is no tar stream of samples", hint="gencli sample RUN -o - makes one") from None
        member, long_name = long_name or header.name, ""
        extended = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
        if not extended and header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise DataError(f"{name}: {shown(member)} is a link or a device and no regular file")
        size = 0 if header.isdir() else header.size
        most = SIDECAR if extended or member.endswith((".json", ".cls")) else MEMBER
        if not 0 <= size <= most:
            raise DataError(f"{name}: {shown(member)} has {size} bytes, more than {most >> 20} MB")
        last, padded = shown(member) or "a member without a name", size + -size % BLOCK
        data = file.read(padded)
        if len(data) < padded:
            raise _cut(name, last)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data[:size].rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type == tarfile.XHDTYPE:
            long_name = _pax_path(data[:size])
        elif not extended and not header.isdir():
            yield member, data[:size]


def _cut(name: str, last: str) -> DataError:
    return DataError(f"{name} was cut off after {last}: its writer did not finish")


def _pax_path(data: bytes) -> str:
    """The ``path`` of an extended header: records of ``"%d %s=%s\\n"``, the number being the record's length."""
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length[:9]) <= len(data):
            return ""
        key, _, value = rest[: int(length[:9]) - len(length) - 1].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        data = data[int(length[:9]) :]
    return ""


# ---------------------------------------------------------------------------------------------- arrays


class Table(NamedTuple):
    """Rows that are taken in order: ``take(n)`` gives the next n. ``said`` is the text that gencli left, or nothing."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    take: Callable[[int], Array]
    label: Array | None = None
    said: str = ""


def array(data: bytes, name: str) -> Array:
    """A whole ``.npy`` file."""
    with _faults(name):
        file = io.BytesIO(data)
        shape, dtype, fortran = _header(file, name, len(data))
        values = file.read(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")


def table(path: Path, ending: str) -> Table:
    """The samples of a ``.npz``, ``.npy`` or ``.safetensors`` file, opened for reading in order.

    Samples are the array ``x`` (else ``arr_0``, ``images``, ``samples`` or the only one), labels the array ``label``
    (else ``labels``, ``y``, ``arr_1``).
    """
    name = str(path)
    with _faults(name):
        if ending == ".npy":
            return _npy(path.open("rb"), path.stat().st_size, name)
        return _npz(path, name) if ending == ".npz" else _safetensors(path, name)


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Whatever the libraries raise for a bad file, as a DataError."""
    from safetensors import SafetensorError

    damaged = (ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, SafetensorError)
    by_header = (tokenize.TokenError, SyntaxError, MemoryError, OverflowError)  # numpy parses an array's as Python
    try:
        yield
    except (*damaged, *by_header) as error:
        raise DataError(f"{name} is damaged: {shown(str(error)) or type(error).__name__}") from None
    except OSError as error:  # a zip may name places before its beginning
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None


def _header(file: IO[bytes], name: str, size: int) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """(shape, dtype, fortran order) of a ``.npy`` file of ``size`` bytes, which is left at its first value."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise DataError(f"{name}: npy format {version} is unknown")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, which could run code: only numbers are read")
    if min(shape, default=0) < 0:
        raise DataError(f"{name}: an array of shape {shape}")
    there, wanted = size - file.tell(), math.prod(shape) * dtype.itemsize
    if there < wanted:
        raise DataError(f"{name} was cut off: {there} bytes of an array of {wanted}")
    return shape, dtype, fortran


def _npy(file: IO[bytes], size: int, name: str) -> Table:
    """Rows of a ``.npy`` file of ``size`` bytes in all."""
    shape, dtype, fortran = _header(file, name, size)
    if not shape or not shape[0] or 0 in shape:
        raise DataError(f"{name} holds no samples")
    row, whole = math.prod(shape[1:]) * dtype.itemsize, math.prod(shape) * dtype.itemsize
    if row > MEMBER or shape[0] > ROWS:
        raise DataError(f"{name}: an array of shape {shape} is too big")

    def values(count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise DataError(f"{name} was cut off")
        return data

    if fortran and len(shape) > 1:  # columns first: only the whole has rows
        turned = np.frombuffer(values(whole), dtype).reshape(shape, order="F")
        return Table(shape, dtype, _slices(lambda a, b: turned[a:b]))

    def take(n: int) -> Array:
        with _faults(name):
            return np.frombuffer(values(n * row), dtype).reshape(n, *shape[1:])

    return Table(shape, dtype, take)


def _slices(part: Callable[[int, int], Array]) -> Callable[[int], Array]:
    """Rows in order from ``part(start, stop)``."""
    done = 0

    def take(n: int) -> Array:
        nonlocal done
        done += n
        return part(done - n, done)

    return take


def _chosen(names: list[str], name: str) -> tuple[str, str | None]:
    """The names of the samples and of the labels among ``names``."""
    numbers = [n for n in names if n != "gencli"]
    xs = [n for n in ("x", "arr_0", "images", "samples") if n in numbers] or numbers
    if not xs or (xs is numbers and len(xs) > 1):
        raise DataError(f"{name} holds no samples: it has no array x, but {shown(', '.join(numbers[:5])) or 'nothing'}")
    return xs[0], next((n for n in ("label", "labels", "y", "arr_1") if n in numbers), None)


def _npz(path: Path, name: str) -> Table:
    archive = zipfile.ZipFile(path)
    entries = {
        info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")
    }
    x, y = _chosen(list(entries), name)

    def all_of(key: str, most: int) -> Array:
        if entries[key].file_size > most:
            raise DataError(f"{name}: {key} has more than {most >> 20} MB")
        with archive.open(entries[key]) as file:
            return array(file.read(most), f"{name}: {key}")

    rows = _npy(archive.open(entries[x]), entries[x].file_size, f"{name}: {x}")
    said = str(all_of("gencli", SIDECAR)) if "gencli" in entries else ""
    return rows._replace(label=None if y is None else all_of(y, rows.shape[0] * 8 + SIDECAR), said=said)


def _safetensors(path: Path, name: str) -> Table:
    from safetensors import safe_open

    file = safe_open(path, framework="np")
    x, y = _chosen(list(file.keys()), name)
    rows = file.get_slice(x)
    shape = tuple(rows.get_shape())
    if not shape or 0 in shape:
        raise DataError(f"{name} holds no samples")

    def part(start: int, stop: int) -> Array:
        with _faults(name):
            return np.asarray(rows[start:stop])

    dtype = np.asarray(rows[:1]).dtype
    said = (file.metadata() or {}).get("gencli", "")
    return Table(shape, dtype, _slices(part), None if y is None else file.get_tensor(y), said)


# ---------------------------------------------------------------------------------------------- writing


def write_member(out: BinaryIO, name: str, data: bytes) -> None:
    """Append a file to a tar archive. It has no owner and no date, so that equal files make equal archives."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    out.write(header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))


def write_end(out: BinaryIO) -> None:
    """The end of a tar archive: without it a reader knows that the writer failed."""
    out.write(bytes(2 * BLOCK))


def _fill(file: IO[bytes], rows: Rows, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array | None:
    """Write the values of ``rows``, which must fill ``shape``; their labels."""
    labels: list[Array] = []
    count = 0
    for x, label in rows:
        if x.shape[1:] != shape[1:]:
            raise ValueError(f"a chunk of shape {x.shape} does not belong to {shape}")
        file.write(np.ascontiguousarray(x, dtype).data)
        count += len(x)
        labels += [] if label is None else [label]
    if count != shape[0]:
        raise ValueError(f"{count} samples came, {shape[0]} were announced")
    if not labels:
        return None
    together = np.concatenate(labels).astype("<i8")
    if len(together) != count:
        raise ValueError(f"{len(together)} labels came for {count} samples")
    return together


def write_npz(file: BinaryIO, rows: Rows, dtype: np.dtype[Any], shape: tuple[int, ...], said: str) -> None:
    """Arrays ``x``, ``label`` and the text ``gencli``, uncompressed; ``rows`` are taken one at a time."""
    with zipfile.ZipFile(file, "w") as archive:

        def member(name: str) -> IO[bytes]:
            return archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True)

        with member("x") as entry:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            label = _fill(entry, rows, dtype, shape)
        rest = ([] if label is None else [("label", label)]) + [("gencli", np.array(said))]
        for name, values in rest:
            with member(name) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def write_safetensors(file: BinaryIO, rows: Rows, dtype: np.dtype[Any], shape: tuple[int, ...], said: str) -> None:
    """Tensors ``x`` and ``label`` and the one metadata key ``gencli``: 8 bytes of length, a JSON header, the values.

    The labels come first, where eight bytes each are aligned, but are known last. ``rows`` are taken one at a time.
    """
    rows = iter(rows)
    head = [first for first in [next(rows, None)] if first is not None]
    labelled = 8 * shape[0] if head and head[0][1] is not None else 0
    end = labelled + math.prod(shape) * dtype.itemsize
    names = {"u1": "U8", "i2": "I16", "f4": "F32"}
    tensors: dict[str, Any] = {
        "__metadata__": {"gencli": said},
        "x": {"dtype": names[dtype.str[1:]], "shape": shape, "data_offsets": [labelled, end]},
    }
    if labelled:
        tensors["label"] = {"dtype": "I64", "shape": [shape[0]], "data_offsets": [0, labelled]}
    header = files.canonical(tensors).encode()
    header = header.ljust(len(header) + -len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header + bytes(labelled))
    label = _fill(file, chain(head, rows), dtype, shape)
    if label is not None:
        file.seek(8 + len(header))
        file.write(label.data)
