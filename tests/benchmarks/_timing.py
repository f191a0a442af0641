"""What the benchmarks share: a few steps of training, and times taken in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gencli.contract import Batch, Step
from gencli.rng import Keys, SampleRng

Seconds = dict[str, list[float]]


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Seconds of each call, sorted; taken in turn, so that what else runs on the machine slows all down."""
    seconds: Seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(found[1:]) for name, found in seconds.items()}


def trained(model: Any, x: Tensor, steps: int, batch: int, lr: float) -> float:
    """A few steps of Adam on the rows ``x``; the last loss in bits/dim. The model is in evaluation mode then."""
    optimizer, keys, bits = torch.optim.Adam(model.parameters(), lr), Keys(0), 0.0
    for number, rows in enumerate(x.split(batch)[:steps]):
        step = Step(number, steps, keys.open("model", number), torch.tensor(number / steps))
        if number == 0:
            model.prepare(Batch(x=rows), step)
        out = model.loss(Batch(x=rows), step)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        bits = float(out["bits_per_dim"])
    model.eval()
    return bits


def sampled(model: Any, n: int, rounds: int, passes: int) -> tuple[Seconds, Tensor, Tensor]:
    """Seconds of drawing ``n`` samples ("cached") and of one pass over them ("naive"), ``passes`` for each drawing;
    the samples and what the pass gave."""
    seconds: Seconds = {"cached": [], "naive": []}
    for _ in range(rounds):  # in turn, so that what else runs on the machine slows both down
        start = time.perf_counter()
        drawn = model.sample(SampleRng(0, range(n)))
        seconds["cached"].append(time.perf_counter() - start)
        with torch.no_grad():
            for _ in range(passes):
                start = time.perf_counter()
                logits = model(drawn)
                seconds["naive"].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in seconds.items()}, drawn, logits


def tell(what: str, seconds: Seconds, values: int, more: Callable[[float], str] = lambda _: "") -> None:
    """The best and the median of :func:`sampled`: a naive sampler takes one pass for each of ``values``.

    ``more`` adds to the line what it makes of the ratio.
    """
    cached, naive = seconds["cached"], seconds["naive"]
    for kind, pick in (("best", lambda t: t[0]), ("median", lambda t: t[len(t) // 2])):
        fast, slow = pick(cached), values * pick(naive)
        print(
            f"{what}, {kind} of {len(cached)} and {len(naive)}: cached {fast:.2f} s, naive {values} x "
            f"{pick(naive):.3f} s = {slow:.0f} s (extrapolated): {slow / fast:.0f} times as fast{more(slow / fast)}"
        )
