"""WGAN-GP: a Wasserstein GAN whose critic is held to slope 1 by a gradient penalty.

Reference:
    Improved Training of Wasserstein GANs. I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, 2017.
    arXiv:1704.00028.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.contract import Config, DataSpec, Model, Phase, Step
from gencli.nn.mlp import Activation, mlp
from gencli.rng import Rng

__all__ = ["WGANGP", "WGANGPConfig", "gradient_penalty"]


def gradient_penalty(D: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """E[(||grad D(x_hat)||_2 - 1)^2], a scalar, at x_hat = epsilon real + (1 - epsilon) fake (eq. 3, algorithm 1).

    ``real`` and ``fake`` are ``(n, ...)``, ``epsilon`` is ``(n,)`` in [0, 1]; ``D`` maps ``(n, ...)`` to ``(n,)`` and
    treats examples one by one. Computed in float32 or better even under autocast: the square of a norm that should be
    1 loses most of bfloat16's eight bits.
    """
    with torch.autocast(real.device.type, enabled=False):
        epsilon = epsilon.view(-1, *[1] * (real.dim() - 1))
        x_hat = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
        return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


class WGANGPConfig(Config):
    """The paper's toy problems have 512 units in 3 hidden layers and lambda 0.1; its images lambda 10."""

    latents: int = Field(2, ge=1, description="dimensions of z ~ N(0, I)")
    hidden: tuple[int, ...] = Field((512, 512, 512), description="widths of both networks' layers")
    activation: Activation = "relu"
    penalty: float = Field(0.1, ge=0, description="lambda, the weight of the gradient penalty")
    critic_steps: int = Field(5, ge=1, description="n_critic, the critic's updates for each of the generator's")


class WGANGP(Model):
    """Multi-layer perceptrons as in the paper's toy problems (figure 1), for points and for small images.

    The critic has no batch normalisation: its penalty is about each example alone (section 4).
    """

    Config = WGANGPConfig

    config: WGANGPConfig

    def __init__(self, config: WGANGPConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.G = mlp(config.latents, config.hidden, spec.dims, config.activation)
        self.D = mlp(spec.dims, config.hidden, 1, config.activation)
        for layer in [*self.G[:-1], *self.D[:-1]]:
            if isinstance(layer, nn.Linear):  # He et al.'s, as in the authors' code: torch's own is too small for ReLU
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")

    def phases(self) -> list[Phase]:
        """n_critic updates of the critic, then one of the generator, which needs no data."""
        return [
            Phase("critic", self.D, self.critic_loss, repeat=self.config.critic_steps, compile=False),
            Phase("generator", self.G, self.generator_loss, batch={}),
        ]

    def averaged(self) -> nn.Module:
        """The generator: a critic is good against one opponent, not against its average."""
        return self.G

    def critic_loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Eq. 3. ``wasserstein`` is the critic's estimate of the distance, up to its Lipschitz constant."""
        real = self.spec.scale(b.x)
        n = real.shape[0]
        with torch.no_grad():
            fake = self.decode(s.rng.normal("z", (n, self.config.latents)))
        d_real, d_fake = self.critic(torch.cat([real, fake.to(real.dtype)])).to(torch.get_default_dtype()).split(n)
        wasserstein = d_real.mean() - d_fake.mean()
        penalty = gradient_penalty(self.critic, real, fake.to(real.dtype), s.rng.uniform("epsilon", (n,)))
        return {"loss": self.config.penalty * penalty - wasserstein, "wasserstein": wasserstein, "penalty": penalty}

    def generator_loss(self, b: Any, s: Step) -> dict[str, Any]:
        """-E[D(G(z))] (algorithm 1, line 11)."""
        return {"loss": -self.critic(self.decode(s.rng.normal("z", (b.n, self.config.latents)))).mean()}

    def critic(self, x: Tensor) -> Tensor:
        """D(x): scaled ``x (n, *shape)`` -> ``(n,)``."""
        return self.D(x.flatten(1))[:, 0]

    # ------------------------------------------------------------------ samples and latents

    def prior(self, rng: Rng) -> Tensor:
        """z ~ N(0, I), ``(n, latents)``."""
        return rng.normal("z", (rng.n, self.config.latents))

    def decode(self, z: Tensor) -> Tensor:
        """G(z): ``z (n, latents)`` -> points, or images as floats in [-1, 1], ``(n, *shape)``."""
        x = self.G(z)
        return (x if self.spec.levels is None else x.tanh()).reshape(-1, *self.spec.shape)

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        """``rng.n`` samples, as :meth:`decode` gives them."""
        return self.decode(self.prior(rng))
