"""A training step of the VAE against pythae's, of the same net, data, batch and optimiser, in one run.

pythae's own MLP: one hidden layer of 512 units on each side, 16 latents, Bernoulli pixels, Adam. On ``shapes`` (400
binary pixels; or ``--data``), batches of 64. Ours is a whole step of the trainer, data and logged numbers included.
Theirs is a step of its trainer, and beside it one with the batches at hand, without its data loader. Both nets have the
same weights and must agree on the ELBO's two terms before anything is timed.

pythae is no dependency: pip install pythae, without its dependencies, into a folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor

from gencli import data, recipe
from gencli.training.session import Session
from tests.tiny import session

BATCH, LATENTS, HIDDEN, ROUNDS = 64, 16, 512, 9

WORDS = [
    *(f"model.latents={LATENTS}", f"model.hidden=[{HIDDEN}]", "model.decoder=bernoulli"),
    *("model.activation=relu", "model.dropout=0", f"train.batch_size={BATCH}", "train.ema=null", "train.lr=1e-4"),
    *("train.schedule=constant", "train.steps=100000", "device=cpu"),
]


def theirs(x: Tensor, folder: str) -> Any:
    """pythae's trainer of its default VAE, ready to go."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)
    model = VAE(VAEConfig(input_dim=tuple(x.shape[1:]), latent_dim=LATENTS, reconstruction_loss="bce"))
    config = BaseTrainerConfig(
        output_dir=folder, per_device_train_batch_size=BATCH, learning_rate=1e-4, optimizer_cls="Adam", no_cuda=True
    )
    trainer = BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=config)
    trainer.prepare_training()
    return trainer


def same_weights(ours: Any, other: Any) -> None:
    """Ours to pythae's: its two linear outputs are the halves of our encoder's last layer, and it sees 0 and 1."""
    encoder, decoder = ours.encoder, ours.decoder
    pairs = [(other.encoder.layers[0][0], encoder[0]), (other.decoder.layers[0][0], decoder[0])]
    for to, of in [*pairs, (other.decoder.layers[1][0], decoder[-1])]:
        to.load_state_dict(of.state_dict())
    first = other.encoder.layers[0][0]  # W (2 x - 1) + b
    first.bias.data -= first.weight.data.sum(1)
    first.weight.data *= 2
    for half, to in enumerate((other.encoder.embedding, other.encoder.log_var)):
        to.weight.data = encoder[-1].weight.data.chunk(2)[half].clone()
        to.bias.data = encoder[-1].bias.data.chunk(2)[half].clone()


@torch.no_grad()
def check(made: Session, trainer: Any, x: Tensor) -> None:
    """The same KL, and the same log p(x|z) at the same z."""
    ours, other = made.model, trainer.model
    same_weights(ours, other)
    q: Any = ours.posterior(x)  # type: ignore[operator]
    recon = other.decoder(q.mu)["reconstruction"]
    found = other.encoder(x.float())
    _, distortion, kl = other.loss_function(recon, x.float(), found.embedding, found.log_covariance, q.mu)
    mine = -ours.log_likelihood(x, q.mu).mean()  # type: ignore[operator]
    print(f"agreement: reconstruction {mine:.4f} and {distortion:.4f}, KL {q.kl.mean():.5f} and {kl:.5f} nats")
    assert abs(mine - distortion) < 1e-3 and abs(q.kl.mean() - kl) < 1e-4


def timed(calls: dict[str, Callable[[], int]], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds a step of each call, which returns how many it took; in turn, sorted."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = clock()
            steps = call()
            took[name].append(1000 * (clock() - start) / steps)
    return {name: sorted(found[1:]) for name, found in took.items()}


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="shapes", help="binary images")
    asked = parser.parse_args(sys.argv[2:])
    threads, source = asked.threads, data.load(asked.data, "train")
    words = [*WORDS, f"data.name={asked.data}", f"threads={threads}"]
    x = source.rows(torch.arange(source.size or 0))["x"]
    steps = len(x) // BATCH
    with tempfile.TemporaryDirectory() as folder, session(recipe.load("vae", words)) as made:
        trainer = theirs(x.float(), folder)
        check(made, trainer, x[:BATCH])
        batches = list(x[: steps * BATCH].float().split(BATCH))

        def ours() -> int:
            for _ in range(steps):
                made.trainer.step()
            return steps

        def whole() -> int:
            with redirect_stderr(io.StringIO()):  # its progress bar
                trainer.train_step(1)
            return len(trainer.train_loader)

        def at_hand() -> int:
            total = 0.0
            for batch in batches:
                out = trainer.model({"data": batch}, epoch=1, dataset_size=len(x), uses_ddp=False)
                trainer._optimizers_step(out)
                total += out.loss.item()
            return steps

        # one thread: of its own processor time, which others on the machine disturb less
        clock = time.process_time if threads == 1 else time.perf_counter
        took = timed({"gencli": ours, "pythae": whole, "pythae, batches at hand": at_hand}, clock)
    print(f"{asked.data}, {x[0].numel()} pixels, batches of {BATCH}")
    for kind, pick in (("best", 0), ("median", ROUNDS // 2)):
        mine = took["gencli"][pick]
        told = ", ".join(f"{name} {found[pick]:.2f} ms ({found[pick] / mine:.2f})" for name, found in took.items())
        print(f"a step, {threads} thread{'s' * (threads > 1)}, {kind} of {ROUNDS} epochs: {told}")


if __name__ == "__main__":
    main()
