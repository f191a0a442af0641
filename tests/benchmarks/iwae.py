"""The importance-weighted bound of 5,000 draws, of 1,000 binarised 8x8 digits: seconds, peak memory and where it goes.

The net is the default recipe's (two layers of 512, 16 latents) with a Bernoulli decoder, on ``digits:threshold``, after
300 steps. Memory is the highest resident size of the whole process, PyTorch included, so each k and chunk is a process
of its own: ``python -m tests.benchmarks iwae`` starts them. Every chunk has the same draws and so the same bound.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

N = 1000


def measure(k: int, chunk: int | None, threads: int) -> None:
    """One bound, printed with what it took."""
    import torch

    from gencli import data, recipe
    from gencli.metrics.likelihood import chunks_of
    from gencli.rng import SampleRng
    from gencli.sampling import scope
    from tests.tiny import session

    words = ["model.decoder=bernoulli", "data.name=digits:threshold", "device=cpu", f"threads={threads}"]
    with session(recipe.load("vae", words, model=True)) as made:
        for _ in range(300):
            made.trainer.step()
        torch.set_num_threads(threads)
        source, start, bounds = data.load("digits:threshold", "train"), time.perf_counter(), list[Any]()
        with made.trainer.evaluating() as model:
            for rows in chunks_of(source, N, model.chunk):
                with scope(SampleRng(0, rows, "eval-train")) as rng:
                    x = source.rows(torch.tensor(rows))["x"]
                    bounds.append(model.iwae(x, rng, k, chunk=chunk))  # type: ignore[operator]
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    bound = torch.cat(bounds).mean().item()
    size = "chosen" if chunk is None else chunk
    print(f"k {k}, chunk {size}, {threads} threads: {seconds:.1f} s, {peak:.2f} GB, bound {bound:.5f} nats", flush=True)


def main() -> None:
    """A process for each measurement; with options, the measurement itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-k", type=int)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(sys.argv[2:])
    if asked.k is not None:
        measure(asked.k, asked.chunk, asked.threads)
        return
    for words in (["-k", "50"], ["-k", "500"], ["-k", "500", "--chunk", "16"], ["-k", "5000"]):
        command = [sys.executable, "-m", "tests.benchmarks", "iwae", *words, "--threads", str(asked.threads)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
