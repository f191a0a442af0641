"""Trains every model of the table in children that fall: killed, stopped by a signal, on a full disk, out of memory.

    python -m tests.faults kill --faults 200
    python -m tests.faults term disk oom --faults 60 --models vae

A warm parent that has imported torch forks children that run the command line (`gencli train`), so a fault costs a
fraction of a second. What fell is resumed until it is done and then compared with a run that nothing befell: final
checkpoint (weights, averages, optimiser state, bytes of the files), samples, best.json, state of run.json, and
metrics.jsonl without its clock. After every fault each checkpoint in place must verify and load, none may be lost,
and stderr must hold one error at most and no traceback. Prints a line a model and exits with 1 if anything was amiss.

SIGKILL proves the death of the process: the page cache survives it. Power cuts are the matter of the order of writes,
which `tests/test_checkpoint.py` holds.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from gencli import checkpoint, cli, console
from gencli import recipe as recipes
from gencli.commands import train as _warm  # noqa: F401 (every import here is one that no child has to make)
from gencli.models import TABLE
from gencli.rng import generator
from gencli.run import read_record
from gencli.training import session as _warmer  # noqa: F401
from gencli.training.trainer import Trainer
from tests.tiny import tiny

STEPS = 24
# A checkpoint a step, so that many faults fall inside one; every other file of a run is written now and then.
OFTEN = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=1",
    "train.evaluate_every=8",
    "train.sample_every=8",
    "train.keep=2",
    "train.ema=0.9",
    "train.patience=null",
)
LONGEST = 120.0  # seconds that a child may take before it counts as hung
SIGNALS = (signal.SIGINT, signal.SIGTERM)


# ---------------------------------------------------------------------- children


@dataclass
class Child:
    """A forked `gencli train`. Its stderr is a pipe: what it says there is on no full disk."""

    pid: int
    stderr: int
    code: int | None = None

    def dead(self) -> bool:
        """Whether it has ended; ``code`` is then its exit code, or minus the signal that ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def sleep(self, seconds: float) -> bool:
        """Wait, but not longer than it lives; whether it still does."""
        until = time.monotonic() + seconds
        while not self.dead() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.002))
        return not self.dead()

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        if self.sleep(LONGEST):
            os.kill(self.pid, signal.SIGKILL)
            self.sleep(LONGEST)
            self.code = 1000  # no exit code: hung
        with open(self.stderr, "rb") as file:
            said = file.read().decode(errors="replace")
        assert self.code is not None
        return self.code, said


def fork(words: list[str], fault: Callable[[], None] | None = None) -> Child:
    """`gencli WORDS` in a child, after ``fault`` has prepared its fate there."""
    out, into = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal must not find the child in its parent's code
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(into)
        return Child(pid, out)
    code = 1001
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for fd, to in ((null, 0), (null, 1), (into, 2)):
            os.dup2(fd, to)
        # pytest may have put objects of its own in their place
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        sys.argv, os.environ["GENCLI_QUIET"] = ["gencli"], "1"
        if fault:
            fault()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = console.run(cli.app, words)
    finally:
        os._exit(code)


# ---------------------------------------------------------------------- a full disk


class Full:
    """A disk with room for ``room`` more bytes: the write that goes beyond it is torn there, and so is every later."""

    def __init__(self, room: int) -> None:
        self.room, self.spent = room, 0
        self._open, self._fdopen = builtins.open, os.fdopen

    def install(self, report: int | None = None) -> None:
        """Let all files that this process opens from here on lie on it; at the end
        tell ``report`` what they took, and which modules this process has imported."""
        builtins.open = lambda *a, **k: self._watch(self._open(*a, **k))
        os.fdopen = lambda *a, **k: self._watch(self._fdopen(*a, **k))
        if report is not None:
            leave = os._exit

            def tell(status: int) -> NoReturn:
                os.write(report, json.dumps([self.spent, list(sys.modules)]).encode())
                leave(status)

            os._exit = tell

    def _watch(self, file: Any) -> Any:
        if not file.writable() or file.fileno() <= 2 or not isinstance(file.name, (str, Path, int)):
            return file
        return _Watched(file, self)

    def take(self, size: int) -> int:
        """How many of ``size`` bytes go in."""
        self.spent += size
        return size if self.spent <= self.room else max(0, size - (self.spent - self.room))


class _Watched:
    """A file on a :class:`Full` disk."""

    def __init__(self, file: Any, disk: Full) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        fits = self._disk.take(len(data))
        self._file.write(data[:fits])
        if fits < len(data):
            self._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fits


# ---------------------------------------------------------------------- one model


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run leaves, by name, but for the clock and the machine."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    paths = [*last.glob("*"), *run.glob("samples/*"), *run.glob("checkpoints/best.json"), run / "recipe.yaml"]
    found: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in sorted(paths)}
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    found["metrics.jsonl"] = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
    record = read_record(run)
    return found | {key: record[key] for key in ("state", "step", "steps", "best", "model", "data", "parameters")}


@dataclass
class Tally:
    """A model's line in the table; ``amiss`` says in words what its last three numbers count."""

    model: str
    faults: int = 0
    inside: int = 0
    runs: int = 0
    differences: int = 0
    unreadable: int = 0
    wrong: int = 0
    seconds: float = 0.0
    amiss: list[str] = field(default_factory=list)

    def note(self, kind: str, text: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.amiss.append(f"{self.model}: {text}")


class Subject:
    """A tiny recipe of one model, its uninterrupted run, and the run that faults befall."""

    def __init__(self, name: str, work: Path) -> None:
        self.tally, self.work = Tally(name), work / name
        self.work.mkdir(parents=True)
        self.recipe = self.work / "recipe.yaml"
        self.recipe.write_text(recipes.dump(tiny(name, *OFTEN)))
        self.run = self.work / "whole"
        report, disk = os.pipe(), Full(2**62)
        child = self.go(lambda: disk.install(report[1]))
        os.close(report[1])
        with open(report[0]) as file:
            told = file.read()
        code, said = child.end()
        if code:
            raise SystemExit(f"{name} does not even train: exit code {code}\n{said}")
        self.written, modules = json.loads(told)
        for module in modules:  # what the verb imports when it needs it, no later child has to
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        shutil.rmtree(self.run)
        began = time.monotonic()
        self.go().end()
        self.seconds = time.monotonic() - began
        self.whole = outcome(self.run)
        self.number = self.newest = 0

    def begin(self) -> None:
        """A new run."""
        self.number, self.newest = self.number + 1, 0
        self.run = self.work / f"{self.number:04d}"

    def go(self, fault: Callable[[], None] | None = None) -> Child:
        """Go on with the run, or begin it where it had not come as far as its recipe."""
        if (self.run / "recipe.yaml").exists():
            return fork(["train", "--resume", str(self.run), "--no-preview"], fault)
        shutil.rmtree(self.run, ignore_errors=True)
        return fork(["train", str(self.recipe), "--out", str(self.run), "--no-preview"], fault)

    def inspect(self, said: str, errors: int) -> None:
        """After a fault: what must hold before anything has been cleared up."""
        self.tally.faults += 1
        folder = self.run / "checkpoints"
        self.tally.inside += any(folder.glob(".step-*"))
        found = checkpoint.steps(self.run)
        for step, path in found:
            try:
                checkpoint.verify(path)
                if step == found[-1][0]:
                    checkpoint.load(path)
                    checkpoint.load_training(path)
            except Exception as error:
                self.tally.note("unreadable", f"{path}: {error}")
        newest = found[-1][0] if found else 0
        if newest < self.newest:
            self.tally.note("unreadable", f"{self.run}: step {self.newest} was there, now {newest}")
        self.newest = newest
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        if "Traceback" in said or "Exception" in said or len(lines) != errors:
            self.tally.note("wrong", f"{self.run}: said {said!r}")

    def expect(self, code: int, allowed: tuple[int, ...], said: str) -> None:
        """Count an exit code that is none of ``allowed``."""
        if code not in allowed:
            self.tally.note("wrong", f"{self.run}: exit code {code}, not one of {allowed}: {said!r}")

    def finish(self) -> None:
        """Resume to the end, and compare."""
        code, said = self.go().end()
        self.expect(code, (0,), said)
        self.compare()

    def compare(self) -> None:
        """Count what differs from the uninterrupted run, and forget a run in which nothing does."""
        self.tally.runs += 1
        try:
            parts = outcome(self.run)
        except Exception as error:
            self.tally.note("differences", f"{self.run}: {type(error).__name__}: {error}")
            return
        differ = [key for key in {**self.whole, **parts} if self.whole.get(key) != parts.get(key)]
        left = [str(p) for p in self.run.rglob(".*") if p.name != ".lock"]
        if differ or left:
            self.tally.note("differences", f"{self.run}: {', '.join(differ + left)}")
        else:
            shutil.rmtree(self.run)


# ---------------------------------------------------------------------- faults


def kill(s: Subject, count: int, seed: int) -> None:
    """SIGKILL at uniformly random instants, again and again until the run is through."""
    g = generator(seed, "kill", s.tally.model)
    while s.tally.faults < count:
        s.begin()
        while True:
            child, delay = s.go(), float(g.uniform(0, 1.2 * s.seconds))
            if s.tally.faults < count and child.sleep(delay):
                os.kill(child.pid, signal.SIGKILL)
            code, said = child.end()
            if code != -signal.SIGKILL:
                break
            s.inspect(said, errors=0)
        s.expect(code, (0,), said)
        s.compare()


def term(s: Subject, count: int, seed: int) -> None:
    """SIGTERM and SIGINT in turn, at uniformly random instants, until the run is through."""
    g = generator(seed, "term", s.tally.model)
    while s.tally.faults < count:
        s.begin()
        while True:
            child, delay = s.go(), float(g.uniform(0, s.seconds))
            signum = SIGNALS[s.tally.faults % 2]
            if sent := s.tally.faults < count and child.sleep(delay):
                os.kill(child.pid, signum)
            code, said = child.end()
            if not sent or code == 0:
                s.expect(code, (0,), said)
                break
            saved = "everything is saved" in said
            # Before training has begun there is nothing to save, and SIGTERM has the meaning that it has by itself.
            before = -signum if signum == signal.SIGTERM else 128 + signum
            s.expect(code, (128 + signum,) if saved else (before,), said)
            s.inspect(said, errors=int(saved))
            if saved and (read_record(s.run)["state"] != "interrupted" or read_record(s.run)["step"] != s.newest):
                s.tally.note("wrong", f"{s.run}: run.json does not tell of the stop")
        s.compare()


def disk(s: Subject, count: int, seed: int) -> None:
    """A disk that is full after b bytes, then one that takes no file above b bytes: budgets b over the whole range."""
    largest = max(len(v) for v in s.whole.values() if isinstance(v, bytes))
    by_size = count // 2
    for k in range(count - by_size):
        s.begin()
        code, said = s.go(Full(s.written * (k + 1) // (count - by_size + 1)).install).end()
        s.expect(code, (1,), said)
        s.inspect(said, errors=1)
        s.finish()
    for k in range(by_size):
        s.begin()
        code, said = s.go(_stop_at(STEPS // 2)).end()  # something to lose
        s.expect(code, (143,), said)
        s.newest = STEPS // 2
        code, said = s.go(_file_limit(largest * k // by_size)).end()
        s.expect(code, (1,), said)
        s.inspect(said, errors=1)
        s.finish()


def _file_limit(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def _in_step(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A fault that does ``act`` as step ``number`` begins."""

    def install() -> None:
        step = Trainer.step

        def fateful(self: Trainer) -> dict[str, float]:
            if self.number + 1 == number:
                act()
            return step(self)

        Trainer.step = fateful  # type: ignore[method-assign]

    return install


def _stop_at(number: int) -> Callable[[], None]:
    return _in_step(number, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _python_memory() -> None:
    raise MemoryError


def _gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _cpu_memory() -> None:
    torch.empty(2**60)


def oom(s: Subject, count: int, seed: int) -> None:
    """Out of memory in every step in turn, as Python, torch on a GPU and torch on the CPU say it."""
    for k in range(count):
        s.begin()
        code, said = s.go(_in_step(1 + k % STEPS, (_python_memory, _gpu_memory, _cpu_memory)[k % 3])).end()
        s.expect(code, (1,), said)
        s.inspect(said, errors=1)
        if "out of memory" not in said or "--batch-size" not in said:
            s.tally.note("wrong", f"{s.run}: said {said!r}")
        if s.newest != k % STEPS or read_record(s.run)["state"] != "failed":
            s.tally.note("wrong", f"{s.run}: fell in step {1 + k % STEPS}, and kept step {s.newest}")
        s.finish()


FAULTS: dict[str, Callable[[Subject, int, int], None]] = {"kill": kill, "term": term, "disk": disk, "oom": oom}


# ---------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=about)
    parser.add_argument("what", nargs="+", choices=FAULTS, help="what befalls the runs")
    parser.add_argument("--faults", "--kills", type=int, default=200, help="how many of each, over all models")
    parser.add_argument("--models", nargs="+", choices=TABLE, default=list(TABLE), metavar="MODEL")
    parser.add_argument("--seed", type=int, default=0, help="of the instants at which they fall")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # before anything computes: a forked child has none of its parent's threads
    work = Path(tempfile.mkdtemp(prefix="gencli-faults-"))
    subjects = [Subject(name, work) for name in given.models[: given.faults]]
    amiss: list[str] = []
    for what in dict.fromkeys(given.what):
        rows = []
        for i, s in enumerate(subjects):
            s.tally, began = Tally(s.tally.model), time.monotonic()
            FAULTS[what](s, given.faults * (i + 1) // len(subjects) - given.faults * i // len(subjects), given.seed)
            s.tally.seconds = time.monotonic() - began
            rows.append(vars(s.tally))
            amiss += rows[-1].pop("amiss")
        if len(rows) > 1:
            rows.append({key: sum(row[key] for row in rows) if key != "model" else "all" for key in rows[0]})
        _print(what, rows)
    for line in amiss:
        print(line)
    if amiss:
        print(f"the runs amiss are kept in {work}")
        return 1
    shutil.rmtree(work)
    return 0


def _print(what: str, rows: list[dict[str, Any]]) -> None:
    names = {"model": what, "faults": "faults", "inside": "in a write", "runs": "runs", "differences": "differences"}
    names |= {"unreadable": "unreadable", "wrong": "wrong exits", "seconds": "seconds"}
    print("| " + " | ".join(names.values()) + " |")
    print("|---" + "|--:" * (len(names) - 1) + "|")
    for row in rows:
        cells = [row[key] if key != "seconds" else f"{row[key]:.0f}" for key in names]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
