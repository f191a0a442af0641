"""The command line from end to end: what a person types, what comes out, and what is said when something is wrong."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import gencli as package
from gencli import checkpoint, cli, console, data, pictures, recipe, streams
from gencli.commands.compare import verdict
from gencli.latents import bilinear, lerp, slerp, walk
from gencli.rng import SampleRng
from gencli.run import read_record
from gencli.sampling import draw, scope
from gencli.training.trainer import Trainer
from tests.tiny import words

STEPS = 4
RUNS = {"pixelcnn": "runs/0001-pixelcnn-digits", "vae": "runs/0002-vae-digits", "wgan-gp": "runs/0003-wgan-gp-moons"}


class Result:
    """What one command gave: exit code, stdout as bytes and text, stderr."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.bytes, self.err = code, out, err.decode()

    @property
    def out(self) -> str:
        return self.bytes.decode()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def row(self) -> dict[str, Any]:
        (row,) = self.rows
        return row


Call = Callable[..., Result]


def invoke(*argv: object) -> int:
    before = sys.argv
    try:
        return console.run(cli.app, [str(word) for word in argv])
    finally:
        sys.argv = before


@pytest.fixture
def gencli(capfdbinary: Any, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command line as ``main`` does, with ``stdin`` as its standard input."""

    def call(*argv: object, stdin: bytes | None = None) -> Result:
        with monkeypatch.context() as patch:
            if stdin is not None:
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            capfdbinary.readouterr()
            code = invoke(*argv)
        return Result(code, *capfdbinary.readouterr())

    return call


def refused(result: Result, code: int, *said: str) -> None:
    """``result`` is this exit code and one line that says all of ``said``, perhaps with a hint below it."""
    assert result.code == code, (result.code, result.err)
    assert result.bytes == b""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert all(line.startswith("  ") for line in lines[at + 1 :]) and len(lines) - at <= 2, result.err
    for word in said:
        assert word in lines[at], (word, result.err)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one small trained run of each model. Tests that change something make a copy."""
    place = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("GENCLI_QUIET", "1")
        for name in RUNS:
            more = ["train.ema=0.5", "--data", "points/moons"] if name == "wgan-gp" else ["train.ema=0.5"]
            assert invoke("train", name, *words(name), "--steps", STEPS, *more) == 0
    return place


@pytest.fixture
def at_shop(shop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in the shop; the path of a folder for what a test writes."""
    monkeypatch.chdir(shop)
    monkeypatch.setenv("GENCLI_QUIET", "1")
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENCLI_QUIET", "1")
    return tmp_path


def pixels(path: Path | io.BytesIO) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def members(stream: Result) -> dict[str, bytes]:
    """The files in a tar stream on stdout, by name."""
    with tarfile.open(fileobj=io.BytesIO(stream.bytes)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def digits(split: str, n: int) -> torch.Tensor:
    return data.load("digits", split).rows(torch.arange(n))["x"]


# ---------------------------------------------------------------------------------------------- train


def test_train_prints_the_folder_alone(here: Path, gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENCLI_QUIET")
    made = gencli("train", "vae", *words("vae"), "--steps", 2)
    assert (made.code, made.out) == (0, "runs/0001-vae-digits\n")
    assert "bits per dim" in made.err and "independent pixels" in made.err and "next: gencli sample" in made.err
    folder = Path(made.out.strip())
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "checkpoints", "log.txt", "metrics.jsonl", "recipe.yaml", "run.json", "samples"
    ]  # fmt: skip
    record = read_record(folder)
    assert (record["state"], record["step"], record["model"]) == ("done", 2, "vae")
    assert record["data"]["digests"]["train"] == data.load("digits", "train").digest
    assert pixels(folder / "samples/step-000002.png").dtype == np.uint8
    assert recipe.load(str(folder)).train.steps == 2
    assert gencli("train", "vae", *words("vae"), "--steps", 1, "-o", "elsewhere/x").out == "elsewhere/x\n"


def test_a_run_s_recipe_runs_again_to_the_same_bytes(at_shop: Path, gencli: Call) -> None:
    again = at_shop / "again"
    assert gencli("train", RUNS["vae"], "--out", again).code == 0
    name = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    assert (again / name).read_bytes() == (Path(RUNS["vae"]) / name).read_bytes()


def test_dry_run_prints_a_recipe_and_writes_nothing(here: Path, gencli: Call) -> None:
    chosen = ["model.decoder=discretised-logistic", "--lr", "0.05", "train.ema=0.25"]
    dry = gencli("train", "vae", *words("vae"), *chosen, "--dry-run")
    Path("dry.yaml").write_text(dry.out)
    resolved = recipe.load("dry.yaml")
    assert dry.code == 0 and (resolved.train.lr, resolved.train.ema) == (0.05, 0.25)
    (total,) = re.findall(r"([\d,]+)  parameters in all", dry.err)
    encoder, decoder = 64 * 16 + 16 + 16 * 4 + 4, 2 * 16 + 16 + 16 * 64 * 2 + 64 * 2
    assert int(total.replace(",", "")) == encoder + decoder
    assert "s of training steps on cpu" in dry.err and "GB" in dry.err
    assert [p.name for p in here.iterdir()] == ["dry.yaml"]


def test_resume_goes_on_to_the_end_of_a_longer_recipe(at_shop: Path, gencli: Call) -> None:
    made = [*words("wgan-gp"), "--data", "points/moons", "train.schedule=constant"]
    scheduled = ["--steps", 2, "train.schedule=linear"]
    assert gencli("train", "wgan-gp", *made, "--steps", 5, "--out", at_shop / "whole").code == 0
    assert gencli("train", "wgan-gp", *made, "--steps", 2, "--out", at_shop / "parts").code == 0
    refused(gencli("train", "--resume", at_shop / "parts", "--lr", "0.5"), 2, "would change what")
    refused(gencli("train", "--resume", at_shop / "parts", "train.batch_size=4"), 2, "would change what")
    refused(gencli("train", "--resume", at_shop / "parts", "vae"), 2, "--resume takes a run")
    refused(gencli("train", "--resume", at_shop / "parts", "--steps", 1), 2, "has done 2 steps")
    on = gencli("train", "--resume", at_shop / "parts", "--steps", 5)
    assert (on.code, on.out) == (0, f"{at_shop / 'parts'}\n")
    for file in ("model.safetensors", "training.safetensors"):
        a, b = ((at_shop / part / "checkpoints/step-000005" / file).read_bytes() for part in ("whole", "parts"))
        tensors = [x[8 + int.from_bytes(x[:8], "little") :] for x in (a, b)]
        assert tensors[0] == tensors[1] and tensors[0], file
    record = read_record(at_shop / "parts")
    assert (record["state"], record["step"], record["steps"]) == ("done", 5, 5)
    assert recipe.load(str(at_shop / "parts")).train.steps == 5  # what a second --resume goes on to
    assert gencli("train", "wgan-gp", *words("wgan-gp"), *scheduled, "--out", at_shop / "scheduled").code == 0
    refused(gencli("train", "--resume", at_shop / "scheduled", "--steps", 5), 2, "would change what")


def test_init_from_begins_with_other_weights(at_shop: Path, gencli: Call) -> None:
    source, common = RUNS["vae"], [*words("vae"), "--steps", 1, "train.lr=1e-30", "train.schedule=constant"]
    assert gencli("train", "vae", *common, "--init-from", source, "-o", at_shop / "run").code == 0
    given, got = package.load(source), package.load(at_shop / "run")
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, given.state_dict()[name]), name
    for wrong in (["vae", *words("vae"), "model.latents=3"], ["pixelcnn", *words("pixelcnn")]):
        result = gencli("train", *wrong, "--steps", 1, "--init-from", source, "-o", at_shop / "no")
        refused(result, 2, source, "do not fit")
    refused(gencli("train", "vae", "--init-from", "nowhere", "-o", at_shop / "no"), 3, "'nowhere'")
    assert not (at_shop / "no").exists()


def test_models_from_python(at_shop: Path) -> None:
    model = package.load(RUNS["vae"])
    assert model.config.latents == 2 and model.spec.shape == (1, 8, 8) and not model.training
    raw = package.load(RUNS["vae"], weights="raw")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), raw.parameters()))
    with scope(SampleRng(0, range(3), "sample")) as rng:
        x = model.sample(rng)
    assert x.shape == (3, 1, 8, 8)


# ---------------------------------------------------------------------------------------------- sample


def test_samples_are_the_same_in_every_form_and_number(at_shop: Path, gencli: Call) -> None:
    for run in (RUNS["pixelcnn"], RUNS["wgan-gp"]):
        loaded = checkpoint.load(run)
        expected = next(draw(loaded.model, 5, seed=3)).x
        forms = [at_shop / f"s.{ending}" for ending in ("npz", "safetensors", "tar")] + [at_shop / "s"]
        for form in forms:
            made = gencli("sample", run, "-n", 5, "--seed", 3, "-o", form)
            assert (made.code, made.out) == (0, "") and f"5 samples in {form}" in made.err
            reading = streams.read(str(form))
            x = np.concatenate([chunk.x for chunk in reading])
            assert x.tobytes() == expected.tobytes() and x.dtype == expected.dtype, form
            assert reading.meta == {"model": loaded.meta["model"], "step": STEPS, "seed": 3, "weights": "ema"}
        assert np.array_equal(np.load(at_shop / "s.npz", allow_pickle=False)["x"], expected)
        assert np.array_equal(load_file(at_shop / "s.safetensors")["x"], expected)
        stream = gencli("sample", run, "-n", 5, "--seed", 3, "-o", "-")
        assert stream.bytes == (at_shop / "s.tar").read_bytes()
        one = gencli("sample", run, "-n", 1, "--seed", 3, "-o", "-")
        first, second = members(one), members(stream)
        assert list(first.items()) == list(second.items())[:2] and len(second) == 10
        assert gencli("sample", run, "-n", 5, "-o", "-").bytes != stream.bytes
        shutil.rmtree(at_shop / "s")


def test_a_picture_of_samples_shows_them(at_shop: Path, gencli: Call) -> None:
    assert gencli("sample", 1, "-n", 4, "-o", at_shop / "deep/grid.png").code == 0
    x = next(draw(package.load(RUNS["pixelcnn"]), 4)).x
    assert np.array_equal(pixels(at_shop / "deep/grid.png"), pictures.grid(x, 17))
    assert gencli("sample", "-n", 50, "-o", at_shop / "points.png").code == 0  # the latest run is of points
    assert pixels(at_shop / "points.png").shape[2] == 3
    assert gencli("sample", 2, "-n", 3, "-o", at_shop / "s.gif").code == 0
    with Image.open(at_shop / "s.gif") as film:
        assert film.n_frames == 3


def test_options_of_a_sampler(at_shop: Path, gencli: Call) -> None:
    model = package.load(RUNS["vae"])
    for given, options in (["temperature=0.5"], {"temperature": 0.5}), (["mean=true"], {"mean": True}):
        assert gencli("sample", RUNS["vae"], *given, "-n", 2, "-o", at_shop / "x.npz").code == 0
        expected = next(draw(model, 2, options=options)).x
        assert np.array_equal(np.load(at_shop / "x.npz", allow_pickle=False)["x"], expected)
    for word, code, said in [
        ("temprature=1", 2, "unknown sampling option 'temprature' (did you mean 'temperature'?)"),
        ("temperature=hot", 2, "'temperature'"),
        ("temperature=[1]", 2, "'temperature'"),
        ("mean=2", 2, "'mean'"),
        ("temperature", 2, "'temperature' is no KEY=VALUE"),
    ]:
        refused(gencli("sample", RUNS["vae"], word, "-o", at_shop / "no.png"), code, said)
    refused(
        gencli("sample", "temperature=1", "-o", at_shop / "no.png"), 2, "unknown sampling option", "it has truncation"
    )
    refused(gencli("sample", 1, "temperature=0", "-o", at_shop / "no.png"), 2, "temperature must be positive")
    assert not (at_shop / "no.png").exists()


def test_samples_of_classes(here: Path, gencli: Call) -> None:
    assert gencli("train", "pixelcnn", *words("pixelcnn"), "model.conditional=true", "--steps", 1).code == 0
    made = gencli("sample", "-n", 5, "--labels", "7,2", "-o", "x.npz")
    assert made.code == 0 and np.load("x.npz", allow_pickle=False)["label"].tolist() == [7, 2, 7, 2, 7]
    assert gencli("sample", "-n", 12, "-o", "y.npz").code == 0
    assert np.load("y.npz", allow_pickle=False)["label"].tolist() == [*range(10), 0, 1]
    drawn = members(gencli("sample", "-n", 1, "--labels", "4", "-o", "-"))
    assert json.loads(drawn["00000000.json"])["label"] == 4
    for wrong in ("10", "cat", "-1", "²", "1,,2", ""):
        refused(gencli("sample", f"--labels={wrong}", "-o", "z.npz"), 2, "unknown class")
    row = gencli("eval", "nll", "-n", 4).row
    model, test = package.load("runs/0001-pixelcnn-digits"), data.load("digits", "test").rows(torch.arange(4))
    with scope(SampleRng(0, range(4), "eval-test")) as rng:
        nats = -model.log_prob(test["x"], rng, labels=test["label"]).double().mean().item()
    assert row["nats"] == pytest.approx(nats, rel=1e-9)


# ---------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize(("name", "kind"), [("pixelcnn", "exact"), ("vae", "upper bound")])
def test_eval_nll_is_the_mean_of_minus_log_prob(name: str, kind: str, at_shop: Path, gencli: Call) -> None:
    row = gencli("eval", "nll", RUNS[name], "-n", 30).row
    model, x = package.load(RUNS[name]), digits("test", 30)
    with scope(SampleRng(0, range(30), "eval-test")) as rng:
        # of a VAE the tighter bound, by 100 draws
        nats = -(model.iwae(x, rng, 100) if name == "vae" else model.log_prob(x, rng)).double()
    assert row.get("k") == (100 if name == "vae" else None)
    assert row["nats"] == pytest.approx(nats.mean().item(), rel=1e-9)
    assert row["nats_stderr"] == pytest.approx(nats.std().item() / math.sqrt(30), rel=1e-9)
    assert row["nats_per_dim"] == pytest.approx(row["nats"] / 64) and row["kind"] == kind
    assert row["bits_per_dim"] == pytest.approx(row["nats"] / (64 * math.log(2)))
    assert row["ratio"] == pytest.approx(row["bits_per_dim"] / row["independent_pixels"])
    said = {key: row[key] for key in ("metric", "data", "examples", "model", "step", "weights", "seed")}
    expected = {"metric": "nll", "data": "digits@test", "examples": 30, "model": name, "step": STEPS}
    assert said == expected | {"weights": "ema", "seed": 0}


def test_eval_takes_split_weights_and_seed(at_shop: Path, gencli: Call) -> None:
    def nats(*more: object, run: object = RUNS["vae"]) -> float:
        return gencli("evaluate", "nll", run, "-n", 20, *more).row["nats"]

    values = [nats(), nats("--split", "val"), nats("--weights", "raw"), nats("--seed", 1)]
    assert len(set(values)) == 4 and nats() == values[0]
    best = checkpoint.load(RUNS["vae"])
    assert nats(run=best.path) == nats(run=best.path.parent) == nats(run="2") == values[0]


def test_the_baseline_is_a_histogram_a_pixel(at_shop: Path, gencli: Call) -> None:
    train, test = digits("train", 1258).flatten(1).numpy(), digits("test", 359).flatten(1).numpy()
    counts = np.stack([(train == k).sum(0) + 1 for k in range(17)])  # (levels, pixels)
    p = counts / counts.sum(0)
    bits = -np.log2(np.take_along_axis(p, test.astype(int), 0)).mean()
    row = gencli("eval", "nll", RUNS["vae"]).row
    assert row["independent_pixels"] == pytest.approx(bits, rel=1e-12) and row["examples"] == 359


def test_eval_modes_counts_samples_near_the_centres(at_shop: Path, gencli: Call) -> None:
    row = gencli("eval", "modes", RUNS["wgan-gp"], "--data", "points/25-gaussians", "-n", 5000).row
    x = np.concatenate([c.x for c in draw(package.load(RUNS["wgan-gp"]), 5000)])
    side = np.arange(-2, 3) * 2 / 2.828
    centres = np.array([(a, b) for a in side for b in side])
    near = np.linalg.norm(x[:, None] - centres, axis=2) <= 3 * 0.05 / 2.828
    assert row["near_share"] == pytest.approx(near.any(1).mean()) and row["covered"] == (near.sum(0) >= 40).sum()
    assert (row["of"], row["samples"], row["data"]) == (25, 5000, "points/25-gaussians")
    few = gencli("eval", "modes", RUNS["wgan-gp"], "--data", "points/25-gaussians", "-n", 500)
    refused(few, 2, "500 samples are too few")
    refused(gencli("eval", "modes", RUNS["vae"], "--data", "points/25-gaussians"), 2, "draws no points")


# ---------------------------------------------------------------------------------------------- interpolate


def test_paths_through_latents_have_their_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    z0, z1 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    assert torch.equal(lerp(z0, z1, t)[[0, -1]], torch.stack([z0, z1]))
    torch.testing.assert_close(lerp(z0, z1, t)[3], (z0 + z1) / 2)
    u0, u1 = z0 / z0.norm(), z1 / z1.norm()
    arc = slerp(u0, u1, t)
    omega = math.acos(float(u0 @ u1))
    torch.testing.assert_close(arc.norm(dim=1), torch.ones(7, dtype=torch.float64))
    angles = [math.acos(min(1.0, float(u0 @ a))) for a in arc]  # even steps along the great circle
    assert angles == pytest.approx([omega * i / 6 for i in range(7)], abs=1e-6)
    e1, e2 = torch.eye(2, dtype=torch.float64)
    half = slerp(e1, e2, t[[0, 3, 6]])
    torch.testing.assert_close(half, torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0, 1]], dtype=torch.float64))
    torch.testing.assert_close(slerp(2 * e1, 4 * e2, t).norm(dim=1), 2 + 2 * t[:, 0])  # the length changes evenly
    for a, b in ((z0, z0), (z0, -z0), (0 * z0, z1)):  # no arc: the straight line
        torch.testing.assert_close(slerp(a, b, t), lerp(a, b, t))
    corners = torch.randn(4, 3, generator=g)
    square = bilinear(None, *corners, 5, "lerp").view(5, 5, 3)
    assert torch.equal(square[[0, 0, -1, -1], [0, -1, 0, -1]], corners)
    torch.testing.assert_close(square[2, 2], corners.mean(0))
    quarter_down = 0.75 * (corners[0] + corners[1]) / 2 + 0.25 * (corners[2] + corners[3]) / 2
    torch.testing.assert_close(square[1, 2], quarter_down)
    assert len(walk(None, z0, z1, 2, "slerp")) == 2


def test_strips_run_from_one_end_to_the_other(at_shop: Path, gencli: Call) -> None:
    model = package.load(RUNS["vae"])
    with scope(SampleRng(0, range(4), "interpolate")) as rng:
        ends = model.spec.unscale(model.decode(model.prior(rng))).numpy()
    for path in ("slerp", "lerp"):
        given = ["--path", path, "--pairs", 2, "--steps", 5, "-o"]
        assert gencli("interpolate", RUNS["vae"], *given, at_shop / "x.npz").code == 0
        x = np.load(at_shop / "x.npz", allow_pickle=False)["x"].reshape(2, 5, 1, 8, 8)
        assert np.array_equal(x[:, [0, -1]].reshape(4, 1, 8, 8), ends)
        assert gencli("interpolate", RUNS["vae"], *given, at_shop / "x.png").code == 0
        assert np.array_equal(pixels(at_shop / "x.png"), pictures.grid(x.reshape(10, 1, 8, 8), 17, columns=5))
    assert gencli("interpolate", RUNS["vae"], "--steps", 6, "-o", at_shop / "x.gif").code == 0
    with Image.open(at_shop / "x.gif") as film:
        assert film.n_frames == 6 + 4  # and back again
    assert gencli("interpolate", RUNS["wgan-gp"], "--steps", 3, "--pairs", 1, "-o", at_shop / "p.npz").code == 0
    assert np.load(at_shop / "p.npz", allow_pickle=False)["x"].shape == (3, 2)


def test_a_grid_has_its_corners(at_shop: Path, gencli: Call) -> None:
    model = package.load(RUNS["vae"])
    with scope(SampleRng(5, range(4), "interpolate")) as rng:
        corners = model.spec.unscale(model.decode(model.prior(rng))).numpy()
    made = gencli("interpolate", RUNS["vae"], "--grid", "--steps", 4, "--seed", 5, "-o", at_shop / "x.npz")
    x = np.load(at_shop / "x.npz", allow_pickle=False)["x"].reshape(4, 4, 1, 8, 8)
    assert made.code == 0 and np.array_equal(x[[0, 0, -1, -1], [0, -1, 0, -1]], corners)


def test_between_two_pictures(at_shop: Path, gencli: Call) -> None:
    model, x = package.load(RUNS["vae"]), digits("test", 2)
    for i in range(2):
        pictures.save_png(at_shop / f"{i}.png", pictures.grid(x[i : i + 1].numpy(), 17, pad=0, scale=1))
    given = ["--from", at_shop / "0.png", "--to", at_shop / "1.png"]
    assert gencli("interpolate", RUNS["vae"], *given, "--steps", 3, "-o", at_shop / "x.npz").code == 0
    z = model.posterior(x)[0]
    expected = model.spec.unscale(model.decode(z)).numpy()
    made = np.load(at_shop / "x.npz", allow_pickle=False)["x"]
    assert made.shape == (3, 1, 8, 8) and np.array_equal(made[[0, -1]], expected)
    refused(gencli("interpolate", RUNS["vae"], *given, "--grid"), 2, "--grid")
    refused(gencli("interpolate", RUNS["vae"], *given[:2]), 2, "--from and --to go together")
    refused(gencli("interpolate", RUNS["vae"], *given[:3], at_shop / "x.npz"), 2, "x.npz", "hold 4 pictures")


# ---------------------------------------------------------------------------------------------- apply


def reconstructed(x: torch.Tensor) -> np.ndarray[Any, Any]:
    model = package.load(RUNS["vae"])
    return model.spec.unscale(model.decode(model.posterior(x)[0])).numpy()


def test_reconstructions_and_their_error(at_shop: Path, gencli: Call) -> None:
    x, y = digits("test", 20), reconstructed(digits("test", 20))
    row = gencli("apply", RUNS["vae"], "-n", 20, "-o", at_shop / "y.npz").row
    assert np.array_equal(np.load(at_shop / "y.npz", allow_pickle=False)["x"], y)
    error = ((y / 8.0 - x.numpy() / 8.0) ** 2).reshape(20, -1)
    assert row["squared_error"] == pytest.approx(error.sum(1).mean(), rel=1e-6) and row["examples"] == 20
    assert row["squared_error_per_dim"] == pytest.approx(error.mean(), rel=1e-6)
    assert gencli("apply", RUNS["vae"], "-n", 3, "--split", "val", "-o", at_shop / "p.png").code == 0
    both = np.concatenate([digits("val", 3).numpy(), reconstructed(digits("val", 3))])
    assert np.array_equal(pixels(at_shop / "p.png"), pictures.grid(both, 17, columns=3))


def test_apply_takes_pictures_and_streams(at_shop: Path, gencli: Call) -> None:
    x = digits("test", 3)
    Image.fromarray((x[0, 0].numpy() * 15.9375).round().astype(np.uint8)).save(at_shop / "one.png")
    assert gencli("apply", RUNS["vae"], at_shop / "one.png", "-o", at_shop / "y.npz").row["examples"] == 1
    assert np.array_equal(np.load(at_shop / "y.npz", allow_pickle=False)["x"], reconstructed(x[:1]))
    given = gencli("sample", RUNS["pixelcnn"], "-n", 3, "-o", "-").bytes
    drawn = torch.from_numpy(next(draw(package.load(RUNS["pixelcnn"]), 3)).x)
    made = gencli("apply", RUNS["vae"], "-", "-o", "-", stdin=given)
    archive = members(made)
    first = pixels(io.BytesIO(archive["00000000.png"]))
    assert made.code == 0 and len(archive) == 6
    assert np.array_equal(np.rint(first / 15.9375), reconstructed(drawn)[0, 0])
    assert json.loads(archive["00000000.json"])["task"] == "reconstruct"


def test_apply_needs_no_name_of_a_run_before_its_inputs(here: Path, gencli: Call) -> None:
    assert gencli("train", "vae", *words("vae"), "--steps", 1).code == 0
    given = gencli("sample", "-n", 3, "-o", "-").bytes
    assert gencli("apply", "-", stdin=given).row["examples"] == 3
    Path("one.tar").write_bytes(given)
    assert gencli("apply", "one.tar").row["examples"] == 3
    refused(gencli("apply", "-", stdin=b""), 3, "standard input is empty")
    refused(gencli("apply", "-", stdin=given[:1000]), 3, "standard input was cut off")
    refused(gencli("apply", "-", stdin=b"hello" * 999), 3, "standard input is no tar stream")


def test_completions_keep_what_is_given(at_shop: Path, gencli: Call) -> None:
    made = gencli("apply", RUNS["pixelcnn"], "--as", "complete", "-n", 3, "--each", 2, "-o", at_shop / "y.npz")
    assert {key: made.row[key] for key in ("task", "examples", "completions", "given")} == {
        "task": "complete", "examples": 3, "completions": 2, "given": 0.5,
    }  # fmt: skip
    x, y = digits("test", 3).numpy(), np.load(at_shop / "y.npz", allow_pickle=False)["x"].reshape(3, 2, 1, 8, 8)
    assert (y[..., :4, :] == x[:, None, :, :4]).all()
    assert (y[:, 0, :, 4:] != y[:, 1, :, 4:]).any((1, 2, 3)).all()
    # one input alone, and another share of it: the same numbers decide
    gencli("apply", RUNS["pixelcnn"], "--as", "complete", "-n", 1, "--each", 2, "-o", at_shop / "z.npz")
    assert np.array_equal(np.load(at_shop / "z.npz", allow_pickle=False)["x"], y[0])
    assert gencli("apply", RUNS["pixelcnn"], "--as", "complete", "-n", 1, "--given", 1, "-o", at_shop / "w.npz").row
    assert (np.load(at_shop / "w.npz", allow_pickle=False)["x"] == x[0]).all()
    # the upper rows of a picture; the picture of all
    half = at_shop / "half.png"
    Image.fromarray((x[0, 0, :3] * 15.9375).round().astype(np.uint8)).save(half)
    row = gencli("apply", RUNS["pixelcnn"], half, "--as", "complete", "temperature=0.5", "-o", at_shop / "p.png").row
    assert row["given"] == 0.375 and pixels(at_shop / "p.png").shape[:2] == (66 + 2, 5 * 66 + 2)
    gencli("apply", RUNS["pixelcnn"], half, "--as", "complete", "--each", 1, "-o", at_shop / "h.npz")
    whole = np.load(at_shop / "h.npz", allow_pickle=False)["x"]
    assert np.array_equal(whole[0, 0, :3], x[0, 0, :3]) and whole.shape == (1, 1, 8, 8)
    Image.new("L", (9, 8)).save(at_shop / "wide.png")
    Image.new("L", (8, 9)).save(at_shop / "tall.png")
    for name in ("wide", "tall"):
        file = at_shop / f"{name}.png"
        refused(gencli("apply", RUNS["pixelcnn"], file, "--as", "complete"), 3, f"{name}.png", "8 wide and at most 8")
    for more, said in [
        (["temprature=1"], "did you mean 'temperature'?"),
        (["temperature=0"], "positive"),
        (["--labels", "3"], "not class-conditional"),
        (["--labels", "x"], "'x' is an unknown class"),
    ]:
        refused(gencli("apply", RUNS["pixelcnn"], *more, "--as", "complete"), 2, said)
    refused(gencli("apply", RUNS["pixelcnn"], "--as", "complete", "--data", "shapes"), 2, "shapes is not what")
    refused(gencli("apply", RUNS["vae"], "--as", "complete"), 2, "vae cannot complete")
    refused(gencli("apply", RUNS["vae"], "temperature=1"), 2, "reconstruct has no option 'temperature'")


def test_a_closed_stdin(at_shop: Path, gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(gencli("apply", RUNS["vae"], "-"), 2, "standard input, but it is closed")


# ---------------------------------------------------------------------------------------------- compare


def test_verdicts_are_paired_t_tests() -> None:
    """By hand: t(0.975) is 12.7062 for 2 seeds and 4.30265 for 3."""
    assert verdict([1.0, 1.2, 1.1]).startswith("reproduced: better by 1.1")  # 1.1 > 4.30265 * 0.1 / sqrt 3
    assert verdict([-1.0, -1.2, -1.1]).startswith("not reproduced: worse by 1.1")
    # mean 1.1, standard error 0.1: the interval of two seeds reaches from -0.17 to 2.37
    assert verdict([1.0, 1.2]).startswith("inconclusive: +1.1")
    for spread, reached in ((4.2, True), (4.4, False)):  # three gains with mean spread and standard error 1
        gains = [spread - math.sqrt(3), spread, spread + math.sqrt(3)]
        assert verdict(gains).startswith("inconclusive") == reached
    assert verdict([0.0, 0.0]).startswith("inconclusive") and verdict([2.0, 2.0]).startswith("reproduced")
    assert "± 0.058" in verdict([1.0, 1.2, 1.1])


def test_compare_trains_and_judges(here: Path, gencli: Call) -> None:
    common = " ".join(words("vae"))
    texts = [f"vae {common} train.evaluate_every=2", f"vae {common} train.lr=1e-9"]
    made = gencli("compare", *texts, "--seeds", 2, "--steps", 3)
    assert made.code == 0, made.err
    for row, text in zip(made.rows, texts):
        a, b = row["values"]
        assert row["recipe"] == text and row["mean"] == pytest.approx((a + b) / 2)
        assert row["stderr"] == pytest.approx(abs(a - b) / 2) and row["metric"] == "bits_per_dim"
        assert (row["steps"], row["data"], row["kind"]) == (3, "digits@test", "upper bound")
    first, second = made.rows
    gains = [b - a for a, b in zip(first["values"], second["values"])]  # lower bits/dim are better
    assert second["verdict"] == verdict(gains) and min(gains) > 0
    runs = sorted(p for p in Path("runs").iterdir() if not p.name.startswith("."))
    assert [read_record(run)["seed"] for run in runs] == [0, 1, 0, 1]
    assert gencli("eval", "nll", 4).row["bits_per_dim"] == second["values"][1]
    assert [step for step, _ in first["curve"]] == [2, 3] and [step for step, _ in second["curve"]] == [3]
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs[:2]]
    evals = [[e["bits_per_dim"] for e in log if e["event"] == "eval"] for log in logs]  # a list a seed, an entry a step
    assert [v for _, v in first["curve"]] == [pytest.approx((a + b) / 2) for a, b in zip(*evals)]


def test_compare_of_a_bound_and_a_density_is_in_nats(here: Path, gencli: Call) -> None:
    texts = [f"nice {' '.join(words('nice'))} model.dequantization={how}" for how in ("uniform", "none")]
    made = gencli("compare", *texts, "--seeds", 2, "--steps", 2)
    assert made.code == 0, made.err
    first, second = made.rows
    assert (first["metric"], first["kind"]) == ("nats", "upper bound")
    assert (second["metric"], second["kind"]) == ("nats", "density")
    assert second["verdict"].startswith("not comparable: upper bound against density")
    for run, value in zip((1, 2), first["values"]):
        told = gencli("eval", "nll", run).row
        assert value == pytest.approx(told["nats"]) and told["bits_per_dim"] == pytest.approx(value / 64 / math.log(2))
    runs = sorted(p for p in Path("runs").iterdir() if not p.name.startswith("."))[:2]
    logs = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    at_end = sum(log["bits_per_dim"] for log in logs) / 2
    assert dict(first["curve"])[2] == pytest.approx(at_end * 64 * math.log(2))


def test_compare_refuses_what_has_no_answer(here: Path, gencli: Call) -> None:
    refused(gencli("compare", "vae"), 2, "two recipes or more")
    refused(gencli("compare", "vae", "vea"), 2, "'vea'", "did you mean 'vae'?")
    refused(gencli("compare", "vae", "vae 'model.latents=2"), 2, "no recipe with overrides")
    refused(gencli("compare", "vae", "vae", "--metric", "nlll"), 2, "'nlll'", "did you mean 'nll'?")
    refused(gencli("compare", "vae", "vae model.latnets=2"), 2, "model.latnets", "did you mean 'latents'?")
    both = [f"{name} {' '.join(words(name.partition('/')[0]))}" for name in ("vae", "wgan-gp/points")]
    refused(gencli("compare", *both), 2, "digits and points/25-gaussians", "--data")
    points = [*both, "--data", "points/25-gaussians"]
    refused(gencli("compare", *points), 2, "no common metric")
    refused(gencli("compare", *points, "--metric", "nll"), 2, "wgan-gp has no likelihood")
    refused(gencli("compare", both[0], both[0], "--metric", "modes"), 2, "digits is not drawn from a known density")
    refused(gencli("compare", "vae", "model.latents=2"), 2, "in its quotes", "'pixelcnn model.latents=2'")
    wrong = "wgan model.tricks.smoothing=0.1"
    refused(gencli("compare", "gan", wrong, "--metric", "fid"), 2, "no target on real data to smooth")
    assert not Path("runs").exists(), "nothing was trained first"


# ---------------------------------------------------------------------------------------------- looking


def test_lists(at_shop: Path, gencli: Call) -> None:
    assert {row["name"] for row in gencli("models").rows} >= set(RUNS)
    assert {*RUNS, "pixelcnn/mnist-binary"} <= {row["recipe"] for row in gencli("recipes", "ls").rows}
    assert [row["name"] for row in gencli("data", "ls").rows] == list(data.SETS)
    found = gencli("runs").rows
    assert [row["run"] for row in found] == list(RUNS.values()) and {row["state"] for row in found} == {"done"}
    assert [row["step"] for row in found] == [STEPS] * 3 and found[1]["best"]["metric"] == "bits_per_dim"
    about = gencli("info", 2).row
    assert about["state"] == "done" and about["parameters"] == sum(
        p.numel() for p in package.load(RUNS["vae"]).parameters()
    )
    kept = gencli("info", checkpoint.load(RUNS["vae"]).path.parent).row
    held = sum(t.numel() for t in package.load(RUNS["vae"]).state_dict().values())
    assert kept["model"] == "vae" and kept["averaged"] == 8 and kept["numbers"] == held > about["parameters"]
    assert gencli("doctor").code == 0


@pytest.mark.parametrize("name", ["digits", "shapes", "points/moons", "photos:32"])
def test_data_show_draws_what_it_names(name: str, here: Path, gencli: Call) -> None:
    row = gencli("data", "show", name, "-n", 6, "--split", "val", "-o", "d.png").row
    source = data.load(name, "val")
    assert row["data"] == f"{name}@val" and row["digest"] == source.digest and row["rows"] == source.size
    assert row["shape"] == list(source.spec.shape) and row["levels"] == source.spec.levels
    if source.spec.levels is not None:
        x = source.rows(torch.arange(6))["x"].numpy()
        assert np.array_equal(pixels(here / "d.png"), pictures.grid(x, source.spec.levels))
    else:
        assert pixels(here / "d.png").ndim == 3


# ---------------------------------------------------------------------------------------------- wrong words


def test_unknown_names_are_answered_with_the_nearest(at_shop: Path, gencli: Call) -> None:
    run = RUNS["vae"]
    Path(at_shop / "m.yaml").write_text("model: {name: vea}\ndata: {name: digits}\n")
    for argv, *said in [
        (["train", "vea"], "'vea'", "did you mean 'vae'?"),
        (["train", at_shop / "m.yaml"], "no model 'vea'", "did you mean 'vae'?"),
        (["train", "vae/papr"], "'vae/papr'"),
        (["train", "pixelcnn", "model.kernel=4"], "'model.kernel' should be odd: a kernel has a centre, not 4"),
        (["train", "vae", "model.latnets=3"], "'model.latnets'", "did you mean 'latents'?"),
        (["train", "vae", "train.stpes=3"], "'train.stpes'", "did you mean 'steps'?"),
        (["train", "vae", "--data", "digts"], "'digts'", "did you mean 'digits'?"),
        (["train", "vae", "train.optimizer=adm"], "train.optimizer", '"adm"'),
        (["train", "vae", "--device", "cup"], "'device'", '"cup"'),
        (["train", "vae", "--steps", "0"], "train.steps", "not 0"),
        (["train"], "which recipe?"),
        (["train", "vae", "latents"], "'latents'", "KEY=VALUE"),
        (["train", "vae", "train.phases={critc: {lr: 1}}"], "critc", "model"),
        (["train", "pixelcnn", "--data", "points/moons"], "points/moons"),
        (["train", "vae", "model.decoder=bernoulli"], "bernoulli"),
        (["eval", "nl", run], "unknown metric 'nl'", "did you mean 'nll'?"),
        (["eval", "nll", run, "--split", "tset"], "'tset'", "did you mean 'test'?"),
        (["eval", "nll", run, "--data", "shaeps"], "'shaeps'", "did you mean 'shapes'?"),
        (["eval", "nll", run, "--data", "shapes"], "shapes", "[1, 20, 20]"),
        (["eval", "nll", run, "--weights", "emma"], "'emma'"),
        (["eval", "nll", RUNS["wgan-gp"]], "no likelihood"),
        (["eval", "modes", run], "digits"),
        (["eval", "modes", run, "--data", "points/25-gaussians"], "draws no points"),
        (["eval", "modes", RUNS["wgan-gp"], "--data", "points/25-gausians"], "25-gausians", "did you mean"),
        (["sample", run, "--labels", "3"], "not class-conditional"),
        (["sample", run, "--device", "cupp"], "'cupp'", "did you mean 'cpu'?"),
        (["sample", run, "-o", at_shop / "x.pgn"], "x.pgn", "did you mean '.png'?"),
        (["interpolate", run, "--path", "slurp"], "'slurp'", "did you mean 'slerp'?"),
        (["interpolate", run, "--path", "model"], "no path of its own"),
        (["interpolate", RUNS["pixelcnn"]], "pixelcnn has no latents"),
        (["apply", run, "--as", "reconstrct"], "'reconstrct'", "did you mean 'reconstruct'?"),
        (["apply", RUNS["pixelcnn"]], "pixelcnn cannot reconstruct"),
        (["apply", run, "--data", "shapes"], "shapes"),
        (["data", "show", "digtis"], "'digtis'", "did you mean 'digits'?"),
        (["data", "show", "digits", "-o", "d.jpg"], "d.jpg", ".png"),
        (["data", "show", "digits:5bit"], "digits", "5bit"),
        (["data", "show", "digits", "--split", "tran"], "'tran'", "did you mean 'train'?"),
        (["recipes", "cat", "wgan-pg"], "'wgan-pg'", "did you mean 'wgan-gp'?"),
        (["models", "pixelcn"], "'pixelcn'", "did you mean 'pixelcnn'?"),
        (["info", "0002-vae-digit"], "did you mean '0002-vae-digits'?"),
    ]:
        refused(gencli(*argv), 2, *said)
    assert not any(p.suffix in (".png", ".pgn") for p in Path.cwd().iterdir())
    assert len(list(Path("runs").glob("0*"))) == 3, "no run was begun"


def test_unknown_verbs_and_options(at_shop: Path, gencli: Call) -> None:
    for argv, said in [
        (["smaple"], "No such command 'smaple'"),
        (["sample", "--labesl", "3"], "--labesl"),
        (["sample", "-n", "many"], "valid integer"),
        (["sample", "-n", "0"], "greater than or equal to 1"),
        (["eval"], "Missing argument 'metric'"),
    ]:
        made = gencli(*argv)
        assert (made.code, made.bytes) == (2, b"") and said in made.err and "Traceback" not in made.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: !!python/object:os.system {name: vae}\n", "tags are not allowed"),
        ("model: &m {name: vae}\ndata: *m\n", "anchors and aliases"),
        ("model: {name: vae}\ndata: {name: digits}\nmodel: {name: pixelcnn}\n", "line 3: the key 'model' is on line 1"),
        ("model: {name: vae\n", "line 2"),
        ("- vae\n", "a recipe is a mapping"),
        ("model: {name: vae}\n", "'data' is missing"),
    ],
)
def test_recipes_that_are_not_taken(text: str, said: str, here: Path, gencli: Call) -> None:
    Path("mine.yaml").write_text(text)
    refused(gencli("train", "mine.yaml"), 2, "mine.yaml", said)
    assert [p.name for p in here.iterdir()] == ["mine.yaml"]


# ---------------------------------------------------------------------------------------------- bad checkpoints


def edited(file: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Rewrite the header and the numbers of a safetensors file."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, numbers = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    change(header, numbers)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 16
    file.write_bytes(raw)


def wrong_shape(header: dict[str, Any], numbers: bytearray) -> None:
    name = next(key for key, entry in header.items() if len(entry.get("shape", [])) == 2)
    header[name]["shape"].reverse()


def nan(header: dict[str, Any], numbers: bytearray) -> None:
    numbers[-4:] = np.float32(np.nan).tobytes()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: f.unlink(), "no such file"),
    "empty": (lambda f: f.write_bytes(b""), "damaged"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "damaged"),
    "bit-flipped": (flip, "damaged"),
    "over-long header": (lambda f: f.write_bytes((10**8).to_bytes(8, "little") + f.read_bytes()[8:]), "header"),
    "wrong shape": (lambda f: edited(f, wrong_shape), "damaged"),
    "not finite": (lambda f: edited(f, nan), "damaged"),
}
ALONE = {"empty": "too short", "truncated": "missing at the end", "wrong shape": "model's is", "not finite": "finite"}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoints_are_named(how: str, at_shop: Path, gencli: Call) -> None:
    damage, _ = DAMAGE[how]
    shutil.copytree(RUNS["vae"], at_shop / "run")
    folder = at_shop / f"run/checkpoints/step-{STEPS:06d}"
    shutil.copy(folder / "model.safetensors", at_shop / "alone.safetensors")
    damage(folder / "model.safetensors")
    refused(gencli("eval", "nll", folder, "-n", 2), 3, f"step-{STEPS:06d}/model.safetensors")
    refused(gencli("sample", at_shop / "run", "-o", at_shop / "x.png"), 3, "every checkpoint is damaged")
    resumed = gencli("train", "--resume", at_shop / "run")  # from the start: no other checkpoint is left
    assert resumed.code == 0 and f"set aside as damaged-{STEPS:06d}-0" in resumed.err
    good = Path(RUNS["vae"]) / f"checkpoints/step-{STEPS:06d}/model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == good.read_bytes()
    damage(at_shop / "alone.safetensors")
    alone = gencli("sample", at_shop / "alone.safetensors", "-n", 2, "-o", at_shop / "x.png")
    if how == "bit-flipped":  # one weight is another: nothing but the manifest can know
        assert alone.code == 0
    else:
        refused(alone, 3, "alone.safetensors", ALONE.get(how, ""))
        assert not (at_shop / "x.png").exists()


def test_runs_without_a_checkpoint(here: Path, gencli: Call) -> None:
    refused(gencli("sample"), 3, "no runs in runs")
    refused(gencli("sample", "7"), 3, "'7'")
    Path("empty").mkdir()
    refused(gencli("eval", "nll", "empty"), 3, "empty is neither a run nor a checkpoint")
    refused(gencli("train", "--resume", "empty"), 2, "'empty'")
    Path("text.safetensors").write_text("hello, world")
    refused(gencli("sample", "text.safetensors"), 3, "text.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gencli.training.trainer.Trainer.step", lambda self: 1 / 0)
        assert gencli("train", "vae", *words("vae")).code == 1
    refused(gencli("sample"), 3, "no checkpoint yet")


# ---------------------------------------------------------------------------------------------- bad pictures


def png(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def good_pictures(folder: Path, n: int = 30) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)
    for i, x in enumerate(noise):
        Image.fromarray(x).save(folder / f"{i:02}.png")


def spoil(kind: str, path: Path) -> None:
    grey = np.full((8, 8), 77, np.uint8)
    if kind == "corrupt":
        path.write_bytes((path.parent / "00.png").read_bytes()[:60])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no picture at all")
    elif kind == "no pixels":
        path.write_bytes(png(0, 8))
    elif kind == "200 megapixels":
        path.write_bytes(png(20_000, 10_000))
    elif kind == "animated":
        frames = [Image.fromarray(grey + i) for i in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "other size":
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(path)


@pytest.mark.parametrize("kind", ["corrupt", "empty", "text", "no pixels", "200 megapixels", "animated", "other size"])
def test_a_bad_picture_in_a_folder_is_named(kind: str, here: Path, gencli: Call) -> None:
    good_pictures(here / "mine")
    spoil(kind, here / "mine/bad.png")
    refused(gencli("data", "show", "mine", "-n", 99, "-o", "d.png"), 3, "mine/bad.png")
    refused(gencli("train", "vae", *words("vae"), "--data", "mine", "--steps", 1), 3, "mine/bad.png")
    assert not Path("runs").exists() and not Path("d.png").exists()


def test_pictures_of_all_kinds_come_as_they_look(here: Path, gencli: Call) -> None:
    good_pictures(here / "mine", 20)
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024  # 16 bits: 0 .. 64512
    Image.fromarray(wide).save("mine/wide.png")
    row = gencli("data", "show", "mine", "-o", "d.png").row
    assert row["shape"] == [1, 8, 8]
    found = [data.load("mine", split) for split in data.SPLITS]
    x = torch.cat([part.rows(torch.arange(part.size))["x"] for part in found])
    assert any(np.array_equal(one[0].numpy(), wide >> 8) for one in x), "16 bits are scaled, not clipped"
    assert gencli("train", "vae", *words("vae"), "--data", "mine", "--steps", 1).out == "runs/0001-vae-mine\n"
    colour = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colour).convert("CMYK").save("mine/ink.tif")
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save("mine/palette.png")
    row = gencli("data", "show", "mine", "-o", "d.png").row
    assert row["shape"] == [3, 8, 8]
    assert gencli("train", "vae", *words("vae"), "--data", "mine", "--steps", 1).out == "runs/0002-vae-mine\n"


def test_folders_and_files_that_hold_no_data(here: Path, gencli: Call) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("no picture")
    refused(gencli("data", "show", "mine"), 3, "mine: no images in this folder")
    refused(gencli("train", "vae", "--data", "mine"), 3, "mine: no images in this folder")
    refused(gencli("data", "show", "./nowhere"), 3, "./nowhere")
    np.savez("x.npz", x=np.array([{}], object))
    refused(gencli("data", "show", "x.npz"), 3, "x.npz", "Python objects")
    np.savez("y.npz", a=np.zeros(3))
    refused(gencli("train", "vae", "--data", "y.npz"), 3, "y.npz", "neither x nor x_train")
    good_pictures(here / "few", 2)
    refused(gencli("train", "vae", *words("vae"), "--data", "few", "--steps", 1), 3, "few: no images for val")


def test_apply_refuses_pictures_that_do_not_fit(at_shop: Path, gencli: Call) -> None:
    (at_shop / "none").mkdir()
    for name, content, code, said in [
        ("a.png", b"", 3, "a.png"),
        ("b.png", png(20_000, 10_000), 3, "megapixels"),
        ("c.npz", b"PK hello", 3, "c.npz"),
        ("d.docx", b"hello", 3, "d.docx"),
        ("none", None, 3, "none"),
        ("missing.png", None, 3, "missing.png"),
    ]:
        if content is not None:
            (at_shop / name).write_bytes(content)
        refused(gencli("apply", RUNS["vae"], at_shop / name, "-o", at_shop / "out.png"), code, said)
    np.save(at_shop / "points.npy", np.zeros((3, 2)))
    refused(gencli("apply", RUNS["vae"], at_shop / "points.npy"), 3, "points.npy", "1x8x8")
    assert not (at_shop / "out.png").exists()


# ---------------------------------------------------------------------------------------------- pipes, disks, signals


def test_a_reader_that_leaves_is_no_error(at_shop: Path) -> None:
    sample = f"{sys.executable} -m gencli sample {RUNS['wgan-gp']} -n 100000 -o -"
    command = f"{sample} | head -c 100 | wc -c; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["100", "141"] and done.stderr == ""


def test_a_full_disk_behind_stdout(at_shop: Path, gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["sample", RUNS["wgan-gp"], "-o", "-"], ["runs"], ["eval", "nll", RUNS["vae"], "-n", 2]):
        with open("/dev/full", "wb") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(full))
            refused(gencli(*argv), 1, "the disk is full")


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes: what a full disk does to a writer, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("room", "culprit", "state"),
    [
        (5000, "run/checkpoints/step-000004", "failed"),
        (500, "run/metrics.jsonl", "running"),  # not even run.json can be written
    ],
)
def test_a_disk_that_fills_up_while_training(
    room: int, culprit: str, state: str, here: Path, gencli: Call, small_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def fills(self: Trainer) -> dict[str, float]:
        if self.number == 3:
            small_files(room)
        return step(self)

    monkeypatch.setattr(Trainer, "step", fills)
    made = gencli("train", "vae", *words("vae"), "--steps", 6, "train.checkpoint_every=2", "--out", "run")
    refused(made, 1, culprit)
    monkeypatch.setattr(Trainer, "step", step)
    small_files(resource.RLIM_INFINITY)
    assert read_record("run")["state"] == state and checkpoint.load("run").step == 2
    assert not [p for p in Path("run").rglob("*.tmp*")]
    assert gencli("train", "--resume", "run").code == 0 and checkpoint.load("run").step == 6
    assert gencli("train", "vae", *words("vae"), "--steps", 6, "train.checkpoint_every=2", "--out", "whole").code == 0
    name = "checkpoints/step-000006/model.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


def test_samples_on_a_full_disk(at_shop: Path, gencli: Call, small_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small_files(3000)
    for name in ("x.npz", "x.tar", "x.safetensors", "x.png"):
        made = gencli("sample", RUNS["pixelcnn"], "-n", 300, "-o", at_shop / name)
        refused(made, 1, f"{at_shop / name}: the file is too big")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused(gencli("sample", RUNS["pixelcnn"], "-o", at_shop / "new"), 1, f"{at_shop / 'new'}: the disk is full")
    assert not list(at_shop.iterdir()), "no half-written file is left"


def test_one_folder_takes_one_run(at_shop: Path, gencli: Call) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(RUNS["vae"]).rglob("*")}
    refused(gencli("train", "vae", *words("vae"), "--out", RUNS["vae"]), 2, RUNS["vae"], "not an empty folder")
    Path(at_shop / "file").write_text("mine")
    refused(gencli("train", "vae", *words("vae"), "--out", at_shop / "file"), 2, "file", "not an empty folder")
    assert {p: p.stat().st_mtime_ns for p in Path(RUNS["vae"]).rglob("*")} == before


def test_a_run_under_way_lets_no_other_in(here: Path, gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    step = Trainer.step

    def nosy(self: Trainer) -> dict[str, float]:
        if self.number == 1:
            codes.extend(invoke("train", *others) for others in (["vae", "--out", "run"], ["--resume", "run"]))
        return step(self)

    monkeypatch.setattr(Trainer, "step", nosy)
    made = gencli("train", "vae", *words("vae"), "--steps", 2, "--out", "run")
    assert (made.code, codes) == (0, [2, 1])
    assert "error: run exists and is not an empty folder" in made.err
    assert "error: run is being written by another process" in made.err
    assert read_record("run")["state"] == "done" and checkpoint.load("run").step == 2


@pytest.mark.parametrize(("name", "lr"), [("vae", "1e9"), ("wgan-gp/points", "10")])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(name: str, lr: str, here: Path, gencli: Call) -> None:
    wild = [f"train.lr={lr}", "train.optimizer=sgd", "train.checkpoint_every=1"]
    made = gencli("train", name, *words(name.partition("/")[0]), *wild, "--steps", 50, "--out", "run")
    refused(made, 4, "at step")
    assert "--lr" in made.err and read_record("run")["state"] == "diverged"
    loaded = checkpoint.load("run")
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    assert loaded.step == max(step for step, _ in checkpoint.steps("run"))


def test_a_signal_stops_a_run_and_resume_ends_it_as_if_nothing_had_been(
    here: Path, gencli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    common = ["train", "pixelcnn", *words("pixelcnn"), "--steps", 6, "train.ema=0.5", "--out"]
    assert gencli(*common, "whole").code == 0
    for signum, number in ((signal.SIGINT, 2), (signal.SIGTERM, 4)):

        def stopped(self: Trainer, signum: int = signum, number: int = number) -> dict[str, float]:
            if self.number == number:
                os.kill(os.getpid(), signum)
            return step(self)

        monkeypatch.setattr(Trainer, "step", stopped)
        made = gencli(*(["train", "--resume", "parts"] if number > 2 else [*common, "parts"]))
        refused(made, 128 + signum, signal.Signals(signum).name, "everything is saved")
        assert "gencli train --resume parts" in made.err and read_record("parts")["state"] == "interrupted"
    monkeypatch.setattr(Trainer, "step", step)
    assert gencli("train", "--resume", "parts").out == "parts\n"
    for file in ("model.safetensors", "training.safetensors"):
        a, b = (Path(run, "checkpoints/step-000006", file).read_bytes() for run in ("whole", "parts"))
        assert a == b, file
