"""gencli translate-embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from gencli.commands.options import Json, Seed

__all__ = ["translate_embeddings"]

COMPARED = (("linear", "none"), ("procrustes", "unit"), ("procrustes", "unit,centre,unit"))
AT = (1, 5, 10)


def translate_embeddings(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Word vectors: .txt, .vec, .bin, .safetensors, .gz of the first three; a run."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TGT", help="The same of the other language.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORD|KEY=VALUE", help="Words to translate, - for lines of stdin; and the map's options."
        ),
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option(metavar="TRAIN", help="Pairs to learn from: a word and a translation a line.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="TEST", help="Pairs to be scored on; without it a quarter of TRAIN's words.")
    ] = None,
    induce: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="TEXT TEXT", help="Find TRAIN in two texts, line i of one the translation of line i of the other."
        ),
    ] = None,
    apply: Annotated[Path | None, typer.Option(metavar="MAP", help="Use this map and fit none.")] = None,
    map_name: Annotated[
        str | None, typer.Option("--map", help="procrustes or linear.", show_default="procrustes")
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(
            help="Steps of unit, centre, whiten on both sides before the map; or none.",
            show_default="unit,centre,unit",
        ),
    ] = None,
    retrieval: Annotated[str, typer.Option(help="nn, inverted-softmax or csls; several for the score.")] = "nn",
    refine: Annotated[
        int, typer.Option(metavar="N", help="Fit N times more, to the words that are each other's nearest.", min=0)
    ] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Linear, orthogonal and centred orthogonal maps, and their differences.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="MAP", help="Where the map goes: MAP.safetensors.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="At most the first so many words of each side.", min=1)] = None,
    k: Annotated[int, typer.Option("-k", help="Translations of each word.", min=1)] = 5,
    on_bad: Annotated[str, typer.Option(help="fail, or skip: leave out what cannot be read, and count it.")] = "fail",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """gencli translate-embeddings en.vec es.vec --dictionary train.txt --test test.txt house

    Learn a map from one language's word vectors to another's from a dictionary, measure it, and translate words by it.

    P@k is the share of TEST's source words, each counted once, with a right translation among the k first of all target
    words; words that either side has no vector of are left out, and coverage says how many are left. Options of the
    maps: gencli info procrustes, gencli info linear. -o keeps the map, --apply uses it:
    echo house | gencli translate-embeddings en.vec es.vec --apply map.safetensors
    """
    from gencli import console
    from gencli.commands.sample import parse_options
    from gencli.console import UsageError
    from gencli.metrics.translation import retrieval as checked
    from gencli.translation import configured, digest, parse

    options = parse_options([word for word in words or [] if "=" in word and word != "="])
    asked = [word for word in words or [] if "=" not in word or word == "="]
    hows = [checked(name) for name in retrieval.split(",")]
    if on_bad not in ("fail", "skip"):
        raise UsageError(f"--on-bad {on_bad!r}: it is fail or skip")
    if sum(given is not None for given in (dictionary, induce, apply)) != 1:
        raise UsageError("a map comes from one of --dictionary TRAIN, --induce TEXT TEXT and --apply MAP")
    if apply and (options or compare or out or refine or map_name or normalise):
        raise UsageError("--apply uses a map as it is: no map, its options, --normalise, --refine, --compare or --out")
    if compare and (out or options or asked or map_name or normalise):
        raise UsageError("--compare measures three maps and keeps none: no other, no --normalise, --out or words")
    if out and out.suffix != ".safetensors":
        raise UsageError(f"{out}: a map is a .safetensors file")
    if len(hows) > 1 and (asked or (apply and not test)):
        raise UsageError("words are translated by one retrieval: name one")
    map_name = map_name or "procrustes"
    configured(map_name, options)
    steps = parse("unit,centre,unit" if normalise is None else normalise)
    task = _Task(source, target, dictionary, test, induce, hows, refine, n, on_bad, seed, asked)
    if compare:
        for rows in _compared(task):
            console.table(rows, json=json or None)
        return
    fitted, rows = _applied(task, apply) if apply else _learned(task, map_name, options, steps)
    if out:
        files = {"source": source, "target": target, "dictionary": dictionary}
        fitted.map.about["files"] = {
            side: {"name": Path(path).name, "sha256": digest(path)} for side, path in files.items() if path
        }
        fitted.map.save(out)
        rows = [row | {"out": str(out)} for row in rows]
    if rows:
        console.table(rows, json=json or None)
    if asked or (apply and not test):
        _translate(fitted, asked or ["-"], hows[0], k, json)


class _Task(NamedTuple):
    source: str
    target: str
    dictionary: Path | None
    test: Path | None
    induce: tuple[Path, Path] | None
    hows: list[str]
    refine: int
    n: int | None
    on_bad: str
    seed: int
    asked: list[str]

    def read(self) -> tuple[Any, Any]:
        """The word vectors of both sides; DataError for words to translate that the source does not have."""
        from gencli.commands.words import vectors_of
        from gencli.console import DataError, say
        from gencli.words import near

        source, target = (vectors_of(where, self.n, self.on_bad) for where in (self.source, self.target))
        for side in (source, target):
            if zero := len(side.x) - int(side.x.any(1).sum()):
                if zero == len(side.x):
                    raise DataError(f"{side.name}: all its vectors are zero")
                say(f"{side.name}: {zero} of its {len(side.x)} vectors are zero: they have no direction")
        for word in self.asked:
            if word != "-" and word not in source.index:
                raise DataError(f"{source.name} has no word {word!r}{near(word, source)}")
        return source, target

    def pairs(self) -> tuple[Any, Any, str, str]:
        """The dictionaries to learn from and to be scored on, no source word in both, and what to call them."""
        from gencli import dictionaries
        from gencli.console import DataError, say

        if self.induce:
            name = f"{self.induce[0].name} and {self.induce[1].name}"
            train = dictionaries.induce(*self.induce, self.on_bad)
        else:
            assert self.dictionary is not None
            name, train = str(self.dictionary), dictionaries.read(self.dictionary, self.on_bad)
        if self.test is None:
            train, test = dictionaries.split(train, seed=self.seed)
            if not train or not test:
                raise DataError(f"{name}: too few words to hold a quarter of them out", hint="give a --test")
            return train, test, name, f"a quarter of {name}"
        test = dictionaries.read(self.test, self.on_bad)
        if known := [word for word in test if word in train]:
            say(f"{self.test}: {len(known)} of its {len(test)} words are learned from too, and left out")
            test = {word: meanings for word, meanings in test.items() if word not in train}
        if not test:
            raise DataError(f"{self.test}: all of its words are in {name} too: nothing is left to be scored on")
        return train, test, name, str(self.test)


@dataclass
class _Fitted:
    """A map, and both sides in one space: ``x``, ``y``, float32 of length 1."""

    map: Any
    source: Any  # Vectors
    target: Any
    x: Any
    y: Any
    _rankings: dict[str, Any] = field(default_factory=dict)

    def ranked(self, how: str, rows: Any, k: int) -> tuple[Any, Any]:
        """Scores and rows of the ``k`` best targets of source ``rows``; what is found out about targets is kept."""
        from gencli.metrics.translation import Ranking

        if how not in self._rankings:
            self._rankings[how] = Ranking(how, self.y, self.x)
        return self._rankings[how](self.x[rows], k)


def _lesson(task: _Task) -> tuple[Callable[..., _Fitted], Any, str]:
    """How to fit a map (of its name, options and steps), the words to score it on, and what to call them."""
    from gencli import translation
    from gencli.metrics.translation import Test

    train, test, train_name, test_name = task.pairs()
    source, target = task.read()
    found = translation.pairs(train, source, target, train_name)
    scored = Test.of(test, source.index, target.index, test_name)

    def fit(name: str, options: dict[str, Any], steps: tuple[str, ...]) -> _Fitted:
        made, x, y = translation.fit(name, options, steps, source.x, target.x, found, task.refine, task.seed)
        return _Fitted(made, source, target, x, y)

    return fit, scored, test_name


def _learned(
    task: _Task, name: str, options: dict[str, Any], steps: tuple[str, ...]
) -> tuple[_Fitted, list[dict[str, Any]]]:
    fit, test, test_name = _lesson(task)
    fitted = fit(name, options, steps)
    return fitted, _scores(task, fitted, test, test_name)[0]


def _applied(task: _Task, path: Path) -> tuple[_Fitted, list[dict[str, Any]]]:
    from gencli import dictionaries, translation
    from gencli.console import DataError, say
    from gencli.metrics.translation import Test
    from gencli.words import unit

    made = translation.load(path)
    source, target = task.read()
    for side, vectors, where, d in (
        ("source", source, task.source, made.W.shape[1]),
        ("target", target, task.target, made.W.shape[0]),
    ):
        if vectors.x.shape[1] != d:
            raise DataError(f"{where} has {vectors.x.shape[1]} dimensions, but {path} was fitted on {d}")
        fitted_on = made.about.get("files", {}).get(side)
        if isinstance(fitted_on, dict) and fitted_on.get("sha256") != translation.digest(where):
            say(f"{where} is not the {side} that {path} was fitted on ({fitted_on.get('name')})")
    fitted = _Fitted(made, source, target, made.mapped(made.source(source.x)), unit(made.target(target.x)))
    if not task.test:
        return fitted, []
    test = Test.of(dictionaries.read(task.test, task.on_bad), source.index, target.index, str(task.test))
    return fitted, _scores(task, fitted, test, str(task.test))[0]


def _scores(task: _Task, fitted: _Fitted, test: Any, name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row of results for each retrieval, and which words were right at 1, 5, 10: bool (n, 3) each."""
    from gencli.metrics.translation import interval, scored

    about = fitted.map.about
    rows, hits = [], []
    for how in task.hows:
        right = scored(test, fitted.ranked(how, test.rows, AT[-1])[1])
        row: dict[str, Any] = {
            "map": about["map"],
            "normalise": ",".join(about["normalise"]) or "none",
            "retrieval": how,
        }
        for i, at in enumerate(AT):
            row[f"p_at_{at}"] = right[:, i].mean()
            if at == 1:
                row["p_at_1_95"] = list(interval(right[:, 0], task.seed))
        row |= {"words": len(right), "coverage": len(right) / test.words, "test": name, "pairs": about["pairs"]}
        rows.append(row | {"seed": task.seed})
        hits.append(right)
    return rows, hits


def _compared(task: _Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of the maps of COMPARED, and their differences on the same words with paired intervals."""
    from itertools import combinations

    from gencli.metrics.translation import interval
    from gencli.translation import parse

    fit, test, test_name = _lesson(task)
    rows: list[dict[str, Any]] = []
    right: dict[tuple[str, str], Any] = {}
    for name, steps in COMPARED:
        more, hits = _scores(task, fit(name, {}, parse(steps)), test, test_name)
        rows += more
        right |= {(how, f"{name} {steps}"): h for how, h in zip(task.hows, hits)}
    differences = []
    for how in task.hows:
        for (name, steps), (other, others) in combinations(COMPARED, 2):
            first, second = f"{name} {steps}", f"{other} {others}"
            row: dict[str, Any] = {"first": second, "second": first, "retrieval": how}
            for i, at in enumerate(AT):
                change = right[how, second][:, i].astype(int) - right[how, first][:, i]
                row |= {f"p_at_{at}_difference": change.mean(), f"p_at_{at}_95": list(interval(change, task.seed, at))}
            differences.append(row | {"words": len(test.rows)})
    return rows, differences


# ---------------------------------------------------------------------------------------------- words


def _translate(fitted: _Fitted, asked: list[str], how: str, k: int, json: bool) -> None:
    """Print the translations of words, those of stdin as they come."""
    import sys

    from gencli import console
    from gencli.words import lines

    given = [word for word in asked if word != "-"]
    if given:
        console.table(_translations(fitted, given, how, k), json=json or None)
    if "-" in asked:
        for batch in lines():
            console.table(_translations(fitted, batch, how, k), json=True)
            sys.stdout.flush()


def _translations(fitted: _Fitted, words: list[str], how: str, k: int) -> list[dict[str, Any]]:
    from gencli.console import say
    from gencli.words import near

    known = [word for word in words if word in fitted.source.index]
    best = dict(zip(known, zip(*fitted.ranked(how, [fitted.source.index[word] for word in known], k))))
    made: list[dict[str, Any]] = []
    for word in words:
        score, rows = best.get(word, (None, None))
        if rows is None:
            say(f"{fitted.source.name} has no word {word!r}{near(word, fitted.source)}")
        translations = rows if rows is None else [fitted.target.words[i] for i in rows]
        made.append({"word": word, "translations": translations, "scores": score})
    return made
