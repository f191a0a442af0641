"""A training run from recipe to finished folder: checkpoints, evaluation, samples, signals, early stopping."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gencli import __version__, checkpoint, console, data, pictures, processes, sampling
from gencli.console import DataError, GencliError, UsageError
from gencli.contract import Model
from gencli.metrics import likelihood
from gencli.models import model_class
from gencli.recipe import Recipe, check_model, dump
from gencli.rng import seeded
from gencli.run import Run
from gencli.training import scores
from gencli.training.batches import Batches, match
from gencli.training.trainer import Trainer
from gencli.training.worries import Worries

__all__ = ["Interrupted", "Session"]


PACE = 32  # steps after which processes that write one memory ask each other whether to stop


class Interrupted(GencliError):
    """A signal stopped the run after it was saved; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, signum: int, run: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; everything is saved", hint=f"gencli train --resume {run}"
        )
        self.exit_code = 128 + signum


@dataclass
class _Course:
    """What a session remembers besides the trainer: all of it is in every checkpoint."""

    best: dict[str, Any] | None = None
    stale: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # lazy phases speak at some steps only


class Session:
    """Everything a run needs, built from its recipe; ``run`` is None for a dry run. Use inside ``settings``."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        cls, config = model_class(recipe.model.name), check_model(recipe)
        part = recipe.data
        self.train_data = data.load(part.name, "train", part.root, on_bad=part.on_bad)
        self.val_data = data.load(part.name, "val", part.root, on_bad=part.on_bad)
        streams = cls.streams(config)
        match(recipe.model.name, streams, self.train_data)
        n = self.train_data.size
        if n is not None and n < 1:
            raise DataError(f"{self.train_data.name}@train has no rows")
        with seeded(recipe.seed, "init"):
            try:
                self.model: Model = cls(config, self.train_data.spec)
            except ValueError as error:
                raise UsageError(f"{recipe.model.name} on {self.train_data.name}: {error}") from None
        train = recipe.train
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        batches = Batches(
            self.train_data,
            streams,
            seed=recipe.seed,
            size=train.batch_size,
            device=device,
            channels_last=train.channels_last,
        )
        self.trainer = Trainer(self.model, train, batches, seed=recipe.seed, device=device)
        self.course = _Course()
        for metric in train.evaluate:
            scores.check_metric(metric)
            scores.check_capable(metric, recipe.model.name)
        self._asked = scores.Asked(split="val", root=part.root, seed=recipe.seed, baselines=False, source=self.val_data)
        self.run: Run | None = None
        self.worries = Worries(self.model, self.train_data, self._tell, since=train.steps // 5)
        self._signal = 0

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def digests(self) -> dict[str, str]:
        """What tells whether the data are still the same."""
        return {"train": self.train_data.digest, "val": self.val_data.digest}

    # ------------------------------------------------------------------ files

    def start(self, run: Run, *, save: bool = False) -> None:
        """Begin in a new run folder; ``save`` weights that did not come from the seed."""
        self.run = run
        run.update(
            model=self.recipe.model.name,
            data={"name": self.train_data.name, "digests": self.digests},
            device=str(self.device),
            processes=processes.world(),
            threads=torch.get_num_threads(),
            seed=self.recipe.seed,
            job=os.environ.get("TORCHELASTIC_RUN_ID"),
            parameters=self.parameters,
            state="running",
            step=0,
            steps=self.recipe.train.steps,
            best=None,
        )
        if save:
            self.save()
        run.write_recipe(dump(self.recipe))  # last: with it the run can be resumed

    def resume(self, run: Run) -> None:
        """Go on in a run folder from its newest checkpoint that verifies, or from the start if it has none."""
        known = (run.record.get("data") or {}).get("digests")
        if known is not None and known != self.digests:
            raise DataError(
                f"{self.train_data.name} has changed since {run.path} began",
                hint=f"gencli train {run.path}/recipe.yaml --init-from {run.path} starts anew with its weights",
            )
        self.run = run
        run.write_recipe(dump(self.recipe))  # perhaps with more steps: what the next --resume goes on to
        newest = processes.first(lambda: _text(checkpoint.latest(run.path, missing_ok=True)))
        if newest is not None:
            state = checkpoint.load_state(Path(newest), self.model)
            self.trainer.restore(state.training, state.training_meta["trainer"], state.ema)
            self.course = _Course(**state.training_meta["course"])
            if self.course.best and processes.rank() == 0:
                checkpoint.mark_best(run.path, **self.course.best)
        run.truncate_metrics(self.trainer.number)
        number, best = self.trainer.number, self.course.best
        run.update(state="running", end=None, step=number, steps=self.recipe.train.steps, best=best)
        run.update(job=os.environ.get("TORCHELASTIC_RUN_ID"), processes=processes.world())

    def save(self) -> None:
        """A checkpoint of this very step; GencliError if the processes hold different weights."""
        processes.agree(0)  # all are here: with train.hogwild, nobody writes any more
        if processes.world() > 1 and (other := processes.differing(self.trainer.digest())) is not None:
            raise GencliError(
                f"step {self.trainer.number}: process {other} does not hold what process 0 holds; nothing was written",
                hint="gencli train --resume goes on from the last checkpoint",
            )
        processes.first(self._write)

    def _write(self) -> None:
        assert self.run is not None
        self.run.sync()  # no checkpoint is newer than what metrics.jsonl says of it
        number = self.trainer.number
        folder = self.run.path / "checkpoints" / f"step-{number:06d}"
        meta = {
            "model": self.recipe.model.name,
            "config": self.model.config.model_dump(mode="json"),
            "spec": self.model.spec.model_dump(mode="json"),
            "recipe": self.recipe.model_dump(mode="json"),
            "step": number,
            "chunk": self.model.chunk,
            "versions": {"gencli": __version__, "torch": torch.__version__},
        }
        checkpoint.save(
            folder,
            self.model,
            meta=meta,
            ema=self.trainer.averages() or None,
            training=self.trainer.tensors(),
            training_meta={"trainer": self.trainer.facts(), "course": vars(self.course)},
        )
        if self.course.best and self.course.best["step"] == number:
            checkpoint.mark_best(self.run.path, **self.course.best)
        best = [self.course.best["step"]] if self.course.best else []
        checkpoint.prune(self.run.path, keep=self.recipe.train.keep, protect=best)
        self.run.update(step=number, best=self.course.best)

    # ------------------------------------------------------------------ looking at the model

    def evaluate(self) -> list[tuple[str, float, dict[str, Any]]]:
        """(name, value, row) of each metric of the val split, of the averaged weights, by the verb's own code.

        Metrics of samples have their counts in their names: fd-domain@500/179. The processes share the work, and each
        has the result.
        """
        train, step = self.recipe.train, self.trainer.number
        found = []
        with self.trainer.evaluating() as model:
            meta = {"model": self.recipe.model.name, "recipe": self.recipe.model_dump(mode="json"), "step": step}
            loaded = checkpoint.Loaded(model, meta | {"chunk": model.chunk}, Path(), step, "ema")
            for metric in self.metrics:
                n = train.evaluate_samples if metric in scores.OF_SAMPLES else likelihood.ENDLESS
                row = scores.score(metric, loaded, replace(self._asked, n=n))
                name, value = scores.headline(row)
                if "samples" in row:
                    name += f"@{row['samples']}" + (f"/{row['reference']}" if "reference" in row else "")
                found.append((name, value, row))
        return found

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the val split is measured by."""
        return self.recipe.train.evaluate or (("nll",) if self.model.likelihood is not None else ())

    def picture(self) -> Any:
        """Samples from the same noise each time, as a picture (H, W, 3); None if the model draws none.

        The processes share the drawing; the picture is the first's.
        """
        if not hasattr(self.model, "sample"):
            return None
        with self.trainer.evaluating() as model:
            chunks = list(sampling.draw(model, self.recipe.train.samples, seed=self.recipe.seed))
        if processes.rank() > 0:
            return None
        self.worries.about_samples(self.trainer.number, chunks)
        return sampling.picture(chunks, self.model.spec, beside=self.train_data)

    # ------------------------------------------------------------------ the run

    def fit(self, *, preview: bool = True) -> None:
        """Train to the end of the recipe. Raises Interrupted or Diverged after saving what can be saved."""
        assert self.run is not None
        run, train = self.run, self.recipe.train
        if train.hogwild and processes.world() > 1:
            self._tell("train.hogwild: processes do not wait for each other, so this run is not reproducible")
        if set(self.metrics) & set(scores.OF_SAMPLES):  # before hours of training: an extractor may not be had
            against = scores.reference(self.recipe.data.name, self._asked, self.device)
            self._asked = replace(self._asked, against=against)
        try:
            with self._signals(), console.Progress(train.steps, run.path.name, start=self.trainer.number) as progress:
                self._loop(progress, preview)
        except BaseException as error:
            state = {4: "diverged", 130: "interrupted", 143: "interrupted"}.get(
                getattr(error, "exit_code", 1), "failed"
            )
            with suppress(OSError):  # a full disk: what happened first is what is told
                run.finish(state)
            raise
        run.finish("done")

    def _loop(self, progress: Any, preview: bool) -> None:
        assert self.run is not None
        train, began = self.recipe.train, time.monotonic()
        log_every = max(1, train.steps // 200)
        checkpoint_every = train.checkpoint_every or max(1, train.steps // 10)
        logs: dict[str, float] = {}
        self._hang_missing(preview)
        while self.trainer.number < train.steps and not self._out_of_patience:
            logs = self.trainer.step()
            number = self.trainer.number
            last = number == train.steps
            self._count(logs)
            if number % log_every == 0 or last:
                mean = {k: v / self.course.counts[k] for k, v in self.course.sums.items()}
                self.course.sums, self.course.counts = {}, {}
                self.run.metric("train", number, **mean, time=round(time.monotonic() - began, 3))
                self.worries.about(number, mean)
                progress.update(number, **_headline(mean))
            else:
                progress.update(number)
            if last or _due(number, train.evaluate_every):
                self._judge(number)
            stop = self._out_of_patience
            # one process may have it a step before another; those that write one memory seldom wait for each other
            alone = processes.world() == 1
            signum = processes.agree(self._signal) if alone or not train.hogwild or number % PACE == 0 or last else 0
            try:
                if last or stop or _due(number, train.sample_every):
                    self._show(number, preview)  # before save: if killed between, drawn again
            finally:  # a picture that fails costs no weights
                if last or stop or signum or self._is_best(number) or _due(number, checkpoint_every):
                    self.save()
            if stop and not last:
                self.run.log(f"stopped at step {number}: no better for {train.patience} evaluations")
            elif signum and not last:
                raise Interrupted(signum, self.run.path)

    def _tell(self, text: str) -> None:
        if self.run is not None and processes.rank() == 0:
            self.run.log(text)
            console.say(text)

    def _count(self, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            self.course.sums[name] = self.course.sums.get(name, 0.0) + value
            self.course.counts[name] = self.course.counts.get(name, 0) + 1

    def _is_best(self, number: int) -> bool:
        return self.course.best is not None and self.course.best["step"] == number

    @property
    def _out_of_patience(self) -> bool:
        """Whether the score has not improved for as many evaluations as the recipe allows: state, so a resume knows."""
        patience = self.recipe.train.patience
        return patience is not None and self.course.stale >= patience

    def _judge(self, number: int) -> None:
        """Evaluate, and remember the best."""
        assert self.run is not None
        found = self.evaluate()
        if not found:
            return
        self.run.metric("eval", number, data=found[0][2]["data"], **{name: value for name, value, _ in found})
        self.run.log(f"step {number}: " + ", ".join(f"{name} {value:.4f}" for name, value, _ in found))
        name, value, _ = found[0]
        sign = -1 if scores.higher_is_better(self.metrics[0]) else 1
        best = sign * self.course.best["value"] if self.course.best else math.inf
        if sign * value <= best:  # never so for NaN; of equal ones, as counts of modes often are, the later
            self.course.best = {"step": number, "metric": name, "value": value}
        self.course.stale = 0 if sign * value < best else self.course.stale + 1

    def _hang_missing(self, preview: bool) -> None:
        """After a resume: the picture of this step, if it failed (a full disk) where the weights could be saved."""
        train, number = self.recipe.train, self.trainer.number
        if number > 0 and (number == train.steps or self._out_of_patience or _due(number, train.sample_every)):
            assert self.run is not None
            file = self.run.path / "samples" / f"step-{number:06d}.png"
            if not processes.first(file.exists):
                self._show(number, preview)

    def _show(self, number: int, preview: bool) -> None:
        image = self.picture()

        def hang() -> None:
            assert self.run is not None
            if image is not None:
                pictures.save_png(self.run.path / "samples" / f"step-{number:06d}.png", image)
                if preview:
                    console.preview(image)

        processes.first(hang)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save and stop; a second one stops at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self._signal:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            self._signal = signum
            if processes.rank() == 0:
                console.say(f"{signal.Signals(signum).name}: finishing the step and saving (again to stop at once)")

        before: dict[int, Callable[..., Any] | int | None] = {}
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                before[signum] = signal.signal(signum, note)
        except ValueError:  # not in the main thread: the caller handles signals
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _headline(logs: dict[str, float]) -> dict[str, float]:
    """What is shown while one waits: no loss where bits/dim says the same, no settings."""
    hidden = {"lr", "gradient_norm"} | ({"loss"} if "bits_per_dim" in logs else set())
    shown = {name: value for name, value in logs.items() if name.rpartition(".")[2] not in hidden}
    return dict(sorted(shown.items(), key=lambda item: item[0] != "bits_per_dim"))
