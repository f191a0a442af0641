"""Word vectors in and out of files. Imports no torch.

Read are word2vec's text format (``n d``, then a word and d numbers a line; fastText's ``.vec`` is the same), GloVe's
(the same without the first line), word2vec's binary format (``.bin``: float32 after each word and a blank), each as it
is or packed (``.gz``), and ``.safetensors`` of gencli (``vectors`` (n, d), and ``words``, UTF-8, one a line).

Text is read in blocks. All blanks of a block are found at once; eight characters before the end of a number are one
64-bit word, and five multiplications make it a number (D. Lemire, Number Parsing at a Gigabyte per Second, 2021,
arXiv 2101.11408). A mantissa below 2^53 over a power of ten is one correctly rounded division, so what comes out is
``float32(float(text))`` to the bit; numbers of another form take that slower road.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from gencli import files
from gencli.archives import shown
from gencli.console import DataError, UsageError, say
from gencli.header import read_header

__all__ = ["Vectors", "opened", "read", "write", "write_text"]

Array = np.ndarray[Any, Any]
BLOCK = 4 << 20  # bytes of text that are parsed at once
LINE = 16 << 20  # bytes of the longest line
WIDEST = 1 << 20  # numbers of the longest row in the binary format
WORD = 4096  # bytes of the longest word in the binary format
BATCH = 1 << 15  # numbers at once: what is computed of them stays in the cache
TEXT = "word2vec's binary format ends in .bin, text in .vec or .txt"
PAD = 16  # bytes before a block, so that the word before a number's end can be loaded
NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
NOT_FINITE = re.compile(rb"[-+]?(nan|inf|infinity)", re.IGNORECASE)
BLANK = np.isin(np.arange(33), [9, 10, 13, 32])


@dataclass(frozen=True)
class Vectors:
    """``words``, each once, in the order of the file, and their vectors ``x``, float32 ``(n, d)``."""

    words: Sequence[str]
    x: Array
    name: str = "the vectors"

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each word."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def alike(self) -> dict[str, list[str]]:
        """The words of each beginning, two letters in lower case."""
        found: dict[str, list[str]] = {}
        for word in self.words:
            found.setdefault(word[:2].lower(), []).append(word)
        return found


# ---------------------------------------------------------------------------------------------- reading


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """``path`` for reading, unpacked by gzip if its name ends in ``.gz``; every fault is a DataError naming it."""
    if path.exists() and not path.is_file() and path.parent != Path("/dev/fd"):  # there the shell's <(...) stand
        raise DataError(f"{path} is no regular file")
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def read(path: Path | str, most: int | None = None, on_bad: str = "fail") -> Vectors:
    """The word vectors of a file, at most the first ``most``; formats as above, told by the file's ending.

    DataError with file and line for a row with too few or too many numbers, a number that is none or not finite, a
    word that came before or is not UTF-8, and a first line that says another count; ``on_bad = "skip"`` leaves such
    rows out (of a word that comes twice the first stays) and says on stderr how many.
    """
    path = Path(path)
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    rows = _Rows(path, "word" if ending in (".bin", ".safetensors") else "line", most, on_bad == "skip")
    if ending == ".safetensors":
        _read_safetensors(path, rows)
    else:
        with opened(path) as file:
            (_read_binary if ending == ".bin" else _read_text)(file, rows)
    if not rows.at:
        raise DataError(f"{path}: no word vectors in it")
    if rows.skipped:
        say(f"{path}: {rows.skipped} rows left out, the first at {rows.first}")
    return Vectors(list(rows.at), rows.x, str(path))


class _Rows:
    """Checked rows, as they come; ``x`` grows by pages that the system moves and does not copy."""

    def __init__(self, path: Path, unit: str, most: int | None, skip: bool) -> None:
        self.path, self.unit, self.most, self.skip = path, unit, most, skip
        self.at: dict[str, int] = {}  # word -> line
        self.x = np.empty((0, 0), np.float32)
        self.skipped, self.first = 0, ""

    @property
    def full(self) -> bool:
        return self.most is not None and len(self.at) >= self.most

    def error(self, line: int, why: str) -> DataError:
        return DataError(f"{self.path} {self.unit} {line}: {why}", hint="--on-bad skip leaves such rows out")

    def bad(self, line: int, why: str) -> None:
        """Refuse a row, or count it."""
        if not self.skip:
            raise self.error(line, why)
        self.skipped += 1
        self.first = self.first or f"{self.unit} {line}: {why}"

    def add(self, words: Sequence[bytes], x: Array, lines: Sequence[int], why: Callable[[int], str]) -> None:
        """Rows ``x`` (k, d) of ``words``; ``why(i)`` says what is wrong with the numbers of row i."""
        fresh = []
        for i, (word, finite, line) in enumerate(zip(words, np.logical_and.reduce(np.isfinite(x), 1), lines)):
            if self.full:
                break
            try:
                text = word.decode()
            except UnicodeDecodeError:
                self.bad(line, f"the word {shown(word.decode('utf-8', 'replace'))!r} is not UTF-8")
                continue
            if not finite:
                self.bad(line, why(i))
            elif not text:
                self.bad(line, "a row without a word")
            elif text in self.at:
                self.bad(line, f"{shown(text)!r} again, which stands in {self.unit} {self.at[text]} already")
            else:
                self.at[text] = line
                fresh.append(i)
        n, d = len(self.at), x.shape[1]
        if not self.x.size:
            self.x = np.empty((0, d), np.float32)
        self.x.resize((n, d), refcheck=False)
        self.x[n - len(fresh) :] = x if len(fresh) == len(x) else x[fresh]


def _header(line: bytes) -> tuple[int, int] | None:
    """The counts of words and dimensions that a first line says, or None where it is a row."""
    fields = line.split()
    if len(fields) == 2 and all(f.isdigit() and len(f) < 16 for f in fields):
        return int(fields[0]), int(fields[1])
    return None


def _read_text(file: BinaryIO, rows: _Rows) -> None:
    first = file.readline(LINE).removeprefix(b"\xef\xbb\xbf")
    if not first:
        return
    block = file.read(BLOCK)
    if b"\0" in first + block[:WORD]:
        raise DataError(f"{rows.path}: its first lines hold zeros: no text", hint=TEXT)
    header = _header(first)
    d = header[1] if header else len(first.split()) - 1
    if d < 1:
        raise rows.error(1, "neither a count and a dimension nor a word and its numbers")
    line, rest = (2, b"") if header else (1, first)
    begin = line
    while not rows.full:
        cut = block.rfind(b"\n") + 1
        whole = rest + block[:cut] if cut or block else (rest + b"\n" if rest.strip() else b"")
        rest = rest + block if block and not cut else block[cut:]
        if len(rest) > LINE:
            raise rows.error(line, f"more than {LINE >> 20} MB in one line")
        if cut or (whole and not block):
            line += _parse(whole, d, line, rows)
        if not block:
            break
        block = file.read(BLOCK)
    if header and header[0] != line - begin and not rows.full:
        rows.bad(1, f"it says that {header[0]} words follow, but {line - begin} do")


def _parse(text: bytes, d: int, line: int, rows: _Rows) -> int:
    """Add the rows of whole lines of ``text``, the first of which is line number ``line``; how many lines they are."""
    block = b"0" * PAD + text + b"0" * 8
    a = np.frombuffer(block, np.uint8)
    at = np.flatnonzero(a <= 32)
    kind = a[at]
    blank = BLANK[kind]
    if not blank.all():  # other control characters may be part of a word
        at, kind = at[blank], kind[blank]
    before = np.concatenate([[PAD - 1], at[:-1]])
    field = at - before > 1  # a blank that ends one: not the first of a line, not the second in a row
    counts = np.diff(np.cumsum(field)[kind == 10], prepend=0)  # fields of each line
    starts, ends = before[field] + 1, at[field]
    good = counts == d + 1
    if not good.all():
        keep = np.repeat(good, counts)
        starts, ends = starts[keep], ends[keep]
    s, e = starts.reshape(-1, d + 1), ends.reshape(-1, d + 1)
    words = [block[i:j] for i, j in zip(s[:, 0].tolist(), e[:, 0].tolist())]
    flat, s, e = np.empty(len(s) * d, np.float32), s[:, 1:].reshape(-1), e[:, 1:].reshape(-1)
    for i in range(0, len(flat), BATCH):
        flat[i : i + BATCH] = _numbers(block, a, s[i : i + BATCH], e[i : i + BATCH])
    x: Array = flat.reshape(-1, d)
    for i in np.flatnonzero(~good).tolist():
        fields = _fields(text.split(b"\n")[i])
        if len(fields) > d + 1 and not _number(fields[-d - 1]):  # the word has blanks, as a few of GloVe's
            place = int(good[:i].sum())
            words.insert(place, b" ".join(fields[:-d]))
            x = np.insert(x, place, _slow(fields[-d:]), 0)
            good[i] = True
        elif fields or i + 1 < len(good):  # the last line may be empty
            rows.bad(line + i, f"{len(fields) - 1} numbers, not {d}" if fields else "an empty line")
    kept = np.flatnonzero(good).tolist()
    rows.add(words, x, [line + i for i in kept], lambda i: _what(_fields(text.split(b"\n")[kept[i]])[-d:]))
    return len(counts)


def _fields(line: bytes) -> list[bytes]:
    return [field for field in re.split(rb"[ \t\r]", line) if field]


def _number(token: bytes) -> bool:
    return bool(NUMBER.fullmatch(token) or NOT_FINITE.fullmatch(token))


def _what(tokens: list[bytes]) -> str:
    """What is wrong with the first bad number."""
    for token in tokens:
        text = shown(token.decode("utf-8", "replace"))
        if not _number(token):
            return f"{text!r} is no number"
        if not np.isfinite(_slow([token])).all():
            return f"the number {text} is not finite in float32"
    return "a number is not finite"


def _slow(tokens: Sequence[bytes]) -> Array:
    """Numbers one by one, float32; NaN for what is none."""
    with np.errstate(over="ignore"):
        return np.array([float(t) if NUMBER.fullmatch(t) else np.nan for t in tokens]).astype(np.float32)


U64 = np.uint64
NIBBLES, NINES, HIGH = U64(0x3030303030303030), U64(0x7676767676767676), U64(0x8080808080808080)
PAIRS, FIRST, SECOND = U64(0x000000FF000000FF), U64(0x000F424000000064), U64(0x0000271000000001)
TENS = 10 ** np.arange(16, dtype=U64)
POWERS = TENS.astype(np.float64)


def _numbers(block: bytes, a: Array, s: Array, e: Array) -> Array:
    """The numbers at ``a[s:e]``, float32; NaN for what is none. ``a`` holds the bytes of ``block``."""
    words = np.ndarray(len(block) - 7, "<u8", block, 0, (1,))  # the eight bytes from each place on
    x, left = _fixed(a, words, s, e, 1)
    for whole in (2, 3):
        if len(left):
            y, again = _fixed(a, words, s[left], e[left], whole)
            x[left] = y
            left = left[again]
    if len(left):
        x[left] = _slow([block[i:j] for i, j in zip(s[left].tolist(), e[left].tolist())])
    return x


def _fixed(a: Array, words: Array, s: Array, e: Array, whole: int) -> tuple[Array, Array]:
    """Numbers with ``whole`` digits before a point and 1 to 15 - ``whole`` after it, and which are of another form."""
    minus = a[s] == 45
    first = s + minus
    k = e - first - (whole + 1)  # digits after the point
    fine = (k >= 1) & (k <= 15 - whole)
    k = np.where(fine, k, 1)
    first = np.minimum(first, len(a) - 8)
    fine &= a[first + whole] == 46
    head: Array = np.zeros(len(s), np.uint64)
    for j in range(whole):
        digit = a[first + j] - np.uint8(48)
        fine &= digit <= 9
        head = head * U64(10) + digit
    tail, bad = _digits(words[e - 8], np.minimum(k, 8))
    long = np.flatnonzero(k > 8)
    if len(long):
        more, wrong = _digits(words[e[long] - 16], k[long] - 8)
        tail[long] += more * U64(10**8)
        bad[long] |= wrong
    x = (head * TENS[k] + tail) / POWERS[k]
    np.negative(x, out=x, where=minus)
    return x.astype(np.float32), np.flatnonzero(~fine | (bad != 0))


def _digits(v: Array, k: Array) -> tuple[Array, Array]:
    """The number whose digits are the last ``k`` (1 to 8) of the eight characters ``v``; not 0 where one is none."""
    shift = (64 - 8 * k).astype(np.uint64)
    v = ((v ^ NIBBLES) >> shift) << shift
    bad = ((v + NINES) | v) & HIGH
    v = v * U64(10) + (v >> U64(8))
    return ((v & PAIRS) * FIRST + ((v >> U64(16)) & PAIRS) * SECOND) >> U64(32), bad


def _read_binary(file: BinaryIO, rows: _Rows) -> None:
    header = _header(file.readline(100))
    if header is None or not 1 <= header[1] <= WIDEST:
        raise DataError(f"{rows.path}: its first line is no count and dimension: not word2vec's binary format")
    n, d = header
    data, done, ended = b"", 0, False
    while done < n and not rows.full and not ended:
        block = file.read(max(BLOCK, 4 * d))
        data, ended, at = data + block, not block, 0
        words: list[bytes] = []
        values: list[bytes] = []
        while done + len(words) < n:
            blank = data.find(b" ", at, at + WORD)
            if blank < 0 or blank + 1 + 4 * d > len(data):
                if blank < 0 and len(data) - at >= WORD:
                    raise rows.error(done + len(words) + 1, f"no blank ends it within {WORD} bytes")
                break
            words.append(data[at:blank].lstrip(b"\n"))
            at = blank + 1 + 4 * d
            values.append(data[blank + 1 : at])
        x = np.frombuffer(b"".join(values), "<f4").reshape(len(words), d)
        rows.add(words, x, range(done + 1, done + len(words) + 1), lambda i: "a number is NaN or infinite")
        data, done = data[at:], done + len(words)
    if not rows.full and (done < n or (data + file.read(2)).strip()):
        raise DataError(
            f"{rows.path}: its first line says {n} words, {'fewer' if done < n else 'more'} follow", hint=TEXT
        )


def _read_safetensors(path: Path, rows: _Rows) -> None:
    from safetensors import safe_open

    _, tensors = read_header(path)
    dtype, shape = tensors.get("vectors", ("", ()))
    if dtype != "F32" or len(shape) != 2 or tensors.get("words", ("", ()))[0] != "U8":
        raise DataError(f"{path}: no word vectors (float32 'vectors' of two dimensions, and 'words')")
    with safe_open(path, "numpy") as file:
        x, words = file.get_tensor("vectors"), file.get_tensor("words").tobytes().split(b"\n")
    if len(words) != len(x):
        raise DataError(f"{path}: {len(words)} words and {len(x)} vectors")
    rows.add(words, x, range(1, len(words) + 1), lambda i: "a number is NaN or infinite")


# ---------------------------------------------------------------------------------------------- writing


def write(path: Path | str, words: Sequence[str], x: Array) -> None:
    """Write ``x`` (n, d) of ``words`` in the format that ``path`` ends in: as in :func:`read`, text for other endings.

    Atomic, and read back to the same bits. UsageError for a word that the format cannot hold.
    """
    path = Path(path)
    x = np.ascontiguousarray(x, np.float32)
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    parted = "\n" if ending == ".safetensors" else " \t\r\n"
    if wrong := next((w for w in words if not w or any(c in w for c in parted)), None):
        raise UsageError(f"{path}: the word {wrong!r} has a blank: this format cannot hold it")
    with files.writing(path) as plain:
        if ending == ".safetensors":
            _write_safetensors(plain, words, x)
            return
        file = cast(BinaryIO, gzip.GzipFile("", "wb", 6, plain, mtime=0)) if path.suffix.lower() == ".gz" else plain
        if ending == ".bin":
            file.write(f"{len(x)} {x.shape[1]}\n".encode())
            for word, row in zip(words, x):
                file.write(word.encode() + b" " + row.astype("<f4").tobytes() + b"\n")
        else:
            write_text(file, words, x)
        if file is not plain:
            file.close()


def write_text(file: BinaryIO, words: Sequence[str], x: Array) -> None:
    """Write word2vec's text format to an open file."""
    file.write(f"{len(x)} {x.shape[1]}\n".encode())
    form = " %.9g" * x.shape[1]  # nine digits tell any two float32 apart
    for word, row in zip(words, x):
        file.write((word + form % tuple(row.tolist()) + "\n").encode())


def _write_safetensors(file: BinaryIO, words: Sequence[str], x: Array) -> None:
    from safetensors.numpy import save

    tensors = {"vectors": x, "words": np.frombuffer("\n".join(words).encode(), np.uint8)}
    file.write(save(tensors, {"gencli": files.canonical({"kind": "vectors"})}))
