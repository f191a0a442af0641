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

    ``name``: a name of :data:`SETS`, the path of a user's own data (:mod:`gencli.data.user`), or the path or URL of a
    folder of shards (:mod:`gencli.data.shards`), followed by variants, as in ``mnist:threshold``,
    ``photos/cats:32:5bit`` or ``book.txt:words:64``. ``split``: "train", "val" or "test". ``root``: the folder of the
    standard sets (default: the environment's ``GENCLI_DATA``). ``on_bad``: "fail" at an image, sound or byte of text
    that cannot be read, or "skip" up to 10 % of them, with a count on stderr. A set's name comes before a folder of the
    same name: ``./digits`` is the folder.

    Raises UsageError for a name that nothing answers to, DataError for data that is missing or bad.
    """
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}{nearest(split, SPLITS)}: there are {', '.join(SPLITS)}")
    if on_bad not in ("fail", "skip"):
        raise UsageError(f"no policy {on_bad!r} for bad data: there are fail and skip")
    base, variants = split_name(name)
    source: Source
    if base in SETS:
        source = _built_in(SETS[base], name, variants, split, root)
    elif base and Path(base).expanduser().exists():
        from gencli.data.user import load_path

        unit = next((v for v in variants if v in ("words", "tokens")), None)
        source = load_path(Path(base).expanduser(), name, split, size=_number(variants), unit=unit, on_bad=on_bad)
    elif "://" in base:
        from gencli.data.shards import load_shards

        source = load_shards(base, name, split)
    elif base.startswith(("/", ".", "~")) or base.endswith((".npz", ".npy", ".txt", ".gz")):
        raise DataError(f"no such file or folder: {base}", hint=_HINT)
    else:
        raise UsageError(f"no data set {base!r}{nearest(base, SETS)}, and no file or folder of that name", hint=_HINT)
    for depth in (v for v in variants if v in ("threshold", "dynamic") or v.endswith("bit")):
        from gencli.data.source import Requantised

        source = Requantised(source, depth)
    return source


def _number(variants: list[str]) -> int | None:
    """The variant that is a number: pixels, symbols or samples of an example."""
    return next((int(v) for v in variants if v.isdigit()), None)


def _built_in(entry: SetEntry, name: str, variants: list[str], split: str, root: Any) -> Source:
    for variant in variants:
        if not entry.allows(variant):
            known = ", ".join(entry.variants) or "none"
            raise UsageError(f"{entry.name} has no variant {variant!r} (its variants: {known})", hint=_HINT)
    if entry.kind == "points":
        from gencli.data.points import PointSource

        return PointSource(entry.name, split)
    if entry.name == "docs" and "tokens" in variants:
        from gencli.data import tokens

        return tokens.docs(name, split, _number(variants))
    if entry.name == "docs":
        from gencli.data.text import docs

        return docs(name, split, words="words" in variants, length=_number(variants))
    if entry.name == "tones":
        from gencli.data.audio import tones

        return tones(name, split)
    if entry.name == "fsdd":
        from gencli.data.audio import fsdd
        from gencli.data.standard import root_folder

        return fsdd(entry, name, split, root_folder(root), _number(variants))
    if entry.origin == "standard":
        from gencli.data.standard import load_standard

        return load_standard(entry, name, split, root)
    from gencli.data import embedded

    if entry.name == "digits":
        return embedded.digits(name, split)
    if entry.name == "photos":
        return embedded.photos(name, split, size=32 if "32" in variants else 16)
    return embedded.shapes(name, split, coloured="coloured" in variants)
