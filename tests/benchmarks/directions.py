"""MAF and IAF, the same couplings in opposite directions: the time of a training step and of samples, on one thread.

The default recipes, on moons: 5 transforms of 2 x 64 units, a step of 512 points; 4,096 samples at once.
"""

from __future__ import annotations

import torch

from gencli import recipe
from gencli.rng import SampleRng
from tests.benchmarks._timing import timed
from tests.tiny import session

ROUNDS, SAMPLES = 30, 4096


def main() -> None:
    torch.set_num_threads(1)
    for name in ("maf", "iaf"):
        with session(recipe.load(name, ["device=cpu", "threads=1"], model=True)) as made:
            step = timed({"step": made.trainer.step}, ROUNDS)["step"]
            with made.trainer.evaluating() as model, torch.no_grad():
                drawn = timed({"samples": lambda model=model: model.sample(SampleRng(0, range(SAMPLES)))}, 5)["samples"]
        size = made.recipe.train.batch_size
        print(
            f"{name}, median: a step of {size} points {1000 * step[ROUNDS // 2]:.1f} ms, "
            f"{SAMPLES} samples {1000 * drawn[2]:.1f} ms"
        )


if __name__ == "__main__":
    main()
