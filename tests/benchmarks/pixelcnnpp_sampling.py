"""Cached PixelCNN++ sampling against one pass over the whole image for every pixel.

Baseline: ``PixelCNNPP.sample_naive``, the same weights and the same images; its time is that of one pass times the
pixels, since all passes cost the same and one draws all colours of a pixel. Net: three residual layers a block, 64
filters, mixtures of 10; 16 colour images of 32x32 at once; float32; initialised by data and trained for a few steps
on drawn shapes. The best published figure for such a cache is 183 times (Ramachandran et al. 2017, on a GPU).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli import data
from gencli.contract import DataSpec
from gencli.models.autoregressive.pixelcnnpp import PixelCNNPP
from gencli.rng import seeded
from tests.benchmarks._timing import sampled, tell, trained

STEPS, BATCH, N, SIDE = 8, 16, 16, 32


def images() -> tuple[Tensor, int]:
    """Enough colour images for the training, on a black ground of 32x32, and their levels."""
    source = data.load("shapes:coloured")
    x = source.rows(torch.arange(STEPS * BATCH))["x"]
    margin = SIDE - x.shape[-1]
    return F.pad(x, (margin // 2, margin - margin // 2) * 2), source.spec.levels or 256


def main() -> None:
    """Train, time both samplers on one thread and on two, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    x, levels = images()
    spec = DataSpec(name="benchmark", kind="image", shape=(3, SIDE, SIDE), levels=levels)
    with seeded("benchmark"):
        model = PixelCNNPP(PixelCNNPP.Config(filters=64, layers=3, mixtures=10, dropout=0), spec)
    bits = trained(model, x, STEPS, BATCH, lr=1e-3)
    print(f"trained {STEPS} steps of {BATCH} on shapes:coloured: {bits:.3f} bits/dim; {N} images of 3x{SIDE}x{SIDE}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds, _, _ = sampled(model, N, rounds=4, passes=4)
        tell(f"{threads} thread{'s' * (threads > 1)}", seconds, SIDE * SIDE)
