"""Text as whole words, for models of words: the variant ``tokens`` of ``docs`` and of a user's own files.

A token is what stands between white space, as it stands there: lower-case and split off marks before, as gensim and
fastText want it too. A line is a sentence; its end is the token :data:`END`, so that no context goes across. Of a
hundred lines one is for val and one for test, the 99th and the 100th.

A file is read twice, in blocks: once to count its words, and once to number them into a nameless file that is mapped
into memory. Memory holds the words and one block, however long the text.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from gencli import files
from gencli.console import DataError, say
from gencli.contract import DataSpec
from gencli.data import text
from gencli.data.source import Array, Epoch, Source, checked
from gencli.data.table import SPLITS

__all__ = ["END", "docs", "load_file"]

END = "</s>"  # of a line, as word2vec's own tool has it
LENGTH = 1024  # tokens of an example
LINES = 100  # of which the last two are val and test
LONGEST = 1 << 14  # characters of a line; longer ones are cut at a blank
BLOCK = 1 << 20  # bytes read at once
WORDS = 300_000  # the most frequent ones are known: their list stands in every checkpoint's header
DIFFERENT = 2_000_000  # words counted; beyond, the rarest are forgotten
WORD = 64  # characters of the longest word

Parts = Iterator[tuple[str, str]]  # (split, some whole lines of it), in order


@dataclass
class Tokens:
    """Rows of ``length`` tokens of one split, mapped into memory, the last filled up with UNKNOWN."""

    name: str
    split: str
    spec: DataSpec
    digest: str
    _rows: Array

    @property
    def size(self) -> int:
        return len(self._rows)

    def rows(self, index: Tensor, epoch: Epoch = 0) -> dict[str, Tensor]:
        """See :meth:`Source.rows`: "x" int32 ``(n, length)``."""
        return {"x": torch.from_numpy(self._rows[checked(index, self.size).numpy()])}


# ---------------------------------------------------------------------------------------------- words to numbers


def _split(lines: str) -> list[str]:
    return lines.replace("\n", f" {END} ").split()


def _count(parts: Parts) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The words of train, the most frequent first, after UNKNOWN and END; and how often each stands there."""
    counts, total, least = Counter[str](), 0, 0
    for split, lines in parts:
        if split != "train":
            continue
        found = _split(lines)
        total += len(found)
        counts.update(found)
        while len(counts) > DIFFERENT:
            least += 1
            counts = Counter({word: n for word, n in counts.items() if n > least})
    ends = counts.pop(END, 0)
    known = sorted((w for w in counts if len(w) <= WORD and w != text.UNKNOWN), key=lambda w: (-counts[w], w))[:WORDS]
    numbers = [counts[word] for word in known]
    return (text.UNKNOWN, END, *known), (total - ends - sum(numbers), ends, *numbers)


def _numbered(parts: Parts, vocabulary: tuple[str, ...], length: int) -> dict[str, tuple[Array, str]]:
    """The rows of each split, int32 ``(n, length)``, and their digest."""
    number = {word: i for i, word in enumerate(vocabulary)}
    stores: dict[str, IO[bytes]] = {split: tempfile.TemporaryFile(dir=_folder()) for split in SPLITS}  # noqa: SIM115
    hashes = {split: hashlib.sha256(f"{split} {length} {' '.join(vocabulary)}".encode()) for split in SPLITS}

    def put(split: str, x: Array) -> None:
        stores[split].write(x.data)
        hashes[split].update(x.data)

    for split, lines in parts:
        words = _split(lines)
        put(split, np.fromiter(map(number.get, words, repeat(0)), np.int32, len(words)))
    found = {}
    for split, store in stores.items():
        with store:
            put(split, np.zeros(-(store.tell() // 4) % length, np.int32))
            n = store.tell() // 4 // length
            store.flush()
            rows = np.memmap(store, np.int32, "r", shape=(n, length)) if n else np.zeros((0, length), np.int32)
            found[split] = (rows, hashes[split].hexdigest()[:16])
    return found


def _folder() -> Path | None:
    """Where nameless files go: on a disk, and not in a ``/tmp`` that may be memory."""
    folder = files.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _sources(where: str, name: str, parts: Callable[[], Parts], length: int) -> dict[str, Source]:
    vocabulary, counts = _count(parts())
    if len(vocabulary) < 4:
        raise DataError(f"{where}: {len(vocabulary) - 2} different words are too few")
    found = _numbered(parts(), vocabulary, length)
    for split, (rows, _) in found.items():
        if not len(rows):
            raise DataError(f"{where}: no line for {split}", hint=f"of {LINES} lines one is for val and one for test")
    spec = DataSpec(
        name=name,
        kind="tokens",
        shape=(length,),
        levels=len(vocabulary),
        vocabulary=vocabulary,
        counts=counts,
        size=len(found["train"][0]),
    )
    return {split: Tokens(name, split, spec, digest, rows) for split, (rows, digest) in found.items()}


# ---------------------------------------------------------------------------------------------- docs

_WORD = re.compile(r"\w+(?:['’-]\w+)*|([^\w\s])\1*")


@lru_cache(1)
def _docs(name: str, length: int) -> dict[str, Source]:
    def parts() -> Parts:
        for split, topics in text.topics().items():
            for paragraph in topics.lower().split("\n\n"):
                yield split, " ".join(m[0] for m in _WORD.finditer(paragraph)) + "\n"

    return _sources("docs", name, parts, length)


def docs(name: str, split: str, length: int | None = None) -> Source:
    """The topics of Python's documentation as lower-case words and marks; a paragraph is a line."""
    return _docs(name, length or LENGTH)[split]


# ---------------------------------------------------------------------------------------------- a user's text


def load_file(path: Path, name: str, split: str, *, length: int | None = None, on_bad: str = "fail") -> Source:
    """The words of a text of UTF-8 of any length, packed by gzip if its name ends in ``.gz``.

    DataError naming the file, and the line where there is one: empty, no text, not UTF-8 (``on_bad = "skip"`` reads
    bad bytes as unknown and counts such lines on stderr), not packed, or too short to give each split a line.
    """
    try:
        said = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return _file(path, name, length or LENGTH, on_bad, (said.st_mtime_ns, said.st_size))[split]


@lru_cache(2)  # train and val of a run are asked for one after the other
def _file(path: Path, name: str, length: int, on_bad: str, stamp: tuple[int, int]) -> dict[str, Source]:
    bad: list[int] = []

    def parts() -> Parts:
        bad.clear()
        first = 0
        for block in _blocks(path, on_bad, bad):
            lines = [piece for line in block.split("\n") if not line.isspace() for piece in _pieces(line) if piece]
            for split, lot in _shared(lines, first).items():
                if lot:
                    yield split, "\n".join(lot) + "\n"
            first += len(lines)

    found = _sources(str(path), name, parts, length)
    if bad:
        say(f"{path}: {len(bad)} lines are not UTF-8, the first is line {bad[0]}; bad places are read as unknown")
    return found


def _shared(lines: list[str], first: int) -> dict[str, list[str]]:
    """``lines``, the first of which is number ``first``, by split."""
    test = lines[(LINES - 1 - first) % LINES :: LINES]
    val = lines[(LINES - 2 - first) % LINES :: LINES]
    train = [line for i, line in enumerate(lines, first) if i % LINES < LINES - 2]
    return {"train": train, "val": val, "test": test}


def _pieces(line: str) -> Iterator[str]:
    while len(line) > LONGEST:
        cut = line.rfind(" ", 0, LONGEST)
        cut = cut if cut > 0 else LONGEST
        yield line[:cut]
        line = line[cut:].lstrip(" ")
    yield line


def _blocks(path: Path, on_bad: str, bad: list[int]) -> Iterator[str]:
    """The file's text in blocks of whole lines (of whole words, where a line is longer than a block)."""
    rest, line, begun = b"", 1, False
    with _opened(path) as file:
        while True:
            block = _read(file, path)
            data = rest + block
            if not begun:
                data = data.removeprefix(b"\xef\xbb\xbf")
            cut = max(data.rfind(b"\n"), -1) + 1 or data.rfind(b" ") + 1
            if not block:
                cut = len(data)
            elif not cut and len(data) > 4 * BLOCK:
                raise DataError(f"{path} line {line}: {len(data) >> 20} MB without a blank: no text")
            whole, rest = data[:cut], data[cut:]
            if b"\0" in whole:
                raise DataError(f"{path} line {line + whole[: whole.index(0)].count(10)}: a byte is zero: no text")
            begun = begun or bool(whole.strip())
            yield _decoded(whole, path, line, on_bad, bad)
            line += whole.count(b"\n")
            if not block:
                break
    if not begun:
        raise DataError(f"{path}: the file is empty")


def _decoded(data: bytes, path: Path, line: int, on_bad: str, bad: list[int]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if on_bad == "fail":
            at = line + data[: error.start].count(b"\n")
            hint = "data.on_bad=skip reads bad bytes as unknown"
            raise DataError(f"{path} line {at}: not UTF-8", hint=hint) from None
    lines = data.split(b"\n")
    for i, one in enumerate(lines, line):
        try:
            one.decode()
        except UnicodeDecodeError:
            bad.append(i)
    return data.decode("utf-8", "replace")


def _opened(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _read(file: Any, path: Path) -> bytes:
    try:
        return cast(bytes, file.read(BLOCK))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
