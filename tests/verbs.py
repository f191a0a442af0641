"""The README's section on verbs, made from ``--help``: ``python -m tests.verbs`` writes it, a test compares it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- verbs: written by python -m tests.verbs -->", "<!-- end of verbs -->"
VERBS = (
    "train",
    "sample",
    "evaluate",
    "interpolate",
    "translate-embeddings",
    "apply",
    "compare",
    "models",
    "recipes",
    "recipes ls",
    "recipes cat",
    "recipes cp",
    "recipes validate",
    "data",
    "data ls",
    "data show",
    "data pack",
    "runs",
    "info",
    "doctor",
    "doctor scale",
)


def help_of(verb: str) -> str:
    """What ``gencli VERB --help`` prints."""
    command = [sys.executable, "-m", "gencli", *verb.split(), "--help"]
    plain = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    plain.pop("GENCLI_DATA", None)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    return "\n".join(lines)


def section() -> str:
    """The section, markers included."""
    parts = [BEGIN, ""]
    for verb in VERBS:
        parts += ["<details>", f"<summary><code>gencli {verb}</code></summary>", ""]
        parts += ["```text", help_of(verb), "```", "", "</details>"]
    return "\n".join([*parts, "", END])


def inserted(text: str) -> str:
    """``text`` of the README with the section renewed."""
    before, _, rest = text.partition(BEGIN)
    return before + section() + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(inserted(README.read_text()))
