"""Models of sequences, rnn and wavenet: order, likelihood and sampler, each against brute force."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.autoregressive.rnn import RNN
from gencli.models.autoregressive.wavenet import WaveNet
from gencli.nn.causal import invert_cdf
from gencli.nn.sequence import Naive, Sequences, flatten, places, unflatten
from gencli.rng import Keys, Rng, SampleRng, seeded, using

KINDS = {1: "text", 2: "audio", 3: "image"}
# shape, coordinates
CASES = [((1, 5, 4), False), ((1, 5, 4), True), ((3, 3, 2), False), ((3, 3, 2), True), ((1, 20), False), ((20,), False)]
SMALL = {RNN: {"hidden": 6, "layers": 3}, WaveNet: {"channels": 5, "layers": 3, "skip": 7}}
both = pytest.mark.parametrize("cls", [RNN, WaveNet])
cases = pytest.mark.parametrize(("shape", "coordinates"), CASES)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # examples are drawn by torch.randint
    yield
    torch.set_default_dtype(torch.float32)


def build(
    cls: type[Sequences], shape: tuple[int, ...], levels: int = 2, scale: float = 2.0, **config: Any
) -> Sequences:
    """A model whose weights are far from their start, so that its probabilities are far from uniform."""
    spec = DataSpec(
        name="test",
        kind=KINDS[len(shape)],
        shape=shape,
        levels=levels,
        classes=("a", "b", "c"),
        vocabulary=tuple(map(str, range(levels))) if len(shape) == 1 else (),
    )
    with seeded("test"):
        model = cls(cls.Config(**{**SMALL[cls], **config}), spec).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def step(number: int = 0) -> Step:
    return Step(number, 1, Keys(0).open("test", number), torch.zeros(()))


def sees(model: Sequences) -> Tensor:
    """(D, D) booleans: do the logits of position t depend on the value at position s?"""
    D = model.spec.dims
    values = model.inputs.values().detach()

    def logits(e: Tensor) -> Tensor:
        return model.network(model.inputs.shift(e), None)[0].sum(-1)

    total = 0.0
    for seed in range(3):  # a ReLU may be off in one
        s = torch.randint(len(values), (1, D), generator=torch.Generator().manual_seed(seed))
        total = total + torch.autograd.functional.jacobian(logits, values[s]).abs().sum((1, 3))
    return total != 0


def test_the_order_is_raster_with_colours_in_turn() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    s = flatten(x)
    for t, (i, j, c) in enumerate(itertools.product(range(4), range(5), range(3))):
        assert torch.equal(s[:, t], x[:, c, i, j])
    assert torch.equal(unflatten(s, (3, 4, 5)), x)
    for other in (x.view(2, 1, 60), x.view(2, 60)):
        assert torch.equal(flatten(other), x.view(2, 60))
        assert torch.equal(unflatten(x.view(2, 60), other.shape[1:]), other)


def test_a_place_is_row_column_and_colour() -> None:
    assert places((1, 3, 2)).tolist() == [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]
    assert places((2, 1, 2)).tolist() == [[0, -1, 1, 0], [0, -1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]


@both
def test_inputs_are_the_value_before_and_the_place_of_this_one(cls: type[Sequences]) -> None:
    model = build(cls, (3, 2, 2), levels=5, coordinates=True)
    x = torch.randint(5, (4, 3, 2, 2))
    inputs = model.inputs(flatten(x))
    assert inputs.shape == (4, 12, 1 + 5 + 2 + 3)
    assert (inputs[:, 0, :6] == 0).all()
    assert torch.equal(inputs[:, 1:, 0], model.spec.scale(flatten(x))[:, :-1])
    assert torch.equal(inputs[:, 1:, 1:6].argmax(-1), flatten(x)[:, :-1])
    assert (inputs[:, 1:, 1:6].sum(-1) == 1).all()
    assert torch.equal(inputs[2, :, 6:], places((3, 2, 2)))
    assert build(cls, (1, 2, 2)).inputs.width == 1  # of two levels, a number says it all


@both
@cases
def test_logits_see_what_came_before_and_nothing_else(
    cls: type[Sequences], shape: tuple[int, ...], coordinates: bool
) -> None:
    model = build(cls, shape, levels=3, scale=1.0, coordinates=coordinates)
    t = torch.arange(model.spec.dims)
    before = t[:, None] > t
    if isinstance(model, WaveNet):
        assert model.receptive_field == 15  # 1 + two stacks of 1 + 2 + 4
        before &= t[:, None] - t <= 15
    assert torch.equal(sees(model), before)


@both
@cases
def test_a_change_of_raw_data_is_seen_by_later_positions_alone(
    cls: type[Sequences], shape: tuple[int, ...], coordinates: bool
) -> None:
    model = build(cls, shape, levels=3, coordinates=coordinates)
    x = torch.randint(3, (1, *shape))
    for where in itertools.product(*map(range, shape)):
        other = x.clone()
        other[0][where] = (x[0][where] + 1) % 3
        changed = (model(x) != model(other)).any(-1)[0]
        c, i, j = (0, 0, *where)[-3:] if len(shape) < 3 else where
        t = j if len(shape) < 3 else (i * shape[2] + j) * shape[0] + c
        assert not changed[: t + 1].any()
        assert changed[t + 1 : t + 2].all()


@both
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    ("shape", "levels", "coordinates"),
    [
        ((1, 2, 2), 2, False),
        ((1, 2, 2), 2, True),
        ((3, 1, 2), 2, False),
        ((3, 1, 2), 3, True),
        ((1, 5), 3, False),
        ((5,), 3, False),
    ],
)
def test_the_probabilities_of_all_examples_sum_to_one(
    cls: type[Sequences], shape: tuple[int, ...], levels: int, coordinates: bool, conditional: bool
) -> None:
    model = build(cls, shape, levels, coordinates=coordinates, conditional=conditional)
    x = torch.tensor(list(itertools.product(range(levels), repeat=model.spec.dims))).view(-1, *shape)
    labels = torch.full((len(x),), 2) if conditional else None
    with torch.no_grad():
        log_p = model.log_prob(x, SampleRng(0, range(len(x))), labels)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.std() > 0.1  # and they are not uniform


@both
@cases
@pytest.mark.parametrize("conditional", [False, True])
def test_cached_sampling_is_naive_sampling(
    cls: type[Sequences], shape: tuple[int, ...], coordinates: bool, conditional: bool
) -> None:
    model = build(cls, shape, levels=5, coordinates=coordinates, conditional=conditional)
    n, labels = 4, torch.tensor([0, 1, 2, 1]) if conditional else None
    cached = model.sample(SampleRng(0, range(n)), labels, temperature=0.8)
    assert torch.equal(cached, model.sample_naive(SampleRng(0, range(n)), labels, temperature=0.8))
    assert cached.shape == (n, *shape) and cached.dtype == torch.uint8 and not cached.is_inference()
    assert cached.double().std() > 0.5
    s, h = flatten(cached), model.one_hot(labels)
    with torch.no_grad():  # the same logits on the way, whatever is put
        networks = [model.cached(n, h), Naive(lambda s: model.network(model.inputs(s), h), s)]
        for t in range(model.spec.dims):
            a, b = (network.logits(t) for network in networks)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            for network in networks:
                network.put(t, s[:, t].long())


@both
def test_cached_sampling_in_float32_gives_the_same_images(cls: type[Sequences]) -> None:
    torch.set_default_dtype(torch.float32)
    model = build(cls, (1, 8, 8), levels=17, coordinates=True, layers=2)
    rng = [SampleRng(1, range(16)) for _ in range(2)]
    assert torch.equal(model.sample(rng[0]), model.sample_naive(rng[1]))


@both
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_models_own_frequencies(cls: type[Sequences], temperature: float) -> None:
    model, n = build(cls, (2,), levels=3, scale=3.0), 4000
    x = model.sample(SampleRng(0, range(n)), temperature=temperature).long()
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        z = model(pairs) / temperature
    expected = n * z.log_softmax(-1).gather(2, pairs[:, :, None]).sum((1, 2)).exp()
    chi2 = ((torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9) - expected) ** 2 / expected).sum()
    assert chi2 < 26.1  # 0.999 quantile of chi-square with 8 degrees of freedom


@both
@cases
def test_completion_keeps_what_is_given_and_draws_the_rest_as_the_naive_route_does(
    cls: type[Sequences], shape: tuple[int, ...], coordinates: bool
) -> None:
    model, rows = build(cls, shape, 5, scale=4.0, coordinates=coordinates), range(40)
    drawn = model.sample(SampleRng(0, rows))
    given = torch.randint(5, drawn.shape)
    known, colours = 4, shape[0] if len(shape) == 3 else 1  # pixels: with three colours twelve values
    done = model.complete(given, known, SampleRng(0, rows))
    first = known * colours
    assert torch.equal(flatten(done)[:, :first], flatten(given)[:, :first].to(torch.uint8))
    assert (flatten(done) != flatten(drawn))[:, first:].any()
    u, z = flatten(SampleRng(0, rows).uniform("value", drawn.shape)), model(done)
    for t in range(first, model.spec.dims):  # every draw inverts its cdf given all before
        assert torch.equal(invert_cdf(z[:, t], u[:, t]), flatten(done)[:, t].long()), t
    assert torch.equal(model.complete(given, 0, SampleRng(0, rows)), drawn)
    assert torch.equal(model.complete(given, model.spec.dims // colours, SampleRng(0, rows)), given.to(torch.uint8))
    assert torch.equal(model.complete(drawn, known, SampleRng(0, rows)), drawn)


@both
@cases
def test_a_head_of_zeros_scores_the_bits_of_a_level(
    cls: type[Sequences], shape: tuple[int, ...], coordinates: bool
) -> None:
    model = build(cls, shape, levels=13, coordinates=coordinates)
    for p in (model.head if cls is RNN else model.last).parameters():
        p.data.zero_()
    x = torch.randint(13, (3, *shape))
    assert model.loss(Batch(x=x), step())["bits_per_dim"].item() == pytest.approx(math.log2(13), rel=1e-14)
    nats = model.log_prob(x, SampleRng(0, range(3)))
    torch.testing.assert_close(nats, torch.full((3,), -model.spec.dims * math.log(13)), rtol=1e-14, atol=0)


@both
def test_the_loss_is_the_mean_of_the_likelihood(cls: type[Sequences]) -> None:
    model, x = build(cls, (3, 4, 4), levels=4, coordinates=True), torch.randint(4, (5, 3, 4, 4))
    out = model.loss(Batch(x=x), step())
    nats = -model.log_prob(x, SampleRng(0, range(5))).mean() / 48
    assert out["loss"].item() == pytest.approx(nats.item(), rel=1e-12)
    assert out["bits_per_dim"].item() == pytest.approx(nats.item() / math.log(2), rel=1e-12)


@pytest.mark.parametrize("conditional", [False, True])
def test_long_sequences_are_scored_a_few_at_a_time(conditional: bool) -> None:
    model = build(WaveNet, (30000,), levels=3, conditional=conditional)
    x, labels = torch.randint(3, (5, 30000)), torch.tensor([0, 1, 2, 0, 1]) if conditional else None
    with torch.no_grad():
        whole = -model.nll(x, labels).sum(1)
        torch.testing.assert_close(model.log_prob(x, SampleRng(0, range(5)), labels), whole, rtol=1e-12, atol=0)


@both
def test_labels_matter_where_they_are_wanted_and_only_there(cls: type[Sequences]) -> None:
    model, x = build(cls, (1, 4, 4), conditional=True), torch.randint(2, (3, 1, 4, 4))
    rng = SampleRng(0, range(3))
    a, b = (model.log_prob(x, rng, torch.full((3,), y)) for y in (0, 1))
    assert (a - b).abs().min() > 1e-3
    with pytest.raises(UsageError, match="needs labels"):
        model.log_prob(x, rng)
    with pytest.raises(UsageError, match="takes no labels"):
        build(cls, (1, 4, 4)).sample(rng, torch.zeros(3))
    for temperature in (0, -1, math.nan):
        with pytest.raises(UsageError, match="temperature"):
            build(cls, (1, 4, 4)).sample(rng, temperature=temperature)
    assert cls.streams(model.config)["x"].fields == ("x", "label")
    assert cls.streams(cls.Config())["x"].fields == ("x",)


@both
def test_what_it_cannot_model_is_refused(cls: type[Sequences]) -> None:
    with pytest.raises(UsageError, match="integer levels"):
        cls(cls.Config(), DataSpec(name="points", kind="points", shape=(2,)))
    with pytest.raises(UsageError, match="classes"):
        cls(cls.Config(conditional=True), DataSpec(name="plain", kind="image", shape=(1, 4, 4), levels=2))
    for shape in ((9,), (1, 9)):
        with pytest.raises(UsageError, match="coordinates"):
            build(cls, shape, coordinates=True)


@both
def test_text_of_many_symbols_is_drawn_as_it_comes(cls: type[Sequences]) -> None:
    model = build(cls, (7,), levels=300, scale=3.0)
    x = model.sample(SampleRng(0, range(5)))
    assert x.shape == (5, 7) and x.dtype == torch.int16 and x.max() > 255
    assert model.log_prob(x, SampleRng(0, range(5))).isfinite().all()


@both
def test_training_learns_and_dropout_ends_with_it(cls: type[Sequences]) -> None:
    model = build(cls, (1, 4, 4), scale=1.0, dropout=0.2, **({"hidden": 24} if cls is RNN else {"channels": 24}))
    x = (torch.arange(16).view(1, 1, 4, 4) + torch.arange(33).view(33, 1, 1, 1)) % 3 == 0  # three images
    optimizer, keys = torch.optim.Adam(model.parameters(), 2e-2), Keys(0)
    model.train()
    masked = set()
    for number in range(80):
        s = Step(number, 80, keys.open("model", number), torch.zeros(()))
        with using(s):
            loss = model.loss(Batch(x=x.byte()), s)["loss"]
        loss.backward()
        masked.add(round(loss.item(), 12))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    nats = -model.log_prob(x.byte(), Rng(torch.zeros(2, dtype=torch.long))).mean().item()
    assert math.log(3) - 0.01 < nats < math.log(3) + 0.25
    assert len(masked) == 80
