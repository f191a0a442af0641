"""The run folder: numbering, lock, run.json, metrics.jsonl, log.txt. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from gencli import __version__, checkpoint, files
from gencli.console import DataError, GencliError, UsageError, nearest
from gencli.header import parse_json

__all__ = ["Follower", "Run", "environment", "find", "list_runs", "newest", "now", "read_record"]

KEYS = (
    "command",
    "job",
    "gencli",
    "python",
    "torch",
    "git",
    "machine",
    "device",
    "processes",
    "threads",
    "seed",
    "model",
    "data",
    "parameters",
    "start",
    "end",
    "state",
    "step",
    "steps",
    "best",
)
LOCK_WAIT = 0.5  # seconds; ``gencli runs`` touches a lock for an instant to see whether its run is alive

# Lock files open in this process. A process does not exclude itself by a POSIX lock, and loses it when it closes any
# descriptor of the file, so nothing else here may open one of these.
_held: dict[Path, int] = {}


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _git() -> dict[str, Any] | None:
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # look only: write no index
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    sha = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    if sha == "(initial)":
        return None
    return {"sha": sha, "dirty": any(not line.startswith("#") for line in lines)}


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What bits may depend on besides the recipe: versions, git state of the working folder, machine."""
    try:
        torch_version: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory: float | None = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (ValueError, OSError):
        memory = None
    return {
        "gencli": __version__,
        "python": platform.python_version(),
        "torch": torch_version,
        "git": _git(),
        "machine": {"system": platform.platform(), "cpu": _cpu(), "cores": cores, "memory_gb": memory},
    }


def _lock(folder: Path) -> int:
    """Hold ``folder/.lock`` until the process ends or closes the descriptor returned; GencliError if it is taken."""
    key = folder.resolve()
    busy = GencliError(f"{folder} is being written by another process", hint="gencli runs")
    if key in _held:
        raise busy
    try:
        # lockf, not flock: a flock outlives a killed owner while a forked child of it still runs
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(fd)
                raise GencliError(f"{folder}: cannot lock: {error.strerror}") from error
            if time.monotonic() > deadline:
                os.close(fd)
                raise busy from None
            time.sleep(0.02)
        else:
            _held[key] = fd
            return fd


def _alive(folder: Path) -> bool:
    """Whether a process holds the lock of ``folder``."""
    if folder.resolve() in _held:
        return True
    try:
        fd = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def read_record(folder: Path | str) -> dict[str, Any]:
    """The ``run.json`` of a run folder; DataError if there is none or it is damaged."""
    path = Path(folder) / "run.json"
    try:
        record = parse_json(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a run folder (no run.json)", hint="gencli runs") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: not a JSON object")
    return record


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: array scalars as numbers, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(folder: Path) -> int | None:
    found = re.match(r"(\d{4,})-", folder.name)
    return int(found[1]) if found else None


def _folders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []


def _allocate(root: Path, name: str) -> Path:
    """Make ``root/0007-name`` with a number that no other run has, whoever else is doing the same."""
    root.mkdir(parents=True, exist_ok=True)
    number = max((_number(p) or 0 for p in _folders(root)), default=0) + 1
    while True:
        # The name differs from creator to creator, so mkdir of the folder itself excludes nobody: claim the number.
        claim = root / f".{number:04d}"
        try:
            claim.mkdir()
        except FileExistsError:
            number += 1
            continue
        try:
            if not any(_number(p) == number for p in _folders(root)):
                folder = root / f"{number:04d}-{name}"
                folder.mkdir()
                return folder
        finally:
            claim.rmdir()
        number += 1


def _vacant(folder: Path) -> bool:
    """Whether a run may begin there: nothing is there, or what a run left that fell before its recipe was written."""
    if not folder.is_dir():
        return not folder.exists()
    names = {p.name for p in folder.iterdir()}
    return not names or (".lock" in names and all(n == "run.json" or n.startswith(".") for n in names))


class Run:
    """A run folder that this process writes. Use it as a context manager, or :meth:`close` it."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        """For :meth:`create` and :meth:`open`, which hold the lock."""
        self.path, self.record = path, record
        self._open: dict[str, TextIO] = {}

    @classmethod
    def create(cls, root: Path | str = "runs", name: str = "run", out: Path | str | None = None) -> Run:
        """A new, locked run: ``root/0007-name``, or exactly ``out``, which must be empty or missing (UsageError)."""
        if out is None:
            safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
            folder = _allocate(Path(root), safe)
        else:
            folder = Path(out)
            taken = UsageError(f"{folder} exists and is not an empty folder", hint="gencli train --out NEW_FOLDER")
            if not _vacant(folder):
                raise taken
            folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        facts = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), **environment()}
        run = cls(folder, {key: facts.get(key) for key in KEYS})
        if (folder / "recipe.yaml").exists():  # another process took the same ``out`` and has ended since
            run.close()
            raise taken
        run.update(start=now(), state="running")
        files.sync_folder(folder.parent)
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """A run that exists, locked, to go on with: its state becomes "running" again."""
        folder = Path(path)
        read_record(folder)
        _lock(folder)
        for leftover in [*folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")]:
            leftover.unlink(missing_ok=True)
        checkpoint.sweep(folder / "checkpoints")
        run = cls(folder, read_record(folder))
        run.update(state="running", end=None)
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and give the lock back."""
        for file in self._open.values():
            with contextlib.suppress(OSError):  # a full disk, told of when the line was written
                file.close()
        self._open.clear()
        fd = _held.pop(self.path.resolve(), None)
        if fd is not None:
            os.close(fd)

    def update(self, **fields: Any) -> None:
        """Set ``fields`` (of :data:`KEYS`) in run.json."""
        unknown = set(fields) - set(KEYS)
        if unknown:
            raise KeyError(f"run.json has no {', '.join(sorted(unknown))}")
        self.record.update(_plain(fields))
        files.write_json(self.path / "run.json", self.record)

    def finish(self, state: str) -> None:
        """Note how and when the run ended: "done", "interrupted", "diverged" or "failed"."""
        self.update(state=state, end=now())

    def write_recipe(self, text: str) -> None:
        """Keep the resolved recipe."""
        files.write_text(self.path / "recipe.yaml", text)

    def _append(self, name: str, line: str) -> None:
        if name not in self._open:
            self._open[name] = open(self.path / name, "a", encoding="utf-8")  # noqa: SIM115 (stays open)
        with files.naming(self.path / name):
            self._open[name].write(line + "\n")
            self._open[name].flush()

    def metric(self, event: str, step: int, time: float | None = None, **values: Any) -> None:
        """Append one event to metrics.jsonl; ``time`` is in seconds since training began or went on.

        The clock is seen under the key "time" alone: without it, two equal runs write equal lines. Numbers that are
        not finite become null.
        """
        line = {"event": event, "step": step, **values, "time": {"at": now(), "seconds": time}}
        self._append("metrics.jsonl", json.dumps(_plain(line), allow_nan=False, ensure_ascii=False))

    def sync(self) -> None:
        """Make what was appended so far durable."""
        for file in self._open.values():
            os.fsync(file.fileno())

    def log(self, text: str) -> None:
        """Append a line to log.txt."""
        self._append("log.txt", text)

    def truncate_metrics(self, step: int) -> None:
        """Drop torn lines and all after ``step``, so that a resumed run writes what an uninterrupted one would."""
        path = self.path / "metrics.jsonl"
        if "metrics.jsonl" in self._open:
            self._open.pop("metrics.jsonl").close()
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
        files.write_bytes(path, b"".join(kept))


class Follower(Run):
    """A run that another process of the same job writes: it has a folder and a record, and writes nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_record(path))

    def update(self, **fields: Any) -> None:
        """Nothing: the first process does it."""

    def write_recipe(self, text: str) -> None:
        """Nothing: the first process does it."""

    def truncate_metrics(self, step: int) -> None:
        """Nothing: the first process does it."""

    def _append(self, name: str, line: str) -> None:
        """Nothing: the first process does it."""


def list_runs(root: Path | str = "runs") -> list[dict[str, Any]]:
    """The ``run.json`` of every run in ``root``, oldest first, each with its ``path``.

    A run that says "running" although no process holds it was killed: its state reads "killed".
    """
    found = []
    for folder in _folders(Path(root)):
        if folder.name.startswith("."):
            continue
        try:
            record = {"path": folder, **read_record(folder)}
        except DataError:
            continue
        if record.get("state") == "running" and not _alive(folder):
            record["state"] = "killed"
        found.append(record)
    return sorted(found, key=lambda r: (str(r.get("start")), _number(r["path"]) or 0, r["path"].name))


def newest(root: Path | str = "runs") -> Path:
    """The run that started last; DataError if there is none."""
    runs = list_runs(root)
    if not runs:
        raise DataError(f"no runs in {root}", hint="gencli train pixelcnn")
    return runs[-1]["path"]


def find(what: Path | str | None, root: Path | str = "runs") -> Path:
    """What a person means: None for the newest run, ``7`` or ``0007`` for ``runs/0007-*``, a run's name, or a path."""
    if what is None:
        return newest(root)
    text = str(what)
    folders = _folders(Path(root))
    if text.isdecimal():
        for folder in sorted(folders):
            if _number(folder) == int(text):
                return folder
    for path in (Path(text), Path(root) / text):
        with contextlib.suppress(OSError):  # a name too long for a path is no run either
            if path.exists():
                return path
    names = [p.name for p in folders if not p.name.startswith(".")]
    raise DataError(f"no run or checkpoint {text!r}{nearest(text, names)}", hint="gencli runs")
