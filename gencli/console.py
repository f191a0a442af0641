"""All that is said to a person (on stderr), results (on stdout), errors and exit codes. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import select
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from json import dumps
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DataError",
    "Diverged",
    "GencliError",
    "Progress",
    "UsageError",
    "nearest",
    "preview",
    "run",
    "say",
    "stdin_binary",
    "stdout_binary",
    "table",
]

BROKEN_PIPE, INTERRUPTED = 141, 130
DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too big"}


class GencliError(Exception):
    """What went wrong, in one line that names the culprit. ``hint`` names the command that helps."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(GencliError):
    """The command line or a recipe is wrong."""

    exit_code = 2


class DataError(GencliError):
    """Data or a checkpoint is missing or bad."""

    exit_code = 3


class Diverged(GencliError):
    """A loss or gradient is not finite."""

    exit_code = 4


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def say(text: str) -> None:
    """A line on stderr. Talk never ends the work: a closed or broken stderr is passed over."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: a signal came amid a write
            print(text, file=sys.stderr, flush=True)


def _on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _terminal(stream: Any) -> bool:
    """Whether ``stream`` is a terminal that can move its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _printable(text: str) -> str:
    """``text`` with control characters escaped: file names and members of archives are not ours."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------------------------------- the guard


def run(app: Callable[[], Any], argv: Sequence[str] | None = None) -> int:
    """Call ``app``, turn whatever it raises into one line on stderr, and return the exit code.

    ``app`` reads ``sys.argv``, which is set from ``argv`` (without the program's name) where given. ``--debug`` before
    a ``--`` is taken out of it; it, or ``GENCLI_DEBUG=1``, shows tracebacks. Usage errors and ``typer.Exit`` arrive as
    the SystemExit that Typer makes of them and keep their code; a return value of ``app`` is ignored.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = words[: words.index("--")] if "--" in words else words
    debug = _on("GENCLI_DEBUG") or "--debug" in options
    sys.argv = [*sys.argv[:1], *[w for w in options if w != "--debug"], *words[len(options) :]]
    try:
        app()
        code = 0
    except SystemExit as stop:
        # Typer turns a broken pipe into exit code 1 before anyone else sees it
        code = _failed(stop.__context__, debug) if isinstance(stop.__context__, BrokenPipeError) else _code(stop.code)
    except BaseException as error:
        code = _failed(error, debug)
    return _flush(code)


def _code(code: Any) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    say(str(code))
    return 1


def _failed(error: BaseException, debug: bool) -> int:
    """Report ``error``; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _reader_left():
        return BROKEN_PIPE
    if debug:
        say("".join(traceback.format_exception(error)).rstrip())
    message, hint, code = _explain(error)
    say(_printable(f"error: {message}"))
    if hint:
        say(_printable(f"  {hint}"))
    return code


def _explain(error: BaseException) -> tuple[str, str, int]:
    """(message, hint, exit code) for ``error``."""
    if isinstance(error, GencliError):
        return str(error), error.hint, error.exit_code
    kind, text = type(error).__name__, " ".join(str(error).split())[:500]
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in text:
        advice = "a smaller --batch-size helps, or train.accumulate=4, which keeps the batch and takes it in parts"
        return f"out of memory ({text[:200] or kind})", advice, 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in DISK:
            return f"{where}{DISK[error.errno]}", "", 1
        return f"{where}{error.strerror}", "--debug shows the traceback", 1
    return f"{kind}: {text}" if text else kind, "--debug shows the traceback", 1


def _reader_left() -> bool:
    """Whether nobody reads stdout any more. A broken pipe inside the program is an ordinary error."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return True


def _flush(code: int) -> int:
    """Write out what is buffered; the exit code, which says so if that failed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            if stream is sys.stdout and code == 0:
                code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1
                if code == 1:
                    say(f"error: standard output: {DISK.get(getattr(error, 'errno', None) or 0, error)}")
            # what is left in the buffer goes nowhere, or Python would complain about it when it shuts down
            with contextlib.suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, stream.fileno())
                os.close(devnull)
    return code


# ---------------------------------------------------------------------------------------------- progress


class Progress:
    """How far a loop has come, on stderr: a bar on a terminal, elsewhere a line every five seconds and one at the end.

    ``total`` is None where the end is unknown; ``start`` is how many a resumed loop has done already, which the rate
    leaves out. One inside another adds a second bar. ``GENCLI_QUIET=1`` silences it; ``NO_COLOR`` takes its colours.
    """

    EVERY = 5.0  # seconds between lines
    FRAME = 0.1  # seconds between redraws of a bar
    _bar: Any = None  # the rich bar on the screen, shared by those inside

    def __init__(self, total: int | None, title: str, unit: str = "step", start: int = 0) -> None:
        self.total, self.title, self.unit, self.done, self._start = total, title, unit, start, start
        self._metrics: Mapping[str, Any] = {}
        self._quiet, self._task, self._owner = _on("GENCLI_QUIET"), None, False

    def __enter__(self) -> Progress:
        self._begin = self._shown = time.monotonic()
        if not self._quiet and _terminal(sys.stderr):
            self._owner = Progress._bar is None
            if self._owner:
                Progress._bar = _rich_bar()
                Progress._bar.start()
            self._task = Progress._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def update(self, done: int, **metrics: Any) -> None:
        """``done`` are done in all. Metrics (numbers, 0-d tensors or text) are read only when they are shown."""
        self.done = done
        self._metrics = metrics or self._metrics
        now = time.monotonic()
        if not self._quiet and now - self._shown >= (self.EVERY if self._task is None else self.FRAME):
            self._shown = now
            self._show(now)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._quiet:
            return
        with contextlib.suppress(OSError, ValueError):
            self._show(time.monotonic())
        if self._task is not None:
            if self._owner:
                Progress._bar.stop()
                Progress._bar = None
            elif Progress._bar is not None:
                Progress._bar.remove_task(self._task)

    def _show(self, now: float) -> None:
        seconds = now - self._begin
        rate = (self.done - self._start) / seconds if seconds > 0 else 0.0
        parts = [_rate(rate, self.unit)] if rate else []
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        else:
            parts.append(f"{_clock(seconds)} in all")
        metrics = [f"{name} {_cell(_plain(value))}" for name, value in self._metrics.items()]
        parts = [*parts[1:], *metrics, *parts[:1]] if self._task is not None else [*parts, *metrics]
        if self._task is not None:
            Progress._bar.update(self._task, completed=self.done, note="  ".join(parts))
            Progress._bar.refresh()
        else:
            count = f"{self.done}/{self.total} ({self.done / self.total:.0%})" if self.total else str(self.done)
            say("  ".join([f"{self.title}: {count} {self.unit}s", *parts]))


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # on a narrow terminal the end of the note gives way, then the bar; never the count
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Bar(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=rest),
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        redirect_stdout=False,  # stdout is data: rich would send it to stderr
        expand=True,
    )


def _rate(rate: float, unit: str) -> str:
    return f"{_cell(rate)} {unit}s/s" if rate >= 1 else f"{_cell(1 / rate)} s/{unit}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# ---------------------------------------------------------------------------------------------- results


def table(rows: Sequence[Mapping[str, Any]], json: bool | None = None, title: str = "") -> None:
    """Results on stdout: an aligned table on a terminal, one JSON object a line elsewhere or with ``json``.

    Tables show four significant digits. JSON holds every digit, keeps the order of keys, and has ``null`` for numbers
    that are not finite, which JSON cannot say.
    """
    if sys.stdout is None:
        raise GencliError("standard output is closed")
    if json or not sys.stdout.isatty():
        for row in rows:
            print(dumps(_plain(row), ensure_ascii=False, allow_nan=False))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(_plain(row.get(name), finite=False)) for name in columns] for row in rows]
    right = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    bold, plain = ("\x1b[1m", "\x1b[0m") if _terminal(sys.stdout) and not os.environ.get("NO_COLOR") else ("", "")
    if title:
        print(f"{bold}{title}{plain}")
    if len(rows) == 1 and sum(widths) + 2 * len(widths) > shutil.get_terminal_size().columns:
        left = max(map(len, columns))
        for name, cell in zip(columns, cells[0]):
            print(f"{bold}{name:<{left}}{plain}  {cell}")
        return

    def line(texts: Iterable[str]) -> str:
        return "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right)).rstrip()

    if columns:
        print(f"{bold}{line(columns)}{plain}")
    for texts in cells:
        print(line(texts))


def _plain(value: Any, finite: bool = True) -> Any:
    """``value`` as JSON knows it: numpy and torch numbers unpacked, not-finite numbers None where ``finite``."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, finite) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), finite)
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(_plain(value, finite=False), (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    """``value`` as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:#.4g}".removesuffix(".")
        return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return _printable(str(value)).replace("\n", " ")


# ---------------------------------------------------------------------------------------------- pictures and pipes


def preview(image: np.ndarray[Any, Any]) -> None:
    """Draw ``image``, uint8 ``(H, W)`` or ``(H, W, 3)``, on a stderr that is a terminal; elsewhere do nothing.

    Each character cell shows two pixels, one above the other. A picture wider than the terminal is averaged down.
    Silent under ``NO_COLOR``, ``GENCLI_QUIET=1`` and ``TERM=dumb``.
    """
    if not _terminal(sys.stderr) or os.environ.get("NO_COLOR") or _on("GENCLI_QUIET"):
        return
    import numpy as np

    a = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    k = -(-a.shape[1] // shutil.get_terminal_size().columns)
    height, width = -(-a.shape[0] // (2 * k)) * 2 * k, -(-a.shape[1] // k) * k
    a = np.pad(a, ((0, height - a.shape[0]), (0, width - a.shape[1]), (0, 0)), mode="edge")
    a = a.reshape(height // k, k, width // k, k, 3).mean(axis=(1, 3)).round().astype(int)
    paint = _truecolor if os.environ.get("COLORTERM") in ("truecolor", "24bit") else _palette
    for above, below in zip(a[::2].tolist(), a[1::2].tolist()):
        say("".join(f"\x1b[38;{paint(*t)};48;{paint(*b)}m▀" for t, b in zip(above, below)) + "\x1b[0m")


def _truecolor(r: int, g: int, b: int) -> str:
    return f"2;{r};{g};{b}"


def _palette(r: int, g: int, b: int) -> str:
    """The nearest of the 256 colours that every terminal has: 24 greys, or a cube of 6 x 6 x 6."""
    if r == g == b and 4 <= r < 247:
        return f"5;{232 + (r - 3) // 10 if r > 8 else 232}"
    cube = [0 if v < 48 else 1 if v < 115 else (v - 35) // 40 for v in (r, g, b)]
    return f"5;{16 + 36 * cube[0] + 6 * cube[1] + cube[2]}"


def stdout_binary() -> BinaryIO:
    """stdout for bytes. UsageError where it is a terminal or closed."""
    if sys.stdout is None:
        raise UsageError("samples go to standard output, but it is closed")
    if sys.stdout.isatty():
        raise UsageError(
            "samples go to standard output, but that is a terminal",
            hint="pipe them on (gencli sample RUN -o - | ...), or name a file: -o samples.png",
        )
    return sys.stdout.buffer


def stdin_binary() -> BinaryIO:
    """stdin for bytes. UsageError where it is a terminal or closed: nothing would ever come."""
    hint = "pipe samples in (gencli sample RUN -o - | ...), or name a file"
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("samples come from standard input, but it is closed", hint=hint)
    if sys.stdin.isatty():
        raise UsageError("samples come from standard input, but that is a terminal", hint=hint)
    return sys.stdin.buffer
