"""word2vec against its formulas: costs, gradients, subsampling, negatives, and what it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.words.word2vec import SPECIAL, L, Word2vec, around, collected, descend
from gencli.rng import Keys
from tests.tiny import session, tiny

WORDS = tuple("abcdefg")
COUNTS = (0, 20, 40, 30, 20, 10, 8, 5, 4)


@pytest.fixture(autouse=True)
def exact():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(**config) -> Word2vec:
    spec = DataSpec(
        name="letters", kind="tokens", shape=(40,), levels=9, vocabulary=("\ufffd", "</s>", *WORDS), counts=COUNTS
    )
    model = Word2vec(
        Word2vec.Config(**{"dim": 6, "window": 3, "negative": 4, "min_count": 1, "shared": 8} | config), spec
    )
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
    return model


def step(number: int = 0, lr: float = 0.1) -> Step:
    return Step(number, 10, Keys(0).open("test", number), torch.zeros(()), lr=lr)


def case(B: int = 2, M: int = 2 * L, window: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, their lines (with ends and gaps), window sizes and negatives."""
    g = torch.Generator().manual_seed(1)
    w = torch.randint(7, (B, M), generator=g)
    line = (torch.rand(B, M, generator=g) < 0.15).cumsum(1) + 100 * torch.arange(B)[:, None]
    w[:, -3:], line[:, -3:] = -1, -1
    size = torch.randint(1, window + 1, (B, M), generator=g)
    return w, line, size, torch.randint(7, (B, 8), generator=g)


def cost_by_the_paper(model: Word2vec, w: Tensor, line: Tensor, size: Tensor, negatives: Tensor) -> tuple[Tensor, int]:
    """Eq. 4 of the paper in loops, each of the K negatives standing for k/K; CBOW as in arXiv:1301.3781."""
    v, v_, k = model.input, model.output, model.config.negative
    cost, terms = torch.zeros(()), 0
    for r in range(len(w)):
        for t in range(w.shape[1]):
            context = [
                j for j in range(t - int(size[r, t]), t + int(size[r, t]) + 1)
                if j != t and 0 <= j < w.shape[1] and w[r, t] >= 0 and line[r, j] == line[r, t]
            ]  # fmt: skip
            if model.config.architecture == "skip-gram":
                pairs = [(v[w[r, t]], v_[w[r, j]]) for j in context]
            else:
                pairs = [(torch.stack([v[w[r, j]] for j in context]).mean(0), v_[w[r, t]])] if context else []
            for h, out in pairs:
                cost = cost - (out @ h).sigmoid().log()
                cost = cost - k / len(negatives[r]) * (-(v_[negatives[r]] @ h)).sigmoid().log().sum()
                terms += 1
    return cost, terms


@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_cost_and_gradients_are_those_of_the_paper(architecture: str) -> None:
    model = made(architecture=architecture)
    w, line, size, negatives = case()
    for p in model.parameters():
        p.requires_grad_(True)
    expected, terms = cost_by_the_paper(model, w, line, size, negatives)
    slopes = torch.autograd.grad(expected, [model.input, model.output])
    with torch.no_grad():
        cost, n, kept = model.gradients(w, model.near(line.flatten(), size.flatten()), negatives)
    assert n == terms > 50
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)
    k = {name: rows.flatten(0, 1) for name, rows in kept.items()}
    dv = torch.zeros_like(model.input).index_add_(0, k["w"], k["dv"])
    dv_ = torch.zeros_like(model.output).index_add_(0, k["w"], k["dv'"]).index_add_(0, k["negatives"], k["dv_neg"])
    torch.testing.assert_close(dv, slopes[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dv_, slopes[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_the_weights_of_a_rows_terms(architecture: str) -> None:
    model = made(architecture=architecture)
    w, line, size, negatives = case()
    near = model.near(line.flatten(), size.flatten())
    _, terms, kept = model.gradients(w, near, negatives)
    k = model.config.negative
    # every term weighs once in one input row (spread over the mean, in CBOW) and once in one output row
    assert kept["t"].sum() == pytest.approx(float(terms) * (1 + k))
    assert kept["t'"].sum() == pytest.approx(float(terms))
    assert kept["t_neg"].sum() == pytest.approx(float(terms) * k)
    assert kept["t"][w < 0].abs().max() == 0 == kept["dv"][w < 0].abs().max()


@pytest.mark.parametrize("b", [1, 5, L - 1, L, L + 3, 2 * L + 1])
def test_collected_is_the_transpose_of_around(b: int) -> None:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(3 * L + 2 * b, 2, generator=g), torch.randn(3, L + 2 * b, 2, generator=g)
    inner = x.clone()
    inner[:b], inner[-b:] = 0, 0  # the rows beside the sequence are nobody's
    torch.testing.assert_close((around(inner, b) * y).sum(), (inner[b:-b] * collected(y, b)).sum())


def test_rows_descend_at_no_more_than_their_curvature_allows() -> None:
    v = torch.zeros(3, 2)
    rows, dv = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 3.0]])
    descend(v, [(rows, dv, torch.tensor([10.0, 50.0, 30.0])), (rows[:1], dv[:1], torch.tensor([5.0]))], 0.1)
    torch.testing.assert_close(v, torch.tensor([[-0.2, -0.4], [-0.075, -0.075], [0.0, 0.0]]))  # 2 / 80 = 0.025


def test_words_are_left_out_as_often_as_the_formula_says() -> None:
    model = made(sample=0.05)
    f = torch.tensor(COUNTS[SPECIAL:]) / sum(COUNTS[SPECIAL:])
    expected = torch.minimum(torch.ones(()), (0.05 / f).sqrt() + 0.05 / f)
    torch.testing.assert_close(model.kept, torch.cat([torch.zeros(2), expected]))
    x = torch.randint(9, (1000, 40), generator=torch.Generator().manual_seed(3))
    w, line, _ = model.left(x, step())
    n = torch.bincount(w[w >= 0], minlength=7)
    share = n / torch.bincount(x.flatten(), minlength=9)[SPECIAL:]
    assert (share - expected).abs().max() < 0.02
    for r in range(20):  # order and lines are kept
        left = w[r][w[r] >= 0].tolist()
        it = iter((x[r] - SPECIAL).tolist())
        assert all(word in it for word in left)
        assert (line[r][: len(left)].diff() >= 0).all() and (line[r][len(left) :] == -1).all()
    assert (made(sample=0).kept[SPECIAL:] == 1).all()


def test_lines_end_where_the_text_says() -> None:
    model = made(sample=0)
    x = torch.tensor([[2, 3, 1, 4, 0, 5, 1, 6]])
    w, line, size = model.left(x, step())
    assert w[0, :5].tolist() == [0, 1, 2, 3, 4] and (w[0, 5:] == -1).all()
    near = model.near(line.flatten(), torch.full_like(size.flatten(), 3))[0, :, 3 : L + 3]
    assert {(i, j) for i, j in near.nonzero().tolist()} == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_windows_are_uniform() -> None:
    model = made(sample=0, window=4)
    w, _, size = model.left(torch.full((500, 40), 3), step())
    share = torch.bincount(size[w >= 0], minlength=5) / (w >= 0).sum()
    assert share[0] == 0 and (share[1:] - 0.25).abs().max() < 0.02


def test_negatives_come_by_their_frequency_to_three_quarters() -> None:
    model = made(shared=8)
    found = []
    for number in range(60):
        out = model.loss(Batch(x=torch.full((100, 4), 3), n=100), step(number))
        found.append(out["keep"]["negatives"].flatten())
    seen = torch.bincount(torch.cat(found), minlength=7) / len(torch.cat(found))
    expected = torch.tensor(COUNTS[SPECIAL:]) ** 0.75
    assert (seen - expected / expected.sum()).abs().max() < 0.01


def test_rare_words_have_no_vector() -> None:
    model = made(min_count=8)
    assert model.vocabulary == tuple("abcde") and model.vectors().shape == (5, 6)
    w, _, _ = model.left(torch.tensor([[2, 7, 8, 6]]), step())
    assert set(w.flatten().tolist()) <= {0, 4, -1}
    with pytest.raises(ValueError, match="1 words come 35 times or more"):
        made(min_count=35)


def test_vectors_stay_at_length_one() -> None:
    model = made(normalise=True, sample=0)
    model.input.copy_(F.normalize(model.input))
    before = model.input.clone()
    s = step(lr=0.5)
    model.update(model.loss(Batch(x=torch.tensor([[2, 3, 4, 5] * 10]), n=1), s)["keep"], s)
    torch.testing.assert_close(model.input.norm(dim=1), torch.ones(7))
    moved = (model.input - before).norm(dim=1) > 1e-3
    assert moved.tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_it_learns_which_words_keep_the_same_company(architecture: str) -> None:
    """a and b stand between c and d, e and f between g and g: the nearest of a is b."""
    model = made(architecture=architecture, dim=8, window=1, sample=0)
    for p, scale in zip(model.parameters(), (0.1, 0.0)):
        p.mul_(scale)
    g = torch.Generator().manual_seed(5)
    first = None
    for number in range(200):
        kind = torch.randint(2, (2, 10), generator=g)
        middle = 2 * kind * 2 + torch.randint(2, (2, 10), generator=g)  # a, b or e, f
        beside = torch.where(kind == 0, torch.tensor(2), torch.tensor(6))
        x = (
            torch.stack([beside, middle, torch.where(kind == 0, 3, 6), torch.full_like(kind, -1)], 2).flatten(1)
            + SPECIAL
        )
        s = step(number, lr=0.1)
        out = model.loss(Batch(x=x, n=2), s)
        first = first or float(out["loss"])
        model.update(out["keep"], s)
    unit = F.normalize(model.vectors())
    assert float(out["loss"]) < 0.8 * first
    assert unit[0] @ unit[1] > 0.9 and unit[4] @ unit[5] > 0.9 and unit[0] @ unit[4] < 0.7


def test_the_learning_rate_is_the_recipes() -> None:
    torch.set_default_dtype(torch.float32)
    with session(tiny("word2vec", "train.lr=0.3", "train.schedule=linear", "train.steps=10")) as run:
        run.trainer.number = 4
        assert run.trainer._step("words", 0, offset=0, stride=1).lr == pytest.approx(0.3 * 0.6)


def test_it_reads_whole_words_and_nothing_else_does() -> None:
    torch.set_default_dtype(torch.float32)
    for model, data, said in [
        ("word2vec", "docs", "word2vec reads tokens, and the data set 'docs' is text"),
        ("word2vec", "digits", "word2vec reads tokens, and the data set 'digits' is image"),
        ("rnn", "docs:tokens", "rnn reads no whole words"),
    ]:
        with pytest.raises(UsageError, match=said), session(tiny(model, f"data.name={data}")):
            pass
