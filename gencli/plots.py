"""Points and their densities as plots: scatters, walks, density maps, warped grids, lines over histograms.

Plots are pictures, uint8 arrays ``(H, W, 3)``; equal input gives equal bits. They use matplotlib's objects, never
pyplot, whose state all callers would share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gencli.pictures import DATA, FAINT, INK, SAMPLES, Array

__all__ = ["classes", "density", "frame", "paths", "scatter", "warp"]

Limits = tuple[tuple[float, float], tuple[float, float]]
Shown = Callable[[Array], Array] | Array  # a log-density or samples


def scatter(points: Array, data: Array | None = None, limits: Limits | None = None) -> Array:
    """Samples ``points`` ``(n, 2)`` beside ``data`` within the same limits; for ``(n, 1)`` two histograms in one frame.

    Of more than two dimensions the first two are shown. Samples outside the frame are counted above it. ``limits`` is
    ``((x0, x1), (y0, y1))``; by default the frame holds the data (99 % of the samples where no data are given).
    """
    limits = limits or frame(points, data)
    if points.shape[1] == 1:
        return _histograms(points, data, limits)
    panels = [("samples", points, SAMPLES)] + ([] if data is None else [("data points", data, DATA)])
    figure, axes = _panels(len(panels), limits)
    for axis, (name, rows, colour) in zip(axes, panels):
        size = min(9.0, max(1.0, 12000 / len(rows))) if len(rows) else 1.0
        opacity = min(0.8, max(0.15, 600 / max(1, len(rows)) ** 0.9))
        axis.scatter(rows[:, 0], rows[:, 1], s=size, c=colour, alpha=opacity, linewidths=0)
        _name(axis, f"{len(rows)} {name}", _outside(rows, limits))
    return _render(figure)


def classes(points: Array, label: Array | None, names: Sequence[str], axes: tuple[str, str]) -> Array:
    """``points (n, 2)``, each in the colour of its ``label``, an index of ``names``; a legend names up to 20."""
    from matplotlib import colormaps

    figure, (axis,) = _panels(1, frame(points, points))
    size = min(9.0, max(2.0, 12000 / max(1, len(points))))
    if label is None:
        axis.scatter(points[:, 0], points[:, 1], s=size, c=DATA, alpha=0.7, linewidths=0)
    else:
        palette = colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"]
        colours = palette(label if len(names) <= 20 else label / len(names))
        axis.scatter(points[:, 0], points[:, 1], s=size, c=colours, alpha=0.8, linewidths=0)
        if len(names) <= 20:
            for k, name in enumerate(names):
                axis.scatter([], [], s=24, color=palette(k), label=name)
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    axis.set_xlabel(axes[0], color=INK)
    axis.set_ylabel(axes[1], color=INK)
    _name(axis, f"{len(points)} examples", 0)
    return _render(figure)


def paths(walks: Array, data: Array | None = None) -> Array:
    """Walks ``(R, T, 2)`` through the plane, a line each with a dot at every step, over the points ``data``."""
    from matplotlib import colormaps

    figure, (axis,) = _panels(1, frame(walks.reshape(-1, walks.shape[2]), data))
    if data is not None:
        axis.scatter(data[:, 0], data[:, 1], s=2, c=DATA, alpha=0.25, linewidths=0)
    for k, walk in enumerate(walks):
        axis.plot(walk[:, 0], walk[:, 1], "o-", color=colormaps["tab10"](k % 10), markersize=3, linewidth=1)
    _name(axis, f"{len(walks)} walks", 0)
    return _render(figure)


def density(shown: Shown, data: Array | None = None, limits: Limits | None = None, bins: int = 160) -> Array:
    """A model's density beside a histogram of ``data``, in the same colours.

    ``shown`` is a log-density, ``(m, D) -> (m,)`` in nats, evaluated at the centres of ``bins`` by ``bins`` cells, or
    samples ``(n, D)``, which become a histogram. For D = 1 (told by ``data`` or the samples) a line over a histogram.
    """
    known = [rows for rows in (data, shown) if rows is not None and not callable(rows)]
    if limits is None:
        if not known:
            raise ValueError("a log-density needs data or limits to know where to look")
        limits = frame(known[-1], data)
    if known and known[0].shape[1] == 1:
        return _histograms(shown, data, limits)
    cell = _cell_size(limits, max(map(len, known), default=1))
    maps: list[tuple[str, Array, int]] = []
    if callable(shown):
        x, y = (_centres(*span, bins) for span in limits)
        where = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
        maps.append(("model density", np.exp(np.asarray(shown(where), np.float64)).reshape(bins, bins), 0))
    else:
        maps.append((f"{len(shown)} samples", _counts(shown, limits, cell), _outside(shown, limits)))
    if data is not None:
        maps.append((f"{len(data)} data points", _counts(data, limits, cell), _outside(data, limits)))
    figure, axes = _panels(len(maps), limits)
    # one scale for both; a percentile, so that a single spike does not darken all the rest
    brightest = max(float(np.percentile(np.nan_to_num(m, posinf=0.0), 99.8)) for _, m, _ in maps) or 1.0
    for axis, (name, values, outside) in zip(axes, maps):
        extent = [*limits[0], *limits[1]]
        axis.imshow(np.nan_to_num(values), origin="lower", extent=extent, vmin=0, vmax=brightest, cmap="magma")
        axis.grid(visible=False)
        _name(axis, name, outside)
    return _render(figure)


def warp(z: Array, x: Array, data: Array | None = None) -> Array:
    """A map from latents to points of as many dimensions, one or two, over ``data (n, D)``.

    In two dimensions ``z`` and ``x`` ``(2, lines, m, 2)`` are a grid, lines along either axis, and what became of it:
    two panels. In one dimension they are ``(m, 1)``, a curve: z over x.
    """
    if z.shape[-1] == 1:
        figure, (axis,) = _panels(1, None)
        axis.plot(x[:, 0], z[:, 0], color=SAMPLES, linewidth=1.6)
        axis.set_xlim(*frame(x, data)[0])
        axis.set_ylabel("$z$", color=INK)
        if data is not None:  # a stroke each, on the axis
            axis.plot(data[:, 0], 0 * data[:, 0], "|", color=DATA, alpha=0.3, transform=axis.get_xaxis_transform())
        return _render(figure)
    figure, axes = _panels(2, frame(x.reshape(-1, 2), data))
    for axis, name, lines in zip(axes, ("latents", "points"), (z, x)):
        for family, colour in zip(lines, (SAMPLES, INK)):
            axis.plot(*family.transpose(2, 1, 0), color=colour, linewidth=0.7)
        axis.grid(visible=False)
        _name(axis, name, 0)
    spans = frame(z.reshape(-1, 2), z.reshape(-1, 2))
    axes[0].set(xlim=spans[0], ylim=spans[1], xlabel="$z_1$", ylabel="$z_2$")
    axes[1].set_ylabel("$x_2$", color=INK)
    if data is not None:
        axes[1].scatter(data[:, 0], data[:, 1], s=3, c=DATA, alpha=0.35, linewidths=0, zorder=0)
    return _render(figure)


def _histograms(shown: Shown, data: Array | None, limits: Limits) -> Array:
    """One frame for one dimension: data filled, samples or the model's density as a line."""
    span = limits[0]
    figure, (axis,) = _panels(1, None)
    known = [rows for rows in (data, shown) if rows is not None and not callable(rows)]
    most = max(map(len, known), default=1)
    edges = np.linspace(*span, min(120, max(12, round(2 * most ** (1 / 3)))) + 1)

    def histogram(rows: Array, colour: str, **style: Any) -> None:
        # normalised by all rows, so that those outside the frame are missed
        weights = np.full(len(rows), 1 / (max(1, len(rows)) * (edges[1] - edges[0])))
        axis.hist(rows[:, 0], edges, weights=weights, color=colour, **style)

    if data is not None:
        histogram(data, colour=DATA, alpha=0.35, label=f"{len(data)} data points")
    if callable(shown):
        x = _centres(*span, 400)
        y = np.exp(np.asarray(shown(x[:, None].astype(np.float32)), np.float64))
        axis.plot(x, y, color=SAMPLES, linewidth=1.6, label="model density")
    else:
        histogram(shown, colour=SAMPLES, histtype="step", linewidth=1.6, label=f"{len(shown)} samples")
    axis.set_xlim(*span)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("density", color=INK)
    axis.legend(frameon=False, loc="upper right", fontsize=9)
    _name(axis, "", 0 if callable(shown) else _outside(shown, limits))
    return _render(figure)


def frame(points: Array, data: Array | None = None) -> Limits:
    """A frame, with a margin, for all the data, or else for the middle 99 % of the points."""
    rows, cut = (points, 0.5) if data is None else (data, 0.0)
    rows = rows[np.isfinite(rows).all(axis=1), :2]
    if not len(rows):
        return (-1.0, 1.0), (-1.0, 1.0)
    low, high = np.percentile(rows, [cut, 100 - cut], axis=0).astype(float)
    margin = np.where(high > low, 0.08 * (high - low), 1.0)
    spans = [(float(a), float(b)) for a, b in zip(low - margin, high + margin)]
    return spans[0], spans[-1]


def _outside(rows: Array, limits: Limits) -> int:
    """How many rows lie outside the frame or are not finite."""
    inside = np.ones(len(rows), bool)
    for column, (low, high) in zip(rows.T[:2], limits):
        inside &= (column >= low) & (column <= high)
    return int((~inside).sum())


def _centres(low: float, high: float, bins: int) -> Array:
    return low + (np.arange(bins) + 0.5) * ((high - low) / bins)


def _cell_size(limits: Limits, n: int) -> float:
    """The side of square cells, so many that ``n`` rows fill a fair share of them."""
    return max(high - low for low, high in limits) / float(np.clip(math.sqrt(n) * 1.2, 16, 128))


def _counts(rows: Array, limits: Limits, cell: float) -> Array:
    """A histogram of the first two columns as a density: it sums to the share inside, over the area."""
    bins = [max(1, round((high - low) / cell)) for low, high in limits]
    rows, n = rows[np.isfinite(rows).all(axis=1)], max(1, len(rows))
    counts, *_ = np.histogram2d(rows[:, 0], rows[:, 1], bins=bins, range=limits)
    area = (limits[0][1] - limits[0][0]) * (limits[1][1] - limits[1][0]) / counts.size
    return counts.T / (n * area)


def _panels(n: int, limits: Limits | None) -> tuple[Any, list[Any]]:
    """A figure with ``n`` panels: equal scales within ``limits``, or one wide panel without."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (6.4, 3.8)
    if limits:
        (left, right), (low, high) = limits
        size = (4.6 * n, 0.8 + 4.0 * float(np.clip((high - low) / (right - left), 0.4, 2.0)))
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#888888")
        axis.tick_params(colors=INK, labelsize=8, length=3, color="#888888")
        axis.set_axisbelow(True)
        axis.grid(color=FAINT, linewidth=0.5)
        axis.set_xlabel("$x_1$" if limits else "$x$", color=INK)
        if limits:
            axis.set(xlim=limits[0], ylim=limits[1], aspect="equal")
    if limits:
        axes[0].set_ylabel("$x_2$", color=INK)
    return figure, axes


def _name(axis: Any, name: str, outside: int) -> None:
    text = ", ".join(([name] if name else []) + ([f"{outside} outside"] if outside else []))
    axis.set_title(text, fontsize=10, color=INK, loc="left")


def _render(figure: Any) -> Array:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
