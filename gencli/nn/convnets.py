"""Encoders and decoders of images: convolutions that halve or double an image's sides while it has more than 4 pixels.

References:
    Deep Residual Learning for Image Recognition, He, Zhang, Ren, Sun, 2015, arXiv 1512.03385 (the blocks; here without
    normalisation, whose statistics would couple the examples of a batch)
"""

from __future__ import annotations

from torch import Tensor, nn

from gencli.nn.mlp import Activation, activation

__all__ = ["ConvDecoder", "ConvEncoder", "sides"]


def sides(H: int, W: int) -> list[tuple[int, int]]:
    """The sizes of an image's maps, from the image to the smallest: halved, rounded up, while a side is above 4."""
    found = [(H, W)]
    while max(found[-1]) > 4 and len(found) < 6:
        h, w = found[-1]
        found.append((-(-h // 2), -(-w // 2)))
    return found


class Residual(nn.Module):
    """x + F(x), F = activation, 3x3 convolution, activation, 3x3 convolution; the last starts at 0."""

    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        self.F = nn.Sequential(
            activation(act),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(act),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.F[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.F(x)


class ConvEncoder(nn.Sequential):
    """Images (n, C, H, W) -> (n, outputs): 3x3 convolutions of stride 2, twice the channels after each but the last.

    ``blocks`` residual blocks follow each of them.
    """

    def __init__(self, shape: tuple[int, ...], channels: int, blocks: int = 0, act: Activation = "relu") -> None:
        C, H, W = shape
        maps = sides(H, W)
        layers: list[nn.Module] = [nn.Conv2d(C, channels, 3, padding=1), activation(act)]
        n_in = channels
        for _ in maps[1:]:
            n_out = min(2 * n_in, 4 * channels)
            layers += [nn.Conv2d(n_in, n_out, 3, 2, 1), *(Residual(n_out, act) for _ in range(blocks)), activation(act)]
            n_in = n_out
        super().__init__(*layers, nn.Flatten())
        self.outputs = n_in * maps[-1][0] * maps[-1][1]


class ConvDecoder(nn.Module):
    """Vectors (n, inputs) -> (n, out, H, W): the mirror of :class:`ConvEncoder`, with maps doubled by repetition."""

    def __init__(
        self, inputs: int, out: int, size: tuple[int, int], channels: int, blocks: int = 0, act: Activation = "relu"
    ) -> None:
        super().__init__()
        maps = sides(*size)[::-1]
        widths = [min(channels << k, 4 * channels) for k in range(len(maps))][::-1]
        self.first = nn.Linear(inputs, widths[0] * maps[0][0] * maps[0][1])
        self.small = (widths[0], *maps[0])
        layers: list[nn.Module] = [activation(act)]
        for side, n_in, n_out in zip(maps[1:], widths, widths[1:]):
            layers += [nn.Upsample(side), nn.Conv2d(n_in, n_out, 3, padding=1)]
            layers += [*(Residual(n_out, act) for _ in range(blocks)), activation(act)]
        self.rest = nn.Sequential(*layers, nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.rest(self.first(z).view(-1, *self.small))
