"""Word vectors: every format in and out to the bit, and a line of complaint for whatever is wrong with a file."""

from __future__ import annotations

import gzip
import os
import random

import numpy as np
import pytest

from gencli import vectors
from gencli.console import DataError, UsageError

WORDS = ["the", "</s>", "año", "10", "naïve\u00a0x"]


def some(n=5, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def text(tmp_path, content, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.vec", "a.vec.gz", "a.bin", "a.bin.gz", "a.safetensors"])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, name):
    x = some() * np.float32(1e-3) ** np.arange(3, dtype=np.float32)  # of sizes that need an exponent too
    vectors.write(tmp_path / name, WORDS, x)
    found = vectors.read(tmp_path / name)
    assert found.words == WORDS and (found.x == x).all() and found.x.dtype == np.float32
    assert found.index == {word: i for i, word in enumerate(WORDS)}
    first = vectors.read(tmp_path / name, most=2)
    assert first.words == WORDS[:2] and (first.x == x[:2]).all()
    before = (tmp_path / name).read_bytes()
    vectors.write(tmp_path / name, WORDS, x)
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_glove_has_no_first_line_and_words_with_blanks(tmp_path):
    found = vectors.read(text(tmp_path, "\ufeffthe 0.5 -1.25\n. . . 2 3e-1\nof\t1  -.5 \r\nat 1 7."))
    assert found.words == ["the", ". . .", "of", "at"]
    assert (found.x == np.array([[0.5, -1.25], [2, 0.3], [1, -0.5], [1, 7]], np.float32)).all()


def numerals(n):
    r = random.Random(0)
    forms = ["{:.6f}", "{:.1f}", "{:.12f}", "{:.14f}", "{:.17f}", "{:.9g}", "{!r}", "{:e}", "{:+.4f}", "{:.0f}"]
    for i in range(n):
        yield forms[i % len(forms)].format(r.gauss(0, 1) * 10 ** r.randint(-9, 5))
    yield from ["-0.0", "0.", ".5", "-.5e3", "00.5", "999.99999999999", "1.00000000000000005", "123456789.125"]


def test_numbers_are_read_as_python_reads_them_to_the_bit(tmp_path):
    tokens = list(numerals(6000))
    path = text(tmp_path, "".join(f"w{i} {token} {token}\n" for i, token in enumerate(tokens)))
    want = np.array([float(token) for token in tokens]).astype(np.float32)
    x = vectors.read(path).x
    assert (x[:, 0] == want).all() and (np.signbit(x[:, 1]) == np.signbit(want)).all()


def test_what_the_shell_pipes_in_is_read(tmp_path):
    """``<(zcat a.vec.gz)`` is ``/dev/fd/63``."""
    there, end = os.pipe()
    os.write(end, b"2 2\na 1 2\nb 3 4\n")
    os.close(end)
    assert vectors.read(f"/dev/fd/{there}").x.tolist() == [[1, 2], [3, 4]]
    os.close(there)


def test_blocks_end_anywhere(tmp_path, monkeypatch):
    x = some(40, 7)
    vectors.write(tmp_path / "a.txt", [f"w{i}" for i in range(40)], x)
    vectors.write(tmp_path / "a.bin", [f"w{i}" for i in range(40)], x)
    for size in (1, 13, 64, 500, 5000):
        monkeypatch.setattr(vectors, "BLOCK", size)
        assert (vectors.read(tmp_path / "a.txt").x == x).all()
        assert (vectors.read(tmp_path / "a.bin").x == x).all()


BAD = {
    "2 3\na 1 2 3\nb 1 2\n": r"a.txt line 3: 2 numbers, not 3",
    "a 1 2\nb 1 2 3\n": r"a.txt line 2: 3 numbers, not 2",
    "3 2\na 1 2\nb 1 2\n": r"a.txt line 1: it says that 3 words follow, but 2 do",
    "1 2\na 1 2\nb 1 2\n": r"a.txt line 1: it says that 1 words follow, but 2 do",
    "a 1 2\nb nan 2\n": r"a.txt line 2: the number nan is not finite",
    "a 1 2\nb 1 nan 2\n": r"a.txt line 2: 3 numbers, not 2",
    "a 1 2\nb nan 1 2\n": r"a.txt line 2: 3 numbers, not 2",
    "a 1 2\nb 1 -inf\n": r"a.txt line 2: the number -inf is not finite",
    "a 1 2\nb 1 1e39\n": r"a.txt line 2: the number 1e39 is not finite in float32",
    "a 1 2\nb 1 0,5\n": r"a.txt line 2: '0,5' is no number",
    "a 1 2\nb 1 0.1.2\n": r"a.txt line 2: '0.1.2' is no number",
    "a 1 2\nb 1 0.12x\n": r"a.txt line 2: '0.12x' is no number",
    "a 1 2\nb 1 1_0\n": r"a.txt line 2: '1_0' is no number",
    "a 1 2\nb 1 -\n": r"a.txt line 2: '-' is no number",
    "a 1 2\nb 1 2\na 3 4\n": r"a.txt line 3: 'a' again, which stands in line 1 already",
    "a 1 2\n\nb 1 2\n": r"a.txt line 2: an empty line",
    b"a 1 2\n\xff\xfe 1 2\n": r"a.txt line 2: the word .* is not UTF-8",
    b"2 1\na \0\0\x80\x3f\nb \0\0\x80\x3f\n": r"a.txt: its first lines hold zeros: no text",
    b"PK\x00\x00\n": r"a.txt: its first lines hold zeros",
    "hello\n": r"a.txt line 1: neither a count",
    "": r"a.txt: no word vectors",
    "0 3\n": r"a.txt: no word vectors",
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, content):
    with pytest.raises(DataError, match=BAD[content]) as error:
        vectors.read(text(tmp_path, content))
    assert "\n" not in str(error.value)


def test_lines_are_counted_over_blocks_and_in_gzip(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 50)
    content = "".join(f"w{i} 0.5 1\n" for i in range(100)).replace("w70 0.5", "w70 0.5 7 8")
    with pytest.raises(DataError, match="line 71: 4 numbers, not 2"):
        vectors.read(text(tmp_path, content))
    with pytest.raises(DataError, match=r"a\.gz line 71: 4 numbers, not 2"):
        vectors.read(text(tmp_path, gzip.compress(content.encode()), "a.gz"))


def test_bad_rows_are_left_out_on_demand_and_counted(tmp_path, capsys):
    path = text(tmp_path, b"a 1 2\nb 1\na 3 4\nc nan 1\n\xff 1 2\n. . 5 6\nd 7 8\n")
    found = vectors.read(path, on_bad="skip")
    assert found.words == ["a", ". .", "d"] and found.x.tolist() == [[1, 2], [5, 6], [7, 8]]
    assert "a.txt: 4 rows left out, the first at line 2: 1 numbers, not 2" in capsys.readouterr().err


def test_damaged_files(tmp_path):
    x = some()
    for name in ("a.bin", "a.safetensors", "a.txt.gz"):
        vectors.write(tmp_path / name, WORDS, x)
        whole = (tmp_path / name).read_bytes()
        for cut in range(1, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(DataError, match=name):
                vectors.read(tmp_path / name)
    text(tmp_path, b"2 1\na \0\0\0\0\nb \0\0\xc0\x7f", "n.bin")
    with pytest.raises(DataError, match=r"n.bin word 2: a number is NaN"):
        vectors.read(tmp_path / "n.bin")
    text(tmp_path, b"1 1\na \0\0\0\0\nb \0\0\xc0\x7f", "n.bin")
    with pytest.raises(DataError, match="says 1 words, more follow"):
        vectors.read(tmp_path / "n.bin")
    text(tmp_path, b"99999999999 999999999999999\nabc", "n.bin")
    with pytest.raises(DataError, match=r"n.bin: its first line is no count and dimension"):
        vectors.read(tmp_path / "n.bin")
    text(tmp_path, b"1 1\n" + b"x" * 9000, "n.bin")
    with pytest.raises(DataError, match="word 1: no blank ends it"):
        vectors.read(tmp_path / "n.bin")
    with pytest.raises(DataError, match="no such file"):
        vectors.read(tmp_path / "none.vec")
    with pytest.raises(DataError, match="no regular file"):
        vectors.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.vec")
    with pytest.raises(DataError, match="no regular file"):
        vectors.read(tmp_path / "pipe.vec")
    with pytest.raises(DataError, match=r"999999999999 words follow, but 1 do"):
        vectors.read(text(tmp_path, "999999999999 2\na 1 2\n"))


def test_a_word_that_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for name in ("a.txt", "a.bin"):
        with pytest.raises(UsageError, match="has a blank"):
            vectors.write(tmp_path / name, ["a", "new york"], some(2))
    vectors.write(tmp_path / "a.safetensors", ["a", "new york"], some(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
