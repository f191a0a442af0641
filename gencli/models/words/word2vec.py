"""word2vec: skip-gram and CBOW with negative sampling.

Reference:
    Distributed Representations of Words and Phrases and their Compositionality. Tomas Mikolov, Ilya Sutskever,
    Kai Chen, Greg Corrado, Jeffrey Dean, 2013, arXiv:1310.4546.

The architectures are those of Mikolov et al., Efficient Estimation of Word Representations in Vector Space, 2013,
arXiv:1301.3781. ``normalise`` is from Xing et al., Normalized Word Embedding and Orthogonal Transform for Bilingual
Word Translation, NAACL 2015.

A word w has an input vector v_w, the one that is kept, and an output vector v'_w. A pair of an input word w_I and a
word w_O near it costs (eq. 4, its sign turned)

    -log s(v'_{w_O} . v_{w_I}) - sum_{i=1}^k log s(-v'_{w_i} . v_{w_I}),    w_i ~ P_n(w) ~ U(w)^{3/4}

with s the logistic function. What is computed is that cost in blocks. The words of a row that subsampling leaves follow
one another; L of them and the words around them give all their pairs as one product of matrices, masked to the windows.
The K negatives of a row serve all its words (Ji et al., Parallelizing Word2Vec in Shared and Distributed Memory, 2016,
arXiv:1604.04661), each with the weight k/K for every pair: in expectation the sum above, and as eq. 4 has it, a
negative may happen to be w_O. Gradients are written out, s(x) - 1 for a pair and s(x) for a negative times the other
vector, and only the rows that a batch names are written.

All pairs of a batch are taken at the same weights, so one that is frequent in it would be moved too far: row r learns
at the rate min(lr, 2 / T_r), T_r being the sum of its terms' weights in the batch. A term's second derivative is
s (1 - s) <= 1/4 along the other vector; where that one is no longer than sqrt(2), the step is no longer than Newton's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli import contract
from gencli.contract import DataSpec, Model, Phase, Step, Stream

__all__ = ["Word2vec"]

L = 16  # centres of a block
SPECIAL = 2  # symbols before the words: the unknown one and the end of a line


class Word2vec(Model):
    """Vectors of words from the company that they keep."""

    class Config(contract.Config):
        """word2vec's hyper-parameters, by the names of the papers and of the authors' tool."""

        architecture: Literal["skip-gram", "cbow"] = Field(
            "skip-gram", description="skip-gram: a word's vector predicts its context; cbow: their mean the word"
        )
        dim: int = Field(100, ge=1, le=4096, description="numbers of a vector")
        window: int = Field(5, ge=1, le=64, description="words on each side, at most: drawn from 1 .. window each time")
        negative: int = Field(5, ge=1, description="k: negatives of a pair")
        shared: int = Field(64, ge=8, multiple_of=8, description="K: negatives of a row, which all its pairs share")
        sample: float = Field(1e-3, ge=0, description="t: words more frequent than this share are left out; 0: none")
        min_count: int = Field(5, ge=1, description="rarer words get no vector")
        normalise: bool = Field(False, description="keep input vectors at length 1 while they learn (Xing et al.)")

    config: Config
    kept: Tensor
    P_n: Tensor

    def __init__(self, config: Config, spec: DataSpec) -> None:
        super().__init__(config, spec)
        counts = torch.tensor(spec.counts[SPECIAL:], dtype=torch.float64)
        self.words = int((counts >= config.min_count).sum())  # the most frequent come first
        if self.words < 2:
            raise ValueError(f"{self.words} words come {config.min_count} times or more (model.min_count)")
        f = counts[: self.words] / counts[: self.words].sum()
        u = (f / config.sample).sqrt() if config.sample else torch.ones_like(f)
        kept = (
            ((u + 1) / u.square()).clamp(max=1) if config.sample else u
        )  # sqrt(t/f) + t/f, as the authors' tool has it
        self.register_buffer("kept", torch.cat([torch.zeros(SPECIAL), kept]).to(torch.get_default_dtype()), False)
        P_n = f.pow(0.75)
        self.register_buffer("P_n", (P_n / P_n.sum()).cumsum(0).to(torch.get_default_dtype()), False)
        V, d = self.words, config.dim
        # learned by `update`, not by an optimiser
        self.input = nn.Parameter(torch.empty(V, d).uniform_(-0.5 / d, 0.5 / d), requires_grad=False)  # v
        self.output = nn.Parameter(torch.zeros(V, d), requires_grad=False)  # v'
        if config.normalise:
            self.input.copy_(F.normalize(self.input))

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return {"x": Stream(options={"kind": "tokens"})}

    def phases(self) -> list[Phase]:
        return [Phase("words", [], self.loss, self.update)]

    # ------------------------------------------------------------------------------------------ what is predicted

    def left(self, x: Tensor, s: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows ``x`` (B, T): the words that subsampling leaves (B, M), -1 behind them, their lines, window sizes."""
        x = torch.where(x < SPECIAL + self.words, x, 0).long()
        left = s.rng.uniform("subsample", x.shape) < self.kept[x]
        size = 1 + s.rng.integers("window", self.config.window, x.shape)
        line = (x == 1).cumsum(1) + (x.shape[1] + 1) * torch.arange(len(x), device=x.device)[:, None]
        counts = left.sum(1)
        M = -(-max(1, int(s.gather(counts).max())) // L) * L
        order = F.pad((~left).to(torch.uint8).argsort(dim=1, stable=True), (0, max(0, M - x.shape[1])))[:, :M]
        there = torch.arange(M, device=x.device) < counts[:, None]
        w, line = (torch.where(there, a.gather(1, order), -1) for a in (x - SPECIAL, line))
        return w, line, size.gather(1, order)

    def near(self, line: Tensor, size: Tensor) -> Tensor:
        """The pairs (N/L, L, L + 2b), of words in a sequence: 1 where the m-th word around a block is near its l-th.

        ``line``, ``size`` (N,); words are near within a line (-1: no word there), ``size`` words ahead or behind.
        """
        b = self.config.window
        away = torch.arange(L + 2 * b, device=line.device) - torch.arange(L, device=line.device)[:, None] - b
        within = torch.where(away == 0, 2 * b, away.abs()) <= size.view(-1, L, 1)
        here, line = torch.where(line < 0, -2, line), F.pad(line, (b, b), value=-1)
        return (within & (here.view(-1, L, 1) == around(line, b)[:, None])).to(self.input.dtype)

    # ------------------------------------------------------------------------------------------ loss and gradients

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """The mean cost of a pair (of a word, in CBOW); its gradients are kept for :meth:`update`."""
        w, line, size = self.left(b.x, s)
        draws = s.rng.uniform("negatives", (len(w), self.config.shared))
        negatives = torch.searchsorted(self.P_n, draws).clamp(max=self.words - 1)
        cost, terms, kept = self.gradients(w, self.near(line.flatten(), size.flatten()), negatives)
        # the sum over my rows, of which the trainer takes the mean over processes
        return {"loss": cost * s.stride / s.total(terms).clamp_min(1), "keep": kept}

    def gradients(self, w: Tensor, near: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum of costs, how many pairs (words) it is of, and its gradients in the rows of v and v' that it names.

        ``w`` (B, M) words, ``near`` of them, ``negatives`` (B, K). "t": the weights of the terms that a row is in.
        """
        (B, M), K, k, b = w.shape, negatives.shape[1], self.config.negative, self.config.window
        v, v_, N = self.input, self.output, B * M
        beside = F.pad(w.flatten().clamp_min(0), (b, b))
        at = beside[b:-b]
        v_neg = F.embedding(negatives, v_)  # (B, K, d)
        n = near.sum(2).flatten()  # pairs of each word
        if self.config.architecture == "skip-gram":
            h = F.embedding(at, v)  # (N, d)
            v_O = around(F.embedding(beside, v_), b)  # (N/L, L + 2b, d)
            s = (h.view(-1, L, self.config.dim) @ v_O.mT).sigmoid()
            g = (s - 1) * near
            cost, times = _log(s, near), n
            dh, dv_ = g @ v_O, collected(g.mT @ h.view(-1, L, self.config.dim), b)
            t_ = collected(near.sum(1)[..., None], b)[:, 0]
        else:
            v_O = F.embedding(at, v_)
            mean = near / n.clamp_min(1).view(-1, L, 1)
            h = (mean @ around(F.embedding(beside, v), b)).flatten(0, 1)
            times = (n > 0).to(n)
            s = (h * v_O).sum(1).sigmoid()
            g = ((s - 1) * times)[:, None]
            cost, dh, dv_, t_ = _log(s, times), g * v_O, g * h, times
        h, times = h.view(B, M, -1), times.view(B, M, 1)
        s = (h @ v_neg.mT).sigmoid()  # (B, M, K)
        g = s * (times * (k / K))
        q = 1 - s
        for _ in range(3):  # products of eight: a logarithm costs as much as ten of them
            q = torch.mul(*q.chunk(2, 2))
        cost = cost + _log(q, times * (k / K))
        dh = torch.baddbmm(dh.view(B, M, -1), g, v_neg)
        t = times.flatten() * (1 + k)
        if self.config.architecture == "cbow":
            dh = collected(mean.mT @ dh.view(-1, L, self.config.dim), b)
            t = collected((mean.mT @ t.view(-1, L, 1)), b)[:, 0]
        rows = {"w": at, "dv": dh.view(N, -1), "t": t, "dv'": dv_, "t'": t_}
        kept = {name: value.unflatten(0, (B, M)) for name, value in rows.items()}
        t_neg = (times.sum(1) * (k / K)).expand(B, K)
        return cost, times.sum(), kept | {"negatives": negatives, "dv_neg": g.mT @ h, "t_neg": t_neg}

    def update(self, kept: dict[str, Tensor], s: Step) -> None:
        """A step down the gradients ``kept`` of the global batch, in the rows that it names."""
        k = {name: rows.flatten(0, 1) for name, rows in kept.items()}
        descend(self.input, [(k["w"], k["dv"], k["t"])], s.lr)
        descend(self.output, [(k["w"], k["dv'"], k["t'"]), (k["negatives"], k["dv_neg"], k["t_neg"])], s.lr)
        if self.config.normalise:
            rows = k["w"].unique()
            self.input[rows] = F.normalize(self.input[rows])

    # ------------------------------------------------------------------------------------------ what it has learned

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that have vectors, the most frequent first."""
        return self.spec.vocabulary[SPECIAL : SPECIAL + self.words]

    def vectors(self) -> Tensor:
        """The input vectors of :attr:`vocabulary`, (words, d)."""
        return self.input


def around(x: Tensor, b: int) -> Tensor:
    """A view: of (N + 2b, ...) the L + 2b rows of each block of L and around it, (N/L, L + 2b, ...)."""
    return x.unfold(0, L + 2 * b, L).movedim(-1, 1)


def collected(g: Tensor, b: int) -> Tensor:
    """The gradients of N words, from those of the rows that :func:`around` took of them: its transpose."""
    sums = g.new_zeros(len(g) * L + 2 * b, g.shape[2])
    for m in range(0, L + 2 * b, L):  # L rows of each block: they are apart
        around(sums, b)[:, m : m + L] += g[:, m : m + L]
    return sums[b:-b]


def _log(s: Tensor, weight: Tensor) -> Tensor:
    """The sum of -log s."""
    return -(s.clamp_min(1e-30).log_() * weight).sum()


def descend(v: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], lr: float) -> None:
    """Rows r of ``v`` go down the sum of their gradients, at the rate min(lr, 2 / T_r). ``parts``: (rows, dv, t)."""
    T = v.new_zeros(len(v))
    for rows, _, t in parts:
        T.scatter_add_(0, rows, t)
    rate = (-2 / T).clamp_(min=-lr)
    for rows, dv, _ in parts:
        v.scatter_add_(0, rows[:, None].expand_as(dv), dv * rate[rows][:, None])
