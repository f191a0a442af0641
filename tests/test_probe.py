"""Probes against scikit-learn's, intervals against scipy's, and which rows keep their labels."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from gencli.console import DataError, UsageError
from gencli.metrics.probe import L2S, accuracy, few_labels, knn, linear_probe
from gencli.rng import Keys


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n, classes, d, seed=0, spread=1.5):
    """Overlapping classes, with features of very unequal scale and offset."""
    y = torch.arange(n) % classes
    x = noise(classes, d, seed=99)[y] + spread * noise(n, d, seed=seed)
    return x * torch.logspace(-2, 3, d) + torch.linspace(-50, 50, d), y


def sklearns(x, y, c):
    scaler = StandardScaler().fit(x.double().numpy())
    model = LogisticRegression(C=c, tol=1e-9, max_iter=20_000).fit(scaler.transform(x.double().numpy()), y.numpy())
    return scaler, model


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("n", "classes", "d"), [(300, 4, 7), (40, 10, 60)])
def test_the_linear_probe_is_scikit_learns(n, classes, d, l2):
    x, y = blobs(n, classes, d)
    test, labels = blobs(200, classes, d, seed=1)
    probe = linear_probe(x, y, classes, l2=l2)
    scaler, theirs = sklearns(x, y, 1 / (l2 * n))
    weight = probe.weight.numpy() * scaler.scale_
    bias = probe.bias.numpy() + probe.weight.numpy() @ scaler.mean_
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-3)
    np.testing.assert_allclose(bias, theirs.intercept_, atol=1e-3)
    # both are at a minimum: the derivative of the objective is 0
    z = torch.from_numpy(scaler.transform(x.double().numpy()))
    w, b = (torch.from_numpy(v).requires_grad_() for v in (weight, bias))
    value = torch.nn.functional.cross_entropy(z @ w.T + b, y) + l2 / 2 * w.square().sum()
    assert all(g.abs().max() <= 1.001e-4 * min(0.1, l2) for g in torch.autograd.grad(value, (w, b)))
    wanted = theirs.predict_log_proba(scaler.transform(test.double().numpy()))
    np.testing.assert_allclose(probe.log_prob(test).numpy(), wanted, atol=1e-3)
    loss = log_loss(labels.numpy(), probe.log_prob(test).exp().numpy(), labels=range(classes))
    assert loss == pytest.approx(log_loss(labels.numpy(), np.exp(wanted), labels=range(classes)), abs=1e-3)
    predicted = theirs.predict(scaler.transform(test.double().numpy()))
    assert (probe.predict(test).numpy() == predicted).all()


def test_two_classes_have_two_rows_of_weights():
    x, y = blobs(100, 2, 5)
    probe = linear_probe(x, y, 2, l2=0.01)
    scaler, theirs = sklearns(x, y, 2 / (0.01 * 100))
    weight = (probe.weight[1] - probe.weight[0]).numpy() * scaler.scale_
    np.testing.assert_allclose(weight, theirs.coef_[0], atol=1e-3)
    np.testing.assert_allclose(probe.log_prob(x), theirs.predict_log_proba(scaler.transform(x.double())), atol=1e-3)


def test_without_a_penalty_or_a_val_split_it_is_scikit_learns_default():
    x, y = blobs(90, 3, 5)
    probe = linear_probe(x, y, 3)
    assert probe.l2 == 1 / 90
    scaler, theirs = sklearns(x, y, 1.0)
    np.testing.assert_allclose(probe.log_prob(x), theirs.predict_log_proba(scaler.transform(x.double())), atol=1e-3)


def test_the_penalty_is_the_best_on_val():
    x, y = blobs(100, 3, 40, spread=4.0)
    val = blobs(600, 3, 40, seed=2, spread=4.0)
    probe = linear_probe(x, y, 3, val=val)
    each = [linear_probe(x, y, 3, l2=l2) for l2 in L2S]
    scores = [accuracy(one.predict(val[0]), val[1]).accuracy for one in each]
    best = scores.index(max(scores))
    assert 0 < best < len(L2S) - 1 and scores[best] > sorted(scores)[-2] + 0.005  # one is clearly the best
    assert probe.l2 == L2S[best]
    # reached from a warm start, and still the minimum
    torch.testing.assert_close(probe.log_prob(val[0]), each[best].log_prob(val[0]), atol=1e-3, rtol=0)
    again = linear_probe(x, y, 3, val=val)
    assert torch.equal(probe.weight, again.weight) and torch.equal(probe.bias, again.bias)
    assert linear_probe(x, y, 3, l2=0.5, val=val).l2 == 0.5


def test_among_equally_accurate_penalties_the_surest_is_taken():
    x, y = blobs(60, 3, 10, spread=0.1)
    easy = (x, y)
    probe = linear_probe(x, y, 3, val=easy)
    assert all(accuracy(linear_probe(x, y, 3, l2=l2).predict(x), y).accuracy == 1 for l2 in L2S)
    assert probe.l2 == L2S[-2]  # where the last penalty starts, the slope is small enough already: the stronger one
    # where some labels are wrong, being sure of them costs
    wrong = torch.cat([y[:30], (y[30:] + 1) % 3])
    assert linear_probe(x, y, 3, val=(x, wrong)).l2 == max(L2S)


def test_the_scale_of_a_feature_does_not_matter_and_a_constant_one_is_ignored():
    x, y = blobs(80, 3, 4)
    dead = torch.stack([torch.full((80,), 0.1), torch.zeros(80), torch.full((80,), 3e4)], 1)
    dead[::2, 2] = torch.nextafter(dead[0, 2], torch.tensor(1e9))  # rounding
    probe = linear_probe(torch.cat([1000 * x + 7, dead], 1), y, 3, l2=0.01)
    assert probe.weight[:, 4:6].abs().max() == 0 and probe.weight[:, 6].abs().max() < 0.1
    other = torch.cat([1000 * x + 7, torch.zeros(80, 3) + torch.tensor([50.0, 50, 3e4])], 1)
    torch.testing.assert_close(probe.log_prob(other), linear_probe(x, y, 3, l2=0.01).log_prob(x), atol=1e-4, rtol=0)


def test_a_class_without_rows_is_never_predicted():
    x, y = blobs(80, 3, 4)
    probe = linear_probe(x, 2 * y, 6, l2=0.01)
    torch.testing.assert_close(probe.log_prob(x)[:, [0, 2, 4]], linear_probe(x, y, 3, l2=0.01).log_prob(x))
    assert (probe.log_prob(x)[:, [1, 3, 5]] == -math.inf).all()
    val = (x, torch.full((80,), 5))
    assert linear_probe(x, 2 * y, 6, val=val).predict(x).unique().tolist() == [0, 2, 4]


def test_images_are_flattened_and_whole_numbers_are_features():
    x = torch.randint(256, (60, 1, 3, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    y = (x[:, 0, 1, 1] > 128).long()
    probe = linear_probe(x, y.to(torch.uint8), 2, l2=1e-3)
    assert accuracy(probe.predict(x), y).accuracy > 0.95
    assert torch.equal(knn(x, y, x, 1, 2), y)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_plain_vote_is_scikit_learns(metric, k):
    x, y = noise(300, 8).double(), torch.arange(300) % 3
    test = noise(150, 8, seed=1).double()
    theirs = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x.numpy(), y.numpy())
    assert (knn(x, y, test, k, 3, metric=metric).numpy() == theirs.predict(test.numpy())).all()


@pytest.mark.parametrize("temperature", [0.07, 1e-4, 10.0])
def test_the_weighted_vote_is_that_of_the_paper(temperature):
    x, y = noise(300, 8).double(), torch.arange(300) % 7
    test = noise(150, 8, seed=1).double()
    cos = torch.nn.functional.normalize(test) @ torch.nn.functional.normalize(x).T
    best, rows = cos.topk(20, dim=1)
    votes = torch.zeros(150, 7, dtype=torch.float64)
    for i in range(150):
        shift = best[i, 0] if temperature < 0.01 else 0.0  # exp would overflow
        for c, j in zip(best[i], rows[i]):
            votes[i, y[j]] += math.exp((c - shift) / temperature)
    found = knn(x, y, test, 20, 7, temperature=temperature)
    assert torch.equal(found, votes.argmax(1))
    plain = knn(x, y, test, 20, 7)
    assert (found != plain).any() or temperature == 10


def test_the_length_of_a_vector_does_not_matter_to_the_cosine():
    x, y, test = noise(90, 5), torch.arange(90) % 4, noise(40, 5, seed=1)
    lengths = torch.rand(90, 1, generator=torch.Generator().manual_seed(3)) + 0.1
    wanted = knn(x, y, test, 3, 4, temperature=0.07)
    assert torch.equal(knn(x * lengths, y, 50 * test, 3, 4, temperature=0.07), wanted)
    assert not torch.equal(knn(x * lengths, y, 50 * test, 3, 4, metric="euclidean"), wanted)


def test_ties_go_to_the_smallest_row_and_the_lowest_class():
    x, y = torch.ones(4, 2), torch.tensor([2, 1, 0, 1])
    assert knn(x, y, x[:1], 1, 3).tolist() == [2]  # the first row
    assert knn(x, y, x[:1], 2, 3).tolist() == [1]  # one vote each for 2 and 1
    assert knn(x, y, x[:1], 3, 3).tolist() == [0]  # one vote each
    assert knn(x, y, x[:1], 4, 3).tolist() == [1]  # two votes
    assert knn(x, y, torch.zeros(1, 2), 1, 3).tolist() == [2]  # no direction: all are as near


def test_wilsons_interval_is_scipys():
    for right, n in [(0, 10), (10, 10), (7, 10), (431, 500), (1, 1)]:
        y = torch.zeros(n, dtype=torch.long)
        found = accuracy((torch.arange(n) >= right).long(), y)
        wanted = scipy.stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
        assert found.accuracy == pytest.approx(right / n) and found.examples == n
        assert found.stderr == pytest.approx(math.sqrt(right / n * (1 - right / n) / n))


def labels(n=1000, classes=10):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(0))


def test_few_labels_are_as_many_of_each_class_and_the_same_for_a_key():
    y = labels()
    rows = few_labels(y, 10, 50, Keys(3).open("labels"))
    assert y[rows].bincount(minlength=10).tolist() == [5] * 10
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, few_labels(y, 10, 50, Keys(3).open("labels")))
    assert not torch.equal(rows, few_labels(y, 10, 50, Keys(4).open("labels")))


def test_fewer_labels_are_among_more_and_a_rest_is_shared_out():
    y = labels()
    sets = [few_labels(y, 10, n, Keys(3).open("labels")) for n in range(10, 121)]
    for fewer, more in itertools.pairwise(sets):
        assert len(more) == len(fewer) + 1 and set(fewer.tolist()) < set(more.tolist())
        counts = y[more].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_every_row_of_a_class_may_keep_its_label():
    y = labels(400, 4)
    drawn = [few_labels(y, 4, 4, Keys(seed).open("labels")) for seed in range(400)]
    first = [int(rows[y[rows] == 0]) for rows in drawn]
    members = (y == 0).nonzero()[:, 0].tolist()
    counts = [first.count(row) for row in members]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


X, Y = torch.eye(4), torch.tensor([0, 1, 0, 1])
NAN = torch.eye(4).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: linear_probe(X[:0], Y[:0], 2), DataError, "training features: no rows"),
        (lambda: linear_probe(NAN, Y, 2), DataError, "training features: row 2 is not finite"),
        (lambda: linear_probe(X, Y[:3], 2), DataError, "4 rows and 3 labels"),
        (lambda: linear_probe(X, Y + 1, 2), DataError, "label 2 is none of 2 classes"),
        (lambda: linear_probe(X, Y - 1, 2), DataError, "label -1 is none of 2 classes"),
        (lambda: linear_probe(X, Y.float(), 2), DataError, "labels are integers"),
        (lambda: linear_probe(X, Y[:, None], 2), DataError, r"labels are integers.*\[4, 1\]"),
        (lambda: linear_probe(X, Y * 0 + 1, 2), DataError, "all 4 training labels are 1"),
        (lambda: linear_probe(X, Y, 2, l2=0), UsageError, "l2 = 0"),
        (lambda: linear_probe(X, Y, 2, l2=math.nan), UsageError, "l2 = nan"),
        (lambda: linear_probe(X, Y, 2, val=(X[:0], Y[:0])), DataError, "validation features: no rows"),
        (lambda: linear_probe(X, Y, 2, val=(NAN, Y)), DataError, "validation features: row 2"),
        (lambda: linear_probe(X, Y, 2, val=(X[:, :3], Y)), DataError, "knows 4 features, not 3"),
        (lambda: linear_probe(X, Y, 2).predict(X[:, :3]), DataError, "knows 4 features, not 3"),
        (lambda: linear_probe(X, Y, 2).predict(NAN), DataError, "the features: row 2"),
        (lambda: knn(X, Y, X, 5, 2), UsageError, "5 nearest rows were asked for, of 4"),
        (lambda: knn(X, Y, X, 0, 2), UsageError, "0 nearest rows"),
        (lambda: knn(X[:0], Y[:0], X, 1, 2), DataError, "training features: no rows"),
        (lambda: knn(X, Y, X[:0], 1, 2), DataError, "the features: no rows"),
        (lambda: knn(NAN, Y, X, 1, 2), DataError, "training features: row 2"),
        (lambda: knn(X, Y, NAN, 1, 2), DataError, "the features: row 2"),
        (lambda: knn(X, Y, X[:, :3], 1, 2), DataError, "3 dimensions and the training rows 4"),
        (lambda: knn(X, Y + 9, X, 1, 2), DataError, "label 10 is none of 2"),
        (lambda: knn(X, Y, X, 1, 2, temperature=0), UsageError, "temperature = 0"),
        (lambda: knn(X, Y, X, 1, 2, metric="manhattan"), UsageError, "metric 'manhattan'"),
        (lambda: accuracy(Y[:0], Y[:0]), DataError, "one each"),
        (lambda: accuracy(Y, Y[:2]), DataError, r"\[4\] for labels \[2\]"),
        (lambda: few_labels(Y, 2, 1, Keys(0).open("l")), UsageError, "1 labels for 2 classes"),
        (lambda: few_labels(Y, 3, 3, Keys(0).open("l")), DataError, "class 2 has 0 rows"),
        (lambda: few_labels(Y, 2, 5, Keys(0).open("l")), DataError, "class 0 has 2 rows, too few for 5 labels"),
        (lambda: few_labels(Y, 1, 3, Keys(0).open("l")), DataError, "label 1 is none of 1"),
    ],
)
def test_what_cannot_be_probed(call, error, says):
    with pytest.raises(error, match=says):
        call()
