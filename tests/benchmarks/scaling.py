"""Predicted and measured steps of 4 processes on this machine: ``python -m tests.benchmarks scaling``.

The model of time of ``gencli.training.scaling``, calibrated by what one and two processes of one thread do (gloo),
predicts what four do; then four do it. All of them share this machine's cores, so the prediction is

    step(4) = contention(4) * (slowdown * (a + c b) + communication(4))

- ``a + c b``: fitted to steps of one process with a whole, a half and a quarter of the batch.
- ``slowdown``: how many times as long a process computes while the other core computes too (they share memory and
  caches, and the faster one waits): step(2) less its all-reduces, over a + c b.
- ``communication``: latency and bytes/s fitted to all-reduces of the recipes' own messages by two processes. Between
  processes of one machine it is copying, hence work for the cores as well.
- ``contention``: processes x threads over cores, at least 1: they take turns.

A block is about SECONDS of steps at full speed, its value their mean; the number printed is the median of WANTED
blocks during which other programs used less than QUIET of a core (by /proc/stat), with the least and the greatest.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from gencli import processes
from gencli.recipe import load
from gencli.training.launch import joined
from gencli.training.scaling import Link, Message, communication, fit
from gencli.training.scaling import messages as listed
from gencli.training.session import Session
from gencli.training.settings import settings

RECIPES = {
    "pixelcnn": ["pixelcnn"],
    "vae, batch 512": ["vae", "train.batch_size=512"],
    "wgan-gp": ["wgan-gp"],
}
SECONDS, WANTED, QUIET, PATIENCE = 0.7, 9, 0.1, 780.0
TICK = os.sysconf("SC_CLK_TCK")


class Job(NamedTuple):
    """What a group of ``world`` is to time: a step of a recipe (as the first of ``acted``), or what it would send."""

    world: int
    recipe: str
    acted: int = 1
    sending: bool = False


def contention(world: int, threads: int, cores: int) -> float:
    """How many times as long all takes where ``world`` processes of ``threads`` threads each share ``cores`` cores."""
    return max(1.0, world * threads / cores)


# ---------------------------------------------------------------------- the groups of processes


def member() -> None:
    """Time what stdin orders, a line each; the first member answers by seconds and messages."""
    torch.set_num_threads(1)
    with joined("cpu"):
        trainers, messages = {}, {}
        for name, (recipe, *more) in RECIPES.items():
            made = load(recipe, [*more, "device=cpu", "threads=1"], model=True)
            with settings(made) as device:
                trainer = trainers[name] = Session(made, device).trainer
            trainer.step()
            with processes.rehearsal(2) as sent:
                trainer.step()
            messages[name] = listed(sent)
        for line in sys.stdin:
            order, repeats = json.loads(line)
            job = Job(*order)
            buffers = [torch.zeros(m.size // 4) for m in messages[job.recipe]]
            with processes.rehearsal(job.acted) if job.world == 1 else nullcontext():
                began = time.perf_counter()
                for _ in range(repeats):
                    if job.sending:
                        for buffer in buffers:
                            dist.all_reduce(buffer)
                    else:
                        trainers[job.recipe].step()
                took = (time.perf_counter() - began) / repeats
            print(json.dumps([took, messages[job.recipe]]), flush=True)


class Group:
    """``world`` processes that wait for orders."""

    def __init__(self, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        self.members = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.scaling"],
                env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def ask(self, job: Job, repeats: int) -> tuple[float, list[Message], float]:
        """Seconds of one of ``repeats``, its messages, and how many cores other programs used meanwhile."""
        began, others = time.perf_counter(), _busy() - self._used()
        for each in self.members:
            assert each.stdin is not None
            print(json.dumps([job, repeats]), file=each.stdin, flush=True)
        assert self.members[0].stdout is not None
        answer = self.members[0].stdout.readline()
        if not answer:
            sys.exit("a process of the benchmark has ended")
        seconds, messages = json.loads(answer)
        others = (_busy() - self._used() - others) / (time.perf_counter() - began)
        return seconds, [Message(*m) for m in messages], others

    def _used(self) -> float:
        """Processor seconds of the members."""
        used = 0
        for each in self.members:
            with open(f"/proc/{each.pid}/stat") as file:
                words = file.read().rpartition(")")[2].split()
            used += int(words[11]) + int(words[12])
        return used / TICK

    def end(self) -> None:
        for each in self.members:
            assert each.stdin is not None
            each.stdin.close()
        for each in self.members:
            each.wait()


def _busy() -> float:
    """Processor seconds of everybody."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICK  # not idle, not waiting for a disk


# ---------------------------------------------------------------------- the proof


def measure() -> tuple[dict[Job, list[float]], dict[str, list[Message]]]:
    """Quiet blocks of every job, in turn, and what each recipe sends a step."""
    jobs = [Job(1, name, acted) for name in RECIPES for acted in (1, 2, 4)]
    jobs += [Job(world, name) for name in RECIPES for world in (2, 4)]
    jobs += [Job(2, name, sending=True) for name in RECIPES]
    groups = {world: Group(world) for world in (1, 2, 4)}
    messages = {}
    blocks: dict[Job, list[float]] = {job: [] for job in jobs}
    lasts, disturbed, end = {}, 0, time.monotonic() + PATIENCE
    for job in jobs:
        lasts[job], messages[job.recipe], _ = groups[job.world].ask(job, 3)
    while (left := [job for job in jobs if len(blocks[job]) < WANTED]) and time.monotonic() < end:
        for job in left:
            lasts[job], _, others = groups[job.world].ask(job, max(3, round(SECONDS / lasts[job])))
            if others < QUIET:
                blocks[job].append(lasts[job])
            else:
                disturbed += 1
                time.sleep(SECONDS / 2)
    for group in groups.values():
        group.end()
    done = sum(map(len, blocks.values()))
    print(f"{done} quiet blocks of {done + disturbed}; at least {min(map(len, blocks.values()))} for every number")
    if not all(blocks.values()):
        sys.exit("other programs were never quiet for long enough: try again later")
    return blocks, messages


def _told(blocks: list[float]) -> str:
    return f"{statistics.median(blocks) * 1e3:.2f} ms ({min(blocks) * 1e3:.2f} .. {max(blocks) * 1e3:.2f})"


def main() -> None:
    """Calibrate by one and two processes, predict four, measure four, print."""
    cores = len(os.sched_getaffinity(0))
    blocks, messages = measure()
    median: dict[Job, float] = {job: statistics.median(times) for job, times in blocks.items()}
    sent: dict[str, Any] = {name: (len(messages[name]), sum(m.size for m in messages[name])) for name in RECIPES}
    sending = {name: median[Job(2, name, sending=True)] for name in RECIPES}
    line = fit([size / count for count, size in sent.values()], [sending[n] / sent[n][0] for n in RECIPES])
    link = Link(1 / line.row if line.row else math.inf, line.fixed / 2)
    print(f"gloo here, from 2 processes: {link.bandwidth / 1e9:.2f} GB/s, {link.latency * 1e6:.0f} us a message")
    for name, (recipe, *more) in RECIPES.items():
        batch = load(recipe, more, model=True).train.batch_size
        rows = [batch // acted for acted in (1, 2, 4)]
        compute = fit(rows, [median[Job(1, name, acted)] for acted in (1, 2, 4)])
        slowdown = (median[Job(2, name)] - sending[name]) / compute.seconds(batch / 2)
        predicted = contention(4, 1, cores) * (
            slowdown * compute.seconds(batch / 4) + communication(messages[name], 4, link)
        )
        measured = median[Job(4, name)]
        print(f"{name}: {sent[name][0]} messages, {sent[name][1] / 1e6:.2f} MB a step")
        for acted, b in zip((1, 2, 4), rows):
            print(f"  1 process, {b} rows: {_told(blocks[Job(1, name, acted)])}, fit {compute.seconds(b) * 1e3:.2f} ms")
        print(f"  2 processes: {_told(blocks[Job(2, name)])}, all-reduces {_told(blocks[Job(2, name, sending=True)])}")
        print(f"  slowdown {slowdown:.2f}, contention of 4 on {cores} cores {contention(4, 1, cores):.1f}")
        print(f"  4 processes: predicted {predicted * 1e3:.2f} ms, measured {_told(blocks[Job(4, name)])}, ", end="")
        print(f"error {100 * (predicted / measured - 1):+.1f} %")


if __name__ == "__main__":
    member()
