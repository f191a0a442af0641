"""Text: symbols of a vocabulary, the embedded ``docs`` and a user's own files.

A symbol is a character, or (variant ``words``) a piece of text: a word or a run of one mark with the space before it,
or white space. Pieces joined are the text again, so words need no rule of joining. The vocabulary is that of train:
symbols too rare for it, and those that train never had, are one, :data:`UNKNOWN`, which stands first.

An example is a window of T symbols; windows follow one another, the last incomplete one is dropped, and each is scored
without what came before it: its first symbols cost more than they would within a longer text.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from gencli import archives
from gencli.console import DataError, say
from gencli.contract import DataSpec
from gencli.data.source import Array, Source, TensorSource
from gencli.data.table import SPLITS

__all__ = [
    "UNKNOWN",
    "characters",
    "decode",
    "docs",
    "encode",
    "known",
    "load_file",
    "read",
    "respelt",
    "symbols",
    "topics",
]

UNKNOWN = "\ufffd"
CHARACTERS, WORDS = 256, 5000  # the largest vocabularies, unknown included
LENGTHS = {False: 128, True: 32}  # symbols of an example: characters, words
MOST = 128 << 20  # bytes of a text, unpacked
DIFFERENT = 2_000_000  # words, counted before the most frequent are chosen
# space before a word or mark belongs to it; no symbol is longer than 41 characters, whatever the text holds
_WORDS = re.compile(r"\n {0,40}| {1,40}(?= )| ?\w{1,40}| ?([^\w\s])\1{0,39}|\s")


# ---------------------------------------------------------------------------------------------- symbols


def symbols(text: str, words: bool) -> Iterator[str]:
    """The symbols of ``text``, in order; joined they are ``text``."""
    return (m[0] for m in _WORDS.finditer(text)) if words else iter(text)


def _by_words(vocabulary: Sequence[str]) -> bool:
    return any(len(symbol) != 1 for symbol in vocabulary)


def encode(text: str, vocabulary: Sequence[str]) -> Array:
    """The numbers in ``vocabulary`` of the symbols of ``text``, int16 ``(n,)``; UNKNOWN's for those it lacks."""
    number = {symbol: k for k, symbol in enumerate(vocabulary)}
    unknown = number.get(UNKNOWN, 0)
    if _by_words(vocabulary):
        return np.fromiter((number.get(s, unknown) for s in symbols(text, words=True)), np.int16)
    table = np.full(0x110000, unknown, np.int16)  # by code point: a hundred times faster than a dictionary
    table[[ord(symbol) for symbol in vocabulary]] = np.arange(len(vocabulary))
    return table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]


def known(text: str, vocabulary: Sequence[str], where: str, most: int) -> Array:
    """:func:`encode` of the first ``most`` symbols. DataError, beginning with ``where``, for one that is not known."""
    number = {symbol: k for k, symbol in enumerate(vocabulary)}
    first = list(islice(symbols(text, _by_words(vocabulary)), most))
    if strange := [symbol for symbol in first if symbol not in number]:
        raise DataError(f"{where}: {strange[0]!r} is not among the {len(vocabulary)} symbols that the model knows")
    return np.array([number[symbol] for symbol in first], np.int16)


def decode(x: Array, vocabulary: Sequence[str]) -> list[str]:
    """The texts of ``x``, integers ``(n, T)``."""
    return ["".join([vocabulary[i] for i in row]) for row in x.tolist()]


def characters(x: Array, vocabulary: Sequence[str]) -> int:
    """How many characters the texts of ``x`` have together; an unknown word counts as one."""
    return int(np.array([len(symbol) for symbol in vocabulary])[x].sum())


def _vocabulary(text: str, words: bool) -> tuple[str, ...]:
    """UNKNOWN and the most frequent symbols of ``text``: words that come twice, 1 in 100,000 of its characters."""
    counts = Counter[str]()
    found = symbols(text, words)
    while part := list(islice(found, 1 << 16)):
        counts.update(part)
        if len(counts) > DIFFERENT:
            raise DataError(f"more than {DIFFERENT} different words")
    least, most = (2, WORDS) if words else (len(text) / 100_000, CHARACTERS)
    order = sorted((s for s, n in counts.items() if n >= least and s != UNKNOWN), key=lambda s: (-counts[s], s))
    return (UNKNOWN, *sorted(order[: most - 1]))


def _source(
    where: str, name: str, split: str, parts: Mapping[str, str], vocabulary: tuple[str, ...], length: int
) -> TensorSource:
    """Windows of ``length`` symbols of the text of ``split``. DataError where one of the three is too short for one."""
    rows = {part: encode(parts[part], vocabulary) for part in SPLITS}
    for part, x in rows.items():  # of all splits: a text without a test should say so before it is learned
        if len(x) < length or len(vocabulary) < 2:
            raise DataError(f"{where}: its {len(x)} symbols for {part} are too few for an example of {length}")
    x = rows[split][: len(rows[split]) // length * length].reshape(-1, length)
    spec = DataSpec(
        name=name,
        kind="text",
        shape=(length,),
        levels=len(vocabulary),
        vocabulary=vocabulary,
        size=len(rows["train"]) // length,
    )
    return TensorSource(name, split, spec, torch.from_numpy(x.copy()))


def respelt(source: Source, spec: DataSpec) -> TensorSource:
    """The text of ``source`` in the vocabulary and the windows of ``spec``: what a model learned elsewhere can read.

    A symbol that either does not know is UNKNOWN. DataError where the text is too short for one window.
    """
    assert source.size is not None
    x = source.rows(torch.arange(source.size))["x"].numpy()
    found = encode("".join(decode(x, source.spec.vocabulary)), spec.vocabulary)
    length, n = spec.dims, len(found) // spec.dims
    if n < 1:
        raise DataError(f"{source.name}: its {len(found)} symbols are too few for an example of {length}")
    new = spec.model_copy(update={"name": source.name, "size": None})
    rows = torch.from_numpy(found[: n * length].reshape(n, length).copy())
    return TensorSource(source.name, source.split, new, rows)


# ---------------------------------------------------------------------------------------------- docs

SHARED = 40  # characters from which on a paragraph must not stand in two topics


@cache
def topics() -> dict[str, str]:
    """The text of each split: topics of Python's documentation, as ``help()`` shows them (PSF licence).

    Topics quote one another at length. A paragraph belongs to the shortest topic that has it and is left out of the
    others, or a fifth of the text would stand in two splits.
    """
    try:
        from pydoc_data.topics import topics as found
    except ImportError as e:
        raise DataError(f"docs: this Python has no pydoc_data.topics ({e})") from e

    owner: dict[str, str] = {}
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for topic in sorted(found, key=lambda t: (len(found[t]), t)):
        own = []
        for paragraph in found[topic].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < SHARED or owner.setdefault(words, topic) == topic:
                own.append(paragraph)
        tenth = hashlib.sha256(f"pydoc_data|{topic}".encode()).digest()[0] * 10 // 256
        parts[{0: "val", 1: "test"}.get(tenth, "train")].append("\n\n".join(own).strip("\n"))
    return {split: "\n\n".join(texts) for split, texts in parts.items()}


@cache
def _docs_vocabulary(words: bool) -> tuple[str, ...]:
    return _vocabulary(topics()["train"], words)


def docs(name: str, split: str, *, words: bool = False, length: int | None = None) -> TensorSource:
    """Windows of the topics of Python's documentation, raw int16 ``(n, length)``.

    Whole topics belong to train, val or test by a hash of their names. The text is that of the Python at hand: equal
    digests, not equal names, mean equal rows.
    """
    return _source("docs", name, split, topics(), _docs_vocabulary(words), length or LENGTHS[words])


# ---------------------------------------------------------------------------------------------- a user's text


def read(path: Path, on_bad: str = "fail") -> str:
    """The text of a UTF-8 file, packed by gzip if its name ends in ``.gz``; line ends are ``\\n``, no byte order mark.

    Raises DataError naming the file where it is empty, larger than 128 MB, no text, or not UTF-8 (then with the place
    of the first bad byte). ``on_bad = "skip"``: bad bytes, up to 10 %, become UNKNOWN, and stderr says how many.
    """
    data = _unpacked(path) if path.suffix.lower() == ".gz" else archives.content(path, MOST)
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    if b"\0" in data:
        raise DataError(f"{path}: byte {data.index(0)} is zero: no text of UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        text = data.decode("utf-8-sig", "replace")
        bad = text.count(UNKNOWN) - data.count(UNKNOWN.encode())
        if on_bad == "fail" or bad > 0.1 * len(data):
            hint = "data.on_bad=skip reads up to 10 % of bad bytes as unknown" if on_bad == "fail" else "more than 10 %"
            raise DataError(f"{path}: byte {e.start} is not UTF-8 ({bad} bad places in all)", hint=hint) from None
        say(f"{path}: {bad} bad places read as unknown, the first at byte {e.start}: not UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unpacked(path: Path) -> bytes:
    parts, size = [], 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 20):
                parts.append(part)
                size += len(part)
                if size > MOST:
                    raise DataError(f"{path} has more than {MOST >> 20} MB, unpacked")
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be unpacked ({e})") from e
    return b"".join(parts)


def load_file(
    path: Path, name: str, split: str, *, words: bool = False, length: int | None = None, on_bad: str = "fail"
) -> TensorSource:
    """Windows of a user's text: train is the first 80 % of its characters, val the next 10 %, test the last 10 %.

    DataError as in :func:`read`, and where the text is too short.
    """
    text = read(path, on_bad)
    a, b = len(text) * 8 // 10, len(text) * 9 // 10
    parts = {"train": text[:a], "val": text[a:b], "test": text[b:]}
    try:
        vocabulary = _vocabulary(parts["train"], words)
    except DataError as e:
        raise DataError(f"{path}: {e}") from None
    return _source(str(path), name, split, parts, vocabulary, length or LENGTHS[words])
