"""PixelCNN: the order of its pixels and colours, its likelihood and its sampler, each against brute force."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.pixelcnn import Cached, PixelCNN
from gencli.nn.causal import CausalConv2d, ColourNorm, HorizontalConv2d, Naive, VerticalConv2d, centre, invert_cdf
from gencli.nn.dropout import Dropout, name_layers
from gencli.rng import Keys, Rng, SampleRng, seeded, using

CASES = [
    ("gated", 1, "joint"),
    ("gated", 3, "joint"),
    ("gated", 3, "independent"),
    ("single", 1, "joint"),
    ("single", 3, "joint"),
    ("single", 3, "independent"),
    ("normed", 1, "joint"),
    ("normed", 3, "joint"),
]
cases = pytest.mark.parametrize(("stacks", "C", "colours"), CASES)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # examples are drawn by torch.randint
    yield
    torch.set_default_dtype(torch.float32)


def build(shape: tuple[int, ...], levels: int = 2, scale: float = 2.0, **config) -> PixelCNN:
    """A model whose weights are far from their start, so that its probabilities are far from uniform."""
    spec = DataSpec(name="test", kind="image", shape=shape, levels=levels, classes=("a", "b", "c"))
    if config.get("stacks") == "normed":
        config = {"channels": 6, **config, "stacks": "single", "layer_norm": True}
    with seeded("test"):
        model = PixelCNN(
            PixelCNN.Config(**{"channels": 7, "layers": 2, "head": 8, "first_kernel": 5, **config}), spec
        ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
        for norm in (m for m in model.modules() if isinstance(m, ColourNorm)):
            norm.bias.copy_(torch.linspace(-0.3, 0.4, len(norm.bias)))
            norm.weight.add_(norm.bias)
    return model


def step(seed: int = 0, offset: int = 0, stride: int = 1) -> Step:
    return Step(0, 1, Keys(seed).open("test", offset=offset, stride=stride), torch.zeros(()), 0, offset, stride)


def sees(model: PixelCNN) -> Tensor:
    """(outputs, inputs) booleans in drawing order: pixels in raster order, colours within. Do logits depend on x?"""
    x = model.spec.scale(
        torch.randint(model.levels, (1, *model.spec.shape), generator=torch.Generator().manual_seed(0))
    )

    def logits(scaled: Tensor) -> Tensor:
        return model.network(scaled, None).permute(0, 2, 3, 1, 4).flatten(0, 3).sum(-1)

    # three images: a ReLU may be off in one
    total = sum(torch.autograd.functional.jacobian(logits, x + 0.1 * t).abs() for t in range(3))
    return total[:, 0].permute(0, 2, 3, 1).flatten(1) != 0


@cases
def test_no_logit_sees_its_own_pixel_or_a_later_one(stacks: str, C: int, colours: str):
    model = build((C, 6, 5), stacks=stacks, colours=colours, scale=1.0, channels=24, head=24)
    group = C if colours == "joint" else 1
    when = torch.arange(6 * 5 * C) // (C // group)
    assert not (sees(model) & (when[:, None] <= when)).any()


@pytest.mark.parametrize(("C", "colours"), [(1, "joint"), (3, "joint"), (3, "independent")])
def test_the_gated_stacks_see_all_that_came_before(C: int, colours: str):
    model = build((C, 6, 5), colours=colours, scale=1.0, channels=24, head=24, layers=5, first_kernel=3)
    group = C if colours == "joint" else 1
    when = torch.arange(6 * 5 * C) // (C // group)
    assert torch.equal(sees(model), when[:, None] > when)


def test_the_single_stack_has_its_blind_spot():
    model = build((1, 6, 7), stacks="single", scale=1.0, channels=24, first_kernel=3, layers=5)
    seen = sees(model)[4 * 7 + 3].view(6, 7)  # what pixel (4, 3) sees
    # k x k kernels reach k // 2 columns right for each row up: the triangle beyond is the blind spot
    right = [[j - 3 <= 4 - i for j in range(7)] for i in range(4)]
    assert torch.equal(seen[:4], torch.tensor(right))
    assert seen[4].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("colours", [1, 3])
def test_a_cropped_convolution_is_the_masked_one(strict: bool, colours: int):
    n_in, n_out, k = 6, 9, 5
    conv = CausalConv2d(n_in, n_out, k, centre(n_in, n_out, colours, strict))
    x = torch.randn(2, n_in, 7, 6)
    kernel = torch.randn(n_out, n_in, k, k)
    with torch.no_grad():
        conv.above.weight.copy_(kernel[:, :, : k // 2])
        conv.left.weight.copy_(kernel[:, :, k // 2 : k // 2 + 1, : conv.left.weight.shape[-1]])
    for o, i in itertools.product(range(n_out), range(n_in)):
        kernel[o, i, k // 2 + 1 :] = 0
        kernel[o, i, k // 2, k // 2 + 1 :] = 0
        mine, theirs = o // (n_out // colours), i // (n_in // colours)
        if not (mine > theirs if strict else mine >= theirs):
            kernel[o, i, k // 2, k // 2] = 0
    torch.testing.assert_close(conv(x), F.conv2d(x, kernel, conv.left.bias, padding=k // 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strict", [True, False])
def test_the_two_parts_of_a_causal_kernel(strict: bool):
    x, k = torch.randn(2, 3, 6, 5), 3
    v, h = VerticalConv2d(3, 4, k, strict), HorizontalConv2d(3, 4, k, not strict)
    full_v, full_h = torch.zeros(4, 3, k, k), torch.zeros(4, 3, k, k)
    full_v[:, :, : v.height] = v.weight.detach()
    full_h[:, :, k // 2, : h.weight.shape[-1]] = h.weight[:, :, 0].detach()
    torch.testing.assert_close(v(x), F.conv2d(x, full_v, v.bias, padding=k // 2))
    torch.testing.assert_close(h(x), F.conv2d(x, full_h, h.bias, padding=k // 2))


@cases
@pytest.mark.parametrize("conditional", [False, True])
def test_the_probabilities_of_all_images_sum_to_one(stacks: str, C: int, colours: str, conditional: bool):
    shape = (1, 2, 3) if C == 1 else (C, 1, 2)
    model = build(shape, stacks=stacks, colours=colours, conditional=conditional)
    x = torch.tensor(list(itertools.product(range(2), repeat=model.spec.dims))).view(-1, *shape)
    labels = torch.full((len(x),), 2) if conditional else None
    with torch.no_grad():
        log_p = model.log_prob(x, SampleRng(0, range(len(x))), labels)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.std() > 0.1  # and they are not uniform


@cases
@pytest.mark.parametrize("conditional", [False, True])
def test_cached_sampling_is_naive_sampling(stacks: str, C: int, colours: str, conditional: bool):
    model = build((C, 5, 4), levels=5, stacks=stacks, colours=colours, conditional=conditional)
    n, labels = 4, torch.tensor([0, 1, 2, 1]) if conditional else None
    cached = model.sample(SampleRng(0, range(n)), labels, temperature=0.8)
    assert torch.equal(cached, model.sample_naive(SampleRng(0, range(n)), labels, temperature=0.8))
    assert cached.shape == (n, C, 5, 4) and cached.dtype == torch.uint8
    assert cached.double().std() > 0.5
    with torch.no_grad():  # the same logits on the way, whatever is put
        networks = [Cached(model, n, model.one_hot(labels)), Naive(lambda x: model(x, labels), cached, model.colours)]
        for i, j, g in itertools.product(range(5), range(4), range(model.colours)):
            a, b = (network.logits(i, j, g) for network in networks)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
            for network in networks:
                network.put(i, j, g, cached.unflatten(1, (model.colours, -1))[:, g, :, i, j].long())


def test_cached_sampling_in_float32_gives_the_same_images():
    torch.set_default_dtype(torch.float32)
    model = build((1, 8, 8), levels=17, channels=16, layers=3)
    rng = [SampleRng(1, range(16)) for _ in range(2)]
    assert torch.equal(model.sample(rng[0]), model.sample_naive(rng[1]))


@pytest.mark.parametrize(("stacks", "temperature"), [("gated", 1.0), ("single", 1.0), ("gated", 0.5)])
def test_samples_have_the_models_own_frequencies(stacks: str, temperature: float):
    model, n = build((1, 1, 2), levels=3, stacks=stacks), 4000
    x = model.sample(SampleRng(0, range(n)), temperature=temperature).flatten(1).long()
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        z = model(pairs.view(9, 1, 1, 2)).flatten(1, 3) / temperature
    expected = n * z.log_softmax(-1).gather(2, pairs[:, :, None]).sum((1, 2)).exp()
    chi2 = ((torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9) - expected) ** 2 / expected).sum()
    assert chi2 < 26.1  # 0.999 quantile of chi-square with 8 degrees of freedom


def test_the_cdf_is_inverted():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-16])
    assert invert_cdf(logits, u).tolist() == [0, 0, 1, 1, 2, 2]
    assert invert_cdf(logits, u, temperature=1e-3).tolist() == [1] * 6


@pytest.mark.parametrize("stacks", ["gated", "single"])
def test_labels_matter_where_they_are_wanted_and_only_there(stacks: str):
    model, x = build((1, 4, 4), stacks=stacks, conditional=True), torch.randint(2, (3, 1, 4, 4))
    rng = SampleRng(0, range(3))
    a, b = (model.log_prob(x, rng, torch.full((3,), y)) for y in (0, 1))
    assert (a - b).abs().min() > 1e-3
    with pytest.raises(UsageError, match="needs labels"):
        model.log_prob(x, rng)
    with pytest.raises(UsageError, match="takes no labels"):
        build((1, 4, 4), stacks=stacks).sample(rng, torch.zeros(3))
    with pytest.raises(UsageError, match="temperature"):
        build((1, 4, 4), stacks=stacks).sample(rng, temperature=0)
    assert PixelCNN.streams(model.config)["x"].fields == ("x", "label")
    assert PixelCNN.streams(PixelCNN.Config())["x"].fields == ("x",)


def test_what_it_cannot_model_is_refused():
    with pytest.raises(UsageError, match="integer levels"):
        PixelCNN(PixelCNN.Config(), DataSpec(name="points", kind="points", shape=(2,)))
    with pytest.raises(UsageError, match="classes"):
        PixelCNN(PixelCNN.Config(conditional=True), DataSpec(name="plain", kind="image", shape=(1, 4, 4), levels=2))
    with pytest.raises(UsageError, match="at least 3"):
        build((3, 4, 4), channels=2)
    with pytest.raises(ValueError, match="odd"):
        PixelCNN.Config(kernel=4)


def test_the_loss_is_the_mean_of_the_likelihood():
    model, x = build((3, 4, 4), levels=4), torch.randint(4, (5, 3, 4, 4))
    out = model.loss(Batch(x=x), step())
    nats = -model.log_prob(x, SampleRng(0, range(5))).mean() / 48
    assert out["loss"].item() == pytest.approx(nats.item(), rel=1e-12)
    assert out["bits_per_dim"].item() == pytest.approx(nats.item() / math.log(2), rel=1e-12)


def test_the_courses_plain_net_has_its_parameters():
    spec = DataSpec(name="test", kind="image", shape=(1, 28, 28), levels=2)
    model = PixelCNN(PixelCNN.Config(stacks="single", kernel=7), spec)
    live = 64 * 24 + 64 + 5 * (64 * 64 * 25 + 64) + 64 * 64 + 64 + 64 * 2 + 2
    assert sum(p.numel() for p in model.parameters()) == live


def test_dropout_keeps_the_mean_and_the_share():
    layer, x = Dropout(0.3), torch.full((500, 40), 2.0)
    with using(step()):
        y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 2 / 0.7}
    assert (y > 0).double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / x.numel()))
    assert y.mean().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(layer.eval()(x), x)
    with pytest.raises(RuntimeError, match="step"):
        layer.train()(x)


def test_dropout_is_a_function_of_the_step_and_the_global_row():
    layers = torch.nn.Sequential(Dropout(0.5), Dropout(0.5))
    name_layers(layers)
    x = torch.ones(8, 33)

    def masks(seed: int, offset: int = 0, stride: int = 1) -> list[Tensor]:
        with using(step(seed, offset, stride)):
            return [layer(x[offset::stride]) for layer in layers]

    first, second = masks(0)
    assert not torch.equal(first, second) and not torch.equal(first, masks(1)[0])
    for rank in range(2):
        mine = masks(0, rank, 2)
        assert torch.equal(mine[0], first[rank::2]) and torch.equal(mine[1], second[rank::2])


@pytest.mark.parametrize("stacks", ["gated", "single"])
def test_training_learns_and_dropout_ends_with_it(stacks: str):
    model = build((1, 4, 4), stacks=stacks, scale=1.0, dropout=0.2, channels=16)
    x = (torch.arange(16).view(1, 1, 4, 4) + torch.arange(32).view(32, 1, 1, 1)) % 3 == 0  # three images
    optimizer, keys = torch.optim.Adam(model.parameters(), 1e-2), Keys(0)
    model.train()
    for number in range(60):
        s = Step(number, 60, keys.open("model", number), torch.zeros(()))
        with using(s):
            loss = model.loss(Batch(x=x.byte()), s)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    nats = -model.log_prob(x.byte(), Rng(torch.zeros(2, dtype=torch.long))).mean().item()
    assert math.log(3) - 0.01 < nats < math.log(3) + 0.25


@pytest.mark.parametrize("C", [1, 3])
def test_completion_keeps_what_is_given_and_draws_the_rest_as_the_naive_route_does(C: int) -> None:
    model = build((C, 4, 5), 5)
    rows = range(6)
    drawn = model.sample(SampleRng(0, rows))
    given = torch.randint(5, drawn.shape)
    known = 7  # pixels: one row of five and two more
    before = torch.arange(20).view(4, 5) < known
    done = model.complete(given, known, SampleRng(0, rows))
    assert (done == given)[..., before].all()
    assert (done != drawn)[..., ~before].any()
    u = SampleRng(0, rows).uniform("pixel", given.shape)
    for i, j, g in itertools.product(range(4), range(5), range(C)):  # every draw inverts its cdf given all before
        if not before[i, j]:
            level = invert_cdf(model(done)[:, g, i, j], u[:, g, i, j])
            assert torch.equal(level, done[:, g, i, j].long()), (i, j, g)
    assert torch.equal(model.complete(given, 0, SampleRng(0, rows)), drawn)
    assert torch.equal(model.complete(given, 20, SampleRng(0, rows)), given.to(torch.uint8))
    assert torch.equal(model.complete(drawn, known, SampleRng(0, rows)), drawn)
