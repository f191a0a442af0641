"""What the processes of one job do together; with one process everything here is the identity.

Process ``r`` of ``w`` holds rows ``r::w`` of the global batch. A job is what ``gencli train --devices N`` and torchrun
start: N times the same command line, told apart by the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
LOCAL_RANK). Every process must reach the same calls of this module in the same order.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gencli.files import naming

__all__ = [
    "agree",
    "average",
    "differing",
    "first",
    "gather",
    "in_common",
    "join",
    "leave",
    "on_one_machine",
    "rank",
    "rehearsal",
    "shared",
    "spread",
    "total",
    "world",
]

TIMEOUT = timedelta(minutes=5)  # for a process that hangs; one that dies is noticed at once
BUCKET = 6_000_000
MEMORY = Path("/dev/shm")  # files there never touch a disk; Linux has it
PATIENCE = timedelta(days=1)  # for what the first process does alone: long evaluations, pictures, slow disks

S = TypeVar("S")
T = TypeVar("T")
Array = np.ndarray[Any, Any]
_waiting: Any = None  # the group of those who wait for the first process


def rank() -> int:
    """This process's number."""
    if _rehearsal is not None:
        return 0
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    if _rehearsal is not None:
        return _rehearsal.world
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_one_machine() -> bool:
    """Whether all of them are: torchrun says so, and ``--devices N`` starts no others."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) == world()


# ---------------------------------------------------------------------- joining


def join(backend: str) -> None:
    """Meet the other processes of the job."""
    global _waiting  # noqa: PLW0603
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store over restarts: without this, processes would call at the doors of the dead
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)


def leave(within: timedelta = PATIENCE) -> None:
    """Part from them once all are here: whoever left before would take the others' meeting point along.

    RuntimeError if they are not here ``within`` that time.
    """
    global _waiting  # noqa: PLW0603
    dist.monitored_barrier(_waiting, timeout=within)
    dist.destroy_process_group()
    _waiting = None


# ---------------------------------------------------------------------- rehearsing


class _Rehearsal(NamedTuple):
    world: int
    sent: list[tuple[str, int]]


_rehearsal: _Rehearsal | None = None


@contextmanager
def rehearsal(world: int) -> Iterator[list[tuple[str, int]]]:
    """Inside the block this process acts the first of ``world`` that compute a step.

    It computes its own rows and takes those of the others to be like them. What it would send is not sent: the list
    holds (operation, bytes), "all_reduce" or "all_gather".
    """
    global _rehearsal  # noqa: PLW0603
    before, _rehearsal = _rehearsal, _Rehearsal(world, [])
    try:
        yield _rehearsal.sent
    finally:
        _rehearsal = before


def _all_reduce(x: Tensor) -> None:
    if _rehearsal is None:
        dist.all_reduce(x)
    else:
        _rehearsal.sent.append(("all_reduce", x.numel() * x.element_size()))


def _all_gather(x: Tensor) -> list[Tensor]:
    if _rehearsal is not None:
        _rehearsal.sent.append(("all_gather", _rehearsal.world * x.numel() * x.element_size()))
        return [x] * _rehearsal.world
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return parts


# ---------------------------------------------------------------------- tensors


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        _all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


class _Gather(torch.autograd.Function):
    """All rows, interleaved; backward sums what every process says of my rows: differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = _all_gather(_bytes(x))
        return torch.stack([part.view(x.dtype).view(x.shape) for part in parts], 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)[rank() :: world()]


def _bytes(x: Tensor) -> Tensor:
    """The bytes of ``x`` in logical order: gloo knows neither bool nor int16, nor memory laid out otherwise."""
    return x.detach().contiguous().flatten().view(torch.uint8)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes."""
    return _Sum.apply(x) if world() > 1 else x


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in global order; ``x`` has as many rows on each, of any dtype."""
    return _Gather.apply(x) if world() > 1 else x


def average(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors of one dtype by their means over all processes, in flat buckets of about BUCKET numbers."""
    bucket: list[Tensor] = []
    for i, x in enumerate(tensors):
        bucket.append(x)
        if i + 1 == len(tensors) or sum(y.numel() for y in bucket) > BUCKET:
            flat = torch.cat([y.reshape(-1) for y in bucket])
            _all_reduce(flat)
            flat /= world()
            for y, part in zip(bucket, flat.split([y.numel() for y in bucket])):
                y.copy_(part.view_as(y))
            bucket = []


def spread(x: Tensor) -> None:
    """Overwrite ``x`` by the first process's."""
    if world() > 1:
        raw = _bytes(x).clone()
        dist.broadcast(raw, 0)
        with torch.no_grad():
            x.copy_(raw.view(x.dtype).view(x.shape))


def in_common(x: Tensor) -> Tensor:
    """The first process's ``x`` in memory that all processes, of one machine, read and write.

    OSError naming it where there is too little of it: a container's /dev/shm may have 64 MB.
    """
    if world() == 1:
        return x
    size = x.numel() * x.element_size()
    with ExitStack() as until_mapped:

        def make() -> str:
            if not MEMORY.is_dir():
                file: Any = until_mapped.enter_context(tempfile.NamedTemporaryFile())
                file.truncate(size)
                return str(file.name)
            with naming(MEMORY):
                # without a name nothing is left of it, whoever is killed and when
                file = until_mapped.enter_context(tempfile.TemporaryFile(dir=MEMORY))
                os.posix_fallocate(file.fileno(), 0, size)  # or the first write without room kills the process
            return f"/proc/{os.getpid()}/fd/{file.fileno()}"

        y = torch.from_file(first(make), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
        if rank() == 0:
            y.copy_(x.detach())
        agree(0)  # all have mapped it
    return y


# ---------------------------------------------------------------------- decisions


def agree(number: int) -> int:
    """The largest ``number`` that any process holds, on all of them."""
    if world() == 1:
        return number
    most = torch.tensor(number)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def first(do: Callable[[], T]) -> T:
    """What ``do()`` returns (a JSON value) on the first process, which alone calls it, on all of them.

    Where it raises, the others end with the exit code of its error and say nothing: the first one does.
    """
    if world() == 1:
        return do()
    if rank() > 0:
        said = _hear(None)
        if "exit" in said:
            raise SystemExit(said["exit"])
        return said["value"]
    try:
        value = do()
    except BaseException as error:
        _hear({"exit": getattr(error, "exit_code", 1)})
        raise
    _hear({"value": value})
    return value


def shared(items: Iterable[S], do: Callable[[S], Array]) -> Iterator[Array]:
    """``do(item)`` of every item, in order, on all processes; each item is worked on by one of them.

    Whole items are shared out, so no bit of a result depends on how many processes there are.
    """
    if world() == 1:
        yield from map(do, items)
        return
    queue = iter(items)
    while turn := list(islice(queue, world())):
        mine = io.BytesIO()
        if rank() < len(turn):
            np.save(mine, do(turn[rank()]), allow_pickle=False)
        for data in _everyones(mine.getvalue())[: len(turn)]:
            yield np.load(io.BytesIO(data), allow_pickle=False)


def _everyones(data: bytes) -> list[bytes]:
    """What each process says, in the order of their numbers."""
    mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=_waiting)
    most = max(1, *map(int, sizes))
    parts = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.cat([mine, mine.new_zeros(most - len(mine))]), group=_waiting)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes)]


def _hear(said: Any) -> Any:
    """Broadcast ``said`` from the first process, as JSON: what comes from elsewhere is never unpickled."""
    data = torch.tensor(list(json.dumps(said).encode()) if rank() == 0 else [], dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0, group=_waiting)
    data = data if rank() == 0 else torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=_waiting)
    return json.loads(bytes(data.tolist()))


def differing(digest: bytes) -> int | None:
    """The first process whose ``digest`` (of one length everywhere) is not the first process's, on all of them."""
    if world() == 1:
        return None
    parts = _all_gather(torch.tensor(list(digest), dtype=torch.uint8))
    return next((other for other, part in enumerate(parts) if not torch.equal(part, parts[0])), None)
