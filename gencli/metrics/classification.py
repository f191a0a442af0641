"""How many examples are classified right: by a model, or by a probe of its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencli import processes
from gencli.console import DataError, UsageError
from gencli.contract import Model
from gencli.data.source import Source
from gencli.metrics import probe
from gencli.metrics.extractors import Extractor
from gencli.metrics.likelihood import chunks_of
from gencli.metrics.seen import rows_seen, see
from gencli.rng import Keys, SampleRng
from gencli.sampling import scope

__all__ = ["accuracy", "probed"]

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN probe, where every class has as many labels; else 1


def accuracy(model: Model, source: Source, *, limit: int | None = None) -> dict[str, Any]:
    """The share of ``source``'s rows whose class is the likeliest under ``model``: one row of results.

    Beside it its standard error, and the share of the commonest class. Several processes share the chunks out.
    UsageError if the model has no classes; DataError if the data have others or none.
    """
    if not hasattr(model, "classify"):
        raise UsageError("this model has no classes", hint="gencli models lists what each can do")
    if not model.spec.fits(source.spec) or model.spec.classes != source.spec.classes:
        raise DataError(f"{source.name} has other rows or classes than {model.spec.name}, which the model knows")
    device = next(model.parameters()).device

    def one(rows: range) -> Any:
        fields = source.rows(torch.tensor(rows))
        with scope(SampleRng(0, rows, f"eval-{source.split}", device)):
            found = model.classify(fields["x"].to(device)).argmax(1).cpu()  # type: ignore[operator]
        return torch.stack([found, fields["label"]]).numpy()

    pairs = torch.cat([torch.from_numpy(p) for p in processes.shared(chunks_of(source, limit, model.chunk), one)], 1)
    return _row("accuracy", source, pairs[0], pairs[1])


def _row(metric: str, source: Source, found: Tensor, labels: Tensor) -> dict[str, Any]:
    right = probe.accuracy(found, labels)
    return {
        "metric": metric,
        "data": f"{source.name}@{source.split}",
        "accuracy": right.accuracy,
        "stderr": right.stderr,
        "commonest": labels.bincount().max().item() / len(labels),
        "examples": right.examples,
    }


def probed(
    metric: str, extractors: dict[str, Extractor], splits: dict[str, Source], n: int | None, seed: int
) -> dict[str, Any]:
    """A linear ("probe") or nearest-neighbour ("knn") classifier of features, learned from train, scored on test.

    ``extractors``: the first is the one in question, the others stand beside it by their names. ``splits``: train, val
    and test. ``n`` labels of train, the same for all, or all of them; the linear probe's penalty is then chosen on val,
    and is 1 / n for few labels.
    """
    train, test = splits["train"], splits["test"]
    if not train.spec.classes:
        raise UsageError(f"{train.name} has no classes to probe for")
    K, row = len(train.spec.classes), dict[str, Any]()
    few = slice(None)
    for name, extractor in extractors.items():
        parts = {split: see(extractor, rows_seen(source), {"x"}) for split, source in splits.items()}
        x, y = zip(*((part.x, torch.from_numpy(part.labels)) for part in parts.values()))
        learned = dict(zip(parts, zip(x, y)))
        if n is not None:
            few = probe.few_labels(learned["train"][1], K, n, Keys(seed).open("probe"))  # type: ignore[assignment]
        train_x, train_y = learned["train"][0][few], learned["train"][1][few]
        test_x, test_y = learned["test"]
        if metric == "probe":
            fitted = probe.linear_probe(train_x, train_y, K, val=learned["val"] if n is None else None)
            found, about = fitted.predict(test_x), {"l2": fitted.l2}
        else:
            many = int(train_y.bincount(minlength=K).min()) >= NEIGHBOURS
            k = NEIGHBOURS if many else 1
            found = probe.knn(train_x, train_y, test_x, k, K, temperature=TEMPERATURE if many else None)
            about = {"k": k}
        if not row:
            row = _row(metric, test, found, test_y) | {"labels": len(train_y)} | about
        else:
            row[name] = probe.accuracy(found, test_y).accuracy
    return row
