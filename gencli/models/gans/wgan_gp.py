"""WGAN-GP: a Wasserstein GAN whose critic is held to slope 1 by a gradient penalty.

    L = E D(G(z)) - E D(x) + lambda E [(||grad D(x^)||_2 - 1)^2],   x^ = epsilon x + (1 - epsilon) G(z)      (eq. 3)

with epsilon uniform in [0, 1], one number an example (algorithm 1). The best critic has slope 1 almost everywhere
between coupled points (proposition 1). The penalty is about each example alone, so the critic has no batch
normalisation (section 4): ``norm_D`` may be ``layer``.

``loss`` minus ``penalty`` times its weight is minus the critic's estimate of the distance, up to its slope.

Reference: Improved Training of Wasserstein GANs, Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, 2017, arXiv
1704.00028.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gencli.nn.gan import GANBase, GANConfig
from gencli.nn.mlp import Activation

__all__ = ["WGANGP", "WGANGPConfig"]


class WGANGPConfig(GANConfig):
    """The paper's toy problems have 512 units in 3 hidden layers, no normalisation and lambda 0.1; images lambda 10."""

    hidden: tuple[int, ...] = Field((512, 512, 512), description="widths of a perceptron's layers")
    activation: Activation = Field("relu", description="D's; G has ReLU")
    norm_D: Literal["layer", "none"] = Field("none", description="of D's layers but the first")
    loss: Literal["wasserstein"] = "wasserstein"
    penalty: float = Field(10.0, ge=0, description="lambda, the weight of the gradient penalty")
    critic_steps: int = Field(5, ge=1, description="n_critic, the critic's moves for each of the generator's")


class WGANGP(GANBase):
    """Convolutions for images, perceptrons for points."""

    Config = WGANGPConfig
    config: WGANGPConfig
    images = "dcgan"
