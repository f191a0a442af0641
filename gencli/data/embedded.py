"""Data that needs no network: scikit-learn's digits and photographs, and drawn shapes."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from gencli.contract import DataSpec
from gencli.data.source import Array, TensorSource, carve
from gencli.data.table import SETS, SPLITS
from gencli.rng import generator

__all__ = ["digits", "digits_split", "photos", "shapes"]


def _source(name: str, split: str, x: Array, label: Array, size: int, levels: int, base: str) -> TensorSource:
    spec = DataSpec(name=name, kind="image", shape=x.shape[1:], levels=levels, classes=SETS[base].classes, size=size)
    return TensorSource(name, split, spec, torch.from_numpy(x), torch.from_numpy(label))


def digits_split() -> dict[str, Array]:
    """The fixed 70/10/20 split of the 1,797 digits, as sorted row numbers."""
    _, val, test = SETS["digits"].sizes or (0, 0, 0)
    return carve(1797, val, test, "digits", "split")


@cache
def _digits() -> tuple[Array, Array]:
    """Images ``(n, 8, 8)`` and labels ``(n,)``, from the file itself: to import scikit-learn takes 0.7 s."""
    place = find_spec("sklearn")
    folders = (place and place.submodule_search_locations) or ()
    found = [Path(folder) / "datasets/data/digits.csv.gz" for folder in folders]
    if not any(path.is_file() for path in found):  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images.astype(np.uint8), bunch.target
    with gzip.open(found[0]) as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.int64)
    return rows[:, :-1].reshape(-1, 8, 8).astype(np.uint8), rows[:, -1]


def digits(name: str, split: str) -> TensorSource:
    """The 8 x 8 digits of Alpaydin and Kaynak (1998), values 0 .. 16, as scikit-learn ships them."""
    (images, labels), parts = _digits(), digits_split()
    rows = parts[split]
    return _source(name, split, images[rows][:, None], labels[rows], len(parts["train"]), 17, "digits")


# A photograph is cut into cells of this height and width, and every patch lies within one cell.
CELL = (61, 64)
STRIDE = 4


def photos(name: str, split: str, size: int = 16) -> TensorSource:
    """Patches ``(3, size, size)`` of scikit-learn's two photographs, overlapping each other within a cell.

    Whole cells belong to train, val or test (80/10/10 of them, the same for every patch size), so no pixel is in two
    splits. Test patches come from the same two photographs all the same: this set says nothing about other pictures.
    """
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    height, width = pictures[0].shape[0] // CELL[0], pictures[0].shape[1] // CELL[1]
    cells = len(pictures) * height * width
    parts = carve(cells, cells // 10, cells // 10, "photos", "split")
    x, label = [], []
    for cell in parts[split]:
        picture, place = divmod(int(cell), height * width)
        top, left = (place // width) * CELL[0], (place % width) * CELL[1]
        for i in range(top, top + CELL[0] - size + 1, STRIDE):
            for j in range(left, left + CELL[1] - size + 1, STRIDE):
                x.append(pictures[picture][i : i + size, j : j + size].transpose(2, 0, 1))
                label.append(picture)
    train = len(x) // len(parts[split]) * len(parts["train"])
    return _source(name, split, np.stack(x), np.array(label), train, 256, "photos")


SIDE = 20


def shapes(name: str, split: str, coloured: bool = False) -> TensorSource:
    """One rectangle, circle or triangle an image, ``(1, 20, 20)`` white on black.

    ``coloured``: ``(3, 20, 20)`` of 4 levels a channel; shape and background each have one colour, never the same.
    Splits are drawn independently of each other, so a small circle of train may come again in test, as in any sample
    of a small discrete distribution.
    """
    sizes = dict(zip(SPLITS, SETS["shapes"].sizes or (0, 0, 0)))
    n = sizes[split]
    g = generator("shapes", "coloured" if coloured else "binary", split)
    kind = g.integers(3, size=n)
    # radius (half the extent), ratio of the sides, centre such that the whole shape is inside
    ry = g.uniform(3, 8, (n, 1, 1))
    rx = np.where(kind[:, None, None] == 0, g.uniform(3, 8, (n, 1, 1)), ry)
    cy = ry + (SIDE - 2 * ry) * g.random((n, 1, 1))
    cx = rx + (SIDE - 2 * rx) * g.random((n, 1, 1))
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5  # centres of pixels
    v, u = (y - cy) / ry, (x - cx) / rx  # the shape spans [-1, 1] in both
    inside = np.select(
        [kind[:, None, None] == k for k in range(3)],
        [(abs(u) <= 1) & (abs(v) <= 1), u**2 + v**2 <= 1, (abs(v) <= 1) & (abs(u) <= (v + 1) / 2)],
    )
    mask = inside.astype(np.uint8)[:, None]
    if coloured:
        ink = g.integers(64, size=n)
        paper = (ink + g.integers(1, 64, size=n)) % 64
        colours = (np.stack([ink, paper])[:, :, None] >> np.array([4, 2, 0])) & 3  # 2 bits a channel
        ink_rgb, paper_rgb = colours.astype(np.uint8)[..., None, None]
        mask = np.where(mask == 1, ink_rgb, paper_rgb)
    return _source(name, split, mask, kind, sizes["train"], 4 if coloured else 2, "shapes")
