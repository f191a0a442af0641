"""Samples in and out: exact round trips, equal bytes, bounded memory, and what strangers may send."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors import safe_open

from gencli import archives, console, given, pictures, plots, streams
from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data import audio
from gencli.streams import Samples

META = {"model": "pixelcnn", "seed": 3, "note": "é"}


def spec_of(levels=17, shape=(1, 8, 8), kind="image", classes=()):
    return DataSpec(name="digits", kind=kind, shape=shape, levels=levels, classes=classes, size=100)


POINTS = spec_of(None, (2,), "points")
SOUND = DataSpec(name="tones", kind="audio", shape=(1, 300), levels=256, rate=4000, size=9)
LETTERS = ("\ufffd", "\n", " ", "a", "b", "é", '"', "-", "\0", "\r", "\u2028")
TEXT = DataSpec(name="docs", kind="text", shape=(40,), levels=len(LETTERS), vocabulary=LETTERS)
WORDS = DataSpec(
    name="docs:words", kind="text", shape=(7,), levels=300, vocabulary=("\ufffd", *(f" {i}" for i in range(299)))
)


def chunks_of(spec, n=23, size=10, labelled=True, seed=0):
    g = np.random.default_rng(seed)
    for start in range(0, n, size):
        shape = (min(size, n - start), *spec.shape)
        if spec.levels is None:
            x = g.standard_normal(shape).astype(np.float32)
        else:
            narrow = spec.levels <= 256 and spec.kind != "text"
            x = g.integers(spec.levels, size=shape).astype(np.uint8 if narrow else np.int16)
        yield Samples(x, g.integers(10, size=shape[0]) if labelled else None, start)


def together(chunks):
    chunks = list(chunks)
    label = None if chunks[0].label is None else np.concatenate([c.label for c in chunks])
    return np.concatenate([c.x for c in chunks]), label


def tar_of(spec=None, n=5, **options):
    """A stream as bytes."""
    spec = spec or spec_of()
    out = io.BytesIO()
    streams._write_tar(out, chunks_of(spec, n, **options), spec, META)
    return out.getvalue()


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(console, "stdin_binary", lambda: io.BufferedReader(io.BytesIO(data)))

    return give


@pytest.fixture
def stdout(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(console, "stdout_binary", lambda: out)
    return out


def read_all(src, limit=None):
    reading = streams.read(src, limit)
    return reading, *together(reading)


# ------------------------------------------------------------------------------------------------ round trips

SPECS = {
    "2 levels": spec_of(2),
    "17 levels": spec_of(17),
    "4 levels, colour": spec_of(4, (3, 5, 7)),
    "255 levels": spec_of(255, (1, 20, 20)),
    "256 levels, colour": spec_of(256, (3, 6, 6)),
    "1000 levels": spec_of(1000, (1, 4, 4)),
    "2 channels": spec_of(9, (2, 4, 4)),
    "points": POINTS,
    "audio without a rate": spec_of(256, (1, 50), "audio"),
    "sound": SOUND,
    "characters": TEXT,
    "words": WORDS,
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dest", ["-", "a.tar", "a.npz", "a.safetensors", "folder/", "plain"])
@pytest.mark.parametrize("name", SPECS)
def test_round_trip_is_exact(name, dest, labelled, tmp_path, stdin, stdout):
    spec = SPECS[name]
    where = dest if dest == "-" else f"{tmp_path}/{dest}"
    streams.write(where, chunks_of(spec, labelled=labelled), spec, META, 23)
    if dest == "-":
        stdin(stdout.getvalue())
    reading, x, label = read_all(where)
    expected, labels = together(chunks_of(spec, labelled=labelled))
    assert x.dtype == expected.dtype and np.array_equal(x, expected)
    assert (label is None) == (labels is None) and np.array_equal(label, labels)
    assert reading.meta == META
    said = ("name", "kind", "shape", "levels", "rate", "vocabulary")
    assert [getattr(reading.spec, f) for f in said] == [getattr(spec, f) for f in said]
    if dest.startswith("a.") and dest != "a.tar":
        assert reading.spec == spec
    first = streams.read(where, limit=3) if dest != "-" else None
    assert first is None or np.array_equal(together(first)[0], expected[:3])


@pytest.mark.parametrize("dest", ["a.tar", "a.npz", "a.safetensors", "a.png"])
def test_equal_samples_make_equal_bytes(dest, tmp_path):
    spec = spec_of()
    for folder, size in (("one", 23), ("two", 4)):
        streams.write(f"{tmp_path}/{folder}/{dest}", [*chunks_of(spec, size=23)], spec, META, 23)
        x, label = together(chunks_of(spec, size=23))
        again = [Samples(x[i : i + size], label[i : i + size], i) for i in range(0, 23, size)]
        streams.write(f"{tmp_path}/{folder}/{dest}", again, spec, META, 23)
    one, two = (tmp_path / "one" / dest).read_bytes(), (tmp_path / "two" / dest).read_bytes()
    assert one == two and os.listdir(tmp_path / "one") == [dest]


def test_the_stream_is_what_tar_and_others_read(tmp_path):
    data = tar_of(n=2)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        infos = archive.getmembers()
        assert [i.name for i in infos] == ["00000000.png", "00000000.json", "00000001.png", "00000001.json"]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.mode, i.type) for i in infos} == {(0, 0, 0, "", 0o644, b"0")}
        image = np.asarray(Image.open(archive.extractfile("00000001.png")))
        sidecar = json.loads(archive.extractfile("00000001.json").read())
    x, label = together(chunks_of(spec_of(), 2))
    assert np.array_equal(image, np.round(x[1, 0].astype(float) * 255 / 16)) and image.dtype == np.uint8
    own = {"index": 1, "label": int(label[1]), "levels": 17, "kind": "image", "data": "digits"}
    assert list(sidecar.items()) == list((own | META).items())
    listed = subprocess.run(["tar", "t"], input=data, capture_output=True, check=True).stdout
    assert listed.split() == [i.name.encode() for i in infos]


def test_arrays_are_what_other_libraries_read(tmp_path):
    spec = spec_of(256, (3, 6, 6))
    x, label = together(chunks_of(spec))
    for ending in (".npz", ".safetensors"):
        streams.write(f"{tmp_path}/a{ending}", chunks_of(spec), spec, META, 23)
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["x"], x) and np.array_equal(arrays["label"], label)
        assert {i.compress_type for i in arrays.zip.infolist()} == {zipfile.ZIP_STORED}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.metadata()) == ["gencli"]
        assert np.array_equal(file.get_tensor("x").numpy(), x)
        assert np.array_equal(file.get_tensor("label").numpy(), label)
        said = json.loads(file.metadata()["gencli"])
    assert said["meta"] == META and DataSpec(**said["spec"]) == spec


def test_sounds_are_what_other_libraries_read(tmp_path):
    x = np.arange(600, dtype=np.uint8).reshape(2, 1, 300)  # all 256 codes
    chunks = [Samples(x[:1], None, 0), Samples(x[1:], None, 1)]
    streams.write(f"{tmp_path}/a.wav", chunks, SOUND, META, 2)
    data, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 4000 and len(data) == 300 + 400 + 300 and not data[300:700].any()
    assert np.array_equal(audio.encode(data[:300]), x[0, 0]) and np.array_equal(audio.encode(data[700:]), x[1, 0])
    reading, back, _ = read_all(f"{tmp_path}/a.wav")  # as one sound
    assert back.shape == (1, 1, 1000) and reading.spec.rate == 4000 and reading.spec.kind == "audio"
    streams.write(f"{tmp_path}/folder", chunks, SOUND, META, 2)
    assert sorted(os.listdir(tmp_path / "folder")) == ["000000.json", "000000.wav", "000001.json", "000001.wav"]
    sidecar = json.loads((tmp_path / "folder" / "000001.json").read_text())
    assert sidecar == {"index": 1, "levels": 256, "kind": "audio", "data": "tones", "rate": 4000} | META
    with pytest.raises(ValueError, match="2 samples came, 3 were announced"):
        streams.write(f"{tmp_path}/b.wav", chunks, SOUND, META, 3)
    assert not (tmp_path / "b.wav").exists()


def test_texts_are_what_people_read(tmp_path):
    x = np.array([[3, 4, 2, 5], [4, 1, 1, 3]], np.int16)
    spec = TEXT.model_copy(update={"shape": (4,)})
    streams.write(f"{tmp_path}/a.txt", [Samples(x[:1]), Samples(x[1:], None, 1)], spec, META, 2)
    assert (tmp_path / "a.txt").read_text() == f"ab é\n{'-' * 72}\nb\n\na\n"
    streams.write(f"{tmp_path}/a.tar", [Samples(x.astype(np.uint8))], spec, META, 2)  # as sampling.raw has it
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.extractfile("00000000.txt").read().decode() == "ab é"
        sidecars = [json.loads(archive.extractfile(f"0000000{i}.json").read()) for i in range(2)]
    assert sidecars[0].pop("vocabulary") == list(LETTERS)
    assert [s["symbols"] for s in sidecars] == x.tolist() and "vocabulary" not in sidecars[1]
    reading, back, _ = read_all(f"{tmp_path}/a.tar")
    assert reading.meta == META and back.dtype == np.int16 and np.array_equal(back, x)


def test_pictures_of_sounds_and_texts(tmp_path):
    for spec in (SOUND, TEXT, WORDS):
        streams.write(f"{tmp_path}/a.png", chunks_of(spec), spec, META, 23)
        image = np.asarray(Image.open(tmp_path / "a.png"))
        assert image.ndim == 3 and image.std() > 5
    assert [streams.default_name("x", s) for s in (SOUND, TEXT, POINTS, spec_of(), spec_of(9, (2, 4, 4)))] == [
        "x.wav", "x.txt", "x.png", "x.png", "x.npz",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ beginnings


def wav_of(path, codes, rate=4000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(audio.wav(codes, rate))
    return str(path)


def test_prompts_of_sound(tmp_path, capsys):
    codes = np.arange(600, dtype=np.uint8) % 251
    short, long = wav_of(tmp_path / "d" / "a.wav", codes[:70]), wav_of(tmp_path / "d" / "b.wav", codes)
    fast = wav_of(tmp_path / "c.wav", np.full(160, 200, np.uint8), 8000)
    x = given.read_prompts([short, long], SOUND)
    assert [p.shape for p in x] == [(1, 70), (1, 300)] and all(p.dtype == np.uint8 for p in x)
    assert np.array_equal(x[0][0], codes[:70]) and np.array_equal(x[1][0], codes[:300])
    assert capsys.readouterr().err == f"{long}: the first 300 of 600 samples are taken\n"
    (y,) = given.read_prompts([fast], SOUND)
    assert y.shape == (1, 80) and abs(y[0, 30:50].astype(int) - 200).max() <= 1  # half as many, and the same tone
    assert capsys.readouterr().err == f"{fast}: resampled from 8000 to 4000 samples a second\n"
    assert [p.shape for p in given.read_prompts([str(tmp_path / "d")], SOUND)] == [(1, 70), (1, 300)]
    streams.write(f"{tmp_path}/s.tar", chunks_of(SOUND, 3), SOUND, META, 3)
    assert np.array_equal(np.stack(given.read_prompts([f"{tmp_path}/s.tar"], SOUND)), together(chunks_of(SOUND, 3))[0])
    other = SOUND.model_copy(update={"rate": 8000})
    with pytest.raises(DataError, match="sounds of 4000 samples a second, but the model's have 8000"):
        given.read_prompts([f"{tmp_path}/s.tar"], other)


def test_prompts_of_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab\n")
    (tmp_path / "b.txt").write_text("a" * 100)
    (tmp_path / "c.txt").write_text("abcé")
    one, two = given.read_prompts([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], TEXT)
    assert one.tolist() == [3, 4] and one.dtype == np.int16 and two.tolist() == [3] * 40
    assert capsys.readouterr().err == f"{tmp_path}/b.txt: the first 40 of 100 characters are taken\n"
    with pytest.raises(DataError, match=r"c\.txt: 'c' is not among the 11 symbols that the model knows"):
        given.read_prompts([f"{tmp_path}/c.txt"], TEXT)
    (tmp_path / "w.txt").write_text(" 7 12 298")
    assert given.read_prompts([f"{tmp_path}/w.txt"], WORDS)[0].tolist() == [8, 13, 299]
    # a stream spells its symbols in the model's vocabulary
    streams.write(f"{tmp_path}/s.tar", chunks_of(TEXT, 3), TEXT, META, 3)
    turned = TEXT.model_copy(update={"vocabulary": LETTERS[::-1]})
    x = together(chunks_of(TEXT, 3))[0]
    assert np.array_equal(np.stack(given.read_prompts([f"{tmp_path}/s.tar"], TEXT)), x)
    assert np.array_equal(np.stack(given.read_prompts([f"{tmp_path}/s.tar"], turned)), 10 - x)
    fewer = TEXT.model_copy(update={"vocabulary": (*LETTERS[:-1], "z")})
    with pytest.raises(DataError, match=r"s\.tar: '\\u2028' is not among the 11 symbols"):
        given.read_prompts([f"{tmp_path}/s.tar"], fewer)


def test_prompts_that_will_not_do(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    streams.write(f"{tmp_path}/s.tar", chunks_of(spec_of(), 3), spec_of(), META, 3)
    (tmp_path / "none").mkdir()
    for spec, src, said in (
        (TEXT, "empty.txt", "the file is empty"),
        (TEXT, "nowhere.txt", "there is no such file"),
        (TEXT, "s.tar", "samples are image, but the model takes text"),
        (SOUND, "bad.wav", "neither WAV nor FLAC"),
        (SOUND, "s.tar", "samples are image, but the model takes audio"),
        (SOUND, "none", "holds no samples"),
        (SOUND, "empty.txt", "cannot read samples from such a file"),
    ):
        with pytest.raises(DataError, match=said) as e:
            given.read_prompts([f"{tmp_path}/{src}"], spec)
        assert src in str(e.value)
    with pytest.raises(UsageError, match="no samples were named"):
        given.read_prompts([], SOUND)
    image = spec_of(17)
    assert np.array_equal(np.stack(given.read_prompts([f"{tmp_path}/s.tar"], image)), together(chunks_of(image, 3))[0])


def tar_with(*members):
    out = io.BytesIO()
    for name, data in members:
        archives.write_member(out, name, data if isinstance(data, bytes) else json.dumps(data).encode())
    archives.write_end(out)
    return out.getvalue()


GOOD_TEXT = {"levels": 3, "kind": "text", "symbols": [1, 2], "vocabulary": ["?", "a", "b"]}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"symbols": [2, 1]})], "not what its sidecar's symbols spell"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"symbols": [1, 3]})], "do not fit 3 levels"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"symbols": [1, True]})], "does not say its symbols"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"symbols": []})], "does not say its symbols"),
        ([("0.txt", b"ab"), ("0.json", {})], "does not say its symbols"),
        ([("0.txt", b"\xff"), ("0.json", GOOD_TEXT)], "byte 0 is not UTF-8"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"vocabulary": ["a", "b"]})], "2 symbols do not make 3 levels"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"vocabulary": [1, 2, 3]})], "is not understood"),
        ([("0.txt", b"ab"), ("0.json", GOOD_TEXT | {"kind": "image"})], "its sidecar says otherwise"),
        ([("0.wav", audio.wav(np.arange(9), 4000)), ("0.json", {"rate": 8000})], "its sidecar says otherwise"),
        ([("0.wav", audio.wav(np.arange(9), 4000)), ("0.json", {"levels": 17})], "its sidecar says otherwise"),
        ([("0.wav", audio.wav(np.arange(9), 4000)[:-1])], "cut off"),
        ([("0.wav", audio.wav(np.arange(9), 4000)), ("1.wav", audio.wav(np.arange(8), 4000))], "those before it have"),
        ([("0.wav", audio.wav(np.arange(9), 4000)), ("1.wav", audio.wav(np.arange(9), 8000))], "those before it have"),
        ([("0.txt", b"a note")], "holds no samples"),
    ],
)
def test_wrong_sounds_and_texts_are_refused(members, said, stdin):
    stdin(tar_with(*members))
    with pytest.raises(DataError, match=said) as e:
        list(streams.read("-"))
    assert len(str(e.value).splitlines()) == 1


def test_captions_and_notes_are_no_samples(tmp_path, stdin):
    image = pictures.png(np.zeros((4, 4), np.uint8))
    stdin(tar_with(("0.png", image), ("0.txt", b"black"), ("0.json", {}), ("1.png", image), ("2.txt", b"a note")))
    assert read_all("-")[1].shape == (2, 1, 4, 4)
    for name, data in (("0.png", image), ("0.txt", b"black"), ("0.json", b"{}"), ("README.txt", b"a note")):
        (tmp_path / name).write_bytes(data)
    assert read_all(str(tmp_path))[1].shape == (1, 1, 4, 4)


def test_pictures(tmp_path):
    spec = spec_of()
    x, _ = together(chunks_of(spec))
    streams.write(f"{tmp_path}/a.png", chunks_of(spec), spec, META, 23)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pictures.grid(x, 17))
    streams.write(f"{tmp_path}/a.gif", chunks_of(spec, 4), spec, META, 4)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 4
        film.seek(3)
        assert np.array_equal(np.asarray(film.convert("L")), pictures.grid(x[3:4], 17, pad=0)[..., 0])
    streams.write(f"{tmp_path}/p.png", chunks_of(POINTS), POINTS, META, 23)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), plots.scatter(together(chunks_of(POINTS))[0]))


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    ("dest", "spec", "text"),
    [
        ("a.nzp", spec_of(), r"cannot write samples to a.nzp \(did you mean '.npz'\?\)"),
        ("a.gif", POINTS, "points of shape 2 make no .gif"),
        ("a.png", spec_of(9, (2, 4, 4)), "image of shape 2x4x4 make no .png"),
    ],
)
def test_a_wrong_destination_is_refused_before_work(dest, spec, text):
    def never():
        raise AssertionError("drew a sample")
        yield

    with pytest.raises(UsageError, match=text):
        streams.write(dest, never(), spec, {}, 1)


def test_a_full_folder_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "a").mkdir()
    streams.write(f"{tmp_path}/a", chunks_of(spec_of(), 3), spec_of(), {}, 3)
    assert sorted(os.listdir(tmp_path / "a")) == [f"{i:06}{e}" for i in range(3) for e in (".json", ".png")]
    with pytest.raises(UsageError, match="is there already and not empty"):
        streams.write(f"{tmp_path}/a", chunks_of(spec_of(), 3), spec_of(), {}, 3)


@pytest.mark.parametrize("dest", ["a.tar", "a.npz", "a.safetensors", "a.png", "folder/"])
def test_a_failure_leaves_nothing_behind(dest, tmp_path):
    def failing():
        yield from chunks_of(spec_of(), 10)
        raise RuntimeError("out of steam")

    with pytest.raises(RuntimeError, match="out of steam"):
        streams.write(f"{tmp_path}/{dest}", failing(), spec_of(), {}, 20)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_wrong_total_is_an_error(ending, tmp_path):
    with pytest.raises(ValueError, match="5 samples came, 6 were announced"):
        streams.write(f"{tmp_path}/a{ending}", chunks_of(spec_of(), 5), spec_of(), {}, 6)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        streams.write(f"{tmp_path}/a.npz", chunks_of(spec_of(), 5), spec_of(), {}, 5)
    assert caught.value.filename == f"{tmp_path}/a.npz" and os.listdir(tmp_path) == []


def test_a_broken_pipe_is_passed_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "wb")
    monkeypatch.setattr(console, "stdout_binary", lambda: file)
    with pytest.raises(BrokenPipeError):
        streams.write("-", chunks_of(spec_of(), 500), spec_of(), {}, 500)
    with pytest.raises(BrokenPipeError):
        file.close()


def big_chunks(n, size=1 << 20):
    for i in range(n):
        yield Samples(np.random.default_rng(i).integers(256, size=(1, 1, 1024, size // 1024), dtype=np.uint8), None, i)


@pytest.mark.parametrize("dest", ["a.tar", "a.npz", "a.safetensors"])
def test_memory_holds_one_chunk(dest, tmp_path):
    spec = spec_of(256, (1, 1024, 1024))
    streams.write(f"{tmp_path}/warm.{dest[2:]}", big_chunks(1), spec, {}, 1)
    tracemalloc.start()
    streams.write(f"{tmp_path}/{dest}", big_chunks(14), spec, {}, 14)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    streams.CHUNK_BYTES, before = 2 << 20, streams.CHUNK_BYTES
    try:
        count = sum(len(chunk.x) for chunk in streams.read(f"{tmp_path}/{dest}"))
    finally:
        streams.CHUNK_BYTES = before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 14 and written < 8 << 20 and peak < 12 << 20


def test_a_stream_is_taken_and_given_sample_by_sample(stdin):
    drawn = []

    def watched():
        for chunk in chunks_of(spec_of(), 30):
            drawn.append(chunk.first)
            yield chunk

    class Out(io.BytesIO):
        def write(self, data):
            seen.append(len(drawn))
            return super().write(data)

    seen, out = [], Out()
    streams._write_tar(out, watched(), spec_of(), {})
    assert seen == [1] * 20 + [2] * 20 + [3] * 21


# ------------------------------------------------------------------------------------------------ reading streams


def cases():
    data = tar_of()
    link = tarfile.TarInfo("00000000.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    huge = tarfile.TarInfo("00000000.png")
    huge.size = 1 << 40
    long_sidecar = tarfile.TarInfo("00000000.json")
    long_sidecar.size = 2 << 20
    damaged = bytearray(data)
    damaged[1024 + 3] ^= 1  # the header of the second member
    return {
        "empty": (b"", "standard input is empty"),
        "half a block": (data[:100], "no tar stream"),
        "text": (b"hello world\n" * 100, "no tar stream"),
        "gzip": (b"\x1f\x8b" + bytes(600), "no tar stream"),
        "no members": (bytes(10240), "holds no samples"),
        "half a picture": (data[:700], "cut off after 00000000.png"),
        "no sidecar": (data[:1024], "cut off after 00000000.png"),
        "half a record, closed": (data[:1024] + bytes(1024), None),
        "no end": (data[:-1024], "cut off after 00000004.json"),
        "half an end": (data[:-512], "cut off after 00000004.json"),
        "damaged": (bytes(damaged), "damaged after 00000000.png"),
        "two archives": (data + data, "several archives in one"),
        "a link": (link.tobuf() + bytes(1024), "a link or a device"),
        "a huge member": (huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "more than 64 MB"),
        "a long sidecar": (long_sidecar.tobuf() + bytes(1024), "more than 1 MB"),
    }


@pytest.mark.parametrize("name", cases())
def test_bad_streams(name, stdin):
    data, text = cases()[name]
    stdin(data)
    if text is None:
        assert len(together(streams.read("-"))[0]) == 1  # a picture alone is a sample of 256 levels
        return
    with pytest.raises(DataError, match=text) as caught:
        together(streams.read("-"))
    assert "\n" not in str(caught.value)


def archive_of(**members):
    out = io.BytesIO()
    for name, data in members.items():
        archives.write_member(out, name.replace("_", "."), data)
    archives.write_end(out)
    return out.getvalue()


def png(shape=(8, 8)):
    return pictures.png(np.zeros(shape, np.uint8))


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"a_json": b"{}"}, "a: a sidecar without its sample"),
        ({"a_png": png(), "a_json": b"{"}, "its sidecar is no JSON object"),
        ({"a_png": png(), "a_json": b"[]"}, "its sidecar is no JSON object"),
        ({"a_png": png(), "a_json": b"[" * 100000}, "its sidecar is no JSON object"),
        ({"a_png": png(), "a_json": b'{"levels": 1}'}, "levels 1 of an image"),
        ({"a_png": png(), "a_json": b'{"levels": "x"}'}, "levels 'x' of an image"),
        ({"a_png": png(), "a_json": b'{"kind": "smell"}'}, "is not understood"),
        ({"a_png": png(), "a_json": b'{"data": 7}'}, "is not understood"),
        ({"a_png": png(), "b_png": png((8, 9))}, "b: 1x8x9 of 256 levels, but those before it have 1x8x8"),
        ({"a_png": png(), "b_png": png(), "b_json": b'{"levels": 2}'}, "b: 1x8x8 of 2 levels"),
        ({"a_png": png(), "a_cls": b"1", "b_png": png()}, "some samples have labels"),
        ({"a_png": png()[:40]}, "a"),
        ({"a_npy": npy(np.array([None]), allow_pickle=True)}, "Python objects"),
        ({"a_npy": npy(np.zeros(9, np.float32))[:-4]}, "cut off"),
        ({"a_npy": b"\x93NUMPY"}, "damaged"),
        ({"a_npy": npy(np.array([np.nan], np.float32))}, "not finite"),
        ({"a_npy": npy(np.array(["x"]))}, "no samples"),
        ({"a_npy": npy(np.full((1, 2, 2), 300))}, "do not fit 256 levels"),
        ({"a_npy": npy(np.zeros((1, 2, 2), np.int16)), "a_json": b'{"levels": 99999}'}, "no samples"),
        ({"README_txt": b"hello"}, "holds no samples"),
    ],
)
def test_bad_members(members, text, stdin):
    stdin(archive_of(**members))
    with pytest.raises(DataError, match=text) as caught:
        together(streams.read("-"))
    assert "\n" not in str(caught.value)


def test_a_member_that_comes_twice_is_refused(stdin):
    out = io.BytesIO()
    for _ in range(2):
        archives.write_member(out, "a.png", png())
    stdin(out.getvalue() + bytes(1024))
    with pytest.raises(DataError, match=r"a.png comes twice"):
        together(streams.read("-"))


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_archives_of_other_tools(style, tmp_path, stdin):
    """Long and non-ASCII names, folders, labels as .cls, unknown companions, padding to 10 KB."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as archive:
        folder = tarfile.TarInfo("données")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i in range(3):
            stem = "données/" + "x" * 120 + f"-{i}"
            image = pictures.png(np.full((4, 4, 3), 10 * i, np.uint8))
            for ending, data in ((".png", image), (".cls", b"%d" % (i + 5)), (".txt", b"a caption")):
                info = tarfile.TarInfo(stem + ending)
                info.size, info.mtime = len(data), 1.5
                archive.addfile(info, io.BytesIO(data))
    stdin(out.getvalue())
    reading, x, label = read_all("-")
    assert x.shape == (3, 3, 4, 4) and x[:, 0, 0, 0].tolist() == [0, 10, 20] and label.tolist() == [5, 6, 7]
    assert (reading.spec.kind, reading.spec.levels, reading.meta) == ("image", 256, {})


def test_reading_takes_the_padding_so_that_the_writer_can_end(monkeypatch):
    source = io.BufferedReader(io.BytesIO(tar_of() + bytes(5000)))
    monkeypatch.setattr(console, "stdin_binary", lambda: source)
    assert len(together(streams.read("-"))[0]) == 5 and source.read() == b""


def test_an_endless_stream_of_zeros_ends(monkeypatch):
    with open("/dev/zero", "rb") as zeros, pytest.raises(DataError, match="holds no samples"):
        monkeypatch.setattr(console, "stdin_binary", lambda: zeros)
        streams.read("-")


def test_truncation_at_any_length_is_noticed(stdin):
    data = tar_of(n=2)
    for length in range(0, len(data) - 1, 97):
        stdin(data[:length])
        with pytest.raises(DataError):
            together(streams.read("-"))


# ------------------------------------------------------------------------------------------------ reading files


def test_arrays_from_elsewhere(tmp_path):
    g = np.random.default_rng(0)
    images = g.integers(256, size=(7, 5, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(7))
    reading, x, label = read_all(f"{tmp_path}/a.npz")
    assert np.array_equal(x, images.transpose(0, 3, 1, 2)) and label.tolist() == [*range(7)]
    assert (reading.spec.shape, reading.spec.levels, reading.spec.size) == ((3, 5, 6), 256, 7)
    np.save(tmp_path / "grey.npy", images[..., 0].astype(np.int64))
    assert np.array_equal(read_all(f"{tmp_path}/grey.npy")[1], images[:, None, :, :, 0])
    np.save(tmp_path / "bits.npy", images[..., 0] > 99)
    reading, x, _ = read_all(f"{tmp_path}/bits.npy")
    assert reading.spec.levels == 2 and x.dtype == np.uint8 and np.array_equal(x[:, 0], images[..., 0] > 99)
    points = np.asfortranarray(g.standard_normal((9, 2)))
    for name, kind in (("p.npy", np.save), ("p.npz", np.savez)):
        kind(tmp_path / name, points)
        reading, x, _ = read_all(f"{tmp_path}/{name}")
        assert x.dtype == np.float32 and np.array_equal(x, points.astype(np.float32)) and reading.spec.kind == "points"
    np.save(tmp_path / "line.npy", points[:, 0])
    assert read_all(f"{tmp_path}/line.npy")[1].shape == (9, 1)


def write_zip(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)


def header_only(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def bad_files(folder):
    x = np.zeros((4, 1, 2, 2), np.uint8)
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(folder / "objects.npz", x=np.array([{}, None], dtype=object))
    (folder / "short.npy").write_bytes(npy(x)[:-1])
    (folder / "huge.npy").write_bytes(header_only((10**9, 3, 1000, 1000)) + bytes(100))
    (folder / "negative.npy").write_bytes(header_only((-2, -2)) + bytes(100))
    (folder / "text.npy").write_bytes(b"not an array")
    (folder / "void.npy").write_bytes(b"")
    np.save(folder / "none.npy", np.zeros((0, 2)))
    np.save(folder / "floats.npy", np.zeros((2, 1, 3, 3)))
    np.save(folder / "nan.npy", np.full((3, 2), np.nan))
    np.savez(folder / "names.npz", a=x, b=x)
    np.savez(folder / "labels.npz", x=x, label=np.arange(3))
    np.savez(folder / "labels2.npz", x=x, label=np.zeros(4))
    write_zip(folder / "claims.npz", x=header_only((100, 1, 8, 8)) + bytes(10))
    write_zip(folder / "said.npz", x=npy(x), gencli=npy(np.array('{"spec": {}, "meta": {}}')))
    write_zip(folder / "bomb.npz", x=npy(x), gencli=npy(np.zeros(4 << 20, np.uint8)))
    (folder / "text.npz").write_bytes(b"not a zip")
    np.savez(folder / "flipped.npz", x=np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2))
    data = bytearray((folder / "flipped.npz").read_bytes())
    data[data.index(bytes(range(16)))] ^= 255
    (folder / "flipped.npz").write_bytes(data)
    (folder / "text.safetensors").write_bytes(b"not tensors at all")
    (folder / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (folder / "text.tar").write_bytes(b"not a tar")
    (folder / "empty.tar").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_bytes(b"hello")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.png")
    return {
        "objects.npy": "Python objects",
        "objects.npz": "Python objects",
        "short.npy": "cut off",
        "huge.npy": "cut off",
        "negative.npy": "shape",
        "text.npy": "damaged",
        "void.npy": "damaged",
        "none.npy": "holds no samples",
        "floats.npy": "neither images",
        "nan.npy": "not finite",
        "names.npz": "it has no array x, but a, b",
        "labels.npz": "labels must be 4 integers",
        "labels2.npz": "labels must be 4 integers",
        "claims.npz": "cut off",
        "said.npz": "is not understood",
        "bomb.npz": "more than 1 MB",
        "text.npz": "damaged",
        "flipped.npz": "damaged",
        "text.safetensors": "damaged",
        "long.safetensors": "damaged",
        "text.tar": "no tar stream",
        "empty.tar": "is empty",
        "picture.png": "picture.png",
        "notes.txt": "cannot read samples",
        "folder": "holds no samples",
        "pipe.png": "no regular file",
        "nowhere.npz": "there is no such file",
    }


def test_bad_files(tmp_path):
    for name, text in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=text) as caught:
            together(streams.read(f"{tmp_path}/{name}"))
        message = str(caught.value)
        assert "\n" not in message and name in message


def test_folders_and_single_images(tmp_path):
    for name, value in (("b.png", 20), ("a.PNG", 10), ("deep/c.png", 30)):
        pictures.save_png(tmp_path / name, np.full((4, 4), value, np.uint8))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert read_all(str(tmp_path))[1][:, 0, 0, 0].tolist() == [10, 20, 30]
    reading, x, _ = read_all(f"{tmp_path}/b.png")
    assert x.shape == (1, 1, 4, 4) and (x == 20).all() and reading.spec.levels == 256


def test_read_images_fits_pictures_to_a_model(tmp_path, stdin):
    spec = spec_of(17)
    x, _ = together(chunks_of(spec, 5))
    stdin(tar_of(n=5))
    assert np.array_equal(given.read_images(["-"], spec), x)
    colour = np.zeros((16, 24, 3), np.uint8)
    colour[:, 4:20] = [255, 0, 0]
    pictures.save_png(tmp_path / "red.png", colour)
    pictures.save_png(tmp_path / "grey.png", np.full((8, 8), 255, np.uint8))
    got = given.read_images([f"{tmp_path}/red.png", f"{tmp_path}/grey.png"], spec)
    assert got.shape == (2, 1, 8, 8) and got.dtype == np.uint8
    assert (got[0] == 5).all() and (got[1] == 16).all()  # round(round(0.299 * 255) * 16 / 255) = 5
    got = given.read_images([f"{tmp_path}/red.png", f"{tmp_path}/grey.png"], spec_of(256, (3, 8, 8)))
    assert got[0, :, 0, 0].tolist() == [255, 0, 0] and (got[1] == 255).all()
    np.save(tmp_path / "p.npy", np.ones((3, 2)))
    assert np.array_equal(given.read_images([f"{tmp_path}/p.npy"], POINTS), np.ones((3, 2)))
    with pytest.raises(DataError, match="samples are 2, but the model takes 1x8x8"):
        given.read_images([f"{tmp_path}/p.npy"], spec)
    with pytest.raises(DataError, match="is 24 x 16 pixels, but the model takes 4 x 2"):
        given.read_images([f"{tmp_path}/red.png"], spec_of(17, (1, 2, 4)))
    with pytest.raises(UsageError, match="no samples"):
        given.read_images([], spec)
