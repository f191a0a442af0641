"""DCGAN: convolutions in both players, by rules that made them trainable.

Strided convolutions in D and transposed ones in G for pooling; batch normalisation in both, but not in G's output and
D's input; no hidden perceptron layers; ReLU in G and tanh at its end; leaky ReLU in D (section 3). Weights start from
N(0, 0.02) and z is uniform (section 4). D normalises data and samples each by their own batch.

The loss is GAN's, non-saturating. ``norm_G=none`` and ``norm_D=none`` take batch normalisation away; the weights then
start from He et al.'s distribution, since N(0, 0.02) would leave signals near 0.

Reference: Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks, Radford, Metz,
Chintala, 2015, arXiv 1511.06434.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gencli.nn.gan import GANBase, GANConfig
from gencli.nn.gan_networks import NormD

__all__ = ["DCGAN", "DCGANConfig"]


class DCGANConfig(GANConfig):
    """Figure 1's generator, and its mirror."""

    latents: int = Field(100, ge=1, description="dimensions of z")
    prior: Literal["normal", "uniform"] = Field("uniform", description="of z: N(0, I), or uniform in [-1, 1]")
    norm_D: NormD = Field("batch", description="of D's layers but the first: batch, layer, spectral, none")
    loss: Literal["saturating", "non-saturating", "least-squares"] = "non-saturating"


class DCGAN(GANBase):
    """For images; points get perceptrons."""

    Config = DCGANConfig
    config: DCGANConfig
    images = "dcgan"
