"""Runs in real folders: a run that was stopped, and one that was killed, end in the bytes of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencli import checkpoint
from gencli.console import DataError, Diverged
from gencli.models import TABLE, Entry
from gencli.recipe import Recipe
from gencli.run import Run, read_record
from gencli.training.session import Interrupted, Session
from gencli.training.settings import settings
from gencli.training.trainer import Trainer
from tests.contract_cases import StyleGAN
from tests.tiny import tiny

STEPS, STOP = 16, 9
MODELS: dict[str, dict[str, Any]] = {
    "vae": {"latents": 2, "hidden": [8]},
    "wgan-gp": {"hidden": [8], "critic_steps": 2},
    "stylegan": {},
}


@pytest.fixture(autouse=True)
def _stylegan_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("stylegan", f"{StyleGAN.__module__}:StyleGAN", "gans", "", "", 2019, "", ("samples",))
    monkeypatch.setitem(TABLE, "stylegan", entry)
    monkeypatch.setenv("GENCLI_QUIET", "1")


def recipe(name: str, **train: Any) -> Recipe:
    parts = {"steps": STEPS, "batch_size": 8, "ema": 0.9, "samples": 4, "checkpoint_every": 6, "evaluate_every": 4}
    data = "points/moons" if name == "wgan-gp" else "digits"
    return Recipe.model_validate(
        {"model": {"name": name, **MODELS[name]}, "data": {"name": data}, "train": parts | train, "device": "cpu"}
    )


def train(made: Recipe, folder: Path, resume: bool = False) -> None:
    with settings(made) as device, Run.open(folder) if resume else Run.create(out=folder) as run:
        session = Session(made, device)
        (session.resume if resume else session.start)(run)
        session.fit(preview=False)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for the clock."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("checkpoints", "samples")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
    record = read_record(folder)
    return found | {key: record[key] for key in ("state", "step", "best", "parameters")}


def fall(patch: pytest.MonkeyPatch, at: int, how: str = "killed") -> None:
    """Let the next session be stopped by a signal, or fall dead, in step ``at``."""
    step = Trainer.step

    def fatal(self: Trainer) -> dict[str, float]:
        if self.number + 1 == at:
            if how == "killed":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    patch.setattr(Trainer, "step", fatal)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_interrupted_run_ends_like_another(name: str, how: str, tmp_path: Path, monkeypatch: Any) -> None:
    made = recipe(name)
    train(made, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(MemoryError if how == "killed" else Interrupted) as caught:
        fall(patch, STOP, how)
        train(made, tmp_path / "parts")
    saved = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*"))
    if how == "stopped":
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert saved[-1] == f"step-{STOP:06d}"
        assert read_record(tmp_path / "parts")["state"] == "interrupted"
    torch.manual_seed(3)
    train(made, tmp_path / "parts", resume=True)
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole["state"] == "done"
    last = [key for key in whole if not key.startswith("checkpoints") or f"step-{STEPS:06d}" in key]
    assert len(last) >= 8
    for key in last:
        assert parts[key] == whole[key], key


def test_evaluation_and_samples_change_no_weight(tmp_path: Path) -> None:
    train(recipe("vae"), tmp_path / "seen")
    train(recipe("vae", evaluate_every=None, sample_every=3, checkpoint_every=None), tmp_path / "blind")
    name = f"checkpoints/step-{STEPS:06d}/training.safetensors"
    header = 8 + int.from_bytes(outcome(tmp_path / "seen")[name][:8], "little")  # its metadata names the best step
    other = 8 + int.from_bytes(outcome(tmp_path / "blind")[name][:8], "little")
    assert outcome(tmp_path / "seen")[name][header:] == outcome(tmp_path / "blind")[name][other:]


def test_means_of_a_lazy_phase_are_over_its_own_steps(tmp_path: Path, monkeypatch: Any) -> None:
    fall(monkeypatch, 33)
    with pytest.raises(MemoryError):
        train(recipe("stylegan", steps=400), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 33, 2))
    assert [row.get("r1.lr") for row in rows] == [1e-3 if k % 8 == 0 else None for k in range(16)]


def test_a_divergence_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def explode(self: Any, b: Any, s: Any) -> dict[str, Any]:
        return {"loss": sum(p.sum() for p in self.parameters()) * float("inf")}

    monkeypatch.setattr("gencli.models.latent.vae.VAE.loss", explode)
    with pytest.raises(Diverged, match="model at step 0"):
        train(recipe("vae"), tmp_path / "run")
    assert read_record(tmp_path / "run")["state"] == "diverged"


def test_sigterm_saves_and_exits_with_143(tmp_path: Path) -> None:
    made = tmp_path / "r.yaml"
    made.write_text(
        "model: {name: vae, latents: 2, hidden: [8]}\ndata: {name: digits}\nthreads: 1\ndevice: cpu\n"
        "train: {steps: 100000, batch_size: 8, samples: 4}\n"
    )
    command = [sys.executable, "-m", "gencli", "train", str(made), "--out", str(tmp_path / "run"), "--no-preview"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert out == ""
    assert f"gencli train --resume {tmp_path / 'run'}" in err
    record = read_record(tmp_path / "run")
    assert record["state"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{record['step']:06d}" / "manifest.json").exists()


def test_data_that_changed_under_a_run_stop_its_resume(tmp_path: Path) -> None:
    """Nobody goes on with other data unawares: the digests of run.json are compared."""
    folder = tmp_path / "data.npz"
    images = np.random.default_rng(0).integers(0, 255, (60, 1, 4, 4), dtype=np.uint8)
    np.savez(folder, x=images)
    chosen = tiny("vae", f"data.name={folder}", "train.steps=2")
    with settings(chosen) as device, Run.create(tmp_path / "runs") as run:
        first = Session(chosen, device)
        first.start(run)
        first.fit(preview=False)
    np.savez(folder, x=255 - images)
    with settings(chosen) as device, Run.open(run.path) as again, pytest.raises(DataError, match="has changed since"):
        Session(chosen, device).resume(again)


def test_a_run_checkpoints_ten_times_unless_told_otherwise(tmp_path: Path) -> None:
    """So that a killed run loses a tenth at most, also where no score makes a checkpoint the best."""
    chosen = tiny("wgan-gp", "train.steps=20", "train.keep=100", "train.checkpoint_every=null")
    with settings(chosen) as device, Run.create(tmp_path / "runs") as run:
        session = Session(chosen, device)
        session.start(run)
        session.fit(preview=False)
    assert [step for step, _ in checkpoint.steps(run.path)] == list(range(2, 21, 2))


def test_early_stopping_is_remembered_by_a_resume(tmp_path: Path) -> None:
    """A run that stopped for want of progress does not go on when it is resumed."""
    chosen = tiny(
        "vae", "train.steps=40", "train.lr=1e-12", "train.ema=0", "train.evaluate_every=2", "train.patience=3"
    )
    with settings(chosen) as device, Run.create(tmp_path / "runs") as run:
        session = Session(chosen, device)
        session.start(run)
        session.fit(preview=False)
    stopped = session.trainer.number
    assert stopped < 40 and session.course.stale == 3
    with settings(chosen) as device, Run.open(run.path) as again:
        session = Session(chosen, device)
        session.resume(again)
        session.fit(preview=False)
    assert session.trainer.number == stopped


def test_of_equally_good_checkpoints_the_later_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 2.0, 2.0, math.nan, 2.5])
    recipe = tiny("vae", "train.steps=5", "train.evaluate_every=1", "train.patience=4")
    with settings(recipe) as device, Run.create(out=tmp_path / "run") as run:
        session = Session(recipe, device)
        monkeypatch.setattr(session, "evaluate", lambda: [("nats", next(values), {"data": "d"})])
        session.start(run)
        session.fit(preview=False)
    assert session.course.best == {"step": 3, "metric": "nats", "value": 2.0}
    assert session.course.stale == 3  # since step 2: an equal value is no better


def test_a_picture_that_failed_is_drawn_at_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe("vae", sample_every=8)
    train(made, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("gencli.pictures.save_png", full)
        train(made, tmp_path / "fallen")
    assert [step for step, _ in checkpoint.steps(tmp_path / "fallen")][-1] == 8  # no weights were lost with it
    assert not (tmp_path / "fallen/samples/step-000008.png").exists()
    train(made, tmp_path / "fallen", resume=True)
    whole, fallen = outcome(tmp_path / "whole"), outcome(tmp_path / "fallen")
    assert whole["samples/step-000008.png"] == fallen["samples/step-000008.png"]
    last = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    assert whole[last] == fallen[last] and whole["metrics"] == fallen["metrics"]
