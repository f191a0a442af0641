"""Pictures against pixel values worked out by hand."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gencli import pictures, plots


def images(n, channels=1, height=2, width=3, levels=4):
    count = n * channels * height * width
    return (np.arange(count) * 7 % levels).astype(np.uint8).reshape(n, channels, height, width)


@pytest.mark.parametrize("levels", [2, 4, 17, 255, 256])
def test_levels_spread_over_bytes_and_come_back(levels):
    x = np.arange(levels).astype(np.uint8)
    y = pictures.to_bytes(x, levels)
    assert y.dtype == np.uint8 and y[0] == 0 and y[-1] == 255
    assert y.tolist() == [round(v * 255 / (levels - 1)) for v in range(levels)]
    assert np.array_equal(np.rint(y.astype(float) * (levels - 1) / 255), x)


def test_grid_places_every_pixel():
    x = images(5)
    g = pictures.grid(x, 4, columns=3, pad=1, scale=1)
    assert g.shape == (2 * 3 + 1, 3 * 4 + 1, 3) and g.dtype == np.uint8
    expected = np.full((7, 13), pictures.GAP)
    for i in range(5):
        for r in range(2):
            for c in range(3):
                expected[1 + i // 3 * 3 + r, 1 + i % 3 * 4 + c] = x[i, 0, r, c] * 85
    assert np.array_equal(g, np.repeat(expected[..., None], 3, axis=2))


def test_grid_scales_by_squares_and_keeps_colour():
    x = images(2, channels=3, levels=256)
    g = pictures.grid(x, 256, columns=1, pad=2, scale=6)
    gap = 2 * (6 // 3)
    assert g.shape == (2 * (12 + gap) + gap, 18 + 2 * gap, 3)
    for r in range(2):
        for c in range(3):
            top, left = 12 + 2 * gap + 6 * r, gap + 6 * c
            assert (g[top : top + 6, left : left + 6] == x[1, :, r, c]).all()
    assert (g[:gap] == pictures.GAP).all() and (g[:, -gap:] == pictures.GAP).all()


@pytest.mark.parametrize(
    ("n", "side", "scale", "columns"), [(4, 8, 8, 2), (64, 28, 2, 8), (9, 32, 2, 3), (1, 128, 1, 1), (10000, 8, 2, 100)]
)
def test_grid_by_default_is_square_and_visible(n, side, scale, columns):
    g = pictures.grid(np.zeros((n, 1, side, side), np.uint8), 2)
    gap = max(1, scale // 3)
    assert g.shape[0] == g.shape[1] == columns * (side * scale + gap) + gap


def test_strip_is_one_row():
    x = images(4)
    assert np.array_equal(pictures.strip(x, 4, scale=2), pictures.grid(x, 4, columns=4, scale=2))


def test_captions_stand_below_and_leave_the_images():
    x = np.zeros((2, 1, 8, 8), np.uint8)
    plain, named = pictures.grid(x, 2), pictures.grid(x, 2, labels=["7", "a very long name"])
    assert named.shape == (plain.shape[0] + pictures.CAPTION, *plain.shape[1:])
    assert np.array_equal(named[: 64 + 2], plain[: 64 + 2])
    first, second = named[66:82, 2:66], named[66:82, 68:132]
    assert (first > 200).any() and (second > 200).any()
    assert (named[66:82, :2] == pictures.GAP).all() and (named[66:82, 66:68] == pictures.GAP).all()


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (1, 2, 2, 2)])
def test_grid_refuses_what_it_cannot_show(shape):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pictures.grid(np.zeros(shape, np.uint8), 256)


def test_png_is_lossless_and_deterministic(tmp_path):
    colour = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    for image in (colour, colour[..., 0]):
        pictures.save_png(tmp_path / "a.png", image)
        assert (tmp_path / "a.png").read_bytes() == pictures.png(image)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def film(path):
    with Image.open(path) as file:
        return [np.asarray((file.seek(i), file.convert("RGB"))[1]) for i in range(file.n_frames)], file.info.copy()


def test_gif_of_greys_is_lossless(tmp_path):
    frames = [np.full((4, 4), v, np.uint8) for v in (0, 100, 255)]
    frames[1] = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    pictures.gif(tmp_path / "a.gif", [np.repeat(f[..., None], 3, axis=2) for f in frames], ms=250)
    shown, info = film(tmp_path / "a.gif")
    assert [np.array_equal(s[..., c], f) for s, f in zip(shown, frames) for c in range(3)] == [True] * 9
    assert info["loop"] == 0 and info["duration"] == 250
    pictures.gif(tmp_path / "b.gif", frames, loop=False)
    assert "loop" not in film(tmp_path / "b.gif")[1]
    before = (tmp_path / "b.gif").read_bytes()
    pictures.gif(tmp_path / "b.gif", frames, loop=False)
    assert (tmp_path / "b.gif").read_bytes() == before


def test_gif_of_few_colours_is_lossless_and_of_many_is_near(tmp_path):
    g = np.random.default_rng(0)
    few = [g.integers(2, size=(8, 8, 3), dtype=np.uint8) * 255 for _ in range(3)]
    pictures.gif(tmp_path / "a.gif", few)
    assert all(np.array_equal(a, b) for a, b in zip(film(tmp_path / "a.gif")[0], few))
    many = [g.integers(256, size=(32, 32, 3), dtype=np.uint8) for _ in range(2)]
    pictures.gif(tmp_path / "b.gif", many)
    assert all(np.abs(a.astype(int) - b).mean() < 16 for a, b in zip(film(tmp_path / "b.gif")[0], many))
    with pytest.raises(ValueError, match="needs a frame"):
        pictures.gif(tmp_path / "c.gif", [])


# ------------------------------------------------------------------------------------------------ plots


def panels(monkeypatch, draw):
    """What ``draw`` gave the panels of its figure: the figure, before it becomes pixels."""
    caught = []
    monkeypatch.setattr(plots, "_render", caught.append)
    draw()
    return caught[0].axes


def moons(n, seed=0):
    g = np.random.default_rng(seed)
    t = g.uniform(0, np.pi, n)
    return np.stack([np.cos(t), np.sin(t)], axis=1) + 0.05 * g.standard_normal((n, 2))


def test_scatter_shares_limits_and_counts_what_lies_outside(monkeypatch):
    data, samples = moons(500), moons(300, 1)
    samples[:2] = [[50, 50], [np.nan, 0]]
    left, right = panels(monkeypatch, lambda: plots.scatter(samples, data))
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    low, high = data.min(axis=0), data.max(axis=0)
    assert left.get_xlim() == pytest.approx((low[0] - 0.08 * (high - low)[0], high[0] + 0.08 * (high - low)[0]))
    assert left.get_title(loc="left").startswith("300 samples, ") and "outside" in left.get_title(loc="left")
    assert int(left.get_title(loc="left").split()[2]) >= 2
    assert right.get_title(loc="left") == "500 data points"
    assert np.array_equal(right.collections[0].get_offsets(), data)


def test_scatter_draws_with_no_global_state():
    image = plots.scatter(moons(200), limits=((-2, 2), (-1, 2)))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert (image[0, 0] == 255).all() and (image < 250).any()
    assert np.array_equal(image, plots.scatter(moons(200), limits=((-2, 2), (-1, 2))))
    code = """import sys, numpy
from gencli import plots
assert "matplotlib" not in sys.modules
plots.scatter(numpy.zeros((3, 2)))
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_points_of_three_dimensions_and_of_none():
    assert plots.scatter(np.zeros((10, 3), np.float32)).ndim == 3
    assert plots.scatter(np.zeros((0, 2), np.float32)).ndim == 3


def normal(x):
    return -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * np.log(2 * np.pi)


def test_histograms_are_densities(monkeypatch):
    g = np.random.default_rng(0)
    data, samples = g.standard_normal((4000, 1)), g.standard_normal((1000, 1))
    samples[:500] = 1e6
    (axis,) = panels(monkeypatch, lambda: plots.scatter(samples, data))
    bars = [p for p in axis.patches if hasattr(p, "get_height")]
    assert sum(p.get_height() * p.get_width() for p in bars) == pytest.approx(1.0)
    (outline,) = [p for p in axis.patches if p.get_label() == "1000 samples"]
    assert abs(polygon_area(outline)) == pytest.approx(0.5, abs=2e-3)  # half of the samples lie outside
    assert axis.get_title(loc="left") == "500 outside"
    (axis,) = panels(monkeypatch, lambda: plots.density(normal, data))
    x, y = axis.lines[0].get_data()
    assert y == pytest.approx(np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), rel=1e-5)


def polygon_area(polygon):
    x, y = polygon.get_xy().T
    return 0.5 * (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def test_density_maps_share_a_scale_and_sum_to_one(monkeypatch):
    data = np.random.default_rng(0).standard_normal((20000, 2))
    left, right = panels(monkeypatch, lambda: plots.density(normal, data, bins=50))
    a, b = left.images[0], right.images[0]
    assert a.get_clim() == b.get_clim() and a.get_extent() == b.get_extent()
    x0, x1, y0, y1 = a.get_extent()
    for image in (a, b):
        values = np.asarray(image.get_array())
        assert values.sum() * (x1 - x0) * (y1 - y0) / values.size == pytest.approx(1.0, abs=0.01)
    assert np.asarray(a.get_array()).max() == pytest.approx(1 / (2 * np.pi), rel=0.01)
    # rows are y, columns are x
    shifted = np.tile(np.array([[1.0, -0.5]]), (10, 1))
    (axis,) = panels(monkeypatch, lambda: plots.density(shifted, limits=((-2, 2), (-1, 1))))
    values = np.asarray(axis.images[0].get_array())
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (row + 0.5) / values.shape[0] * 2 - 1 == pytest.approx(-0.5, abs=0.2)
    assert (column + 0.5) / values.shape[1] * 4 - 2 == pytest.approx(1.0, abs=0.2)
    with pytest.raises(ValueError, match="data or limits"):
        plots.density(normal)


def test_plots_become_files(tmp_path):
    image = plots.density(normal, limits=((-3, 3), (-3, 3)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pictures.png(image)))), image)


# ------------------------------------------------------------------------------------------------ sounds and texts


def ink(image):
    """Where a waveform is drawn."""
    return (image == [int(pictures.DATA[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)


@pytest.mark.parametrize("length", [1, 7, 64, 300, 5000])
def test_waves_reach_from_the_lowest_to_the_highest_sample(length):
    ramp = np.linspace(-1, 1, length)[None] if length > 1 else np.ones((1, 1))
    drawn = ink(pictures.waves(ramp))[6:-6, 6:-6]  # without the frame
    assert drawn.shape[0] == 64 and drawn.any(0).all()
    top = drawn.argmax(0)  # the first row with ink: never lower than before, as the ramp rises
    assert (np.diff(top) <= 0).all() and top[-1] == 0 and (length == 1 or drawn[-1, 0])
    spikes = np.zeros((1, length))
    spikes[0, length // 2] = 1  # one sample among thousands is not lost
    assert ink(pictures.waves(spikes))[6].any()


def test_waves_are_in_rows():
    image = ink(pictures.waves(np.array([[0.0] * 100, [1.0] * 100, [-1.0] * 100]), columns=1))
    rows = np.flatnonzero(image.any(1)) - 6
    assert len(rows) == 3 and rows[1:].tolist() == [70, 140 + 63] and rows[0] in (31, 32)


def test_a_page_shows_what_is_written():
    short, long = pictures.page(["ab"]), pictures.page(["ab", "x" * 200])
    assert short.shape[1] == long.shape[1] and long.shape[0] - short.shape[0] == 15 * 4  # a rule and three lines
    assert (short < 100).any() and not (pictures.page([" \n "]) < 255).any()
    assert pictures.page(["\n" * 10_000]).shape[0] == 15 * pictures.PAGE + 20
    assert np.array_equal(pictures.page(["a\0b\x1b"]), pictures.page(["a b "]))
