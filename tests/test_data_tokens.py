"""Text as whole words: vocabularies, lines, splits, and files that are read in blocks."""

from __future__ import annotations

import gzip
from collections import Counter

import numpy as np
import pytest
import torch

from gencli.console import DataError, UsageError
from gencli.data import load, tokens
from gencli.data.text import UNKNOWN

TEXT = "".join(f"the cat sat on mat {i % 7} .\n" for i in range(250))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def spelt(source):
    x = source.rows(torch.arange(source.size))["x"]
    assert x.dtype == torch.int32 and x.shape == (source.size, *source.spec.shape)
    return " ".join(source.spec.vocabulary[i] for i in x.flatten().tolist()).replace(f" {UNKNOWN}", "")


def file(tmp_path, text, name="t.txt"):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return f"{tmp_path / name}:tokens"


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_a_file_is_its_words_whatever_the_block(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(tokens, "BLOCK", block)
    where = file(tmp_path, TEXT, name)
    lines = [line.split() for line in TEXT.splitlines()]
    parts = {"val": lines[98::100], "test": lines[99::100], "train": [x for i, x in enumerate(lines) if i % 100 < 98]}
    for split, want in parts.items():
        source = load(f"{where}:16", split)
        assert spelt(source) == " ".join(word for line in want for word in [*line, "</s>"])
        assert source.size == -(-sum(len(line) + 1 for line in want) // 16) and source.spec.shape == (16,)
    counts = Counter(word for line in parts["train"] for word in line)
    known = dict(zip(source.spec.vocabulary, source.spec.counts))
    assert known == {UNKNOWN: 0, "</s>": len(parts["train"]), **counts}
    assert list(source.spec.counts[2:]) == sorted(counts.values(), reverse=True)
    assert source.spec.kind == "tokens" and source.spec.levels == len(known)


def test_digests_tell_texts_apart(tmp_path):
    a, b = load(file(tmp_path, TEXT, "a.txt")), load(file(tmp_path, TEXT, "b.txt.gz"))
    c = load(file(tmp_path, TEXT.replace("mat 3", "hat 3"), "c.txt"))
    assert a.digest == b.digest != c.digest and a.digest != load(f"{tmp_path}/a.txt:tokens", "val").digest


def test_a_file_that_changed_is_read_anew(tmp_path):
    where = file(tmp_path, TEXT)
    first = load(where)
    file(tmp_path, TEXT + TEXT)
    assert load(where).size == 2 * first.size or load(where).digest != first.digest


def test_rare_words_are_forgotten_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "DIFFERENT", 14)
    spec = load(file(tmp_path, TEXT + "once twice\n")).spec
    assert len(spec.vocabulary) == 15 and "once" not in spec.vocabulary and spec.counts[0] == 2
    monkeypatch.setattr(tokens, "DIFFERENT", 100)
    monkeypatch.setattr(tokens, "WORDS", 3)
    assert load(file(tmp_path, TEXT, "u.txt")).spec.vocabulary == (UNKNOWN, "</s>", ".", "cat", "mat")


def test_words_that_train_lacks_are_unknown(tmp_path):
    lines = TEXT.splitlines()
    lines[98] = "unheard of cat"
    source = load(file(tmp_path, "\n".join(lines)), "val")
    assert source.rows(torch.arange(1))["x"][0, :4].tolist() == [0, 0, source.spec.vocabulary.index("cat"), 1]


def test_one_long_line_is_cut_at_blanks(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST", 50)
    source = load(file(tmp_path, TEXT.replace("\n", " ")))
    words = spelt(source).split()
    assert words.count("</s>") > 100 and set(words) == {"</s>", *TEXT.split()}


@pytest.mark.parametrize("lines", [50, 2000])
def test_no_more_is_held_at_once_of_a_longer_text(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(tokens, "BLOCK", 1000)
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress("".join(f"line {i} of a text\n" for i in range(lines)).encode()))
    blocks = list(tokens._blocks(path, "fail", []))
    assert max(map(len, blocks)) <= 1000 + len("line 1999 of a text\n") and sum(map(len, blocks)) > 17 * lines


def test_docs():
    train, test = load("docs:tokens", "train"), load("docs:tokens:32", "test")
    assert train.spec.shape == (1024,) and test.spec.shape == (32,) and train.spec.vocabulary == test.spec.vocabulary
    assert np.isin(["the", "python", ",", "class"], train.spec.vocabulary).all()
    assert not any(word != word.lower() or " " in word for word in train.spec.vocabulary)
    assert sum(train.spec.counts) == pytest.approx(1024 * train.size, abs=1024)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"a b c\n" * 50, "no line for val"),
        (b"a b\nc \xff d\n", "line 2: not UTF-8"),
        (b"a b\n\nc\0d\n", "line 3: a byte is zero"),
        (b"a\n" * 300, "1 different words are too few"),
    ],
)
def test_bad_files_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said) as caught:
        load(file(tmp_path, text))
    assert str(tmp_path / "t.txt") in str(caught.value)


def test_bad_archives_are_named(tmp_path):
    for data in (gzip.compress(TEXT.encode())[:-40], b"no gzip at all"):
        (tmp_path / "t.txt.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"t\.txt\.gz: cannot be read"):
            load(f"{tmp_path / 't.txt.gz'}:tokens")
    with pytest.raises(DataError, match="no such file"):
        load(f"{tmp_path / 'none.txt'}:tokens")


def test_bad_bytes_can_be_skipped(tmp_path, capsys):
    where = file(tmp_path, TEXT.encode() + b"the \xff cat\n" + b"c\xffat\n")
    source = load(where, on_bad="skip")
    assert "2 lines are not UTF-8, the first is line 251" in capsys.readouterr().err
    assert source.spec.counts[0] >= 1


def test_only_text_has_tokens(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((30, 2)))
    with pytest.raises(UsageError, match="only text has tokens"):
        load(f"{tmp_path / 'x.npy'}:tokens")
    with pytest.raises(UsageError, match="no variant 'tokens'"):
        load("digits:tokens")
    with pytest.raises(UsageError, match="two variants that exclude each other"):
        load("docs:tokens:words")
