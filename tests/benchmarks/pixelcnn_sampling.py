"""Cached PixelCNN sampling against one pass over the whole image for every pixel.

Baseline: ``PixelCNN.sample_naive``, the same weights and the same images; its time is that of one pass times the
pixels, since all passes cost the same. Both run cropped kernels, so the baseline is the faster of its kind. Net: the
course's, 7x7 mask A, 5 times 7x7 mask B, two 1x1, 64 filters; 64 binary images of 28x28 at once; float32; weights
trained for a few dozen steps on MNIST at threshold 1/2 where $GENCLI_DATA has it, else on drawn shapes.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli import data
from gencli.console import DataError
from gencli.contract import DataSpec
from gencli.models.autoregressive.pixelcnn import PixelCNN
from gencli.rng import seeded
from tests.benchmarks._timing import sampled, tell, trained

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


def main() -> None:
    """Train, time both samplers on one thread and on two, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name, x = images()
    spec = DataSpec(name="benchmark", kind="image", shape=(1, SIDE, SIDE), levels=2)
    with seeded("benchmark"):
        model = PixelCNN(PixelCNN.Config(stacks="single", channels=64, layers=5, first_kernel=7, kernel=7), spec)
    bits = trained(model, x, STEPS, BATCH, lr=1e-3)
    print(f"net trained {STEPS} steps of {BATCH} on {name}: {bits:.4f} bits/dim; {N} images of 1x{SIDE}x{SIDE}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds, _, _ = sampled(model, N, rounds=4, passes=5)
        tell(f"{threads} thread{'s' * (threads > 1)}", seconds, SIDE * SIDE)
