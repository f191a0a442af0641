"""Parts of GANs against closed forms, finite differences, singular values and loops written from the papers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import DataSpec, Step
from gencli.nn import grey, penalties, spectral_norm
from gencli.nn.gan import truncated
from gencli.nn.gan_losses import discriminator_loss, generator_loss, output
from gencli.nn.gan_networks import Head, MinibatchDiscrimination, body, generator, halvings
from gencli.nn.gan_norms import ConditionalBatchNorm, VirtualBatchNorm
from gencli.nn.norm import BatchNorm
from gencli.rng import Keys, using


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step():
    return Step(0, 1, Keys(0).open("discriminator", 0, 0), torch.tensor(0.0))


# ---------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_papers():
    real, fake = noise(7), noise(5, seed=1)
    D = torch.sigmoid
    plain = -D(real).log().mean() - (1 - D(fake)).log().mean()
    want = {
        "saturating": (plain, (1 - D(fake)).log().mean()),
        "non-saturating": (plain, -D(fake).log().mean()),
        "least-squares": (((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2, ((fake - 1) ** 2).mean() / 2),
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
        "hinge": (
            -torch.minimum(real - 1, real * 0).mean() - torch.minimum(-1 - fake, fake * 0).mean(),
            -fake.mean(),
        ),
    }
    for loss, (d, g) in want.items():
        torch.testing.assert_close(discriminator_loss(loss, real, fake), d, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(generator_loss(loss, fake), g, rtol=1e-12, atol=1e-14)
    assert output("saturating", fake) == D(fake).mean() and output("hinge", fake) == fake.mean()


def test_losses_are_finite_and_exact_far_out_and_in_half_precision():
    far = torch.tensor([1000.0])
    assert discriminator_loss("non-saturating", -far, far) == 2000 and generator_loss("non-saturating", -far) == 1000
    for loss in ("saturating", "non-saturating", "least-squares", "wasserstein", "hinge"):
        d = noise(9).bfloat16()
        assert discriminator_loss(loss, d, d).dtype == generator_loss(loss, d).dtype == torch.float32
        torch.testing.assert_close(generator_loss(loss, d), generator_loss(loss, d.float()), rtol=0, atol=0)


def test_the_saturating_gradient_dies_where_d_wins_and_the_other_where_g_wins():
    """Their slopes in a logit are -D and -(1 - D)."""
    for at in (-20.0, -3.0, 0.0, 1.5, 20.0):
        for loss, want in (("saturating", -1 / (1 + math.exp(-at))), ("non-saturating", -1 / (1 + math.exp(at)))):
            d = torch.tensor([at], requires_grad=True)
            generator_loss(loss, d).backward()
            assert d.grad.item() == pytest.approx(want, rel=1e-9), (loss, at)


def test_smoothing_touches_real_data_alone():
    real, fake = noise(7).requires_grad_(), noise(5, seed=1).requires_grad_()
    D = real.sigmoid()
    for loss, want in {
        "non-saturating": -(0.9 * D.log() + 0.1 * (1 - D).log()).mean() - (1 - fake.sigmoid()).log().mean(),
        "least-squares": ((real - 0.9) ** 2).mean() / 2 + (fake**2).mean() / 2,
    }.items():
        got = discriminator_loss(loss, real, fake, 0.1)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        ours, plain = (torch.autograd.grad(v, [real, fake]) for v in (got, discriminator_loss(loss, real, fake)))
        assert torch.equal(ours[1], plain[1]) and not torch.allclose(ours[0], plain[0])
    for loss in ("wasserstein", "hinge"):
        with pytest.raises(ValueError, match="no target"):
            discriminator_loss(loss, real, fake, 0.1)


def test_the_best_discriminator_of_two_gaussians_is_approached():
    # p = N(1, 1), q = N(-1, 1): log p / q = 2 x, so d* = 2 x; with target a, D* = a p / (p + q) (Salimans, section 3.4)
    p, q = noise(20_000) + 1, noise(20_000, seed=1) - 1
    for smoothing in (0.0, 0.25):
        w, b, c = (torch.zeros((), requires_grad=True) for _ in range(3))

        def d(x, a=1 - smoothing, w=w, b=b, c=c):
            D = a * torch.sigmoid(w * x + b) + 0 * c
            return D.logit()

        optimizer = torch.optim.LBFGS([w, b], max_iter=50)

        def closure(d=d, optimizer=optimizer, smoothing=smoothing):
            optimizer.zero_grad()
            loss = discriminator_loss("non-saturating", d(p), d(q), smoothing)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert w.item() == pytest.approx(2, abs=0.06) and b.item() == pytest.approx(0, abs=0.04)


# ---------------------------------------------------------------------------------------------- penalties


def test_the_penalty_of_a_linear_critic_is_that_of_its_slope():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    args = (lambda x: x @ w + 7, noise(8, 2), noise(8, 2, seed=1), torch.rand(8))
    penalty = penalties.gradient_penalty(*args)
    assert penalty.item() == pytest.approx((5 - 1) ** 2, abs=1e-12)
    penalty.backward()
    torch.testing.assert_close(w.grad, 2 * 4 * w.detach() / 5, rtol=1e-12, atol=1e-12)
    assert penalties.zero_centred(*args).item() == pytest.approx(25, abs=1e-12)
    assert penalties.r1(*args[:2]).item() == pytest.approx(25, abs=1e-12)


def test_the_penalties_of_a_quadratic_critic_are_taken_where_they_should():
    A = noise(3, 3, seed=2)
    A = A + A.T
    real, fake, epsilon = noise(8, 3), noise(8, 3, seed=1), torch.rand(8)
    x_hat = torch.stack([e * r + (1 - e) * f for e, r, f in zip(epsilon, real, fake)])
    slopes = (x_hat @ A).pow(2).sum(1)  # grad of x A x / 2 is A x
    D = lambda x: 0.5 * (x @ A * x).sum(1)  # noqa: E731
    for kind, want in {
        "gradient": (slopes.sqrt() - 1).pow(2).mean(),
        "zero-centred": slopes.mean(),
        "r1": (real @ A).pow(2).sum(1).mean(),
    }.items():
        assert penalties.penalty(kind, D, real, fake, epsilon).item() == pytest.approx(want.item(), rel=1e-12)
    # epsilon is one number an image, not one a pixel
    images = penalties.gradient_penalty(
        lambda x: x.square().sum((1, 2, 3)) / 2, real.view(8, 1, 3, 1), fake.view(8, 1, 3, 1), epsilon
    )
    assert images.item() == pytest.approx((x_hat.norm(dim=1) - 1).pow(2).mean().item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["gradient", "r1", "zero-centred"])
def test_a_penalty_s_gradient_is_that_of_finite_differences(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    real, fake, epsilon = noise(6, 3), noise(6, 3, seed=1), torch.rand(6)

    def value():
        return penalties.penalty(kind, lambda x: net(x)[:, 0], real, fake, epsilon)

    value().backward()
    for name, p in net.named_parameters():
        if name == "2.bias":
            assert p.grad is None or p.grad.abs().max() < 1e-15
            continue
        for i in range(p.numel()):
            with torch.no_grad():
                flat, found = p.view(-1), []
                for move in (1e-5, -2e-5):
                    flat[i] += move
                    with torch.enable_grad():
                        found.append(value().item())
                flat[i] += 1e-5
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(p.grad.view(-1)[i].item(), rel=1e-6, abs=1e-8)


def test_penalties_stay_in_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    args = (lambda x: net(x)[:, 0], noise(6, 3), noise(6, 3, seed=1), torch.rand(6))
    want = penalties.gradient_penalty(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penalties.gradient_penalty(*args), want)


def test_a_flat_critic_has_a_penalty_with_a_gradient():
    w = torch.zeros(2, requires_grad=True)
    penalties.gradient_penalty(lambda x: x @ w, noise(4, 2), noise(4, 2, seed=1), torch.rand(4)).backward()
    assert w.grad.isfinite().all()


def test_clipping_bounds_every_weight():
    net = nn.Linear(50, 4)
    before = net.weight.detach().clone()
    penalties.clip(net, 0.05)
    assert all(p.abs().max() <= 0.05 for p in net.parameters()) and torch.equal(net.weight, before.clamp(-0.05, 0.05))


# ---------------------------------------------------------------------------------------------- spectral norm


def layers():
    torch.manual_seed(0)
    return [
        (spectral_norm.SNLinear(6, 4), noise(3, 6)),
        (spectral_norm.SNConv2d(3, 4, 3, padding=1), noise(2, 3, 5, 5)),
        (spectral_norm.SNEmbedding(5, 3), torch.tensor([0, 4, 2])),
    ]


def test_the_spectral_norm_is_the_largest_singular_value_of_the_reshaped_kernel():
    for layer, _ in layers():
        spectral_norm.iterate(layer, 300)
        W = layer.weight.detach()
        top = torch.linalg.svdvals(W.reshape(len(W), -1))[0]
        assert layer.sigma().item() == pytest.approx(top.item(), rel=1e-10)
        assert torch.linalg.svdvals(layer.W_SN().reshape(len(W), -1))[0].item() == pytest.approx(1, rel=1e-10)
        # and its gradient that of W / svd's sigma
        ours, theirs = (
            torch.autograd.grad((w * noise(*W.shape, seed=3)).sum(), layer.weight)[0]
            for w in (layer.W_SN(), layer.weight / torch.linalg.matrix_norm(layer.weight.reshape(len(W), -1), 2))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_one_power_iteration_is_algorithm_1():
    for layer, _ in layers():
        u, W = layer.u.clone(), layer.weight.detach().reshape(len(layer.weight), -1)
        spectral_norm.iterate(layer)
        v = W.T @ u / (W.T @ u).norm()
        torch.testing.assert_close(layer.v, v, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.u, W @ v / (W @ v).norm(), rtol=1e-12, atol=1e-14)


def test_a_forward_pass_moves_nothing():
    for layer, x in layers():
        before = {k: t.clone() for k, t in layer.state_dict().items()}
        outs = [layer(x), layer(x), layer.eval()(x)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items()) and {"u", "v"} <= before.keys()


def test_a_convolution_is_bounded_by_the_root_of_its_kernel_s_area():
    # the kernel's norm alone is no bound: the paper's sigma and that of the whole map, as a matrix
    layer = layers()[1][0]
    spectral_norm.iterate(layer, 300)
    layer.bias.data.zero_()
    matrix = layer(torch.eye(3 * 8 * 8).view(-1, 3, 8, 8)).flatten(1)
    top = torch.linalg.svdvals(matrix)[0].item()
    assert 1 < top <= 3


# ---------------------------------------------------------------------------------------------- norms and layers


@pytest.mark.parametrize("shape", [(3,), (3, 2, 4)])
def test_virtual_batch_norm_is_the_paper_s_loop(shape):
    R, n = 5, 4
    norm = VirtualBatchNorm(3, R, eps=1e-5)
    norm.weight.data, norm.bias.data = noise(3, seed=7), noise(3, seed=8)
    x = 2 * noise(R + n, *shape) + 1
    got = norm(x)
    along = [slice(None), *[None] * (len(shape) - 1)]
    for i in range(R + n):
        batch = x[:R] if i < R else torch.cat([x[:R], x[i : i + 1]])  # x^i and the reference batch, R + 1 examples
        want = torch.empty(shape)
        for c in range(3):
            values = batch[:, c]
            want[c] = (x[i, c] - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        want = want * norm.weight.detach()[tuple(along)] + norm.bias.detach()[tuple(along)]
        torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-12)
    # no example depends on another
    torch.testing.assert_close(norm(x[[*range(R), R + 2]])[R], got[R + 2], rtol=1e-12, atol=1e-14)


def test_minibatch_discrimination_is_the_paper_s_loop():
    torch.manual_seed(0)
    layer, f = MinibatchDiscrimination(4, 3, 2), noise(6, 4)
    with using(step()):
        got = layer(f)
    assert torch.equal(got[:, :4], f) and got.shape == (6, 7)
    M = [[f[i] @ layer.T[:, b] for b in range(3)] for i in range(6)]
    for i in range(6):
        for b in range(3):
            o = sum(math.exp(-(M[i][b] - M[j][b]).abs().sum().item()) for j in range(6))
            assert got[i, 4 + b].item() == pytest.approx(o, rel=1e-10)


def test_conditional_batch_norm_has_a_scale_and_a_shift_a_class():
    norm, plain, x = ConditionalBatchNorm(3, 2), BatchNorm(3, affine=False), noise(6, 3, 2, 2)
    norm.weight.data, norm.bias.data = noise(2, 3, seed=1), noise(2, 3, seed=2)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    with using(step()):
        got, want = norm(x, labels), plain(x)
    for i, y in enumerate(labels):
        torch.testing.assert_close(got[i], want[i] * norm.weight[y][:, None, None] + norm.bias[y][:, None, None])


def test_one_row_has_no_batch_norm():
    with using(step()), pytest.raises(UsageError, match="batch_size=2 or more"):
        BatchNorm(3)(noise(1, 3))


def test_the_projection_is_that_of_eq_3():
    torch.manual_seed(0)
    head, f, y = Head(4, classes=3), noise(5, 4), torch.tensor([0, 2, 1, 2, 0])
    inner = torch.stack([head.V.weight[k] @ f[i] for i, k in enumerate(y)])
    want = f @ head.linear.weight[0] + head.linear.bias + inner
    torch.testing.assert_close(head(f, y), want, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("network", ["dcgan", "resnet"])
@pytest.mark.parametrize(
    "size", [(4, 4), (8, 8), (16, 16), (28, 28), (32, 32), (64, 64), (128, 128), (256, 256), (16, 32)]
)
@torch.no_grad()
def test_networks_of_any_size(network, size):
    spec = DataSpec(name="test", kind="image", shape=(3, *size), levels=256)
    G = generator(network, 5, spec, hidden=(), channels=2, norm="batch", classes=4)
    D, n = body(network, spec, hidden=(), channels=2, norm="spectral", act="relu")
    with using(step()):
        x = G(noise(2, 5), torch.tensor([0, 3]))
    assert x.shape == (2, 3, *size) and D(x).shape == (2, n)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
@pytest.mark.parametrize("kind", ["conv", "transposed", "spectral"])
def test_convolutions_of_one_channel_are_torch_s(kind, size, monkeypatch):
    """Values, gradients, and the gradients of a gradient, which a penalty takes."""
    torch.manual_seed(0)
    if kind == "transposed":
        ours, x = grey.ConvTranspose2d(5, 1, 4, 2, 1), noise(3, 5, *size)
    else:
        ours = grey.Conv2d(1, 5, 4, 2, 1) if kind == "conv" else spectral_norm.SNConv2d(1, 5, 4, 2, 1)
        x = noise(3, 1, *size)

    def everything():
        here = x.clone().requires_grad_()
        y = ours(here)
        weighing = noise(*y.shape, seed=1)
        (slope,) = torch.autograd.grad((y.tanh() * weighing).sum(), here, create_graph=True)
        wanted = [here, ours.weight, ours.bias]
        return y, slope, *torch.autograd.grad(slope.square().sum() + y.square().sum(), wanted)

    called = []
    for name in ("fold", "unfold"):
        plain = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *args, plain=plain, **more: called.append(1) or plain(*args, **more))
    found = everything()
    assert called  # by patches
    if kind == "transposed":
        monkeypatch.setattr(grey.ConvTranspose2d, "forward", nn.ConvTranspose2d.forward)
    else:
        monkeypatch.setattr(grey.Conv2d, "by", lambda self, W, x: self._conv_forward(x, W, self.bias))
    called.clear()
    for a, b in zip(found, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert not called


@torch.no_grad()
def test_the_first_map_has_the_layout_of_the_weights():
    spec = DataSpec(name="test", kind="image", shape=(3, 16, 16), levels=256)
    for network in ("dcgan", "resnet"):
        G = generator(network, 5, spec, hidden=(), channels=2, norm="none")
        plain = G(noise(2, 5))
        first = G[:2]
        assert first(noise(2, 5)).is_contiguous()
        G.to(memory_format=torch.channels_last)
        assert first(noise(2, 5)).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(G(noise(2, 5)), plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("side", "fits"), [(25, 24), (36, 32), (178, 192), (2, 8)])
def test_sizes_that_cannot_be_made_are_refused_with_one_that_can(side, fits):
    with pytest.raises(UsageError, match=f"test are {side}x{side}; .* such as {fits}x{fits}"):
        halvings("test", (3, side, side))


# ---------------------------------------------------------------------------------------------- truncation


def test_truncated_noise_has_the_truncated_distribution():
    z = truncated(noise(200_000), 0.7, "normal")
    assert z.abs().max() <= 0.7
    Phi = torch.special.ndtr
    inside = Phi(torch.tensor(0.7)) - Phi(torch.tensor(-0.7))
    for q in (-0.6, -0.2, 0.0, 0.45):
        want = (Phi(torch.tensor(q)) - Phi(torch.tensor(-0.7))) / inside
        assert (z <= q).double().mean().item() == pytest.approx(want.item(), abs=0.004)
    x = noise(50)
    assert torch.equal(x.argsort(), truncated(x, 0.7, "normal").argsort())
    torch.testing.assert_close(truncated(x, 8.0, "normal"), x, rtol=1e-6, atol=1e-6)
    u = 2 * torch.rand(50) - 1
    assert torch.equal(truncated(u, 0.5, "uniform"), u * 0.5) and torch.equal(truncated(u, 3.0, "uniform"), u)
    with pytest.raises(UsageError, match="above 0, not 0"):
        truncated(x, 0.0, "normal")
    assert F.relu(truncated(torch.tensor([40.0], dtype=torch.float32), 2.0, "normal")).item() == 2.0
