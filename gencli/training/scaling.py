"""How long a step would take on many processes: a projection from a few steps measured on one, not a measurement.

With p processes, b rows of the global batch on each, and messages of n bytes between them,

    step(p) = a + c b + sum over messages of all_reduce(n, p)

without overlap, since the trainer reduces after the backward pass. ``a + c b`` is fitted to measured steps: at small
batches what does not depend on the batch counts most. The all-reduce is a reduce-scatter by halving and an all-gather
by doubling: 2 log2(p) messages one after another, and 2 (p - 1) / p of the bytes through each process's link. No
algorithm sends fewer bytes; a ring sends as many, but pays the latency 2 (p - 1) times. The sums' own arithmetic is
left out.

Reference:
    Optimization of Collective Communication Operations in MPICH. R. Thakur, R. Rabenseifner, W. Gropp, 2005
    (section 4.5).
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencli import processes
from gencli.console import UsageError
from gencli.training.trainer import Trainer

__all__ = [
    "Calibration",
    "Fit",
    "Link",
    "Message",
    "Share",
    "all_reduce",
    "bandwidth",
    "calibrate",
    "communication",
    "contention",
    "fit",
    "latency",
    "memory",
    "messages",
    "project",
    "rehearse",
    "sharing",
]

# ---------------------------------------------------------------------- the model of time


class Link(NamedTuple):
    """What one process has to reach the others: bytes/s each way, and seconds until a message begins to arrive."""

    bandwidth: float
    latency: float


class Message(NamedTuple):
    """An all-reduce of ``size`` bytes, ``times`` a step on average. An all-gather of as many is half of one."""

    size: int
    times: float


class Fit(NamedTuple):
    """Seconds of a step without communication: ``fixed + row * rows`` for ``rows`` rows on a process."""

    fixed: float
    row: float

    def seconds(self, rows: float) -> float:
        return self.fixed + self.row * rows


def fit(rows: Sequence[int], seconds: Sequence[float]) -> Fit:
    """The least relative squares ``seconds = a + c rows`` with a, c >= 0; with one size of batch all is fixed."""
    if len(set(rows)) == 1:
        return Fit(statistics.mean(seconds), 0.0)
    u, v = [1 / t for t in seconds], [b / t for b, t in zip(rows, seconds)]  # minimise sum (a u + c v - 1)^2
    uu, uv, vv = (sum(x * y for x, y in zip(p, q)) for p, q in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    a, c = (sum(u) * vv - sum(v) * uv) / determinant, (sum(v) * uu - sum(u) * uv) / determinant
    if a < 0:
        return Fit(0.0, sum(v) / vv)
    if c < 0:
        return Fit(sum(u) / uu, 0.0)
    return Fit(a, c)


def all_reduce(size: float, world: int, link: Link) -> float:
    """Seconds of the sum of ``size`` bytes over ``world`` processes; 0 for one."""
    return 2 * math.ceil(math.log2(world)) * link.latency + 2 * (world - 1) / world * size / link.bandwidth


def communication(messages: Sequence[Message], world: int, link: Link) -> float:
    """Seconds a step of all ``messages``."""
    return sum(m.times * all_reduce(m.size, world, link) for m in messages)


def contention(world: int, threads: int, cores: int) -> float:
    """How many times as long computing takes where ``world`` processes of ``threads`` threads share ``cores`` cores."""
    return max(1.0, world * threads / cores)


def project(
    compute: Fit, messages: Sequence[Message], link: Link, *, batch: int, worlds: Sequence[int], weak: bool
) -> list[dict[str, Any]]:
    """A row for each number of processes in ``worlds``.

    Strong scaling shares ``batch`` rows out; with ``weak`` every process keeps ``batch`` rows. The speed-up is in
    examples a second, against one process. Rows that a loss gathers count as for one ``batch``.
    """
    rows = []
    alone = batch / compute.seconds(batch)
    for world in worlds:
        each = batch if weak else batch // world
        computing, sending = compute.seconds(each), communication(messages, world, link)
        rate = each * world / (computing + sending)
        rows.append(
            {
                "processes": world,
                "scaling": "weak" if weak else "strong",
                "rows_each": each,
                "batch": each * world,
                "compute_ms": computing * 1e3,
                "communication_ms": sending * 1e3,
                "step_ms": (computing + sending) * 1e3,
                "speedup": rate / alone,
                "efficiency": rate / alone / world,
                "examples_per_s": rate,
            }
        )
    return rows


# ---------------------------------------------------------------------- what a person writes


def _quantity(option: str, text: str, units: dict[str, float], example: str, zero: bool) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z/]+)", text.strip(), re.ASCII)
    value = float(found[1]) * units.get(found[2], math.nan) if found else math.nan
    if not math.isfinite(value) or (value == 0 and not zero):
        raise UsageError(f"{option} {text[:40]!r}: a number and {', '.join(units)}, such as {example}")
    return value


def bandwidth(text: str) -> float:
    """Bytes a second of ``400Gb/s`` (bits) or ``50GB/s`` (bytes); UsageError where the unit is not said."""
    bits = {"Gb/s": 1e9 / 8, "GB/s": 1e9, "Mb/s": 1e6 / 8, "MB/s": 1e6}
    return _quantity("--bandwidth", text, bits, "400Gb/s (bits) or 50GB/s (bytes)", zero=False)


def latency(text: str) -> float:
    """Seconds of ``10us``."""
    return _quantity("--latency", text, {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}, "10us", zero=True)


# ---------------------------------------------------------------------- calibration


@dataclass
class Share:
    """Measured steps of one process of ``world``: its rows, the median seconds, and what it would send."""

    world: int
    rows: int
    seconds: float = 0.0
    messages: list[Message] = field(default_factory=list)


def messages(sent: Iterable[tuple[str, int]], times: float = 1) -> list[Message]:
    """What ``processes.rehearsal`` lists, ``times`` a step."""
    return [Message(size, times if how == "all_reduce" else times / 2) for how, size in sent]


class Calibration(NamedTuple):
    """What the projection of a recipe rests on; ``strong``: among how many processes its batches divide."""

    compute: Fit
    messages: list[Message]
    shares: list[Share]
    strong: list[int]


def calibrate(trainer: Trainer, worlds: Sequence[int]) -> Calibration:
    """Measure the largest, the smallest and a middle share of the batch that ``worlds`` (ascending from 1) make.

    UsageError where the batch cannot be shared at all. The trainer's state is of no use afterwards.
    """
    strong = sharing(trainer, worlds)
    several = strong[1:] or sharing(trainer, range(2, trainer.train.batch_size + 1))[:1]
    if not several:
        raise UsageError(
            f"train.batch_size={trainer.train.batch_size} and train.accumulate={trainer.train.accumulate}: there is "
            "nothing to share",
            hint=f"train.batch_size={2 * trainer.train.batch_size}",
        )
    shares = rehearse(trainer, sorted({1, several[(len(several) - 1) // 2], several[-1]}))
    compute = fit([share.rows for share in shares], [share.seconds for share in shares])
    return Calibration(compute, shares[-1].messages, shares, strong)


def sharing(trainer: Trainer, worlds: Iterable[int]) -> list[int]:
    """Those of ``worlds`` among which every batch divides."""

    def divides(world: int) -> bool:
        try:
            for player in trainer.players:
                trainer.batches.sizes(player.phase, world * trainer.train.accumulate)
        except UsageError:
            return False
        return True

    return [world for world in worlds if divides(world)]


def rehearse(trainer: Trainer, worlds: Sequence[int], *, seconds: float = 3.0, least: int = 5) -> list[Share]:
    """Measured steps of the first process of each number in ``worlds``, in turn: ``least`` rounds or more, for
    ``seconds``. The trainer's state is of no use afterwards.
    """
    trainer.step()  # what is done once
    shares = [Share(world, trainer.train.batch_size // world) for world in worlds]
    often = _kinds(trainer)
    taken: dict[tuple[int, int], list[float]] = {(world, number): [] for world in worlds for number in often}
    rounds, end = -2, math.inf  # two to warm up
    while rounds < least or time.perf_counter() < end:
        for share in shares:
            for number, part in often.items():
                trainer.number = number
                with processes.rehearsal(share.world) as sent:
                    took = _timed(trainer)
                if rounds == -2:
                    share.messages += messages(sent, part)
                elif rounds >= 0:
                    taken[share.world, number].append(took)
        rounds += 1
        if rounds == 0:
            end = time.perf_counter() + seconds
    for share in shares:
        share.seconds = sum(part * statistics.median(taken[share.world, number]) for number, part in often.items())
    return shares


def _kinds(trainer: Trainer) -> dict[int, float]:
    """The first step of each kind that the phases' repeats make, and what part of all steps is of its kind."""
    numbers = range(1, max(2, min(trainer.train.steps, 10_000)))
    kinds = {n: tuple(player.phase.times(n) for player in trainer.players) for n in numbers}
    first = {kind: n for n, kind in reversed(kinds.items())}
    return {first[kind]: count / len(kinds) for kind, count in Counter(kinds.values()).items()}


def _timed(trainer: Trainer) -> float:
    """Seconds of one step, to the end of what the device does."""
    began = time.perf_counter()
    trainer.step()
    if trainer.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def memory(trainer: Trainer) -> dict[str, int]:
    """Bytes that every process holds between steps, and the gradients of the largest phase; no activations."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    return {
        "weights": size(trainer.model.state_dict().values()),
        "gradients": max(size(player.parameters) for player in trainer.players),
        "optimiser": size(trainer.tensors().values()),
        "averages": size(trainer.ema.values()),
    }
