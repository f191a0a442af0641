"""One step after another: phases, gradients, optimisers, averages. No files, no console: see ``session``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gencli import processes
from gencli.console import DataError, Diverged, UsageError
from gencli.contract import Model, Phase, Step, modules
from gencli.nn.norm import BatchNorm
from gencli.rng import Keys, using
from gencli.training import optimisers
from gencli.training.batches import Batches

__all__ = ["Trainer"]

SETTLING = 20  # batches that the batch norm of averaged weights is measured by


@dataclass
class _Player:
    """A phase with what the trainer adds to it."""

    phase: Phase
    part: Any
    parameters: list[nn.Parameter]
    call: Callable[..., dict[str, Any]]
    optimizer: str | None
    taken: int = 0


def _parameters(thing: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(thing.parameters()) if isinstance(thing, nn.Module) else [thing]


def _like(p: nn.Parameter, value: Tensor) -> Tensor:
    """A copy of ``value`` where ``p`` lies and, if of its shape, laid out alike: fused kernels pair up raw memory."""
    if value.shape != p.shape:
        return value.to(p.device, copy=True)
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


class Trainer:
    """Trains ``model`` on ``batches`` as ``train`` (a recipe's train part) says.

    After any number of steps its state (``tensors()``, ``facts()``) is all that the next step depends on.
    """

    def __init__(self, model: Model, train: Any, batches: Batches, *, seed: int, device: torch.device) -> None:
        self.model, self.train, self.batches, self.device = model, train, batches, device
        self.keys = Keys(seed, device)
        self.number = 0
        self.ema: dict[str, Tensor] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.players = [self._player(p) for p in model.phases()]
        unknown = set(train.phases) - {p.phase.name for p in self.players}
        if unknown:
            have = ", ".join(p.phase.name for p in self.players)
            raise UsageError(f"train.phases names {sorted(unknown)[0]!r}; this model's phases are {have}")
        self._common = False
        if train.hogwild:
            self._check_hogwild()
        for player in self.players:
            batches.sizes(player.phase, processes.world() * train.accumulate)

    def _check_hogwild(self) -> None:
        why = ""
        if self.optimizers:
            why = "has an optimiser"
        elif self.device.type != "cpu":
            why = f"is on {self.device}"
        elif not processes.on_one_machine():
            why = "is on several machines"
        if why:
            hint = "it is for models that write the rows a batch names, such as word2vec, on one machine's CPU"
            raise UsageError(f"train.hogwild: {type(self.model).__name__} {why}", hint=hint)
        for key, value in (("accumulate", 1), ("deterministic", False), ("ema", None)):
            if getattr(self.train, key) != value:
                raise UsageError(f"train.{key} goes not with train.hogwild, where no process waits for another")

    def _player(self, phase: Phase) -> _Player:
        part = self.train.phase(phase.name)
        groups: list[dict[str, Any]] = []
        own: dict[int, nn.Parameter] = {}  # tied weights are met twice
        for thing, multiple in modules(phase.parameters):
            new = {id(p): p for p in _parameters(thing) if p.requires_grad and id(p) not in own}
            groups.append({"params": list(new.values()), "multiple": multiple})
            own |= new
        optimizer = (phase.optimizer or phase.name) if own else None
        if phase.optimizer:
            if phase.optimizer not in self.optimizers:
                raise ValueError(
                    f"phase {phase.name!r} shares the optimiser of {phase.optimizer!r}, no phase before it"
                )
            shared = {id(p) for g in self.optimizers[phase.optimizer].param_groups for p in g["params"]}
            if not own.keys() <= shared:
                raise ValueError(
                    f"phase {phase.name!r}: its parameters are not all in the optimiser of {phase.optimizer!r}"
                )
            said = self.train.phases.get(phase.name)
            for key in ("optimizer", "betas", "momentum", "weight_decay"):
                if getattr(said, key, None) is not None:
                    raise UsageError(
                        f"train.phases.{phase.name}.{key}: this phase shares the optimiser of {phase.optimizer!r}, "
                        f"whose {key} counts"
                    )
        elif own:
            self.optimizers[phase.name] = optimisers.build(groups, part)
        call = torch.compile(phase.loss) if self.train.compile and phase.compile and own else phase.loss
        return _Player(phase, part, list(own.values()), call, optimizer)

    # ------------------------------------------------------------------ one step

    def step(self) -> dict[str, float]:
        """One step of every phase; the scalars that the losses returned, named ``phase.key`` where phases are many.

        Raises Diverged before any parameter is touched by a loss or gradient that is not finite.
        """
        if self.number == 0 and not self.ema:
            self._prepare()
        if self.train.hogwild and not self._common:
            self._common = True
            for p in self.model.parameters():
                p.data = processes.in_common(p.data)
        if not self.model.training:  # it visits every module
            self.model.train()
        logs: dict[str, float] = {}
        try:
            for player in self.players:
                for repeat in range(player.phase.times(self.number)):
                    for name, value in self._run(player, repeat).items():
                        logs[name if len(self.players) == 1 else f"{player.phase.name}.{name}"] = value
        finally:
            for p in self.trainable:
                p.requires_grad_(True)
        self._average()
        self.keys.forget()
        self.number += 1
        return logs

    def _step(self, phase: str, repeat: int, *scope: object, offset: int, stride: int) -> Step:
        rng = self.keys.open(phase, self.number, repeat, *scope, offset=offset, stride=stride)
        rng.n = self.train.batch_size // stride
        progress = torch.tensor(self.number / self.train.steps)
        part = next((p.part for p in self.players if p.phase.name == phase), self.train)
        lr = part.lr * optimisers.factor(part.schedule, self.train, self.number)
        if self.train.hogwild:  # each process goes on by itself, with its own rows
            offset, stride = 0, 1
        return Step(self.number, self.train.steps, rng, progress, repeat, offset, stride, lr)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.train.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _run(self, player: _Player, repeat: int) -> dict[str, float]:
        phase, accumulate = player.phase, self.train.accumulate
        members = {id(p) for p in player.parameters}
        for p in self.trainable:
            p.requires_grad_(id(p) in members)
        outs: list[dict[str, Any]] = []
        for part in range(accumulate):
            offset, stride = processes.rank() + processes.world() * part, processes.world() * accumulate
            s = self._step(phase.name, repeat, offset=offset, stride=stride)
            b = self.batches.get(phase, player.taken, offset, stride)
            with using(s), self._autocast(), torch.set_grad_enabled(bool(player.parameters)):
                out = player.call(b, s)
            if player.parameters:
                (out["loss"] / accumulate).backward()
            outs.append(out | {"keep": {name: rows.detach() for name, rows in out.get("keep", {}).items()}})
        player.taken += 1
        logs = self._update(player, outs)
        if phase.after is not None:
            kept = {name: self._global([o["keep"][name] for o in outs]) for name in outs[0]["keep"]}
            s = self._step(phase.name, repeat, "after", offset=0, stride=1)
            with torch.no_grad(), using(s):
                phase.after(kept, s)
        return logs

    def _global(self, parts: list[Tensor]) -> Tensor:
        """The rows of all micro-batches and processes, in global order, no less exact than the state they go into."""
        x = torch.stack(parts, 1).flatten(0, 1) if len(parts) > 1 else parts[0]
        if x.is_floating_point():
            x = x.to(torch.promote_types(x.dtype, torch.get_default_dtype()))
        return x if self.train.hogwild else processes.gather(x)

    def _update(self, player: _Player, outs: list[dict[str, Any]]) -> dict[str, float]:
        """Average the gradients over processes, check that all is finite, clip, and take the optimiser's step."""
        names = [k for k, v in outs[0].items() if k != "keep" and (not torch.is_tensor(v) or v.dim() == 0)]
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        values = torch.zeros(0, device=self.device, dtype=exact)
        if names:
            with torch.no_grad():  # few operations: to start them takes a tenth of a small model's step
                rows = [torch.stack([torch.as_tensor(o[k], device=self.device) for k in names]).to(exact) for o in outs]
                values = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
        live = [p for p in player.parameters if p.grad is not None]
        grads = [p.grad for p in live if p.grad is not None]
        if processes.world() > 1 and not self.train.hogwild:
            processes.average(grads)
            values = processes.total(values) / processes.world() if names else values
        norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=self.device)]
        *numbers, size = torch.cat([values, torch.stack(norms).norm().reshape(1)]).tolist()
        logs = dict(zip(names, numbers))
        where = f"{player.phase.name} at step {self.number}"
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise Diverged(f"the loss of {where} is {logs['loss']}", hint="try a smaller --lr, or train.clip=1")
        if not math.isfinite(size):
            raise Diverged(f"the gradient of {where} is not finite", hint="try a smaller --lr, or train.clip=1")
        if player.optimizer is not None and live:
            clip = player.part.clip
            if clip is not None and size > clip:
                torch._foreach_mul_(grads, clip / size)
            optimizer = self.optimizers[player.optimizer]
            rate = player.part.lr * optimisers.factor(player.part.schedule, self.train, self.number)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            optimizer.step()
            logs["lr"] = rate
            logs["gradient_norm"] = size
        for p in player.parameters:
            p.grad = None
        return logs

    # ------------------------------------------------------------------ before the first step, and averages

    def _prepare(self) -> None:
        """Data-dependent initialisation on the global batch, the same on every process, and the first averages."""
        phase = Phase("prepare", [], self.model.loss)
        s = self._step("prepare", 0, offset=0, stride=1)
        with torch.no_grad(), using(s):
            self.model.train()
            self.model.prepare(self.batches.get(phase, 0), s)
        for value in self.model.state_dict().values():
            processes.spread(value)
        if self.train.ema is not None:
            self.ema = {name: p.detach().clone() for name, p in self._averaged()}

    def _averaged(self) -> list[tuple[str, nn.Parameter]]:
        inside = {id(p) for thing, _ in modules(self.model.averaged()) for p in _parameters(thing)}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) in inside]

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            # the first averages would otherwise be the random initialisation for 1 / (1 - ema) steps
            decay = min(self.train.ema, (1 + self.number) / (10 + self.number))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for _, p in self._averaged()], 1 - decay)

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, with the batch-norm statistics that are theirs: what a checkpoint holds of them."""
        if not (names := self._statistics()):
            return self.ema
        with self.evaluating():
            return self.ema | {name: value.clone() for name, value in names.items()}

    def _settling(self) -> list[tuple[str, BatchNorm]]:
        """The batch norms of the averaged part, if its statistics are to be measured anew."""
        if not self.ema or type(self.model).settle is Model.settle:
            return []
        inside = {
            id(m)
            for thing, _ in modules(self.model.averaged())
            if isinstance(thing, nn.Module)
            for m in thing.modules()
        }
        return [(n, m) for n, m in self.model.named_modules() if isinstance(m, BatchNorm) and id(m) in inside]

    def _statistics(self) -> dict[str, Tensor]:
        """Their running averages, by name."""
        return {f"{n}.{key}": getattr(m, key) for n, m in self._settling() for key in ("running_mean", "running_var")}

    @torch.no_grad()
    def _settle(self) -> None:
        """Measure them as the plain mean over ``SETTLING`` batches, the same ones each time, on each process alone."""
        norms = [m for _, m in self._settling()]
        if not norms:
            return
        momenta = [m.momentum for m in norms]
        self.model.train()
        try:
            for k in range(SETTLING):
                for norm in norms:
                    norm.momentum = 1 / (k + 1)
                rng = Keys(self.keys.seed, self.device).open("settle", k)
                rng.n = self.train.batch_size
                with using(Step(self.number, self.train.steps, rng, torch.tensor(self.number / self.train.steps))):
                    self.model.settle(rng)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum

    @contextmanager
    def evaluating(self) -> Iterator[Model]:
        """The model in evaluation mode with its averaged weights, and as it was afterwards."""
        own: dict[str, Tensor] = dict(self._averaged()) if self.ema else {}
        own |= self._statistics()
        raw = {name: p.detach().clone() for name, p in own.items()}
        try:
            with torch.no_grad():
                for name, average in self.ema.items():
                    own[name].copy_(average)
            self._settle()
            self.model.eval()
            yield self.model
        finally:
            with torch.no_grad():
                for name, p in own.items():
                    p.copy_(raw[name])
            self.model.train()

    # ------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """The optimisers' state, named ``optimizer/<optimiser>/<parameter>/<key>``."""
        state = {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    for key, value in optimizer.state.get(p, {}).items():
                        if value is not None:
                            state[f"optimizer/{name}/{self.names[id(p)]}/{key}"] = torch.as_tensor(value)
        return state

    def digest(self) -> bytes:
        """A hash of the weights and buffers, by which processes find that they hold the same."""
        found = hashlib.blake2b(digest_size=16)
        for name, value in self.model.state_dict().items():
            found.update(name.encode())
            found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.digest()

    def facts(self) -> dict[str, Any]:
        """What else the next step depends on, as JSON."""
        return {"step": self.number, "taken": {p.phase.name: p.taken for p in self.players}}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any], ema: dict[str, Tensor]) -> None:
        """Go on from ``tensors()`` and ``facts()`` (the model's own weights are loaded by the caller)."""
        self.number = facts["step"]
        for player in self.players:
            player.taken = facts["taken"][player.phase.name]
        if self.train.ema is not None and ema:
            self.ema = {name: _like(p, ema[name]) for name, p in self._averaged()}
        states: dict[str, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            owner, _, key = full.rpartition("/")
            states.setdefault(owner, {})[key] = value
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    # only fused kernels count their steps on the device
                    here = set() if group.get("fused") else {"step"}
                    if state := states.pop(f"optimizer/{name}/{self.names[id(p)]}", None):
                        optimizer.state[p] = {
                            k: v.to("cpu", copy=True) if k in here else _like(p, v) for k, v in state.items()
                        }
        if states:
            raise DataError(f"training state {sorted(states)[0]!r} belongs to no parameter of this model")
