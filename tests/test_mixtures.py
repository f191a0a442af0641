"""The logistic mixture: its masses sum to one, its tails are exact, its samples follow its masses."""

import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor

from gencli.nn.likelihoods import discretised_logistic
from gencli.nn.mixtures import LogisticMixture, openai_discretised_logistic
from gencli.rng import generator

getcontext().prec = 60


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # examples are drawn by torch.randint
    yield
    torch.set_default_dtype(torch.float32)


def parameters(head: LogisticMixture, n: int, spread: float = 2.0) -> Tensor:
    """Rows of theta with means within and beyond the levels and log-scales from below the bound to wide."""
    return spread * torch.from_numpy(generator("theta", head.parameters).standard_normal((n, head.parameters)))


def decimal_mass(level: int, mean: float, log_scale: float, levels: int) -> Decimal:
    """The mass of a bin by its definition in sixty digits, mirrored into the lower tail, where they are enough."""
    if 2 * level / (levels - 1) - 1 > mean:
        return decimal_mass(levels - 1 - level, -mean, log_scale, levels)

    def cdf(edge: Decimal) -> Decimal:
        return 1 / (1 + (-(edge - Decimal(mean)) / Decimal(log_scale).exp()).exp())

    centre, half = Decimal(2 * level) / (levels - 1) - 1, Decimal(1) / (levels - 1)
    upper = Decimal(1) if level == levels - 1 else cdf(centre + half)
    return upper - (Decimal(0) if level == 0 else cdf(centre - half))


@pytest.mark.parametrize("levels", [*(2**bits for bits in range(1, 9)), 17])
def test_the_masses_of_all_levels_sum_to_one(levels: int):
    head = LogisticMixture(1, levels, 5)
    theta = parameters(head, 200)
    x = torch.arange(levels).expand(200, 1, -1)
    mass = head.log_prob(x, theta[:, :, None].expand(-1, -1, levels)).exp()
    assert mass.shape == (200, levels)
    assert (mass.sum(1) - 1).abs().max() < 1e-10
    assert (mass.amax(1) < 0.999).any()


@pytest.mark.parametrize(("channels", "levels"), [(3, 4), (2, 5), (3, 2)])
def test_the_joint_masses_of_all_colours_sum_to_one(channels: int, levels: int):
    head = LogisticMixture(channels, levels, 3)
    theta = parameters(head, 50)
    x = torch.tensor(list(itertools.product(range(levels), repeat=channels))).T[None]
    mass = head.log_prob(x.expand(50, -1, -1), theta[:, :, None].expand(-1, -1, x.shape[2])).exp()
    assert (mass.sum(1) - 1).abs().max() < 1e-10


def test_the_mixture_is_its_definition_in_plain_python():
    head, levels, M = LogisticMixture(3, 16, 2), 16, 2
    theta, x = parameters(head, 6, 1.0), torch.randint(16, (6, 3))
    for row, levels_of in zip(theta.tolist(), x.tolist()):
        y = [v * 2 / (levels - 1) - 1 for v in levels_of]
        pi = [math.exp(v) for v in row[:M]]
        mean, log_s, a = (row[M * k : M * (k + 3)] for k in (1, 4, 7))
        total = Decimal(0)
        for m in range(M):
            R, G, B = (mean[c * M + m] for c in range(3))
            alpha, beta, gamma = (math.tanh(a[p * M + m]) for p in range(3))
            means = [R, G + alpha * y[0], B + beta * y[0] + gamma * y[1]]
            term = Decimal(pi[m] / sum(pi))
            for c in range(3):
                term *= decimal_mass(levels_of[c], means[c], log_s[c * M + m], levels)
            total += term
        ours = head.log_prob(torch.tensor([levels_of]), torch.tensor([row])).item()
        assert ours == pytest.approx(float(total.ln()), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_tails_are_exact(dtype: torch.dtype):
    levels = 256
    x = torch.tensor([0, 1, 30, 100, 127, 128, 200, 254, 255])
    for log_scale, mean in itertools.product((-7.0, -6.0, -4.0, -1.0, 1.0), (-1.25, -0.5, 0.0, 0.75)):
        ours = discretised_logistic(x, torch.tensor(mean, dtype=dtype), torch.tensor(log_scale, dtype=dtype), levels)
        truth = torch.tensor([float(decimal_mass(k, mean, log_scale, levels).ln()) for k in x.tolist()])
        tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 5e-4}
        torch.testing.assert_close(ours.double(), truth, **tolerance)


@pytest.mark.parametrize(("log_scale", "gap"), [(-7.0, 2.15), (-5.0, 0.056)])
def test_openais_form_is_off_in_the_tails_by_the_documented_amount_and_right_elsewhere(log_scale: float, gap: float):
    mean, s = torch.tensor(0.0), torch.tensor(log_scale)
    x = torch.arange(256)
    exact, other = (f(x, mean, s, 256) for f in (discretised_logistic, openai_discretised_logistic))
    w = 2 / 255 * math.exp(-log_scale)
    formula = w / 2 + math.log(-math.expm1(-w)) - math.log(w)
    assert formula == pytest.approx(gap, abs=0.005)
    inner = (x > 0) & (x < 255)
    tail = inner & (exact < math.log(0.9e-5))
    assert tail.sum() > 50
    torch.testing.assert_close((exact - other)[tail], torch.full_like(exact[tail], formula), rtol=1e-4, atol=1e-4)
    sure = (exact > math.log(1.1e-5)) | ~inner
    torch.testing.assert_close(exact[sure], other[sure], rtol=1e-9, atol=1e-9)
    assert LogisticMixture(1, 256, 1, "openai").log_prob(
        torch.tensor([[255 - 20]]), torch.tensor([[0.0, 0.0, log_scale]])
    ).item() == pytest.approx(other[235].item())


def test_gradients_are_finite_however_far_the_level_is():
    for form in ("exact", "openai"):
        head = LogisticMixture(3, 256, 2, form)
        theta = parameters(head, 100, 20.0).float().requires_grad_()
        head.log_prob(torch.randint(256, (100, 3)), theta).sum().backward()
        assert theta.grad is not None and theta.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("channels", "levels"), [(1, 6), (3, 3)])
def test_samples_have_the_masses_frequencies(channels: int, levels: int, temperature: float):
    """Uniforms on a grid: the share of each outcome is its mass to the grid's width, with no chance in it."""
    head = LogisticMixture(channels, levels, 2)
    theta = parameters(head, 1, 0.8)
    steps = {1: 1000, 3: 40}[channels]
    grid = (torch.arange(steps) + 0.5) / steps
    u = torch.cartesian_prod(*[grid] * (1 + channels))
    drawn = head.sample(theta.expand(len(u), -1), u, temperature)
    assert drawn.shape == (len(u), channels) and drawn.dtype == torch.int64
    code = (drawn * levels ** torch.arange(channels)).sum(1)
    share = torch.bincount(code, minlength=levels**channels) / len(u)
    x = torch.tensor(list(itertools.product(range(levels), repeat=channels))).flip(1)
    cooled = theta.clone()  # logits over the temperature, log-scales plus its log
    cooled[:, :2] /= temperature
    cooled[:, 2 + 2 * channels : 2 + 4 * channels] += math.log(temperature)
    mass = head.log_prob(x, cooled.expand(len(x), -1)).exp()
    assert (share - mass).abs().max() < {1: 0.003, 3: 0.02}[channels]
    assert mass.max() < 0.9


def test_the_ends_of_the_uniforms_give_levels_too():
    head = LogisticMixture(3, 256, 4)
    for u in (0.0, 1 - 2**-24):
        drawn = head.sample(parameters(head, 50).float(), torch.full((50, 4), u, dtype=torch.float32))
        assert drawn.min() >= 0 and drawn.max() <= 255
