"""The Fréchet distance: exact where the usual routes are not, and the same however its rows come."""

import math

import numpy as np
import pytest
import torch

from gencli.console import DataError
from gencli.metrics import frechet as module
from gencli.metrics.frechet import BLOCK, Moments, distance, gaussian, infinity
from gencli.rng import Keys


def fitted(x, batch=100):
    found = Moments(x.shape[1])
    for part in torch.as_tensor(x).split(batch):
        found.add(part)
    return found


def features():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((64, 64)) / 8
    return rng.standard_normal((500, 64)) @ A + 0.1, rng.standard_normal((700, 64))


def by_root(x, y):
    """The formula with scipy's matrix root."""
    from scipy.linalg import sqrtm

    a, b = np.cov(x.T), np.cov(y.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.trace(sqrtm(a @ b)).real


def test_torch_fidelity_has_the_same_number():
    """torch-fidelity 0.4.0, fid_statistics_to_metric, on the same features."""
    x, y = features()
    assert distance(fitted(x), fitted(y)) == pytest.approx(22.94293219862027, rel=1e-8)
    assert distance(fitted(y), fitted(x)) == pytest.approx(by_root(x, y), rel=1e-9)


def test_a_known_pair_of_gaussians():
    """Covariances that commute: the trace is that of the difference of their roots, squared."""
    s, t = torch.linspace(0.5, 2, 8).double(), torch.linspace(3, 1, 8).double()
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double())[0]
    a, b = Moments(8), Moments(8)
    for made, scale, mean in ((a, s, 0.0), (b, t, 1.5)):
        # rows with just this mean and covariance: +- sqrt(8 d) along each axis of Q
        rows = torch.cat([Q * scale.sqrt()[None, :], -Q * scale.sqrt()[None, :]], 1).T * math.sqrt(15 / 2)
        made.add(rows + mean)
    want = 8 * 1.5**2 + (s.sqrt() - t.sqrt()).square().sum().item()
    assert distance(a, b) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("n, m, d", [(24, 24, 256), (10, 400, 64), (400, 10, 64), (60, 61, 64), (65, 40, 64)])
def test_few_rows_against_many_digits(n, m, d):
    """Where the product of covariances is singular: singular values of the rows' products, by mpmath with 50 digits."""
    mp = pytest.importorskip("mpmath")
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((n, d)), 0.5 * rng.standard_normal((m, d)) + 0.2
    x, y = np.round(x * 64) / 64, np.round(y * 64) / 64
    got = distance(fitted(x), fitted(y))
    with mp.workdps(50):
        small = min(n, m)
        if small > 24:  # 50 digits take long: float64, but of the matrix whose singular values they are
            X, Y = x - x.mean(0), y - y.mean(0)
            cross = np.linalg.svd(X @ Y.T, compute_uv=False).sum() / math.sqrt((n - 1) * (m - 1))
            spread = (X**2).sum() / (n - 1) + (Y**2).sum() / (m - 1)
            want = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * cross
        else:
            X = mp.matrix((x - x.mean(0)).tolist())
            Y = mp.matrix((y - y.mean(0)).tolist())
            P = X * Y.T if n <= m else Y * X.T
            roots = mp.eigsy(P * P.T, eigvals_only=True)
            cross = sum(mp.sqrt(abs(e)) for e in roots) / mp.sqrt((n - 1) * (m - 1))
            spread = sum(v * v for v in X) / (n - 1) + sum(v * v for v in Y) / (m - 1)
            want = float(sum((a - b) ** 2 for a, b in zip(x.mean(0), y.mean(0))) + spread - 2 * cross)
    assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("power, fast", [(0, True), (2, True), (6, False)])
def test_spectra_that_fall(power, fast, monkeypatch):
    """As those of networks do: eigenvalues k^-power, more of them than a strip; the fast route while it is exact."""
    rng = np.random.default_rng(10)
    d = 300
    scale, Q = np.arange(1, d + 1) ** (-power / 2), np.linalg.qr(rng.standard_normal((d, d)))[0]
    x, y = ((rng.standard_normal((n, d)) * scale) @ Q + shift for n, shift in ((900, 0.0), (1000, 0.01)))
    X, Y = (v - v.mean(0) for v in (x, y))
    R, S = (np.linalg.qr(v, mode="r") for v in (X, Y))  # never the square of the rows
    cross = np.linalg.svd(R @ S.T, compute_uv=False).sum() / math.sqrt(899 * 999)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + (X**2).sum() / 899 + (Y**2).sum() / 999 - 2 * cross
    slow = []
    monkeypatch.setattr(module, "_any_factor", lambda S, known=module._any_factor: slow.append(S) or known(S))
    assert distance(fitted(x), fitted(y)) == pytest.approx(want, rel=1e-9)
    assert (not slow) == fast


def test_the_usual_routes_are_off_where_rows_are_few():
    """Eigenvalues of the product of covariances, as other tools take them."""
    rng = np.random.default_rng(2)
    x, y = np.abs(rng.standard_normal((24, 512))), np.abs(rng.standard_normal((24, 512)))
    a, b = np.cov(x.T), np.cov(y.T)
    usual = (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b) + 0j).real.sum()
    )
    exact = distance(fitted(x), fitted(y))
    assert 1e-8 < abs(usual - exact) / exact < 1e-3  # 2,048 dimensions: python -m tests.benchmarks frechet


@pytest.mark.parametrize("n, d", [(500, 64), (40, 64), (64, 64), (65, 64), (2000, 8)])
def test_a_set_and_itself(n, d):
    x = np.random.default_rng(3).standard_normal((n, d))
    assert distance(fitted(x), fitted(x)) <= 1e-9 * np.trace(np.cov(x.T))


def test_dead_features_and_equal_rows():
    """Covariances without full rank although rows are many."""
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal((300, 16)) for _ in range(2))
    full = distance(fitted(x), fitted(y))
    dead = [np.concatenate([v, np.zeros((300, 5)), v[:, :1] - v[:, 1:2]], 1) for v in (x, y)]
    root = by_root(*(v[:, [*range(16)]] for v in dead))
    assert full == pytest.approx(root, rel=1e-9)
    X, Y = (v - v.mean(0) for v in dead)
    cross = np.linalg.svd(X @ Y.T, compute_uv=False).sum() / 299
    want = ((dead[0].mean(0) - dead[1].mean(0)) ** 2).sum() + ((X**2).sum() + (Y**2).sum()) / 299 - 2 * cross
    assert distance(*map(fitted, dead)) == pytest.approx(want, rel=1e-8)
    same = np.ones((30, 4))
    assert distance(fitted(same), fitted(same + 2)) == pytest.approx(16)


def test_batches_order_and_merging_do_not_matter():
    rng = np.random.default_rng(5)
    for n, d in ((3 * BLOCK + 7, 16), (40, 64), (700, 600)):
        x = rng.standard_normal((n, d)) + 1e3
        whole = fitted(x, n)
        for batch in (1, 37, BLOCK):
            other = fitted(x, batch)
            for name, tensor in whole.tensors().items():
                assert torch.equal(other.tensors()[name], tensor), (name, batch)
        halves = [fitted(x[: n // 3]), fitted(x[n // 3 :])]
        halves[0].merge(halves[1])
        for other in (halves[0], fitted(x[rng.permutation(n)])):
            assert other.n == n
            torch.testing.assert_close(other.mean, whole.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(whole.covariance.numpy(), np.cov(x.T), rtol=1e-9, atol=1e-11)


def test_statistics_survive_a_file():
    y = fitted(np.random.default_rng(7).standard_normal((90, 16)))
    for n in (12, 300):
        x = fitted(np.random.default_rng(6).standard_normal((n, 16)))
        again = Moments.of(x.tensors())
        assert again.n == n and distance(again, y) == distance(x, y)
    with pytest.raises(DataError, match="no mean and scatter"):
        Moments.of({"n": torch.tensor(3), "mean": torch.zeros(4)})


def test_memory_does_not_grow():
    found = Moments(8)
    for _ in range(40):
        found.add(torch.zeros(100, 8))
    assert sum(map(len, found._rows)) < BLOCK + 100


def test_the_distance_of_endless_samples():
    """Both sides are standard normal: the distance falls to 0 with the number of samples."""
    rng = np.random.default_rng(8)
    x, y = (torch.from_numpy(rng.standard_normal((n, 16))) for n in (3000, 200_000))
    reference = fitted(y, 5000)
    at_hand = distance(fitted(x), reference)
    value, error = infinity(x, reference, Keys(0).open("test"))
    assert abs(value) < 0.5 * at_hand and 0 < error < 0.5 * at_hand


def test_counts_near_the_dimensions_are_no_line():
    """The distance to a standard normal is 3; counts from a tenth of 480 rows on would say 2.5."""
    d, rng = 48, np.random.default_rng(11)
    reference = Moments.of({"n": torch.tensor(10**9), "mean": torch.zeros(d), "scatter": torch.eye(d) * (10**9 - 1)})
    found = [
        infinity(torch.from_numpy(rng.standard_normal((480, d)) + 0.25), reference, Keys(k).open("test"))[0]
        for k in range(6)
    ]
    assert np.mean(found) == pytest.approx(3, abs=0.25)


def test_the_gaussian_has_the_moments_of_the_rows():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 2
    x = np.concatenate([x, x[:, :1], np.full((400, 1), 3.0)], 1)  # singular
    drawn = torch.cat(list(gaussian(torch.from_numpy(x), Keys(0).open("test"), 40_000))).numpy()
    scale = np.sqrt(np.outer(x.var(0), x.var(0)) + 1e-9)
    assert np.abs((np.cov(drawn.T) - np.cov(x.T)) / scale).max() < 5 / math.sqrt(40_000) * 2
    assert np.abs(drawn.mean(0) - x.mean(0)).max() < 5 * x.std(0).max() / math.sqrt(40_000)
    np.testing.assert_allclose(drawn[:, 0], drawn[:, 6], atol=1e-5)


def test_what_has_no_distance():
    x = fitted(np.zeros((5, 3)))
    with pytest.raises(DataError, match="1 rows are too few"):
        distance(fitted(np.zeros((1, 3))), x)
    with pytest.raises(DataError, match="of 3 and of 4 dimensions"):
        distance(x, fitted(np.zeros((5, 4))))
    with pytest.raises(DataError, match="row 1 is not finite"):
        x.add(torch.tensor([[0.0, 0, 0], [0, math.nan, 0]]))
    with pytest.raises(DataError, match="20 are needed"):
        infinity(torch.zeros(19, 3), x, Keys(0).open("test"))
