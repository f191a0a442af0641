"""Dictionaries: their lines, splits by source word, and pairs induced from sentences against counting by hand."""

from __future__ import annotations

import gzip
from collections import Counter

import pytest

from gencli import dictionaries, keyed
from gencli.console import DataError


def put(tmp_path, content, name="d.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_pairs_by_blank_or_tab(tmp_path):
    lines = "the el\nthe la\r\ncat\tgato\nnew york\tnueva york\n\nthe el\ndog   perro"
    want = {"the": ["el", "la"], "cat": ["gato"], "new york": ["nueva york"], "dog": ["perro"]}
    assert dictionaries.read(put(tmp_path, lines)) == want
    assert dictionaries.read(put(tmp_path, gzip.compress(lines.encode()), "d.gz")) == want
    assert dictionaries.read(put(tmp_path, b"\xef\xbb\xbfa b\n")) == {"a": ["b"]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a b\nlonely\n", r"d.txt line 2: 1 words \('lonely'\)"),
        ("a b\nc\t\n", r"d.txt line 2: 1 words"),
        ("a b c\n", r"d.txt line 1: 3 words"),
        (b"a b\nc \xe9t\xe9\n", r"d.txt line 2: byte 3 is not UTF-8"),
        ("\n\n", r"d.txt: no pairs"),
        (b"x" * (1 << 21), r"d.txt line 1: longer than 1 MB"),
    ],
)
def test_what_is_no_pair_is_said_with_its_line(tmp_path, content, why, capsys):
    path = put(tmp_path, content)
    with pytest.raises(DataError, match=why):
        dictionaries.read(path)
    if content in ("a b\nlonely\n", b"a b\nc \xe9t\xe9\n"):
        assert dictionaries.read(path, "skip") == {"a": ["b"]} and "line 2" in capsys.readouterr().err


def test_splits_are_by_source_word_and_depend_on_no_order():
    whole = {f"w{i}": [f"v{j}" for j in range(1 + i % 3)] for i in range(100)}
    train, test = dictionaries.split(whole)
    assert len(test) == 25 and not set(train) & set(test) and train | test == whole
    assert dictionaries.split(dict(reversed(list(whole.items()))))[1].keys() == test.keys()
    assert dictionaries.split(whole, seed=1)[1].keys() != test.keys()


def by_hand(source, target):
    a, b, both = Counter(), Counter(), Counter()
    for left, right in zip(source, target):
        left, right = set(left.split()), set(right.split())
        a.update(left)
        b.update(right)
        both.update((x, y) for x in left for y in right)
    dice = {(x, y): 2 * n / (a[x] + b[y]) for (x, y), n in both.items() if min(a[x], b[y]) >= 5}
    found = {}
    for (x, y), score in dice.items():
        rivals = [s for (p, q), s in dice.items() if (p == x) != (q == y)]
        if score > 0.3 and all(score > s for s in rivals):
            found[x] = [y]
    return found


def test_an_induced_dictionary_is_that_of_counting_by_hand(tmp_path, monkeypatch):
    g = keyed.generator("induce")
    source, target = [], []
    for _ in range(300):
        words = g.choice(30, size=5, p=(p := 1 / (1.0 + g.permutation(30))) / p.sum())
        source.append(" ".join(f"s{w}" for w in words))
        kept = [w if g.random() < 0.8 else g.integers(30) for w in words]
        target.append(" ".join(f"t{w}" for w in g.permutation(kept)))
    paths = put(tmp_path, "\n".join(source)), put(tmp_path, gzip.compress("\n".join(target).encode()), "t.gz")
    want = by_hand(source, target)
    for rows in (2000, 7):
        monkeypatch.setattr(dictionaries, "ROWS", rows)
        found = dictionaries.induce(*paths)
        ties = {x for x in found if x not in want}  # two equally good friends: only the first is kept here
        assert len(want) > 20 and {x: y for x, y in found.items() if x not in ties} == want and len(ties) < 3
        assert sum(x[1:] == y[0][1:] for x, y in found.items()) > 0.9 * len(found)


def test_texts_that_are_no_translations_of_each_other(tmp_path):
    a, b = put(tmp_path, "a b\nc d\n"), put(tmp_path, "x\n", "t.txt")
    with pytest.raises(DataError, match=r"d.txt has 2 lines and .*t.txt 1"):
        dictionaries.induce(a, b)
    with pytest.raises(DataError, match="no two words keep company"):
        dictionaries.induce(a, put(tmp_path, "x\ny\n", "t.txt"))
    put(tmp_path, "a\n" * 9 + "z\n")
    assert dictionaries.induce(a, put(tmp_path, b"x\n" * 9 + b"\xff\n", "t.txt"), "skip") == {"a": ["x"]}
    put(tmp_path, "a b\nc d\n")
    with pytest.raises(DataError, match=r"t.txt line 2: byte 1 is not UTF-8"):
        dictionaries.induce(a, put(tmp_path, b"x\n\xff\n", "t.txt"))
