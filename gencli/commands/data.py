"""gencli data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, ExtractorName, ExtractorWeights, Json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="gencli data ls\n\nData sets: what there is, and what it looks like.")


@app.command("ls", short_help="List the data sets.")
def ls(data_root: DataRoot = None, json: Json = False) -> None:
    """gencli data ls

    List the data sets that gencli knows. A path (a folder of images or sounds, a folder per class, .npz, .npy, .txt)
    is one too. A variant follows a name after a colon: mnist:threshold, docs:words:64 (N: symbols or samples of an
    example).
    """
    from gencli import console, data

    rows: list[dict[str, Any]] = []
    for entry in data.SETS.values():
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "shape": "x".join(map(str, entry.shape)),
                "levels": entry.levels,
                "origin": entry.origin,
                "variants": ", ".join(entry.variants),
                "what": entry.description,
            }
        )
    console.table(rows, json=json or None)


@app.command("pack", short_help="Write a data set as shards.")
def pack(
    name: Annotated[str, typer.Argument(metavar="SOURCE", help="A data set's name, or a path.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the shards.")],
    shard_mb: Annotated[int, typer.Option(help="Megabytes of one shard at most.", min=1)] = 256,
    on_bad: Annotated[str, typer.Option(help="At a bad image: fail, or skip up to 10 % of them.")] = "fail",
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli data pack photos/ shards/

    Write a data set as tar shards with an index, to train from data that is larger than memory or lies behind a URL:
    `gencli train vae --data shards/`. Any tar and WebDataset read the shards.
    """
    from itertools import count

    from gencli import console, data
    from gencli.console import UsageError
    from gencli.data import packing
    from gencli.data.table import split_name

    packing.vacant(folder)
    base, variants = split_name(name)
    if "dynamic" in variants:
        hint = f"gencli data pack {base} {folder}, and then --data {folder}:dynamic"
        raise UsageError(f"{name} draws anew in every epoch, and shards would hold one drawing", hint=hint)
    if "tokens" in variants:
        raise UsageError(f"{name}: whole words are read from text as it is, however long: there is nothing to pack")
    sources = [data.load(name, split, str(data_root) if data_root else None, on_bad=on_bad) for split in data.SPLITS]
    total = sum(source.size or 0 for source in sources)
    with console.Progress(total, "pack", unit="row") as progress:
        done = count(1)
        packing.pack(sources, folder, shard_mb << 20, lambda: progress.update(next(done)))
    files = [path for path in folder.iterdir() if path.suffix == ".tar"]
    row = {
        "shards": str(folder),
        "data": name,
        **{source.split: source.size for source in sources},
        "files": len(files),
        "MB": round(sum(path.stat().st_size for path in files) / 2**20, 1),
    }
    console.table([row], json=json or None)


@app.command("stats", short_help="Save the statistics that fid compares with.")
def stats(
    name: Annotated[str, typer.Argument(metavar="SOURCE", help="A data set's name, or a path.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="A .safetensors file.")] = Path(
        "stats.safetensors"
    ),
    split: Annotated[str, typer.Option(help="test, val, train, or all of them.")] = "test",
    extractor: ExtractorName = None,
    extractor_weights: ExtractorWeights = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli data stats digits -o stats.safetensors

    Save mean and covariance of a split's features, for machines without the data: `gencli eval fid --data
    stats.safetensors`. The file names its data and extractor, and another extractor refuses it.
    """
    from gencli import console
    from gencli.console import UsageError
    from gencli.metrics.reference import Reference, Saved
    from gencli.training.scores import Asked, reference

    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: statistics are a .safetensors file")
    root = str(data_root) if data_root else None
    asked = Asked(root=root, split=split, extractor=extractor, extractor_weights=extractor_weights)
    seen_by, against = reference(name, asked)
    if not isinstance(against, Reference):
        raise UsageError(f"{name} holds statistics already")
    Saved.write(out, against)
    console.table(
        [{"data": against.name, "rows": against.size, **seen_by.about, "statistics": str(out)}], json=json or None
    )


@app.command("show", short_help="Draw a contact sheet.")
def show(
    name: Annotated[str, typer.Argument(help="A data set's name, or a path.")] = "digits",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    n: Annotated[int, typer.Option("-n", help="How many examples.", min=1)] = 64,
    out: Annotated[
        str, typer.Option("-o", "--out", help="A .png; of sounds also a .wav, of texts a .txt.")
    ] = "data.png",
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli data show digits -o digits.png

    Draw a contact sheet of a data set (points as a scatter, sounds as waveforms, texts as a page), and print its shape,
    levels, counts and digest. `-o sounds.wav` and `-o texts.txt` write what there is to hear and to read.
    """
    import torch

    from gencli import console, data, streams
    from gencli.console import UsageError

    if Path(out).suffix.lower() not in (".png", ".wav", ".txt"):
        raise UsageError(f"{out}: a contact sheet is a .png, or a .wav of sounds, or a .txt")
    source = data.load(name, split, str(data_root) if data_root else None)
    count = 5000 if source.spec.kind == "points" else n
    rows = min(count, source.size) if source.size is not None else count
    fields = source.rows(torch.arange(rows))
    labels = fields["label"].numpy() if "label" in fields else None
    spec = source.spec
    streams.write(out, [streams.Samples(fields["x"].numpy(), labels, 0)], spec, {}, rows)
    row = {
        "data": f"{source.name}@{split}",
        "rows": source.size,
        "shape": list(spec.shape),
        "levels": spec.levels,
        **({"rate": spec.rate} if spec.kind == "audio" else {}),
        "classes": len(spec.classes),
        "digest": source.digest,
        "picture": out,
    }
    console.table([row], json=json or None)
