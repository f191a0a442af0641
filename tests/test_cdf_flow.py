"""cdf-flow: its map is the mixture's distribution function, onto either base, and one dimension is all it takes."""

import pytest
import torch

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.data.points import density
from gencli.models.flows.cdf_flow import CDFFlow
from gencli.rng import SampleRng
from tests.flows import build, normal
from tests.tiny import session, tiny

LINE = DataSpec(name="points/mixture-1d", kind="points", shape=(1,))
BASES, KERNELS = ["normal", "uniform"], ["normal", "logistic"]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def true_flow(base):
    """The flow of points/mixture-1d itself: components N(-1, 0.25^2) and N(0.5, 0.5^2), half each."""
    flow = CDFFlow(CDFFlow.Config(components=2, base=base), LINE)
    scales = torch.tensor([0.25, 0.5]).log()
    scales = scales / (1 - scales.abs() / 5)  # the bound undone
    with torch.no_grad():
        flow.theta.copy_(torch.cat([torch.zeros(2), torch.tensor([-1.0, 0.5]), scales])[:, None])
    return flow


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_with_the_truths_parameters_it_is_the_truth(float64, base):
    flow, x = true_flow(base), torch.linspace(-3, 3, 601)[:, None]
    expected = torch.from_numpy(density("points/mixture-1d").log_prob(x.numpy()))
    torch.testing.assert_close(flow.log_prob(x, None), expected, rtol=0, atol=1e-10)
    cdf = torch.cumulative_trapezoid(expected.exp(), x[:, 0])
    z = flow.encode(x, None)[1:, 0]
    F = z if base == "uniform" else torch.special.ndtr(z)
    assert (F - cdf).abs().max() < 1e-4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_a_flow(float64, base, kernel):
    flow, x = build(CDFFlow, LINE, components=4, base=base, kernel=kernel, jitter=0.3), normal(20, 1)
    v = x.clone().requires_grad_()
    z, log_det = flow.f(v)
    (slope,) = torch.autograd.grad(z.sum(), v)
    torch.testing.assert_close(log_det, slope[:, 0].log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.f_inverse(z.detach()), x, rtol=0, atol=1e-10)
    axis = torch.linspace(-40, 40, 80001)[:, None]
    assert torch.trapezoid(flow.log_prob(axis, None).exp(), axis[:, 0]).item() == pytest.approx(1, abs=1e-6)
    flow.float()
    torch.set_default_dtype(torch.float32)
    x = x.float()
    assert (flow.f_inverse(flow.f(x)[0]) - x).abs().max() <= 1e-5


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_samples_have_the_density(base):
    flow, rng = true_flow(base), SampleRng(0, range(4000))
    x = flow.sample(rng).sort(0).values
    assert x.shape == (4000, 1)
    F = torch.special.ndtr((x + 1) / 0.25) / 2 + torch.special.ndtr((x - 0.5) / 0.5) / 2
    # Kolmogorov and Smirnov's distance, 1.95 / sqrt(n) at one in a thousand
    assert (F[:, 0] - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.95 / 4000**0.5


def test_uniform_latents_at_their_ends_are_points():
    flow = true_flow("uniform")
    assert flow.decode(torch.tensor([[0.0], [1.0]])).isfinite().all()


@pytest.mark.parametrize("data", ["mixture-1d", "peaks-1d"])
def test_it_learns_densities_on_the_line(data):
    recipe = tiny("cdf-flow", f"data.name=points/{data}", "train.steps=300", "train.batch_size=512",
                  "model.components=6", "train.lr=5e-2")  # fmt: skip
    with session(recipe) as made:
        for _ in range(300):
            made.trainer.step()
        with made.trainer.evaluating() as model, torch.no_grad():
            x = made.val_data.rows(torch.arange(4000))["x"]
            true = torch.from_numpy(density(f"points/{data}").log_prob(x.numpy()))
            assert (true - model.log_prob(x, None)).mean() < 0.02


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UsageError, match="cdf-flow is for one dimension, and t has 2: try maf"):
        CDFFlow(CDFFlow.Config(), DataSpec(name="t", kind="points", shape=(2,)))
    with pytest.raises(UsageError, match="temperature is for normal latents"):
        true_flow("uniform").sample(SampleRng(0, range(2)), temperature=0.5)
