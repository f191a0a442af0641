"""YAML without its traps, read and written. Imports no torch.

Scalars follow the core schema of version 1.2: ``1e-4`` is a number; ``no``, ``on`` and ``1:30`` are text. Refused, with
the line: tags, anchors and aliases, merge keys, duplicate keys, several documents, deep nesting, large files, numbers
that are not finite or do not fit 64 bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gencli.console import UsageError

__all__ = ["Key", "dump", "parse", "quoted", "read", "scalar"]

Key = tuple[str | int, ...]  # the way to a value: keys of mappings and places in lists

_MAX_BYTES, _MAX_DEPTH, _MAX_INT = 1_000_000, 20, 2**63
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ENDLESS = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+-]*")  # text that needs no quotes
_QUOTED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # unless it is one of these, to some reader


def quoted(text: str, length: int = 100) -> str:
    """``text`` in quotes for a message of one line, however long or strange it is."""
    shown = repr(text)
    return shown if len(shown) <= length else f"{shown[:length]}..."


def read(path: Path, name: str) -> tuple[Any, dict[Key, int]]:
    """:func:`parse` of the file ``path``, called ``name`` in messages."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(f"{name}: larger than {_MAX_BYTES // 1000} kB")
        return parse(data.decode("utf-8-sig"), name)
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} line {data[: error.start].count(10) + 1}: not UTF-8 text") from None


def parse(text: str, name: str) -> tuple[Any, dict[Key, int]]:
    """The value of a document and the line (from 1) of every key and list item in it.

    :raises UsageError: ``NAME line N: what is wrong``.
    """
    try:
        return _document(text)
    except _Bad as bad:
        raise UsageError(f"{name} line {bad.line}: {bad}" if bad.line else f"{name}: {bad}") from None


def scalar(text: str) -> Any:
    """The value of ``key=text`` on a command line: a scalar, or YAML where it opens with a bracket or a quote.

    :raises UsageError: what is wrong with it.
    """
    try:
        text.encode()
        # anything else is no YAML: in a path, ': ' and ' #' are themselves
        return _document(text)[0] if text.startswith(("[", "{", '"', "'")) else _scalar(text)
    except UnicodeEncodeError:
        raise UsageError("not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


class _Bad(ValueError):
    def __init__(self, what: str, mark: Any = None) -> None:
        super().__init__(what)
        self.line = mark.line + 1 if mark else 0


def _document(text: str) -> tuple[Any, dict[Key, int]]:
    lines: dict[Key, int] = {}
    events = yaml.parse(text, Loader=_Loader)  # a generator: nothing is built before it is checked
    try:
        next(events)  # the start of the stream
        if isinstance(next(events), yaml.StreamEndEvent):
            return None, {}
        result = _value(next(events), (), events, lines)
        next(events)  # the end of the document
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            raise _Bad("more than one document", after.start_mark)
    except yaml.MarkedYAMLError as error:
        raise _Bad(error.problem or "not YAML", error.problem_mark) from None
    except yaml.YAMLError as error:
        raise _Bad(f"not YAML: {str(error).splitlines()[0]}") from None
    return result, lines


def _value(event: Any, at: Key, events: Iterator[Any], lines: dict[Key, int]) -> Any:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _Bad("anchors and aliases (& and *) are not allowed", event.start_mark)
    if event.tag is not None:
        raise _Bad(f"tags are not allowed ({quoted(event.tag)[1:-1]})", event.start_mark)
    if len(at) > _MAX_DEPTH:
        raise _Bad(f"nested more than {_MAX_DEPTH} deep", event.start_mark)
    if isinstance(event, yaml.ScalarEvent):
        try:
            event.value.encode()  # the escape of half a character can be read, and then not be written
            return _scalar(event.value) if event.implicit[0] else event.value
        except UnicodeEncodeError:
            raise _Bad("not UTF-8 text", event.start_mark) from None
        except ValueError as error:
            raise _Bad(str(error), event.start_mark) from None
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*at, len(items))
            lines[here] = _line(event)
            items.append(_value(event, here, events, lines))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
            raise _Bad("a key should be a word", event.start_mark)
        key, here = event.value, (*at, event.value)
        if key == "<<":
            raise _Bad("merge keys (<<) are not allowed", event.start_mark)
        try:
            key.encode()
        except UnicodeEncodeError:
            raise _Bad("not UTF-8 text", event.start_mark) from None
        if key in mapping:
            raise _Bad(f"the key {quoted(key)} is on line {lines[here]} already", event.start_mark)
        lines[here] = _line(event)
        mapping[key] = _value(next(events), here, events, lines)
    return mapping


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        # int() would be slow, and refuses thousands of digits with a message of its own
        number = int(text, 0 if text.startswith(("0o", "0x")) else 10) if len(text) <= 40 else _MAX_INT
        if not -_MAX_INT <= number < _MAX_INT:
            raise ValueError("the number is too large")
        return number
    if _FLOAT.fullmatch(text):
        if math.isfinite(real := float(text)):
            return real
        raise ValueError("the number is too large")
    if _ENDLESS.fullmatch(text):
        raise ValueError("a number should be finite")
    return text


def dump(value: Any) -> str:
    """``value`` (mappings, lists, scalars) as YAML that :func:`parse` reads back equal: block mappings, flow lists."""
    document = [yaml.DocumentStartEvent(explicit=False), *_events(value), yaml.DocumentEndEvent()]
    stream = [yaml.StreamStartEvent(), *document, yaml.StreamEndEvent()]
    return str(yaml.emit(stream, Dumper=_Dumper, allow_unicode=True, width=1 << 20))


def _events(value: Any) -> Iterator[yaml.Event]:
    if isinstance(value, dict):
        yield yaml.MappingStartEvent(anchor=None, tag=None, implicit=True, flow_style=False)
        for key, item in value.items():
            yield from _events(key)
            yield from _events(item)
        yield yaml.MappingEndEvent()
    elif isinstance(value, (list, tuple)):
        yield yaml.SequenceStartEvent(anchor=None, tag=None, implicit=True, flow_style=True)
        for item in value:
            yield from _events(item)
        yield yaml.SequenceEndEvent()
    elif isinstance(value, str):
        plain = bool(_PLAIN.fullmatch(value)) and value.lower() not in _QUOTED
        yield yaml.ScalarEvent(None, None, (plain, not plain), value, style=None if plain else '"')
    else:
        yield yaml.ScalarEvent(None, None, (True, False), json.dumps(value))
