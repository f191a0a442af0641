"""Nearest training rows against brute force in float64, and the test of copying against scipy's Mann-Whitney."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.overrides import TorchFunctionMode

from gencli import pictures
from gencli.console import DataError, UsageError
from gencli.metrics import nearest as module
from gencli.metrics.nearest import mann_whitney, memorisation, nearest, sheet


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels(*shape, high=256, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def brute(x, t, k):
    """All distances from the differences; a stable sort leaves equal ones in order of rows."""
    distance = (x.flatten(1).double()[:, None] - t.flatten(1).double()[None]).square().sum(-1).sqrt()
    order = distance.argsort(dim=1, stable=True)[:, :k]
    return order, distance.gather(1, order)


def agree(x, t, k, **options):
    rows, distances = nearest(x, t, k, **options)
    want_rows, want = brute(x, t, k)
    assert torch.equal(rows, want_rows)
    torch.testing.assert_close(distances, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_nearest_rows_are_those_of_brute_force(k, dtype):
    agree(noise(23, 17, dtype=dtype), noise(40, 17, seed=1, dtype=dtype), k)


def test_images_are_compared_as_they_come():
    agree(levels(20, 3, 5, 4), levels(70, 3, 5, 4, seed=1), 4)
    agree(levels(20, 6, high=2), levels(70, 6, high=2, seed=1), 30)  # full of ties


def far(n=500):
    """Rows near ``(300, 300, ...)``, where the last place of |x|^2 in float32 is 1, and others within 0.1 of them."""
    t = (300 + 1e-3 * noise(n, 128, seed=1)).float()
    return (t[: n // 8] + 1e-3 * noise(n // 8, 128, seed=2)).float(), t


def test_near_duplicates_far_from_the_origin():
    x, t = far()
    t[-1] = -300  # no centre helps
    agree(x, t, 5)
    expanded = x.square().sum(1)[:, None] - 2 * x @ t.T + t.square().sum(1)
    assert (expanded.argmin(1) != brute(x, t, 1)[0][:, 0]).float().mean() > 0.5  # what is guarded against


@pytest.mark.parametrize("last", [False, True])
def test_the_bound_on_errors_is_that_of_the_longest_row_of_all_blocks(last, monkeypatch):
    x, t = far()
    others = [noise(100, 128, seed=5), noise(100, 128, seed=6)]
    monkeypatch.setattr(module, "PIECE", 128 * 100)
    agree(x, torch.cat([*others, t] if last else [others[0], t, others[1]]), 5)


class Coarse(TorchFunctionMode):
    """Matrix products of float32 as some devices compute them where torch may be fast: of rounded numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype == torch.float32:
            args = [v.bfloat16().float() for v in args]
        return func(*args, **(kwargs or {}))


def test_coarse_matrix_products_are_not_relied_on():
    x, t = noise(40, 128), noise(300, 128, seed=1)
    torch.set_float32_matmul_precision("high")
    try:
        with Coarse():
            agree(x, t, 5)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_copy_is_at_distance_zero_and_ties_go_to_the_smallest_row():
    t = noise(50, 9)
    t[[7, 30, 41]] = t[3].clone()
    rows, distances = nearest(t[3:4], t, 5)
    assert rows[0, :4].tolist() == [3, 7, 30, 41]
    assert distances[0, :4].tolist() == [0, 0, 0, 0] and distances[0, 4] > 0
    same = torch.ones(30, 4)
    rows, distances = nearest(same[:2], same, 3)
    assert rows.tolist() == [[0, 1, 2]] * 2 and not distances.any()


def test_no_bit_depends_on_how_the_work_is_cut(monkeypatch):
    x, t = noise(31, 12), noise(90, 12, seed=1)
    t[50:] = t[:40].clone()
    want = nearest(x, t, 4)
    for chunk in (1, 7, 31, 1000):
        assert all(map(torch.equal, nearest(x, t, 4, chunk=chunk), want))
    monkeypatch.setattr(module, "PIECE", 12 * 13)  # blocks of 13 training rows and 13 pairs
    assert all(map(torch.equal, nearest(x, t, 4), want))
    monkeypatch.setattr(module, "TABLE", 90 * 2)
    assert all(map(torch.equal, nearest(x, t, 4), want))


def test_an_outlier_costs_time_and_no_truth():
    x, t = noise(9, 12), noise(90, 12, seed=1)
    t[4] = 1e6
    agree(x, t, 2)
    agree(torch.cat([x, torch.full((1, 12), 1e6)]), t, 2)


def test_one_float64_input_keeps_its_digits():
    t = noise(60, 8, dtype=torch.float64)
    x = (t[:9] + 1e-9).clone()
    agree(x, t, 1)
    rows, distances = nearest(x, t)
    assert rows[:, 0].tolist() == list(range(9))
    torch.testing.assert_close(distances, torch.full((9, 1), 1e-9 * math.sqrt(8)).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("x", "t", "k", "error", "says"),
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), 1, DataError, r"the samples: no rows.*\[0, 3\]"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, DataError, "the training rows: no rows"),
        (torch.zeros(2, 0), torch.zeros(2, 0), 1, DataError, "no rows"),
        (torch.zeros(3), torch.zeros(2, 3), 1, DataError, "no rows"),
        (torch.zeros(2, 3), torch.zeros(2, 4), 1, DataError, "3 dimensions and the training rows 4"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 3, UsageError, "3 nearest rows were asked for, of 2: 1 to 2"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0, UsageError, "0 nearest rows"),
        (torch.tensor([[0.0], [math.nan]]), torch.zeros(2, 1), 1, DataError, "the samples: row 1 is not finite"),
        (torch.zeros(2, 1), torch.tensor([[math.inf], [0]]), 1, DataError, "training rows: row 0 is not finite"),
        (torch.zeros(2, 1), torch.tensor([[1e30], [0]]), 1, DataError, "too large"),
        (torch.tensor([[1e38], [0]]), torch.tensor([[3e38], [1]]), 1, DataError, "too large"),
    ],
)
def test_what_cannot_be_compared(x, t, k, error, says):
    with pytest.raises(error, match=says):
        nearest(x, t, k)


@pytest.mark.parametrize("tied", [False, True])
def test_mann_whitney_is_scipys(tied):
    a, b = noise(80, seed=3, dtype=torch.float64) - 0.3, noise(130, seed=4, dtype=torch.float64)
    if tied:
        a, b = (a * 2).round(), (b * 2).round()
    nearer, z = mann_whitney(a, b)
    theirs = scipy.stats.mannwhitneyu(a, b, alternative="less", method="asymptotic", use_continuity=False)
    assert nearer == pytest.approx(1 - theirs.statistic / (80 * 130), abs=1e-14)
    assert scipy.stats.norm.cdf(z) == pytest.approx(theirs.pvalue, rel=1e-10)
    pairs = (a[:, None] < b).double() + (a[:, None] == b).double() / 2
    assert nearer == pytest.approx(pairs.mean().item(), abs=1e-14)
    assert z < 0 and mann_whitney(b, a) == pytest.approx((1 - nearer, -z), abs=1e-12)


def test_mann_whitney_of_the_smallest_sets():
    # U of one against one is 0 or 1 with mean 1 / 2 and variance 1 / 4
    assert mann_whitney(torch.tensor([1.0]), torch.tensor([2.0])) == (1.0, pytest.approx(-1.0))
    assert mann_whitney(torch.tensor([2.0]), torch.tensor([2.0])) == (0.5, 0.0)
    assert mann_whitney(torch.zeros(5), torch.zeros(9)) == (0.5, 0.0)


def test_a_perfect_model_has_a_z_like_one_number_in_the_normal_distribution():
    train = noise(400, 6)
    zs = [memorisation(noise(200, 6, seed=s), train, noise(200, 6, seed=s + 500))[0].z for s in range(1, 61)]
    # all share one training set, but given it the statistic is standard normal
    assert abs(np.mean(zs)) < 4 / math.sqrt(60) and 0.7 < np.std(zs) < 1.3


def test_copies_are_told_from_fresh_and_from_poor_samples():
    train, test = noise(400, 6), noise(300, 6, seed=1)
    copied = train[:200] + 0.01 * noise(200, 6, seed=2)
    copied[:20] = train[:20]
    row, neighbours = memorisation(copied, train, test)
    assert neighbours.rows[:, 0].tolist() == list(range(200))
    assert row.z < -10 and row.nearer > 0.99 and row.close > 0.9 and row.copies == 20 and row.test_copies == 0
    theirs = brute(test, train, 1)[1][:, 0]
    assert row.test_median == pytest.approx(np.median(theirs.numpy()), rel=1e-14)
    assert row.median == pytest.approx(np.median(brute(copied, train, 1)[1].numpy()), rel=1e-14) and row.median < 0.05
    wanted = scipy.stats.mannwhitneyu(neighbours.distances[:, 0], theirs, use_continuity=False, alternative="less")
    assert row.nearer == pytest.approx(1 - wanted.statistic / (200 * 300), abs=1e-12)

    poor, _ = memorisation(3 * noise(200, 6, seed=2), train, test)
    assert poor.z > 10 and poor.nearer < 0.1 and poor.close < 0.02
    mixed, _ = memorisation(torch.cat([copied, 3 * noise(200, 6, seed=2)]), train, test)
    assert mixed.close > 0.45 and abs(mixed.z) < 5  # what z alone does not see


def test_close_counts_what_is_nearer_than_the_twentieth_part_of_the_test_rows():
    train = torch.zeros(1, 1)
    test = torch.arange(1.0, 101).reshape(-1, 1)  # at distances 1 .. 100: five are below 6
    row, _ = memorisation(torch.tensor([[0.0], [5.9], [6.0], [7.0]]), train, test)
    assert row.close == 0.5 and row.copies == 1
    assert memorisation(test, train, test)[0].close == 0.05
    assert memorisation(test, train, test)[0][:2] == (0.5, 0.0)


def test_the_test_rows_are_checked_by_name():
    good = torch.zeros(2, 3)
    with pytest.raises(DataError, match="the test rows: no rows"):
        memorisation(good, good, torch.zeros(0, 3))
    with pytest.raises(DataError, match="the test rows: row 1"):
        memorisation(good, good, torch.tensor([[0.0] * 3, [math.nan] * 3]))
    with pytest.raises(DataError, match="dimensions"):
        memorisation(good, good, torch.zeros(2, 4))


def test_a_sheet_shows_each_sample_left_of_its_neighbour():
    samples, neighbours = levels(3, 1, 4, 4).numpy(), levels(3, 1, 4, 4, seed=1).numpy()
    picture = sheet(samples, neighbours, 256, np.array([0.0, 1.23456, 700]))
    order = np.stack([samples[0], neighbours[0], samples[1], neighbours[1], samples[2], neighbours[2]])
    labels = ["sample", "0", "sample", "1.23", "sample", "700"]
    assert np.array_equal(picture, pictures.grid(order, 256, columns=4, labels=labels))
    with pytest.raises(DataError, match=r"\[3, 1, 4, 4\]"):
        sheet(samples, neighbours[:2], 256, np.zeros(3))
