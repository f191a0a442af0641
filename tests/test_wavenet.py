"""WaveNet against its equations, written out, and its receptive field. What it shares with rnn is in test_sequence."""

import pytest
import torch

from tests.test_sequence import WaveNet, build, flatten, float64, sees  # noqa: F401 (float64 is a fixture)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_network_is_the_equations(conditional: bool) -> None:
    model = build(WaveNet, (1, 3, 3), levels=4, coordinates=True, conditional=conditional)
    raw, labels = torch.randint(4, (2, 1, 3, 3)), torch.tensor([2, 0]) if conditional else None
    one_hot, p = model.one_hot(labels), model.config.channels
    first, S, head, last = ((layer.weight, layer.bias) for layer in (model.first, model.S, model.head, model.last))
    before = torch.cat([torch.zeros(2, 1, 5), model.inputs.values()[flatten(raw)][:, :-1]], 1)
    places = torch.tensor([[t // 3 - 1.0, t % 3 - 1.0] for t in range(9)])
    x = [torch.cat([before[:, t], places[t].expand(2, -1)], 1) @ first[0].T + first[1] for t in range(9)]
    skip = [S[1].expand(2, -1) for _ in range(9)]
    assert model.config.dilations == [1, 2, 4, 1, 2, 4]
    for k, (layer, d) in enumerate(zip(model.layers, model.config.dilations)):
        z = []
        for t in range(9):
            past = x[t - d] if t >= d else torch.zeros(2, p)
            a = [past @ W.weight[:, :, 0, 0].T + x[t] @ W.weight[:, :, 0, 1].T + W.bias for W in (layer.W_f, layer.W_g)]
            if conditional:
                to = one_hot @ layer.V.weight.T
                a = [a[0] + to[:, :p], a[1] + to[:, p:]]
            z.append(a[0].tanh() * a[1].sigmoid())
        skip = [skip[t] + z[t] @ S[0][:, k * p : (k + 1) * p].T for t in range(9)]
        if k < 5:
            x = [x[t] + z[t] @ layer.R.weight.T for t in range(9)]
    logits = [(skip[t].relu() @ head[0].T + head[1]).relu() @ last[0].T + last[1] for t in range(9)]
    torch.testing.assert_close(model(raw, labels), torch.stack(logits, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("stacks", "layers", "reach"), [(1, 1, 2), (1, 4, 16), (2, 3, 15), (3, 2, 10), (2, 5, 63)])
def test_the_receptive_field_is_what_the_dilations_say(stacks: int, layers: int, reach: int) -> None:
    model = build(WaveNet, (1, 70), levels=3, scale=1.0, channels=8, stacks=stacks, layers=layers)
    assert model.receptive_field == reach
    seen = sees(model)
    for t in range(70):
        assert seen[t].nonzero().flatten().tolist() == list(range(max(0, t - reach), t))


def test_a_ring_longer_than_the_sequence_is_cut() -> None:
    model = build(WaveNet, (20,), stacks=1, layers=10)
    rings = [row.shape for layer in model.cached(3, None).layers for row in [next(layer[0])[0]]]
    assert rings == [(3, 10)] * 10
