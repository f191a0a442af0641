"""Word vectors asked: sums, neighbours, similarities and analogies, and the verbs that ask."""

from __future__ import annotations

import io
import itertools
import json
import sys

import numpy as np
import pytest

from gencli import cli, console, recipe, words
from gencli import vectors as files
from gencli.console import DataError, UsageError
from gencli.metrics import similarity
from gencli.run import Run
from gencli.vectors import Vectors
from tests.tiny import session

NAMES = ["king", "queen", "man", "woman", "prince", "princess", "apple"]


@pytest.fixture
def small() -> Vectors:
    g = np.random.default_rng(0)
    royal, young, female = (g.normal(size=20) for _ in range(3))
    x = [royal, royal + female, 0 * royal, female, royal + young, royal + young + female, g.normal(size=20)]
    return Vectors(NAMES, (np.array(x) + g.normal(size=20) + 0.1 * g.normal(size=(7, 20))).astype(np.float32), "v")


def test_sums() -> None:
    assert words.queries(["king", "-", "man", "+", "woman"]) == ["king - man + woman"]
    assert words.queries(["king", "man - boy"]) == ["king", "man - boy"]
    assert words.parts("king - man + woman") == [(1, "king"), (-1, "man"), (1, "woman")]
    assert words.parts("- man") == [(-1, "man")]
    odd = Vectors(["a", ". . ."], np.eye(2, dtype=np.float32), "v")
    assert words.vector(". . .", odd, odd.x)[1] == [". . ."]  # a word of GloVe's
    for bad in ("king man", "king -", "- - man", "", "+"):
        with pytest.raises(UsageError, match="no word, and no sum"):
            words.parts(bad)


def test_lengths_of_any_size_become_one() -> None:
    g = np.random.default_rng(3).normal(size=(5, 4)) * np.array([[1e-38], [1e-20], [1], [1e25], [0]])
    x = g.astype(np.float32)
    found = words.unit(x)
    np.testing.assert_allclose(found[:4], g[:4] / np.linalg.norm(g[:4], axis=1, keepdims=True), rtol=1e-5)
    assert not found[4].any() and found.dtype == np.float32 and (x == g.astype(np.float32)).all()


def test_the_vector_of_a_sum(small: Vectors) -> None:
    y, own = words.vector("king - man + woman", small, small.x)
    np.testing.assert_allclose(y, small.x[0] - small.x[2] + small.x[3], rtol=1e-6)
    assert own == ["king", "man", "woman"] and words.vector("king - cat", small, small.x) == "cat"


@pytest.mark.parametrize("chunk", [1, 15, 1 << 20])
def test_nearest_words_are_those_of_the_largest_cosine(monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(words, "CHUNK", chunk)
    g = np.random.default_rng(1)
    x, y, without = words.unit(g.normal(size=(12, 5))), g.normal(size=(6, 5)), g.integers(12, size=(6, 2))
    scores, rows = words.nearest_words(y, x, without, 4)
    for i in range(6):
        cosine = {r: y[i] @ x[r] / np.linalg.norm(y[i]) for r in range(12) if r not in without[i]}
        best = sorted(cosine, key=lambda r: -cosine[r])[:4]
        assert rows[i].tolist() == best
        np.testing.assert_allclose(scores[i], [cosine[r] for r in best], rtol=1e-5)


def spearman(a: list[float], b: list[float]) -> float:
    """By the definition: Pearson's correlation of ranks, ties sharing the mean of theirs."""

    def ranks(v: list[float]) -> list[float]:
        return [sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


@pytest.mark.parametrize("mark", ["\t", ",", " "])
def test_similarity_is_spearmans(tmp_path, small: Vectors, mark: str) -> None:
    g = np.random.default_rng(2)
    pairs = list(itertools.combinations(range(7), 2))
    scores = g.integers(5, size=len(pairs)).tolist()  # with ties
    lines = [mark.join([NAMES[a].title(), NAMES[b], str(s)]) for (a, b), s in zip(pairs, scores)]
    head = ["Word1,Word2,Score"] if mark == "," else ["# of people"]
    (tmp_path / "p.txt").write_text("\n".join([*head, *lines, mark.join(["king", "cat", "1"])]))
    x = small.x / np.linalg.norm(small.x, axis=1, keepdims=True)
    row = similarity.similarity(small, tmp_path / "p.txt")
    assert row["spearman"] == pytest.approx(spearman([float(x[a] @ x[b]) for a, b in pairs], scores), abs=1e-6)
    assert row["pairs"] == 21 and row["coverage"] == pytest.approx(21 / 22)


def test_equal_cosines_have_no_rank_correlation(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a b 1\nb c 2\na c 3\n")
    with pytest.raises(DataError, match=r"p\.txt: the cosines of its 3 pairs are all 1: they have no order"):
        similarity.similarity(Vectors(list("abc"), np.ones((3, 1), np.float32)), tmp_path / "p.txt")


def test_analogies_by_section(tmp_path, small: Vectors) -> None:
    text = (
        ": royal\nman woman king queen\nking queen prince princess\n: fruit\nman woman king apple\nman cat king queen\n"
    )
    (tmp_path / "q.txt").write_text(text + ": none\ncat dog mouse rat\n")
    rows = similarity.analogy(small, tmp_path / "q.txt")
    assert [(r["section"], r["accuracy"], r["questions"]) for r in rows] == [
        ("royal", 1.0, 2), ("fruit", 0.0, 1), ("none", None, 0), ("all", pytest.approx(2 / 3), 3),
    ]  # fmt: skip
    assert [r["coverage"] for r in rows] == [1.0, 0.5, 0.0, 0.6]


@pytest.mark.parametrize(
    ("metric", "text", "said"),
    [
        ("similarity", "a b 1\nking queen\n", "line 1: 'a b 1'|line 2: 'king queen' is not two words and a score"),
        ("similarity", "king queen 1\nking man nan\n", "line 2: the score nan is not finite"),
        ("similarity", "king queen 1\ncat dog 2\n", "of 2 pairs 1 have vectors"),
        ("similarity", b"king queen 1\n\xff man 1\n", "line 2: byte 1 is not UTF-8"),
        ("similarity", "x" * (2 << 20), "line 1: longer than 1 MB"),
        ("analogy", "man woman king\n", "line 1: 'man woman king' is not four words"),
        ("analogy", ": x\na b c d\n", "no question of which all words have vectors"),
    ],
)
def test_bad_questions_are_named(tmp_path, small: Vectors, metric: str, text: str | bytes, said: str) -> None:
    (tmp_path / "q.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said) as caught:
        getattr(similarity, metric)(small, tmp_path / "q.txt")
    assert "q.txt" in str(caught.value)


def test_words_of_stdin(monkeypatch) -> None:
    def piped(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return words.lines()

    whole = piped(b"\xef\xbb\xbfa\r\n\n  \nb c\nd")
    assert [word for batch in whole for word in batch] == ["a", "b c", "d"] and not list(piped(b""))
    batches = list(piped("".join(f"w{i}\n" for i in range(150)).encode()))
    assert [len(batch) for batch in batches] == [64, 64, 22] and batches[2][-1] == "w149"
    bad = piped(b"a\nb\n\xff\nc\n")
    assert next(bad) == ["a", "b"]
    with pytest.raises(DataError, match="standard input line 3: not UTF-8"):
        next(bad)
    with pytest.raises(DataError, match="standard input line 2: longer than 64 kB"):
        list(piped(b"a\n" + b"x" * (1 << 20)))


# ---- the verbs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a file."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "t.txt").write_text("".join(f"the king and the queen sat on mat {i % 5}\n" for i in range(200)))
    made = recipe.load("word2vec", [f"data.name={folder}/t.txt:tokens", "train.steps=3", "model.dim=4"], model=True)
    with session(made) as one, Run.create(out=folder / "run") as record:
        one.start(record)
        for _ in range(3):
            one.trainer.step()
        one.save()
    return folder


@pytest.fixture
def call(run, monkeypatch, capfd):
    """What the command line prints, called as ``main`` does it in the folder of the run."""
    monkeypatch.chdir(run)

    def called(*given, code: int = 0, stdin: str = ""):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            patch.setattr(sys, "argv", ["gencli"])
            found = console.run(cli.app, list(map(str, given)))
        out, err = capfd.readouterr()
        assert found == code, err
        return out if code == 0 else err

    return called


def test_apply_answers_words(run, call) -> None:
    (row,) = map(json.loads, call("apply", "run", "king", "-", "mat", "+", "queen", "-n", 3).splitlines())
    assert row["word"] == "king - mat + queen" and len(row["neighbours"]) == 3 == len(row["cosines"])
    assert not {"king", "mat", "queen"} & set(row["neighbours"])
    piped = [json.loads(line) for line in call("apply", "run", "-", stdin="king\nkingg\nthe + on\n").splitlines()]
    assert [r["word"] for r in piped] == ["king", "kingg", "the + on"] and piped[1]["neighbours"] is None
    piped = [json.loads(line) for line in call("apply", "run", "-", stdin="king mat\n+\nking\n").splitlines()]
    assert [r["neighbours"] is None for r in piped] == [True, True, False]
    assert "'king mat' is no word, and no sum" in call("apply", "run", "king mat", code=2)
    assert "--out is for vectors" in call("apply", "run", "king", "-o", "a.txt", code=2)
    assert "no word 'kingg' (did you mean 'king'?)" in call("apply", "run", "kingg", "--as", "vectors", code=2)


def test_vectors_leave_for_files_and_pipes(run, call) -> None:
    call("apply", "run", "--as", "vectors", "-o", "all.vec.gz")
    call("apply", "run", "--as", "vectors", "-o", "all.safetensors")
    (run / "two.vec").write_text(call("apply", "run", "queen", "the", "--as", "vectors"))
    whole, same, two = (files.read(run / name) for name in ("all.vec.gz", "all.safetensors", "two.vec"))
    assert whole.words[0] == "the" and len(whole.words) == 12 and whole.x.shape == (12, 4)
    assert whole.words == same.words and np.array_equal(whole.x, same.x)
    assert two.words == ["queen", "the"] and np.array_equal(two.x, whole.x[[whole.index["queen"], 0]])
    (run / "two.vec").write_text(call("apply", "run", "-", "--as", "vectors", stdin="queen\nkingg\nthe\nqueen\n"))
    assert files.read(run / "two.vec").words == two.words
    call("apply", "run", "--as", "vectors", "-n", 3, "-o", "three.bin")
    assert files.read(run / "three.bin").words == whole.words[:3]
    (run / "folder.vec").mkdir()
    assert call("apply", "run", "--as", "vectors", "-o", "folder.vec", code=1).startswith("error: folder.vec: Is a dir")
    (run / "p.txt").write_text("king queen 9\nking mat 1\nthe on 3\ncat dog 1\n")
    (a,) = map(json.loads, call("eval", "similarity", "run", "p.txt").splitlines())
    (b,) = map(json.loads, call("eval", "similarity", "all.vec.gz", "p.txt").splitlines())
    assert a["spearman"] == b["spearman"] and a["coverage"] == 0.75 and a["words"] == 12
    assert "takes a run or a file of vectors" in call("eval", "analogy", code=2)
