"""word2vec against its formulas: costs, gradients, subsampling, negatives, and what it learns."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gencli import checkpoint
from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.models.words.word2vec import SPECIAL, Blocks, L, Word2vec, band
from gencli.rng import Keys
from gencli.run import Run
from gencli.training.session import Interrupted
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
        Word2vec.Config(**{"dim": 6, "window": 3, "negative": 4, "min_count": 1, "shared": 4} | config), spec
    )
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
    return model


def step(number: int = 0, lr: float = 0.1) -> Step:
    return Step(number, 10, Keys(0).open("test", number), torch.zeros(()), lr=lr)


def case(B: int = 2, M: int = 2 * L, window: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, their lines (with ends and gaps), window sizes and the negatives of each block."""
    g = torch.Generator().manual_seed(1)
    w = torch.randint(7, (B, M), generator=g)
    line = (torch.rand(B, M, generator=g) < 0.15).cumsum(1) + 100 * torch.arange(B)[:, None]
    w[:, -3:], line[:, -3:] = 0, -1
    size = torch.randint(1, window + 1, (B, M), generator=g).where(line >= 0, 0)
    return w, line, size, torch.randint(7, (B, M // L, 4), generator=g)


def cost_by_the_paper(model: Word2vec, w: Tensor, line: Tensor, size: Tensor, negatives: Tensor) -> tuple[Tensor, int]:
    """Eq. 4 of the paper in loops, each of the K negatives standing for k/K; CBOW as in arXiv:1301.3781."""
    v, v_, k = model.input, model.output, model.config.negative
    cost, terms = torch.zeros(()), 0
    for r in range(len(w)):
        for t in range(w.shape[1]):
            context = [
                j for j in range(t - int(size[r, t]), t + int(size[r, t]) + 1)
                if j != t and 0 <= j < w.shape[1] and line[r, t] >= 0 and line[r, j] == line[r, t]
            ]  # fmt: skip
            if model.config.architecture == "skip-gram":
                pairs = [(v[w[r, t]], v_[w[r, j]]) for j in context]
            else:
                pairs = [(torch.stack([v[w[r, j]] for j in context]).mean(0), v_[w[r, t]])] if context else []
            others = v_[negatives[r, t // L]]
            for h, out in pairs:
                cost = cost - (out @ h).sigmoid().log() - k / len(others) * (-(others @ h)).sigmoid().log().sum()
                terms += 1
    return cost, terms


def terms_of(model: Word2vec, w: Tensor, line: Tensor, size: Tensor, negatives: Tensor) -> Blocks:
    return model.blocks(w.flatten(), model.near(line.flatten(), size.flatten()), negatives.flatten(0, 1))


@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_cost_and_gradients_are_those_of_the_paper(architecture: str) -> None:
    model = made(architecture=architecture)
    batch = case()
    for p in model.parameters():
        p.requires_grad_(True)
    expected, pairs = cost_by_the_paper(model, *batch)
    slopes = torch.autograd.grad(expected, [model.input, model.output])
    terms = terms_of(model, *batch)
    assert terms.n.sum() == pairs > 50
    # rates of rows multiply the gradients in them
    g = torch.Generator().manual_seed(4)
    a, a_ = (torch.rand(7, generator=g) for _ in range(2))
    with torch.no_grad():
        p, dv, dv_ = model.gradients(terms, a[terms.into], a_[terms.out])
        torch.testing.assert_close(model.cost(p, terms.W), expected, rtol=1e-12, atol=0)
    for rows, rate, found, slope in ((terms.into, a, dv, slopes[0]), (terms.out, a_, dv_, slopes[1])):
        total = torch.zeros_like(slope).index_add_(0, rows.flatten(), found.flatten(0, 1))
        torch.testing.assert_close(total, rate[:, None] * slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_rows_descend_at_no_more_than_their_curvature_allows(architecture: str) -> None:
    """By hand: T_r sums the weights of the terms that row r is in, and r moves by min(lr, 2 / T_r) of its gradient."""
    model = made(architecture=architecture, sample=0)
    x = torch.randint(7, (3, 40), generator=torch.Generator().manual_seed(6)) + SPECIAL
    before = [p.clone() for p in model.parameters()]
    w, line, size = model.left(x, s := step(lr=0.03))
    negatives = model.negatives(s.rng.uniform("negatives", (3, w.shape[1] // L, 4)))
    terms = terms_of(model, w, line, size, negatives)
    _, dv, dv_ = model.gradients(terms, torch.ones_like(terms.into), torch.ones_like(terms.out))
    into = terms.W.sum(2) if terms.A is None else (terms.A * terms.W.sum(2)[..., None]).sum(1)
    s = step(lr=0.03)
    model.update(model.loss(Batch(x=x, n=3), s)["keep"], s)
    capped = 0
    for v, old, rows, t, g in zip(
        model.parameters(), before, (terms.into, terms.out), (into, terms.W.sum(1)), (dv, dv_)
    ):
        for r in range(7):
            here = rows == r
            rate = min(0.03, 2 / float(t[here].sum()))
            capped += rate < 0.03
            torch.testing.assert_close(v[r], old[r] - rate * g[here].sum(0), rtol=1e-8, atol=1e-10)
    assert capped > 0


def test_weights_are_summed_exactly_where_products_are_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of ones in bfloat16 ends at 256, and 2 / T would be too long a step."""
    kinds, add = [], Tensor.scatter_add_
    monkeypatch.setattr(Tensor, "scatter_add_", lambda T, *more: (kinds.append(T.dtype), add(T, *more))[1])
    with torch.autocast("cpu", torch.bfloat16):
        made(architecture="cbow").loss(Batch(x=torch.full((1, 40), SPECIAL), n=1), step())
    assert kinds == [torch.float64] * 2


def test_a_band_of_a_block() -> None:
    x = torch.arange(2 * L * (L + 6)).view(2, L, L + 6)
    for row in (0, 5, L - 1):
        torch.testing.assert_close(band(x, 3)[1, row], x[1, row, row : row + 7])


def test_words_are_left_out_as_often_as_the_formula_says() -> None:
    model = made(sample=0.05)
    f = torch.tensor(COUNTS[SPECIAL:]) / sum(COUNTS[SPECIAL:])
    expected = torch.minimum(torch.ones(()), (0.05 / f).sqrt() + 0.05 / f)
    torch.testing.assert_close(model.kept, torch.cat([torch.zeros(2), expected]))
    x = torch.randint(9, (1000, 40), generator=torch.Generator().manual_seed(3))
    w, line, _ = model.left(x, step())
    n = torch.bincount(w[line >= 0], minlength=7)
    share = n / torch.bincount(x.flatten(), minlength=9)[SPECIAL:]
    assert (share - expected).abs().max() < 0.02
    for r in range(20):  # order and lines are kept
        left = w[r][line[r] >= 0].tolist()
        it = iter((x[r] - SPECIAL).tolist())
        assert all(word in it for word in left)
        assert (line[r][: len(left)].diff() >= 0).all() and (line[r][len(left) :] == -1).all()
    assert (made(sample=0).kept[SPECIAL:] == 1).all()


def test_lines_end_where_the_text_says() -> None:
    model = made(sample=0)
    x = torch.tensor([[2, 3, 1, 4, 0, 5, 1, 6]])
    w, line, size = model.left(x, step())
    assert w[0, :5].tolist() == [0, 1, 2, 3, 4] and (line[0, 5:] == -1).all() and (w[0, 5:] == 0).all()
    near = model.near(line.flatten(), (3 * size).clamp(max=3).flatten())
    assert {(n, n + j - 3) for n, j in near.nonzero().tolist()} == {(0, 1), (1, 0), (2, 3), (3, 2)}
    near = model.near(torch.zeros(5, dtype=torch.int32), torch.tensor([1, 2, 4, 1, 3], dtype=torch.int32))
    assert near.int().tolist()[1] == [0, 0, 1, 0, 1, 1, 0] and near.int().tolist()[2] == [0, 1, 1, 0, 1, 1, 0]


def test_windows_are_uniform() -> None:
    model = made(sample=0, window=4)
    _, line, size = model.left(torch.full((500, 40), 3), step())
    share = torch.bincount(size[line >= 0], minlength=5) / (line >= 0).sum()
    assert share[0] == 0 and (share[1:] - 0.25).abs().max() < 0.02
    model = made(sample=0.02, window=4)  # where many are left out, too
    _, line, size = model.left(torch.full((2000, 40), 3), step())
    assert 0.2 < (line >= 0).sum() / 80000 < 0.5
    share = torch.bincount(size[line >= 0], minlength=5) / (line >= 0).sum()
    assert share[0] == 0 and (share[1:] - 0.25).abs().max() < 0.02


def test_negatives_come_by_their_frequency_to_three_quarters() -> None:
    model = made()
    found = model.negatives(step().rng.uniform("negatives", (5000, 2, 3)))
    seen = torch.bincount(found.flatten(), minlength=7) / found.numel()
    expected = torch.tensor(COUNTS[SPECIAL:]) ** 0.75
    expected /= expected.sum()
    assert (seen - expected).abs().max() < 0.01
    assert torch.equal(found, found.sort(2)[0])  # of each third one
    counts = torch.stack([(found == 0).sum(2), (found == 1).sum(2)]).double()
    assert (counts.var(dim=(1, 2)) < 0.9 * 3 * (expected * (1 - expected))[:2]).all()  # less than the binomial's


def test_rare_words_have_no_vector() -> None:
    model = made(min_count=8)
    assert model.vocabulary == tuple("abcde") and model.vectors().shape == (5, 6)
    w, line, _ = model.left(torch.tensor([[2, 7, 8, 6]]), step())
    assert set(w[line >= 0].tolist()) <= {0, 4}
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
    alike = (unit @ unit.T).fill_diagonal_(-1)
    assert alike.argmax(1)[[0, 1, 4, 5]].tolist() == [1, 0, 5, 4] and alike[0, 1] > 0.9 and alike[4, 5] > 0.9
    assert alike[0, 4] < alike[0, 1] - 0.1


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


def test_a_signal_stops_hogwild_of_one_process_at_this_step(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    made = tiny("word2vec", "train.hogwild=true", "train.steps=20")
    with session(made) as run, Run.create(out=tmp_path / "run") as folder:
        run.start(folder)
        run._signal = signal.SIGTERM
        with pytest.raises(Interrupted):
            run.fit(preview=False)
        assert run.trainer.number == checkpoint.steps(folder.path)[-1][0] == 1


def test_hogwild_is_for_rows_that_a_model_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    with session(tiny("word2vec", "train.hogwild=true")) as run:
        run.trainer.step()
    refused = pytest.raises(UsageError, match=r"^train.hogwild: VAE has an optimiser$")
    with refused, session(tiny("vae", "train.hogwild=true")):
        pass
    for wrong in ("accumulate=2", "ema=0.9", "deterministic=true"):
        refused = pytest.raises(UsageError, match=rf"^train.{wrong.partition('=')[0]} goes not with train.hogwild, ")
        with refused, session(tiny("word2vec", "train.hogwild=true", f"train.{wrong}")):
            pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    refused = pytest.raises(UsageError, match=r"^train.hogwild: Word2vec is on several machines$")
    with refused, session(tiny("word2vec", "train.hogwild=true")):
        pass
