"""The verbs that need no torch, and the command line as a whole: help, parsing, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gencli import cli, console
from gencli import recipe as recipes
from gencli.commands import doctor, info, train
from gencli.commands import runs as runs_command
from gencli.models import MAPS, TABLE
from gencli.run import Run

VERBS = ["train", "sample", "evaluate", "eval", "interpolate", "apply", "compare", "models", "runs", "info", "doctor"]
VERBS += ["recipes", "recipes ls", "recipes cat", "recipes cp", "recipes validate", "data", "data ls", "data show"]
VERBS += ["doctor scale", "translate-embeddings"]
RECIPE = "# gencli train vae\n# 1.9 bits/dim\nmodel: {name: vae, latents: 4}\ndata: {name: digits}\ntrain: {steps: 9}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with shipped recipes, two runs (one of them torn) and a checkpoint."""
    root = tmp_path / "shipped"
    (root / "vae").mkdir(parents=True)
    (root / "vae/default.yaml").write_text(RECIPE)
    (root / "vae/paper.yaml").write_text(RECIPE.replace("vae\n", "vae/paper\n", 1))
    monkeypatch.setattr(recipes, "recipe_root", lambda: root)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    with Run.create("runs", "vae-digits") as run:
        (run.path / "recipe.yaml").write_text(RECIPE)
        best = {"step": 5, "metric": "bits_per_dim", "value": 1.25}
        run.update(model="vae", data={"name": "digits", "digests": {}}, step=9, steps=9, state="done", best=best)
        run.metric("train", 8, loss=3.0)
        run.metric("train", 9, loss=2.5, kl=0.125)
        run.metric("eval", 9, bits_per_dim=1.5)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 10, "lo')
    torn = home / "runs/0002-torn"
    torn.mkdir()
    (torn / "run.json").write_text('{"state": "runn')
    (home / "runs/notes").mkdir()
    folder = run.path / "checkpoints/step-000009"
    folder.mkdir(parents=True)
    meta = {"model": "vae", "config": {"latents": 4}, "spec": {"name": "digits"}, "step": 9, "chunk": 64}
    write_safetensors(folder / "model.safetensors", {"w": [2, 3], "b": [], "ema/w": [2, 3]}, meta | {"recipe": {}})
    return home


def write_safetensors(path, shapes, meta):
    header, end = {"__metadata__": {"gencli": json.dumps(meta)}}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def gencli(capsys):
    """Call the command line as ``main`` does: (exit code, stdout, stderr)."""

    def call(*words):
        argv = sys.argv
        try:
            code = console.run(cli.app, list(words))
        finally:
            sys.argv = argv
        out, err = capsys.readouterr()
        return code, out, err

    return call


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


# --- models


def test_models(place, gencli):
    code, out, _ = gencli("models")
    found = {row["name"]: row for row in rows(out)}
    assert code == 0 and list(found) == [*TABLE, *MAPS]
    assert found["vae"]["recipes"] == ["vae", "vae/paper"] and found["vae"]["year"] == 2013
    assert found["vae"]["capabilities"] == list(TABLE["vae"].capabilities)


def test_one_model_from_its_source(place, gencli):
    for words in (("models", "vae"), ("info", "vae"), ("info", "vae", "--json")):
        code, out, _ = gencli(*words)
        (row,) = rows(out)
        assert code == 0 and row["title"] == "Auto-Encoding Variational Bayes" and "Reference" in row["doc"]
        (latents,) = [field for field in row["config"] if field["key"] == "latents"]
        assert latents["type"] == "int" and latents["default"] == "16" and "dimensions of z" in latents["about"]


@pytest.mark.parametrize("name", [*TABLE, *MAPS])
def test_every_model_of_the_table_can_be_shown_and_cited(name, gencli):
    _, out, _ = gencli("info", name)
    (row,) = rows(out)
    assert Path(row["source"]).is_file() and row["doc"] and row["config"]
    text = info.bibtex(name)
    assert text.count("{") == text.count("}") and f"year = {{{(TABLE | MAPS)[name].year}}}" in text
    if arxiv := (TABLE | MAPS)[name].arxiv:
        assert f"eprint = {{{arxiv}}}" in text


def test_bibtex():
    assert info.bibtex("vae") == (
        "@misc{kingma2013vae,\n  title = {{Auto-Encoding Variational Bayes}},\n"
        "  author = {Diederik P. Kingma and Max Welling},\n"
        "  year = {2013},\n  eprint = {1312.6114},\n  archivePrefix = {arXiv},\n}\n"
    )


def test_unknown_names_are_answered_with_the_nearest(place, gencli):
    for words, near in [
        (("models", "vea"), "'vae'"),
        (("info", "vea"), "'vae'"),
        (("info", "0001-vae-digit"), "'0001-vae-digits'"),
        (("recipes", "cat", "vae/papr"), "'vae/paper'"),
        (("recipes", "ls", "vea"), "'vae'"),
    ]:
        code, out, err = gencli(*words)
        assert (code, out) == (2, "") and f"did you mean {near}?" in err and err.count("\n") == 2


# --- recipes


def test_recipes_ls_and_cat(place, gencli):
    code, out, _ = gencli("recipes", "ls")
    about = {"data": "digits", "steps": 9, "about": "1.9 bits/dim"}
    assert code == 0 and rows(out) == [{"recipe": "vae", **about}, {"recipe": "vae/paper", **about}]
    assert gencli("recipes", "cat", "vae")[1] == RECIPE


def test_recipes_cp_makes_files_and_never_overwrites(place, gencli):
    assert gencli("recipes", "cp", "vae", "mine.yaml")[:2] == (0, "mine.yaml\n")
    assert Path("mine.yaml").read_text() == RECIPE
    Path("mine.yaml").write_text("precious")
    code, out, err = gencli("recipes", "cp", "vae", "mine.yaml")
    assert (code, out) == (2, "") and "mine.yaml exists" in err and Path("mine.yaml").read_text() == "precious"
    assert gencli("recipes", "cp", "vae/paper", ".")[1] == "vae-paper.yaml\n"
    assert gencli("recipes", "cp", "vae")[1] == "vae.yaml\n"
    assert gencli("recipes", "cp", "vae", ".")[0] == 2
    assert gencli("recipes", "cp", "runs/0001-vae-digits", ".")[1] == "0001-vae-digits.yaml\n"


def test_recipes_validate_says_all_that_is_wrong(place, gencli):
    code, out, _ = gencli("recipes", "validate")
    assert code == 0 and [row["valid"] for row in rows(out)] == [True, True]
    Path("a.yaml").write_text(RECIPE.replace("latents", "latnets").replace("steps", "stesp"))
    code, out, err = gencli("recipes", "validate", "a.yaml", "vae", "b.yaml")
    assert code == 2 and [row["valid"] for row in rows(out)] == [False, True, False]
    assert rows(out)[0]["problems"] == [
        "a.yaml line 5: unknown key 'train.stesp' (did you mean 'steps'?)",
        "a.yaml line 3: unknown key 'model.latnets' (did you mean 'latents'?)",
    ]
    assert all(line in err for line in (*rows(out)[0]["problems"], "no such recipe file: 'b.yaml'"))


# --- runs


def test_runs(place, gencli):
    code, out, _ = gencli("runs")
    first, torn = rows(out)
    age = first.pop("age")
    assert code == 0 and 0 <= age < 60
    assert first == {
        "run": "runs/0001-vae-digits",
        "state": "done",
        "model": "vae",
        "data": "digits",
        "step": 9,
        "steps": 9,
        "last": {"loss": 2.5, "kl": 0.125},
        "best": {"step": 5, "metric": "bits_per_dim", "value": 1.25},
    }
    assert torn == {"run": "runs/0002-torn", "state": "broken"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", {}),
        (b"\xff\x00\n[1]\n3\n", {}),
        (b'{"event":"train","step":1,"loss":1}\n{"event":"train","st', {"loss": 1}),
        (b"x" * 200_000 + b'\n{"event":"train","step":1,"loss":2}\n', {"loss": 2}),
        (b'{"event":"train","loss":3}\n' + b"[" * 50_000, {"loss": 3}),
    ],
)
def test_last_metrics_of_torn_files(tmp_path, text, expected):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert runs_command.last_metrics(tmp_path) == expected


def test_runs_of_strange_records(place, gencli):
    for n, record in enumerate(['{"data": 3, "best": "x", "start": 7}', "[]", "[" * 10_000, "{}"]):
        folder = place / f"runs/000{n + 3}-odd"
        folder.mkdir()
        (folder / "run.json").write_text(record)
    code, out, _ = gencli("runs")
    states = {row["run"][5:9]: row["state"] for row in rows(out)}
    assert code == 0
    assert states == {"0001": "done", "0002": "broken", "0003": None, "0004": "broken", "0005": "broken", "0006": None}


def test_no_runs(tmp_path, monkeypatch, gencli):
    monkeypatch.chdir(tmp_path)
    code, out, err = gencli("runs")
    assert (code, out) == (0, "") and "gencli train" in err
    assert gencli("runs", "--root", "elsewhere")[0] == 3


# --- info


def test_info_of_a_run(place, gencli):
    for what in ("runs/0001-vae-digits", "1", "0001-vae-digits"):
        code, out, _ = gencli("info", what)
        (row,) = rows(out)
        assert code == 0 and row["state"] == "done" and row["recipe"] == RECIPE and row["last"]["loss"] == 2.5
        assert row["checkpoints"] == ["step-000009"]
    assert gencli("info", "1", "--bibtex")[1] == info.bibtex("vae")
    code, _, err = gencli("info", "runs/0002-torn")
    assert code == 3 and "runs/0002-torn/run.json" in err


def test_info_of_a_checkpoint(place, gencli):
    folder = Path("runs/0001-vae-digits/checkpoints/step-000009")
    for what in (folder, folder / "model.safetensors"):
        code, out, _ = gencli("info", str(what))
        (row,) = rows(out)
        assert code == 0 and row["numbers"] == 7 and row["tensors"] == 2 and row["averaged"] == 1
        assert row["dtypes"] == {"F32": 3} and row["step"] == 9 and row["config"] == {"latents": 4}
        assert row["bytes"] == (folder / "model.safetensors").stat().st_size
    assert gencli("info", str(folder), "--bibtex")[1] == info.bibtex("vae")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    code, out, err = gencli("info", str(folder))
    assert (code, out) == (3, "") and "model.safetensors" in err and err.count("\n") <= 2


def test_a_folder_of_the_name_of_a_model_hides_nothing(place, gencli):
    Path("vae").mkdir()
    assert rows(gencli("info", "vae")[1])[0]["family"] == "latent"
    shutil.copytree("runs/0001-vae-digits", "wgan-gp")
    assert rows(gencli("info", "wgan-gp")[1])[0]["model"] == "vae"
    code, _, err = gencli("info", "runs/notes")
    assert code == 3 and "neither a run nor a checkpoint" in err


# --- doctor


def test_doctor(place, gencli, monkeypatch):
    monkeypatch.setenv("GENCLI_DATA", str(place / "runs"))
    code, out, err = gencli("doctor")
    found = {row["check"]: row for row in rows(out)}
    assert code == 0 and found["torch"]["state"] == "ok" and "0001-vae-digits" in found["data root"]["value"]
    assert all(f"advice: {row['check']}: {row['advice']}" in err for row in found.values() if row["state"] == "advice")
    assert found["python"]["value"] == ".".join(map(str, sys.version_info[:3]))


def test_doctor_ends_with_1_where_something_is_broken(place, gencli, monkeypatch):
    def faint():
        raise RuntimeError("dizzy")

    monkeypatch.setattr(doctor, "_machine", faint)
    code, out, err = gencli("doctor", "--data-root", "nowhere")
    broken = {row["check"] for row in rows(out) if row["state"] == "broken"}
    assert code == 1 and broken == {"faint", "data root"} and "broken: data root" in err and "dizzy" in err


# --- the command line


@pytest.mark.parametrize("verb", VERBS)
def test_help_opens_with_a_command_that_exists_and_is_not_wrapped(verb):
    result = CliRunner().invoke(cli.app, [*verb.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    first = next(line for line in result.output.splitlines() if line.startswith("  "))
    example = re.fullmatch(r"  (gencli [^`]+)", first)
    assert example, first
    names = ("eval", "evaluate") if verb in ("eval", "evaluate") else (verb,)
    assert example[1].startswith(tuple(f"gencli {name}" for name in names))


def test_help_lists_the_verbs_each_with_a_word(gencli):
    code, out, _ = gencli("--help")
    listed = dict(re.findall(r"^  ([a-z-]+)  +(\S.*)$", out.split("Commands:")[1], re.M))
    assert code == 0 and set(listed) == {v for v in VERBS if " " not in v} - {"eval"}
    assert not [about for about in listed.values() if about.endswith("...")]


def test_version(gencli):
    from gencli import __version__

    assert gencli("--version") == (0, f"gencli {__version__}\n", "")


def test_wrong_words(gencli):
    assert gencli("trian")[0] == 2
    assert gencli("models", "--jsn")[0] == 2
    assert gencli()[0] == 2


def test_overrides_and_options_mix_in_any_order(monkeypatch):
    seen = []
    monkeypatch.setattr(recipes, "load", lambda *words, model: seen.append(words) or 1 / 0)
    app = typer.Typer()
    app.command()(train.train)
    given = ("pixelcnn", ["model.channels=32", "train.ema=0.9"], {"seed": 3})
    for words in (
        "pixelcnn model.channels=32 --seed 3 train.ema=0.9",
        "--seed 3 pixelcnn model.channels=32 train.ema=0.9",
        "pixelcnn model.channels=32 train.ema=0.9 --seed=3",
    ):
        result = CliRunner().invoke(app, words.split())
        assert isinstance(result.exception, ZeroDivisionError), result.output
    for spec, overrides, options in seen:
        assert (spec, overrides, {k: v for k, v in options.items() if v is not None}) == given
    assert len(seen) == 3


def test_shell_completion_is_there():
    env = {**os.environ, "_GENCLI_COMPLETE": "complete_bash", "COMP_WORDS": "gencli int", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['gencli']; from gencli.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "interpolate"


STATIC = ["--version", "--help", "models", "models vae", "info vae", "info 1", "info CHECKPOINT", "info vae --bibtex"]
STATIC += ["runs", "recipes ls", "recipes cat RECIPE", "recipes cp RECIPE new.yaml", "doctor --help", "train --help"]


def test_static_verbs_import_no_torch(place):
    code = f"""
import sys, contextlib, io
from gencli import cli, console, recipe
loads = []
for words in {STATIC}:
    words = words.replace("CHECKPOINT", "runs/0001-vae-digits/checkpoints/step-000009").replace("RECIPE", "r.yaml")
    with contextlib.redirect_stdout(io.StringIO()):
        assert console.run(cli.app, words.split()) == 0, words
    loads += [words for name in ("torch", "torchvision", "numpy", "click") if name in sys.modules]
print(loads)
"""
    Path("r.yaml").write_text(RECIPE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
