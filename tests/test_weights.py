"""Weights of the Inception network: found, downloaded, converted; files of torch.save read without running them."""

import functools
import hashlib
import io
import os
import pickle
import re
import tracemalloc
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gencli import pickles
from gencli.console import DataError
from gencli.metrics import weights
from gencli.metrics.weights import inception_weights, packed
from gencli.rng import generator, seeded

FORMATS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "stacked": {"_use_new_zipfile_serialization": False},
    "stacked, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
formats = pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)


def saved(value, **how) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


def refused(data: bytes, most: int = 16 << 20) -> str:
    """What is said of a bad file: one line that names it, with advice, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as e:
            pickles.tensors(data, "bad.pth")
        assert tracemalloc.get_traced_memory()[1] < len(data) + most
    finally:
        tracemalloc.stop()
    text = str(e.value)
    assert text.startswith("bad.pth") and "\n" not in text and len(text) < 300
    assert "weights_only=True" in e.value.hint
    return text


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A module's state: OrderedDict with the attribute _metadata, counters, channels-last, shared memory."""
    with seeded("state"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2, bias=False))
        net[0].to(memory_format=torch.channels_last)
        shared = torch.randn(7, 6)
        net.register_buffer("part", shared[2:4, 1:])
        net.register_buffer("turned", shared.T)
        net.register_buffer("none", torch.zeros(0, 3))
        net.register_buffer("number", torch.tensor(2.5))
    return net.state_dict()


# ---- files of torch.save


@formats
def test_what_torch_saved_is_read(state, how):
    found = pickles.tensors(saved(state, **how), "a.pth")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@formats
def test_every_type_of_number(how):
    types = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    values = {str(t): torch.arange(-3, 300 if t.itemsize > 1 else 100).to(t) for t in types}
    values |= {"uint8": torch.arange(200).byte(), "bool": torch.tensor([True, False, True])}
    found = pickles.tensors(saved(values, **how), "a.pth")
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in values.items())


class Runs:
    """What runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@formats
def test_nothing_in_a_file_is_run(tmp_path, how):
    evil = tmp_path / "evil"
    for value in ({"a": torch.zeros(2), "b": Runs(evil)}, Runs(evil), OrderedDict(a=Runs(evil))):
        assert "its pickle asks for posix.system, which is not run" in refused(saved(value, **how))
    assert not evil.exists()


@formats
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (functools.partial(nn.Linear, 2, 2), "asks for torch.nn.modules.linear.Linear"),
        (lambda: {"a": nn.Parameter(torch.zeros(2))}, "asks for torch._utils._rebuild_parameter"),
        (lambda: {"a": np.zeros(2)}, "asks for numpy"),
        (lambda: {"a": {"b": torch.zeros(2)}}, "not a plain dictionary of tensors"),
        (lambda: [torch.zeros(2)], "not a plain dictionary of tensors"),
        (dict, "not a plain dictionary of tensors"),
        (lambda: {1: torch.zeros(2)}, "keys are not text"),
        (lambda: {"a": torch.zeros(2), "b": 1.5}, "instruction BINFLOAT"),
        (lambda: {"a": torch.zeros(1).expand(10**9)}, "beyond its storage"),
        (lambda: {"a": torch.zeros(2, dtype=torch.complex64)}, r"asks for torch.ComplexFloatStorage"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_named(how, value, says):
    assert says in refused(saved(value(), **how))


def archive(pickled: bytes, storage: bytes = bytes(8), compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in {"a/data.pkl": pickled, "a/data/0": storage, **more}.items():
            file.writestr(name, data)
    return out.getvalue()


def tensor(offset="K\0", size="K\2\x85", stride="K\1\x85", numel="K\2", kind="FloatStorage", key="0") -> bytes:
    """A pickle of {"x": a tensor}, its parts given as instructions."""
    text = (
        f"\x80\2}}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n{kind}\nX\1\0\0\0{key}"
        f"X\3\0\0\0cpu{numel}tQ{offset}{size}{stride}\x89ccollections\nOrderedDict\n)RtRs."
    )
    return text.encode("latin-1")


def test_a_pickle_by_hand():
    found = pickles.tensors(archive(tensor(), np.array([1, 2], np.float32).tobytes()), "a.pth")
    assert found["x"].tolist() == [1, 2]


BIG = "\x8a\x0a" + "\xff" * 9 + "\x00"  # 2**72 - 1
HOSTILE = {
    "offset": (tensor(offset="K\1"), "beyond its storage"),
    "negative offset": (tensor(offset="J\xff\xff\xff\xff"), "bad shape"),
    "size": (tensor(size="K\3\x85"), "beyond its storage"),
    "huge size": (tensor(size=BIG + "\x85"), "bad shape"),
    "repeated": (tensor(size="J\xff\xff\xff\x7f\x85", stride="K\0\x85"), "beyond its storage"),
    "negative size": (tensor(size="J\xff\xff\xff\xff\x85"), "bad shape"),
    "stride": (tensor(stride="K\2\x85"), "beyond its storage"),
    "strides": (tensor(stride="K\1K\1\x86"), "bad shape"),
    "true for a size": (tensor(size="\x88\x85"), "bad shape"),
    "numel": (tensor(numel="K\3"), "a/data/0 has 8 bytes, not 12"),
    "huge numel": (tensor(numel="J\xff\xff\xff\x7f"), "larger than what the file holds"),
    "type": (tensor(kind="UntypedStorage"), "torch.UntypedStorage"),
    "missing storage": (tensor(key="1"), "There is no item named 'a/data/1'"),
    "path": (tensor(key="/"), "There is no item named 'a/data//'"),
    "truncated": (tensor()[:-1], "pickle exhausted"),
    "cut": (tensor()[:40], "newline|exhausted|expected"),
    "empty": (b"", "exhausted"),
    "underflow": (b"\x80\2\x87.", "takes what is not there"),
    "no mark": (b"\x80\2t.", "takes what is not there"),
    "mark below": (b"\x80\2K\1(\x85t.", "takes what is not there"),
    "recall": (b"\x80\2h\5.", "recalls what it never kept"),
    "keep nothing": (b"\x80\2q\5.", "takes what is not there"),
    "append to a number": (b"\x80\2K\1K\1a.", "no list where one belongs"),
    "item of a number": (b"\x80\2K\1X\1\0\0\0aK\1s.", "no dict where one belongs"),
    "odd items": (b"\x80\2}(K\1u.", "keys are not text"),
    "build a number": (b"\x80\2K\1}b.", "no dict where one belongs"),
    "call a number": (b"\x80\2K\1)R.", "REDUCE"),
    "call a type": (b"\x80\2ctorch\nFloatStorage\n)R.", "REDUCE"),
    "call with arguments": (b"\x80\2ccollections\nOrderedDict\nK\1\x85R.", "REDUCE"),
    "tensor of nothing": (b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n)R.", "something else than a storage"),
    "persistent number": (b"\x80\2K\1Q.", "no storage"),
    "name": (tensor().replace(b"X\1\0\0\0x", b"X\3\0\0\0\xed\xa0\x80"), "name is no text"),
    "persistent text": (b"P1\n.", "instruction PERSID"),
    "instance": (b"(ios\nsystem\n.", "instruction INST"),
    "object": (b"\x80\2(cos\nsystem\no.", "os.system"),
    "new object": (b"\x80\2ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "extension": (b"\x80\2\x82\1.", "instruction EXT1"),
    "eval": (b"\x80\2cbuiltins\neval\n.", "builtins.eval"),
    "name on the stack": (b"\x80\4\x8c\2os\x8c\6system\x93.", "os.system"),
    "numbers for a name": (b"\x80\4K\1K\2\x93.", "asks for "),
    "name in names": (b"\x80\2ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
    "control characters": (b"\x80\2c\x1b[2J\r\nos\n.", "asks for "),
    "unknown instruction": (b"\x80\2\xff.", "unknown"),
    "steps": (b"\x80\2" + b"N" * pickles.STEPS + b".", "more than 100000 instructions"),
    "deep": (b"\x80\2)" + b"\x85" * 30_000 + b".", "not a plain dictionary"),
    "deep, called": (b"\x80\2ccollections\nOrderedDict\n)" + b"\x85" * 30_000 + b"R.", "REDUCE"),
    "doubling": (b"\x80\2)" + b"q\0h\0\x86" * 30_000 + b"Q.", "no storage"),
    "doubling, a name": (b"\x80\4)" + b"q\0h\0\x86" * 30_000 + b"q\0h\0\x93.", "asks for "),
    "doubling, a key": (b"\x80\2}(" + b")" + b"q\0h\0\x86" * 30_000 + b"K\1u.", "keys are not text"),
    "contains itself": (b"\x80\2]q\0h\0a.", "not a plain dictionary"),
    "long text": (b"\x80\2X\xff\xff\xff\x7fx.", "expected|only"),
    "long number": (b"\x80\2\x8b\xff\xff\xff\x7fx.", "expected|only|not enough"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name):
    data, says = HOSTILE[name]
    assert re.search(says if "|" in says else re.escape(says), refused(archive(data), 32 << 20)), name
    refused(b"\x80\2" + data[2:], 32 << 20)  # as the older format's first


def test_hostile_archives_are_refused():
    good = tensor()
    assert "compressed" in refused(archive(good, bytes(64 << 20), zipfile.ZIP_DEFLATED), 4 << 20)
    many = {f"a/x{i}": b"" for i in range(pickles.MEMBERS)}
    assert "members" in refused(archive(good, **many))
    assert "data.pkl" in refused(archive(good, **{"b/data.pkl": good}))
    assert "data.pkl" in refused(archive(b"").replace(b"data.pkl", b"data.txt"))
    assert "little-endian" in refused(archive(good, **{"a/byteorder": b"big"}))
    whole = archive(good)
    for cut in range(2, len(whole)):
        refused(whole[:cut])
    # one storage under many names, each as large as the file
    names = b"".join(tensor(numel="J\0\0\1\0", size="J\0\0\1\0\x85", key=k)[3:-1] for k in "0123456789")
    assert "larger than what the file holds" in refused(archive(b"\x80\2}" + names + b".", bytes(1 << 18)), 4 << 20)
    # one storage seen many times
    view = tensor(numel="J\0\0\x10\0", size="J\0\0\x10\0\x85")[3:-1]
    views = b"".join(view.replace(b"\1\0\0\0x", b"\3\0\0\0%d" % i, 1) for i in range(100, 300))
    assert "more than 512 MB" in refused(archive(b"\x80\2}" + views + b".", bytes(4 << 20)), 4 << 20)


def test_damaged_files_are_refused_or_read(state):
    """A thousand changed bytes and cuts: a DataError or tensors, never another exception."""
    g, read = generator("damage"), 0
    for how in FORMATS.values():
        good = saved(state, **how)
        for _ in range(250):
            bad = bytearray(good)
            for _ in range(g.integers(1, 4)):
                bad[g.integers(len(bad))] = g.integers(256)
            if g.random() < 0.2:
                del bad[g.integers(len(bad)) :]
            try:
                pickles.tensors(bytes(bad), "bad.pth")
                read += 1
            except DataError as e:
                assert "\n" not in str(e)
    assert 0 < read < 700


def test_the_older_format_is_checked_part_by_part():
    value = torch.zeros(2)
    data, key = saved({"a": value}, **FORMATS["stacked"]), str(value.untyped_storage()._cdata).encode()
    assert pickles.tensors(data, "a.pth")["a"].tolist() == [0, 0]
    assert "cut off" in refused(data[:-1])
    at = data.rindex(key)
    assert "list of storages" in refused(data[:at] + b"1" * len(key) + data[at + len(key) :])
    assert "at storage" in refused(data[:-16] + b"\3" + data[-15:])  # the number of its elements
    assert "little-endian" in refused(data.replace(b"little_endian", b"little_indian"))
    assert "not the format" in refused(data.replace(b"M\xe9\x03.", b"M\xea\x03."))  # 1001
    assert "not a file of torch.save" in refused(b"MZ" + data)
    assert "not of torch.save" in refused(pickle.dumps({"a": 1}, 2))
    for cut in range(len(data)):
        refused(data[:cut])


# ---- the file of weights


def test_every_format_has_one_digest(tmp_path, state):
    for ending, how in (("pth", {}), ("pt", FORMATS["stacked"])):
        (tmp_path / f"w.{ending}").write_bytes(saved(state, **how))
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "w.safetensors")
    found = [inception_weights(tmp_path / f"w.{ending}") for ending in ("pth", "pt", "safetensors")]
    assert len({digest for _, digest in found}) == 1
    wanted = {k: t for k, t in state.items() if "num_batches" not in k}
    for tensors, _ in found:
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[k], t) and tensors[k].is_contiguous() for k, t in wanted.items())
    (tmp_path / "again.safetensors").write_bytes(packed(found[0][0]))
    again, digest = inception_weights(tmp_path / "again.safetensors")
    assert digest == found[0][1] == hashlib.sha256((tmp_path / "again.safetensors").read_bytes()).hexdigest()
    assert all(torch.equal(t, load_file(tmp_path / "again.safetensors")[k]) for k, t in again.items())
    other = {**found[0][0], "number": torch.tensor(2.6)}
    assert hashlib.sha256(packed(other)).hexdigest() != digest


def test_bad_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"none\.pth: no such file"):
        inception_weights(tmp_path / "none.pth")
    with pytest.raises(DataError, match="no regular file"):
        inception_weights(tmp_path)
    path = tmp_path / "w.safetensors"
    for data in (b"", b"x", b"\xff" * 100, packed({"a": torch.zeros(9)})[:-1], packed({"a": torch.zeros(9)}) + b"x"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"w\.safetensors") as e:
            inception_weights(path)
        assert "\n" not in str(e.value)
    path.write_bytes(packed({"a": torch.tensor([1, torch.nan])}))
    with pytest.raises(DataError, match="a is not finite"):
        inception_weights(path)
    monkeypatch.setattr(weights, "MOST", 20)
    with pytest.raises(DataError, match="more than"):
        inception_weights(path)


@pytest.fixture
def web(tmp_path, monkeypatch, state):
    """A web where the first address is down and the second one has a small file; the addresses asked for."""
    data, asked = saved(state, **FORMATS["stacked"]), []

    def urlopen(url, timeout):
        asked.append(url)
        if url == weights.ADDRESSES[0]:
            raise OSError("no route to host")
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(weights, "SIZE", len(data))
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def test_weights_are_downloaded_and_converted_once(tmp_path, web, state, capsys):
    (first, digest), (second, same) = inception_weights(), inception_weights()
    assert web == list(weights.ADDRESSES) and digest == same
    assert all(torch.equal(a, state[k]) and torch.equal(second[k], a) for k, a in first.items())
    assert os.listdir(tmp_path / "cache" / "gencli") == ["inception-2015-12-05.safetensors"]
    assert hashlib.sha256(weights.cached().read_bytes()).hexdigest() == digest
    assert capsys.readouterr().err.count("downloading") == 2


@pytest.mark.parametrize("fault", ["another file", "larger"])
def test_another_file_than_the_known_one_is_refused(tmp_path, web, monkeypatch, fault):
    if fault == "larger":
        monkeypatch.setattr(weights, "SIZE", weights.SIZE - 1)
    else:
        monkeypatch.setattr(weights, "SHA256", "0" * 64)
    with pytest.raises(DataError, match="not the known file") as e:
        inception_weights()
    assert "--extractor-weights FILE" in e.value.hint
    assert not (tmp_path / "cache").exists()


def test_without_a_network_one_line_says_what_to_do(tmp_path, web, monkeypatch):
    def down(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", down)
    with pytest.raises(DataError) as e:
        inception_weights()
    text = str(e.value)
    assert "inception-2015-12-05.safetensors" in text and "no route to host" in text and "\n" not in text
    assert all(address in text for address in weights.ADDRESSES) and "--extractor-weights FILE" in e.value.hint
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path, web, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="read-only"):
        inception_weights()
    assert web == []
