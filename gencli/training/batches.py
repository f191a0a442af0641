"""Which rows the k-th batch holds: a function of (seed, phase, stream, k), so there is no cursor to lose."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from gencli.console import UsageError
from gencli.contract import Batch, Phase, Stream
from gencli.rng import generator

__all__ = ["Batches", "match"]

# rows and shards that are mixed at a time: as many rows as matter, no more files than may be open
WINDOW_ROWS, WINDOW_SHARDS = 1 << 16, 32
Array = np.ndarray[Any, Any]
Rows = dict[str, dict[str, torch.Tensor]]  # of each stream, by field
T = TypeVar("T")


def match(model: str, streams: dict[str, Stream], source: Any) -> None:
    """UsageError if ``source`` lacks what the model's streams ask for."""
    for stream in streams.values():
        if stream.rows != "all":
            raise UsageError(f"{model} needs {stream.rows} rows, and the data set {source.name!r} has no such part")
        kind = stream.options.get("kind")
        if kind != source.spec.kind and (kind or source.spec.kind == "tokens"):  # whole words are for who asks for them
            wanted = f"{kind}, and the data set {source.name!r} is {source.spec.kind}" if kind else "no whole words"
            hint = "text is docs:tokens, or a file: --data text.txt:tokens" if kind == "tokens" else "gencli data ls"
            raise UsageError(f"{model} reads {wanted}", hint=hint)
        if "label" in stream.fields and not source.spec.classes:
            raise UsageError(
                f"{model} needs labels, and the data set {source.name!r} has none",
                hint="a folder per class, or y beside x in an .npz, gives labels",
            )


class _Plan(NamedTuple):
    """An epoch of shards: its window w is ``shards[firsts[w] : firsts[w + 1]]`` and begins at row ``starts[w]``."""

    shards: Array
    firsts: list[int]
    starts: Array


class Batches:
    """Batches of one training source, for every phase and stream of a model.

    An epoch of a source in memory is one permutation of its rows. A source that says ``windows`` (the ends of its
    shards) is too large for that: its shards are permuted, taken a few at a time, and the rows of these few permuted.
    The next batch of a source that is ``slow`` is read while a step computes (``ahead``); no order depends on it.
    """

    def __init__(
        self,
        source: Any,
        streams: dict[str, Stream],
        *,
        seed: int,
        size: int,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self.source, self.streams, self.seed, self.size = source, streams, seed, size
        self.device, self.channels_last = device, channels_last
        self.ahead: bool = getattr(source, "slow", False)
        ends = getattr(source, "windows", None)
        self._ends: Array | None = None if ends is None else np.asarray(ends, np.int64)
        self._held: dict[tuple[object, ...], dict[tuple[int, ...], Any]] = {}
        self._reader: _Reader | None = None
        self._next: dict[tuple[str, int, int], tuple[int, Future[Rows] | None]] = {}

    def index(self, phase: str, stream: str, size: int, k: int) -> torch.Tensor:
        """The rows of the k-th global batch: every epoch is a permutation of its own, and no row is left out."""
        position = np.arange(k * size, (k + 1) * size)
        n = self.source.size
        if n is None:
            return torch.from_numpy(position)
        if self._ends is None and (e := k * size // n) == ((k + 1) * size - 1) // n:  # as it is for most
            return torch.from_numpy(self._order(phase, stream, n, e)[k * size - e * n :][:size].copy())
        epoch, place = position // n, position % n
        rows = np.empty_like(position)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            if self._ends is None:
                rows[here] = self._order(phase, stream, n, e)[place[here]]
            else:
                rows[here] = self._in_windows(self._ends, phase, stream, e, place[here])
        return torch.from_numpy(rows)

    def _in_windows(self, ends: Array, phase: str, stream: str, epoch: int, place: Array) -> Array:
        """The rows at ``place`` in ``epoch`` of shards that end at ``ends``."""
        plan = self._kept(("plan", phase, stream), (epoch,), lambda: self._plan(ends, phase, stream, epoch))
        window = np.searchsorted(plan.starts, place, side="right") - 1
        rows = np.empty_like(place)
        for w in np.unique(window).tolist():
            shards = plan.shards[plan.firsts[w] : plan.firsts[w + 1]]
            sizes = np.diff(ends, prepend=0)[shards]
            last = np.cumsum(sizes)
            order = self._order(phase, stream, int(last[-1]), epoch, w)
            at = order[place[window == w] - plan.starts[w]]  # rows of the window, as its shards follow one another
            shard = np.searchsorted(last, at, side="right")
            rows[window == w] = at - last[shard] + ends[shards[shard]]
        return rows

    def _plan(self, ends: Array, phase: str, stream: str, epoch: int) -> _Plan:
        """The shards in the order of ``epoch``, cut into windows."""
        shards = self._order(phase, stream, len(ends), epoch)
        firsts, starts, rows, total = [0], [0], 0, 0
        for i, size in enumerate(np.diff(ends, prepend=0)[shards].tolist()):
            if i > firsts[-1] and (rows + size > WINDOW_ROWS or i - firsts[-1] == WINDOW_SHARDS):
                firsts.append(i)
                starts.append(total)
                rows = 0
            rows += size
            total += size
        return _Plan(shards, [*firsts, len(shards)], np.array(starts))

    def epoch(self, size: int, k: int) -> torch.Tensor:
        """Which pass over the data each row of the k-th global batch belongs to: some sources draw anew in each."""
        return torch.arange(k * size, (k + 1) * size) // (self.source.size or 2**62)

    def _order(self, phase: str, stream: str, n: int, *of: int) -> Array:
        """A permutation of ``0 .. n - 1`` for ``of``: an epoch, or an epoch and one of its windows."""
        key = (self.seed, "order", phase, stream, *of)
        return self._kept((len(of), phase, stream), of, lambda: generator(*key).permutation(n))

    def _kept(self, what: tuple[object, ...], of: tuple[int, ...], make: Callable[[], T]) -> T:
        """``make()``, kept for the last two ``of`` that it was asked for: a batch may lie across a border."""
        kept = self._held.setdefault(what, {})
        if of not in kept:
            if len(kept) == 2:
                del kept[next(iter(kept))]
            kept[of] = make()
        return kept[of]

    def sizes(self, phase: Phase, stride: int) -> Mapping[str, int]:
        """Rows of each stream in a global batch of ``phase``; UsageError if ``stride`` parts would differ in size."""
        sizes = phase.batch
        if sizes is None:
            sizes = {name: round(self.size * s.ratio) for name, s in self.streams.items()}
        for size in sizes.values() or [self.size]:
            if size % stride:
                raise UsageError(f"a batch of {size} rows does not divide into {stride} parts (processes x accumulate)")
        return sizes

    def get(self, phase: Phase, k: int, offset: int = 0, stride: int = 1) -> Batch:
        """Rows ``offset::stride`` of the k-th batch of ``phase``, as its loss receives them.

        What goes wrong in reading them ahead is raised here.
        """
        indices = self._indices(phase, k, offset, stride)
        rows = self._read(indices)() if not self.ahead else self._read_ahead(indices, phase, k, offset, stride)
        parts = {}
        for name, (index, _) in indices.items():
            fields = {f: self._place(rows[name][f]) for f in self.streams[name].fields}
            parts[name] = Batch(**fields, index=index.to(self.device), n=len(index))
        if not parts:
            return Batch(n=self.size // stride)
        return next(iter(parts.values())) if len(self.streams) == 1 else Batch(**parts)

    def _indices(self, phase: Phase, k: int, offset: int, stride: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(rows, epoch of each) of every stream."""
        return {
            name: (
                self.index(phase.name, name, size, k)[offset::stride],
                self.epoch(size, k)[offset::stride],
            )
            for name, size in self.sizes(phase, stride).items()
        }

    def _read(self, indices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], Rows]:
        """What reads the rows ``indices``; it holds the source and not me, who must be free to go while it runs."""
        source = self.source
        return lambda: {name: source.rows(index, epoch) for name, (index, epoch) in indices.items()}

    def _read_ahead(self, indices: Any, phase: Phase, k: int, offset: int, stride: int) -> Rows:
        """The rows ``indices``, perhaps read already; whoever has asked for two batches in a row will want a third."""
        expected, ready = self._next.pop((phase.name, offset, stride), (None, None))
        rows = ready.result() if ready is not None and expected == k else self._read(indices)()
        following = None
        if expected == k:
            self._reader = self._reader or _Reader()
            following = self._reader.start(self._read(self._indices(phase, k + 1, offset, stride)))
        self._next[phase.name, offset, stride] = (k + 1, following)
        return rows

    def _place(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x


class _Reader:
    """A thread that reads what will be asked for next. It ends with this object and keeps no process alive."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._tasks,), name="gencli-reader", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._tasks, thread)  # at the latest when the interpreter ends

    def start(self, read: Callable[[], Rows]) -> Future[Rows]:
        """Begin ``read()`` once those before it are done."""
        found: Future[Rows] = Future()
        self._tasks.put((read, found))
        return found


def _serve(tasks: queue.SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        read, found = task
        try:
            found.set_result(read())
        except BaseException as error:
            found.set_exception(error)
        del task, read, found  # a batch is held by whom it is for


def _stop(tasks: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    with suppress(queue.Empty):
        while True:
            tasks.get_nowait()
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=2.0)  # not for ever: a disk or a network may hang
