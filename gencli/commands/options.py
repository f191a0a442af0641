"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "DataName",
    "DataRoot",
    "Device",
    "Devices",
    "ExtractorName",
    "ExtractorWeights",
    "Json",
    "Overrides",
    "RunName",
    "Seed",
    "Weights",
    "fan_out",
    "load_run",
]

RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="A run folder, its number, a checkpoint or a .safetensors file; the latest run without it.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as model.channels=32.")
]
Seed = Annotated[int, typer.Option(help="Seed of all draws.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, also on a terminal.")]
Weights = Annotated[str, typer.Option(help="ema (averaged, where the run averaged) or raw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Devices = Annotated[
    int, typer.Option(min=1, metavar="N", help="Processes that share the work: one a GPU, or on the CPU.")
]
DataName = Annotated[str | None, typer.Option("--data", help="A data set's name, or a path; the run's own without it.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of standard data sets, in torchvision's layout.", envvar="GENCLI_DATA")
]

ExtractorName = Annotated[
    str | None, typer.Option(help="inception, domain, pixels, or a run with features; what suits the data without it.")
]
ExtractorWeights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The Inception network's weights: .safetensors or .pth.")
]


def fan_out(devices: int) -> None:
    """Let ``devices`` processes do this command, where that many are asked for: this one only waits for them then."""
    from gencli.training.launch import launch, launched, mind_the_parent

    if devices > 1 and not launched():
        raise typer.Exit(launch(devices))
    mind_the_parent()


def load_run(run: str | None, weights: str, device: str) -> Any:
    """The ``checkpoint.Loaded`` model of a run, its number, a checkpoint, a file, or of the latest run."""
    from gencli import checkpoint
    from gencli.console import UsageError
    from gencli.run import find
    from gencli.training.settings import choose_device

    if weights not in ("ema", "raw"):
        raise UsageError(f"--weights {weights!r}: it is ema or raw")
    return checkpoint.load(find(run), weights=weights, device=str(choose_device(device)))
