"""Sound: mu-law, files that cannot be trusted, tones, spoken digits, a user's folder."""

from __future__ import annotations

import io
import math
import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gencli.console import DataError, UsageError
from gencli.contract import DataSpec
from gencli.data import SETS, SPLITS, audio, load
from gencli.data.audio import SILENCE, decode, encode, header, read
from gencli.data.source import TensorSource
from gencli.metrics import likelihood

CODES = np.arange(256, dtype=np.uint8)


def everything(source):
    return source.rows(torch.arange(source.size))


def sound(x, rate=8000, kind="WAV", subtype=None):
    """A file's bytes as libsndfile writes them."""
    out = io.BytesIO()
    soundfile.write(out, x, rate, format=kind, subtype=subtype)
    return out.getvalue()


def sine(n, hz=440.0, rate=8000, loud=0.5):
    return loud * np.sin(2 * np.pi * hz * np.arange(n) / rate)


# ---- mu-law


def test_mu_law_is_the_papers():
    def f(x):  # WaveNet, section 2.2
        return math.copysign(math.log(1 + 255 * abs(x)) / math.log(1 + 255), x)

    for k, x in enumerate(decode(CODES)):
        assert f(x) == pytest.approx(2 * k / 255 - 1, abs=1e-12)
    g = np.random.default_rng(0)
    x = np.concatenate([g.uniform(-1, 1, 500), g.normal(size=500) * 0.01])
    nearest = [int(np.argmin(abs(2 * np.arange(256) / 255 - 1 - f(v)))) for v in x]
    assert encode(x).tolist() == nearest and encode(x).dtype == np.uint8
    assert encode(np.array([-9, -1, -0.0, 0, 1, 9])).tolist() == [0, 0, SILENCE, SILENCE, 255, 255]
    assert np.array_equal(encode(x.astype(np.float32)), encode(x.astype(np.float32).astype(float)))


def test_every_code_survives_decoding_and_sixteen_bits():
    assert np.array_equal(encode(decode(CODES)), CODES)
    codes, rate = read(audio.wav(CODES, 8000), "it")
    assert rate == 8000 and np.array_equal(codes, CODES)
    data, _ = soundfile.read(io.BytesIO(audio.wav(CODES, 8000)))
    assert np.allclose(data, decode(CODES), atol=4e-5)
    with pytest.raises(UsageError, match=r"do not fit a \.wav"):
        audio.wav_header(2**31, 8000)


# ---- files


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-15), ("WAV", "PCM_24", 2**-23), ("WAV", "PCM_32", 2**-30),
        ("WAV", "FLOAT", 1e-7), ("WAV", "DOUBLE", 1e-7), ("WAVEX", "PCM_24", 2**-23),
        ("FLAC", "PCM_S8", 2**-7), ("FLAC", "PCM_16", 2**-15), ("FLAC", "PCM_24", 2**-23),
    ],
)  # fmt: skip
def test_kinds_of_samples(kind, subtype, error):
    x = sine(3000)
    data = sound(x, 8000, kind, subtype)
    codes, rate = read(data, "it")
    assert rate == 8000 and header(data, "it") == (8000, 3000) and codes.shape == (3000,) and codes.dtype == np.uint8
    slack = error + 1e-7
    assert (encode(x - slack) <= codes).all() and (codes <= encode(x + slack)).all()


def test_channels_are_mixed_by_their_mean():
    left, right = sine(500, 300), sine(500, 500)
    codes, _ = read(sound(np.stack([left, right], 1), subtype="FLOAT"), "it")
    assert abs(decode(codes) - (left + right) / 2).max() < 0.01
    with pytest.raises(DataError, match="17 channels"):
        read(sound(np.zeros((10, 17))), "it")


def test_floats_beyond_one_are_clipped_and_absurd_ones_refused():
    codes, _ = read(sound(np.array([1.5, -1.5, 0.0]), subtype="FLOAT"), "it")
    assert codes.tolist() == [255, 0, SILENCE]
    for bad in (np.nan, np.inf, 32767.0):
        with pytest.raises(DataError, match=r"it: samples that are not finite, or far outside"):
            read(sound(np.array([0.0, bad]), subtype="FLOAT"), "it")


@pytest.mark.parametrize("found", [4000, 11025, 16000, 44100, 48000, 1001])
def test_resampling_keeps_the_pitch(found):
    data = sound(sine(found, 300, found), found, subtype="FLOAT")
    codes, rate = read(data, "it", rate=8000)
    assert rate == 8000 and abs(len(codes) - 8000) <= 8 and len(codes) == header(data, "it").resampled(8000)
    x, t = decode(codes), np.arange(len(codes)) / 8000
    middle = slice(400, 7400)
    assert abs(x - 0.5 * np.sin(2 * np.pi * 300 * t))[middle].max() < 0.03


def test_resampling_lets_nothing_fold_over():
    x = sine(48000, 7000, 48000)  # above half of 8,000
    codes, _ = read(sound(x, 48000, subtype="FLOAT"), "it", rate=8000)
    assert abs(decode(codes)[400:-400]).max() < 0.01


@pytest.mark.parametrize("found", [8000, 44100])
def test_the_beginning_alone(found):
    data = sound(sine(found, 300, found), found)
    whole, _ = read(data, "it", rate=8000)
    for most in (1, 100, 7999, 99999):
        assert np.array_equal(read(data, "it", rate=8000, most=most)[0], whole[:most])


def test_bad_files_are_named():
    good, flac = sound(sine(4000)), sound(np.random.default_rng(0).uniform(-1, 1, 40000), kind="FLAC")
    cases = {
        b"": "the file is empty",
        b"hello": "neither WAV nor FLAC",
        sound(sine(4000), kind="OGG"): "neither WAV nor FLAC",
        sound(sine(4000), kind="AIFF"): "neither WAV nor FLAC",
        good[:1000]: "cut off, 7044 bytes are missing",
        good[:20]: "no samples",
        good[:44]: "cut off, 8000 bytes are missing",
        sound(np.zeros(0)): "no samples",
        flac[:2000]: "x.wav: (cut off|cannot be read)",
        flac[: len(flac) - 100]: "x.wav: (cut off|cannot be read)",
        b"fLaC" + bytes(50): "cannot be read",
        b"RIFF\xff\xff\xff\xffWAVE": "no samples",
        sound(sine(100), subtype="ULAW"): "packed as ULAW",
        sound(sine(4000), subtype="IMA_ADPCM"): "packed as IMA_ADPCM",
    }
    for data, said in cases.items():
        with pytest.raises(DataError, match=said) as e:
            read(data, "x.wav")
        assert str(e.value).startswith("x.wav: ") and len(str(e.value).splitlines()) == 1


def head(rate=8000, frames=10, channels=1, bits=16, data=None):
    data = frames * channels * bits // 8 if data is None else data
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + data, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", data)
    )


def test_absurd_files_are_refused_from_the_header(tmp_path):
    start = time.perf_counter()
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(head(frames=2**30))
        file.truncate(44 + 2**31)  # a sparse file
    for call in (header, read):
        with pytest.raises(DataError, match=r"long\.wav: more than 34 million samples"):
            call(path)
        for rate in (0, 1, 999, 400_001, 2**31 - 1):
            with pytest.raises(DataError, match="x: "):
                call(head(rate) + bytes(20), "x")
    slow = head(1000, 2**19) + bytes(2**20)
    with pytest.raises(DataError, match="more than 34 million samples at 384000"):
        read(slow, "x", rate=384_000)
    assert time.perf_counter() - start < 2


def test_a_wav_out_of_a_pipe_has_no_length():
    data = head(data=2**32 - 1) + audio.pcm(CODES)
    assert np.array_equal(read(data, "it")[0], CODES)


# ---- windows


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (49, 1), (99, 1), (100, 1), (149, 1), (150, 2), (200, 2), (249, 2), (250, 3)]
)
def test_windows(n, k):
    codes = (np.arange(n) % 100 + 1).astype(np.uint8)
    x = audio._cut(codes, 100)
    assert x.shape == (k, 1, 100) and k == audio._windows(n, 100)
    kept = min(n, k * 100)
    assert np.array_equal(x.reshape(-1)[:kept], codes[:kept]) and (x.reshape(-1)[kept:] == SILENCE).all()


# ---- tones


def test_tones_are_what_their_classes_say():
    source = load("tones", "test")
    assert source.spec.rate == 4000 and source.spec.shape == (1, 1600) and source.spec.classes == SETS["tones"].classes
    rows = everything(source)
    assert rows["x"].dtype == torch.uint8 and torch.bincount(rows["label"], minlength=8).min() > 30
    x, label = decode(rows["x"].numpy())[:, 0], rows["label"].numpy()
    assert abs(x).max() < 0.99 and abs(x).mean() > 0.1
    spectrum = abs(np.fft.rfft(x.reshape(-1, 4, 400) * np.hanning(400), 4000))  # bins of 1 Hz
    pitch = spectrum[..., 100:900].argmax(-1) + 100
    rises, falls = (np.diff(pitch, axis=1) * s > 0 for s in (1, -1))
    assert rises[label % 2 == 0].all() and falls[label % 2 == 1].all()
    # the second harmonic belongs to the saw, the third to square and saw, and, fainter, the triangle
    low = pitch[:, :] < 320
    at = [np.take_along_axis(spectrum, (h * pitch).clip(max=2000)[..., None], -1)[..., 0] for h in (1, 2, 3)]
    for wave, (second, third) in enumerate([(0, 0), (0, 1 / 9), (0, 1 / 3), (1 / 2, 1 / 3)]):
        some = low & (label[:, None] // 2 == wave)
        assert abs(np.median((at[1] / at[0])[some]) - second) < 0.06
        assert abs(np.median((at[2] / at[0])[some]) - third) < 0.06


def test_tones_hold_more_than_their_histogram():
    train, test = load("tones", "train"), load("tones", "test")
    counts = np.bincount(everything(train)["x"].flatten().numpy(), minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())[everything(test)["x"].numpy()].mean()
    assert likelihood.baseline(train, test) == ("histogram", pytest.approx(bits, rel=1e-12)) and bits > 7
    # a straight line through the last two samples predicts within a few codes: half of the bits are for the taking
    x = decode(everything(test)["x"].numpy())[:, 0]
    wrong = encode(x[:, 2:]).astype(int) - encode(2 * x[:, 1:-1] - x[:, :-2]).astype(int)
    assert np.median(abs(wrong)) < 20


# ---- spoken digits


def spoken(root, packed, takes=50, rate=8000):
    """All names, with sounds that tell digit, speaker and take."""
    files = {}
    for digit in range(10):
        for k, speaker in enumerate(("a", "b", "c", "d", "e", "f")):
            for take in range(takes):
                codes = np.array([digit, k, take, *range(30 + digit)], np.uint8)
                files[f"{digit}_{speaker}_{take}.wav"] = audio.wav(codes, rate)
    folder = root / "fsdd"
    folder.mkdir(parents=True)
    if packed:
        with zipfile.ZipFile(folder / "recordings.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"recordings/{name}", data)
            archive.writestr("recordings/README.md", "not a sound")
    else:
        (folder / "recordings").mkdir()
        for name, data in files.items():
            (folder / "recordings" / name).write_bytes(data)


@pytest.mark.parametrize("packed", [True, False])
def test_fsdd_layout_and_split(tmp_path, packed):
    spoken(tmp_path, packed)
    takes = {"train": range(10, 50), "val": range(5, 10), "test": range(5)}
    for split, wanted in takes.items():
        source = load("fsdd:50", split, tmp_path)
        rows = everything(source)
        assert source.spec.shape == (1, 50) and source.spec.rate == 8000 and source.spec.size == 2400
        assert torch.equal(rows["label"], rows["x"][:, 0, 0].long()) and source.size == 60 * len(wanted)
        assert set(rows["x"][:, 0, 2].tolist()) == set(wanted)
        assert len({(*x[0, :3].tolist(),) for x in rows["x"]}) == source.size
        ends = torch.arange(50) >= 33 + rows["label"][:, None]
        assert (rows["x"][:, 0][ends] == SILENCE).all() and not (rows["x"][:, 0][~ends] == SILENCE).any()
    short = load("fsdd:10", "test", tmp_path)  # 33 to 42 samples: rests of 5 and more make a window of their own
    assert short.size == 30 * (2 * 3 + 8 * 4)


def test_fsdd_that_will_not_do(tmp_path):
    with pytest.raises(DataError, match=r"recordings\.zip is not there, and cannot be downloaded") as e:
        load("fsdd", root=tmp_path)
    assert "free-spoken-digit-dataset" in e.value.hint and "--data-root" in e.value.hint
    spoken(tmp_path / "few", True, takes=49)
    with pytest.raises(DataError, match="holds 2940 recordings, which is not its official number"):
        load("fsdd", root=tmp_path / "few")
    spoken(tmp_path / "fast", True, rate=16000)
    with pytest.raises(DataError, match=r"0_a_0\.wav: 16000 samples a second, and fsdd has 8000"):
        load("fsdd", "test", tmp_path / "fast")
    whole = (tmp_path / "few" / "fsdd" / "recordings.zip").read_bytes()
    (tmp_path / "few" / "fsdd" / "recordings.zip").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"recordings\.zip: cannot be read"):
        load("fsdd", root=tmp_path / "few")


def test_real_fsdd():
    root = Path(os.environ.get("GENCLI_DATA", "nowhere"))
    if not (root / "fsdd").exists():
        pytest.skip("needs GENCLI_DATA with fsdd")
    sizes = [load("fsdd", split).size for split in SPLITS]
    assert tuple(sizes) == SETS["fsdd"].sizes
    test = everything(load("fsdd:8000", "test"))
    assert torch.bincount(test["label"]).tolist() == [30] * 10  # test clips are at most 1.5 seconds long
    with zipfile.ZipFile(root / "fsdd" / "recordings.zip") as archive:
        x, _ = soundfile.read(io.BytesIO(archive.read("recordings/0_george_0.wav")))
    assert any(np.array_equal(row[0, : len(x)], encode(x)) for row in test["x"].numpy())


# ---- a user's folder


def fill(folder, n, start=0, rate=8000, length=300, kind="wav"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        g = np.random.default_rng(i)
        data = sound(g.uniform(-0.5, 0.5, length), rate, "WAV" if kind == "wav" else "FLAC")
        (folder / f"{i:03}.{kind}").write_bytes(data)


def test_a_folder_of_sounds(tmp_path):
    fill(tmp_path / "dog", 12)
    fill(tmp_path / "cat", 12, 12, kind="flac")
    (tmp_path / "cover.jpg").write_bytes(b"no sound")
    sources = {s: load(f"{tmp_path}:100", s) for s in SPLITS}
    spec = sources["train"].spec
    assert spec.kind == "audio" and spec.shape == (1, 100) and spec.rate == 8000 and spec.classes == ("cat", "dog")
    assert sum(s.size for s in sources.values()) == 72 and spec.size == sources["train"].size
    rows = everything(sources["train"])
    dogs = {read(f)[0][:100].tobytes() for f in (tmp_path / "dog").iterdir()}
    assert [int(x.numpy().tobytes() in dogs) for x in rows["x"][::3]] == rows["label"][::3].tolist()
    assert load(str(tmp_path)).spec.shape == (1, audio.LENGTH)
    with pytest.raises(UsageError, match="only images have levels"):
        load(f"{tmp_path}:threshold")
    with pytest.raises(UsageError, match="not a folder"):
        load(str(next((tmp_path / "dog").iterdir())))


def test_own_splits(tmp_path):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "valid", 3, 10)
    fill(tmp_path / "test", 2, 20)
    assert [load(f"{tmp_path}:300", s).size for s in SPLITS] == [10, 3, 2]


def test_other_rates_are_resampled_and_that_is_said_once(tmp_path, capsys):
    fill(tmp_path, 20)
    fill(tmp_path, 5, 20, rate=44100, length=3000)
    sizes = [load(f"{tmp_path}:300", s) for s in SPLITS]
    assert {s.spec.rate for s in sizes} == {8000}
    assert sum(s.size for s in sizes) == 20 + 5 * audio._windows(math.ceil(3000 * 80 / 441), 300)
    assert capsys.readouterr().err == f"{tmp_path}: resampled 5 of 25 sounds to 8000 samples a second\n"


def test_bad_sounds_stop_or_are_skipped(tmp_path, capsys):
    fill(tmp_path, 30)
    (tmp_path / "005.wav").write_bytes(b"")
    loud = sound(np.array([0.0, np.nan] * 200), subtype="FLOAT")
    (tmp_path / "011.wav").write_bytes(loud)
    with pytest.raises(DataError, match=r"005\.wav: the file is empty \(1 of 30 sounds in .* are bad\)"):
        load(f"{tmp_path}:300")
    size = sum(load(f"{tmp_path}:300", s, on_bad="skip").size for s in SPLITS)
    assert size == 28 and "left out 2 of 30 sounds, the first 011.wav" in capsys.readouterr().err
    (tmp_path / "005.wav").unlink()
    with pytest.raises(DataError, match=r"011\.wav: samples that are not finite"):  # in whichever split it is
        for split in SPLITS:
            load(f"{tmp_path}:300", split)
    for i in range(12, 14):
        (tmp_path / f"{i:03}.wav").write_bytes(b"no")
    with pytest.raises(DataError, match="3 of 29"):
        load(f"{tmp_path}:300", on_bad="skip")


def test_a_folder_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    fill(tmp_path, 12)
    monkeypatch.setattr(audio, "IN_MEMORY", 1000)
    with pytest.raises(DataError, match="million samples for train"):
        load(f"{tmp_path}:300")


def test_levels_and_rates_of_a_model_and_its_data_agree():
    class Any8000(torch.nn.Module):
        likelihood = "exact"
        spec = DataSpec(name="a", kind="audio", shape=(1, 4), levels=256, rate=8000)

        def log_prob(self, x, rng, labels=None):
            raise AssertionError

    other = Any8000.spec.model_copy(update={"rate": 4000})
    source = TensorSource("b", "test", other, torch.zeros(3, 1, 4, dtype=torch.uint8))
    with pytest.raises(UsageError, match="the samples a second of b are not those of a"):
        likelihood.nll(Any8000(), source)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_no_truncation_is_taken_for_the_whole(kind):
    data = sound(sine(300), kind=kind)
    for length in range(len(data)):
        with pytest.raises(DataError, match=r"^x: "):
            read(data[:length], "x")
