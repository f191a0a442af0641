"""gencli sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import Device, Devices, RunName, Seed, Weights, fan_out

__all__ = ["parse_options", "sample"]


def sample(
    run: RunName = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Sampling options of the model, such as temperature=0.9, or truncation=0.7 of a GAN.",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="How many: 64; or data points beside a view: 2000.", min=1)
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Where to: .png, .gif, .wav, .txt, .npz, .safetensors, .tar, a folder, or - for a stream; samples.png "
            "(sounds: samples.wav, texts: samples.txt) without it.",
        ),
    ] = None,
    seed: Seed = 0,
    view: Annotated[
        str | None,
        typer.Option(
            metavar="density|map|progress",
            help="In place of samples: of a model of points in one or two dimensions its density, whose integral over "
            "the picture is printed, or its map from latents to points, as a warped grid or a curve; of any run its "
            "progress, a film (.gif, .webp) of the samples that training drew from the same noise.",
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Classes, such as 3 or 0,1,2 or cat,dog: taken in turn.")] = None,
    weights: Weights = "ema",
    device: Device = "auto",
    devices: Devices = 1,
) -> None:
    """gencli sample -n 64 -o grid.png

    Draw samples from a run (the latest without a name). Sample i is the same whatever -n is. `-o -` writes a tar
    stream of pictures, sounds or texts with a JSON sidecar each: `gencli sample -n 500 -o - | tar t`.

    gencli sample --view progress -o film.gif
    """
    from gencli.training.launch import joined

    if run is not None and "=" in run:
        options = [run, *(options or [])]
        run = None
    if view == "progress":
        others = {"--seed": seed or None, "--weights": None if weights == "ema" else weights}
        _film(run, out or "progress.gif", {"-n": n, "--labels": labels, **others, **dict.fromkeys(options or [], True)})
        return
    fan_out(devices)
    with joined(device):
        if view is not None:
            _view(run, parse_options(options or []), view, n or 2000, out, seed, labels, weights, device)
        else:
            _sample(run, parse_options(options or []), n or 64, out, seed, labels, weights, device)


def _sample(
    run: str | None,
    options: dict[str, Any],
    n: int,
    out: str | None,
    seed: int,
    labels: str | None,
    weights: str,
    device: str,
) -> None:
    from gencli import console, pictures, processes, streams
    from gencli.commands.options import load_run
    from gencli.console import UsageError
    from gencli.sampling import check_options, draw, parse_labels, picture

    loaded = load_run(run, weights, device)
    if not hasattr(loaded.model, "sample"):
        raise UsageError(f"{loaded.meta['model']} draws no samples", hint="gencli models lists what each model can do")
    check_options(loaded.model.sample, options)
    spec = loaded.model.spec
    out = out or streams.default_name("samples", spec)
    wanted = parse_labels(labels, loaded.model)
    chunks = draw(loaded.model, n, seed=seed, labels=wanted, options=options, chunk=loaded.meta["chunk"])
    if processes.rank() > 0:  # the first writes what all have drawn
        for _ in chunks:
            pass
        return
    meta = {"model": loaded.meta["model"], "step": loaded.meta["step"], "seed": seed, "weights": loaded.weights}
    with console.Progress(n, "sample", unit="sample") as progress:
        counted = _counted(chunks, progress)
        if spec.kind == "points" and out.endswith(".png"):
            pictures.save_png(out, picture(list(counted), spec, beside=_data_of(loaded)))
        else:
            streams.write(out, counted, spec, meta, n)
    if out != "-":
        console.say(f"{n} samples in {out}")


def _view(
    run: str | None,
    options: dict[str, Any],
    view: str,
    n: int,
    out: str | None,
    seed: int,
    labels: str | None,
    weights: str,
    device: str,
) -> None:
    import torch

    from gencli import console, pictures, processes, views
    from gencli.commands.options import load_run
    from gencli.console import UsageError
    from gencli.sampling import parse_labels

    views.check(view)
    if options:
        raise UsageError(f"a view has no option {next(iter(options))!r}: samples have")
    out = out or f"{view}.png"
    if not out.endswith(".png"):
        raise UsageError(f"a view is a picture: -o {view}.png, not {out}")
    loaded = load_run(run, weights, device)
    wanted = parse_labels(labels, loaded.model)
    source = _data_of(loaded)
    data = None if source is None else source.rows(torch.arange(min(n, source.size or n)))["x"].numpy()
    image, row = views.draw(view, loaded.model, data, seed=seed, labels=wanted)
    if processes.rank() == 0:
        pictures.save_png(out, image)
        about = {"view": view, "model": loaded.meta["model"], "step": loaded.meta["step"], "weights": loaded.weights}
        console.table([{**about, **row, "out": out}])


def _film(run: str | None, out: str, given: dict[str, Any]) -> None:
    """What training has drawn, one picture after another; the last stays for a second."""
    from gencli import console, pictures
    from gencli.console import UsageError
    from gencli.data.images import decode
    from gencli.run import find

    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--view progress shows what training has drawn: it has no use for {name}")
    if not out.lower().endswith((".gif", ".webp")):
        raise UsageError(f"progress is a film: -o progress.gif or progress.webp, not {out}")
    drawn = [decode(file.read_bytes(), str(file), channels=3).transpose(1, 2, 0) for file in _drawn(find(run))]
    frames = pictures.on_one_page(drawn)
    pictures.film(out, [*frames, *frames[-1:] * 4], ms=200)
    console.say(f"{len(frames)} picture{'s' * (len(frames) > 1)} in {out}")


def _drawn(folder: Path) -> list[Path]:
    """The pictures of the run at ``folder``, or of that in which it lies as a checkpoint does, in the order of steps."""
    from gencli.console import DataError

    home = next((p for p in (folder, *folder.absolute().parents) if (p / "run.json").exists()), folder)
    found = {int(p.stem[5:]): p for p in home.glob("samples/step-*.png") if p.stem[5:].isdecimal()}
    if not found:
        raise DataError(
            f"{home} has no pictures of samples: training has drawn none yet, or they are gone",
            hint="gencli train RECIPE train.sample_every=50",
        )
    return [found[step] for step in sorted(found)]


def _data_of(loaded: Any) -> Any:
    """What the run learned from, to be shown beside its samples; None where it is not at hand."""
    from gencli import data
    from gencli.console import GencliError

    part = loaded.meta["recipe"]["data"]
    try:
        return data.load(part["name"], "train", part["root"])
    except GencliError:
        return None


def _counted(chunks: Any, progress: Any) -> Any:
    for chunk in chunks:
        yield chunk
        progress.update(chunk.first + len(chunk.x))


def parse_options(words: list[str]) -> dict[str, Any]:
    """``temperature=0.9`` and the like; UsageError for a word without "=" or a value that is no scalar."""
    from gencli.console import UsageError
    from gencli.strict_yaml import scalar

    parsed = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UsageError(f"{word!r} is no KEY=VALUE")
        parsed[key] = scalar(text)
    return parsed
