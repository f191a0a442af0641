"""The classifier: its loss, its networks against others' of the same weights, and the extractor that ships."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from gencli import checkpoint, data, recipe
from gencli.console import UsageError
from gencli.contract import Batch, DataSpec, Step
from gencli.files import canonical
from gencli.metrics.extractors import DIGITS
from gencli.models.supervised.classifier import Classifier, moved, warped
from gencli.nn.norm import BatchNorm
from gencli.nn.resnet import ResNet, WideBlock, WideResNet
from gencli.rng import Keys, using

NETWORKS: list[dict[str, Any]] = [
    {"channels": 4},
    {"network": "resnet", "depth": 10, "channels": 4},
    {"network": "wrn", "depth": 10, "channels": 2},
]
networks = pytest.mark.parametrize("config", NETWORKS, ids=["cnn", "resnet", "wrn"])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def spec(*shape: int, classes: int = 10) -> DataSpec:
    return DataSpec(name="test", kind="image", shape=shape, levels=256, classes=tuple(map(str, range(classes))))


def build(shape: tuple[int, ...] = (3, 8, 8), classes: int = 5, **config: Any) -> Classifier:
    return Classifier(Classifier.Config(**config), spec(*shape, classes=classes))


def pictures(n: int, *shape: int) -> Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8)


def step(number: int = 0, offset: int = 0, stride: int = 1) -> Step:
    rng = Keys(0).open("model", number, offset=offset, stride=stride)
    return Step(number, 9, rng, torch.zeros(()), 0, offset, stride)


def excited(net: nn.Module) -> nn.Module:
    """``net`` with normalisations that are not those of the start: statistics and parameters all matter."""
    for module in net.modules():
        if isinstance(module, (BatchNorm, nn.BatchNorm2d)):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, 0, 0.3)
    return net


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels(epsilon: float) -> None:
    model = build(label_smoothing=epsilon, channels=4).eval()
    model.head[2].weight.data *= 20
    x, label = pictures(6, 3, 8, 8), torch.tensor([0, 4, 2, 2, 1, 3])
    out = model.loss(Batch(x=x, label=label.to(torch.uint8), n=6), step())
    total, right = 0.0, 0
    for z, y in zip(model.classify(x).tolist(), label.tolist()):
        log_sum = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
        q = [(1 - epsilon) * (k == y) + epsilon / 5 for k in range(5)]
        total -= sum(q[k] * (z[k] - log_sum) for k in range(5))
        right += max(range(5), key=z.__getitem__) == y
    assert out["loss"].item() == pytest.approx(total / 6, rel=1e-12)
    assert out["accuracy"].item() == pytest.approx(right / 6)


@networks
def test_logits_are_a_linear_map_of_the_positive_features(config: dict[str, Any]) -> None:
    model, x = build(**config).eval(), pictures(4, 3, 8, 8)
    h = model.features(x)
    assert h.shape == (4, model.feature_dim) and model.classify(x).shape == (4, 5)
    assert torch.equal(model.classify(x), F.linear(h.clamp_min(0), model.head[2].weight, model.head[2].bias))
    assert h.std(0).max() > 1e-3 and (h.min() < 0) == (config.get("network", "cnn") == "cnn")


def test_features_are_float32_where_torch_is() -> None:
    torch.set_default_dtype(torch.float32)
    model = build(**NETWORKS[0]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        h, z = model.features(pictures(2, 3, 8, 8)), model.classify(pictures(2, 3, 8, 8))
    assert h.dtype == z.dtype == torch.float32


@networks
def test_in_evaluation_no_example_sees_another(config: dict[str, Any]) -> None:
    model, x = build(**config), pictures(7, 3, 8, 8)
    with using(step()):
        first = model.classify(x)
    assert isinstance(excited(model.eval()), Classifier)
    whole = model.classify(x)
    parts = torch.cat([model.classify(x[i : i + 2]) for i in range(0, 7, 2)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert (first - whole).abs().max() > 1e-3, "running statistics are used"
    with using(step()):  # in training they do
        model.train()
        assert (model.classify(x)[:2] - model.classify(x[:2])).abs().max() > 1e-3


@pytest.mark.parametrize(("network", "where"), [("cnn", "head.1"), ("resnet", "head.1"), ("wrn", "f.1.F.3")])
def test_dropout_is_where_its_paper_has_it(network: str, where: str) -> None:
    model = build(network=network, channels=2, dropout=0.3)
    assert next(name for name, m in model.named_modules() if getattr(m, "p", 0) == 0.3) == where
    assert {m.purpose for m in model.modules() if hasattr(m, "purpose")} >= {f"dropout:{where}"}


# ------------------------------------------------------------------------------------------------------ augmentation


def test_moved_images_are_the_shifts_and_mirrors_of_their_own() -> None:
    x, shift = pictures(400, 2, 5, 4), 2
    y = moved(x, step().rng, shift, flip=True)
    assert y.dtype == torch.uint8 and y.shape == x.shape
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (shift, shift), (shift, shift)), mode="edge")
    seen = set()
    for n, (i, j, mirror) in itertools.product(range(len(x)), itertools.product(range(5), range(5), (1, -1))):
        if np.array_equal(padded[n, :, i : i + 5, j : j + 4][..., ::mirror], y[n]):
            seen.add((n, i, j, mirror))
    assert len({found[0] for found in seen}) == 400
    assert len({found[1:] for found in seen}) == 50, "every move occurs"
    assert torch.equal(moved(x, step().rng, 0, flip=False), x)
    assert 150 < sum(torch.equal(a, b) for a, b in zip(moved(x, step().rng, 0, flip=True), x)) < 250


def test_moves_are_a_function_of_the_key_and_the_global_row() -> None:
    x = pictures(12, 3, 9, 9)
    whole = moved(x, step().rng, 2, True)
    assert torch.equal(moved(x, step().rng, 2, True), whole)
    assert not torch.equal(moved(x, step(1).rng, 2, True), whole)
    for rank in range(3):
        assert torch.equal(moved(x[rank::3], step(0, rank, 3).rng, 2, True), whole[rank::3])


def test_warped_images_are_interpolated_by_their_own_affine_map() -> None:
    x, w = torch.randn(3, 2, 6, 5), 0.4
    y, u = warped(x, step().rng, w), step().rng.uniform("warp", (3, 2, 3)).numpy()
    for n, c, i, j in itertools.product(range(3), range(2), range(6), range(5)):
        centre = np.array([(2 * j + 1) / 5 - 1, (2 * i + 1) / 6 - 1, 1])  # of the pixel, in [-1, 1]^2
        to = (np.eye(2, 3) + w * (2 * u[n] - 1)) @ centre
        col, row = (((to[k] + 1) * size - 1) / 2 for k, size in enumerate((5, 6)))
        col, row = min(max(col, 0), 4), min(max(row, 0), 5)  # beyond the edge lies the edge
        i0, j0 = min(int(row), 4), min(int(col), 3)
        a, b = row - i0, col - j0
        image = x[n, c].numpy()
        want = (1 - a) * ((1 - b) * image[i0, j0] + b * image[i0, j0 + 1])
        want += a * ((1 - b) * image[i0 + 1, j0] + b * image[i0 + 1, j0 + 1])
        assert y[n, c, i, j].item() == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(warped(x, step().rng, 0.0), x, rtol=0, atol=1e-12)
    whole = warped(x, step().rng, w)
    assert torch.equal(whole, y) and not torch.equal(warped(x, step(1).rng, w), y)
    for rank in range(3):
        torch.testing.assert_close(warped(x[rank::3], step(0, rank, 3).rng, w), whole[rank::3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", [{"shift": 2}, {"flip": True}, {"warp": 0.2}])
def test_only_the_loss_moves_images(how: dict[str, Any]) -> None:
    model, x, label = build(**how, **NETWORKS[0]).eval(), pictures(5, 3, 8, 8), torch.arange(5)
    told = [model.loss(Batch(x=x, label=label, n=5), step(i))["loss"].item() for i in range(2)]
    assert told[0] != told[1]
    assert torch.equal(model.classify(x), model.classify(x))


# ------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("config", "parameters", "d"),
    [
        ({"network": "wrn"}, 1_467_610, 128),  # WRN-28-2
        ({"network": "wrn", "width": 10}, 36_479_194, 640),  # 36.5 M in the paper
        ({"network": "wrn", "depth": 40, "width": 4}, 8_949_210, 256),  # 8.9 M in the paper
        ({"network": "resnet"}, 11_173_962, 512),  # torchvision's ResNet-18 with another first layer and 10 classes
        ({}, 230_890, 64),
    ],
)
def test_networks_have_their_papers_parameters(config: dict[str, Any], parameters: int, d: int) -> None:
    with torch.device("meta"):
        model = build((3, 32, 32), 10, **config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.feature_dim == model.f.outputs == model.head[2].in_features == d


@pytest.mark.parametrize("training", [False, True])
def test_resnet_18_is_torchvisions(training: bool) -> None:
    theirs = excited(resnet18())
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = theirs.fc = nn.Identity()
    ours = ResNet(3)
    state = [v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")]
    ours.load_state_dict(dict(zip(ours.state_dict(), state, strict=True)))
    x = torch.randn(2, 3, 9, 8)
    with using(step()):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n_in", "n_out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2)])
def test_a_wide_block_is_its_formula(n_in: int, n_out: int, stride: int) -> None:
    block, x = excited(WideBlock(n_in, n_out, stride, dropout=0.5)).eval(), torch.randn(2, n_in, 6, 5)
    first, second, one, two = block.first[0], block.F[1], block.F[0], block.F[4]

    def normed(norm: BatchNorm, x: Tensor) -> Tensor:
        by = [t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        return ((x - by[0]) / (by[1] + norm.eps).sqrt() * by[2] + by[3]).clamp_min(0)

    h = normed(first, x)
    y = F.conv2d(normed(second, F.conv2d(h, one.weight, stride=stride, padding=1)), two.weight, padding=1)
    changes = n_in != n_out or stride > 1
    y = y + (F.conv2d(h, block.W_s.weight, stride=stride) if changes else x)
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


def test_a_wide_resnet_has_three_groups_and_halves_twice() -> None:
    net = WideResNet(3, 16, 2)
    blocks = [m for m in net if isinstance(m, WideBlock)]
    assert [b.F[0].out_channels for b in blocks] == [32, 32, 64, 64, 128, 128]
    assert [b.F[0].stride[0] for b in blocks] == [1, 1, 2, 1, 2, 1]
    sides: list[int] = []
    net[-2].register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-1]))
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 128) and sides == [8]


@pytest.mark.parametrize(("side", "last"), [(1, 1), (3, 3), (4, 2), (8, 2), (28, 3), (33, 2)])
def test_the_cnn_halves_while_4_pixels_remain(side: int, last: int) -> None:
    model, shapes = build((1, side, side), channels=2).eval(), list[torch.Size]()
    model.f[-3].register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape[2:]))
    assert model.features(pictures(2, 1, side, side)).shape == (2, 4) and shapes == [(last, last)]


def test_what_it_cannot_learn_is_refused() -> None:
    plain = DataSpec(name="plain", kind="image", shape=(1, 8, 8), levels=2)
    with pytest.raises(UsageError, match=r"^classifier needs images with classes, and plain has none$"):
        Classifier(Classifier.Config(), plain)
    moons = DataSpec(name="points/moons", kind="points", shape=(2,), classes=("a", "b"))
    with pytest.raises(UsageError, match="points/moons has none"):
        Classifier(Classifier.Config(), moons)
    with pytest.raises(UsageError, match=r"8 b \+ 2 layers, and depth is 20 \(the nearest is 18\)"):
        build(network="resnet", depth=20)
    with pytest.raises(UsageError, match=r"6 b \+ 4 layers, and depth is 2 \(the nearest is 10\)"):
        build(network="wrn", depth=2)


# ------------------------------------------------------------------------------------------------------ what ships


def test_the_digits_extractor_knows_the_digits_and_nothing_of_the_machine_that_made_it() -> None:
    torch.set_default_dtype(torch.float32)
    loaded, test = checkpoint.load(DIGITS), data.load("digits", "test")
    rows = test.rows(torch.arange(test.size))
    right = (loaded.model.classify(rows["x"]).argmax(1) == rows["label"]).double().mean().item()
    assert right >= 0.99
    h = loaded.model.features(rows["x"])
    assert h.shape == (359, 64) and torch.linalg.matrix_rank(h.double() - h.double().mean(0)) == 64
    assert DIGITS.stat().st_size < 500_000
    said = canonical(loaded.meta)
    assert loaded.meta["recipe"]["data"] == {"name": "digits", "on_bad": "fail", "root": None}
    assert loaded.meta["recipe"]["seed"] == 0 and not [w for w in ("/", "\\", "home", "tmp") if w in said]


def test_the_shipped_extractor_is_what_the_default_recipe_makes() -> None:
    torch.set_default_dtype(torch.float32)
    made = checkpoint.load(DIGITS).meta["recipe"]
    now = recipe.load("classifier", model=True).model_dump(mode="json")
    assert [made[k] for k in ("model", "data", "seed", "threads")] == [
        now[k] for k in ("model", "data", "seed", "threads")
    ]
    shared = set(made["train"]) & set(now["train"])
    assert {k: made["train"][k] for k in shared} == {k: now["train"][k] for k in shared}
