"""A short version of `python -m tests.faults`: whatever befalls a run, it ends like one that nothing befell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

MEMORY = Path("/dev/shm")


def run(what: list[str], count: int) -> None:
    """The driver, in a process of its own: a parent that forks must have started no thread."""
    command = [sys.executable, "-m", "tests.faults", *what, "--faults", str(count)]
    command += ["--models", "pixelcnn", "vae", "wgan-gp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if MEMORY.is_dir():  # a disk's fsync would take most of the time
        env["TMPDIR"] = str(MEMORY)
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    totals = re.findall(r"^\| all \| (\d+) \| \d+ \| \d+ \| 0 \| 0 \| 0 \|", done.stdout, re.M)
    assert totals == [str(count)] * len(what), done.stdout


def test_killed() -> None:
    run(["kill"], 12)


def test_stopped_out_of_disk_and_out_of_memory() -> None:
    run(["term", "disk", "oom"], 3)
