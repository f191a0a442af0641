"""PixelCNN++: what each pixel sees, its likelihood, its initialisation and its sampler, each against brute force."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.pixelcnnpp import Cached, PixelCNNPP
from gencli.nn.causal import Naive, concat_elu
from gencli.nn.weightnorm import NormedConv2d, initialise
from gencli.rng import Keys, Rng, SampleRng, seeded, using


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # examples are drawn by torch.randint
    yield
    torch.set_default_dtype(torch.float32)


def step(number: int = 0) -> Step:
    return Step(number, 1, Keys(0).open("test", number), torch.zeros(()))


def images(shape: tuple[int, ...], levels: int, n: int = 24) -> Tensor:
    return torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(1))


def build(shape: tuple[int, ...], levels: int = 4, **config) -> PixelCNNPP:
    """A model as its first batch leaves it, but for gates that matter more and means that lie among the levels."""
    spec = DataSpec(name="test", kind="image", shape=shape, levels=levels, classes=("a", "b", "c"))
    with seeded("test"):
        model = PixelCNNPP(
            PixelCNNPP.Config(**{"filters": 6, "layers": 2, "mixtures": 2, "dropout": 0.0, **config}), spec
        ).eval()
    for conv in (m for m in model.modules() if isinstance(m, NormedConv2d)):
        conv.init_scale = max(conv.init_scale, 0.5)
    model.head.init_scale = 0.5
    x = images(shape, levels)
    initialise(model, lambda: model(x, torch.arange(len(x)) % 3 if model.config.conditional else None))
    return model


# ---------------------------------------------------------------------------------------------- what a pixel sees


@pytest.mark.parametrize("C", [1, 3])
def test_a_pixels_parameters_see_the_pixels_before_it_and_all_of_them(C: int):
    H, W = 8, 8
    model = build((C, H, W), filters=8, layers=3)
    x = model.spec.scale(images((C, H, W), 4, 1))
    seen = torch.autograd.functional.jacobian(lambda x: model.network(x, None)[0].square().sum(0), x)
    seen = seen.abs().sum(3).flatten(0, 1).flatten(1)  # (outputs, inputs), both in raster order
    when = torch.arange(H * W)
    assert not seen[when[:, None] <= when].any()
    assert (seen[when[:, None] > when] > 0).all()


def test_colours_see_the_colours_before_them_through_the_coupling():
    """log p(x) differentiated twice: the score of a colour depends on x_k through its means."""
    model = build((3, 4, 4), levels=256)
    theta = model(images((3, 4, 4), 256, 1))[:, :, 1, 2].detach()
    head = model.mixture
    x = torch.tensor([[100, 30, 200]])

    def of_colour(c: int, x: Tensor) -> Tensor:
        """log p(x_c | colours before it): the difference of two joint masses over the first colours."""
        first = [LogisticOf(head, theta, k).joint(x) for k in (c, c + 1)]
        return first[1] - first[0]

    for c, k in itertools.product(range(3), range(3)):
        other = x.clone()
        other[0, k] += 40
        changed = (of_colour(c, x) - of_colour(c, other)).abs().item() > 1e-9
        assert changed == (k <= c), (c, k)


class LogisticOf:
    """The mixture over the first ``count`` colours alone: its later masses sum to one and drop out."""

    def __init__(self, head, theta: Tensor, count: int) -> None:
        self.head, self.theta, self.count = head, theta, count

    def joint(self, x: Tensor) -> Tensor:
        logits, mean, log_scale, a = self.head.split(self.theta)
        y = self.head.scaled(x, mean)
        total = logits.log_softmax(1)
        for c in range(self.count):
            shift = sum(a[:, p] * y[:, k] for p, (to, k) in enumerate(self.head.pairs) if to == c)
            total = total + self.head.mass(x[:, c], mean[:, c] + shift, log_scale[:, c], 256)
        return total.logsumexp(1)


def test_the_likelihood_is_the_sum_over_pixels_and_the_loss_its_mean():
    model, x = build((3, 4, 8)), images((3, 4, 8), 4, 5)
    theta = model(x)
    by_hand = sum(
        model.mixture.log_prob(x[:, :, i, j], theta[:, :, i, j]) for i, j in itertools.product(range(4), range(8))
    )
    log_p = model.log_prob(x, SampleRng(0, range(5)))
    torch.testing.assert_close(log_p, by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_p[2:3], model.log_prob(x[2:3], SampleRng(0, [2])))
    out = model.loss(Batch(x=x), step())
    assert out["loss"].item() == pytest.approx(-log_p.mean().item() / 96, rel=1e-12)
    assert out["bits_per_dim"].item() == pytest.approx(out["loss"].item() / math.log(2), rel=1e-12)


def test_the_two_log_likelihoods_are_one_net():
    exact, other = (build((3, 4, 4), levels=256, log_likelihood=form) for form in ("exact", "openai"))
    x = images((3, 4, 4), 256, 4)
    assert torch.equal(exact(x), other(x))
    a, b = (m.log_prob(x, SampleRng(0, range(4))) for m in (exact, other))
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.02)


# ---------------------------------------------------------------------------------------------- layers


def test_concat_elu_is_elu_of_both_signs():
    x = torch.linspace(-9, 9, 41).requires_grad_()
    ours, theirs = concat_elu(x, 0), F.elu(torch.cat([x, -x]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    weight = torch.linspace(1, 2, 82)
    a, b = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(a[x != 0], b[x != 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_first_batch_gives_every_layer_zero_mean_and_unit_variance(conditional: bool):
    spec = DataSpec(name="test", kind="image", shape=(1, 8, 8), levels=17, classes=("a", "b", "c"))
    with seeded("test"):
        model = PixelCNNPP(
            PixelCNNPP.Config(filters=6, layers=2, mixtures=2, dropout=0.5, conditional=conditional), spec
        )
    b, seen = Batch(x=images((1, 8, 8), 17, 40), label=torch.arange(40) % 3), {}

    def watch(name: str):
        return lambda m, args, out: seen.__setitem__(name, (m.init_scale, out))

    s = step()
    with torch.no_grad(), using(s):
        model.prepare(b, s)
    for name, m in model.named_modules():
        if isinstance(m, NormedConv2d):
            m.register_forward_hook(watch(name))
    s = step()  # the same masks of dropout again
    with torch.no_grad(), using(s):
        model(b.x, b.label if conditional else None)
    assert len(seen) == sum(isinstance(m, NormedConv2d) for m in model.modules()) > 60
    for name, (scale, out) in seen.items():
        sd, mean = torch.std_mean(out, (0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-10, name
        assert (sd - scale).abs().max() < 1e-6, name
    assert not [n for n, m in model.named_modules() if isinstance(m, NormedConv2d) and m._forward_pre_hooks]


def test_a_constant_output_is_left_at_its_scale():
    conv = NormedConv2d(2, 3)
    conv.fit(torch.ones(4, 2, 3, 3))
    assert torch.equal(conv.g, torch.ones(3))
    assert conv(torch.ones(4, 2, 3, 3)).abs().max() < 1e-12


def test_the_weights_length_is_g():
    for name, m in build((3, 4, 4)).named_modules():
        if isinstance(m, NormedConv2d):
            w = m.kernel().transpose(0, 1) if "grow" in name else m.kernel()
            torch.testing.assert_close(w.flatten(1).norm(dim=1), m.g.abs())


@pytest.mark.parametrize("conditional", [False, True])
def test_gradients_reach_every_parameter(conditional: bool):
    model = build((3, 8, 8), conditional=conditional)
    b = Batch(x=images((3, 8, 8), 4, 6), label=torch.arange(6) % 3)
    model.loss(b, step())["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("shape", "layers", "conditional"),
    [((1, 8, 12), 2, False), ((3, 8, 4), 1, True), ((1, 4, 4), 3, True), ((3, 16, 8), 2, False)],
)
def test_cached_sampling_is_naive_sampling(shape: tuple[int, ...], layers: int, conditional: bool):
    model = build(shape, levels=17, layers=layers, conditional=conditional)
    n, labels = 3, torch.tensor([0, 2, 1]) if conditional else None
    cached = model.sample(SampleRng(0, range(n)), labels, temperature=0.8)
    assert torch.equal(cached, model.sample_naive(SampleRng(0, range(n)), labels, temperature=0.8))
    assert cached.shape == (n, *shape) and cached.dtype == torch.uint8 and cached.double().std() > 0.5
    with torch.no_grad():  # the same parameters on the way
        networks = [Cached(model, n, model.one_hot(labels)), Naive(lambda x: model(x, labels), cached, 1)]
        for i, j in itertools.product(*map(range, shape[1:])):
            a, b = (network.logits(i, j, 0) for network in networks)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
            for network in networks:
                network.put(i, j, 0, cached[:, :, i, j].long())


def test_cached_sampling_in_float32_gives_the_same_images():
    torch.set_default_dtype(torch.float32)
    model = build((1, 8, 8), levels=17, filters=16)
    rng = [SampleRng(1, range(8)) for _ in range(2)]
    assert torch.equal(model.sample(rng[0]), model.sample_naive(rng[1]))


def test_samples_are_kept_by_index_and_know_more_than_256_levels():
    model = build((1, 4, 4), levels=1000)
    many = model.sample(SampleRng(0, range(6)))
    assert many.dtype == torch.int16 and torch.equal(model.sample(SampleRng(0, [4])), many[4:5])
    assert not torch.equal(model.sample(SampleRng(1, range(6))), many)


@pytest.mark.parametrize("C", [1, 3])
def test_completion_keeps_what_is_given_and_draws_the_rest_as_the_naive_route_does(C: int):
    model, rows, known = build((C, 4, 8), 17), range(6), 11  # a row of eight and three more
    drawn, given = model.sample(SampleRng(0, rows)), images((C, 4, 8), 17, 6)
    before = torch.arange(32).view(4, 8) < known
    done = model.complete(given, known, SampleRng(0, rows))
    assert (done == given)[..., before].all() and (done != drawn)[..., ~before].any()
    u = SampleRng(0, rows).uniform("pixel", (6, 1 + C, 4, 8))
    with torch.no_grad():
        theta = model(done)
    for i, j in itertools.product(range(4), range(8)):
        if not before[i, j]:
            assert torch.equal(model.mixture.sample(theta[:, :, i, j], u[:, :, i, j]), done[:, :, i, j].long()), (i, j)
    assert torch.equal(model.complete(given, 0, SampleRng(0, rows)), drawn)
    assert torch.equal(model.complete(given, 32, SampleRng(0, rows)), given.to(torch.uint8))
    assert torch.equal(model.complete(drawn, known, SampleRng(0, rows)), drawn)


def test_a_pixels_samples_have_its_own_frequencies():
    """The first two pixels of 3,000 images against their joint masses, by chi-square."""
    model, n, K = build((1, 4, 4), levels=3), 3000, 3
    x = model.sample(SampleRng(0, range(n))).flatten(1)[:, :2].long()
    pairs = torch.zeros(9, 1, 4, 4, dtype=torch.long)
    pairs[:, 0, 0, :2] = torch.tensor(list(itertools.product(range(K), repeat=2)))
    with torch.no_grad():
        log_p = model.mixture.log_prob(pairs, model(pairs))[:, 0, :2].sum(1)
    expected = n * log_p.exp()
    assert expected.sum().item() == pytest.approx(n, rel=1e-12)
    chi2 = ((torch.bincount(x[:, 0] * K + x[:, 1], minlength=9) - expected) ** 2 / expected).sum()
    assert chi2 < 26.1  # 0.999 quantile of chi-square with 8 degrees of freedom


# ---------------------------------------------------------------------------------------------- use


def test_training_learns_and_dropout_ends_with_it():
    model = build((1, 8, 8), filters=12, layers=1, dropout=0.2)
    x = (torch.arange(64).view(1, 1, 8, 8) + torch.arange(24).view(24, 1, 1, 1)) % 3  # three images of three levels
    with torch.no_grad():
        model.prepare(Batch(x=x), step())
    optimizer, keys = torch.optim.Adam(model.parameters(), 5e-3), Keys(0)
    model.train()
    for number in range(80):
        s = Step(number, 80, keys.open("model", number), torch.zeros(()))
        with using(s):
            loss = model.loss(Batch(x=x), s)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    nats = -model.log_prob(x, Rng(torch.zeros(2, dtype=torch.long))).mean().item()
    assert math.log(3) - 0.01 < nats < math.log(3) + 1


def test_labels_matter_where_they_are_wanted_and_only_there():
    model, x, rng = build((1, 4, 4), conditional=True), images((1, 4, 4), 4, 3), SampleRng(0, range(3))
    a, b = (model.log_prob(x, rng, torch.full((3,), y)) for y in (0, 1))
    assert (a - b).abs().min() > 1e-3
    with pytest.raises(UsageError, match="needs labels"):
        model.log_prob(x, rng)
    with pytest.raises(UsageError, match="takes no labels"):
        build((1, 4, 4)).sample(rng, torch.zeros(3))
    with pytest.raises(UsageError, match="temperature"):
        build((1, 4, 4)).sample(rng, temperature=0)
    assert PixelCNNPP.streams(model.config)["x"].fields == ("x", "label")
    assert PixelCNNPP.streams(PixelCNNPP.Config())["x"].fields == ("x",)


def test_what_it_cannot_model_is_refused():
    with pytest.raises(UsageError, match="integer levels"):
        PixelCNNPP(PixelCNNPP.Config(), DataSpec(name="points", kind="points", shape=(2,)))
    with pytest.raises(UsageError, match="classes"):
        spec = DataSpec(name="plain", kind="image", shape=(1, 4, 4), levels=2)
        PixelCNNPP(PixelCNNPP.Config(conditional=True), spec)
    for H, W in ((6, 8), (8, 6)):
        with pytest.raises(UsageError, match=f"{H}x{W}"):
            build((1, H, W))


def test_the_papers_net_has_its_size():
    spec = DataSpec(name="test", kind="image", shape=(3, 32, 32), levels=256)
    with torch.device("meta"):
        model = PixelCNNPP(PixelCNNPP.Config(), spec)
    assert model.mixture.parameters == 100
    p, k = 160, 5
    # 2 x 3 and 2 x 2 taps: the two convolutions of a layer, and the 1x1 ones for u and for both shortcuts
    down, shortcuts = (2 + 4) * p * p * (6 + 4) + 2 * p * p, 4 * p * p
    layers = 3 * k * down + (3 * k + 2) * (down + shortcuts)
    weights = layers + 2 * 2 * p * p * (6 + 4) + 4 * p * (6 + 3 + 2) + 100 * p
    assert sum(m.v.numel() for m in model.modules() if isinstance(m, NormedConv2d)) == weights
    outputs = sum(m.g.numel() for m in model.modules() if isinstance(m, NormedConv2d))
    assert sum(q.numel() for q in model.parameters()) == weights + 2 * outputs
