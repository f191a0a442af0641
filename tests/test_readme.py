"""The README says what is so: its commands are those of CI, its verbs those of ``--help``."""

from __future__ import annotations

import re
from pathlib import Path

from tests.verbs import BEGIN, END, VERBS, help_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(heading: str) -> str:
    """The first fenced block under a heading."""
    text = README.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1].strip()


def test_each_command_is_one_line():
    assert len(block("Quick start").splitlines()) == 1
    assert len(block("Tests").splitlines()) == 1


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == block("Tests")


def test_verbs_are_documented_by_their_help():
    documented = README.split(BEGIN, 1)[1].split(END, 1)[0]
    for verb in VERBS:
        assert f"```text\n{help_of(verb)}\n```" in documented, f"gencli {verb}: run python -m tests.verbs"


def test_every_help_opens_with_an_example():
    for verb in VERBS:
        text = help_of(verb)
        first = text.split("\n\n")[1].strip()
        assert first.startswith("gencli "), f"{verb}: {first!r}"
