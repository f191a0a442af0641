"""FFJORD: the solvers, the trace and the density, each against a closed form, autograd or a sum over a grid."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gencli.console import Diverged, UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.flows.ffjord import FFJORD, Dynamics
from gencli.nn.ode import solve
from gencli.rng import Keys, SampleRng


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def build(shape=(2,), levels=None, scale=1.0, kind=None, **config) -> FFJORD:
    """A model in evaluation mode whose weights, ``scale / sqrt(inputs)`` in size, are far from their start."""
    kind = kind or ("points" if len(shape) == 1 else "image")
    spec = DataSpec(name="test", kind=kind, shape=shape, levels=levels)
    model, g = FFJORD(FFJORD.Config(**{"hidden": (16, 16), **config}), spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            size = scale / math.sqrt(p[0].numel()) if p.dim() in (2, 4) else 1.0
            p.copy_(size * torch.randn(p.shape, generator=g))
    return model.eval()


def linear(A: Tensor, **config) -> FFJORD:
    """dz/dt = A z."""
    model = build((len(A),), hidden=(), **config)
    (layer,) = model.dynamics.layers
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        layer.layer.weight.copy_(A)
        layer.c.fill_(60.0)  # its sigmoid is 1
    return model


def step(seed: int = 0) -> Step:
    return Step(0, 1, Keys(seed).open("test"), torch.zeros(()))


def rng(n: int, seed: int = 0) -> SampleRng:
    return SampleRng(seed, range(n), "test")


A = torch.tensor([[0.3, -1.2, 0.1], [0.9, -0.5, 0.4], [0.2, 0.3, -0.6]], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- solvers


def growth(t: float | Tensor, y: Tensor) -> Tensor:  # y(t) = y(0) exp(t + sin 3t)
    return y * (1 + 3 * torch.as_tensor(3 * t).cos())


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.5)])
def test_the_solvers_find_the_solution_in_both_directions(start: float, end: float):
    y = torch.randn(5, 3)
    truth = y * math.exp(end + math.sin(3 * end) - start - math.sin(3 * start))
    fine, count = solve(growth, y, start, end, "rk4", steps=200)
    assert count == 800
    torch.testing.assert_close(fine, truth, rtol=1e-7, atol=0)
    for tolerance in (1e-4, 1e-9):
        found, count = solve(growth, y, start, end, "dopri5", tolerance=tolerance)
        assert 10 < count < 1000
        torch.testing.assert_close(found, truth, rtol=20 * tolerance, atol=20 * tolerance)


def test_rk4_is_of_order_4():
    y = torch.ones(1, 1)
    errors = [(solve(growth, y, 0, 1, "rk4", steps=n)[0] - math.exp(1 + math.sin(3))).abs().item() for n in (20, 40)]
    assert 14 < errors[0] / errors[1] < 18


def test_one_row_that_is_hard_makes_the_steps_short_for_all():
    def field(t: float | Tensor, y: Tensor) -> Tensor:
        return y[:, :1] * torch.as_tensor(40 * t).cos() * torch.tensor([[0.0, 1.0]])

    easy = torch.tensor([[0.0, 1.0]]).expand(200, 2)
    hard = torch.tensor([[5.0, 1.0]])
    few, many = (solve(field, y, 0, 1, "dopri5", tolerance=1e-6)[1] for y in (easy, torch.cat([easy, hard])))
    assert many > 2 * few
    y, _ = solve(field, torch.cat([easy, hard]), 0, 1, "dopri5", tolerance=1e-6)
    assert y[-1, 1].item() == pytest.approx(1 + 5 * math.sin(40) / 40, abs=1e-5)


def test_numbers_that_are_not_judged_do_not_shorten_the_steps():
    def field(t: float | Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[:, 0], torch.as_tensor(60 * t).cos() * 10 + 0 * y[:, 0]], 1)

    y = torch.ones(4, 2)
    assert solve(field, y, 0, 1, "dopri5", judged=1)[1] < solve(field, y, 0, 1, "dopri5")[1] / 2


def test_dynamics_that_explode_are_refused_in_one_line():
    with pytest.raises(Diverged, match="dopri5 cannot follow") as caught:
        solve(lambda t, y: y**2, torch.full((1, 1), 2.0), 0, 1, "dopri5")  # infinite at t = 1/2
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- dynamics


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_tangents_are_autograds(shape: tuple[int, ...], activation: str):
    model = build(shape, None, 2.0, activation=activation, hidden=(6, 5))
    x, t = torch.randn(4, *shape), 0.37
    D = x[0].numel()
    f, Jv = model.dynamics(t, x, model.units(x))
    assert torch.equal(f, model.dynamics(t, x)[0])
    J = Jv.flatten(2).permute(1, 2, 0)  # (n, outputs, inputs)
    for i in range(4):
        whole = torch.autograd.functional.jacobian(lambda y: model.dynamics(t, y[None])[0][0], x[i]).view(D, D)
        torch.testing.assert_close(J[i], whole, rtol=1e-10, atol=1e-12)
    e = torch.randn(1, *x.shape)
    _, Je = model.dynamics(t, x, e)
    torch.testing.assert_close(Je[0].flatten(1), torch.einsum("nij,nj->ni", J, e[0].flatten(1)))


def test_the_dynamics_change_with_time():
    model, x = build(), torch.randn(3, 2)
    assert (model.dynamics(0.1, x)[0] - model.dynamics(0.9, x)[0]).abs().min() > 1e-3


def test_a_layer_is_the_papers_concatsquash():
    layer = Dynamics((3, 4), "tanh", False).layers[0]
    z, t = torch.randn(5, 3), 0.3
    with torch.no_grad():
        layer.h.normal_(), layer.c.normal_()
    expected = layer.layer(z) * torch.sigmoid(layer.g * t + layer.c) + layer.h * t
    torch.testing.assert_close(layer(t, z, None)[0], expected)


# ---------------------------------------------------------------------------------------------- the flow


@pytest.mark.parametrize(("evaluation", "atol"), [("rk4", 1e-7), ("dopri5", 1e-8)])
def test_linear_dynamics_are_solved_exactly(evaluation: str, atol: float):
    model, x = linear(A, evaluation=evaluation, steps=40, tolerance=1e-10), torch.randn(7, 3)
    z, log_det = model.f(x)
    torch.testing.assert_close(z, x @ torch.linalg.matrix_exp(-A).T, rtol=0, atol=atol)
    torch.testing.assert_close(log_det, -A.trace().expand(7), rtol=0, atol=atol)
    torch.testing.assert_close(model.f_inverse(z), x, rtol=0, atol=atol)
    flow = torch.linalg.matrix_exp(A)
    p = torch.distributions.MultivariateNormal(torch.zeros(3), flow @ flow.T)
    torch.testing.assert_close(model.log_prob(x, rng(7)), p.log_prob(x), rtol=0, atol=10 * atol)


@pytest.mark.parametrize("shape", [(2,), (5,), (1, 2, 3)])
def test_the_log_determinant_is_that_of_the_map(shape: tuple[int, ...]):
    model, x = build(shape, None, 2.0, tolerance=1e-10), torch.randn(3, *shape)
    z, log_det = model.f(x)
    for i in range(3):
        J = torch.autograd.functional.jacobian(lambda y: model.f(y[None])[0][0], x[i]).view(len(z[i]), -1)
        assert torch.linalg.slogdet(J)[1].item() == pytest.approx(log_det[i].item(), abs=1e-7)
    assert log_det.abs().max() > 0.04


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_the_inverse_is_one_to_the_tolerance(shape: tuple[int, ...]):
    for dtype, tolerance, atol in ((torch.float64, 1e-10, 1e-8), (torch.float32, 1e-6, 1e-4)):
        torch.set_default_dtype(dtype)
        model, x = build(shape, None, 3.0, tolerance=tolerance).to(dtype), torch.randn(64, *shape)
        with torch.no_grad():
            z = model.encode(x, rng(64))
            assert (z - x.flatten(1)).abs().max() > 0.5
            assert (model.f_inverse(z) - x).abs().max() < atol
            torch.testing.assert_close(model.f(x[:4])[0], z[:4], rtol=0, atol=atol)


def test_a_smaller_tolerance_changes_little():
    x, found = torch.randn(100, 2), []
    for tolerance in (1e-5, 5e-6, 1e-11):
        with torch.no_grad():
            found.append(build(scale=3.0, tolerance=tolerance).log_prob(x, rng(100)))
    assert (found[0] - found[1]).abs().max() < 2e-4 and (found[0] - found[2]).abs().max() < 2e-4


@pytest.mark.parametrize("evaluation", ["rk4", "dopri5"])
def test_the_density_integrates_to_one(evaluation: str):
    model = build(scale=1.5, evaluation=evaluation, steps=16)
    side = torch.linspace(-12, 12, 241)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_p = torch.cat([model.log_prob(part, rng(len(part))) for part in grid.split(20000)])
    plain = -0.5 * grid.square().sum(1) - math.log(2 * math.pi)
    assert (log_p - plain)[plain > -4].abs().max() > 0.5  # it is not the base density
    assert (log_p.exp().sum() * 0.01).item() == pytest.approx(1, abs=1e-4)


def test_rk4_gives_each_row_what_it_gives_it_alone():
    model, x = build((3,), scale=3.0, evaluation="rk4"), torch.randn(50, 3)
    z, log_det = model.f(x)
    for i in (0, 17, 49):
        one, log_one = model.f(x[i : i + 1])
        torch.testing.assert_close(one[0], z[i], rtol=0, atol=1e-13)
        torch.testing.assert_close(log_one[0], log_det[i], rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------- the estimated trace


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_hutchinsons_estimate_has_no_bias(noise: str):
    n = 20000
    exact = build((10,), scale=2.0, evaluation="rk4", steps=4)
    rough = build((10,), scale=2.0, evaluation="rk4", steps=4, trace="hutchinson", noise=noise)
    x = torch.randn(1, 10).expand(n, 10)
    with torch.no_grad():
        truth, estimates = exact.log_prob(x[:1], rng(1)).item(), rough.log_prob(x, step().rng)
    error = estimates.std().item() / math.sqrt(n)
    assert estimates.std() > 0.05 and abs(estimates.mean().item() - truth) < 4 * error
    assert rough.likelihood == "estimate" and exact.likelihood == "density"


def test_the_noise_is_as_it_is_called():
    x = torch.zeros(4000, 10)
    for noise in ("gaussian", "rademacher"):
        e = build((10,), trace="hutchinson", noise=noise).tangents(x, step().rng)
        assert e.shape == (1, 4000, 10)
        torch.testing.assert_close(e[0].T @ e[0] / 4000, torch.eye(10), rtol=0, atol=0.08)
        assert (e.unique().tolist() == [-1, 1]) == (noise == "rademacher")


def test_one_noise_serves_a_whole_solve():
    model, x = build((10,), scale=3.0, trace="hutchinson", tolerance=1e-6), torch.randn(20, 10)
    model.config = model.config.model_copy(update={"solver": "dopri5"})
    asked: list[Tensor] = []
    tangents: Callable[..., Tensor] = model.tangents
    model.tangents = lambda *args: asked.append(tangents(*args)) or asked[-1]
    with torch.no_grad():
        first, y, evaluations = model._log_prob(x, rng(20))
        again, _, _ = model._log_prob(x, rng(20))
        other, _, _ = model._log_prob(x, rng(20, seed=1))
        exact = build((10,), scale=3.0, tolerance=1e-6)._log_prob(x, rng(20))
    assert len(asked) == 3 and torch.equal(asked[0], asked[1])
    assert torch.equal(first, again) and (first - other).abs().min() > 0
    assert evaluations < 2 * exact[2] < 400  # noise drawn anew would ask for thousands
    assert y.shape == (20, 11)


def test_low_dimensions_are_evaluated_exactly():
    rough, exact = (build(trace=trace) for trace in ("hutchinson", "exact"))
    x = torch.randn(9, 2)
    assert torch.equal(rough.log_prob(x, rng(9)), exact.log_prob(x, rng(9)))
    assert rough.likelihood == "density"
    rough.train(), exact.train()
    assert (rough.log_prob(x, rng(9)) - exact.log_prob(x, rng(9))).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_likelihood_and_the_penalties_are_integrals():
    """Against Euler's method in a thousand steps with autograd's Jacobian, in the middle of each step."""
    model = build((3,), scale=2.0, steps=8, kinetic=0.3, jacobian=0.7).train()
    x, N = torch.randn(4, 3), 1000
    out = model.loss(Batch(x=x), step())
    z, kinetic, frobenius, trace = x.clone(), 0.0, 0.0, torch.zeros(4)
    for i in range(N):
        t = 1 - (i + 0.5) / N
        with torch.no_grad():
            z_mid = z - model.dynamics(t + 0.25 / N, z)[0] / (2 * N)
            v = model.dynamics(t, z_mid)[0]
        J = torch.func.vmap(torch.func.jacrev(lambda y, t=t: model.dynamics(t, y[None])[0][0]))(z_mid)
        kinetic += v.square().sum(1).mean() / N
        frobenius += J.square().sum((1, 2)).mean() / N
        trace -= J.diagonal(dim1=1, dim2=2).sum(1) / N
        z = z - v / N
    log_p = -0.5 * z.square().sum(1) - 1.5 * math.log(2 * math.pi) + trace
    assert out["nats_per_dim"].item() == pytest.approx(-log_p.mean().item() / 3, rel=1e-4)
    assert out["kinetic"].item() == pytest.approx(kinetic.item() / 3, rel=1e-4)
    assert out["jacobian"].item() == pytest.approx(frobenius.item() / 3, rel=1e-4)
    total = out["nats_per_dim"] + 0.3 * out["kinetic"] + 0.7 * out["jacobian"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-12)
    assert out["evaluations"] == 32
    plain = build((3,), scale=2.0, steps=8).train().loss(Batch(x=x), step())
    assert plain["loss"].item() == pytest.approx(out["nats_per_dim"].item(), rel=1e-12)
    assert set(plain) == {"loss", "evaluations"}


def test_the_estimated_frobenius_norm_has_no_bias():
    exact, rough = (
        build((4,), scale=2.0, steps=3, jacobian=1.0, trace=trace, noise="gaussian").train()
        for trace in ("exact", "hutchinson")
    )
    x, n = torch.randn(1, 4), 20000
    with torch.no_grad():
        truth = exact.loss(Batch(x=x), step())["jacobian"].item()
        v = rough.tangents(x.expand(n, 4), step().rng)
        found = -rough.integrate(x.expand(n, 4), 1.0, 0.0, v, True)[0][:, -1] / 4
    assert abs(found.mean().item() - truth) < 4 * found.std().item() / math.sqrt(n)
    assert abs(found.mean().item() / truth - 1) < 0.05


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_training_differentiates_the_solution(solver: str):
    """The gradient of the loss against finite differences of it."""
    model = build(scale=2.0, solver=solver, kinetic=0.1, tolerance=1e-10).train()
    x = torch.randn(6, 2)
    loss = model.loss(Batch(x=x), step())["loss"]
    p = model.dynamics.layers[1].layer.weight
    (gradient,) = torch.autograd.grad(loss, p)
    with torch.no_grad():
        for i, j in ((0, 0), (5, 3)):
            values = []
            for d in (1e-5, -2e-5):
                p[i, j] += d
                values.append(model.loss(Batch(x=x), step())["loss"].item())
            p[i, j] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[i, j].item(), rel=1e-4, abs=1e-8)


def test_training_learns_a_density():
    torch.set_default_dtype(torch.float32)
    model = build((1,), steps=4, hidden=(16, 16)).train()
    optimizer, keys = torch.optim.Adam(model.parameters(), 1e-2), Keys(0)
    g = torch.Generator().manual_seed(0)

    def data(n: int) -> Tensor:  # half of it at -2, half at 2, sd 1/2
        return (torch.randint(2, (n, 1), generator=g) * 4 - 2) + 0.5 * torch.randn(n, 1, generator=g)

    for number in range(150):
        s = Step(number, 150, keys.open("model", number), torch.zeros(()))
        model.loss(Batch(x=data(128)), s)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    x = data(4000)
    model.eval()
    with torch.no_grad():
        nats = -model.log_prob(x, rng(4000)).mean().item()
    entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.25)  # the two hardly overlap
    assert entropy - 0.05 < nats < entropy + 0.1


# ---------------------------------------------------------------------------------------------- what it is for


def test_images_have_a_bound_an_estimate_of_it_or_a_density():
    kinds = {
        ("exact", "uniform"): "lower bound",
        ("hutchinson", "uniform"): "estimate",
        ("exact", "none"): "density",
        ("hutchinson", "none"): "density",
    }
    for (trace, dequantization), kind in kinds.items():
        model = build((1, 4, 4), 17, trace=trace, dequantization=dequantization, hidden=(4,), logit=0.05)
        assert model.likelihood == kind
        out = model.train().loss(Batch(x=torch.randint(17, (5, 1, 4, 4))), step())
        assert ("bits_per_dim" in out) == (kind != "density")
    x = model.eval().sample(rng(3))
    assert x.shape == (3, 1, 4, 4) and x.min() >= 0 and x.max() <= 16


def test_what_it_cannot_model_is_refused():
    with pytest.raises(UsageError, match="images and points"):
        build((8,), 256, kind="audio")
