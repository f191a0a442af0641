"""A training step of the plain PixelCNN, its kernels cropped, against the same network with full masked kernels.

Baseline: every k x k kernel is whole and multiplied by its mask in each step, as code after the paper does; written
here, with the same weights. Net: the course's, 7x7 mask A, 5 times 7x7 mask B, two 1x1, 64 filters; 32 binary images
of 28x28; float32; forward, backward and Adam. Both run in channels-last order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli import data
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.pixelcnn import PixelCNN
from gencli.nn.causal import CausalConv2d
from gencli.rng import Keys, seeded

BATCH, SIDE, STEPS = 32, 28, 8


class Masked(nn.Module):
    """The masked convolution that ``conv`` is: a full kernel whose pixels from the centre on are multiplied by 0."""

    def __init__(self, conv: CausalConv2d) -> None:
        super().__init__()
        above, left = conv.above.weight.detach(), conv.left.kernel().detach()
        n_out, n_in, rows, k = above.shape
        taps = left.shape[-1]
        mask = torch.ones(k, k)
        mask[rows, taps:] = 0
        mask[rows + 1 :] = 0
        self.register_buffer("mask", mask)
        self.weight = nn.Parameter(0.1 * torch.randn(n_out, n_in, k, k))
        with torch.no_grad():
            self.weight[:, :, :rows] = above
            self.weight[:, :, rows, :taps] = left[:, :, 0]
        self.bias = nn.Parameter(conv.left.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.weight.shape[-1] // 2)


def masked(model: PixelCNN) -> PixelCNN:
    """A copy of ``model`` with full masked kernels."""
    copy = PixelCNN(model.config, model.spec)
    copy.load_state_dict(model.state_dict())
    copy.stack.convs = nn.ModuleList(Masked(conv) for conv in model.stack.convs)
    return copy


def main() -> None:
    """Compare outputs, time both steps in turn on one thread and on two, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    x = F.pad(data.load("shapes").rows(torch.arange(BATCH))["x"], (4, 4, 4, 4))
    spec = DataSpec(name="benchmark", kind="image", shape=(1, SIDE, SIDE), levels=2)
    with seeded("benchmark"):
        cropped = PixelCNN(PixelCNN.Config(stacks="single", channels=64, layers=5, first_kernel=7, kernel=7), spec)
        full = masked(cropped)
    with torch.no_grad():
        difference = (cropped(x) - full(x)).abs().max().item()
    print(f"largest difference of the logits, float32: {difference:.1e}")
    keys = Keys(0)
    step = Step(0, 1, keys.open("model"), torch.zeros(()))

    def training(model: PixelCNN) -> Callable[[], float]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

        def one() -> float:
            start = time.perf_counter()
            model.loss(Batch(x=x), step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        one()
        return one

    steps = [training(model) for model in (cropped, full)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = [[one() for one in steps] for _ in range(STEPS)]  # in turn, so that other load slows both down
        for kind, pick in (("best", min), ("median", lambda t: sorted(t)[len(t) // 2])):
            ours, theirs = (pick(t) for t in zip(*times))
            print(
                f"{threads} thread{'s' * (threads > 1)}, {kind} of {STEPS}: cropped {ours * 1e3:.0f} ms a step,"
                f" masked {theirs * 1e3:.0f} ms: {theirs / ours:.2f} times as fast"
            )
    with torch.no_grad():
        difference = (cropped(x) - full(x)).abs().max().item()
    print(f"after these {2 * STEPS + 1} steps of each: {difference:.1e}")
