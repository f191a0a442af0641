"""Words a second of word2vec against gensim's Word2Vec at the same settings, and what the vectors are worth.

``python -m tests.benchmarks word2vec EN.txt [FR.txt]``: texts of a sentence a line, tokens parted by blanks. Dynamic
windows of 5, words that come 5 times, subsampling at 1e-3; gensim 4.4 (its C routines, compiled) with one worker thread
or two, ours through the trainer as a run goes, in one process or in two that write one memory (train.hogwild: not
reproducible; nor is gensim with two). Words are those of the text, with what subsampling leaves out and without the
ends of lines, which are tokens of ours. Sides take turns and the best of ROUNDS turns of SECONDS counts: by the
processor's time for one, by the clock for two. Reading and counting are left out. gensim is not needed by gencli:
pip install gensim smart_open wrapt, without dependencies.

Our steps are of 4 rows of 1024 tokens for each process, whose terms are taken at the same weights. gensim learns at
0.025, its own rate, ours as said.

With FR, line by line the translation of EN: P@1 of translate-embeddings (CSLS and nearest neighbour, orthogonal,
centred, a dictionary induced from the sentences) for vectors of EPOCHS passes of each, the mean over SPLITS ways to
hold out a quarter of the dictionary's words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gencli import dictionaries, recipe, translation, vectors
from gencli.metrics.translation import Test, ranked, scored
from gencli.training.session import Session
from gencli.training.settings import settings

SECONDS, ROUNDS, EPOCHS, SPLITS = 2.0, 4, 20, 6
ROWS, LENGTH = 4, 1024


class How(NamedTuple):
    architecture: str
    dim: int
    negative: int
    precision: str = "float32"
    lr: float = 0.025

    def __str__(self) -> str:
        return f"{self.architecture} d={self.dim} k={self.negative} {self.precision}, lr {self.lr}"


SETTINGS = [
    How("skip-gram", 100, 5),
    How("skip-gram", 100, 5, "bf16"),
    How("skip-gram", 300, 10),
    How("skip-gram", 300, 10, "bf16"),
    How("cbow", 100, 5),
]
WORTH = [
    How("skip-gram", 100, 5),
    How("skip-gram", 100, 5, "bf16"),
    How("skip-gram", 300, 10),
    How("skip-gram", 300, 10, lr=0.05),
    How("cbow", 100, 5, lr=0.1),
]


def words_of(text: Path, how: How, processes: int = 1) -> list[str]:
    words = [f"data.name={text}:tokens:{LENGTH}", f"train.batch_size={ROWS * processes}", f"train.lr={how.lr}"]
    words += [f"model.architecture={how.architecture}", f"model.dim={how.dim}", f"model.negative={how.negative}"]
    return [*words, f"train.precision={how.precision}", "train.schedule=linear", "threads=1", "device=cpu"]


def ours(text: Path, how: How, epochs: int) -> Session:
    """A session on ``text`` that would take ``epochs`` passes."""
    words = words_of(text, how)
    made = recipe.load("word2vec", words)
    with settings(made) as device:
        steps = epochs * (Session(made, device).train_data.size or 0) // ROWS
        return Session(recipe.load("word2vec", [*words, f"train.steps={max(1, steps)}"]), device)


def hogwild(text: Path, how: How, steps: int) -> tuple[float, vectors.Vectors]:
    """Tokens a second by the clock of two processes that write one memory, and their vectors."""
    from gencli import checkpoint
    from gencli.models.words.word2vec import Word2vec

    with tempfile.TemporaryDirectory() as folder:
        line = ["train", "word2vec", *words_of(text.absolute(), how, 2), "train.hogwild=true", f"train.steps={steps}"]
        line += ["--devices", "2", "--no-preview", "-o", f"{folder}/run"]
        subprocess.run([sys.executable, "-m", "gencli", *line], check=True, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        log = [(row["step"], row["time"]["seconds"]) for row in map(json.loads, lines) if row["event"] == "train"]
        (first, begin), (last, end) = log[0], log[-1]
        model = checkpoint.load(Path(folder, "run")).model
        assert isinstance(model, Word2vec)
        found = vectors.Vectors(model.vocabulary, model.vectors().numpy().copy())
        return (last - first) * 2 * ROWS * LENGTH / (end - begin), found


def theirs(sentences: list[list[str]], how: How, threads: int) -> Any:
    from gensim.models import Word2Vec

    sg = int(how.architecture == "skip-gram")
    model = Word2Vec(vector_size=how.dim, window=5, negative=how.negative, sample=1e-3, sg=sg, workers=threads, seed=0)
    model.build_vocab(sentences)
    return model


def rate(turn: Callable[[], float], clock: Callable[[], float]) -> float:
    """Words a second of ``turn``, which says how many it saw, called for SECONDS."""
    start, words = clock(), 0.0
    while (taken := clock() - start) < SECONDS:
        words += turn()
    return words / taken


def speed(text: Path) -> None:
    sentences = [line.split() for line in text.read_text().splitlines()]
    total = sum(map(len, sentences))
    share = total / (total + len(sentences))  # of our tokens are words
    for how in SETTINGS:
        one, two = theirs(sentences, how, 1), theirs(sentences, how, 2)
        session = ours(text, how, 1000)

        def step(session: Session = session) -> float:
            for _ in range(10):
                session.trainer.step()
            return 10 * ROWS * LENGTH * share

        def epoch(model: Any = one) -> int:
            model.train(sentences, total_examples=len(sentences), epochs=1)
            return total

        rates: dict[str, list[float]] = {"one": [], "gensim": [], "two": [], "gensim, two": []}
        for _ in range(ROUNDS):
            with settings(session.recipe):
                rates["one"].append(rate(step, time.process_time))
            rates["gensim"].append(rate(epoch, time.process_time))
            rates["two"].append(hogwild(text, how, 600)[0] * share)
            rates["gensim, two"].append(rate(partial(epoch, two), time.perf_counter))
        best = {name: max(found) for name, found in rates.items()}
        for mine, other, who in (("one", "gensim", "one thread"), ("two", "gensim, two", "two")):
            say = f"{how}, {who}: gencli {best[mine]:,.0f}, gensim {best[other]:,.0f} words/s"
            print(f"{say}, {best[mine] / best[other]:.2f} times", flush=True)


def worth(texts: list[Path]) -> None:
    """P@1 of both sides' vectors."""
    induced = dictionaries.induce(*texts)
    for how in WORTH:
        for who in ("gencli", "gencli, two processes", "gensim"):
            if how.precision == "bf16" and who != "gencli":  # gensim's are float32
                continue
            found = [learned(who, text, how) for text in texts]
            scores = precision(induced, found)
            print(f"{how}, {who}: P@1 " + ", ".join(f"{v:.1f} % by {k}" for k, v in scores.items()), flush=True)


def learned(who: str, text: Path, how: How) -> vectors.Vectors:
    if who == "gensim":
        sentences = [line.split() for line in text.read_text().splitlines()]
        model = theirs(sentences, how, 1)
        model.train(sentences, total_examples=len(sentences), epochs=EPOCHS)
        return vectors.Vectors(model.wv.index_to_key, model.wv.vectors)
    session = ours(text, how, EPOCHS)
    if who != "gencli":
        return hogwild(text, how, session.recipe.train.steps // 2)[1]
    with settings(session.recipe):
        for _ in range(session.recipe.train.steps):
            session.trainer.step()
    return vectors.Vectors(session.model.vocabulary, session.model.vectors().numpy())


def precision(induced: dictionaries.Dictionary, found: list[vectors.Vectors]) -> dict[str, float]:
    """P@1 in per cent by each way of retrieval, the mean over SPLITS."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.vec" for i in range(2)]
        for path, side in zip(paths, found):
            vectors.write(path, side.words, side.x)
        source, target = (vectors.read(path) for path in paths)
    hits: dict[str, list[float]] = {"csls": [], "nn": []}
    steps = translation.parse("unit,centre,unit")
    for seed in range(SPLITS):
        train, test = dictionaries.split(induced, seed=seed)
        pairs = translation.pairs(train, source, target, "train")
        asked = Test.of(test, source.index, target.index, "test")
        _, x, y = translation.fit("procrustes", {}, steps, source.x, target.x, pairs, 0, 0)
        for how, kept in hits.items():
            kept.append(float(scored(asked, ranked(how, x[asked.rows], y, x, 10)[1])[:, 0].mean()))
    return {how: 100 * float(np.mean(kept)) for how, kept in hits.items()}


def main() -> None:
    texts = [Path(word) for word in sys.argv[2:]]
    if not texts:
        sys.exit("usage: python -m tests.benchmarks word2vec EN.txt [FR.txt]")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {len(texts[0].read_text().split()):,} words")
    if len(texts) > 1:
        worth(texts[:2])
    speed(texts[0])
