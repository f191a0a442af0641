"""The table of data sets, as ``gencli data ls`` prints it. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from gencli.console import UsageError

__all__ = ["SETS", "SPLITS", "SetEntry", "split_name"]

SPLITS = ("train", "val", "test")
_VARIANT = re.compile(r"threshold|dynamic|words|tokens|[1-7]bit|[1-9]\d{0,4}")


@dataclass(frozen=True)
class SetEntry:
    """One data set: what it holds, where it comes from and what may follow its name after a colon.

    ``sizes``: rows of train, val and test, None where points never end and where they depend on Python's version.
    ``variants``: "Nbit" stands for 1bit to 7bit, "N" for the symbols or samples of an example. ``rate``: samples a
    second.
    """

    name: str
    kind: Literal["image", "points", "audio", "text"]
    description: str
    shape: tuple[int, ...]
    levels: int | None
    classes: tuple[str, ...]
    origin: Literal["embedded", "drawn", "standard"]
    sizes: tuple[int, int, int] | None = None
    variants: tuple[str, ...] = ()
    rate: int | None = None

    def allows(self, variant: str) -> bool:
        """Whether ``variant`` may follow this name."""
        if variant.isdigit() and "N" in self.variants:
            return True
        return variant in self.variants or ("Nbit" in self.variants and re.fullmatch("[1-7]bit", variant) is not None)


def split_name(name: str) -> tuple[str, list[str]]:
    """``"mnist:5bit"`` -> ``("mnist", ["5bit"])``. A path that exists is taken whole, colons and all.

    Raises UsageError where two variants contradict each other.
    """
    if os.path.exists(os.path.expanduser(name)):
        return name, []
    base, *variants = name.split(":")
    if base not in SETS:  # a path may hold colons of its own: take off only what can be a variant
        base, variants = name, []
        while (m := re.fullmatch(rf"(.+):({_VARIANT.pattern})", base)) and not os.path.exists(os.path.expanduser(base)):
            base, variants = m[1], [m[2], *variants]
    sizes = [v for v in variants if v.isdigit()]
    if len(sizes) > 1 or len(variants) - len(sizes) > 1:
        raise UsageError(f"{name!r} names two variants that exclude each other: {', '.join(variants)}")
    return base, variants


_TEN = tuple("0123456789")
_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""
_GREY = ("threshold", "dynamic", "Nbit")


def _points(name: str, description: str, classes: tuple[str, ...], dims: int = 2) -> SetEntry:
    return SetEntry(f"points/{name}", "points", description, (dims,), None, classes, "drawn")


def _mnist(name: str, description: str, classes: tuple[str, ...]) -> SetEntry:
    sizes = (55_000, 5_000, 10_000)
    return SetEntry(name, "image", description, (1, 28, 28), 256, classes, "standard", sizes, _GREY)


def _colour(
    name: str, description: str, classes: tuple[str, ...], sizes: tuple[int, int, int] = (45_000, 5_000, 10_000)
) -> SetEntry:
    return SetEntry(name, "image", description, (3, 32, 32), 256, classes, "standard", sizes, ("Nbit",))


SETS: dict[str, SetEntry] = {
    entry.name: entry
    for entry in (
        SetEntry(
            "digits", "image", "scikit-learn's handwritten digits, values 0 to 16", (1, 8, 8), 17, _TEN,
            "embedded", (1258, 180, 359), ("threshold", "dynamic"),
        ),
        SetEntry(
            "photos", "image", "colour patches cut from scikit-learn's two photographs", (3, 16, 16), 256,
            ("china", "flower"), "embedded", (17_472, 2_184, 2_184), ("32", "Nbit"),
        ),
        SetEntry(
            "shapes", "image", "drawn: one rectangle, circle or triangle, white on black", (1, 20, 20), 2,
            ("rectangle", "circle", "triangle"), "drawn", (10_000, 1_000, 2_000), ("coloured",),
        ),
        SetEntry(
            "tones", "audio", "drawn: four notes up or down a scale in one of four waveforms", (1, 1600), 256,
            tuple(f"{wave} {way}" for wave in ("sine", "triangle", "square", "saw") for way in ("up", "down")),
            "drawn", (2_000, 250, 500), rate=4000,
        ),
        SetEntry(
            "docs", "text", "topics of Python's documentation: differs between versions of Python", (128,), None, (),
            "embedded", None, ("words", "tokens", "N"),
        ),
        _points("smiley", "two eyes and a mouth", ("left eye", "right eye", "mouth")),
        _points("moons", "two half circles, noise 0.1", ("upper", "lower")),
        _points("checkerboard", "eight squares of a 4 x 4 board", tuple("01234567")),
        _points("spirals", "two arms, noise 0.1", ("0", "1")),
        _points("rings", "four circles about one centre, noise 0.08", tuple("0123")),
        _points("25-gaussians", "a 5 x 5 grid of narrow Gaussians", tuple(str(i) for i in range(25))),
        _points("mixture-1d", "two Gaussians of different width on the line", ("0", "1"), dims=1),
        _points("peaks-1d", "three narrow Gaussians of different weight on the line", ("0", "1", "2"), dims=1),
        _mnist("mnist", "handwritten digits", _TEN),
        _mnist("fashion-mnist", "clothes", _FASHION),
        _mnist("kmnist", "cursive Japanese characters", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
        _colour("cifar10", "photographs of ten kinds of thing (binary version)", _CIFAR10),
        _colour("cifar100", "photographs of a hundred kinds of thing (binary version)", tuple(_CIFAR100.split())),
        _colour("svhn", "house numbers from the street", _TEN, (68_257, 5_000, 26_032)),
        SetEntry(
            "fsdd", "audio", "spoken digits of six speakers", (1, 4000), 256, _TEN,
            "standard", (2_466, 313, 307), ("N",), 8000,
        ),
    )
}  # fmt: skip
