"""gencli recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gencli.commands.options import Json

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="gencli recipes ls\n\nList, read, copy and check recipes: YAML files that say what to train, on what and how.",
)
Name = Annotated[str, typer.Argument(metavar="RECIPE", help="pixelcnn, pixelcnn/paper, or a .yaml file.")]


@app.command(short_help="List the recipes.")
def ls(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Only this model's.")] = None,
    json: Json = False,
) -> None:
    """gencli recipes ls

    List the recipes, or those of one model: data set, optimiser steps, and what came out.
    """
    from gencli import console
    from gencli.console import UsageError, nearest
    from gencli.recipe import list_recipes

    listed = list_recipes()
    names = {r.model for r in listed}
    if model is not None and model not in names:
        raise UsageError(f"no recipes of {model!r}{nearest(model, names)}", hint="gencli recipes ls")
    rows = [
        {"recipe": r.name, "data": r.data, "steps": r.steps, "about": r.headline}
        for r in listed
        if model in (None, r.model)
    ]
    console.table(rows, json=json)


@app.command(short_help="Print a recipe's file.")
def cat(recipe: Name) -> None:
    """gencli recipes cat pixelcnn

    Print a recipe's file as it is: `gencli recipes cat pixelcnn > mine.yaml`.
    """
    from gencli.recipe import find

    print(_text(find(recipe)[0]), end="")


@app.command(short_help="Copy a recipe's file, to change it.")
def cp(
    recipe: Name,
    to: Annotated[Path, typer.Argument(metavar="DEST", help="A new file, or a folder.")] = Path(),
) -> None:
    """gencli recipes cp pixelcnn mine.yaml

    Copy a recipe's file, to change and train it: `gencli train mine.yaml`. Prints the new file's path. Nothing is
    ever overwritten.
    """
    from gencli import files
    from gencli.console import UsageError
    from gencli.recipe import find

    path, _ = find(recipe)
    if to.is_dir():
        to /= (
            f"{path.parent.name}.yaml"
            if path.name in ("default.yaml", "recipe.yaml")
            else f"{path.parent.name}-{path.name}"
        )
    if to.exists():
        raise UsageError(f"{to} exists", hint=f"gencli recipes cp {recipe} ANOTHER.yaml")
    files.write_text(to, _text(path))
    print(to)


@app.command(short_help="Check recipes, without training.")
def validate(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE", help="Recipes and files; all shipped ones without any.")
    ] = None,
    json: Json = False,
) -> None:
    """gencli recipes validate mine.yaml

    Check recipes: every key, type and range, those of the model's configuration too. Exit code 2 and a line for
    each problem where something is wrong.
    """
    from gencli import console
    from gencli.console import UsageError
    from gencli.recipe import list_recipes, load

    rows, problems = [], []
    for name in recipes or [r.name for r in list_recipes()]:
        try:
            load(name, model=True)
            found = []
        except UsageError as error:
            found = str(error).splitlines()
        rows.append({"recipe": name, "valid": not found, "problems": found})
        problems += found
    console.table(rows, json=json)
    if problems:
        raise UsageError("\n".join(problems))


def _text(path: Path) -> str:
    from gencli.console import UsageError

    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
