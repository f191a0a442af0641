"""The mixture and the linear VAE: every bound against the likelihood, which both know."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.latent.linear_vae import LinearVAE
from gencli.models.latent.mixture import Mixture
from gencli.nn.importance import BLOCK, log_mean_weight
from gencli.rng import Keys, SampleRng, seeded

ESTIMATORS = ("exact", "prior", "importance", "elbo")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(model, D=3, seed=0, **config):
    spec = DataSpec(name="test", kind="points", shape=(D,))
    with seeded(seed):
        made = model(model.Config(**config), spec)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # far from where training starts: mu, sigma, V, S of no special value
        for p in made.parameters():
            p += 0.4 * torch.randn(p.shape, generator=g)
    return made


def step():
    return Step(0, 1, Keys(0).open("model", 0, 0), torch.tensor(0.0))


def truth(model):
    """p(x) by torch.distributions."""
    if isinstance(model, Mixture):
        parts = Independent(Normal(model.mu, model.log_sigma.exp()), 1)
        return MixtureSameFamily(Categorical(torch.ones(len(model.mu))), parts)
    sigma2 = (2 * model.log_sigma).exp()
    return MultivariateNormal(model.b, model.W @ model.W.T + sigma2 * torch.eye(len(model.b)))


MODELS = {"mixture": (Mixture, {"components": 5, "hidden": (8,)}), "linear-vae": (LinearVAE, {"latents": 2})}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@torch.no_grad()
def test_elbo_below_iwae_below_more_draws_below_the_likelihood(name, estimator):
    """In expectation, which many equal examples show; and the likelihood is that of torch.distributions."""
    cls, config = MODELS[name]
    model = build(cls, estimator=estimator, **config)
    x = torch.tensor([[0.3, -0.5, 0.8]])
    exact = truth(model).log_prob(x)
    torch.testing.assert_close(model.log_prob(x, None), exact, rtol=1e-12, atol=1e-12)
    n = 2000
    many = x.expand(n, -1)
    found = [model.iwae(many, SampleRng(0, range(n)), k) for k in (1, 4, 8, 150)]
    means, errors = [b.mean().item() for b in found], [b.std().item() / math.sqrt(n) for b in found]
    elbo, exact = model.elbo(x, None).item(), exact.item()
    assert means[0] == pytest.approx(elbo, abs=4 * errors[0] + 1e-9)  # one draw is the ELBO in expectation
    if estimator == "exact":
        assert all(m == pytest.approx(exact, abs=1e-9) for m in (elbo, *means))
        return
    assert elbo < means[1] < means[2] < means[3] < exact + 4 * errors[3]
    assert exact - means[3] < 0.2 * (exact - elbo)


@torch.no_grad()
def test_the_gap_of_the_elbo_is_the_kl_from_the_posterior():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for estimator in ESTIMATORS:
        model = build(Mixture, estimator=estimator, components=5, hidden=(8,))
        log_p_xz = model.log_joint(x)
        q, posterior = Categorical(logits=model.log_q(x, log_p_xz)), Categorical(logits=log_p_xz)
        gap = model.log_prob(x, None) - model.elbo(x, None)
        torch.testing.assert_close(gap, kl_divergence(q, posterior), rtol=1e-9, atol=1e-9)
        linear = build(LinearVAE, estimator=estimator, latents=2)
        mu, L = linear.posterior(linear.centred(x))
        M = linear.W.T @ linear.W / (2 * linear.log_sigma).exp() + torch.eye(2)
        at = torch.linalg.solve(M, linear.W.T @ linear.centred(x).T).T / (2 * linear.log_sigma).exp()
        kl = kl_divergence(MultivariateNormal(mu, scale_tril=L), MultivariateNormal(at, precision_matrix=M))
        torch.testing.assert_close(linear.log_prob(x, None) - linear.elbo(x, None), kl, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_iwae_is_the_log_mean_of_weights(name):
    cls, config = MODELS[name]
    model, n, k = build(cls, estimator="importance", **config), 3, BLOCK + 7
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    rng = SampleRng(2, range(n))
    if name == "mixture":
        u = torch.cat([rng.uniform("z", (n, m)) for m in (BLOCK, 7)], 1)
        log_q = model.q(x).log_softmax(1)
        z = (log_q.exp().cumsum(1)[:, None] <= u[..., None]).sum(-1)  # (n, k)
        log_p = Independent(Normal(model.mu[z], model.log_sigma[z].exp()), 1).log_prob(x[:, None]) - math.log(5)
        log_w = log_p - log_q.gather(1, z)
    else:
        e = torch.cat([rng.normal("epsilon", (n, m, 2)) for m in (BLOCK, 7)], 1)
        q = Normal(((x - model.b) @ model.V.T)[:, None], (0.5 * model.log_S).exp())
        z = q.mean + e * q.stddev
        log_x = Normal(z @ model.W.T + model.b, model.log_sigma.exp()).log_prob(x[:, None]).sum(-1)
        log_w = log_x + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
    want = log_w.exp().mean(1).log()
    torch.testing.assert_close(model.iwae(x, SampleRng(2, range(n)), k), want, rtol=1e-10, atol=1e-10)
    few = log_w[:, :9].exp().mean(1).log()  # the draws of a smaller k are the first
    torch.testing.assert_close(model.iwae(x, SampleRng(2, range(n)), 9), few, rtol=1e-10, atol=1e-10)


def test_blocks_of_draws_are_one_mean_and_carry_gradients():
    log_w = torch.randn(3, 2 * BLOCK + 5, requires_grad=True)
    asked: list[int] = []

    def draw(m):
        asked.append(m)
        return log_w[:, sum(asked) - m : sum(asked)]

    value = log_mean_weight(draw, log_w.shape[1])
    assert asked == [BLOCK, BLOCK, 5] and value.dtype == torch.float64
    torch.testing.assert_close(value, log_w.exp().mean(1).log())
    value.sum().backward()
    torch.testing.assert_close(log_w.grad, log_w.detach().softmax(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_what_they_say(name):
    cls, config = MODELS[name]
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    scale = 1 if name == "mixture" else 3  # nats; nats a dimension
    for estimator in ESTIMATORS:
        model = build(cls, estimator=estimator, k=4, **config)
        out = model.loss(Batch(x=x, n=40), step())
        exact, elbo = model.log_prob(x, None).mean(), model.elbo(x, None).mean()
        iwae = model.iwae(x, step().rng, 4).mean()
        want = {"exact": exact, "elbo": elbo}.get(estimator, iwae)
        assert out["nats"].item() == pytest.approx(-exact.item()) and out["gap"].item() == pytest.approx(
            (exact - want).item(), abs=1e-12
        )
        extra = elbo if (name, estimator) == ("mixture", "importance") else 0.0
        assert out["loss"].item() == pytest.approx(-(want + extra).item() / scale)
        out["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_mixture_s_networks_learn_by_their_own_terms():
    """p by the draws' weights alone, q by the ELBO alone."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    model = build(Mixture, estimator="importance", k=4, components=5, hidden=(8,))
    p, q = [model.mu, model.log_sigma], list(model.q.parameters())
    found = torch.autograd.grad(model.loss(Batch(x=x, n=40), step())["loss"], [*p, *q])
    of_p = torch.autograd.grad(-model.iwae(x, step().rng, 4).mean(), p)
    of_q = torch.autograd.grad(-model.elbo(x, None).mean(), q)
    for a, b in zip(found, [*of_p, *of_q], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_model_s_moments(name):
    cls, config = MODELS[name]
    model, n = build(cls, **config), 8_000
    x = model.sample(SampleRng(0, range(n)))
    p = truth(model)
    errors = (p.variance / n).sqrt()
    assert ((x.mean(0) - p.mean).abs() < 4.5 * errors).all()
    torch.testing.assert_close(x.var(0), p.variance, rtol=0.08, atol=0)
    if name == "linear-vae":
        torch.testing.assert_close(x.T.cov(), p.covariance_matrix, rtol=0, atol=0.15)


def test_a_linear_vae_learns_what_principal_components_know():
    """Training by the likelihood, and by the ELBO whose q can be the posterior, end at Tipping and Bishop's maximum."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=g) @ torch.diag(torch.tensor([3.0, 2.0, 0.7, 0.5]))
    x = x @ torch.linalg.qr(torch.randn(4, 4, generator=g))[0] + torch.tensor([1.0, -2.0, 0.0, 0.5])
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / 500).flip(0)
    sigma2 = eigenvalues[2:].mean()
    best = -0.5 * (eigenvalues[:2].log().sum() + 2 * sigma2.log() + 4 * (1 + math.log(2 * math.pi)))
    for estimator in ("exact", "elbo"):
        model = build(LinearVAE, D=4, estimator=estimator, latents=2)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model.loss(Batch(x=x, n=500), step())["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
        assert model.log_prob(x, None).mean().item() == pytest.approx(best.item(), abs=1e-4)
        assert model.elbo(x, None).mean().item() == pytest.approx(best.item(), abs=1e-4)


@torch.no_grad()
def test_levels_are_points_of_minus_one_to_one():
    model = LinearVAE(LinearVAE.Config(latents=2), DataSpec(name="t", kind="image", shape=(1, 2, 2), levels=5))
    x = torch.randint(5, (6, 1, 2, 2))
    want = truth(model).log_prob(x.flatten(1) / 2.0 - 1)
    torch.testing.assert_close(model.log_prob(x, None), want)
    y = model.sample(SampleRng(0, range(9)))
    assert y.shape == (9, 1, 2, 2) and y.min() >= 0 and y.max() <= 4
    assert torch.equal(model.encode(x, None), (x.flatten(1) / 2.0 - 1 - model.b) @ model.V.T)


def test_components_start_at_examples_that_the_seed_picks():
    x = torch.randn(8, 2)
    model = build(Mixture, D=2, components=11)
    model.prepare(Batch(x=x, n=8), step())
    assert ((model.mu[:, None] == x).all(2).sum(1) == 1).all() and len(model.mu.unique(dim=0)) == 8
    before = model.mu.clone()
    model.prepare(Batch(x=x, n=8), Step(0, 1, Keys(1).open("model", 0, 0), torch.tensor(0.0)))
    assert not torch.equal(model.mu, before)


def test_a_mixture_of_levels_is_refused():
    with pytest.raises(UsageError, match="5 levels"):
        Mixture(Mixture.Config(), DataSpec(name="t", kind="image", shape=(1, 2, 2), levels=5))
