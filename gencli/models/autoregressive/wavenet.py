"""WaveNet: dilated causal convolutions, whose sight doubles from layer to layer, over audio, images or text.

    p(x) = prod_t p(x_t | x_1, ..., x_{t-1})                                              (eq. 1)
    z = tanh(W_f * x + V_f h) . sigmoid(W_g * x + V_g h)                     (eq. 2 and section 2.5)
    x <- x + R z,   skip = sum of S z over all layers                                     (figure 4)
    p(x_t | ...) = softmax(1x1(relu(1x1(relu(skip)))))

* is a convolution of two taps, at t and t - d; d runs through 1, 2, 4, ... in each of several stacks. h is a class in
one-hot form (global conditioning). The first convolution is 1x1, for inputs are shifted by one already. The logits
of x_t see the 1 + sum of all d values before it. R has no bias: those of the gates do its work.

References:
    WaveNet: A Generative Model for Raw Audio, van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner,
    Senior, Kavukcuoglu, 2016, arXiv 1609.03499
    Fast Wavenet Generation Algorithm, Le Paine, Khorrami, Chang, Zhang, Ramachandran, Hasegawa-Johnson, Huang, 2016,
    arXiv 1611.09482 (sampling)
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.contract import Config, DataSpec, Model
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.sequence import Inputs, Sequences

__all__ = ["WaveNet", "WaveNetConfig"]


class WaveNetConfig(Config):
    """The hyper-parameters of a WaveNet."""

    channels: int = Field(32, ge=1, description="features of the residual stream and of each gate")
    skip: int | None = Field(None, ge=1, description="features of the skip connections' sum; null = channels")
    stacks: int = Field(2, ge=1, description="how often the dilations are run through")
    layers: int = Field(5, ge=1, le=20, description="layers of a stack: dilations 1, 2, 4, ..., 2^(layers - 1)")
    coordinates: bool = Field(
        False, description="of images: feed row and column (and colour) of the value about to be predicted"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the outputs of all gates")
    conditional: bool = Field(False, description="condition on the class by V h in every gate (section 2.5)")

    @property
    def dilations(self) -> list[int]:
        """The dilation of each layer."""
        return [2**k for k in range(self.layers)] * self.stacks


class GatedLayer(nn.Module):
    """Eq. 2 and the residual connection, on features (n, D, channels)."""

    def __init__(self, c: WaveNetConfig, dilation: int, classes: int, last: bool) -> None:
        super().__init__()
        p, self.dilation = c.channels, dilation
        self.W_f = nn.Conv2d(p, p, (1, 2), dilation=(1, dilation))
        self.W_g = nn.Conv2d(p, p, (1, 2), dilation=(1, dilation))
        self.V = nn.Linear(classes, 2 * p, bias=False) if classes else None
        self.R = None if last else nn.Linear(p, p, bias=False)
        self.dropout = Dropout(c.dropout)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (n, D, p) and classes h to the next layer's x and to z (n, D, p)."""
        # two convolutions over an image of height 1 in channels-last order: the fastest of many ways to say it
        past = F.pad(x, (0, 0, self.dilation, 0)).transpose(1, 2).unsqueeze(2)
        f, g = (W(past).squeeze(2).transpose(1, 2) for W in (self.W_f, self.W_g))
        if self.V is not None:
            to_f, to_g = self.V(h)[:, None].chunk(2, -1)
            f, g = f + to_f, g + to_g
        z = self.dropout(f.tanh() * g.sigmoid())
        return x if self.R is None else x + self.R(z), z


class WaveNet(Sequences, Model):
    """WaveNet over sequences: exact likelihood, exact samples."""

    Config = WaveNetConfig
    likelihood = "exact"
    config: WaveNetConfig

    def __init__(self, config: WaveNetConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.check("wavenet")
        assert spec.levels is not None
        p, skip = config.channels, config.skip or config.channels
        classes = len(spec.classes) if config.conditional else 0
        dilations = config.dilations
        self.inputs = Inputs(spec, config.coordinates, p)
        self.first = nn.Linear(self.inputs.width, p)
        self.layers = nn.ModuleList(
            GatedLayer(config, d, classes, last=i == len(dilations)) for i, d in enumerate(dilations, 1)
        )
        self.S = nn.Linear(len(dilations) * p, skip)  # S z summed over the layers = one S of all z side by side
        self.head = nn.Linear(skip, skip)
        self.last = nn.Linear(skip, spec.levels)
        name_layers(self)

    @property
    def receptive_field(self) -> int:
        """How many values before x_t its logits see."""
        return 1 + sum(self.config.dilations)

    def network(self, inputs: Tensor, h: Tensor | None) -> Tensor:
        """Logits (n, D, levels) of inputs (n, D, width) and one-hot classes (n, classes)."""
        x, gated = self.first(inputs), []
        for layer in self.layers:
            x, z = layer(x, h)
            gated.append(z)
        return self.last(self.head(self.S(torch.cat(gated, -1)).relu()).relu())

    def cached(self, n: int, h: Tensor | None) -> Cached:
        return Cached(self, n, h)


class Cached:
    """The network in a sampler (a ``nn.sequence.Network``): a layer of dilation d keeps its last d inputs in a ring.

    Slot t mod d of a ring is a row [a b] of two inputs. At time t one half holds the input of time t - d, and that of
    time t goes to the other, over the one of t - 2d: the row is then all that both taps see, and the layer is one
    product, with its taps in the order in which the halves stand.
    """

    def __init__(self, model: WaveNet, n: int, h: Tensor | None) -> None:
        p, D, inputs = model.config.channels, model.spec.dims, model.inputs
        layers: list[Any] = list(model.layers)
        values = inputs.values()
        of_value, of_place = model.first.weight.split([values.shape[1], inputs.places.shape[1]], 1)
        self.table = values @ of_value.T  # (levels, p)
        self.places = (inputs.places @ of_place.T + model.first.bias).unbind(0)  # D times (p,)
        self.level: Tensor | None = None
        self.x = values.new_empty(n, p)
        self.fg = values.new_empty(n, 2 * p)
        self.f, self.g = self.fg.chunk(2, 1)
        self.gated = values.new_empty(n, len(layers) * p)  # z of all layers side by side
        self.layers: list[Any] = []
        for layer, z in zip(layers, self.gated.split(p, 1)):
            ring = values.new_zeros(min(layer.dilation, D), n, 2 * p)
            past, now = (torch.cat([W.weight[:, :, 0, tap] for W in (layer.W_f, layer.W_g)]).T for tap in (0, 1))
            # slots with the half to write and the order of taps: [past now] in one round, [now past] in the next
            turns = [
                (row, half, taps)
                for part, taps in ((ring[..., p:], torch.cat([past, now])), (ring[..., :p], torch.cat([now, past])))
                for row, half in zip(ring.unbind(0), part.unbind(0))
            ]
            bias = torch.cat([layer.W_f.bias, layer.W_g.bias])
            bias = (bias if layer.V is None else bias + layer.V(h)).expand(n, -1).contiguous()
            self.layers.append((cycle(turns), bias, z, None if layer.R is None else layer.R.weight.T.contiguous()))
        self.head = [(layer.weight.T.contiguous(), layer.bias) for layer in (model.S, model.head, model.last)]

    def logits(self, t: int) -> Tensor:
        x: Tensor = self.x
        z: Any = None
        R: Any = None
        if self.level is None:
            x.copy_(self.places[t])
        else:
            torch.index_select(self.table, 0, self.level, out=x)
            x += self.places[t]
        for turns, bias, z_next, R_next in self.layers:
            row, half, taps = next(turns)
            if R is None:
                half.copy_(x)
            else:
                torch.addmm(x, z, R, out=half)
            torch.addmm(bias, row, taps, out=self.fg)
            torch.mul(self.f.tanh_(), self.g.sigmoid_(), out=z_next)
            x, z, R = half, z_next, R_next
        (S, b), (head, c), (last, d) = self.head
        return torch.addmm(d, torch.addmm(c, torch.addmm(b, self.gated, S).relu_(), head).relu_(), last)

    def put(self, t: int, level: Tensor) -> None:
        self.level = level
