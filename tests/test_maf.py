"""MAF: exact both ways for either map, densities that integrate to 1, orders that take turns, few passes."""

import pytest
import torch

from gencli.contract import DataSpec
from gencli.data import load
from gencli.models.flows.maf import MAF
from gencli.nn.made import Autoregressive
from gencli.rng import SampleRng
from tests.flows import IMAGE, POINTS, assert_a_flow, build, mass, normal
from tests.tiny import session, tiny

TRANSFORMS = {"affine": {}, "mixture": {"transform": "mixture", "components": 3}}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def points(D):
    return DataSpec(name="p", kind="points", shape=(D,))


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("spec", [points(1), points(2), points(11), IMAGE], ids=lambda s: f"{s.kind}-{s.dims}")
def test_it_is_a_flow(float64, spec, transform):
    assert_a_flow(build(MAF, spec, hidden=(40, 40), transforms=3, **TRANSFORMS[transform]))


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_its_density_integrates_to_one(float64, transform):
    flow = build(MAF, POINTS, hidden=(16,), transforms=3, **TRANSFORMS[transform])
    assert abs(mass(flow, reach=20) - 1) < 1e-4


def test_it_is_the_paper_written_out(float64):
    """Eqs. 4 and 5 with networks of one unit's width a dimension: two dimensions, one layer, by hand."""
    flow = build(MAF, POINTS, hidden=(), transforms=1)
    actnorm, layer = flow.flow.layers
    x = normal(5, 2)
    y = (x + actnorm.b) * actnorm.log_s.exp()
    W, b = layer.made.out.weight, layer.made.out.bias  # rows: mu_1, alpha_1, mu_2, alpha_2
    mu_2, a_2 = W[2, 0] * y[:, 0] + b[2], W[3, 0] * y[:, 0] + b[3]
    alpha = torch.stack([b[1].expand(5), a_2], 1)
    alpha = alpha / (1 + alpha.abs() / 5)
    u = (y - torch.stack([b[0].expand(5), mu_2], 1)) * (-alpha).exp()
    z, log_det = flow.f(x)
    torch.testing.assert_close(z, u)
    torch.testing.assert_close(log_det, actnorm.log_s.sum() - alpha.sum(1))


def test_every_second_layer_has_the_reversed_order():
    layers = [m for m in build(MAF, points(4), transforms=3, hidden=(8,)).modules() if isinstance(m, Autoregressive)]
    assert [layer.order.tolist() for layer in layers] == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]


def test_the_first_batch_is_normalised_and_trained_weights_invert():
    recipe = tiny("maf/digits", "model.hidden=[64, 64]", "train.steps=60", "train.batch_size=64")
    with session(recipe) as made:
        for _ in range(60):
            made.trainer.step()
        with made.trainer.evaluating() as model, torch.no_grad():
            x = load("digits", "val").rows(torch.arange(20))["x"]
            y, _ = model.to_real(x, SampleRng(0, range(20)))
            z = model.f(y)[0]
            assert (model.f_inverse(z) - y).abs().max() <= 1e-5 * y.abs().max()
            passes = [layer.solve(z)[1] for layer in model.modules() if isinstance(layer, Autoregressive)]
            assert max(passes) <= 64
            model.double()
            y = y.double()
            assert (model.f_inverse(model.f(y)[0]) - y).abs().max() <= 1e-10
            model.float()


@pytest.mark.parametrize(
    ("name", "below"),
    [("maf", 1.7), ("maf/smiley", 2.2)],  # Gaussians of the data's moments: 2.56 and 3.43; entropies 1.008 and 1.334
)
def test_a_few_steps_learn_the_points(name, below):
    recipe = tiny(name, "train.steps=150", "train.batch_size=256", "model.hidden=[32, 32]", "model.transforms=3")
    with session(recipe) as made:
        logs = [made.trainer.step() for _ in range(150)]
    assert 2 * sum(row["loss"] for row in logs[-10:]) / 10 < below
