"""gencli compare."""

from __future__ import annotations

import math
import shlex
import time
from json import loads
from typing import Annotated, Any

import typer

from gencli.commands.options import DataRoot, Json

__all__ = ["compare", "verdict"]


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Recipes, each with its overrides: 'pixelcnn model.stacks=single'."),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe.", min=2)] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps of every run; those of the first recipe without it.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="As of gencli evaluate; nll, modes or fid without it, by what the model has.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data set of every run.")] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """gencli compare pixelcnn 'pixelcnn model.stacks=single' --seeds 3 --steps 200

    Train recipes side by side, with the same seeds and the same number of steps, score each on the test split, and say
    whether the first is better than each of the others: reproduced, not reproduced, or inconclusive (by a paired
    t-test over seeds, each at 95 %). The curves of the val split, where the recipes evaluate on their way, follow:
    their mean over seeds at every `train.evaluate_every` steps.
    """
    from gencli import console, recipe
    from gencli.console import UsageError
    from gencli.training.scores import check_metric, higher_is_better

    if len(recipes) < 2:
        raise UsageError("compare needs two recipes or more", hint="gencli compare pixelcnn vae")
    if metric is not None:
        check_metric(metric)
    common = {"data.name": data, "data.root": str(data_root) if data_root else None, "train.steps": steps}
    common = {key: value for key, value in common.items() if value is not None}
    parsed = [_parse(text, common) for text in recipes]
    budget = parsed[0].train.steps
    parsed = [p.model_copy(update={"train": p.train.model_copy(update={"steps": budget})}) for p in parsed]
    for p in parsed:
        recipe.check_model(p)
    sets = {p.data.name: None for p in parsed}
    if len(sets) > 1:
        raise UsageError(f"the recipes train on {' and '.join(sets)}: name one data set by --data")
    metrics = {_metric(p, metric) for p in parsed}
    if len(metrics) > 1:
        raise UsageError("the recipes have no common metric: name one by --metric")
    (metric,) = metrics
    _build(parsed)
    rows, dims = list[dict[str, Any]](), 0
    for text, chosen in zip(recipes, parsed):
        values, took, curves = list[float](), 0.0, list[dict[int, float]]()
        for seed in range(seeds):
            console.say(f"{text}, seed {seed}")
            began = time.monotonic()
            name, value, protocol, curve, dims = _one(chosen.model_copy(update={"seed": seed}), metric)
            values.append(value)
            curves.append(curve)
            took += time.monotonic() - began
        mean, error = _mean(values)
        rows.append(
            {"recipe": text, "metric": name, "mean": mean, "stderr": error, "values": values}
            | protocol
            | {"steps": budget, "seconds_each": round(took / seeds, 1), "curve": _curve(curves)}
        )
    _common_unit(rows, dims)
    higher = higher_is_better(metric)
    rows[0]["verdict"] = "(the first is compared with the others)"
    for row in rows[1:]:
        sign = 1 if higher else -1
        row["verdict"] = verdict([sign * (a - b) for a, b in zip(rows[0]["values"], row["values"])])
        kinds = [rows[0].get("kind"), row.get("kind")]
        if "density" in kinds and kinds[0] != kinds[1]:
            row["verdict"] = f"not comparable: {kinds[0]} against {kinds[1]}, which has no unit of its own"
        elif kinds[0] != kinds[1]:
            row["verdict"] += f" ({kinds[0]} against {kinds[1]}: a bound may be loose)"
    _show(rows, json)


def _common_unit(rows: list[dict[str, Any]], dims: int) -> None:
    """Nats an example for all, where some have a likelihood of levels, in bits a dimension, and some a density."""
    if len({row["metric"] for row in rows}) == 1:
        return
    factor = dims * math.log(2)
    for row in rows:
        if row["metric"] == "bits_per_dim":
            row |= {"metric": "nats", "mean": row["mean"] * factor, "stderr": row["stderr"] * factor}
            row["values"] = [value * factor for value in row["values"]]
            row["curve"] = [(step, value * factor) for step, value in row["curve"]]


def _show(rows: list[dict[str, Any]], json: bool) -> None:
    """The rows; on a terminal their curves as a table of their own, a line a step."""
    import sys

    from gencli import console

    if json or not sys.stdout.isatty():
        console.table(rows, json=json or None)
        return
    curves = [dict(row.pop("curve")) for row in rows]
    console.table(rows)
    steps = sorted({step for curve in curves for step in curve})
    if len(steps) > 1:
        lines = [{"step": n} | {r["recipe"]: c.get(n) for r, c in zip(rows, curves)} for n in steps]
        console.table(lines, title=f"{rows[0]['metric']} on val, mean over seeds")


def _curve(curves: list[dict[int, float]]) -> list[tuple[int, float]]:
    """(step, mean over the runs that got there) of each step."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            found.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(found.items())]


def _build(recipes: list[Any]) -> None:
    """Make every model once: what the last one refuses is told before the first is trained for hours."""
    from gencli.training.session import Session
    from gencli.training.settings import settings

    for recipe in recipes:
        with settings(recipe) as device:
            Session(recipe, device)


def _parse(text: str, options: dict[str, Any]) -> Any:
    from gencli import recipe
    from gencli.console import UsageError

    try:
        name, *overrides = shlex.split(text)
    except ValueError:
        raise UsageError(f"{text!r} is no recipe with overrides") from None
    if "=" in name:
        raise UsageError(f"{name!r} is no recipe: overrides stand behind one, in its quotes: 'pixelcnn {name}'")
    return recipe.load(name, overrides, options)


def _metric(recipe: Any, wanted: str | None) -> str:
    """The metric that is wanted, or that the model has; UsageError, before hours of training, if it can't be had."""
    from gencli.data import points
    from gencli.models import model_class
    from gencli.training.scores import check_capable

    cls = model_class(recipe.model.name)
    chosen = wanted or ("nll" if cls.likelihood else "modes" if recipe.data.name.startswith("points/") else "fid")
    if chosen == "modes":
        points.modes(recipe.data.name)
    check_capable(chosen, recipe.model.name)
    return chosen


def _one(recipe: Any, metric: str) -> tuple[str, float, dict[str, Any], dict[int, float], int]:
    """Train one run and score it: the metric's full name, its value, its protocol, the val split's by step, and the
    dimensions of an example."""
    from gencli import checkpoint
    from gencli.commands.train import train_recipe
    from gencli.training.scores import Asked, headline, score

    run = train_recipe(recipe, preview=False)
    loaded = checkpoint.load(run)
    row = score(metric, loaded, Asked(baselines=False))
    name, value = headline(row)
    protocol: dict[str, Any] = {
        key: row[key] for key in ("data", "kind", "extractor", "examples", "samples") if key in row
    }
    events = map(loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    curve = {e["step"]: e[name] for e in events if e["event"] == "eval" and e.get(name) is not None}
    return name, value, protocol, curve, loaded.model.spec.dims


def _mean(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def verdict(gains: list[float]) -> str:
    """What paired gains (one a seed, positive where the first recipe is better) say at 95 %."""
    from scipy.stats import t

    mean, error = _mean(gains)
    bound = float(t.ppf(0.975, len(gains) - 1)) * error
    if mean - bound > 0:
        return f"reproduced: better by {mean:.4g} ± {error:.2g}"
    if mean + bound < 0:
        return f"not reproduced: worse by {-mean:.4g} ± {error:.2g}"
    return f"inconclusive: {mean:+.4g} ± {error:.2g}"
