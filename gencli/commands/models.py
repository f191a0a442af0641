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
    """
    from gencli import console
    from gencli.models import TABLE

    if name is not None:
        from gencli.commands.info import about_model
        from gencli.console import UsageError, nearest

        if name not in TABLE:
            raise UsageError(f"no model {name!r}{nearest(name, TABLE)}", hint="gencli models")
        about_model(name, json)
        return
    from gencli.recipe import list_recipes

    recipes: dict[str, list[str]] = {}
    for listed in list_recipes():
        recipes.setdefault(listed.model, []).append(listed.name)
    rows = [
        {
            "name": e.name,
            "family": e.family,
            "year": e.year,
            "capabilities": list(e.capabilities),
            "recipes": recipes.get(e.name, []),
            "origin": e.origin,
            "title": e.title,
        }
        for e in TABLE.values()
    ]
    console.table(rows, json=json)
