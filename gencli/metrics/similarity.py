"""Word vectors against people: similarity of pairs (Spearman's rho) and analogies (3CosAdd).

Pairs: two words and a person's score a line, by tab, comma or blank; WordSim-353 and its like. Analogies: ``a b c d``,
a is to b as c to d, under lines ``: section``, as in Mikolov et al. 2013 (arXiv:1301.3781, section 4.1); the answer is
the word nearest to b - a + c of unit vectors, among all words but these three. A word that has no vector is looked for
in lower case; lines with words that have none are left out, and ``coverage`` says how many are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gencli.archives import shown
from gencli.console import DataError
from gencli.dictionaries import lines
from gencli.vectors import Vectors
from gencli.words import nearest_words, unit

__all__ = ["analogy", "similarity"]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, text) for number, line in lines(path) if (text := line.strip()) and not text.startswith("#"))


def _rows(words: list[str], vectors: Vectors) -> list[int] | None:
    found = [vectors.index.get(word, vectors.index.get(word.lower())) for word in words]
    return None if None in found else [row for row in found if row is not None]


def similarity(vectors: Vectors, path: Path) -> dict[str, Any]:
    """Spearman's rank correlation between people's scores and cosines. DataError naming file and line."""
    rows: list[list[int]] = []
    scores: list[float] = []
    total = 0
    for number, text in _lines(path):
        parted = text.split("\t") if "\t" in text else text.split(",") if "," in text else text.split()
        fields = [field.strip() for field in parted]
        try:
            score = float(fields[2])
        except (IndexError, ValueError):
            if number == 1 and len(fields) > 2:
                continue  # the names of the columns
            raise DataError(f"{path} line {number}: {shown(text)!r} is not two words and a score") from None
        if not np.isfinite(score):
            raise DataError(f"{path} line {number}: the score {fields[2]} is not finite")
        total += 1
        if (found := _rows(fields[:2], vectors)) is not None:
            rows.append(found)
            scores.append(score)
    if len(rows) < 3 or len(set(scores)) < 2:
        raise DataError(f"{path}: of {total} pairs {len(rows)} have vectors: too few to compare")
    x = unit(vectors.x)
    a, b = np.array(rows).T
    cosines = (x[a] * x[b]).sum(1)
    if (cosines == cosines[0]).all():
        raise DataError(f"{path}: the cosines of its {len(rows)} pairs are all {cosines[0]:.3g}: they have no order")
    rho = float(stats.spearmanr(cosines, scores).statistic)
    return {"metric": "similarity", "spearman": rho, "pairs": len(rows), "coverage": len(rows) / total, "of": str(path)}


def analogy(vectors: Vectors, path: Path) -> list[dict[str, Any]]:
    """The accuracy of each section, and of all questions in the last row. DataError naming file and line."""
    sections: list[tuple[str, list[list[int] | None]]] = []
    for number, text in _lines(path):
        if text.startswith(":"):
            sections.append((text[1:].strip(), []))
            continue
        fields = text.split()
        if len(fields) != 4:
            raise DataError(f"{path} line {number}: {shown(text)!r} is not four words")
        if not sections:
            sections.append(("", []))
        sections[-1][1].append(_rows(fields, vectors))
    asked = np.array([q for _, questions in sections for q in questions if q is not None])
    if not len(asked):
        raise DataError(f"{path}: no question of which all words have vectors")
    x = unit(vectors.x)
    a, b, c, d = asked.T
    _, found = nearest_words(x[b] - x[a] + x[c], x, asked[:, :3], 1)
    right = iter((found[:, 0] == d).tolist())
    rows = []
    for name, questions in sections:
        mine = [next(right) for q in questions if q is not None]
        rows.append(_row(name, mine, len(questions), path))
    everything = (found[:, 0] == d).tolist()
    return [*rows, _row("all", everything, sum(len(q) for _, q in sections), path)]


def _row(section: str, right: list[bool], total: int, path: Path) -> dict[str, Any]:
    accuracy = float(np.mean(right)) if right else None
    covered = len(right) / total if total else None
    row = {"metric": "analogy", "section": section, "accuracy": accuracy, "questions": len(right)}
    return row | {"coverage": covered, "of": str(path)}
