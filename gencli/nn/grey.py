"""Convolutions between an image of one channel and a map of many, as matrix products of patches, on the CPU.

A library's kernels pad channels to the width of its vectors, 16 for 1. With the image's patches as the columns of a
matrix nothing is padded: G's last layer and the slope of D's first are two to five times as fast, and equal to
rounding. Differentiable to any order, as a gradient penalty asks. Where it is not faster (several channels, an image
without a gradient, other devices) these are torch's own layers, whose names and shapes of weights they have.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Conv2d", "ConvTranspose2d"]


class Conv2d(nn.Conv2d):
    """(n, n_in, H, W) -> (n, n_out, H', W'), of square kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.by(self.weight, x)

    def by(self, W: Tensor, x: Tensor) -> Tensor:
        """The same with ``W`` (n_out, n_in, k, k) for the weight."""
        (k, _), (stride, _) = self.kernel_size, self.stride
        if self.in_channels > 1 or stride == 1 or not x.requires_grad or x.device.type != "cpu":
            return self._conv_forward(x, W, self.bias)
        padding = int(self.padding[0])
        H, width = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
        patches = F.unfold(x, k, padding=padding, stride=stride)  # (n, k k, H' W')
        y = F.linear(patches.transpose(1, 2), W.flatten(1), self.bias)  # (n, H' W', n_out): channels last
        return y.unflatten(1, (H, width)).permute(0, 3, 1, 2)


class ConvTranspose2d(nn.ConvTranspose2d):
    """(n, n_in, H, W) -> (n, n_out, H', W'), of square kernels."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.out_channels > 1 or output_size is not None or x.device.type != "cpu":
            return super().forward(x, output_size)
        (k, _), (stride, _), padding = self.kernel_size, self.stride, int(self.padding[0])
        H, width = ((side - 1) * stride - 2 * padding + k for side in x.shape[2:])
        patches = x.permute(0, 2, 3, 1).flatten(1, 2) @ self.weight.flatten(1)  # (n, H W, k k)
        y = F.fold(patches.transpose(1, 2), (H, width), k, padding=padding, stride=stride)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)
