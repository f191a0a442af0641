"""gencli interpolate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, Device, RunName, Seed, Weights

__all__ = ["interpolate"]

MOST = 5000  # examples in a scatter
SEEDS = 10_000  # in one path
BORDER = 3.0  # a traversal goes from minus this to this


def interpolate(
    run: RunName = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Rows of a .png, a film (.gif, .webp), .npz, .tar, a folder, or - for a stream; interpolation.png "
            "(traversal.png, scatter.png) without it.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Where to begin: a picture or a class of the run's data, whose mean latent is meant."
        ),
    ] = None,
    stops: Annotated[
        list[str] | None, typer.Option("--to", help="Where to go next, as in --from; again for a path of several.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="A path through the first samples of these seeds, such as 3,14,15 or 0-7.")
    ] = None,
    plus: Annotated[
        str | None, typer.Option("--add", help="Move by the mean latent of this class less that of --minus.")
    ] = None,
    minus: Annotated[str | None, typer.Option(help="The class whose mean latent --add takes away.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="A square between four corners instead of rows.")] = False,
    traverse: Annotated[
        bool, typer.Option("--traverse", help="A row for each latent dimension, from -3 to 3, the most active first.")
    ] = False,
    scatter: Annotated[
        bool, typer.Option("--scatter", help="Where the val split lies among the latents, coloured by class.")
    ] = False,
    path: Annotated[
        str | None, typer.Option(help="slerp, lerp, or model: the model's own, which is taken where there is one.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Go back from the last keyframe to the first.")] = False,
    pairs: Annotated[int, typer.Option(help="How many rows, where draws or dimensions make them.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Pictures from one keyframe to the next, both among them.", min=2)] = 10,
    labels: Annotated[str | None, typer.Option(help="Of class-conditional models: classes, a row each.")] = None,
    data_root: DataRoot = None,
    seed: Seed = 0,
    weights: Weights = "ema",
    device: Device = "auto",
) -> None:
    """gencli interpolate -o walk.gif

    Walk through the latent space of a run: between draws of the prior, or between pictures, classes or seeds:

    gencli interpolate --from a.png --to b.png --to 7 -o path.png

    gencli interpolate --seeds 3,14,15 --loop -o walk.webp

    gencli interpolate --from face.png --add smiling --minus neutral

    A film goes there and back, or round with --loop. --from alone takes a file of several pictures (.npz, .tar, a
    folder, - for a stream): a path through all of them, a row each with --add, the four corners of --grid.
    """
    from gencli import streams
    from gencli.commands.options import load_run
    from gencli.console import UsageError

    if (plus is None) != (minus is None):
        raise UsageError("--add and --minus go together: the difference of two classes is added")
    named = {"--grid": grid, "--add": plus is not None, "--traverse": traverse, "--scatter": scatter}
    chosen = [name for name, on in named.items() if on]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} are two pictures: choose one")
    mode = chosen[0] if chosen else ""
    _check(mode, {"--from": start, "--to": stops, "--seeds": seeds, "--loop": loop, "--path": path, "--labels": labels})
    loaded = load_run(run, weights, device)
    _capable(loaded, "latents", "prior", "decode")
    walker = _Walker(loaded, data_root, seed, labels, path, steps, loop)
    if scatter:
        walker.scatter(out or "scatter.png")
        return
    keys = walker.keyframes(start, stops or [], seeds, mode)
    out = out or ("traversal.png" if traverse else streams.default_name("interpolation", loaded.model.spec))
    if grid:
        walker.write(out, *walker.square(keys))
    elif traverse:
        walker.traverse(out, keys, pairs)
    elif plus is not None and minus is not None:
        walker.write(out, walker.moved(keys, plus, minus, pairs))
    else:
        walker.write(out, *walker.rows(keys, pairs))


# Of --from, --to and the like, what each picture has no use for.
USELESS = {
    "--traverse": ("--to", "--loop", "--path"),
    "--scatter": ("--from", "--to", "--seeds", "--loop", "--path", "--labels"),
    "--grid": ("--loop",),
    "--add": ("--to", "--path"),
}


def _check(mode: str, given: dict[str, Any]) -> None:
    """UsageError for an option without a meaning here."""
    from gencli.console import UsageError

    for name in USELESS.get(mode, ()):
        if given[name]:
            raise UsageError(f"{mode} has no use for {name}")
    if given["--seeds"] and given["--from"]:
        raise UsageError("--seeds and --from: a path goes through one or the other")
    if given["--to"] and not given["--from"]:
        raise UsageError("--from and --to go together")


def _capable(loaded: Any, capability: str, *methods: str) -> None:
    """UsageError that names the models which have what this one lacks."""
    from gencli.console import UsageError
    from gencli.models import TABLE

    if all(hasattr(loaded.model, method) for method in methods):
        return
    lacks, which = {
        "latents": ("no latents to walk through", "with latents"),
        "encodes": ("no encoder, which pictures and classes need", "with an encoder"),
    }[capability]
    have = ", ".join(e.name for e in TABLE.values() if capability in e.capabilities)
    raise UsageError(f"{loaded.meta['model']} has {lacks}", hint=f"models {which}: {have}")


class _Walker:
    """The latents that a command line asks for, and what is written of them.

    Rows are latents ``(R, T, ...)`` and, for class-conditional models, their classes ``(R,)``.
    """

    def __init__(
        self, loaded: Any, root: Any, seed: int, labels: str | None, path: str | None, steps: int, loop: bool
    ) -> None:
        from gencli.commands.sample import parse_labels
        from gencli.console import UsageError

        self.loaded, self.model, self.spec = loaded, loaded.model, loaded.model.spec
        self.root, self.seed, self.path, self.steps, self.loop = root, seed, path, steps, loop
        self.conditional = self.model.conditional
        self.labels = parse_labels(labels, self.spec.classes)
        if self.labels and not self.conditional:
            raise UsageError("this model is not class-conditional: it takes no labels")

    def source(self, split: str) -> Any:
        """A split of the run's data."""
        from gencli import data

        part = self.loaded.meta["recipe"]["data"]
        return data.load(part["name"], split, str(self.root) if self.root else part.get("root"))

    # ------------------------------------------------------------------ keyframes

    def keyframes(self, start: str | None, stops: Sequence[str], seeds: str | None, mode: str) -> Any:
        """The latents that the command line names, ``(k, ...)``; None where it names none."""
        from gencli import latents
        from gencli.console import UsageError

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

    def _named(self, words: Sequence[str]) -> Any:
        """The latents of pictures and classes, in order."""
        import torch

        from gencli import latents
        from gencli.console import UsageError
        from gencli.given import read_images

        _capable(self.loaded, "encodes", "encode")
        classes = [None if self._is_file(word) else self._class(word, "neither a file nor a class") for word in words]
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
        pictures, means = iter(z), iter(self._means(named))
        return torch.stack([next(pictures if k is None else means) for k in classes])

    def _is_file(self, word: str) -> bool:
        """A class comes before a file of its name: ./3 is the file."""
        there = word == "-" or Path(word).exists() or Path(word).suffix != "" or "/" in word
        return there and word not in self.spec.classes

    def _class(self, word: str, what: str = "an unknown class") -> int:
        from gencli.console import UsageError, nearest

        names = self.spec.classes
        if word in names:
            return names.index(word)
        if word.isdecimal() and int(word) < len(names):
            return int(word)
        some = f"the classes are {', '.join(names[:20])}" if names else f"{self.spec.name} has no classes"
        more = ", ..." if len(names) > 20 else ""
        raise UsageError(f"{word!r} is {what}{nearest(word, names)}: {some}{more}")

    def _means(self, classes: Sequence[int]) -> Any:
        """The mean latents of classes of the training data."""
        from gencli import console, latents
        from gencli.console import UsageError

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

    def rows(self, keys: Any, pairs: int) -> tuple[Any, Any]:
        """Between draws a row a pair; through ``keys`` one row, or one a class."""
        import torch

        from gencli import latents
        from gencli.sampling import labels_for

        if keys is None:
            ends = latents.drawn(self.model, 2 * pairs, seed=self.seed).unflatten(0, (pairs, 2))
        else:
            count = len(self.labels or self.spec.classes[:pairs]) if self.conditional else 1
            ends = keys[None].expand(count, *keys.shape)
        y = labels_for(self.spec, range(len(ends)), self.labels) if self.conditional else None
        return torch.stack([latents.through(self.model, e, self.steps, self.path, self.loop) for e in ends]), y

    def square(self, keys: Any) -> tuple[Any, Any]:
        """Rows of the square between four corners."""
        from gencli import latents

        a, b, c, d = latents.drawn(self.model, 4, seed=self.seed) if keys is None else keys
        z = latents.bilinear(self.model, a, b, c, d, self.steps, self.path)
        return z.unflatten(0, (self.steps, self.steps)), self._one_class(self.steps)

    def moved(self, keys: Any, plus: str, minus: str, pairs: int) -> Any:
        """From each start straight to where the difference of two classes leads."""
        import torch

        from gencli import latents

        z = latents.drawn(self.model, pairs, seed=self.seed) if keys is None else keys
        more, less = self._means([self._class(plus), self._class(minus)])
        walks = [
            latents.through(self.model, torch.stack([a, a + (more - less)]), self.steps, "lerp", self.loop) for a in z
        ]
        return torch.stack(walks)

    def _one_class(self, n: int) -> Any:
        """The labels of ``n`` rows of a picture that shows one class."""
        from gencli.console import UsageError
        from gencli.sampling import labels_for

        if self.labels and len(self.labels) > 1:
            raise UsageError("this is a picture of one class: give --labels one")
        return labels_for(self.spec, range(n), self.labels or [0]) if self.conditional else None

    # ------------------------------------------------------------------ pictures of a latent space

    def traverse(self, out: str, keys: Any, most: int) -> None:
        """Write a row for each dimension, and tell which."""
        import torch

        from gencli import console, latents
        from gencli.console import GencliError

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
        import torch

        from gencli import console, latents, pictures
        from gencli.console import UsageError

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
        pictures.save_png(out, pictures.classes(z, y, self.spec.classes, axes))
        console.table([self._about() | row | {"out": out}])

    # ------------------------------------------------------------------ writing

    def _about(self) -> dict[str, Any]:
        return {"model": self.loaded.meta["model"], "step": self.loaded.meta["step"], "weights": self.loaded.weights}

    def write(self, out: str, z: Any, y: Any = None, captions: Sequence[Sequence[str]] = ()) -> None:
        """Decode rows and write them: pictures in rows, each from one keyframe to the next, films, or samples.

        ``captions`` are those of the first pictures of each row.
        """
        import numpy as np

        from gencli import console, latents, pictures, streams

        rows, across = z.shape[:2]
        labels = None if y is None else y.repeat_interleave(across)
        examples = latents.decoded(self.model, z.flatten(0, 1), labels)
        ending = Path(out).suffix.lower()
        if self.spec.kind != "image" or ending not in (".png", ".gif", ".webp"):
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
                (pictures.gif if ending == ".gif" else pictures.webp)(out, frames, ms=80)
        if out != "-":
            console.say(f"{rows} x {across} {'pictures' if self.spec.kind == 'image' else 'samples'} in {out}")


def _samples(chunks: Iterator[Any], labels: Any) -> Iterator[Any]:
    from gencli.streams import Samples

    first = 0
    for x in chunks:
        yield Samples(x, None if labels is None else labels[first : first + len(x)].numpy(), first)
        first += len(x)


def _seeds(text: str) -> list[int]:
    """``3,14,15`` or ``0-7``, or both."""
    from gencli.console import UsageError

    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < first + SEEDS:
            raise UsageError(f"--seeds {text}: seeds are numbers and rising ranges of them, such as 3,14,15 or 0-7")
        found += range(first, last + 1)
    return found
