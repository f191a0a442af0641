"""Supervised classification: the baseline of every other way to learn features, and the extractor of Fréchet distances.

    L = - sum_k q_k log p_k,   p = softmax(W ReLU(f(x)) + b),   q_k = (1 - epsilon) [k = label] + epsilon / K

``f`` is a small convolutional network, a ResNet or a Wide ResNet, whose output is what :meth:`Classifier.features`
returns, and epsilon the label smoothing.

References:
    Deep Residual Learning for Image Recognition, He, Zhang, Ren, Sun, 2015, arXiv 1512.03385 (``network="resnet"``)
    Wide Residual Networks, Zagoruyko, Komodakis, 2016, arXiv 1605.07146 (``network="wrn"``)
    Rethinking the Inception Architecture for Computer Vision, Szegedy et al., 2015, arXiv 1512.00567 (label smoothing,
    section 7)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gencli.console import UsageError
from gencli.contract import Config, DataSpec, Model, Step, Stream
from gencli.nn.dropout import Dropout, name_layers
from gencli.nn.norm import BatchNorm
from gencli.nn.resnet import ResNet, WideResNet, he_normal
from gencli.rng import Rng

__all__ = ["Classifier", "ClassifierConfig", "moved", "warped"]


class ClassifierConfig(Config):
    """The hyper-parameters of a classifier."""

    network: Literal["cnn", "resnet", "wrn"] = Field("cnn", description="a small CNN, a ResNet or a Wide ResNet")
    channels: int | None = Field(None, ge=1, description="features of the first layer; null = 32 (cnn), 64, 16 (wrn)")
    depth: int | None = Field(None, ge=1, description="layers: 8 b + 2 (resnet; null = 18), 6 b + 4 (wrn; null = 28)")
    width: int = Field(2, ge=1, description="k, how many times wider than a ResNet a Wide ResNet is")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of the features before the last layer; in a wrn inside its blocks"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="epsilon, the share of the label given to all classes")
    shift: int = Field(0, ge=0, description="training images are moved by up to as many pixels each way")
    flip: bool = Field(False, description="half of the training images are mirrored left to right")
    warp: float = Field(0.0, ge=0, lt=1, description="how far from the identity the affine maps of training images are")


class CNN(nn.Sequential):
    """Pairs of 3x3 convolutions, each followed by 2x2 max-pooling, while at least 4 pixels remain, and a linear layer.

    (n, C, H, W) -> (n, outputs), normalised and of both signs: a Fréchet distance takes features for Gaussian, and
    what a ReLU leaves of these told digits from a Gaussian's images half as well. ``outputs`` = 2 ``channels``.
    """

    def __init__(self, C: int, H: int, W: int, channels: int) -> None:
        layers: list[nn.Module] = []
        n_out = channels
        while min(H, W) >= 4:
            for n_in in (C, n_out):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), BatchNorm(n_out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            C, H, W, n_out = n_out, H // 2, W // 2, 2 * channels
        super().__init__(*layers, nn.Flatten(), nn.Linear(C * H * W, 2 * channels, bias=False), BatchNorm(2 * channels))
        self.outputs = 2 * channels
        he_normal(self)


def moved(x: Tensor, rng: Rng, shift: int, flip: bool) -> Tensor:
    """Images (n, C, H, W), each moved by up to ``shift`` pixels each way (its edge repeated) and mirrored or not."""
    n, _, H, W = x.shape

    def along(offset: Tensor, size: int) -> Tensor:
        return (torch.arange(size, device=x.device) + offset[:, None]).clamp(0, size - 1)

    i, j = (along(o, size) for o, size in zip(rng.integers("shift", 2 * shift + 1, (n, 2)).sub(shift).T, (H, W)))
    if flip:
        j = torch.where(rng.uniform("flip", (n, 1)) < 0.5, j.flip(1), j)
    return x[torch.arange(n, device=x.device)[:, None, None], :, i[:, :, None], j[:, None]].movedim(3, 1)


def warped(x: Tensor, rng: Rng, warp: float) -> Tensor:
    """Scaled images (n, C, H, W), each seen through an affine map of its own: what is between pixels is interpolated.

    In coordinates where an image is [-1, 1]^2 the map's six numbers are the identity's plus up to ``warp`` each way.
    """
    identity = torch.eye(2, 3, device=x.device)
    theta = identity + warp * (2 * rng.uniform("warp", (len(x), 2, 3)) - 1)
    with torch.autocast(x.device.type, enabled=False):  # places need all their digits
        places = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, places, padding_mode="border", align_corners=False)


class Classifier(Model):
    """Cross-entropy of a network's class probabilities."""

    Config = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if spec.kind != "image" or not spec.classes:
            raise UsageError(f"classifier needs images with classes, and {spec.name} has none")
        c, (C, H, W) = config, spec.shape
        self.f: CNN | ResNet | WideResNet
        match c.network:
            case "cnn":
                self.f = CNN(C, H, W, c.channels or 32)
            case "resnet":
                self.f = ResNet(C, c.depth or 18, c.channels or 64)
            case "wrn":
                self.f = WideResNet(C, c.depth or 28, c.width, c.channels or 16, c.dropout)
        self.feature_dim: int = self.f.outputs
        dropout = Dropout(0.0 if c.network == "wrn" else c.dropout)
        self.head = nn.Sequential(nn.ReLU(), dropout, nn.Linear(self.feature_dim, len(spec.classes)))
        name_layers(self)

    @classmethod
    def streams(cls, config: ClassifierConfig) -> dict[str, Stream]:
        return {"x": Stream(("x", "label"))}

    def features(self, x: Tensor) -> Tensor:
        """f(x) of raw images (n, C, H, W): (n, feature_dim), in float32 or better."""
        return self._features(self.spec.scale(x))

    def classify(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of raw images (n, C, H, W)."""
        return self._logits(self.spec.scale(x))

    def _features(self, x: Tensor) -> Tensor:
        return self.f(x).to(torch.get_default_dtype())

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self._features(x)).to(torch.get_default_dtype())

    def loss(self, b: Any, s: Step) -> dict[str, Any]:
        """Nats an example, and the share of examples whose label is the most probable class."""
        c, x, label = self.config, b.x, b.label.long()
        if c.shift or c.flip:
            x = moved(x, s.rng, c.shift, c.flip)
        x = self.spec.scale(x)
        if c.warp:
            x = warped(x, s.rng, c.warp)
        logits = self._logits(x)
        accuracy = (logits.detach().argmax(1) == label).to(logits).mean()
        return {"loss": F.cross_entropy(logits, label, label_smoothing=c.label_smoothing), "accuracy": accuracy}
