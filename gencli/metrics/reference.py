"""What samples are compared with: a split of a data set, or statistics of one that were saved.

Statistics of a split are remembered in the user's cache folder under a key made of the split's content, the
extractor's weights and the number of rows, so that changed data or weights never meet an old number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from gencli import files, processes
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data.source import Source
from gencli.header import read_header, short
from gencli.metrics.extractors import Extractor
from gencli.metrics.frechet import Moments, distance, gaussian
from gencli.metrics.likelihood import rows_of
from gencli.metrics.seen import Seen, Subject, rows_seen, see
from gencli.rng import Keys
from gencli.sampling import raw
from gencli.streams import Samples

__all__ = ["About", "Reference", "Saved"]

MOST = 2**40  # numbers of one example, in a file that somebody may have made up
WIDEST = 4096  # pixels of the images of which a Gaussian with full covariance is fitted at most


class Reference:
    """A split that samples are compared with, as one extractor sees it; ``train`` is what a model may have learned."""

    def __init__(self, source: Source, extractor: Extractor, train: Source | None = None) -> None:
        self.source, self.extractor, self.train = source, extractor, train
        self.name = f"{source.name}@{source.split}"
        self.spec = source.spec
        extractor.check(source.spec, self.name)
        self.size = source.size
        self._seen: dict[str, Seen] = {}
        self._moments: Moments | None = None

    def seen(self, keep: Collection[str]) -> Seen:
        """What ``keep`` names, of all rows; read once for each set of wishes."""
        key = " ".join(sorted(keep))
        if key not in self._seen:
            self._seen[key] = see(self.extractor, rows_seen(self.source), keep)
        return self._seen[key]

    @property
    def moments(self) -> Moments:
        """Remembered from one command to the next."""
        if self._moments is None:
            path = _cached("moments", "safetensors", self.source.digest, self.extractor.digest)
            if processes.first(path.exists):
                self._moments = Moments.of(load_file(path))
            else:
                found = self.seen({"moments"}).moments
                assert found is not None
                processes.first(lambda: files.write_bytes(path, to_bytes(found.tensors())))
                self._moments = found
        return self._moments

    def baselines(self, n: int, seed: int) -> dict[str, float]:
        """Distances to the reference of ``n`` rows of train ("real") and of as many draws of a Gaussian with the mean
        and the covariance of its pixels ("gaussian"): what a perfect and a trivial model would have."""
        if self.train is None:
            return {}
        train = self.train
        digests = (train.digest, self.source.digest, self.extractor.digest)
        path = _cached("baselines by blocks", "json", *digests, n, seed)
        known = processes.first(lambda: json.loads(path.read_text("utf-8")) if path.exists() else None)
        if known is None:
            real = see(self.extractor, _drawn(train, n, seed), {"moments"}).moments
            assert real is not None
            known = {"real": distance(real, self.moments), "gaussian": self._gaussian(train, n, seed)}
            processes.first(lambda: files.write_json(path, known))
        return {name: value for name, value in known.items() if value is not None}

    def _gaussian(self, train: Source, n: int, seed: int) -> float | None:
        if self.spec.dims > WIDEST:
            return None
        x = torch.cat([fields["x"] for fields in rows_of(train, 10 * WIDEST)])
        drawn = gaussian(train.spec.scale(x).flatten(1), Keys(seed).open("gaussian baseline"), n)
        real = torch.get_default_dtype()
        chunks = (Samples(raw(part.unflatten(1, train.spec.shape).to(real), train.spec)) for part in drawn)
        of = see(self.extractor, Subject("the Gaussian", train.spec, chunks), {"moments"}).moments
        assert of is not None
        return distance(of, self.moments)


class About(BaseModel):
    """What the header of a file of statistics says of them: the extractor, by name and digest, and the data."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str
    digest: str
    extractor: str
    sha256: str = ""
    data: str
    spec: DataSpec

    @staticmethod
    def read(path: Path) -> About:
        """DataError if ``path`` is no file of ``gencli data stats``."""
        said = read_header(path)[0].get("stats")
        if said is None:
            raise DataError(f"{path} holds no statistics", hint="gencli data stats writes them")
        try:
            about = About.model_validate_json(json.dumps(said))
            if min(about.spec.shape, default=0) < 1 or math.prod(about.spec.shape) > MOST:
                raise DataError(f"{path}: its data have the shape {list(about.spec.shape)}")
            return about
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "what it says of them"
            raise DataError(f"{path} holds no statistics that gencli wrote: {short(where)}: {first['msg']}") from None


class Saved:
    """The statistics of a reference in a file of ``gencli data stats``.

    DataError if it is none, or if another extractor made them.
    """

    def __init__(self, path: Path, extractor: Extractor) -> None:
        about = About.read(path)
        if about.digest != extractor.digest:
            ours = extractor.about["extractor"]
            made_by = f"made by {short(about.extractor)} {short(about.sha256)}"
            raise DataError(f"{path}: {made_by}, not by {ours} as it is here")
        try:
            self.moments = Moments.of(load_file(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        self.name, self.spec, self.size = about.data, about.spec, self.moments.n

    @staticmethod
    def write(path: Path, reference: Reference) -> None:
        """Save the statistics of ``reference``."""
        extractor, moments = reference.extractor, reference.moments
        said = extractor.about | {"name": extractor.name, "digest": extractor.digest, "data": reference.name}
        said |= {"rows": moments.n, "of": reference.source.digest, "spec": reference.spec.model_dump(mode="json")}
        metadata = {"gencli": files.canonical({"stats": said})}
        files.write_bytes(path, to_bytes(moments.tensors(), metadata=metadata))

    def seen(self, keep: Collection[str]) -> Seen:
        """UsageError: the rows are not there."""
        raise UsageError(f"{self.name}: saved statistics serve fid alone", hint="--data with a data set's name or path")

    def baselines(self, n: int, seed: int) -> dict[str, float]:
        """None: the rows are not there."""
        return {}


def _drawn(source: Source, n: int, seed: int) -> Subject:
    """``n`` rows of ``source``, drawn without putting back (all, where it has fewer), in order."""
    if source.size is None:
        index = torch.arange(n)
    else:
        index = Keys(seed).open("real baseline").permutation("rows", source.size)[:n].sort().values
    chunks = (Samples(source.rows(part)["x"].numpy()) for part in index.split(256))
    return Subject(f"{source.name}@{source.split}", source.spec, chunks)


def _cached(what: str, ending: str, *parts: object) -> Path:
    """The file in the cache folder for ``what`` of ``parts``; its folder is there."""
    key = hashlib.sha256(json.dumps([what, *map(str, parts)]).encode()).hexdigest()[:32]
    folder = files.cache_folder() / "metrics"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.{ending}"
