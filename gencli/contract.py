"""The contract between models and verbs.

A model says what data it needs (:meth:`Model.streams`), what it minimises (:meth:`Model.phases`) and what it can do
(the methods listed in :data:`CAPABILITIES`). Verbs ask for capabilities and know no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gencli import processes
from gencli.console import UsageError
from gencli.rng import Rng

__all__ = ["CAPABILITIES", "Batch", "Config", "DataSpec", "Model", "Phase", "Step", "Stream", "capabilities", "every"]

# capability -> the methods that make it
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "samples": ("sample",),
    "likelihood": ("log_prob",),
    "bounds": ("elbo", "iwae"),
    "completes": ("complete",),
    "latents": ("prior", "decode"),
    "encodes": ("encode",),
    "inverts": ("to_real", "from_real", "f", "f_inverse"),
    "features": ("features",),
    "classes": ("classify",),
    "translates": ("translate",),
    "vectors": ("vocabulary", "vectors"),
}


class DataSpec(BaseModel):
    """What a model is told of its data, and all that it may know of it.

    Raw images are uint8 or int16 arrays ``(n, C, H, W)`` of levels ``0 .. levels - 1``; raw audio is uint8
    ``(n, 1, T)`` of 256 mu-law levels, ``rate`` of them a second; raw text is uint8 or int16 ``(n, T)``, each level a
    symbol of ``vocabulary``; raw tokens are int32 ``(n, T)``, each a word of ``vocabulary``, and ``counts`` says how
    often each of them stands in train; raw points are float ``(n, D)`` with ``levels = None``. ``size`` is the number
    of training rows, None for drawn data that never ends.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["image", "points", "audio", "text", "tokens"]
    shape: tuple[int, ...]
    levels: int | None = None
    classes: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    rate: int | None = None
    size: int | None = None

    @property
    def dims(self) -> int:
        """The number of dimensions D of one example."""
        return int(torch.Size(self.shape).numel())

    def fits(self, other: DataSpec) -> bool:
        """Whether rows of ``other`` mean to a model of this what its own do."""
        return all(getattr(self, key) == getattr(other, key) for key in ("shape", "levels", "vocabulary", "rate"))

    def scale(self, x: Tensor) -> Tensor:
        """Raw levels to [-1, 1] in torch's default dtype; real-valued data passes unchanged."""
        y = x.to(torch.get_default_dtype())
        return y if self.levels is None else y * (2 / (self.levels - 1)) - 1

    def unscale(self, y: Tensor) -> Tensor:
        """[-1, 1] to the nearest raw level (uint8, or int16 above 256 levels); real-valued data passes unchanged."""
        if self.levels is None:
            return y
        x = ((y + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1)
        return x.to(torch.uint8 if self.levels <= 256 else torch.int16)


@dataclass(frozen=True)
class Stream:
    """One stream of examples that a model asks for.

    ``fields``: what each row holds ("x", "label", "pair", ...). ``rows``: which part of the data set. ``ratio``: rows
    of this stream for each row of the recipe's batch size. ``options``: wishes to the data source.
    """

    fields: tuple[str, ...] = ("x",)
    rows: Literal["all", "labelled", "unlabelled", "A", "B"] = "all"
    ratio: float = 1
    options: Mapping[str, Any] = field(default_factory=dict)


class Batch:
    """This process's rows: ``x`` (raw), ``label``, ..., ``index`` (rows in the data set) and ``n``.

    With several streams each is a Batch of its own: ``b.labelled.x``.
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:  # for type checkers, and for a clear error
        raise AttributeError(f"this batch has no {name!r}, only {', '.join(self.__dict__)}")


@dataclass
class Step:
    """Where training stands: the second argument of everything that computes.

    ``number`` counts optimiser steps from 0, ``of`` is how many the recipe asks for; ``progress = number / of`` as a
    0-d tensor, for schedules inside a loss (a Python number would recompile every step). ``lr`` is the recipe's
    learning rate at this step, for an ``after`` that takes its own. The methods speak for all processes, in global
    order, and are differentiable to any order.
    """

    number: int
    of: int
    rng: Rng
    progress: Tensor
    repeat: int = 0
    offset: int = 0
    stride: int = 1
    lr: float = 0.0

    def mine(self, x: Tensor) -> Tensor:
        """My rows of something that covers the global batch."""
        return x[self.offset :: self.stride]

    def gather(self, x: Tensor) -> Tensor:
        """The global batch's rows of something that I hold my rows of."""
        return x if self._alone() else processes.gather(x)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes of something that each has summed over its rows."""
        return x if self._alone() else processes.total(x)

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean over the global batch (over its masked rows), scaled so that the trainer's average is right."""
        if mask is None:
            return x.mean()
        mask = mask.to(x.dtype)
        return (x * mask).sum() * self.stride / self.total(mask.sum()).clamp_min(1)

    def _alone(self) -> bool:
        """Whether I hold the whole batch; UsageError if nobody can: micro-batches come one after another."""
        if self.stride not in (1, processes.world()):
            raise UsageError("this model couples the examples of a batch: train.accumulate must be 1")
        return self.stride == 1


Loss = Callable[[Any, Step], dict[str, Any]]
After = Callable[[dict[str, Tensor], Step], None]


@dataclass
class Phase:
    """One player's move in a step: minimise ``loss`` over ``parameters``.

    ``parameters``: a module, a list of modules, or groups ``{"params": module, "lr": multiple}``; ``[]`` is a phase
    without gradient. ``loss(b, s)`` returns ``{"loss": scalar, ...}``: other scalars are logged, ``"keep"`` maps names
    to rows that ``after(kept, s)`` receives from the whole global batch, detached; only ``after`` may write state.
    ``optimizer`` names the phase whose optimiser this one shares. ``repeat``: a number, or step number -> number
    (0 = not at this step). ``batch``: ``{stream: rows}`` instead of every stream at the recipe's size.
    """

    name: str
    parameters: Any
    loss: Loss
    after: After | None = None
    optimizer: str | None = None
    repeat: int | Callable[[int], int] = 1
    batch: Mapping[str, int] | None = None
    compile: bool = True

    def times(self, step: int) -> int:
        """How often this phase runs at step ``step``."""
        return self.repeat(step) if callable(self.repeat) else self.repeat


def every(k: int) -> Callable[[int], int]:
    """A ``repeat`` for lazy phases: once at steps 0, k, 2k, ..."""
    return lambda step: int(step % k == 0)


class Config(BaseModel):
    """Base of every model's ``Config``: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(nn.Module):
    """Base of every model. One objective needs ``loss`` alone; a game lists phases."""

    Config: ClassVar[type[Config]] = Config
    if TYPE_CHECKING:  # capabilities are methods that a model has or lacks
        sample: Callable[..., Tensor]
        log_prob: Callable[..., Tensor]
        elbo: Callable[..., Tensor]
        iwae: Callable[..., Tensor]
        complete: Callable[..., Tensor]
        prior: Callable[..., Tensor]
        decode: Callable[..., Tensor]
        encode: Callable[..., Tensor]
        to_real: Callable[..., tuple[Tensor, Tensor]]
        f: Callable[..., tuple[Tensor, Tensor]]
        f_inverse: Callable[..., Tensor]
        from_real: Callable[..., Tensor]
    # what log_prob returns, named wherever the number is printed
    likelihood: ClassVar[Literal["exact", "lower bound", "estimate", "density"] | None] = None
    # examples a sampler or an evaluation computes at once; part of the checkpoint, since bits depend on it
    chunk: ClassVar[int] = 64

    def __init__(self, config: Any, spec: DataSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec

    @classmethod
    def streams(cls, config: Any) -> dict[str, Stream]:
        """What this model needs of its data: by default x, and labels too where ``model.conditional`` is on."""
        return {"x": Stream(("x", "label") if getattr(config, "conditional", False) else ("x",))}

    @property
    def conditional(self) -> bool:
        """Whether training, likelihood, samples and latents are told the class."""
        return bool(getattr(self.config, "conditional", False))

    def phases(self) -> list[Phase]:
        """The moves of one step, in order."""
        return [Phase("model", self, self.loss)]

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """The objective of a model that has just one."""
        raise NotImplementedError

    def prepare(self, b: Any, s: Step) -> None:
        """Called once before the first step with a global batch: data-dependent initialisation."""

    def settle(self, rng: Rng) -> None:
        """Pass ``rng.n`` fresh examples through :meth:`averaged`, in training mode: what batch norm is measured by.

        The statistics of averaged weights are no averages of those that the weights had on their way. A model whose
        averaged part has batch norm and needs no data gives this; without it the running averages stay.
        """

    def worry(self, signs: Mapping[str, float]) -> dict[str, str]:
        """What seems to go wrong, each with a line that says what to try: told once in a run.

        ``signs``: means of what was logged, by its names there; or of samples their ``spread``, a share of the data's.
        """
        return {}

    def averaged(self) -> nn.Module | Sequence[nn.Module | nn.Parameter]:
        """The part whose parameters are averaged over steps (``train.ema``)."""
        return self


def capabilities(model: type[Model] | Model) -> list[str]:
    """The capabilities that ``model`` has the methods for."""
    return [name for name, methods in CAPABILITIES.items() if all(hasattr(model, m) for m in methods)]


def modules(parameters: Any) -> Iterator[tuple[nn.Module | nn.Parameter, float]]:
    """The (module or parameter, lr multiple) pairs of a ``Phase.parameters``."""
    for part in parameters if isinstance(parameters, (list, tuple)) else [parameters]:
        if isinstance(part, dict):
            for module, _ in modules(part["params"]):
                yield module, part.get("lr", 1.0)
        else:
            yield part, 1.0
