"""IAF: exact both ways, a density that integrates to 1, the exact gradient of its implicit latents."""

import pytest
import torch

from gencli.contract import DataSpec
from gencli.models.flows.iaf import IAF
from gencli.nn.made import Autoregressive
from tests.flows import IMAGE, POINTS, assert_a_flow, build, mass, normal
from tests.tiny import session, tiny


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def points(D):
    return DataSpec(name="p", kind="points", shape=(D,))


@pytest.mark.parametrize("spec", [points(1), points(2), points(11), IMAGE], ids=lambda s: f"{s.kind}-{s.dims}")
def test_it_is_a_flow(float64, spec):
    assert_a_flow(build(IAF, spec, hidden=(40, 40), transforms=3))


def test_its_density_integrates_to_one(float64):
    flow = build(IAF, POINTS, hidden=(16,), transforms=3)
    assert abs(mass(flow, reach=16) - 1) < 1e-4


def test_eq_11_of_its_own_samples(float64):
    """Drawn in one pass a layer, a sample has the density that eq. 11 reads off that pass."""
    flow = build(IAF, points(6), hidden=(20,), transforms=3)
    z = eps = normal(10, 6)
    log_q = -0.5 * (eps.square() + torch.tensor(2 * torch.pi).log()).sum(1)
    for actnorm, layer in reversed(list(zip(flow.flow.layers[::2], flow.flow.layers[1::2]))):
        mu, a = layer.step.made(z).unbind(1)
        log_sigma = a / (1 + a.abs() / 5)
        z = (mu + log_sigma.exp() * z) * (-actnorm.log_s).exp() - actnorm.b
        log_q = log_q - log_sigma.sum(1) + actnorm.log_s.sum()
    torch.testing.assert_close(flow.f_inverse(eps), z)
    torch.testing.assert_close(flow.log_prob(z, None), log_q)


def test_the_gradient_of_its_loss_is_that_of_finite_differences(float64):
    flow = build(IAF, points(5), hidden=(12,), transforms=3).train()
    x = normal(7, 5)
    flow.log_prob(x, None).mean().backward()
    for name, p in flow.named_parameters():
        d = normal(*p.shape, key=("direction", name)) * (1 if p.dim() == 1 else 0.3)
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p += h * d
                values.append(flow.log_prob(x, None).mean().item())
                p -= h * d
        assert (p.grad * d).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7), name


def test_samples_take_one_pass_and_densities_at_most_D(monkeypatch):
    flow, counts = build(IAF, points(30), hidden=(40,), transforms=2), []
    solve = Autoregressive.solve

    def counted(self, u, *more):
        x, passes = solve(self, u, *more)
        counts.append(passes)
        return x, passes

    monkeypatch.setattr(Autoregressive, "solve", counted)
    with torch.no_grad():
        x = flow.f_inverse(normal(5, 30))
        assert counts == []
        flow.log_prob(x, None)
    assert len(counts) == 2 and max(counts) <= 30


def test_a_few_steps_learn_the_moons():
    """From 2.56 nats of a Gaussian of the data's moments; the entropy is 1.008."""
    recipe = tiny("iaf", "train.steps=200", "train.batch_size=256", "model.hidden=[32, 32]", "model.transforms=4")
    with session(recipe) as made:
        logs = [made.trainer.step() for _ in range(200)]
    assert 2 * sum(row["loss"] for row in logs[-10:]) / 10 < 1.9
