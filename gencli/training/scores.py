"""Every metric of a run or of samples, in one row of results each: what the verbs and a run's own evaluations call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gencli import data as sets
from gencli import sampling
from gencli.checkpoint import Loaded
from gencli.console import UsageError, nearest
from gencli.contract import Model
from gencli.data import points
from gencli.data.source import Source, Whole
from gencli.data.text import respelt
from gencli.metrics import classification, likelihood, modes, quality
from gencli.metrics.extractors import Extractor, Network, Pixels
from gencli.metrics.inverse import inverse
from gencli.metrics.reference import About, Reference, Saved
from gencli.metrics.seen import Subject, see
from gencli.models import model_class
from gencli.rng import seeded
from gencli.streams import Reading
from gencli.training.extractor import choose, default

__all__ = [
    "METRICS",
    "OF_SAMPLES",
    "Asked",
    "check_capable",
    "check_metric",
    "headline",
    "higher_is_better",
    "reference",
    "score",
    "scores",
]

OF_MODELS = ("nll", "elbo", "iwae", "inverse", "modes", "accuracy", "probe", "knn")
OF_SAMPLES = ("fid", "kid", "inception-score", "precision-recall", "memorisation")
METRICS = (*OF_MODELS, *OF_SAMPLES)
HIGHER = ("elbo", "iwae", "modes", "accuracy", "probe", "knn", "inception-score", "precision-recall")
# what a metric asks of a model, and what a model without it lacks; the others ask for samples
METHODS = {
    "nll": ("log_prob", "likelihood"),
    "elbo": ("elbo", "bound of its likelihood"),
    "iwae": ("iwae", "bound of its likelihood"),
    "inverse": ("f_inverse", "inverse"),
    "accuracy": ("classify", "classes"),
    "probe": ("features", "features"),
    "knn": ("features", "features"),
}
MOST = 10_000  # samples that a run is asked for where nobody says how many


@dataclass(frozen=True)
class Asked:
    """What is asked of a measurement: the options of ``gencli evaluate``, which explains them.

    ``source`` and ``against`` are the split and what :func:`reference` gave, where they are at hand already.
    """

    data: str | None = None
    root: str | None = None
    split: str = "test"
    n: int | None = None
    seed: int = 0
    k: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    extractor: str | None = None
    extractor_weights: Path | None = None
    per_class: bool = False
    extrapolate: bool = False
    baselines: bool = True
    labels: int | None = None
    out: Path | None = None
    source: Source | None = None
    against: tuple[Extractor, Reference | Saved] | None = None


def check_metric(metric: str, among: Sequence[str] = METRICS) -> None:
    """UsageError if there is no such metric."""
    if metric not in among:
        raise UsageError(f"unknown metric {metric!r}{nearest(metric, among)}: there is {', '.join(among)}")


def check_capable(metric: str, name: str) -> None:
    """UsageError if the model ``name`` lacks what ``metric`` asks for."""
    model = model_class(name)
    method, lacks = METHODS.get(metric, ("sample", "samples"))
    if not hasattr(model, method) and not (metric == "accuracy" and hasattr(model, "sample")):
        raise UsageError(f"{name} has no {lacks}", hint="gencli models lists what each can do")


def headline(row: Mapping[str, Any]) -> tuple[str, float]:
    """The one number of a row of results, and its name."""
    if row["metric"] == "nll":
        unit = "bits_per_dim" if "bits_per_dim" in row else "nats"
        return unit, row[unit]
    if row["metric"] in ("elbo", "iwae"):
        return row["metric"], row["nats"]
    key = next(key for key in ("covered", "accuracy", "precision", "value") if key in row)
    return str(row["metric"]), float(row[key])


def higher_is_better(metric: str) -> bool:
    """Whether more of ``metric``, by the name it has in METRICS, is better."""
    return metric in HIGHER


def score(metric: str, what: Loaded | Reading, asked: Asked) -> dict[str, Any]:
    """One metric of one model or of samples: a row that says how it was measured."""
    (row,) = scores([metric], what, asked)
    return row


def applicable(what: Loaded | Reading, asked: Asked) -> list[str]:
    """The metrics that ``what`` can have: those of its model's capabilities, and those of its samples."""
    spec = what.spec if isinstance(what, Reading) else what.model.spec
    found: list[str] = []
    if isinstance(what, Loaded):
        model, name = what.model, _data_name(what, asked)
        found += ["nll"] if model.likelihood is not None else []
        found += ["elbo", "iwae"] if hasattr(model, "iwae") else []
        found += ["inverse"] if hasattr(model, "f_inverse") else []
        found += ["modes"] if hasattr(model, "sample") and _has_modes(name) else []
        found += ["accuracy"] if hasattr(model, "classify") else []
        found += ["probe", "knn"] if hasattr(model, "features") else []
        if not hasattr(model, "sample"):
            return found
    if spec.kind == "text":
        return found
    found += ["fid", "kid", "precision-recall"]
    return [*found, "inception-score", "memorisation"] if spec.kind == "image" else found


def scores(metrics: Sequence[str] | None, what: Loaded | Reading, asked: Asked) -> list[dict[str, Any]]:
    """A row for each of ``metrics`` (None: all that apply); samples are drawn and looked at once for all of them."""
    wanted = applicable(what, asked) if metrics is None else list(metrics)
    rows: dict[str, dict[str, Any]] = {}
    for metric in wanted:
        if metric in OF_MODELS:
            rows[metric] = _of_model(metric, what, asked)
    if judged := [metric for metric in wanted if metric in OF_SAMPLES]:
        rows |= _of_samples(judged, what, asked)
    return [rows[metric] for metric in wanted]


def _about(what: Loaded) -> dict[str, Any]:
    return {
        "model": what.meta["model"],
        "step": what.meta["step"],
        "weights": what.weights,
        "checkpoint": str(what.path.parent),
    }


def _data_name(what: Loaded | Reading, asked: Asked) -> str:
    if asked.data is not None:
        return asked.data
    if isinstance(what, Loaded):
        return str(what.meta["recipe"]["data"]["name"])
    if what.spec.name.split(":")[0] not in sets.SETS:
        raise UsageError("what should the samples be compared with?", hint="--data with a data set's name or path")
    return what.spec.name


def _root(what: Loaded | Reading, asked: Asked) -> str | None:
    return asked.root or (what.meta["recipe"]["data"].get("root") if isinstance(what, Loaded) else None)


def _split(name: str, asked: Asked, root: str | None) -> Source:
    if asked.source is not None:
        return asked.source
    if asked.split == "all":
        return Whole([sets.load(name, split, root) for split in sets.SPLITS])
    return sets.load(name, asked.split, root)


def _has_modes(name: str) -> bool:
    try:
        points.modes(name)
    except UsageError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- of a model


def _of_model(metric: str, what: Loaded | Reading, asked: Asked) -> dict[str, Any]:
    if isinstance(what, Reading):
        if metric == "accuracy":
            return _accuracy_of_samples(what, asked)
        raise UsageError(f"{metric} is of a run, not of samples", hint="gencli runs")
    name, root = _data_name(what, asked), _root(what, asked)
    if metric == "modes":
        row = modes.modes(what.model, name, n=asked.n or modes.SAMPLES, seed=asked.seed)
    elif metric == "accuracy":
        if not hasattr(what.model, "classify") and hasattr(what.model, "sample"):
            return _accuracy_of_samples(what, asked)
        row = classification.accuracy(what.model, _split(name, asked, root), limit=asked.n)
    elif metric == "inverse":
        check_capable(metric, what.meta["model"])
        row = inverse(what.model, _split(name, asked, root), seed=asked.seed, limit=asked.n)
    elif metric in ("probe", "knn"):
        row = _probed(metric, what, asked, root)
    else:
        row = _likelihood(metric, what.model, name, asked, root)
    return row | _about(what) | {"seed": asked.seed}


def _probed(metric: str, what: Loaded, asked: Asked, root: str | None) -> dict[str, Any]:
    """Beside raw pixels and an encoder of the same shape that has learned nothing."""
    name, model = _data_name(what, asked), what.model
    if not hasattr(model, "features"):
        raise UsageError(f"{what.meta['model']} has no features", hint="gencli models lists what each model can do")
    splits = {split: sets.load(name, split, root) for split in sets.SPLITS}
    with seeded(asked.seed, "random encoder"):
        random = type(model)(model.config, model.spec).to(next(model.parameters()).device)
    extractors: dict[str, Extractor] = {
        "features": Network(model, "features", "", {}),
        "raw pixels": Pixels(),
        "random encoder": Network(random, "random", "", {}),
    }
    return classification.probed(metric, extractors, splits, asked.labels, asked.seed)


def _likelihood(metric: str, model: Model, name: str, asked: Asked, root: str | None) -> dict[str, Any]:
    def fitted(source: Source) -> Source:
        if source.spec.kind == model.spec.kind == "text" and not model.spec.fits(source.spec):
            return respelt(source, model.spec)
        return source

    source = fitted(_split(name, asked, root))
    if metric in ("elbo", "iwae"):
        row = likelihood.bound(metric, model, source, seed=asked.seed, limit=asked.n, k=asked.k)
    else:
        row = likelihood.nll(model, source, seed=asked.seed, limit=asked.n, k=asked.k)
    if source.spec.kind == "text" and metric == "nll":
        row |= likelihood.per_character(row, source)
    if source.spec.kind == "points" and name in sets.SETS:
        row |= _gap(source, row)
    if asked.baselines and "bits_per_dim" in row:
        told, bits = likelihood.baseline(fitted(sets.load(name, "train", root)), source)
        row |= {told: bits, "ratio": row["bits_per_dim"] / bits}
    return row


def _gap(source: Source, row: Mapping[str, Any]) -> dict[str, float]:
    """How far the model is from the density that the points are drawn from, on the same points: total nats each.

    ``entropy`` is the mean of minus the true log-density, ``gap`` the mean of the true less the model's.
    """
    x = torch.cat([fields["x"] for fields in likelihood.rows_of(source, row["examples"])])
    true = float(points.density(source.name).log_prob(x.double().numpy()).mean())
    return {"entropy": -true, "gap": true - (-row["nats"] if row["metric"] == "nll" else row["nats"])}


# ---------------------------------------------------------------------------------------------- of samples


def _of_samples(metrics: Sequence[str], what: Loaded | Reading, asked: Asked) -> dict[str, dict[str, Any]]:
    extractor, against = _against(what, asked)
    need = {part for metric in metrics for part in quality.NEEDS[metric]}
    if asked.per_class or asked.extrapolate:
        need |= {"x"}
    subject = _subject(what, asked, against.size)
    seen = see(extractor, subject, need)
    rows = {}
    for metric in metrics:
        rows[metric] = quality.judge(
            metric,
            seen,
            against,
            extractor,
            seed=asked.seed,
            per_class=asked.per_class,
            extrapolate=asked.extrapolate,
            baselines=asked.baselines,
            picture=asked.out,
        )
        rows[metric] |= subject.about
    return rows


def _against(what: Loaded | Reading, asked: Asked) -> tuple[Extractor, Reference | Saved]:
    if asked.against is not None:
        return asked.against
    device = next(what.model.parameters()).device if isinstance(what, Loaded) else "cpu"
    return reference(_data_name(what, asked), replace(asked, root=_root(what, asked)), device)


def reference(name: str, asked: Asked, device: Any = "cpu") -> tuple[Extractor, Reference | Saved]:
    """What samples are compared by, and with: data set ``name``, or a file of its statistics."""
    given: dict[str, Any] = {"root": asked.root, "file": asked.extractor_weights, "device": device}
    if name.endswith(".safetensors"):
        about = About.read(Path(name))
        extractor = choose(asked.extractor or about.name, about.spec, data_name=about.spec.name, **given)
        return extractor, Saved(Path(name), extractor)
    source = _split(name, asked, asked.root)
    extractor = choose(asked.extractor or default(source.spec), source.spec, data_name=name, **given)
    train = None if asked.split in ("train", "all") else sets.load(name, "train", asked.root)
    return extractor, Reference(source, extractor, train)


def _subject(what: Loaded | Reading, asked: Asked, reference: int | None) -> Subject:
    if isinstance(what, Reading):
        return Subject("the samples", what.spec, what, {"subject": what.spec.name} | what.meta)
    model = what.model
    if not hasattr(model, "sample"):
        raise UsageError(f"{what.meta['model']} draws no samples", hint="gencli models lists what each model can do")
    n = asked.n or min(reference or MOST, MOST)
    chunks = sampling.draw(model, n, seed=asked.seed, options=asked.options, chunk=what.meta["chunk"])
    return Subject(what.meta["model"], model.spec, chunks, _about(what) | dict(asked.options))


def _accuracy_of_samples(what: Loaded | Reading, asked: Asked) -> dict[str, Any]:
    """How often the classifier of the data sees in a sample the class that it was drawn for."""
    extractor, against = _against(what, asked)
    subject = _subject(what, asked, against.size)
    seen = see(extractor, subject, {"logits"})
    if seen.labels is None or seen.logits is None:
        lacking = "these samples have no labels" if seen.labels is None else f"{extractor.name} has no classes"
        raise UsageError(f"{lacking}: accuracy is of samples of known class")
    right = float((seen.logits.argmax(1).numpy() == seen.labels).mean())
    row = {"metric": quality.full_name("accuracy", extractor), "accuracy": right, "samples": seen.n}
    return row | extractor.about | subject.about | {"seed": asked.seed}
