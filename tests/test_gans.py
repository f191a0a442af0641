"""The game: who moves when and against whom, the tricks inside it, what is refused, samples."""

import pytest
import torch
from torch import nn

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models import model_class
from gencli.nn import penalties, spectral_norm
from gencli.nn.gan_losses import discriminator_loss, generator_loss
from gencli.nn.gan_norms import ConditionalBatchNorm
from gencli.nn.norm import BatchNorm
from gencli.rng import Keys, SampleRng, seeded, using

GANS = ["gan", "dcgan", "improved-gan", "wgan", "wgan-gp", "sngan"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


POINTS = DataSpec(name="test", kind="points", shape=(2,), classes=("a", "b"))
IMAGES = DataSpec(name="test", kind="image", shape=(1, 8, 8), levels=17, classes=("a", "b", "c"))


def build(name, spec=POINTS, seed=0, **config):
    cls = model_class(name)
    small = {"hidden": (16, 16), "channels": 4, "latents": 3}
    with seeded(seed):
        return cls(cls.Config(**(small | config)), spec)


def step(phase="discriminator", number=0, repeat=0):
    return Step(number, 1, Keys(0).open(phase, number, repeat), torch.tensor(0.0), repeat)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(n=8, spec=POINTS):
    g = torch.Generator().manual_seed(3)
    x = noise(n, 2, seed=3) if spec is POINTS else torch.randint(17, (n, 1, 8, 8), generator=g)
    return Batch(x=x, label=torch.arange(n) % len(spec.classes), n=n)


def run(phase, b, number=0):
    """The phase's loss and what is after it, as the trainer calls them."""
    s = step(phase.name, number)
    with using(s):
        out = phase.loss(b, s)
    return out, s


# ---------------------------------------------------------------------------------------------- the moves


@pytest.mark.parametrize("name", GANS)
def test_each_player_moves_itself_alone(name):
    model = build(name, IMAGES)
    D, G = model.phases()
    assert (D.name, G.name) == ("discriminator", "generator")
    assert D.parameters is model.D and G.parameters is model.G and model.averaged() is model.G
    assert G.batch == {} and D.batch is None
    run(D, batch(spec=IMAGES))[0]["loss"].backward()
    assert all(p.grad is None for p in model.G.parameters())
    model.D.requires_grad_(False)
    run(G, Batch(n=8))[0]["loss"].backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.G.named_parameters())


def test_the_losses_are_those_of_the_outputs():
    for name in ("gan", "sngan", "wgan"):
        model = build(name, norm_D="none", norm_G="none")
        b, loss = batch(), model.config.loss
        out, _ = run(model.phases()[0], b)
        again = step()
        fake = model.decode(again.rng.normal("z", (8, 3)))
        real, fake = model.D(b.x), model.D(fake)
        assert out["loss"].item() == pytest.approx(discriminator_loss(loss, real, fake).item(), rel=1e-12)
        want = real.sigmoid() if name == "gan" else real
        assert out["real"].item() == pytest.approx(want.mean().item(), rel=1e-12)
        n = 8 * model.config.generator_batch
        again = step("generator")
        want = generator_loss(loss, model.D(model.decode(again.rng.normal("z", (n, 3)))))
        assert run(model.phases()[1], Batch(n=8))[0]["loss"].item() == pytest.approx(want.item(), rel=1e-12)
    assert build("sngan").config.generator_batch == 2


def test_the_uniform_prior_fills_minus_one_to_one():
    z = build("dcgan", IMAGES).prior(SampleRng(0, range(2000)))
    assert -1 <= z.min() < -0.99 and 0.99 < z.max() < 1 and z.mean().abs() < 0.02


def test_wgan_gp_has_the_loss_of_eq_3():
    model, b = build("wgan-gp", penalty=0.3, norm_G="none"), batch()
    out, _ = run(model.phases()[0], b)
    s = step()
    fake = model.decode(s.rng.normal("z", (8, 3))).detach()
    w = model.D(b.x).mean() - model.D(fake).mean()
    gp = penalties.gradient_penalty(model.D, b.x, fake, s.rng.uniform("epsilon", (8,)))
    assert out["penalty"].item() == pytest.approx(gp.item(), rel=1e-12)
    assert out["loss"].item() == pytest.approx((0.3 * gp - w).item(), rel=1e-12)
    assert not model.phases()[0].compile and build("gan").phases()[0].compile


def test_simultaneous_players_face_each_other_as_they_were():
    model = build("gan", updates="simultaneous", norm_D="none")
    G, D = model.phases()
    assert (G.name, D.name) == ("generator", "discriminator")
    out, s = run(G, Batch(n=8))
    shown = out["keep"]["fake"].detach()
    with torch.no_grad():
        G.after({"fake": shown}, s)
        for p in model.G.parameters():  # G has moved since
            p.add_(1)
    b = batch()
    found, s = run(D, b)
    want = discriminator_loss("non-saturating", model.D(b.x), model.D(shown))
    assert found["loss"].item() == pytest.approx(want.item(), rel=1e-12)
    D.after({}, s)
    assert model._shown is None  # nothing is left for the next step


def test_the_critic_of_wgan_moves_often_at_first_and_at_times():
    D, _ = build("wgan").phases()
    assert [D.times(t) for t in (0, 24, 25, 499, 500, 501, 1000)] == [100, 100, 5, 5, 100, 5, 100]
    assert build("wgan", first_steps=0).phases()[0].times(0) == 5
    assert build("sngan").phases()[0].times(7) == 5


def test_wgan_clips_after_the_critic_s_move_and_nothing_else():
    model = build("wgan", clip=0.02, norm_D="none")
    D, G = model.phases()
    before = [p.detach().clone() for p in model.G.parameters()]
    G.after({}, step("generator"))
    assert max(p.abs().max() for p in model.D.parameters()) > 0.02
    D.after({}, step())
    assert max(p.abs().max() for p in model.D.parameters()) == 0.02
    assert all(torch.equal(p, q) for p, q in zip(model.G.parameters(), before))


def test_the_spectral_norm_iterates_once_a_move_of_d():
    model = build("sngan", IMAGES)
    layer = next(m for m in model.D.modules() if isinstance(m, spectral_norm.SpectralNorm))
    D, G = model.phases()
    u = layer.u.clone()
    for phase, b in ((D, batch(spec=IMAGES)), (G, Batch(n=8))):
        run(phase, b)
    G.after({}, step("generator"))
    assert torch.equal(layer.u, u)
    with torch.no_grad():
        layer.weight.add_(0.3 * noise(*layer.weight.shape))
    want = [t.clone() for t in (layer.u, layer.weight.flatten(1))]
    D.after({}, step())
    v = nn.functional.normalize(want[1].T @ want[0], dim=0)
    torch.testing.assert_close(layer.u, nn.functional.normalize(want[1] @ v, dim=0), rtol=1e-12, atol=1e-14)


def test_the_slope_of_sngan_s_d_is_bounded_by_its_lipschitz_constant():
    plain, steep = build("sngan", norm_G="none"), build("sngan", norm_G="none", lipschitz=30)
    x, y = noise(200, 2), noise(200, 2, seed=1)
    torch.testing.assert_close(steep.D(x), 30 * plain.D(x), rtol=1e-12, atol=0)
    for model, K in ((plain, 1), (steep, 30)):
        spectral_norm.iterate(model.D, 200)
        assert ((model.D(x) - model.D(y)).abs() <= K * (x - y).norm(dim=1)).all()


def test_a_trained_critic_measures_the_distance_between_two_point_clouds():
    # G is constant at (0, 0) and the data is at (3, 4) -> the optimal critic has slope 1 and W1 = 5
    model = build("wgan-gp", penalty=10.0, norm_G="none")
    with torch.no_grad():
        for p in model.G.parameters():
            p.zero_()
        model.D.head.linear.weight.zero_()
    b = Batch(x=torch.tensor([[3.0, 4.0]]).expand(64, 2), n=64)
    optimizer = torch.optim.Adam(model.D.parameters(), 3e-3, betas=(0.5, 0.9))
    estimates = []
    for number in range(300):
        out, _ = run(model.phases()[0], b, number)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        estimates.append((out["real"] - out["fake"]).item())
    assert estimates[0] == 0
    # lambda (g - 1)^2 - 5 g is least at g = 1 + 5 / (2 lambda): the soft constraint's known bias
    assert sum(estimates[-50:]) / 50 == pytest.approx(5 * 1.25, rel=0.02)


def test_the_best_discriminator_of_two_known_gaussians_is_approached(monkeypatch):
    """p = N((1, 0), I), p_G = N((-1, 0), I): D* = p / (p + p_G), so d* = log p / p_G = 2 x_1 (Goodfellow, prop. 1)."""
    model = build("gan", hidden=(32, 32), latents=2)
    monkeypatch.setattr(model, "decode", lambda z, y: z - torch.tensor([1.0, 0.0]))
    optimizer = torch.optim.Adam(model.D.parameters(), 5e-3)
    losses = []
    for number in range(300):
        b = Batch(x=noise(256, 2, seed=number) + torch.tensor([1.0, 0.0]), n=256)
        out, _ = run(model.phases()[0], b, number)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    x = noise(2000, 2, seed=9999)  # where both have mass
    with torch.no_grad():
        D, best = model.D(x).sigmoid(), (2 * x[:, 0]).sigmoid()
    assert (D - best).abs().mean() < 0.03 and (D - best).abs().max() < 0.3
    # and its loss is log 4 - 2 JSD (theorem 1), here E softplus(-2 x_1) for data and as much for samples
    value = 2 * torch.nn.functional.softplus(-2 * (noise(200_000, seed=1) + 1)).mean().item()
    assert sum(losses[-100:]) / 100 == pytest.approx(value, rel=0.05)


# ---------------------------------------------------------------------------------------------- the tricks


def test_feature_matching_is_the_distance_of_mean_features():
    model = build("gan", tricks={"feature_matching": True})
    _, G = model.phases()
    assert G.batch is None
    b = batch()
    s = step("generator")
    fake = model.decode(s.rng.normal("z", (8, 3)))
    want = (model.D.body(b.x).mean(0) - model.D.body(fake).mean(0)).square().sum()
    assert run(G, b)[0]["loss"].item() == pytest.approx(want.item(), rel=1e-12)


def test_smoothing_reaches_the_loss_of_d():
    b = batch()
    plain, smooth = (run(build("gan", tricks={"smoothing": t}).phases()[0], b)[0]["loss"].item() for t in (0.0, 0.1))
    model = build("gan")
    d = model.D(b.x)
    assert smooth - plain == pytest.approx(0.1 * d.mean().item(), rel=1e-9)  # 0.1 (softplus(d) - softplus(-d))


def test_minibatch_discrimination_looks_at_data_and_samples_apart():
    model = build("gan", tricks={"minibatch_kernels": 3})
    b, s = batch(), step()
    fake = model.decode(s.rng.normal("z", (8, 3)))
    with using(s):
        want = discriminator_loss("non-saturating", model.D(b.x), model.D(fake))
        assert model.D.head.linear.in_features == 16 + 3
    assert run(model.phases()[0], b)[0]["loss"].item() == pytest.approx(want.item(), rel=1e-12)


def test_historical_averaging_is_the_running_mean():
    model = build("gan", tricks={"historical_averaging": 0.5})
    model.prepare(batch(), step("prepare"))
    D, G = model.phases()
    past = {"D": [model._theta("D")], "G": [model._theta("G")]}
    for t in range(1, 5):
        for phase, player, b in ((D, "D", batch()), (G, "G", Batch(n=8))):
            out, s = run(phase, b, t)
            mean = torch.stack(past[player]).mean(0)
            torch.testing.assert_close(getattr(model, f"history_{player}"), mean, rtol=1e-12, atol=1e-14)
            extra = 0.5 * (model._theta(player) - mean).square().sum().item()
            plain = run(build_like(model, phase.name), b, t)[0]["loss"].item()
            assert out["loss"].item() == pytest.approx(plain + extra, rel=1e-10)
            with torch.no_grad():
                for p in phase.parameters.parameters():
                    p.add_(0.1 * noise(*p.shape, seed=t))
            phase.after({}, s)
            past[player].append(model._theta(player))
    assert model.updates_D == model.updates_G == 5


def test_historical_averaging_in_any_layout():
    """Weights with their channels last have the same history."""
    plain, other = (build("dcgan", IMAGES, tricks={"historical_averaging": 0.5}) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    other.to(memory_format=torch.channels_last)
    for model in (plain, other):
        model.prepare(batch(spec=IMAGES), step("prepare"))
    for phase, same in zip(plain.phases(), other.phases()):
        b = batch(spec=IMAGES) if phase.batch is None else Batch(n=8)
        one, two = (run(p, b, 1)[0]["loss"].item() for p in (phase, same))
        assert one == pytest.approx(two, rel=1e-6)
    torch.testing.assert_close(plain.history_D, other.history_D)


def build_like(model, phase):
    """The same weights without the trick."""
    other = build("gan")
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k[0] in "DG"})
    return {p.name: p for p in other.phases()}[phase]


def test_the_reference_batch_is_drawn_once_and_kept():
    model = build("gan", IMAGES, norm_G="batch", tricks={"virtual_batch_norm": 6}, conditional=True)
    assert model.reference.shape == (6, 3 + 3) and not model.reference.any()
    model.prepare(batch(spec=IMAGES), step("prepare"))
    torch.testing.assert_close(model.reference[:, :3], step("prepare").rng.normal("z", (6, 3)))
    assert torch.equal(model.reference[:, 3:], torch.eye(3)[[0, 1, 2, 0, 1, 2]])
    assert "reference" in model.state_dict() and not [m for m in model.modules() if isinstance(m, BatchNorm)]
    z, y = noise(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model.decode(z[2:3], y[2:3])[0], model.decode(z, y)[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [POINTS, IMAGES])
@pytest.mark.parametrize("network", ["mlp", "dcgan", "resnet"])
def test_both_players_of_every_network_are_told_the_class(network, spec):
    if spec is POINTS and network != "mlp":
        pytest.skip("image networks")
    for norm in ("batch", "none"):
        model = build("gan", spec, network=network, conditional=True, norm_G=norm, norm_D="spectral")
        b = batch(n=8, spec=spec)
        assert model.phases()[1].batch is None  # G, too, draws for the classes of rows
        for phase in model.phases():
            run(phase, b)[0]["loss"].backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in phase.parameters.parameters())
        assert model.D.head.V.weight.shape[0] == len(spec.classes)
        assert any(isinstance(m, ConditionalBatchNorm) for m in model.G.modules()) == (norm == "batch")


REFUSED = [
    ("gan", {"tricks": {"smoothing": 0.1}, "loss": "hinge"}, None),
    ("wgan", {"tricks": {"smoothing": 0.1}}, "the wasserstein loss has no target on real data to smooth"),
    ("sngan", {"tricks": {"smoothing": 0.1}}, "the hinge loss has no target"),
    ("dcgan", {"penalty": 1.0}, "norm_D=batch couples a batch"),
    ("wgan-gp", {"tricks": {"minibatch_kernels": 4}}, "tricks.minibatch_kernels couples a batch"),
    ("wgan-gp", {"norm_D": "batch"}, None),
    ("sngan", {"penalty": 1.0, "norm_D": "batch"}, "norm_D=batch couples a batch"),
    ("gan", {"penalty": 1.0, "tricks": {"minibatch_kernels": 4}}, "tricks.minibatch_kernels couples a batch"),
    ("wgan", {"norm_D": "spectral"}, "would divide the weights that clipping bounds"),
    ("wgan", {"penalty": 10.0, "norm_D": "none"}, "a slope that clipping holds already"),
    ("wgan", {"loss": "hinge"}, None),
    ("dcgan", {"tricks": {"feature_matching": True}, "loss": "saturating"}, "takes the place of G's loss"),
    ("gan", {"updates": "simultaneous", "critic_steps": 2}, "D and G move once each"),
    ("gan", {"updates": "simultaneous", "generator_batch": 2}, "D and G move once each"),
    ("gan", {"tricks": {"virtual_batch_norm": 8}, "norm_G": "none"}, "needs model.norm_G=batch"),
    ("gan", {"tricks": {"virtual_batch_norm": 1}, "norm_G": "batch"}, "one row has no variance"),
    ("sngan", {"lipschitz": 2.0, "norm_D": "none"}, "model.lipschitz bounds spectrally normalised layers"),
    ("sngan", {"updates": "simultaneous"}, "D and G move once each"),
    ("dcgan", {"network": "resnet"}, "is for images, and test is points: use mlp"),
]


@pytest.mark.parametrize(("name", "config", "why"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(name, config, why):
    if why is None:  # not even a value of that key
        with pytest.raises(ValueError):
            build(name, **config)
        return
    with pytest.raises(UsageError, match=why):
        build(name, **config)


def test_data_that_cannot_be_made_is_refused():
    with pytest.raises(UsageError, match="sound is audio"):
        build("gan", DataSpec(name="sound", kind="audio", shape=(1, 99), levels=256))
    with pytest.raises(UsageError, match="one has one"):
        build("gan", DataSpec(name="one", kind="points", shape=(2,), classes=("a",)), conditional=True)
    with pytest.raises(UsageError, match="none has none"):
        build("gan", DataSpec(name="none", kind="points", shape=(2,)), conditional=True)
    with pytest.raises(UsageError, match="25x25"):
        build("dcgan", DataSpec(name="odd", kind="image", shape=(1, 25, 25), levels=256))


# ---------------------------------------------------------------------------------------------- samples


@torch.no_grad()
@pytest.mark.parametrize("spec", [POINTS, IMAGES])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", GANS)
def test_a_sample_depends_on_its_row_alone(name, conditional, spec):
    model = build(name, spec, conditional=conditional).eval()
    model.prepare(batch(spec=spec), step("prepare"))
    for layer in model.modules():
        if isinstance(layer, ConditionalBatchNorm):  # all classes begin alike
            layer.bias += noise(*layer.bias.shape)
    y = torch.arange(20) % 2 if conditional else None
    x = model.sample(SampleRng(0, range(20)), y)
    assert x.shape == (20, *spec.shape) and x.is_floating_point()
    other = model.sample(SampleRng(0, [7, 3]), None if y is None else y[[7, 3]])
    torch.testing.assert_close(other, x[[7, 3]], rtol=1e-10, atol=1e-12)
    assert torch.equal(model.decode(model.prior(SampleRng(0, range(20))), y), x)
    if spec is IMAGES:
        assert x.abs().max() <= 1
    if conditional:
        assert not torch.equal(model.sample(SampleRng(0, range(20)), 1 - y), x)
        with pytest.raises(UsageError, match="needs labels"):
            model.decode(x.flatten(1)[:, :3])
    near = model.sample(SampleRng(0, range(20)), y, truncation=1e-9)
    assert (near[0] - near[2]).abs().max() < 1e-6  # all of z is 0, and these two are of one class


@torch.no_grad()
def test_points_are_not_squashed():
    model = build("wgan-gp").eval()
    model.G[-2].bias += 100
    assert model.sample(SampleRng(0, range(4))).min() > 50
