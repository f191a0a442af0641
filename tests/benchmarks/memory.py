"""Peak memory of training, of streaming and of judging digits: ``python -m tests.benchmarks memory``.

Whole processes; what ``import torch`` alone holds is printed beside them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np

CHILD = """
import resource, sys
sys.argv = ["gencli", *sys.argv[1:]]
from gencli.cli import main
code = main()
sys.stdout.flush()
print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f}", file=sys.stderr)
sys.exit(code)
"""


def peak(*command: str) -> float:
    """Peak resident memory of one ``gencli`` process, MB; its stdout is thrown away."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stderr.rsplit("PEAK ", 1)[1])


def main() -> None:
    torch_alone = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)"
    base = subprocess.run([sys.executable, "-c", torch_alone], capture_output=True, text=True, check=True)
    print(f"import torch alone: {float(base.stdout):.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(f"gencli train pixelcnn train.steps=200: {peak('train', 'pixelcnn', 'train.steps=200'):.0f} MB")
        for n in ("100", "1000", "10000"):
            print(f"gencli sample -n {n} -o -: {peak('sample', '-n', n, '-o', '-'):.0f} MB")
        rows = np.random.default_rng(0).integers(0, 256, (64_000, 1, 8, 8)).astype(np.uint8)
        for n in (1000, 8000, 64_000):
            np.savez(f"{n}.npz", x=rows[:n])
            told = peak("eval", "fid", f"{n}.npz", "--data", "digits")
            print(f"gencli eval fid {n}.npz --data digits: {told:.0f} MB")


if __name__ == "__main__":
    main()
