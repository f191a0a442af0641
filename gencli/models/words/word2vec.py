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
one another; L of them, the words around them and K negatives, which the block shares (Ji et al., Parallelizing Word2Vec
in Shared and Distributed Memory, 2016, arXiv:1604.04661), give all their terms as one product of matrices, weighted: 1
for a pair within the window, k/K for a negative of each pair. In expectation that is the sum above, and as eq. 4 has
it, a negative may happen to be w_O. Gradients are written out, s(x) - 1 for a pair and s(x) for a negative times the
other vector, and only the rows that a batch names are written.

All terms of a batch are taken at the same weights, so a row that is frequent in it would be moved too far: row r learns
at the rate min(lr, 2 / T_r), T_r being the sum of its terms' weights in the batch. A term's second derivative is
s (1 - s) <= 1/4 along the other vector; where that one is no longer than sqrt(2), the step is no longer than Newton's.
(4 / T_r learns a little faster on large vocabularies, and diverges on one of seven words.)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli import contract
from gencli.contract import DataSpec, Model, Phase, Step, Stream

__all__ = ["Word2vec"]

L = 32  # words of a block
SPECIAL = 2  # symbols before the words: the unknown one and the end of a line
REPORTED = 8  # while training, one block in so many: nothing needs the logarithms but the report


class Blocks(NamedTuple):
    """The terms of N words: h = A v[into] with v'[out], whose first C columns are what is so, the other K negatives.

    ``into`` (N/L, i) and ``out`` (N/L, C + K) name rows, ``A`` is (N/L, L, i) or None for the identity, ``W``
    (N/L, L, C + K) weighs the terms, ``n`` (N/L, L) counts those of each word that are so.
    """

    into: Tensor
    out: Tensor
    A: Tensor | None
    W: Tensor
    n: Tensor
    C: int


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
        shared: int = Field(32, ge=1, description="K: negatives of a block of 32 words, which all its pairs share")
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
        # sqrt(t/f) + t/f, as the authors' tool has it
        kept = ((u + 1) / u.square()).clamp(max=1) if config.sample else u
        others = torch.zeros(len(counts) - self.words)
        kept = torch.cat([torch.zeros(SPECIAL), kept, others])
        self.register_buffer("kept", kept.to(torch.get_default_dtype()), False)
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
        """Of rows ``x`` (B, T) the words that subsampling leaves, their lines and the sizes of their windows, (B, M).

        Behind the last word of a row stand word 0, line -1 and size 0. M is the same on all processes, a multiple of L.
        """
        B, T = x.shape
        rows, x = torch.arange(B, device=x.device), x.flatten()
        share = self.kept.index_select(0, x)
        u = s.rng.uniform("subsample", (B, T)).flatten()
        left = u < share
        counts = left.view(B, T).sum(1)
        M = -(-max(1, int(s.gather(counts).max())) // L) * L
        at = left.nonzero()[:, 0]
        row = at // T
        to = (rows * M - counts.cumsum(0) + counts).index_select(0, row) + torch.arange(len(at), device=x.device)
        w = x.index_select(0, at) - SPECIAL
        line = (x == 1).cumsum(0).index_select(0, at) + row
        # below a word's share u is uniform
        size = 1 + self.config.window * u.index_select(0, at) / share.index_select(0, at)
        found = x.new_tensor([[0], [-1], [0]]).repeat(1, B * M)
        for place, value in zip(found, (w, line, size)):
            place.scatter_(0, to, value.to(x.dtype))
        return tuple(found.view(3, B, M))

    def near(self, line: Tensor, size: Tensor) -> Tensor:
        """Whether the word at n + j - b is near the n-th, (N, 2b + 1): in its line, and within ``size`` words of it."""
        b = self.config.window
        away = torch.arange(-b, b + 1, device=line.device, dtype=size.dtype)[:, None].abs()
        away[b] = 2 * b + 2  # itself
        there = F.pad(line, (b, b), value=-1).unfold(0, len(line), 1)  # (2b + 1, N)
        return ((away <= size) & (there == line)).T

    def negatives(self, u: Tensor) -> Tensor:
        """K words for each block from ``u`` (..., K), uniform in [0, 1): one of each of K equal parts of P_n.

        One taken at random is drawn from P_n, and their sum varies less than that of words drawn one by one.
        """
        K = u.shape[-1]
        u = (u + torch.arange(K, device=u.device)) / K
        return torch.searchsorted(self.P_n, u, out_int32=True).clamp_(max=self.words - 1)

    def blocks(self, w: Tensor, near: Tensor, negatives: Tensor) -> Blocks:
        """The terms of words ``w`` (N,), ``near`` (N, 2b + 1) of them, with ``negatives`` (N/L, K)."""
        b, k, K = self.config.window, self.config.negative, negatives.shape[1]
        own, context = w.view(-1, L), F.pad(w, (b, b)).unfold(0, L + 2 * b, L).contiguous()
        pairs = near.view(-1, L, 2 * b + 1).to(self.input.dtype)
        n = pairs.sum(2)
        if self.config.architecture == "skip-gram":
            into, out, A, half = own, context, None, b
        else:  # a word's context has one term: the word
            into, out, half = context, own, 0
            A = n.new_zeros(*n.shape, L + 2 * b)
            band(A, b).copy_(pairs / n.clamp_min(1)[..., None])
            n = n.clamp(max=1)
            pairs = n[..., None]
        C = out.shape[1]
        W = n.new_zeros(*n.shape, C + K)
        band(W, half).copy_(pairs)
        W[..., C:] = n[..., None] * (k / K)
        return Blocks(into, torch.cat([out, negatives], 1), A, W, n, C)

    # ------------------------------------------------------------------------------------------ loss and gradients

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """The mean cost of a pair (of a word, in CBOW); the steps down its gradients are kept for :meth:`update`."""
        w, line, size = self.left(b.x, s)
        B, M = w.shape
        negatives = self.negatives(s.rng.uniform("negatives", (B, M // L, self.config.shared)))
        terms = self.blocks(w.flatten(), self.near(line.flatten(), size.flatten()), negatives.flatten(0, 1))
        t, t_ = terms.n * (1 + self.config.negative), terms.W.sum(1)
        if terms.A is not None:
            t = (t[:, None] @ terms.A)[:, 0].to(t.dtype)  # bfloat16 cannot count beyond 256

        def rate(rows: Tensor, t: Tensor) -> Tensor:
            T = t.new_zeros(self.words)
            T.scatter_add_(0, *(s.gather(a.view(B, -1)).flatten() for a in (rows.long(), t)))
            return (2 / T).clamp_(max=s.lr).index_select(0, rows.flatten()).view(rows.shape)

        p, dv, dv_ = self.gradients(terms, -rate(terms.into, t), -rate(terms.out, t_))
        every = REPORTED if self.training else 1
        p, W, n = (x.unflatten(0, (B, -1))[:, ::every] for x in (p, terms.W, terms.n))
        cost, pairs = self.cost(p, W), s.total(n.sum())
        keep = {"into": terms.into, "dv": dv, "out": terms.out, "dv'": dv_}
        # the sum over my rows, of which the trainer takes the mean over processes
        return {
            "loss": cost * s.stride / pairs.clamp_min(1),
            "keep": {name: x.unflatten(0, (B, -1)) for name, x in keep.items()},
        }

    def gradients(self, terms: Blocks, a: Tensor, a_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model gives to what is so, (N/L, L, C + K), and the cost's gradients in v[into], v'[out].

        The gradients come out times ``a`` (N/L, i) and ``a_`` (N/L, C + K), a number for each row.
        """
        into, out, A, W, _, C = terms
        v, v_ = F.embedding(into, self.input), F.embedding(out, self.output)
        h = v if A is None else A @ v  # (N/L, L, d)
        p = (h @ v_.mT).to(W.dtype).sigmoid_()  # (N/L, L, C + K)
        torch.sub(1, p[..., C:], out=p[..., C:])
        e = torch.addcmul(W, p, W, value=-1)
        e[..., :C].neg_()
        if A is None:
            dv = (e * a[..., None]) @ v_
        else:
            dv = (A * a[:, None]).mT @ (e @ v_)
        return p, dv, e.mul_(a_[:, None]).mT @ h

    @staticmethod
    def cost(p: Tensor, W: Tensor) -> Tensor:
        """The sum of -log p, weighted."""
        return -(p.clamp_min(1e-30).log_() * W).sum()

    def update(self, kept: dict[str, Tensor], s: Step) -> None:
        """Take the steps ``kept`` of the global batch, in the rows that they are of."""
        for v, rows, dv in ((self.input, "into", "dv"), (self.output, "out", "dv'")):
            v.index_add_(0, kept[rows].flatten(), kept[dv].flatten(0, -2))
        if self.config.normalise:
            rows = kept["into"].unique()
            self.input[rows] = F.normalize(self.input[rows])

    # ------------------------------------------------------------------------------------------ what it has learned

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that have vectors, the most frequent first."""
        return self.spec.vocabulary[SPECIAL : SPECIAL + self.words]

    def vectors(self) -> Tensor:
        """The input vectors of :attr:`vocabulary`, (words, d)."""
        return self.input


def band(x: Tensor, b: int) -> Tensor:
    """A view (N/L, L, 2b + 1) of ``x`` (N/L, L, C): of the l-th row of a block its columns l .. l + 2b."""
    C = x.shape[2]
    return x.as_strided((len(x), L, 2 * b + 1), (L * C, C + 1, 1))
