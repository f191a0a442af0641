"""Hostile inputs by the thousand: ``python -m tests.fuzz [--inputs 20000] [--seed 0] [--replay KIND:INDEX]``.

Real files of every kind that gencli reads are mutated in their bytes (then with checksums put right, to get further
in) and in their structure. Each input is either accepted with a valid value or refused by a ``GencliError`` of one line
for each problem, within a second of processor time and 200 MB of memory. Input ``index`` of ``kind`` depends on
(seed, kind, index) alone. Exit status 1 if one input failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from safetensors.torch import save

from gencli import (
    archives,
    checkpoint,
    dictionaries,
    files,
    given,
    pickles,
    recipe,
    run,
    streams,
    strict_yaml,
    translation,
    vectors,
)
from gencli.console import GencliError
from gencli.contract import DataSpec
from gencli.data import SPLITS, audio, packing, shards
from gencli.data.images import decode, header
from gencli.data.source import TensorSource
from gencli.data.user import load_path
from gencli.header import DTYPES, read_header
from gencli.metrics import similarity
from gencli.metrics.extractors import Pixels
from gencli.metrics.frechet import Moments, distance
from gencli.metrics.reference import About, Saved
from gencli.rng import generator
from tests.tiny import session, tiny

SECONDS, MEGABYTES, LINE = 1.0, 200.0, 2000
FLIPS = 3000
Rng = np.random.Generator
MODEL, TRAINING, MANIFEST = "model.safetensors", "training.safetensors", "manifest.json"


# ---------------------------------------------------------------------------------------------- mutations

WORDS = [
    "",
    "a\nb",
    "\x1b[31m",
    "\u2028",
    "\ud800",
    "\0",
    "x" * 3000,
    "../../x",
    "null",
    "1e999",
    "name",
    "%s%n",
    "source",
    "spec",
]
NUMBERS = [0, 1, -1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400]
REALS = [0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]


def value(g: Rng, depth: int = 0) -> Any:
    """Something that a file might hold where another thing is meant."""
    kind = int(g.integers(9 if depth < 3 else 6))
    if kind == 0:
        return WORDS[g.integers(len(WORDS))]
    if kind == 1:
        return NUMBERS[g.integers(len(NUMBERS))]
    if kind == 2:
        return REALS[g.integers(len(REALS))]
    if kind <= 4:
        return [None, True, False, [], {}][g.integers(5)]
    if kind == 5:
        deep: Any = []
        for _ in range(g.choice([5, 30, 200])):
            deep = [deep] if g.integers(2) else {"a": deep}
        return deep
    if kind == 6:
        return [value(g, depth + 1) for _ in range(g.integers(4))]
    return {str(value(g, 9))[:50]: value(g, depth + 1) for _ in range(g.integers(4))}


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside ``tree``."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def restructured(g: Rng, tree: Any) -> Any:
    """``tree`` with a few values replaced, removed, renamed, copied or added."""
    tree = json.loads(json.dumps({"root": tree}))
    for _ in range(g.integers(1, 4)):
        found = list(places(tree))
        inside, key = found[g.integers(len(found))]
        other, there = found[g.integers(len(found))]
        action = g.integers(6)
        if action <= 1:
            inside[key] = value(g)
        elif action == 2:
            inside[key] = json.loads(json.dumps(other[there]))
        elif action == 3 and isinstance(inside[key], (int, float)):
            inside[key] = inside[key] * int(g.integers(-3, 4)) + int(g.integers(-2, 3))
        elif action == 4 and key != "root":
            del inside[key]
        elif isinstance(inside[key], dict):
            inside[key][str(there) if g.integers(2) else WORDS[g.integers(len(WORDS))]] = value(g)
        else:
            inside[key] = [inside[key]]
    return tree.get("root")


def as_json(g: Rng, tree: Any) -> bytes:
    if g.integers(40) == 0:
        return b"[" * 5000
    text = json.dumps(tree, ensure_ascii=bool(g.integers(2)), indent=int(g.integers(3)) or None)
    return text.encode("utf-8", "surrogatepass")


def damaged(g: Rng, data: bytes, other: bytes = b"") -> bytes:
    """``data`` with a few bits, bytes, numbers or stretches changed, moved, lost, or taken from ``other``."""
    out = bytearray(data)
    for _ in range(g.integers(1, 5)):
        n = len(out)
        if not n:
            break
        a = int(g.integers(min(n, 64))) if g.integers(3) == 0 else int(g.integers(n))
        b = min(n, a + int(g.integers(1, 33)))
        match int(g.integers(10)):
            case 0 | 1:
                out[a] ^= 1 << int(g.integers(8))
            case 2:
                out[a] = int(g.choice([0, 1, 10, 32, 34, 48, 57, 127, 128, 255]))
            case 3:
                out[a:b] = g.bytes(b - a)
            case 4:
                size = int(g.choice([2, 4, 8]))
                number = int(g.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1])) % 2 ** (8 * size)
                out[a : a + size] = number.to_bytes(size, "little" if g.integers(2) else "big")
            case 5:
                del out[a:b]
            case 6:
                del out[a:]
            case 7:
                out[a:a] = out[a:b] * int(g.choice([1, 2, 50]))
            case 8:
                c = int(g.integers(n))
                out[c:c] = out[a:b]
            case _ if other:
                c = int(g.integers(len(other)))
                out[a:b] = other[c : c + int(g.integers(1, 200))]
            case _:
                out[a:a] = b"\0" * int(g.integers(1, 600))
    return bytes(out)


def summed_png(data: bytes) -> bytes:
    """``data`` with the checksum of every chunk put right."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        size = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + size > len(out):
            break
        out[at + 8 + size : at + 12 + size] = zlib.crc32(out[at + 4 : at + 8 + size]).to_bytes(4, "big")
        at += 12 + size
    return bytes(out)


def summed_tar(data: bytes) -> bytes:
    """``data`` with the checksum of every block that once was a header put right."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            block = out[at : at + 512]
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            out[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(out)


# ---------------------------------------------------------------------------------------------- what is mutated


@dataclass
class Material:
    """Real files of every kind, made once, and a folder to write mutated ones into."""

    folder: Path
    recipes: list[bytes] = field(default_factory=list)
    pictures: dict[str, list[bytes]] = field(default_factory=dict)
    sounds: dict[str, list[bytes]] = field(default_factory=dict)
    tars: list[bytes] = field(default_factory=list)
    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)
    pickled: list[bytes] = field(default_factory=list)
    run: Path = Path()
    step: Path = Path()
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


SOUND = DataSpec(name="tones", kind="audio", shape=(1, 60), levels=256, rate=8000)
TEXT = DataSpec(name="docs", kind="text", shape=(9,), levels=4, vocabulary=("\ufffd", "\n", "é", " two"))


def spoken(spec: DataSpec, n: int = 4) -> streams.Samples:
    x = generator("fuzz", spec.kind).integers(spec.levels or 2, size=(n, *spec.shape))
    return streams.Samples(x.astype(np.uint8 if spec.kind == "audio" else np.int16), np.arange(n))


def recorded(kind: str, subtype: str, channels: int = 1, rate: int = 8000, n: int = 900) -> bytes:
    out = io.BytesIO()
    x = generator("fuzz", "sound").uniform(-0.5, 0.5, (n, channels)).cumsum(0) / 20
    soundfile.write(out, x.clip(-1, 1), rate, format=kind, subtype=subtype)
    return out.getvalue()


def samples(points: bool, n: int = 4) -> tuple[DataSpec, streams.Samples]:
    g = generator("fuzz", "samples")
    if points:
        return DataSpec(name="p", kind="points", shape=(2,)), streams.Samples(
            g.standard_normal((n, 2)).astype(np.float32)
        )
    x = g.integers(17, size=(n, 1, 4, 4), dtype=np.uint8)
    return DataSpec(name="digits", kind="image", shape=(1, 4, 4), levels=17), streams.Samples(x, np.arange(n))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def material(folder: Path) -> Material:
    m = Material(folder)
    m.recipes = [r.path.read_bytes() for r in recipe.list_recipes()]
    g = generator("fuzz", "material")
    rgb = Image.fromarray(g.integers(256, size=(9, 13, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        m.pictures[kind] = [encoded(rgb, kind), encoded(rgb.convert("L"), kind)]
    m.pictures["PNG"] += [encoded(rgb.convert(mode), "PNG") for mode in ("P", "RGBA", "LA", "1")]
    m.pictures["PNG"] += [encoded(Image.fromarray(g.integers(2**16, size=(5, 5), dtype=np.uint16)), "PNG")]
    m.pictures["JPEG"] += [encoded(rgb, "JPEG", exif=exif), encoded(rgb, "JPEG", progressive=True)]
    m.pictures["JPEG"] += [encoded(rgb.convert("CMYK"), "JPEG")]
    m.pictures["TIFF"] += [
        encoded(rgb, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    ]
    m.pictures["WEBP"] += [encoded(rgb, "WEBP", lossless=True), encoded(rgb.convert("RGBA"), "WEBP", exif=exif)]
    for points in (False, True):
        spec, chunk = samples(points)
        path = folder / "material.tar"
        streams.write(str(path), iter([chunk]), spec, {"model": "vae", "seed": 0}, 4)
        m.tars.append(path.read_bytes())
        for ending in ("npz", "safetensors"):
            path = folder / f"material.{ending}"
            streams.write(str(path), iter([chunk]), spec, {"model": "vae"}, 4)
            m.tables.append(path.read_bytes())
        m.arrays += [chunk.x, chunk.x.astype(np.float64), np.asfortranarray(chunk.x)]
    for spec in (SOUND, TEXT):
        path = folder / "material.tar"
        streams.write(str(path), iter([spoken(spec)]), spec, {"model": "wavenet", "seed": 0}, 4)
        m.tars.append(path.read_bytes())
        path = folder / "material.safetensors"
        streams.write(str(path), iter([spoken(spec)]), spec, {"model": "wavenet"}, 4)
        m.tables += [m.tables[0], path.read_bytes()]
    for kind in ("WAV", "FLAC"):
        m.sounds[kind] = [
            recorded(kind, "PCM_16"),
            recorded(kind, "PCM_24", 2, 44100),
            recorded(kind, "PCM_16", 1, 4000),
        ]
    m.sounds["WAV"] += [recorded("WAV", t) for t in ("PCM_U8", "PCM_32", "FLOAT", "DOUBLE")]
    m.sounds["WAV"] += [recorded("WAVEX", "PCM_24", 2), recorded("WAV", "IMA_ADPCM"), recorded("WAV", "GSM610")]
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=style) as archive:
            for i in range(2):
                for ending, data in ((".png", m.pictures["PNG"][1]), (".cls", b"%d" % i)):
                    info = tarfile.TarInfo("é" + "x" * 120 + f"-{i}{ending}")
                    info.size, info.mtime = len(data), 1.5
                    archive.addfile(info, io.BytesIO(data))
        m.tars.append(out.getvalue())
    small = tiny("wgan-gp", "data.name=points/moons", "model.hidden=[2]", "model.latents=2", "train.steps=2")
    with session(small) as made, run.Run.create(out=folder / "run") as opened:
        made.start(opened)
        made.trainer.step()
        made.save()
        opened.metric("step", 1, loss=0.5)
        m.run, m.step = opened.path, checkpoint.latest(opened.path) or Path()
    checkpoint.mark_best(m.run, 1, "nll", 0.5)
    m.state = checkpoint.load(m.step).model.state_dict()
    for new in (True, False):
        out = io.BytesIO()
        weights = {"a.weight": torch.arange(6.0).view(2, 3).T, "a.bias": torch.zeros(3), "n": torch.tensor(3)}
        torch.save(weights, out, _use_new_zipfile_serialization=new)
        m.pickled.append(out.getvalue())
    return m


# ---------------------------------------------------------------------------------------------- the kinds

Kind = Callable[[Material, Rng], None]  # returns where the input is accepted and its value is valid
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__.replace("_", "-")] = function
    return function


def plain(tree: Any) -> bool:
    """Whether ``tree`` holds nothing but what YAML and JSON may say, without NaN or infinities."""
    if isinstance(tree, dict):
        return all(isinstance(k, str) and plain(v) for k, v in tree.items())
    if isinstance(tree, list):
        return all(map(plain, tree))
    return tree is None or isinstance(tree, (str, bool, int)) or (isinstance(tree, float) and math.isfinite(tree))


def parsed(found: Any) -> None:
    assert plain(found)
    assert strict_yaml.parse(strict_yaml.dump(found), "again")[0] == found


@kind
def yaml_text(m: Material, g: Rng) -> None:
    data = damaged(
        g, m.recipes[g.integers(len(m.recipes))], b"&a *a !!python/object:os.system [1] <<: {a: 0x_1}\t- ? |\n"
    )
    parsed(strict_yaml.read(m.file("x.yaml", data), "x.yaml")[0])


@kind
def yaml_tree(m: Material, g: Rng) -> None:
    parsed(strict_yaml.read(m.file("x.yaml", as_json(g, value(g))), "x.yaml")[0])


PLACE = re.compile(r"(x\.yaml( line \d+)?|override ('.*'|\".*\"|.*\.\.\.)|option .+): .")


def recipe_of(path: Path, overrides: list[str]) -> None:
    try:
        made = recipe.load(str(path), overrides, model=True)
    except GencliError as error:
        # one line a problem, each with its place
        assert all(PLACE.match(line.replace(str(path), "x.yaml")) for line in str(error).split("\n")), str(error)
        raise
    again = path.with_name("again.yaml")
    again.write_text(recipe.dump(made))
    assert recipe.load(str(again)) == made


@kind
def recipe_text(m: Material, g: Rng) -> None:
    data = damaged(g, m.recipes[g.integers(len(m.recipes))], m.recipes[g.integers(len(m.recipes))])
    recipe_of(m.file("x.yaml", data), [])


@kind
def recipe_tree(m: Material, g: Rng) -> None:
    tree = strict_yaml.parse(m.recipes[g.integers(len(m.recipes))].decode(), "x.yaml")[0]
    recipe_of(m.file("x.yaml", as_json(g, restructured(g, tree))), [])


KEYS = ["train.lr", "train.steps", "train.betas", "train.phases.a.lr", "model.name", "model.hidden", "model", "seed"]
KEYS += ["data.name", "train", "", ".", "a..b", "model.latents", "train.lr.x", "threads", "\n", "é"]


GOOD = [
    "1e-4",
    "3",
    "100",
    "0",
    "0.5",
    "true",
    "[0.5, 0.9]",
    "adam",
    "linear",
    "null",
    "[16]",
    "digits",
    "vae",
    "float64",
]


@kind
def overrides(m: Material, g: Rng) -> None:
    path = m.file("x.yaml", m.recipes[g.integers(len(m.recipes))])
    words = []
    for _ in range(g.integers(1, 3)):
        how = g.integers(4)
        text = GOOD[g.integers(len(GOOD))] if how < 2 else json.dumps(value(g, 2)) if how == 2 else str(value(g, 2))
        word = f"{KEYS[g.integers(len(KEYS))]}={text}"
        if g.integers(3) == 0:
            word = damaged(g, word.encode("utf-8", "replace")).decode("utf-8", "surrogateescape")
        words.append(word)
    recipe_of(path, words)


def finite(tensors: dict[str, torch.Tensor]) -> None:
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


@kind
def safetensors_header(m: Material, g: Rng) -> None:
    whole = (m.step / (MODEL if g.integers(2) else TRAINING)).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    tree = json.loads(whole[8 : 8 + size])
    if g.integers(2):
        meta = restructured(g, json.loads(tree["__metadata__"]["gencli"]))
        tree["__metadata__"]["gencli"] = as_json(g, meta).decode("utf-8", "replace")
    else:
        tree = restructured(g, tree)
    head = as_json(g, tree) if g.integers(4) else damaged(g, as_json(g, tree))
    length = len(head) if g.integers(8) else [0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1][g.integers(7)]
    path = m.file("x.safetensors", struct.pack("<Q", length) + head + whole[8 + size :])
    meta, tensors = read_header(path)
    assert isinstance(meta, dict) and all(d in DTYPES for d, _ in tensors.values())
    finite(checkpoint.load(path).model.state_dict())


@kind
def checkpoint_file(m: Material, g: Rng) -> None:
    data = damaged(g, (m.step / MODEL).read_bytes(), (m.step / TRAINING).read_bytes())
    finite(checkpoint.load(m.file("x.safetensors", data)).model.state_dict())


def same_or_refused(m: Material, folder: Path) -> None:
    checkpoint.verify(folder)
    state = checkpoint.load(folder).model.state_dict()
    assert state.keys() == m.state.keys() and all(torch.equal(t, m.state[n]) for n, t in state.items())
    checkpoint.load_training(folder)


def copied(m: Material, name: str) -> Path:
    target = m.folder / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(m.run if name == "copied" else m.step, target)
    return target


def json_of(g: Rng, path: Path) -> bytes:
    data = path.read_bytes()
    return as_json(g, restructured(g, json.loads(data))) if g.integers(3) else damaged(g, data)


@kind
def checkpoint_with_manifest(m: Material, g: Rng) -> None:
    folder = copied(m, "step-000009")
    name = [MANIFEST, MODEL, TRAINING][g.integers(3)]
    (folder / name).write_bytes(
        json_of(g, folder / name) if name == MANIFEST else damaged(g, (folder / name).read_bytes())
    )
    same_or_refused(m, folder)


@kind
def run_json(m: Material, g: Rng) -> None:
    folder = copied(m, "copied")
    (folder / "run.json").write_bytes(json_of(g, folder / "run.json"))
    listed = [r for r in run.list_runs(m.folder) if r["path"] == folder]
    assert isinstance(run.read_record(folder), dict) and len(listed) == 1
    run.newest(m.folder)


@kind
def best_json(m: Material, g: Rng) -> None:
    folder = copied(m, "copied")
    best = folder / "checkpoints" / "best.json"
    best.write_bytes(json_of(g, best))
    assert checkpoint.resolve(folder).name == MODEL
    checkpoint.prune(folder, 1)
    assert len(checkpoint.steps(folder)) == 1


@kind
def metrics_jsonl(m: Material, g: Rng) -> None:
    folder = copied(m, "copied")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    k = int(g.integers(len(lines)))
    lines[k] = json.dumps(restructured(g, json.loads(lines[k]))).encode()
    text = b"\n".join(lines) + b"\n"
    (folder / "metrics.jsonl").write_bytes(text if g.integers(2) else damaged(g, text))
    with run.Run.open(folder) as opened:
        opened.truncate_metrics(1)
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        assert json.loads(line)["step"] <= 1


def reading(path: Path) -> None:
    """Everything in ``path`` as samples."""
    found = streams.read(str(path))
    files.canonical(found.meta).encode()  # can be written again
    for chunk in found:
        assert chunk.x.shape[1:] == found.spec.shape and len(chunk.x) and isinstance(chunk.first, int)
        assert chunk.label is None or (chunk.label.shape == chunk.x.shape[:1] and chunk.label.dtype == np.int64)
        if found.spec.levels is None:
            assert chunk.x.dtype == np.float32 and np.isfinite(chunk.x).all()
        else:
            assert chunk.x.dtype in (np.uint8, np.int16) and chunk.x.min() >= 0 and chunk.x.max() < found.spec.levels


NAMES = ["../../x.png", "/tmp/x.png", "a\nb.png", "a\0b.png", "x.png", ".", "..", "", "a.JSON", "x" * 99, "\udcff.png"]


@kind
def tar(m: Material, g: Rng) -> None:
    data = m.tars[g.integers(len(m.tars))]
    if g.integers(2):
        out = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as archive,
            tarfile.open(fileobj=out, mode="w", format=int(g.integers(3))) as new,
        ):
            for info in archive:
                body = archive.extractfile(info).read()
                if g.integers(4) == 0:
                    info.name = NAMES[g.integers(len(NAMES))]
                if g.integers(8) == 0:
                    info.type = [b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S"][
                        g.integers(14)
                    ]
                    info.linkname = "../../etc/passwd"
                if g.integers(6) == 0:
                    body = damaged(g, body)
                    info.size = len(body)
                with contextlib.suppress(ValueError, UnicodeError):
                    new.addfile(info, io.BytesIO(body))
        data = out.getvalue()
    else:
        data = damaged(g, data, m.tars[g.integers(len(m.tars))])
        data = summed_tar(data) if g.integers(2) else data
    reading(m.file("x.tar", data))


@kind
def sidecar(m: Material, g: Rng) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(m.tars[g.integers(4)])) as archive:
        for info in archive:
            body = archive.extractfile(info).read()
            if info.name.endswith(".json") and g.integers(2):
                body = as_json(g, restructured(g, json.loads(body))) if g.integers(4) else damaged(g, body)
            archives.write_member(out, info.name, body)
    archives.write_end(out)
    reading(m.file("x.tar", out.getvalue()))


def npy(x: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, x, allow_pickle=False)
    return out.getvalue()


HEADS = ["<f8", "|O", "|V0", "|S0", "<U3", "<M8[s]", "<c8", "<f2", ">i8", "|b1", [["a", "<f4"]], "", 7, "<f4,<f4"]
SHAPES = [(), (0,), (-1, 2), (2**62, 2**62), (4,), (4, 2), (2, 0, 3), (True, 2), (1.5,), (10**9,), "x", (4, 1, 1, 1, 1)]


def array_file(m: Material, g: Rng) -> bytes:
    data = npy(m.arrays[g.integers(len(m.arrays))])
    if g.integers(2):
        return damaged(g, data)
    descr = HEADS[g.integers(len(HEADS))] if g.integers(2) else ["|u1", "<f4", "<f8"][g.integers(3)]
    shape = SHAPES[g.integers(len(SHAPES))] if g.integers(2) else [(4, 2), (2, 1, 2, 2)][g.integers(2)]
    text = repr({"descr": descr, "fortran_order": [True, False, False, 2][g.integers(4)], "shape": shape})
    if g.integers(8) == 0:
        text = str(g.choice(["-" * 9000 + "1", "[" * 9000, "{", "{'descr': " * 500, "__import__('os')", text[:-9]]))
    head = text.encode() + b" " * int(g.integers(64)) + b"\n"
    version = int(g.choice([1, 1, 1, 1, 1, 2, 3, 9]))
    size = struct.pack("<H" if version == 1 else "<I", len(head))
    return b"\x93NUMPY" + bytes([version, 0]) + size + head + data[128:] + bytes(int(g.integers(99)))


@kind
def npy_file(m: Material, g: Rng) -> None:
    reading(m.file("x.npy", array_file(m, g)))


def archive_file(m: Material, g: Rng) -> bytes:
    if g.integers(2):
        return damaged(g, m.tables[int(g.choice([0, 2]))])
    out = io.BytesIO()
    names = [
        "x",
        "y",
        "label",
        "x_train",
        "x_val",
        "y_train",
        "levels",
        "classes",
        "gencli",
        "a\nb",
        "arr_0",
        "../../z",
    ]
    with zipfile.ZipFile(out, "w", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][g.integers(2)]) as archive:
        for name in ["x", *g.choice(names, int(g.integers(4)))]:
            body = array_file(m, g) if g.integers(2) else npy(value_array(m, g))
            with warnings.catch_warnings(action="ignore"):  # of names that come twice
                archive.writestr(f"{name}.npy", body)
    return damaged(g, out.getvalue()) if g.integers(4) == 0 else out.getvalue()


def value_array(m: Material, g: Rng) -> Any:
    x = [
        *m.arrays,
        np.arange(4),
        np.array(7),
        np.array(["a\nb", "b"]),
        np.array("{}"),
        np.array(1e400),
        np.array(2**40),
    ]
    x += [np.zeros((40, 2)), np.zeros((40, 3, 3), np.uint8), np.array("x"), np.array([2**64 - 1] * 4, np.uint64)]
    return x[g.integers(len(x))]


@kind
def npz_file(m: Material, g: Rng) -> None:
    reading(m.file("x.npz", archive_file(m, g)))


@kind
def tensor_file(m: Material, g: Rng) -> None:
    whole = m.tables[int(g.choice([1, 3, 5, 7]))]
    size = int.from_bytes(whole[:8], "little")
    if g.integers(2):
        tree = json.loads(whole[8 : 8 + size])
        if g.integers(2):
            tree = restructured(g, tree)
        else:
            said = restructured(g, json.loads(tree["__metadata__"]["gencli"]))
            tree["__metadata__"]["gencli"] = as_json(g, said).decode("utf-8", "replace")
        head = as_json(g, tree)
        whole = struct.pack("<Q", len(head)) + head + whole[8 + size :]
    else:
        whole = damaged(g, whole)
    reading(m.file("x.safetensors", whole))


@kind
def pickled_weights(m: Material, g: Rng) -> None:
    """A .pth file of either format; of an archive mostly one member, with its checksum put right."""
    whole = m.pickled[g.integers(len(m.pickled))]
    if whole[:2] == b"PK" and g.integers(4):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
            chosen = "pkl" if g.integers(4) else "/0"
            for name in old.namelist():
                body = old.read(name)
                new.writestr(name, damaged(g, body, m.pickled[1]) if name.endswith(chosen) else body)
        whole = out.getvalue()
    else:
        whole = damaged(g, whole)
    found = pickles.tensors(whole, "x.pth")
    assert all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in found.items())
    assert sum(t.numel() for t in found.values()) < 10**6


@kind
def statistics_file(m: Material, g: Rng) -> None:
    """A file of gencli data stats: its header, its numbers or its bytes."""
    moments = Moments(3)
    moments.add(torch.from_numpy(generator("fuzz", "moments").standard_normal((int(g.choice([2, 9])), 3))))
    body, spec = moments.tensors(), samples(False)[0]
    said: Any = {"name": "pixels", "digest": "pixels", "extractor": "pixels", "data": "digits@test"}
    said |= {"spec": spec.model_dump(mode="json")}
    match int(g.integers(4)):
        case 0:
            said = restructured(g, said)
        case 1:
            name = list(body)[g.integers(len(body))]
            body[name] = torch.from_numpy(np.asarray(g.choice([-1, 0, 3, np.inf, 1e300], tuple(g.integers(4, size=2)))))
        case _:
            pass
    whole = save(body, {"gencli": as_json(g, {"stats": said}).decode("utf-8", "replace")})
    path = m.file("x.safetensors", damaged(g, whole) if g.integers(2) else whole)
    about = About.read(path)
    found = Saved(path, Pixels())
    assert about.data == found.name and found.moments.n >= 2 and found.spec.dims > 0
    assert math.isfinite(distance(found.moments, moments)) if found.moments.d == 3 else True


@kind
def user_data(m: Material, g: Rng) -> None:
    name = ["x.npz", "x.npy"][g.integers(2)]
    path = m.file(name, archive_file(m, g) if name == "x.npz" else array_file(m, g))
    source = load_path(path, name, ["train", "val", "test"][g.integers(3)])
    x = source.rows(torch.arange(min(source.size or 1, 3)))["x"]
    assert tuple(x.shape[1:]) == source.spec.shape and source.spec.dims > 0
    assert x.dtype == (torch.float32 if source.spec.levels is None else torch.uint8)
    finite({"x": x})


@kind
def image_folder(m: Material, g: Rng) -> None:
    folder = m.folder / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for n in range(4):
        data = m.pictures["PNG"][0]
        (folder / f"{n}.png").write_bytes(damaged(g, data) if n == 2 else data)
    source = load_path(folder, "pictures", "train")
    assert source.rows(torch.arange(1))["x"].dtype == torch.uint8


@kind
def shard_folder(m: Material, g: Rng) -> None:
    """Shards with a damaged manifest, index or tar, mostly with checksums that vouch for the damage."""
    packed, folder = m.folder / "packed", m.folder / "shards"
    if not packed.exists():
        spec, chunk = samples(False)
        spec = spec.model_copy(update={"classes": tuple("0123"), "size": 4})
        made = [TensorSource("digits", s, spec, torch.from_numpy(chunk.x), torch.arange(4)) for s in SPLITS]
        packing.pack(made, packed, 4096, lambda: None)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(packed, folder)
    manifest, index, tar = folder / shards.MANIFEST, folder / "train-000001.index", folder / "train-000001.tar"
    said, kept = json.loads(manifest.read_bytes()), index.read_bytes()
    match int(g.integers(4)):
        case 0:
            manifest.write_bytes(damaged(g, manifest.read_bytes()))
        case 1:
            manifest.write_bytes(as_json(g, restructured(g, said)))
        case 2:
            kept = damaged(g, kept)
        case _:
            tar.write_bytes(damaged(g, tar.read_bytes()))
            said["shards"]["train"][1]["bytes"] = tar.stat().st_size
            entry = np.frombuffer(kept, shards.ENTRY)[0]
            data = tar.read_bytes()[int(entry["offset"]) :][: int(entry["length"])]
            kept = kept[:24] + hashlib.sha256(data).digest()[:16] + kept[40:]
    if kept != index.read_bytes():
        index.write_bytes(kept)
        if g.integers(4):
            said["shards"]["train"][1]["index_sha256"] = hashlib.sha256(kept).hexdigest()
            manifest.write_text(json.dumps(said))
    source = shards.load_shards(str(folder), "x", "train")
    x = source.rows(torch.arange(min(source.size, 6)))["x"]
    assert tuple(x.shape[1:]) == source.spec.shape and source.spec.dims > 0
    finite({"x": x})


def picture(of: str) -> Kind:
    def check(m: Material, g: Rng) -> None:
        corpus = m.pictures[of]
        data = damaged(g, corpus[g.integers(len(corpus))], corpus[g.integers(len(corpus))])
        data = summed_png(data) if of == "PNG" and g.integers(4) else data
        size = 8 if g.integers(4) == 0 else None
        x = decode(data, "x", size=size)
        assert x.dtype == np.uint8 and x.ndim == 3 and x.shape[0] in (1, 3) and 0 not in x.shape
        assert size is not None or header(data, "x")[1:] == x.shape[1:]

    check.__name__ = f"image_{of.lower()}"
    return kind(check)


for _of in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
    picture(_of)


def sound(of: str) -> Kind:
    def check(m: Material, g: Rng) -> None:
        corpus = m.sounds[of]
        data = damaged(g, corpus[g.integers(len(corpus))], corpus[g.integers(len(corpus))])
        rate = [None, 8000, 11025, 384_000][g.integers(4)]
        codes, found = audio.read(data, "x", rate=rate)
        assert codes.dtype == np.uint8 and codes.ndim == 1 and len(codes) == audio.header(data, "x").resampled(found)
        assert found == (rate or audio.header(data, "x").rate)
        (begun,) = given.read_prompts([str(m.file("x.wav", data))], SOUND)
        assert begun.dtype == np.uint8 and begun.shape[0] == 1 and 0 < begun.shape[1] <= 60
        reading(m.folder / "x.wav")

    check.__name__ = f"sound_{of.lower()}"
    return kind(check)


for _of in ("WAV", "FLAC"):
    sound(_of)


@kind
def sound_folder(m: Material, g: Rng) -> None:
    folder = m.folder / "sounds"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for n in range(12):
        data = m.sounds["WAV"][g.integers(2)]
        (folder / f"{n}.wav").write_bytes(damaged(g, data) if n == 2 else data)
    source = load_path(folder, "sounds", "train", size=100, on_bad=["fail", "skip"][g.integers(2)])
    x = source.rows(torch.arange(source.size or 1))["x"]
    assert x.dtype == torch.uint8 and tuple(x.shape[1:]) == (1, 100) and source.spec.rate


@kind
def text_file(m: Material, g: Rng) -> None:
    data = damaged(
        g, (" ".join(WORDS[:5]) * 3 + "été, one two\r\n" * 30).encode("utf-8", "replace"), b"\xff\xfe\0\xc3("
    )
    name = ["x.txt", "x.txt.gz"][g.integers(2)]
    if name == "x.txt.gz":
        data = gzip.compress(data)
        data = damaged(g, data) if g.integers(2) else data
    path = m.file(name, data)
    source = load_path(
        path, name, "val", unit=(None, "words", "tokens")[g.integers(3)], size=4, on_bad=["fail", "skip"][g.integers(2)]
    )
    x = source.rows(torch.arange(source.size or 1))["x"]
    assert x.dtype == torch.int16 and x.min() >= 0 and x.max() < len(source.spec.vocabulary) == source.spec.levels
    (begun,) = given.read_prompts([str(path)], source.spec)
    assert begun.dtype == np.int16 and begun.ndim == 1


NOTES = b"\xff\0\n \t\rnan1e999-\xef\xbb\xbf:#"  # what may stand amid words and numbers


def packed(m: Material, g: Rng, name: str, data: bytes) -> Path:
    """``data``, damaged, in a file; or packed by gzip before or after that."""
    if g.integers(3):
        return m.file(name, damaged(g, data, NOTES))
    return m.file(f"{name}.gz", damaged(g, gzip.compress(data)) if g.integers(2) else gzip.compress(damaged(g, data)))


def word_vectors(ending: str) -> Kind:
    def check(m: Material, g: Rng) -> None:
        n, d = int(g.integers(1, 7)), int(g.integers(1, 5))
        vectors.write(
            path := m.folder / "words" / f"whole{ending}", [f"w{i}é" for i in range(n)], g.normal(size=(n, d))
        )
        data = path.read_bytes()
        path = m.file(f"x{ending}", damaged(g, data)) if ending == ".safetensors" else packed(m, g, f"x{ending}", data)
        found = vectors.read(path, None, ["fail", "skip"][g.integers(2)])
        assert len(found.words) == len(set(found.words)) == len(found.x) > 0 and np.isfinite(found.x).all()

    check.__name__ = f"word_vectors_{ending[1:]}"
    return kind(check)


for _ending in (".vec", ".bin", ".safetensors"):
    word_vectors(_ending)


@kind
def word_map(m: Material, g: Rng) -> None:
    x, pairs = g.normal(size=(6, 3)).astype(np.float32), np.arange(6)[:, None].repeat(2, 1)
    made, _, _ = translation.fit("procrustes", {}, ("unit", "centre", "whiten"), x, x[::-1], pairs)
    made.save(path := m.folder / "words" / "map.safetensors")
    found = translation.load(m.file("x.safetensors", damaged(g, path.read_bytes())))
    assert (
        found.W.ndim == 2 and np.isfinite(found.W).all() and found.mapped(found.source(x[:, : found.W.shape[1]])).size
    )


@kind
def bilingual_dictionary(m: Material, g: Rng) -> None:
    data = b"the el\nthe la\r\ncat\tgato\nnew york\tnueva york\n\ndog   perro\n"
    found = dictionaries.read(packed(m, g, "d.txt", data), ["fail", "skip"][g.integers(2)])
    assert found and all(word and meanings and all(meanings) for word, meanings in found.items())


@kind
def parallel_texts(m: Material, g: Rng) -> None:
    right = m.file("right.txt", b"x y\nz\n" * 9)
    found = dictionaries.induce(packed(m, g, "left.txt", b"a b\nc\n" * 9), right, ["fail", "skip"][g.integers(2)])
    assert found and all(len(meanings) == 1 for meanings in found.values())


@kind
def word_questions(m: Material, g: Rng) -> None:
    known = vectors.Vectors(list("abcdef"), np.eye(6, 4, dtype=np.float32) + np.float32(0.1))
    if g.integers(2):
        row = similarity.similarity(known, packed(m, g, "s.txt", b"# p\na b 1\nc d 2.5\ne f 3\na q 1\nb d 2\n"))
        assert row["pairs"] >= 3 and 0 < row["coverage"] <= 1
        return
    rows = similarity.analogy(known, packed(m, g, "a.txt", b": s\na b c d\nb c d e\n: t\na b c q\n"))
    assert rows[-1]["section"] == "all" and 0 <= rows[-1]["accuracy"] <= 1


# ---------------------------------------------------------------------------------------------- running


class Stuck(BaseException):
    """An input that takes ten times what it may; not an Exception, which a reader may well catch."""


@dataclass
class Count:
    """What became of the inputs of one kind; ``slowest`` in seconds of processor time, ``peak`` in MB."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak: float = 0.0
    failures: list[str] = field(default_factory=list)


def memory(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB; the highest ever where the system tells neither."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def stuck(*_: Any) -> None:
    raise Stuck


def judged(count: Count, name: str, action: Callable[[], None], debug: bool = False) -> None:
    """Run ``action`` on one input and note in ``count`` what came of it."""
    count.inputs += 1
    forget_peak()
    before, began, fault = memory("VmRSS"), time.process_time(), ""
    signal.setitimer(signal.ITIMER_VIRTUAL, 10 * SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            action()
        count.accepted += 1
    except GencliError as error:
        count.refused += 1
        text = str(error)
        if not text or any(not line or len(line) > LINE for line in text.split("\n")):
            fault = f"an empty or long line: {text[:200]!r}"
        elif len(text.splitlines()) > 1 and not name.startswith(("recipe", "override")):
            fault = f"more than one line: {text[:200]!r}"
        if debug:
            print(f"{type(error).__name__}: {text}")
    except (Exception, Stuck) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:150]!r} ({Path(last.filename).name}:{last.lineno})"
        if debug:
            traceback.print_exc(file=sys.stdout)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    took, grown = time.process_time() - began, memory("VmHWM") - before
    count.slowest, count.peak = max(count.slowest, took), max(count.peak, grown)
    if took > SECONDS:
        fault = fault or f"{took:.1f} s"
    if grown > MEGABYTES:
        fault = fault or f"{grown:.0f} MB"
    if fault:
        count.failures.append(f"{name}: {fault}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libtiff says on the descriptor of stderr, past Python."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def flips_and_truncations(m: Material, counts: dict[str, Count], seed: int, flips: int, every: int) -> None:
    """``flips`` bits flipped and truncations at every ``every``-th length, of a checkpoint and of its lone model file.

    With its manifest each is refused, or has the same content; alone, a flip may hit a weight, which nothing can tell.
    """
    whole = {name: (m.step / name).read_bytes() for name in (MODEL, TRAINING, MANIFEST)}
    folder = copied(m, "step-000008")

    def with_manifest(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        try:
            same_or_refused(m, folder)
        finally:
            (folder / name).write_bytes(whole[name])

    def alone(data: bytes) -> None:
        finite(checkpoint.load(m.file("x.safetensors", data)).model.state_dict())

    for title in ("bit flips", "bit flips, alone", "truncations", "truncations, alone"):
        counts[title] = Count()
    for i in range(flips):
        g = generator(seed, "flips", i)
        name = [MODEL, TRAINING, MANIFEST][i % 3]
        for title, of in (("bit flips", name), ("bit flips, alone", MODEL)):
            data = bytearray(whole[of])
            data[int(g.integers(len(data)))] ^= 1 << int(g.integers(8))
            if title == "bit flips":
                judged(counts[title], f"{title}:{i}", lambda n=of, d=bytes(data): with_manifest(n, d))
            else:
                judged(counts[title], f"{title}:{i}", lambda d=bytes(data): alone(d))
    for name, data in whole.items():
        for length in range(0, len(data), every):
            cut = data[:length]
            judged(counts["truncations"], f"truncations:{name}:{length}", lambda n=name, d=cut: with_manifest(n, d))
            if name == MODEL:
                judged(counts["truncations, alone"], f"truncations, alone:{length}", lambda d=cut: alone(d))
    for title in ("truncations", "truncations, alone"):
        cuts = counts[title]
        # the manifest's last byte is a newline, which nobody misses
        if cuts.accepted > (title == "truncations"):
            cuts.failures.append(f"{title}: {cuts.accepted} accepted")


def fuzz(m: Material, inputs: int, seed: int, flips: int, every: int) -> dict[str, Count]:
    """Counts by kind of ``inputs`` mutated inputs, ``flips`` bit flips and truncations at every ``every``-th length."""
    counts: dict[str, Count] = {}
    handler = signal.signal(signal.SIGVTALRM, stuck)
    try:
        for k, (name, check) in enumerate(KINDS.items()):
            counts[name] = Count()
            judged(Count(), name, lambda c=check, n=name: c(m, generator(seed, n, -1)))  # imports what it needs
            for i in range(inputs // len(KINDS) + (k < inputs % len(KINDS))):
                judged(counts[name], f"{name}:{i}", lambda c=check, n=name, i=i: c(m, generator(seed, n, i)))
        flips_and_truncations(m, counts, seed, flips, every)
    finally:
        signal.signal(signal.SIGVTALRM, handler)
    return counts


def report(counts: dict[str, Count]) -> str:
    rows = [*counts.items()]
    total = Count(
        sum(c.inputs for c in counts.values()),
        sum(c.accepted for c in counts.values()),
        sum(c.refused for c in counts.values()),
        max(c.slowest for c in counts.values()),
        max(c.peak for c in counts.values()),
        [f for c in counts.values() for f in c.failures],
    )
    out = [
        f"{'kind':<26} {'inputs':>7} {'accepted':>9} {'refused':>8} {'failures':>9} {'slowest, s':>11} {'peak, MB':>9}"
    ]
    for name, c in [*rows, ("all", total)]:
        numbers = f"{c.inputs:>7} {c.accepted:>9} {c.refused:>8} {len(c.failures):>9} {c.slowest:>11.3f} {c.peak:>9.1f}"
        out.append(f"{name:<26} {numbers}")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=20_000, help="mutated inputs over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="KIND:INDEX", help="one input alone, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.replay:
            title, _, index = args.replay.rpartition(":")
            count, m = Count(), material(folder)
            judged(count, args.replay, lambda: KINDS[title](m, generator(args.seed, title, int(index))), debug=True)
            print(*count.failures, count, sep="\n")
            return int(bool(count.failures))
        began = time.perf_counter()
        m = material(folder)
        with quiet():
            counts = fuzz(m, args.inputs, args.seed, FLIPS, 1)
    failures = [f for c in counts.values() for f in c.failures]
    print(report(counts))
    print(f"{time.perf_counter() - began:.0f} s; seed {args.seed}")
    for line in failures[:100]:
        print(line)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
