"""gencli evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import (
    DataName,
    DataRoot,
    Device,
    Devices,
    ExtractorName,
    ExtractorWeights,
    Json,
    Seed,
    Weights,
    fan_out,
)

__all__ = ["evaluate"]

CHOICES = (
    "nll, elbo, iwae, inverse, modes, accuracy, probe, knn, fid, kid, inception-score, precision-recall, "
    "memorisation, or all of them; of word vectors similarity and analogy"
)
OF_WORDS = ("similarity", "analogy")


def evaluate(
    metric: Annotated[str, typer.Argument(help=f"{CHOICES}.")],
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="SUBJECT",
            help="A run folder, its number, a checkpoint; or samples: a folder, .npz, .tar, or - for a stream. "
            "The latest run without it. Of word vectors also a file of them.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Sampling options, as of gencli sample; the questions of similarity and analogy."
        ),
    ] = None,
    data: DataName = None,
    data_root: DataRoot = None,
    split: Annotated[str, typer.Option(help="Of the reference: test, val, train, or all of them.")] = "test",
    n: Annotated[int | None, typer.Option("-n", help="At most so many examples, or so many samples.", min=1)] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "-k", help="iwae, and nll of a model with that bound: draws of z an example; 1000, nll 100.", min=1
        ),
    ] = None,
    extractor: ExtractorName = None,
    extractor_weights: ExtractorWeights = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="fid: of each class too, and their mean.")] = False,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="fid: also for endless samples (Chong and Forsyth 2019).")
    ] = False,
    baselines: Annotated[bool, typer.Option(help="fid: real rows and a Gaussian beside it.")] = True,
    labels: Annotated[
        int | None, typer.Option(metavar="N", help="probe, knn: learn from N labels; all of train without it.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="memorisation: a picture of the pairs.")
    ] = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
    devices: Devices = 1,
    json: Json = False,
) -> None:
    """gencli eval fid -n 500

    Measure a run, or samples from anywhere, on the test split of the data: gencli sample -n 500 -o - | gencli eval fid
    - --data digits. The result is a table on a terminal and one JSON object a line otherwise, and names unit, kind,
    data, counts, extractor, weights and seed.
    """
    from gencli import console, processes
    from gencli.commands.sample import parse_options
    from gencli.training.launch import joined
    from gencli.training.scores import METRICS, Asked, check_metric, scores

    if subject is not None and "=" in subject and not Path(subject).exists():
        options, subject = [subject, *(options or [])], None
    if k is not None and metric not in ("iwae", "nll"):
        raise console.UsageError(f"-k is for iwae and nll, not {metric}")
    if devices > 1 and subject == "-":
        raise console.UsageError("a stream is read by one process: --devices is for runs and files")
    check_metric(metric, (*METRICS, *OF_WORDS, "all"))
    if metric in OF_WORDS:
        from gencli.commands.words import measure

        console.table(measure(metric, [word for word in (subject, *(options or [])) if word], n), json=json or None)
        return
    fan_out(devices)
    asked = Asked(
        data=data,
        root=str(data_root) if data_root else None,
        split=split,
        n=n,
        seed=seed,
        k=k,
        options=parse_options(options or []),
        extractor=extractor,
        extractor_weights=extractor_weights,
        per_class=per_class,
        extrapolate=extrapolate,
        baselines=baselines,
        labels=labels,
        out=out,
    )
    with joined(device):
        rows = scores(None if metric == "all" else [metric], _open(subject, weights, device, n), asked)
        if processes.rank() == 0:
            for row in rows:  # a table each: their columns differ
                console.table([row], json=json or None)


def _open(subject: str | None, weights: str, device: str, n: int | None) -> Any:
    """A ``checkpoint.Loaded`` model, or a ``streams.Reading`` of samples."""
    from gencli import streams
    from gencli.commands.options import load_run

    if subject is not None and _holds_samples(subject):
        return streams.read(subject, n)
    return load_run(subject, weights, device)


def _holds_samples(subject: str) -> bool:
    """Whether ``subject`` is samples, and no run or checkpoint."""
    from gencli.console import DataError
    from gencli.header import read_header

    path, ending = Path(subject), Path(subject).suffix.lower()
    if path.is_dir():
        ours = ("run.json", "checkpoints", "model.safetensors", "manifest.json")
        return not any((path / name).exists() for name in ours) and any(path.iterdir())
    if ending == ".safetensors" and path.is_file():
        try:
            return "model" not in read_header(path)[0]
        except DataError:
            return True
    return subject == "-" or ending in (".tar", ".npz", ".npy", ".png", ".jpg", ".jpeg", ".wav", ".flac")
