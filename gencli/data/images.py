"""Image files to arrays, without trusting them.

Every picture becomes uint8 ``(C, H, W)``, C = 1 (grey) or 3 (RGB):

- 16 bits a channel: the high byte (an 8-bit picture widened either way comes back exactly). Pictures of 32-bit integers
  or floats have no natural range and are refused.
- Transparency: composited over black, so that colours hidden under transparent pixels never show.
- Palettes, CMYK, YCbCr, Lab: converted to RGB; 1-bit pictures to grey 0 and 255.
- EXIF orientation (JPEG, WebP, TIFF, and PNG with the tag before the pixels) is applied.
- Animations and files of several pages are refused; of an MPO (a JPEG with a preview or depth map) the first counts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from gencli.console import DataError, GencliError
from gencli.data.source import Array

__all__ = ["PIXELS", "SUFFIXES", "decode", "header"]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff")
PIXELS = 50_000_000  # more than any training picture has, less than fills a machine

# also above Pillow's own softer limit: an error that names the file instead of a line on stderr
warnings.simplefilter("error", Image.DecompressionBombWarning)

_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def header(file: Path | bytes, name: str = "") -> tuple[int, int, int]:
    """``(C, H, W)`` of what :func:`decode` will give, from the header alone. DataError as there."""
    with _opened(file, name) as im:
        width, height = im.size if _orientation(im) < 5 else im.size[::-1]
        return 1 if im.mode in _GREY else 3, height, width


def decode(file: Path | bytes, name: str = "", *, channels: int | None = None, size: int | None = None) -> Array:
    """One picture as a uint8 array ``(C, H, W)``.

    ``file``: a path, or the file's bytes. ``name``: what to call it in errors. ``channels = 3`` makes grey pictures
    RGB. ``size``: cut the middle square and resize it to ``size`` x ``size`` (Lanczos, antialiased).

    Raises DataError naming the file if it is empty, truncated, corrupt, animated, of another format, of a mode without
    a natural 8-bit range, or larger than 50 megapixels (seen from the header, before any pixel is read).
    """
    with _opened(file, name) as im:
        turn = _TURN.get(_orientation(im))
        im.load()
        flat = _eight_bits(im)
        if turn is not None:
            flat = flat.transpose(turn)
        if size is not None:
            side = min(flat.size)
            left, top = (flat.width - side) // 2, (flat.height - side) // 2
            square = flat.crop((left, top, left + side, top + side))  # resize(box=) would look beyond the box
            flat = square.resize((size, size), Image.Resampling.LANCZOS)
        if channels == 3:
            flat = flat.convert("RGB")
        a = np.asarray(flat)
    return np.array(a[None] if a.ndim == 2 else a.transpose(2, 0, 1), order="C")  # a copy: Pillow's is read-only


@contextmanager
def _opened(file: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The open picture, with every way in which it can be bad turned into a DataError."""
    name = name or (str(file) if isinstance(file, Path) else "image")
    try:
        if (len(file) if isinstance(file, bytes) else file.stat().st_size) == 0:
            raise DataError(f"{name}: the file is empty")
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as im:
            if im.width * im.height > PIXELS:
                raise Image.DecompressionBombError
            if getattr(im, "n_frames", 1) > 1 and im.format != "MPO":
                raise DataError(f"{name}: an animation or a file of several pages, not one picture")
            if im.mode == "F" or (im.mode == "I" and im.format not in ("PNG", "PPM")):
                raise DataError(f"{name}: pixels of 32 bits have no natural range: save it with 8 or 16 bits a channel")
            yield im
    except GencliError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name}: more than {PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not a picture of the formats {', '.join(FORMATS)}") from None
    except Exception as e:  # a decoder fed with garbage may raise anything
        raise DataError(f"{name}: cannot be read as a picture ({e or type(e).__name__})") from e


def _orientation(im: Image.Image) -> int:
    """The EXIF orientation 1 .. 8 that is left to apply."""
    # Pillow turns TIFF itself, and would have to decode a whole PNG to look for a tag behind the pixels
    if im.format == "TIFF" or (im.format == "PNG" and "exif" not in im.info):
        return 1
    try:
        value = im.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata does not make a picture bad
        return 1
    return value if value in _TURN else 1


def _eight_bits(im: Image.Image) -> Image.Image:
    """``im`` in mode L or RGB."""
    if im.mode.startswith("I"):
        a = np.asarray(im)
        if a.min() < 0 or a.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return Image.fromarray((a >> 8).astype(np.uint8))
    target = "L" if im.mode in _GREY else "RGB"
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, (0, 0, 0, 255)), im.convert("RGBA")).convert("RGB")
    return im if im.mode == target else im.convert(target)
