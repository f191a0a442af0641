"""MAF against zuko and nflows with the same weights: log-densities, and samples by fewer than D passes a layer.

D = 64, 5 affine transforms of 2 x 256 units with actnorm between them, trained on the 8x8 digits by the recipe
maf/digits. Theirs are zuko's MaskedAutoregressiveTransform and nflows' MaskedAffineAutoregressiveTransform, given these
masks and weights and, in place of their own maps, u = (x - mu) exp(-alpha), which takes them no more operations. A side
that is not installed is left out: pip install zuko nflows, without their dependencies.

Inverses start from the same latents. Errors are the largest differences, over 512 samples, from the inverse in float64
one dimension after another, of real numbers before they become levels, and of f(f^-1(z)) from z.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gencli import data, recipe
from gencli.metrics.likelihood import nll
from gencli.models.flows.maf import MAF
from gencli.nn.made import BLOCK, Autoregressive
from gencli.rng import SampleRng
from tests.benchmarks._timing import timed
from tests.tiny import session

BATCH, ROUNDS, SAMPLINGS, QUARTERS = 512, 60, 5, 4


def trained() -> MAF:
    """The net after its recipe, printing how its bound on the validation split went."""
    with session(recipe.load("maf/digits", ["device=cpu", "threads=2"], model=True)) as made:
        steps, val, told = made.recipe.train.steps, data.load("digits", "val"), []
        for part in range(QUARTERS):
            for _ in range(steps // QUARTERS):
                made.trainer.step()
            with made.trainer.evaluating() as model:
                told.append(f"{nll(model, val)['bits_per_dim']:.3f}")
                if part == QUARTERS - 1:
                    model = copy.deepcopy(model)
        print(f"trained {steps} steps on digits: {', '.join(told)} bits/dim on val at each quarter")
    return model.eval()


def pairs(model: MAF) -> list[tuple[Any, Autoregressive]]:
    """Actnorm and autoregressive layer, again and again."""
    found = list(model.flow.layers)
    return list(zip(found[::2], found[1::2]))


def give(theirs: list[Any], ours: Autoregressive) -> None:
    """Our masks and weights to masked linear layers of theirs."""
    for to, of in zip(theirs, [*ours.made.hidden, ours.made.out], strict=True):
        to.weight.data, to.bias.data = of.weight.data.clone(), of.bias.data.clone()
        to.mask = of.mask.to(to.mask.dtype)


Side = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # x -> log p(x), and z -> x


def ours(model: MAF) -> Side:
    """gencli."""

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = model.f(x)
        return model.log_base(z) + log_det

    return log_prob, model.f_inverse


def in_zuko(model: MAF) -> Side:
    """The same in zuko."""
    import zuko
    from zuko.transforms import DependentTransform

    class Map(zuko.transforms.MonotonicAffineTransform):
        def __init__(self, mu: Tensor, alpha: Tensor) -> None:
            super(zuko.transforms.MonotonicAffineTransform, self).__init__()
            self.shift, self.log_scale = mu, -alpha
            self.scale = self.log_scale.exp()

        def _call(self, x: Tensor) -> Tensor:
            return (x - self.shift) * self.scale

        def _inverse(self, y: Tensor) -> Tensor:
            return y / self.scale + self.shift

    D, parts = model.spec.dims, list[Any]()
    for actnorm, layer in pairs(model):
        b, s = actnorm.b.detach(), actnorm.log_s.detach()
        parts.append(
            zuko.lazy.UnconditionalTransform(lambda m, a: DependentTransform(Map(m, a), 1), -b, -s, buffer=True)
        )
        widths = [m.out_features for m in layer.made.hidden]
        parts.append(
            zuko.flows.MaskedAutoregressiveTransform(
                D, univariate=lambda mu, a: Map(mu, a / (1 + abs(a / 5))), hidden_features=widths
            )
        )
        give([m for m in parts[-1].hyper if hasattr(m, "mask")], layer)
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D), buffer=True
    )
    flow = zuko.lazy.Flow(parts, base)
    return lambda x: flow().log_prob(x), flow().transform.inv


def in_nflows(model: MAF) -> Side:
    """The same in nflows."""
    from nflows import transforms
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow

    class Map(transforms.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
            mu, a = self._unconstrained_scale_and_shift(theta)
            log_scale = -a / (1 + abs(a / 5))
            return (inputs - mu) * log_scale.exp(), log_scale.sum(1)

        def _elementwise_inverse(self, inputs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
            mu, a = self._unconstrained_scale_and_shift(theta)
            log_scale = a / (1 + abs(a / 5))
            return inputs * log_scale.exp() + mu, log_scale.sum(1)

    D, parts = model.spec.dims, list[Any]()
    for actnorm, layer in pairs(model):
        norm = transforms.ActNorm(D)
        norm.log_scale.data, norm.shift.data = actnorm.log_s.detach(), actnorm.b.detach() * actnorm.log_s.detach().exp()
        one = Map(D, layer.made.hidden[0].out_features, num_blocks=1, use_residual_blocks=False)
        net = one.autoregressive_net
        give([net.initial_layer, *(block.linear for block in net.blocks), net.final_layer], layer)
        parts += [norm, one]
    flow = Flow(transforms.CompositeTransform(parts), StandardNormal([D])).eval()
    return flow.log_prob, lambda z: flow._transform.inverse(z)[0]


def one_after_another(model: MAF, z: Tensor) -> Tensor:
    """The inverse by D passes of the whole network a layer, each for one dimension."""
    for actnorm, layer in reversed(pairs(model)):
        x = torch.zeros_like(z)
        for i in layer.order.tolist():
            x[:, i] = layer.g.inverse(z, layer.made(x))[:, i]
        z = actnorm.inverse(x)
    return z


def passes(model: MAF, z: Tensor, **block: int) -> list[int]:
    """Those of each layer, from the last to the first."""
    counts = []
    for actnorm, layer in reversed(pairs(model)):
        x, n = layer.solve(z, **block)
        counts.append(n)
        z = actnorm.inverse(x)
    return counts


@torch.no_grad()
def compare(model: MAF) -> None:
    """Agreement, errors and passes once, then times on one thread and on two."""
    sides = {"gencli": ours(model)}
    for name, make in (("zuko", in_zuko), ("nflows", in_nflows)):
        try:
            sides[name] = make(model)
        except ModuleNotFoundError:
            print(f"{name} is not installed: left out")
    rng = SampleRng(0, range(BATCH))
    x, _ = model.to_real(data.load("digits").rows(torch.arange(BATCH))["x"], rng)
    x, z = x.flatten(1), model.prior(rng)
    log_p = sides["gencli"][0](x)
    for name, (log_prob, _) in sides.items():
        if name != "gencli":
            print(
                f"log_prob of {name} differs by at most {(log_prob(x) - log_p).abs().max():.1e} nats, of "
                f"{log_p.abs().mean():.1f}"
            )
    exact = one_after_another(copy.deepcopy(model).double(), z.double())
    for name, (_, inverse) in sides.items():
        found = inverse(z).flatten(1)
        print(
            f"{name}: x is {(found - exact).abs().max():.1e} from that of float64, of {exact.abs().max():.1f} at most"
        )
    print(f"round trip: f(f^-1(z)) is {(model.f(model.f_inverse(z))[0] - z).abs().max():.1e} from z")
    print(
        f"passes a layer, at most {x.shape[1]}: {passes(model, z)} over blocks of {BLOCK} dimensions, "
        f"{passes(model, z, block=x.shape[1])} over all at once"
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for what, k, given, rounds in (("log_prob", 0, x, ROUNDS), ("sampling", 1, z, SAMPLINGS)):
            took = timed({name: partial(side[k], given) for name, side in sides.items()}, rounds)
            for kind, pick in (("best", 0), ("median", rounds // 2)):
                ms = {name: 1000 * seconds[pick] for name, seconds in took.items()}
                best = min([t for name, t in ms.items() if name != "gencli"], default=float("nan"))
                print(
                    f"{what}, {threads} thread{'s' * (threads > 1)}, {kind} of {rounds}: "
                    + ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items())
                    + f": {best / ms['gencli']:.2f} times as fast as the faster of them"
                )


def main() -> None:
    """Train, compare, print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    compare(trained())
