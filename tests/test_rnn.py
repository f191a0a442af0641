"""The LSTM against its equations, written out. What it shares with wavenet is in test_sequence."""

import pytest
import torch

from tests.test_sequence import RNN, build, flatten, float64  # noqa: F401 (float64 is a fixture)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_network_is_the_equations(conditional: bool) -> None:
    model = build(RNN, (1, 3, 3), levels=4, coordinates=True, conditional=conditional)
    x, labels = torch.randint(4, (2, 1, 3, 3)), torch.tensor([2, 0]) if conditional else None
    one_hot, H = model.one_hot(labels), model.config.hidden
    state = [(torch.zeros(2, H), torch.zeros(2, H)) for _ in model.lstms]
    for t in range(9):
        before = model.inputs.values()[flatten(x)[:, t - 1]] if t else torch.zeros(2, 5)
        place = torch.tensor([t // 3 - 1.0, t % 3 - 1.0]).expand(2, -1)
        y = torch.cat([before, place, *([one_hot] if conditional else [])], 1)
        for k, lstm in enumerate(model.lstms):
            h, c = state[k]
            gates = y @ lstm.weight_ih_l0.T + h @ lstm.weight_hh_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
            i, f, g, o = gates.split(H, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = o.sigmoid() * c.tanh()
            state[k] = y, c
        z = y @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(x, labels)[:, t], z, rtol=0, atol=1e-12)


def test_the_courses_net_has_its_parameters() -> None:
    model = build(RNN, (1, 28, 28), hidden=256, layers=1, coordinates=True)
    assert sum(p.numel() for p in model.parameters()) == 4 * 256 * (3 + 256 + 2) + 256 * 2 + 2
