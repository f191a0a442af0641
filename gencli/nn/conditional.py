"""Class conditioning: labels as the networks of class-conditional models see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.console import UsageError

if TYPE_CHECKING:
    from gencli.contract import DataSpec

__all__ = ["Conditional"]


class Conditional:
    """For a model whose config has ``conditional``."""

    config: Any
    spec: DataSpec

    def check_classes(self) -> None:
        """UsageError if the model is conditional and the data has no classes."""
        if self.config.conditional and not self.spec.classes:
            raise UsageError(f"model.conditional needs classes, and {self.spec.name} has none")

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Labels (n,) as (n, classes); UsageError unless they are given exactly where the model is conditional."""
        if (labels is not None) != self.config.conditional:
            given = "needs labels" if labels is None else "takes no labels"
            raise UsageError(f"this model has model.conditional={str(self.config.conditional).lower()}: it {given}")
        if labels is None:
            return None
        return F.one_hot(labels.long(), len(self.spec.classes)).to(torch.get_default_dtype())
