"""Residual networks for 32 x 32 images: the CIFAR family, and the SVD-training paper's bottleneck form.

Source: He et al., CVPR 2016, section 4.2, arXiv 1512.03385; Yang et al., CVPR-W 2020, arXiv 2004.09031, section 4.1 (whose "56" and
"110" are bottleneck networks).
"""

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.zoo.weights import load_weights

__all__ = [
    "CifarResNet",
    "bottleneck56",
    "bottleneck110",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


Shortcut = Literal["A", "projection"]


Images = Float[Tensor, "batch channels height width"]


Logits = Float[Tensor, "batch classes"]


class SubsampleAndPad(nn.Module):
    """Shortcut option A: every second pixel, and zero channels on both sides; no parameters.

    Args:
        extra: channels to add, >= 0; half of them, rounded down, come first.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, images: Images) -> Float[Tensor, "batch wider half_height half_width"]:
        """Return the images at half the resolution with `extra` more channels."""
        return F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))

    def extra_repr(self) -> str:
        """Show the padding in the printed model."""
        return f"extra={self.extra}"


def scaled(owner: str, width: float, *channels: int) -> list[int]:
    """Return numbers of channels multiplied by `width`, rounded, at least 1; a SettingError unless it is positive and finite."""
    if not 0 < width < math.inf:
        raise SettingError(owner, "width", got=width, rule="a finite number > 0")
    return [max(1, round(width * count)) for count in channels]


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + downsample(x))``."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.downsample = SubsampleAndPad(width - inputs) if shortcut == "A" else _projection(inputs, width, stride)

    def forward(self, images: Images) -> Float[Tensor, "batch outputs out_height out_width"]:
        """Return the block's feature maps."""
        features = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(features)) + self.downsample(images))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, and a projection where the shape changes."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        if shortcut != "projection":
            raise SettingError("Bottleneck", "shortcut", got=shortcut, rule="'projection'")
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = _projection(inputs, outputs, stride)

    def forward(self, images: Images) -> Float[Tensor, "batch outputs out_height out_width"]:
        """Return the block's feature maps."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = F.relu(self.bn2(self.conv2(features)))
        return F.relu(self.bn3(self.conv3(features)) + self.downsample(images))


class CifarResNet(nn.Module):
    """Stem of 16 channels, three stages of widths 16, 32, 64 (the last two halve the resolution), global mean, one linear layer.

    Args:
        block: `BasicBlock` (depth 6n + 2) or `Bottleneck` (the paper's networks of the same n).
        blocks: n, blocks in each stage, >= 1.
        num_classes: width of the output, >= 1.
        shortcut: where the shape changes: ``"A"`` (no parameters) or ``"projection"`` (1x1 convolution without bias, BatchNorm).
        width: > 0; multiplies the 16, 32 and 64 channels, rounded, at least 1.

    Raises:
        SettingError: an argument outside these ranges.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: int, num_classes: int, shortcut: Shortcut, width: float = 1.0
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "projection"):
            raise SettingError("CifarResNet", "shortcut", got=shortcut, rule="'A' or 'projection'")
        for name, value in (("blocks", blocks), ("num_classes", num_classes)):
            if value < 1:
                raise SettingError("CifarResNet", name, got=value, rule="an integer >= 1")
        first, second, third = scaled("CifarResNet", width, 16, 32, 64)

        def stage(inputs: int, width: int, stride: int) -> nn.Sequential:
            outputs = width * block.expansion
            return nn.Sequential(*(block(outputs if i else inputs, width, 1 if i else stride, shortcut) for i in range(blocks)))

        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = stage(first, first, 1)
        self.layer2 = stage(first * block.expansion, second, 2)
        self.layer3 = stage(second * block.expansion, third, 2)
        self.linear = nn.Linear(third * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Logits:
        """Return the class logits of normalized RGB images (32 x 32 in the papers)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _resnet(
    depth: int, num_classes: int, shortcut: Shortcut, pretrained: Literal["akamaster"] | None, width: float | None = None
) -> CifarResNet:
    model = CifarResNet(BasicBlock, (depth - 2) // 6, num_classes, shortcut, 1.0 if width is None else width)
    if pretrained is None:
        return model
    if pretrained != "akamaster" or depth == 110:
        allowed = "None" if depth == 110 else "None or 'akamaster'"
        raise SettingError(f"resnet{depth}", "pretrained", got=pretrained, rule=allowed, hint="weights exist for depths 20, 32, 44, 56")
    if shortcut != "A" or num_classes != 10 or width is not None:
        got = {"shortcut": shortcut, "num_classes": num_classes, "width": width}
        raise SettingError(f"resnet{depth}", "pretrained", got=got, rule="used with shortcut='A' and num_classes=10 and no width")
    return load_weights(model, f"weights/cifar10_akamaster_resnet{depth}.safetensors")


def resnet20(
    num_classes: int = 10, shortcut: Shortcut = "A", pretrained: Literal["akamaster"] | None = None, width: float | None = None
) -> CifarResNet:
    """CIFAR ResNet-20: 40.55 M convolution MACs with shortcut A, 40.81 M with projections (the paper's).

    Args:
        num_classes: width of the output, >= 1.
        shortcut: ``"A"``: subsample and zero-pad; ``"projection"``: 1x1 convolution without bias, then BatchNorm.
        pretrained: ``"akamaster"`` reads the CIFAR-10 weights from the data folder (91.73 % on the test set; shortcut A, 10 classes;
            inputs from `cifar10` with ``normalize="imagenet"``). They were trained on all 50,000 training images.
        width: > 0; multiplies every number of channels, rounded, at least 1; None for the network itself.

    Returns:
        The network, in training mode.

    Raises:
        SettingError: an argument outside these values.
        FormatError: the weights are missing or are not this network's.

    Examples:
        >>> sum(p.numel() for n, p in resnet20(shortcut="projection").named_parameters() if p.ndim == 4)
        270256
    """
    return _resnet(20, num_classes, shortcut, pretrained, width)


def resnet32(num_classes: int = 10, shortcut: Shortcut = "A", pretrained: Literal["akamaster"] | None = None) -> CifarResNet:
    """CIFAR ResNet-32; arguments as `resnet20`, pretrained 92.63 %."""
    return _resnet(32, num_classes, shortcut, pretrained)


def resnet44(num_classes: int = 10, shortcut: Shortcut = "A", pretrained: Literal["akamaster"] | None = None) -> CifarResNet:
    """CIFAR ResNet-44; arguments as `resnet20`, pretrained 93.11 %."""
    return _resnet(44, num_classes, shortcut, pretrained)


def resnet56(
    num_classes: int = 10, shortcut: Shortcut = "A", pretrained: Literal["akamaster"] | None = None, width: float | None = None
) -> CifarResNet:
    """CIFAR ResNet-56; arguments as `resnet20`, pretrained 93.39 %."""
    return _resnet(56, num_classes, shortcut, pretrained, width)


def resnet110(num_classes: int = 10, shortcut: Shortcut = "A", pretrained: None = None) -> CifarResNet:
    """CIFAR ResNet-110; arguments as `resnet20`, without pretrained weights."""
    return _resnet(110, num_classes, shortcut, pretrained)


def bottleneck56(num_classes: int = 10) -> CifarResNet:
    """The paper's "ResNet-56": nine bottlenecks a stage (83 layers deep), 127.3 M convolution MACs."""
    return CifarResNet(Bottleneck, 9, num_classes, "projection")


def bottleneck110(num_classes: int = 10) -> CifarResNet:
    """The paper's "ResNet-110": eighteen bottlenecks a stage (164 layers deep), 247.6 M convolution MACs."""
    return CifarResNet(Bottleneck, 18, num_classes, "projection")
