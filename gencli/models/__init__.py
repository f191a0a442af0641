"""The table of models: what exists, where, from which paper. Imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gencli.console import UsageError, nearest

if TYPE_CHECKING:
    from gencli.contract import Model

__all__ = ["TABLE", "Entry", "model_class"]


@dataclass(frozen=True)
class Entry:
    """One model. ``path`` is ``module:Class``; ``capabilities`` are those of ``contract.CAPABILITIES``."""

    name: str
    path: str
    family: str
    title: str
    authors: str
    year: int
    arxiv: str
    capabilities: tuple[str, ...]
    origin: str = "gencli"


TABLE: dict[str, Entry] = {
    e.name: e
    for e in [
        Entry(
            "pixelcnn",
            "gencli.models.autoregressive.pixelcnn:PixelCNN",
            "autoregressive",
            "Conditional Image Generation with PixelCNN Decoders",
            "Aäron van den Oord, Nal Kalchbrenner, Oriol Vinyals, Lasse Espeholt, Alex Graves, Koray Kavukcuoglu",
            2016,
            "1606.05328",
            ("samples", "likelihood"),
        ),
        Entry(
            "vae",
            "gencli.models.latent.vae:VAE",
            "latent",
            "Auto-Encoding Variational Bayes",
            "Diederik P. Kingma, Max Welling",
            2013,
            "1312.6114",
            ("samples", "likelihood", "latents", "encodes"),
        ),
        Entry(
            "wgan-gp",
            "gencli.models.gans.wgan_gp:WGANGP",
            "gans",
            "Improved Training of Wasserstein GANs",
            "Ishaan Gulrajani, Faruk Ahmed, Martin Arjovsky, Vincent Dumoulin, Aaron Courville",
            2017,
            "1704.00028",
            ("samples", "latents"),
        ),
    ]
}


def model_class(name: str) -> type[Model]:
    """The class of model ``name``. Imports its module, and so torch.

    :raises UsageError: if the table has no such model.
    """
    if name not in TABLE:
        raise UsageError(f"no model {name!r}{nearest(name, TABLE)}", hint="gencli models")
    module, _, attribute = TABLE[name].path.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), attribute)
    return found
