"""Arrays to pictures: grids, strips, films, waveforms, pages. Plots are in :mod:`gencli.plots`.

numpy and Pillow; matplotlib only for its font of one width. Pictures are uint8 arrays ``(H, W, 3)``; equal input gives
equal files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gencli import files

__all__ = [
    "film",
    "gif",
    "grid",
    "on_one_page",
    "page",
    "png",
    "save_png",
    "strip",
    "to_bytes",
    "waves",
    "webp",
]

Array = np.ndarray[Any, Any]
GAP = 96  # grey between images: seen beside black, beside white and beside most of what lies between
VISIBLE, WIDEST = 64, 2048  # pixels: a small image grows to the first, unless the whole grows beyond the second
CAPTION = 16  # pixels of height
PAGE, PAPER = 400, 246  # lines of a page of text; the grey behind a sound
INK, FAINT, SAMPLES, DATA = "#222222", "#d8d8d8", "#d1495b", "#2b6ca3"  # colours, of plots too


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


def film(path: Path | str, frames: Sequence[Array], ms: int = 100) -> None:
    """Write :func:`gif` or :func:`webp` as ``path`` ends; endless."""
    (webp if Path(path).suffix.lower() == ".webp" else gif)(path, frames, ms)


def on_one_page(images: Sequence[Array]) -> list[Array]:
    """Images ``(H, W, 3)`` of perhaps several sizes, each at the top left of white ``(max H, max W, 3)``."""
    H, W = (max(image.shape[axis] for image in images) for axis in (0, 1))
    pads = [((0, H - image.shape[0]), (0, W - image.shape[1]), (0, 0)) for image in images]
    return [np.pad(image, pad, constant_values=255) for image, pad in zip(images, pads)]


def webp(path: Path | str, frames: Sequence[Array], ms: int = 100) -> None:
    """Write an endless film as :func:`gif` does, as an animated WebP: lossless in all colours."""
    pages = [Image.fromarray(frame).convert("RGB") for frame in frames]
    if not pages:
        raise ValueError("a film needs a frame")
    file = io.BytesIO()
    pages[0].save(file, "webp", save_all=True, append_images=pages[1:], duration=ms, loop=0, lossless=True)
    files.write_bytes(path, file.getvalue())
