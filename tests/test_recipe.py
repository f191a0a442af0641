"""Recipes: strict YAML, overrides, everything wrong said at once, and the way there and back."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gencli import recipe as recipes
from gencli import strict_yaml
from gencli.console import UsageError
from gencli.recipe import DataPart, ModelPart, PhasePart, Recipe, TrainPart, check_model, digest, dump, load

GOOD = """\
# gencli train pixelcnn
model:
  name: pixelcnn
  channels: 16
data:
  name: digits
train:
  steps: 100
  batch_size: 32
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def lines_of(spec, overrides=(), options=None, **kw):
    with pytest.raises(UsageError) as caught:
        load(spec, overrides, options, **kw)
    return str(caught.value).splitlines()


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-3", 1e-3),
        ("+.5", 0.5),
        ("3.", 3.0),
        ("-12", -12),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ('"1"', "1"),
        ("'null'", "null"),
        ("1e", "1e"),
        (".", "."),
        ("-", "-"),
        ("٣", "٣"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    found = strict_yaml.scalar(text)
    assert (found, type(found)) == (value, type(value))
    if text != "-":  # in a file, a list
        assert strict_yaml.parse(f"a: {text}", "f")[0] == {"a": value}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [ls]", 2, "tags are not allowed"),
        ("a: !!str 1", 1, "tags are not allowed"),
        ("a: ! 1", 1, "tags are not allowed"),
        ("!!map {a: 1}", 1, "tags are not allowed"),
        ("a: &x 1\nb: *x", 1, "anchors and aliases"),
        ("a: 1\nb: *x", 2, "anchors and aliases"),
        ("a: 1\n<<: {b: 2}", 2, "merge keys"),
        ("a: 1\nb: 2\na: 3", 3, "the key 'a' is on line 1 already"),
        ("x:\n  a: 1\n  'a': 3", 3, "the key 'a' is on line 2 already"),
        ("? [a]\n: 1", 1, "a key should be a word"),
        ("&k a: 1", 1, "a key should be a word"),
        ("a: 1\n---\nb: 1", 2, "more than one document"),
        ("a: " + "[" * 500, 1, "nested more than 20 deep"),
        ("\n".join(" " * i + "a:" for i in range(30)), 22, "nested more than 20 deep"),
        ("a:\n  b: 99999999999999999999", 2, "too large"),
        ("a: 0x" + "f" * 17, 1, "too large"),
        ("a: " + "9" * 5000, 1, "too large"),
        ("a: 1e999", 1, "too large"),
        ("a: .inf", 1, "finite"),
        ("a: -.Inf", 1, "finite"),
        ("a: .nan", 1, "finite"),
        ("a: [1\nb: 2", 2, ""),
        ("a: 'x", 1, ""),
        ("a: b: c", 1, ""),
        ("\ta: 1", 1, ""),
        ("a: @x", 1, ""),
        ("a: *", 1, ""),
        ("%YAML 3.0\n---\na: 1", 1, ""),
    ],
)
def test_what_yaml_may_not_hold_is_refused_with_its_line(text, line, what):
    with pytest.raises(UsageError) as caught:
        strict_yaml.parse(text, "f.yaml")
    message = str(caught.value)
    assert message.startswith(f"f.yaml line {line}: ") and what in message
    assert "\n" not in message


def test_a_bomb_costs_nothing():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")
    )
    began = time.process_time()
    for text in (bomb, "a: " + "{a: " * 100_000, "[" * 900_000, "a: " + "- " * 400_000):
        with pytest.raises(UsageError):
            strict_yaml.parse(text, "f")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: \xff\n", "line 1: not UTF-8 text"),
        (b"a: 1\nb: \xc3(\n", "line 2: not UTF-8 text"),
        (b"# " + b"x" * 1_000_000, "larger than 1000 kB"),
        (b"a: \x07\n", "not YAML"),
        (b"", "a recipe is a mapping"),
        (b"[1, 2]", "a recipe is a mapping"),
        (b"just words", "a recipe is a mapping"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, data, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    (line,) = lines_of(str(path))
    assert message in line and str(path) in line


def test_lines_are_those_of_keys_and_items():
    value, lines = strict_yaml.parse("a:\n  b: [1,\n   {c: 2}]\n\nd: 3\n", "f")
    assert value == {"a": {"b": [1, {"c": 2}]}, "d": 3}
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("a", "b", 1, "c"): 3, ("d",): 5}


keys = st.text(min_size=1, max_size=8).filter(lambda s: s != "<<")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(
        ["no", "1e-4", "0o17", "0x1", ".inf", "null", "~", "", "- a", "a: b", "#", "<<", "1:30", "\x85", "é\n"]
    )
)
values = st.recursive(scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(keys, s, max_size=3), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_yaml_that_is_written_reads_back_equal(value):
    found = strict_yaml.parse(strict_yaml.dump(value), "f")[0]
    assert repr(found) == repr(value)  # tells 1 from 1.0 from True, and 0.0 from -0.0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    for read in (lambda: strict_yaml.parse(text, "f"), lambda: strict_yaml.scalar(text)):
        with contextlib.suppress(UsageError):
            read()


# --- validation


def test_everything_wrong_is_said_at_once_with_lines_and_nearest_names(write):
    path = write(
        "model:\n  name: pixelcnn\nmodle: 3\ndata:\n  name: digits\n  rot: x\ntrain:\n  stesp: 3\n  lr: -1e-3\n"
        "  betas: [0.9, 2]\n  compile: yes\n  batch_size: 64\n  accumulate: 3\n  phases:\n    critic: {lrr: 3}\n"
        "  ema: 1.0\n  patience: 3\n  schedule: cosin\n  steps: 2.5\nseed: -1\nbatch_size: 8\n"
    )
    found = lines_of(
        path, ["train.stpes=3", "train.clip=0", "steps=3", "train.keep", "foo.bar=1"], {"train.warmup": -2}
    )
    expected = [
        "override 'train.keep': should be KEY=VALUE, such as train.steps=100",
        f"{path} line 3: unknown key 'modle' (did you mean 'model'?)",
        f"{path} line 6: unknown key 'data.rot' (did you mean 'root'?)",
        f"{path} line 8: unknown key 'train.stesp' (did you mean 'steps'?)",
        f"{path} line 9: 'train.lr' should be greater than 0, not -0.001",
        f"{path} line 10: 'train.betas.1' should be less than 1, not 2",
        f"{path} line 11: 'train.compile' should be a valid boolean, not \"yes\"",
        f"{path} line 13: 'train.accumulate' should divide train.batch_size, 64, not 3",
        f"{path} line 15: unknown key 'train.phases.critic.lrr' (did you mean 'lr'?)",
        f"{path} line 16: 'train.ema' should be less than 1, not 1.0",
        f"{path} line 17: 'train.patience' counts evaluations: train.evaluate_every should be set, not 3",
        f"{path} line 18: 'train.schedule' should be 'constant', 'linear', 'cosine' or 'exponential', not \"cosin\"",
        f"{path} line 19: 'train.steps' should be a valid integer, not 2.5",
        f"{path} line 20: 'seed' should be greater than or equal to 0, not -1",
        f"{path} line 21: unknown key 'batch_size' (did you mean 'train.batch_size'?)",
        "option --warmup -2: 'train.warmup' should be greater than or equal to 0, not -2",
        "override 'train.stpes=3': unknown key 'train.stpes' (did you mean 'steps'?)",
        "override 'train.clip=0': 'train.clip' should be greater than 0, not 0",
        "override 'steps=3': unknown key 'steps' (did you mean 'train.steps'?)",
        "override 'foo.bar=1': unknown key 'foo'",
    ]
    assert found == expected


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.steps=true",
        "train.steps='5'",
        "train.steps=1.5",
        "train.batch_size=0",
        "train.batch_size=[1]",
        "train.lr=0",
        "train.lr=fast",
        "train.lr=true",
        "train.lr=null",
        "train.betas=[0.9]",
        "train.betas=0.9",
        "train.betas=[0.9, 1]",
        "train.momentum=1",
        "train.weight_decay=-1",
        "train.decay=0",
        "train.decay=1.1",
        "train.warmup=-1",
        "train.clip=0",
        "train.ema=-0.1",
        "train.ema=1",
        "train.precision=float16",
        "train.compile=1",
        "train.compile=yes",
        "train.keep=-1",
        "train.samples=0",
        "train.evaluate_every=0",
        "train.phases=[1]",
        "train.phases.critic=3",
        "train.phases.critic.lr=-1",
        "train.accumulate=3",
        "train.patience=2",
        "train.steps.x=2",
        "seed=1.5",
        "seed=-1",
        "device=tpu",
        "threads=0",
        "data=3",
        "data.name=",
        "data.name=3",
        "data.on_bad=maybe",
        "model=vae",
        "model.name=null",
        "train=7",
        "train.lr=1e999",
        "train.lr=[1",
        "train.betas=*x",
        "=3",
        ".=3",
        "train.=3",
        "train.lr",
    ],
)
def test_one_bad_value_is_one_line_that_names_it(write, override):
    (line,) = lines_of(write(GOOD), [override])
    assert line.startswith(f"override {override!r}: ")


def test_missing_keys(write):
    path = write("train: {steps: 3}\ndata: {}\n")
    assert lines_of(path) == [f"{path}: the key 'model' is missing", f"{path} line 2: the key 'data.name' is missing"]


def test_values_arrive(write):
    r = load(write(GOOD + "  lr: 1e-4\n  betas: [0, 0.9]\n"))
    assert r.model == ModelPart(name="pixelcnn", channels=16) and r.model.config == {"channels": 16}
    assert (r.train.steps, r.train.lr, r.train.betas, r.seed) == (100, 1e-4, (0.0, 0.9), 0)
    assert r.train.evaluate_every is None and r.device == "auto" and r.data.on_bad == "fail"


# --- overrides


def test_overrides_win_over_options_over_the_file(write):
    path = write(GOOD)
    options = {"train.steps": 7, "train.lr": 0.5, "data.root": None}
    r = load(path, ["train.steps=8", "train.ema=0.9", "train.ema=0.99"], options)
    assert (r.train.steps, r.train.lr, r.train.ema, r.data.root) == (8, 0.5, 0.99, None)
    assert load(path, ["seed=1", "train.steps=8"]) == load(path, ["train.steps=8", "seed=1"])


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("train.betas=[0, 0.9]", lambda r: r.train.betas, (0.0, 0.9)),
        ("train.phases.critic.lr=4e-4", lambda r: r.train.phases["critic"].lr, 4e-4),
        ("train.phases={critic: {optimizer: sgd}}", lambda r: r.train.phases, {"critic": PhasePart(optimizer="sgd")}),
        ("train.steps=1e5", lambda r: r.train.steps, 100_000),
        ("train.clip=null", lambda r: r.train.clip, None),
        ("train.clip=", lambda r: r.train.clip, None),
        ("model.a.b=no", lambda r: r.model.config["a"], {"b": "no"}),
        ("data.root=/a b: c #d=e", lambda r: r.data.root, "/a b: c #d=e"),
        ("data.name='1e-4'", lambda r: r.data.name, "1e-4"),
        ("train={}", lambda r: r.train, TrainPart()),
    ],
)
def test_override_values(write, override, get, value):
    assert get(load(write(GOOD), [override])) == value


def test_an_override_takes_the_place_of_the_line_in_messages(write):
    path = write(GOOD + "  betas: [2, 3]\n")
    assert lines_of(path, ["train.betas=[0.5, 4]"]) == [
        "override 'train.betas=[0.5, 4]': 'train.betas.1' should be less than 1, not 4"
    ]


def test_an_override_that_is_not_text(write):
    (line,) = lines_of(write(GOOD), ["data.root=/\udcff"])
    assert "not UTF-8" in line


# --- there and back

fractions = st.floats(0, 1, exclude_max=True)
positives = st.floats(0, exclude_min=True, allow_infinity=False)
optional = st.none()
phases = st.builds(
    PhasePart, lr=optional | positives, betas=optional | st.tuples(fractions, fractions), clip=optional | positives
)
trains = st.builds(
    TrainPart,
    steps=st.integers(1, 10**9),
    batch_size=st.integers(1, 100).map(lambda n: 6 * n),
    accumulate=st.sampled_from([1, 2, 3, 6]),
    optimizer=st.sampled_from(["sgd", "adam", "adamw", "adamax", "rmsprop"]),
    lr=positives,
    betas=st.tuples(fractions, fractions),
    decay=st.floats(0, 1, exclude_min=True),
    clip=optional | positives,
    ema=optional | fractions,
    compile=st.booleans(),
    evaluate_every=st.integers(1, 100),
    patience=optional | st.integers(1, 100),
    phases=st.dictionaries(keys, phases, max_size=2),
)
configs = st.dictionaries(keys.filter(lambda k: k != "name"), values, max_size=3)
models = st.builds(
    lambda name, config: ModelPart.model_validate({**config, "name": name}), st.text(min_size=1), configs
)
whole = st.builds(
    Recipe,
    model=models,
    data=st.builds(DataPart, name=st.text(min_size=1), root=optional | st.text()),
    train=trains,
    seed=st.integers(0, 2**63 - 1),
    threads=optional | st.integers(1, 64),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole)
def test_a_dumped_recipe_loads_equal(tmp_path, recipe):
    path = tmp_path / "r.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    again = load(str(path))
    assert again == recipe and dump(again) == dump(recipe) and digest(again) == digest(recipe)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_dump_holds_every_key_in_order_and_other_readers_understand_it(write):
    recipe = load(write(GOOD), ["data.name=no", "train.phases.critic.lr=0.5"])
    plain = yaml.safe_load(dump(recipe))
    assert list(plain) == ["model", "data", "train", "seed", "device", "threads"]
    assert list(plain["train"]) == list(TrainPart.model_fields)
    assert plain["data"]["name"] == "no" and plain["train"]["phases"]["critic"]["lr"] == 0.5


def test_a_recipe_cannot_be_changed(write):
    recipe = load(write(GOOD))
    for part, key in ((recipe, "seed"), (recipe.train, "lr"), (recipe.model, "name"), (recipe.model, "channels")):
        with pytest.raises(Exception, match="frozen"):
            setattr(part, key, 1)


def test_phase_settings_are_filled_up_from_train(write):
    train = load(write(GOOD), ["train.phases.critic={lr: 4e-4, betas: [0, 0.9]}", "train.clip=2"]).train
    assert train.phase("critic") == PhasePart(
        optimizer="adam", lr=4e-4, betas=(0.0, 0.9), momentum=0.0, weight_decay=0.0, schedule="constant", clip=2.0
    )
    assert train.phase("generator").lr == 1e-3


def test_digest_tells_what_steers_training_from_what_does_not(write):
    path = write(GOOD)
    same = ["train.keep=5", "train.evaluate_every=3", "train.samples=4", "device=cpu", "threads=1", "data.root=/x"]
    same += ["train.checkpoint_every=2", "train.sample_every=2", "train.steps=200"]
    assert digest(load(path, same)) == digest(load(path))
    other = ["train.lr=2e-3", "train.batch_size=16", "seed=1", "model.channels=8", "data.name=x", "train.ema=0.9"]
    other += ["train.phases.a.lr=1", "data.on_bad=skip", "train.schedule=linear", "train.accumulate=2"]
    digests = {digest(load(path, [o])) for o in other}
    assert len(digests | {digest(load(path))}) == len(other) + 1
    for schedule in ("train.schedule=cosine", "train.phases.a.schedule=linear"):
        assert digest(load(path, [schedule, "train.steps=200"])) != digest(load(path, [schedule]))


# --- finding


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    root = tmp_path / "recipes"
    for name in ("pixelcnn/default", "pixelcnn/paper", "vae/default"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.yaml").write_text(f"# gencli train {name}\n#\n# 1.23 bits/dim in 2 minutes\n{GOOD[24:]}")
    monkeypatch.setattr(recipes, "recipe_root", lambda: root)
    monkeypatch.chdir(tmp_path)
    return root


def test_names_of_shipped_recipes(shipped):
    assert load("pixelcnn") == load("pixelcnn/default") == load(str(shipped / "pixelcnn/default.yaml"))
    assert load("pixelcnn/paper").model.name == "pixelcnn"
    listed = recipes.list_recipes()
    assert [r.name for r in listed] == ["pixelcnn", "pixelcnn/paper", "vae"]
    assert listed[0][2:] == ("pixelcnn", "digits", 100, "1.23 bits/dim in 2 minutes")
    (line,) = lines_of("pixelcnn/paper", ["x=1"])
    assert line == "override 'x=1': unknown key 'x'"


def test_a_run_folder_is_a_recipe(shipped, tmp_path):
    run = tmp_path / "runs" / "0001-x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump(load("vae", ["seed=5"])))
    assert load(str(run)).seed == load(f"{run}/recipe.yaml").seed == 5


def test_a_folder_of_the_name_of_a_recipe_hides_nothing(shipped, tmp_path):
    (tmp_path / "vae").mkdir()
    assert load("vae").model.name == "pixelcnn"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pixlcnn", "no recipe 'pixlcnn' (did you mean 'pixelcnn'?)"),
        ("pixelcnn/papr", "no recipe 'pixelcnn/papr' (did you mean 'pixelcnn/paper'?)"),
        ("mine.yaml", "no such recipe file: 'mine.yaml'"),
        ("", "no recipe ''"),
        ("../recipes/vae", "no recipe '../recipes/vae'"),
    ],
)
def test_unknown_recipes(shipped, spec, message):
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert str(caught.value).startswith(message) and caught.value.hint == "gencli recipes ls"


def test_a_map_of_word_vectors_has_no_recipe(shipped):
    with pytest.raises(UsageError, match="procrustes maps word vectors") as caught:
        load("procrustes")
    assert caught.value.hint == "gencli translate-embeddings SRC TGT --dictionary TRAIN --map procrustes"


def test_a_broken_recipe_is_listed_as_such(shipped):
    (shipped / "vae/default.yaml").write_text("a: &x 1")
    (shipped / "vae/list.yaml").write_text("[1]")
    (shipped / "vae/odd.yaml").write_text("data: 3\ntrain: [1]")
    broken, no_mapping, odd = recipes.list_recipes()[2:]
    assert broken.headline.startswith("broken: default.yaml line 1") and no_mapping.headline.startswith("broken")
    assert (odd.data, odd.steps) == ("", None)


@pytest.mark.parametrize("name", [r.name for r in recipes.list_recipes()])
def test_shipped_recipes_are_valid_and_open_with_their_command(name):
    load(name, model=True)
    path, _ = recipes.find(name)
    assert path.read_text("utf-8").startswith(f"# gencli train {name}")


# --- the model's own keys


def test_keys_of_the_model_are_checked_with_their_lines(write):
    path = write("model:\n  name: vae\n  latnets: 3\n  hidden: [1, a]\ndata: {name: digits}\ntrain: {stpes: 3}\n")
    expected = [
        f"{path} line 3: unknown key 'model.latnets' (did you mean 'latents'?)",
        f"{path} line 4: 'model.hidden.1' should be a valid integer, not \"a\"",
    ]
    override = "override 'model.latents=0': 'model.latents' should be greater than or equal to 1, not 0"
    found = lines_of(path, ["model.latents=0"], model=True)
    assert found == [f"{path} line 6: unknown key 'train.stpes' (did you mean 'steps'?)", *expected, override]
    with pytest.raises(UsageError) as caught:
        check_model(load(path, ["train={}"]))
    assert str(caught.value).splitlines() == expected
    config = check_model(load(path, ["train={}", "model={name: vae, latents: 3, hidden: [8, 9]}"]))
    assert (config.latents, config.hidden) == (3, (8, 9))


def test_an_unknown_model_is_named(write):
    path = write(GOOD.replace("pixelcnn", "pixelcn"))
    assert lines_of(path, model=True) == [f"{path} line 3: no model 'pixelcn' (did you mean 'pixelcnn'?)"]
    from gencli.models import model_class

    with pytest.raises(UsageError, match=r"no model 'va' .did you mean 'vae'") as caught:
        model_class("va")
    assert caught.value.hint == "gencli models"


def test_recipes_need_no_torch(write):
    code = f"import sys; from gencli.recipe import *; digest(load({write(GOOD)!r})); list_recipes()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_infinity_never_enters():
    with pytest.raises(ValueError):
        TrainPart(lr=math.inf)
    assert Path(recipes.recipe_root()).name in ("recipes", "_recipes")
