"""gencli interpolate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, Device, RunName, Seed, Weights

__all__ = ["interpolate"]


def interpolate(
    run: RunName = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Rows of a .png, a film (.gif, .webp), .npz, .tar, a folder, or - for a stream; interpolation.png "
            "(traversal.png, scatter.png) without it.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Where to begin: a picture or a class of the run's data, whose mean latent is meant."
        ),
    ] = None,
    stops: Annotated[
        list[str] | None, typer.Option("--to", help="Where to go next, as in --from; again for a path of several.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="A path through the first samples of these seeds, such as 3,14,15 or 0-7.")
    ] = None,
    plus: Annotated[
        str | None, typer.Option("--add", help="Move by the mean latent of this class less that of --minus.")
    ] = None,
    minus: Annotated[str | None, typer.Option(help="The class whose mean latent --add takes away.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="A square between four corners instead of rows.")] = False,
    traverse: Annotated[
        bool, typer.Option("--traverse", help="A row for each latent dimension, from -3 to 3, the most active first.")
    ] = False,
    scatter: Annotated[
        bool, typer.Option("--scatter", help="Where the val split lies among the latents, coloured by class.")
    ] = False,
    path: Annotated[
        str | None, typer.Option(help="slerp, lerp, or model: the model's own, which is taken where there is one.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Go back from the last keyframe to the first.")] = False,
    pairs: Annotated[int, typer.Option(help="How many rows, where draws or dimensions make them.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Pictures from one keyframe to the next, both among them.", min=2)] = 10,
    labels: Annotated[str | None, typer.Option(help="Of class-conditional models: classes, a row each.")] = None,
    data_root: DataRoot = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
) -> None:
    """gencli interpolate -o walk.gif

    Walk through the latent space of a run: between draws of the prior, or between pictures, classes or seeds:

    gencli interpolate --from a.png --to b.png --to 7 -o path.png

    gencli interpolate --seeds 3,14,15 --loop -o walk.webp

    gencli interpolate --from face.png --add smiling --minus neutral

    A film goes there and back, or round with --loop. --from alone takes a file of several pictures (.npz, .tar, a
    folder, - for a stream): a path through all of them, a row each with --add, the four corners of --grid.
    """
    from gencli import streams
    from gencli.commands.options import load_run
    from gencli.console import UsageError
    from gencli.walks import Walker

    if (plus is None) != (minus is None):
        raise UsageError("--add and --minus go together: the difference of two classes is added")
    named = {"--grid": grid, "--add": plus is not None, "--traverse": traverse, "--scatter": scatter}
    chosen = [name for name, on in named.items() if on]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} are two pictures: choose one")
    mode = chosen[0] if chosen else ""
    _check(mode, {"--from": start, "--to": stops, "--seeds": seeds, "--loop": loop, "--path": path, "--labels": labels})
    loaded = load_run(run, weights, device)
    walker = Walker(loaded, data_root, seed, labels, path, steps, loop)
    if scatter:
        walker.scatter(out or "scatter.png")
        return
    keys = walker.keyframes(start, stops or [], seeds, mode)
    out = out or ("traversal.png" if traverse else streams.default_name("interpolation", loaded.model.spec))
    if grid:
        walker.write(out, *walker.square(keys))
    elif traverse:
        walker.traverse(out, keys, pairs)
    elif plus is not None and minus is not None:
        walker.write(out, walker.moved(keys, plus, minus, pairs))
    else:
        walker.write(out, *walker.rows(keys, pairs))


# Of --from, --to and the like, what each picture has no use for.
USELESS = {
    "--traverse": ("--to", "--loop", "--path"),
    "--scatter": ("--from", "--to", "--seeds", "--loop", "--path", "--labels"),
    "--grid": ("--loop",),
    "--add": ("--to", "--path"),
}


def _check(mode: str, given: dict[str, Any]) -> None:
    """UsageError for an option without a meaning here."""
    from gencli.console import UsageError

    for name in USELESS.get(mode, ()):
        if given[name]:
            raise UsageError(f"{mode} has no use for {name}")
    if given["--seeds"] and given["--from"]:
        raise UsageError("--seeds and --from: a path goes through one or the other")
    if given["--to"] and not given["--from"]:
        raise UsageError("--from and --to go together")
