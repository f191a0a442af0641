"""The Inception network: numbers of torch-fidelity's on the same random weights, its resize rule by brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import Inception3

from gencli.console import DataError
from gencli.metrics import inception
from gencli.metrics.inception import Inception, load_inception, resized
from gencli.metrics.weights import packed
from gencli.rng import generator


def random_weights() -> dict[str, Tensor]:
    """Weights of the network's own names that keep activations near 1, the same on every machine."""
    g, weights = generator("inception"), {}
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in Inception().state_dict().items() if "num_batches" not in k}
    for name, shape in sorted(shapes.items()):
        x = g.standard_normal(shape)
        if name.endswith("conv.weight"):
            x *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            x = 1 + 0.2 * np.tanh(x)
        else:
            x *= 0.05 if name == "fc.weight" else 0.1
        weights[name] = torch.from_numpy(x.astype(np.float32))
    return weights


def images(*shape: int) -> Tensor:
    return torch.from_numpy(generator("images", shape).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    path.write_bytes(packed(random_weights()))
    return path


@pytest.fixture(scope="module")
def net(file) -> Inception:
    torch.set_num_threads(1)
    return load_inception(file)


# by torch-fidelity 0.4.0 (feature_extractor_weights_path, "2048", "logits_unbiased") on the CPU: the norm of all, and
# every 256th feature and 126th logit of the last image
KNOWN = {
    (2, 3, 40, 32): (
        55.52654427,
        [0.5830259, 0.5983688, 0.0, 0.0, 1.514175, 0.0, 0.440488, 0.2911268],
        90.09716398,
        [0.812704, -0.8145021, -0.6973068, 3.515134, -0.7666264, 0.5774695, -1.684902, -0.9438009],
    ),
    (1, 3, 310, 420): (
        48.07489938,
        [0.6994911, 0.7462561, 0.0, 0.0, 1.75369, 0.0008603923, 0.5340356, 0.2831481],
        78.05151660,
        [1.33522, -0.8958266, -0.8510469, 4.197902, -0.9761758, 0.6849167, -1.988061, -1.287965],
    ),
}


@pytest.mark.parametrize("shape", KNOWN)
def test_features_and_logits_are_those_of_torch_fidelity(net, shape):
    features, logits = net(images(*shape))
    assert features.shape == (shape[0], 2048) and logits.shape == (shape[0], 1008)
    assert features.dtype == logits.dtype == torch.float32
    for x, norm, some in zip((features, logits), KNOWN[shape][::2], KNOWN[shape][1::2]):
        assert x.double().norm().item() == pytest.approx(norm, rel=1e-6)
        assert x[-1, :: x.shape[1] // 8].tolist() == pytest.approx(some, rel=0, abs=1e-5)


def test_every_part_of_the_rule_matters(net, monkeypatch):
    """The tolerance above is far below what the usual departures from the network would change."""
    x = images(1, 3, 32, 32)
    right, _ = net(x)
    last, net.Mixed_7c.last = net.Mixed_7c.last, False
    average, _ = net(x)
    net.Mixed_7c.last = last
    pool = torch.nn.functional.avg_pool2d
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "avg_pool2d", lambda *a, **k: pool(*a))
        padded, _ = net(x)
    half = torch.nn.functional.interpolate(x.float(), (299, 299), mode="bilinear")
    with monkeypatch.context() as patch:
        patch.setattr(inception, "resized", lambda x: half.clone())
        centred, _ = net(x)
    for other in (average, padded, centred):
        assert (other - right).norm() > 1e-2 * right.norm()


def test_folding_batch_norm_changes_rounding_alone(net, file):
    plain = Inception()
    with torch.no_grad():
        plain.load_state_dict(random_weights(), strict=False)
    a, b = plain(images(1, 3, 32, 32))[0], net(images(1, 3, 32, 32))[0]
    assert (a - b).norm() < 1e-6 * a.norm()


def test_a_batch_is_its_images(net, monkeypatch):
    x = images(3, 3, 20, 50)
    whole = net(x)
    monkeypatch.setattr(inception, "AT_ONCE", 2)
    for a, b in zip(whole, net(x)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    grey = images(1, 1, 20, 50).expand(-1, 3, -1, -1)
    torch.testing.assert_close(net(grey)[0], net(grey.contiguous())[0], rtol=0, atol=0)


def test_what_surrounds_it_does_not_lower_its_precision(net):
    x = images(1, 3, 32, 32)
    right = net(x)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(right, found))
    assert not any(y.requires_grad for y in found)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 28), (299, 299), (300, 298), (601, 450)])
def test_the_resize_rule_by_its_definition(size):
    x = images(1, 2, *size)
    grids = [np.arange(299, dtype=np.float32) * np.float32(n / 299) for n in size]
    low = [grid.astype(int) for grid in grids]
    high = [np.minimum(a + 1, n - 1) for a, n in zip(low, size)]
    dy, dx = (grid.astype(np.float64) - a for grid, a in zip(grids, low))
    raw = x[0].double().numpy()
    expected = 0
    for rows, v in ((low[0], 1 - dy), (high[0], dy)):
        for columns, u in ((low[1], 1 - dx), (high[1], dx)):
            expected = expected + raw[:, rows][:, :, columns] * v[:, None] * u
    np.testing.assert_allclose(resized(x)[0].numpy(), expected, rtol=0, atol=1e-4)
    if size == (299, 299):
        assert torch.equal(resized(x), x.float())


def test_its_names_and_shapes_are_torchvisions():
    with torch.device("meta"):
        theirs = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        mine = Inception().state_dict()
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in theirs.items()}


def test_what_it_says_of_itself(net, file):
    again = load_inception(file)
    assert net.digest == again.digest and len(net.digest) == 64
    assert (net.feature_dim, net.classes, net.resize) == (2048, 1008, "tf1-bilinear-299")
    for bad in (images(1, 1, 8, 8), images(3, 8, 8), images(1, 3, 8, 8).float()):
        with pytest.raises(ValueError, match="uint8"):
            net(bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: w | {"fc.weight": torch.zeros(1000, 2048)},
            r"fc\.weight has shape \[1000, 2048\], not \[1008, 2048\]",
        ),
        (lambda w: w | {"AuxLogits.conv0.conv.weight": torch.zeros(1)}, "AuxLogits.conv0.conv.weight is unknown"),
        (lambda w: {k: t for k, t in w.items() if k != "fc.bias"}, "fc.bias is missing"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, says):
    path = tmp_path / "other.safetensors"
    path.write_bytes(packed(change(random_weights())))
    with pytest.raises(DataError, match=says) as e:
        load_inception(path)
    assert str(path) in str(e.value) and "torchvision" in e.value.hint
