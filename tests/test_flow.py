"""What flows share: every term of the bound, the kinds of likelihood, both ways between levels and numbers, actnorm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gencli import data
from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.metrics.likelihood import nll
from gencli.nn.bijections import ActNorm, Chain, initialise, wide
from gencli.nn.couplings import AffineCoupling, MaskedCoupling, MultiScale, Squeeze, mask
from gencli.nn.flow import Flow, FlowConfig
from gencli.rng import Keys, SampleRng
from tests.flows import IMAGE, POINTS, log_det_of_jacobian, normal


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Affine(Flow):
    """z = 2 y + 0.3: one parameter, so that a verb finds a device."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def f(self, x, labels=None):
        return self.scale * x.flatten(1) + 0.3, self.spec.dims * self.scale.log().expand(len(x))

    def f_inverse(self, z, labels=None):
        return ((z - 0.3) / self.scale).reshape(-1, *self.spec.shape)


class Gaussianised(Affine):
    """Data that is uniform over the cube of levels becomes exactly N(0, I)."""

    def f(self, x, labels=None):
        y, a = x.flatten(1), self.config.logit
        v = y + 0.5 if a is None else (y.sigmoid() - a) / (1 - 2 * a)
        log_dv = torch.zeros_like(y) if a is None else nn.functional.logsigmoid(y) + nn.functional.logsigmoid(-y)
        z = torch.special.ndtri(v)
        log_dv = log_dv - (0 if a is None else math.log(1 - 2 * a))
        return z, (log_dv + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).sum(1)


class Fixed:
    """An rng whose uniform numbers are given."""

    def __init__(self, u):
        self.u = u

    def uniform(self, purpose, shape):
        return self.u.expand(shape)


def flow(cls=Affine, spec=IMAGE, **config):
    return cls(FlowConfig(**config), spec)


def levels(n=5, spec=IMAGE):
    return torch.from_numpy(np.random.default_rng(0).integers(spec.levels, size=(n, *spec.shape)).astype(np.uint8))


# ---------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("logit", [None, 1e-6, 0.05, 0.3])
@pytest.mark.parametrize("K", [2, 17, 256])
def test_uniform_levels_cost_exactly_log2_of_their_number(logit, K):
    spec = DataSpec(name="noise", kind="image", shape=(1, 3, 3), levels=K)
    model = flow(Gaussianised, spec, logit=logit)
    x = levels(20, spec)
    log_p = model.log_prob(x, SampleRng(0, range(20)))
    torch.testing.assert_close(-log_p / (9 * math.log(2)), torch.full((20,), math.log2(K)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("logit", [None, 0.05])
def test_the_density_integrated_over_each_level_is_a_distribution_of_levels(logit):
    """Sum over x of the integral over u of exp(log p): all the mass that the flow has within [0, K]."""
    K = 4
    spec = DataSpec(name="one", kind="image", shape=(1, 1, 1), levels=K)
    model = flow(spec=spec, logit=logit)
    node, weight = np.polynomial.legendre.leggauss(60)
    node, weight = torch.from_numpy((node + 1) / 2), torch.from_numpy(weight / 2)
    P, bound = [], []
    for x in range(K):
        rows = torch.full((60, 1, 1, 1), x, dtype=torch.uint8)
        log_p = model.log_prob(rows, Fixed(node.reshape(-1, 1, 1, 1)))
        P.append((weight * log_p.exp()).sum())
        bound.append((weight * log_p).sum())
    ends = torch.tensor([-0.5, 0.5]) if logit is None else torch.tensor([logit, 1 - logit]).logit()
    inside = torch.special.ndtr(2 * ends + 0.3).diff()
    torch.testing.assert_close(torch.stack(P).sum(), inside[0], rtol=1e-9, atol=0)
    assert (torch.stack(bound) < torch.stack(P).log()).all(), "Jensen"


@pytest.mark.parametrize("logit", [None, 1e-6, 0.05])
def test_the_preprocessing_s_determinant_is_its_jacobian_s(logit):
    model = flow(logit=logit)
    x, u = levels(3), torch.from_numpy(np.random.default_rng(1).random((3, *IMAGE.shape)))
    y, log_det = model.to_real(x, Fixed(u))

    def continuous(v, i):  # v = x + u as one real number
        return model.to_real(v, Fixed(torch.zeros(1)))[0]

    torch.testing.assert_close(log_det, log_det_of_jacobian(continuous, x + u), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.from_real(y), x + u)


@pytest.mark.parametrize("K", [2, 256])
def test_both_ends_keep_their_digits_in_float32(K):
    spec = DataSpec(name="ends", kind="image", shape=(1, 1, 2), levels=K)
    model = flow(spec=spec, logit=1e-6)
    x = torch.tensor([0, K - 1], dtype=torch.uint8).reshape(1, 1, 1, 2)
    u = torch.tensor([1e-5, 1 - 1e-5]).float().double().reshape(1, 1, 1, 2)
    y, log_det = model.to_real(x, Fixed(u))
    torch.set_default_dtype(torch.float32)
    y32, log_det32 = model.to_real(x, Fixed(u.float()))
    assert y32.dtype == torch.float32
    torch.testing.assert_close(y32.double(), y, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_det32.double(), log_det, rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------- kinds


def test_only_levels_with_noise_have_bits():
    digits = data.load("digits", "test")
    for dequantization, kind in (("uniform", "upper bound"), ("none", "density")):
        model = flow(spec=digits.spec, dequantization=dequantization).float()
        torch.set_default_dtype(torch.float32)
        row = nll(model, digits, limit=10)
        loss = model.loss(Batch(x=digits.rows(torch.arange(4))["x"], n=4), step())
        torch.set_default_dtype(torch.float64)
        assert row["kind"] == kind
        assert ("bits_per_dim" in row) == ("bits_per_dim" in loss) == (kind == "upper bound")
    points = flow(spec=POINTS)
    assert points.likelihood == "density" and "bits_per_dim" not in points.loss(Batch(x=normal(4, 2), n=4), step())


def step():
    return Step(0, 1, Keys(0).open("model", 0, 0), torch.ones(()))


def test_without_noise_all_data_lies_at_the_centres():
    model = flow(dequantization="none")
    x = levels()
    y, log_det = model.to_real(x, None)
    torch.testing.assert_close(y, (x + 0.5) / 8 - 0.5)
    torch.testing.assert_close(log_det, torch.full((5,), -32 * math.log(8)))


@pytest.mark.parametrize("base", ["normal", "logistic"])
def test_the_loss_is_the_density_by_hand(base):
    model = flow(spec=POINTS)
    model.base = base
    x = normal(6, 2)
    z = 2 * x + 0.3
    if base == "normal":
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    else:
        expected = -z - 2 * (1 + (-z).exp()).log()
    expected = expected.sum(1) + 2 * math.log(2)
    torch.testing.assert_close(model.log_prob(x, None), expected)
    loss = model.loss(Batch(x=x, n=6), step())
    torch.testing.assert_close(loss["loss"], -expected.mean() / 2)


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UsageError, match=r"model\.logit is for levels, and blobs is real-valued"):
        flow(spec=POINTS, logit=0.05)
    with pytest.raises(UsageError, match="variational dequantization is for images, and blobs is points"):
        flow(spec=POINTS, dequantization="variational")
    for bad in ({"logit": 0.0}, {"logit": 0.5}, {"dequantization": "gaussian"}):
        with pytest.raises(ValueError):
            FlowConfig(**bad)


# ---------------------------------------------------------------------------------------------- samples and latents


@pytest.mark.parametrize("logit", [None, 1e-6, 0.05])
@pytest.mark.parametrize("dequantization", ["uniform", "none"])
def test_what_is_encoded_is_decoded_to_the_same_levels(logit, dequantization):
    model = flow(logit=logit, dequantization=dequantization)
    x = levels(40)
    z = model.encode(x, SampleRng(0, range(40)))
    assert z.shape == (40, 32)
    y = model.decode(z)
    assert y.min() >= -1 and y.max() <= 1
    assert torch.equal(model.spec.unscale(y), x)


@pytest.mark.parametrize("base", ["normal", "logistic"])
def test_samples_follow_the_base_and_the_temperature(base):
    model = flow(spec=POINTS)
    model.base = base
    x = model.sample(SampleRng(0, range(4000)))
    sd = (1.0 if base == "normal" else math.pi / math.sqrt(3)) / 2
    torch.testing.assert_close(x.std(0), torch.full((2,), sd), rtol=0.05, atol=0)
    torch.testing.assert_close(x.mean(0), torch.full((2,), -0.15), rtol=0, atol=0.05)
    cold = model.sample(SampleRng(0, range(4000)), temperature=0.5)
    torch.testing.assert_close(cold + 0.15, 0.5 * (x + 0.15))


def test_samples_are_levels_and_those_that_decode_gives():
    model = flow(logit=0.05)
    x = model.sample(SampleRng(0, range(50)))
    assert x.dtype == torch.int64 and x.min() >= 0 and x.max() <= 7 and len(x.unique()) > 3
    assert torch.equal(model.spec.unscale(model.decode(model.prior(SampleRng(0, range(50))))).long(), x)


# ---------------------------------------------------------------------------------------------- layers


def test_actnorm_gives_the_first_batch_zero_mean_and_unit_variance():
    x = 3 * normal(50, 4, 5, 5) + torch.arange(4.0)[:, None, None]
    x[:, 3] = 7.0  # constant: centred alone
    chain = Chain([ActNorm(4), ActNorm(4)])
    with torch.no_grad():
        chain.layers[0].b.fill_(5)
        initialise(chain, lambda: chain(x))
        y, log_det = chain(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-9)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.tensor([1.0, 1, 1, 0]), rtol=0, atol=1e-9)
    sd = x.std((0, 2, 3), correction=0)[:3]
    torch.testing.assert_close(log_det, (-25 * sd.log().sum()).expand(50))
    torch.testing.assert_close(chain.inverse(y), x)
    assert not list(chain.layers[0]._forward_pre_hooks), "and never again"


def net(n_in, n_out):
    return nn.Conv2d(n_in, n_out, 3, padding=1)


@pytest.mark.parametrize("kind", ["checkerboard", "halves"])
def test_masks_are_complementary_and_equal_in_size(kind):
    a, b = mask(kind, 4, 6), mask(kind, 4, 6, swap=True)
    assert torch.equal(a + b, torch.ones(1, 4, 6)) and a.sum() == 12
    if kind == "checkerboard":
        assert torch.equal(a[0, :2, :3], torch.tensor([[1.0, 0, 1], [0, 1, 0]]))
    else:
        assert a[0, :2].all() and not a[0, 2:].any()


def test_a_masked_coupling_is_equation_9():
    b = mask("checkerboard", 4, 4)
    layer, x = MaskedCoupling(b, net(3, 6)), normal(2, 3, 4, 4)
    s, t = layer.net(b * x).chunk(2, 1)
    s = 2 * torch.tanh(s / 2)
    y, log_det = layer(x)
    torch.testing.assert_close(y, b * x + (1 - b) * (x * s.exp() + t))
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda v, i: layer(v)[0], x))
    torch.testing.assert_close(layer.inverse(y), x)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_a_coupling_of_an_odd_number_of_features(swap, even):
    n_1, n_2 = (2, 3) if swap else (3, 2)
    layer, x = AffineCoupling(nn.Linear(n_1, 2 * n_2), swap=swap, even=even), normal(4, 5)
    y, log_det = layer(x)
    stay = ([1, 3] if even else [3, 4]) if swap else ([0, 2, 4] if even else [0, 1, 2])
    assert [i for i in range(5) if torch.equal(y[:, i], x[:, i])] == stay
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda v, i: layer(v)[0], x))
    torch.testing.assert_close(layer.inverse(y), x)


def test_no_scale_underflows():
    layer = AffineCoupling(nn.Linear(1, 2))
    with torch.no_grad():
        layer.net.weight.fill_(0)
        layer.net.bias.copy_(torch.tensor([-1e4, 1.0]))
    x = normal(5, 2)
    y, log_det = layer(x)
    torch.testing.assert_close(log_det, torch.full((5,), -2.0))
    torch.testing.assert_close(layer.inverse(y), x)


def test_half_of_a_squeeze_s_channels_are_a_checkerboard():
    x = normal(2, 3, 4, 6)
    y, log_det = Squeeze()(x)
    assert y.shape == (2, 12, 2, 3) and not log_det.any()
    assert torch.equal(Squeeze().inverse(y), x)
    half = Squeeze().inverse(torch.cat([torch.ones(1, 6, 2, 3), torch.zeros(1, 6, 2, 3)], 1))
    assert torch.equal(half[0], mask("checkerboard", 4, 6).expand(3, 4, 6))


def test_latents_leave_as_the_noise_of_their_learned_prior():
    """log p(z1, z2) = log N(z1; 0, 1) + log N(z2; mu(z1), sigma(z1)), by torch's Normal."""
    scale = MultiScale([Squeeze(), Chain([])], [(4, 2, 2), (2, 2, 2)], [net(2, 4)])
    x = normal(3, 1, 4, 4)
    z, log_det = scale(x)
    z_1, z_2 = Squeeze()(x)[0].chunk(2, 1)
    mu, s = scale.priors[0](z_1).chunk(2, 1)
    N = torch.distributions.Normal
    expected = N(0.0, 1.0).log_prob(z_1).flatten(1).sum(1)
    expected = expected + N(mu, (2 * torch.tanh(s / 2)).exp()).log_prob(z_2).flatten(1).sum(1)
    torch.testing.assert_close(N(0.0, 1.0).log_prob(z).sum(1) + log_det, expected)
    torch.testing.assert_close(scale.inverse(z), x)
    assert torch.equal(z[:, 8:], z_1.flatten(1)), "the last scale's come last"


def test_sums_are_wide():
    assert wide(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.ones(1)).dtype == torch.float64
