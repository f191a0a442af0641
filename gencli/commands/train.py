"""gencli train."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import Devices, Overrides, fan_out

__all__ = ["train", "train_recipe"]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="pixelcnn, pixelcnn/paper, or a .yaml file: see gencli recipes ls."),
    ] = None,
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="A data set's name, or a path.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of standard data sets.", envvar="GENCLI_DATA")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    devices: Devices = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder; runs/NNNN-... without it.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Begin with the weights of this run or checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, sizes, time and memory, and stop.")
    ] = False,
    preview: Annotated[bool, typer.Option(help="Show small samples in the terminal.")] = True,
) -> None:
    """gencli train pixelcnn

    Train a recipe. Prints the run's folder on stdout, alone: `gencli sample $(gencli train vae) -o v.png` works.
    Every value of the recipe can be set by KEY=VALUE: `gencli train vae model.latents=32 train.ema=0.999`.
    """
    from gencli.console import UsageError
    from gencli.recipe import load
    from gencli.training.launch import restarted

    if not dry_run:
        fan_out(devices)
    options = {
        "data.name": data,
        "data.root": str(data_root) if data_root else None,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.lr": lr,
        "seed": seed,
        "device": device,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if (job := restarted()) is not None and (begun := _begun(job, out)) is not None:
        _tell(_resume(str(begun), [], {}, preview))  # whatever the command line says: it is in the run's recipe
        return
    if resume is not None:
        words = ([recipe] if recipe else []) + (overrides or [])
        if out or init_from or any("=" not in w for w in words):
            raise UsageError("--resume takes a run, and overrides alone", hint=f"gencli train --resume {resume}")
        _tell(_resume(resume, words, given, preview))
        return
    if recipe is None or "=" in recipe:
        raise UsageError("which recipe? for example: gencli train pixelcnn", hint="gencli recipes ls")
    resolved = _placed(load(recipe, overrides or [], given, model=True))
    if dry_run:
        _dry_run(resolved)
        return
    _tell(train_recipe(resolved, out=out, init_from=init_from, preview=preview))


def _begun(job: str, out: Path | None) -> Path | None:
    """The run that ``job`` had begun before it was started again; None if it fell before there was one to go on with."""
    from gencli.run import list_runs

    if out is not None:
        return out if (out / "recipe.yaml").exists() else None
    mine = [r["path"] for r in list_runs() if r.get("job") == job and (r["path"] / "recipe.yaml").exists()]
    return mine[-1] if mine else None


def _tell(path: Path) -> None:
    """The run's folder on stdout, by one process."""
    if os.environ.get("RANK", "0") == "0":
        print(path)


def _placed(recipe: Any) -> Any:
    """``recipe`` with a user's data named by its absolute path, so that the run finds it from any folder."""
    from gencli.data import SETS
    from gencli.data.table import split_name

    name, variants = split_name(recipe.data.name)
    path = Path(name).expanduser()
    if name in SETS or not path.exists():
        return recipe
    placed = ":".join([str(path.absolute()), *variants])
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": placed})})


def train_recipe(recipe: Any, *, out: Path | None = None, init_from: str | None = None, preview: bool = True) -> Path:
    """Train ``recipe`` in a new run folder and return the folder."""
    from gencli.run import Run
    from gencli.training.launch import joined, led
    from gencli.training.session import Session
    from gencli.training.settings import settings

    with joined(recipe.device), settings(recipe) as device:
        session = Session(recipe, device)
        if init_from is not None:
            _initialise(session.model, init_from)
        name = f"{recipe.model.name}-{Path(recipe.data.name).name}"
        with led(lambda: Run.create(name=name, out=out)) as run:
            session.start(run, save=init_from is not None)
            _fit(session, preview)
            return run.path


def _initialise(model: Any, what: str) -> None:
    """Give ``model`` the averaged weights of another run or checkpoint of the same shape."""
    from gencli import checkpoint
    from gencli.console import UsageError
    from gencli.run import find

    state = checkpoint.load(find(what)).model.state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UsageError(f"--init-from {what}: its weights do not fit this model: {reason}") from None


def _resume(what: str, words: list[str], options: dict[str, Any], preview: bool) -> Path:
    from gencli.console import UsageError, say
    from gencli.recipe import digest, load
    from gencli.run import Run, find, read_record
    from gencli.training.launch import joined, led
    from gencli.training.session import Session
    from gencli.training.settings import settings

    path = find(what)
    before, recipe = load(str(path)), load(str(path), words, options, model=True)
    if digest(before) != digest(recipe):
        changed = ", ".join(words + [f"{key}={value}" for key, value in options.items()])
        raise UsageError(
            f"{changed} would change what {path} has been so far (steps too, where a schedule counts them)",
            hint=f"gencli train {path}/recipe.yaml --init-from {path} starts anew with its weights",
        )
    if before.train.steps != recipe.train.steps:
        say(f"going on to {recipe.train.steps} steps: where a loss follows progress, not the same as from the start")
    done = read_record(path).get("step") or 0
    if recipe.train.steps < done:
        raise UsageError(f"{path} has done {done} steps: train.steps is at least that")
    with joined(recipe.device), settings(recipe) as device, led(lambda: Run.open(path)) as run:
        session = Session(recipe, device)
        session.resume(run)
        _fit(session, preview)
        return path


def _fit(session: Any, preview: bool) -> None:
    """Train, and say at the end what came out and what to do with it."""
    from gencli import console, processes
    from gencli.metrics.likelihood import baseline

    run, began = session.run, time.monotonic()
    if processes.rank() > 0:
        session.fit(preview=False)
        return
    recipe = session.recipe
    spec, rows = session.train_data.spec, [session.train_data.size, session.val_data.size]
    counts = "endless" if rows[0] is None else f"{rows[0]} train and {rows[1]} val rows"
    levels = "" if spec.levels is None else f" of {spec.levels} levels"
    several = f" x {processes.world()}" if processes.world() > 1 else ""
    console.say(
        f"{recipe.model.name} on {session.train_data.name} ({counts}, {'x'.join(map(str, spec.shape))}{levels}): "
        f"{session.parameters:,} parameters, {recipe.train.steps} steps of {recipe.train.batch_size}, "
        f"{session.device}{several}, {run.path}"
    )
    session.fit(preview=preview)
    drawn = f"; picture: {run.path}/samples" if hasattr(session.model, "sample") else ""
    console.say(f"trained in {time.monotonic() - began:.0f} s{drawn}")
    best = session.course.best
    if best is not None:
        line = f"{best['metric'].replace('_', ' ')} {best['value']:.4f} on {session.val_data.name}@val (step {best['step']})"
        if best["metric"] == "bits_per_dim":
            what, bits = baseline(session.train_data, session.val_data)
            line += f"; {what.replace('_', ' ')} {bits:.4f}"
        console.say(line)
    console.say("next: " + "; ".join(_next(session.model, run.path)))


def _next(model: Any, path: Path) -> list[str]:
    """Commands that show what a trained model can do."""
    from gencli.streams import default_name

    shown = default_name("grid", model.spec)
    return [
        *([f"gencli sample {path} -n 64 -o {shown}"] if hasattr(model, "sample") else []),
        *(["gencli eval nll"] if model.likelihood is not None else []),
        *(["gencli eval accuracy"] if hasattr(model, "classify") else []),
        *(["gencli eval probe"] if hasattr(model, "features") and not hasattr(model, "classify") else []),
        *([f"gencli apply {path} --as vectors -o words.vec"] if hasattr(model, "vectors") else []),
    ]


def _dry_run(recipe: Any) -> None:
    """Print the recipe, and on stderr what it would take, from a few measured steps."""
    import resource

    from gencli import console
    from gencli.recipe import dump
    from gencli.training.session import Session
    from gencli.training.settings import settings

    print(dump(recipe), end="")
    with settings(recipe) as device:
        session = Session(recipe, device)
        for name, part in session.model.named_children():
            console.say(f"{sum(p.numel() for p in part.parameters()):>12,}  {name}")
        console.say(f"{session.parameters:>12,}  parameters in all")
        session.trainer.step()
        began = time.monotonic()
        for _ in range(3):
            session.trainer.step()
        each = (time.monotonic() - began) / 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e9
    console.say(
        f"about {each * recipe.train.steps:.0f} s of training steps on {device} and {peak:.1f} GB (from 3 steps)"
    )
