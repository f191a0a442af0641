"""A training step of Glow and of Real NVP against normflows' same nets: ``python -m tests.benchmarks couplings``.

Glow: 3 scales of 8 steps, 128 hidden channels, 32x32x3, 32 images. Real NVP: 8 couplings with 2 x 64 hidden units on
64-dimensional points, 512 of them, actnorm between. A step is the density of a batch, its gradient and Adam. The same
layers, sizes and number of parameters are printed; weights are each library's own. pip install normflows, without its
dependencies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencli.contract import DataSpec
from gencli.models.flows.glow import Glow
from gencli.models.flows.realnvp import RealNVP
from tests.benchmarks._timing import timed

SCALES, DEPTH, WIDTH, IMAGES = 3, 8, 128, (32, 3, 32, 32)
COUPLINGS, HIDDEN, POINTS = 8, 64, (512, 64)
ROUNDS = 10


class Density(nn.Module):
    """log p of real numbers, without what is done to data before."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_det = self.flow.f(x)
        return self.flow.log_base(z) + log_det


def glow() -> nn.Module:
    spec = DataSpec(name="noise", kind="image", shape=IMAGES[1:], levels=256)
    return Density(Glow(Glow.Config(scales=SCALES, depth=DEPTH, width=WIDTH), spec))


def their_glow() -> nn.Module:
    import normflows as nf

    C, H, _ = IMAGES[1:]
    base, merges, flows = [], [], []
    for i in range(SCALES):
        channels = C * 2 ** (SCALES + 1 - i)
        flows.append([*(nf.flows.GlowBlock(channels, WIDTH, scale_map="sigmoid") for _ in range(DEPTH))])
        flows[-1].append(nf.flows.Squeeze())
        size = H // 2 ** (SCALES - i)
        if i > 0:
            merges.append(nf.flows.Merge())
            shape = (channels // 2, size, size)
        else:
            shape = (channels, size, size)
        base.append(nf.distributions.GlowBase(shape))
    return Unlabelled(nf.MultiscaleFlow(base, flows, merges, class_cond=False))


class Unlabelled(nn.Module):
    """normflows' image flows want to be told that there are no labels."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x, None)


def realnvp() -> nn.Module:
    spec = DataSpec(name="noise", kind="points", shape=POINTS[1:])
    return Density(RealNVP(RealNVP.Config(couplings=COUPLINGS, hidden=(HIDDEN, HIDDEN)), spec))


def their_realnvp() -> nn.Module:
    import normflows as nf

    D, parts = POINTS[1], list[Any]()
    for _ in range(COUPLINGS):
        net = nf.nets.MLP([D // 2, HIDDEN, HIDDEN, D], init_zeros=True)
        parts += [nf.flows.AffineCouplingBlock(net, scale_map="exp"), nf.flows.Permute(D, mode="swap")]
        parts += [nf.flows.ActNorm(D)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(D, trainable=False), parts)


def step(model: Any, x: Tensor) -> Callable[[], None]:
    """One training step on ``x``, with the optimiser that a careful user of either library takes."""
    with torch.no_grad():
        model.log_prob(x)  # actnorm
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def one() -> None:
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()

    return one


def main() -> None:
    cases = {"glow": (glow, their_glow, IMAGES), "realnvp": (realnvp, their_realnvp, POINTS)}
    for name, (make, make_theirs, shape) in cases.items():
        torch.manual_seed(0)
        x = torch.randn(shape)
        layouts = {"": torch.contiguous_format}
        if x.dim() == 4:
            layouts[", channels last"] = torch.channels_last
        calls = {}
        for side, build in (("gencli", make), ("normflows", make_theirs)):
            for layout, memory in layouts.items():
                model = build().to(memory_format=memory)
                calls[side + layout] = step(model, x.contiguous(memory_format=memory))
            print(f"{name}, {side}: {sum(p.numel() for p in model.parameters()):,} parameters")
        for threads in (1, 2):
            torch.set_num_threads(threads)
            took = timed(calls, ROUNDS if name == "glow" else 20 * ROUNDS)
            for kind, pick in (("best", 0), ("median", len(took["gencli"]) // 2)):
                ms = {side: 1000 * found[pick] for side, found in took.items()}
                ours, theirs = (min(t for s, t in ms.items() if s.startswith(side)) for side in ("gencli", "normflows"))
                told = ", ".join(f"{side} {t:.1f} ms" for side, t in ms.items())
                of = f"{name}, {threads} thread{'s' * (threads > 1)}, {kind}"
                print(f"{of}: {told}: {theirs / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
