"""What all GANs share: two players, their moves in a step, the tricks and penalties they may have, samples and latents.

A GAN is a generator G, from noise z to data, and a discriminator D, from data to a number d. The players take turns:

    alternating:   D moves ``critic_steps`` times on fresh data and samples, then G once, against the new D
    simultaneous:  both move at once: D judges the very samples by which G has just been judged, and G faced the old D

The tricks are those of Improved Techniques for Training GANs, and any GAN may have them unless they contradict what it
is; what they couple (the features of a batch, its examples' distances) is the global batch on any number of processes.

References:
    Generative Adversarial Nets, Goodfellow et al., 2014, arXiv 1406.2661
    Improved Techniques for Training GANs, Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, 2016, arXiv 1606.03498
    Large Scale GAN Training for High Fidelity Natural Image Synthesis, Brock, Donahue, Simonyan, 2018, arXiv 1809.11096
    (truncation, section 3.1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Phase, Step, Stream
from gencli.nn import gan_networks, penalties, spectral_norm
from gencli.nn.conditional import Conditional
from gencli.nn.gan_losses import PROBABILITIES, GANLoss, discriminator_loss, generator_loss, output
from gencli.nn.gan_networks import Head, MinibatchDiscrimination, Network, NormD
from gencli.nn.gan_norms import Norm
from gencli.nn.mlp import Activation
from gencli.rng import Rng

__all__ = ["GANBase", "GANConfig", "Tricks"]

CERTAIN = 0.98  # D(x) - D(G(z)), in the mean, from which on there is a warning
ALIKE = 0.2  # of the data's spread, below which there is one


class Tricks(Config):
    """The five of Salimans et al., section 3. Nothing is on unless it is asked for."""

    feature_matching: bool = Field(False, description="G matches the mean features of data in D, in place of its loss")
    minibatch_kernels: int = Field(0, ge=0, description="minibatch discrimination: B, kernels over the batch; 0: none")
    historical_averaging: float = Field(
        0.0, ge=0, description="weight of ||theta - mean of past thetas||^2, each player"
    )
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="one-sided: D should say 1 - this of real data, 0.1 in the paper"
    )
    virtual_batch_norm: int = Field(
        0, ge=0, description="rows of G's reference batch, which takes batch norm's place; 0: none"
    )


class GANConfig(Config):
    """``hidden`` is of perceptrons, ``channels`` of image networks. Each model says which ``network`` "auto" is."""

    latents: int = Field(64, ge=1, description="dimensions of z")
    prior: Literal["normal", "uniform"] = Field("normal", description="of z: N(0, I), or uniform in [-1, 1]")
    network: Literal["auto", "mlp", "dcgan", "resnet"] = Field("auto", description="of both players; points: mlp")
    hidden: tuple[int, ...] = Field(
        (128, 128), description="widths of a perceptron's layers, from the data's side in D"
    )
    channels: int = Field(32, ge=1, description="of the map next to the image, in both players")
    activation: Activation = Field("leaky-relu", description="D's; G has ReLU")
    norm_G: Literal["batch", "none"] = Field("batch", description="normalisation of G's layers")
    norm_D: NormD = Field("none", description="of D's layers but the first: batch, layer, spectral (of weights), none")
    conditional: bool = Field(False, description="by class: conditional batch norm in G, a projection in D")
    loss: GANLoss = Field("non-saturating", description="see gencli.nn.gan_losses")
    updates: Literal["alternating", "simultaneous"] = Field("alternating", description="how the players move in a step")
    critic_steps: int = Field(1, ge=1, description="D's moves for each of G's")
    generator_batch: int = Field(1, ge=1, description="rows of G's batch for each of D's")
    penalty: float = Field(0.0, ge=0, description="weight of the penalty on D's gradient; 0: none")
    penalty_kind: penalties.Penalty = Field(
        "gradient", description="gradient (slope 1 between data and samples), r1, zero-centred"
    )
    tricks: Tricks = Tricks.model_validate({})


class _D(nn.Module):
    """(n, *shape), labels (n,) or None -> d (n,), ``gain`` times what the head says."""

    gain: float = 1.0

    def __init__(self, body: nn.Module, near: nn.Module, head: Head) -> None:
        super().__init__()
        self.body, self.near, self.head = body, near, head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.gain * self.head(self.near(self.body(x)), labels)


class GANBase(Model, Conditional):
    """A model gives its ``Config`` and :attr:`images`; everything follows from the config."""

    reference: Tensor  # inputs of G, (virtual_batch_norm, inputs)
    images: ClassVar[Network] = "mlp"  # the network for images unless the config names one

    config: GANConfig

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.check()
        c, tricks = self.config, self.config.tricks
        points = spec.kind == "points"
        network: Network = ("mlp" if points else self.images) if c.network == "auto" else c.network
        classes = len(spec.classes) if c.conditional else 0
        norm: Norm = "virtual" if tricks.virtual_batch_norm else c.norm_G
        by_class = classes if norm == "batch" else 0  # else G is told the class beside z
        self.inputs = c.latents + (classes - by_class)
        self.G = gan_networks.generator(
            network,
            self.inputs,
            spec,
            hidden=c.hidden,
            channels=c.channels,
            norm=norm,
            classes=by_class,
            reference=tricks.virtual_batch_norm,
        )
        body, n = gan_networks.body(
            network, spec, hidden=c.hidden[::-1], channels=c.channels, norm=c.norm_D, act=c.activation
        )
        near = MinibatchDiscrimination(n, tricks.minibatch_kernels) if tricks.minibatch_kernels else nn.Identity()
        head = Head(n + tricks.minibatch_kernels, spectral=c.norm_D == "spectral", classes=classes)
        self.D = _D(body, near, head)
        gan_networks.initialise(self.G, network, norm != "none")
        gan_networks.initialise(self.D, network, c.norm_D == "batch")
        spectral_norm.iterate(self.D, 15)
        self._remember()
        self._shown: Tensor | None = None  # samples that G was judged by in this step, for D

    def check(self) -> None:
        """UsageError, with the reason, for what makes no sense together."""
        c, spec, tricks = self.config, self.spec, self.config.tricks
        if spec.kind not in ("image", "points"):
            raise UsageError(f"GANs here make images and points, and {spec.name} is {spec.kind}")
        if c.network not in ("auto", "mlp") and spec.kind == "points":
            raise UsageError(f"model.network={c.network} is for images, and {spec.name} is points: use mlp")
        self.check_classes()
        if c.conditional and len(spec.classes) == 1:
            raise UsageError(f"model.conditional needs several classes, and {spec.name} has one")
        if tricks.smoothing and c.loss in ("wasserstein", "hinge"):
            raise UsageError(f"model.tricks.smoothing: the {c.loss} loss has no target on real data to smooth")
        if tricks.feature_matching and c.loss == "saturating":
            raise UsageError(
                "model.tricks.feature_matching takes the place of G's loss, in which alone loss=saturating differs"
            )
        if tricks.virtual_batch_norm and c.norm_G != "batch":
            raise UsageError("model.tricks.virtual_batch_norm stands in for batch norm: it needs model.norm_G=batch")
        if tricks.virtual_batch_norm == 1:
            raise UsageError("model.tricks.virtual_batch_norm: a reference batch of one row has no variance")
        coupled = (
            "norm_D=batch" if c.norm_D == "batch" else "tricks.minibatch_kernels" if tricks.minibatch_kernels else ""
        )
        if c.penalty and coupled:
            raise UsageError(
                f"model.penalty is about D's gradient at each example alone, and model.{coupled} couples a batch",
                hint="model.norm_D=layer or none" if c.norm_D == "batch" else "",
            )
        if c.updates == "simultaneous" and (c.critic_steps > 1 or c.generator_batch > 1):
            raise UsageError("model.updates=simultaneous: D and G move once each, on as many samples")

    # ------------------------------------------------------------------ the moves

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        """Labels too where the model is conditional: a sample is drawn for the class of a row of the data."""
        return {"x": Stream(("x", "label") if config.conditional else ("x",))}

    def phases(self) -> list[Phase]:
        """D and G, or G and D where they move at once. G needs no data, unless for features or for classes."""
        c = self.config
        D = Phase(
            "discriminator",
            self.D,
            self.discriminator_loss,
            self.after_discriminator,
            repeat=self.critic_repeats(),
            compile=not c.penalty,
        )
        data: dict[str, int] | None = None if c.conditional or c.tricks.feature_matching else {}
        G = Phase("generator", self.G, self.generator_loss, self.after_generator, batch=data)
        return [D, G] if c.updates == "alternating" else [G, D]

    def critic_repeats(self) -> int | Callable[[int], int]:
        """How often D moves in a step."""
        return self.config.critic_steps

    def averaged(self) -> nn.Module:
        """The generator: a discriminator is good against one opponent, not against its average."""
        return self.G

    def discriminator_loss(self, b: Any, s: Step) -> dict[str, Any]:
        """``real`` and ``fake`` are D's mean outputs: probabilities, or d where the loss knows none."""
        c, y = self.config, self._labels(b)
        x = self.spec.scale(b.x)
        with torch.no_grad():
            fake = self.decode(self._z(s.rng, b.n), y) if self._shown is None else s.mine(self._shown)
            fake = fake.to(x.dtype)
        d_real, d_fake = self._judge(x, fake, y)
        loss = self._nostalgic("D", discriminator_loss(c.loss, d_real, d_fake, c.tricks.smoothing))
        out = {"real": output(c.loss, d_real), "fake": output(c.loss, d_fake)}
        if c.penalty:
            epsilon = s.rng.uniform("epsilon", (b.n,))
            out["penalty"] = penalties.penalty(c.penalty_kind, lambda x: self.D(x, y), x, fake, epsilon)
            loss = loss + c.penalty * out["penalty"]
        return {"loss": loss} | out

    def generator_loss(self, b: Any, s: Step) -> dict[str, Any]:
        """G's part of the loss, or the distance of mean features: ||E f(x) - E f(G(z))||^2 (Salimans, section 3.1)."""
        c, y = self.config, self._labels(b)
        k = c.generator_batch
        y = None if y is None else y.repeat(k)
        fake = self.decode(self._z(s.rng, k * b.n), y)
        if c.tricks.feature_matching:
            with torch.no_grad():
                real = self._mean(self.D.body(self.spec.scale(b.x)), s)
            loss = (real - self._mean(self.D.body(fake), s)).square().sum()
        else:
            loss = generator_loss(c.loss, self.D(fake, y))
        out: dict[str, Any] = {"loss": self._nostalgic("G", loss)}
        return out | ({"keep": {"fake": fake}} if c.updates == "simultaneous" else {})

    def _judge(self, x: Tensor, fake: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """d of both, in one pass unless D looks at a batch as a whole."""
        c = self.config
        if c.norm_D == "batch" or c.tricks.minibatch_kernels:
            return self.D(x, y), self.D(fake, y)
        d = self.D(torch.cat([x, fake]), None if y is None else y.repeat(2))
        return d[: len(x)], d[len(x) :]

    @staticmethod
    def _mean(f: Tensor, s: Step) -> Tensor:
        """The mean over the global batch: (n, features) -> (features,)."""
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        return s.total(f.sum(0)) / (len(f) * s.stride)

    def after_discriminator(self, kept: dict[str, Tensor], s: Step) -> None:
        """One power iteration where D is spectrally normalised."""
        if self.config.norm_D == "spectral":
            spectral_norm.iterate(self.D)
        self._forget("D")
        self._shown = None

    def after_generator(self, kept: dict[str, Tensor], s: Step) -> None:
        """Where the players move at once: what D is to judge."""
        self._forget("G")
        self._shown = kept.get("fake")

    def prepare(self, b: Any, s: Step) -> None:
        """Draw the reference batch, and begin the averages of weights with the first ones."""
        if R := self.config.tricks.virtual_batch_norm:
            z = self._z(s.rng.whole, R)
            classes = self.inputs - self.config.latents
            self.reference.copy_(
                torch.cat([z, torch.eye(classes)[torch.arange(R) % classes].to(z)], 1) if classes else z
            )
        if self.config.tricks.historical_averaging:
            for player in "DG":
                getattr(self, f"history_{player}").copy_(self._theta(player))

    def settle(self, rng: Rng) -> None:
        """Samples, for the batch norm of averaged weights to be measured by."""
        classes = len(self.spec.classes)
        y = rng.integers("label", classes, (rng.n,)) if self.config.conditional else None
        self.decode(self._z(rng, rng.n), y)

    def worry(self, signs: Mapping[str, float]) -> dict[str, str]:
        """A discriminator that is certain of everything, and samples that are all alike."""
        c, found = self.config, {}
        real, fake = (signs.get(f"discriminator.{key}") for key in ("real", "fake"))
        if c.loss in PROBABILITIES and real is not None and fake is not None and real - fake > CERTAIN:
            remedies = ["a smaller train.phases.discriminator.lr"]
            remedies += [] if c.norm_D == "spectral" else ["model.norm_D=spectral"]
            remedies += [] if c.tricks.smoothing else ["model.tricks.smoothing=0.1"]
            found["saturation"] = (
                f"D is certain of everything (D(x) = {real:.3f}, D(G(z)) = {fake:.3f}), G can learn little from it: "
                f"try {' or '.join(remedies)}"
            )
        if (spread := signs.get("spread", 1.0)) < ALIKE:
            remedies = ["a smaller --lr"]
            remedies += [] if c.penalty or c.tricks.minibatch_kernels else ["model.tricks.minibatch_kernels=32"]
            remedies += [] if c.penalty and c.penalty_kind == "gradient" else ["wgan-gp"]
            found["collapse"] = (
                f"samples hardly differ ({spread:.2f} of the data's standard deviation), G has collapsed: "
                f"try {' or '.join(remedies)}"
            )
        return found

    def _labels(self, b: Any) -> Tensor | None:
        return b.label.long() if self.config.conditional else None

    # ------------------------------------------------------------------ historical averaging (Salimans, section 3.3)

    def _remember(self) -> None:
        """Buffers: the reference batch, each player's mean weights and of how many updates it is the mean."""
        tricks = self.config.tricks
        if tricks.virtual_batch_norm:
            self.register_buffer("reference", torch.zeros(tricks.virtual_batch_norm, self.inputs))
        if tricks.historical_averaging:
            for player in "DG":
                self.register_buffer(f"history_{player}", self._theta(player))
                self.register_buffer(f"updates_{player}", torch.ones((), dtype=torch.long))

    def _theta(self, player: str) -> Tensor:
        """All weights of a player, flat."""
        return self._flat(player).detach()

    def _flat(self, player: str) -> Tensor:
        return torch.cat([p.reshape(-1) for p in getattr(self, player).parameters()])  # in any layout

    def _nostalgic(self, player: str, loss: Tensor) -> Tensor:
        """``loss`` + ||theta - 1/t sum_i theta[i]||^2, by its weight."""
        if not (weight := self.config.tricks.historical_averaging):
            return loss
        return loss + weight * (self._flat(player) - getattr(self, f"history_{player}")).square().sum()

    def _forget(self, player: str) -> None:
        """The mean over one update more: mean <- mean + (theta - mean) / t."""
        if self.config.tricks.historical_averaging:
            t, mean = getattr(self, f"updates_{player}"), getattr(self, f"history_{player}")
            t += 1
            mean += (self._theta(player) - mean) / t

    # ------------------------------------------------------------------ samples and latents

    def _z(self, rng: Rng, n: int) -> Tensor:
        shape = (n, self.config.latents)
        return rng.normal("z", shape) if self.config.prior == "normal" else 2 * rng.uniform("z", shape) - 1

    def prior(self, rng: Rng) -> Tensor:
        """z, ``(rng.n, latents)``."""
        return self._z(rng, rng.n)

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """G(z): ``z (n, latents)``, labels (n,) -> points, or images as floats in [-1, 1], ``(n, *shape)``."""
        y = self.one_hot(labels)
        if y is not None and self.inputs > self.config.latents:
            z = torch.cat([z, y], 1)
        R = self.config.tricks.virtual_batch_norm
        x = self.G(torch.cat([self.reference, z]), None)[R:] if R else self.G(z, labels)
        return x if self.spec.levels is None else x.tanh()

    def sample(self, rng: Rng, labels: Tensor | None = None, *, truncation: float | None = None) -> Tensor:
        """``rng.n`` samples, as :meth:`decode` gives them.

        ``truncation``: z only within +- this, by its distribution there; below 1 less varied samples, often better.
        """
        z = self.prior(rng)
        return self.decode(z if truncation is None else truncated(z, truncation, self.config.prior), labels)


def truncated(z: Tensor, within: float, prior: str) -> Tensor:
    """Noise ``z`` of any shape -> noise distributed as z given that |z| <= ``within``, a monotone function of z.

    Not drawn anew until it fits, as the paper does: the same distribution, and sample i is near what it was without.
    UsageError unless ``within`` is above 0.
    """
    if not within > 0:
        raise UsageError(f"truncation must be above 0, not {within}")
    if prior == "uniform":
        return z * min(within, 1.0)
    wide = z.double()
    inside = math.erf(within / math.sqrt(2))
    x = math.sqrt(2) * torch.erfinv(inside * torch.erf(wide / math.sqrt(2)))
    return x.clamp(-within, within).to(z.dtype)
