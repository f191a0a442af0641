"""Dropout whose masks are a function of the step, not of history.

Reference: Dropout: A Simple Way to Prevent Neural Networks from Overfitting, Srivastava, Hinton, Krizhevsky,
Sutskever, Salakhutdinov, 2014, JMLR 15.
"""

from __future__ import annotations

from torch import Tensor, nn

from gencli import rng

__all__ = ["Dropout", "name_layers"]


class Dropout(nn.Module):
    """In training: zero each number with probability ``p`` and multiply the others by 1 / (1 - p).

    The first dimension of the input counts examples. The mask is drawn from the ambient step for the global batch, so
    it depends neither on the number of processes nor on a resume. ``purpose`` keys the draw: see :func:`name_layers`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: p must be in [0, 1), got {p}")
        self.p, self.purpose = p, "dropout"

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape (n, ...); RuntimeError in training outside of a step."""
        if not self.training or self.p == 0:
            return x
        keep = rng.ambient().rng.uniform(self.purpose, x.shape) >= self.p
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def name_layers(model: nn.Module) -> None:
    """Give each :class:`Dropout` in ``model`` its module name as purpose; a model calls it at the end of __init__.

    Layers with a name of their own keep their masks when another layer is added or removed.
    """
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.purpose = f"dropout:{name}"
