"""The contract's promises, kept by every system of ``contract_cases``: exact resume, silent evaluation, ..."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from gencli import sampling
from gencli.console import DataError, Diverged, UsageError
from gencli.contract import Model, Phase, Step, Stream
from gencli.metrics import likelihood
from gencli.recipe import TrainPart
from gencli.rng import Keys, SampleRng, seeded
from gencli.training import optimisers
from gencli.training.batches import Batches, match
from gencli.training.trainer import Trainer
from tests.contract_cases import CASES, Case, Source, images, points

CPU = torch.device("cpu")
N = 9  # steps before the interruption, and after it
EVERY = pytest.mark.parametrize("name", CASES)
UNCOUPLED = [name for name, case in CASES.items() if not case.coupled]
COUPLED = [name for name, case in CASES.items() if case.coupled]


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start(case: Case, init: int = 0, **train: Any) -> Trainer:
    """A trainer of ``case``; ``init`` chooses the first weights."""
    source = case.source()
    with seeded(init, "init"):
        model = case.model(None, source.spec)
    part = TrainPart.model_validate({"steps": 2 * N, "batch_size": 8, "lr": 2e-3, **case.train, **train})
    batches = Batches(
        source, case.model.streams(None), seed=0, size=part.batch_size, device=CPU, channels_last=part.channels_last
    )
    return Trainer(model, part, batches, seed=0, device=CPU)


def run(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return [trainer.step() for _ in range(steps)]


def written(trainer: Trainer) -> tuple[bytes, bytes, bytes, str]:
    """All that a checkpoint would hold."""
    parts = (trainer.model.state_dict(), trainer.ema, trainer.tensors())
    weights, ema, state = (
        save({k: v.clone(memory_format=torch.contiguous_format) for k, v in p.items()}) for p in parts
    )
    return weights, ema, state, json.dumps(trainer.facts())


def read(trainer: Trainer, checkpoint: tuple[bytes, bytes, bytes, str]) -> None:
    weights, ema, state, facts = checkpoint
    trainer.model.load_state_dict(load(weights))
    trainer.restore(load(state), json.loads(facts), load(ema))


def assert_same(a: Trainer, b: Trainer) -> None:
    """Equal weights, buffers, averages and optimisers, to the bit."""
    parts = [(t.model.state_dict(), t.ema, t.tensors()) for t in (a, b)]
    for x, y in zip(*parts):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key
    assert a.facts() == b.facts()


def interrupted(case: Case, **train: Any) -> None:
    """2N steps equal N steps, a checkpoint, and N steps of a trainer built from other weights."""
    whole = start(case, **train)
    logs = run(whole, 2 * N)
    first = start(case, **train)
    before = run(first, N)
    checkpoint = written(first)
    torch.manual_seed(5)
    np.random.seed(5)
    second = start(case, init=1, **train)
    read(second, checkpoint)
    torch.rand(7)
    assert before + run(second, N) == logs
    assert_same(whole, second)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def watch(trainer: Trainer, look: Callable[[str, Any, Step], None]) -> None:
    """Call ``look(phase, b, s)`` before every loss."""
    for player in trainer.players:

        def call(b: Any, s: Step, name: str = player.phase.name, loss: Any = player.call) -> dict[str, Any]:
            look(name, b, s)
            return loss(b, s)

        player.call = call


# ---------------------------------------------------------------------------------------------------- exact resume


@EVERY
def test_interrupted_run_ends_in_the_same_bits(name):
    interrupted(CASES[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamax", "rmsprop"])
def test_every_optimiser_resumes(optimizer):
    settings = {"optimizer": optimizer, "weight_decay": 0.01, "momentum": 0.9, "clip": 1.0, "schedule": "cosine"}
    interrupted(CASES["dropout-vae"], **settings)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"accumulate": 4}, {"momentum": 0.0, "optimizer": "sgd"}])
def test_every_setting_resumes(settings):
    interrupted(CASES["dropout-vae"], **settings)


class Convolutions(Model):
    """Kernels whose memory is laid out by channels last, which a file does not know."""

    def __init__(self, config: Any, spec: Any) -> None:
        super().__init__(config, spec)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        x = self.spec.scale(b.x)
        return {"loss": (self.net(x + s.rng.normal("noise", x.shape)) - x).square().mean()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamax"])
def test_channels_last_resumes(optimizer):
    case = Case(Convolutions, images, {"channels_last": True, "ema": 0.9, "momentum": 0.9, "optimizer": optimizer})
    interrupted(case)
    trainer = start(case)
    run(trainer, 1)
    assert trainer.batches.get(trainer.players[0].phase, 0).x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamax"])
def test_a_restored_trainer_shares_no_memory(optimizer):
    settings = {"optimizer": optimizer, "momentum": 0.9}
    first, second = (start(CASES["dropout-vae"], **settings) for _ in range(2))
    run(first, 3)
    before = written(first)
    second.restore(first.tensors(), first.facts(), first.ema)
    run(second, 2)
    assert written(first) == before


def test_state_of_another_model_is_refused():
    trainer = start(CASES["wgan"])
    run(trainer, 1)
    state = trainer.tensors()
    state["optimizer/critic/h/weight/exp_avg"] = torch.zeros(1)
    with pytest.raises(DataError, match="h/weight"):
        start(CASES["wgan"]).restore(state, trainer.facts(), trainer.ema)


# ---------------------------------------------------------------------------------------------------- evaluation


@EVERY
def test_looking_at_the_model_changes_no_bit(name):
    case = CASES[name]
    blind, seen = start(case), start(case)
    logs = run(blind, 2 * N)
    source, seen_logs = case.source(), []
    x = source.rows(torch.arange(6))["x"]
    for step in range(2 * N):
        seen_logs += run(seen, 1)
        raw = weights(seen.model)
        with seen.evaluating() as model:
            assert not model.training
            if seen.ema:
                swapped = dict(model.named_parameters())
                assert all(torch.equal(swapped[k], v) for k, v in seen.ema.items())
            if hasattr(model, "sample"):
                list(sampling.draw(model, 3, chunk=4))
            if model.likelihood and step % 6 == 0:
                likelihood.nll(model, source, limit=20)
            with sampling.scope(SampleRng(0, range(6))) as rng:
                for method in (m for m in ("classify", "features") if hasattr(model, m)):
                    getattr(model, method)(x)
                if hasattr(model, "translate"):
                    model.translate(x, rng, "AB")
        assert all(torch.equal(raw[k], v) for k, v in seen.model.state_dict().items())
        assert seen.model.training
    assert seen_logs == logs
    assert_same(blind, seen)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if hasattr(case.model, "sample")])
def test_a_sample_does_not_depend_on_how_many(name):
    trainer = start(CASES[name])
    run(trainer, 2)
    chunk = 8
    with trainer.evaluating() as model:
        longest = np.concatenate([s.x for s in sampling.draw(model, 2 * chunk + 1, chunk=chunk)])
        for n in (1, 3, chunk, chunk + 1):
            parts = [s.x for s in sampling.draw(model, n, chunk=chunk)]
            assert np.array_equal(np.concatenate(parts), longest[:n])
        assert not np.array_equal(longest[:chunk], longest[chunk : 2 * chunk])
        other = next(iter(sampling.draw(model, chunk, seed=1, chunk=chunk))).x
        assert not np.array_equal(longest[:chunk], other)


# ---------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("name", UNCOUPLED)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up(float64, name, parts):
    whole, split = start(CASES[name]), start(CASES[name], accumulate=parts)
    for a, b in zip(run(whole, 2 * N), run(split, 2 * N)):
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)
    for key, value in whole.model.state_dict().items():
        assert (value - split.model.state_dict()[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_refuse_micro_batches(name):
    trainer = start(CASES[name], accumulate=2)
    before = weights(trainer.model)
    with pytest.raises(UsageError, match=r"^this model couples the examples of a batch: train.accumulate must be 1$"):
        trainer.step()
    assert all(torch.equal(before[k], p) for k, p in trainer.model.named_parameters())


def test_global_batch_of_a_step():
    keys, x = Keys(0), torch.arange(6.0)
    part = Step(0, 1, keys.open("a", offset=1, stride=3), torch.tensor(0.0), offset=1, stride=3)
    assert part.mine(x).tolist() == [1, 4]
    whole = Step(0, 1, keys.open("a"), torch.tensor(0.0))
    assert whole.gather(x) is x
    assert whole.total(x) is x
    assert whole.mean(x, x > 3).item() == 4.5
    assert whole.mean(x, x > 9).item() == 0
    for method in (part.gather, part.total):
        with pytest.raises(UsageError, match=r"train\.accumulate"):
            method(x)


# ---------------------------------------------------------------------------------------------------- phases


@EVERY
def test_phases_touch_their_own_parameters(name):
    case = CASES[name]
    trainer = start(case)
    model, names = trainer.model, trainer.names
    own = {p.phase.name: {names[id(q)] for q in p.parameters} for p in trainer.players}
    graded: dict[str, set[str]] = {phase: set() for phase in own}
    now = [""]

    def look(phase: str, b: Any, s: Step) -> None:
        now[0] = phase
        assert {n for n, p in model.named_parameters() if p.requires_grad} == own[phase]
        assert all(p.grad is None for p in model.parameters())
        assert torch.is_grad_enabled() == bool(own[phase])

    def stepping(*_: Any) -> None:
        reached = {n for n, p in model.named_parameters() if p.grad is not None}
        assert reached <= own[now[0]]
        graded[now[0]] |= reached

    watch(trainer, look)
    for optimizer in trainer.optimizers.values():
        optimizer.register_step_pre_hook(stepping)
    trainer.step()
    first = weights(model)
    run(trainer, 2 * N - 1)
    # the last bias is no part of an input's gradient, nor of a difference of two outputs
    free = {"verdict.bias"}
    still = ["f.2.bias"] if name == "wgan" else []
    for phase, names_of in own.items():
        assert names_of - graded[phase] == (free if phase == "r1" else set()), phase
    assert [n for n, p in model.named_parameters() if torch.equal(p, first[n])] == still
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_prepare_runs_once_and_before_the_averages():
    trainer = start(CASES["glow"])
    calls, prepare = [], trainer.model.prepare

    def counted(b: Any, s: Step) -> None:
        prepare(b, s)
        calls.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        assert (s.number, b.n) == (0, 8)

    trainer.model.prepare = counted
    run(trainer, 1)
    # one step after, the average is 1/10 of what prepare left and 9/10 of what the step made of it
    for key, value in trainer.ema.items():
        expected = 0.1 * calls[0][key] + 0.9 * dict(trainer.model.named_parameters())[key]
        torch.testing.assert_close(value, expected.detach())
    resumed = start(CASES["glow"], init=1)
    resumed.model.prepare = counted
    read(resumed, written(trainer))
    run(trainer, 2)
    run(resumed, 2)
    assert len(calls) == 1


class Two(Model):
    """A loss linear in two numbers, with the gradient (3, 4) of length 5; ``frozen`` never learns."""

    def __init__(self, config: Any, spec: Any) -> None:
        super().__init__(config, spec)
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.layout: Callable[[Two], list[Phase]] = lambda m: [Phase("model", m, m.loss)]

    def phases(self) -> list[Phase]:
        return self.layout(self)

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        return {"loss": 3 * self.a.weight.sum() + 4 * self.b.weight.sum() + self.frozen.sum()}


def two(layout: Callable[[Two], list[Phase]] | None = None, **train: Any) -> Trainer:
    source = points()
    with seeded(0, "two"):
        model = Two(None, source.spec)
    model.layout = layout or model.layout
    part = TrainPart.model_validate({"steps": 10, "batch_size": 4, "optimizer": "sgd", "lr": 0.5, **train})
    batches = Batches(source, Two.streams(None), seed=0, size=4, device=CPU, channels_last=False)
    return Trainer(model, part, batches, seed=0, device=CPU)


def moved(trainer: Trainer) -> list[float]:
    """How far a, b and the frozen number go in one step."""
    before = [p.item() for p in trainer.model.parameters()]
    trainer.logs = trainer.step()
    return [p.item() - old for p, old in zip(trainer.model.parameters(), before)]


def test_rates_multiples_and_clipping():
    frozen, a, b = 0.0, -0.5 * 3, -0.5 * 4
    assert moved(two()) == pytest.approx([frozen, a, b])
    assert moved(two(clip=1.0)) == pytest.approx([frozen, a / 5, b / 5])
    assert moved(two(clip=6.0)) == pytest.approx([frozen, a, b])
    multiples = two(lambda m: [Phase("model", [{"params": m.a, "lr": 0.1}, {"params": [m.b], "lr": 2}], m.loss)])
    assert moved(multiples) == pytest.approx([frozen, a / 10, 2 * b])
    assert multiples.logs == pytest.approx({"loss": multiples.logs["loss"], "lr": 0.5, "gradient_norm": 5})
    games = lambda m: [Phase("first", m.a, m.loss), Phase("second", m.b, m.loss)]  # noqa: E731
    assert moved(two(games, phases={"second": {"lr": 0.25}})) == pytest.approx([frozen, a, b / 2])
    assert moved(two(games, phases={"second": {"clip": 1.0}}, schedule="linear", warmup=5)) == pytest.approx(
        [frozen, a / 5, b / 4 / 5]
    )
    assert moved(two(games, phases={"first": {"optimizer": "adam"}})) == pytest.approx([frozen, -0.5, b])


def test_tied_weights_are_one_parameter():
    trainer = two(lambda m: [Phase("model", [m.a, m, m.a], m.loss)])
    assert moved(trainer) == pytest.approx([0, -1.5, -2])


def test_phases_that_contradict_each_other_are_refused():
    both = lambda m: Phase("first", [m.a, m.b], m.loss)  # noqa: E731
    trainer = two(lambda m: [both(m), Phase("second", m.b, m.loss, optimizer="first")])
    assert list(trainer.optimizers) == ["first"]
    assert moved(trainer) == pytest.approx([0, -1.5, -4])
    with pytest.raises(ValueError, match="'second': its parameters are not all in the optimiser of 'first'"):
        two(lambda m: [Phase("first", m.a, m.loss), Phase("second", m, m.loss, optimizer="first")])
    with pytest.raises(ValueError, match="'second' shares the optimiser of 'frist'"):
        two(lambda m: [both(m), Phase("second", m.b, m.loss, optimizer="frist")])
    with pytest.raises(UsageError, match=r"train.phases names 'critic'; this model's phases are model"):
        two(phases={"critic": {"lr": 1.0}})
    with pytest.raises(UsageError, match=r"train.phases.second.betas: .*'first'"):
        layout = lambda m: [both(m), Phase("second", m.b, m.loss, optimizer="first")]  # noqa: E731
        two(layout, phases={"second": {"betas": [0.5, 0.9]}})


# ---------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("bad", ["loss", "gradient", "one micro-batch"])
def test_divergence_stops_before_any_parameter_moves(bad):
    snapshots: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def spoiled(model: Two, s: Step) -> dict[str, Any]:
        loss = model.loss(None, s)["loss"]
        if s.number < 2 or (bad == "one micro-batch" and s.offset == 0):
            return {"loss": loss}
        if bad == "gradient":  # 0 times infinity
            return {"loss": loss + (0 * model.b.weight).sqrt().sum()}
        return {"loss": loss * math.inf}

    def remember(kept: dict[str, Tensor], s: Step) -> None:
        snapshots.append((weights(trainer.model), {k: v.clone() for k, v in trainer.tensors().items()}))

    layout = lambda m: [  # noqa: E731
        Phase("first", m.a, m.loss, after=remember),
        Phase("second", m.b, lambda b, s: spoiled(m, s)),
    ]
    trainer = two(layout, optimizer="adam", accumulate=2, ema=0.9)
    run(trainer, 2)
    ema = {k: v.clone() for k, v in trainer.ema.items()}
    with pytest.raises(Diverged, match="second at step 2") as caught:
        trainer.step()
    assert caught.value.exit_code == 4
    assert ("gradient" in str(caught.value)) == (bad == "gradient")
    for before, after in zip(snapshots[-1], (trainer.model.state_dict(), trainer.tensors())):
        assert all(torch.equal(before[k], v) for k, v in after.items())
    assert all(torch.equal(ema[k], v) for k, v in trainer.ema.items())
    assert trainer.number == 2


# ---------------------------------------------------------------------------------------------------- averages, rates


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_averages_have_their_closed_form(float64, decay):
    trainer = start(CASES["dropout-vae"], ema=decay)
    path = [weights(trainer.model)]
    for _ in range(2 * N):
        trainer.step()
        path.append(weights(trainer.model))
    d = [min(decay, (1 + t) / (10 + t)) for t in range(2 * N)]
    assert d[0] == 0.1
    assert (d[-1] == decay) == (decay == 0.5)
    share = [math.prod(d), *[(1 - d[t]) * math.prod(d[t + 1 :]) for t in range(2 * N)]]
    assert sum(share) == pytest.approx(1)
    for key, value in trainer.ema.items():
        torch.testing.assert_close(value, sum(w * p[key] for w, p in zip(share, path)), rtol=0, atol=1e-13)


def test_only_the_averaged_part_is_averaged():
    trainer = start(CASES["wgan"])
    run(trainer, 1)
    assert all(name.startswith("G.") for name in trainer.ema)
    assert len(trainer.ema) == 4


@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_have_their_closed_form(warmup):
    train = TrainPart(steps=25, warmup=warmup, decay=0.9)
    for step in range(25):
        ramp = (step + 1) / warmup if step < warmup else 1
        left = max(0, step - warmup) / (25 - warmup)
        factor = functools.partial(optimisers.factor, train=train, step=step)
        assert factor("constant") == pytest.approx(ramp)
        assert factor("linear") == pytest.approx(ramp * (1 - left))
        assert factor("cosine") == pytest.approx(ramp * math.cos(math.pi * left / 2) ** 2)
        assert factor("exponential") == pytest.approx(ramp * 0.9**step)
        assert factor("linear") > 0  # the last step still learns


# ---------------------------------------------------------------------------------------------------- randomness


def test_no_two_losses_share_their_numbers():
    seen: list[tuple[int, ...]] = []
    trainer = start(CASES["wgan"])
    watch(trainer, lambda phase, b, s: seen.append((*s.rng.key.tolist(), s.number, s.repeat)))
    after: list[tuple[int, ...]] = []
    critic = trainer.players[0].phase
    clip = critic.after
    critic.after = lambda kept, s: (after.append(tuple(s.rng.key.tolist())), clip(kept, s))
    run(trainer, 4)
    assert len(seen) == 3 * 6 + 2 + 4
    assert len({key[:2] for key in seen} | set(after)) == len(seen) + len(after)
    keys = Keys(0)
    draws = [keys.open(*scope).normal("z", (4,)) for scope in (("critic", 0, 0), ("critic", 0, 1), ("generator", 0, 0))]
    draws.append(keys.open("critic", 1, 0).normal("z", (4,)))
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_a_scope_opens_once():
    keys = Keys(0)
    keys.open("critic", 3, 0)
    keys.open("critic", 3, 0, offset=1, stride=2)
    with pytest.raises(RuntimeError, match="opened twice"):
        keys.open("critic", 3, 0)
    keys.forget()
    keys.open("critic", 3, 0)


def test_a_slice_draws_its_rows_of_the_whole():
    def draws(offset: int, stride: int) -> list[Tensor]:
        rng, n = Keys(7).open("a", 0, 0, offset=offset, stride=stride), 12 // stride
        return [
            rng.normal("x", (n, 3)),
            rng.normal("x", (n, 2, 2)),
            rng.uniform("x", (n,)),
            rng.integers("x", 9, (n, 2)),
            rng.permutation("p", 5),
            rng.whole.normal("w", (6,)),
            rng.normal("w", (n,)),
        ]

    whole = draws(0, 1)
    assert len({tuple(x.flatten()[:4].tolist()) for x in whole}) == len(whole)
    for stride in (2, 4):
        for offset in range(stride):
            for kind, (x, part) in enumerate(zip(whole, draws(offset, stride))):
                assert torch.equal(part, x if kind in (4, 5) else x[offset::stride])


def test_a_sampler_has_its_share_of_examples():
    seen = []
    trainer = start(CASES["dropout-vae"], accumulate=2)
    watch(trainer, lambda phase, b, s: seen.append((s.rng.n, b.n, len(trainer.model.prior(s.rng)))))
    run(trainer, 1)
    assert seen == [(4, 4, 4)] * 2


def test_compiled_losses_draw_the_same(monkeypatch):
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:  # what every backend receives; making C++ of it takes a minute
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    eager, compiled = start(CASES["dropout-vae"]), start(CASES["dropout-vae"], compile=True)
    assert run(eager, 4) == run(compiled, 4)
    assert_same(eager, compiled)
    assert len(graphs) == 1  # nothing that changes from step to step makes it compile again
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["dropout-vae", "stylegan"])
def test_bfloat16_computes_but_does_not_store(name):
    trainer, kinds = start(CASES[name], precision="bf16"), set()
    for module in trainer.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, out: kinds.add(out.dtype))
    logs = run(trainer, 2 * N)
    assert kinds == {torch.bfloat16}
    assert {v.dtype for v in [*trainer.model.parameters(), *trainer.tensors().values()]} == {torch.float32}
    exact = run(start(CASES[name]), 2 * N)
    for key, value in logs[0].items():
        assert value == pytest.approx(exact[0][key], rel=0.05, abs=0.02)
    assert logs != exact


@EVERY
def test_float64(float64, name):
    trainer = start(CASES[name])
    run(trainer, 3)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}
    assert {v.dtype for k, v in trainer.tensors().items() if not k.endswith("/step")} == {torch.float64}


# ---------------------------------------------------------------------------------------------------- batches


def batches(source: Source, seed: int = 0, size: int = 4, streams: dict[str, Stream] | None = None) -> Batches:
    return Batches(source, streams or {"x": Stream()}, seed=seed, size=size, device=CPU, channels_last=False)


@pytest.mark.parametrize("n, size", [(10, 4), (10, 10), (10, 3), (3, 8), (7, 7), (1, 5)])
def test_every_epoch_is_a_permutation(n, size):
    source = batches(points(n), size=size)
    rows = torch.cat([source.index("model", "x", size, k) for k in range(5 * n)]).tolist()
    epochs = [rows[i : i + n] for i in range(0, len(rows), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) > 4


def test_the_order_is_a_function_of_its_key():
    want = [batches(points(10)).index("model", "x", 4, k).tolist() for k in range(40)]
    again = batches(points(10))
    for k in np.random.default_rng(0).permutation(40):
        assert again.index("model", "x", 4, int(k)).tolist() == want[k]
    others = [("critic", "x", 0), ("model", "y", 0), ("model", "x", 1)]
    orders = [batches(points(10), seed).index(phase, stream, 10, 0).tolist() for phase, stream, seed in others]
    orders.append(batches(points(10)).index("model", "x", 10, 0).tolist())
    assert len({tuple(o) for o in orders}) == 4


def test_endless_sources_never_repeat():
    source = batches(points(endless=True))
    assert torch.cat([source.index("model", "x", 4, k) for k in range(30)]).tolist() == list(range(120))


def test_batches_hold_what_streams_ask_for():
    source, loss = images(), lambda b, s: {}
    streams = {"labelled": Stream(("x", "label")), "unlabelled": Stream(ratio=1.5)}
    both = batches(source, streams=streams)
    b = both.get(Phase("model", [], loss), 0)
    assert (b.labelled.n, b.unlabelled.n) == (4, 6)
    assert torch.equal(b.labelled.x, source.x[b.labelled.index])
    assert torch.equal(b.labelled.label, source.label[b.labelled.index])
    with pytest.raises(AttributeError, match="no 'label', only x, index, n"):
        _ = b.unlabelled.label
    parts = [both.get(Phase("model", [], loss), 0, offset, 2).unlabelled.index for offset in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(), b.unlabelled.index)
    assert list(vars(both.get(Phase("model", [], loss, batch={"labelled": 20}), 0))) == ["labelled"]
    one = batches(source)
    assert one.get(Phase("model", [], loss, batch={}), 0, 1, 2).n == 2
    for phase in (Phase("model", [], loss), Phase("model", [], loss, batch={}), Phase("m", [], loss, batch={"x": 10})):
        with pytest.raises(UsageError, match="does not divide into 3 parts"):
            one.get(phase, 0, 0, 3)


def test_data_that_lacks_a_stream_is_refused():
    with pytest.raises(UsageError, match="simclr needs labels, and the data set 'blobs' has none"):
        match("simclr", {"x": Stream(("x", "label"))}, points())
    with pytest.raises(UsageError, match="needs A rows"):
        match("cyclegan", {"A": Stream(rows="A")}, images())
    match("pixelcnn", {"x": Stream()}, images())
