"""Data: the table of data sets and :func:`load`. Importing this imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencli.console import DataError, UsageError, nearest
from gencli.data.table import SETS, SPLITS, SetEntry, split_name

if TYPE_CHECKING:
    from gencli.data.source import Source

__all__ = ["SETS", "SPLITS", "SetEntry", "load"]

_HINT = "gencli data ls names the data sets and their variants"


def load(name: str, split: str = "train", root: Path | str | None = None, *, on_bad: str = "fail") -> Source:
    """The rows of one split of a data set.

    ``name``: a name of :data:`SETS` or the path of a user's own data (:mod:`gencli.data.user`), followed by variants,
    as in ``mnist:threshold`` or ``photos/cats:32:5bit``. ``split``: "train", "val" or "test". ``root``: the folder of
    the standard sets (default: the environment's ``GENCLI_DATA``). ``on_bad``: "fail" at an image that cannot be
    read, or "skip" up to 10 % of them, with a count on stderr. A set's name comes before a folder of the same name:
    ``./digits`` is the folder.

    Raises UsageError for a name that nothing answers to, DataError for data that is missing or bad.
    """
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}{nearest(split, SPLITS)}: there are {', '.join(SPLITS)}")
    if on_bad not in ("fail", "skip"):
        raise UsageError(f"no policy {on_bad!r} for bad images: there are fail and skip")
    base, variants = split_name(name)
    source: Source
    if base in SETS:
        source = _built_in(SETS[base], name, variants, split, root)
    elif base and Path(base).expanduser().exists():
        from gencli.data.user import load_path

        sizes = [v for v in variants if v.isdigit()]
        source = load_path(Path(base).expanduser(), name, split, size=int(sizes[0]) if sizes else None, on_bad=on_bad)
    elif base.startswith(("/", ".", "~")) or base.endswith((".npz", ".npy")):
        raise DataError(f"no such file or folder: {base}", hint=_HINT)
    else:
        raise UsageError(f"no data set {base!r}{nearest(base, SETS)}, and no file or folder of that name", hint=_HINT)
    for depth in (v for v in variants if v in ("threshold", "dynamic") or v.endswith("bit")):
        from gencli.data.source import Requantised

        source = Requantised(source, depth)
    return source


def _built_in(entry: SetEntry, name: str, variants: list[str], split: str, root: Any) -> Source:
    for variant in variants:
        if not entry.allows(variant):
            known = ", ".join(entry.variants) or "none"
            raise UsageError(f"{entry.name} has no variant {variant!r} (its variants: {known})", hint=_HINT)
    if entry.kind == "points":
        from gencli.data.points import PointSource

        return PointSource(entry.name, split)
    if entry.origin == "standard":
        from gencli.data.standard import load_standard

        return load_standard(entry, name, split, root)
    from gencli.data import embedded

    if entry.name == "digits":
        return embedded.digits(name, split)
    if entry.name == "photos":
        return embedded.photos(name, split, size=32 if "32" in variants else 16)
    return embedded.shapes(name, split, coloured="coloured" in variants)
