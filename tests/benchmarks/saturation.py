"""The generator's gradient norm under both losses of a GAN, at the same weights, while one player runs ahead.

The default recipe, on digits: after 200 steps of the game one player stands still and the other goes on alone. The
norms are those of both losses' gradients in G's parameters for the same 512 latents, the shares what is left of them
since the other player stopped; means of 3 seeds.

    saturating      E log(1 - D(G(z))), whose slope in a logit d is -D: it dies where D wins
    non-saturating  -E log D(G(z)), with slope -(1 - D): it fades where G wins
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean
from typing import cast

import torch

from gencli import recipe
from gencli.console import table
from gencli.nn.gan import GANBase
from gencli.nn.gan_losses import GANLoss, generator_loss
from gencli.rng import SampleRng
from tests.tiny import session

SEEDS, TOGETHER, ALONE, LATENTS = (0, 1, 2), 200, (0, 10, 30, 100, 300, 1000), 512
LOSSES: tuple[GANLoss, ...] = ("saturating", "non-saturating")


def measured(model: GANBase) -> tuple[float, list[float]]:
    """The mean of D(G(z)), and the norm of each loss's gradient in G's parameters."""
    d = model.D(model.decode(model.prior(SampleRng(1, range(LATENTS)))))
    norms = []
    for loss in LOSSES:
        grads = torch.autograd.grad(generator_loss(loss, d), list(model.G.parameters()), retain_graph=True)
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
    return d.sigmoid().mean().item(), norms


def ahead(winner: str, seed: int) -> list[tuple[int, float, list[float]]]:
    """Its moves alone, D(G(z)) and the norms, after TOGETHER steps of the game."""
    with session(recipe.load("gan", [f"seed={seed}", "device=cpu", "threads=1"], model=True)) as made:
        trainer, model = made.trainer, cast(GANBase, made.model)
        for _ in range(TOGETHER):
            trainer.step()
        trainer.players = [player for player in trainer.players if player.phase.name == winner]
        rows = [(0, *measured(model))]
        for before, after in pairwise(ALONE):
            for _ in range(after - before):
                trainer.step()
            rows.append((after, *measured(model)))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    for winner in ("discriminator", "generator"):
        runs = [ahead(winner, seed) for seed in SEEDS]
        rows = []
        for at, moves in enumerate(ALONE):
            row: dict[str, float | int | str] = {"alone": winner, "moves": moves}
            row["D(G(z))"] = mean(run[at][1] for run in runs)
            for i, loss in enumerate(LOSSES):
                row[loss] = mean(run[at][2][i] for run in runs)
                row[f"{loss}, share"] = mean(run[at][2][i] / run[0][2][i] for run in runs)
            rows.append(row)
        table(rows)


if __name__ == "__main__":
    main()
