"""The command line: one line a verb. Imports no torch; each verb imports what it needs when it is called."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gencli import __version__, console
from gencli.commands import (
    apply,
    compare,
    data,
    doctor,
    evaluate,
    info,
    interpolate,
    models,
    recipes,
    runs,
    sample,
    train,
    translate_embeddings,
)

__all__ = ["app", "main"]

# Plain help: through rich it takes more than twice the time (0.10 s against 0.22 s), and wraps what is to be copied.
app = typer.Typer(
    name="gencli",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gencli {__version__}")
        raise typer.Exit


@app.callback()
def gencli(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    """gencli train pixelcnn

    Generative and unsupervised deep learning: train, sample, evaluate and interpolate every model by the same verbs.
    Results go to stdout, all else to stderr.
    """


app.command(short_help="Train a recipe.")(train.train)
app.command(short_help="Draw samples from a run.")(sample.sample)
app.command(short_help="Measure a run, or samples.")(evaluate.evaluate)
app.command("eval", hidden=True)(evaluate.evaluate)
app.command(short_help="Walk between latents or images.")(interpolate.interpolate)
app.command("translate-embeddings", short_help="Map word vectors of one language to another's.")(
    translate_embeddings.translate_embeddings
)
app.command(short_help="Let a run work on given inputs.")(apply.apply)
app.command(short_help="Train recipes side by side and judge.")(compare.compare)
app.command(short_help="List the models.")(models.models)
app.add_typer(recipes.app, name="recipes", short_help="List, read, copy and check recipes.")
app.add_typer(data.app, name="data", short_help="List, show and pack data sets.")
app.command(short_help="List the runs.")(runs.runs)
app.command(short_help="All about a model, run or checkpoint.")(info.info)
app.add_typer(doctor.app, name="doctor", short_help="Check this machine.")


def main() -> int:
    """Run the command line; the exit code."""
    # torch's threads spin while they wait for each other. A short spin costs nothing where gencli is alone, and leaves
    # a core to what shares the machine: the other end of a pipe, on two cores, by a fifth.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    return console.run(app)
