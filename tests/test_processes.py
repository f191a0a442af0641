"""One process and several reach the same weights; none waits for another that stopped.

All that needs a group of processes runs in one: ``python -m tests.test_processes 2 FOLDER 4 FOLDER`` forks a group of
two and one of four, which leave in their folders what the tests compare with a single process.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gencli import checkpoint, processes
from gencli.commands.train import _begun as begun
from gencli.commands.train import train_recipe
from gencli.console import Diverged, GencliError, UsageError
from gencli.contract import Step
from gencli.metrics.likelihood import nll
from gencli.models import TABLE
from gencli.nn.norm import BatchNorm
from gencli.recipe import Recipe, load
from gencli.rng import Keys, using
from gencli.run import Run, read_record
from gencli.sampling import draw
from gencli.training.launch import joined, led
from gencli.training.session import Interrupted, Session
from gencli.training.settings import settings
from gencli.training.trainer import Trainer
from tests.contract_cases import CASES
from tests.test_trainer import start
from tests.tiny import tiny

STEPS = 20
WORLDS = (2, 4)
DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.float64)


# of games, moves and tricks that no default recipe has
GAMES = [
    "gan model.updates=simultaneous model.norm_G=batch model.tricks.minibatch_kernels=3 model.conditional=true",
    "gan model.tricks.feature_matching=true model.tricks.historical_averaging=0.1 model.conditional=true",
    "sngan model.network=resnet model.penalty=1 model.penalty_kind=r1 model.generator_batch=2 model.critic_steps=2",
]


def recipe(name: str, *more: str) -> Recipe:
    name, *more = [*name.split(), *more]
    return tiny(name, f"train.steps={STEPS}", "train.precision=float64", "train.ema=0.9", *more)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint would hold."""
    parts = {"weight": trainer.model.state_dict(), "ema": trainer.ema, "state": trainer.tensors()}
    return {f"{part}/{key}": v.detach().clone().contiguous() for part, d in parts.items() for key, v in d.items()}


def trained(name: str) -> tuple[dict[str, Tensor], list[dict[str, float]], bytes]:
    """State, logs and digest after STEPS steps in float64 of a case, or of a model of the table."""
    if name.startswith("case-"):
        torch.set_default_dtype(torch.float64)
        try:
            trainer = start(CASES[name.removeprefix("case-")])
            logs = [trainer.step() for _ in range(STEPS)]
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with settings(recipe(name)) as device:
            trainer = Session(recipe(name), device).trainer
            logs = [trainer.step() for _ in range(STEPS)]
    return state(trainer), logs, trainer.digest()


NAMES = [*(f"case-{name}" for name in CASES), *TABLE, *GAMES]


# ------------------------------------------------------------------------------------------ a member of the group


def rows_everywhere() -> None:
    """Rows of every dtype come together in global order, as they are."""
    r, w = processes.rank(), processes.world()
    for dtype in DTYPES:
        whole = (torch.arange(4 * w * 6) % 5 - (dtype.is_signed * 2)).to(dtype).view(4 * w, 2, 3)
        mine = whole[r::w]
        assert torch.equal(processes.gather(mine), whole), dtype
        assert torch.equal(processes.gather(mine[:, 0, 0]), whole[:, 0, 0]), dtype
        assert torch.equal(processes.gather(mine.transpose(1, 2)), whole.transpose(1, 2)), dtype
    odd = torch.tensor([-0.0, math.inf, math.nan]) if r == 0 else torch.zeros(3)
    assert (
        processes.gather(odd)[::w].view(torch.int32).tolist()
        == odd.new_tensor([-0.0, math.inf, math.nan]).view(torch.int32).tolist()
    )


def derivatives() -> None:
    """Of a function that couples all rows, to the second order, against the same function in one process."""
    r, w = processes.rank(), processes.world()
    whole = torch.linspace(-1, 1, 3 * w, dtype=torch.float64).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return (x**3).sum() * x.exp().mean()

    (slope,) = torch.autograd.grad(f(whole), whole, create_graph=True)
    (curve,) = torch.autograd.grad((slope**2).sum(), whole)
    mine = whole.detach()[r::w].clone().requires_grad_()
    for everyone in (
        lambda: f(processes.gather(mine)) / w,
        lambda: processes.total((mine**3).sum()) * processes.total(mine.exp().sum()) / (3 * w) / w,
    ):
        (own,) = torch.autograd.grad(everyone(), mine, create_graph=True)
        torch.testing.assert_close(own, slope[r::w], rtol=1e-12, atol=1e-12)
        (own,) = torch.autograd.grad((own**2).sum(), mine)
        torch.testing.assert_close(own, curve[r::w], rtol=1e-12, atol=1e-12)


def batch_norm() -> None:
    """Outputs, first and second derivatives and running averages are those of torch's layer on the whole batch."""
    r, w = processes.rank(), processes.world()
    g = torch.Generator().manual_seed(0)
    whole = (5 + torch.randn(3 * w, 2, 3, 2, dtype=torch.float64, generator=g)).requires_grad_()
    want, have = (norm.double() for norm in (torch.nn.BatchNorm2d(2), BatchNorm(2)))
    for norm in (want, have):
        norm.weight.data, norm.bias.data = torch.tensor([0.5, 2.0]).double(), torch.tensor([-1.0, 1.0]).double()
    mine = whole.detach()[r::w].clone().requires_grad_()
    s = Step(0, 1, Keys(0).open("norm", offset=r, stride=w), torch.zeros(()), 0, r, w)
    with using(s):
        pairs = [(want(whole), whole), (have(mine), mine)]
    slopes = [torch.autograd.grad((y**3).sum(), x, create_graph=True)[0] for y, x in pairs]
    curves = [torch.autograd.grad((d**2).sum(), x)[0] for d, (_, x) in zip(slopes, pairs)]
    for one, several in [(pairs[0][0], pairs[1][0]), slopes, curves]:
        torch.testing.assert_close(several, one[r::w], rtol=1e-10, atol=1e-10)
    assert have.running_var.sub(want.running_var).abs().max() < 1e-14 and have.running_mean.sum() > 0.9
    torch.testing.assert_close(have.running_mean, want.running_mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(have.eval()(mine), want.eval()(whole)[r::w], rtol=1e-13, atol=1e-13)
    early = Step(0, 1, Keys(0).open("early", offset=r, stride=2 * w), torch.zeros(()), 0, r, 2 * w)
    with using(early), pytest.raises(UsageError, match=r"train\.accumulate must be 1"):
        have.train()(mine)


def decisions() -> None:
    """What one process knows, all do; what fails on the first ends all."""
    r, w = processes.rank(), processes.world()
    assert processes.agree(7 * (r == w - 1)) == 7
    assert processes.first(lambda: {"rank": processes.rank(), "text": "ü" * 1000}) == {"rank": 0, "text": "ü" * 1000}
    for dtype in DTYPES:
        x = torch.full((2, 3, 4, 5), float(r == 0)).to(dtype).contiguous(memory_format=torch.channels_last)
        processes.spread(x)
        assert torch.equal(x, torch.ones_like(x)) and x.is_contiguous(memory_format=torch.channels_last)
    scalar = torch.tensor(r + 5)
    processes.spread(scalar)
    assert scalar == 5

    def fail() -> None:
        assert processes.rank() == 0
        raise UsageError("no")

    with pytest.raises(UsageError if r == 0 else SystemExit) as caught:
        processes.first(fail)
    assert r == 0 or caught.value.code == 2
    assert processes.differing(b"same") is None
    assert processes.differing(b"abcd" if r < w - 1 else b"abce") == w - 1


def work() -> None:
    """Items are shared out whole, one process each; all have all results, in order."""
    r, w = processes.rank(), processes.world()
    for n in (0, 1, w, 2 * w + 1):
        done: list[int] = []

        def do(i: int, done: list[int] = done) -> np.ndarray[Any, Any]:
            done.append(i)
            return np.full((i % 3, 2), i, np.int16) if i % 2 else np.array(float(i))

        found = list(processes.shared(range(n), do))
        assert done == list(range(n))[r::w]
        assert [str(a.dtype) for a in found] == ["int16" if i % 2 else "float64" for i in range(n)]
        assert all(np.array_equal(a, np.full((i % 3, 2), i) if i % 2 else float(i)) for i, a in enumerate(found))


def divergence() -> None:
    """A loss that is not finite on one process stops all, before a weight has changed."""
    for bad in (math.nan, math.inf):
        trainer = start(CASES["dropout-vae"])
        trainer.step()
        player, before = trainer.players[0], trainer.digest()
        loss = player.call

        def broken(b: Any, s: Any, loss: Any = loss, bad: float = bad) -> dict[str, Any]:
            out = loss(b, s)
            return out | {"loss": out["loss"] * (bad if processes.rank() == 1 else 1)}

        player.call = broken
        with pytest.raises(Diverged, match="model at step 1"):
            trainer.step()
        assert trainer.digest() == before


def batches_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match=f"a batch of 9 rows does not divide into {processes.world()} parts"):
        start(CASES["dropout-vae"], batch_size=9)
    with pytest.raises(UsageError, match=f"does not divide into {processes.world() * 8} parts"):
        start(CASES["dropout-vae"], accumulate=8)


def one_memory(folder: Path) -> None:
    """With train.hogwild each process takes its own rows, and all write the same vectors: what is saved is learned."""
    made = recipe("word2vec", "train.hogwild=true", "train.checkpoint_every=10", "train.ema=null")
    with settings(made) as device, led(lambda: Run.create(out=folder / "hogwild")) as run:
        session = Session(made, device)
        session.start(run)
        before = session.model.input.clone()
        session.fit(preview=False)
        assert processes.rank() > 0 or "this run is not reproducible" in (run.path / "log.txt").read_text()
        mine = session.model.input.clone()
        assert not torch.equal(mine, before)
        assert torch.equal(processes.gather(mine[None]), mine.expand(processes.world(), *mine.shape))
        processes.agree(0)  # all have looked
        session.model.input.data[0] += processes.rank() + 1  # one after another or at once: nothing waits
        processes.agree(0)
        assert not torch.equal(session.model.input[0], mine[0])
        assert checkpoint.steps(run.path)[-1][0] == STEPS


def memory_in_common() -> None:
    """It holds the first process's numbers, has no name that could be left, and says where it has no room."""
    names: list[set[str]] = []

    def mapped(name: str, **more: Any) -> Tensor:
        names.append(set(os.listdir("/dev/shm")))
        return map_file(name, **more)

    before, map_file = set(os.listdir("/dev/shm")), torch.from_file
    torch.from_file = mapped
    try:
        x = processes.in_common(torch.full((4, 2), 1.0 + processes.rank(), dtype=torch.float64))
    finally:
        torch.from_file = map_file
    assert torch.equal(x, torch.ones(4, 2, dtype=torch.float64)) and len(names) == 1
    # PyTorch's own, of threads and the like, come and go
    assert not [name for name in names[0] - before if "gencli" in name or name.startswith("tmp")]
    processes.agree(0)
    x[processes.rank()] = 5
    processes.agree(0)
    assert (x == 5).any(1).sum() == processes.world()
    allocate = os.posix_fallocate

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = full
    try:
        processes.in_common(torch.ones(2))
    except OSError as error:
        assert processes.rank() == 0 and error.filename == "/dev/shm"
    except SystemExit as error:
        assert processes.rank() > 0 and error.code == 1
    else:
        raise AssertionError
    finally:
        os.posix_fallocate = allocate


def different_weights(folder: Path) -> None:
    """Nothing is written once the processes have parted."""
    made = recipe("vae")
    with settings(made) as device, led(lambda: Run.create(out=folder / "parted")) as run:
        session = Session(made, device)
        session.start(run)
        session.trainer.step()
        if processes.rank() == 1:
            next(session.model.parameters()).data[0] += 1e-9
        with pytest.raises(GencliError, match=r"^step 1: process 1 does not"):
            session.save()
        assert not checkpoint.steps(run.path)


def goes_on_and_stops(folder: Path) -> None:
    """A run of fewer processes goes on here; a signal to the second process stops all at the same step, saved."""
    made, (begin, end) = recipe("vae", *RESUMED), {2: (6, 11), 4: (11, 15)}[processes.world()]
    with settings(made) as device, led(lambda: Run.open(folder.parent / "resumed")) as run:
        session = Session(made, device)
        session.resume(run)
        assert session.trainer.number == begin
        stop_at(session, end, only=1)
        with pytest.raises(Interrupted) as caught:
            session.fit(preview=False)
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert session.trainer.number == end


RESUMED = ["train.checkpoint_every=5", "train.evaluate_every=4", "train.sample_every=10"]


def drawn(name: str) -> dict[str, Tensor]:
    """What a model of the table draws and how likely it finds data, as its weights start: in chunks of three."""
    made = tiny(name)
    with settings(made) as device:
        session = Session(made, device)
        with session.trainer.evaluating() as model:
            found = {}
            if hasattr(model, "sample"):
                found["samples"] = torch.from_numpy(np.concatenate([c.x for c in draw(model, 10, chunk=3)]))
            if hasattr(model, "log_prob"):
                model.chunk = 3
                found["nats"] = torch.tensor(nll(model, session.val_data, limit=10)["nats"], dtype=torch.float64)
            if hasattr(model, "features"):
                found["features"] = model.features(session.val_data.rows(torch.arange(10))["x"])
            if hasattr(model, "vectors"):
                found["vectors"] = model.vectors().clone()
            return found


def stop_at(session: Session, step: int, only: int = 0) -> None:
    """Let process ``only`` receive SIGTERM in step ``step``."""
    take = session.trainer.step

    def stopped() -> dict[str, float]:
        if session.trainer.number + 1 == step and processes.rank() == only:
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    session.trainer.step = stopped  # type: ignore[method-assign]


CHECKS = {
    f.__name__: f
    for f in (
        rows_everywhere,
        derivatives,
        batch_norm,
        decisions,
        work,
        divergence,
        batches_that_do_not_divide,
        memory_in_common,
    )
}
WITH_FILES = {f.__name__: f for f in (different_weights, one_memory, goes_on_and_stops)}


def member(folder: Path) -> None:
    """Do everything, and leave what came out: errors by name, digests, and the first process's states."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"errors": {}, "digests": {}, "logs": {}}
    with joined("cpu"):
        jobs = {name: lambda name=name: CHECKS[name]() for name in CHECKS}
        jobs |= {name: lambda name=name: WITH_FILES[name](folder) for name in WITH_FILES}
        for name in TABLE:
            jobs[f"draw-{name}"] = lambda name=name: (drawn(name), [], b"")
        for name in NAMES:
            jobs[name] = lambda name=name: trained(name)
        for name, job in jobs.items():
            try:
                result = job()
            except Exception:
                found["errors"][name] = traceback.format_exc()
                continue
            if result is not None:
                tensors, found["logs"][name], digest = result
                found["digests"][name] = digest.hex()
                if processes.rank() == 0:
                    save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{processes.rank()}.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------------- the tests


class Group:
    """What the members of one group have left."""

    def __init__(self, world: int, folder: Path) -> None:
        self.folder = folder
        self.found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]

    def passed(self, name: str) -> None:
        for found in self.found:
            assert name not in found["errors"], found["errors"][name]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Group]:
    """A group of each size, and a run that one process began for the groups to go on with, one after the other."""
    base = tmp_path_factory.mktemp("groups")
    folders = {world: base / str(world) for world in WORLDS}
    for folder in folders.values():
        folder.mkdir()
    made = recipe("vae", *RESUMED)
    with settings(made) as device, Run.create(out=base / "resumed") as run:
        session = Session(made, device)
        session.start(run)
        stop_at(session, 6)
        with pytest.raises(Interrupted):
            session.fit(preview=False)
    pairs = [str(word) for pair in folders.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_processes", *pairs], check=False, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    return {world: Group(world, folder) for world, folder in folders.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CHECKS)
def test_the_group_agrees_on(groups: dict[int, Group], name: str, world: int) -> None:
    groups[world].passed(name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_processes_is_one(groups: dict[int, Group], alone: dict[str, Any], name: str, world: int) -> None:
    group = groups[world]
    group.passed(name)
    if name not in alone:
        alone[name] = trained(name)
    want, logs, _ = alone[name]
    assert len({found["digests"][name] for found in group.found}) == 1
    assert all(found["logs"][name] == group.found[0]["logs"][name] for found in group.found)
    have = load_file(group.folder / f"{name}.safetensors")
    assert have.keys() == want.keys()
    for key, value in want.items():
        assert (have[key].double() - value.double()).abs().max() <= 1e-10, key
    for one, several in zip(logs, group.found[0]["logs"][name], strict=True):
        assert several == pytest.approx(one, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TABLE)
def test_samples_and_scores_have_the_same_bits_on_any_number_of_processes(
    groups: dict[int, Group], alone: dict[str, Any], name: str, world: int
) -> None:
    group, name, key = groups[world], f"draw-{name}", name
    group.passed(name)
    if name not in alone:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        alone[name] = drawn(key)
        torch.set_num_threads(before)
    have = load_file(group.folder / f"{name}.safetensors")
    assert alone[name] and have.keys() == alone[name].keys()
    for part, value in alone[name].items():
        assert torch.equal(have[part], value), part


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_written_by_processes_that_have_parted(groups: dict[int, Group], world: int) -> None:
    groups[world].passed("different_weights")


@pytest.mark.parametrize("world", WORLDS)
def test_processes_write_one_memory(groups: dict[int, Group], world: int) -> None:
    groups[world].passed("one_memory")


def test_a_run_goes_from_one_process_to_two_to_four_and_back(groups: dict[int, Group], tmp_path: Path) -> None:
    groups[2].passed("goes_on_and_stops")
    groups[4].passed("goes_on_and_stops")
    made, folder = recipe("vae", *RESUMED), groups[2].folder.parent / "resumed"
    assert read_record(folder)["state"] == "interrupted"
    assert read_record(folder)["processes"] == 4
    assert checkpoint.steps(folder)[-1][0] == 15
    with settings(made) as device, Run.open(folder) as run:
        session = Session(made, device)
        session.resume(run)
        assert session.trainer.number == 15
        session.fit(preview=False)
        have = state(session.trainer)
    with settings(made) as device, Run.create(out=tmp_path / "whole") as run:
        whole = Session(made, device)
        whole.start(run)
        whole.fit(preview=False)
        want = state(whole.trainer)
    assert have.keys() == want.keys()
    assert max((have[key] - want[key]).abs().max().item() for key in want) <= 1e-10
    rows = [[json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (folder, run.path)]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        assert all(one[k] == pytest.approx(other[k]) for k in one if k not in ("time", "event", "data"))
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step-000010.png", "step-000020.png"]


# ------------------------------------------------------------------------------------------------ the command line


SMALL = [
    *("model.latents=2", "model.hidden=[8]", "train.batch_size=8", "train.samples=4", "train.evaluate_every=10"),
    *("device=cpu", "threads=1"),
]


def words(out: Path, steps: int) -> list[str]:
    return ["train", "vae", *SMALL, "--no-preview", "--steps", str(steps), "--out", str(out)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gencli", *arguments]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    made = load("vae", [*SMALL, f"train.steps={STEPS}"], model=True)
    return train_recipe(made, out=out, preview=False)


@pytest.mark.parametrize("how", ["devices", "torchrun"])
def test_the_command_line_of_two_processes(how: str, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gencli"]
    start = [sys.executable, *torchrun] if how == "torchrun" else command()
    more = [] if how == "torchrun" else ["--devices", "2"]
    done = subprocess.run([*start, *words(out, STEPS), *more], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert done.stderr.count("trained in") == 1
    name = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    want, have = load_file(one / name), load_file(out / name)
    assert have.keys() == want.keys()
    assert max((have[key] - want[key]).abs().max().item() for key in want) < 1e-6
    kinds = [
        [(row["event"], row["step"]) for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        for run in (one, out)
    ]
    assert kinds[0] == kinds[1]
    assert read_record(out)["state"] == "done"


def test_a_wrong_command_is_told_once() -> None:
    done = subprocess.run(command("train", "vay", "--devices", "2"), check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("vay") == 1


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A job of two processes that trains without end, as soon as it trains."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(*words(out, 10**6), "train.checkpoint_every=100", "--devices", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        yield process, out
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> dict[int, int]:
    """The launcher's children by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(e[5:]) for e in environment if e.startswith(b"RANK=")]
        found |= {rank: int(child) for rank in ranks}
    return found


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by /proc")


@linux
def test_a_dead_process_ends_the_job(job: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = job
    os.kill(children(process.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + signal.SIGKILL, stderr
    assert stdout == ""
    assert "process 1 ended by SIGKILL" in stderr
    assert "another process of this job has stopped" in stderr
    assert read_record(out)["state"] == "failed"
    assert checkpoint.latest(out) is not None


@linux
def test_torchrun_starts_again_from_the_last_checkpoint(one: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs/0001-vae-digits"
    given = words(out, STEPS)[:-2]  # without --out: the second life finds the run by the job's name
    # the first life is slow, and falls by our hand in its tenth step or later
    slow = "import os, runpy, sys, time; from gencli.training.trainer import Trainer as T; step = T.step\n"
    slow += "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
    slow += "    T.step = lambda self: (time.sleep(0.2 if self.number < 10 else 1), step(self))[1]\n"
    slow += "sys.argv[0] = 'gencli'; runpy.run_module('gencli', run_name='__main__', alter_sys=True)"
    (tmp_path / "slow.py").write_text(slow)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "--max-restarts=1", "--monitor-interval=0.1", "slow.py", *given, "train.checkpoint_every=4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/step-000008").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout == "runs/0001-vae-digits\n"
    name = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    want, have = load_file(one / name), load_file(out / name)
    assert max((have[key] - want[key]).abs().max().item() for key in want) < 1e-6
    assert read_record(out)["state"] == "done"
    assert [run.name for run in out.parent.iterdir()] == [out.name]
    assert begun("another", None) is None
    assert begun("any", out) == out
    assert begun("any", tmp_path / "new") is None


def test_two_processes_write_and_print_what_one_does(one: Path, tmp_path: Path) -> None:
    """Sampling and evaluation, whole commands: equal files, equal rows."""
    several = []
    for n in ("1", "2"):
        said = {}
        for name, verb in {"x.npz": ["sample", "-n", "150", "-o", "x.npz"], "-": ["sample", "-o", "-"]}.items():
            (tmp_path / n).mkdir(exist_ok=True)
            line = command(*verb[:1], str(one), *verb[1:], "--devices", n, "--device", "cpu")
            done = subprocess.run(line, check=False, capture_output=True, cwd=tmp_path / n)
            assert done.returncode == 0, done.stderr
            said[name] = done.stdout if name == "-" else (tmp_path / n / name).read_bytes()
        line = command("eval", "nll", str(one), "--devices", n, "--device", "cpu")
        done = subprocess.run(line, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr
        several.append(said | {"nll": json.loads(done.stdout)})
    assert several[0] == several[1]
    assert len(several[0]["-"]) > 64 * 1024 and several[0]["nll"]["examples"] == 359


@linux
def test_signals_reach_all_processes(job: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = job
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, stderr
    assert stdout == ""
    assert stderr.count("stopped by SIGINT; everything is saved") == 1
    record = read_record(out)
    assert record["state"] == "interrupted"
    assert checkpoint.steps(out)[-1][0] == record["step"]


@linux
def test_the_processes_do_not_outlive_their_parent(job: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = job
    left = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in left.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [rank for rank, pid in left.items() if Path(f"/proc/{pid}").exists()]
    assert read_record(out)["state"] == "interrupted"


def fork(world: int, folder: Path) -> list[int]:
    """Start a group from this process, which has imported everything and done nothing; the members' ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = []
    for rank in range(world):
        if not (pid := os.fork()):
            os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                member(folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        members.append(pid)
    return members


if __name__ == "__main__":
    codes = []
    for size, at in zip(sys.argv[1::2], sys.argv[2::2]):
        codes += [os.waitpid(pid, 0)[1] for pid in fork(int(size), Path(at))]
    sys.exit(int(any(codes)))
