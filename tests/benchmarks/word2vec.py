"""Words a second of word2vec against gensim's Word2Vec at the same settings, and what the vectors are worth.

``python -m tests.benchmarks word2vec EN.txt [FR.txt]``: texts of a sentence a line, tokens parted by blanks. Dynamic
windows of 5, words that come 5 times, subsampling as said; gensim 4.4 (its C routines, compiled, with one or two worker
threads), ours through the trainer as a run goes, one process, one or two threads. Words are those of the text, with
what subsampling leaves out; a second is the clock's, or the processor's (of all threads): on a busy machine the latter
says more. Both take turns of at least SECONDS each, and the best of ROUNDS counts. Reading and counting are left out.
gensim is not needed by gencli: pip install gensim smart_open wrapt, without their dependencies.

Our batches are 8 rows of 512 tokens, whose pairs are taken at the same weights; both sides learn at 0.025.

With FR, line by line the translation of EN: P@1 of translate-embeddings (CSLS, orthogonal, centred, a dictionary
induced from the sentences, a quarter of its words held out) for vectors of EPOCHS passes of each.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gencli import dictionaries, recipe, translation, vectors
from gencli.metrics.translation import Test, ranked, scored
from gencli.training.session import Session, settings

SECONDS, ROUNDS, EPOCHS = 2.0, 4, 20
THREADS = (1, 2)
SETTINGS = [  # architecture, dim, negatives, subsampling
    ("skip-gram", 100, 5, 1e-3),
    ("skip-gram", 100, 5, 1e-4),
    ("skip-gram", 300, 10, 1e-3),
    ("cbow", 100, 5, 1e-3),
]


def ours(text: Path, how: tuple[str, int, int, float], threads: int, epochs: int) -> Session:
    """A session on ``text`` that would take ``epochs`` passes."""
    architecture, dim, negative, sample = how
    words = [f"data.name={text}:tokens:512", "train.batch_size=8", "train.lr=0.025", "train.schedule=linear"]
    words += [f"model.architecture={architecture}", f"model.dim={dim}", f"model.negative={negative}"]
    words += [
        f"model.sample={sample}",
        f"model.shared={128 if negative > 5 else 64}",
        f"threads={threads}",
        "device=cpu",
    ]
    made = recipe.load("word2vec", words)
    with settings(made) as device:
        steps = epochs * (Session(made, device).train_data.size or 0) // 8
        return Session(recipe.load("word2vec", [*words, f"train.steps={max(1, steps)}"]), device)


def theirs(sentences: list[list[str]], how: tuple[str, int, int, float], threads: int) -> Any:
    from gensim.models import Word2Vec

    architecture, dim, negative, sample = how
    sg = int(architecture == "skip-gram")
    model = Word2Vec(vector_size=dim, window=5, negative=negative, sample=sample, sg=sg, workers=threads, seed=0)
    model.build_vocab(sentences)
    return model


def rate(turn: Callable[[], int]) -> tuple[float, float]:
    """Words a second by the clock and of the processor of ``turn``, which says how many it saw, for SECONDS."""
    start, processor, words = time.perf_counter(), time.process_time(), 0
    while (taken := time.perf_counter() - start) < SECONDS:
        words += turn()
    return words / taken, words / (time.process_time() - processor)


def speed(text: Path) -> None:
    sentences = [line.split() for line in text.read_text().splitlines()]
    total = sum(map(len, sentences))
    for how in SETTINGS:
        for threads in THREADS:
            session, model = ours(text, how, threads, 1000), theirs(sentences, how, threads)

            def step(session: Session = session) -> int:
                for _ in range(10):
                    session.trainer.step()
                return 10 * 8 * 512

            def epoch(model: Any = model) -> int:
                model.train(sentences, total_examples=len(sentences), epochs=1)
                return total

            a, b = [], []
            for _ in range(ROUNDS):
                with settings(session.recipe):
                    torch.set_num_threads(threads)
                    a.append(rate(step))
                b.append(rate(epoch))
            (mine, mine_cpu), (other, other_cpu) = ([max(r[i] for r in rates) for i in (0, 1)] for rates in (a, b))
            name = f"{how[0]} d={how[1]} k={how[2]} t={how[3]:g}, {threads} thread{'s' * (threads > 1)}"
            print(
                f"{name}: gencli {mine:,.0f}, gensim {other:,.0f} words/s by the clock, {mine / other:.2f} times",
                end="",
            )
            print(f"; {mine_cpu:,.0f}, {other_cpu:,.0f} of the processor, {mine_cpu / other_cpu:.2f} times", flush=True)


def worth(texts: list[Path]) -> None:
    """P@1 of both sides' vectors."""
    how = SETTINGS[0]
    for who in ("gencli", "gensim"):
        found = []
        for text in texts:
            if who == "gencli":
                session = ours(text, how, 1, EPOCHS)
                with settings(session.recipe):
                    for _ in range(session.recipe.train.steps):
                        session.trainer.step()
                x = session.model.vectors().numpy()
                found.append(vectors.Vectors(session.model.vocabulary, x))
            else:
                sentences = [line.split() for line in text.read_text().splitlines()]
                model = theirs(sentences, how, 1)
                model.train(sentences, total_examples=len(sentences), epochs=EPOCHS)
                found.append(vectors.Vectors(model.wv.index_to_key, model.wv.vectors))
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.vec" for i in range(2)]
            for path, side in zip(paths, found):
                vectors.write(path, side.words, side.x)
            source, target = (vectors.read(path) for path in paths)
        train, test = dictionaries.split(dictionaries.induce(*texts))
        pairs = translation.pairs(train, source, target, "train")
        asked = Test.of(test, source.index, target.index, "test")
        steps = translation.parse("unit,centre,unit")
        _, x, y = translation.fit("procrustes", {}, steps, source.x, target.x, pairs, 0, 0)
        right = scored(asked, ranked("csls", x[asked.rows], y, x, 10)[1])
        print(f"{who}: P@1 {100 * right[:, 0].mean():.1f} % of {len(right)} words after {EPOCHS} passes", flush=True)


def main() -> None:
    texts = [Path(word) for word in sys.argv[2:]]
    if not texts:
        sys.exit("usage: python -m tests.benchmarks word2vec EN.txt [FR.txt]")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {len(texts[0].read_text().split()):,} words")
    if len(texts) > 1:
        worth(texts[:2])
    speed(texts[0])
