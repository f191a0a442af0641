"""gencli apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataName, DataRoot, Device, Json, Seed, Weights

__all__ = ["apply"]

# and the methods that they take
TASKS = {
    "reconstruct": ("encode", "decode"),
    "complete": ("complete",),
    "neighbours": ("vectors",),
    "vectors": ("vectors",),
}
WHY = {"reconstruct": "it has no encoder", "complete": "it does not draw one part after another"}

OTHERS = (".npz", ".npy", ".tar", ".wav", ".flac", ".txt")  # files of inputs that are no pictures


def apply(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, its number, a checkpoint; the latest run without it."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Pictures, a folder, .npz, .tar, or - for a stream; words; and options: temperature=0.9.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--as", help="reconstruct or complete; of words neighbours (without it) or vectors."),
    ] = None,
    data: DataName = None,
    data_root: DataRoot = None,
    split: Annotated[str, typer.Option(help="Of the data set: test, val or train.")] = "test",
    n: Annotated[
        int | None,
        typer.Option("-n", help="At most so many inputs: 32, or 8 to complete; neighbours of a word: 10.", min=1),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="applied.png (inputs beside outputs), .npz, .tar, .wav, .txt, a folder or -; en.vec of words.",
        ),
    ] = None,
    given: Annotated[
        float, typer.Option(help="The share of a whole input that a completion is given.", min=0, max=1)
    ] = 0.5,
    each: Annotated[int, typer.Option(help="Completions of each input.", min=1)] = 4,
    labels: Annotated[
        str | None, typer.Option(help="Of class-conditional models: the inputs' classes, such as 3 or cat, in turn.")
    ] = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """gencli apply half.png --as complete -o whole.png

    Let a run work on given inputs (without any, on the test split of its data).

    reconstruct: encode and decode, inputs above outputs, and the error: squared, with pixels in [-1, 1], and the PSNR
    of its mean.

    complete: go on where an input ends: the upper rows of a picture, the beginning of a sound or a text. Of an input
    that is whole, the first half is given (--given). A row of pictures is what is given, completions, and the input.

    neighbours: the words nearest to each word or sum, such as king - man + woman; a line of stdin is one, with -.

    vectors: of the words given, of stdin's with -, or of all, in word2vec's text format, or as -o says: .vec, .vec.gz,
    .bin, .safetensors.
    """
    from gencli import console
    from gencli.commands.options import load_run
    from gencli.commands.sample import parse_options
    from gencli.console import UsageError, nearest
    from gencli.data.images import SUFFIXES

    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}{nearest(task, TASKS)}: --as is {' or '.join(TASKS)}")
    words = [word for word in (run, *(inputs or [])) if word is not None]
    options = parse_options([word for word in words if "=" in word and not Path(word).exists()])
    words = [word for word in words if "=" not in word or Path(word).exists()]
    first = Path(words[0]) if words else Path()
    if first.suffix.lower() in (*SUFFIXES, *OTHERS) or (words and words[0] == "-"):
        words.insert(0, "")  # of the latest run, then
    loaded = load_run(words[0] or None if words else None, weights, device)
    name = loaded.meta["model"]
    task = task or ("neighbours" if hasattr(loaded.model, "vectors") else "reconstruct")
    if not all(hasattr(loaded.model, method) for method in TASKS[task]):
        hint = "gencli models lists what each model can do"
        if task in WHY:
            raise UsageError(f"{name} cannot {task}: {WHY[task]}", hint=hint)
        raise UsageError(f"{name} has no word vectors", hint=hint)
    if options and task != "complete":
        raise UsageError(f"{task} has no option {next(iter(options))!r}: complete has")
    if task in ("neighbours", "vectors"):
        from gencli.commands.words import neighbours, show_vectors

        if task == "neighbours":
            if out:
                raise UsageError("neighbours are printed: --out is for vectors (--as vectors)")
            neighbours(loaded, words[1:], n or 10, json)
        else:
            show_vectors(loaded, words[1:], n, out)
        return
    if task == "complete":
        row = _complete(loaded, words[1:], options, data, data_root, split, n or 8, out, given, each, labels, seed)
    else:
        row = _reconstruct(loaded, words[1:], data, data_root, split, n or 32, out, labels, seed)
    if out != "-":
        console.table([{"task": task, "model": name, **row}], json=json or None)
    elif task == "reconstruct":
        console.say(f"squared error {row['squared_error_per_dim']:.4g} a dimension")


def _reconstruct(
    loaded: Any,
    inputs: list[str],
    data: str | None,
    root: Any,
    split: str,
    n: int,
    out: str | None,
    labels: str | None,
    seed: int,
) -> dict[str, Any]:
    import math

    import numpy as np
    import torch

    from gencli import latents, pictures
    from gencli.console import UsageError
    from gencli.given import read_images
    from gencli.sampling import labels_for, parse_labels

    model, spec = loaded.model, loaded.model.spec
    wanted = parse_labels(labels, model)
    if inputs and not data:
        x, name = read_images(inputs, spec)[:n], "given"
    else:
        fields = _rows(loaded, inputs, data, root, split, n)
        x, name = fields["x"], f"{data or loaded.meta['recipe']['data']['name']}@{split}"
        if model.conditional and wanted is None and "label" in fields:
            wanted = fields["label"].tolist()
    if model.conditional and wanted is None:
        raise UsageError("this model encodes by class: say of which one each input is, such as --labels 3")
    y = labels_for(spec, range(len(x)), wanted) if wanted else None
    z = latents.encode(model, x, seed=seed, labels=y)
    made = np.concatenate(list(latents.decoded(model, z, y)))
    grid = None
    if spec.kind == "image":
        columns = min(16, len(x))
        above = [np.concatenate([x[i : i + columns], made[i : i + columns]]) for i in range(0, len(x), columns)]
        grid = pictures.grid(np.concatenate(above), spec.levels, columns=columns)
    error = (spec.scale(torch.from_numpy(made)) - spec.scale(torch.from_numpy(x))).double().square().flatten(1)
    mean = error.mean().item()
    psnr = {} if spec.levels is None else {"psnr_db": 10 * math.log10(4 / mean) if mean else math.inf}  # a peak of 2
    return {
        "data": name,
        "examples": len(x),
        "squared_error": error.sum(1).mean().item(),  # summed over dimensions, pixels in [-1, 1]
        "squared_error_per_dim": mean,
        **psnr,
        "weights": loaded.weights,
        "seed": seed,
        "out": _write(loaded, out, made, grid, "reconstruct"),
    }


def _complete(
    loaded: Any,
    inputs: list[str],
    options: dict[str, Any],
    data: str | None,
    root: Any,
    split: str,
    n: int,
    out: str | None,
    given: float,
    each: int,
    labels: str | None,
    seed: int,
) -> dict[str, Any]:
    import numpy as np

    from gencli import pictures
    from gencli.given import read_prompts
    from gencli.sampling import check_options, completions, parse_labels

    model, spec = loaded.model, loaded.model.spec
    check_options(model.complete, options)
    wanted = parse_labels(labels, model)
    if inputs and not data:
        prompts = read_prompts(inputs, spec)[:n]
    else:
        rows = _rows(loaded, inputs, data, root, split, n)
        prompts = list(rows["x"])
        if wanted is None and "label" in rows:
            wanted = rows["label"].tolist()
    heads = [_head(p, spec, given) for p in prompts]
    y = completions(
        model, heads, each=each, seed=seed, labels=wanted if model.conditional else None, options=options
    )  # (n, each, ...)
    grid = None
    if spec.kind == "image":
        whole = all(p.shape == spec.shape for p in prompts)
        begun = np.full((len(heads), 1, *spec.shape), spec.levels // 2, y.dtype)
        for shown, head in zip(begun, heads):
            shown[0, :, : head.shape[1]] = head
        parts = [begun, y, *([np.stack(prompts)[:, None]] if whole else [])]
        row = np.concatenate(parts, 1)
        grid = pictures.grid(row.reshape(-1, *spec.shape), spec.levels, columns=row.shape[1])
    shares = sorted({head.size / spec.dims for head in heads})
    return {
        "examples": len(heads),
        "completions": each,
        "given": shares[0] if len(shares) == 1 else shares,
        "out": _write(loaded, out, y.reshape(-1, *spec.shape), grid, "complete"),
    }


def _head(x: Any, spec: Any, given: float) -> Any:
    """What a completion is given of ``x``: all of a part of an example, the beginning of a whole one."""
    if x.shape != spec.shape:
        return x
    along = -2 if spec.kind == "image" else -1
    keep = round(given * x.shape[along])
    return x[:, :keep] if spec.kind == "image" else x[..., :keep]


def _rows(loaded: Any, inputs: list[str], data: str | None, root: Any, split: str, n: int) -> dict[str, Any]:
    """Rows of ``data``, or of the run's data set."""
    import torch

    from gencli import data as sets
    from gencli.console import UsageError

    if inputs:
        raise UsageError("give inputs or --data, not both")
    part = loaded.meta["recipe"]["data"]
    source = sets.load(data or part["name"], split, str(root) if root else part.get("root"))
    if not loaded.model.spec.fits(source.spec):
        raise UsageError(f"{source.name} is not what the model knows: {list(loaded.model.spec.shape)}")
    rows = min(n, source.size) if source.size is not None else n
    return {name: value.numpy() for name, value in source.rows(torch.arange(rows)).items()}


def _write(loaded: Any, out: str | None, y: Any, grid: Any, task: str) -> str:
    """Write outputs, as ``grid`` where a picture is asked for; where they are."""
    from gencli import pictures, streams

    dest = out or ("applied.png" if grid is not None else streams.default_name("applied", loaded.model.spec))
    if dest.endswith(".png") and grid is not None:
        pictures.save_png(dest, grid)
    else:
        about = {"model": loaded.meta["model"], "step": loaded.meta["step"], "task": task}
        streams.write(dest, iter([streams.Samples(y, None, 0)]), loaded.model.spec, about, len(y))
    return dest
