"""What a pipe costs: ``python -m tests.benchmarks pipe``.

``gencli sample RUN -n 10000 -o - | gencli eval fid - --data digits`` against ``gencli eval fid RUN -n 10000``, wall
clock, taken in turn; a small VAE is trained first, since cheap samples make the pipe's share largest.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N = 10_000
GENCLI = [sys.executable, "-m", "gencli"]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        run = str(Path(place) / "run")
        train = [*GENCLI, "train", "vae", "--steps", "300", "--no-preview", "--out", run]
        subprocess.run(train, check=True, **quiet)  # type: ignore[call-overload]
        times: dict[str, list[float]] = {"one process": [], "pipe": []}
        values = set()
        for _ in range(3):
            began = time.perf_counter()
            one = subprocess.run([*GENCLI, "eval", "fid", run, "-n", str(N)], check=True, capture_output=True)
            times["one process"].append(time.perf_counter() - began)
            began = time.perf_counter()
            with subprocess.Popen(
                [*GENCLI, "sample", run, "-n", str(N), "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as source:
                told = [*GENCLI, "eval", "fid", "-", "--data", "digits"]
                two = subprocess.run(told, stdin=source.stdout, check=True, capture_output=True)
            times["pipe"].append(time.perf_counter() - began)
            values |= {json.loads(made.stdout)["value"] for made in (one, two)}
        for name, found in times.items():
            print(f"{name:<12} {min(found):.2f} s best, {statistics.median(found):.2f} s median of 3")
        print(f"ratio {min(times['pipe']) / min(times['one process']):.2f}; the values agree: {len(values) == 1}")


if __name__ == "__main__":
    main()
