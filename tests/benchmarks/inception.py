"""Inception features against torch-fidelity's: ``python -m tests.benchmarks inception [--threads 1 2]``.

Baseline: ``FeatureExtractorInceptionV3`` of torch-fidelity 0.4 as its commands use it ("2048", "logits_unbiased"),
where it is installed. The same random weights, the same 16 images of 32x32 pixels, resized by the same rule; float32 on
the CPU. Both take turns, so that what else runs on the machine slows both down; the best of five counts. Processor
seconds are told beside the wall clock's: with one thread they do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gencli.metrics.inception import load_inception
from gencli.metrics.weights import packed
from tests.test_inception import images, random_weights

BATCH, TURNS = 16, 5


def theirs(weights: dict[str, torch.Tensor], folder: str) -> Any:
    """torch-fidelity's extractor with ``weights``, or None where it is not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        print(f"torch-fidelity is left out ({error}): pip install torch-fidelity==0.4.0")
        return None
    path = f"{folder}/weights.pth"
    torch.save(weights, path)
    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)


def timed(compute: Callable[[], Any]) -> tuple[float, float]:
    """(wall clock, processor) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    compute()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def main() -> None:
    """Compare results, time both, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    threads = parser.parse_args(sys.argv[2:]).threads
    weights, x = random_weights(), images(BATCH, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(packed(weights))
        nets = {"gencli": load_inception(path), "torch-fidelity": theirs(weights, folder)}
    nets = {name: net for name, net in nets.items() if net is not None}
    found = [net(x) for net in nets.values()]
    for what, a, b in zip(("features", "logits"), found[0], found[-1]):
        if len(nets) == 2:
            print(
                f"{what}: differ by {(a - b).norm() / b.norm():.1e} of their norm, at most by {(a - b).abs().max():.1e}"
            )
    for n in threads:
        torch.set_num_threads(n)
        times = [{name: timed(lambda net=net: net(x)) for name, net in nets.items()} for _ in range(TURNS)]
        best = {name: [min(turn[name][k] for turn in times) for k in (0, 1)] for name in nets}
        for name, (wall, cpu) in best.items():
            print(f"{n} threads, batch {BATCH}: {name} {BATCH / wall:.2f} images/s, {cpu / BATCH:.3f} processor s each")
        if len(nets) == 2:
            mine, other = best.values()
            print(
                f"{n} threads: {other[0] / mine[0]:.2f} times as fast ({other[1] / mine[1]:.2f} in processor seconds)"
            )
