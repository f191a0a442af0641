"""What a person gives a model to work on: files and streams, converted to the examples that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gencli import archives, console
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data import audio, text
from gencli.data.images import SUFFIXES, decode
from gencli.data.source import Array
from gencli.streams import Reading, like, read, requantised

__all__ = ["read_images", "read_prompts"]


def read_images(sources: Sequence[str], spec: DataSpec) -> Array:
    """All samples of ``sources`` (see :func:`read`) as a model of ``spec`` takes them: raw ``(n, *spec.shape)``.

    Single image files are fitted: colour to grey or grey to colour, the middle square to the model's size.
    """
    found: list[Array] = []
    for src in sources:
        if spec.kind == "image" and Path(src).suffix.lower() in SUFFIXES and Path(src).is_file():
            found.append(requantised(_fitted(src, spec)[None], 256, spec.levels or 256))
            continue
        reading = read(src)
        if reading.spec.shape != spec.shape or (reading.spec.levels is None) != (spec.levels is None):
            raise DataError(f"{src}: samples are {like(reading.spec.shape)}, but the model takes {like(spec.shape)}")
        for chunk in reading:
            same = spec.levels is None or reading.spec.levels is None
            found.append(chunk.x if same else requantised(chunk.x, reading.spec.levels or 256, spec.levels or 256))
    if not found:
        raise UsageError("no samples were named")
    return np.concatenate(found)


def read_prompts(sources: Sequence[str], spec: DataSpec) -> list[Array]:
    """What a model of ``spec`` can go on from: the upper rows of images ``(C, h, W)``, sounds ``(1, t)``, texts
    ``(t,)``, h at most H and t at most T.

    Image files are not fitted as :func:`read_images` does it: DataError unless one is as wide as the model's images.
    ``.wav`` and ``.flac`` files, or a folder of them, are resampled to the model's rate; ``.txt`` and ``.txt.gz`` files
    lose the line end that an editor leaves at their end. What is longer than T is cut; both are said on stderr. All
    that :func:`read` reads will do too. DataError naming the file, and the symbol if the model does not know it.
    """
    if spec.kind not in ("audio", "text"):
        heads = [_prompt_of_image(src, spec) if Path(src).suffix.lower() in SUFFIXES else src for src in sources]
        return [x for h in heads for x in (read_images([h], spec) if isinstance(h, str) else [h])]
    files = audio.SUFFIXES if spec.kind == "audio" else (".txt", ".txt.gz")
    found: list[Array] = []
    for src in sources:
        path = Path(src)
        if not path.is_file() and not path.is_dir() and src != "-":
            raise DataError(f"{src}: there is no such file or folder")
        below = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(files))
        if src != "-" and path.is_file() and path.name.lower().endswith(files):
            below = [path]
        if below and spec.kind == "audio":
            found += [_prompt_of_sound(file, spec) for file in below]
        elif below and not any(file.with_suffix(".json").exists() for file in below):  # ours come with sidecars
            found += [_prompt_of_text(text.read(file), str(file), spec) for file in below]
        else:
            found += _prompts_of_samples(read(src), src, spec)
    if not found:
        raise UsageError("no samples were named")
    return found


def _prompt_of_image(src: str, spec: DataSpec) -> Array:
    channels, height, width = spec.shape
    if not Path(src).is_file():
        raise DataError(f"{src}: there is no such file")
    data = archives.content(Path(src), archives.MEMBER)
    x = _coloured(decode(data, src, channels=3 if channels == 3 else None), spec)
    if x.shape[2] != width or x.shape[1] > height:
        wanted = f"{width} wide and at most {height} high"
        raise DataError(f"{src} is {x.shape[2]} x {x.shape[1]} pixels, but what this model completes is {wanted}")
    return requantised(x, 256, spec.levels or 256)


def _prompt_of_sound(path: Path, spec: DataSpec) -> Array:
    head, rate = audio.header(path), spec.rate
    if rate is not None and head.rate != rate:
        console.say(f"{path}: resampled from {head.rate} to {rate} samples a second")
    there = head.frames if rate is None else head.resampled(rate)
    if there > spec.dims:
        console.say(f"{path}: the first {spec.dims} of {there} samples are taken")
    return audio.read(path, rate=rate, most=spec.dims)[0][None]


def _prompt_of_text(given: str, where: str, spec: DataSpec) -> Array:
    given = given.removesuffix("\n")
    x = text.known(given, spec.vocabulary, where, spec.dims)
    taken = len(text.decode(x[None], spec.vocabulary)[0])
    if taken < len(given):
        console.say(f"{where}: the first {taken} of {len(given)} characters are taken")
    return x


def _prompts_of_samples(reading: Reading, src: str, spec: DataSpec) -> list[Array]:
    other = reading.spec
    if other.kind != spec.kind or len(other.shape) != len(spec.shape):
        raise DataError(f"{src}: samples are {other.kind}, but the model takes {spec.kind}")
    if spec.kind == "audio":
        if (other.levels, other.shape[0]) != (spec.levels, 1) or other.rate not in (None, spec.rate):
            raise DataError(f"{src}: sounds of {other.rate} samples a second, but the model's have {spec.rate}")
        return [x[:, : spec.dims] for chunk in reading for x in chunk.x]
    if other.vocabulary == spec.vocabulary:
        return [x[: spec.dims] for chunk in reading for x in chunk.x]
    if len(other.vocabulary) != other.levels:
        raise DataError(f"{src} does not say what its symbols are")
    texts = (one for chunk in reading for one in text.decode(chunk.x, other.vocabulary))
    return [text.known(one, spec.vocabulary, src, spec.dims) for one in texts]


def _fitted(src: str, spec: DataSpec) -> Array:
    channels, height, width = spec.shape
    data = archives.content(Path(src), archives.MEMBER)
    x = decode(data, src, channels=3 if channels == 3 else None)
    if x.shape[1:] != (height, width):
        if height != width:
            raise DataError(f"{src} is {x.shape[2]} x {x.shape[1]} pixels, but the model takes {width} x {height}")
        x = decode(data, src, channels=3 if channels == 3 else None, size=height)
    return _coloured(x, spec)


def _coloured(x: Array, spec: DataSpec) -> Array:
    """An image for a model of ``spec``: grey where that is, by the luma of ITU-R BT.601, as Pillow has it."""
    if spec.shape[0] == 1 and len(x) == 3:
        x = np.rint(np.tensordot([0.299, 0.587, 0.114], x, 1))[None].astype(np.uint8)
    return x
