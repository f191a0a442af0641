"""Dequantization: q's density is that of its own map, it starts near uniform, and learning it tightens a true bound."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.nn.dequantization import Centre, Uniform, Variational, dequantizer
from gencli.nn.flow import Flow, FlowConfig
from gencli.rng import Keys, SampleRng, seeded
from tests.flows import IMAGE, POINTS, log_det_of_jacobian, normal


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learned(jitter=0.0, shape=(2, 4, 4)):
    with seeded(0), torch.no_grad():
        q = Variational(shape, 8, 8)
        for name, p in q.named_parameters():
            p += jitter * normal(*p.shape, key=name)
    return q


class Given:
    """An rng whose normal numbers are given."""

    def __init__(self, e):
        self.e = e

    def normal(self, purpose, shape):
        assert self.e.shape == torch.Size(shape)
        return self.e


def test_log_q_is_the_density_of_the_map_from_noise():
    q, x, e = learned(jitter=0.05), torch.arange(96.0).reshape(3, 2, 4, 4) % 8, normal(3, 2, 4, 4)
    u, log_q = q(x, Given(e))
    assert ((u > 0) & (u < 1)).all()
    log_det = log_det_of_jacobian(lambda v, i: q(x[i : i + 1], Given(v))[0], e)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(e).flatten(1).sum(1) - log_det
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-8)


def test_the_noise_depends_on_the_levels():
    q, e = learned(jitter=0.2), normal(1, 2, 4, 4)
    x = torch.zeros(1, 2, 4, 4)
    assert (q(x, Given(e))[0] - q(x + 3, Given(e))[0]).abs().max() > 1e-3


def test_it_starts_near_the_uniform_distribution():
    u, log_q = learned()(torch.zeros(500, 2, 4, 4), SampleRng(0, range(500)))
    assert 0 < log_q.mean() / 32 < 0.02, "its KL from the uniform distribution, a dimension"
    counts = torch.histc(u, 10, 0, 1) / u.numel()
    assert (counts - 0.1).abs().max() < 0.02


def test_uniform_and_none():
    x = torch.zeros(300, 2, 4, 4)
    u, log_q = Uniform()(x, SampleRng(0, range(300)))
    assert not log_q.any() and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.01
    u, log_q = Centre()(x, None)
    assert not log_q.any() and (u == 0.5).all()


def test_each_config_has_its_noise():
    assert isinstance(dequantizer("uniform", IMAGE, 8), Uniform)
    assert isinstance(dequantizer("variational", IMAGE, 8), Variational)
    assert isinstance(dequantizer("none", IMAGE, 8), Centre)
    assert isinstance(dequantizer("uniform", POINTS, 8), Centre), "points have no levels"
    with pytest.raises(UsageError, match="variational dequantization is for images"):
        dequantizer("variational", DataSpec(name="t", kind="text", shape=(8,), levels=5), 8)


class Normal(Flow):
    """y ~ N(0, 1 / 16): nothing to learn but the noise."""

    def f(self, x, labels=None):
        return 4 * x.flatten(1), math.log(4) * self.spec.dims * x.new_ones(len(x))


def test_the_learned_bound_is_tighter_and_still_a_bound():
    spec = DataSpec(name="two", kind="image", shape=(1, 2, 2), levels=3)
    with seeded(0):
        flow = Normal(FlowConfig(dequantization="variational", dequantization_width=8), spec)
    uniform = Normal(FlowConfig(), spec)
    x = torch.cartesian_prod(*[torch.arange(3)] * 4).to(torch.uint8).reshape(81, 1, 2, 2)
    # P(x) in closed form: y = (x + u) / 3 - 1/2 lies in an interval of N(0, 1 / 16)
    edges = torch.special.ndtr(4 * (torch.arange(4) / 3 - 0.5))
    log_P = edges.diff().log()[x.long()].flatten(1).sum(1)

    def mean_bound(model, rows=100):
        many = x.repeat(rows, 1, 1, 1)
        with torch.no_grad():
            log_p = model.log_prob(many, SampleRng(0, range(len(many))))
        return log_p.reshape(rows, 81).mean(0)

    before = mean_bound(uniform)
    adam = torch.optim.Adam(flow.parameters(), 1e-2)
    keys = Keys(0)
    for step in range(150):
        adam.zero_grad()
        (-flow.log_prob(x, keys.open("model", step)).mean()).backward()
        adam.step()
    after = mean_bound(flow)
    assert (before < log_P).all() and (after < log_P + 0.02).all(), "a bound, but for the draws' error"
    gap_before, gap_after = (log_P - before).mean(), (log_P - after).mean()
    assert 0 < gap_after < gap_before / 3, (gap_before, gap_after)


class OnlyScale(Flow):
    """z = exp(s) (y - c): what any flow can do to data on a grid."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.s, self.c = nn.Parameter(torch.zeros(spec.dims)), nn.Parameter(torch.zeros(spec.dims))

    def f(self, x, labels=None):
        return self.s.exp() * (x.flatten(1) - self.c), self.s.sum().expand(len(x))


@pytest.mark.parametrize("dequantization", ["uniform", "none"])
def test_without_noise_the_density_of_a_constant_pixel_has_no_end(dequantization):
    spec = DataSpec(name="flat", kind="image", shape=(1, 1, 1), levels=2)
    flow = OnlyScale(FlowConfig(dequantization=dequantization), spec)
    x = torch.zeros(200, 1, 1, 1, dtype=torch.uint8)
    found = []
    for s in (1.0, 3.0, 5.0, 7.0):
        with torch.no_grad():
            flow.s.fill_(s)
            flow.c.fill_(-0.25)  # the middle of level 0
            found.append(flow.log_prob(x, SampleRng(0, range(200))).mean().item())
    if dequantization == "none":
        assert np.allclose(np.diff(found), 2), "each doubling of the scale is worth log 2, for ever"
    else:
        assert max(found) < 0, "the bound is one on log P(x) <= 0"
