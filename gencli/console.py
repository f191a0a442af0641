"""All that is said to a person (on stderr), errors and exit codes. Imports no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

__all__ = ["DataError", "Diverged", "GencliError", "UsageError", "nearest", "say"]


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
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
