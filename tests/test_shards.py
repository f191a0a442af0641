"""Shards: what is packed comes back, whatever is damaged is named, and the order is the same for everybody."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencli import pictures
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec, Phase, Stream
from gencli.data import SPLITS, folders, load, packing, shards
from gencli.data.source import TensorSource
from gencli.recipe import Recipe
from gencli.rng import generator
from gencli.training import batches as batching
from gencli.training.batches import Batches
from gencli.training.trainer import Trainer
from tests.test_session import outcome, train

MAIN = [sys.executable, "-m", "gencli"]
SIZES = {"train": 23, "val": 5, "test": 7}


def made(kind: str) -> dict[str, TensorSource]:
    """Three splits of random rows of one kind."""
    g = np.random.default_rng(0)
    fields: dict[str, dict[str, Any]] = {
        "grey": {"kind": "image", "shape": (1, 5, 6), "levels": 256, "classes": ("a", "b", "c")},
        "colour": {"kind": "image", "shape": (3, 6, 4), "levels": 256},
        "17 levels": {"kind": "image", "shape": (1, 8, 8), "levels": 17, "classes": ("a", "b")},
        "binary": {"kind": "image", "shape": (1, 4, 4), "levels": 2},
        "five channels": {"kind": "image", "shape": (5, 4, 4), "levels": 4},
        "1000 levels": {"kind": "image", "shape": (1, 4, 4), "levels": 1000, "classes": ("a", "b")},
        "points": {"kind": "points", "shape": (3,), "classes": ("a", "b")},
        "audio": {"kind": "audio", "shape": (1, 40), "levels": 256, "rate": 8000},
        "text": {"kind": "text", "shape": (12,), "levels": 3, "vocabulary": ("a", "\n", "é")},
    }
    spec = DataSpec(name=kind, size=SIZES["train"], **fields[kind])
    sources = {}
    for split, n in SIZES.items():
        x: Any = g.standard_normal((n, *spec.shape)).astype(np.float32)
        if spec.levels is not None:
            x = g.integers(spec.levels, size=(n, *spec.shape)).astype(
                np.int16 if spec.levels > 256 or kind == "text" else np.uint8
            )
        label = torch.from_numpy(g.integers(len(spec.classes), size=n)) if spec.classes else None
        sources[split] = TensorSource(kind, split, spec, torch.from_numpy(x), label)
    return sources


def packed(sources: dict[str, Any], folder: Path, shard_bytes: int = 12_000) -> Path:
    packing.pack(sources.values(), folder, shard_bytes, lambda: None)
    return folder


def order_of(source: Any) -> torch.Tensor:
    return torch.arange(source.size) * packing._stride(source) % source.size


def everything(source: Any) -> dict[str, torch.Tensor]:
    return source.rows(torch.arange(source.size))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


KINDS = ["grey", "colour", "17 levels", "binary", "five channels", "1000 levels", "points", "audio", "text"]

# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_comes_back(kind, tmp_path):
    sources = made(kind)
    folder = packed(sources, tmp_path / "s")
    assert len(list(folder.glob("train-*.tar"))) > 1
    for split, source in sources.items():
        back = load(str(folder), split)
        assert (back.name, back.split, back.size) == (str(folder), split, SIZES[split])
        assert back.spec == source.spec.model_copy(update={"name": str(folder)})
        assert same(everything(back), source.rows(order_of(source)))
        assert split == "train" or same(everything(back), everything(source))
        index = torch.tensor([3, 0, 3, SIZES[split] - 1, 1])
        assert same(back.rows(index), source.rows(order_of(source)[index]))
        assert back.rows(index)["x"].is_contiguous()
        assert back.rows(index[:0])["x"].shape == (0, *source.spec.shape)
        for bad in (-1, SIZES[split]):
            with pytest.raises(IndexError):
                back.rows(torch.tensor([0, bad]))
    assert sorted(order_of(sources["train"]).tolist()) == list(range(SIZES["train"]))
    assert len({load(str(folder), split).digest for split in SPLITS}) == 3


def test_real_sets_and_their_variants(tmp_path):
    sources = {split: load("digits", split) for split in SPLITS}
    folder = packed(sources, tmp_path / "s", 1 << 20)
    assert [load(str(folder), split).size for split in SPLITS] == [1258, 180, 359]
    assert same(everything(load(str(folder), "test")), everything(sources["test"]))
    fewer = load(f"{folder}:threshold", "train")
    assert torch.equal(everything(fewer)["x"], (everything(load(str(folder)))["x"] > 8).to(torch.uint8))
    assert fewer.slow and fewer.windows.tolist() == load(str(folder)).windows.tolist() and len(fewer.windows) == 3
    with pytest.raises(UsageError, match="only a folder of images can be resized"):
        load(f"{folder}:32")


def test_any_tar_reads_them_and_the_index_maps_them(tmp_path):
    source = made("17 levels")["train"]
    folder = packed(made("17 levels"), tmp_path / "s")
    want, seen = source.rows(order_of(source)), 0
    for path in sorted(folder.glob("train-*.tar")):
        index = np.memmap(path.with_suffix(".index"), shards.ENTRY, "r")
        data = path.read_bytes()
        with tarfile.open(path) as archive:
            files = archive.getmembers()
            assert [m.name for m in files] == [f"{seen + i:08}{e}" for i in range(len(index)) for e in (".png", ".cls")]
            assert {(m.mtime, m.uid, m.uname) for m in files} == {(0, 0, "")}
            for i, entry in enumerate(index):
                inside = archive.extractfile(files[2 * i]).read()
                offset, length = int(entry["offset"]), int(entry["length"])
                assert (offset, inside) == (files[2 * i].offset_data, data[offset : offset + length])
                assert entry["sha256"].tobytes() == hashlib.sha256(inside).digest()[:16]
                label = int(want["label"][seen])
                assert entry["label"] == label and archive.extractfile(files[2 * i + 1]).read() == b"%d" % label
                with pictures.Image.open(io.BytesIO(inside)) as im:
                    grey = torch.from_numpy(np.array(im)).double()
                assert torch.equal((grey * 16 / 255).round(), want["x"][seen, 0].double())
                seen += 1
    assert seen == SIZES["train"]


@pytest.mark.parametrize("kind", ["grey", "text"])
def test_equal_rows_make_equal_files(kind, tmp_path):
    a, b = packed(made(kind), tmp_path / "a"), packed(made(kind), tmp_path / "b")
    assert [(p.name, p.read_bytes()) for p in sorted(a.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(b.iterdir())
    ]
    assert load(str(a)).digest == load(str(b)).digest
    other = made(kind)
    other["test"]._fields["x"][0].view(-1)[0] ^= 1
    assert load(str(packed(other, tmp_path / "c"))).digest != load(str(a)).digest  # of any split: one file vouches


def test_sizes_of_shards(tmp_path, monkeypatch):
    source = made("grey")["train"]
    for size in (1, 4096, 10_000, 10**6):
        folder = packed(made("grey"), tmp_path / str(size), size)
        tars = sorted(folder.glob("train-*.tar"))
        rows = [len(p.with_suffix(".index").read_bytes()) // 40 for p in tars]
        assert sum(rows) == SIZES["train"]
        assert all(p.stat().st_size <= size or n == 1 for p, n in zip(tars, rows))
        assert size < 10**6 or len(tars) == 1
        assert size != 10_000 or set(rows[:-1]) == {4}  # 2 x 1024 bytes a row, and 1024 at the end
    monkeypatch.setattr(packing, "ROWS", 10)
    back = load(str(packed(made("grey"), tmp_path / "rows", 10**6)))
    assert back.windows.tolist() == [10, 20, 23]
    assert same(everything(back), source.rows(order_of(source)))


class Sorted:
    """Endless-looking rows that are made when they are asked for, sorted by class; it counts what it is asked."""

    def __init__(self, split: str, n: int, classes: int = 10) -> None:
        self.name, self.split, self.size, self.digest = "sorted", split, n, ""
        self.spec = DataSpec(
            name="sorted", kind="image", shape=(1, 2, 2), levels=256, size=n, classes=tuple(map(str, range(classes)))
        )
        self.most = 0

    def rows(self, index, epoch=0):
        self.most = max(self.most, len(index))
        x = (index[:, None, None, None] // torch.tensor([1, 256]).repeat(2).view(1, 1, 2, 2) % 256).to(torch.uint8)
        return {"x": x, "label": index * len(self.spec.classes) // self.size}


def test_every_shard_of_a_sorted_source_is_a_fair_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "ROWS", 300)
    sources = {split: Sorted(split, n) for split, n in (("train", 2999), ("val", 10), ("test", 10))}
    folder = packed(sources, tmp_path / "s", 1 << 30)
    labels = everything(load(str(folder)))["label"]
    counts = torch.stack([torch.bincount(part, minlength=10) for part in labels.split(300)[:-1]])
    assert counts.min() >= 27 and counts.max() <= 33
    assert {source.most for source in sources.values()} == {10, 256}
    for n in (1, 2, 3, 10, 997, 1000, 4096, 10**6):
        stride = packing._stride(Sorted("train", n))
        assert math.gcd(stride, n) == 1 and abs(stride - (math.sqrt(5) - 1) / 2 * n) < 10


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["digits", "full"], 2, "full is there already and not empty"),
        (["digits", "file"], 2, "file is there already"),
        (["digits", "part"], 2, "part holds a packing that was cut off"),
        (["points/moons", "new"], 2, "points/moons is drawn and never ends"),
        (["digits:dynamic", "new"], 2, "data pack digits new, and then --data new:dynamic"),
        (["nothing", "new"], 2, "no data set 'nothing'"),
        (["digits", "new", "--shard-mb", "0"], 2, "shard-mb"),
    ],
)
def test_packing_that_is_refused(words, code, said, tmp_path, monkeypatch, capfd):
    from gencli import console
    from gencli.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "train-000000.tar").write_bytes(b"x")
    assert console.run(app, ["data", "pack", *words]) == code
    out, err = capfd.readouterr()
    assert said in err and not out and not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def test_the_command_packs_a_folder_and_shows_it(tmp_path, monkeypatch, capfd):
    from gencli import console
    from gencli.cli import app

    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    for group in ("cat", "dog"):
        (tmp_path / "pets" / group).mkdir(parents=True)
        for i in range(15):
            pictures.save_png(tmp_path / "pets" / group / f"{i}.png", g.integers(256, size=(6, 6, 3), dtype=np.uint8))
    (tmp_path / "shards").mkdir()  # an empty folder will do
    assert console.run(app, ["data", "pack", "pets", "shards/", "--shard-mb", "1"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row == {"shards": "shards", "data": "pets", "files": 3, "MB": 0.1} | {
        split: load("pets", split).size for split in SPLITS
    }
    assert console.run(app, ["data", "show", "shards", "--split", "val"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["rows"], shown["shape"], shown["classes"]) == (row["val"], [3, 6, 6], 2)
    assert load("shards").spec.classes == ("cat", "dog")
    assert same(everything(load("shards", "val")), everything(load("pets", "val")))
    packing = ["data", "pack", "pets", "again"]
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"no picture")
    assert console.run(app, packing) == 3 and not (tmp_path / "again").exists()
    assert console.run(app, [*packing, "--on-bad", "skip"]) == 0
    assert sum(load("again", split).size for split in SPLITS) == 29


class Failing(Sorted):
    def rows(self, index, epoch=0):
        if index.max() > 700:
            raise self.error
        return super().rows(index, epoch)


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize("there", [False, True])
def test_packing_that_fails_leaves_nothing(error, there, tmp_path):
    source = Failing("train", 3000)
    source.error = error
    folder = tmp_path / "s"
    if there:
        folder.mkdir()
    with pytest.raises(type(error)):
        packed({"train": source}, folder, 1 << 16)
    assert list(tmp_path.rglob("*")) == ([folder] if there else [])


def test_packing_that_is_killed_is_never_taken_for_whole(tmp_path):
    """At every number of rows: after the last one only the manifest is missing."""
    total = sum(SIZES.values())
    for at in (1, 9, SIZES["train"] + 2, total):
        folder = tmp_path / str(at)
        child = os.fork()
        if child == 0:
            done = iter(range(1, total + 1))

            def tick(done: Any = done, at: int = at) -> None:
                if next(done) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                packing.pack(made("grey").values(), folder, 8192, tick)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (folder / "shards.json").exists()
        for split in SPLITS:
            with pytest.raises(DataError, match=r"no shards\.json|no images in this folder"):
                load(str(folder), split)
        with pytest.raises(UsageError, match=r"cut off|not empty"):
            packed(made("grey"), folder)


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(packing.files, "sync_folder", lambda folder: written.append(sorted(os.listdir(folder))))
    folder = packed(made("grey"), tmp_path / "s", 8192)
    assert written[-1] == sorted(os.listdir(folder)) and "shards.json" in written[-1]
    assert all("shards.json" not in names for names in written[:-1])
    assert len(written[-1]) == len(written)  # each file by itself, and none that is not synced


# ------------------------------------------------------------------------------------------------ damage


def manifest(folder: Path, change: Any) -> None:
    path = folder / "shards.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(change(said) or said))


def index(folder: Path, change: Any, name: str = "train-000001") -> None:
    """Change the entries of a shard's index and put its checksum in the manifest right."""
    path = folder / f"{name}.index"
    entries = np.frombuffer(path.read_bytes(), shards.ENTRY).copy()
    change(entries)
    path.write_bytes(entries.tobytes())

    def right(said: Any) -> None:
        said["shards"]["train"][1]["index_sha256"] = hashlib.sha256(entries.tobytes()).hexdigest()

    manifest(folder, right)


def member(folder: Path, data: bytes, name: str = "train-000001") -> None:
    """Put other data in the place of a shard's first row, with all checksums right."""
    path = folder / f"{name}.tar"
    whole = bytearray(path.read_bytes())

    def change(entries: Any) -> None:
        offset = int(entries["offset"][0])
        assert len(data) <= int(entries["offset"][1]) - offset
        whole[offset : offset + len(data)] = data
        entries["length"][0] = len(data)
        entries["sha256"][0] = np.void(hashlib.sha256(data).digest()[:16])

    index(folder, change)
    path.write_bytes(whole)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def array(x: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def at(key: str, value: Any, place: int = 0) -> Any:
    def change(entries: Any) -> None:
        entries[key][place] = value

    return change


def shard(key: str, value: Any) -> Any:
    def change(said: Any) -> None:
        said["shards"]["train"][1][key] = value

    return change


def spec(key: str, value: Any) -> Any:
    return lambda said: said["spec"].__setitem__(key, value)


PNG = pictures.png(np.zeros((8, 7), np.uint8))
DAMAGE: dict[str, tuple[str, Any, str]] = {
    # whole files
    "no manifest": ("grey", lambda f: (f / "shards.json").unlink(), "s has shards but no shards.json"),
    "a shard is gone": ("grey", lambda f: (f / "train-000001.tar").unlink(), "train-000001.tar: there is no such file"),
    "a shard is cut": ("grey", lambda f: os.truncate(f / "train-000001.tar", 5000), "train-000001.tar has 5000 bytes"),
    "a shard is a link": ("grey", lambda f: linked(f / "train-000001.tar"), "train-000001.tar: a link"),
    "a shard is a pipe": ("grey", lambda f: fifo(f / "train-000001.tar"), "train-000001.tar: no regular file"),
    "an index is gone": ("grey", lambda f: (f / "train-000001.index").unlink(), "train-000001.index: there is no such"),
    "an index is cut": ("grey", lambda f: os.truncate(f / "train-000001.index", 79), "train-000001.index has 79 bytes"),
    "an index is a link": ("grey", lambda f: linked(f / "train-000001.index"), "train-000001.index: a link"),
    "an index is damaged": ("grey", lambda f: flip(f / "train-000001.index", 3), "train-000001.index is damaged: its"),
    "a row is damaged": ("grey", lambda f: flip(f / "train-000001.tar", 560), r"train-000001.tar: 00000005.png is dam"),
    # the manifest
    "no JSON": ("grey", lambda f: (f / "shards.json").write_bytes(b'{"format": '), "shards.json: "),
    "no object": ("grey", lambda f: (f / "shards.json").write_bytes(b"[]"), "shards.json: "),
    "empty": ("grey", lambda f: (f / "shards.json").write_bytes(b""), "shards.json: "),
    "half a character": ("grey", lambda f: manifest(f, spec("name", "\ud800")), "shards.json: "),
    "deep": ("grey", lambda f: (f / "shards.json").write_bytes(b"[" * 100_000), "shards.json: "),
    "other format": ("grey", lambda f: manifest(f, lambda m: m | {"format": "2"}), "shards.json: format: "),
    "other key": ("grey", lambda f: manifest(f, lambda m: m | {"run": "rm"}), "shards.json: run: Extra"),
    "up": ("grey", lambda f: manifest(f, shard("file", "../x.tar")), r"is called ../x.tar and not train-000001.tar"),
    "absolute": ("grey", lambda f: manifest(f, shard("file", "/etc/passwd")), "is called /etc/passwd and not"),
    "twice": ("grey", lambda f: manifest(f, shard("file", "train-000000.tar")), "called train-000000.tar and not"),
    "a name of lines": ("grey", lambda f: manifest(f, shard("file", "a\nb" * 200)), r"is called a\?ba\?b"),
    "too many rows": ("grey", lambda f: manifest(f, shard("rows", 2**20 + 1)), "train.1.rows: Input should be less"),
    "no rows": ("grey", lambda f: manifest(f, shard("rows", 0)), "shards.train.1.rows: Input should be greater"),
    "other rows": ("grey", lambda f: manifest(f, shard("rows", 4)), "do not add up to the rows"),
    "rows as text": ("grey", lambda f: manifest(f, shard("rows", "5")), "valid integer"),
    "no checksum": ("grey", lambda f: manifest(f, shard("index_sha256", "0" * 63)), "index_sha256: String should"),
    "other checksum": ("grey", lambda f: manifest(f, shard("index_sha256", "0" * 64)), "train-000001.index is damaged"),
    "split": ("grey", lambda f: manifest(f, lambda m: m["shards"].__setitem__("x\n", [])), r"a split 'x\\n'"),
    "no train": ("grey", lambda f: manifest(f, lambda m: m["shards"].pop("train") and None), "do not add up"),
    "huge shape": ("grey", lambda f: manifest(f, spec("shape", [1, 2**40, 2**40])), "rows of shape"),
    "negative shape": ("grey", lambda f: manifest(f, spec("shape", [1, -5, 6])), "rows of shape"),
    "flat images": ("grey", lambda f: manifest(f, spec("shape", [30])), "images have three dimensions"),
    "no levels": ("grey", lambda f: manifest(f, spec("levels", None)), "image of None levels"),
    "many levels": ("grey", lambda f: manifest(f, spec("levels", 10**400)), "shards.json: |image of 1000"),
    "rate": ("audio", lambda f: manifest(f, spec("rate", 0)), "a rate of 0"),
    "vocabulary": ("text", lambda f: manifest(f, spec("vocabulary", ["a"])), "a vocabulary of 1 for 3 levels"),
    # an index that its checksum vouches for
    "before": ("grey", lambda f: index(f, at("offset", 0)), "rows that overlap or lie outside of train-000001.tar"),
    "after": ("grey", lambda f: index(f, at("offset", 2**63, -1)), "rows outside of train-000001.tar"),
    "at the end": ("grey", lambda f: index(f, at("length", 60_000, -1)), "rows that overlap or lie outside of"),
    "long": ("grey", lambda f: index(f, at("length", 2**26 + 1)), "or of more than 64 MB"),
    "very long": ("grey", lambda f: index(f, at("length", 2**64 - 1)), "or of more than 64 MB"),
    "without length": ("grey", lambda f: index(f, at("length", 0, 1)), "empty, or"),
    "overlapping": ("grey", lambda f: index(f, at("length", 3000)), "rows that overlap"),
    "backwards": ("grey", lambda f: index(f, lambda e: e.__setitem__(slice(None), e[::-1].copy())), "that overlap"),
    "label": ("grey", lambda f: index(f, at("label", 3)), "labels from 0 to 3 instead of 0 to 2"),
    "negative label": ("grey", lambda f: index(f, at("label", -1)), "labels from -1 to . instead of 0 to 2"),
    "unwanted label": ("text", lambda f: index(f, at("label", 0)), "labels from -1 to 0 instead of -1 to -1"),
    # rows that their checksum vouches for
    "other size": ("grey", lambda f: member(f, PNG), r"00000005.png: no PNG of 6 x 5 pixels"),
    "no picture": ("grey", lambda f: member(f, b"hello"), "no PNG of 6 x 5 pixels"),
    "half a picture": ("grey", lambda f: member(f, pictures.png(np.zeros((5, 6), np.uint8))[:40]), "000005.png: "),
    "colour": ("grey", lambda f: member(f, pictures.png(np.zeros((5, 6, 3), np.uint8))), "3 channels instead of 1"),
    "not an array": ("points", lambda f: member(f, b"hello"), "00000006.npy is damaged"),
    "other shape": (
        "points",
        lambda f: member(f, array(np.zeros(2, "<f4"))),
        r"float32 \(2,\) instead of float32 \(3,\)",
    ),
    "other type": ("points", lambda f: member(f, array(np.zeros(3))), r"float64 \(3,\) instead of float32 \(3,\)"),
    "objects": ("points", lambda f: member(f, array(np.zeros(3, "<f4")).replace(b"<f4", b"|O ")), "00000006.npy"),
    "not finite": ("points", lambda f: member(f, array(np.float32([0, np.inf, 0]))), "values that are not finite"),
    "a level too many": ("text", lambda f: member(f, array(np.int16([3] * 12))), "from 3 to 3 do not fit 3 levels"),
    "a level too few": ("1000 levels", lambda f: member(f, array(np.full((1, 4, 4), -1, "<i2"))), "from -1 to -1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_in_one_line(what, tmp_path):
    kind, damage, said = DAMAGE[what]
    folder = packed(made(kind), tmp_path / "s", 13_000 if kind != "points" else 15_000)
    damage(folder)
    with pytest.raises(DataError, match=said) as caught:
        everything(load(str(folder)))
    assert str(tmp_path / "s") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_rows_beside_the_damage_are_read(tmp_path):
    folder = packed(made("grey"), tmp_path / "s")
    flip(folder / "train-000001.tar", 560)
    source, whole = load(str(folder)), made("grey")["train"]
    good = torch.tensor([i for i in range(23) if i != 5])
    assert same(source.rows(good), whole.rows(order_of(whole)[good]))
    with pytest.raises(DataError, match=r"00000005.png is damaged"):
        source.rows(torch.tensor([5]))


# ------------------------------------------------------------------------------------------------ many and at once


def test_open_files_are_few_and_threads_may_share_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 2)
    monkeypatch.setattr(shards, "LOCAL", 4)
    whole = made("grey")["train"]
    folder = packed(made("grey"), tmp_path / "s", 4096)
    source = load(str(folder))
    assert len(source.windows) == 23

    def opened() -> int:
        open_files = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # the listing's own is gone
        return sum(os.path.realpath(path).startswith(str(folder)) for path in open_files)

    def work(seed: int) -> bool:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(23))
        return all(same(source.rows(order), whole.rows(order_of(whole)[order])) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert len(source._open) == 2 and opened() <= 2
    monkeypatch.setattr(shards, "OPEN", 64)
    monkeypatch.setattr(shards, "HELD", 5)
    everything(source)
    assert len(source._open) == 5
    source = None
    gc.collect()
    assert opened() == 0


def test_shards_behind_a_url(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    folder = packed(made("17 levels"), tmp_path / "s")
    there = fsspec.filesystem("memory")
    there.put(str(folder), "/packed", recursive=True)
    try:
        for split in SPLITS:
            local, remote = load(str(folder), split), load("memory://packed", split)
            assert same(everything(remote), everything(local))
            assert (remote.digest, remote.name) == (local.digest, "memory://packed")
        assert load("memory://packed/:threshold", "val").spec.levels == 2
        there.rm("/packed/train-000001.tar")
        source = load("memory://packed")  # each shard in its turn
        with pytest.raises(DataError, match=r"memory://packed/train-000001.tar: there is no such file"):
            everything(source)
        there.pipe("/packed/train-000000.tar", b"x" * 12_288)
        with pytest.raises(DataError, match=r"memory://packed/train-000000.tar: 00000000.png is damaged|has 12288"):
            source.rows(torch.arange(1))
        there.pipe("/packed/shards.json", b"{}")
        with pytest.raises(DataError, match=r"memory://packed/shards.json"):
            load("memory://packed")
    finally:
        there.rm("/packed", recursive=True)
    with pytest.raises(DataError, match=r"memory://packed/shards.json: there is no such file"):
        load("memory://packed")
    with pytest.raises(UsageError, match="nonsense") as caught:
        load("nonsense://packed")
    assert "pip install 'gencli[remote]'" in caught.value.hint
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match="fsspec") as caught:
        load("memory://packed")
    assert "pip install 'gencli[remote]'" in caught.value.hint


# ------------------------------------------------------------------------------------------------ the order


class Listed:
    """A source of shards of ``sizes`` whose rows are their own numbers."""

    slow = False

    def __init__(self, sizes: list[int]) -> None:
        self.windows = np.cumsum(sizes)
        self.size, self.name, self.asked = int(self.windows[-1]), "listed", []
        self.spec = DataSpec(name="listed", kind="points", shape=(1,), size=self.size)

    def rows(self, index, epoch=0):
        self.asked.append(index.tolist())
        return {"x": torch.stack([index, torch.as_tensor(epoch).expand(len(index))], 1).float()}


def batches(source: Any, seed: int = 0, streams: dict[str, Stream] | None = None, size: int = 4) -> Batches:
    return Batches(
        source, streams or {"x": Stream()}, seed=seed, size=size, device=torch.device("cpu"), channels_last=False
    )


def drawn(source: Any, size: int, k: int, **given: Any) -> list[int]:
    return torch.cat([batches(source, **given).index("model", "x", size, i) for i in range(k)]).tolist()


@pytest.mark.parametrize("sizes", [[7, 3, 1, 9, 4, 6], [30], [1] * 30, [29, 1]])
@pytest.mark.parametrize("size", [1, 4, 30, 45])
def test_every_row_comes_once_an_epoch(sizes, size, monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_ROWS", 10)
    rows = drawn(Listed(sizes), size, 4 * 30 // math.gcd(size, 30))
    epochs = [rows[i : i + 30] for i in range(0, len(rows) - 29, 30)]
    assert len(epochs) > 2 and all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_window_is_a_few_shards_mixed(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_ROWS", 50)
    source = Listed([10] * 20)
    epochs = [drawn(source, 200, 2)[i : i + 200] for i in (0, 200)]
    for epoch in epochs:
        for at in range(0, 200, 50):
            window = epoch[at : at + 50]
            shards = sorted({row // 10 for row in window})
            assert len(shards) == 5 and sorted(window) == [10 * s + i for s in shards for i in range(10)]
            assert sum(a // 10 != b // 10 for a, b in itertools.pairwise(window)) > 25  # mixed, not one after another
            assert shards != list(range(shards[0], shards[0] + 5))  # shards from anywhere
    first = [{row // 10 for row in epoch[:50]} for epoch in epochs]
    assert first[0] != first[1]
    monkeypatch.setattr(batching, "WINDOW_SHARDS", 2)
    assert len({row // 10 for row in drawn(source, 20, 1)}) == 2
    # a shard that is larger than a window is one
    assert sorted(drawn(Listed([60, 60]), 60, 1)) in (list(range(60)), list(range(60, 120)))


def test_the_order_is_a_function_of_its_key(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_ROWS", 10)
    source = Listed([7, 3, 1, 9, 4, 6])
    want = [batches(source).index("model", "x", 4, k).tolist() for k in range(40)]
    again = batches(source)
    for k in np.random.default_rng(0).permutation(40):
        assert again.index("model", "x", 4, int(k)).tolist() == want[k]
    for phase, stream, seed in (("critic", "x", 0), ("model", "y", 0), ("model", "x", 1)):
        assert batches(source, seed).index(phase, stream, 30, 0).tolist() != [*itertools.chain(*want)][:30]
    for n in (1, 2, 4):  # processes
        phase, together = Phase("model", [], lambda b, s: {}), batches(source)
        parts = [[batches(source).get(phase, k, i, n).index for i in range(n)] for k in range(40)]
        assert [torch.stack(part, 1).flatten().tolist() for part in parts] == want
        assert torch.equal(together.get(phase, 9).x[:, 1], torch.tensor([1.0] * 4))  # the epoch that rows are told


def test_sources_in_memory_keep_the_order_that_they_always_had():
    source = made("points")["train"]
    want = np.concatenate([generator(3, "order", "model", "x", e).permutation(23) for e in range(3)])
    assert torch.cat([batches(source, 3).index("model", "x", 6, k) for k in range(11)]).tolist() == want[:66].tolist()
    assert not batches(source).ahead


def test_the_order_of_a_large_set_takes_the_memory_of_a_window():
    source = Listed([2**14] * 6104)  # 10^8 rows: 800 MB for a permutation of all
    b = batches(source)
    b.index("model", "x", 256, 0)
    tracemalloc.start()
    try:
        per_window = batching.WINDOW_ROWS // 256
        for k in [*range(1, 400), *range(400, 30 * per_window, per_window // 2), source.size // 256]:
            assert len(b.index("model", "x", 256, k)) == 256
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * batching.WINDOW_ROWS * 8 + 10**6
    assert max(b.index("model", "x", 256, 0)) > 2**20 and len(set(b.index("model", "x", 256, 0).tolist())) == 256


# ------------------------------------------------------------------------------------------------ reading ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gencli-reader"]


def test_batches_are_the_same_whether_read_ahead_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_ROWS", 8)
    folder = packed(made("grey"), tmp_path / "s")
    streams = {"a": Stream(("x", "label")), "b": Stream(ratio=0.5)}
    phases = [Phase("model", [], lambda b, s: {}), Phase("critic", [], lambda b, s: {}, batch={"b": 6})]

    def seen(ahead: bool) -> list[Any]:
        b = batches(load(str(folder)), streams=streams)
        assert b.ahead
        b.ahead = ahead
        found: list[Any] = []
        for k in [0, 1, 2, 3, 4, 9, 10, 11, 12, 2, 3, 4]:  # on, a leap (a resume), and back
            for phase in phases:
                for offset in range(2):
                    got = b.get(phase, k, offset, 2)
                    found += [value.tolist() for part in vars(got).values() for value in list(vars(part).values())[:-1]]
        assert bool(readers()) == ahead
        return found

    assert seen(True) == seen(False)
    gc.collect()
    assert not readers()


class Slow(Listed):
    """Tells when a row is read, and fails at one."""

    slow = True

    def __init__(self, fail: int = -1) -> None:
        super().__init__([100])
        self.fail, self.read = fail, threading.Semaphore(0)
        self.by: list[str] = []

    def rows(self, index, epoch=0):
        self.by.append(threading.current_thread().name)
        self.asked.append(index.tolist())
        self.read.release()
        if len(self.asked) == self.fail:
            raise DataError("the disk is gone")
        return {"x": index[:, None].float()}


def test_the_next_batch_is_read_while_a_step_computes():
    source, phase = Slow(), Phase("model", [], lambda b, s: {})
    b = batches(source)
    b.get(phase, 0)
    b.get(phase, 1)
    for _ in range(3):
        assert source.read.acquire(timeout=10)
    assert source.asked[2] == b.index("model", "x", 4, 2).tolist()  # nobody has asked for it yet
    assert b.get(phase, 2).index.tolist() == source.asked[2]
    assert source.read.acquire(timeout=10)
    assert [len(source.asked), source.by] == [4, ["MainThread"] * 2 + ["gencli-reader"] * 2]


def test_what_fails_ahead_fails_at_the_step_that_asks():
    source, phase = Slow(fail=4), Phase("model", [], lambda b, s: {})
    b = batches(source)
    for k in range(3):
        b.get(phase, k)
    for _ in range(4):
        assert source.read.acquire(timeout=10)
    with pytest.raises(DataError, match="the disk is gone"):
        b.get(phase, 3)
    assert b.get(phase, 3).index.tolist() == source.asked[3]  # once more, and it went well
    del b
    gc.collect()
    assert not readers()


HUNG = """
import sys, threading, torch
from gencli.contract import Phase, Stream
from gencli.training.batches import Batches
class Hung:
    name, size, slow, asked = "hung", 100, True, 0
    def rows(self, index, epoch=0):
        self.asked += 1
        if self.asked > 2:
            threading.Event().wait()
        return {"x": index}
b = Batches(Hung(), {"x": Stream()}, seed=0, size=4, device=torch.device("cpu"), channels_last=False)
for k in range(2):
    b.get(Phase("model", [], None), k)
assert threading.active_count() == 2
print("begun", flush=True)
if sys.argv[1] == "error":
    raise ValueError("diverged")
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("error", 1)])
def test_a_read_that_hangs_keeps_no_process_alive(how, code):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HUNG, how], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, "begun\n"), done.stderr
    assert time.monotonic() - began < 40 and ("diverged" in done.stderr) == (how == "error")


def test_folders_that_are_not_in_memory_are_read_ahead(tmp_path, monkeypatch):
    for i in range(12):
        pictures.save_png(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8))
    assert not batches(load(str(tmp_path))).ahead
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    assert batches(load(str(tmp_path))).ahead and batches(load(f"{tmp_path}:1bit")).ahead


# ------------------------------------------------------------------------------------------------ training


def recipe(folder: Path, **given: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "vae", "latents": 2, "hidden": [8]},
            "data": {"name": str(folder)},
            "train": {"steps": 16, "batch_size": 8, "samples": 4, "checkpoint_every": 6, "evaluate_every": 8} | given,
            "device": "cpu",
        }
    )


def test_training_from_shards_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("GENCLI_QUIET", "1")
    monkeypatch.setattr(batching, "WINDOW_ROWS", 30)  # several windows and epochs in 16 steps
    monkeypatch.setattr(packing, "ROWS", 12)
    sources = {s: TensorSource("d", s, load("digits").spec, load("digits", s).rows(torch.arange(60))["x"],
                               load("digits", s).rows(torch.arange(60))["label"]) for s in SPLITS}  # fmt: skip
    for source in sources.values():
        source.spec = source.spec.model_copy(update={"size": 60})
    made = recipe(packed(sources, tmp_path / "s"))
    train(made, tmp_path / "whole")
    step = Trainer.step

    def killed(self: Trainer) -> dict[str, float]:
        if self.number + 1 == 10:
            raise MemoryError
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "step", killed)
        train(made, tmp_path / "parts")
    train(made, tmp_path / "parts", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardSource, "slow", False)  # nothing read ahead
        train(made, tmp_path / "without")
    whole, parts, without = (outcome(tmp_path / name) for name in ("whole", "parts", "without"))
    last = [key for key in whole if not key.startswith("checkpoints") or "step-000016" in key]
    assert len(last) >= 8 and whole["state"] == "done"
    for key in last:
        assert parts[key] == whole[key] and without[key] == whole[key], key


def test_a_shard_that_is_cut_in_mid_run_ends_it_in_one_line(tmp_path):
    folder, out = packed({s: load("digits", s) for s in SPLITS}, tmp_path / "s", 1 << 20), tmp_path / "run"
    words = ["vae", "model.hidden=[8]", "model.latents=2", "train.samples=4", "train.checkpoint_every=50", "threads=1"]
    words.append("train.schedule=constant")  # or the number of steps would matter
    command = [*MAIN, "train", *words, "--data", str(folder), "--out", str(out), "--steps", "1000000", "--no-preview"]
    env = {**os.environ, "GENCLI_QUIET": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        end = time.monotonic() + 120
        while not list(out.glob("checkpoints/*/manifest.json")) and run.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        tar = folder / "train-000001.tar"
        whole = tar.read_bytes()
        os.truncate(tar, 600)
        _, err = run.communicate(timeout=120)
    finally:
        run.kill()
        run.wait()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert run.returncode == 3 and len(errors) == 1 and "Traceback" not in err, err
    assert "train-000001.tar: 0" in errors[0] and "cut off" in errors[0]
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    done = max(int(path.parent.name[5:]) for path in out.glob("checkpoints/*/manifest.json"))
    resume = [*MAIN, "train", "--resume", str(out), f"train.steps={done + 20}", "--no-preview"]
    again = subprocess.run(resume, capture_output=True, text=True, check=False, env=env)
    assert again.returncode == 3 and "train-000001.tar has 600 bytes" in again.stderr  # before a step is done
    tar.write_bytes(whole)
    again = subprocess.run(resume, capture_output=True, text=True, check=False, env=env)
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "run.json").read_text())["state"] == "done"
    assert (out / "checkpoints" / f"step-{done + 20:06}").is_dir()
