"""gencli runs."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import Json

__all__ = ["last_metrics", "runs"]

_TAIL = 1 << 16  # bytes of metrics.jsonl that are read, from its end


def runs(
    root: Annotated[Path, typer.Option(help="The folder that holds the runs.")] = Path("runs"), json: Json = False
) -> None:
    """gencli runs

    List the runs, oldest first: state, model, data, steps done, last training metrics, best score on the val split,
    and time since the start. `gencli info RUN` says more; `gencli train --resume RUN` goes on with one that stopped.
    """
    from gencli import console
    from gencli.console import DataError
    from gencli.run import list_runs

    if not root.is_dir():
        if root != Path("runs"):
            raise DataError(f"{root} is no folder", hint="gencli runs --root FOLDER")
        console.say("no runs here yet\n  gencli train pixelcnn")
        return
    try:
        rows = [_row(record) for record in list_runs(root)]
        known = {row["run"] for row in rows}
        rows += [
            {"run": str(p), "state": "broken"} for p in sorted(root.iterdir()) if str(p) not in known and _like_a_run(p)
        ]
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from None
    if not json and sys.stdout.isatty():
        rows = [{key: _short(key, value) for key, value in row.items()} for row in rows]
    console.table(rows, json=json)


def last_metrics(run: Path) -> dict[str, Any]:
    """The metrics of the last training event in ``metrics.jsonl``; empty if there is none. Torn lines are passed over."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read(_TAIL).split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            event = jsonlib.loads(line)
            if isinstance(event, dict) and event.get("event") == "train":
                return {k: v for k, v in event.items() if k not in ("event", "step", "time")}
    return {}


def _like_a_run(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return (
            path.is_dir()
            and not path.name.startswith(".")
            and (path.name[:4].isdigit() or (path / "run.json").exists())
        )
    return False


def _row(record: dict[str, Any]) -> dict[str, Any]:
    data, best = record.get("data"), record.get("best")
    return {
        "run": str(record["path"]),
        "state": record.get("state"),
        "model": record.get("model"),
        "data": data.get("name") if isinstance(data, dict) else data,
        "step": record.get("step"),
        "steps": record.get("steps"),
        "last": last_metrics(record["path"]),
        "best": best if isinstance(best, dict) else None,
        "age": _age(record.get("start")),
    }


def _age(start: Any) -> float | None:
    """Seconds since ``start`` (ISO 8601)."""
    try:
        return round((datetime.now(UTC) - datetime.fromisoformat(start)).total_seconds(), 1)
    except (TypeError, ValueError):
        return None


def _short(key: str, value: Any) -> Any:
    """``value`` as a cell of the table on a terminal."""
    if key == "age" and value is not None:
        for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
            if value >= 2 * seconds:
                return f"{value // seconds:.0f} {unit}"
        return f"{value:.0f} s"
    if key == "best" and value:
        return f"{value.get('metric')} {_number(value.get('value'))}"
    if key == "last":
        return ", ".join(f"{name} {_number(v)}" for name, v in list(value.items())[:3]) if value else None
    return value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
