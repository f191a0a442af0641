"""Every model of the table at a size that trains in no time: its default recipe, made smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gencli import recipe as recipes
from gencli.recipe import Recipe
from gencli.training.session import Session
from gencli.training.settings import settings

UNJUDGED = ["train.evaluate=[]"]  # a distance of many samples takes longer than a tiny training

# A model that is missing here is tested at the size of its default recipe: right, but slow.
SMALLER: dict[str, list[str]] = {
    "cdf-flow": ["model.components=3"],
    "ffjord": ["model.hidden=[8]", "model.steps=2"],
    "glow": ["model.scales=2", "model.depth=2", "model.width=8"],
    "iaf": ["model.hidden=[8]", "model.transforms=2"],
    "maf": ["model.hidden=[8]", "model.transforms=2"],
    "linear-vae": ["model.latents=2"],
    "mixture": ["model.components=6", "model.hidden=[8]"],
    "nice": ["model.hidden=[16]", "model.couplings=2"],
    "classifier": ["model.channels=4"],
    "pixelcnn": ["model.channels=8", "model.layers=1", "model.first_kernel=3"],
    "pixelcnnpp": ["model.filters=6", "model.layers=1", "model.mixtures=2"],
    "realnvp": ["model.channels=4", "model.blocks=1"],
    "rnn": ["model.hidden=8", "model.layers=2"],
    "vae": ["model.latents=2", "model.hidden=[16]"],
    "wavenet": ["model.channels=8", "model.stacks=1", "model.layers=3"],
    "gan": ["model.hidden=[16]", *UNJUDGED],
    "dcgan": ["model.latents=4", "model.channels=4", *UNJUDGED],
    "improved-gan": ["model.latents=4", "model.channels=4", "model.tricks.virtual_batch_norm=6", *UNJUDGED],
    "wgan": ["model.latents=4", "model.channels=4", "model.first_steps=1", "model.first_critic_steps=3", *UNJUDGED],
    "wgan-gp": ["model.latents=2", "model.hidden=[16]", "model.channels=4", "model.critic_steps=2", *UNJUDGED],
    "sngan": ["model.latents=4", "model.channels=4", "model.critic_steps=2", *UNJUDGED],
    "word2vec": ["model.dim=8", "model.shared=8"],
}


def words(name: str) -> list[str]:
    """Overrides of the default recipe of model ``name``: a small net, small batches and few samples."""
    return [
        *SMALLER.get(name, []),
        "train.batch_size=8",
        "train.samples=4",
        "train.checkpoint_every=1000",
        "device=cpu",
        "threads=1",
    ]


def tiny(name: str, *overrides: str) -> Recipe:
    """The default recipe of model ``name``, made smaller and then changed by ``overrides``."""
    return recipes.load(name, [*words(name), *overrides], model=True)


@contextmanager
def session(recipe: Recipe) -> Iterator[Session]:
    """A session of ``recipe``, inside torch's settings for it."""
    with settings(recipe) as device:
        yield Session(recipe, device)
