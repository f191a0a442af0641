"""The Inception Score against torch-fidelity's, and its two entropies by hand."""

import math

import numpy as np
import pytest
import torch

from gencli.console import DataError
from gencli.metrics.inception_score import inception_score
from gencli.rng import Keys


class InOrder:
    """A permutation that moves nothing."""

    def permutation(self, purpose, n):
        return torch.arange(n)


def logits():
    rng = np.random.default_rng(0)
    rng.standard_normal((64, 64)), rng.standard_normal((500, 64)), rng.standard_normal((700, 64))
    return torch.from_numpy(rng.standard_normal((1000, 10)) * 3)


def test_torch_fidelity_has_the_same_numbers():
    """torch-fidelity 0.4.0, isc_features_to_metric, one split and ten, not shuffled."""
    one, ten = (inception_score(logits(), InOrder(), splits) for splits in (1, 10))
    assert (one.mean, one.std) == (pytest.approx(3.867451785646715, rel=1e-12), 0.0)
    assert (ten.mean, ten.std) == (
        pytest.approx(3.7886196166335404, rel=1e-12),
        pytest.approx(0.169086941902699, rel=1e-10),
    )
    assert math.exp(one.h_y - one.h_y_x) == pytest.approx(one.mean, rel=1e-12)
    assert (ten.h_y, ten.h_y_x) == (one.h_y, one.h_y_x)


def test_sure_and_even_is_the_number_of_classes():
    sure = 1e3 * torch.eye(4).repeat(50, 1)
    found = inception_score(sure, Keys(0).open("test"))
    assert found.h_y == pytest.approx(math.log(4)) and found.h_y_x == pytest.approx(0) and 3.5 < found.mean <= 4
    unsure = inception_score(torch.zeros(40, 4), Keys(0).open("test"))
    assert unsure.mean == pytest.approx(1) and unsure.h_y_x == pytest.approx(math.log(4))


def test_rows_are_shuffled():
    """Classes in order would have each split see few of them."""
    ordered = 1e3 * torch.eye(10).repeat_interleave(30, 0)
    assert inception_score(ordered, InOrder()).mean == pytest.approx(1)
    assert inception_score(ordered, Keys(0).open("test")).mean > 7
    assert inception_score(ordered, Keys(0).open("test")) == inception_score(ordered, Keys(0).open("test"))


def test_too_few_rows():
    with pytest.raises(DataError, match=r"9 samples are too few .* 10 splits"):
        inception_score(torch.zeros(9, 3), Keys(0).open("test"))
    with pytest.raises(DataError, match="the logits: row 4 is not finite"):
        inception_score(torch.zeros(20, 3).index_fill(0, torch.tensor([4]), math.inf), Keys(0).open("test"))
