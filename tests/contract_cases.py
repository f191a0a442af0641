"""Systems that strain the contract, each as small as its mechanism allows: what ``test_trainer`` runs over.

They are ports of mechanisms (queues, generations, pools, lazy penalties, clipping, ...), not of the papers' networks;
and the GANs of the table with all tricks on, and with players that move at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.contract import DataSpec, Model, Phase, Step, Stream, every
from gencli.models.gans.gan import GAN
from gencli.models.gans.improved_gan import ImprovedGAN
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.mlp import mlp
from gencli.nn.norm import BatchNorm
from gencli.rng import Rng, generator

__all__ = ["CASES", "Case", "Source", "images", "points"]


class Source:
    """A data set in memory, as ``Batches`` and the verbs see one; ``endless`` answers any index."""

    split, digest = "train", ""

    def __init__(self, spec: DataSpec, x: Tensor, label: Tensor, endless: bool = False) -> None:
        self.name, self.spec, self.x, self.label = spec.name, spec, x, label
        self.size = None if endless else len(x)

    def rows(self, index: Tensor, epoch: Any = 0) -> dict[str, Tensor]:
        i = index % len(self.x)
        return {"x": self.x[i], "label": self.label[i]}


def images(n: int = 40) -> Source:
    """Four noisy 4 x 4 patterns of 17 levels, with their class."""
    g = generator("images")
    label = g.integers(4, size=n)
    patterns = g.integers(2, 15, size=(4, 1, 4, 4))
    x = patterns[label] + g.integers(-2, 3, size=(n, 1, 4, 4))
    spec = DataSpec(name="patterns", kind="image", shape=(1, 4, 4), levels=17, classes=tuple("abcd"), size=n)
    return Source(spec, torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(label))


def points(n: int = 40, endless: bool = False) -> Source:
    """Five blobs on a circle."""
    g = generator("points")
    label = g.integers(5, size=n)
    angle = label * (2 * np.pi / 5)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * g.standard_normal((n, 2))
    spec = DataSpec(name="blobs", kind="points", shape=(2,), size=None if endless else n)
    return Source(spec, torch.from_numpy(x), torch.from_numpy(label), endless)


def sharpened(p: Tensor) -> Tensor:
    return p.square() / p.square().sum(1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------- cases


class MoCo(Model):
    """A momentum encoder, a queue, keys normalised in shuffled groups (He et al. 2019, arXiv:1911.05722)."""

    K, m, T, groups = 32, 0.9, 0.2, 2

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.f_q, self.f_k = (nn.ModuleList([nn.Linear(spec.dims, 16, bias=False), nn.Linear(16, 8)]) for _ in "qk")
        self.f_k.load_state_dict(self.f_q.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(self.K, 8), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def phases(self) -> list[Phase]:
        return [Phase("query", self.f_q, self.loss, after=self.enqueue)]

    def f(self, net: nn.ModuleList, x: Tensor, s: Step, order: Tensor) -> Tensor:
        x = self.spec.scale(x).flatten(1)
        h = s.gather(net[0](x + 0.2 * s.rng.normal("view", x.shape)))[order].unflatten(0, (self.groups, -1))
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-5).sqrt()
        return F.normalize(net[1](s.mine(h.flatten(0, 1)[order.argsort()]).relu()), dim=1)

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        n = b.n * s.stride
        q = self.f(self.f_q, b.x, s, torch.arange(n))
        with torch.no_grad():
            k = self.f(self.f_k, b.x, s, s.rng.whole.permutation("shuffle", n))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], 1) / self.T
        return {"loss": F.cross_entropy(logits, torch.zeros(b.n, dtype=torch.long)), "keep": {"k": k}}

    def enqueue(self, kept: dict[str, Tensor], s: Step) -> None:
        for slow, fast in zip(self.f_k.parameters(), self.f_q.parameters()):
            slow.lerp_(fast, 1 - self.m)
        n = len(kept["k"])
        self.queue[(self.at + torch.arange(n)) % self.K] = kept["k"]
        self.at.add_(n).remainder_(self.K)


class MixMatch(Model):
    """Two streams, guessed labels, and mixing across the global batch (Berthelot et al. 2019, arXiv:1905.02249)."""

    K = 2

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.net = nn.Sequential(nn.Linear(spec.dims, 16, bias=False), BatchNorm(16), nn.ReLU(), nn.Linear(16, 4))

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return {"labelled": Stream(("x", "label")), "unlabelled": Stream(ratio=2)}

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        known, u = b.labelled, b.unlabelled
        views = [self.spec.scale(v).flatten(1) for v in (known.x, *[u.x] * self.K)]
        views = [v + 0.1 * s.rng.normal("view", v.shape) for v in views]
        with torch.no_grad():
            q = sharpened(torch.stack([self.net(v).softmax(1) for v in views[1:]]).mean(0))
        v, p = torch.cat(views), torch.cat([F.one_hot(known.label, 4).to(q), *[q] * self.K])
        other = s.mine(s.rng.whole.permutation("partner", len(v) * s.stride))
        a = s.rng.uniform("lambda", (len(v), 1))
        a = torch.maximum(a, 1 - a)
        v, p = a * v + (1 - a) * s.gather(v)[other], a * p + (1 - a) * s.gather(p)[other]
        out = self.net(v)
        supervised = -(p * out.log_softmax(1))[: known.n].sum(1).mean()
        consistency = (p - out.softmax(1))[known.n :].square().mean()
        return {"loss": supervised + 75 * s.progress * consistency, "consistency": consistency}

    def classify(self, x: Tensor) -> Tensor:
        return self.net(self.spec.scale(x).flatten(1))


class NoisyStudent(Model):
    """Generations: each student learns from labels that the one before wrote (Xie et al. 2019, arXiv:1911.04252)."""

    S, generations, rows = 6, 3, 40  # optimiser steps a generation; unlabelled rows

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.nets = nn.ModuleList(mlp(spec.dims, (12 + 4 * g,), 4, dropout=0.3) for g in range(self.generations))
        self.register_buffer("soft", torch.zeros(self.rows, 4))
        self.register_buffer("sure", torch.zeros(self.rows))
        name_layers(self)

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return {"labelled": Stream(("x", "label")), "unlabelled": Stream()}

    def phases(self) -> list[Phase]:
        return [phase for g in range(self.generations) for phase in self.generation(g)]

    def generation(self, g: int) -> list[Phase]:
        student = Phase(
            f"student-{g}",
            self.nets[g],
            lambda b, s: self.student(g, b, s),
            repeat=lambda step: int(min(step // self.S, self.generations - 1) == g),
        )
        teach = Phase(
            f"teach-{g}",
            [],
            lambda b, s: self.teach(self.nets[g - 1], b.unlabelled),
            after=self.write,
            repeat=lambda step: self.rows // 8 * (step == g * self.S),
            batch={"unlabelled": 8},
        )
        return [teach, student] if g else [student]

    def teach(self, teacher: nn.Module, u: Any) -> dict[str, Any]:
        teacher.eval()
        return {"keep": {"p": teacher(self.spec.scale(u.x).flatten(1)).softmax(1), "row": u.index}}

    def write(self, kept: dict[str, Tensor], s: Step) -> None:
        self.soft[kept["row"]] = kept["p"]
        self.sure[kept["row"]] = (kept["p"].amax(1) > 0.3).to(self.sure)

    def student(self, g: int, b: Any, s: Step) -> dict[str, Any]:
        self.nets[g].train()

        def f(x: Tensor) -> Tensor:
            x = self.spec.scale(x).flatten(1)
            return self.nets[g](x + 0.1 * s.rng.normal("noise", x.shape))

        loss = F.cross_entropy(f(b.labelled.x), b.labelled.label)
        if g:
            row = b.unlabelled.index
            loss = loss - (self.sure[row] * (self.soft[row] * f(b.unlabelled.x).log_softmax(1)).sum(1)).mean()
        return {"loss": loss}


class IMLE(Model):
    """Every L steps each example is given its nearest sample, without gradient (Li & Malik 2018, arXiv:1809.09087)."""

    L, m, rows = 7, 24, 40

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.G = mlp(4, (16,), spec.dims)
        self.register_buffer("z", torch.zeros(self.rows, 4))

    def phases(self) -> list[Phase]:
        match = Phase("match", [], self.nearest, after=self.write, repeat=every(self.L), batch={"x": self.rows})
        return [match, Phase("generator", self.G, self.loss)]

    def nearest(self, b: Any, s: Step) -> dict[str, Any]:
        z = s.rng.whole.normal("z", (self.m, 4))
        distance = torch.cdist(self.spec.scale(b.x), self.G(z))
        return {"keep": {"z": z[distance.argmin(1)], "row": b.index}, "distance": distance.amin(1).mean()}

    def write(self, kept: dict[str, Tensor], s: Step) -> None:
        self.z[kept["row"]] = kept["z"]

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        z = self.z[b.index] + 0.05 * s.rng.normal("jitter", (b.n, 4))
        return {"loss": (self.G(z) - self.spec.scale(b.x)).square().sum(1).mean()}

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self.G(rng.normal("z", (rng.n, 4)))


class StyleGAN(Model):
    """A lazy penalty that shares the critic's optimiser, mixed styles, the running mean of w, the spread of groups.

    Karras et al. 2018 and 2019, arXiv:1812.04948 and 1912.04958.
    """

    group = 4

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.mapping, self.first, self.style = mlp(4, (8,), 8), nn.Linear(8, 16), nn.Linear(8, 16)
        self.last, self.strength = nn.Linear(16, spec.dims), nn.Parameter(torch.full((16,), 0.1))
        self.body, self.verdict = mlp(spec.dims, (16,), 16), nn.Linear(17, 1)
        self.register_buffer("w_avg", torch.zeros(8))
        self.G = [self.mapping, self.first, self.style, self.last, self.strength]

    def phases(self) -> list[Phase]:
        D = [self.body, self.verdict]
        return [
            Phase("critic", D, self.critic),
            Phase("r1", D, self.r1, optimizer="critic", repeat=every(16), compile=False),
            Phase("generator", self.G, self.generator, after=self.track, batch={}),
        ]

    def averaged(self) -> list[nn.Module]:
        return [self.mapping, self.first, self.style, self.last]

    def synthesis(self, w1: Tensor, w2: Tensor, noise: Tensor) -> Tensor:
        return self.last((self.first(w1) + self.strength * noise).tanh() * self.style(w2)).tanh()

    def fake(self, n: int, s: Step) -> tuple[Tensor, Tensor]:
        w, other = (self.mapping(s.rng.normal("z", (n, 4))) for _ in range(2))
        mixed = torch.where(s.rng.uniform("mix", (n, 1)) < 0.5, other, w)
        return self.synthesis(w, mixed, s.rng.normal("noise", (n, 16))), w

    def D(self, x: Tensor, s: Step) -> Tensor:
        h = self.body(x)
        groups = s.gather(h).unflatten(0, (-1, self.group))
        spread = (groups.var(1) + 1e-8).sqrt().mean(1).repeat_interleave(self.group)
        return self.verdict(torch.cat([h, s.mine(spread)[:, None]], 1))[:, 0]

    def critic(self, b: Any, s: Step) -> dict[str, Any]:
        real, fake = self.D(self.spec.scale(b.x).flatten(1), s), self.D(self.fake(b.n, s)[0], s)
        return {"loss": F.softplus(fake).mean() + F.softplus(-real).mean(), "gap": (real - fake).mean()}

    def r1(self, b: Any, s: Step) -> dict[str, Any]:
        x = self.spec.scale(b.x).flatten(1).requires_grad_()
        (gradient,) = torch.autograd.grad(self.D(x, s).sum(), x, create_graph=True)
        return {"loss": 16 * 5 * gradient.square().sum(1).mean()}

    def generator(self, b: Any, s: Step) -> dict[str, Any]:
        x, w = self.fake(b.n, s)
        return {"loss": F.softplus(-self.D(x, s)).mean(), "keep": {"w": w}}

    def track(self, kept: dict[str, Tensor], s: Step) -> None:
        self.w_avg.lerp_(kept["w"].mean(0), 0.01)

    def sample(self, rng: Rng, labels: Tensor | None = None, *, psi: float = 0.7) -> Tensor:
        w = self.w_avg.lerp(self.mapping(rng.normal("z", (rng.n, 4))), psi)
        return self.synthesis(w, w, rng.normal("noise", (rng.n, 16))).unflatten(1, self.spec.shape)


class CycleGAN(Model):
    """Two domains and a pool of past fakes for the critics (Zhu et al. 2017, arXiv:1703.10593)."""

    P = 20

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        d = spec.dims
        self.G, self.F, self.D = mlp(d, (8,), d), mlp(d, (8,), d), mlp(d, (8,), 1)
        self.register_buffer("pool", torch.zeros(self.P, d))
        self.register_buffer("shown", torch.zeros(8, d))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return {"A": Stream(), "B": Stream()}

    def phases(self) -> list[Phase]:
        return [
            Phase("generators", [self.G, self.F], self.generators, after=self.swap),
            Phase("critic", self.D, self.critic, batch={"B": 8}),
        ]

    def generators(self, b: Any, s: Step) -> dict[str, Any]:
        x, y = self.spec.scale(b.A.x).flatten(1), -self.spec.scale(b.B.x).flatten(1)
        fake = self.G(x)
        cycle = (self.F(fake) - x).abs().mean() + (self.G(self.F(y)) - y).abs().mean()
        return {"loss": (self.D(fake) - 1).square().mean() + 10 * cycle, "cycle": cycle, "keep": {"fake": fake}}

    def swap(self, kept: dict[str, Tensor], s: Step) -> None:
        n = len(kept["fake"])
        coin, slot = s.rng.uniform("coin", (n,)), s.rng.integers("slot", self.P, (n,))
        for i, fake in enumerate(kept["fake"]):
            if self.filled < self.P:
                self.pool[self.filled] = self.shown[i] = fake
                self.filled += 1
            elif coin[i] < 0.5:
                self.shown[i] = self.pool[slot[i]]
                self.pool[slot[i]] = fake
            else:
                self.shown[i] = fake

    def critic(self, b: Any, s: Step) -> dict[str, Any]:
        real, fake = self.D(-self.spec.scale(b.B.x).flatten(1)), self.D(s.mine(self.shown))
        return {"loss": ((real - 1).square() + fake.square()).mean() / 2}

    def translate(self, x: Tensor, rng: Rng, direction: str) -> Tensor:
        return (self.G if direction == "AB" else self.F)(self.spec.scale(x).flatten(1))


class SimCLR(Model):
    """Two views of each example against all others of the global batch (Chen et al. 2020, arXiv:2002.05709)."""

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.net = nn.Sequential(nn.Linear(spec.dims, 16, bias=False), BatchNorm(16), nn.ReLU(), nn.Linear(16, 8))

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        x = self.spec.scale(b.x).flatten(1)[:, None]
        v = (x + 0.3 * s.rng.normal("views", (b.n, 2, x.shape[-1]))).flatten(0, 1)
        z = F.normalize(self.net(v), dim=1)
        everyone = s.gather(z.unflatten(0, (b.n, 2))).flatten(0, 1)
        me = (2 * s.mine(torch.arange(b.n * s.stride))[:, None] + torch.arange(2)).flatten()
        logits = (z @ everyone.T / 0.2).scatter(1, me[:, None], -1e9)
        return {"loss": F.cross_entropy(logits, me ^ 1), "right": (logits.argmax(1) == (me ^ 1)).to(z).mean()}

    def features(self, x: Tensor) -> Tensor:
        return self.net[:3](self.spec.scale(x).flatten(1))


class Glow(Model):
    """Scales and shifts set by the first batch, then learned (Kingma & Dhariwal 2018, arXiv:1807.03039)."""

    likelihood = "exact"
    layers = 3

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.b, self.log_s = (nn.Parameter(torch.zeros(self.layers, 2)) for _ in range(2))
        self.nets = nn.ModuleList(mlp(1, (8,), 2, "tanh") for _ in range(self.layers))

    def flow(self, x: Tensor, init: bool = False) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for k, net in enumerate(self.nets):
            if init:
                self.b[k] = -x.mean(0)
                self.log_s[k] = -x.std(0).log()
            x = (x + self.b[k]) * self.log_s[k].exp()
            x1, x2 = x.chunk(2, 1)
            h, t = net(x1).chunk(2, 1)
            x = torch.cat([x2 * h.tanh().exp() + t, x1], 1)
            log_det = log_det + self.log_s[k].sum() + h.tanh()[:, 0]
        return x, log_det

    def prepare(self, b: Any, s: Step) -> None:
        self.flow(self.spec.scale(b.x), init=True)

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        z, log_det = self.flow(self.spec.scale(x))
        return -0.5 * (z.square() + np.log(2 * np.pi)).sum(1) + log_det

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        return {"loss": -self.log_prob(b.x, s.rng).mean()}

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        z = rng.normal("z", (rng.n, 2))
        for k in reversed(range(self.layers)):
            y, x1 = z.chunk(2, 1)
            h, t = self.nets[k](x1).chunk(2, 1)
            z = torch.cat([x1, (y - t) * (-h.tanh()).exp()], 1) * (-self.log_s[k]).exp() - self.b[k]
        return z


class DropoutVAE(Model):
    """Masks and latents drawn in one loss, and a schedule inside it (Kingma & Welling 2013, arXiv:1312.6114)."""

    likelihood = "lower bound"

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.encoder = nn.Sequential(Dropout(0.2), *mlp(spec.dims, (16,), 8, dropout=0.1))
        self.decoder = mlp(4, (16,), spec.dims, dropout=0.1)
        name_layers(self)

    def terms(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        x = self.spec.scale(x).flatten(1)
        mu, log_sigma = self.encoder(x).chunk(2, 1)
        z = mu + log_sigma.exp() * rng.normal("epsilon", mu.shape)
        kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1)
        return 0.5 * (self.decoder(z) - x).square().sum(1), kl

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        distortion, kl = self.terms(b.x, s.rng)
        return {"loss": (distortion + s.progress * kl).mean(), "kl": kl.mean()}

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        distortion, kl = self.terms(x, rng)
        return -distortion - kl - 0.5 * self.spec.dims * np.log(2 * np.pi)

    def prior(self, rng: Rng) -> Tensor:
        return rng.normal("z", (rng.n, 4))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).unflatten(1, self.spec.shape)

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self.decode(self.prior(rng))


class WGAN(Model):
    """A clipped critic that moves more often at first and at times (Arjovsky et al. 2017, arXiv:1701.07875)."""

    c = 0.1

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.G, self.f = mlp(4, (16,), spec.dims), mlp(spec.dims, (16,), 1)

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", self.f, self.critic, after=self.clip, repeat=lambda t: 6 if t < 3 or t % 8 == 0 else 2),
            Phase("generator", [{"params": self.G, "lr": 0.5}], self.generator, batch={}),
        ]

    def averaged(self) -> nn.Module:
        return self.G

    def critic(self, b: Any, s: Step) -> dict[str, Any]:
        with torch.no_grad():
            fake = self.G(s.rng.normal("z", (b.n, 4)))
        return {"loss": self.f(fake).mean() - self.f(self.spec.scale(b.x)).mean()}

    def clip(self, kept: dict[str, Tensor], s: Step) -> None:
        for p in self.f.parameters():
            p.clamp_(-self.c, self.c)

    def generator(self, b: Any, s: Step) -> dict[str, Any]:
        return {"loss": -self.f(self.G(s.rng.normal("z", (b.n, 4)))).mean()}

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self.G(rng.normal("z", (rng.n, 4)))


class NormedGP(Model):
    """Batch norm in both players under a gradient penalty: couples the batch in a second derivative.

    The paper has none in the critic (Gulrajani et al. 2017, arXiv:1704.00028, section 4); it is the hardest case.
    """

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        deconv = nn.ConvTranspose2d(8, spec.shape[0], 2, 2, bias=False)
        self.G = nn.Sequential(
            nn.Linear(4, 32, bias=False), BatchNorm(32), nn.Unflatten(1, (8, 2, 2)), nn.ReLU(), deconv
        )
        conv = nn.Conv2d(spec.shape[0], 8, 2, 2, bias=False)
        self.D = nn.Sequential(conv, BatchNorm(8), nn.Softplus(), nn.Flatten(), nn.Linear(32, 1, bias=False))

    def phases(self) -> list[Phase]:
        return [Phase("critic", self.D, self.critic), Phase("generator", self.G, self.generator, batch={})]

    def critic(self, b: Any, s: Step) -> dict[str, Any]:
        x, fake = self.spec.scale(b.x), self.G(s.rng.normal("z", (b.n, 4))).detach()
        e = s.rng.uniform("e", (b.n, 1, 1, 1))
        mixed = (e * x + (1 - e) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.D(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return {"loss": (self.D(fake) - self.D(x)).mean() + 10 * penalty, "penalty": penalty}

    def generator(self, b: Any, s: Step) -> dict[str, Any]:
        return {"loss": -self.D(self.G(s.rng.normal("z", (b.n, 4)))).mean()}

    def sample(self, rng: Rng, labels: Tensor | None = None) -> Tensor:
        return self.G(rng.normal("z", (rng.n, 4))).tanh()


class TrickyGAN(ImprovedGAN):
    """Every trick at once, by class: what couples a batch through features, distances and statistics."""

    FIXED: Any = ImprovedGAN.Config.model_validate(
        {
            "latents": 3,
            "channels": 4,
            "conditional": True,
            "tricks": {
                "feature_matching": True,
                "minibatch_kernels": 3,
                "historical_averaging": 0.1,
                "virtual_batch_norm": 5,
            },
        }
    )

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(self.FIXED, spec)

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return super().streams(cls.FIXED)


class SimultaneousGAN(GAN):
    """What G was judged by, handed to D; and a penalty."""

    FIXED: Any = GAN.Config(latents=3, hidden=(8,), updates="simultaneous", penalty=0.5, penalty_kind="r1")

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(self.FIXED, spec)

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        return super().streams(cls.FIXED)


@dataclass(frozen=True)
class Case:
    """A model, its data, what its recipe would say, and whether its loss couples the examples of a batch."""

    model: type[Model]
    source: Callable[[], Source]
    train: dict[str, Any] = field(default_factory=dict)
    coupled: bool = False


CASES = {
    "moco": Case(MoCo, images, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}, coupled=True),
    "mixmatch": Case(MixMatch, images, {"ema": 0.95}, coupled=True),
    "noisy-student": Case(NoisyStudent, images),
    "imle": Case(IMLE, points, {"clip": 1.0}),
    "stylegan": Case(StyleGAN, images, {"ema": 0.9, "betas": (0.0, 0.99)}, coupled=True),
    "cyclegan": Case(CycleGAN, images, {"schedule": "linear", "phases": {"critic": {"lr": 4e-3}}}),
    "simclr": Case(SimCLR, images, {"optimizer": "adamw", "warmup": 5, "schedule": "cosine"}, coupled=True),
    "glow": Case(Glow, lambda: points(endless=True), {"optimizer": "adamax", "ema": 0.99}),
    "dropout-vae": Case(DropoutVAE, images, {"ema": 0.9, "schedule": "exponential", "decay": 0.99}),
    "wgan": Case(WGAN, points, {"optimizer": "rmsprop", "ema": 0.9}),
    "tricky-gan": Case(TrickyGAN, images, {"ema": 0.9, "betas": (0.5, 0.999)}, coupled=True),
    "simultaneous-gan": Case(SimultaneousGAN, points, {"ema": 0.9}),
    "normed-gp": Case(NormedGP, images, {"betas": (0.0, 0.9)}, coupled=True),
}
