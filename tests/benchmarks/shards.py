"""Packing and reading shards of 1,000,000 small images: ``python -m tests.benchmarks shards [--images N]``.

The images (16x16, grey, about 90 bytes as PNG and 2 KB in a tar with its label) are a function of their number and are
made on the spot, packed into a temporary folder, and deleted: 2 GB at a time. Every line is one process that does
nothing else; its peak memory is that of the whole process, with what ``import torch`` and the code alone hold beside
it. The claim is that memory does not depend on the number of images. Reading is in the order of training, in batches of
256, over the same number of batches for every size; then, for the largest set, beside a step that takes as long as it
takes to read a batch: on a device (the processor waits) and on one core.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gencli.contract import DataSpec, Phase, Stream
from gencli.data import SPLITS, load, packing
from gencli.training.batches import Batches

SIDE, BATCH, BATCHES, STEPS = 16, 256, 800, 200
PER_IMAGE = 2200  # bytes on disk


class Drawn:
    """Rectangles whose place, size and brightness are a function of their number."""

    def __init__(self, split: str, n: int) -> None:
        self.name, self.split, self.size, self.digest = "drawn", split, n, ""
        classes = tuple(map(str, range(10)))
        self.spec = DataSpec(name="drawn", kind="image", shape=(1, SIDE, SIDE), levels=256, classes=classes, size=n)

    def rows(self, index: torch.Tensor, epoch: Any = 0) -> dict[str, torch.Tensor]:
        mixed = index.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        top, left, height, width = (((mixed >> np.uint64(at)) % np.uint64(12))[:, None, None] for at in (8, 20, 32, 44))
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint64)
        inside = (y >= top) & (y <= top + height) & (x >= left) & (x <= left + width)
        grey = (mixed >> np.uint64(56)).astype(np.uint8)[:, None, None] | np.uint8(64)
        return {"x": torch.from_numpy((inside * grey)[:, None]), "label": index % 10}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def packed(folder: str, n: int) -> dict[str, float]:
    before, began = peak(), time.perf_counter()
    sources = [Drawn(split, n if split == "train" else 1000) for split in SPLITS]
    packing.pack(sources, Path(folder), 256 << 20, lambda: None)
    return {"images/s": (n + 2000) / (time.perf_counter() - began), "peak MB": peak(), "before MB": before}


def batches(folder: str, ahead: bool) -> Callable[[int], Any]:
    """What gives the k-th batch."""
    source, phase = load(folder), Phase("model", [], lambda b, s: {})
    made = Batches(
        source, {"x": Stream(("x", "label"))}, seed=0, size=BATCH, device=torch.device("cpu"), channels_last=False
    )
    made.ahead = ahead
    return lambda k: made.get(phase, k)


def reading(folder: str, n: int) -> dict[str, float]:
    before, source = peak(), Drawn("train", n)
    batch, began = batches(folder, True), time.perf_counter()
    for k in range(BATCHES):
        b = batch(k)
    rate = BATCHES * BATCH / (time.perf_counter() - began)
    whole = source.rows(b.index * packing._stride(source) % n)
    if not torch.equal(b.x, whole["x"]) or not torch.equal(b.label, whole["label"]):
        raise SystemExit("what was read is not what was packed")
    return {"images/s": rate, "peak MB": peak(), "before MB": before}


def beside(folder: str, n: int) -> dict[str, float]:
    """Images a second of reading alone, and with a step of the same length, read ahead or not."""
    torch.set_num_threads(1)
    a = torch.randn(256, 256)

    def spin(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            a @ a

    def rate(ahead: bool, step: Callable[[float], None], seconds: float) -> float:
        batch = batches(folder, ahead)
        batch(0), batch(1), batch(2)
        began = time.perf_counter()
        for k in range(3, STEPS + 3):
            batch(k)
            step(seconds)
        return STEPS * BATCH / (time.perf_counter() - began)

    alone = rate(False, time.sleep, 0.0)
    each = BATCH / alone
    found = {"reading alone": alone, "step ms": each * 1000}
    for title, step in (("device", time.sleep), ("core", spin)):
        for ahead in (False, True):
            found[f"{title}, {'read ahead' if ahead else 'in turn'}"] = rate(ahead, step, each)
    return found


def child(what: str, folder: Path, n: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.shards", what, str(folder), str(n)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks shards")
    parser.add_argument("--images", type=int, default=1_000_000, help="of the largest set")
    largest = parser.parse_args(sys.argv[2:]).images
    with tempfile.TemporaryDirectory() as name:
        free = shutil.disk_usage(name).free
        if free < largest * PER_IMAGE * 1.2:
            raise SystemExit(
                f"{name} has {free / 1e9:.1f} GB free, and {largest * PER_IMAGE * 1.2 / 1e9:.1f} are needed"
            )
        print(f"{'images':>9}  {'on disk':>8}  {'packing':>28}  {'reading, batches of ' + str(BATCH):>28}")
        for n in sorted({max(1, largest // 100), max(1, largest // 10), largest}):
            folder = Path(name, str(n))
            found = [child("packed", folder, n), child("reading", folder, n)]
            size = sum(path.stat().st_size for path in folder.iterdir())
            cells = [f"{f['images/s']:>8,.0f}/s {f['peak MB']:>5.0f} MB (-{f['before MB']:.0f})" for f in found]
            print(f"{n:>9,}  {size / 1e6:>5,.0f} MB  {cells[0]:>28}  {cells[1]:>28}", flush=True)
            if n == largest:
                for title, value in child("beside", folder, n).items():
                    unit = "ms" if title == "step ms" else "images/s"
                    print(f"  {title.removesuffix(' ms'):<22} {value:>9,.1f} {unit}")
            shutil.rmtree(folder)


if __name__ == "__main__":  # a child
    print(
        json.dumps({"packed": packed, "reading": reading, "beside": beside}[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
    )
