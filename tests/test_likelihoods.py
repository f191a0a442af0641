"""Likelihood heads against brute force and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal

from gencli.console import UsageError
from gencli.nn.likelihoods import Bernoulli, Categorical, DiscretisedLogistic, Gaussian, discretised_logistic, head
from gencli.rng import SampleRng


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def grid():
    """Means inside and far outside of [-1, 1], log-scales -7 .. 1."""
    mean, log_scale = torch.meshgrid(
        torch.tensor([-30.0, -1.5, -1.0, -0.37, 0.0, 0.123, 0.999, 1.0, 4.0]), torch.linspace(-7, 1, 17), indexing="ij"
    )
    return mean.flatten(), log_scale.flatten()


def every_level(h, levels, theta):
    """log p of each level: (levels, ...)."""
    x = torch.arange(levels).view(-1, *[1] * (theta.dim() - 1)).expand(levels, *theta.shape[:-1])
    return h.log_prob(x, theta.expand(levels, *theta.shape))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_discretised_logistic_sums_to_one(levels):
    theta = torch.stack(grid(), -1)
    mass = every_level(DiscretisedLogistic(levels), levels, theta).exp().sum(0)
    assert (mass - 1).abs().max() < 1e-12


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_discretised_logistic_is_the_difference_of_its_distribution_function(levels):
    mean, log_scale = torch.tensor([0.1, -0.8, 0.97]), torch.tensor([-1.0, 0.5, -2.0])
    cdf = lambda y: torch.sigmoid((y - mean) / log_scale.exp())  # noqa: E731
    h = 1 / (levels - 1)
    for k in {0, 1, levels // 2, levels - 2, levels - 1}:
        y = 2 * k * h - 1
        low = cdf(y - h) if k > 0 else torch.zeros(3)
        high = cdf(y + h) if k < levels - 1 else torch.ones(3)
        got = discretised_logistic(torch.full((3,), k), mean, log_scale, levels)
        torch.testing.assert_close(got.exp(), high - low, rtol=1e-9, atol=1e-15)


def test_the_discretised_logistic_is_exact_and_differentiable_in_the_tails():
    # the mass of a bin far below the mean is e^(edge - mean)/s (1 - e^(-width/s)) to all digits
    s = math.exp(-6)
    mean, log_scale = torch.tensor([0.9], requires_grad=True), torch.tensor([-6.0], requires_grad=True)
    got = discretised_logistic(torch.tensor([10]), mean, log_scale, 256)
    upper = 2 * 10 / 255 - 1 + 1 / 255
    assert got.item() == pytest.approx((upper - 0.9) / s + math.log1p(-math.exp(-2 / 255 / s)), rel=1e-12)
    got.backward()
    assert mean.grad.item() == pytest.approx(-1 / s, rel=1e-12)

    theta = torch.stack(grid(), -1).float().requires_grad_()
    log_p = every_level(DiscretisedLogistic(256), 256, theta)
    log_p.sum().backward()
    assert log_p.isfinite().all() and theta.grad.isfinite().all() and log_p.dtype == torch.float32
    wide = every_level(DiscretisedLogistic(256), 256, theta.detach().double())
    torch.testing.assert_close(log_p.double(), wide, rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("name", ["categorical", "discretised-logistic", "bernoulli"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_every_head_is_normalised_and_its_mean_is_the_mean(name, levels):
    if name == "bernoulli" and levels != 2:
        return
    h = head(name, levels)
    theta = 3 * torch.randn(5, 4, h.parameters, generator=torch.Generator().manual_seed(0))
    p = every_level(h, levels, theta).exp()
    assert p.shape == (levels, 5, 4) and (p.sum(0) - 1).abs().max() < 1e-12
    y = torch.linspace(-1, 1, levels).view(-1, 1, 1)
    torch.testing.assert_close(h.mean(theta), (p * y).sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("h", [Bernoulli(), Categorical(5), DiscretisedLogistic(5)])
def test_samples_have_the_head_s_probabilities(h):
    levels, n = 2 if isinstance(h, Bernoulli) else 5, 20_000
    theta = torch.randn(1, 3, h.parameters, generator=torch.Generator().manual_seed(1))
    p = every_level(h, levels, theta)[:, 0].exp()
    x = h.sample(theta.expand(n, -1, -1), SampleRng(0, range(n)))
    assert x.dtype == torch.int64 and x.shape == (n, 3)
    share = torch.stack([(x == k).double().mean(0) for k in range(levels)])
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_a_gaussian_is_torch_s_normal():
    theta = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(2))
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    want = Normal(theta[..., 0], theta[..., 1].exp())
    torch.testing.assert_close(Gaussian().log_prob(x, theta), want.log_prob(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(Gaussian().mean(theta), want.mean)
    draws = Gaussian().sample(theta[:1].expand(20_000, -1, -1), SampleRng(0, range(20_000)))
    assert ((draws.mean(0) - want.mean[0]) / want.stddev[0]).abs().max() < 4 / math.sqrt(20_000)
    torch.testing.assert_close(draws.std(0), want.stddev[0], rtol=0.03, atol=0)


def test_half_precision_outputs_are_widened():
    theta = torch.randn(4, 17).bfloat16()
    assert Categorical(17).log_prob(torch.arange(4), theta).dtype == torch.float32


@pytest.mark.parametrize(
    "name, levels, other",
    [
        ("bernoulli", 17, "categorical"),
        ("bernoulli", None, "gaussian"),
        ("categorical", None, "gaussian"),
        ("discretised-logistic", None, "gaussian"),
        ("gaussian", 256, "categorical"),
    ],
)
def test_a_head_that_does_not_fit_the_data_is_refused_with_the_one_that_does(name, levels, other):
    with pytest.raises(UsageError, match=f"{name}.*{other}"):
        head(name, levels)
