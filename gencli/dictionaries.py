"""Bilingual dictionaries: read, split by source word, and induced from sentences and their translations. No torch.

A dictionary is ``{source word: [translations]}``, in the order of its file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gencli.archives import shown
from gencli.console import DataError, say
from gencli.vectors import opened

__all__ = ["Dictionary", "induce", "lines", "read", "split"]

Dictionary = dict[str, list[str]]
LONGEST = 1 << 20  # bytes of a line
LEAST = 5  # sentences that a word must stand in before its company says what it means
DICE = 0.3  # the weakest bond of an induced pair
ROWS = 2000  # source words whose company is counted at once


def lines(path: Path | str, on_bad: str = "fail") -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a UTF-8 file or its ``.gz``; only ``\\n`` and ``\\r\\n`` end one.

    DataError with file and line where one is not UTF-8 (``on_bad = "skip"``: it is empty) or longer than 1 MB.
    """
    path = Path(path)
    with opened(path) as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            try:
                if len(line) == LONGEST:
                    raise DataError(f"{path} line {number}: longer than {LONGEST >> 20} MB")
                yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                if on_bad != "skip":
                    raise DataError(f"{path} line {number}: byte {error.start + 1} is not UTF-8") from None
                say(f"{path} line {number}: not UTF-8, left out")
                yield number, ""


def read(path: Path | str, on_bad: str = "fail") -> Dictionary:
    """The pairs of a dictionary: a word and a translation a line, between them a tab or blanks; further ones of a word
    on lines of their own.

    DataError with file and line for a line that is no pair (``on_bad = "skip"``: left out), and for no pairs at all.
    """
    found: dict[str, dict[str, None]] = {}
    for number, line in lines(path, on_bad):
        if not line.strip():
            continue
        pair = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        pair = [part for part in pair if part]
        if len(pair) == 2:
            found.setdefault(pair[0], {})[pair[1]] = None
        else:
            why = f"{path} line {number}: {len(pair)} words ({shown(line[:60])!r}), not a word and its translation"
            if on_bad != "skip":
                raise DataError(why, hint="between the two stands a tab or a blank; --on-bad skip leaves others out")
            say(f"{why}: left out")
    if not found:
        raise DataError(f"{path}: no pairs of words in it")
    return {word: list(meanings) for word, meanings in found.items()}


def split(dictionary: Mapping[str, list[str]], share: float = 0.25, seed: int = 0) -> tuple[Dictionary, Dictionary]:
    """(train, test): ``share`` of the source words, with all their translations, are held out for test.

    Which ones is decided by a hash of word and seed, so that a word of several translations stands on one side, and
    the order of the file does not matter.
    """
    order = sorted(dictionary, key=lambda word: hashlib.sha256(f"{seed}|{word}".encode()).digest())
    held = set(order[: round(share * len(order))])
    train = {word: meanings for word, meanings in dictionary.items() if word not in held}
    return train, {word: meanings for word, meanings in dictionary.items() if word in held}


def induce(source: Path | str, target: Path | str, on_bad: str = "fail") -> Dictionary:
    """A dictionary out of two texts, line i of one the translation of line i of the other, words between blanks.

    Dice's coefficient of two words, 2 n(a, b) / (n(a) + n(b)), n counting lines; kept are pairs that are each other's
    best, above 0.3, of words in at least 5 lines (L. R. Dice, Measures of the Amount of Ecologic Association Between
    Species, Ecology 1945; for translation: I. D. Melamed, Models of Translational Equivalence among Words, 2000).
    Memory grows with the texts' length and with 2,000 times the words of the target.
    """
    from scipy import sparse

    sides = []
    for path in (source, target):
        number: dict[str, int] = {}
        rows: list[int] = []
        columns: list[int] = []
        n = 0
        for n, line in lines(path, on_bad):
            found = {number.setdefault(word, len(number)) for word in line.split()}
            columns += found
            rows += [n - 1] * len(found)
        ones = np.ones(len(rows), np.float32)
        sides.append((list(number), sparse.csc_matrix((ones, (rows, columns)), (n, len(number)))))
    (words, A), (meanings, B) = sides
    if A.shape[0] != B.shape[0]:
        raise DataError(
            f"{source} has {A.shape[0]} lines and {target} {B.shape[0]}: a line of one must translate that of the other"
        )
    a, b = (np.asarray(m.sum(0)).ravel() for m in (A, B))
    best_a, score_a = np.zeros(len(words), int), np.zeros(len(words), np.float32)
    best_b, score_b = np.zeros(len(meanings), int), np.zeros(len(meanings), np.float32)
    keep_a, keep_b = np.flatnonzero(a >= LEAST), np.flatnonzero(b >= LEAST)
    for start in range(0, len(keep_a) if len(keep_b) else 0, ROWS):
        at = keep_a[start : start + ROWS]
        both = (A[:, at].T @ B[:, keep_b]).toarray()  # lines with both words
        dice = 2 * both / (a[at, None] + b[keep_b])
        best_a[at], score_a[at] = keep_b[dice.argmax(1)], dice.max(1)
        top, better = dice.argmax(0), dice.max(0) > score_b[keep_b]
        best_b[keep_b[better]], score_b[keep_b[better]] = at[top[better]], dice.max(0)[better]
    kept = {words[i]: [meanings[best_a[i]]] for i in keep_a if score_a[i] > DICE and best_b[best_a[i]] == i}
    if not kept:
        raise DataError(f"{source} and {target}: no two words keep company often enough to be a pair")
    return kept
