"""gencli evaluate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gencli.commands.options import DataName, DataRoot, Device, Devices, Json, Seed, Weights, fan_out

__all__ = ["METRICS", "evaluate", "score"]

METRICS = ("nll", "modes")


def evaluate(
    metric: Annotated[str, typer.Argument(help="nll (likelihood) or modes (of points/25-gaussians).")],
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, its number, a checkpoint; the latest run without it."),
    ] = None,
    data: DataName = None,
    data_root: DataRoot = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    n: Annotated[int | None, typer.Option("-n", help="At most so many examples, or so many samples.", min=1)] = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
    devices: Devices = 1,
    json: Json = False,
) -> None:
    """gencli eval nll

    Measure a run on the test split of its data. The result is a table on a terminal and one JSON object a line
    otherwise, and names unit, kind, data, counts, weights and seed.
    """
    from gencli import console, processes
    from gencli.commands.options import load_run
    from gencli.training.launch import joined

    fan_out(devices)
    check_metric(metric)
    with joined(device):
        loaded = load_run(run, weights, device)
        root = str(data_root) if data_root else None
        row = score(metric, loaded, data=data, root=root, split=split, n=n, seed=seed)
        if processes.rank() == 0:
            console.table([row], json=json or None)


def check_metric(metric: str) -> None:
    """UsageError if there is no such metric."""
    from gencli.console import UsageError, nearest

    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}{nearest(metric, METRICS)}: there is {', '.join(METRICS)}")


def score(
    metric: str, loaded: Any, *, data: str | None, root: str | None, split: str, n: int | None, seed: int
) -> dict[str, Any]:
    """One metric of one loaded checkpoint: a row that says how it was measured."""
    from gencli import data as sets
    from gencli.metrics import likelihood, modes

    part = loaded.meta["recipe"]["data"]
    name = data or part["name"]
    root = root or part.get("root")
    if metric == "modes":
        row = modes.modes(loaded.model, name, n=n or modes.SAMPLES, seed=seed)
    else:
        source = sets.load(name, split, root)
        row = likelihood.nll(loaded.model, source, seed=seed, limit=n)
        if source.spec.kind == "text":
            row |= likelihood.per_character(row, source)
        if source.spec.levels is not None:
            what, bits = likelihood.baseline(sets.load(name, "train", root), source)
            row |= {what: bits, "ratio": row["bits_per_dim"] / bits}
    return row | {
        "model": loaded.meta["model"],
        "step": loaded.meta["step"],
        "weights": loaded.weights,
        "seed": seed,
        "checkpoint": str(loaded.path.parent),
    }
