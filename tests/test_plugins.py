"""Models of installed packages: found by entry point alone, loaded only when named, never in place of our own."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gencli import checkpoint, models
from gencli import recipe as recipes
from gencli.console import GencliError, UsageError
from gencli.run import Run
from tests.tiny import session

TEMPLATE = Path(__file__).parent / "plugin_template"


def install(site: Path, name: str, version: str, points: str, summary: str = "") -> None:
    """What pip leaves of a package in a folder of ``sys.path``."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    (info / "entry_points.txt").write_text(f"[gencli.models]\n{points}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of ``sys.path``, here and in children."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("GENCLI_NO_PLUGINS", raising=False)
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith(("gencli_gaussian", "broken_")):
            del sys.modules[name]


@pytest.fixture
def template(site: Path) -> Path:
    """The template, installed as its pyproject.toml says."""
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
    points = "\n".join(f"{k} = {v}" for k, v in project["entry-points"]["gencli.models"].items())
    install(site, project["name"], project["version"], points, project["description"])
    shutil.copy(TEMPLATE / "gencli_gaussian.py", site)
    return site


def gencli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gencli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})


def test_a_plugin_trains_and_samples_like_any_model(template: Path, tmp_path: Path) -> None:
    words = ["train.steps=3", "device=cpu", "threads=1", "train.batch_size=8", "train.samples=4"]
    recipe = recipes.load(str(TEMPLATE / "recipe.yaml"), words, model=True)
    with session(recipe) as made, Run.create(out=tmp_path / "run") as run:
        made.start(run)
        for _ in range(3):
            made.trainer.step()
        made.save()
    loaded = checkpoint.load(run.path)
    assert loaded.meta["model"] == "gaussian" and type(loaded.model).__name__ == "Gaussian"
    assert torch.equal(loaded.model.mu, made.model.mu) and bool((loaded.model.mu != 0).all())
    with pytest.raises(UsageError, match=r"recipe.yaml line 3: unknown key 'model.log_sigm'|log_sigm.*log_sigma"):
        recipes.load(str(TEMPLATE / "recipe.yaml"), ["model.log_sigm=1"], model=True)


def test_the_list_names_the_origin_and_imports_nothing(template: Path) -> None:
    code = (
        "import sys; from gencli.models import listing; print(listing()); print('torch' in sys.modules, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "origin='gencli-gaussian 0.1'" in done.stdout
    assert not {"torch", "gencli_gaussian"} & set(done.stdout.splitlines()[1].split())
    done = gencli("models")
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(found) == [*models.TABLE, *models.MAPS, "gaussian"] and not done.stderr
    assert {row["origin"] for row in found.values()} == {"gencli", "gencli-gaussian 0.1"}
    assert (found["gaussian"]["title"], found["gaussian"]["year"]) == (
        "A Gaussian with a diagonal covariance, as an example of a plugin",
        None,
    )
    about = json.loads(gencli("models", "gaussian").stdout)
    assert about["origin"] == "gencli-gaussian 0.1" and about["config"][0]["key"] == "log_sigma"
    assert "diagonal" in about["doc"]


def test_plugins_can_be_left_out(template: Path) -> None:
    assert "gaussian" not in gencli("models", GENCLI_NO_PLUGINS="1").stdout
    done = gencli("info", "gaussian", GENCLI_NO_PLUGINS="1")
    assert done.returncode == 2 and "no model" in done.stderr
    assert gencli("models", GENCLI_NO_PLUGINS="0").stdout.count("gaussian") > 0


def test_a_built_in_model_is_never_replaced(site: Path) -> None:
    install(site, "gencli-thief", "1.0", "vae = broken_thief:VAE\ntwice = broken_thief:A")
    install(site, "gencli-other", "2.0", "twice = broken_thief:B")
    assert models.model_class("vae").__module__ == "gencli.models.latent.vae"
    assert models.entry("vae").origin == "gencli"
    done = gencli("models")
    assert done.stderr.splitlines() == [
        "model 'twice' is left out: gencli-other 2.0 and gencli-thief 1.0 both offer it",
        "model 'vae' of gencli-thief 1.0 is left out: gencli has a model of that name",
    ]
    assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == [*models.TABLE, *models.MAPS]
    with pytest.raises(UsageError, match="no model 'twice'"):
        models.model_class("twice")


@pytest.mark.parametrize(
    ("value", "source", "said"),
    [
        (
            "broken_one:Model",
            "raise ValueError('line one\\nline two')",
            "cannot be loaded: ValueError: line one line two",
        ),
        ("broken_one:Model", "import no_such_module_at_all", "cannot be loaded: ModuleNotFoundError"),
        ("broken_one:Model", "def (", "cannot be loaded: SyntaxError"),
        ("broken_one:Missing", "", "cannot be loaded: AttributeError"),
        ("broken_none:Model", "", "cannot be loaded: ModuleNotFoundError"),
        ("not a reference!", "", "cannot be loaded: AttributeError"),
        ("broken_one:Model", "class Model: pass", "is no subclass of Model"),
        ("broken_one:Model", "Model = 7", "is no subclass of Model"),
    ],
)
def test_a_broken_plugin_is_named_in_one_line(site: Path, value: str, source: str, said: str) -> None:
    install(site, "gencli-broken", "3.1", f"broken = {value}")
    (site / "broken_one.py").write_text(source)
    with pytest.raises(GencliError) as caught:
        models.model_class("broken")
    line = str(caught.value)
    assert line.startswith("model 'broken' of gencli-broken 3.1") and said in line and len(line.splitlines()) == 1
    assert "GENCLI_NO_PLUGINS=1" in caught.value.hint
    listed, problems = models.listing()
    assert [e.name for e in listed] == [*models.TABLE, *models.MAPS, "broken"] and not problems
    assert models.model_class("vae")


def test_a_malformed_list_of_entry_points_harms_no_built_in_model(site: Path) -> None:
    install(site, "gencli-malformed", "1.0", "this line has no equals sign")
    listed, problems = models.listing()
    assert [e.name for e in listed] == [*models.TABLE, *models.MAPS] and models.model_class("vae")
    assert len(problems) == 1 and problems[0].startswith("plugins are left out: ") and "\n" not in problems[0]


def test_a_module_on_the_path_is_no_plugin(site: Path) -> None:
    """Only an installed package's entry point counts: no module, path or recipe names code to run."""
    (site / "broken_path.py").write_text("raise SystemExit('ran')")
    for name in ("broken_path", "broken_path:Model", "../broken_path", "gencli.models"):
        with pytest.raises(UsageError, match="no model"):
            models.model_class(name)


def test_help_and_built_in_models_look_for_no_plugin() -> None:
    code = """
import sys
from importlib import metadata
def refuse(**_): raise SystemExit("looked for plugins")
metadata.entry_points = refuse
from gencli.models import entry
entry("vae")
from gencli.cli import main
sys.argv = ["gencli", "--help"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "looked" not in done.stderr, done.stderr
