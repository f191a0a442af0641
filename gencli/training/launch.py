"""Several processes from one command line: ``--devices N`` does here what torchrun does elsewhere.

Each child runs the same command line with the environment that torchrun would give it. Imports no torch by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO

from gencli.console import Diverged, GencliError, UsageError, say
from gencli.run import Follower, Run

__all__ = ["joined", "launch", "launched", "led", "mind_the_parent", "restarted"]

GRACE = 5.0  # seconds that the others have to end by themselves after one has failed
CHILD = "GENCLI_LAUNCHED"
JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and launch() tell each process


def restarted() -> str | None:
    """The name of this job if torchrun has started it again after one of its processes had died."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return os.environ.get("TORCHELASTIC_RUN_ID")


def launched() -> bool:
    """Whether this process is one of several already, by :func:`launch` or by torchrun."""
    return all(name in os.environ for name in JOB) and int(os.environ["WORLD_SIZE"]) > 1


def launch(devices: int) -> int:
    """Run this command line in ``devices`` processes; the exit code: that of the first that fails.

    stdout is the first child's. The others' stderr is shown where one of them fails first. SIGINT and SIGTERM are
    passed on to all; when one has died, the others have GRACE seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), CHILD: "1"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // devices))}  # of all cores each, they would stand in line
    # -P: a folder named gencli, where the command was given, is not this program
    safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
    command = [sys.executable, *safe, "-m", "gencli", *sys.argv[1:]]
    talk: list[IO[bytes]] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(devices):
            talk.append(tempfile.TemporaryFile())  # noqa: SIM115 (read at the end)
            environment = {**threads, **os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # never written to: it ends when this process does
                    stdout=subprocess.DEVNULL if rank else None,
                    stderr=talk[rank] if rank else None,
                    start_new_session=True,  # a terminal's Ctrl-C comes by ``forward``, once
                )
            )
        failed = _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if failed is None:
        return 0
    code = children[failed].returncode
    # with any other code than 1, the first child failed of itself in the same way and has told it
    if failed > 0 and code != (children[0].returncode if code != 1 else None):
        talk[failed].seek(0)
        said = talk[failed].read().decode(errors="replace").strip()
        say(f"process {failed} ended {f'by {signal.Signals(-code).name}' if code < 0 else f'with exit code {code}'}")
        if said:
            say(said)
    for file in talk:
        file.close()
    return 128 - code if code < 0 else code


def _wait(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all to end, or for GRACE seconds after one has failed; which one failed first."""
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + GRACE
        if None not in codes:
            break
        time.sleep(0.02)
    return failed


def mind_the_parent() -> None:
    """In a child of :func:`launch`: stop as by SIGTERM, everything saved, if the parent is killed."""
    if os.environ.pop(CHILD, None) is None:
        return
    source = sys.stdin.fileno()

    def wait() -> None:
        while os.read(source, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Inside the block this process is one of its job's, if its environment says that there are others.

    ``device`` is a recipe's: CUDA gives process LOCAL_RANK the GPU of that number, and nccl moves what lies there;
    gloo moves what lies on the CPU. An error that all processes raise is told by the first alone; the death of one
    ends the others with a GencliError. UsageError where ``device`` serves one process only.
    """
    import torch.distributed as dist

    from gencli import processes

    if not launched():
        yield
        return
    backend = _backend(device)
    if int(os.environ["RANK"]) > 0:
        os.environ["GENCLI_QUIET"] = "1"  # one progress bar is enough
    try:
        processes.join(backend)
        yield
        processes.leave()
    except GencliError as error:
        rank = processes.rank()
        if isinstance(error, Diverged) or error.exit_code > 128:  # all raise it: they part as after work well done
            with suppress(RuntimeError):
                processes.leave(timedelta(seconds=GRACE))
            if rank > 0:
                raise SystemExit(error.exit_code) from None
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise GencliError(
                "another process of this job has stopped, or does not answer",
                hint="what it said last tells why; gencli train --resume goes on from a run's last checkpoint",
            ) from error
        raise


def _backend(device: str) -> str:
    import torch

    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise UsageError("one process at a time can use Apple's GPU", hint="gencli train --device cpu --devices 2")
    if kind != "cuda":
        return "gloo"
    mine, there = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if number:
        raise UsageError(f"device {device!r} is one GPU: several processes take one each", hint="--device cuda")
    if mine >= there:
        raise UsageError(f"process {mine} of this machine has no GPU of its own: there are {there}", hint="--devices")
    torch.cuda.set_device(mine)
    return "cpu:gloo,cuda:nccl"


def led(make: Callable[[], Run]) -> Run:
    """The run that the first process makes and writes; the others follow it."""
    from gencli import processes

    mine: list[Run] = []

    def lead() -> str:
        mine.append(make())
        return str(mine[0].path)

    path = processes.first(lead)
    return mine[0] if mine else Follower(Path(path))
