"""Cached WaveNet sampling against one pass over the whole sound for every sample.

Baseline: ``WaveNet.sample_naive``, the same weights and the same sounds; its time is that of one pass times the
samples, since all passes cost the same. Net: 32 channels, 256 features after the skip connections, two stacks of
dilations 1..512, 256 mu-law levels; sounds of 8,000 samples, one at a time and 16 at a time; float32; the weights are
those of the start, enlarged, for the time does not depend on them.
"""

from __future__ import annotations

import torch

from gencli.contract import DataSpec
from gencli.models.autoregressive.wavenet import WaveNet
from gencli.nn.causal import invert_cdf
from gencli.nn.sequence import flatten
from gencli.rng import SampleRng, seeded
from tests.benchmarks._timing import sampled, tell

LENGTH = 8000


def main() -> None:
    """Time both samplers on one thread, print."""
    spec = DataSpec(name="benchmark", kind="audio", shape=(1, LENGTH), levels=256, rate=8000)
    with seeded("benchmark"):
        model = WaveNet(WaveNet.Config(channels=32, skip=256, stacks=2, layers=10), spec).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, receptive field {model.receptive_field}; sounds of {LENGTH} samples")
    torch.set_num_threads(1)
    for n in (1, 16):
        seconds, drawn, logits = sampled(model, n, rounds=3, passes=2)
        again = invert_cdf(logits, flatten(SampleRng(0, range(n)).uniform("value", drawn.shape)))
        same = (again == flatten(drawn)).sum().item()
        tell(f"1 thread, batch {n}", seconds, LENGTH)
        print(f"{same} of {drawn.numel()} draws are the naive route's, given the same values before them")
