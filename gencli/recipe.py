"""Recipes: strict YAML and ``key=value`` overrides become one validated, frozen :class:`Recipe`. Imports no torch.

Everything wrong with a recipe (unknown keys, wrong types, values out of range) is said at once, each with its line and
the nearest right key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails

from gencli import files, strict_yaml
from gencli.console import GencliError, UsageError, nearest
from gencli.models import MAPS
from gencli.strict_yaml import Key, quoted, scalar

if TYPE_CHECKING:
    from pydantic import ValidationInfo

    from gencli.contract import Config

__all__ = [
    "DataPart",
    "Listed",
    "ModelPart",
    "PhasePart",
    "Recipe",
    "TrainPart",
    "check_model",
    "digest",
    "dump",
    "find",
    "list_recipes",
    "load",
    "recipe_root",
    "scalar",
]

T = TypeVar("T", bound=BaseModel)

# --- the parts --------------------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """``1e5`` is how people write a number of steps, and a float to YAML."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Optimizer = Literal["sgd", "adam", "adamw", "adamax", "rmsprop"]
Schedule = Literal["constant", "linear", "cosine", "exponential"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(BaseModel):
    """Which model; every key but ``name`` goes to the model's own ``Config``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1)

    @property
    def config(self) -> dict[str, Any]:
        """The keys for the model's ``Config``."""
        return dict(self.__pydantic_extra__ or {})


class DataPart(_Part):
    """Which data set, where it lies, and what to do about items that cannot be read."""

    name: str = Field(min_length=1)
    root: str | None = None
    on_bad: Literal["fail", "skip"] = "fail"


class PhasePart(_Part):
    """What one phase does otherwise than ``train`` says; None is "as there"."""

    optimizer: Optimizer | None = None
    lr: Positive | None = None
    betas: tuple[Fraction, Fraction] | None = None
    momentum: Fraction | None = None
    weight_decay: NonNegative | None = None
    schedule: Schedule | None = None
    clip: Positive | None = None


class TrainPart(_Part):
    """How to train. ``lr`` is the peak rate; ``warmup`` and the ``*_every`` count optimiser steps.

    ``hogwild``: processes write one memory and do not wait for each other (Niu et al., 2011, arXiv:1106.5730): fast,
    not reproducible.

    ``evaluate``: metrics of the val split, the first of which names the best checkpoint; nll without it, where the
    model has a likelihood. Metrics of samples draw ``evaluate_samples`` of them.
    """

    steps: Count = 1000
    batch_size: Count = 64
    accumulate: Count = 1
    optimizer: Optimizer = "adam"
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    momentum: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    schedule: Schedule = "constant"
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warmup: Natural = 0
    clip: Positive | None = None
    ema: Fraction | None = None
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    hogwild: bool = False
    evaluate: tuple[str, ...] = ()
    evaluate_every: Count | None = None
    evaluate_samples: Count = 500
    sample_every: Count | None = None
    checkpoint_every: Count | None = None
    patience: Count | None = None
    keep: Count = 2
    phases: dict[str, PhasePart] = {}
    samples: Count = 64

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", value) % value:
            raise ValueError(f"should divide train.batch_size, {info.data['batch_size']}")
        return value

    @field_validator("patience")
    @classmethod
    def _counts_evaluations(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("evaluate_every", value) is None:
            raise ValueError("counts evaluations: train.evaluate_every should be set")
        return value

    def phase(self, name: str) -> PhasePart:
        """What phase ``name`` does: its own settings, filled up with those of ``train``."""
        own = self.phases.get(name, PhasePart())
        values = {key: getattr(own, key) for key in PhasePart.model_fields}
        return PhasePart(**{key: getattr(self, key) if value is None else value for key, value in values.items()})


class _Origin:  # noqa: PLW1641 (recipes are not hashed)
    """Where each key of a recipe was said: a line of the file, an override or an option."""

    def __init__(self, name: str, places: Mapping[Key, int]) -> None:
        self.name = name
        self.places: dict[Key, str] = {key: f"{name} line {line}" for key, line in places.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)  # provenance is no part of a recipe's value

    def say(self, key: Key, place: str) -> None:
        """``key`` and all below it now come from ``place``."""
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key} | {key: place}

    def of(self, key: Key) -> str:
        """The place of ``key`` or of the nearest key above it."""
        return next((self.places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.places), self.name)

    def order(self, key: Key) -> int:
        """Sorts keys as they were said."""
        places = [self.name, *self.places.values()]
        return places.index(self.of(key))


class Recipe(_Part):
    """A whole recipe; :func:`load` makes it, :func:`dump` writes it."""

    model: ModelPart
    data: DataPart
    train: TrainPart = TrainPart()
    seed: Natural = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count | None = None
    _origin: _Origin = PrivateAttr(default_factory=lambda: _Origin("recipe", {}))


# --- where recipes lie ------------------------------------------------------------------------------------------------


class Listed(NamedTuple):
    """A shipped recipe in the list: ``headline`` is the header's first line that is not the command."""

    name: str
    path: Path
    model: str
    data: str
    steps: int | None
    headline: str


def recipe_root() -> Path:
    """The folder of shipped recipes: inside an installed package, else beside it in the source tree."""
    inside = Path(__file__).parent / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def _shipped() -> dict[str, Path]:
    paths = sorted(recipe_root().glob("*/*.yaml"), key=lambda p: (p.parent.name, p.stem != "default", p.stem))
    return {p.parent.name if p.stem == "default" else f"{p.parent.name}/{p.stem}": p for p in paths}


def list_recipes() -> list[Listed]:
    """All shipped recipes, by model, the default first. One that cannot be read says so in its headline."""
    rows = []
    for name, path in _shipped().items():
        try:
            parts, _ = strict_yaml.read(path, path.name)
            parts = {key: part if isinstance(part, dict) else {} for key, part in parts.items()}
            header = [line.lstrip("# ").rstrip() for line in _header(path)]
            headline = next((line for line in header if line and not line.startswith("gencli ")), "")
            data, steps = str(parts.get("data", {}).get("name", "")), parts.get("train", {}).get("steps")
        except (UsageError, AttributeError) as error:
            headline, data, steps = f"broken: {error}", "", None
        rows.append(Listed(name, path, path.parent.name, data, steps, headline))
    return rows


def _header(path: Path) -> list[str]:
    lines = path.read_text("utf-8-sig").splitlines()
    return lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))]


def find(spec: str) -> tuple[Path, str]:
    """The file that ``spec`` names and how to name it in messages.

    ``spec`` is a path to a file or run folder, or a shipped recipe: ``pixelcnn``, ``pixelcnn/paper``.
    """
    path = Path(spec)
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml", str(path / "recipe.yaml")
    if spec and path.exists() and not path.is_dir():
        return path, spec
    shipped = _shipped()
    name = spec.removesuffix("/default")
    if name in shipped:
        return shipped[name], f"recipes/{shipped[name].parent.name}/{shipped[name].name}"
    if name in MAPS:
        hint = f"gencli translate-embeddings SRC TGT --dictionary TRAIN --map {name}"
        raise UsageError(f"{name} maps word vectors: it is fitted to a dictionary, not trained by a recipe", hint=hint)
    what = "no such recipe file:" if path.suffix in (".yaml", ".yml") else "no recipe"
    raise UsageError(f"{what} {spec!r}{nearest(spec.removesuffix('.yaml'), shipped)}", hint="gencli recipes ls")


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    spec: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None, *, model: bool = False
) -> Recipe:
    """The recipe that ``spec`` names, changed by ``options`` and then by ``overrides``.

    ``overrides``: ``train.ema=0.999``, the value a YAML scalar or flow list. ``options``: dotted key -> value, where
    None was not given. ``model=True`` checks the keys of the model too, which imports torch.

    :raises UsageError: with one line for each thing that is wrong.
    """
    path, name = find(spec)
    data, lines = strict_yaml.read(path, name)
    if not isinstance(data, dict):
        raise UsageError(f"{name}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    origin, problems = _Origin(name, lines), []
    for key, chosen in (options or {}).items():
        if chosen is not None:
            problems += _set(data, key, chosen, f"option {_flag(key)} {chosen}", origin)
    for override in overrides:
        key, equals, text = override.partition("=")
        place = f"override {quoted(override, 200)}"
        if not equals or not all(key.split(".")):
            problems.append(f"{place}: should be KEY=VALUE, such as train.steps=100")
            continue
        if not key.isprintable():  # control characters, and bytes that are no text
            problems.append(f"{place}: its key is not text")
            continue
        try:
            problems += _set(data, key, scalar(text), place, origin)
        except UsageError as error:
            problems.append(f"{place}: {error}")
    recipe, found = _validate(Recipe, data, (), origin)
    problems += found
    if model and isinstance(part := data.get("model"), dict) and isinstance(part.get("name"), str):
        problems += _check_model(part["name"], {k: v for k, v in part.items() if k != "name"}, origin)[1]
    if recipe is None or problems:
        raise UsageError("\n".join(problems))
    recipe._origin = origin
    return recipe


def check_model(recipe: Recipe) -> Config:
    """The model's own ``Config``. Imports torch.

    :raises UsageError: with one line for each key that it does not know or accept.
    """
    config, problems = _check_model(recipe.model.name, recipe.model.config, recipe._origin)
    if config is None:
        raise UsageError("\n".join(problems))
    return config


def _check_model(name: str, config: dict[str, Any], origin: _Origin) -> tuple[Config | None, list[str]]:
    from gencli.models import model_class

    try:
        config_class = model_class(name).Config
    except GencliError as error:
        return None, [f"{origin.of(('model', 'name'))}: {error}"]
    return _validate(config_class, config, ("model",), origin)


def _flag(key: str) -> str:
    return {"data.name": "--data", "data.root": "--data-root"}.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}")


def _set(data: dict[str, Any], dotted: str, value: Any, place: str, origin: _Origin) -> list[str]:
    """Set ``dotted`` in ``data``; the problem if something above it is no mapping."""
    keys = dotted.split(".")
    for depth, key in enumerate(keys[:-1]):
        if data.get(key) is None:
            data[key] = {}
            origin.say(tuple(keys[: depth + 1]), place)
        if not isinstance(data[key], dict):
            return [f"{place}: {quoted('.'.join(keys[: depth + 1]))} is no mapping"]
        data = data[key]
    data[keys[-1]] = value
    origin.say(tuple(keys), place)
    return []


def _validate(kind: type[T], data: Any, at: Key, origin: _Origin) -> tuple[T | None, list[str]]:
    """``data`` as a ``kind``, or what is wrong with it, one line for each key."""
    try:
        # by way of JSON, whose strict mode still takes a list for a tuple
        return kind.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        problems: dict[str, None] = {}
        errors = error.errors(include_url=False, include_context=False)
        for details in sorted(errors, key=lambda e: origin.order((*at, *e["loc"]))):
            problems[_problem(kind, details, at, origin)] = None
        return None, list(problems)


def _problem(kind: type[BaseModel], details: ErrorDetails, at: Key, origin: _Origin) -> str:
    key = (*at, *details["loc"])
    place, dotted = origin.of(key), quoted(".".join(map(str, key)))
    if details["type"] == "missing":
        return f"{place}: the key {dotted} is missing"
    if details["type"] == "extra_forbidden":
        return f"{place}: unknown key {dotted}{_meant(kind, details['loc'])}"
    what = details["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("an object", "a mapping")
    shown = json.dumps(details["input"])
    return f"{place}: {dotted} {what}, not {shown if len(shown) < 60 else shown[:60] + '...'}"


def _meant(kind: type[BaseModel], loc: Key) -> str:
    """Did-you-mean for an unknown key: the nearest beside it, or the same word in another part of the recipe."""
    for step in loc[:-1]:
        if step in kind.model_fields:  # else it is the key of a phase, or the place in a list
            kind = next(_models(kind.model_fields[str(step)].annotation), kind)
    word = str(loc[-1])
    if kind is Recipe:
        for part, model in (("train", TrainPart), ("data", DataPart)):
            if word in model.model_fields:
                return f" (did you mean '{part}.{word}'?)"
    return nearest(word, kind.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


# --- writing ----------------------------------------------------------------------------------------------------------


def dump(recipe: Recipe) -> str:
    """``recipe`` as YAML that loads to an equal recipe; all keys, in the order of their definition."""
    return strict_yaml.dump(recipe.model_dump())


_NO_MATTER = (
    "evaluate",
    "evaluate_every",
    "evaluate_samples",
    "sample_every",
    "checkpoint_every",
    "patience",
    "keep",
    "samples",
)


def digest(recipe: Recipe) -> str:
    """A hash of all that steers training step by step: two recipes of one digest may continue each other's runs.

    The number of steps counts only where a learning rate is scheduled by it, so that a run can be prolonged.
    """
    parts = recipe.model_dump(mode="json", exclude={"device": True, "threads": True, "data": {"root"}})
    train = {key: value for key, value in parts["train"].items() if key not in _NO_MATTER}
    schedules = {train["schedule"], *(phase["schedule"] for phase in train["phases"].values())}
    if not schedules & {"linear", "cosine"}:
        del train["steps"]
    return hashlib.blake2b(files.canonical(parts | {"train": train}).encode(), digest_size=16).hexdigest()
