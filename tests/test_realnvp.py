"""Real NVP: exact both ways for every mask and scale, densities that integrate to 1, refusals in one line."""

import pytest
import torch

from gencli.console import UsageError
from gencli.contract import DataSpec
from gencli.data import load
from gencli.models.flows.realnvp import RealNVP
from gencli.nn.couplings import MaskedCoupling
from gencli.rng import SampleRng
from tests.flows import IMAGE, POINTS, assert_a_flow, build, mass, normal
from tests.tiny import session, tiny

SMALL = {"channels": 4, "blocks": 1}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("masks", ["checkerboard", "halves"])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_it_is_a_flow_of_images(float64, masks, scales):
    assert_a_flow(build(RealNVP, IMAGE, scales=scales, masks=masks, logit=0.05, **SMALL))


@pytest.mark.parametrize("D", [2, 3])
def test_it_is_a_flow_of_points(float64, D):
    assert_a_flow(build(RealNVP, DataSpec(name="p", kind="points", shape=(D,)), hidden=(16,)))


def test_its_density_integrates_to_one(float64):
    flow = build(RealNVP, POINTS, couplings=5, hidden=(16,), jitter=0.2)
    assert abs(mass(flow, reach=16) - 1) < 1e-4


def test_every_latent_depends_on_every_pixel(float64):
    """Wide networks' receptive fields cover 4 x 4 pixels: no mask keeps two parts of the image apart."""
    for masks in ("checkerboard", "halves"):
        flow = build(RealNVP, IMAGE, masks=masks, channels=4, blocks=2, jitter=0.2)
        x = normal(1, *IMAGE.shape)
        J = torch.autograd.functional.jacobian(lambda v: flow.f(v[None])[0][0], x[0], vectorize=True)  # noqa: B023
        assert (J.reshape(32, 32) != 0).all()


def test_the_masks_take_turns_and_only_their_kind_differs(float64):
    a, b = (build(RealNVP, IMAGE, masks=masks, **SMALL) for masks in ("checkerboard", "halves"))
    found = [m.b for m in a.modules() if isinstance(m, MaskedCoupling)]
    assert len(found) == 3 + 4
    for first, second in zip(found[:2] + found[3:6], found[1:3] + found[4:7]):
        assert torch.equal(first + second, torch.ones_like(first))
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


def test_half_of_the_dimensions_leave_at_each_scale(float64):
    """The first latents depend on nothing that the later scales do."""
    flow = build(RealNVP, IMAGE, scales=3, **SMALL)
    x = normal(2, *IMAGE.shape)
    z = flow.f(x)[0]
    with torch.no_grad():
        for p in flow.flow.scales[1].parameters():
            p += 0.1
    changed = (flow.f(x)[0] != z).any(0)
    assert not changed[:16].any() and changed[16:].all()


def test_the_first_batch_is_normalised_and_trained_weights_invert():
    with session(tiny("realnvp", "train.steps=40", "model.dropout=0.0")) as made:
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


def test_a_few_steps_learn_the_moons():
    """From 2.56 nats of a Gaussian of the data's moments to below 1.6; the entropy is 1.008."""
    with session(tiny("realnvp/points", "train.steps=150", "train.batch_size=256", "model.couplings=6")) as made:
        logs = [made.trainer.step() for _ in range(150)]
    assert 2 * sum(row["loss"] for row in logs[-10:]) / 10 < 1.6


@pytest.mark.parametrize(
    ("spec", "config", "says"),
    [
        (("image", (1, 7, 7)), {"scales": 2}, "t is 7 x 7: 1 squeezes need sides divisible by 2, and none fits"),
        (("image", (1, 12, 6)), {"scales": 4}, "t is 12 x 6: 3 squeezes need sides divisible by 8, and 1 fits"),
        (("points", (1,)), {}, "a coupling needs at least 2 dimensions, and t has 1"),
        (("audio", (1, 64)), {}, "realnvp is for images and points, and t is audio"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(spec, config, says):
    kind, shape = spec
    with pytest.raises(UsageError, match=says):
        RealNVP(
            RealNVP.Config(**config), DataSpec(name="t", kind=kind, shape=shape, levels=None if kind == "points" else 8)
        )
