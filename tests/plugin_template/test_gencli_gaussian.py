"""The mathematics of the model. Whoever copies the template tests their own here."""

import torch
from gencli_gaussian import Gaussian

from gencli.contract import DataSpec
from gencli.rng import SampleRng

SPEC = DataSpec(name="points", kind="points", shape=(2,))


def model():
    made = Gaussian(Gaussian.Config(log_sigma=0.5), SPEC)
    made.mu.data = torch.tensor([1.0, -2.0])
    return made.requires_grad_(False)


def test_the_likelihood_is_that_of_torch():
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 5.0]])
    normal = torch.distributions.Normal(torch.tensor([1.0, -2.0]), torch.full((2,), 0.5).exp())
    torch.testing.assert_close(model().log_prob(x, SampleRng(0, range(3))), normal.log_prob(x).sum(1))


def test_samples_have_the_moments_and_are_keyed_by_their_index():
    x = model().sample(SampleRng(0, range(4000)))
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -2.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std(0).log(), torch.full((2,), 0.5), atol=0.05, rtol=0)
    assert torch.equal(model().sample(SampleRng(0, range(7, 9))), x[7:9])
