"""What ``apply`` and ``evaluate`` do with word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["measure", "neighbours", "show_vectors", "vectors_of"]


def neighbours(loaded: Any, asked: list[str], n: int, json: bool) -> None:
    """Print the words nearest to each word or sum of ``asked``, or to those of stdin's lines where that is ``-``."""
    import sys

    from gencli import console, words
    from gencli.console import UsageError

    vectors = _vectors(loaded)
    x = words.unit(vectors.x)
    if asked == ["-"]:
        for batch in words.lines():
            console.table(_found(batch, vectors, x, n, piped=True), json=True)
            sys.stdout.flush()
        return
    if not asked:
        raise UsageError("no words: name some, such as king - man + woman, or pipe them in, one a line, with -")
    console.table(_found(words.queries(asked), vectors, x, n), json=json or None)


def _found(queries: list[str], vectors: Any, x: Any, n: int, piped: bool = False) -> list[dict[str, Any]]:
    """A row for each query; ``neighbours`` is None where a word has no vector, which stderr says.

    UsageError for what is no word and no sum; a line that is ``piped`` in is answered as a word without a vector is.
    """
    import numpy as np

    from gencli import words
    from gencli.console import UsageError, say

    rows: list[dict[str, Any]] = []
    for query in queries:
        try:
            found = words.vector(query, vectors, x)
            why = f"{vectors.name} has no word {found!r}{words.near(found, vectors)}" if isinstance(found, str) else ""
        except UsageError as error:
            if not piped:
                raise
            found, why = query, str(error)
        if isinstance(found, str):
            say(why)
            rows.append({"word": query, "neighbours": None, "cosines": None})
            continue
        y, own = found
        without = np.array([[vectors.index[word] for word in own]])
        scores, at = words.nearest_words(y[None], x, without, min(n, len(x) - len(set(own))))
        rows.append({"word": query, "neighbours": [vectors.words[i] for i in at[0]], "cosines": scores[0].tolist()})
    return rows


def show_vectors(loaded: Any, asked: list[str], n: int | None, out: str | None) -> None:
    """The vectors of ``asked``, at most ``n``, to the file ``out``, or as text on stdout.

    Of all words without any; of stdin's lines where that is ``-``: those that have a vector, stderr names the others.
    """
    import sys

    from gencli import vectors as files
    from gencli.console import GencliError, UsageError, say
    from gencli.words import lines, near

    vectors, piped = _vectors(loaded), asked == ["-"]
    wanted = dict.fromkeys(word for batch in lines() for word in batch) if piped else dict.fromkeys(asked)
    for word in list(wanted):
        if word not in vectors.index:
            why = f"{vectors.name} has no word {word!r}{near(word, vectors)}"
            if not piped:
                raise UsageError(why)
            say(why)
            del wanted[word]
    chosen = (list(wanted) if asked else vectors.words)[:n]
    x = vectors.x[[vectors.index[word] for word in chosen]]
    if out in (None, "-"):
        if sys.stdout is None:
            raise GencliError("standard output is closed")
        files.write_text(sys.stdout.buffer, chosen, x)
    else:
        files.write(str(out), chosen, x)


def measure(metric: str, given: list[str], most: int | None) -> list[dict[str, Any]]:
    """The rows of ``similarity`` or ``analogy``; ``given``: a run or a file of vectors (or none), and the questions."""
    from gencli.commands.options import load_run
    from gencli.console import UsageError
    from gencli.metrics import similarity

    if not 1 <= len(given) <= 2:
        raise UsageError(
            f"{metric} takes a run or a file of vectors, and a file of questions", hint="gencli eval --help"
        )
    questions = Path(given[-1])
    vectors = vectors_of(given[0], most) if len(given) == 2 else _vectors(load_run(None, "ema", "cpu"), most)
    about = {"vectors": vectors.name, "words": len(vectors.words)}
    rows = (
        [similarity.similarity(vectors, questions)]
        if metric == "similarity"
        else similarity.analogy(vectors, questions)
    )
    return [row | about for row in rows]


def vectors_of(where: str, most: int | None = None, on_bad: str = "fail") -> Any:
    """The ``Vectors`` of a file (as :func:`gencli.vectors.read` gives them), or of a run whose model has some."""
    from gencli import vectors

    path = Path(where)
    if path.is_file() or not (path.is_dir() or where.isdecimal()):
        return vectors.read(path, most, on_bad)
    from gencli.commands.options import load_run

    return _vectors(load_run(where, "ema", "cpu"), most)


def _vectors(loaded: Any, most: int | None = None) -> Any:
    from gencli.console import UsageError
    from gencli.vectors import Vectors

    model, name = loaded.model, f"{loaded.meta['model']} of {loaded.path.parent}"
    if not hasattr(model, "vectors"):
        raise UsageError(f"{name} has no word vectors", hint="gencli models")
    x = model.vectors().detach().float().cpu().numpy()[:most]
    return Vectors(list(model.vocabulary)[: len(x)], x, name)
