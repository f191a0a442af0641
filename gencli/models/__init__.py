"""The table of models: what exists, where, from which paper. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TABLE", "Entry"]


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
            "van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu",
            2016,
            "1606.05328",
            ("samples", "likelihood"),
        ),
        Entry(
            "vae",
            "gencli.models.latent.vae:VAE",
            "latent",
            "Auto-Encoding Variational Bayes",
            "Kingma, Welling",
            2013,
            "1312.6114",
            ("samples", "likelihood", "latents", "encodes"),
        ),
        Entry(
            "wgan-gp",
            "gencli.models.gans.wgan_gp:WGANGP",
            "gans",
            "Improved Training of Wasserstein GANs",
            "Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville",
            2017,
            "1704.00028",
            ("samples", "latents"),
        ),
    ]
}
