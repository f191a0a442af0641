"""Embedding translation: time, memory and scores of ``gencli translate-embeddings``, started as a user starts it.

CPU seconds stand beside the seconds: on a machine that does other work they are what a command takes alone.

``python -m tests.benchmarks translation``: with GENCLI_DATA at a folder that holds ``bli/`` (see below) the three maps
of ``--compare`` on its en-es vectors; then 200,000 words of 300 dimensions a side, drawn (a rotated copy with noise;
5,000 pairs to learn, 1,500 to score): the fit, P@k by nearest neighbour and by exact CSLS, words piped in one by one,
and loading the same vectors as text against gensim's ``KeyedVectors.load_word2vec_format``, where gensim can be
imported. ``--words`` (6,500 or more), ``--dims`` make it smaller, ``--threads 2`` sets the threads of the products.

``bli/vectors/es-en/word2vec.{en,es}.gz`` and ``bli/muse/en-es.{0-5000,5000-6500}.txt.gz`` are those of Zhang et al.,
ACL 2017, and of MUSE.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gencli import keyed, translation, vectors

FILES = ("a.safetensors", "b.safetensors", "train.txt", "test.txt")
NOISE = 3.0  # of variance 9 beside 1: cosines of 0.32 between translations


def started(words: tuple[object, ...], threads: int, **pipes: Any) -> subprocess.Popen[bytes]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    line = [sys.executable, "-m", "gencli", "translate-embeddings", *map(str, words)]
    return subprocess.Popen(line, env=os.environ | dict.fromkeys(names, str(threads)), **pipes)


def command(*words: object, threads: int = 1) -> tuple[list[dict[str, Any]], str]:
    """(rows printed, what it took from start to end) of ``gencli translate-embeddings`` in a process of its own."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = started(words, threads, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, "it failed"
        out.seek(0)
        rows = [json.loads(row) for row in out.read().splitlines()]
    seconds, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    return rows, f"{seconds:.2f} s ({cpu:.2f} s of CPU), {usage.ru_maxrss / 2**20:.2f} GB"


class Clock:
    """Seconds and CPU seconds of a block, as text."""

    def __enter__(self) -> Clock:
        self.begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s ({self.cpu:.2f} of CPU)"


def bli(root: Path) -> None:
    sides = [root / f"vectors/es-en/word2vec.{side}.gz" for side in ("en", "es")]
    train, test = root / "muse/en-es.0-5000.txt.gz", root / "muse/en-es.5000-6500.txt.gz"
    rows, took = command(*sides, "--dictionary", train, "--test", test, "--compare")
    print(f"bli en-es, three maps in one command: {took}, start included")
    for row in rows[:3]:
        print(f"  {row['map']} {row['normalise']}: P@1 {100 * row['p_at_1']:.1f}, P@5 {100 * row['p_at_5']:.1f}")
    for row in rows[3:]:
        low, high = row["p_at_1_95"]
        change = 100 * row["p_at_1_difference"]
        print(f"  {row['first']} - {row['second']}: {change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")


def alone(work: Callable[..., None], *given: object) -> None:
    """``work`` in a process of its own: the peak of this one's memory would count as that of commands it starts."""
    process = multiprocessing.get_context("fork").Process(target=work, args=given)
    process.start()
    process.join()
    assert process.exitcode == 0, "it failed"


def drawn(folder: Path, n: int, d: int) -> None:
    """Vectors of two languages, safetensors, and dictionaries to learn from and to be scored on."""
    g = keyed.generator("translation benchmark")
    x = g.standard_normal((n, d), dtype=np.float32)
    R = np.linalg.qr(g.standard_normal((d, d)))[0].astype(np.float32)
    z = x @ R + g.standard_normal((n, d), dtype=np.float32) * NOISE
    for name, side in (("a", x), ("b", z)):
        vectors.write(folder / f"{name}.safetensors", [f"{name}{i}" for i in range(n)], side)
    *_, train, test = (folder / name for name in FILES)
    train.write_text("".join(f"a{i} b{i}\n" for i in range(5000)))
    test.write_text("".join(f"a{i} b{i}\n" for i in range(5000, 6500)))


def fitting(folder: Path) -> None:
    """The map alone, as float64 from 5,000 pairs, and with it the normalisation and the mapping of all words."""
    x, z = vectors.read(folder / "a.safetensors").x, vectors.read(folder / "b.safetensors").x
    rows = np.repeat(np.arange(5000)[:, None], 2, 1)
    for name in ("procrustes", "linear"):
        model = translation.configured(name, {})
        with Clock() as fit:
            model.fit(x[:5000], z[:5000], keyed.generator("benchmark"))
        print(f"  {name}: fit {fit}")
        for steps in ((), ("unit", "centre", "unit")):
            with Clock() as whole:
                translation.fit(name, {}, steps, x, z, rows)
            print(f"    normalise ({','.join(steps) or 'none'}), fit and map all: {whole}", flush=True)


def piping(folder: Path, how: str, threads: int) -> None:
    """Seconds from a word on stdin to its answer, the first (with all that comes before it) and the next 100."""
    words = (folder / "a.safetensors", folder / "b.safetensors", "--apply", folder / "m.safetensors")
    took = []
    begin = time.perf_counter()
    with started((*words, "--retrieval", how), threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for i in range(5000, 5101):
            process.stdin.write(f"a{i}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["word"] == f"a{i}"
            took.append(time.perf_counter() - begin)
            begin = time.perf_counter()
        process.stdin.close()
    print(
        f"  a word in, a line out, by {how}: the first after {took[0]:.2f} s, the next {np.median(took[1:]):.3f} s",
        end="",
    )
    print(f" each (the slowest {max(took[1:]):.3f} s)", flush=True)


def loading(folder: Path) -> None:
    """Both loaders on the same text file, six decimals a number as the original program writes them."""
    a = vectors.read(folder / "a.safetensors")
    text = folder / "a.txt"
    with text.open("w") as file:
        file.write(f"{len(a.x)} {a.x.shape[1]}\n")
        form = " %.6f" * a.x.shape[1]
        for word, row in zip(a.words, a.x):
            file.write(word + form % tuple(row.tolist()) + "\n")
    with Clock() as clock:
        ours = vectors.read(text).x
    print(f"  loading {text.stat().st_size / 1e6:.0f} MB of text: {clock}", flush=True)
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        print("  gensim is not installed")
        return
    with Clock() as peer:
        theirs = KeyedVectors.load_word2vec_format(text).vectors
    assert (ours == theirs).all()
    times = f"{peer.seconds / clock.seconds:.1f} times the time, {peer.cpu / clock.cpu:.1f} of CPU"
    print(f"  gensim's loader: {peer}, {times}; the numbers are equal to the bit")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--words", type=int, default=200_000)
    parser.add_argument("--dims", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-loading", action="store_true")
    given = parser.parse_args(sys.argv[2:])
    root = Path(os.environ.get("GENCLI_DATA", "")) / "bli"
    if root.is_dir():
        bli(root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(drawn, folder, given.words, given.dims)
        source, target, train, test = (folder / name for name in FILES)
        print(f"{given.words} x {given.dims}, drawn, {given.threads} thread{'s' * (given.threads > 1)}")
        alone(fitting, folder)
        for how in ("nn", "csls"):
            words = (source, target, "--dictionary", train, "--test", test, "--retrieval", how)
            (row,), took = command(*words, threads=given.threads)
            right = f"P@1 {100 * row['p_at_1']:.1f} of {row['words']} words"
            print(f"  {how}: {right}, {took}, reading included", flush=True)
        command(source, target, "--dictionary", train, "--test", test, "-o", folder / "m.safetensors")
        for how in ("nn", "csls"):
            piping(folder, how, given.threads)
        if not given.skip_loading:
            alone(loading, folder)


if __name__ == "__main__":
    main()
