"""Walks through a model's latent space: from what a person names to pictures, films and streams of samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencli import console, data, latents, pictures, plots, streams
from gencli.checkpoint import Loaded
from gencli.console import GencliError, UsageError
from gencli.data.source import Source
from gencli.given import read_images
from gencli.models import TABLE
from gencli.sampling import class_of, labels_for, parse_labels
from gencli.streams import Samples

__all__ = ["Walker"]

MOST = 5000  # examples in a scatter
SEEDS = 10_000  # in one path
BORDER = 3.0  # a traversal goes from minus this to this


class Walker:
    """The latents that a command line asks for, and what is written of them.

    Rows are latents ``(R, T, ...)`` and, for class-conditional models, their classes ``(R,)``.
    """

    def __init__(
        self, loaded: Loaded, root: Path | None, seed: int, labels: str | None, path: str | None, steps: int, loop: bool
    ) -> None:
        _capable(loaded, "latents", "prior", "decode")
        self.loaded, self.model, self.spec = loaded, loaded.model, loaded.model.spec
        self.root, self.seed, self.path, self.steps, self.loop = root, seed, path, steps, loop
        self.conditional = self.model.conditional
        self.labels = parse_labels(labels, self.model)

    def source(self, split: str) -> Source:
        """A split of the run's data."""
        part = self.loaded.meta["recipe"]["data"]
        return data.load(part["name"], split, str(self.root) if self.root else part.get("root"))

    # ------------------------------------------------------------------ keyframes

    def keyframes(self, start: str | None, stops: Sequence[str], seeds: str | None, mode: str) -> Tensor | None:
        """The latents that the command line names, ``(k, ...)``; None where it names none."""
        if seeds is not None:
            keys = latents.of_seeds(self.model, _seeds(seeds))
        elif start is not None:
            keys = self._named([start, *stops])
        else:
            return None
        if not mode and len(keys) < 2:
            if seeds is not None:
                raise UsageError(f"a path has two keyframes or more: --seeds {seeds} is one")
            raise UsageError("--from and --to go together, unless --from holds several pictures")
        if mode == "--grid" and len(keys) != 4:
            raise UsageError(f"--grid has four corners, not {len(keys)}")
        if mode == "--traverse" and len(keys) != 1:
            raise UsageError(f"--traverse goes out from one place, not from {len(keys)}")
        return keys

    def _named(self, words: Sequence[str]) -> Tensor:
        """The latents of pictures and classes, in order."""
        _capable(self.loaded, "encodes", "encode")
        classes = [
            None if self._is_file(word) else class_of(word, self.spec, "neither a file nor a class") for word in words
        ]
        files = [word for word, k in zip(words, classes) if k is None]
        named = [k for k in classes if k is not None]
        if not files:
            return self._means(named)
        x, y = read_images(files, self.spec), None
        if len(words) > 1 and len(x) != len(files):
            raise UsageError(f"{' and '.join(files)} hold {len(x)} pictures: a walk has one at either end")
        if self.conditional:
            if len(self.labels or ()) != 1:
                raise UsageError("this model encodes by class: say of which one the pictures are, such as --labels 3")
            y = torch.tensor(self.labels).expand(len(x))
        z = latents.encode(self.model, x, seed=self.seed, labels=y)
        if not named:
            return z
        given, means = iter(z), iter(self._means(named))
        return torch.stack([next(given if k is None else means) for k in classes])

    def _is_file(self, word: str) -> bool:
        """A class comes before a file of its name: ./3 is the file."""
        there = word == "-" or Path(word).exists() or Path(word).suffix != "" or "/" in word
        return there and word not in self.spec.classes

    def _means(self, classes: Sequence[int]) -> Tensor:
        """The mean latents of classes of the training data."""
        _capable(self.loaded, "encodes", "encode")
        if self.conditional:
            hint = f"--seeds 3,14 --labels {classes[0]},{classes[-1]} shows the same latents as each of these classes"
            raise UsageError("this model is told the class, so its latents are not where a class is found", hint=hint)
        source = self.source("train")
        z, counts = latents.class_means(self.model, source, classes, seed=self.seed)
        each = dict(zip((self.spec.classes[k] for k in classes), counts))
        told = ", ".join(f"{name} ({count} examples)" for name, count in each.items())
        console.say(f"mean latents of {source.name}@train: {told}")
        return z

    # ------------------------------------------------------------------ rows

    def rows(self, keys: Tensor | None, pairs: int) -> tuple[Tensor, Tensor | None]:
        """Between draws a row a pair; through ``keys`` one row, or one a class."""
        if keys is None:
            ends = latents.drawn(self.model, 2 * pairs, seed=self.seed).unflatten(0, (pairs, 2))
        else:
            count = len(self.labels or self.spec.classes[:pairs]) if self.conditional else 1
            ends = keys[None].expand(count, *keys.shape)
        y = labels_for(self.spec, range(len(ends)), self.labels) if self.conditional else None
        return torch.stack([latents.through(self.model, e, self.steps, self.path, self.loop) for e in ends]), y

    def square(self, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of the square between four corners."""
        a, b, c, d = latents.drawn(self.model, 4, seed=self.seed) if keys is None else keys
        z = latents.bilinear(self.model, a, b, c, d, self.steps, self.path)
        return z.unflatten(0, (self.steps, self.steps)), self._one_class(self.steps)

    def moved(self, keys: Tensor | None, plus: str, minus: str, pairs: int) -> Tensor:
        """From each start straight to where the difference of two classes leads."""
        z = latents.drawn(self.model, pairs, seed=self.seed) if keys is None else keys
        more, less = self._means([class_of(plus, self.spec), class_of(minus, self.spec)])
        walks = [
            latents.through(self.model, torch.stack([a, a + (more - less)]), self.steps, "lerp", self.loop) for a in z
        ]
        return torch.stack(walks)

    def _one_class(self, n: int) -> Tensor | None:
        """The labels of ``n`` rows of a picture that shows one class."""
        if self.labels and len(self.labels) > 1:
            raise UsageError("this is a picture of one class: give --labels one")
        return labels_for(self.spec, range(n), self.labels or [0]) if self.conditional else None

    # ------------------------------------------------------------------ pictures of a latent space

    def traverse(self, out: str, keys: Tensor | None, most: int) -> None:
        """Write a row for each dimension, and tell which."""
        z = (latents.drawn(self.model, 1, seed=self.seed) if keys is None else keys)[0]
        row: dict[str, Any] = {"view": "traversal", "latents": z.numel()}
        dims, captions = list(range(z.numel()))[:most], [[f"z{j + 1}"] for j in range(z.numel())]
        if hasattr(self.model, "kl_per_dimension"):
            try:
                source = self.source("val")
            except GencliError as error:
                console.say(f"the first dimensions: which are active is not known, for {error}")
            else:
                kl, n = latents.activity(self.model, source)
                dims = kl.argsort(descending=True, stable=True).tolist()[:most]
                captions = [[f"z{j + 1}", f"{kl[j]:.2f} nats"] for j in range(z.numel())]
                row |= {"data": f"{source.name}@val", "examples": n, "kl": kl[dims].tolist()}
        values = torch.linspace(-BORDER, BORDER, self.steps)
        rows = latents.traversal(z, dims, values)
        self.write(out, rows, self._one_class(len(dims)), [captions[j] for j in dims])
        if out != "-":
            console.table([self._about() | row | {"dimensions": [j + 1 for j in dims], "out": out}])

    def scatter(self, out: str) -> None:
        """Write where examples lie on the plane of the latents."""
        if not out.endswith(".png"):
            raise UsageError(f"a scatter is a picture: -o scatter.png, not {out}")
        _capable(self.loaded, "encodes", "encode")
        source = self.source("val")
        found = list(latents.encodings(self.model, source, MOST, seed=self.seed))
        z = torch.cat([z.flatten(1) for z, _ in found]).cpu().numpy()
        y = None if found[0][1] is None else torch.cat([y for _, y in found if y is not None]).numpy()
        row = {"view": "scatter", "data": f"{source.name}@val", "examples": len(z), "latents": z.shape[1]}
        axes = ("$z_1$", "$z_2$")
        if z.shape[1] < 2:
            raise UsageError("one latent dimension makes no plane: --traverse shows it")
        if z.shape[1] > 2:
            z, share = latents.principal_axes(z)
            console.say(
                f"{row['latents']} latent dimensions, shown on the two axes along which they vary most: "
                f"{share:.1%} of the variance"
            )
            axes, row["variance_share"] = ("first principal axis", "second principal axis"), share
        pictures.save_png(out, plots.classes(z, y, self.spec.classes, axes))
        console.table([self._about() | row | {"out": out}])

    # ------------------------------------------------------------------ writing

    def _shown(self) -> np.ndarray[Any, Any] | None:
        """Points of the training data to walk among; None where they are not at hand."""
        try:
            source = self.source("train")
        except GencliError:
            return None
        n = 2000 if source.size is None else min(2000, source.size)
        return source.rows(torch.arange(n))["x"].numpy()

    def _about(self) -> dict[str, Any]:
        return {"model": self.loaded.meta["model"], "step": self.loaded.meta["step"], "weights": self.loaded.weights}

    def write(self, out: str, z: Tensor, y: Tensor | None = None, captions: Sequence[Sequence[str]] = ()) -> None:
        """Decode rows and write them: pictures in rows, each from one keyframe to the next, films, or samples.

        ``captions`` are those of the first pictures of each row.
        """
        rows, across = z.shape[:2]
        labels = None if y is None else y.repeat_interleave(across)
        examples = latents.decoded(self.model, z.flatten(0, 1), labels)
        ending = Path(out).suffix.lower()
        if self.spec.kind == "points" and self.spec.dims == 2 and ending == ".png":
            x = np.concatenate(list(examples)).reshape(rows, across, 2)
            pictures.save_png(out, plots.paths(x, self._shown()))
        elif self.spec.kind != "image" or ending not in (".png", ".gif", ".webp"):
            about = self._about() | {"seed": self.seed}
            streams.write(out, _samples(examples, labels), self.spec, about, rows * across)
        else:
            x = np.concatenate(list(examples)).reshape(rows, across, *self.spec.shape)
            if ending == ".png":
                legs = range(0, across - 1, self.steps - 1)
                whole = np.stack([x[:, i : i + self.steps] for i in legs], 1).reshape(-1, *self.spec.shape)
                below = [text for row in captions for text in (*row, *[""] * across)[:across]]
                levels = self.spec.levels or 256
                image = pictures.grid(whole, levels, columns=self.steps, labels=below or None)
                pictures.save_png(out, image)
            else:
                columns = max(1, round(rows**0.5))
                frames = [pictures.grid(x[:, i], self.spec.levels or 256, columns=columns) for i in range(across)]
                # round, or there and back again: neither shows a frame twice where it closes
                frames = frames[:-1] if self.loop else frames + frames[-2:0:-1]
                pictures.film(out, frames, ms=80)
        if out != "-":
            console.say(f"{rows} x {across} {'pictures' if self.spec.kind == 'image' else 'samples'} in {out}")


def _capable(loaded: Loaded, capability: str, *methods: str) -> None:
    """UsageError that names the models which have what this one lacks."""
    if all(hasattr(loaded.model, method) for method in methods):
        return
    lacks, which = {
        "latents": ("no latents to walk through", "with latents"),
        "encodes": ("no encoder, which pictures and classes need", "with an encoder"),
    }[capability]
    have = ", ".join(e.name for e in TABLE.values() if capability in e.capabilities)
    raise UsageError(f"{loaded.meta['model']} has {lacks}", hint=f"models {which}: {have}")


def _samples(chunks: Iterator[Any], labels: Tensor | None) -> Iterator[Samples]:
    first = 0
    for x in chunks:
        yield Samples(x, None if labels is None else labels[first : first + len(x)].numpy(), first)
        first += len(x)


def _seeds(text: str) -> list[int]:
    """``3,14,15`` or ``0-7``, or both."""
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < first + SEEDS:
            raise UsageError(f"--seeds {text}: seeds are numbers and rising ranges of them, such as 3,14,15 or 0-7")
        found += range(first, last + 1)
    return found
