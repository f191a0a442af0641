"""Arrays and strips of a user's own, and standard sets in the layout of torchvision."""

import dataclasses
import gzip
import hashlib
import io
import os
import struct
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gencli.console import DataError, UsageError
from gencli.data import SETS, SPLITS, load, standard

RNG = np.random.default_rng(0)


def everything(source):
    return source.rows(torch.arange(source.size))


# ---- arrays


@pytest.mark.parametrize(
    "stored", [lambda x: x, lambda x: x.transpose(0, 2, 3, 1), lambda x: x[:, 0]], ids=["NCHW", "NHWC", "NHW"]
)
def test_npz_of_images(tmp_path, stored):
    x = RNG.integers(0, 256, (40, 1 if stored(np.zeros((1, 3, 4, 5))).ndim == 3 else 3, 4, 5), dtype=np.uint8)
    y = np.arange(40) % 3
    np.savez(tmp_path / "a.npz", x=stored(x), y=y)
    seen = []
    for split, size in zip(SPLITS, (32, 4, 4)):
        source = load(str(tmp_path / "a.npz"), split)
        assert source.size == size and source.spec.size == 32 and source.spec.shape == x.shape[1:]
        assert source.spec.levels == 256 and source.spec.classes == ("0", "1", "2")
        rows = everything(source)
        places = [int(np.flatnonzero((x == r.numpy()).all((1, 2, 3)))[0]) for r in rows["x"]]
        assert rows["label"].tolist() == y[places].tolist()
        seen += places
    assert sorted(seen) == list(range(40))


def test_npz_with_splits_levels_and_classes(tmp_path):
    x = RNG.integers(0, 17, (30, 4, 4), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=x[:20], y_train=np.arange(20).reshape(20, 1) % 2, x_test=x[20:],
        y_test=np.zeros(10, int), levels=17, classes=np.array(["on", "off"]),
    )  # fmt: skip
    sources = [load(str(tmp_path / "a.npz"), s) for s in SPLITS]
    assert [s.size for s in sources] == [18, 2, 10] and sources[2].spec.size == 18
    assert sources[0].spec.levels == 17 and sources[0].spec.classes == ("on", "off")
    assert np.array_equal(everything(sources[2])["x"][:, 0].numpy(), x[20:])


def test_points_and_bits(tmp_path):
    points = RNG.standard_normal((50, 3))
    np.save(tmp_path / "p.npy", points)
    source = load(str(tmp_path / "p.npy"))
    assert (source.spec.kind, source.spec.shape, source.spec.levels) == ("points", (3,), None)
    assert source.rows(torch.tensor([0]))["x"].dtype == torch.float32
    np.save(tmp_path / "line.npy", points[:, 0])
    assert load(str(tmp_path / "line.npy")).spec.shape == (1,)
    np.save(tmp_path / "b.npy", points.reshape(50, 1, 3) > 0)
    assert load(str(tmp_path / "b.npy")).spec.levels == 2
    with pytest.raises(UsageError, match="only images have levels"):
        load(f"{tmp_path / 'p.npy'}:threshold")
    with pytest.raises(UsageError, match="only a folder of images can be resized"):
        load(f"{tmp_path / 'b.npy'}:32")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.array([{"a": 1}, None], dtype=object)}, "Python objects, which are never loaded"),
        ({"x": np.zeros((9, 4, 4), np.uint16)}, "neither images"),
        ({"x": np.zeros((9, 4, 4), np.float32)}, "neither images"),
        ({"x": np.zeros((9, 16), np.uint8)}, "neither images"),
        ({"x": np.zeros((9, 3, 8, 3), np.uint8)}, "cannot tell the channels"),
        ({"x": np.zeros((9, 4, 8, 5), np.uint8)}, "cannot tell the channels"),
        ({"x": np.zeros((0, 4, 4), np.uint8)}, "no rows"),
        ({"x": np.full((9, 2), np.nan)}, "not finite"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.zeros(8, int)}, "labels must be 9 integers"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.full(9, -1)}, "labels must be"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.zeros(9)}, "labels must be"),
        ({"x": np.full((9, 4, 4), 9, np.uint8), "levels": 4}, "do not fit 4 levels"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "y": np.full(9, 2), "classes": np.array(["a"])}, "only 1 classes"),
        ({"x": np.zeros((1, 4, 4), np.uint8)}, "too few"),
        ({"data": np.zeros((9, 4, 4), np.uint8)}, "neither x nor x_train"),
        ({"x": np.zeros((9, 4, 4), np.uint8), "x_val": np.zeros((9, 4, 5), np.uint8)}, "differ from those of train"),
    ],
)
def test_arrays_that_will_not_do(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=said) as e:
        load(str(tmp_path / "a.npz"))
    assert str(tmp_path / "a.npz") in str(e.value)


def test_files_that_are_no_arrays(tmp_path):
    for name in ("a.npz", "a.npy"):
        for data in (b"", b"hello", b"PK\x03\x04" + bytes(50), b"\x93NUMPY\x01\x00" + bytes(20)):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(DataError, match="cannot be read as arrays"):
                load(str(tmp_path / name))
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a folder"):
        load(str(tmp_path / "a.pt"))


# ---- strips


def strips(folder, split, tiles, per=5):
    for k in range(0, len(tiles), per):
        part = tiles[k : k + per]
        Image.fromarray(part.reshape(-1, *part.shape[2:])).save(folder / f"{split}-{k // per:02}.png")


def test_strips(tmp_path):
    x, y = RNG.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8), RNG.integers(0, 4, 60, dtype=np.uint8)
    strips(tmp_path, "train", x[:50], per=4)  # 13 strips: the order is by number
    strips(tmp_path, "test", x[50:])
    np.save(tmp_path / "train-labels.npy", y[:50])
    np.save(tmp_path / "test-labels.npy", y[50:])
    train, val, test = (load(str(tmp_path), s) for s in SPLITS)
    assert (train.size, val.size, test.size) == (45, 5, 10) and train.spec.shape == (3, 4, 4)
    rows = everything(test)
    assert np.array_equal(rows["x"].numpy(), x[50:].transpose(0, 3, 1, 2)) and rows["label"].tolist() == y[50:].tolist()
    seen = {}
    for source in (train, val):
        r = everything(source)
        seen |= {bytes(a.numpy().tobytes()): int(label) for a, label in zip(r["x"], r["label"])}
    assert seen == {np.ascontiguousarray(a.transpose(2, 0, 1)).tobytes(): label for a, label in zip(x[:50], y[:50])}
    np.save(tmp_path / "test-labels.npy", y[:3])
    with pytest.raises(DataError, match="labels must be 10 integers"):
        load(str(tmp_path))
    Image.new("RGB", (4, 9)).save(tmp_path / "test-00.png")
    with pytest.raises(DataError, match=r"test-00\.png.*no column of squares"):
        load(str(tmp_path))


# ---- standard sets


def idx(a):
    return b"\0\0\x08" + bytes([a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape) + a.astype(np.uint8).tobytes()


@pytest.fixture
def offline(monkeypatch):
    def refuse(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")


@pytest.fixture
def small(monkeypatch):
    """The standard sets at a hundredth of their official size."""
    for name, entry in SETS.items():
        if entry.origin == "standard":
            train, val, test = (n // 100 for n in entry.sizes)
            monkeypatch.setitem(SETS, name, dataclasses.replace(entry, sizes=(train, val, test)))


def fake_mnist(root, folder="MNIST", zipped=True):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    first = np.arange(600) // 250, np.arange(600) % 250  # every image carries its number
    for part, n in (("train", 600), ("t10k", 100)):
        x = np.zeros((n, 28, 28), np.uint8)
        x[:, 0, 0], x[:, 0, 1] = first[0][:n], first[1][:n]
        for kind, a in (("images-idx3", x), ("labels-idx1", np.arange(n) % 10)):
            data = gzip.compress(idx(a), 1) if zipped else idx(a)
            (raw / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}").write_bytes(data)
    return raw


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_layout(tmp_path, monkeypatch, offline, small, zipped):
    raw = fake_mnist(tmp_path, zipped=zipped)
    before = sorted(os.listdir(raw))
    monkeypatch.setenv("GENCLI_DATA", str(tmp_path))
    numbers = {}
    for split in SPLITS:
        rows = everything(load("mnist", split))
        number = rows["x"][:, 0, 0, 0].long() * 250 + rows["x"][:, 0, 0, 1]
        assert torch.equal(rows["label"], number % 10) and rows["x"].shape[1:] == (1, 28, 28)
        numbers[split] = number.tolist()
    assert sorted(numbers["train"] + numbers["val"]) == list(range(600)) and len(numbers["val"]) == 50
    assert numbers["test"] == list(range(100))
    assert load("mnist:threshold", "test", tmp_path).spec.levels == 2
    assert sorted(os.listdir(raw)) == before
    (raw / before[0]).write_bytes((raw / before[0]).read_bytes()[:-100])
    with pytest.raises(DataError, match="t10k-images"):
        load("mnist", "test")


def fake_cifar(folder, files, labels, n):
    folder.mkdir(parents=True)
    for k, file in enumerate(files):
        a = np.zeros((n, labels + 3072), np.uint8)
        a[:, labels - 1] = np.arange(n) % 10
        if labels == 2:
            a[:, 0] = 99  # the coarse label
        a[:, labels] = k
        a[:, labels + 1024 + 33] = 7  # green, second row, second column
        (folder / file).write_bytes(a.tobytes())


def test_cifar_binary(tmp_path, offline, small):
    fake_cifar(
        tmp_path / "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"], 1, 100
    )
    train, val, test = (load("cifar10", s, tmp_path) for s in SPLITS)
    assert (train.size, val.size, test.size) == (450, 50, 100)
    x = everything(test)["x"]
    assert x[0, 1, 1, 1] == 7 and x[0, 0, 0, 0] == 5 and int(x[0].sum()) == 12
    assert everything(test)["label"].tolist() == [i % 10 for i in range(100)]
    batches = torch.cat([everything(train)["x"], everything(val)["x"]])[:, 0, 0, 0]
    assert torch.bincount(batches.int()).tolist() == [100] * 5
    fake_cifar(tmp_path / "cifar-100-binary", ["test.bin"], 2, 100)
    hundred = load("cifar100", "test", tmp_path)
    assert everything(hundred)["label"].max() == 9 and len(hundred.spec.classes) == 100
    with pytest.raises(DataError, match=r"cifar-100-binary: train\.bin is not there"):
        load("cifar100", "train", tmp_path)
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(bytes(5000))
    with pytest.raises(DataError, match="cut off"):
        load("cifar100", "test", tmp_path)


def test_the_pickled_cifar_is_not_read(tmp_path, offline):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"pickled version in cifar-10-batches-py is never read"):
        load("cifar10", "train", tmp_path)


def test_svhn(tmp_path, offline, small):
    from scipy.io import savemat

    n = 260
    x = np.zeros((32, 32, 3, n), np.uint8)
    x[1, 2, 0, 5] = 9
    savemat(tmp_path / "test_32x32.mat", {"X": x, "y": (np.arange(n) % 10 + 1)[:, None]}, do_compression=True)
    rows = everything(load("svhn", "test", tmp_path))
    assert rows["x"][5, 0, 1, 2] == 9 and rows["label"][:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    (tmp_path / "test_32x32.mat").write_bytes(b"junk" * 100)
    with pytest.raises(DataError, match="not SVHN"):
        load("svhn", "test", tmp_path)


@pytest.mark.parametrize("name", [n for n, e in SETS.items() if e.origin == "standard"])
def test_missing_sets_say_where_they_were_looked_for(tmp_path, offline, name):
    with pytest.raises(DataError, match="is not there, and cannot be downloaded") as e:
        load(name, "train", tmp_path)
    assert str(tmp_path) in str(e.value) and "--data-root" in e.value.hint and "GENCLI_DATA" in e.value.hint
    assert os.listdir(tmp_path) == []


def test_a_set_of_another_size_is_refused(tmp_path, offline):
    fake_mnist(tmp_path)
    with pytest.raises(DataError, match="600 rows, which is not its official number"):
        load("mnist", "train", tmp_path)


def served(monkeypatch, data):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(data))


def test_downloads_are_verified(tmp_path, monkeypatch):
    served(monkeypatch, b"an error page")
    with pytest.raises(DataError, match="not the known file"):
        load("mnist", "train", tmp_path)
    assert os.listdir(tmp_path) == []
    served(monkeypatch, b"right")
    download = standard.Download("https://example.org/a", "sha256:" + hashlib.sha256(b"right").hexdigest())
    path = standard._find(tmp_path / "new", ("a.bin",), "a.bin", download)
    assert path.read_bytes() == b"right" and os.listdir(tmp_path / "new") == ["a.bin"]
    served(monkeypatch, b"never asked for again")
    assert standard._find(tmp_path / "new", ("a.bin",), "a.bin", download) == path


def test_only_wanted_members_leave_a_tar(tmp_path, monkeypatch):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in ("set/a.bin", "set/b.bin", "../evil", "set/other"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    served(monkeypatch, out.getvalue())
    checksum = "md5:" + hashlib.md5(out.getvalue()).hexdigest()
    download = standard.Download("https://example.org/set.tar.gz", checksum, ("a.bin", "b.bin"))
    standard._find(tmp_path / "set", ("a.bin",), "a.bin", download)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["set", "set/a.bin", "set/b.bin"]


def test_a_read_only_root_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="read-only"):
        load("kmnist", "train", tmp_path)


def test_every_address_is_https_with_a_checksum():
    source = Path(standard.__file__).read_text()
    assert "http://" not in source and source.count("https://") == 6


# ---- the real files, where there are any


def real(*parts):
    root = Path(os.environ.get("GENCLI_DATA", ""))
    if not os.environ.get("GENCLI_DATA") or not root.joinpath(*parts).exists():
        pytest.skip("needs GENCLI_DATA with " + "/".join(parts))
    return root.joinpath(*parts)


@pytest.mark.parametrize(
    ("name", "folder", "mean", "first"),
    [("mnist", "MNIST", 0.1307, [7, 2, 1, 0, 4]), ("fashion-mnist", "FashionMNIST", 0.2860, [9, 2, 1, 1, 6])],
)
def test_real_mnist(name, folder, mean, first):
    real(folder, "raw")
    train, val, test = (everything(load(name, s)) for s in SPLITS)
    assert abs(torch.cat([train["x"], val["x"]]).double().mean() / 255 - mean) < 5e-5  # as published
    assert test["label"][:5].tolist() == first and torch.bincount(test["label"]).sum() == 10_000
    if name == "fashion-mnist":
        assert torch.bincount(test["label"]).tolist() == [1000] * 10


def test_real_strips():
    path = real("cifar10-subset")
    test = everything(load(str(path), "test"))
    assert test["x"].shape == (5000, 3, 32, 32) and torch.bincount(test["label"]).tolist() == [500] * 10
    mean = test["x"].double().mean((0, 2, 3)) / 255
    assert abs(mean - torch.tensor([0.4914, 0.4822, 0.4465])).max() < 0.01  # of the whole of CIFAR-10
