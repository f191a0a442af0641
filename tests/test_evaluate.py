"""gencli evaluate on samples: one number whatever carries them, with its protocol, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from gencli import checkpoint, data
from gencli.metrics.extractors import BLOCK, Pixels, features
from gencli.metrics.frechet import Moments, distance
from gencli.training.scores import Asked, score
from tests.test_cli import Call, gencli, invoke, refused
from tests.tiny import words

__all__ = ["gencli"]  # the fixture

N = 90


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small run of a VAE on digits (1), one of a conditional PixelCNN (2), and 90 samples of the first
    as a stream, a folder and arrays; a cache folder of its own."""
    place = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("GENCLI_QUIET", "1")
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert invoke("train", "vae", *words("vae"), "--steps", 4) == 0
        assert invoke("train", "pixelcnn", *words("pixelcnn"), "model.conditional=true", "--steps", 4) == 0
        for out in ("s.tar", "s/", "s.npz", "s.safetensors"):
            assert invoke("sample", 1, "-n", N, "-o", out) == 0
        yield place


@pytest.fixture(autouse=True)
def _at_shop(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setenv("GENCLI_QUIET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shop / "cache"))


# ---------------------------------------------------------------------------------------------- one number


def test_one_number_whatever_carries_the_samples(gencli: Call) -> None:
    told = gencli("eval", "fid", 1, "-n", N).row
    assert told["metric"] == "fd-domain" and told["data"] == "digits@test"
    assert (told["samples"], told["reference"]) == (N, 359)
    assert (
        told["extractor"] == "classifier on digits" and told["extractor_accuracy"] > 0.98 and len(told["sha256"]) == 12
    )
    assert 0 < told["real"] < told["gaussian"] and told["ratio"] == pytest.approx(told["value"] / told["gaussian"])
    stream = Path("s.tar").read_bytes()
    for subject in ("s.tar", "s", "s.npz", "s.safetensors"):
        assert gencli("eval", "fid", subject).row["value"] == told["value"], subject
    piped = gencli("eval", "fid", "-", "--data", "digits", stdin=stream)
    assert piped.row["value"] == told["value"] and piped.row["model"] == "vae"


def test_the_number_is_the_distance_of_the_features(gencli: Call) -> None:
    """Of pixels, where it can be said by hand: in float64, with a matrix root by eigenvalues."""
    told = gencli("eval", "fid", "s.npz", "--extractor", "pixels", "--no-baselines").row
    with np.load("s.npz") as file:
        x = file["x"].reshape(N, -1) / 8 - 1
    source = data.load("digits", "test")
    y = source.rows(torch.arange(359))["x"].reshape(359, -1).numpy() / 8 - 1
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    by_hand = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert told["metric"] == "fd-pixels" and told["value"] == pytest.approx(by_hand, rel=1e-6)
    assert "real" not in told


def test_order_and_chunks_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 17, (200, 1, 8, 8)).astype(np.uint8)
    spec = data.load("digits", "test").spec

    def moments(chunks: list[np.ndarray]) -> Moments:
        found = Moments(64)
        for one in features(Pixels(), chunks, spec):
            found.add(one.x)
        return found

    whole = moments([x])
    for chunks in ([x[:1], x[1:70], x[70:]], np.array_split(x, 200), [x[:BLOCK], x[BLOCK:]]):
        other = moments(chunks)
        assert torch.equal(whole.tensors()["mean"], other.tensors()["mean"])
        assert torch.equal(whole.tensors()["scatter"], other.tensors()["scatter"])
    mixed = moments([x[rng.permutation(200)]])
    assert abs(distance(whole, mixed)) < 1e-9
    fixed = moments([rng.integers(0, 17, (200, 1, 8, 8)).astype(np.uint8)])
    assert distance(whole, fixed) == pytest.approx(distance(mixed, fixed), rel=1e-10)


def test_a_network_sees_blocks_of_one_size() -> None:
    """Bits of a matrix product depend on the number of rows: the last block is filled up."""
    sizes = []

    class Spy(Pixels):
        def __call__(self, x: np.ndarray, spec: data.source.DataSpec) -> object:  # type: ignore[name-defined, override]
            sizes.append(len(x))
            return super().__call__(x, spec)

    x = np.zeros((150, 1, 8, 8), np.uint8)
    assert sum(len(f.x) for f in features(Spy(), [x[:7], x[7:]], data.load("digits", "test").spec)) == 150
    assert sizes == [BLOCK] * 3


def test_several_processes_tell_the_same(gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    alone = gencli("eval", "fid", 1, "-n", N, "--no-baselines").row
    made = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-m", "gencli", "eval", "fid", "1", "-n", str(N), "--no-baselines", "--devices", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == alone


# ---------------------------------------------------------------------------------------------- the reference


def test_saved_statistics(gencli: Call) -> None:
    made = gencli("data", "stats", "digits", "-o", "stats.safetensors")
    assert made.code == 0 and made.row["rows"] == 359
    told, direct = (gencli("eval", "fid", "s.tar", "--data", what).row for what in ("stats.safetensors", "digits"))
    assert told["value"] == direct["value"] and told["data"] == "digits@test" and "gaussian" not in told
    refused(gencli("eval", "kid", "s.tar", "--data", "stats.safetensors"), 2, "saved statistics serve fid alone")
    other = gencli("eval", "fid", "s.tar", "--data", "stats.safetensors", "--extractor", "pixels")
    refused(other, 3, "made by 'classifier on digits'", "not by pixels")
    refused(gencli("eval", "fid", "s.tar", "--data", "s.safetensors"), 3, "holds no statistics")
    refused(gencli("data", "stats", "digits", "-o", "stats.npz"), 2, ".safetensors")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda said, t: said.pop("name"), "'name': Field required"),
        (lambda said, t: said.pop("data"), "'data': Field required"),
        (lambda said, t: said.update(spec={"name": "digits"}), "'spec.kind': Field required"),
        (lambda said, t: said.update(spec=3), "'spec': "),
        (lambda said, t: said.update(digest=7), "'digest': "),
        (lambda said, t: said.update(name="inceptoin"), "no extractor 'inceptoin'"),
        (lambda said, t: t.pop("mean"), "no mean and scatter"),
        (lambda said, t: t.update(n=torch.tensor([3, 4])), "no mean and scatter"),
        (lambda said, t: t.update(n=torch.tensor(1)), "do not go with 1 rows"),
        (lambda said, t: t.update(scatter=t["scatter"][:, :-1].contiguous()), "do not go with 359 rows"),
        (lambda said, t: t["scatter"].fill_(float("nan")), "not finite"),
    ],
)
def test_statistics_that_gencli_did_not_write(gencli: Call, edit: Callable[..., object], told: str) -> None:
    if not Path("whole.safetensors").exists():
        assert gencli("data", "stats", "digits", "-o", "whole.safetensors").code == 0
    with safe_open("whole.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["gencli"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(meta["stats"], tensors)
    save_file(tensors, "edited.safetensors", {"gencli": json.dumps(meta)})
    call = gencli("eval", "fid", "s.tar", "--data", "edited.safetensors")
    refused(call, 2 if told.startswith("no extractor") else 3, told)


def test_a_changed_folder_never_meets_an_old_number(gencli: Call, tmp_path: Path) -> None:
    shutil.copytree("s", tmp_path / "s")
    ask = (
        "eval",
        "fid",
        "s.tar",
        "--data",
        tmp_path / "s",
        "--split",
        "all",
        "--extractor",
        "pixels",
        "--no-baselines",
    )
    assert gencli(*ask).row["value"] < 1e-3, "a set and itself, but for bytes that are no levels"
    first = sorted((tmp_path / "s").glob("*.png"))[0]
    Image.fromarray(255 - np.asarray(Image.open(first))).save(first)
    assert gencli(*ask).row["value"] > 0.01


def test_all_splits_are_one_reference(gencli: Call) -> None:
    told = gencli("eval", "fid", "s.tar", "--split", "all").row
    assert told["reference"] == 1797 and told["data"] == "digits@all" and "real" not in told


def test_baselines_are_real_rows_and_a_gaussian(gencli: Call) -> None:
    """Against the same by hand: 90 rows of train drawn anew would differ, so that only their size is compared."""
    told = gencli("eval", "fid", "s.tar").row
    again = gencli("eval", "fid", "s.tar", "--seed", 1).row
    assert told["value"] == again["value"] and told["real"] != again["real"]
    assert 0.5 < told["real"] / again["real"] < 2 < told["gaussian"] / told["real"] < 100


# ---------------------------------------------------------------------------------------------- the other metrics


def test_metrics_of_samples(gencli: Call) -> None:
    kid = gencli("eval", "kid", "s.tar").row
    assert kid["metric"] == "kd-domain" and kid["value"] > 3 * kid["stderr"] > 0
    score = gencli("eval", "inception-score", "s.tar").row
    assert score["metric"] == "inception-score-domain" and 1 <= score["value"] <= 10
    assert 0 <= score["E[H(y|x)]"] <= score["H(y)"] <= np.log(10) and score["splits"] == 10
    both = gencli("eval", "precision-recall", "s.tar").row
    assert 0 <= both["precision"] <= 1 and 0 <= both["recall"] <= 1


def test_real_rows_are_precise_and_complete(gencli: Call, tmp_path: Path) -> None:
    source = data.load("digits", "train")
    np.savez(tmp_path / "real.npz", x=(source.rows(torch.arange(300))["x"].numpy() * 15.9375).round().astype(np.uint8))
    found = gencli("eval", "precision-recall", tmp_path / "real.npz", "--data", "digits").row
    assert found["precision"] > 0.8 and found["recall"] > 0.5
    told = gencli("eval", "fid", tmp_path / "real.npz", "--data", "digits").row
    assert told["value"] < 0.2 * told["gaussian"]


def test_distance_per_class_and_extrapolated(gencli: Call) -> None:
    told = gencli("eval", "fid", 2, "-n", 200, "--per-class", "--extrapolate").row
    assert len(told["by_class"]) == 10 and told["class_mean"] == pytest.approx(np.mean(list(told["by_class"].values())))
    assert told["infinity"] < told["value"] and told["infinity_stderr"] > 0
    refused(gencli("eval", "fid", "s.tar", "--per-class"), 2, "the samples have no labels")


def test_accuracy_of_a_classifier_and_of_samples(gencli: Call) -> None:
    drawn = gencli("eval", "accuracy", 2, "-n", 100).row
    assert drawn["metric"] == "accuracy-domain" and 0 <= drawn["accuracy"] <= 0.6 and drawn["samples"] == 100
    assert gencli("eval", "accuracy", "s.tar").code == 2
    assert invoke("train", "classifier", *words("classifier"), "--steps", 3, "--out", "c") == 0
    told = gencli("eval", "accuracy", "c").row
    model = checkpoint.load("c").model
    rows = data.load("digits", "test").rows(torch.arange(359))
    right = (model.classify(rows["x"]).argmax(1) == rows["label"]).double().mean().item()
    assert told["accuracy"] == pytest.approx(right) and told["examples"] == 359 and 0.1 < told["commonest"] < 0.13
    by_run = gencli("eval", "fid", "s.tar", "--extractor", "c").row
    assert by_run["metric"] == "fd-classifier" and by_run["extractor"] == "classifier on digits, step 3"


def test_all_metrics_of_a_run(gencli: Call) -> None:
    found = {row["metric"]: row for row in gencli("eval", "all", 1, "-n", N).rows}
    assert set(found) == {
        *(
            "nll",
            "elbo",
            "iwae",
            "fd-domain",
            "kd-domain",
            "precision-recall-domain",
            "inception-score-domain",
            "memorisation",
        )
    }
    assert found["fd-domain"]["value"] == gencli("eval", "fid", 1, "-n", N).row["value"]


def test_points_have_their_own_values_for_features(gencli: Call) -> None:
    assert invoke("train", "wgan-gp", *words("wgan-gp"), "--steps", 2, "--data", "points/moons", "--out", "w") == 0
    told = gencli("eval", "fid", "w", "-n", 500).row
    assert told["metric"] == "fd-pixels" and told["reference"] == 10_000 and told["real"] < told["value"]


def test_points_of_a_known_density_show_the_gap(gencli: Call) -> None:
    made = (
        "train",
        "realnvp",
        *words("realnvp"),
        "--data",
        "points/moons",
        "model.logit=null",
        "--steps",
        2,
        "--out",
        "r",
    )
    assert invoke(*made) == 0
    told = gencli("eval", "nll", "r", "-n", 12_000).row
    assert told["kind"] == "density" and "bits_per_dim" not in told and told["examples"] == 12_000
    assert told["entropy"] == pytest.approx(1.008, abs=0.03) and told["gap"] == pytest.approx(
        told["nats"] - told["entropy"]
    )


# ---------------------------------------------------------------------------------------------- in training


def test_a_recipe_may_be_judged_by_its_samples(gencli: Call) -> None:
    more = ["train.evaluate=[fid,nll]", "train.evaluate_every=2", "train.evaluate_samples=30"]
    assert invoke("train", "vae", *words("vae"), "--steps", 6, *more, "--out", "judged") == 0
    events = [json.loads(line) for line in Path("judged/metrics.jsonl").read_text().splitlines()]
    curve = {e["step"]: e["fd-domain@30/180"] for e in events if e["event"] == "eval"}
    assert list(curve) == [2, 4, 6] and all("bits_per_dim" in e for e in events if e["event"] == "eval")
    best = json.loads(Path("judged/checkpoints/best.json").read_text())
    assert best["metric"] == "fd-domain@30/180" and best["step"] == min(curve, key=curve.__getitem__)
    asked = Asked(split="val", n=30, baselines=False)
    assert score("fid", checkpoint.load("judged"), asked)["value"] == min(curve.values())


def test_a_recipe_asks_for_metrics_that_there_are(gencli: Call) -> None:
    refused(gencli("train", "vae", "train.evaluate=[fdi]"), 2, "'fdi'", "did you mean 'fid'?")
    refused(gencli("train", "wgan-gp", "train.evaluate=[nll]"), 2, "wgan-gp has no likelihood")


# ---------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_measured_is_one_line(gencli: Call, tmp_path: Path) -> None:
    refused(gencli("eval", "fdi", 1), 2, "unknown metric 'fdi'", "did you mean 'fid'?")
    refused(gencli("eval", "fid", "-", "--data", "digits", stdin=b""), 3, "standard input")
    refused(gencli("eval", "fid", "s.tar", "--extractor", "domian"), 2, "'domian'", "did you mean 'domain'?")
    refused(gencli("eval", "fid", "s.tar", "-n", 1), 3, "2")
    refused(gencli("eval", "kid", "s.tar", "-n", 1), 3, "kid needs 4")
    refused(gencli("eval", "inception-score", "s.tar", "-n", 5), 3, "10")
    refused(gencli("eval", "precision-recall", "s.tar", "-n", 3), 3, "4")
    refused(gencli("eval", "nll", "s.tar"), 2, "nll is of a run")
    refused(
        gencli("eval", "fid", "s.tar", "--data", "shapes", "--extractor", "pixels"), 3, "of 64 and of 400 dimensions"
    )
    refused(
        gencli("eval", "fid", "s.tar", "--data", "points/moons", "--extractor", "domain"), 2, "no images with classes"
    )
    refused(gencli("eval", "fid", "s.tar", "--extractor-weights", "x.pth"), 2, "--extractor inception")
    refused(gencli("eval", "fid", "s.tar", "--extractor", "inception", "--extractor-weights", "x.pth"), 3, "x.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.md").write_text("nothing")
    refused(gencli("eval", "fid", tmp_path / "empty", "--data", "digits"), 3, "holds no samples")


def test_mixed_sizes_and_colours_and_a_corrupt_member(gencli: Call, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 8)), ("b", (8, 9)), ("c", (8, 8, 3))):
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f"{name}.png")
    for names, said in (("ab", "1x8x9"), ("ac", "3x8x8")):
        folder = tmp_path / names
        folder.mkdir()
        for name in names:
            shutil.copy(tmp_path / f"{name}.png", folder)
        refused(gencli("eval", "fid", folder, "--data", "digits"), 3, said)
    broken = bytearray(Path("s.tar").read_bytes())
    at = broken.index(b"IDAT") + 8
    broken[at : at + 8] = b"\0" * 8
    (tmp_path / "broken.tar").write_bytes(broken)
    refused(gencli("eval", "fid", tmp_path / "broken.tar", "--data", "digits"), 3, "00000000")
