"""The extractor that a person means, trained first where it is a classifier of their own data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gencli import checkpoint, console, data, files, processes, recipe
from gencli.console import DataError, UsageError, nearest
from gencli.contract import DataSpec
from gencli.metrics.classification import accuracy
from gencli.metrics.extractors import DIGITS, Extractor, Network, OfInception, Pixels, file_digest
from gencli.run import Run, find
from gencli.training.launch import led

__all__ = ["EXTRACTORS", "choose", "default"]

EXTRACTORS = ("domain", "inception", "pixels")
SMALL = 32  # pixels: narrower images than these are nothing that the Inception network knows
COUNTED = 2_000  # test rows for the accuracy that is told of a classifier


def default(spec: DataSpec) -> str:
    """What sees data like ``spec`` where nobody says: inception for colour images of 32 pixels and more, domain for
    other images, pixels for what is no image."""
    if spec.kind != "image":
        return "pixels"
    return "inception" if spec.shape[0] == 3 and min(spec.shape[1:]) >= SMALL else "domain"


def choose(
    name: str | None,
    spec: DataSpec,
    *,
    data_name: str,
    root: str | None = None,
    file: Path | None = None,
    device: Any = "cpu",
) -> Extractor:
    """The extractor ``name`` (default: that of ``spec``): "domain", "inception", "pixels", or a run with features.

    ``data_name`` is the data set whose classes a domain classifier tells apart; ``file`` holds the Inception network's
    weights. UsageError where there is no such extractor, DataError where its weights are not to be had.
    """
    name = name or default(spec)
    if file is not None and name != "inception":
        raise UsageError("--extractor-weights belongs to --extractor inception")
    if name == "pixels":
        return Pixels()
    if name == "inception":
        from gencli.metrics.inception import load_inception

        return OfInception(load_inception(file).to(device))
    if name == "domain":
        return _domain(data_name, root, device)
    try:
        loaded = checkpoint.load(find(name), device=str(device))
    except DataError as error:
        if os.path.exists(name):
            raise
        near = nearest(name, EXTRACTORS)
        raise UsageError(f"no extractor {name!r}{near}: {', '.join(EXTRACTORS)}, or a run with features") from error
    about = {"extractor": f"{loaded.meta['model']} on {loaded.meta['spec']['name']}, step {loaded.step}"}
    return Network(loaded.model, loaded.meta["model"], file_digest(loaded.path), about)


def _domain(name: str, root: str | None, device: Any) -> Network:
    test = data.load(name, "test", root)
    if test.spec.kind != "image" or not test.spec.classes:
        raise UsageError(
            f"{name} has no images with classes for a domain extractor to tell apart",
            hint="--extractor inception, pixels, or a run with features",
        )
    path = DIGITS if name == "digits" else _trained(name, root, device)
    loaded = checkpoint.load(path, device=str(device))
    about = {
        "extractor": f"classifier on {name}",
        "extractor_accuracy": accuracy(loaded.model, test, limit=COUNTED)["accuracy"],
    }
    return Network(loaded.model, "domain", file_digest(loaded.path), about)


def _trained(name: str, root: str | None, device: Any) -> Path:
    """The classifier of ``name`` by the recipe classifier/domain: from the cache folder, or trained now."""
    from gencli.training.session import Session  # which chooses extractors itself
    from gencli.training.settings import settings

    chosen = recipe.load(
        "classifier/domain", [], {"data.name": name, "data.root": root, "device": str(device)}, model=True
    )
    key = f"{recipe.digest(chosen)}-{chosen.train.steps}-{data.load(name, 'train', root).digest}"
    folder = files.cache_folder() / "extractors" / key
    if processes.first(lambda: _serves(folder)):
        return folder
    console.say(f"training a classifier of {name} to compare features by, once: {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with settings(chosen) as there:
        session = Session(chosen, there)
        with led(lambda: Run.create(out=Path(tempfile.mkdtemp(dir=folder.parent, prefix=".training-")) / "run")) as run:
            session.start(run)
            session.fit(preview=False)
    processes.first(lambda: _put(run.path, folder))
    return folder


def _serves(folder: Path) -> bool:
    """Whether a classifier lies there that can be read; one that cannot (another version wrote it) is taken away."""
    if not folder.exists():
        return False
    try:
        checkpoint.load(find(str(folder)))
    except DataError as error:
        console.say(f"{folder} cannot be read and is made anew: {error}")
        shutil.rmtree(folder)
        return False
    return True


def _put(made: Path, folder: Path) -> None:
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():  # else another command was there first, with the same weights
            raise
    shutil.rmtree(made.parent, ignore_errors=True)
