"""CPU seconds of the verbs that import no torch: ``python -m tests.benchmarks startup``."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

COMMANDS = ("--help", "train --help", "models", "recipes ls", "runs")


def cpu_seconds(command: str) -> float:
    """User and system time of one ``gencli`` process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "gencli", *command.split()], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for command in COMMANDS:
        times = [cpu_seconds(command) for _ in range(9)][1:]
        spread = f"{min(times):.3f} .. {max(times):.3f}"
        print(f"gencli {command:<14} {statistics.median(times):.3f} s CPU (median of 8; {spread})")


if __name__ == "__main__":
    main()
