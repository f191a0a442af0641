"""What ``apply`` and ``evaluate`` do with word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["measure", "neighbours", "show_vectors"]


def neighbours(loaded: Any, asked: list[str], n: int, json: bool) -> None:
    """Print the words nearest to each word or sum of ``asked``, or to those of stdin's lines where that is ``-``."""
    import sys

    from gencli import console, words
    from gencli.console import UsageError

    vectors = _vectors(loaded)
    x = words.unit(vectors.x)
    if asked == ["-"]:
        for batch in words.lines():
            console.table(_found(batch, vectors, x, n), json=True)
            sys.stdout.flush()
        return
    if not asked:
        raise UsageError("no words: name some, such as king - man + woman, or pipe them in, one a line, with -")
    console.table(_found(words.queries(asked), vectors, x, n), json=json or None)


def _found(queries: list[str], vectors: Any, x: Any, n: int) -> list[dict[str, Any]]:
    """A row for each query; ``neighbours`` is None where a word has no vector, which stderr says."""
    import numpy as np

    from gencli import words
    from gencli.console import say

    rows: list[dict[str, Any]] = []
    for query in queries:
        found = words.vector(query, vectors, x)
        if isinstance(found, str):
            say(f"{vectors.name} has no word {found!r}{words.near(found, vectors)}")
            rows.append({"word": query, "neighbours": None, "cosines": None})
            continue
        y, own = found
        without = np.array([[vectors.index[word] for word in own]])
        scores, at = words.nearest_words(y[None], x, without, min(n, len(x) - len(set(own))))
        rows.append({"word": query, "neighbours": [vectors.words[i] for i in at[0]], "cosines": scores[0].tolist()})
    return rows


def show_vectors(loaded: Any, asked: list[str], out: str | None) -> None:
    """The vectors of ``asked`` (of all words without any) to the file ``out``, or as text on stdout."""
    from gencli import vectors as files
    from gencli.console import UsageError, stdout_binary
    from gencli.words import near

    vectors = _vectors(loaded)
    for word in asked:
        if word not in vectors.index:
            raise UsageError(f"{vectors.name} has no word {word!r}{near(word, vectors)}")
    chosen = list(dict.fromkeys(asked)) or vectors.words
    x = vectors.x[[vectors.index[word] for word in chosen]]
    if out in (None, "-"):
        stream = stdout_binary()
        files.write_text(stream, chosen, x)
        stream.flush()
    else:
        files.write(str(out), chosen, x)


def measure(metric: str, given: list[str], most: int | None) -> list[dict[str, Any]]:
    """The rows of ``similarity`` or ``analogy``; ``given``: a run or a file of vectors (or none), and the questions."""
    from gencli.commands.options import load_run
    from gencli.commands.translate_embeddings import _vectors as of
    from gencli.console import UsageError
    from gencli.metrics import similarity

    if not 1 <= len(given) <= 2:
        raise UsageError(
            f"{metric} takes a run or a file of vectors, and a file of questions", hint="gencli eval --help"
        )
    questions = Path(given[-1])
    vectors = of(given[0], most, "fail") if len(given) == 2 else _vectors(load_run(None, "ema", "cpu"), most)
    about = {"vectors": vectors.name, "words": len(vectors.words)}
    rows = (
        [similarity.similarity(vectors, questions)]
        if metric == "similarity"
        else similarity.analogy(vectors, questions)
    )
    return [row | about for row in rows]


def _vectors(loaded: Any, most: int | None = None) -> Any:
    from gencli.console import UsageError
    from gencli.vectors import Vectors

    model, name = loaded.model, f"{loaded.meta['model']} of {loaded.path.parent}"
    if not hasattr(model, "vectors"):
        raise UsageError(f"{name} has no word vectors", hint="gencli models")
    x = model.vectors().detach().float().cpu().numpy()[:most]
    return Vectors(list(model.vocabulary)[: len(x)], x, name)
