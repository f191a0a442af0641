"""SNGAN: a discriminator each of whose weights is divided by its largest singular value.

    W_SN = W / sigma(W),   sigma(W) = u^T W v  by one power iteration a step                    (eq. 8, algorithm 1)
    V_D = E min(0, -1 + D(x)) + E min(0, -1 - D(G(z))),   V_G = -E D(G(z))                               (eqs. 16, 17)

The norm of a layer's slope, and by the product of layers that of D, is so bounded (eq. 7) without looking at data; that
of a convolution by the kernel's norm only up to a constant (see gencli.nn.spectral_norm). The bound is the method's one
parameter (section 1), here ``lipschitz``, by which D's output is multiplied: 1 in the paper, and too little where modes
lie close, as real and fake never differ there by the margins of eq. 16.

G has batch normalisation. By default both are residual networks (appendix B.4), ``network=dcgan`` are plain ones. D
moves ``critic_steps`` times for each move of G, whose batch is twice as large, as in the authors' code.

``conditional``: conditional batch norm in G, and a projection in D (1802.05637).

Reference: Spectral Normalization for Generative Adversarial Networks, Miyato, Kataoka, Koyama, Yoshida, 2018, arXiv
1802.05957.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn.gan import GANBase, GANConfig
from gencli.nn.gan_networks import NormD
from gencli.nn.mlp import Activation

__all__ = ["SNGAN", "SNGANConfig"]


class SNGANConfig(GANConfig):
    """Table 4's networks have 256 channels in G and 128 in D; here both have ``channels``."""

    latents: int = Field(128, ge=1, description="dimensions of z")
    activation: Activation = Field("relu", description="D's; G has ReLU")
    norm_D: NormD = Field("spectral", description="of D's layers: spectral (of weights), or batch, layer, none")
    lipschitz: float = Field(1.0, gt=0, description="of D, as a bound: its output is this times its layers'")
    loss: Literal["hinge", "non-saturating", "wasserstein"] = "hinge"
    critic_steps: int = Field(5, ge=1, description="n_dis, D's moves for each of G's")
    generator_batch: int = Field(2, ge=1, description="rows of G's batch for each of D's")


class SNGAN(GANBase):
    """For images; points get perceptrons."""

    Config = SNGANConfig
    config: SNGANConfig
    images = "resnet"

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.D.gain = self.config.lipschitz

    def check(self) -> None:
        """UsageError, with the reason, for what makes no sense together."""
        super().check()
        if self.config.lipschitz != 1 and self.config.norm_D != "spectral":
            raise UsageError("model.lipschitz bounds spectrally normalised layers: it needs model.norm_D=spectral")
