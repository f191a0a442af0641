"""Translation by word vectors: which target words lie nearest, and how often a right one is among them. No torch.

x are mapped source vectors, y target vectors, all of length 1. Three ways to rank the y for an x:

- ``nn``: by the cosine. Hubs, targets near to everything, are often first.
- ``inverted-softmax``: exp(30 cos) over its sum over source words, so that a hub shares itself out (Samuel L. Smith et
  al. 2017, arXiv 1702.03859). Summed over the first 20,000 source words (the paper samples some).
- ``csls``: 2 cos(x, y) - r(x) - r(y), r the mean cosine to the 10 nearest of the other language (Alexis Conneau et al.,
  Word Translation Without Parallel Data, 2017, arXiv 1710.04087). Exact over all words: see :class:`Ranking`.

P@k is the share of the source words, each counted once, that have any of their translations among the k first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gencli import keyed
from gencli.console import DataError, UsageError, nearest

__all__ = ["RETRIEVALS", "Ranking", "Test", "interval", "ranked", "retrieval", "scored"]

Array = np.ndarray[Any, Any]
RETRIEVALS = ("nn", "inverted-softmax", "csls")
K, BETA, SAMPLE = 10, 30.0, 20_000
PARTS = (0.04, 0.1, 0.25, 0.5)  # of the sources, after which bounds are looked at again
TABLE = 1 << 24  # products in memory at once: 64 MB
GROUPS = 32  # columns that are looked through as one
DRAWS = 10_000  # resamples of a bootstrap
CLOSE = 1e-5  # more than float32 errs in a score


# ---------------------------------------------------------------------------------------------- the nearest


def _top(P: Array, k: int) -> tuple[Array, Array]:
    """The ``k`` largest numbers of each row of ``P`` (B, S), in no order, and their columns, (B, k).

    The maxima of groups of columns are taken first: the k largest lie in the k groups with the largest maxima.
    """
    size = P.shape[1] // GROUPS
    if size < 2 * k:
        at = np.argpartition(P, P.shape[1] - k, 1)[:, -k:] if k < P.shape[1] else np.tile(np.arange(k), (len(P), 1))
        return np.take_along_axis(P, at, 1), at
    best = P[:, : size * GROUPS].reshape(len(P), GROUPS, size).max(1)  # group j: columns j, j + size, ...
    group = np.argpartition(best, size - k, 1)[:, -k:]
    at = (group[:, :, None] + size * np.arange(GROUPS)).reshape(len(P), -1)
    rest = np.arange(size * GROUPS, P.shape[1])
    at = np.concatenate([at, np.tile(rest, (len(P), 1))], 1)
    found = np.take_along_axis(P, at, 1)
    pick = np.argpartition(found, found.shape[1] - k, 1)[:, -k:]
    return np.take_along_axis(found, pick, 1), np.take_along_axis(at, pick, 1)


def _sorted(score: Array, at: Array) -> tuple[Array, Array]:
    """Largest first, of equal ones the smaller column."""
    order = np.lexsort((at, -score), axis=1)
    return np.take_along_axis(score, order, 1), np.take_along_axis(at, order, 1)


def _products(a: Array, b: Array, columns: int | None = None) -> Iterator[tuple[slice, slice, Array]]:
    """Blocks of ``a @ b.T``, at most TABLE numbers: rows, columns, block; all columns at once without ``columns``."""
    wide = max(1, min(columns or len(b), len(b)))
    high = max(1, min(TABLE // wide, len(a)))
    table = np.empty((high, wide), np.float32)
    for i in range(0, len(a), high):
        for j in range(0, len(b), wide):
            rows, cols = slice(i, min(i + high, len(a))), slice(j, min(j + wide, len(b)))
            block = table.reshape(-1)[: (rows.stop - i) * (cols.stop - j)].reshape(rows.stop - i, cols.stop - j)
            yield rows, cols, np.matmul(a[rows], b[cols].T, out=block)


def _raise(best: Array, a: Array, b: Array) -> Array:
    """``best`` (n, k), the largest products of the rows of ``a`` (n, d) so far, with those of the rows of ``b``."""
    k = best.shape[1]
    for rows, cols, P in _products(a, b, 1 << 14):
        new, _ = _top(P, min(k, cols.stop - cols.start))
        both = np.concatenate([best[rows], new], 1)
        best[rows] = np.partition(both, both.shape[1] - k, 1)[:, -k:]
    return best


class Ranking:
    """Targets ``y`` (m, d) ranked for one source word after another; what was found out about them is kept.

    ``sources`` (s, d): all mapped source words, whose crowding corrects for hubs. All float32 of length 1.

    CSLS needs r(y), and all of them take as many products as there are pairs of words; but few y need it. Its mean over
    a part of the sources is never above it, so it bounds a score from above. The exact scores of the most promising y
    give for each x a k-th best; then a y is followed through further sources only as long as its bound reaches that of
    some x. None is approximate, and a y that was followed for one word is not followed again for the next.
    """

    def __init__(self, how: str, y: Array, sources: Array) -> None:
        self.how, self.y = how, y
        self.factor = {"nn": 1.0, "inverted-softmax": BETA, "csls": 2.0}[how]
        self.minus = np.zeros(len(y), np.float32)  # taken from factor * cos; of csls r(y), or its bound
        if how == "inverted-softmax":
            total = np.zeros(len(y))
            for rows, _, P in _products(y, sources[:SAMPLE], 1 << 12):
                P *= BETA
                total[rows] += np.exp(P, out=P).sum(1, dtype=np.float64)
            self.minus[:] = np.log(total)
        elif how == "csls":
            least = min(len(sources), K)
            cuts = [0, *(max(round(part * len(sources)), least) for part in PARTS), len(sources)]
            self.parts = [sources[a:b] for a, b in pairwise(cuts)]
            # the largest products with the sources in as many parts as each y was followed through
            self.best = _raise(np.full((len(y), least), -np.inf, np.float32), y, self.parts[0])
            self.followed = np.ones(len(y), int)
            self.minus = self.best.mean(1)

    def __call__(self, x: Array, k: int) -> tuple[Array, Array]:
        """Scores and rows of the ``k`` best of y for each of ``x`` (n, d), best first, both (n, k)."""
        k = min(k, len(self.y))
        score, at = np.empty((len(x), k), np.float32), np.empty((len(x), k), int)
        for rows, _, P in _products(x, self.y):
            P *= np.float32(self.factor)
            if self.how == "csls":
                r = _top(P, min(K, len(self.y)))[0].mean(1, keepdims=True) / 2
                P -= self._enough(P, k)
                P -= r
            else:
                P -= self.minus
            score[rows], at[rows] = _sorted(*_top(P, k))
        return score, at

    def _enough(self, P: Array, k: int) -> Array:
        """r(y) of all y that can be among the ``k`` best of a row of ``P`` (n, m), 2 cos(x, y); infinite of others."""
        most = np.full(len(self.y), -np.inf, np.float32)
        most[_top(P - self.minus, k)[1]] = np.inf
        least = _top(P - self._follow(most), k)[0].min(1, keepdims=True) - CLOSE
        return self._follow((P - least).max(0))

    def _follow(self, most: Array) -> Array:
        """Follow each y through the sources as long as its bound is not above ``most`` (m,).

        r(y), infinite where not all sources were looked at.
        """
        for i, part in enumerate(self.parts[1:], 1):
            on = np.flatnonzero((self.followed == i) & (self.minus <= most))
            self.best[on] = _raise(self.best[on], self.y[on], part)
            self.minus[on] = self.best[on].mean(1)
            self.followed[on] += 1
        return np.where(self.followed == len(self.parts), self.minus, np.float32(np.inf))


def ranked(how: str, x: Array, y: Array, sources: Array, k: int) -> tuple[Array, Array]:
    """The ``k`` best of ``y`` for each of ``x`` by :class:`Ranking`, where nothing more is asked of it."""
    return Ranking(how, y, sources)(x, k)


# ---------------------------------------------------------------------------------------------- the score


class Test(NamedTuple):
    """The part of a test dictionary that both vocabularies have: ``rows`` (n,) of its source words, ``right[i]`` the
    rows of their translations, and of how many source words in all."""

    rows: Array
    right: list[set[int]]
    words: int

    @classmethod
    def of(
        cls, dictionary: Mapping[str, Sequence[str]], source: Mapping[str, int], target: Mapping[str, int], name: str
    ) -> Test:
        """Of ``dictionary``, read from ``name``; DataError where no word of it can be scored."""
        pairs = {
            source[w]: {target[m] for m in meanings if m in target} for w, meanings in dictionary.items() if w in source
        }
        pairs = {row: right for row, right in pairs.items() if right}
        if not pairs:
            first = next(iter(dictionary), "")
            raise DataError(
                f"{name}: none of its {len(dictionary)} words, such as {first!r}, is among the source vectors with a "
                "translation among the target vectors",
                hint="is it the other direction, or in another case?",
            )
        return cls(np.array(list(pairs)), list(pairs.values()), len(dictionary))


def retrieval(name: str) -> str:
    """``name``, if it is one of RETRIEVALS; UsageError otherwise."""
    if name not in RETRIEVALS:
        raise UsageError(f"unknown retrieval {name!r}{nearest(name, RETRIEVALS)}: it is {', '.join(RETRIEVALS)}")
    return name


def scored(test: Test, at: Array) -> Array:
    """Whether a right translation is among the 1, 5, 10 first of ``at`` (n, 10), rows of targets: bool (n, 3)."""
    right = np.zeros(at.shape, bool)
    for i, (row, good) in enumerate(zip(at.tolist(), test.right)):
        right[i] = [t in good for t in row]
    return np.stack([right[:, :k].any(1) for k in (1, 5, 10)], 1)


def interval(values: Array, *key: object) -> tuple[float, float]:
    """The 95 % interval of the mean of ``values`` (n,) by bootstrap: the middle of 10,000 resamples' means.

    Of differences of two systems on the same words it is the paired bootstrap (Philipp Koehn, Statistical Significance
    Tests for Machine Translation Evaluation, EMNLP 2004). A resample of n values of which few differ is one multinomial
    draw of their counts, which is the same distribution. ``key`` keys the draws.
    """
    value, count = np.unique(values.astype(np.float64), return_counts=True)
    n = len(values)
    draws = keyed.generator("bootstrap", *key).multinomial(n, count / n, DRAWS) @ value / n
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
