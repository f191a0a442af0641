"""The verb: from files to a score, a saved map and translated words; and one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gencli import cli, console, keyed, vectors
from gencli.metrics.translation import RETRIEVALS, Ranking
from gencli.translation import load
from gencli.words import unit

BLI = Path(os.environ.get("GENCLI_DATA", "/nowhere")) / "bli"
N = 60


@pytest.fixture
def gencli(capsys):
    """Call the command line as ``main`` does: (exit code, rows on stdout, stderr)."""

    def call(*words):
        argv = sys.argv
        try:
            code = console.run(cli.app, ["translate-embeddings", *map(str, words)])
        finally:
            sys.argv = argv
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Vectors of s0 .. s59 and t0 .. t59, of which t is s turned, with some noise; dictionaries of them; two texts."""
    monkeypatch.chdir(tmp_path)
    g = keyed.generator("translate-embeddings")
    x = unit(g.standard_normal((N, 8)).astype(np.float32))
    R = np.linalg.qr(g.standard_normal((8, 8)))[0]
    for name, side in (("s", x), ("t", x @ R + 0.05 * g.standard_normal((N, 8)))):
        vectors.write(f"{name}.vec", [f"{name}{i}" for i in range(N)], side.astype(np.float32))
    Path("train.txt").write_text("".join(f"s{i} t{i}\n" for i in range(30)))
    Path("test.txt").write_text(
        "".join(f"s{i}\tt{i}\ns{i}\tx{i}\n" for i in range(30, 50)) + "sx tx\n" * 2 + "s51 tx\n"
    )
    lines = [g.permutation(N)[:6] for _ in range(200)]
    Path("a.txt").write_text("".join(" ".join(f"s{i}" for i in line) + "\n" for line in lines))
    Path("b.txt").write_text("".join(" ".join(f"t{i}" for i in line) + "\n" for line in lines))
    return tmp_path


FIT = ("s.vec", "t.vec", "--dictionary", "train.txt", "--test", "test.txt")


def test_a_map_is_learned_scored_kept_and_applied(place, gencli, monkeypatch):
    code, (row,), err = gencli(*FIT, "-o", "map.safetensors")
    assert code == 0 and not err and row["p_at_1"] == 1 and row["words"] == 20 and row["pairs"] == 30
    assert row["coverage"] == pytest.approx(20 / 22) and row["test"] == "test.txt" and row["retrieval"] == "nn"
    assert row["map"] == "procrustes" and row["normalise"] == "unit,centre,unit" and row["p_at_1_95"] == [1, 1]
    made = load("map.safetensors")
    assert made.about["files"]["source"]["name"] == "s.vec" and len(made.about["files"]["dictionary"]["sha256"]) == 64
    apply = ("s.vec", "t.vec", "--apply", "map.safetensors")
    code, (again,), _ = gencli(*apply, "--test", "test.txt")
    assert code == 0 and again == {key: value for key, value in row.items() if key != "out"}
    code, rows, _ = gencli(*apply, "s7", "s50", "-k", 3)
    assert [r["translations"][0] for r in rows] == ["t7", "t50"] and len(rows[0]["translations"]) == 3
    assert rows[0]["scores"] == sorted(rows[0]["scores"], reverse=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"s1\n\nnone\ns2")))
    code, rows, err = gencli(*apply, "--retrieval", "csls")
    assert code == 0 and [r["translations"] and r["translations"][0] for r in rows] == ["t1", None, "t2"]
    assert "s.vec has no word 'none'" in err
    vectors.write("u.vec", ["u"], np.ones((1, 8), np.float32))
    assert (
        "u.vec is not the target that map.safetensors was fitted on (t.vec)"
        in gencli("s.vec", "u.vec", *apply[2:], "s1")[2]
    )


def test_words_are_answered_while_more_are_awaited(place):
    assert gencli_process("s.vec", "t.vec", "--dictionary", "train.txt", "-o", "map.safetensors").wait() == 0
    process = gencli_process("s.vec", "t.vec", "--apply", "map.safetensors")
    for word in ("s3", "s4"):
        process.stdin.write(f"{word}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["translations"][0] == f"t{word[1:]}"
    process.stdin.close()
    assert process.wait() == 0


class Dripping(io.BytesIO):
    """A pipe that gives at most ``size`` bytes at once."""

    size = 1

    def read1(self, size=-1):
        return super().read1(self.size)


@pytest.mark.parametrize("how", RETRIEVALS)
def test_piped_words_get_what_named_words_get(place, gencli, monkeypatch, how):
    """However they come; and no pass over all targets is taken twice."""
    made = []

    class Counted(Ranking):
        def __init__(self, *given):
            made.append(given)
            super().__init__(*given)

    monkeypatch.setattr("gencli.metrics.translation.Ranking", Counted)
    assert gencli(*FIT, "-o", "map.safetensors")[0] == 0
    apply, names = ("s.vec", "t.vec", "--apply", "map.safetensors", "--retrieval", how), [f"s{i}" for i in range(N)]
    code, named, _ = gencli(*apply, *names)
    for size in (1, 1000):  # bytes that come at once
        made.clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Dripping("\r\n".join(names).encode())))
        Dripping.size = size
        code, piped, _ = gencli(*apply)
        assert code == 0 and [r["translations"] for r in piped] == [r["translations"] for r in named]
        np.testing.assert_allclose([r["scores"] for r in piped], [r["scores"] for r in named], atol=2e-5)
        assert [r["word"] for r in piped] == names and len(made) == 1


def gencli_process(*words):
    root = str(Path(cli.__file__).parent.parent)
    line = [sys.executable, "-m", "gencli", "translate-embeddings", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, env=os.environ | {"PYTHONPATH": root, "GENCLI_DEBUG": "1"})


def test_no_torch_is_loaded(place):
    code = (
        "import sys; from gencli import cli, console; c = console.run(cli.app); sys.exit(c or 'torch' in sys.modules)"
    )
    root = str(Path(cli.__file__).parent.parent)
    line = [sys.executable, "-c", code, "translate-embeddings", *FIT, "--compare"]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": root}, capture_output=True, check=True)
    assert len(done.stdout.splitlines()) == 6


def test_every_map_and_retrieval_is_there_by_options(place, gencli):
    for words in (["--map", "linear"], ["--map", "linear", "penalty=0.1"], ["--map", "linear", "solver=sgd"]):
        code, (row,), _ = gencli(*FIT, *words, "--normalise", "none")
        assert code == 0 and row["map"] == "linear" and row["normalise"] == "none" and row["p_at_1"] > 0.9
    code, rows, _ = gencli(*FIT, "solver=gradient", "--refine", 2, "--retrieval", "nn,inverted-softmax,csls")
    assert code == 0 and [r["retrieval"] for r in rows] == ["nn", "inverted-softmax", "csls"]
    assert all(r["p_at_1"] > 0.9 and r["pairs"] > 50 for r in rows)


def test_without_a_test_a_quarter_of_the_words_is_held_out(place, gencli):
    code, (row,), _ = gencli("s.vec", "t.vec", "--dictionary", "train.txt")
    assert code == 0 and row["words"] == 8 and row["pairs"] == 22 and row["test"] == "a quarter of train.txt"
    code, (row,), _ = gencli("s.vec", "t.vec", "--induce", "a.txt", "b.txt")
    assert code == 0 and row["words"] == 15 and row["pairs"] == 45 and row["test"] == "a quarter of a.txt and b.txt"
    assert row["p_at_1"] == 1


def test_words_that_were_learned_from_are_not_scored(place, gencli):
    Path("test.txt").write_text("s1 t1\ns40 t40\n")
    code, (row,), err = gencli(*FIT)
    assert code == 0 and row["words"] == 1 and "1 of its 2 words are learned from too" in err
    Path("test.txt").write_text("s1 t1\n")
    code, rows, err = gencli(*FIT)
    assert code == 3 and not rows and "nothing is left to be scored on" in err


def test_comparison_reports_paired_differences(place, gencli):
    code, rows, _ = gencli(*FIT, "--compare", "--retrieval", "nn,csls")
    assert code == 0 and len(rows) == 12
    score = {(r["map"], r["normalise"], r["retrieval"]): r["p_at_1"] for r in rows[:6]}
    for row in rows[6:]:
        first, second = (score[(*row[side].split(), row["retrieval"])] for side in ("first", "second"))
        assert row["p_at_1_difference"] == pytest.approx(first - second)
        assert row["p_at_1_95"][0] <= row["p_at_1_difference"] <= row["p_at_1_95"][1]


def test_vectors_of_a_run(place, gencli, monkeypatch):
    import torch

    class Model:
        vocabulary = tuple(f"s{i}" for i in range(N))

        def vectors(self):
            return torch.from_numpy(vectors.read("s.vec").x)

    class Loaded:
        model, meta, path = Model(), {"model": "words"}, Path("run/model.safetensors")

    monkeypatch.setattr("gencli.commands.options.load_run", lambda *a: Loaded)
    Path("run").mkdir()
    assert (
        gencli(*FIT)[1][0]["p_at_1"] == gencli("run", *FIT[1:])[1][0]["p_at_1"] == gencli(7, *FIT[1:])[1][0]["p_at_1"]
    )
    Loaded.model = object()
    code, _, err = gencli("run", *FIT[1:])
    assert code == 2 and "words of run has no word vectors" in err


WRONG = [
    (2, ("s.vec", "t.vec"), "a map comes from one of --dictionary"),
    (2, (*FIT, "--induce", "a.txt", "b.txt"), "a map comes from one of --dictionary"),
    (2, (*FIT, "--map", "procrustse"), "did you mean 'procrustes'"),
    (2, (*FIT, "penlty=3", "--map", "linear"), "did you mean 'penalty'"),
    (2, (*FIT, "penalty=lots", "--map", "linear"), "penalty=lots"),
    (2, (*FIT, "penalty=inf", "--map", "linear"), "penalty=inf"),
    (2, (*FIT, "rate=1e9", "solver=sgd", "--map", "linear"), "not finite: a smaller rate may help"),
    (2, (*FIT, "--normalise", ""), "unknown step ''"),
    (2, (*FIT, "--normalise", "units"), "did you mean 'unit'"),
    (2, (*FIT, "--retrieval", "knn"), "unknown retrieval 'knn'"),
    (2, (*FIT, "--retrieval", "nn,csls", "s1"), "name one"),
    (2, (*FIT, "--on-bad", "ignore"), "it is fail or skip"),
    (2, (*FIT, "-o", "map.txt"), "a map is a .safetensors file"),
    (2, (*FIT, "--compare", "-o", "map.safetensors"), "keeps none"),
    (2, (*FIT, "--compare", "--map", "linear"), "measures three maps"),
    (2, ("s.vec", "t.vec", "--apply", "m.safetensors", "--refine", 2), "--apply uses a map as it is"),
    (2, ("s.vec", "t.vec", "--apply", "m.safetensors", "--map", "linear"), "--apply uses a map as it is"),
    (2, ("s.vec", "t.vec", "--apply", "m.safetensors", "--retrieval", "nn,csls"), "name one"),
    (3, ("s.vec", "t.vec", "--apply", "m.safetensors"), "m.safetensors: no such file"),
    (3, ("none.vec", *FIT[1:]), "none.vec: no such file"),
    (3, (*FIT, "s99"), "s.vec has no word 's99' (did you mean 's9'"),
    (3, ("t.vec", "s.vec", *FIT[2:], "-o", "map.safetensors"), "train.txt: none of its 30 words, such as 's0'"),
    (3, ("s.vec", "t.vec", "--dictionary", "train.txt", "--test", "other.txt"), "other.txt: none of its 1 words"),
    (3, ("s.vec", "five.vec", *FIT[2:], "-o", "map.safetensors"), "the source has 8 and the target 5"),
    (3, ("ragged.vec", *FIT[1:], "-o", "map.safetensors"), "ragged.vec line 3: 7 numbers, not 8"),
    (3, ("twice.vec", *FIT[1:], "-o", "map.safetensors"), "twice.vec line 62: 's0' again, which stands in line 2"),
    (3, ("nan.vec", *FIT[1:], "-o", "map.safetensors"), "nan.vec line 3: the number nan is not finite"),
    (3, ("few.vec", *FIT[1:], "-o", "map.safetensors"), "few.vec line 1: it says that 70 words follow, but 60 do"),
    (3, ("latin.vec", *FIT[1:], "-o", "map.safetensors"), "latin.vec line 3: the word"),
    (3, (*FIT[:3], "latin.txt", "-o", "map.safetensors"), "latin.txt line 2: byte 1 is not UTF-8"),
    (3, (*FIT[:3], "bad.txt", "-o", "map.safetensors"), "bad.txt line 1: 1 words"),
    (3, ("s.vec", "t.vec", "--induce", "a.txt", "short.txt"), "a.txt has 200 lines and short.txt 1"),
]


@pytest.mark.parametrize(("code", "words", "why"), WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(place, gencli, code, words, why):
    lines = Path("s.vec").read_text().splitlines()
    Path("ragged.vec").write_text("\n".join([*lines[:2], lines[2].rpartition(" ")[0], *lines[3:]]) + "\n")
    Path("twice.vec").write_text("\n".join([f"{N + 1} 8", *lines[1:], lines[1]]) + "\n")
    vectors.write("five.vec", [f"t{i}" for i in range(N)], np.ones((N, 5), np.float32))
    Path("nan.vec").write_text("\n".join([*lines[:2], lines[2].rpartition(" ")[0] + " nan", *lines[3:]]) + "\n")
    Path("few.vec").write_text("\n".join([f"{N + 10} 8", *lines[1:]]) + "\n")
    Path("latin.vec").write_bytes("\n".join([*lines[:2], "\xe9" + lines[2], *lines[3:]]).encode("latin-1") + b"\n")
    Path("latin.txt").write_bytes(b"s40 t40\n\xe9 t41\n")
    Path("other.txt").write_text("x y\n")
    Path("bad.txt").write_text("alone\n")
    Path("short.txt").write_text("t1\n")
    before = set(Path().iterdir())
    found, rows, err = gencli(*words)
    first, *hint = err.splitlines()
    assert found == code and first.startswith("error: ") and why in first and len(hint) <= 1
    assert set(Path().iterdir()) == before and not rows


def test_skipped_rows_are_counted(place, gencli):
    Path("s.vec").write_text(Path("s.vec").read_text() + "s0 1\n")
    assert gencli(*FIT)[0] == 3
    code, (row,), err = gencli(*FIT, "--on-bad", "skip")
    assert code == 0 and row["p_at_1"] == 1 and "s.vec: 2 rows left out, the first at line 62: 1 numbers, not 8" in err


def test_vectors_of_zeros_are_named(place, gencli):
    x = vectors.read("s.vec").x
    x[[3, 55]] = 0
    vectors.write("s.vec", [f"s{i}" for i in range(N)], x)
    code, _, err = gencli(*FIT)
    assert code == 0 and "s.vec: 2 of its 60 vectors are zero: they have no direction" in err
    vectors.write("s.vec", [f"s{i}" for i in range(N)], 0 * x)
    code, rows, err = gencli(*FIT)
    assert code == 3 and not rows and "s.vec: all its vectors are zero" in err


def test_words_of_stdin_that_are_not_utf8(place, gencli, monkeypatch):
    assert gencli(*FIT, "-o", "map.safetensors")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"s1\n\xff\n")))
    code, rows, err = gencli("s.vec", "t.vec", "--apply", "map.safetensors")
    assert code == 3 and [row["word"] for row in rows] == ["s1"] and "standard input line 2: not UTF-8" in err
    monkeypatch.setattr(sys, "stdin", None)
    assert gencli("s.vec", "t.vec", "--apply", "map.safetensors")[0] == 2


@pytest.mark.skipif(not BLI.is_dir(), reason="needs GENCLI_DATA with bli/")
def test_the_figures_of_en_es(gencli):
    sides = [BLI / f"vectors/es-en/word2vec.{side}.gz" for side in ("en", "es")]
    dictionaries = ["--dictionary", BLI / "muse/en-es.0-5000.txt.gz", "--test", BLI / "muse/en-es.5000-6500.txt.gz"]
    code, rows, _ = gencli(*sides, *dictionaries, "--compare")
    assert code == 0 and [round(100 * row["p_at_1"], 1) for row in rows[:3]] == [74.8, 75.3, 76.1]
    assert all(row["words"] == 461 and row["pairs"] == 2567 for row in rows[:3])
