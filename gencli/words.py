"""What is asked of word vectors: sums of words, the words nearest to them, similarities and analogies. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gencli.console import DataError, UsageError, nearest
from gencli.vectors import Vectors

__all__ = ["CHUNK", "lines", "near", "nearest_words", "parts", "queries", "unit", "unit_", "vector"]

Array = np.ndarray[Any, Any]
CHUNK = 1 << 25  # similarities at once
AT_ONCE = 64  # lines of stdin answered at once: products of matrices pay, and the first need not wait for the last
LONGEST = 1 << 16  # bytes of a line of stdin


def unit(x: Array) -> Array:
    """Rows of ``x`` (n, d) over their lengths; a row of zeros stays one."""
    return unit_(x.copy())


def unit_(x: Array) -> Array:
    """:func:`unit` in place: a copy of 200,000 vectors takes longer than their lengths."""
    length = np.sqrt(np.einsum("nd,nd->n", x, x))
    odd = np.flatnonzero(~((length > 1e-15) & (length < 1e15)))  # whose squares may leave the range of float32
    whole = x[odd].astype(np.float64)
    length[odd] = 1
    x /= length[:, None]
    x[odd] = whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-300)
    return x


def queries(words: Sequence[str]) -> list[str]:
    """What is asked by the words of a command line: one sum if ``+`` or ``-`` is among them, else each for itself."""
    return [" ".join(words)] if any(word in ("+", "-") for word in words) else list(words)


def parts(query: str) -> list[tuple[int, str]]:
    """``king - man + woman`` -> ``[(1, "king"), (-1, "man"), (1, "woman")]``. UsageError if it is no such sum."""
    fields = query.split()
    if fields and fields[0] not in ("+", "-"):
        fields = ["+", *fields]
    signs, words = fields[::2], fields[1::2]
    if not words or len(signs) != len(words) or any(sign not in ("+", "-") for sign in signs):
        raise UsageError(f"{query[:80]!r} is no word, and no sum such as 'king - man + woman'")
    return [(1 if sign == "+" else -1, word) for sign, word in zip(signs, words)]


def vector(query: str, vectors: Vectors, x: Array) -> tuple[Array, list[str]] | str:
    """The sum that ``query`` asks for of rows of ``x``, and its words; or the first word that ``vectors`` lacks."""
    asked = [(1, query)] if query in vectors.index else parts(query)  # a few of GloVe's words have blanks
    for _, word in asked:
        if word not in vectors.index:
            return word
    total = sum((sign * x[vectors.index[word]] for sign, word in asked), np.zeros(x.shape[1], x.dtype))
    return total, [word for _, word in asked]


def nearest_words(y: Array, x: Array, without: Array, k: int) -> tuple[Array, Array]:
    """For each row of ``y`` the k rows of unit vectors ``x`` of the largest cosine: (cosines, rows), both (n, k).

    ``without`` (n, m): rows that are no answer, such as the words of the question itself.
    """
    y, k = unit(y), min(k, len(x))
    scores, rows = np.zeros((len(y), k), np.float32), np.zeros((len(y), k), np.int64)
    for here in _chunks(len(y), max(1, CHUNK // len(x))):
        s = y[here] @ x.T
        np.put_along_axis(s, without[here], -np.inf, 1)
        best = np.argpartition(-s, k - 1, 1)[:, :k]
        found = np.take_along_axis(s, best, 1)
        order = np.argsort(-found, 1, kind="stable")
        scores[here], rows[here] = np.take_along_axis(found, order, 1), np.take_along_axis(best, order, 1)
    return scores, rows


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(n, i + size)) for i in range(0, n, size))


# ---------------------------------------------------------------------------------------------- words from a person


def near(word: str, vectors: Vectors) -> str:
    """Words of ``vectors`` that ``word`` may have meant, as :func:`gencli.console.nearest` says them."""
    # of 200,000 words only those that begin alike: difflib takes milliseconds for each thousand
    alike = [w for w in vectors.alike.get(word[:2].lower(), []) if abs(len(w) - len(word)) < 3]
    return nearest(word, alike[:2000])


def lines() -> Iterator[list[str]]:
    """The words of stdin, one a line, as many at once as have come, and no more than 64.

    UsageError where nothing is piped in; DataError with its number for a line that is not UTF-8 or longer than 64 kB,
    after the lines before it.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("no words: name some, or pipe them in, one a line")
    rest, number = b"", 0
    while True:
        data = sys.stdin.buffer.read1(1 << 16)  # type: ignore[union-attr]
        *whole, rest = (rest + data).split(b"\n") if data else [rest, b""]
        words: list[str] = []
        for line in whole:
            number += 1
            try:
                word = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield words
                raise DataError(f"standard input line {number}: not UTF-8") from None
            words += [word] if word else []
            if len(words) == AT_ONCE:
                yield words
                words = []
        if words:
            yield words
        if len(rest) > LONGEST:
            raise DataError(f"standard input line {number + 1}: longer than {LONGEST >> 10} kB")
        if not data:
            return
