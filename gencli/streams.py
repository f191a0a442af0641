"""Samples in and out of files and pipes.

A stream is a tar archive that WebDataset readers and ``tar`` understand. Each sample is ``00000012.png`` (images of at
most 256 levels and 1 or 3 channels), ``.wav`` (sound), ``.txt`` (text) or ``.npy`` (all else), and then its sidecar
``00000012.json``::

    {"index": 12, "label": 3, "levels": 17, "kind": "image", "data": "digits", ...}

where ``...`` is what the writer says of all samples. Levels are spread over the bytes of a PNG (see
``pictures.to_bytes``) and come back exactly; so do mu-law codes from the 16 bits of a WAV. The sidecar of a sound says
its ``rate``; that of a text its ``symbols`` as numbers, and the first one of a stream the ``vocabulary``. Equal samples
make equal bytes. A stream without its two closing blocks of zeros was cut off and is refused: its writer failed.
Members are read one by one and never extracted.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gencli import archives, console, files, pictures, plots
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data import audio, text
from gencli.data.images import SUFFIXES, decode

__all__ = ["Reading", "Samples", "default_name", "like", "picture", "read", "requantised", "write"]

Array = np.ndarray[Any, Any]
ENDINGS = (".png", ".gif", ".wav", ".txt", ".npz", ".safetensors", ".tar")
# what a sidecar says of its sample and the samples' data
OWN = ("index", "label", "levels", "kind", "data", "rate", "symbols", "vocabulary")
PAUSE = 0.1  # seconds of silence between sounds in one file
RULE = "-" * 72  # between texts in one file
DATA = (*SUFFIXES, *audio.SUFFIXES, ".npy", ".txt")  # the files that a sample may be in
CHUNK, CHUNK_BYTES = 256, 32 << 20  # a chunk ends at whichever comes first


@dataclass(frozen=True)
class Samples:
    """A chunk of samples: ``x`` raw as in :class:`gencli.contract.DataSpec`; points are float32.

    ``label`` is integers ``(n,)``; ``first`` is the number of the first sample.
    """

    x: Array
    label: Array | None = None
    first: int = 0


@dataclass(frozen=True)
class Reading:
    """What :func:`read` found: a guess at the ``spec``, what the writer said (``meta``), and the chunks, read once."""

    spec: DataSpec
    meta: dict[str, Any]
    chunks: Iterator[Samples]

    def __iter__(self) -> Iterator[Samples]:
        return self.chunks


# ---------------------------------------------------------------------------------------------- writing


def _manner(dest: str, spec: DataSpec) -> str:
    """How ``dest`` is written: one of ENDINGS, "folder" or "-". UsageError where it cannot be."""
    if dest == "-":
        console.stdout_binary()
        return dest
    path, ending = Path(dest), Path(dest).suffix.lower()
    if dest.endswith(("/", os.sep)) or path.is_dir() or not ending:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UsageError(f"{dest} is there already and not empty", hint="name a new folder: -o samples-2/")
        return "folder"
    if ending not in ENDINGS:
        near = console.nearest(ending, ENDINGS)
        raise UsageError(f"cannot write samples to {dest}{near}", hint=f"endings: {' '.join(ENDINGS)}, a folder/, or -")
    if ending not in (".npz", ".safetensors", ".tar") and ending not in _endings(spec):
        hint = "endings for all kinds of data: .npz .safetensors .tar"
        raise UsageError(f"{spec.kind} of shape {like(spec.shape)} make no {ending}", hint=hint)
    return ending


def _endings(spec: DataSpec) -> tuple[str, ...]:
    """How samples are shown or heard."""
    own = {".png": (".png", ".gif"), ".wav": (".wav", ".png"), ".txt": (".txt", ".png")}
    return own.get(
        _ending(spec), (".png",) if spec.kind == "points" else (".txt", ".png") if spec.kind == "tokens" else ()
    )


def default_name(stem: str, spec: DataSpec) -> str:
    """The file that samples go to where nobody names one: ``stem`` and the ending that shows them."""
    return stem + (_endings(spec) or (".npz",))[0]


def _ending(spec: DataSpec) -> str:
    """What one sample is written as: it fits a PNG of 8 bits, a WAV or a text, or else an array."""
    if spec.kind == "image" and spec.levels is not None and spec.levels <= 256 and spec.shape[0] in (1, 3):
        return ".png"
    if spec.kind == "audio" and (spec.levels, spec.shape[:-1]) == (256, (1,)) and spec.rate is not None:
        return ".wav"
    return ".txt" if spec.kind == "text" and len(spec.vocabulary) == spec.levels else ".npy"


def write(dest: str, chunks: Iterable[Samples], spec: DataSpec, meta: Mapping[str, Any], total: int) -> None:
    """Write ``total`` samples to ``dest``; ``meta`` (JSON values) is what all of them share: model, run, seed.

    By ending: ``.png`` a grid (a scatter of points, waveforms, a page of text), ``.gif`` one frame a sample, ``.wav``
    all sounds with pauses of 0.1 s, ``.txt`` all texts with a rule between them, ``.npz`` and ``.safetensors`` arrays
    ``x`` and ``label``, ``.tar`` a stream, a folder of ``000012.png`` and ``000012.json``, ``-`` a stream on stdout.
    Chunks are taken one at a time and let go, except for pictures. Files and folders appear whole or not at all; a
    closed pipe raises BrokenPipeError.
    """
    how = _manner(dest, spec)
    if how == "-":
        out = console.stdout_binary()
        _write_tar(out, chunks, spec, meta)
        out.flush()
    elif how == "folder":
        _write_folder(Path(dest), chunks, spec, meta)
    elif how in (".png", ".gif"):
        x = np.concatenate([chunk.x for chunk in chunks])
        _write_picture(Path(dest), how, x, spec)
    elif how in (".wav", ".txt"):
        with files.writing(dest) as file:
            (_write_sound if how == ".wav" else _write_text)(file, chunks, spec, total)
    elif how == ".tar":
        with files.writing(dest) as file:
            _write_tar(file, chunks, spec, meta)
    else:
        said = files.canonical({"meta": dict(meta), "spec": spec.model_dump(mode="json")})
        writer = archives.write_npz if how == ".npz" else archives.write_safetensors
        with files.writing(dest) as file:
            writer(file, ((chunk.x, chunk.label) for chunk in chunks), _dtype(spec), (total, *spec.shape), said)


def _dtype(spec: DataSpec) -> np.dtype[Any]:
    return np.dtype("<f4" if spec.levels is None else "u1" if spec.levels <= 256 and spec.kind != "text" else "<i2")


def _write_picture(path: Path, how: str, x: Array, spec: DataSpec) -> None:
    if how == ".gif":
        pictures.gif(path, [pictures.grid(one[None], spec.levels or 256, pad=0) for one in x])
    else:
        pictures.save_png(path, picture(x, spec))


def picture(x: Array, spec: DataSpec) -> Array:
    """Raw samples as one picture, uint8 ``(H, W, 3)``: a grid of images, a scatter, waveforms, a page of text."""
    if spec.kind == "points":
        return plots.scatter(x)
    if spec.kind == "audio":
        return pictures.waves(audio.decode(x[:, 0]))
    if spec.kind in ("text", "tokens"):
        return pictures.page(_spelt(x, spec))
    return pictures.grid(x, spec.levels or 256)


def _write_sound(out: BinaryIO, chunks: Iterable[Samples], spec: DataSpec, total: int) -> None:
    rate = spec.rate or 1
    pause = bytes(2 * round(PAUSE * rate))
    out.write(audio.wav_header(total * spec.dims + (total - 1) * (len(pause) // 2), rate))
    done = 0
    for chunk in chunks:
        for x in chunk.x:
            out.write((pause if done else b"") + audio.pcm(x[0]))
            done += 1
    if done != total:
        raise ValueError(f"{done} samples came, {total} were announced")


def _spelt(x: Array, spec: DataSpec) -> list[str]:
    """The texts of ``x``; between whole words a blank."""
    if spec.kind == "tokens":
        return [" ".join(spec.vocabulary[i] for i in row) for row in x.tolist()]
    return text.decode(x, spec.vocabulary)


def _write_text(out: BinaryIO, chunks: Iterable[Samples], spec: DataSpec, total: int) -> None:
    between = ""
    for chunk in chunks:
        for one in _spelt(chunk.x, spec):
            out.write(f"{between}{one}\n".encode())
            between = f"{RULE}\n"


def _members(chunk: Samples, spec: DataSpec, meta: Mapping[str, Any]) -> Iterator[tuple[int, str, bytes, bytes]]:
    """(index, ending, data, sidecar) of each sample."""
    ending = _ending(spec)
    for i, x in enumerate(chunk.x):
        sidecar: dict[str, Any] = {"index": chunk.first + i}
        if chunk.label is not None:
            sidecar["label"] = int(chunk.label[i])
        sidecar |= {"levels": spec.levels, "kind": spec.kind, "data": spec.name}
        if ending == ".png":
            b = pictures.to_bytes(x, spec.levels or 256)
            data = pictures.png(b[0] if len(b) == 1 else b.transpose(1, 2, 0))
        elif ending == ".wav":
            data = audio.wav(x[0], spec.rate or 1)
            sidecar["rate"] = spec.rate
        elif ending == ".txt":
            data = text.decode(x[None], spec.vocabulary)[0].encode()
            sidecar["symbols"] = x.tolist()
            sidecar |= {"vocabulary": spec.vocabulary} if chunk.first + i == 0 else {}
        else:
            file = io.BytesIO()
            np.save(file, np.ascontiguousarray(x, _dtype(spec)), allow_pickle=False)
            data = file.getvalue()
        sidecar |= {key: value for key, value in meta.items() if key not in OWN}
        said = json.dumps(sidecar, ensure_ascii=False, allow_nan=False) + "\n"
        yield chunk.first + i, ending, data, said.encode()


def _write_tar(out: BinaryIO, chunks: Iterable[Samples], spec: DataSpec, meta: Mapping[str, Any]) -> None:
    for chunk in chunks:
        for index, ending, data, sidecar in _members(chunk, spec, meta):
            archives.write_member(out, f"{index:08}{ending}", data)
            archives.write_member(out, f"{index:08}.json", sidecar)
    archives.write_end(out)


def _write_folder(path: Path, chunks: Iterable[Samples], spec: DataSpec, meta: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        for chunk in chunks:
            for index, ending, data, sidecar in _members(chunk, spec, meta):
                (temporary / f"{index:06}{ending}").write_bytes(data)
                (temporary / f"{index:06}.json").write_bytes(sidecar)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        temporary.rename(path)  # onto nothing or an empty folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in console.DISK:
            error.filename = str(path)
        raise
    files.sync_folder(path.parent)


# ---------------------------------------------------------------------------------------------- reading


class _Item(NamedTuple):
    """One sample as it was found; ``said`` is its sidecar, ``text`` what the symbols ``x`` spell."""

    name: str
    x: Array
    label: int | None
    said: dict[str, Any]
    text: str | None = None


def read(src: str, limit: int | None = None) -> Reading:
    """Open at most ``limit`` samples: ``-`` (a stream on stdin), ``.tar``, ``.npz``, ``.npy``, ``.safetensors``, a
    folder of images, sounds or texts, one image, or one sound.

    What :func:`write` wrote comes back exactly. From elsewhere: images of 256 levels; arrays of integers
    ``(n, C, H, W)``, ``(n, H, W, C)`` or ``(n, H, W)``, or of floats ``(n, D)``; sounds as mu-law codes. The first
    sample is read at once, so most faults show here and the rest while the chunks are read; each is a DataError of one
    line.
    """
    if src == "-":
        return _grouped(_items_of_tar(console.stdin_binary(), "standard input"), "standard input", limit)
    path, ending = Path(src), Path(src).suffix.lower()
    if not path.exists():
        raise DataError(f"{src}: there is no such file or folder")
    if path.is_dir():
        return _grouped(_items_of_folder(path), src, limit)
    if not path.is_file():
        raise DataError(f"{src} is no regular file")
    if ending == ".tar":
        return _grouped(_items_of_tar(path.open("rb"), src), src, limit)
    if ending in (*SUFFIXES, *audio.SUFFIXES):
        return _grouped(iter([_item(src, {ending: archives.content(path, archives.MEMBER)})]), src, limit)
    if ending in (".npz", ".npy", ".safetensors"):
        return _rows(archives.table(path, ending), src, limit)
    known = (".tar", ".npz", ".npy", ".safetensors", *SUFFIXES, *audio.SUFFIXES)
    near = console.nearest(ending, known)
    raise DataError(f"{src}: cannot read samples from such a file{near}", hint=f"endings: {' '.join(known)}")


def requantised(x: Array, levels: int, wanted: int) -> Array:
    """Raw levels ``0 .. levels - 1`` spread over ``0 .. wanted - 1``."""
    if levels == wanted:
        return x
    return np.rint(x * ((wanted - 1) / (levels - 1))).astype(np.uint8 if wanted <= 256 else np.int16)


def _grouped(items: Iterator[_Item], name: str, limit: int | None) -> Reading:
    """Chunks of items that agree in shape, levels and labels."""
    head = next(items, None)
    if head is None:
        raise DataError(f"{name} holds no samples")
    said = head.said
    spec = _spec(
        name,
        name=said.get("data", name),
        kind=said.get("kind", "image" if head.x.ndim == 3 else "points"),
        shape=head.x.shape,
        levels=said.get("levels"),
        rate=said.get("rate"),
        vocabulary=said.get("vocabulary", ()),
    )
    if spec.vocabulary and len(spec.vocabulary) != spec.levels:
        raise DataError(f"{name}: {len(spec.vocabulary)} symbols do not make {archives.shown(str(spec.levels))} levels")
    meta = {key: value for key, value in said.items() if key not in OWN}
    return Reading(spec, meta, _chunks(chain([head], items), spec, head.label is not None, limit))


def _spec(source: str, /, **fields: Any) -> DataSpec:
    try:
        return DataSpec(**fields)
    except ValueError:
        raise DataError(f"{source}: what it says of its samples is not understood") from None


def _chunks(items: Iterator[_Item], spec: DataSpec, labelled: bool, limit: int | None) -> Iterator[Samples]:
    held: list[_Item] = []
    done = 0

    def chunk() -> Samples:
        label = np.array([item.label for item in held], np.int64) if labelled else None
        index = held[0].said.get("index")
        first = index if isinstance(index, int) else done - len(held)
        return Samples(np.stack([item.x for item in held]), label, first)

    while done != limit and (item := next(items, None)) is not None:
        shapes = [(item.x.shape, item.said.get("levels")), (spec.shape, spec.levels)]
        if shapes[0] != shapes[1]:
            found, wanted = (f"{like(shape)} of {archives.shown(str(levels))} levels" for shape, levels in shapes)
            raise DataError(f"{item.name}: {found}, but those before it have {wanted}")
        if (item.label is not None) != labelled:
            raise DataError(f"{item.name}: some samples have labels and some have none")
        if item.said.get("rate") != spec.rate:
            raise DataError(f"{item.name}: another number of samples a second than those before it have")
        if item.text is not None and spec.vocabulary and text.decode(item.x[None], spec.vocabulary) != [item.text]:
            raise DataError(f"{item.name}: its text is not what its sidecar's symbols spell")
        held.append(item)
        done += 1
        if len(held) == CHUNK or len(held) * item.x.nbytes >= CHUNK_BYTES:
            yield chunk()
            held.clear()
    if held:
        yield chunk()


def like(shape: tuple[int, ...]) -> str:
    """``1x8x8``."""
    return "x".join(map(str, shape))


def _item(name: str, parts: Mapping[str, bytes]) -> _Item:
    """A sample from the files that share its name, by ending."""
    said = _sidecar(parts[".json"], name) if ".json" in parts else {}
    label = said.get("label")
    if ".cls" in parts and parts[".cls"].strip().isdigit():  # the way of WebDataset
        label = int(parts[".cls"][:18])
    if not isinstance(label, int) or not 0 <= label < 2**63:
        label = None
    image = next((ending for ending in parts if ending in SUFFIXES), None)
    if image is not None:
        x = decode(parts[image], name)
        said.setdefault("levels", 256)
        levels = said["levels"]
        if not isinstance(levels, int) or not 2 <= levels <= 256:
            raise DataError(f"{name}: levels {archives.shown(repr(levels))} of an image are not between 2 and 256")
        return _Item(name, requantised(x, 256, levels), label, said)
    sound = next((parts[ending] for ending in audio.SUFFIXES if ending in parts), None)
    if sound is not None:
        x, rate = audio.read(sound, name)
        own = {"levels": 256, "rate": rate, "kind": "audio"}
        if any(said.setdefault(key, value) != value for key, value in own.items()):
            raise DataError(f"{name}: a sound of {rate} samples a second, and its sidecar says otherwise")
        return _Item(name, x[None], label, said)
    if ".txt" in parts and ".npy" not in parts:
        return _text_item(name, parts[".txt"], label, said)
    if ".npy" not in parts:
        raise DataError(f"{name}: a sidecar without its sample")
    x = archives.array(parts[".npy"], name)
    if "levels" not in said:
        said["levels"] = None if x.dtype.kind == "f" else 256
    return _Item(name, _raw(x, said["levels"], name, said.get("kind") == "text"), label, said)


def _text_item(name: str, data: bytes, label: int | None, said: dict[str, Any]) -> _Item:
    numbers = said.get("symbols")
    if not isinstance(numbers, list) or not numbers or not all(type(k) is int and 0 <= k < 2**15 for k in numbers):
        raise DataError(f"{name}: a text whose sidecar does not say its symbols", hint="gencli sample -o - writes them")
    try:
        spelt = data.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: byte {e.start} is not UTF-8") from None
    if said.setdefault("kind", "text") != "text":
        raise DataError(f"{name}: a text, and its sidecar says otherwise")
    return _Item(name, _raw(np.array(numbers, np.int16), said.get("levels"), name, True), label, said, spelt)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number


# refuses NaN and infinities, which could not be written again
_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _sidecar(data: bytes, name: str) -> dict[str, Any]:
    try:
        said = _JSON.decode(data.decode())
        if b"\\u" in data:  # perhaps half a character, which could not be written either
            files.canonical(said).encode()
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise DataError(f"{name}: its sidecar is no JSON object")
    return said


def _raw(x: Array, levels: Any, name: str, wide: bool) -> Array:
    """``x`` as uint8 (text, ``wide``, and above 256 levels: int16) below ``levels``; float32 where that is None."""
    if levels is None and x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():  # as float32: what float64 holds may be too large
            raise DataError(f"{name}: values that are not finite")
        return x
    if x.dtype.kind not in "biu" or not isinstance(levels, int) or not 2 <= levels <= 2**15:
        what = f"{x.dtype} of {archives.shown(str(levels))} levels"
        raise DataError(f"{name}: {what} are no samples: integer levels or real points are")
    if x.size and (x.min() < 0 or x.max() >= levels):
        raise DataError(f"{name}: values from {x.min()} to {x.max()} do not fit {levels} levels")
    return x.astype(np.uint8 if levels <= 256 and not wide else np.int16, copy=False)


def _items_of_folder(path: Path) -> Iterator[_Item]:
    """Images, sounds, texts and arrays in the order of their names, folders below included, with their sidecars."""
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            ending = file.suffix.lower()
            if name.startswith(".") or ending not in DATA:
                continue
            if ending == ".txt" and not file.with_suffix(".json").exists():  # a note beside the samples
                continue
            if ending == ".txt" and any(file.with_suffix(other).name in names for other in DATA if other != ".txt"):
                continue  # the caption of an image, say
            parts = {ending: archives.content(file, archives.MEMBER)}
            if file.with_suffix(".json").exists():
                parts[".json"] = archives.content(file.with_suffix(".json"), archives.SIDECAR)
            yield _item(str(file), parts)


def _items_of_tar(file: BinaryIO, name: str) -> Iterator[_Item]:
    """Members that follow one another and share a name up to its first dot are one sample."""
    key, parts = "", dict[str, bytes]()
    for member, data in archives.members(file, name):
        folder, _, base = member.rpartition("/")
        stem, ending = f"{folder}/{base.split('.')[0]}", PurePosixPath(base).suffix.lower()
        if stem != key:
            if parts.keys() - {".txt"}:  # a text alone is no sample
                yield _item(f"{name}: {archives.shown(key.lstrip('/'))}", parts)
            key, parts = stem, {}
        if ending in parts:
            raise DataError(f"{name}: {archives.shown(member)} comes twice")
        if ending in (*DATA, ".json", ".cls"):
            parts[ending] = data
    if parts.keys() - {".txt"}:
        yield _item(f"{name}: {archives.shown(key.lstrip('/'))}", parts)


def _rows(table: archives.Table, name: str, limit: int | None) -> Reading:
    """The rows of an array file, a chunk at a time."""
    n, turned = table.shape[0], False
    if table.said:
        said = _sidecar(table.said.encode(), name)
        spec = _spec(name, **said.get("spec", {})) if isinstance(said.get("spec"), dict) else None
        meta = said.get("meta")
        if spec is None or not isinstance(meta, dict) or spec.shape != table.shape[1:]:
            raise DataError(f"{name}: what it says of its samples is not understood")
    else:
        shape, levels, turned = _layout(table, name)
        kind = "points" if levels is None else "image"
        spec, meta = _spec(name, name=name, kind=kind, shape=shape, levels=levels, size=n), {}
    if table.label is not None and (table.label.shape != (n,) or table.label.dtype.kind not in "iu"):
        raise DataError(f"{name}: its labels must be {n} integers, not {table.label.dtype} {table.label.shape}")

    def chunks() -> Iterator[Samples]:
        end = n if limit is None else min(n, limit)
        size = max(1, min(CHUNK, CHUNK_BYTES // max(1, spec.dims * table.dtype.itemsize)))
        for start in range(0, end, size):
            x = table.take(min(size, end - start))
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if turned else x.reshape(len(x), *spec.shape)
            label = None if table.label is None else table.label[start : start + len(x)].astype(np.int64)
            yield Samples(_raw(x, spec.levels, name, spec.kind == "text"), label, start)

    return Reading(spec, meta, chunks())


def _layout(table: archives.Table, name: str) -> tuple[tuple[int, ...], int | None, bool]:
    """(shape of a sample, levels, whether the channels come last) of an array from elsewhere."""
    shape, kind = table.shape[1:], table.dtype.kind
    if kind == "f" and len(shape) <= 1:
        return shape or (1,), None, False
    levels = 2 if kind == "b" else 256
    if kind in "biu" and len(shape) == 2:
        return (1, *shape), levels, False
    if kind in "biu" and len(shape) == 3 and (shape[0] in (1, 3) or shape[2] in (1, 3)):
        last = shape[0] not in (1, 3)
        return (shape[2], shape[0], shape[1]) if last else shape, levels, last
    what = f"{table.dtype} {like(table.shape)}"
    raise DataError(f"{name}: {what} is neither images (integers, n x C x H x W) nor points (floats, n x D)")
