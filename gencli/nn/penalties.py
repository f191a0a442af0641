"""What holds a discriminator's slope: penalties on its gradient at given points, and the clipping of its weights.

    gradient      E (||grad D(x^)|| - 1)^2,   x^ = epsilon x + (1 - epsilon) G(z)               (Gulrajani, eq. 3)
    r1            E ||grad D(x)||^2  on real data                                               (Mescheder, eq. 9)
    zero-centred  E ||grad D(x^)||^2                                                            (Thanh-Tung, section 5)

Each is about every example alone, so D must treat them one by one: no statistics of a batch. All in float32 or better
even under autocast: the square of a norm that should be 1 loses most of bfloat16's eight bits.

References:
    Wasserstein GAN, Arjovsky, Chintala, Bottou, 2017, arXiv 1701.07875 (clipping)
    Improved Training of Wasserstein GANs, Gulrajani et al., 2017, arXiv 1704.00028
    Which Training Methods for GANs do actually Converge?, Mescheder, Geiger, Nowozin, 2018, arXiv 1801.04406
    Improving Generalization and Stability of Generative Adversarial Networks, Thanh-Tung, Tran, Venkatesh, 2019,
    arXiv 1902.03984
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Penalty", "clip", "gradient_penalty", "penalty", "r1", "zero_centred"]

Penalty = Literal["gradient", "r1", "zero-centred"]
Critic = Callable[[Tensor], Tensor]


def gradient_penalty(D: Critic, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """E[(||grad D(x^)||_2 - 1)^2], a scalar, between ``real`` and ``fake`` ``(n, ...)`` at ``epsilon (n,)`` in [0, 1].

    ``D`` maps ``(n, ...)`` to ``(n,)``.
    """
    return (_slopes(D, _between(real, fake, epsilon)).norm(dim=1) - 1).square().mean()


def zero_centred(D: Critic, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """E ||grad D(x^)||^2, of the same arguments."""
    return _slopes(D, _between(real, fake, epsilon)).square().sum(1).mean()


def r1(D: Critic, real: Tensor) -> Tensor:
    """E ||grad D(x)||^2, a scalar, at ``real (n, ...)``. The paper has gamma / 2 before it."""
    return _slopes(D, real).square().sum(1).mean()


def penalty(kind: Penalty, D: Critic, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """The penalty ``kind``, a scalar, without its weight."""
    if kind == "r1":
        return r1(D, real)
    return (gradient_penalty if kind == "gradient" else zero_centred)(D, real, fake, epsilon)


@torch.no_grad()
def clip(D: nn.Module, c: float) -> None:
    """w <- clip(w, -c, c) for every weight of D (Arjovsky, algorithm 1, line 7)."""
    for p in D.parameters():
        p.clamp_(-c, c)


def _between(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    epsilon = epsilon.view(-1, *[1] * (real.dim() - 1))
    return epsilon * real + (1 - epsilon) * fake


def _slopes(D: Critic, x: Tensor) -> Tensor:
    """grad D(x): ``x (n, ...)`` -> ``(n, dimensions)``, differentiable once more."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        return gradient.flatten(1)
