"""gencli models."""

from __future__ import annotations

from typing import Annotated

import typer

from gencli.commands.options import Json

__all__ = ["models"]


def models(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="Say more about this one.")] = None,
    json: Json = False,
) -> None:
    """gencli models

    List the models: what each can do, its recipes and its paper. With a name, all about that model: its paper, its
    configuration and how it works, as gencli info does.

    Installed packages may offer more models (the column origin names them); GENCLI_NO_PLUGINS=1 leaves those out.
    """
    from gencli import console
    from gencli.models import listing

    if name is not None:
        from gencli.commands.info import about_model

        about_model(name, json)
        return
    from gencli.recipe import list_recipes

    recipes: dict[str, list[str]] = {}
    for listed in list_recipes():
        recipes.setdefault(listed.model, []).append(listed.name)
    entries, problems = listing()
    for problem in problems:
        console.say(problem)
    rows = [
        {
            "name": e.name,
            "family": e.family or None,
            "year": e.year or None,
            "capabilities": list(e.capabilities) or None,
            "recipes": recipes.get(e.name, []),
            "origin": e.origin,
            "title": e.title or None,
        }
        for e in entries
    ]
    console.table(rows, json=json)
