"""gencli interpolate and reconstructions: paths, keyframes, differences of classes, films, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gencli as package
from gencli import data, latents, pictures, plots
from gencli.console import DataError
from gencli.contract import Config, DataSpec, Model
from gencli.data.source import TensorSource
from gencli.rng import SampleRng
from gencli.sampling import draw, scope
from tests.test_cli import Call, Result, digits, gencli, invoke, members, pixels, refused
from tests.tiny import words

__all__ = ["gencli"]  # the fixture

VAE, CLASSES, GAN, FLOW, PIXELCNN = 1, 2, 3, 4, 5  # runs of the shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small runs of a VAE, a class-conditional one, a GAN of points, a flow, and a PixelCNN, and files of
    the first digits."""
    place = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("GENCLI_QUIET", "1")
        for name, *more in (
            ("vae", "model.latents=3"),
            ("vae", "model.conditional=true"),
            ("wgan-gp", "--data", "points/moons"),
            ("nice",),
            ("pixelcnn",),
        ):
            assert invoke("train", name, *words(name), *more, "--steps", 4) == 0
        for i, x in enumerate(digits("test", 4).numpy()):
            pictures.save_png(place / f"{i}.png", pictures.grid(x[None], 17, pad=0, scale=1))
        np.savez(place / "four.npz", x=pictures.to_bytes(digits("test", 4).numpy(), 17))
        yield place


@pytest.fixture(autouse=True)
def _at_shop(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setenv("GENCLI_QUIET", "1")


@pytest.fixture
def walked(gencli: Call, tmp_path: Path) -> Any:
    """Call interpolate; the examples that it wrote, raw ``(n, ...)``."""

    def call(*argv: object, **how: Any) -> np.ndarray[Any, Any]:
        made = gencli("interpolate", *argv, "-o", tmp_path / "x.npz", **how)
        assert made.code == 0, made.err
        return np.load(tmp_path / "x.npz", allow_pickle=False)["x"]

    return call


def model(run: int) -> Model:
    (folder,) = Path("runs").glob(f"{run:04}-*")
    return package.load(folder)


def decoded(net: Model, z: torch.Tensor, labels: torch.Tensor | None = None) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return net.spec.unscale(net.decode(z) if labels is None else net.decode(z, labels)).numpy()


def prior(net: Model, seed: int, rows: list[int], purpose: str) -> torch.Tensor:
    with scope(SampleRng(seed, rows, purpose)) as rng:
        return net.prior(rng)


def mean_latent(net: Model, k: int) -> torch.Tensor:
    """By force: every training digit of class k, one after the other, in float64."""
    rows = data.load("digits", "train").rows(torch.arange(1258))
    mine = rows["x"][rows["label"] == k]
    with torch.no_grad():
        return sum(net.encode(x[None], None)[0].double() for x in mine) / len(mine)


def near(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal up to one level in a hundred pixels, where rounding fell to the other side."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and bool((a != b).mean() < 0.01)


# ---------------------------------------------------------------------------------------------- paths


def test_slerp_keeps_the_norm_and_its_ends() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 33)[:, None]
    for angle in (1e-3, 0.5, 1.5, 3.0, math.pi - 2e-3):  # float32, and nearly antiparallel: where an arccos fails
        z0 = torch.randn(64, generator=g)
        aside = torch.randn(64, generator=g)
        aside = aside - (aside @ z0) / (z0 @ z0) * z0
        z1 = math.cos(angle) * z0 + math.sin(angle) * aside * z0.norm() / aside.norm()
        arc = latents.slerp(z0, z1, t)
        torch.testing.assert_close(arc.norm(dim=1), z0.norm().expand(33), rtol=1e-3 if angle > 3.1 else 2e-5, atol=0)
        assert torch.equal(arc[0], z0) and torch.equal(arc[-1], z1)
    z0, z1 = torch.randn(2, 1000, generator=g)
    assert torch.equal(latents.slerp(z0, z1, t)[[0, -1]], torch.stack([z0, z1]))


def test_a_path_passes_its_keyframes_and_a_loop_returns() -> None:
    keys = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))  # latents of any shape
    for path in ("lerp", "slerp"):
        z = latents.through(None, keys, 5, path)
        assert z.shape == (9, 2, 4) and torch.equal(z[::4], keys)
        closed = latents.through(None, keys, 5, path, loop=True)
        assert torch.equal(closed[:9], z) and torch.equal(closed[-1], keys[0]) and len(closed) == 13
    assert torch.equal(latents.through(None, keys, 2, "lerp"), keys)


def test_a_model_s_own_path_is_taken_first() -> None:
    class Own:
        def path(self, z0: torch.Tensor, z1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.where(t < 0.5, z0, z1)  # as for codes that have nothing between them

    z0, z1, t = torch.zeros(2), torch.ones(2), torch.tensor([0.0, 0.4, 0.6, 1.0])
    expected = torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]])
    for path in (None, "model"):
        assert torch.equal(latents.between(Own(), z0, z1, t, path), expected)
    assert torch.equal(latents.between(Own(), z0, z1, t, "lerp"), t[:, None].expand(4, 2))


def test_bilinear_corners_are_the_corners() -> None:
    corners = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    for path in ("lerp", "slerp"):
        square = latents.bilinear(None, *corners, 6, path).view(6, 6, 7)
        assert torch.equal(square[[0, 0, -1, -1], [0, -1, 0, -1]], corners)


def test_a_traversal_changes_one_entry_a_row() -> None:
    z, values = torch.arange(6.0).view(2, 3), torch.tensor([-3.0, 0, 3])
    rows = latents.traversal(z, [4, 0], values)
    assert rows.shape == (2, 3, 2, 3)
    for i, j in enumerate((4, 0)):
        others = torch.arange(6) != j
        assert torch.equal(rows[i].flatten(1)[:, j], values)
        assert (rows[i].flatten(1)[:, others] == z.flatten()[others]).all()


def test_principal_axes_are_those_of_the_covariance() -> None:
    g = np.random.default_rng(0)
    z = g.normal(size=(400, 5)) @ np.diag([0.1, 3, 0.2, 1, 0.3]) + 7
    x, share = latents.principal_axes(z)
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    assert share == pytest.approx(values[-2:].sum() / values.sum())
    for k in range(2):
        axis = vectors[:, -1 - k] * np.sign(vectors[np.abs(vectors[:, -1 - k]).argmax(), -1 - k])
        np.testing.assert_allclose(x[:, k], (z - z.mean(0)) @ axis, atol=1e-9)


# ---------------------------------------------------------------------------------------------- means of classes


class Twice(Model):
    """z = 2 x + noise, to see which rows are encoded and by which numbers."""

    chunk = 7

    def __init__(self) -> None:
        super().__init__(Config(), DataSpec(name="p", kind="points", shape=(2,), classes=("a", "b", "c")))
        self.w = torch.nn.Parameter(torch.tensor(2.0))

    def encode(self, x: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        return self.w * x + 0.1 * rng.normal("noise", x.shape)


def test_means_are_those_of_all_rows_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "READ", 50)
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(333, 2, generator=g), torch.randint(0, 2, (333,), generator=g)
    source = TensorSource("p", "train", Twice().spec, x, y)
    with torch.no_grad():
        means, counts = latents.class_means(Twice(), source, [1, 0, 1], seed=5)
    with scope(SampleRng(5, range(333), "encode")) as rng:
        noise = rng.normal("noise", (333, 2))
    for mean, count, k in zip(means, counts, (1, 0, 1)):
        assert count == (y == k).sum()
        torch.testing.assert_close(mean, (2 * x + 0.1 * noise)[y == k].double().mean(0).float())
    with pytest.raises(DataError, match="no example of class 'c'"):
        latents.class_means(Twice(), source, [0, 2], seed=5)
    with pytest.raises(DataError, match="does not say which class"):
        latents.class_means(Twice(), TensorSource("p", "train", Twice().spec, x), [0], seed=5)


def test_from_class_to_class(walked: Any, gencli: Call) -> None:
    net = model(VAE)
    ends = torch.stack([mean_latent(net, k) for k in (3, 8, 1)]).float()
    x = walked(VAE, "--from", "3", "--to", "8", "--to", 1, "--steps", 4, "--path", "lerp")
    t = torch.linspace(0, 1, 4)[:, None]
    z = torch.cat([(1 - t) * ends[0] + t * ends[1], ((1 - t) * ends[1] + t * ends[2])[1:]])
    assert near(x, decoded(net, z))
    made = gencli("interpolate", VAE, "--from", "3", "--to", "8", "-o", "-")
    count = (data.load("digits", "train").rows(torch.arange(1258))["label"] == 3).sum()
    assert f"mean latents of digits@train: 3 ({count} examples), 8 (" in made.err


def test_arithmetic_adds_the_difference_of_two_means(walked: Any) -> None:
    net = model(VAE)
    step = (mean_latent(net, 7) - mean_latent(net, 0)).float()
    x = walked(VAE, "--add", 7, "--minus", 0, "--pairs", 3, "--steps", 3, "--seed", 2).reshape(3, 3, 1, 8, 8)
    starts = prior(net, 2, [0, 1, 2], "interpolate")
    for k in range(3):
        assert near(x[:, k], decoded(net, starts + step * k / 2))
    given = walked(VAE, "--from", "four.npz", "--add", 7, "--minus", 0, "--steps", 2).reshape(4, 2, 1, 8, 8)
    z = net.posterior(digits("test", 4)).mu.detach()
    assert near(given[:, 0], decoded(net, z)) and near(given[:, 1], decoded(net, z + step))
    seeded = walked(VAE, "--seeds", 9, "--add", 7, "--minus", 7, "--steps", 2)
    assert np.array_equal(seeded[0], seeded[1])


# ---------------------------------------------------------------------------------------------- keyframes


def test_a_path_through_pictures(walked: Any, gencli: Call) -> None:
    net = model(VAE)
    expected = decoded(net, net.posterior(digits("test", 4)).mu.detach())
    files = [word for i in (1, 2, 3) for word in ("--to", f"{i}.png")]
    x = walked(VAE, "--from", "0.png", *files, "--steps", 3)
    assert len(x) == 7 and np.array_equal(x[::2], expected)
    assert np.array_equal(walked(VAE, "--from", "four.npz", "--steps", 3), x)
    stream = gencli("apply", VAE, "four.npz", "-o", "-").bytes  # any stream of pictures
    again = torch.from_numpy(expected)
    assert np.array_equal(
        walked(VAE, "--from", "-", "--steps", 2, stdin=stream), decoded(net, net.posterior(again).mu.detach())
    )
    closed = walked(VAE, "--from", "four.npz", "--steps", 3, "--loop")
    assert np.array_equal(closed[:7], x) and np.array_equal(closed[-1], x[0]) and len(closed) == 9
    mixed = walked(VAE, "--from", "0.png", "--to", "8", "--to", "1.png", "--steps", 2)
    assert np.array_equal(mixed[[0, 2]], expected[:2]) and near(
        mixed[1:2], decoded(net, mean_latent(net, 8)[None].float())
    )


def test_seeds_are_those_of_samples(walked: Any) -> None:
    x = walked(GAN, "--seeds", "3,14,5-6", "--steps", 4)
    assert x.shape == (10, 2)
    for k, seed in enumerate((3, 14, 5, 6)):
        np.testing.assert_allclose(x[3 * k], next(draw(model(GAN), 1, seed=seed)).x[0], rtol=1e-5, atol=1e-6)


def test_a_grid_between_given_corners(walked: Any) -> None:
    x = walked(VAE, "--grid", "--from", "four.npz", "--steps", 4).reshape(4, 4, 1, 8, 8)
    net = model(VAE)
    expected = decoded(net, net.posterior(digits("test", 4)).mu.detach())
    assert np.array_equal(x[[0, 0, -1, -1], [0, -1, 0, -1]], expected)


def test_the_same_latents_as_each_class(walked: Any, gencli: Call) -> None:
    net = model(CLASSES)
    z = torch.cat([prior(net, seed, [0], "sample") for seed in (3, 14)])
    x = walked(CLASSES, "--seeds", "3,14", "--labels", "2,7", "--steps", 3).reshape(2, 3, 1, 8, 8)
    for row, k in zip(x, (2, 7)):
        assert np.array_equal(row[[0, -1]], decoded(net, z, torch.tensor([k, k])))
    assert walked(CLASSES, "--seeds", "3,14", "--steps", 3).shape[0] == 8 * 3  # the first 8 classes
    stream = members(gencli("interpolate", CLASSES, "--pairs", 3, "--labels", "4,1", "--steps", 2, "-o", "-"))
    assert [json.loads(stream[f"{i:08}.json"])["label"] for i in range(6)] == [4, 4, 1, 1, 4, 4]
    y = torch.tensor([5, 5])
    given = walked(CLASSES, "--from", "0.png", "--to", "1.png", "--labels", "5", "--steps", 2)
    assert np.array_equal(given, decoded(net, net.posterior(digits("test", 2), y).mu.detach(), y))
    assert walked(CLASSES, "--grid", "--labels", "5", "--steps", 2).shape[0] == 4
    assert walked(CLASSES, "--traverse", "--labels", "5", "--steps", 2).shape[0] == 2 * 2
    refused(gencli("interpolate", CLASSES, "--from", "0.png", "--to", "1.png"), 2, "encodes by class", "--labels 3")
    refused(gencli("interpolate", CLASSES, "--from", "3", "--to", "8"), 2, "this model is told the class")
    refused(gencli("interpolate", CLASSES, "--add", "3", "--minus", "8"), 2, "this model is told the class")
    refused(gencli("interpolate", CLASSES, "--grid", "--labels", "3,4"), 2, "--labels one")


def test_every_model_with_latents_walks(walked: Any) -> None:
    x = walked(FLOW, "--from", "0.png", "--to", "1.png", "--steps", 3)
    assert np.array_equal(x[[0, 2]], digits("test", 2).numpy())  # what a flow encodes comes back
    assert walked(FLOW, "--add", 1, "--minus", 2, "--pairs", 2, "--steps", 2).shape == (4, 1, 8, 8)
    assert walked(FLOW, "--traverse", "--pairs", 5, "--steps", 4).shape == (20, 1, 8, 8)
    assert walked(GAN, "--traverse", "--steps", 4).shape == (8, 2)


# ---------------------------------------------------------------------------------------------- films and streams


def frames(path: Path) -> tuple[list[np.ndarray[Any, Any]], dict[str, Any]]:
    with Image.open(path) as film:
        found = []
        for i in range(film.n_frames):
            film.seek(i)
            found.append(np.asarray(film.convert("RGB")))
        return found, dict(film.info)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_films_go_there_and_back_or_round(ending: str, gencli: Call, walked: Any, tmp_path: Path) -> None:
    film = tmp_path / f"x.{ending}"
    for more, order in (([], [0, 1, 2, 3, 4, 3, 2, 1]), (["--loop"], [0, 1, 2, 3, 4, 5])):
        given = [VAE, "--seeds", "3,14,15", "--steps", 3, *more]
        assert gencli("interpolate", *given, "-o", film).code == 0
        x = walked(*given)
        shown, info = frames(film)
        assert info["loop"] == 0 and len(shown) == len(order)
        for image, i in zip(shown, order):
            assert np.array_equal(image, pictures.grid(x[i : i + 1], 17))
    assert gencli("interpolate", VAE, "--pairs", 4, "--steps", 5, "-o", film).code == 0
    assert len(frames(film)[0]) == 8


def test_webp_keeps_colours_and_bytes(tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    pictures.webp(tmp_path / "a.webp", list(film), ms=250)
    assert all(np.array_equal(a, b) for a, b in zip(frames(tmp_path / "a.webp")[0], film))
    before = (tmp_path / "a.webp").read_bytes()
    pictures.webp(tmp_path / "a.webp", list(film), ms=250)
    assert (tmp_path / "a.webp").read_bytes() == before
    with pytest.raises(ValueError, match="a film needs a frame"):
        pictures.webp(tmp_path / "b.webp", [])


def test_a_strip_has_a_row_from_keyframe_to_keyframe(gencli: Call, walked: Any, tmp_path: Path) -> None:
    given = [VAE, "--seeds", "3,14,15", "--steps", 4]
    assert gencli("interpolate", *given, "-o", tmp_path / "x.png").code == 0
    x = walked(*given)
    rows = np.concatenate([x[0:4], x[3:7]])
    assert np.array_equal(pixels(tmp_path / "x.png"), pictures.grid(rows, 17, columns=4))
    assert gencli("interpolate", *given, "--loop", "-o", tmp_path / "x.png").code == 0
    assert np.array_equal(
        pixels(tmp_path / "x.png"),
        pictures.grid(np.concatenate([rows, x[6:], walked(*given, "--loop")[7:]]), 17, columns=4),
    )


def test_a_stream_is_read_again(gencli: Call, walked: Any, tmp_path: Path) -> None:
    given = [VAE, "--seeds", "3,14", "--steps", 3]
    made = gencli("interpolate", *given, "-o", "-")
    archive = members(made)
    assert sorted(archive) == [f"0000000{i}.{ending}" for i in range(3) for ending in ("json", "png")]
    said = json.loads(archive["00000001.json"])
    assert (said["model"], said["step"], said["levels"], said["weights"]) == ("vae", 4, 17, said["weights"])
    again = gencli("interpolate", VAE, "--from", "-", "--steps", 2, "-o", tmp_path / "y.npz", stdin=made.bytes)
    net, x = model(VAE), torch.from_numpy(walked(*given))
    y = np.load(tmp_path / "y.npz", allow_pickle=False)["x"]
    assert again.code == 0 and np.array_equal(y, decoded(net, net.posterior(x).mu.detach()))


# ---------------------------------------------------------------------------------------------- the whole space


def test_a_traversal_tells_the_active_dimensions_first(gencli: Call, walked: Any, tmp_path: Path) -> None:
    net = model(VAE)
    kl = net.posterior(data.load("digits", "val").rows(torch.arange(180))["x"]).kl_j.detach().double().mean(0)
    row = gencli("interpolate", VAE, "--traverse", "--steps", 5, "-o", tmp_path / "t.png").row
    order = kl.argsort(descending=True)
    assert row["dimensions"] == (order + 1).tolist() and row["kl"] == pytest.approx(kl[order].tolist(), rel=1e-5)
    assert (row["data"], row["examples"], row["latents"]) == ("digits@val", 180, 3)
    z = prior(net, 0, [0], "interpolate")
    x = walked(VAE, "--traverse", "--steps", 5, "--pairs", 2).reshape(2, 5, 1, 8, 8)
    for shown, j in zip(x, order.tolist()):
        moved = z.repeat(5, 1)
        moved[:, j] = torch.linspace(-3, 3, 5)
        assert np.array_equal(shown, decoded(net, moved))
    captions = [text for j in order.tolist() for text in (f"z{j + 1}", f"{kl[j]:.2f} nats", "", "", "")]
    whole = walked(VAE, "--traverse", "--steps", 5)
    assert np.array_equal(pixels(tmp_path / "t.png"), pictures.grid(whole, 17, columns=5, labels=captions))
    flow = gencli("interpolate", FLOW, "--traverse", "--pairs", 4, "--from", "0.png", "-o", tmp_path / "t.png").row
    assert flow["dimensions"] == [1, 2, 3, 4] and "kl" not in flow


def test_a_scatter_of_the_latents(gencli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = plots.classes
    monkeypatch.setattr(plots, "classes", lambda *given: seen.append(given) or real(*given))
    made = gencli("interpolate", VAE, "--scatter", "-o", tmp_path / "s.png")
    rows = data.load("digits", "val").rows(torch.arange(180))
    z = model(VAE).posterior(rows["x"]).mu.detach().numpy()
    expected, share = latents.principal_axes(z)
    assert (made.row["examples"], made.row["latents"], made.row["data"]) == (180, 3, "digits@val")
    assert made.row["variance_share"] == pytest.approx(share, rel=1e-4) and "3 latent dimensions" in made.err
    np.testing.assert_allclose(seen[0][0], expected, atol=1e-4)
    assert np.array_equal(seen[0][1], rows["label"].numpy()) and pixels(tmp_path / "s.png").ndim == 3
    made = gencli("interpolate", CLASSES, "--scatter", "-o", tmp_path / "s.png")
    assert "variance_share" not in made.row and "axes" not in made.err
    z = model(CLASSES).posterior(rows["x"], rows["label"]).mu.detach().numpy()
    np.testing.assert_allclose(seen[1][0], z, atol=1e-5)


@pytest.mark.parametrize("names", [0, 3, 15, 40])
def test_colours_of_classes(names: int) -> None:
    points = np.random.default_rng(0).normal(size=(300, 2))
    label = None if not names else np.arange(300) % names
    image = plots.classes(points, label, [f"class {k}" for k in range(names)], ("a", "b"))
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert np.array_equal(image, plots.classes(points, label, [f"class {k}" for k in range(names)], ("a", "b")))
    strong = image[np.ptp(image.astype(int), axis=2) > 120]  # coloured, and no edge of a dot
    hues = {tuple(rgb) for rgb in (strong // 32).tolist()}
    assert len(hues) >= min(names, 8) or names <= 3


# ---------------------------------------------------------------------------------------------- reconstructions


def test_the_error_of_a_reconstruction_and_its_psnr(gencli: Call, tmp_path: Path) -> None:
    row = gencli("apply", VAE, "four.npz", "-o", tmp_path / "y.npz").row
    net, x = model(VAE), digits("test", 4)
    y = decoded(net, net.posterior(x).mu.detach())
    error = ((y / 8.0 - x.numpy() / 8.0) ** 2).mean()
    assert row["squared_error_per_dim"] == pytest.approx(error, rel=1e-6)
    assert row["psnr_db"] == pytest.approx(20 * math.log10(2 / math.sqrt(error)), rel=1e-6)
    assert (row["data"], row["examples"]) == ("given", 4)
    assert gencli("apply", VAE, "-n", 4, "-o", tmp_path / "y.npz").row["data"] == "digits@test"
    assert f"squared error {error:.4g} a dimension" in gencli("apply", VAE, "four.npz", "-o", "-").err
    exact = gencli("apply", FLOW, "four.npz", "-o", tmp_path / "y.npz").row
    assert (exact["squared_error"], exact["psnr_db"]) == (0, None)  # infinite, which JSON cannot say


def test_a_conditional_model_reconstructs_by_class(gencli: Call, tmp_path: Path) -> None:
    net, rows = model(CLASSES), data.load("digits", "test").rows(torch.arange(5))

    def made(*argv: object) -> np.ndarray[Any, Any]:
        assert gencli("apply", CLASSES, *argv, "-o", tmp_path / "y.npz").code == 0
        return np.load(tmp_path / "y.npz", allow_pickle=False)["x"]

    def expected(x: torch.Tensor, y: torch.Tensor) -> np.ndarray[Any, Any]:
        return decoded(net, net.posterior(x, y).mu.detach(), y)

    assert np.array_equal(made("-n", 5), expected(rows["x"], rows["label"]))
    assert np.array_equal(made("four.npz", "--labels", "3,5"), expected(rows["x"][:4], torch.tensor([3, 5, 3, 5])))
    refused(gencli("apply", CLASSES, "four.npz"), 2, "encodes by class", "--labels 3")
    refused(gencli("apply", VAE, "four.npz", "--labels", "3"), 2, "not class-conditional")


# ---------------------------------------------------------------------------------------------- what is refused


def hinted(result: Result, code: int, said: str, hint: str) -> None:
    refused(result, code, said)
    assert hint in result.err.splitlines()[-1], result.err


def test_what_has_no_latents_is_told_who_has(gencli: Call) -> None:
    hinted(gencli("interpolate", PIXELCNN), 2, "pixelcnn has no latents", "models with latents: ")
    for more in (["--from", "a.npz", "--to", "b.npz"], ["--add", "0", "--minus", "0"], ["--scatter"]):
        hinted(gencli("interpolate", GAN, *more), 2, "wgan-gp has no encoder", "models with an encoder: ")
    assert (
        "vae" in gencli("interpolate", PIXELCNN).err
        and "wgan-gp" not in gencli("interpolate", GAN, "--scatter").err[30:]
    )


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--seeds", "3"], 2, "two keyframes or more"),
        (["--seeds", "3,x"], 2, "--seeds 3,x"),
        (["--seeds", "7-3"], 2, "rising"),
        (["--seeds", "0-99999999999"], 2, "numbers and rising ranges"),
        (["--seeds", "-1,2"], 2, "--seeds -1,2"),
        (["--seeds", "1,2", "--from", "0.png"], 2, "--seeds and --from"),
        (["--to", "0.png"], 2, "--from and --to go together"),
        (["--from", "0.png"], 2, "--from and --to go together"),
        (["--from", "0.png", "--to", "four.npz"], 2, "hold 5 pictures"),
        (["--from", "0.png", "--to", "nine"], 2, "'nine' is neither a file nor a class: the classes are 0, 1,"),
        (["--from", "0.png", "--to", "11"], 2, "(did you mean '1'?)"),
        (["--from", "0.png", "--to", "10.png"], 3, "10.png: there is no such file"),
        (["--from", "0.png", "--to", "torn.png"], 3, "torn.png"),
        (["--from", "0.png", "--to", "wide.npz"], 3, "wide.npz: samples are 1x9x7"),
        (["--add", "3"], 2, "--add and --minus go together"),
        (["--minus", "3"], 2, "--add and --minus go together"),
        (["--add", "3", "--minus", "x"], 2, "'x' is an unknown class"),
        (["--add", "3", "--minus", "4", "--grid"], 2, "--grid and --add"),
        (["--add", "3", "--minus", "4", "--path", "slerp"], 2, "--add has no use for --path"),
        (["--add", "3", "--minus", "4", "--from", "0.png", "--to", "1.png"], 2, "--add has no use for --to"),
        (["--grid", "--seeds", "1,2"], 2, "--grid has four corners, not 2"),
        (["--grid", "--loop"], 2, "--grid has no use for --loop"),
        (["--traverse", "--seeds", "1,2"], 2, "--traverse goes out from one place, not from 2"),
        (["--traverse", "--scatter"], 2, "--traverse and --scatter"),
        (["--scatter", "--seeds", "1,2"], 2, "--scatter has no use for --seeds"),
        (["--scatter", "-o", "s.gif"], 2, "a scatter is a picture: -o scatter.png, not s.gif"),
        (["--labels", "3"], 2, "not class-conditional"),
        (["-o", "x.gfi"], 2, "x.gfi (did you mean '.gif'?)"),
        (["-o", "x.wav"], 2, ".wav"),
    ],
)
def test_bad_words_are_answered_in_a_line(argv: list[str], code: int, said: str, gencli: Call, shop: Path) -> None:
    if "wide.npz" in argv:
        np.savez(shop / "wide.npz", x=np.zeros((1, 1, 9, 7), np.uint8))
    if "torn.png" in argv:
        (shop / "torn.png").write_bytes((shop / "0.png").read_bytes()[:40])
    refused(gencli("interpolate", VAE, *argv), code, said)


def test_walks_of_points_are_lines_over_the_data(gencli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def paths(walks: np.ndarray, data: np.ndarray | None = None) -> np.ndarray:
        drawn.append((walks, data))
        return real(walks, data)

    real = plots.paths
    monkeypatch.setattr(plots, "paths", paths)
    assert gencli("interpolate", GAN, "--pairs", 3, "--steps", 5, "-o", "w.png").code == 0
    ((walks, data),) = drawn
    assert walks.shape == (3, 5, 2) and data is not None and data.shape == (2000, 2)
    assert gencli("interpolate", GAN, "--pairs", 3, "--steps", 5, "-o", "w.npz").code == 0
    with np.load("w.npz") as file:
        assert np.array_equal(file["x"].reshape(3, 5, 2), walks)
    image = np.asarray(Image.open("w.png"))
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # a colour a walk
        assert (image == colour).all(-1).any()


def test_points_have_no_film(gencli: Call) -> None:
    refused(gencli("interpolate", GAN, "-o", "x.gif"), 2, "points of shape 2 make no .gif")
    refused(gencli("interpolate", GAN, "-o", "x.webp"), 2, "x.webp")


def test_a_class_comes_before_a_file_of_its_name(walked: Any, shop: Path) -> None:
    plain = walked(VAE, "--from", "3", "--to", "8", "--steps", 2)
    (shop / "3").mkdir(exist_ok=True)
    assert np.array_equal(walked(VAE, "--from", "3", "--to", "8", "--steps", 2), plain)
