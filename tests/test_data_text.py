"""Text: symbols, the embedded documentation, a user's files, and bits a character."""

from __future__ import annotations

import gzip
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gencli.console import DataError, UsageError
from gencli.data import SPLITS, load, text
from gencli.data.text import UNKNOWN, decode, encode, symbols
from gencli.metrics import likelihood


def everything(source):
    return source.rows(torch.arange(source.size))["x"]


def spelt(source):
    """The whole text of a source, windows joined."""
    return "".join(decode(everything(source).numpy(), source.spec.vocabulary))


# ---- symbols


@given(st.text(max_size=200), st.booleans())
def test_symbols_joined_are_the_text(s, words):
    found = list(symbols(s, words))
    assert "".join(found) == s and all(1 <= len(x) <= 41 for x in found)


def test_words_are_what_one_expects():
    assert list(symbols("if x >>= 2:\n    y  = 'é2' # ...\n", True)) == [
        "if", " x", " >>", "=", " 2", ":", "\n    ", "y", " ", " =", " '", "é2", "'", " #", " ...", "\n",
    ]  # fmt: skip
    assert [len(w) for w in symbols("a" * 100 + "-" * 90, True)] == [40, 40, 20, 40, 40, 10]


def test_encode_is_the_inverse_of_decode():
    vocabulary = (UNKNOWN, "\n", " ", "a", "b", "é", "😀", "\0")
    x = np.random.default_rng(0).integers(len(vocabulary), size=(3, 50))
    for row, s in zip(x, decode(x, vocabulary)):
        codes = encode(s, vocabulary)
        assert codes.dtype == np.int16 and np.array_equal(codes, row)
    assert encode("abcA\ud800", vocabulary).tolist() == [3, 4, 0, 0, 0]
    words = (UNKNOWN, " the", "the", "\n")
    assert encode("the cat\nthe the", words).tolist() == [2, 0, 3, 2, 1]


def test_characters_counts_what_decode_writes():
    source = load("docs:words", "val")
    x = everything(source).numpy()
    assert text.characters(x, source.spec.vocabulary) == len("".join(decode(x, source.spec.vocabulary)))


# ---- docs


@pytest.mark.parametrize(
    ("name", "length"), [("docs", 128), ("docs:words", 32), ("docs:256", 256), ("docs:words:9", 9)]
)
def test_docs(name, length):
    sources = {s: load(name, s) for s in SPLITS}
    spec = sources["train"].spec
    assert (
        spec.kind == "text"
        and spec.shape == (length,)
        and spec.levels == len(spec.vocabulary) == len({*spec.vocabulary})
    )
    assert spec.vocabulary[0] == UNKNOWN and spec.size == sources["train"].size
    assert all(s.spec == spec for s in sources.values())
    for split, source in sources.items():
        x = everything(source)
        assert x.dtype == torch.int16 and x.shape == (source.size, length) and x.min() >= 0 and x.max() < spec.levels
        whole = text.topics()[split]
        counts = len(list(symbols(whole, "words" in name)))
        assert source.size == counts // length  # windows follow one another, the last incomplete one is dropped
        mine, theirs = spelt(source), whole
        if "words" not in name:
            assert len(mine) == source.size * length
            assert all(a in (b, UNKNOWN) for a, b in zip(mine, theirs))
            assert mine.count(UNKNOWN) < 1e-3 * len(mine)
    total = sum(s.size for s in sources.values())
    assert 0.7 < sources["train"].size / total < 0.87 and min(s.size for s in sources.values()) / total > 0.06


def test_docs_share_no_paragraph_between_splits():
    # Python's topics quote one another: "specialnames" holds the whole of "customization"
    seen = [
        {" ".join(p.split()) for p in text.topics()[s].split("\n\n") if len(" ".join(p.split())) >= 40} for s in SPLITS
    ]
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_docs_vocabulary_is_that_of_train():
    vocabulary = load("docs", "test").spec.vocabulary
    assert set(vocabulary[1:]) <= set(text.topics()["train"]) and 90 < len(vocabulary) < 120
    words = load("docs:words", "test").spec.vocabulary
    train = list(symbols(text.topics()["train"], True))
    assert set(words[1:]) == {w for w in set(train) if train.count(w) > 1} or len(words) == text.WORDS


def test_variants_that_will_not_do():
    with pytest.raises(UsageError, match="no variant 'threshold'"):
        load("docs:threshold")
    with pytest.raises(UsageError, match="exclude each other"):
        load("docs:64:32")
    with pytest.raises(DataError, match=r"docs: its .* symbols for (train|val|test) are too few"):
        load("docs:99999")


# ---- a user's text

POEM = "".join(f"line {i} of a pöem, {'xyz'[i % 3]}\r\n" for i in range(400))


def test_a_text_file(tmp_path):
    (tmp_path / "poem.txt").write_bytes(b"\xef\xbb\xbf" + POEM.encode())
    with gzip.open(tmp_path / "poem.txt.gz", "wb") as file:
        file.write(POEM.encode())
    whole = POEM.replace("\r\n", "\n")
    for name in ("poem.txt:50", "poem.txt.gz:50"):
        sources = [load(f"{tmp_path}/{name}", s) for s in SPLITS]
        assert sources[0].name == sources[0].spec.name == f"{tmp_path}/{name}"
        ends = [0, len(whole) * 8 // 10, len(whole) * 9 // 10, len(whole)]
        for source, a, b in zip(sources, ends, ends[1:]):
            assert source.size == (b - a) // 50 and whole[a:b].startswith(spelt(source))
        assert "ö" in sources[0].spec.vocabulary and sources[2].spec.size == sources[0].size
    words = load(f"{tmp_path}/poem.txt:words", "train")
    assert words.spec.shape == (32,) and " line" not in words.spec.vocabulary and "line" in words.spec.vocabulary
    assert spelt(words).count(UNKNOWN) > 0  # every number comes once
    with pytest.raises(UsageError, match="only text has words"):
        load(f"{tmp_path}:words")
    with pytest.raises(UsageError, match="only images have levels"):
        load(f"{tmp_path}/poem.txt:threshold")


def test_rare_characters_are_unknown_and_the_vocabulary_is_small(tmp_path):
    many = "".join(chr(0x4E00 + i) * 3 for i in range(1000)) + "ab" * 5000
    (tmp_path / "a.txt").write_text(many + many[:3000])
    spec = load(str(tmp_path / "a.txt")).spec
    assert spec.levels == text.CHARACTERS and {"a", "b", UNKNOWN} < set(spec.vocabulary)
    (tmp_path / "a.txt").write_text("ab" * 900 + "abz" * 100)  # what train never had is unknown
    test = load(f"{tmp_path}/a.txt:9", "test")
    assert test.spec.vocabulary == (UNKNOWN, "a", "b") and spelt(test).count(UNKNOWN) > 50
    (tmp_path / "a.txt").write_text("ab" * 200_000 + "c" + "ab" * 100_000)
    assert load(str(tmp_path / "a.txt")).spec.vocabulary == (UNKNOWN, "a", "b")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"too short", "too few for an example of 128"),
        (b"x" * 4000 + b"\0" + b"x" * 4000, "byte 4000 is zero"),
        ("h\u00e9" .encode("utf-16"), "is zero|is not UTF-8"),
        (b"a" * 1000 + b"\xff" + b"a" * 4000, "byte 1000 is not UTF-8 .1 bad places"),
    ],
)  # fmt: skip
def test_bad_texts_are_named(tmp_path, data, said):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as e:
        load(str(path))
    assert str(e.value).startswith(str(path)) and len(str(e.value).splitlines()) == 1


def test_bad_bytes_may_be_skipped(tmp_path, capsys):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"ab" * 500 + b"\xff" + b"ab" * 2000 + UNKNOWN.encode() + b"ab" * 500)
    source = load(str(path), on_bad="skip")
    assert "1 bad places read as unknown, the first at byte 1000" in capsys.readouterr().err
    assert spelt(source)[1000] == UNKNOWN and spelt(source).count(UNKNOWN) == 1
    path.write_bytes(bytes(range(128, 256)) * 50 + b"a" * 1000)
    with pytest.raises(DataError, match="is not UTF-8") as e:
        load(str(path), on_bad="skip")
    assert e.value.hint == "more than 10 %"


def test_packed_texts_that_will_not_do(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.gz"
    good = gzip.compress(POEM.encode())
    for bad in (b"hello", good[:100], good[:50] + bytes(50) + good[100:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="cannot be unpacked"):
            load(str(path))
    monkeypatch.setattr(text, "MOST", 1 << 20)
    path.write_bytes(gzip.compress(bytes(50 << 20)))
    with pytest.raises(DataError, match="more than 1 MB"):
        load(str(path))
    (tmp_path / "b.txt").write_bytes(b"a" * (1 << 20) + b"b")
    with pytest.raises(DataError, match="more than 1 MB"):
        load(str(tmp_path / "b.txt"))
    monkeypatch.setattr(text, "DIFFERENT", 100)
    (tmp_path / "b.txt").write_text(" ".join(map(str, range(100_000))))
    with pytest.raises(DataError, match=r"b\.txt: more than 100 different words"):
        load(f"{tmp_path}/b.txt:words")
    with pytest.raises(DataError, match="no such file"):
        load("nowhere.txt")


# ---- what is said of it


class Uniform(torch.nn.Module):
    """Every symbol equally likely."""

    likelihood, chunk, conditional, config = "exact", 64, False, types.SimpleNamespace()

    def __init__(self, spec):
        super().__init__()
        self.spec, self.p = spec, torch.nn.Parameter(torch.zeros(()))

    def log_prob(self, x, rng, labels=None):
        return torch.full((len(x),), -self.spec.dims * math.log(self.spec.levels), dtype=torch.float64)


def test_bits_per_character_and_perplexity():
    for name in ("docs", "docs:words"):
        source = load(name, "val")
        row = likelihood.nll(Uniform(source.spec), source, limit=100)
        row |= likelihood.per_character(row, source)
        levels, length = source.spec.levels, source.spec.dims
        assert row["perplexity"] == pytest.approx(levels, rel=1e-9) and row["bits_per_dim"] == pytest.approx(
            math.log2(levels)
        )
        letters = sum(map(len, decode(source.rows(torch.arange(100))["x"].numpy(), source.spec.vocabulary)))
        assert row["bits_per_char"] == pytest.approx(100 * length * math.log2(levels) / letters, rel=1e-12)
        if name == "docs":
            assert row["bits_per_char"] == pytest.approx(row["bits_per_dim"], rel=1e-12)


def test_the_unigram_is_pooled_over_places():
    train, test = load("docs", "train"), load("docs", "test")
    counts = np.bincount(everything(train).flatten().numpy(), minlength=train.spec.levels) + 1.0
    bits = -np.log2(counts / counts.sum())[everything(test).numpy()].mean()
    assert likelihood.baseline(train, test) == ("unigram", pytest.approx(bits, rel=1e-12))


def test_a_model_of_other_symbols_is_refused(tmp_path):
    for name, letters in (("a", "ab"), ("b", "cd")):
        (tmp_path / f"{name}.txt").write_text(letters * 1000)
    a, b = (load(str(tmp_path / f"{x}.txt"), "test") for x in "ab")
    assert likelihood.nll(Uniform(a.spec), a)["bits_per_dim"] == pytest.approx(math.log2(3))
    with pytest.raises(UsageError, match=r"the symbols of .*b\.txt are not those of .*a\.txt"):
        likelihood.nll(Uniform(a.spec), b)


def test_a_text_in_the_vocabulary_of_another(tmp_path):
    (tmp_path / "other.txt").write_text("abba cab\n" * 200)
    source = load(str(tmp_path / "other.txt"), "test")
    spec = source.spec.model_copy(update={"vocabulary": (UNKNOWN, " ", "b", "a"), "levels": 4, "shape": (10,)})
    found = text.respelt(source, spec)
    assert found.spec.fits(spec) and found.split == "test" and found.spec.name == source.name
    whole = spelt(source)
    assert spelt(found) == whole[: len(whole) // 10 * 10].replace("c", UNKNOWN).replace("\n", UNKNOWN)
    with pytest.raises(DataError, match="too few for an example of 5000"):
        text.respelt(source, spec.model_copy(update={"shape": (5000,)}))
