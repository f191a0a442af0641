"""GAN: a generator G and a discriminator D play against each other.

    min_G max_D  E_x [log D(x)] + E_z [log(1 - D(G(z)))]                                                     (eq. 1)

For a fixed G the best D is p_data / (p_data + p_G) (proposition 1), and the game's value then 2 JSD(p_data, p_G) -
log 4 (eq. 6). G's gradient of eq. 1 vanishes where D rejects its samples with confidence; so section 3 proposes to
maximise log D(G(z)) instead: the non-saturating loss, the default. ``loss=saturating`` is eq. 1 itself, and
``least-squares`` LSGAN's (1611.04076).

Departures: leaky ReLU where the paper has maxout and dropout in D, ReLU alone in G.

Reference: Generative Adversarial Nets, Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio,
2014, arXiv 1406.2661.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gencli.nn.gan import GANBase, GANConfig

__all__ = ["GAN", "OriginalConfig"]


class OriginalConfig(GANConfig):
    """Perceptrons, unless ``network`` says otherwise."""

    norm_G: Literal["batch", "none"] = Field("none", description="normalisation of G's layers")
    loss: Literal["saturating", "non-saturating", "least-squares"] = "non-saturating"


class GAN(GANBase):
    """Algorithm 1, with k = ``critic_steps``."""

    Config = OriginalConfig
    config: OriginalConfig
