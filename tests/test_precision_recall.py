"""Precision and recall by balls, against every pair and torch-fidelity's numbers."""

import numpy as np
import pytest
import torch

from gencli.console import DataError
from gencli.metrics import precision_recall as module
from gencli.metrics.precision_recall import precision_recall
from tests.test_frechet import features


def by_hand(real, samples, k):
    def radius(x):
        d = np.linalg.norm(x[:, None] - x[None], axis=-1)
        return np.sort(d, 1)[:, k]  # the first is the row itself

    d = np.linalg.norm(samples[:, None] - real[None], axis=-1)
    within, around = d <= radius(real), d <= radius(samples)[:, None]
    return within.any(1).mean(), around.any(0).mean(), within.sum() / (k * len(samples)), within.any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_balls_by_hand(k, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 17)
    rng = np.random.default_rng(0)
    real, samples = rng.standard_normal((60, 3)), 0.7 * rng.standard_normal((45, 3)) + 0.4
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(samples), k)
    assert found == pytest.approx(by_hand(real, samples, k))
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_torch_fidelity_has_the_same_numbers():
    """torch-fidelity 0.4.0, prc_features_to_metric, which divides in float32; its first set holds the samples."""
    samples, real = (torch.from_numpy(v).float() for v in features())
    found = precision_recall(real, samples)
    assert (found.precision, found.recall) == (pytest.approx(0.632, abs=1e-6), pytest.approx(0.0885714, abs=1e-6))


def test_a_set_and_itself_and_far_away():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    same = precision_recall(x, x)
    assert same[:2] == (1, 1) and same.coverage == 1
    assert precision_recall(x, x + 1e4) == (0, 0, 0, 0)


@pytest.mark.parametrize("chunk", [512, 100, 17])
@pytest.mark.parametrize("copies", [1, 4])
def test_copies_are_on_the_rims(chunk, copies, monkeypatch):
    """Copies of the real rows, shuffled: each ball holds its centre and k others, the last of them on the rim.

    With four copies of each row all radii are 0.
    """
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(3)
    real = torch.from_numpy(np.abs(rng.standard_normal((400 // copies, 64))) + 5).float().repeat_interleave(copies, 0)
    found = precision_recall(real, real[torch.from_numpy(rng.permutation(400))])
    assert found == (1, 1, pytest.approx(4 / 3, rel=1e-12), 1)


def test_the_two_are_not_swapped():
    """Samples of one of two modes are precise and incomplete."""
    rng = np.random.default_rng(1)
    real = torch.from_numpy(np.concatenate([rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) + 50]))
    found = precision_recall(real, torch.from_numpy(rng.standard_normal((60, 2))))
    assert found.precision > 0.9 and 0.4 < found.recall <= 0.5


def test_what_cannot_be_compared():
    with pytest.raises(DataError, match=r"3 samples and 9 rows of the reference are too few .* 4 on a side"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    with pytest.raises(DataError, match="of 3 and of 2 dimensions"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(DataError, match="the samples: row 5 is not finite"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 2).index_fill(0, torch.tensor([5]), torch.nan))
