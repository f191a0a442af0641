"""The short version of ``python -m tests.fuzz``, watched by an audit hook; and archives that want out of place."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gencli import pictures, recipe, streams
from gencli.console import DataError, UsageError
from gencli.data.user import load_path
from tests import fuzz

# Runs the fuzzer in a child that notes every unpickling, every program or connection started, and every file, folder
# or link made outside of one folder; and then shows that it would have noted them.
WATCHED = """
import os, sys, tempfile
from pathlib import Path
from tests import fuzz
folder = Path(sys.argv[1]) / "deep" / "inside"
folder.mkdir(parents=True)
material = fuzz.material(folder)
fuzz.fuzz(material, len(fuzz.KINDS), 1, 1, 10**6)  # imports everything
seen = []
ACTS = {"os.mkdir": 0, "os.symlink": 1, "os.link": 1, "os.rename": 1, "os.truncate": 0, "os.chmod": 0}
def hook(event, args):
    if event.startswith(("pickle", "subprocess", "os.system", "os.exec", "os.fork", "os.posix", "socket.connect")):
        seen.append((event, str(args)[:80]))
    path = args[0] if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) else None
    path = args[ACTS[event]] if event in ACTS else path
    if isinstance(path, (str, bytes, os.PathLike)):
        where = os.path.realpath(os.fsdecode(path))
        if not where.startswith((os.path.realpath(folder) + os.sep, "/proc/")) and where != "/dev/null":
            seen.append((event, where))
sys.addaudithook(hook)
counts = fuzz.fuzz(material, 1400, 0, 60, 61)
print(fuzz.report(counts))
print("FAILURES", [f for c in counts.values() for f in c.failures])
print("SEEN", seen)
import pickle
pickle.loads(pickle.dumps(Exception))
open(folder.parent / "outside", "wb").close()
(folder.parent / "a folder").mkdir()
print("NOTICED", [event for event, _ in seen])
"""


def test_hostile_inputs_are_accepted_or_refused_and_run_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", WATCHED, str(tmp_path)]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "deep" / "inside" / "cache")}  # where nameless files may go
    here = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here, env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line[:2000] for line in lines[-3:]]
    assert told == ["FAILURES []", "SEEN []", "NOTICED ['pickle.find_class', 'open', 'os.mkdir']"]
    (total,) = [line.split() for line in lines if line.startswith("all ")]
    inputs, accepted, refused = map(int, total[1:4])
    assert inputs >= 1500 and accepted + refused == inputs and min(accepted, refused) > inputs / 20


def test_the_fuzzer_sees_what_is_wrong() -> None:
    def raising(error: BaseException) -> list[str]:
        def action() -> None:
            raise error

        count = fuzz.Count()
        fuzz.judged(count, "kind:0", action)
        return count.failures

    assert not raising(DataError("x: one line")) and raising(DataError("x: one\nline")) and raising(DataError(""))
    assert raising(ValueError("x")) and raising(fuzz.Stuck()) and raising(DataError("x" * 3000))
    count = fuzz.Count()
    fuzz.judged(count, "kind:1", lambda: np.ones(int(fuzz.MEGABYTES * 2**17 * 1.1)).sum())
    assert [f.split()[-1] for f in count.failures] == ["MB"]
    count = fuzz.Count()
    fuzz.judged(count, "kind:2", lambda: sum(range(10**8)))
    assert [f.split()[-1] for f in count.failures] == ["s"]


NAMES = ["../../outside.png", "/{tmp}/outside.png", "a/../../../outside.png", "./..//outside.png", "outside.png"]


@pytest.mark.parametrize("name", NAMES)
def test_members_are_read_by_name_and_never_extracted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with tarfile.open("x.tar", "w") as archive:
        body = pictures.png(np.full((2, 2), 7, np.uint8))
        info = tarfile.TarInfo(name.format(tmp=tmp_path))
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    before = sorted(map(str, tmp_path.rglob("*")))
    (chunk,) = streams.read("x.tar")
    assert (chunk.x == 7).all() and sorted(map(str, tmp_path.rglob("*"))) == before


KINDS = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]


@pytest.mark.parametrize("kind", [*KINDS, tarfile.GNUTYPE_SPARSE, b"Z"])
def test_links_and_devices_are_refused_and_never_made(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "../../../etc/passwd"
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"a\.png is a link or a device"):
        list(streams.read(str(path)))
    assert os.listdir(tmp_path) == ["x.tar"]


def npy(x: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, x, allow_pickle=False)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("a.npy", npy(np.array([1e300])), "not finite"),  # finite in float64 alone
        ("a.npy", b"\x93NUMPY\x01\x00\x04\x00{[(\n", "is damaged"),  # numpy's parser raises what is no ValueError
        ("a.npy", b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"[" * 9000, "is damaged"),
        ("a\nb.png", b"", "a\\?b"),
        ("a.json", b'{"levels": NaN}', "no JSON object"),
        ("a.json", b'{"levels": 1e999}', "no JSON object"),
        ("a.json", b'{"data": "\\ud800"}', "no JSON object"),
    ],
)
def test_what_the_fuzzer_has_found_in_streams(name: str, body: bytes, said: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    with pytest.raises(DataError, match=said) as caught:
        list(streams.read(str(tmp_path / "x.tar")))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.full((30, 2), 1e300)}, "not finite"),
        ({"x": np.zeros((30, 3, 3), np.uint8), "levels": np.array([2, 3])}, "levels must be one integer"),
        ({"x": np.zeros((30, 3, 3), np.uint8), "levels": np.array(np.inf)}, "levels must be one integer"),
        ({"x": np.zeros((30, 3, 3), np.uint8), "classes": np.array("one")}, "classes must be a list"),
        ({"a\nb": np.zeros(3)}, "neither x nor x_train"),
    ],
)
def test_what_the_fuzzer_has_found_in_arrays(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=said) as caught:
        load_path(tmp_path / "x.npz", "x", "train")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("override", ['data.root="\\ud800"', "\udcff=1", "a\nb=1", "train.lr=" + "x" * 9000])
def test_what_the_fuzzer_has_found_in_overrides(override: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.load("vae", [override])
    lines = str(caught.value).split("\n")
    assert len(lines) == 1 and len(lines[0]) < 1000 and lines[0].isprintable()
