"""Improved GAN: a DCGAN with five tricks that make the game's equilibrium easier to reach.

    feature matching          G minimises ||E f(x) - E f(G(z))||^2, f the features in D                (section 3.1)
    minibatch discrimination  D sees how near the examples of a batch are to each other                (section 3.2)
    historical averaging      ||theta - 1/t sum_i theta[i]||^2 in each player's loss                   (section 3.3)
    one-sided smoothing       D should say 0.9 of real data; 0 of samples, still                       (section 3.4)
    virtual batch norm        G's layers normalise each example by a fixed batch and itself            (section 3.5)

Each is a switch of every GAN here (``tricks``, see gencli.nn.gan); this model has those that served the paper's
samples on by default: minibatch discrimination, smoothing and virtual batch norm. Feature matching served its
classifiers, and gave worse samples.

Departures: the minibatch layer has neither the authors' code's data-dependent scale nor weight normalisation.

Reference: Improved Techniques for Training GANs, Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, 2016, arXiv
1606.03498.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gencli.nn.gan import GANBase, GANConfig, Tricks
from gencli.nn.gan_networks import NormD

__all__ = ["ImprovedGAN", "ImprovedGANConfig"]


class ImprovedTricks(Tricks):
    """The paper's mix for images without labels."""

    minibatch_kernels: int = Field(32, ge=0, description="minibatch discrimination: B, kernels over the batch; 0: none")
    smoothing: float = Field(0.1, ge=0, lt=1, description="one-sided: D should say 1 - this of real data")
    virtual_batch_norm: int = Field(
        64, ge=0, description="rows of G's reference batch, which takes batch norm's place; 0: none"
    )


class ImprovedGANConfig(GANConfig):
    """DCGAN's networks for images."""

    latents: int = Field(100, ge=1, description="dimensions of z")
    prior: Literal["normal", "uniform"] = Field("uniform", description="of z: N(0, I), or uniform in [-1, 1]")
    norm_D: NormD = Field("batch", description="of D's layers but the first: batch, layer, spectral, none")
    loss: Literal["saturating", "non-saturating", "least-squares"] = "non-saturating"
    tricks: ImprovedTricks = ImprovedTricks.model_validate({})


class ImprovedGAN(GANBase):
    """For images; points get perceptrons."""

    Config = ImprovedGANConfig
    config: ImprovedGANConfig
    images = "dcgan"
