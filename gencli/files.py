"""Files are written whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["cache_folder", "canonical", "naming", "sync_folder", "write_bytes", "write_json", "write_text", "writing"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # there is no room for what is written


def cache_folder() -> Path:
    """Where downloads and what can be computed again are kept: ``gencli`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gencli"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spare blanks: equal values give equal text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name ``path``: a full disk does not say whose file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_bytes(path: Path | str, data: bytes | memoryview) -> None:
    """Replace ``path`` by ``data``. A crash at any instant leaves the old file or the new one, never a part."""
    with naming(Path(path)), writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write in parts in the block, which takes the place of ``path`` at its end.

    An exception leaves the old one. Of the block's own OSErrors a full disk's alone names ``path``: what is written may
    be read from elsewhere.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and (error.errno in FULL or error.filename == name):
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """:func:`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """:func:`write_bytes` for a JSON value, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
