"""A training step of DCGAN against a plain script's, of the same networks from the same weights on the same data.

Two scripts. One does what ``gencli train dcgan`` does, new noise for each player (algorithm 1 of the GAN paper), and
after some steps in float64 its weights are ours, to rounding. The other is the tutorials': G is judged by the samples
that D has just been shown, which saves it one pass of G without gradient, as model.updates=simultaneous does. Both
have torch's own batch norm, default layout and default Adam, and let D's own gradients be computed in G's step, to be
thrown away. They get batches and noise ready-made; ours reads and draws its own within its time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli import recipe
from gencli.contract import Phase
from gencli.nn.norm import BatchNorm
from gencli.rng import Keys
from gencli.training.session import Session
from tests.tiny import session

ROUNDS, IN_A_ROW, WARM, CHECKED = 15, 4, 4, 3
SIZES = {
    "8x8 digits, 32 channels": ["data.name=digits", "model.channels=32"],
    "20x20 shapes, 32 channels": ["data.name=shapes", "model.channels=32"],
    "32x32 colour patches, 64 channels": ["data.name=photos:32", "model.channels=64"],
}
COMMON = ["model.latents=100", "train.batch_size=64", "train.ema=null", "train.schedule=constant", "device=cpu"]


class Script:
    """Plain torch, as one finds it."""

    def __init__(self, made: Session, reuse: bool) -> None:
        self.made, self.reuse = made, reuse
        self.G, self.D = (
            _plain(net) for net in (made.model.G, nn.Sequential(made.model.D.body, made.model.D.head.linear))
        )
        train = made.recipe.train
        adam = {"lr": train.lr, "betas": tuple(train.betas)}
        self.of_G, self.of_D = (torch.optim.Adam(net.parameters(), **adam) for net in (self.G, self.D))

    def ready(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Data and both players' noise of a step."""
        made, phase = self.made, self.made.model.phases()[0]
        n = made.recipe.train.batch_size
        x = made.model.spec.scale(made.trainer.batches.get(Phase(phase.name, [], phase.loss), number).x).contiguous()
        z = [
            2 * Keys(made.recipe.seed).open(name, number, 0).uniform("z", (n, made.model.config.latents)) - 1
            for name in ("discriminator", "generator")
        ]
        return x, z[0], z[1]

    def step(self, x: Tensor, z: Tensor, other: Tensor) -> None:
        G, D = self.G, self.D
        fake = G(z).tanh()
        self.of_D.zero_grad()
        loss = F.softplus(-D(x)).mean() + F.softplus(D(fake.detach())).mean()
        loss.backward()
        self.of_D.step()
        self.of_G.zero_grad()
        if not self.reuse:
            fake = G(other).tanh()
        g = F.softplus(-D(fake)).mean()
        g.backward()
        self.of_G.step()
        loss.item(), g.item()


def _plain(net: nn.Module) -> nn.Module:
    """A copy with torch's own convolutions, batch norm and layout."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, BatchNorm):
            theirs: nn.Module = nn.BatchNorm2d(len(layer.running_mean)).to(layer.running_mean.dtype)
            theirs.load_state_dict(layer.state_dict(), strict=False)
            owner, _, key = name.rpartition(".")
            setattr(net.get_submodule(owner), key, theirs)
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.ConvTranspose2d
    return net


def _session(words: list[str], *more: str) -> Any:
    return session(recipe.load("dcgan", [*words, *COMMON, *more], model=True))


def difference(words: list[str]) -> float:
    """The largest difference of a weight after a few steps in float64, ours and the script's."""
    with _session(words, "train.precision=float64") as made:
        script = Script(made, reuse=False)
        for number in range(CHECKED):
            script.step(*script.ready(number))
            made.trainer.step()
        theirs = [*script.G.parameters(), *script.D.parameters()]
        ours = [*made.model.G.parameters(), *made.model.D.parameters()]
        return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def times(words: list[str]) -> dict[str, float]:
    """Median CPU seconds of a step of each, a few steps of one after a few of another: whatever else the machine does
    meets all alike, and each finds its own weights in the caches, as in a run."""
    with _session(words) as made, _session(words, "model.updates=simultaneous") as other:
        scripts = {"script": Script(made, reuse=False), "script, one pass of G": Script(made, reuse=True)}
        found: dict[str, list[float]] = {"gencli": [], "gencli, simultaneous": [], **{key: [] for key in scripts}}
        for number in range(ROUNDS):
            ready = scripts["script"].ready(number)
            for _ in range(IN_A_ROW):
                found["gencli"].append(_seconds(made.trainer.step))
            for _ in range(IN_A_ROW):
                found["gencli, simultaneous"].append(_seconds(other.trainer.step))
            for key, script in scripts.items():
                for _ in range(IN_A_ROW):
                    found[key].append(_seconds(script.step, *ready))
    return {key: median(each[WARM:]) for key, each in found.items()}


def _seconds(step: Callable[..., object], *ready: Tensor) -> float:
    began = time.process_time()
    step(*ready)
    return time.process_time() - began


def main() -> None:
    for name, words in SIZES.items():
        print(f"{name}: weights differ by {difference(words):.0e} after {CHECKED} steps in float64")
        found = times(words)
        for key, value in found.items():
            print(f"  {key}: {1e3 * value:.1f} ms, {value / found['gencli']:.2f} of gencli's", flush=True)
