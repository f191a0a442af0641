"""WGAN-GP: the penalty against closed forms, the game's phases, samples."""

import pytest
import torch

from gencli.contract import Batch, DataSpec, Step
from gencli.models.gans.wgan_gp import WGANGP, gradient_penalty
from gencli.rng import Keys, SampleRng, seeded


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


POINTS = DataSpec(name="test", kind="points", shape=(2,))
IMAGES = DataSpec(name="test", kind="image", shape=(1, 2, 2), levels=17)


def build(spec=POINTS, **config):
    with seeded(0):
        return WGANGP(WGANGP.Config(**{"hidden": (16, 16), **config}), spec)


def step(phase="critic", repeat=0, number=0):
    return Step(number, 1, Keys(0).open(phase, number, repeat), torch.tensor(0.0), repeat)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_penalty_of_a_linear_critic_is_that_of_its_slope():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ w + 7, noise(8, 2), noise(8, 2, seed=1), torch.rand(8))
    assert penalty.item() == pytest.approx((5 - 1) ** 2, abs=1e-12)
    penalty.backward()
    torch.testing.assert_close(w.grad, 2 * 4 * w.detach() / 5, rtol=1e-12, atol=1e-12)


def test_the_penalty_of_a_quadratic_critic_is_taken_at_the_interpolates():
    A = noise(3, 3, seed=2)
    A = A + A.T
    real, fake, epsilon = noise(8, 3), noise(8, 3, seed=1), torch.rand(8)
    x_hat = torch.stack([e * r + (1 - e) * f for e, r, f in zip(epsilon, real, fake)])
    want = ((x_hat @ A).pow(2).sum(1).sqrt() - 1).pow(2).mean()  # grad of x A x / 2 is A x
    got = gradient_penalty(lambda x: 0.5 * (x @ A * x).sum(1), real, fake, epsilon)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    # epsilon is one number an image, not one a pixel
    images = gradient_penalty(
        lambda x: x.square().sum((1, 2, 3)) / 2, real.view(8, 1, 3, 1), fake.view(8, 1, 3, 1), epsilon
    )
    assert images.item() == pytest.approx((x_hat.norm(dim=1) - 1).pow(2).mean().item(), rel=1e-12)


def test_the_penalty_stays_in_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model = build()
    real, fake, epsilon = noise(8, 2), noise(8, 2, seed=1), torch.rand(8)
    want = gradient_penalty(model.critic, real, fake, epsilon)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient_penalty(model.critic, real, fake, epsilon)
        out = model.critic_loss(Batch(x=real, n=8), step())
    assert torch.equal(got, want) and out["loss"].dtype == torch.float32


@pytest.mark.parametrize("spec", [POINTS, IMAGES])
def test_the_critic_s_gradient_is_that_of_finite_differences_through_the_penalty(spec):
    model = build(spec, activation="tanh", penalty=10.0)
    x = noise(8, 2) if spec is POINTS else torch.randint(17, (8, 1, 2, 2))
    b = Batch(x=x, n=8)
    model.critic_loss(b, step())["loss"].backward()
    for name, p in model.D.named_parameters():
        if name == "4.bias":  # a constant of the critic changes nothing in eq. 3
            assert p.grad.abs().max() < 1e-14
            continue
        i = p.grad.flatten().abs().argmax()
        losses = []
        with torch.no_grad():
            flat = p.view(-1)
        for move in (1e-6, -2e-6):
            with torch.no_grad():
                flat[i] += move
            losses.append(model.critic_loss(b, step())["loss"].item())
        with torch.no_grad():
            flat[i] += 1e-6
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(p.grad.flatten()[i].item(), rel=1e-4), name


def test_the_losses_are_those_of_the_paper():
    model = build(penalty=0.3)
    b = Batch(x=noise(8, 2), n=8)
    out = model.critic_loss(b, step())
    s = step()
    fake = model.decode(s.rng.normal("z", (8, 2))).detach()
    w = model.critic(b.x).mean() - model.critic(fake).mean()
    gp = gradient_penalty(model.critic, b.x, fake, s.rng.uniform("epsilon", (8,)))
    assert out["wasserstein"].item() == pytest.approx(w.item(), abs=1e-12)
    assert out["loss"].item() == pytest.approx((0.3 * gp - w).item(), abs=1e-12)
    s = step("generator")
    want = -model.critic(model.decode(s.rng.normal("z", (8, 2)))).mean()
    assert model.generator_loss(Batch(n=8), step("generator"))["loss"].item() == pytest.approx(want.item(), abs=1e-12)


def test_each_phase_moves_its_own_player():
    model = build()
    critic, generator = model.phases()
    assert (critic.times(0), generator.times(0)) == (5, 1) and not critic.compile and generator.batch == {}
    assert critic.parameters is model.D and generator.parameters is model.G and model.averaged() is model.G
    critic.loss(Batch(x=noise(8, 2), n=8), step())["loss"].backward()
    assert all(p.grad is None for p in model.G.parameters())
    # in eq. 3 the critic's constants have no gradient: its last bias, and nothing else
    assert [n for n, p in model.D.named_parameters() if p.grad.abs().max() < 1e-14] == ["4.bias"]
    for p in model.D.parameters():
        p.grad = None
        p.requires_grad_(False)
    generator.loss(Batch(n=8), step("generator"))["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.G.parameters())
    assert all(p.grad is None for p in model.D.parameters())


def test_a_trained_critic_measures_the_distance_between_two_point_clouds():
    # G is constant at (0, 0) and the data is at (3, 4) -> the optimal critic has slope 1 and W1 = 5
    model = build(penalty=10.0)
    with torch.no_grad():
        for p in model.G.parameters():
            p.zero_()
        model.D[-1].weight.zero_()
    b = Batch(x=torch.tensor([[3.0, 4.0]]).expand(64, 2), n=64)
    optimizer = torch.optim.Adam(model.D.parameters(), 3e-3, betas=(0.5, 0.9))
    estimates = []
    for number in range(300):
        out = model.critic_loss(b, step(number=number))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        estimates.append(out["wasserstein"].item())
    assert estimates[0] == 0
    # lambda (g - 1)^2 - 5 g is least at g = 1 + 5 / (2 lambda): the soft constraint's known bias
    assert sum(estimates[-50:]) / 50 == pytest.approx(5 * 1.25, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("spec", [POINTS, IMAGES])
def test_sample_depends_on_its_row_alone(spec):
    model = build(spec)
    x = model.sample(SampleRng(0, range(20)))
    assert x.shape == (20, *spec.shape) and x.is_floating_point()
    torch.testing.assert_close(model.sample(SampleRng(0, [7, 3])), x[[7, 3]], rtol=1e-12, atol=1e-14)
    assert torch.equal(model.decode(model.prior(SampleRng(0, range(20)))), x)
    if spec is IMAGES:
        assert x.abs().max() <= 1


@torch.no_grad()
def test_points_are_not_squashed():
    model = build()
    model.G[-1].bias += 100
    assert model.sample(SampleRng(0, range(4))).min() > 50
