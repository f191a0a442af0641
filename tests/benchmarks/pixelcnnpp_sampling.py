"""Cached PixelCNN++ sampling against one pass over the whole image for every pixel.

Baseline: ``PixelCNNPP.sample_naive``, the same weights and the same images; its time is that of one pass times the
pixels, since all passes cost the same and one draws all colours of a pixel. Net: three residual layers a block, 64
filters, mixtures of 10; 16 colour images of 32x32 at once; float32; initialised by data and trained for a few steps
on drawn shapes. The best published figure for such a cache is 183 times (Ramachandran et al. 2017, on a GPU).
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli import data
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.pixelcnnpp import PixelCNNPP
from gencli.rng import Keys, SampleRng, seeded

STEPS, BATCH, N, SIDE = 8, 16, 16, 32


def images() -> tuple[Tensor, int]:
    """Enough colour images for the training, on a black ground of 32x32, and their levels."""
    source = data.load("shapes:coloured")
    x = source.rows(torch.arange(STEPS * BATCH))["x"]
    margin = SIDE - x.shape[-1]
    return F.pad(x, (margin // 2, margin - margin // 2) * 2), source.spec.levels or 256


def trained(x: Tensor, levels: int) -> tuple[PixelCNNPP, float]:
    """The net after its steps, and its last loss in bits/dim."""
    spec = DataSpec(name="benchmark", kind="image", shape=(3, SIDE, SIDE), levels=levels)
    with seeded("benchmark"):
        model = PixelCNNPP(PixelCNNPP.Config(filters=64, layers=3, mixtures=10, dropout=0), spec)
    optimizer, keys, bits = torch.optim.Adam(model.parameters(), 1e-3), Keys(0), 0.0
    for number, rows in enumerate(x.split(BATCH)):
        step = Step(number, STEPS, keys.open("model", number), torch.tensor(number / STEPS))
        if number == 0:
            model.prepare(Batch(x=rows), step)
        out = model.loss(Batch(x=rows), step)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        bits = float(out["bits_per_dim"])
    return model.eval(), bits


def main() -> None:
    """Train, time both samplers on one thread and on two, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    x, levels = images()
    model, bits = trained(x, levels)
    print(f"trained {STEPS} steps of {BATCH} on shapes:coloured: {bits:.3f} bits/dim; {N} images of 3x{SIDE}x{SIDE}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cached, full = [], []
        for _ in range(4):  # in turn, so that what else runs on the machine slows both down
            start = time.perf_counter()
            drawn = model.sample(SampleRng(0, range(N)))
            cached.append(time.perf_counter() - start)
            with torch.no_grad():
                for _ in range(4):
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
