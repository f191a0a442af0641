"""WGAN: the discriminator becomes a critic f that estimates the distance between data and samples.

    W(P_r, P_g) = sup_{||f||_L <= 1}  E f(x) - E f(G(z))                                                     (eq. 2)

A distance that is finite and has gradients where the two distributions do not overlap (theorem 1), so the critic can
and should be trained to the end: n_critic moves for each of G's, and ``first_critic_steps`` of them in the first
``first_steps`` steps and in every ``every``-th after, as the authors' code has it. To hold f's slope below some
constant, its weights are clipped to [-c, c] after each move (algorithm 1, line 7); too large a c takes long to be
reached, too small a c starves G of gradient. RMSprop, since momentum was unstable (section 3).

Reference: Wasserstein GAN, Arjovsky, Chintala, Bottou, 2017, arXiv 1701.07875.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from gencli.console import UsageError
from gencli.contract import Step
from gencli.nn import penalties
from gencli.nn.gan import GANBase, GANConfig
from gencli.nn.gan_networks import NormD

__all__ = ["WGAN", "WGANConfig"]


class WGANConfig(GANConfig):
    """DCGAN's networks for images."""

    norm_D: NormD = Field("batch", description="of the critic's layers but the first: batch, layer, none")
    loss: Literal["wasserstein"] = "wasserstein"
    clip: float = Field(0.01, gt=0, description="c, the bound of the critic's weights")
    critic_steps: int = Field(5, ge=1, description="n_critic, the critic's moves for each of the generator's")
    first_critic_steps: int = Field(100, ge=1, description="its moves in the first steps, and at times after")
    first_steps: int = Field(25, ge=0, description="how many steps these are; 0: no step is different")
    every: int = Field(500, ge=1, description="after them, every so many steps again")


class WGAN(GANBase):
    """Algorithm 1, by weight clipping."""

    Config = WGANConfig
    config: WGANConfig
    images = "dcgan"

    def check(self) -> None:
        """UsageError, with the reason, for what makes no sense together."""
        super().check()
        if self.config.norm_D == "spectral":
            raise UsageError("model.norm_D=spectral would divide the weights that clipping bounds: sngan clips none")
        if self.config.penalty:
            raise UsageError("model.penalty would hold a slope that clipping holds already: wgan-gp clips nothing")

    def critic_repeats(self) -> Callable[[int], int]:
        """How often the critic moves at a step."""
        c = self.config

        def moves(step: int) -> int:
            more = c.first_steps > 0 and (step < c.first_steps or step % c.every == 0)
            return c.first_critic_steps if more else c.critic_steps

        return moves

    def after_discriminator(self, kept: dict[str, Tensor], s: Step) -> None:
        """Clip the critic's weights, all of them (algorithm 1, line 7)."""
        penalties.clip(self.D, self.config.clip)
        super().after_discriminator(kept, s)
