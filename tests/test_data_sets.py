"""The table of data sets, embedded sets, depths and points."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from gencli.console import DataError, UsageError
from gencli.data import SETS, SPLITS, embedded, load
from gencli.data.points import BLOCK, POINTS, PointSource, density, modes
from gencli.data.source import TensorSource, carve

HERE = [n for n, e in SETS.items() if e.origin != "standard"]
IMAGES = [n for n in HERE if SETS[n].kind == "image"]
INDEX = torch.tensor([7, 3, 170, 3])


def everything(source):
    return source.rows(torch.arange(source.size))


def test_the_table_costs_no_heavy_import():
    code = "import sys, gencli.data; print([m for m in ('torch', 'numpy', 'sklearn', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*HERE, "shapes:coloured", "photos:32", "photos:5bit", "digits:dynamic"])
def test_rows_are_a_pure_function_of_the_index(name, split):
    source = load(name, split)
    rows = source.rows(INDEX)
    assert (source.name, source.split, source.spec.name) == (name, split, name)
    assert tuple(rows["x"].shape) == (4, *source.spec.shape) and rows["x"].is_contiguous()
    assert ("label" in rows) == bool(source.spec.classes)
    if "label" in rows:
        assert rows["label"].shape == (4,) and rows["label"].dtype == torch.int64
        assert rows["label"].min() >= 0 and rows["label"].max() < len(source.spec.classes)
    again = load(name, split).rows(INDEX.flip(0))
    for key in rows:
        assert torch.equal(rows[key].flip(0), again[key])
        assert torch.equal(rows[key][1], rows[key][3]) and torch.equal(rows[key][:1], source.rows(INDEX[:1])[key])
    assert load(name, split).digest == source.digest and len(source.digest) == 16
    assert source.rows(INDEX[:0])["x"].shape == (0, *source.spec.shape)


@pytest.mark.parametrize("name", [*IMAGES, "shapes:coloured", "photos:32", "photos:5bit", "digits:threshold"])
def test_images_agree_with_the_table(name):
    entry = SETS[name.partition(":")[0]]
    for split, size in zip(SPLITS, entry.sizes):
        source = load(name, split)
        x = everything(source)["x"]
        assert x.dtype == torch.uint8 and source.spec.kind == "image" and source.spec.classes == entry.classes
        assert source.spec.size == load(name, "train").size
        if ":" not in name:
            assert (source.size, source.spec.shape, source.spec.levels) == (size, entry.shape, entry.levels)
        assert int(x.min()) == 0 and source.spec.levels - 8 < int(x.max()) <= source.spec.levels - 1


@pytest.mark.parametrize("index", [[-1], [0, 180]])
def test_no_row_outside_the_split(index):
    with pytest.raises(IndexError):
        load("digits", "val").rows(torch.tensor(index))


FROZEN = {
    "digits": ("0608b469c28ee37b", "59e6415359ae851e", "bc87cad241718505"),
    "photos": ("ea4cc81adcd749d7", "1ebcc83e2bff3969", "0e865d644bf1bf19"),
    "shapes": ("2735e427636ec747", "0c556efb6b970653", "9e3784e020439148"),
    "shapes:coloured": ("0148535a712370c6", "37c295b1444b5e17", "02c7bf778fe47812"),
    "tones": ("eebcae0863f1c3a1", "eebe38e4b2055886", "d3fe1b142f6218b6"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_embedded_data_never_changes(name):
    # a figure reported on this data would silently stop being comparable
    assert tuple(load(name, split).digest for split in SPLITS) == FROZEN[name]


def test_the_digits_split_never_changes():
    parts = embedded.digits_split()
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    assert {k: len(v) for k, v in parts.items()} == {"train": 1258, "val": 180, "test": 359}
    digest = hashlib.sha256(b"".join(parts[s].astype("<i8").tobytes() for s in SPLITS)).hexdigest()
    assert digest == "5fae27e9cce3b1804e3d4a4cc480a5303657c83717829a325b649f3d8202837a"


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch, rows = load_digits(), embedded.digits_split()["val"]
    got = everything(load("digits", "val"))
    assert np.array_equal(got["x"][:, 0].numpy(), bunch.images[rows])
    assert np.array_equal(got["label"].numpy(), bunch.target[rows])


def test_photos_share_no_pixel_between_splits(monkeypatch):
    # photographs whose pixels carry their own address: a pixel in two splits would show
    number = np.arange(2 * 427 * 640, dtype=np.uint32).reshape(2, 427, 640)
    pictures = np.stack([number >> 16, (number >> 8) & 255, number & 255], axis=-1).astype(np.uint8)
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: type("B", (), {"images": list(pictures)}))
    seen = []
    for split in SPLITS:
        x = everything(embedded.photos("photos", split))["x"].long()
        seen.append(set(torch.unique(x[:, 0] * 65536 + x[:, 1] * 256 + x[:, 2]).tolist()))
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_shapes_are_what_their_labels_say():
    rows = everything(load("shapes", "train"))
    x, label = rows["x"][:, 0].bool(), rows["label"]
    assert torch.bincount(label).min() > 3000
    height, width = x.any(2).sum(1), x.any(1).sum(1)
    fill = x.sum((1, 2)) / (height * width)
    assert x.any((1, 2)).all() and not x.all((1, 2)).any()
    assert (fill[label == 0] == 1).all()
    assert abs(fill[label == 1].mean() - np.pi / 4) < 0.03 and abs(fill[label == 2].mean() - 0.5) < 0.07
    # a triangle stands on its base
    triangles = x[label == 2].sum(2)
    first = triangles[torch.arange(len(triangles)), triangles.gt(0).int().argmax(1)]
    assert (first < triangles.max(1).values).all()


def test_coloured_shapes_have_two_colours():
    x = everything(load("shapes:coloured", "val"))["x"].long()
    code = (x[:, 0] * 16 + x[:, 1] * 4 + x[:, 2]).flatten(1)
    assert {len(c.unique()) for c in code} == {2}
    assert len(code.unique()) == 64


def test_threshold_and_bits():
    x = everything(load("digits", "val"))["x"]
    assert torch.equal(everything(load("digits:threshold", "val"))["x"], (x > 8).byte())
    y, low = (everything(load(name, "val"))["x"] for name in ("photos", "photos:3bit"))
    assert torch.equal(low, y // 32) and load("photos:3bit").spec.levels == 8
    assert load("photos:3bit").digest != load("photos").digest != load("photos:2bit").digest


def test_dynamic_binarisation_has_the_right_mean_and_follows_the_epoch():
    grey = load("digits", "train").rows(torch.arange(40))["x"].double() / 16
    train, val = load("digits:dynamic", "train"), load("digits:dynamic", "val")
    index = torch.arange(40)
    draws = torch.stack([train.rows(index, e)["x"].double() for e in range(200)])
    # 40 x 64 independent binomial proportions: the standardised squared error has mean 1
    free = (grey > 0) & (grey < 1)
    z2 = (draws.mean(0) - grey)[free] ** 2 / (grey * (1 - grey) / 200)[free]
    assert abs(z2.mean() - 1) < 0.15
    assert torch.equal(draws[0][~free], grey[~free])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(val.rows(index, 0)["x"], val.rows(index, 5)["x"])
    mixed = train.rows(index[:2], torch.tensor([3, 4]))["x"].double()
    assert torch.equal(mixed, torch.stack([draws[3, 0], draws[4, 1]]))


def test_unknown_names():
    with pytest.raises(UsageError, match=r"did you mean 'digits'.*") as e:
        load("digit")
    assert "gencli data ls" in e.value.hint
    for name, said in {
        "points/moon": "did you mean 'points/moons'",
        "digits:5bit": "no variant '5bit'",
        "photos:64": "no variant '64'",
        "shapes:threshold": "no variant",
        "mnist:threshold:dynamic": "exclude each other",
        "": "no data set",
    }.items():
        with pytest.raises(UsageError, match=said):
            load(name)
    with pytest.raises(UsageError, match="did you mean 'train'"):
        load("digits", "trian")
    with pytest.raises(DataError, match="no such file"):
        load("./nowhere")


def test_carve_leaves_rows_to_train_on():
    parts = carve(10, 3, 2, "key")
    assert sorted(np.concatenate(list(parts.values()))) == list(range(10)) and len(parts["test"]) == 2
    with pytest.raises(DataError):
        carve(5, 3, 2, "key")


def test_digest_depends_on_content_and_split():
    spec = load("digits").spec
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    y = x.clone()
    y[1, 0, 7, 7] = 1
    digests = {TensorSource("a", s, spec, v).digest for s in ("train", "val") for v in (x, y)}
    assert len(digests) == 4 and TensorSource("b", "val", spec, x.clone()).digest in digests


# ---- points


def test_the_table_names_the_points():
    assert {n for n, e in SETS.items() if e.kind == "points"} == set(POINTS)
    for name, mixture in POINTS.items():
        assert len(SETS[name].classes) == len(mixture.parts)
        assert mixture.sample(np.random.default_rng(0), 10)[0].shape == (10, *SETS[name].shape)


# entropy in nats: of the course's sets as measured elsewhere, and in closed form where there is one
GRID_SD = 0.05 / 2.828
ENTROPY = {
    "points/smiley": 1.334,
    "points/moons": 1.008,
    "points/checkerboard": np.log(32),
    "points/25-gaussians": np.log(25) + np.log(2 * np.pi * np.e * GRID_SD**2),
}


def on_grid(name):
    """Midpoints of a fine grid that covers the set, the area of a cell, and the log-density there."""
    mixture = density(name)
    x, _ = mixture.sample(np.random.default_rng(1), 2000)
    low, high = np.floor(x.min(0)) - 0.5, np.ceil(x.max(0)) + 0.5
    if name.endswith("checkerboard"):
        low, high = np.array([-5.0, -5.0]), np.array([5.0, 5.0])
    if name.endswith("gaussians"):  # narrow: a grid around the one in the middle, and 25 of them
        low, high = -8 * GRID_SD * np.ones(2), 8 * GRID_SD * np.ones(2)
    n = 4000 if len(low) == 1 else 260
    axes = [lo + (hi - lo) * (np.arange(n) + 0.5) / n for lo, hi in zip(low, high)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(low))
    return np.prod((high - low) / n) * (25 if name.endswith("gaussians") else 1), mixture.log_prob(points)


@pytest.mark.parametrize("name", POINTS)
def test_densities_integrate_to_one_and_samples_follow_them(name):
    cell, log_p = on_grid(name)
    p = np.exp(log_p)
    assert abs(p.sum() * cell - 1) < 1e-6
    entropy = -(p * np.where(p > 0, log_p, 0)).sum() * cell
    if name in ENTROPY:
        assert abs(entropy - ENTROPY[name]) < 3e-3
    x, _ = density(name).sample(np.random.default_rng(2), 8000)
    mine = density(name).log_prob(x)
    assert np.isfinite(mine).all()
    assert abs(-mine.mean() - entropy) < 5 * mine.std() / 8000**0.5 + 1e-6


@pytest.mark.parametrize("name", POINTS)
def test_samples_fill_the_regions_that_the_density_says(name):
    # the entropy sees no rotation: compare the mass of 12 half spaces with importance-weighted uniform points
    mixture, rng = density(name), np.random.default_rng(3)
    x, _ = mixture.sample(rng, 20_000)
    dims = x.shape[1]
    if name.endswith("gaussians"):
        centres = np.array([p.mean for p in mixture.parts])
        u = centres[rng.integers(25, size=20_000)] + GRID_SD * rng.uniform(-6, 6, (20_000, 2))
        weight = np.exp(mixture.log_prob(u)) * 25 * (12 * GRID_SD) ** 2 / 20_000
    else:
        low, high = x.min(0) - 0.5, x.max(0) + 0.5
        u = rng.uniform(low, high, (20_000, dims))
        weight = np.exp(mixture.log_prob(u)) * np.prod(high - low) / 20_000
    for direction in rng.standard_normal((12, dims)):
        cut = np.quantile(x @ direction, rng.uniform(0.2, 0.8))
        assert abs((x @ direction < cut).mean() - weight[u @ direction < cut].sum()) < 0.08


def test_moons_are_scikit_learns():
    from sklearn.datasets import make_moons

    x, y = make_moons(4000, noise=0.1, random_state=0)
    assert abs(-density("points/moons").log_prob(x).mean() - 1.008) < 0.04
    for label, part in enumerate(density("points/moons").parts):
        assert part.log_prob(x[y == label]).mean() > part.log_prob(x[y != label]).mean() + 5


def test_the_smiley_smiles():
    log_p = density("points/smiley").log_prob(np.array([[0, -1], [2, 0], [-1.5, 2.5], [1.5, 2.5], [0, 1], [0, 2.5]]))
    assert log_p[:4].min() > -4 and log_p[4:].max() < -10


def test_curve_quadrature_is_exact():
    from scipy.integrate import quad

    for name in ("points/moons", "points/smiley", "points/spirals"):
        part = density(name).parts[-1]
        for x in part.sample(np.random.default_rng(4), 6):

            def integrand(v, x=x, part=part):
                d2 = ((x - part.path(np.array([v]))) ** 2).sum()
                return part.power * v ** (part.power - 1) * np.exp(-d2 / (2 * part.sd**2)) / (2 * np.pi * part.sd**2)

            truth = quad(integrand, 0, 1, points=np.linspace(0, 1, 60), limit=500, epsabs=1e-12)[0]
            assert abs(part.log_prob(x[None])[0] - np.log(truth)) < 1e-8


def test_modes_of_the_grid():
    centres, sd = modes("points/25-gaussians")
    assert centres.shape == (25, 2) and abs(sd - 0.05 / 2.828) < 1e-12
    assert abs(np.unique(centres.round(9)) - np.array([-4, -2, 0, 2, 4]) / 2.828).max() < 1e-8
    x = load("points/25-gaussians", "val").rows(torch.arange(4096))["x"].double()
    distance, label = torch.cdist(x, torch.from_numpy(centres)).min(1)
    assert torch.equal(label, load("points/25-gaussians", "val").rows(torch.arange(4096))["label"])
    assert abs((distance < 3 * sd).double().mean() - (1 - np.exp(-4.5))) < 0.008
    assert abs(x.std() - 1) < 0.03
    with pytest.raises(UsageError):
        modes("points/moons")
    with pytest.raises(UsageError):
        modes("digits")


def test_endless_rows_across_blocks_and_splits():
    source = load("points/moons", "test")
    assert source.size is None and source.spec.size is None and source.spec.levels is None
    far = torch.tensor([5, 10**12, BLOCK, BLOCK - 1, 5])
    rows = source.rows(far)["x"]
    assert torch.equal(rows[[0, 3]], source.rows(torch.arange(BLOCK))["x"][[5, BLOCK - 1]])
    assert torch.equal(rows[1], PointSource("points/moons", "test").rows(far[1:2])["x"][0])
    assert torch.equal(rows[0], rows[4]) and rows.dtype == torch.float32
    streams = [load("points/moons", split).rows(torch.arange(5000))["x"][:, 0] for split in SPLITS]
    assert len(torch.cat(streams).unique()) > 14_900  # nothing repeats but by rounding
    with pytest.raises(IndexError):
        source.rows(torch.tensor([-1]))
