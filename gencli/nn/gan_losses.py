"""What the players of a GAN minimise, from the discriminator's outputs d(x), d(G(z)): logits, or a critic's scores.

                    discriminator                                        generator
    saturating      -E log D(x) - E log(1 - D(G(z)))                     E log(1 - D(G(z)))        (Goodfellow, eq. 1)
    non-saturating  the same                                             -E log D(G(z))            (ibid., section 3)
    least-squares   E (d(x) - 1)^2 / 2 + E d(G(z))^2 / 2                 E (d(G(z)) - 1)^2 / 2     (Mao, eq. 9)
    wasserstein     E d(G(z)) - E d(x)                                   -E d(G(z))                (Arjovsky, eq. 2)
    hinge           E max(0, 1 - d(x)) + E max(0, 1 + d(G(z)))           -E d(G(z))                (Miyato, eqs. 16, 17)

with D = sigmoid(d), whose logarithms are softplus of d: no probability is ever near 0. All in float32 or better.

One-sided smoothing (Salimans, section 3.4) asks for 1 - ``smoothing`` where D(x) or d(x) should be 1, on real data
alone: with a target above 0 for samples the optimal D would have p_G in its numerator, and hold samples where they are.

References:
    Generative Adversarial Nets, Goodfellow et al., 2014, arXiv 1406.2661
    Improved Techniques for Training GANs, Salimans et al., 2016, arXiv 1606.03498
    Least Squares Generative Adversarial Networks, Mao et al., 2016, arXiv 1611.04076
    Wasserstein GAN, Arjovsky, Chintala, Bottou, 2017, arXiv 1701.07875
    Spectral Normalization for Generative Adversarial Networks, Miyato et al., 2018, arXiv 1802.05957
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PROBABILITIES", "GANLoss", "discriminator_loss", "generator_loss", "output"]

GANLoss = Literal["saturating", "non-saturating", "least-squares", "wasserstein", "hinge"]
PROBABILITIES = ("saturating", "non-saturating")  # whose d is a logit


def discriminator_loss(loss: GANLoss, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """The discriminator's loss, a scalar, of d(x) ``(n,)`` and d(G(z)) ``(m,)``.

    ``smoothing`` is for losses with a target; the others have none to smooth: ValueError.
    """
    real, fake = _exact(real), _exact(fake)
    if loss in PROBABILITIES:
        plain = F.softplus(-real).mean() + F.softplus(fake).mean()
        return plain + smoothing * real.mean() if smoothing else plain  # as softplus(d) = softplus(-d) + d
    if loss == "least-squares":
        return ((real - (1 - smoothing)).square().mean() + fake.square().mean()) / 2
    if smoothing:
        raise ValueError(f"the {loss} loss has no target that could be smoothed")
    if loss == "wasserstein":
        return fake.mean() - real.mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(loss: GANLoss, fake: Tensor) -> Tensor:
    """The generator's loss, a scalar, of d(G(z)) ``(n,)``."""
    fake = _exact(fake)
    if loss == "saturating":
        return -F.softplus(fake).mean()
    if loss == "non-saturating":
        return F.softplus(-fake).mean()
    if loss == "least-squares":
        return (fake - 1).square().mean() / 2
    return -fake.mean()


def output(loss: GANLoss, d: Tensor) -> Tensor:
    """What one wants to see of d ``(n,)``: the mean probability D where there is one, the mean of d where not."""
    d = _exact(d.detach())
    return (d.sigmoid() if loss in PROBABILITIES else d).mean()


def _exact(d: Tensor) -> Tensor:
    return d.to(torch.promote_types(d.dtype, torch.float32))
