"""The maps against scipy, autograd and what they must undo; retrieval against loops; the score by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from gencli import keyed, translation
from gencli.console import DataError, UsageError
from gencli.metrics import translation as metric
from gencli.models.translation.linear import Linear
from gencli.models.translation.procrustes import Procrustes
from gencli.translation import Normalisation
from gencli.words import unit


def noise(*shape, key="noise"):
    return keyed.generator("test", key).standard_normal(shape)


def rotation(d, key="rotation"):
    return np.linalg.qr(noise(d, d, key=key))[0]


def solved(model, X, Z, **options):
    return model(model.Config(**options)).fit(X, Z, keyed.generator("order"))


# --- maps


def test_procrustes_is_scipys_and_orthogonal():
    X, Z = noise(80, 12), noise(80, 12, key="other")
    W = solved(Procrustes, X, Z)
    R, _ = scipy.linalg.orthogonal_procrustes(X, Z)  # min |X R - Z|: R = W^T
    np.testing.assert_allclose(W, R.T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(W.T @ W, np.eye(12), rtol=0, atol=1e-9)


def test_least_squares_on_unit_vectors_is_gensims():
    """gensim 4.4.0, TranslationMatrix(source, target, pairs).translation_matrix, which maps rows: the transpose."""
    i = np.arange(36).reshape(12, 3)
    x, z = np.sin(0.7 * i * i).astype(np.float32), np.cos(1.3 * i * i).astype(np.float32) + np.float32(0.5)
    made, _, _ = translation.fit("linear", {}, ("unit",), x, z, np.repeat(np.arange(12)[:, None], 2, 1))
    theirs = [0.700538, 0.8751097, 0.50979257, 0.2525519, -0.15766479, 0.42988276, -0.3977614, 0.2030666, 0.13532041]
    np.testing.assert_allclose(made.W.T.ravel(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mirrored", [1, -1])
def test_the_gradient_form_meets_the_closed_form(mirrored):
    X, R = noise(200, 10), rotation(10)
    R[0] *= mirrored
    Z = X @ R.T + 0.3 * noise(200, 10, key="other")
    W = solved(Procrustes, X, Z, solver="gradient")
    np.testing.assert_allclose(W.T @ W, np.eye(10), rtol=0, atol=1e-9)
    np.testing.assert_allclose(W, solved(Procrustes, X, Z), rtol=0, atol=1e-6)


def test_gradients_are_autograds():
    X, Z, V = noise(20, 5), noise(20, 4, key="z"), noise(4, 5, key="w")
    W, x, z = (torch.tensor(a, requires_grad=a is V) for a in (V, X, Z))
    ((x @ W.T * z).sum()).backward()
    np.testing.assert_allclose(Procrustes.gradient(X, Z), W.grad, rtol=1e-12)
    W.grad = None
    ((x @ W.T - z).square().sum() + 0.7 * W.square().sum()).backward()
    np.testing.assert_allclose(Linear.gradient(V, X, Z, 0.7), W.grad, rtol=1e-12)


def test_least_squares_and_ridge_have_no_gradient_left():
    X, Z = noise(50, 6), noise(50, 4, key="z")
    assert abs(Linear.gradient(solved(Linear, X, Z), X, Z)).max() < 1e-9
    ridge = solved(Linear, X, Z, penalty=3.0)
    assert abs(Linear.gradient(ridge, X, Z, 3.0)).max() < 1e-9
    few = solved(Linear, X[:3], Z[:3])  # fewer pairs than dimensions: the least of the maps that fit
    np.testing.assert_allclose(few @ X[:3].T, Z[:3].T, atol=1e-9)
    np.testing.assert_allclose(few, Z[:3].T @ np.linalg.pinv(X[:3].T), atol=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 20.0])
def test_stochastic_gradient_descent_nears_least_squares(penalty):
    X = noise(400, 6)
    Z = X @ noise(6, 4, key="w") + 0.1 * noise(400, 4, key="z")
    exact = solved(Linear, X, Z, penalty=penalty)
    W = solved(Linear, X, Z, penalty=penalty, solver="sgd")
    assert abs(W - exact).max() < 0.02 < 0.1 * abs(exact).max()
    assert (solved(Linear, X, Z, penalty=penalty, solver="sgd") == W).all()


@pytest.mark.parametrize("name", ["procrustes", "linear"])
@pytest.mark.parametrize("steps", ["none", "unit", "unit,centre,unit", "centre,whiten"])
def test_a_rotated_noisy_copy_is_found_again(name, steps):
    x = noise(400, 20).astype(np.float32)
    R = rotation(20)
    z = (x @ R.T + 0.05 * noise(400, 20, key="more")).astype(np.float32)
    made, mapped, y = translation.fit(
        name, {}, translation.parse(steps), x, z, np.repeat(np.arange(100)[:, None], 2, 1)
    )
    at = metric.ranked("nn", mapped, y, mapped, 1)[1][:, 0]
    assert (at[100:] == np.arange(100, 400)).all()
    if steps == "none":
        assert abs(made.W - R).max() < 0.05
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1, rtol=1e-5)


def test_refinement_finds_what_few_pairs_miss():
    x = unit(noise(600, 30).astype(np.float32))
    z = unit((x @ rotation(30).T + 0.08 * noise(600, 30, key="more")).astype(np.float32))
    few = np.repeat(np.arange(25)[:, None], 2, 1)

    def right(refine):
        made, mapped, y = translation.fit("procrustes", {}, (), x, z, few, refine)
        assert made.about["pairs"] == 25 or refine
        return (metric.ranked("nn", mapped, y, mapped, 1)[1][:, 0] == np.arange(600)).mean()

    assert right(0) < 0.9 and right(4) > 0.98


def test_different_dimensions_suit_the_linear_map_alone():
    X, Z = noise(30, 6), noise(30, 4, key="z")
    assert solved(Linear, X, Z).shape == (4, 6)
    with pytest.raises(DataError, match="the source has 6 and the target 4"):
        solved(Procrustes, X, Z)


def test_options_of_maps():
    assert translation.configured("linear", {"penalty": 1}).config.penalty == 1
    for name, options, why in [
        ("procrusts", {}, "did you mean 'procrustes'"),
        ("linear", {"penlty": 1}, "did you mean 'penalty'"),
        ("linear", {"penalty": -1}, "penalty=-1"),
        ("procrustes", {"solver": "magic"}, "solver=magic"),
    ]:
        with pytest.raises(UsageError, match=why):
            translation.configured(name, options)
    assert translation.parse("none") == () and translation.parse("unit,whiten") == ("unit", "whiten")
    with pytest.raises(UsageError, match="did you mean 'centre'"):
        translation.parse("unit,center")


# --- normalisation


def test_normalisation_does_what_its_steps_say():
    x = (noise(500, 8) @ noise(8, 8, key="mix") + 3).astype(np.float32)
    _, y = Normalisation.fit(("unit", "centre", "unit"), x)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    c = u - u.mean(0)
    np.testing.assert_allclose(y, c / np.linalg.norm(c, axis=1, keepdims=True), rtol=1e-4, atol=1e-6)
    learned, y = Normalisation.fit(("centre", "whiten"), x)
    np.testing.assert_allclose(y.T @ y / 500, np.eye(8), atol=1e-4)
    np.testing.assert_allclose(learned(x[:3]), y[:3], rtol=1e-6)  # of others it takes what it learned, not their mean
    assert (unit(np.zeros((1, 3), np.float32)) == 0).all()
    with pytest.raises(DataError, match="do not span"):
        Normalisation.fit(("whiten",), x[:5])


# --- files


def test_a_map_is_saved_and_loaded_to_the_bit(tmp_path):
    x, z = (noise(60, 5, key=k).astype(np.float32) for k in "xz")
    steps = ("unit", "centre", "whiten")
    made, mapped, _ = translation.fit("procrustes", {}, steps, x, z, np.repeat(np.arange(60)[:, None], 2, 1))
    path = tmp_path / "map.safetensors"
    made.save(path)
    found = translation.load(path)
    assert (found.W == made.W).all() and found.about == made.about and found.about["normalise"] == list(steps)
    assert (found.mapped(found.source(x)) == mapped).all()
    whole = path.read_bytes()
    made.save(path)
    assert path.read_bytes() == whole
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"map\.safetensors"):
            translation.load(path)
    for old, new, why in [
        (b'pairs\\":60', b'pairs\\":{}', "is no map"),
        (b'"kind\\":\\"map', b'"kind\\":\\"mop', "is no map"),
        (b'\\"whiten\\"', b'\\"centre\\"', r"source\.2|target\.2"),
        (b'\\"whiten\\"', b'\\"wheten\\"', "is no map"),
        (whole[-8:], np.float64("nan").tobytes(), "not finite"),
    ]:
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(DataError, match=why):
            translation.load(path)


# --- retrieval


def spaces(n=70, m=90, s=400, d=6):
    return [unit(noise(k, d, key=key).astype(np.float32)) for k, key in ((n, "q"), (m, "t"), (s, "s"))]


def looped(how, x, y, sources):
    """Scores (n, m) by the formulas, a pair at a time, in float64."""
    x, y, sources = (a.astype(np.float64) for a in (x, y, sources))
    r_x = [np.mean(sorted(float(q @ t) for t in y)[-10:]) for q in x]
    r_y = [np.mean(sorted(float(t @ q) for q in sources)[-10:]) for t in y]
    total = [sum(math.exp(30 * float(t @ q)) for q in sources) for t in y]
    score = np.empty((len(x), len(y)))
    for i, q in enumerate(x):
        for j, t in enumerate(y):
            cosine = float(q @ t)
            score[i, j] = {
                "nn": cosine,
                "csls": 2 * cosine - r_x[i] - r_y[j],
                "inverted-softmax": 30 * cosine - math.log(total[j]),
            }[how]
    return score


@pytest.mark.parametrize("how", metric.RETRIEVALS)
@pytest.mark.parametrize("table", [1 << 24, 300])
def test_retrieval_is_that_of_a_loop_over_all_pairs(how, table, monkeypatch):
    monkeypatch.setattr(metric, "TABLE", table)
    x, y, sources = spaces()
    want = looped(how, x, y, sources)
    score, at = metric.ranked(how, x, y, sources, 10)
    best = np.argsort(-want, 1, kind="stable")[:, :10]
    np.testing.assert_allclose(score, np.take_along_axis(want, best, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(want, at, 1), np.take_along_axis(want, best, 1), atol=1e-5)


def hubs():
    """A large space with a hub, where most targets are never needed."""
    x, y, sources = spaces(30, 4000, 3000, 40)
    y[7] = unit(sources.mean(0, keepdims=True))[0]
    return x, y, sources


def counted(monkeypatch):
    """The products that CSLS takes to follow targets through sources, a number a call."""
    found = []
    whole = metric._raise
    monkeypatch.setattr(metric, "_raise", lambda b, a, c: found.append(len(a) * len(c)) or whole(b, a, c))
    return found


def test_csls_leaves_out_only_what_cannot_win(monkeypatch):
    x, y, sources = hubs()
    products = counted(monkeypatch)
    score, at = metric.ranked("csls", x, y, sources, 5)
    P, R = x @ y.T, y @ sources.T
    want = 2 * P - np.sort(P)[:, -10:].mean(1)[:, None] - np.sort(R)[:, -10:].mean(1)
    best = np.argsort(-want, 1, kind="stable")[:, :5]
    assert (at == best).all() and sum(products) < 4000 * 3000 / 4
    np.testing.assert_allclose(score, np.take_along_axis(want, best, 1), atol=1e-5)


@pytest.mark.parametrize("how", metric.RETRIEVALS)
def test_word_by_word_is_the_same_as_all_at_once(how, monkeypatch):
    x, y, sources = hubs()
    score, at = metric.ranked(how, x, y, sources, 5)
    products = counted(monkeypatch)
    ranking = metric.Ranking(how, y, sources)
    first = [ranking(x[:1], 5), len(products)]
    one = [ranking(x[i : i + 1], 5) for i in range(30)]
    np.testing.assert_array_equal(np.concatenate([a for _, a in one]), at)
    np.testing.assert_allclose(np.concatenate([s for s, _ in one]), score, atol=2e-5)
    if how == "csls":  # one look at all targets; then each is followed but once, and the first word is not again
        assert max(products[1:]) < 4000 * 3000 / 20 and products[0] == 4000 * 120
        assert sum(products) < 4000 * 3000 / 4 and not any(products[first[1] : first[1] + 6])


def test_the_largest_numbers_of_rows():
    P = noise(5, 2000).astype(np.float32)
    for width, k in ((2000, 7), (1999, 1), (640, 10), (641, 10), (30, 10), (10, 10)):
        values, at = metric._top(P[:, :width], k)
        assert (np.sort(values) == np.sort(P[:, :width])[:, -k:]).all()
        assert (np.take_along_axis(P, at, 1) == values).all()


def test_equal_scores_go_to_the_smaller_row():
    y = np.eye(3, dtype=np.float32)[[0, 1, 0, 1]]
    assert metric.ranked("nn", y[:2], y, y, 4)[1].tolist() == [[0, 2, 1, 3], [1, 3, 0, 2]]
    assert metric.retrieval("csls") == "csls"
    with pytest.raises(UsageError, match="did you mean 'csls'"):
        metric.retrieval("clsl")


# --- the score


def test_the_score_counts_source_words_once_with_any_translation():
    source, target = {"a": 0, "b": 1, "c": 2, "d": 3}, {w: i for i, w in enumerate("uvwxyz")}
    dictionary = {"a": ["u", "v"], "b": ["w"], "c": ["nowhere"], "e": ["u"], "d": ["z", "nowhere"]}
    test = metric.Test.of(dictionary, source, target, "d.txt")
    assert test.rows.tolist() == [0, 1, 3] and test.right == [{0, 1}, {2}, {5}] and test.words == 5
    at = np.array([[1, 0, 2, 3, 4, 5], [0, 1, 3, 4, 2, 5], [0, 1, 2, 3, 4, 5]])
    assert metric.scored(test, at).tolist() == [[True] * 3, [False, True, True], [False, False, True]]
    with pytest.raises(DataError, match=r"d\.txt: none of its 1 words, such as 'q'"):
        metric.Test.of({"q": ["u"]}, source, target, "d.txt")


def test_the_interval_is_that_of_resampling():
    change = np.array([1] * 60 + [-1] * 30 + [0] * 110)
    g = keyed.generator("resample")
    means = change[g.integers(200, size=(20_000, 200))].mean(1)
    np.testing.assert_allclose(metric.interval(change, 0), np.quantile(means, (0.025, 0.975)), atol=0.011)
    assert metric.interval(np.zeros(9), 0) == (0, 0) and metric.interval(change, 0) == metric.interval(change, 0)
