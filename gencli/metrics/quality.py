"""Sample quality: one row of results for samples against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gencli import pictures, processes
from gencli.console import DataError, UsageError
from gencli.metrics.extractors import Extractor
from gencli.metrics.frechet import Moments, distance, infinity
from gencli.metrics.inception_score import inception_score
from gencli.metrics.kid import kid
from gencli.metrics.likelihood import rows_of
from gencli.metrics.nearest import memorisation, sheet
from gencli.metrics.precision_recall import precision_recall
from gencli.metrics.reference import Reference, Saved
from gencli.metrics.seen import Seen
from gencli.rng import Keys
from gencli.streams import like, requantised

__all__ = ["NEEDS", "full_name", "judge"]

# metric -> what it must see of the samples
NEEDS: dict[str, set[str]] = {
    "fid": {"moments"},
    "kid": {"x"},
    "inception-score": {"logits"},
    "precision-recall": {"x"},
    "memorisation": {"rows"},
}
COUNTED = 100_000  # rows of train and of the reference that samples are compared with, one by one, at most
SHOWN = 24  # pairs in the picture: the nearest
SHORT = {"fid": "fd", "kid": "kd"}


def full_name(metric: str, extractor: Extractor) -> str:
    """``fid`` is the Inception network's alone; of another extractor the distance is ``fd-domain``, say."""
    return metric if extractor.name == "inception" else f"{SHORT.get(metric, metric)}-{extractor.name}"


def judge(
    metric: str,
    seen: Seen,
    reference: Reference | Saved,
    extractor: Extractor,
    *,
    seed: int,
    per_class: bool = False,
    extrapolate: bool = False,
    baselines: bool = True,
    picture: Path | None = None,
) -> dict[str, Any]:
    """One row of results: ``metric`` of what was ``seen`` against ``reference``."""
    row: dict[str, Any] = {"metric": full_name(metric, extractor)}
    if metric == "fid":
        row |= _frechet(seen, reference, seed, baselines)
        if extrapolate:
            row |= _extrapolated(seen, reference, seed)
        if per_class:
            row |= _by_class(seen, reference)
    elif metric == "kid":
        other = reference.seen({"x"})
        value, error = kid(seen.x, other.x)  # type: ignore[arg-type]
        row |= {"value": value, "stderr": error, "reference": other.n}
    elif metric == "inception-score":
        if seen.logits is None:
            raise UsageError(f"the {extractor.name} extractor has no classes to score")
        score = inception_score(seen.logits, rng=Keys(seed).open("inception score"))
        row |= {"value": score.mean, "std": score.std, "splits": score.splits, "H(y)": score.h_y}
        row |= {"E[H(y|x)]": score.h_y_x, "classes": seen.logits.shape[1]}
    elif metric == "precision-recall":
        other = reference.seen({"x"})
        row |= precision_recall(other.x, seen.x)._asdict()  # type: ignore[arg-type]
        row |= {"reference": other.n}
    else:
        row = _memorised(seen, reference, picture)
    about = extractor.about if metric != "memorisation" else {"distance": "Euclidean, pixels in [-1, 1]"}
    return row | {"data": reference.name, "samples": seen.n, **about, "seed": seed}


def _memorised(seen: Seen, reference: Reference | Saved, picture: Path | None) -> dict[str, Any]:
    """Distances of pixels in [-1, 1]: those of samples to train, beside those of the reference's rows to train."""
    if not isinstance(reference, Reference) or reference.train is None:
        raise UsageError(f"{reference.name} has no train split that could be remembered")
    if seen.rows is None or not seen.spec.shape == reference.spec.shape:
        raise DataError(f"samples are {like(seen.spec.shape)}, and {reference.name} is {like(reference.spec.shape)}")
    levels = reference.spec.levels
    own = seen.rows if levels is None else requantised(seen.rows, seen.spec.levels or 256, levels)
    train, test = (torch.cat([f["x"] for f in rows_of(s, COUNTED)]) for s in (reference.train, reference.source))
    scale = reference.spec.scale
    found, neighbours = memorisation(scale(torch.from_numpy(own)), scale(train), scale(test))
    if picture is not None:
        order = neighbours.distances[:, 0].argsort()[:SHOWN]
        pairs = own[order.numpy()], train[neighbours.rows[order, 0]].numpy()
        shown = sheet(*pairs, levels or 256, neighbours.distances[order, 0].numpy())
        processes.first(lambda: pictures.save_png(picture, shown))
    return {"metric": "memorisation", **found._asdict(), "train": len(train), "reference": len(test)}


def _frechet(seen: Seen, reference: Reference | Saved, seed: int, baselines: bool) -> dict[str, Any]:
    assert seen.moments is not None
    value = distance(seen.moments, reference.moments)
    row: dict[str, Any] = {"value": value, "reference": reference.moments.n}
    if baselines:
        beside = reference.baselines(seen.n, seed)
        row |= beside
        if beside.get("gaussian"):
            row["ratio"] = value / beside["gaussian"]
    return row


def _extrapolated(seen: Seen, reference: Reference | Saved, seed: int) -> dict[str, Any]:
    assert seen.x is not None
    value, error = infinity(seen.x, reference.moments, Keys(seed).open("fid infinity"))
    return {"infinity": value, "infinity_stderr": error}


def _by_class(seen: Seen, reference: Reference | Saved) -> dict[str, Any]:
    """The distance between the samples and the reference's rows of each class, and the mean over classes."""
    other = reference.seen({"x"})
    if seen.labels is None or other.labels is None:
        which = reference.name if seen.labels is not None else "the samples"
        raise UsageError(f"{which} have no labels: no distance per class")
    assert seen.x is not None and other.x is not None
    found: dict[str, float] = {}
    for k, name in enumerate(reference.spec.classes):
        mine, theirs = (torch.from_numpy(y == k) for y in (seen.labels, other.labels))
        for rows, where in ((mine, "samples"), (theirs, reference.name)):
            if rows.sum() < 2:
                raise DataError(f"class {name!r} has {int(rows.sum())} rows in {where}: 2 are needed, better 50")
        pair = [Moments(seen.x.shape[1]), Moments(seen.x.shape[1])]
        pair[0].add(seen.x[mine])
        pair[1].add(other.x[theirs])
        found[name] = distance(*pair)
    return {"class_mean": sum(found.values()) / len(found), "by_class": found}
