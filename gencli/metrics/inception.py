"""The network of the Inception Score and the Fréchet Inception Distance.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for Computer Vision, 2015,
arXiv 1512.00567. The metrics mean one file of weights, TensorFlow's graph of 2015-12-05, which departs from the paper:
1,008 outputs; the average pools of its blocks count no padding; the last block pools by the maximum; and Inception
Scores take its logits without their bias (Salimans et al. 2016, arXiv 1606.03498). Names of modules are those of the
files that hold these weights for PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.archives import shown
from gencli.console import DataError
from gencli.metrics.weights import cached, inception_weights

__all__ = ["SIDE", "Inception", "load_inception", "resized"]

SIDE = 299  # pixels that the network sees across and down
AT_ONCE = 16  # images on a CPU: more of them take memory (24 MB each) and no less time


def resized(x: Tensor) -> Tensor:
    """uint8 ``(n, C, H, W)`` to float32 ``(n, C, 299, 299)`` by the rule of TensorFlow 1, to the bit.

    Bilinear; output i lies at input i * H / 299 (no half pixels) and mixes two pixels however large the image is.
    """
    (top, bottom, dy), (left, right, dx) = (_taps(size, x.device) for size in x.shape[2:])

    def across(rows: Tensor) -> Tensor:  # (n, C, h, W) -> (n, C, h, 299)
        a = rows.index_select(3, left).float()
        return rows.index_select(3, right).float().sub_(a).mul_(dx).add_(a)

    if x.shape[2] < SIDE:  # each row serves several of the output
        rows = across(x)
        a, b = rows.index_select(2, top), rows.index_select(2, bottom)
    else:
        a, b = across(x.index_select(2, top)), across(x.index_select(2, bottom))
    return b.sub_(a).mul_(dy[:, None]).add_(a)


def _taps(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per output pixel the two input pixels between which it lies, and how far it is from the first."""
    at = torch.arange(SIDE, dtype=torch.float32, device=device) * torch.tensor(size / SIDE, dtype=torch.float32)
    low = at.long()
    return low, (low + 1).clamp_max(size - 1), at - low


class Conv(nn.Module):
    """Convolution, batch norm by running statistics, ReLU. ``same``: padded to the size of its input."""

    def __init__(self, n_in: int, n_out: int, *kernel: int, stride: int = 1, same: bool = True) -> None:
        super().__init__()
        h, w = kernel if len(kernel) == 2 else kernel * 2
        self.conv = nn.Conv2d(n_in, n_out, (h, w), stride, (h // 2, w // 2) if same else 0, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x: Tensor, average: bool = False) -> Tensor:
        """``average``: over 3 x 3 pixels; it stands before the convolution, but costs less behind this linear map."""
        y = self.conv(x)
        if average:
            y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
        return F.relu(self.bn(y), inplace=True)

    def fold(self) -> None:
        """Make batch norm part of the convolution, in float64."""
        bn, weight = self.bn, self.conv.weight
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        folded = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        bias = (bn.bias.double() - bn.running_mean.double() * scale).to(weight.dtype)
        self.conv.weight, self.conv.bias = (nn.Parameter(p, requires_grad=False) for p in (folded, bias))
        self.bn = nn.Identity()


class BlockA(nn.Module):
    """35 x 35 pixels."""

    def __init__(self, n_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n_in, 64, 1)
        self.branch5x5_1 = Conv(n_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(n_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(n_in, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(x, average=True)], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17 pixels."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(n_in, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = Conv(n_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), b, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17 pixels, 7 x 7 kernels in two passes."""

    def __init__(self, n_in: int, c: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n_in, 192, 1)
        self.branch7x7_1 = Conv(n_in, c, 1)
        self.branch7x7_2 = Conv(c, c, 1, 7)
        self.branch7x7_3 = Conv(c, 192, 7, 1)
        self.branch7x7dbl_1 = Conv(n_in, c, 1)
        self.branch7x7dbl_2 = Conv(c, c, 7, 1)
        self.branch7x7dbl_3 = Conv(c, c, 1, 7)
        self.branch7x7dbl_4 = Conv(c, c, 7, 1)
        self.branch7x7dbl_5 = Conv(c, 192, 1, 7)
        self.branch_pool = Conv(n_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(x, average=True)], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8 pixels."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(n_in, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = Conv(n_in, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, 1, 7)
        self.branch7x7x3_3 = Conv(192, 192, 7, 1)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8 x 8 pixels. ``last``: pooled by the maximum."""

    def __init__(self, n_in: int, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.branch1x1 = Conv(n_in, 320, 1)
        self.branch3x3_1 = Conv(n_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, 1, 3)
        self.branch3x3_2b = Conv(384, 384, 3, 1)
        self.branch3x3dbl_1 = Conv(n_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, 1, 3)
        self.branch3x3dbl_3b = Conv(384, 384, 3, 1)
        self.branch_pool = Conv(n_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = self.branch3x3_1(x)
        c = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        d = self.branch_pool(F.max_pool2d(x, 3, 1, 1)) if self.last else self.branch_pool(x, average=True)
        split = [self.branch3x3_2a(b), self.branch3x3_2b(b), self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        return torch.cat([self.branch1x1(x), *split, d], 1)


class Inception(nn.Module):
    """Images to features and logits. ``digest`` is the SHA-256 of its weights (see ``weights.py``)."""

    resize = f"tf1-bilinear-{SIDE}"
    feature_dim = 2048
    classes = 1008
    digest = ""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280), BlockE(2048, last=True)
        self.fc = nn.Linear(self.feature_dim, self.classes)
        self.requires_grad_(False).eval()

    def fold(self) -> Inception:
        """Itself, made fast: batch norms folded, weights laid out as the convolutions read them."""
        for conv in [module for module in self.modules() if isinstance(module, Conv)]:
            conv.fold()
        return self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 ``(n, 3, H, W)`` to features ``(n, 2048)`` and logits without bias ``(n, 1008)``, both float32."""
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Inception sees uint8 (n, 3, H, W), not {x.dtype} {list(x.shape)}")
        with _plain_float32(x.device):
            parts = x.split(AT_ONCE) if x.device.type == "cpu" else [x]
            features = torch.cat([self._features(part) for part in parts])
            return features, features @ self.fc.weight.T

    def _features(self, x: Tensor) -> Tensor:
        """uint8 ``(n, 3, H, W)`` to ``(n, 2048)``."""
        h = resized(x).sub_(128).div_(128).contiguous(memory_format=torch.channels_last)  # (n, 3, 299, 299)
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))  # (n, 64, 147, 147)
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(h, 3, 2)))  # (n, 192, 71, 71)
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(h, 3, 2))))  # (n, 288, 35, 35)
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))  # (n, 768, 17, 17)
        h = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(h)))  # (n, 1280, 8, 8)
        return self.Mixed_7c(self.Mixed_7b(h)).mean((2, 3))


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Neither TF32 nor half precision, whatever the training around it uses: they change a distance's digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.autocast(device.type, enabled=False), flags:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_inception(weights: Path | None = None) -> Inception:
    """The network on the CPU with the weights of a file, else with those of 2015 (downloaded once).

    DataError where there are none to be had, or they are another network's.
    """
    with torch.device("meta"):
        net = Inception()
    state, digest = inception_weights(weights)
    wanted = {name: t.shape for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name in sorted(wanted.keys() | state):
        here, there = wanted.get(name), state[name].shape if name in state else None
        if here != there:
            fault = (
                f"has shape {list(there)}, not {list(here)}"
                if here and there
                else "is missing"
                if here
                else "is unknown"
            )
            raise DataError(
                f"{weights or cached()}: not the Inception network of 2015: {shown(name)} {fault}",
                hint="torchvision's own Inception weights are another network",
            )
    net.load_state_dict(state, assign=True)
    net.requires_grad_(False)
    net.digest = digest
    return net.fold()
