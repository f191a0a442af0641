"""Cached LSTM sampling against one pass over the whole image for every pixel.

Baseline: ``RNN.sample_naive``, the same weights and the same images; its time is that of one pass times the pixels,
since all passes cost the same. A baseline that reads no further than the pixel it draws costs half of that, so its
figure is printed too: the passes of both run torch's own LSTM. Net: the course's, LSTM-256; 64 binary images of 28x28
at once; float32; weights trained for a few steps on MNIST at threshold 1/2 where $GENCLI_DATA has it, else on drawn
shapes.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.rnn import RNN
from gencli.nn.causal import invert_cdf
from gencli.nn.sequence import flatten
from gencli.rng import Keys, SampleRng, seeded
from tests.benchmarks.pixelcnn_sampling import BATCH, SIDE, images

STEPS, N = 12, 64


def trained(x: Tensor) -> tuple[RNN, float]:
    """The net after its steps, and its last loss in bits/dim."""
    spec = DataSpec(name="benchmark", kind="image", shape=(1, SIDE, SIDE), levels=2)
    with seeded("benchmark"):
        model = RNN(RNN.Config(hidden=256, coordinates=True), spec)
    optimizer, keys, bits = torch.optim.Adam(model.parameters(), 3e-3), Keys(0), 0.0
    for number, rows in enumerate(x.split(BATCH)[:STEPS]):
        out = model.loss(Batch(x=rows), Step(number, STEPS, keys.open("model", number), torch.tensor(number / STEPS)))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        bits = float(out["bits_per_dim"])
    return model.eval(), bits


def main() -> None:
    """Train, time both samplers on one thread, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name, x = images()
    model, bits = trained(x)
    print(f"net trained {STEPS} steps of {BATCH} on {name}: {bits:.4f} bits/dim; {N} images of 1x{SIDE}x{SIDE}")
    torch.set_num_threads(1)
    cached, full = [], []
    for _ in range(4):  # in turn, so that what else runs on the machine slows both down
        start = time.perf_counter()
        drawn = model.sample(SampleRng(0, range(N)))
        cached.append(time.perf_counter() - start)
        with torch.no_grad():
            for _ in range(3):
                start = time.perf_counter()
                logits = model(drawn)
                full.append(time.perf_counter() - start)
    again = invert_cdf(logits, flatten(SampleRng(0, range(N)).uniform("value", drawn.shape)))
    same = (again == flatten(drawn)).sum().item()
    print(f"{same} of {drawn.numel()} draws are the naive route's, given the same values before them")
    pixels = SIDE * SIDE
    for kind, pick in (("best", min), ("median", lambda t: sorted(t)[len(t) // 2])):
        fast, slow = pick(cached), pixels * pick(full)
        print(
            f"1 thread, {kind} of {len(cached)} and {len(full)}: cached {fast:.2f} s, naive {pixels} x"
            f" {pick(full):.3f} s = {slow:.0f} s (extrapolated): {slow / fast:.0f} times as fast,"
            f" {slow / 2 / fast:.0f} times a naive route that stops at the pixel it draws"
        )
