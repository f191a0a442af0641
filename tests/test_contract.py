"""What every model of the table promises (at a tiny size), and the house rules that its source is held to."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gencli import checkpoint, data
from gencli.console import UsageError
from gencli.contract import CAPABILITIES, Model, capabilities
from gencli.models import MAPS, TABLE, model_class
from gencli.recipe import list_recipes
from gencli.rng import SampleRng
from gencli.run import Run
from gencli.sampling import draw, raw, scope
from gencli.training.session import Session
from gencli.training.trainer import Trainer
from tests.tiny import SMALLER, session, tiny

SOURCE = Path(__file__).parent.parent / "gencli"
STEPS = 2  # a run and its half: 2 * STEPS == STEPS + STEPS


def state(made: Session) -> dict[str, Tensor]:
    """Copies of all tensors that the next step depends on."""
    found = {f"model/{name}": t.clone() for name, t in made.model.state_dict().items()}
    found |= {f"ema/{name}": t.clone() for name, t in made.trainer.ema.items()}
    return found | {name: t.clone() for name, t in made.trainer.tensors().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module", params=list(TABLE))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session after ``STEPS`` of ``2 * STEPS`` steps, with a checkpoint of that step. Never changed."""
    folder = tmp_path_factory.mktemp("run") / request.param
    with session(tiny(request.param, f"train.steps={2 * STEPS}")) as made, Run.create(out=folder) as run:
        made.start(run)
        for _ in range(STEPS):
            logs = made.trainer.step()
            assert logs and np.isfinite(list(logs.values())).all(), logs
        made.save()
        yield made


@pytest.fixture
def model(trained: Session) -> Model:
    """The trained model as every verb gets it."""
    return checkpoint.load(trained.run.path).model


@pytest.fixture
def rows(trained: Session) -> tuple[Tensor, Tensor | None]:
    """Five rows of the data's val split: x, and labels where the model wants them."""
    fields = trained.val_data.rows(torch.arange(5))
    return fields["x"], fields["label"] if conditional(trained.model) else None


def conditional(model: Model) -> bool:
    return bool(getattr(model.config, "conditional", False))


def need(model: Model, capability: str) -> None:
    if capability not in capabilities(model):
        pytest.skip(f"no {capability}")


def log_prob(model: Model, x: Tensor, labels: Tensor | None = None, first: int = 0) -> Tensor:
    with scope(SampleRng(0, range(first, first + len(x)), "test")) as rng:
        return model.log_prob(x, rng, labels=labels)


def samples(model: Model, n: int, seed: int = 0, **options: Any) -> np.ndarray[Any, Any]:
    chunks = list(draw(model, n, seed=seed, **options))
    assert [chunk.first for chunk in chunks] == list(range(0, n, model.chunk))
    return np.concatenate([chunk.x for chunk in chunks])


def assert_raw(x: np.ndarray[Any, Any], model: Model, n: int) -> None:
    """``n`` examples as data comes: whole levels in range, or finite floats."""
    assert x.shape == (n, *model.spec.shape)
    if model.spec.levels is None:
        assert x.dtype == np.float32 and np.isfinite(x).all()
    else:
        assert x.dtype == (np.uint8 if model.spec.levels <= 256 else np.int16)
        assert x.min() >= 0 and x.max() < model.spec.levels


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", list(TABLE))
def test_the_table_tells_what_the_class_has(name: str) -> None:
    cls = model_class(name)
    assert capabilities(cls) == [c for c in CAPABILITIES if c in TABLE[name].capabilities]
    assert set(TABLE[name].capabilities) <= set(CAPABILITIES)
    assert (cls.likelihood is not None) == hasattr(cls, "log_prob")
    assert TABLE[name].path.startswith(f"gencli.models.{TABLE[name].family}.")
    assert name in {r.name for r in list_recipes()}, "a model has a default recipe"
    assert name in SMALLER, "give the new model a tiny size in tests/tiny.py"


@pytest.mark.parametrize("name", [r.name for r in list_recipes()])
def test_the_data_of_every_shipped_recipe_is_in_the_table(name: str) -> None:
    (listed,) = [r for r in list_recipes() if r.name == name]
    base, variants = data.table.split_name(listed.data)
    assert base in data.SETS and all(data.SETS[base].allows(v) for v in variants) and listed.model in TABLE


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", list(TABLE))
def test_every_parameter_is_trained_by_some_phase(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[str] = set()
    update = Trainer._update

    def watched(self: Trainer, player: Any, outs: Any) -> dict[str, float]:
        reached.update(self.names[id(p)] for p in player.parameters if p.grad is not None)
        return update(self, player, outs)

    monkeypatch.setattr(Trainer, "_update", watched)
    with session(tiny(name)) as made:
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        for _ in range(STEPS):
            made.trainer.step()
        if all(p.after is not None and not p.parameters for p in made.model.phases()):  # it writes its own updates
            assert all(not torch.equal(p, before[n]) for n, p in made.model.named_parameters())
            return
        learnt = {n for n, p in made.model.named_parameters() if p.requires_grad}
        moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert learnt and learnt == reached
    assert moved <= learnt, "a loss or a sampler changed what no phase lists"


def test_half_a_run_and_its_resumption_are_the_whole(trained: Session) -> None:
    with session(trained.recipe) as whole:
        for _ in range(2 * STEPS):
            last = whole.trainer.step()
        expected = state(whole)
    with session(trained.recipe) as half:
        half.resume(trained.run)
        assert half.trainer.number == STEPS
        torch.manual_seed(3)
        np.random.seed(3)
        for _ in range(STEPS):
            again = half.trainer.step()
        assert_same(state(half), expected)
    assert again == last


def test_looking_at_a_model_changes_nothing(trained: Session) -> None:
    before = state(trained)
    globals_before = (torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    mode = trained.model.training
    first, second = trained.evaluate(), trained.evaluate()
    assert first == second
    pictures = [trained.picture(), trained.picture()]
    if pictures[0] is not None:
        assert np.array_equal(*pictures) and pictures[0].dtype == np.uint8
    assert_same(state(trained), before)
    assert trained.model.training == mode and trained.trainer.number == STEPS
    assert torch.equal(torch.random.get_rng_state(), globals_before[0])
    assert np.array_equal(np.random.get_state()[1], globals_before[1]) and random.getstate() == globals_before[2]


# ---------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_the_model_back(trained: Session, rows: tuple[Tensor, Tensor | None]) -> None:
    for weights in ("ema", "raw"):
        loaded = checkpoint.load(trained.run.path, weights=weights)
        model = loaded.model
        assert (loaded.step, loaded.meta["model"]) == (STEPS, trained.recipe.model.name)
        assert model.config == trained.model.config and model.spec == trained.model.spec
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        ema = trained.trainer.averages() if weights == "ema" else {}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, ema.get(name, trained.model.state_dict()[name])), (weights, name)
    with trained.trainer.evaluating() as live:
        again = checkpoint.load(trained.run.path).model
        if live.likelihood is not None:
            assert torch.equal(log_prob(live, *rows), log_prob(again, *rows))
        if hasattr(live, "sample"):
            assert samples(live, 3).tobytes() == samples(again, 3).tobytes()


# ---------------------------------------------------------------------------------------------- capabilities


def test_samples_are_raw_and_do_not_depend_on_how_many(model: Model) -> None:
    need(model, "samples")
    many = samples(model, model.chunk + 1)
    assert_raw(many, model, model.chunk + 1)
    for n in (1, 3, model.chunk):
        assert samples(model, n).tobytes() == many[:n].tobytes()
    assert len(np.unique(many, axis=0)) > 1, "all samples are equal"
    assert samples(model, 3, seed=1).tobytes() != many[:3].tobytes()


def test_a_likelihood_is_a_number_of_nats_an_example(model: Model, rows: tuple[Tensor, Tensor | None]) -> None:
    need(model, "likelihood")
    x, labels = rows
    assert model.likelihood in ("exact", "lower bound", "estimate", "density")
    whole = log_prob(model, x, labels)
    assert whole.shape == (len(x),) and whole.isfinite().all() and whole.dtype in (torch.float32, torch.float64)
    if model.spec.levels is not None and model.likelihood in ("exact", "lower bound"):
        assert (whole <= 0).all(), "a probability above one"
    for i in range(len(x)):  # each example on its own, keyed by its index
        alone = log_prob(model, x[i : i + 1], None if labels is None else labels[i : i + 1], first=i)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-5, atol=1e-4)


def test_bounds_are_of_each_example_and_rise_with_the_draws(model: Model, rows: tuple[Tensor, Tensor | None]) -> None:
    need(model, "bounds")
    x, labels = rows
    with scope(SampleRng(0, range(len(x)), "test")) as rng:
        assert model.elbo(x, rng, labels=labels).shape == (len(x),)
    found = []
    for k in (1, 300):
        with scope(SampleRng(0, range(len(x)), "test")) as rng:
            found.append(model.iwae(x, rng, k, labels=labels))
    assert found[1].shape == (len(x),) and found[1].dtype == torch.float64 and found[1].isfinite().all()
    assert found[1].mean() >= found[0].mean() - 1e-9
    with scope(SampleRng(0, [1], "test")) as rng:  # each example on its own, keyed by its index
        alone = model.iwae(x[1:2], rng, 300, labels=None if labels is None else labels[1:2])
    torch.testing.assert_close(alone[0], found[1][1], rtol=1e-5, atol=1e-4)


def test_latents_are_decoded_to_samples(model: Model) -> None:
    need(model, "latents")
    with scope(SampleRng(0, range(6), "test")) as rng:
        z = model.prior(rng)
        assert len(z) == 6 and z.is_floating_point() and z.isfinite().all()
        x = model.decode(z)
        assert_raw(raw(x, model.spec), model, 6)
        if x.is_floating_point() and model.spec.levels is not None:
            assert x.min() >= -1 and x.max() <= 1, "decoded pixels lie in [-1, 1]"
        assert torch.equal(x, model.decode(z)), "decode draws nothing"
        torch.testing.assert_close(model.decode(z[2:3])[0], x[2], rtol=1e-4, atol=1e-5)


def test_what_is_encoded_can_be_decoded(model: Model, rows: tuple[Tensor, Tensor | None]) -> None:
    need(model, "encodes")
    x, _ = rows
    with scope(SampleRng(0, range(len(x)), "test")) as rng:
        z = model.encode(x, rng)
        assert_raw(raw(model.decode(z), model.spec), model, len(x))
    with scope(SampleRng(0, range(1), "test")) as rng:
        assert model.prior(rng).shape[1:] == z.shape[1:]


def test_translations_keep_the_shape(model: Model, rows: tuple[Tensor, Tensor | None]) -> None:
    need(model, "translates")
    with scope(SampleRng(0, range(len(rows[0])), "test")) as rng:
        for direction in ("AB", "BA"):
            assert_raw(raw(model.translate(rows[0], rng, direction), model.spec), model, len(rows[0]))


@pytest.mark.parametrize("name", list(TABLE))
def test_labels_go_to_the_model_that_wants_them(name: str) -> None:
    cls = model_class(name)
    with session(tiny(name)) as made, made.trainer.evaluating() as plain:
        if "samples" in capabilities(cls) and not conditional(plain):
            with pytest.raises(UsageError, match="not class-conditional"):
                next(draw(plain, 1, labels=[0]))
    if "conditional" not in cls.Config.model_fields:
        return
    with session(tiny(name, "model.conditional=true")) as made:
        logs = made.trainer.step()
        assert np.isfinite(list(logs.values())).all()
        classes = len(made.model.spec.classes)
        x = made.val_data.rows(torch.arange(3))["x"]
        with made.trainer.evaluating() as model:
            if "samples" in capabilities(cls):
                chunks = list(draw(model, 5, labels=[classes - 1, 0]))
                assert chunks[0].label.tolist() == [classes - 1, 0] * 2 + [classes - 1]
                assert_raw(chunks[0].x, model, 5)
                assert next(draw(model, 5)).label.tolist() == [i % classes for i in range(5)]
            if model.likelihood is not None:
                assert log_prob(model, x, torch.tensor([0, 1, classes - 1])).isfinite().all()
                with pytest.raises(UsageError):
                    log_prob(model, x)


# ---------------------------------------------------------------------------------------------- the source


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    """Modules imported at run time; ``lazy`` counts those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in FILES else str(child.module)
        elif not type_checking(child) and (lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from imports(child, lazy)


def imported(module: str, lazy: bool = True) -> set[str]:
    return set(imports(tree_of(FILES[module]), lazy))


def room(module: str) -> str:
    """The room of the house that a module stands in: a package's name, or its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "gencli"


MODELS = [e.path.partition(":")[0] for e in [*TABLE.values(), *MAPS.values()]]


@pytest.mark.parametrize("name", [*TABLE, *MAPS])
def test_a_model_is_one_file_that_cites_its_paper(name: str) -> None:
    entry = (TABLE | MAPS)[name]
    path = Path(find_spec(entry.path.partition(":")[0]).origin)
    doc = ast.get_docstring(tree_of(path))
    said = " ".join(doc.split()).lower()
    assert "reference" in said and entry.arxiv in said and str(entry.year) in said
    assert not [w for w in re.findall(r"[a-z]{4,}", entry.title.lower()) if w not in said]
    assert entry.authors.split(",")[0].split()[-1].lower() in said
    assert len(path.read_text("utf-8").splitlines()) <= 300
    assert "Config" in tree_names(path, entry.path.partition(":")[2])


def tree_names(path: Path, cls: str) -> set[str]:
    (found,) = [n for n in tree_of(path).body if isinstance(n, ast.ClassDef) and n.name == cls]
    names = {ast.unparse(n.targets[0]) for n in found.body if isinstance(n, ast.Assign)}
    return names | {n.name for n in found.body if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize("module", [m for m in FILES if room(m) == "models" and m != "gencli.models"])
def test_models_know_tensors_and_nothing_of_machines(module: str) -> None:
    rooms = {room(m) for m in imported(module) if m.split(".")[0] == "gencli"}
    assert rooms <= {"contract", "nn", "rng", "console"}, "models import contract, nn, rng, never one another"
    outside = {m.split(".")[0] for m in imported(module)} & {"os", "pathlib", "shutil", "io", "tempfile", "subprocess"}
    assert not outside, outside
    calls = {ast.unparse(n.func) for n in ast.walk(tree_of(FILES[module])) if isinstance(n, ast.Call)}
    assert not calls & {"open", "print", "input", "torch.manual_seed", "torch.randn", "torch.rand", "torch.randint"}
    assert not [c for c in calls if c.endswith((".cuda", ".randn_like", ".rand_like", "torch.device"))]


# What each room may import, lazily or not: the arrows of gencli/README.md.
GROUND = {"gencli", "keyed", "rng", "processes", "files", "console", "header", "strict_yaml", "archives"}
MIDDLE = GROUND | {"nn", "contract", "data", "models", "checkpoint", "run", "recipe"}
ARROWS: dict[str, set[str]] = {
    "console": set(),
    "files": set(),
    "processes": {"files"},
    "keyed": set(),
    "rng": {"keyed"},
    "header": {"console"},
    "strict_yaml": {"console"},
    "archives": {"console", "files"},
    "pickles": {"archives", "console"},
    "nn": {"rng", "console", "contract"},
    "contract": {"processes", "console", "rng"},
    "data": {"contract", "rng", "files", "console", "archives", "pictures"},
    "models": {"contract", "nn", "rng", "console"},
    "checkpoint": {"contract", "models", "rng", "files", "console", "header"},
    "recipe": {"contract", "models", "files", "console", "strict_yaml"},
    "run": {"gencli", "checkpoint", "files", "console", "header"},
    "pictures": {"files"},
    "streams": {"archives", "console", "files", "pictures", "plots", "contract", "data"},
    "given": {"archives", "console", "contract", "data", "streams"},
    "plots": {"pictures"},
    "sampling": MIDDLE | {"plots", "streams"},
    "latents": MIDDLE | {"sampling", "given"},
    "views": MIDDLE | {"plots", "sampling"},
    "walks": MIDDLE | {"given", "latents", "pictures", "plots", "sampling", "streams"},
    "vectors": {"archives", "console", "files", "header"},
    "dictionaries": {"archives", "console", "vectors"},
    "translation": {"console", "files", "header", "keyed", "metrics", "models", "vectors", "words"},
    "words": {"console", "vectors"},
    "metrics": MIDDLE | {"dictionaries", "vectors", "words", "header", "pickles", "pictures", "sampling", "streams"},
    "training": MIDDLE | {"header", "metrics", "sampling", "streams", "pictures"},
    "gencli": {"checkpoint", "contract"},
    "cli": {"gencli", "commands", "console"},
    "__main__": {"cli"},
}


@pytest.mark.parametrize("module", list(FILES))
def test_arrows_run_one_way(module: str) -> None:
    own = room(module)
    found = {room(m) for m in imported(module) if m.split(".")[0] == "gencli"} - {own}
    assert "commands" not in found or own == "cli"
    if own != "commands":
        assert found <= ARROWS[own], f"{module} imports {sorted(found - ARROWS[own])}: see gencli/README.md"
    if own == "nn":
        outside = {m.split(".")[0] for m in imported(module)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "gencli", "pydantic", "torchdiffeq"}


HEAVY = {"torch", "torchvision", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "safetensors", "pydantic", "rich"}
LIGHT = ["cli", "commands", "console", "files", "header", "strict_yaml", "checkpoint", "run", "models", "__main__"]


@pytest.mark.parametrize("module", [m for m in FILES if room(m) in LIGHT and m not in MODELS] + ["gencli.data"])
def test_importing_what_starts_first_imports_nothing_heavy(module: str) -> None:
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        here = ahead.pop()
        if here in seen or here not in FILES:
            continue
        seen.add(here)
        found = imported(here, lazy=False)
        assert not {m.split(".")[0] for m in found} & HEAVY, here
        ahead += [m for m in found if m.startswith("gencli")]
        ahead += [here.rpartition(".")[0]]  # its package is imported before it


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "telnetlib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"}
FORBIDDEN_CALLS |= {"torch.jit.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}
FORBIDDEN_CALLS |= {"yaml.unsafe_load_all", "yaml.full_load_all", "tempfile.mktemp"}


@pytest.mark.parametrize("module", list(FILES))
def test_nothing_in_the_source_runs_what_a_file_says(module: str) -> None:
    assert not {m.split(".")[0] for m in imported(module)} & FORBIDDEN_MODULES
    assert not [m for m in imported(module) if m.startswith("torch.hub")]
    for node in ast.walk(tree_of(FILES[module])):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.hub", ast.unparse(node)
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_MODULES
        if not isinstance(node, ast.Call):
            continue
        called, where = ast.unparse(node.func), f"{module} line {node.lineno}"
        assert called not in FORBIDDEN_CALLS, where
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get("shell", "False") == "False", where
        assert given.get("allow_pickle", "False") == "False", where
        if called in ("np.load", "numpy.load", "np.lib.format.read_array", "np.save", "np.lib.format.write_array"):
            assert "allow_pickle" in given, f"{where}: say allow_pickle=False"


PICKLES = """
import sys
import numpy, PIL.Image, PIL.PngImagePlugin, sklearn.datasets, torch, safetensors.torch
from gencli import checkpoint, data, pictures, sampling, streams
from gencli.data import embedded
from gencli.metrics import likelihood
from gencli.models.latent import vae
raised = []
sys.addaudithook(lambda event, args: raised.append((event, args)) if event.startswith("pickle") else None)
loaded = checkpoint.load(sys.argv[1])
checkpoint.load_training(loaded.path.parent)
chunks = list(sampling.draw(loaded.model, 3))
for name in ("digits", "shapes"):
    data.load(name, "test").rows(torch.arange(3))
for ending in ("npz", "safetensors", "tar", "png"):
    streams.write(f"{sys.argv[2]}/x.{ending}", iter(chunks), loaded.model.spec, {}, 3)
    list(streams.read(f"{sys.argv[2]}/x.{ending}"))
likelihood.nll(loaded.model, data.load("digits", "test"), limit=3)
print(raised)
import pickle
pickle.loads(pickle.dumps(Exception))
print(len(raised))
"""


def test_using_a_checkpoint_and_data_unpickles_nothing(tmp_path: Path) -> None:
    with session(tiny("vae", "train.steps=1")) as made, Run.create(out=tmp_path / "run") as run:
        made.start(run)
        made.trainer.step()
        made.save()
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PICKLES, str(run.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "1"], done.stdout + done.stderr
