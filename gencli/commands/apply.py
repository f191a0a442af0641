"""gencli apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataName, DataRoot, Device, Json, Seed, Weights

__all__ = ["apply"]


def apply(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, its number, a checkpoint; the latest run without it."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Pictures, a folder, .npz, .tar, or - for a stream."),
    ] = None,
    task: Annotated[str, typer.Option("--as", help="reconstruct.")] = "reconstruct",
    data: DataName = None,
    data_root: DataRoot = None,
    split: Annotated[str, typer.Option(help="Of the data set: test, val or train.")] = "test",
    n: Annotated[int, typer.Option("-n", help="At most so many inputs.", min=1)] = 32,
    out: Annotated[
        str, typer.Option("-o", "--out", help=".png (inputs above outputs), .npz, .tar, a folder or -.")
    ] = "applied.png",
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """gencli apply --as reconstruct -o pairs.png

    Let a run work on given inputs (without any, on the test split of its data). reconstruct: encode and decode, inputs
    above outputs, and the error on stdout.
    """
    import numpy as np
    import torch

    from gencli import console, pictures, streams
    from gencli.commands.options import load_run
    from gencli.console import UsageError, nearest
    from gencli.data.images import SUFFIXES
    from gencli.rng import SampleRng
    from gencli.sampling import raw, scope

    if task not in ("reconstruct",):
        raise UsageError(f"unknown task {task!r}{nearest(task, ['reconstruct'])}: --as is reconstruct")
    if run == "-" or Path(run or "").suffix.lower() in (*SUFFIXES, ".npz", ".npy", ".tar"):  # of the latest run, then
        inputs, run = [str(run), *(inputs or [])], None
    loaded = load_run(run, weights, device)
    model, spec = loaded.model, loaded.model.spec
    if not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise UsageError(f"{loaded.meta['model']} cannot reconstruct: it has no encoder", hint="gencli models")
    x = _inputs(inputs or [], loaded, data, data_root, split, n)
    place = next(model.parameters()).device
    given = torch.from_numpy(x)
    parts = []
    for start in range(0, len(x), model.chunk):
        rows = range(start, min(start + model.chunk, len(x)))
        with scope(SampleRng(seed, rows, "apply", place)) as rng:
            parts.append(raw(model.decode(model.encode(given[rows.start : rows.stop].to(place), rng)), spec))
    y = np.concatenate(parts)
    if out.endswith(".png") and spec.kind == "image":
        columns = min(16, len(x))
        above = [np.concatenate([x[i : i + columns], y[i : i + columns]]) for i in range(0, len(x), columns)]
        pictures.save_png(out, pictures.grid(np.concatenate(above), spec.levels, columns=columns))
    else:
        about = {"model": loaded.meta["model"], "step": loaded.meta["step"], "task": task}
        streams.write(out, iter([streams.Samples(y, None, 0)]), spec, about, len(y))
    if out == "-":
        return
    error = (spec.scale(torch.from_numpy(y)) - spec.scale(given)).double().square().flatten(1)
    row = {
        "task": task,
        "model": loaded.meta["model"],
        "examples": len(x),
        "squared_error": error.sum(1).mean().item(),  # summed over dimensions, pixels in [-1, 1]
        "squared_error_per_dim": error.mean().item(),
        "out": out,
    }
    console.table([row], json=json or None)


def _inputs(inputs: list[str], loaded: Any, data: str | None, root: Any, split: str, n: int) -> Any:
    """Raw inputs (n, ...) in the model's levels: given ones, else rows of the run's data set."""
    import torch

    from gencli import data as sets
    from gencli.console import UsageError
    from gencli.streams import read_images

    if inputs:
        if data:
            raise UsageError("give inputs or --data, not both")
        return read_images(inputs, loaded.model.spec)[:n]
    part = loaded.meta["recipe"]["data"]
    source = sets.load(data or part["name"], split, str(root) if root else part.get("root"))
    if (source.spec.shape, source.spec.levels) != (loaded.model.spec.shape, loaded.model.spec.levels):
        raise UsageError(f"{source.name} is not what the model knows: {list(loaded.model.spec.shape)}")
    rows = min(n, source.size) if source.size is not None else n
    return source.rows(torch.arange(rows))["x"].numpy()
