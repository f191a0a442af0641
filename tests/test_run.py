"""The run folder: one number, one writer, and metrics that do not show where a run was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gencli import checkpoint, run
from gencli.console import DataError, GencliError, UsageError
from gencli.run import Run, find, list_runs, newest


def child(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import sys; from gencli.run import Run; {code}", *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def make(root: Path, name: str = "tiny", start: str | None = None) -> Path:
    with Run.create(root, name) as r:
        if start:
            r.update(start=start)
        return r.path


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Another process that holds a run."""
    process = child("r = Run.create(sys.argv[1], 'held'); print(r.path, flush=True); sys.stdin.read()", tmp_path)
    assert process.stdout is not None
    yield Path(process.stdout.readline().strip()), process
    process.kill()
    process.communicate()


# ---------------------------------------------------------------------- numbers and names


def test_numbers_and_names(tmp_path: Path) -> None:
    root = tmp_path / "new" / "runs"
    assert make(root, "pixelcnn-digits") == root / "0001-pixelcnn-digits"
    assert make(root, "vae points/moons") == root / "0002-vae-points-moons"
    assert make(root, "../../x").parent == root
    (root / "0041-older").mkdir()
    (root / "notes").mkdir()
    (root / "9999-a-file").touch()
    assert make(root).name == "0042-tiny"
    (root / "9999-x").mkdir()
    assert make(root).name == "10000-tiny"
    assert make(root).name == "10001-tiny"
    assert not [p for p in root.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("pick", [lambda i: "same", lambda i: f"name{i}"])
def test_threads_get_different_numbers(tmp_path: Path, pick: Callable[[int], str]) -> None:
    with ThreadPoolExecutor(20) as pool:
        folders = list(pool.map(lambda i: run._allocate(tmp_path, pick(i)), range(60)))
    assert sorted(int(f.name[:4]) for f in folders) == list(range(1, 61))
    assert all(f.is_dir() for f in folders)


def test_processes_get_different_numbers(tmp_path: Path) -> None:
    code = "sys.stdin.read(); [print(Run.create(sys.argv[1], sys.argv[2]).path.name) for _ in range(5)]"
    children = [child(code, tmp_path, f"name{i}") for i in range(4)]
    for c in children:
        assert c.stdin is not None
        c.stdin.close()  # the start
    names = [line for c in children for line in (c.stdout or ()) if c.wait() == 0]
    assert sorted(int(name[:4]) for name in names) == list(range(1, 21))


def test_out_is_taken_as_it_is(tmp_path: Path) -> None:
    with Run.create(tmp_path / "runs", "x", out=tmp_path / "deep" / "out") as r:
        assert r.path == tmp_path / "deep" / "out" and not (tmp_path / "runs").exists()
        r.write_recipe("seed: 1\n")
    (tmp_path / "empty").mkdir()
    Run.create(out=tmp_path / "empty").close()
    (tmp_path / "file").touch()
    for taken in ("deep/out", "deep", "file"):
        before = sorted((tmp_path / "deep").rglob("*"))
        with pytest.raises(UsageError, match=f"{taken} exists and is not an empty folder"):
            Run.create(out=tmp_path / taken)
        assert sorted((tmp_path / "deep").rglob("*")) == before


def test_out_may_hold_what_fell_before_there_was_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Run.create(out=out) as fallen:
        fallen.update(seed=7)
    (out / ".run.json.1.tmp").write_text("{")
    with Run.create(out=out) as r:
        assert r.record["seed"] is None
    (out / "notes.txt").touch()  # somebody's
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        Run.create(out=out)


# ---------------------------------------------------------------------- lock


def test_one_writer(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    path, process = holder
    for _ in range(2):  # a refused attempt does not free the lock
        began = time.monotonic()
        with pytest.raises(GencliError, match="is being written by another process") as caught:
            Run.open(path)
        assert caught.value.exit_code == 1 and time.monotonic() - began < 2
    assert [r["state"] for r in list_runs(path.parent)] == ["running"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [r["state"] for r in list_runs(path.parent)] == ["killed"]
    with Run.open(path) as again:  # at once
        assert again.record["state"] == "running"


def test_a_killed_owner_frees_the_lock_though_its_children_live(tmp_path: Path) -> None:
    code = (
        "import os, time; r = Run.create(sys.argv[1], 'x'); pid = os.fork(); "
        "pid or time.sleep(60); print(pid, r.path, flush=True); time.sleep(60)"
    )
    process = child(code, tmp_path)
    assert process.stdout is not None
    worker, path = process.stdout.readline().split()
    process.kill()
    process.wait()
    try:
        os.kill(int(worker), 0)
        Run.open(path).close()
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_looking_at_runs_frees_no_lock_of_ours(tmp_path: Path) -> None:
    code = "Run.open(sys.argv[1])"
    with Run.create(tmp_path, "mine") as mine:
        assert list_runs(tmp_path)[0]["state"] == "running"
        with pytest.raises(GencliError, match="another"):
            Run.open(mine.path)
        assert child(code, mine.path, stderr=subprocess.DEVNULL).wait() == 1  # still ours
    assert child(code, mine.path).wait() == 0


def test_two_starts_at_once(tmp_path: Path) -> None:
    path = make(tmp_path)
    code = "sys.stdin.readline(); r = Run.open(sys.argv[1]); print('won', flush=True); sys.stdin.readline()"
    children = [child(code, path, stderr=subprocess.PIPE) for _ in range(4)]
    for c in children:
        assert c.stdin is not None
        c.stdin.write("go\n")
        c.stdin.flush()
    deadline = time.monotonic() + 20
    while sum(c.poll() is not None for c in children) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    outputs = [c.communicate("end\n") for c in children]
    assert sorted(out for out, _ in outputs) == ["", "", "", "won\n"]
    assert sum("being written by another process" in err for _, err in outputs) == 3


# ---------------------------------------------------------------------- run.json


def test_record(tmp_path: Path) -> None:
    with Run.create(tmp_path, "tiny") as r:
        first = json.loads((r.path / "run.json").read_text())
        assert tuple(first) == run.KEYS
        assert first["state"] == "running" and first["end"] is None and first["step"] is None
        stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
        assert re.fullmatch(stamp, first["start"])
        assert first["python"] == ".".join(map(str, sys.version_info[:3]))
        assert set(first["machine"]) == {"system", "cpu", "cores", "memory_gb"}
        assert first["machine"]["cores"] >= 1 and first["machine"]["memory_gb"] > 0.1
        best = {"step": 3, "metric": "nats", "value": np.float32(1.5)}
        r.update(step=3, best=best, parameters=np.int64(7), data={"name": "x", "digests": {"val": "ab"}})
        with pytest.raises(KeyError, match="spet"):
            r.update(spet=3)
        r.finish("done")
        r.write_recipe("seed: 0\n")
    last = run.read_record(r.path)
    assert (last["state"], last["step"], last["best"], last["parameters"]) == ("done", 3, {**best, "value": 1.5}, 7)
    assert re.fullmatch(stamp, last["end"]) and last["start"] == first["start"]
    assert (r.path / "recipe.yaml").read_text() == "seed: 0\n"
    with Run.open(r.path) as again:
        assert again.record == {**last, "state": "running", "end": None} == run.read_record(r.path)


def test_torch_version_without_torch() -> None:
    import torch

    code = "from gencli import run; print(run.environment()['torch']); assert 'torch' not in sys.modules"
    out, _ = child(code).communicate(timeout=60)
    assert out.strip() == torch.__version__.split("+")[0] or out.strip() == torch.__version__


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run.environment()["git"] is None

    def git(*args: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *args], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert run.environment()["git"] is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    (tmp_path / "untracked").touch()
    assert run.environment()["git"] == {"sha": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert run.environment()["git"]["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert run.environment()["git"] is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":1}', "\xff", "[" * 10000])
def test_bad_record(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="is not a run folder") as caught:
        Run.open(tmp_path)
    assert caught.value.hint == "gencli runs"
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"run\.json"):
        Run.open(tmp_path)
    assert list_runs(tmp_path.parent) == []


def test_open_sweeps(tmp_path: Path) -> None:
    path = make(tmp_path)
    leftovers = [
        path / ".run.json.ab.tmp",
        path / "samples" / ".x.png.ab.tmp",
        path / "checkpoints" / ".best.json.a.tmp",
    ]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.touch()
    (path / "checkpoints" / ".step-000003.tmp-77").mkdir()
    damaged = path / "checkpoints" / "step-000003"
    damaged.mkdir()
    Run.open(path).close()
    assert not any(p.exists() for p in leftovers) and checkpoint.steps(path) == []
    assert os.listdir(path / "checkpoints") == ["damaged-000003-0"]
    assert (path / ".lock").exists()


# ---------------------------------------------------------------------- metrics


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics(tmp_path: Path) -> None:
    with Run.create(tmp_path, "x") as r:
        r.metric("train", 1, loss=np.float32(0.5), time=1.25, bad=float("nan"), worse=[float("inf"), 1])
        r.metric("eval", 1, data="digits@val", nats=2.0)
        first, second = lines(r.path)  # on disk without closing
        assert first.pop("time")["seconds"] == 1.25 and second.pop("time")["seconds"] is None
        assert first == {"event": "train", "step": 1, "loss": 0.5, "bad": None, "worse": [None, 1]}
        assert second == {"event": "eval", "step": 1, "data": "digits@val", "nats": 2.0}
        r.log("grün")
        r.log("zwei")
        assert (r.path / "log.txt").read_text(encoding="utf-8") == "grün\nzwei\n"


def test_a_resumed_run_writes_the_metrics_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def bare(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "time"} for line in lines(path)]

    def go_on(r: Run, start: int, stop: int) -> None:
        for step in range(start, stop):
            r.metric("train", step, loss=1 / step, time=step)
            if step % 3 == 0:
                r.metric("eval", step, nats=step / 7)

    with Run.create(tmp_path, "whole") as whole:
        go_on(whole, 1, 11)
    torn_lines = [
        b"",
        b'{"event": "train", "st',
        b'{"event": "train", "step": 2}',
        b"\0\0\0\0\n",
        b'{"a": 1}\n',
        b"7\n",
    ]
    for saved in (0, 1, 6):
        for torn in torn_lines:
            with Run.create(tmp_path, "cut") as cut:
                go_on(cut, 1, 8)
            with open(cut.path / "metrics.jsonl", "ab") as file:
                file.write(torn)
            with Run.open(cut.path) as r:
                r.truncate_metrics(saved)
                go_on(r, saved + 1, 11)
                assert bare(r.path) == bare(whole.path)


def test_truncate_while_open_and_without_a_file(tmp_path: Path) -> None:
    with Run.create(tmp_path, "x") as r:
        r.truncate_metrics(5)
        assert not (r.path / "metrics.jsonl").exists()
        for step in (1, 2, 3):
            r.metric("train", step)
        r.truncate_metrics(1)
        r.metric("train", 9)
        assert [line["step"] for line in lines(r.path)] == [1, 9]


# ---------------------------------------------------------------------- finding


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for look in (newest, lambda: find(None)):
        with pytest.raises(DataError, match="no runs in runs") as caught:
            look()
        assert caught.value.hint == "gencli train pixelcnn"
    assert list_runs() == []
    one, two = make(Path("runs"), "vae-digits"), make(Path("runs"), "pixelcnn-digits")
    assert find("1") == find("0001") == one and find("2") == find(two) == find("0002-pixelcnn-digits") == two
    assert find(None) == newest() == two
    (tmp_path / "model.safetensors").touch()
    assert find("model.safetensors") == Path("model.safetensors")
    with pytest.raises(DataError, match=r"'0002-pixelcn-digits' \(did you mean '0002-pixelcnn-digits'\?\)") as caught:
        find("0002-pixelcn-digits")
    assert caught.value.hint == "gencli runs"
    for what in ("3", "x" * 5000, "\0"):
        with pytest.raises(DataError, match="no run or checkpoint"):
            find(what)


def test_newest_is_the_one_that_started_last(tmp_path: Path) -> None:
    a = make(tmp_path, "a", "2030-01-01T00:00:00.000+00:00")
    b = make(tmp_path, "b", "2029-01-01T00:00:00.000+00:00")
    (tmp_path / "0009-not-a-run").mkdir()
    assert [r["path"] for r in list_runs(tmp_path)] == [b, a] and newest(tmp_path) == a
    with Run.create(out=tmp_path / "mine") as r:
        r.update(start="2031-01-01T00:00:00.000+00:00")
    assert newest(tmp_path) == tmp_path / "mine"
