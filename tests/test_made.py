"""Masked networks: what depends on what, by autograd; the layers they make: determinants, inverses, passes."""

import pytest
import torch

from gencli.nn.made import MADE, Autoregressive, MaskedLinear
from gencli.nn.monotone import Affine, MixtureCDF, logit_of_normal, normal_of_logit
from tests.flows import log_det_of_jacobian, normal

MAPS = {"affine": Affine(), "logistic": MixtureCDF(4, "logistic"), "normal": MixtureCDF(4, "normal")}
ORDERS = {
    "natural": torch.arange,
    "reversed": lambda D: torch.arange(D).flip(0),
    "random": lambda D: normal(D, key="order").argsort(),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moved(module, jitter=0.3):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += jitter * normal(*p.shape, key=name)
    return module


def layer(g="affine", D=12, hidden=(40, 40), order="natural", jitter=0.3):
    return moved(Autoregressive(MAPS[g], D, hidden, ORDERS[order](D)), jitter)


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize(("D", "hidden"), [(7, (20, 30)), (64, (256, 256)), (5, ()), (6, (2,)), (1, (3,))])
def test_theta_depends_on_what_comes_before_alone(order, D, hidden):
    order = ORDERS[order](D)
    made = moved(MADE(D, hidden, torch.zeros(2), order, "tanh"))
    J = torch.autograd.functional.jacobian(lambda v: made(v[None])[0].sum(0), normal(D), vectorize=True)
    place = order.argsort()
    before = place[None, :] < place[:, None]  # (theta of, x)
    assert (J[~before] == 0).all()
    if hidden == () or min(hidden) >= D - 1:
        assert (J[before] != 0).all(), "all that comes before is seen"


def test_halves_of_a_product_are_the_whole():
    """Large layers skip blocks of zeros, for sorted units of either order; for others there are none."""
    degrees = torch.arange(256) // 4
    for outputs in (degrees, degrees.flip(0), normal(256).argsort() // 4):
        linear = MaskedLinear(degrees, outputs)
        x = normal(9, 256)
        torch.testing.assert_close(linear(x), x @ (linear.weight * linear.mask).T + linear.bias)
    spans = [part[2:] for part in MaskedLinear(degrees, degrees).parts]
    assert spans == [(0, 128), (0, 256)]
    made = MADE(65, (256, 256), torch.zeros(2))  # an odd number of dimensions: parameters of one stay together
    assert [part[:2] for part in made.out.parts] == [(0, 66), (66, 130)]


def test_a_network_starts_at_its_initial_theta():
    made = MADE(3, (8,), torch.tensor([0.5, -1.0]))
    assert torch.equal(made(normal(4, 3)), torch.tensor([[0.5], [-1.0]]).expand(4, 2, 3))


# ---------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("g", list(MAPS))
def test_the_determinant_is_that_of_the_jacobian(g, order):
    one, x = layer(g, 6, order=order), normal(3, 6)
    _, log_det = one(x)
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda v, i: one(v)[0], x), rtol=0, atol=1e-9)
    assert log_det.abs().min() > 1e-3


def one_after_another(one, u):
    """The plain route: D passes of the whole network, each for one dimension."""
    x = torch.zeros_like(u)
    for i in one.order.tolist():
        x[:, i] = one.g.inverse(u, one.made(x))[:, i]
    return x


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("g", list(MAPS))
@torch.no_grad()
def test_the_iteration_finds_what_one_dimension_after_another_finds(g, order):
    one, u = layer(g, 19, (40, 30), order), normal(20, 19, key="u")
    expected = one_after_another(one, u)
    torch.testing.assert_close(one(expected)[0], u, rtol=0, atol=1e-10)
    for block in (1, 4, 8, 19, 50):
        x, passes = one.solve(u, block)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
        assert passes <= 19 and (block > 1 or passes == 19)
    one.float()
    single = one.solve(u.float())[0]
    plain = one_after_another(one, u.float())
    # rounding errors of the same order as the plain route: where the map is flat, both are larger than 1e-5
    assert (single - expected).abs().max() <= 8 * (plain - expected).abs().max() + 1e-6


@torch.no_grad()
def test_the_iteration_stops_when_it_has_converged():
    one, u = layer(D=64, hidden=(64,), jitter=0.02), normal(20, 64, key="u")
    x, passes = one.solve(u, 64)
    torch.testing.assert_close(x, one_after_another(one, u), rtol=0, atol=1e-12)
    assert passes < 20


@torch.no_grad()
def test_it_needs_all_its_passes_where_dimensions_form_a_chain():
    """x_i = u_i + x_{i-1}: information moves on by one dimension a pass, and a block's count is that of its sizes."""
    D = 12
    one = Autoregressive(Affine(), D, ())
    for i in range(1, D):
        one.made.out.weight[2 * i, i - 1] = 1
    u = torch.ones(2, D)
    for block in (1, 5, D):
        x, passes = one.solve(u, block)
        assert torch.equal(x, torch.arange(1.0, D + 1).expand(2, D)) and passes == D


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("g", list(MAPS))
def test_the_gradient_of_the_inverse_is_that_through_all_passes(g, order):
    """Against autograd through D passes, where the map's inverse has a gradient; else through (dx/du)^-1 = du/dx."""
    one, c = layer(g, 6, (20,), order), normal(3, 6, key="c")
    u = normal(3, 6, key="u").requires_grad_()
    x = one.inverse(u)
    found = torch.autograd.grad((c * x.sin()).sum(), [u, *one.parameters()])
    if g == "affine":
        plain = torch.zeros_like(u)
        for _ in range(6):
            plain = one.g.inverse(u, one.made(plain))
        expected = torch.autograd.grad((c * plain.sin()).sum(), [u, *one.parameters()])
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    J = torch.stack([torch.autograd.functional.jacobian(lambda v: one(v[None])[0][0], row) for row in x.detach()])
    expected = torch.linalg.solve(J.mT, (c * x.cos()).detach()[..., None])[..., 0]
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("kernel", ["logistic", "normal"])
@pytest.mark.parametrize("components", [1, 3, 10])
def test_a_mixture_starts_near_the_identity(kernel, components):
    g, x = MixtureCDF(components, kernel), torch.linspace(-2, 2, 101)
    u, _ = g.forward(x, g.initial()[:, None])
    assert (u - x).abs().max() < 0.25


@pytest.mark.parametrize("kernel", ["logistic", "normal"])
def test_a_mixtures_map_is_its_distribution_function(kernel):
    """Against F and F' written out, in float64, where they do not underflow."""
    g = MixtureCDF(3, kernel)
    x, theta = 2 * normal(50, 2), normal(50, 9, 2, key="theta")
    logits, m, s = theta.mT.unflatten(-1, (3, 3)).unbind(-2)
    scale = (s / (1 + s.abs() / 5)).exp()
    K = torch.distributions.Normal(m, scale) if kernel == "normal" else None
    a = (x[..., None] - m) / scale
    cdf = K.cdf(x[..., None]) if K else a.sigmoid()
    pdf = K.log_prob(x[..., None]).exp() if K else a.sigmoid() * (-a).sigmoid() / scale
    F, f = ((logits.softmax(-1) * part).sum(-1) for part in (cdf, pdf))
    u, log_slope = g.forward(x, theta)
    base = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(base.cdf(u), F, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(base.log_prob(u) + log_slope, f.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g.inverse(u, theta), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["logistic", "normal"])
def test_tails_keep_their_digits(kernel, dtype):
    """A thousand scales out nothing is infinite, and the way back is found."""
    g = MixtureCDF(2, kernel)
    theta = torch.tensor([0.3, -0.2, -1.0, 1.0, -2.0, 0.5], dtype=dtype)[:, None]
    x = torch.tensor([-1000.0, -50.0, -3.0, 0.0, 4.0, 60.0, 1000.0], dtype=dtype).requires_grad_()
    u, log_slope = g.forward(x, theta)
    (slope,) = torch.autograd.grad(u.sum(), x)
    assert u.isfinite().all() and log_slope.isfinite().all() and (u.diff() > 0).all()
    # the log-density 1000 scales out is -10^6: float32 holds it to 0.1
    torch.testing.assert_close(slope.log(), log_slope, rtol=0, atol=2e-2 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(g.inverse(u, theta), x, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-5)


def test_newton_is_caught_where_a_mixture_is_flat():
    """Two narrow peaks far apart: between them the density is e^-1000, and at the middle Newton would leap away."""
    g = MixtureCDF(2, "normal")
    theta = torch.tensor([0.0, 0.0, -10.0, 10.0, -2.0, -2.0])[:, None]
    u = torch.linspace(-4, 4, 1001)
    x = g.inverse(u, theta)
    assert (g.forward(x, theta)[0] - u).abs().max() < 1e-9
    assert (x.diff() > 0).all() and (x[:500] < -9).all() and (x[501:] > 9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_from_logits_and_back(dtype):
    eps = torch.finfo(dtype).eps
    t = torch.linspace(-100, 100, 4001, dtype=dtype).requires_grad_()
    z, log_slope = normal_of_logit(t)
    assert (z.diff() > 0).all()
    assert ((logit_of_normal(z) - t).abs() <= 16 * eps * (1 + t.abs())).all()
    (slope,) = torch.autograd.grad(z.sum(), t)
    assert ((slope.log() - log_slope).abs() <= 256 * eps).all()
    inside = t.detach()[t.abs() < 5].double()
    expected = torch.special.ndtri(inside.sigmoid())
    assert (z[t.abs() < 5] - expected).abs().max() < 32 * eps


@pytest.mark.parametrize("g", list(MAPS))
def test_no_parameters_overflow(g):
    x = torch.tensor([[-50.0, 0.0, 50.0]], dtype=torch.float32)
    for size in (0, 30, 1000):
        theta = (size * normal(1, MAPS[g].parameters, 3)).float()
        u, log_slope = MAPS[g].forward(x, theta)
        assert u.isfinite().all() and log_slope.isfinite().all()
        assert MAPS[g].inverse(x, theta).isfinite().all()
