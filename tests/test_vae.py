"""The VAE: its bounds are bounds, and exact where they must be."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.latent.vae import AT_ONCE, VAE, kl_to_standard_normal
from gencli.nn.importance import BLOCK
from gencli.rng import Keys, SampleRng, seeded, using


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(shape, levels, *, kind="image", seed=0, classes=(), **config):
    spec = DataSpec(name="test", kind=kind, shape=shape, levels=levels, classes=classes)
    with seeded(seed):
        return VAE(VAE.Config(**config), spec)


def step(progress=1.0):
    return Step(0, 1, Keys(0).open("model", 0, 0), torch.tensor(progress))


def ppca(noise=0.3):
    """A linear VAE with p(x) = N(b, W W^T + noise^2), its exact posterior, and that density."""
    vae = build((4,), None, kind="points", latents=2, hidden=(), decoder="gaussian")
    g = torch.Generator().manual_seed(5)
    W, b = torch.randn(4, 2, generator=g), torch.randn(4, generator=g)
    # an orthogonal basis makes the posterior's covariance diagonal, as the encoder's is
    W = torch.linalg.qr(W)[0] * torch.tensor([2.0, 0.5])
    M = W.T @ W + noise**2 * torch.eye(2)
    A = torch.linalg.solve(M, W.T)  # E[z|x] = A (x - b), Cov[z|x] = noise^2 / M
    with torch.no_grad():
        encoder, decoder = vae.encoder[0], vae.decoder[0]
        encoder.weight[:2], encoder.bias[:2] = A, -A @ b
        encoder.weight[2:], encoder.bias[2:] = 0, (noise**2 / M.diag()).log()
        decoder.weight[0::2], decoder.bias[0::2] = W, b
        decoder.weight[1::2], decoder.bias[1::2] = 0, math.log(noise)
    return vae, MultivariateNormal(b, W @ W.T + noise**2 * torch.eye(4))


@torch.no_grad()
def test_the_bounds_are_exact_at_the_exact_posterior():
    vae, p = ppca()
    x = p.sample((32,))
    mu, log_var, _ = vae.posterior(x)
    # averaged over z the ELBO is exact; with one z it is log p(x) plus noise of mean 0
    z = mu + (0.5 * log_var).exp() * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, None]
    elbo = torch.stack([vae.log_likelihood(x, zi) for zi in z]).mean(0) - kl_to_standard_normal(mu, log_var).sum(1)
    torch.testing.assert_close(elbo, p.log_prob(x), rtol=0, atol=1e-10)
    for k in (1, 5):
        torch.testing.assert_close(vae.iwae(x, SampleRng(0, range(32)), k), p.log_prob(x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_elbo_below_iwae_below_exact_and_iwae_rises_with_k():
    vae, p = ppca()
    vae.encoder[0].bias += torch.tensor([0.2, -0.3, 0.8, 0.5])  # a posterior that is wrong
    n = 4000
    x = p.sample((1,)).expand(n, -1)
    exact = p.log_prob(x[0])
    mu, log_var, _ = vae.posterior(x[:1])
    elbo = vae.log_prob(x, SampleRng(0, range(n)))
    bounds = [elbo] + [vae.iwae(x, SampleRng(0, range(n)), k) for k in (1, 4, 16, 64)]
    means, errors = [b.mean().item() for b in bounds], [b.std().item() / math.sqrt(n) for b in bounds]
    # the gap of the ELBO is KL(q || p(z|x)), known in closed form
    true = Normal(mu - torch.tensor([0.2, -0.3]), (0.5 * (log_var - torch.tensor([0.8, 0.5]))).exp())
    gap = kl_divergence(Normal(mu, (0.5 * log_var).exp()), true).sum()
    assert means[0] == pytest.approx((exact - gap).item(), abs=4 * errors[0])
    assert means[1] == pytest.approx((exact - gap).item(), abs=4 * errors[1])
    assert means[1] < means[2] < means[3] < means[4] < exact + 4 * errors[4]
    assert exact - means[4] < 0.1 * (exact - means[1])


@torch.no_grad()
def test_iwae_is_the_log_mean_of_weights_and_does_not_depend_on_its_chunk():
    vae = build((1, 2, 2), 3, latents=2, hidden=(8,))
    x = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]]).view(2, 1, 2, 2)
    mu, log_var, _ = vae.posterior(x)
    q = Normal(mu, (0.5 * log_var).exp())
    z = mu[:, None] + q.stddev[:, None] * SampleRng(3, range(2)).normal("epsilon", (2, 7, 2))
    log_w = torch.stack(
        [
            vae.log_likelihood(x, z[:, i]) + Normal(0.0, 1.0).log_prob(z[:, i]).sum(1) - q.log_prob(z[:, i]).sum(1)
            for i in range(7)
        ]
    )
    for chunk in (1, 3, 100):
        got = vae.iwae(x, SampleRng(3, range(2)), 7, chunk=chunk)
        torch.testing.assert_close(got, log_w.exp().mean(0).log(), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_many_draws_take_no_more_memory_and_begin_with_those_of_fewer(monkeypatch):
    """Beyond one block of draws the bound is still the log-mean of the weights, whatever passes through at once."""
    vae = build((1, 2, 2), 3, latents=2, hidden=(8,))
    x, k = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]]).view(2, 1, 2, 2), 2 * BLOCK + 44
    rng = SampleRng(3, range(2))
    e = torch.cat([rng.normal("epsilon", (2, BLOCK, 2)) for _ in range(3)], 1)[:, :k]
    q = vae.posterior(x)
    z = q.at(e)
    log_q = MultivariateNormal(q.mu[:, None], torch.diag_embed(q.log_var.exp())[:, None]).log_prob(z)
    log_w = vae.log_likelihood(x, z) + Normal(0.0, 1.0).log_prob(z).sum(-1) - log_q
    passed, theta = [], vae.theta
    monkeypatch.setattr(vae, "theta", lambda z, y: passed.append(z.shape[0] * z.shape[1]) or theta(z, y))
    for chunk in (1, 50, BLOCK, 10_000, None):
        got = vae.iwae(x, SampleRng(3, range(2)), k, chunk=chunk)
        torch.testing.assert_close(got, log_w.logsumexp(1) - math.log(k), rtol=1e-12, atol=1e-12)
        assert max(passed) <= 2 * BLOCK and sum(passed) == 2 * k
        passed.clear()
    vae.width = AT_ONCE // 6  # a wide decoder: three draws of two examples at once
    wide = vae.iwae(x, SampleRng(3, range(2)), k)
    assert max(passed) == 6 and torch.allclose(wide, got, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["bernoulli", "categorical", "discretised-logistic"])
def test_the_bound_s_mass_over_all_images_is_at_most_one(decoder):
    vae = build((1, 1, 2), 2, latents=2, hidden=(8,), decoder=decoder, seed=4)
    for p in vae.decoder.parameters():
        p *= 1.5  # far from uniform
    x = torch.tensor(list(itertools.product([0, 1], repeat=2))).view(4, 1, 1, 2)
    draws = 4000
    rng = SampleRng(0, range(4 * draws))
    elbo = vae.log_prob(x.repeat(draws, 1, 1, 1), rng).view(draws, 4).mean(0)
    tight = vae.iwae(x, SampleRng(1, range(4)), 20_000)
    assert 0.3 < elbo.exp().sum() < 1
    assert tight.exp().sum().item() == pytest.approx(1, abs=0.01)  # IWAE -> log p(x), whose mass is 1


@torch.no_grad()
@pytest.mark.parametrize("levels", [2, 17])
def test_a_uniform_decoder_costs_log2_levels(levels):
    vae = build((1, 3, 3), levels)
    for layer in (vae.encoder[-1], vae.decoder[-1]):
        layer.weight.zero_()
        layer.bias.zero_()
    x = torch.randint(levels, (6, 1, 3, 3))
    out = vae.loss(Batch(x=x, n=6), step())
    assert out["kl"].item() == 0
    assert out["bits_per_dim"].item() == pytest.approx(math.log2(levels), abs=1e-12)
    assert out["loss"].item() == pytest.approx(math.log(levels), abs=1e-12)
    assert vae.log_prob(x, SampleRng(0, range(6))).tolist() == pytest.approx([-9 * math.log(levels)] * 6)


def test_kl_is_torch_s():
    g = torch.Generator().manual_seed(0)
    mu, log_var = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)
    want = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_standard_normal(mu, log_var), want, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_loss_is_minus_the_elbo_in_nats_a_dimension():
    vae = build((1, 2, 2), 5, latents=3, hidden=(8,))
    x = torch.randint(5, (4, 1, 2, 2))
    out = vae.loss(Batch(x=x, n=4), step())
    elbo = vae.log_prob(x, step().rng)  # the same draw
    assert out["loss"].item() == pytest.approx(-elbo.mean().item() / 4, abs=1e-12)
    assert out["bits_per_dim"].item() == pytest.approx(-elbo.mean().item() / 4 / math.log(2), abs=1e-12)


@torch.no_grad()
def test_kl_weight_warm_up_and_free_bits_change_the_loss_and_not_the_bound():
    x = torch.randint(5, (4, 1, 2, 2))
    plain = build((1, 2, 2), 5, latents=3, hidden=(8,))
    b = Batch(x=x, n=4)
    ref = plain.loss(b, step())
    kl_j = plain.posterior(x).kl_j.mean(0)
    floor = kl_j.sort().values[1].item()  # one dimension below, one above, one at the floor
    cases = [
        ({"kl_weight": 0.5}, 1.0, 0.5 * kl_j.sum()),
        ({"kl_weight": 2.0, "kl_warmup": 0.5}, 0.125, 2 * 0.25 * kl_j.sum()),
        ({"kl_warmup": 0.5}, 0.75, kl_j.sum()),
        ({"free_bits": floor}, 1.0, sum(max(k, floor) for k in kl_j.tolist())),
    ]
    for config, progress, cost in cases:
        out = build((1, 2, 2), 5, latents=3, hidden=(8,), **config).loss(b, step(progress))
        assert out["loss"].item() == pytest.approx(((ref["reconstruction"] + cost) / 4).item(), abs=1e-12)
        assert out["bits_per_dim"].item() == ref["bits_per_dim"].item()


def test_free_bits_leave_a_cheap_dimension_without_kl_gradient():
    vae = build((1, 2, 2), 5, latents=2, hidden=(), free_bits=1e3)
    with torch.no_grad():
        vae.decoder[0].weight.zero_()  # so the reconstruction says nothing about z
    vae.loss(Batch(x=torch.randint(5, (4, 1, 2, 2)), n=4), step())["loss"].backward()
    assert vae.encoder[0].weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    "levels, decoder",
    [(2, "bernoulli"), (17, "categorical"), (17, "discretised-logistic"), (None, "gaussian")],
)
def test_every_parameter_gets_the_gradient_of_finite_differences(levels, decoder):
    shape, kind = ((3,), "points") if levels is None else ((1, 2, 2), "image")
    vae = build(shape, levels, kind=kind, latents=2, hidden=(6,), decoder=decoder, activation="tanh", kl_warmup=0.5)
    x = torch.randn(4, 3) if levels is None else torch.randint(levels, (4, 1, 2, 2))
    b = Batch(x=x, n=4)
    vae.loss(b, step(0.2))["loss"].backward()
    for name, p in vae.named_parameters():
        i = p.grad.flatten().abs().argmax()
        assert p.grad.flatten()[i] != 0, name
        with torch.no_grad():
            flat = p.view(-1)
            losses = []
            for sign in (1e-6, -2e-6):
                flat[i] += sign
                losses.append(vae.loss(b, step(0.2))["loss"].item())
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(p.grad.flatten()[i].item(), rel=1e-4), name


@torch.no_grad()
def test_samples_follow_the_decoder_and_depend_on_their_row_alone():
    vae = build((1, 2, 2), 3, latents=2, hidden=(8,))
    n = 8000
    x = vae.sample(SampleRng(0, range(n)))
    assert x.shape == (n, 1, 2, 2) and x.dtype == torch.int64
    z = vae.prior(SampleRng(0, range(n)))
    p = vae.theta(z).softmax(-1).mean(0)  # (4, 3)
    share = torch.stack([(x.flatten(1) == k).double().mean(0) for k in range(3)], 1)
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(n)
    assert torch.equal(vae.sample(SampleRng(0, [5, 77, 3]))[:, 0], x[[5, 77, 3], 0])
    levels = torch.linspace(-1, 1, 3)
    mean = vae.sample(SampleRng(0, range(10)), mean=True)
    torch.testing.assert_close(mean.flatten(1), vae.theta(z[:10]).softmax(-1) @ levels, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vae.decode(z[:10]), mean)
    cold = vae.sample(SampleRng(0, range(10)), temperature=0.0, mean=True)
    torch.testing.assert_close(cold, vae.decode(torch.zeros(1, 2)).expand_as(cold))


@torch.no_grad()
def test_encode_is_the_posterior_s_mean():
    vae, p = ppca()
    x = p.sample((3,))
    assert torch.equal(vae.encode(x, SampleRng(0, range(3))), vae.posterior(x)[0])


def test_dropout_draws_in_training_alone():
    vae = build((1, 2, 2), 5, latents=2, hidden=(32,), dropout=0.5)
    x = torch.randint(5, (4, 1, 2, 2))
    s = step()
    with using(s):
        vae.train()
        assert not torch.equal(vae.encode(x, s.rng), vae.encode(x, s.rng))
    vae.eval()
    assert torch.equal(vae.encode(x, s.rng), vae.encode(x, s.rng))
    assert len({m.purpose for m in vae.modules() if hasattr(m, "purpose")}) == 2


def test_a_decoder_for_other_data_is_refused():
    with pytest.raises(UsageError, match="categorical"):
        build((1, 2, 2), 17, decoder="bernoulli")
    with pytest.raises(UsageError, match="gaussian"):
        build((2,), None, kind="points")


@torch.no_grad()
def test_a_full_covariance_has_the_kl_and_the_weights_of_torch_s_normal():
    vae = build((4,), None, kind="points", latents=3, hidden=(8,), decoder="gaussian", posterior="full", seed=2)
    x = torch.randn(5, 4)
    q = vae.posterior(x)
    of = MultivariateNormal(q.mu, scale_tril=q.L)
    prior = MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert (q.L.tril(-1).abs() > 1e-3).any() and (q.L.triu(1) == 0).all()
    torch.testing.assert_close(q.kl, kl_divergence(of, prior), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.log_var.exp(), of.variance, rtol=1e-12, atol=1e-12)
    e = SampleRng(3, range(5)).normal("epsilon", (5, 7, 3))
    z = torch.stack([q.at(e[:, i]) for i in range(7)])  # (7, 5, 3)
    torch.testing.assert_close(q.at(e), z.transpose(0, 1), rtol=1e-12, atol=1e-12)
    log_w = torch.stack([vae.log_likelihood(x, z[i]) for i in range(7)]) + prior.log_prob(z) - of.log_prob(z)
    got = vae.iwae(x, SampleRng(3, range(5)), 7, chunk=2)
    torch.testing.assert_close(got, log_w.exp().mean(0).log(), rtol=1e-10, atol=1e-10)
    with pytest.raises(UsageError, match="free_bits"):
        build((4,), None, kind="points", decoder="gaussian", posterior="full", free_bits=0.1)


@torch.no_grad()
def test_a_full_covariance_closes_the_gap_that_a_diagonal_leaves():
    """A linear model whose exact posterior has correlated latents: there the bound is the likelihood."""
    W, noise, J = torch.tensor([[1.0, 0.8], [0.2, 1.0], [0.5, 0.5]]), 0.3, 2
    M = W.T @ W + noise**2 * torch.eye(J)
    S = noise**2 * torch.linalg.inv(M)
    vae = build((3,), None, kind="points", latents=J, hidden=(), decoder="gaussian", posterior="full")
    encoder, decoder = vae.encoder[0], vae.decoder[0]
    L = torch.linalg.cholesky(S)
    encoder.weight.zero_()
    encoder.weight[:J] = torch.linalg.solve(M, W.T)
    encoder.bias.copy_(torch.cat([torch.zeros(J), 2 * L.diagonal().log(), L[1:2, 0]]))
    decoder.weight[0::2], decoder.weight[1::2] = W, 0
    decoder.bias[0::2], decoder.bias[1::2] = 0, math.log(noise)
    p = MultivariateNormal(torch.zeros(3), W @ W.T + noise**2 * torch.eye(3))
    x = p.sample((8,))
    for k in (1, 4):
        torch.testing.assert_close(vae.iwae(x, SampleRng(0, range(8)), k), p.log_prob(x), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("network", ["conv", "residual"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 7)])
def test_convolutions_give_every_pixel_its_own_parameters(network, shape):
    """theta's rows are pixels in the order of x: shifting one channel's bias moves the means of that channel alone."""
    vae = build(shape, 9, latents=3, network=network, channels=4, decoder="discretised-logistic")
    C, H, W = shape
    z = torch.randn(2, 5, 3)
    theta = vae.theta(z)
    assert theta.shape == (2, 5, C * H * W, 2)
    torch.testing.assert_close(vae.theta(z[0]), theta[0], rtol=1e-10, atol=1e-10)
    last = vae.decoder.rest[-1]
    last.bias[2 * (C - 1)] += 1  # the mean of the last channel
    moved = (vae.theta(z) - theta).reshape(2, 5, C, H * W, 2)
    torch.testing.assert_close(moved[:, :, -1, :, 0], torch.ones(2, 5, H * W))
    assert moved[:, :, -1, :, 1].abs().max() < 1e-12 and (C == 1 or moved[:, :, :-1].abs().max() < 1e-12)
    x = torch.randint(9, (4, *shape))
    assert vae.log_prob(x, SampleRng(0, range(4))).shape == (4,)
    with pytest.raises(UsageError, match="use mlp"):
        build((2,), None, kind="points", network=network, decoder="gaussian")


@torch.no_grad()
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_class_is_told_to_both_networks(network):
    vae = build((1, 4, 4), 5, classes=("a", "b"), latents=2, hidden=(6,), network=network, conditional=True)
    x, y = torch.randint(5, (4, 1, 4, 4)), torch.tensor([0, 1, 0, 1])
    q, other = vae.posterior(x, y), vae.posterior(x, 1 - y)
    assert (q.mu != other.mu).any(1).all() and (vae.theta(q.mu, y) != vae.theta(q.mu, 1 - y)).flatten(1).any(1).all()
    row = vae.theta(q.mu, y)
    z = q.mu[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(vae.theta(z, y), row[:, None].expand(-1, 3, -1, -1), rtol=1e-10, atol=1e-10)
    assert vae.sample(SampleRng(0, range(3)), labels=torch.tensor([0, 1, 1])).shape == (3, 1, 4, 4)
    with pytest.raises(UsageError, match="needs labels"):
        vae.log_prob(x, SampleRng(0, range(4)))


def test_collapsed_dimensions_are_counted():
    vae = build((1, 2, 2), 5, latents=3, hidden=())
    with torch.no_grad():
        vae.encoder[0].weight.zero_()
        vae.encoder[0].bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0]))  # the first is the prior's own
    out = vae.loss(Batch(x=torch.randint(5, (4, 1, 2, 2)), n=4), step())
    assert out["collapsed"].item() == 1
