"""Checkpoints: nothing lost whenever the writer dies, nothing believed that a file says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from gencli import checkpoint, files, header, models
from gencli.console import DataError, Diverged, GencliError
from gencli.contract import Config, DataSpec, Model

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and peak memory in Linux's unit")
MODEL, TRAINING, MANIFEST = "model.safetensors", "training.safetensors", "manifest.json"


class TinyConfig(Config):
    width: int = 3
    depth: int = 0


class Tiny(Model):
    """Two tied matrices, a counter and a mask: one of each that a checkpoint has to get right."""

    Config = TinyConfig

    def __init__(self, config: TinyConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if config.width < 1:
            raise ValueError("width\nof \x1b[31mnothing")
        self.a = nn.Linear(spec.dims, config.width)
        self.tied = nn.Linear(spec.dims, config.width, bias=False)
        self.tied.weight = self.a.weight
        self.deeper = nn.ModuleList(nn.Linear(1, 1) for _ in range(config.depth))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([True, False]))


SPEC = DataSpec(name="points", kind="points", shape=(2,))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = models.Entry("tiny", "tests.test_checkpoint:Tiny", "test", "", "", 2000, "", ())
    monkeypatch.setitem(models.TABLE, "tiny", entry)


def make_model(value: float = 1.0, **config: int) -> Tiny:
    model = Tiny(TinyConfig(**config), SPEC)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p) + value)
    return model


def make_meta(step: int = 1, **fields: Any) -> dict[str, Any]:
    meta = {
        "model": "tiny",
        "config": TinyConfig().model_dump(mode="json"),
        "spec": SPEC.model_dump(mode="json"),
        "recipe": {"lr": 1e-4, "title": "grün"},
        "step": step,
        "chunk": 64,
        "versions": {"gencli": "0", "torch": "0"},
    }
    return {**meta, **fields}


def write(run: Path, step: int, value: float = 1.0, **meta: Any) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    model = make_model(value)
    checkpoint.save(
        folder,
        model,
        meta=make_meta(step, **meta),
        ema={"a.weight": model.a.weight.detach() * 10},
        training={"optimiser/0/m": torch.full((2, 2), value)},
        training_meta={"number": step},
    )
    return folder


def value_of(folder: Path) -> float:
    """Load everything of a checkpoint, and return the value it was written with (in all of its files)."""
    checkpoint.verify(folder)
    model = Tiny(TinyConfig(), SPEC)
    state = checkpoint.load_state(folder, model)
    value = model.a.bias[0].item()
    assert torch.equal(state.training["optimiser/0/m"], torch.full((2, 2), value))
    return value


def craft(path: Path, head: Any, data: bytes = b"", meta: Any = None) -> Path:
    """A safetensors file of our own making; ``head`` a dict, or the header's bytes."""
    if isinstance(head, dict):
        head = json.dumps({"__metadata__": {"gencli": files.canonical(meta or make_meta())}, **head}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def refused(path: Path, *words: str) -> str:
    """Loading ``path`` fails at once with one line that names it; returns that line."""
    began = time.process_time()  # not the wall clock: the machine may be busy
    with pytest.raises(DataError) as caught:
        checkpoint.load(path)
    assert time.process_time() - began < 1
    line = str(caught.value)
    assert str(path) in line and len(line.splitlines()) == 1 and line.isprintable(), line
    assert all(word in line for word in words), line
    assert caught.value.exit_code == 3
    return line


# ---------------------------------------------------------------------- in and out


def test_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, 2.0)
    before = torch.get_rng_state()
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())  # loading draws nothing from anyone else's generator
    assert (loaded.step, loaded.weights, loaded.path) == (7, "ema", folder / MODEL)
    assert loaded.meta == make_meta(7)
    m = loaded.model
    grid = torch.arange(6.0).view(3, 2) + 2
    assert torch.equal(m.a.weight, grid * 10) and torch.equal(m.a.bias, torch.arange(3.0) + 2)
    assert m.tied.weight is m.a.weight and m.count.dtype == torch.long and m.mask.tolist() == [True, False]
    assert not m.training and not any(p.requires_grad for p in m.parameters())
    raw = checkpoint.load(folder / MODEL, weights="raw")
    assert raw.weights == "raw" and torch.equal(raw.model.a.weight, grid)

    fresh = Tiny(TinyConfig(), SPEC)
    state = checkpoint.load_state(folder, fresh)
    assert torch.equal(fresh.a.weight, grid) and torch.equal(state.ema["a.weight"], grid * 10)
    assert state.meta == make_meta(7) and state.training_meta == {"number": 7} and list(state.ema) == ["a.weight"]
    tensors, meta = checkpoint.load_training(folder)
    assert meta == {"number": 7} and torch.equal(tensors["optimiser/0/m"], torch.full((2, 2), 2.0))
    json.loads((folder / MANIFEST).read_text())
    assert sorted(os.listdir(folder)) == [MANIFEST, MODEL, TRAINING]


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert (folder / MODEL).stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o777 == 0o750


def test_raw_where_nothing_was_averaged(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000001"
    checkpoint.save(folder, make_model(), meta=make_meta(), ema=None, training={}, training_meta={})
    assert checkpoint.load(folder, weights="ema").weights == "raw"
    assert checkpoint.load_training(folder) == ({}, {})


def test_float64_run_loads_for_use_in_float32(tmp_path: Path) -> None:
    model = make_model(1 / 3).double()
    folder = tmp_path / "checkpoints" / "step-000001"
    recipe = {"train": {"precision": "float64"}}
    save = {"ema": {"a.bias": model.a.bias.detach() * 2}, "training": {}, "training_meta": {}}
    checkpoint.save(folder, model, meta=make_meta(recipe=recipe), **save)
    loaded = checkpoint.load(folder).model
    assert loaded.a.bias.dtype == torch.float32 and torch.equal(loaded.a.bias, (model.a.bias * 2).float())
    again = make_model(0).double()
    checkpoint.load_state(folder, again)
    assert torch.equal(again.a.weight, model.a.weight)
    other = tmp_path / "checkpoints" / "step-000002"
    checkpoint.save(other, model, meta=make_meta(), **save)
    with pytest.raises(DataError, match=r"is torch\.float64"):
        checkpoint.load(other)


BYTES = """
import sys
import torch
from tests.test_checkpoint import write
from pathlib import Path
write(Path(sys.argv[1]), 3)
"""


def test_equal_state_equal_bytes_in_every_process(tmp_path: Path) -> None:
    folder = write(tmp_path / "here", 3)
    env = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", BYTES, str(tmp_path / "there")], check=True, env=env, timeout=60)
    for again in ("there", *map(str, range(5))):
        if again != "there":
            write(tmp_path / again, 3)
        for name in (MODEL, TRAINING, MANIFEST):
            there = tmp_path / again / "checkpoints" / "step-000003" / name
            assert there.read_bytes() == (folder / name).read_bytes()


def test_header_agrees_with_the_library(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    meta, tensors = header.read_header(folder / MODEL)
    assert meta == make_meta(1)
    known = load_file(folder / MODEL)
    assert {n: s for n, (_, s) in tensors.items()} == {n: tuple(t.shape) for n, t in known.items()}
    assert tensors["count"] == ("I64", ()) and tensors["mask"] == ("BOOL", (2,)) and tensors["a.bias"] == ("F32", (3,))
    every = {name: torch.zeros(1, dtype=getattr(torch, name)) for _, name in header.DTYPES.values()}
    (tmp_path / "all").write_bytes(to_bytes(every, metadata={"gencli": "{}"}))
    found = header.read_header(tmp_path / "all")[1]
    assert len(found) == 14 and all(header.DTYPES[d][1] == name for name, (d, _) in found.items())
    assert all(t.element_size() == header.DTYPES[found[name][0]][0] for name, t in every.items())


def test_header_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, 1)
    code = (
        "import sys; from gencli import checkpoint, header; "
        f"header.read_header(checkpoint.resolve({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("where", ["weight", "average", "training"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_not_written(tmp_path: Path, where: str, bad: float) -> None:
    model, ema, training = make_model(), {"a.bias": torch.zeros(3)}, {"v": torch.zeros(2, dtype=torch.float64)}
    target = {"weight": model.a.bias.data, "average": ema["a.bias"], "training": training["v"]}[where]
    target[1] = bad
    folder = tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(Diverged, match=r"'(a\.bias|ema/a\.bias|v)' is not finite"):
        checkpoint.save(folder, model, meta=make_meta(), ema=ema, training=training, training_meta={})
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- which one


def test_best_latest_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no checkpoint yet"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path, missing_ok=True) is None and checkpoint.steps(tmp_path) == []
    folders = {s: write(tmp_path, s, s) for s in (1, 2, 3, 4, 10, 1000000)}
    assert [s for s, _ in checkpoint.steps(tmp_path)] == list(folders)
    assert checkpoint.latest(tmp_path) == folders[1000000] == checkpoint.resolve(tmp_path).parent
    checkpoint.mark_best(tmp_path, step=2, metric="bits_per_dim", value=1.5)
    record = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert record == {"step": 2, "metric": "bits_per_dim", "value": 1.5}
    assert checkpoint.best(tmp_path) == folders[2] == checkpoint.resolve(tmp_path).parent
    checkpoint.prune(tmp_path, keep=2, protect=[3])
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [2, 3, 10, 1000000]
    checkpoint.prune(tmp_path, keep=0)
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [2, 1000000]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.json", "step-000002", "step-1000000"]

    (folders[2] / TRAINING).unlink()
    assert checkpoint.resolve(tmp_path).parent == folders[1000000]
    assert "no such file; using the latest checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}', '{"step": 77}', '{"step": 1, "step": 1}'])
def test_a_bad_best_is_ignored(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 1)
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    assert checkpoint.best(tmp_path) is None and checkpoint.resolve(tmp_path).parent == folder


def test_falls_back_when_the_newest_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path, s, s) for s in (1, 2, 3)]
    flip(folders[2] / MODEL, -1, 3)
    (folders[1] / MANIFEST).unlink()
    assert checkpoint.latest(tmp_path) == folders[0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "SHA-256" in said[0] and str(folders[2]) in said[0] and MANIFEST in said[1]
    with pytest.raises(DataError, match="SHA-256"):
        checkpoint.load(folders[2])
    flip(folders[0] / TRAINING, -1, 0)
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path, missing_ok=True)
    # set aside, they no longer hide from prune that the last good one is not among the newest
    checkpoint.sweep(tmp_path / "checkpoints")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"damaged-00000{i}-0" for i in (1, 2, 3)]


def test_resolve_refuses_by_name(tmp_path: Path) -> None:
    for what, words in [("nothing", "no such file"), (".", "neither a run nor a checkpoint"), ("\0", "null")]:
        with pytest.raises(DataError, match=words):
            checkpoint.resolve(tmp_path / what)
    folder = write(tmp_path, 1)
    (folder / MODEL).unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: no such file") as caught:
        checkpoint.load(folder)
    assert caught.value.hint == "gencli runs"


# ---------------------------------------------------------------------- faults in writing

FAULTY = ["mkdir", "fsync", "replace", "rename", "unlink", "rmdir", "fdopen"]


class Faults:
    """Does ``act`` instead of (``torn``: halfway into) the k-th call that changes the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], for_ever: bool = False) -> None:
        self.left, self.act, self.for_ever = 0, act, for_ever
        for name in FAULTY:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 or (self.for_ever and self.left < 0):
                if name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                self.act()
            return real(*args, **kwargs)

        return call


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hidden(run: Path) -> list[str]:
    return [str(p) for p in run.rglob("*") if p.name.startswith(".")]


def check_after_fault(run: Path, replaced: bool) -> float:
    """What must hold after a fault and a sweep: the value found in step 2, 0 if it is not there."""
    checkpoint.sweep(run / "checkpoints")
    assert hidden(run) == []
    assert value_of(run / "checkpoints" / "step-000001") == 1
    newest = checkpoint.latest(run)
    assert newest is not None
    found = value_of(newest)
    assert found in ((2, 3) if replaced else (1, 3))
    checkpoint.load(run)
    return found


@pytest.mark.parametrize("replaced", [False, True])
def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    outcomes = set()
    for for_ever in (False, True):
        for k in range(1, 100):
            run = tmp_path / f"{k}-{for_ever}"
            write(run, 1, 1)
            if replaced:
                write(run, 2, 2)
            with monkeypatch.context() as patch:
                faults = Faults(patch, no_space, for_ever)
                faults.left = k
                try:
                    write(run, 2, 3)
                except GencliError as error:
                    assert "No space left on device" in str(error) and "step-000002" in str(error)
                    failed = True
                else:
                    failed = False
                done = faults.left > 0
            if not for_ever:  # one failed call is put right on the spot, not just at the next start
                assert value_of(checkpoint.latest(run)) in ((2, 3) if replaced else (1, 3))  # type: ignore[arg-type]
            found = check_after_fault(run, replaced)
            assert failed or found == 3
            outcomes.add(found)
            if done:
                break
        else:
            pytest.fail("never finished")
        assert k > 15
    assert outcomes == ({2, 3} if replaced else {1, 3})


@pytest.mark.parametrize("replaced", [False, True])
def test_a_killed_writer_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    outcomes = []
    for k in range(1, 100):
        run = tmp_path / str(k)
        write(run, 1, 1)
        if replaced:
            write(run, 2, 2)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                Faults(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL)).left = k
                write(run, 2, 3)
                code = 0
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        outcomes.append(check_after_fault(run, replaced))
        if status == 0:
            break
    assert outcomes[-1] == 3 and outcomes == sorted(outcomes)  # the old one up to some call, the new one from there
    assert len(outcomes) > 15 and outcomes[0] != 3


def test_a_killed_prune_or_sweep_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(1, 100):
        run = tmp_path / str(k)
        for s in (1, 2, 3):
            write(run, s, s)
        (run / "checkpoints" / ".step-000004.tmp-123").mkdir()
        (run / "checkpoints" / ".best.json.abc.tmp").write_text("{")
        with monkeypatch.context() as patch:
            faults = Faults(patch, no_space)
            faults.left = k
            try:
                checkpoint.sweep(run / "checkpoints")
                checkpoint.prune(run, keep=1)
            except OSError:
                pass
            done = faults.left > 0
        for step, folder in checkpoint.steps(run):
            assert value_of(folder) == step
        assert value_of(run / "checkpoints" / "step-000003") == 3
        checkpoint.sweep(run / "checkpoints")
        assert hidden(run) == []
        if done:
            break
    assert k > 8


def test_saving_the_same_again_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 1)
    inode = (folder / MODEL).stat().st_ino
    with monkeypatch.context() as patch:
        Faults(patch, no_space, for_ever=True)
        write(tmp_path, 1)
    assert (folder / MODEL).stat().st_ino == inode
    flip(folder / TRAINING, -1, 1)
    write(tmp_path, 1)  # ... unless what is there is damaged
    assert value_of(folder) == 1


@linux
def test_order_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may reorder is fenced: contents before names, names before the folder's own name."""
    events: list[tuple[str, str]] = []
    fsync = os.fsync

    def record_sync(fd: int) -> None:
        fsync(fd)
        events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))

    def recorder(real: Callable[..., None]) -> Callable[..., None]:
        def record(src: Any, dst: Any) -> None:
            real(src, dst)
            events.append((str(src), str(dst)))

        return record

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", recorder(os.replace))
    monkeypatch.setattr(os, "rename", recorder(os.rename))
    folder = write(tmp_path / "run", 1)
    moves = [(i, src, dst) for i, (src, dst) in enumerate(events) if src != "fsync"]
    assert [Path(dst).name for _, _, dst in moves] == [MODEL, TRAINING, MANIFEST, folder.name]
    for i, src, dst in moves:
        assert ("fsync", src) in events[:i]
        assert ("fsync", str(Path(dst).parent)) in events[i + 1 :]
    last = moves[-1][0]
    assert events[last - 1] == ("fsync", moves[-1][1])  # the folder's names are durable before it gets its own
    assert ("fsync", str(tmp_path / "run")) in events  # a new "checkpoints" is a name, too


def test_disk_full_for_real(tmp_path: Path) -> None:
    """Every budget of bytes a file may have: the write fails in one line and leaves the old checkpoint."""
    write(tmp_path, 1)
    size = max((tmp_path / "checkpoints" / "step-000001" / n).stat().st_size for n in (MODEL, TRAINING))
    for budget in [*range(0, size, size // 12), size - 1]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (budget, budget))
                try:
                    write(tmp_path, 2)
                except GencliError as error:
                    code = 7 if "File too large" in str(error) else 8
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert hidden(tmp_path) == [] and value_of(tmp_path / "checkpoints" / "step-000001") == 1
        assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]


# ---------------------------------------------------------------------- faults and malice in reading


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("lone", [False, True])
def test_every_truncation_is_refused(tmp_path: Path, lone: bool) -> None:
    folder = write(tmp_path, 1)
    whole = (folder / MODEL).read_bytes()
    if lone:
        (folder / MANIFEST).unlink()
    for length in range(len(whole)):
        (folder / MODEL).write_bytes(whole[:length])
        with pytest.raises(DataError, match=MODEL):
            checkpoint.load(folder / MODEL)
    (folder / MODEL).write_bytes(whole)
    checkpoint.load(folder / MODEL)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder, draw = write(tmp_path, 1), random.Random(0)
    for name in (MODEL, TRAINING):
        whole = (folder / name).read_bytes()
        for _ in range(250):
            flip(folder / name, draw.randrange(len(whole)), draw.randrange(8))
            with pytest.raises(DataError, match=name):
                checkpoint.verify(folder)
            with pytest.raises(DataError, match=name):
                checkpoint.load(folder) if name == MODEL else checkpoint.load_training(folder)
            (folder / name).write_bytes(whole)
    checkpoint.verify(folder)


def test_a_flipped_bit_in_a_lone_file_never_makes_a_traceback(tmp_path: Path) -> None:
    draw, path = random.Random(1), tmp_path / "m.safetensors"
    whole = (write(tmp_path, 1) / MODEL).read_bytes()
    loaded = 0
    for _ in range(500):
        path.write_bytes(whole)
        flip(path, draw.randrange(len(whole)), draw.randrange(8))
        try:
            checkpoint.load(path)
            loaded += 1
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert 0 < loaded < 450


def test_what_the_header_reader_accepts_the_library_accepts(tmp_path: Path) -> None:
    draw, path = random.Random(2), tmp_path / "m.safetensors"
    whole = (write(tmp_path, 1) / MODEL).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    accepted = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 2)):
            data[draw.randrange(8, end)] = draw.choice(b'0123456789[]{},:"FIU32-.e\\ \x00\xff')
        path.write_bytes(data)
        try:
            header.read_header(path)
        except DataError:
            continue
        accepted += 1
        safetensors.deserialize(bytes(data))
    assert 30 < accepted < 800


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, bytes(12), "hole"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [0, 4]}}, bytes(4), "overlap"),
    "not from 0": ({"a": {**F32, "data_offsets": [4, 8]}}, bytes(8), "hole"),
    "polyglot": ({"a": F32}, bytes(4) + b"PK\x03\x04 and more", "13 bytes too many"),
    "short": ({"a": F32}, bytes(3), "1 bytes missing"),
    "backwards": ({"a": {**F32, "data_offsets": [4, 0]}}, bytes(4), "do not fit"),
    "shape and span": ({"a": {**F32, "shape": [2]}}, bytes(4), "do not fit"),
    "overflow": ({"a": {**F32, "shape": [2**62, 4]}}, bytes(4), "do not fit"),
    "huge": ({"a": {**F32, "shape": [2**64]}}, bytes(4), "bad shape"),
    "negative": ({"a": {**F32, "shape": [-1]}}, bytes(4), "bad shape"),
    "fraction": ({"a": {**F32, "shape": [1.0]}}, bytes(4), "bad shape"),
    "truth": ({"a": {**F32, "shape": [True]}}, bytes(4), "bad shape"),
    "65 dimensions": ({"a": {**F32, "shape": [1] * 65}}, bytes(4), "bad shape"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 4]}}, bytes(4), "bad offsets"),
    "dtype": ({"a": {**F32, "dtype": "F33"}}, bytes(4), "unknown dtype"),
    "dtype list": ({"a": {**F32, "dtype": ["F32"]}}, bytes(4), "unknown dtype"),
    "field": ({"a": {**F32, "pickle": 1}}, bytes(4), "exactly dtype"),
    "entry": ({"a": [1]}, bytes(4), "exactly dtype"),
    "duplicate": (b'{"a":1,"a":1}', b"", "duplicate key 'a'"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", "duplicate key 'dtype'"),
    "UTF-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "list": (b"[]", b"", "not a JSON object"),
    "blank": (b" {}", b"", "not a JSON object"),
    "NaN": (b'{"a":NaN}', b"", "NaN is not JSON"),
    "digits": (b'{"a":' + b"1" * 5000 + b"}", b"", "digits"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
    "torn": (b'{"a":', b"", "not JSON"),
    "empty": (b"{}", b"", "not written by gencli"),
    "metadata": (b'{"__metadata__":{"gencli":1}}', b"", "__metadata__"),
    "foreign": (b'{"__metadata__":{"format":"pt"}}', b"", "not written by gencli"),
    "gencli torn": (b'{"__metadata__":{"gencli":"{"}}', b"", "gencli metadata: not JSON"),
    "gencli list": (b'{"__metadata__":{"gencli":"[]"}}', b"", "gencli metadata: not a JSON object"),
    "gencli twice": (b'{"__metadata__":{"gencli":"{\\"a\\":1,\\"a\\":2}"}}', b"", "duplicate key 'a'"),
    "gencli bare": (b'{"__metadata__":{"gencli":"{}"}}', b"", "'model' is missing"),
    "terminal": ({"\x1b[2J\n\u202e": [1]}, b"", "exactly dtype"),
    "surrogate": (b'{"__metadata__":{"gencli":"{}"},"\\ud800":1}', b"", "exactly dtype"),
    "long name": ({"a" * 100_000: [1]}, b"", "exactly dtype"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    head, data, words = BAD_HEADERS[case]
    line = refused(craft(tmp_path / "m.safetensors", head, data), words)
    assert len(line) < len(str(tmp_path)) + 250


@linux
def test_long_headers_are_refused_unread(tmp_path: Path) -> None:
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = tmp_path / "m.safetensors"
    craft(path, b"{" + b",".join(entry % i for i in range(1_050_000)) + b"}")
    assert path.stat().st_size > 60e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "more than the 8388608")
    craft(path, b"{" + b",".join(entry % i for i in range(110_000)) + b"}")
    refused(path, "110000 tensors, more than the 100000")
    craft(path, b'{"a":1' + b',"b":1' * 1_300_000 + b"}")
    refused(path, "duplicate key 'b'")
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + b"{}")
    refused(path, "more than the 8388608")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a well-formed lone file with given changes to its tensors (None drops one) and its metadata."""
    base = load_file(write(tmp_path / "base", 1) / MODEL)

    def make(changes: dict[str, torch.Tensor | None] | None = None, **meta: Any) -> Path:
        tensors = {n: t for n, t in {**base, **(changes or {})}.items() if t is not None}
        path = tmp_path / "lone.safetensors"
        path.write_bytes(to_bytes(tensors, metadata={"gencli": files.canonical(make_meta(**meta))}))
        return path

    yield make


def test_tensors_must_be_the_models_own(lone: Callable[..., Path]) -> None:
    checkpoint.load(lone())
    nan = torch.tensor([1.0, float("nan"), 1.0])
    refused(lone({"a.bias": None}), "'a.bias' is missing")
    refused(lone({"a.bias": torch.zeros(4)}), "'a.bias' is torch.float32 [4], the model's is torch.float32 [3]")
    refused(lone({"a.bias": torch.zeros(3, dtype=torch.int32)}), "is torch.int32")
    refused(lone({"count": torch.zeros(1, dtype=torch.long)}), "'count'")
    refused(lone({"more": torch.zeros(1)}), "'more' is none of this model's")
    refused(lone({"../../x": torch.zeros(1)}), "'../../x' is none")
    refused(lone({"ema/count": torch.zeros((), dtype=torch.long)}), "'ema/count' is none")
    refused(lone({"ema/a.bias": torch.zeros(2)}), "'ema/a.bias' is torch.float32 [2]")
    refused(lone({"a.bias": nan}), "'a.bias' is not finite")
    refused(lone({"ema/a.weight": torch.full((3, 2), float("inf"))}), "'ema/a.weight' is not finite")
    checkpoint.load(lone({"ema/a.weight": None}))


def test_metadata_must_describe_a_model(lone: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        checkpoint.load(lone(model="tinny"))
    assert caught.value.hint == "gencli models"
    refused(lone(model="tinny"), "did you mean 'tiny'?")
    refused(lone(model="os:system"), "no model 'os:system'")
    refused(lone(model=None), "'model'")
    refused(lone(step=True), "'step'")
    refused(lone(chunk=0), "'chunk'")
    refused(lone(chunk=10**9), "'chunk'")
    refused(lone(config={"width": "wide"}), "TinyConfig 'width'")
    refused(lone(config={"widht": 3}), "TinyConfig 'widht'")
    refused(lone(config={"width": 0}), "cannot build tiny: width")
    refused(lone(spec={"name": "x"}), "DataSpec 'kind'")
    refused(lone(config={"width": 4}), "'a.bias' is torch.float32 [3], the model's is torch.float32 [4]")


@linux
@pytest.mark.parametrize("config", [{"width": 10**8}, {"width": 10**13}, {"depth": 10**9}])
def test_a_config_cannot_fill_the_memory(lone: Callable[..., Path], config: dict[str, int]) -> None:
    path, before = lone(config=config), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "cannot build tiny")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    make_model()  # and the watch is over: building goes on as before
    nn.Linear(10_000, 10_000)


FACT = '{"sha256":1,"bytes":1}'
BAD_MANIFESTS = [
    *("", "[]", "{}", '{"files": {}}', '{"files": {"../../x": {}}}', '{"files": [1]}', "\xff", "x" * 100_000),
    f'{{"step":1,"files":{{"{MODEL}":{FACT},"{TRAINING}":7}}}}',
    f'{{"step":1,"files":{{"{MODEL}":{FACT},"{TRAINING}":{FACT}}}}}',
]


@pytest.mark.parametrize("text", BAD_MANIFESTS, ids=range(len(BAD_MANIFESTS)))
def test_bad_manifests(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    for read in (checkpoint.verify, checkpoint.load, checkpoint.load_training, lambda f: checkpoint.load(f / MODEL)):
        with pytest.raises(DataError, match=str(folder)):
            read(folder)


def test_not_even_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DataError, match="neither a run nor a checkpoint"):
        checkpoint.load(tmp_path / "folder.safetensors")
    with pytest.raises(DataError, match="is a folder"):
        header.read_header(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    refused(Path("/dev/null"), "not a regular file")
    refused(tmp_path / "gone", "no such file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "too short")
    folder = write(tmp_path, 1)
    (tmp_path / "m.safetensors").symlink_to(folder / MODEL)
    checkpoint.load(tmp_path / "m.safetensors")
    shutil.rmtree(folder)
    (folder / MODEL).mkdir(parents=True)
    refused(folder / MODEL, "neither a run")

    secret = craft(tmp_path / "secret", {"a": F32}, bytes(4))
    secret.chmod(0)
    if os.geteuid() == 0:  # whom nothing is forbidden

        def forbid(*_: Any, **__: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("builtins.open", forbid)
    refused(secret, "Permission denied")


def test_the_manifest_holds_sha256(tmp_path: Path) -> None:
    folder = write(tmp_path, 12)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (MODEL, TRAINING):
        data = (folder / name).read_bytes()
        assert manifest["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert manifest["step"] == 12
