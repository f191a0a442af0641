"""Residual networks for small images, without their last linear layer.

References:
    Deep Residual Learning for Image Recognition, He, Zhang, Ren, Sun, 2015, arXiv 1512.03385
    Wide Residual Networks, Zagoruyko, Komodakis, 2016, arXiv 1605.07146
"""

from __future__ import annotations

from torch import Tensor, nn

from gencli.console import UsageError
from gencli.nn.dropout import Dropout
from gencli.nn.norm import BatchNorm

__all__ = ["BasicBlock", "ResNet", "WideBlock", "WideResNet", "he_normal"]


def conv3x3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    """(n, n_in, H, W) -> (n, n_out, H / stride, W / stride), rounded up; the normalisation around it has the bias."""
    return nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)


def he_normal(net: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (kernel's area * outputs)), as both papers' code does."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """ReLU(F(x) + W_s x), He et al., eq. 2 and figure 2; W_s is the identity where the shape stays.

    (n, n_in, H, W) -> (n, n_out, H / stride, W / stride).
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.F = nn.Sequential(
            conv3x3(n_in, n_out, stride), BatchNorm(n_out), nn.ReLU(), conv3x3(n_out, n_out), BatchNorm(n_out)
        )
        same = n_in == n_out and stride == 1
        project = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), BatchNorm(n_out))
        self.W_s = nn.Identity() if same else project

    def forward(self, x: Tensor) -> Tensor:
        return (self.F(x) + self.W_s(x)).relu()


class WideBlock(nn.Module):
    """x + F(x) with normalisation and ReLU before each convolution and dropout between them (WRN, figure 1 d).

    Where the shape changes, the shortcut is a 1x1 convolution of the normalised input. Shapes as in BasicBlock.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(BatchNorm(n_in), nn.ReLU())
        self.F = nn.Sequential(
            conv3x3(n_in, n_out, stride), BatchNorm(n_out), nn.ReLU(), Dropout(dropout), conv3x3(n_out, n_out)
        )
        same = n_in == n_out and stride == 1
        self.W_s = None if same else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.F(h) + (x if self.W_s is None else self.W_s(h))


class ResNet(nn.Sequential):
    """ResNet-``depth``, ``depth`` = 8 b + 2: four stages of b blocks, and a 3x3 convolution first as images are small.

    (n, inputs, H, W) -> (n, outputs), the mean over the last map; ``outputs`` = 8 ``channels``.
    """

    def __init__(self, inputs: int, depth: int = 18, channels: int = 64) -> None:
        blocks = _blocks("resnet", depth, 8, 2)
        layers: list[nn.Module] = [conv3x3(inputs, channels), BatchNorm(channels), nn.ReLU()]
        n_in = channels
        for stage in range(4):
            for block in range(blocks):
                n_out = channels << stage
                layers.append(BasicBlock(n_in, n_out, 2 if stage > 0 and block == 0 else 1))
                n_in = n_out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.outputs = n_in
        he_normal(self)


class WideResNet(nn.Sequential):
    """WRN-``depth``-``width`` (table 1): ``depth`` = 6 b + 4, three groups of b blocks.

    (n, inputs, H, W) -> (n, outputs), the mean over the last map; ``outputs`` = 4 ``width`` ``channels``. With
    ``dropout`` the model must call :func:`gencli.nn.dropout.name_layers`.
    """

    def __init__(self, inputs: int, depth: int = 28, width: int = 2, channels: int = 16, dropout: float = 0.0) -> None:
        blocks = _blocks("wrn", depth, 6, 4)
        layers: list[nn.Module] = [conv3x3(inputs, channels)]
        n_in = channels
        for group in range(3):
            for block in range(blocks):
                n_out = width * channels << group
                layers.append(WideBlock(n_in, n_out, 2 if group > 0 and block == 0 else 1, dropout))
                n_in = n_out
        super().__init__(*layers, BatchNorm(n_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.outputs = n_in
        he_normal(self)


def _blocks(name: str, depth: int, each: int, ends: int) -> int:
    """Blocks a stage of a network of ``depth`` layers; UsageError if they do not come out even."""
    blocks, rest = divmod(depth - ends, each)
    if rest or blocks < 1:
        near = each * max(1, round((depth - ends) / each)) + ends
        raise UsageError(f"a {name} has {each} b + {ends} layers, and depth is {depth} (the nearest is {near})")
    return blocks
