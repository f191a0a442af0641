"""gencli evaluate elbo, iwae and nll of models with bounds: which number, of which sign, by how many draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gencli import checkpoint, data
from gencli.rng import SampleRng
from gencli.sampling import scope
from tests.test_cli import Call, gencli, invoke, refused
from tests.tiny import words

__all__ = ["gencli"]  # the fixture

N = 70  # more than a chunk


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small runs of a VAE on digits (1), of a PixelCNN (2), of MAF on moons (3)."""
    place = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("GENCLI_QUIET", "1")
        for name in ("vae", "pixelcnn", "maf"):
            assert invoke("train", name, *words(name), "--steps", 4) == 0
        yield place


@pytest.fixture(autouse=True)
def _at_shop(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setenv("GENCLI_QUIET", "1")


@pytest.mark.parametrize("k", [5, None])
def test_the_bounds_are_the_model_s(gencli: Call, k: int | None) -> None:
    loaded = checkpoint.load(Path("runs/0001-vae-digits"))
    x = data.load("digits", "test").rows(torch.arange(N))["x"]
    nats = []
    for rows in (range(64), range(64, N)):
        with scope(SampleRng(0, rows, "eval-test")) as rng:
            nats.append(loaded.model.iwae(x[rows.start : rows.stop], rng, k or 1000))
    mean = torch.cat(nats).mean().item()
    row = gencli("eval", "iwae", 1, "-n", N, *([] if k is None else ["-k", k])).row
    assert (row["metric"], row["kind"], row["k"], row["examples"]) == ("iwae", "lower bound", k or 1000, N)
    assert row["nats"] == pytest.approx(mean, rel=1e-6) and row["nats"] < 0
    # as a code length, of the sign of every other bits/dim
    assert row["bits_per_dim"] == pytest.approx(-mean / 64 / math.log(2), rel=1e-6)
    assert row["ratio"] == pytest.approx(row["bits_per_dim"] / row["independent_pixels"])


def test_elbo_below_iwae_below_more_draws_and_nll_takes_the_tightest(gencli: Call) -> None:
    elbo = gencli("eval", "elbo", 1, "-n", N).row
    assert elbo["kind"] == "lower bound" and "k" not in elbo
    few, many, nll = (gencli("eval", *words, 1, "-n", N).row for words in (["iwae", "-k", 10], ["iwae"], ["nll"]))
    assert elbo["nats"] < few["nats"] < many["nats"]
    assert (nll["kind"], nll["bound"], nll["k"]) == ("upper bound", "iwae", 100)
    assert few["nats"] < -nll["nats"] < many["nats"]
    same = gencli("eval", "iwae", 1, "-n", N, "-k", 100).row
    assert nll["nats"] == -same["nats"] and nll["bits_per_dim"] == same["bits_per_dim"]
    assert gencli("eval", "nll", 1, "-n", N, "-k", 10).row["nats"] == -few["nats"]


def test_all_has_the_bounds_of_a_model_that_has_them(gencli: Call) -> None:
    from gencli.training.scores import Asked, applicable

    assert applicable(checkpoint.load(Path("runs/0001-vae-digits")), Asked())[:3] == ["nll", "elbo", "iwae"]
    assert "iwae" not in applicable(checkpoint.load(Path("runs/0002-pixelcnn-digits")), Asked())


def test_a_run_may_be_selected_by_its_bound(gencli: Call) -> None:
    made = gencli("train", "vae", *words("vae"), "--steps", 4, "train.evaluate=[iwae]", "train.evaluate_every=2")
    assert made.code == 0
    text = (Path(made.out.strip()) / "metrics.jsonl").read_text("utf-8")
    assert '"iwae": -' in text


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["elbo", "2"], "no elbo"),
        (["iwae", "3"], "no iwae"),
        (["nll", "2", "-k", "5"], "no bound by draws"),
        (["elbo", "1", "-k", "5"], "-k is for iwae and nll"),
        (["fid", "1", "-k", "5"], "-k is for iwae and nll"),
        (["iwea", "1"], "did you mean"),
    ],
)
def test_what_has_no_bound_is_refused_by_name(gencli: Call, words: list[str], what: str) -> None:
    refused(gencli("eval", *words), 2, what)


def test_compare_refuses_a_metric_that_a_model_lacks(gencli: Call) -> None:
    refused(gencli("compare", "vae", "pixelcnn", "--metric", "elbo"), 2, "pixelcnn has no bound")
