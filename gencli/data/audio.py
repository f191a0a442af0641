"""Sound: mu-law codes, files without trusting them, and the sets ``tones``, ``fsdd`` and a user's folder.

Raw sound is mu-law codes, uint8 ``(n, 1, T)``. Files are WAV (integers of 8 to 32 bits, floats) or FLAC; channels are
mixed to one by their mean, and floats beyond [-1, 1] are clipped, as a loudspeaker would.

An example is a window of T samples. A recording is cut into windows that follow one another; the rest at its end is
filled up with silence if it is at least half a window or the recording has no other, and dropped if not. The silence
counts in a likelihood like any sound.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gencli import archives
from gencli.console import DataError, GencliError, UsageError, say
from gencli.contract import DataSpec
from gencli.data import folders
from gencli.data.source import Array, TensorSource
from gencli.data.table import SETS, SPLITS, SetEntry
from gencli.rng import generator

__all__ = ["SILENCE", "SUFFIXES", "decode", "encode", "fsdd", "header", "load_folder", "read", "tones", "wav"]

SUFFIXES = (".wav", ".flac")
LENGTH = 4000  # samples of an example, where a name asks for no other number
FRAMES = 1 << 25  # of one file, channels counted apart: 12 minutes at 44,100 a second
IN_MEMORY = 1 << 29  # samples of one split
RATES = (1000, 400_000)
CHANNELS = 16
BLOCK = 1 << 16  # frames decoded at once


# ---------------------------------------------------------------------------------------------- mu-law


def decode(codes: Array) -> Array:
    """Mu-law codes 0 .. 255 to float64 in [-1, 1]: the inverse of f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu), mu = 255,

    at f = 2 code / 255 - 1 (van den Oord et al. 2016, WaveNet, section 2.2; ITU-T G.711 approximates the same curve).
    """
    f = codes / 127.5 - 1
    return np.sign(f) * np.expm1(abs(f) * np.log(256)) / 255


SILENCE = 128  # the code of 0


def encode(x: Array) -> Array:
    """Samples in [-1, 1] (clipped) to mu-law codes, uint8: f(x) rounded to the nearest of 256 levels."""
    f = np.sign(x) * np.log1p(255 * np.minimum(abs(x), 1, dtype=np.float64)) / np.log(256)
    return ((f + 1) * 127.5 + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- files


class Header(NamedTuple):
    """Samples a second, and how many (per channel)."""

    rate: int
    frames: int

    def resampled(self, rate: int) -> int:
        """How many samples there are at ``rate``."""
        ratio = _ratio(self.rate, rate)
        return -(-self.frames * ratio.numerator // ratio.denominator)


def _ratio(found: int, wanted: int) -> Fraction:
    """``wanted / found``, to 1 in 10,000 at worst where no small fraction will do."""
    small = min(found, wanted)
    up = Fraction(small, max(found, wanted)).limit_denominator(1000) or Fraction(1, 1000)
    return up if small == wanted else 1 / up


def _name(file: Path | bytes, name: str) -> str:
    return name or (str(file) if isinstance(file, Path) else "sound")


@contextmanager
def _opened(file: Path | bytes, name: str) -> Iterator[Any]:
    """The open file (soundfile's), with every way in which it can be bad turned into a DataError."""
    import soundfile

    name = _name(file, name)
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as raw:
            size = raw.seek(0, io.SEEK_END)
            raw.seek(0)
            start = raw.read(12)
            if not start:
                raise DataError(f"{name}: the file is empty")
            if start[:4] != b"fLaC" and (start[:4], start[8:]) != (b"RIFF", b"WAVE"):
                raise DataError(f"{name}: neither WAV nor FLAC")  # libsndfile knows many more, and is shown none
            if start[:4] == b"RIFF":
                _whole(raw, size, name)
            raw.seek(0)
            with soundfile.SoundFile(raw) as f:
                if f.format not in ("WAV", "WAVEX", "FLAC"):
                    raise DataError(f"{name}: neither WAV nor FLAC")
                if re.fullmatch(r"PCM_(S8|U8|16|24|32)|FLOAT|DOUBLE", f.subtype) is None:
                    raise DataError(f"{name}: sound packed as {f.subtype}: only plain samples are read")
                if not RATES[0] <= f.samplerate <= RATES[1]:
                    raise DataError(
                        f"{name}: {f.samplerate} samples a second are not between {RATES[0]} and {RATES[1]}"
                    )
                if f.channels > CHANNELS:
                    raise DataError(f"{name}: {f.channels} channels are more than {CHANNELS}")
                if f.frames <= 0:
                    raise DataError(f"{name}: no samples")
                if f.frames * f.channels > FRAMES:
                    raise DataError(f"{name}: more than {FRAMES / 1e6:.0f} million samples", hint="cut it into pieces")
                yield f
    except GencliError:
        raise
    except Exception as e:  # a decoder fed with garbage may raise anything
        said = archives.shown(" ".join(str(e).split())) or type(e).__name__
        raise DataError(f"{name}: cannot be read as sound ({said})") from e


def _whole(raw: Any, size: int, name: str) -> None:
    """DataError if the samples of a WAV file end before its header says: libsndfile takes what is there for the whole.

    A size of 2^32 - 1 was written into a pipe, where none is known.
    """
    at = 12
    while at + 8 <= size:
        raw.seek(at)
        kind, length = struct.unpack("<4sI", raw.read(8))
        at += 8 + length + length % 2
        if kind == b"data":
            if length != 2**32 - 1 and at - length % 2 > size:
                raise DataError(f"{name}: cut off, {at - length % 2 - size} bytes are missing")
            return
    raise DataError(f"{name}: no samples")


def header(file: Path | bytes, name: str = "") -> Header:
    """Rate and length as :func:`read` will find them, from the header alone. DataError as there."""
    with _opened(file, name) as f:
        return Header(f.samplerate, f.frames)


def read(file: Path | bytes, name: str = "", *, rate: int | None = None, most: int | None = None) -> tuple[Array, int]:
    """``(codes, rate)``: one recording as mu-law codes, uint8 ``(n,)``, and how many of them a second there are.

    ``file``: a path, or the file's bytes. ``name``: what to call it in errors. ``rate``: resample to this many samples
    a second (polyphase, Kaiser window); without it the file's own. ``most``: stop after so many codes.

    Raises DataError naming the file if it is empty, cut off, corrupt, of another format, holds samples that are not
    finite or far outside [-1, 1], or is longer or faster than sound for training is (seen from the header).
    """
    name = _name(file, name)
    with _opened(file, name) as f:
        found, wanted = f.samplerate, rate or f.samplerate
        if Header(found, f.frames).resampled(wanted) > FRAMES:
            raise DataError(f"{name}: more than {FRAMES / 1e6:.0f} million samples at {wanted} a second")
        frames = f.frames
        if most is not None:  # and a second more for the filter, which looks ahead
            frames = min(frames, int(most / _ratio(found, wanted)) + found)
        parts, left = [], frames
        while left > 0:
            block = f.read(min(BLOCK, left), dtype="float32", always_2d=True)
            if not len(block):
                raise DataError(f"{name}: cut off, {left} of {f.frames} samples are missing")
            x = block.mean(1, dtype=np.float32)
            if not np.isfinite(x).all() or abs(x).max() > 16:
                raise DataError(f"{name}: samples that are not finite, or far outside -1 .. 1")
            parts.append(encode(x) if found == wanted else x)
            left -= len(block)
    if found == wanted:
        return np.concatenate(parts)[:most], wanted
    from scipy.signal import resample_poly

    ratio = _ratio(found, wanted)
    y = resample_poly(np.concatenate(parts), ratio.numerator, ratio.denominator)[:most]
    return np.concatenate([encode(y[i : i + BLOCK]) for i in range(0, len(y), BLOCK)]), wanted


def wav(codes: Array, rate: int) -> bytes:
    """A WAV file of mu-law codes ``(n,)``: 16 bits, one channel. :func:`read` gives the same codes back."""
    return wav_header(len(codes), rate) + pcm(codes)


def wav_header(frames: int, rate: int) -> bytes:
    """The 44 bytes before ``frames`` samples of 16 bits."""
    if frames * 2 > 2**32 - 64:
        raise UsageError(f"{frames} samples do not fit a .wav", hint="-o folder/ writes a file each")
    sizes = struct.pack("<I", 36 + 2 * frames), struct.pack("<I", 2 * frames)
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + sizes[0] + b"WAVEfmt " + form + b"data" + sizes[1]


def pcm(codes: Array) -> bytes:
    """Mu-law codes as little-endian integers of 16 bits."""
    return np.rint(decode(codes) * 32767).astype("<i2").tobytes()


# ---------------------------------------------------------------------------------------------- windows


def _windows(n: int, length: int) -> int:
    """How many examples a recording of ``n`` samples makes."""
    return max(1, n // length + (n % length >= length / 2))


def _cut(codes: Array, length: int) -> Array:
    """A recording, uint8 ``(n,)``, as examples ``(k, 1, length)``."""
    k = _windows(len(codes), length)
    whole = np.full(k * length, SILENCE, np.uint8)
    whole[: len(codes)] = codes[: k * length]
    return whole.reshape(k, 1, length)


def _spec(name: str, length: int, rate: int, classes: tuple[str, ...], size: int) -> DataSpec:
    return DataSpec(name=name, kind="audio", shape=(1, length), levels=256, classes=classes, rate=rate, size=size)


# ---------------------------------------------------------------------------------------------- tones

NOTES, NOTE = 4, 400  # notes of a sound, samples of a note
SCALE = np.array([0, 2, 4, 7, 9, 12])  # pentatonic, in semitones
LOWEST = 110.0  # Hz
HARMONICS = 16


def _waveform(k: int, theta: Array, pitch: Array, top: float) -> Array:
    """The k-th waveform at the angles ``theta``, of harmonics below ``top``, with peaks of about 1."""
    x = np.sin(theta)
    if k == 0:
        return x
    step = 1 if k == 3 else 2  # triangle and square: odd harmonics alone
    turn, before, now = 2 * np.cos(step * theta), -np.sin((step - 1) * theta), x
    for h in range(1 + step, HARMONICS + 1, step):
        before, now = now, turn * now - before  # sin(h t) = 2 cos(s t) sin((h - s) t) - sin((h - 2 s) t)
        x = x + now * (pitch * h < top) * (1 / h if k > 1 else (2 - h % 4) / h**2)
    return x / (1.2, 0.93, 1.75)[k - 1]


def tones(name: str, split: str) -> TensorSource:
    """Four notes up or down a scale, ``(1, 1600)`` at 4,000 samples a second, in one of four waveforms.

    Class = waveform x direction. The key is one of twelve; phases, loudness and decay differ from sound to sound, and
    a faint noise (standard deviation 0.001) keeps the density of any sound finite. Waveforms are sums of harmonics
    below half the rate: sine 1; triangle 1, -1/9, 1/25, ...; square 1, 1/3, 1/5, ...; saw 1, 1/2, 1/3, ...
    """
    entry = SETS["tones"]
    sizes = dict(zip(SPLITS, entry.sizes or ()))
    n, g, rate = sizes[split], generator("tones", split), entry.rate or 1
    label = g.integers(8, size=n)
    wave, falling = label // 2, label % 2
    steps = np.sort(g.random((n, len(SCALE))).argsort(1)[:, :NOTES], 1)
    steps = np.where(falling[:, None] == 1, steps[:, ::-1], steps)
    pitch = LOWEST * 2 ** ((g.integers(12, size=(n, 1)) + SCALE[steps]) / 12)  # (n, notes), Hz
    phase = g.random((n, NOTES))
    loud, fade = g.uniform(0.3, 0.9, (n, 1, 1)), g.uniform(0.5, 2.5, (n, 1, 1))
    t = np.arange(NOTE) / rate
    x = np.empty((n, NOTES, NOTE))
    for k in range(4):
        rows = np.flatnonzero(wave == k)
        theta = 2 * np.pi * (pitch[rows, :, None] * t + phase[rows, :, None])
        x[rows] = _waveform(k, theta, pitch[rows, :, None], rate / 2)
    ramp = np.minimum(1, (np.arange(NOTE) + 1) / 20) * np.minimum(1, (NOTE - np.arange(NOTE)) / 20)  # no clicks
    x *= loud * ramp * np.exp(-fade * np.arange(NOTE) / NOTE)
    x = x.reshape(n, 1, -1) + 0.001 * g.standard_normal((n, 1, NOTES * NOTE))
    spec = _spec(name, NOTES * NOTE, rate, entry.classes, sizes["train"])
    return TensorSource(name, split, spec, torch.from_numpy(encode(x)), torch.from_numpy(label))


# ---------------------------------------------------------------------------------------------- fsdd

SPEAKERS, TAKES = 6, 50


def fsdd(entry: SetEntry, name: str, split: str, root: Path, length: int | None) -> TensorSource:
    """Spoken digits of the Free Spoken Digit Dataset, cut into windows (by default of 4,000 samples, half a second).

    Read from ``fsdd/recordings.zip`` or the folder ``fsdd/recordings`` below ``root``. Test is the official one, takes
    0 to 4 of every digit and speaker; of the others takes 5 to 9 are val. DataError where it is missing or bad.
    """
    length, folder = length or LENGTH, root / "fsdd"
    with _recordings(folder) as (names, content):
        found: dict[str, list[tuple[int, str]]] = {part: [] for part in SPLITS}
        for file in names:
            if m := re.fullmatch(r"(?:.*/)?(\d)_([a-z]+)_(\d{1,3})\.wav", file):
                part = "test" if int(m[3]) < 5 else "val" if int(m[3]) < 10 else "train"
                found[part].append((int(m[1]), file))
        count = sum(map(len, found.values()))
        if count != 10 * SPEAKERS * TAKES:
            raise DataError(f"{folder}: fsdd holds {count} recordings, which is not its official number")
        x, label, train = [], [], 0
        for part in {"train", split}:
            for digit, file in sorted(found[part]):
                data, where = content(file), f"{folder}: {archives.shown(file)}"
                if part == split:
                    codes, rate = read(data, where)
                    if rate != entry.rate:
                        raise DataError(f"{where}: {rate} samples a second, and fsdd has {entry.rate}")
                    x.append(_cut(codes, length))
                    label += [digit] * len(x[-1])
                if part == "train":
                    train += _windows(len(codes) if part == split else header(data, where).frames, length)
    spec = _spec(name, length, entry.rate or 1, entry.classes, train)
    return TensorSource(name, split, spec, torch.from_numpy(np.concatenate(x)), torch.tensor(label))


@contextmanager
def _recordings(folder: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The names of the recordings and what gives one's bytes."""
    loose = folder / "recordings"
    if loose.is_dir():
        yield sorted(p.name for p in loose.iterdir()), lambda file: archives.content(loose / file, archives.MEMBER)
        return
    if not (folder / "recordings.zip").is_file():
        raise DataError(
            f"{folder}: recordings.zip is not there, and cannot be downloaded by gencli",
            hint="put the folder recordings of github.com/Jakobovski/free-spoken-digit-dataset there, packed or not, "
            "or name the folder of all sets with --data-root or GENCLI_DATA",
        )
    try:
        with zipfile.ZipFile(folder / "recordings.zip") as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}

            def content(file: str) -> bytes:
                if sizes[file] > archives.MEMBER:
                    raise DataError(f"{folder}: {archives.shown(file)} has more than {archives.MEMBER >> 20} MB")
                return archive.read(file)

            yield sorted(sizes), content
    except GencliError:
        raise
    except Exception as e:  # zip knows many ways to be bad
        raise DataError(f"{folder / 'recordings.zip'}: cannot be read ({archives.shown(str(e))})") from e


# ---------------------------------------------------------------------------------------------- a user's folder


def load_folder(root: Path, name: str, split: str, *, length: int | None, on_bad: str) -> TensorSource:
    """The recordings of ``split`` below ``root``, in windows of ``length`` samples (4,000 without).

    Folders mean classes and splits as with images (:mod:`gencli.data.folders`). The rate that most files have is the
    set's; files of another are resampled. Raises DataError where there are no sounds or too many, one is bad
    (``on_bad = "fail"``) or more than 10 % are ("skip").
    """
    length = length or LENGTH
    splits = folders.listed(root, SUFFIXES, "sounds")
    everything = [item for part in SPLITS for item in splits[part]]
    heads, bad = folders.inspected(everything, header, read if on_bad == "skip" else None)
    splits = folders.without(root, splits, bad, on_bad, "sounds")
    classes = folders.classes_of(root, splits)
    counts = Counter(head.rate for head in heads.values())
    rate = max(counts, key=lambda r: (counts[r], r))
    if len(counts) > 1:
        _once(f"{root}: resampled {len(heads) - counts[rate]} of {len(heads)} sounds to {rate} samples a second")
    windows = {
        part: sum(_windows(heads[item.name].resampled(rate), length) for item in splits[part]) for part in SPLITS
    }
    if not windows[split]:
        raise DataError(
            f"{root}: no sounds for {split} ({len(everything)} in all)", hint=f"make a folder {split}/ there"
        )
    if windows[split] * length > IN_MEMORY:
        raise DataError(f"{root}: more than {IN_MEMORY / 1e6:.0f} million samples for {split}", hint="take fewer files")
    found = folders.threads(lambda item: _cut(read(item.path, str(item.path), rate=rate)[0], length), splits[split])
    spec = _spec(name, length, rate, classes, windows["train"])
    label = [classes.index(item.group) for item, x in zip(splits[split], found) for _ in x if item.group is not None]
    x = torch.from_numpy(np.concatenate(found))
    return TensorSource(name, split, spec, x, torch.tensor(label) if classes else None)


@cache
def _once(text: str) -> None:
    """Say ``text``, the first time alone: train and val of one folder have the same to say."""
    say(text)
