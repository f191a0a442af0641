"""gencli interpolate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import Device, RunName, Seed, Weights

__all__ = ["interpolate"]


def interpolate(
    run: RunName = None,
    out: Annotated[
        str, typer.Option("-o", "--out", help=".png (strips, or a grid), .gif, .npz, .tar or -.")
    ] = "interpolation.png",
    path: Annotated[str, typer.Option(help="slerp, lerp, or model: the model's own path.")] = "slerp",
    pairs: Annotated[int, typer.Option(help="How many pairs of ends, one strip each.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Pictures a strip, both ends among them.", min=2)] = 10,
    grid: Annotated[bool, typer.Option("--grid", help="One square between four corners instead of strips.")] = False,
    start: Annotated[str | None, typer.Option("--from", help="A picture to begin at, instead of a draw.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="A picture to end at.")] = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
) -> None:
    """gencli interpolate -o strip.png

    Walk through the latent space of a run: strips between draws of the prior (or between two pictures), a grid between
    four corners, or a looped GIF (`-o walk.gif`).
    """
    import torch

    from gencli import console
    from gencli.commands.options import load_run
    from gencli.console import UsageError
    from gencli.latents import bilinear, ends, walk
    from gencli.sampling import raw

    loaded = load_run(run, weights, device)
    model = loaded.model
    if not (hasattr(model, "prior") and hasattr(model, "decode")):
        raise UsageError(f"{loaded.meta['model']} has no latents to walk through", hint="gencli models")
    if (start is None) != (end is None):
        raise UsageError("--from and --to go together")
    if grid and start:
        raise UsageError("--grid lies between four draws: it goes without --from and --to")
    given = [start, end] if start and end else []
    z = ends(model, 4 if grid else 2 * pairs, given, seed=seed)
    with torch.no_grad():
        if grid:
            rows, columns = steps, steps
            between = bilinear(model, z[0], z[1], z[2], z[3], steps, path)
        else:
            rows, columns = len(z) // 2, steps
            between = torch.cat([walk(model, z[2 * i], z[2 * i + 1], steps, path) for i in range(rows)])
        parts = [raw(model.decode(part), model.spec) for part in between.split(model.chunk)]
    _write(out, parts, model, columns, loaded.meta)
    if out != "-":
        console.say(f"{rows} x {columns} pictures in {out}")


def _write(out: str, parts: list[Any], model: Any, columns: int, meta: dict[str, Any]) -> None:
    import numpy as np

    from gencli import pictures, streams

    x = np.concatenate(parts)
    spec = model.spec
    if out.endswith(".png") and spec.kind == "image":
        pictures.save_png(Path(out), pictures.grid(x, spec.levels, columns=columns))
    elif out.endswith(".gif") and spec.kind == "image":
        strips = x.reshape(-1, columns, *x.shape[1:])
        frames = [pictures.grid(strips[:, i], spec.levels, columns=_square(len(strips))) for i in range(columns)]
        pictures.gif(Path(out), frames + frames[-2:0:-1], ms=80)  # there and back again: the loop has no jump
    else:
        about = {"model": meta["model"], "step": meta["step"]}
        streams.write(out, iter([streams.Samples(x, None, 0)]), spec, about, len(x))


def _square(n: int) -> int:
    return max(1, round(n**0.5))
