"""Cached LSTM sampling against one pass over the whole image for every pixel.

Baseline: ``RNN.sample_naive``, the same weights and the same images; its time is that of one pass times the pixels,
since all passes cost the same. A baseline that reads no further than the pixel it draws costs half of that, so its
figure is printed too: the passes of both run torch's own LSTM. Net: the course's, LSTM-256; 64 binary images of 28x28
at once; float32; weights trained for a few steps on MNIST at threshold 1/2 where $GENCLI_DATA has it, else on drawn
shapes.
"""

from __future__ import annotations

import os

import torch

from gencli.contract import DataSpec
from gencli.models.autoregressive.rnn import RNN
from gencli.nn.causal import invert_cdf
from gencli.nn.sequence import flatten
from gencli.rng import SampleRng, seeded
from tests.benchmarks._timing import sampled, tell, trained
from tests.benchmarks.pixelcnn_sampling import BATCH, SIDE, images

STEPS, N = 12, 64


def main() -> None:
    """Train, time both samplers on one thread, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name, x = images()
    spec = DataSpec(name="benchmark", kind="image", shape=(1, SIDE, SIDE), levels=2)
    with seeded("benchmark"):
        model = RNN(RNN.Config(hidden=256, coordinates=True), spec)
    bits = trained(model, x, STEPS, BATCH, lr=3e-3)
    print(f"net trained {STEPS} steps of {BATCH} on {name}: {bits:.4f} bits/dim; {N} images of 1x{SIDE}x{SIDE}")
    torch.set_num_threads(1)
    seconds, drawn, logits = sampled(model, N, rounds=4, passes=3)
    again = invert_cdf(logits, flatten(SampleRng(0, range(N)).uniform("value", drawn.shape)))
    same = (again == flatten(drawn)).sum().item()
    print(f"{same} of {drawn.numel()} draws are the naive route's, given the same values before them")
    tell(
        "1 thread",
        seconds,
        SIDE * SIDE,
        lambda r: f", {r / 2:.0f} times a naive route that stops at the pixel it draws",
    )
