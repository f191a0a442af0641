"""Views of models of points: densities and maps of a model that is known in closed form, and the verb."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gencli import cli, console, pictures, plots, views
from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model
from gencli.rng import Rng
from gencli.run import Run
from tests.tiny import words


class AffineConfig(Config):
    conditional: bool = False
    latents: int | None = None


class Affine(Model):
    """x = s z + label + 1/2."""

    Config = AffineConfig
    likelihood = "density"

    def __init__(self, config: AffineConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.s = torch.nn.Parameter(torch.tensor([0.5, 2.0][: spec.dims]))

    def log_prob(self, x: Tensor, rng: Rng, labels: Tensor | None = None) -> Tensor:
        assert len(x) == rng.n <= views.CHUNK and not torch.is_grad_enabled()
        z = (x - 0.5 - (0 if labels is None else labels[:, None])) / self.s
        return (-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - self.s.log()).sum(1)

    def prior(self, rng: Rng) -> Tensor:
        return rng.normal("z", (rng.n, self.config.latents or self.spec.dims))

    def decode(self, z: Tensor) -> Tensor:
        return self.s * z + 0.5


def model(D: int, **config) -> Affine:
    spec = DataSpec(name="test", kind="points", shape=(D,), classes=("a", "b", "c", "d"))
    return Affine(Affine.Config(**config), spec)


def data(D: int, n: int = 2000) -> np.ndarray:
    return (0.5 + np.array([0.5, 2.0][:D]) * np.random.default_rng(0).standard_normal((n, D))).astype(np.float32)


def panels(monkeypatch, view: str, *args, **options):
    """What the view drew, before it becomes pixels, and what it says."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(plots, "_render", caught.append)
        _, row = views.draw(view, *args, **options)
    return caught[0].axes, row


@pytest.mark.parametrize("D", [1, 2])
def test_the_integral_is_that_over_the_window(D: int):
    x = data(D)
    image, row = views.draw("density", model(D), x)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    mass = 1.0
    for (low, high), s, column in zip(row["window"], [0.5, 2.0], x.T):
        assert low < column.min() and column.max() < high
        a, b = ((end - 0.5) / s / math.sqrt(2) for end in (low, high))
        mass *= (math.erf(b) - math.erf(a)) / 2
    assert 0.99 < mass < 1
    assert row["integral"] == pytest.approx(mass, abs=2e-4)
    assert row["kind"] == "density"


def test_a_window_that_shows_half_of_the_mass_says_so():
    x = data(2)
    _, row = views.draw("density", model(2), x[x[:, 0] > 0.5])
    left = row["window"][0][0]  # there is a margin
    assert row["integral"] == pytest.approx((1 - math.erf((left - 0.5) / 0.5 / math.sqrt(2))) / 2, abs=1e-2)


def test_a_density_is_drawn_where_it_is(monkeypatch):
    (left, right), _ = panels(monkeypatch, "density", model(2), data(2))
    image = left.images[0].get_array()
    x, y = (np.linspace(*span, views.BINS + 1) for span in (left.get_xlim(), left.get_ylim()))
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert image.shape == (views.BINS, views.BINS)
    assert x[column] - 0.1 < 0.5 < x[column + 1] + 0.1 and y[row] - 0.1 < 0.5 < y[row + 1] + 0.1
    assert right.get_title(loc="left") == "2000 data points"
    (axis,), _ = panels(monkeypatch, "density", model(1), data(1))
    line = axis.lines[0]
    top = line.get_ydata().argmax()
    assert line.get_ydata()[top] == pytest.approx(1 / 0.5 / math.sqrt(2 * math.pi), rel=1e-3)
    assert line.get_xdata()[top] == pytest.approx(0.5, abs=0.02)


def test_a_grid_is_warped_as_the_model_says(monkeypatch):
    for beside in (data(2), None):
        (before, after), row = panels(monkeypatch, "map", model(2), beside)
        assert len(before.lines) == len(after.lines) == 2 * views.LINES
        for z, x in zip(before.lines, after.lines):
            z, x = np.stack(z.get_data(), 1), np.stack(x.get_data(), 1)
            assert len(z) == views.FINE and np.ptp(z, 0).min() == 0 < np.ptp(z, 0).max()
            np.testing.assert_allclose(x, 0.5 + z * [0.5, 2.0], atol=1e-5)
        assert len(after.collections) == (beside is not None)
        for low, high in row["latents"]:
            assert low == pytest.approx(-2.58, abs=0.2) and high == pytest.approx(2.58, abs=0.2)
    assert np.array_equal(*(views.draw("map", model(2), data(2))[0] for _ in range(2)))


def test_the_map_of_one_dimension_is_a_curve(monkeypatch):
    (axis,), _ = panels(monkeypatch, "map", model(1), data(1))
    x, z = axis.lines[0].get_data()
    np.testing.assert_allclose(x, 0.5 + 0.5 * z, atol=1e-5)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("$x$", "$z$")
    assert views.draw("map", model(1), data(1))[0].std() > 1


def test_the_density_of_one_class():
    _, row = views.draw("density", model(1, conditional=True), data(1), labels=[3])
    assert row["integral"] < 0.01  # the class is at 3.5, and the data are not
    assert views.draw("density", model(1, conditional=True), data(1), labels=[0])[1]["integral"] > 0.99


def test_what_has_no_such_view_is_told_so():
    image = DataSpec(name="digits", kind="image", shape=(1, 8, 8), levels=17)
    for view, subject, options, said in [
        ("densty", model(2), {}, "did you mean 'density'"),
        ("density", model(3), {}, "points of 3 dimensions"),
        ("map", Affine(Affine.Config(), image), {}, "image data"),
        ("density", Model(Config(), DataSpec(name="p", kind="points", shape=(2,))), {}, "no likelihood"),
        ("map", Model(Config(), DataSpec(name="p", kind="points", shape=(2,))), {}, "no latents"),
        ("map", model(2, latents=5), {}, "latents have 5"),
        ("density", model(1), {"labels": [0]}, "not class-conditional"),
        ("density", model(1, conditional=True), {}, "all classes at once"),
        ("map", model(1, conditional=True), {"labels": [0]}, "class-conditional"),
    ]:
        with pytest.raises(UsageError, match=said):
            views.draw(view, subject, data(subject.spec.dims) if subject.spec.dims < 3 else None, **options)
    with pytest.raises(UsageError, match="not at hand"):
        views.draw("density", model(2))


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENCLI_QUIET", "1")

    def gencli(*argv: str) -> tuple[int, str, str]:
        code = console.run(cli.app, [*argv])
        return code, *capfd.readouterr()

    assert gencli("train", "ffjord", *words("ffjord"), "--steps", "2")[0] == 0
    for view in ("density", "map"):
        code, out, err = gencli("sample", "--view", view, "-n", "300")
        assert code == 0, err
        row = json.loads(out)
        assert (row["view"], row["model"], row["out"]) == (view, "ffjord", f"{view}.png")
        assert (tmp_path / f"{view}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["density.png", "map.png", "runs"]
    for argv, said in [
        (("--view", "map", "-o", "map.npz"), "a view is a picture"),
        (("temperature=2", "--view", "map"), "no option 'temperature'"),
        (("--view", "nap"), "did you mean 'map'"),
        (("--view", "progres"), "did you mean 'progress'"),
    ]:
        code, out, err = gencli("sample", *argv)
        assert code == 2 and not out and said in err, err


def test_a_film_of_progress_shows_the_pictures_of_training_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)

    def gencli(*argv: str) -> tuple[int, str, str]:
        code = console.run(cli.app, ["sample", "--view", "progress", *argv])
        return code, *capfd.readouterr()

    Run.create().close()
    samples = Path("runs/0001-run/samples")
    code, out, err = gencli()
    assert code == 3 and not out and "no pictures of samples" in err and "train.sample_every" in err
    greys = {50: 30, 999_999: 90, 1_000_000: 200}  # by number: the last would be the second by name
    for step, grey in greys.items():
        pictures.save_png(samples / f"step-{step:06d}.png", np.full((4, 5, 3), grey, np.uint8))
    pictures.save_png(samples / "step-000100.png", np.full((2, 6, 3), 60, np.uint8))  # another size
    (samples / ".step-000200.png.x.tmp").write_bytes(b"half")
    for argv, file in [((), "progress.gif"), (("1", "-o", "film.webp"), "film.webp")]:
        code, out, err = gencli(*argv)
        assert code == 0 and not out and f"4 pictures in {file}" in err, err
        with Image.open(file) as film:
            assert film.n_frames >= 4 and film.size == (6, 4) and film.info.get("loop") == 0
            corners, lasts = [], []
            for k in range(film.n_frames):
                film.seek(k)
                corners.append(film.convert("RGB").getpixel((0, 0))[0])
                lasts.append(film.convert("RGB").getpixel((0, 3))[0])
        assert corners[:4] == [30, 60, 90, 200] and set(corners[4:]) <= {200}
        assert lasts[:4] == [30, 255, 90, 200]  # the page below the smaller one
    checkpoint = Path("runs/0001-run/checkpoints/step-000050")
    checkpoint.mkdir(parents=True)
    assert gencli(str(checkpoint), "-o", "again.gif")[0] == 0
    assert Path("again.gif").read_bytes() == Path("progress.gif").read_bytes()
    before = sorted(os.listdir())
    for argv, code, said in [
        (("-o", "film.png"), 2, "-o progress.gif or progress.webp, not film.png"),
        (("-n", "3"), 2, "no use for -n"),
        (("--labels", "1"), 2, "no use for --labels"),
        (("--seed", "1"), 2, "no use for --seed"),
        (("--weights", "raw"), 2, "no use for --weights"),
        (("truncation=0.5",), 2, "no use for truncation=0.5"),
        (("nowhere",), 3, "no run or checkpoint 'nowhere'"),
    ]:
        found, out, err = gencli(*argv)
        assert found == code and not out and said in err and err.count("\n") <= 2, err
    (samples / "step-000100.png").write_bytes(b"\x89PNG no more")
    code, out, err = gencli("-o", "bad.gif")
    assert code == 3 and "step-000100.png" in err and sorted(os.listdir()) == before
