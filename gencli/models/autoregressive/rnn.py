"""RNN: a recurrent net reads an image pixel by pixel, or a text symbol by symbol, and says what comes next.

    p(x) = prod_t p(x_t | x_1, ..., x_{t-1})                                  (Pixel RNN, eq. 1)
    [i f g o] = W x_{t-1} + U h_{t-1} + b
    c_t = sigmoid(f) . c_{t-1} + sigmoid(i) . tanh(g)
    h_t = sigmoid(o) . tanh(c_t)                                              (LSTM)
    p(x_t | ...) = softmax(V h_t + a)

The state (h, c) carries all of the past, so that nothing is out of reach and drawing costs one step a value. This is
the plain LSTM over the flattened image, as the course has it; the Row and Diagonal LSTMs of the first paper, whose
states run along two dimensions, are not here.

References:
    Pixel Recurrent Neural Networks, van den Oord, Kalchbrenner, Kavukcuoglu, 2016, arXiv 1601.06759 (images pixel by
    pixel, colours in turn, a softmax over levels: section 2)
    Generating Sequences With Recurrent Neural Networks, Graves, 2013, arXiv 1308.0850 (stacked LSTMs, text)
    Long Short-Term Memory, Hochreiter, Schmidhuber, 1997, Neural Computation 9(8); with the forget gate of Learning to
    Forget, Gers, Schmidhuber, Cummins, 2000, Neural Computation 12(10)
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.contract import Config, DataSpec, Model
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.sequence import Inputs, Sequences

__all__ = ["RNN", "RNNConfig"]


class RNNConfig(Config):
    """The hyper-parameters of an LSTM over sequences."""

    hidden: int = Field(256, ge=1, description="size of h and c, and of the vectors of a text's symbols")
    layers: int = Field(1, ge=1, description="LSTMs stacked on each other")
    coordinates: bool = Field(
        False, description="of images: feed row and column (and colour) of the value about to be predicted"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the outputs of all LSTMs")
    conditional: bool = Field(False, description="condition on the class, which is fed with every input")


class RNN(Sequences, Model):
    """LSTM over sequences: exact likelihood, exact samples."""

    Config = RNNConfig
    likelihood = "exact"
    config: RNNConfig

    def __init__(self, config: RNNConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.check("rnn")
        assert spec.levels is not None
        self.inputs = Inputs(spec, config.coordinates, config.hidden)
        n_in = self.inputs.width + (len(spec.classes) if config.conditional else 0)
        widths = [n_in] + [config.hidden] * (config.layers - 1)
        # one at a time: the dropout between the layers of a deep nn.LSTM is not keyed
        self.lstms = nn.ModuleList(nn.LSTM(width, config.hidden, batch_first=True) for width in widths)
        self.dropout = nn.ModuleList(Dropout(config.dropout) for _ in widths)
        self.head = nn.Linear(config.hidden, spec.levels)
        name_layers(self)

    def network(self, inputs: Tensor, h: Tensor | None) -> Tensor:
        """Logits (n, D, levels) of inputs (n, D, width) and one-hot classes (n, classes)."""
        y = inputs if h is None else torch.cat([inputs, h[:, None].expand(-1, inputs.shape[1], -1)], -1)
        for lstm, dropout in zip(self.lstms, self.dropout):
            y = dropout(lstm(y)[0])
        return self.head(y)

    def cached(self, n: int, h: Tensor | None) -> Cached:
        return Cached(self, n, h)


class Cached:
    """The network in a sampler (a ``nn.sequence.Network``): the states stay, a position is one step.

    All gates of a layer are one product: its weights stand on each other as [W U], its input and its last output
    beside each other in ``state``. What the first layer's W makes of every level is a table.
    """

    def __init__(self, model: RNN, n: int, h: Tensor | None) -> None:
        H, inputs = model.config.hidden, model.inputs
        # gates in the order i, f, o, g: those with a sigmoid lie together
        order = torch.cat([torch.arange(2 * H), torch.arange(3 * H, 4 * H), torch.arange(2 * H, 3 * H)])
        lstms: list[Any] = list(model.lstms)
        W, U, b = [], [], []
        for lstm in lstms:
            W.append(lstm.weight_ih_l0[order])
            U.append(lstm.weight_hh_l0[order])
            b.append((lstm.bias_ih_l0 + lstm.bias_hh_l0)[order])
        values, classes = inputs.values(), 0 if h is None else h.shape[1]
        of_value, of_place, of_class = W[0].split([values.shape[1], inputs.places.shape[1], classes], 1)
        self.table = values @ of_value.T  # (levels, 4H)
        self.first = b[0] if h is None else b[0] + h @ of_class.T
        self.places = (inputs.places @ of_place.T).unbind(0) if of_place.shape[1] else None  # D times (4H,)
        self.level: Tensor | None = None
        self.state = U[0].new_zeros(n, len(U) * H)  # h of all layers, each beside that of the layer below
        self.c = [U[0].new_zeros(n, H) for _ in U]
        self.gates, self.tanh = U[0].new_empty(n, 4 * H), U[0].new_empty(n, H)
        self.ifo = self.gates[:, : 3 * H]
        self.i, self.f, self.o, self.g = self.gates.split(H, 1)
        self.h = self.state.split(H, 1)
        self.windows = [self.h[0], *(self.state[:, k * H : (k + 2) * H] for k in range(len(U) - 1))]
        self.weights = [U[0].T.contiguous(), *(torch.cat([w, u], 1).T.contiguous() for w, u in zip(W[1:], U[1:]))]
        self.bias = b
        self.V, self.a = model.head.weight.T.contiguous(), model.head.bias

    def logits(self, t: int) -> Tensor:
        x: Tensor = self.gates
        if self.level is None:
            x.copy_(self.first.expand_as(x))
        else:
            torch.index_select(self.table, 0, self.level, out=x)
            x += self.first
        if self.places is not None:
            x += self.places[t]
        for k, (window, weight, c, h) in enumerate(zip(self.windows, self.weights, self.c, self.h)):
            torch.addmm(x if k == 0 else self.bias[k], window, weight, out=x)
            self.ifo.sigmoid_()
            c.mul_(self.f).addcmul_(self.i, self.g.tanh_())
            torch.mul(self.o, torch.tanh(c, out=self.tanh), out=h)
        return torch.addmm(self.a, h, self.V)

    def put(self, t: int, level: Tensor) -> None:
        self.level = level
