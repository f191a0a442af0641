"""Glow: W is what its factors say, priors are whitened, classes and temperature act, samples are finite."""

import pytest
import torch

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.data import load
from gencli.models.flows.glow import Glow, Invertible1x1
from gencli.nn.bijections import ActNorm
from gencli.rng import Keys, SampleRng, seeded, using
from tests.flows import IMAGE, assert_a_flow, build, log_det_of_jacobian, normal
from tests.tiny import session, tiny

SMALL = {"scales": 2, "depth": 2, "width": 8}
LABELS = torch.tensor([0, 1, 0])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("scales", [1, 2])
def test_it_is_a_flow(float64, scales, conditional):
    config = SMALL | {"scales": scales, "conditional": conditional, "logit": 0.05}
    assert_a_flow(build(Glow, IMAGE, **config), labels=LABELS if conditional else None)


def test_w_is_its_factors_and_starts_as_a_rotation(float64):
    with seeded(0):
        layer = Invertible1x1(6)
    W = layer.W()
    torch.testing.assert_close(W @ W.T, torch.eye(6))
    assert (W - torch.eye(6)).abs().max() > 0.1
    assert {name for name, _ in layer.named_buffers()} == {"P", "sign"}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p += 0.3 * normal(*p.shape, key=name)
    sign, log_abs = torch.linalg.slogdet(layer.W())
    torch.testing.assert_close(log_abs, layer.log_diagonal.sum())
    assert sign == torch.linalg.det(layer.P) * layer.sign.prod()


def test_one_product_is_actnorm_and_then_w_at_every_pixel(float64):
    with seeded(0):
        layer = Invertible1x1(6)
    x = 2 * normal(4, 6, 3, 5) + 1
    layer.fit(x)
    with torch.no_grad():
        layer.log_diagonal += 0.2
        y, log_det = layer(x)
        by_hand = torch.einsum("ij,njhw->nihw", layer.W(), ActNorm.forward(layer, x)[0])
    torch.testing.assert_close(y, by_hand)
    torch.testing.assert_close(log_det[:1], log_det_of_jacobian(lambda v, i: layer(v)[0], x[:1]))
    torch.testing.assert_close(layer.inverse(y), x)


def test_the_first_batch_sets_every_actnorm(float64):
    with seeded(0):
        flow = Glow(Glow.Config(**SMALL), IMAGE)
    x = torch.randint(8, (64, *IMAGE.shape), generator=torch.Generator().manual_seed(0))
    s = Step(0, 1, Keys(0).open("prepare", 0, 0), torch.zeros(()))
    before = flow.to_real(x, Keys(0).open("prepare", 0, 0))[0]
    with using(s):
        flow.prepare(Batch(x=x, n=64), s)
    seen = []
    layers = [m for m in flow.modules() if isinstance(m, ActNorm)]
    assert len(layers) == 4
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(ActNorm.forward(m, *args)[0]))
    flow.eval().f(before)
    for y in seen:
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), rtol=0, atol=1e-9)
        torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(y.shape[1]))


def test_the_last_prior_is_of_the_class(float64):
    """log p(x|c) - log p(x|c') is that of two Gaussians over the last scale's latents."""
    flow = build(Glow, IMAGE, conditional=True, **SMALL)
    x = torch.randint(8, (3, *IMAGE.shape), generator=torch.Generator().manual_seed(0))
    found = [flow.log_prob(x, SampleRng(0, range(3)), torch.full((3,), c)) for c in (0, 1)]
    z = flow.flow(flow.to_real(x, SampleRng(0, range(3)))[0])[0]
    D = torch.Size(flow.top_shape).numel()
    expected = []
    for c in (0, 1):
        mu, s = (flow.top + flow.of_class.weight[:, c]).repeat_interleave(D // flow.top_shape[0]).chunk(2)
        normal_c = torch.distributions.Normal(mu, (2 * torch.tanh(s / 2)).exp())
        expected.append(normal_c.log_prob(z[:, -D:]).sum(1))
    torch.testing.assert_close(found[1] - found[0], expected[1] - expected[0])
    assert (found[1] - found[0]).abs().min() > 1e-3


def test_temperature_acts_on_every_scale_s_noise(float64):
    flow = build(Glow, IMAGE, **SMALL)
    z = flow.prior(SampleRng(0, range(4)))
    x = flow.sample(SampleRng(0, range(4)), temperature=0.7)
    assert torch.equal(x, flow.from_real(flow.f_inverse(0.7 * z)).floor().clamp_max(7).long())
    cold = flow.sample(SampleRng(0, range(4)), temperature=0.0)
    assert (cold == cold[:1]).all()


def test_samples_stay_finite_whatever_the_networks_say():
    with seeded(0):
        flow = Glow(Glow.Config(**SMALL), IMAGE).eval()
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if name.endswith(("net.5.weight", "net.5.bias")) or "priors" in name:
                p.copy_(100 * normal(*p.shape, key=name))
        z = flow.prior(SampleRng(0, range(50)))
        x = flow.f_inverse(z)
    assert x.isfinite().all()


def test_determinants_are_float32_in_bf16():
    flow = build(Glow, IMAGE, **SMALL)
    x = normal(4, *IMAGE.shape)
    with torch.no_grad():
        z, log_det = flow.f(x)
        with torch.autocast("cpu", torch.bfloat16):
            z_16, log_det_16 = flow.f(x)
            assert (flow.f_inverse(z_16) - x).abs().max() < 0.05
    assert z_16.dtype == log_det_16.dtype == torch.float32
    torch.testing.assert_close(log_det_16, log_det, rtol=0, atol=0.1)
    assert not torch.equal(z_16, z)


def test_trained_weights_invert():
    with session(tiny("glow", "train.steps=40", "model.dropout=0.0")) as made:
        for _ in range(40):
            made.trainer.step()
        with made.trainer.evaluating() as model, torch.no_grad():
            x = load("digits", "val").rows(torch.arange(20))["x"]
            y, _ = model.to_real(x, SampleRng(0, range(20)))
            assert (model.f_inverse(model.f(y)[0]) - y).abs().max() <= 1e-5 * y.abs().max()
            model.double()
            y = y.double()
            assert (model.f_inverse(model.f(y)[0]) - y).abs().max() <= 1e-10
            model.float()


@pytest.mark.parametrize(
    ("spec", "config", "says"),
    [
        (("image", (1, 28, 28)), {"scales": 3}, "28 x 28: 3 squeezes need sides divisible by 8, and 2 fit "),
        (("points", (2,)), {}, "glow is for images, and t is points: try realnvp"),
        (("image", (1, 8, 8)), {"conditional": True}, "needs classes, and t has none"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(spec, config, says):
    kind, shape = spec
    with pytest.raises(UsageError, match=says):
        Glow(Glow.Config(**config), DataSpec(name="t", kind=kind, shape=shape, levels=None if kind == "points" else 8))
