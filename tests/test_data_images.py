"""Decoding images that cannot be trusted, and folders of them."""

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gencli.console import DataError
from gencli.data import folders, load
from gencli.data.images import decode, header

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def both(data):
    """The decoded picture, after checking that the header promised its shape."""
    a = decode(data, "it")
    assert a.dtype == np.uint8 and a.flags.c_contiguous and header(data, "it") == a.shape
    return a


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_come_back(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    colour = both(encoded(Image.fromarray(RGB), kind, **options))
    if kind == "GIF":  # reduced to 256 colours: 35 pixels have no more
        assert abs(colour.astype(int) - RGB.transpose(2, 0, 1)).max() <= 1
    else:
        assert np.array_equal(colour, RGB.transpose(2, 0, 1))
    if kind != "WEBP":  # which knows no grey
        assert np.array_equal(both(encoded(Image.fromarray(GREY), kind))[0], GREY)


def test_jpeg():
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 5
    a = both(encoded(Image.fromarray(smooth), "JPEG", quality=95))
    assert a.shape == (1, 16, 24) and abs(a[0].astype(int) - smooth).max() < 8


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    for kind in ("JPEG", "TIFF"):
        red = both(encoded(cmyk, kind))[:, 8, 8].astype(int)
        assert red[0] > 240 and red[1:].max() < 15


def test_palette():
    im = Image.new("P", (2, 1))
    im.putpalette([255, 0, 0, 0, 0, 255])
    im.putpixel((1, 0), 1)
    assert both(encoded(im))[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    assert both(encoded(im, transparency=1))[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 0]]


def test_transparency_is_composited_over_black():
    im = Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 255], [200, 100, 50, 51]]], np.uint8), "RGBA")
    assert both(encoded(im))[:, 0].T.tolist() == [[0, 0, 0], [200, 100, 50], [40, 20, 10]]
    grey = Image.fromarray(np.array([[[200, 0], [200, 255], [200, 51]]], np.uint8), "LA")
    assert both(encoded(grey))[0, 0].tolist() == [0, 200, 40]
    keyed = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert both(encoded(keyed, transparency=9))[0, 0].tolist() == [7, 0]


def test_one_bit():
    assert both(encoded(Image.fromarray(np.array([[True, False]]))))[0].tolist() == [[255, 0]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    wide = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert both(encoded(Image.fromarray(wide), kind))[0, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.array_equal(both(encoded(Image.fromarray(GREY.astype(np.uint16) * 257), kind))[0], GREY)
    assert np.array_equal(both(encoded(Image.fromarray(GREY.astype(np.uint16) * 256), kind))[0], GREY)


def png(width, height, depth, colour, rows=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour():
    assert both(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x1234, 0x80FF, 0xFFFF)))[:, 0, 0].tolist() == [
        18,
        128,
        255,
    ]


def test_pixels_without_a_range_are_refused():
    for a in (np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int32)):
        for read in (decode, header):
            with pytest.raises(DataError, match=r"odd\.tif.*no natural range"):
                read(encoded(Image.fromarray(a), "TIFF"), "odd.tif")


def test_animations_are_refused():
    frames = [Image.new("L", (4, 4), v) for v in (0, 128, 255)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match="animation"):
            decode(data, "it")
    assert decode(encoded(frames[0], "GIF", save_all=True), "it").shape[1:] == (4, 4)


@pytest.mark.parametrize("size", [(20_000, 10_000), (8000, 7000), (2**31 - 1, 2**31 - 1)])
def test_huge_pictures_are_refused_from_the_header(size):
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"big\.png: more than 50 megapixels"):
        decode(png(*size, 8, 2, b"\0" * 1000), "big.png")
    assert time.perf_counter() - start < 1


def test_bad_files_are_named():
    good = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    jpeg = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    with pytest.raises(DataError, match=r"x\.png: the file is empty"):
        decode(b"", "x.png")
    for bad in (
        good[:1000],
        jpeg[:1000],
        bytes(flipped),
        good[:30],
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"hello",
        jpeg[:2],
    ):
        with pytest.raises(DataError, match=r"x\.png"):
            decode(bad, "x.png")


def test_other_formats_are_not_opened():
    for kind in ("ICO", "TGA", "PDF", "ICNS"):
        with pytest.raises(DataError, match="not a picture of the formats"):
            decode(encoded(Image.new("RGB", (64, 64)), kind), "it")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuzz", range(3))
def test_damaged_bytes_give_a_picture_or_a_data_error(fuzz):
    rng = np.random.default_rng(fuzz)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
    for kind in kinds:
        data = encoded(Image.fromarray(RGB), kind)
        for _ in range(60):
            bad = bytearray(data)
            for place in rng.integers(0, len(bad), rng.integers(1, 6)):
                bad[place] = rng.integers(256)
            with contextlib.suppress(DataError):
                assert decode(bytes(bad), "it").dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255  # top left bright
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[:, ::-1][::-1, ::-1], 7: upright.T[::-1, ::-1], 8: upright.T[::-1][::-1, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = both(encoded(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), kind, exif=exif))
    assert a.shape == (3, 16, 32) and abs(a[0].astype(int) - upright).mean() < 4


def test_resizing_cuts_the_middle_and_averages():
    board = (np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8)
    board[:, :32] = board[:, 96:] = 255  # outside of the middle square
    a = decode(encoded(Image.fromarray(board)), size=8)
    assert a.shape == (1, 8, 8) and abs(a.astype(int) - 127).max() <= 2  # grey: no aliasing, and nothing from outside
    assert decode(encoded(Image.fromarray(board)), channels=3, size=8).shape == (3, 8, 8)


# ---- folders


def fill(folder, n, shape=(4, 6), start=0, kind="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(start + i).integers(0, 256, shape, dtype=np.uint8)).save(
            folder / f"{start + i:03}.{kind}"
        )


def everything(source):
    return source.rows(torch.arange(source.size))


def test_a_flat_folder_splits_by_name(tmp_path):
    fill(tmp_path / "a", 60)
    sources = {s: load(str(tmp_path / "a"), s) for s in ("train", "val", "test")}
    sizes = {s: source.size for s, source in sources.items()}
    assert sum(sizes.values()) == 60 and sizes["train"] > 36 and min(sizes.values()) >= 1
    assert all(s.spec.size == sizes["train"] and s.spec.shape == (1, 4, 6) for s in sources.values())
    rows = [everything(s)["x"] for s in sources.values()]
    assert "label" not in everything(sources["train"]) and sources["train"].spec.classes == ()
    assert len(torch.cat(rows).flatten(1).unique(dim=0)) == 60
    fill(tmp_path / "a", 30, start=60)  # new images move no old one
    for split, old in zip(("train", "val", "test"), rows):
        new = {bytes(x.numpy()) for x in everything(load(str(tmp_path / "a"), split))["x"]}
        assert {bytes(x.numpy()) for x in old} <= new


def test_three_images_make_three_splits(tmp_path):
    fill(tmp_path, 3)
    assert [load(str(tmp_path), s).size for s in ("train", "val", "test")] == [1, 1, 1]


def test_a_folder_per_class(tmp_path):
    fill(tmp_path / "dogs", 20, (4, 4, 3))
    fill(tmp_path / "cats" / "deep", 20, (4, 4, 3), start=20)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    fill(tmp_path / ".hidden", 1)
    source = load(str(tmp_path))
    assert source.spec.classes == ("cats", "dogs") and source.spec.shape == (3, 4, 4)
    rows = everything(source)
    dogs = {bytes(decode(f).tobytes()) for f in (tmp_path / "dogs").iterdir()}
    assert [int(bytes(x.numpy()) in dogs) for x in rows["x"]] == rows["label"].tolist()
    fill(tmp_path, 1, start=90)
    with pytest.raises(DataError, match=r"090\.png is in no class folder"):
        load(str(tmp_path))


def test_own_splits(tmp_path):
    fill(tmp_path / "train" / "a", 12)
    fill(tmp_path / "train" / "b", 12, start=12)
    fill(tmp_path / "test" / "b", 3, start=50)
    train, val, test = (load(str(tmp_path), s) for s in ("train", "val", "test"))
    assert train.size + val.size == 24 and val.size >= 1 and test.size == 3
    assert everything(test)["label"].tolist() == [1, 1, 1]
    fill(tmp_path / "valid" / "a", 2, start=70)
    assert load(str(tmp_path), "val").size == 2 and load(str(tmp_path), "train").size == 24
    fill(tmp_path / "test" / "c", 1, start=80)
    with pytest.raises(DataError, match="class 'c'"):
        load(str(tmp_path))
    fill(tmp_path / "other", 1)
    with pytest.raises(DataError, match="in none of the folders"):
        load(str(tmp_path))


def test_large_folders_are_decoded_when_asked_for(tmp_path, monkeypatch):
    fill(tmp_path / "a", 20)
    fill(tmp_path / "b", 20, (4, 6, 3), start=20)
    small = load(str(tmp_path))
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    large = load(str(tmp_path))
    assert isinstance(large, folders.FolderSource) and not isinstance(small, folders.FolderSource)
    assert small.spec == large.spec and small.spec.shape == (3, 4, 6)  # grey and colour mixed
    index = torch.tensor([5, 2, 2, 11])
    for key in ("x", "label"):
        assert torch.equal(small.rows(index)[key], large.rows(index)[key])
        assert torch.equal(large.rows(index.flip(0))[key].flip(0), large.rows(index)[key])
    digest = large.digest
    assert load(str(tmp_path)).digest == digest != load(str(tmp_path), "val").digest
    with pytest.raises(IndexError):
        large.rows(torch.tensor([large.size]))
    first = sorted((tmp_path / "a").iterdir())
    for file in first:
        file.write_bytes(file.read_bytes()[:-40])
    assert load(str(tmp_path)).digest != digest
    with pytest.raises(DataError, match=r"\.png"):
        everything(load(str(tmp_path)))


def test_mixed_sizes_name_the_odd_one_and_the_way_out(tmp_path):
    fill(tmp_path, 20)
    fill(tmp_path, 1, (9, 8), start=50)
    with pytest.raises(DataError, match=r"050\.png: 8x9 pixels, while most images are 6x4") as e:
        load(str(tmp_path))
    assert f"{tmp_path}:4 " in e.value.hint
    source = load(f"{tmp_path}:4")
    assert source.spec.shape == (1, 4, 4) and source.name == source.spec.name == f"{tmp_path}:4"
    assert load(f"{tmp_path}:4:5bit").spec.levels == 32


def test_bad_images_stop_or_are_skipped(tmp_path, capsys):
    fill(tmp_path, 30)
    (tmp_path / "005.png").write_bytes(b"")
    truncated = tmp_path / "011.png"
    fill(tmp_path, 1, (64, 64), start=11)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"005\.png: the file is empty \(1 of 30"):
        load(str(tmp_path))
    size = sum(load(str(tmp_path), s, on_bad="skip").size for s in ("train", "val", "test"))
    assert size == 28 and "left out 2 of 30" in capsys.readouterr().err
    for i in range(12, 14):
        (tmp_path / f"{i:03}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="4 of 30"):
        load(str(tmp_path), on_bad="skip")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(DataError, match="no images in this folder"):
        load(str(tmp_path))


def test_links_in_a_circle_end(tmp_path):
    fill(tmp_path / "a", 12)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert sum(load(str(tmp_path), s).size for s in ("train", "val", "test")) == 12
