"""NICE: its volume is its scale's, its parts take turns, its densities integrate to 1."""

import math

import pytest
import torch

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.flows.nice import NICE
from gencli.rng import Keys, SampleRng
from tests.flows import IMAGE, POINTS, assert_a_flow, build, mass, normal


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("couplings", [2, 3, 4])
@pytest.mark.parametrize("shape", [(2,), (5,)])
def test_it_is_a_flow_of_points(couplings, shape):
    spec = DataSpec(name="p", kind="points", shape=shape)
    assert_a_flow(build(NICE, spec, couplings=couplings, hidden=(16,), activation="tanh"))


def test_it_is_a_flow_of_images():
    assert_a_flow(build(NICE, IMAGE, hidden=(16, 16), logit=0.05))


def test_only_the_scale_changes_volume():
    flow = build(NICE, IMAGE, hidden=(16,), jitter=0.5)
    _, log_det = flow.f(normal(4, *IMAGE.shape))
    torch.testing.assert_close(log_det, flow.s.sum().expand(4))


def test_equation_by_equation():
    """Two couplings by hand: odd places first, then even ones, then S."""
    flow = build(NICE, DataSpec(name="p", kind="points", shape=(3,)), couplings=2, hidden=(4,))
    x = normal(5, 3)
    m_1, m_2 = (layer.net for layer in flow.couplings.layers)
    odd, even = x[:, [0, 2]], x[:, [1]]
    even = even + m_1(odd)
    odd = odd + m_2(even)
    h = flow.s.exp() * torch.stack([odd[:, 0], even[:, 0], odd[:, 1]], 1)
    torch.testing.assert_close(flow.f(x)[0], h)
    log_p = (-h - 2 * (1 + (-h).exp()).log() + flow.s).sum(1)  # the logistic density
    torch.testing.assert_close(flow.log_prob(x, None), log_p)


@pytest.mark.parametrize("base", ["logistic", "normal"])
def test_its_density_integrates_to_one(base):
    flow = build(NICE, POINTS, couplings=3, hidden=(8,), jitter=0.4, base=base)
    assert abs(mass(flow, reach=40 if base == "logistic" else 12) - 1) < 1e-4


def test_it_begins_as_its_base():
    flow = build(NICE, POINTS, jitter=0.0, hidden=(8,))
    x = flow.sample(SampleRng(0, range(3000)))
    torch.testing.assert_close(x.std(0), torch.full((2,), math.pi / math.sqrt(3)), rtol=0.05, atol=0)


@pytest.mark.parametrize(("base", "sd"), [("logistic", math.pi / math.sqrt(3)), ("normal", 1.0)])
def test_the_first_batch_has_the_moments_of_the_prior(base, sd):
    spec = DataSpec(name="p", kind="points", shape=(5,))
    flow = NICE(NICE.Config(couplings=3, hidden=(8,), base=base), spec)
    x = normal(400, 5) * torch.tensor([0.01, 1, 3, 100, 0.1]) + torch.tensor([-7, 0, 2, 50, 0.5])
    step = Step(0, 1, Keys(0).open("prepare"), torch.zeros(()))
    flow.prepare(Batch(x=x, n=400), step)
    h, log_det = flow.f(x)
    torch.testing.assert_close(h.mean(0), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(h.std(0), torch.full((5,), sd), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_det, flow.s.sum().expand(400))


def test_one_dimension_has_no_parts():
    with pytest.raises(UsageError, match="at least 2 dimensions, and line has 1"):
        NICE(NICE.Config(), DataSpec(name="line", kind="points", shape=(1,)))
