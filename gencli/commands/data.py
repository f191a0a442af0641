"""gencli data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, Json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="gencli data ls\n\nData sets: what there is, and what it looks like.")


@app.command("ls", short_help="List the data sets.")
def ls(data_root: DataRoot = None, json: Json = False) -> None:
    """gencli data ls

    List the data sets that gencli knows. A path (a folder of images, a folder per class, .npz, .npy) is one too.
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


@app.command("show", short_help="Draw a contact sheet.")
def show(
    name: Annotated[str, typer.Argument(help="A data set's name, or a path.")] = "digits",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    n: Annotated[int, typer.Option("-n", help="How many examples.", min=1)] = 64,
    out: Annotated[str, typer.Option("-o", "--out", help="The picture.")] = "data.png",
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli data show digits -o digits.png

    Draw a contact sheet of a data set (points as a scatter), and print its shape, levels, counts and digest.
    """
    import torch

    from gencli import console, data, pictures
    from gencli.console import UsageError
    from gencli.sampling import picture
    from gencli.streams import Samples

    if Path(out).suffix.lower() != ".png":
        raise UsageError(f"{out}: a contact sheet is a .png")
    source = data.load(name, split, str(data_root) if data_root else None)
    count = 5000 if source.spec.kind == "points" else n
    rows = min(count, source.size) if source.size is not None else count
    fields = source.rows(torch.arange(rows))
    labels = fields["label"].numpy() if "label" in fields else None
    sheet = picture([Samples(fields["x"].numpy(), labels, 0)], source.spec)
    pictures.save_png(out, sheet)
    spec = source.spec
    row = {
        "data": f"{source.name}@{split}",
        "rows": source.size,
        "shape": list(spec.shape),
        "levels": spec.levels,
        "classes": len(spec.classes),
        "digest": source.digest,
        "picture": out,
    }
    console.table([row], json=json or None)
