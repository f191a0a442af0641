"""Arrays to pictures: grids, strips, films, waveforms, pages, scatters, density maps, warped grids.

numpy and Pillow; matplotlib only for plots and for its font of one width.

Pictures are uint8 arrays ``(H, W, 3)``; equal input gives equal files. Plots use matplotlib's objects, never pyplot,
whose state all callers would share.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gencli import files

__all__ = [
    "classes",
    "density",
    "frame",
    "gif",
    "grid",
    "page",
    "png",
    "save_png",
    "scatter",
    "strip",
    "to_bytes",
    "warp",
    "waves",
    "webp",
]

Array = np.ndarray[Any, Any]
GAP = 96  # grey between images: seen beside black, beside white and beside most of what lies between
VISIBLE, WIDEST = 64, 2048  # pixels: a small image grows to the first, unless the whole grows beyond the second
CAPTION = 16  # pixels of height
PAGE, PAPER = 400, 246  # lines of a page of text; the grey behind a sound
INK, FAINT, SAMPLES, DATA = "#222222", "#d8d8d8", "#d1495b", "#2b6ca3"


def to_bytes(x: Array, levels: int) -> Array:
    """Raw levels ``0 .. levels - 1`` to uint8 ``0 .. 255``: ``round(x * 255 / (levels - 1))``."""
    if levels == 256 and x.dtype == np.uint8:
        return x
    return np.rint(x * (255 / (levels - 1))).astype(np.uint8)


def grid(
    x: Array,
    levels: int,
    columns: int | None = None,
    pad: int = 1,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
) -> Array:
    """Images ``x``, raw ``(n, C, H, W)`` with C = 1 or 3, in rows of ``columns``; uint8 ``(H', W', 3)``.

    Every pixel becomes a square of ``scale`` pixels; ``pad * max(1, scale // 3)`` pixels of grey lie around and
    between the images. By default columns make a square, and small images grow (8x8 to 64x64) while the whole stays
    within about 2048 pixels. ``labels`` are captions below the images.
    """
    n, channels, height, width = x.shape
    if n == 0 or channels not in (1, 3):
        raise ValueError(f"a grid shows one or more images of 1 or 3 channels, got shape {x.shape}")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    if scale is None:
        scale = max(
            1, min(VISIBLE // max(height, width), WIDEST // max(rows * (height + pad), columns * (width + pad)))
        )
    height, width = height * scale, width * scale
    gap, caption = pad * max(1, scale // 3), CAPTION if labels else 0
    down, right = height + caption + gap, width + gap
    corners = [(gap + i // columns * down, gap + i % columns * right) for i in range(n)]
    image = np.full((rows * down + gap, columns * right + gap, 3), GAP, np.uint8)
    for one, (top, left) in zip(to_bytes(x, levels), corners):
        big = one.repeat(scale, axis=1).repeat(scale, axis=2)
        image[top : top + height, left : left + width] = big.transpose(1, 2, 0)
    if not labels:
        return image
    canvas, font = Image.fromarray(image), ImageFont.load_default(12)
    draw = ImageDraw.Draw(canvas)
    for text, (top, left) in zip(labels, corners):
        place = (left + width / 2, top + height + CAPTION / 2)
        draw.text(place, _fitting(text, width, font), font=font, fill=(255, 255, 255), anchor="mm")
    return np.asarray(canvas)


def _fitting(text: str, width: int, font: Any) -> str:
    """``text``, cut to ``width`` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else text[:-1]
    return text


def strip(x: Array, levels: int, pad: int = 1, scale: int | None = None, labels: Sequence[str] | None = None) -> Array:
    """Images side by side in one row: an interpolation, a denoising chain. See :func:`grid`."""
    return grid(x, levels, columns=len(x), pad=pad, scale=scale, labels=labels)


def waves(x: Array, columns: int | None = None) -> Array:
    """Sounds ``x``, floats in [-1, 1] ``(n, T)``, one a cell; uint8 ``(H', W', 3)``.

    Each column of pixels reaches from the lowest to the highest of its samples, as sound editors draw them.
    """
    n, T = x.shape
    columns = min(n, columns or max(1, math.ceil(math.sqrt(n) / 2)))
    rows = -(-n // columns)
    height, width, gap = 64, max(64, min(4 * T, (WIDEST // 2 if columns > 1 else 768) // columns)), 6
    image = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    ink = np.array([int(DATA[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    faint = np.array([int(FAINT[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    # the samples under each column and the next one's first, so that neighbouring strokes touch
    edges = np.linspace(0, T - 1, width + 1)[:, None]
    inside = np.minimum(np.floor(edges[:-1]) + np.arange(math.ceil(T / width) + 2), np.ceil(edges[1:])).astype(int)
    under = x[:, inside]  # (n, width, samples)
    down = np.rint((1 - np.stack([under.max(-1), under.min(-1)])) / 2 * (height - 1))
    line = np.arange(height)
    stroke = (line[:, None] >= down[0, :, None]) & (line[:, None] <= down[1, :, None])  # (n, height, width)
    for i, one in enumerate(stroke):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        cell = image[top : top + height, left : left + width]
        cell[:], cell[height // 2] = PAPER, faint
        cell[one] = ink
    return image


def page(texts: Sequence[str], columns: int = 80) -> Array:
    """``texts`` one below the other, in letters of one width, broken after ``columns`` letters; uint8 ``(H, W, 3)``."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), 12)
    across, down, margin = math.ceil(font.getlength("0") * columns), 15, 10
    lines: list[str | None] = []  # None: a rule between two texts
    for text in texts:
        lines += [None] if lines else []
        for line in "".join(c if c.isprintable() or c == "\n" else " " for c in text).split("\n"):
            lines += [line[i : i + columns] for i in range(0, max(1, len(line)), columns)]
    if len(lines) > PAGE:
        lines = [*lines[: PAGE - 1], "..."]
    canvas = Image.new("RGB", (across + 2 * margin, down * len(lines) + 2 * margin), "white")
    draw = ImageDraw.Draw(canvas)
    for k, line_or_rule in enumerate(lines):
        y = margin + k * down
        if line_or_rule is None:
            draw.line([margin, y + down // 2, margin + across, y + down // 2], fill=FAINT)
        else:
            draw.text((margin, y), line_or_rule, font=font, fill=INK)
    return np.asarray(canvas)


def png(image: Array) -> bytes:
    """A PNG file of ``image``, uint8 ``(H, W)`` or ``(H, W, 3)``; lossless, without metadata."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def save_png(path: Path | str, image: Array) -> None:
    """Write :func:`png` of ``image`` to ``path``, whole or not at all."""
    files.write_bytes(path, png(image))


def gif(path: Path | str, frames: Sequence[Array], ms: int = 100, loop: bool = True) -> None:
    """Write a film of uint8 ``(H, W)`` or ``(H, W, 3)`` frames, ``ms`` milliseconds each, whole or not at all.

    Grey films are lossless; colours are cut to 256 a frame. Equal frames in a row become one that lasts longer.
    """
    pages = []
    for frame in frames:
        grey = frame.ndim == 3 and bool((frame == frame[..., :1]).all())
        pages.append(Image.fromarray(np.ascontiguousarray(frame[..., 0]) if grey else frame))
    if not pages:
        raise ValueError("a film needs a frame")
    if len({page.mode for page in pages}) > 1:
        pages = [page.convert("RGB") for page in pages]
    if pages[0].mode == "RGB":
        pages = [page.quantize(256, dither=Image.Dither.NONE) for page in pages]
    file = io.BytesIO()
    endless: dict[str, int] = {"loop": 0} if loop else {}
    pages[0].save(file, format="gif", save_all=True, append_images=pages[1:], duration=ms, optimize=False, **endless)
    files.write_bytes(path, file.getvalue())


def webp(path: Path | str, frames: Sequence[Array], ms: int = 100) -> None:
    """Write an endless film as :func:`gif` does, as an animated WebP: lossless in all colours."""
    pages = [Image.fromarray(frame).convert("RGB") for frame in frames]
    if not pages:
        raise ValueError("a film needs a frame")
    file = io.BytesIO()
    pages[0].save(file, "webp", save_all=True, append_images=pages[1:], duration=ms, loop=0, lossless=True)
    files.write_bytes(path, file.getvalue())


# ---------------------------------------------------------------------------------------------- plots

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
