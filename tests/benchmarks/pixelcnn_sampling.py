"""Cached PixelCNN sampling against one pass over the whole image for every pixel.

Baseline: ``PixelCNN.sample_naive``, the same weights and the same images; its time is that of one pass times the
pixels, since all passes cost the same. Both run cropped kernels, so the baseline is the faster of its kind. Net: the
course's, 7x7 mask A, 5 times 7x7 mask B, two 1x1, 64 filters; 64 binary images of 28x28 at once; float32; weights
trained for a few dozen steps on MNIST at threshold 1/2 where $GENCLI_DATA has it, else on drawn shapes.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli import data
from gencli.console import DataError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.pixelcnn import PixelCNN
from gencli.rng import Keys, SampleRng, seeded

STEPS, BATCH, N, SIDE = 40, 32, 64, 28


def images() -> tuple[str, Tensor]:
    """Enough binary images for the training, and their name."""
    if os.environ.get("GENCLI_DATA"):
        try:
            return "mnist:threshold", data.load("mnist:threshold").rows(torch.arange(STEPS * BATCH))["x"]
        except DataError:
            pass
    source = data.load("shapes")
    x = source.rows(torch.arange(STEPS * BATCH) % (source.size or STEPS * BATCH))["x"]
    margin = SIDE - x.shape[-1]
    return "shapes, padded to 28x28", F.pad(x, (margin // 2, margin - margin // 2) * 2)


def trained(x: Tensor) -> tuple[PixelCNN, float]:
    """The net after its steps, and its last loss in bits/dim."""
    spec = DataSpec(name="benchmark", kind="image", shape=(1, SIDE, SIDE), levels=2)
    with seeded("benchmark"):
        model = PixelCNN(PixelCNN.Config(stacks="single", channels=64, layers=5, first_kernel=7, kernel=7), spec)
    optimizer, keys, bits = torch.optim.Adam(model.parameters(), 1e-3), Keys(0), 0.0
    for number, rows in enumerate(x.split(BATCH)):
        step = Step(number, STEPS, keys.open("model", number), torch.tensor(number / STEPS))
        out = model.loss(Batch(x=rows), step)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        bits = float(out["bits_per_dim"])
    return model.eval(), bits


def main() -> None:
    """Train, time both samplers on one thread and on two, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name, x = images()
    model, bits = trained(x)
    print(f"net trained {STEPS} steps of {BATCH} on {name}: {bits:.4f} bits/dim; {N} images of 1x{SIDE}x{SIDE}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cached, full = [], []
        for _ in range(4):  # in turn, so that what else runs on the machine slows both down
            start = time.perf_counter()
            drawn = model.sample(SampleRng(0, range(N)))
            cached.append(time.perf_counter() - start)
            with torch.no_grad():
                for _ in range(5):
                    start = time.perf_counter()
                    model(drawn)
                    full.append(time.perf_counter() - start)
        pixels = SIDE * SIDE
        for kind, pick in (("best", min), ("median", lambda t: sorted(t)[len(t) // 2])):
            fast, slow = pick(cached), pixels * pick(full)
            print(
                f"{threads} thread{'s' * (threads > 1)}, {kind} of {len(cached)} and {len(full)}: cached {fast:.2f} s,"
                f" naive {pixels} x {pick(full):.3f} s = {slow:.0f} s (extrapolated): {slow / fast:.0f} times as fast"
            )
