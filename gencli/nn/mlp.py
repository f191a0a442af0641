"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from gencli.nn.dropout import Dropout

__all__ = ["Activation", "activation", "mlp"]

Activation = Literal["relu", "leaky-relu", "tanh", "silu", "elu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}


def activation(name: Activation) -> nn.Module:
    """The nonlinearity ``name``."""
    return _ACTIVATIONS[name]()


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation: Activation = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """``(..., inputs)`` -> ``(..., outputs)`` through ``hidden`` layers; with none of them, a linear map.

    With ``dropout`` the model must call :func:`gencli.nn.dropout.name_layers`.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), _ACTIVATIONS[activation]()]
        if dropout:
            layers.append(Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
