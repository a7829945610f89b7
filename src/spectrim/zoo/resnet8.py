"""MLPerf Tiny's ResNet-8.

Source: MLPerf Tiny, arXiv 2106.07597.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.zoo.resnet import Images, Logits, scaled
from spectrim.zoo.weights import load_weights


class _TinyStem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, images: Images) -> Float[Tensor, "batch outputs height width"]:
        return F.relu(self.bn(self.conv(images)))


class _TinyBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1 if stride == 1 else 0)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-3)
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, images: Images) -> Float[Tensor, "batch outputs out_height out_width"]:
        # TensorFlow's "same" padding at stride 2 on even sides is one pixel on the right and bottom only.
        padded = images if self.stride == 1 else F.pad(images, (0, 1, 0, 1))
        features = F.relu(self.bn1(self.conv1(padded)))
        return F.relu(self.bn2(self.conv2(features)) + self.shortcut(images))


class ResNet8(nn.Module):
    """MLPerf Tiny's ResNet-8: three residual blocks of widths 16, 32, 64; convolutions have biases; input is raw 0..255 RGB.

    Args:
        width: > 0; multiplies every number of channels, rounded, at least 1.

    Raises:
        SettingError: for another width.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, third = scaled("ResNet8", width, 16, 32, 64)
        self.stem = _TinyStem(first)
        self.block1 = _TinyBlock(first, first, 1)
        self.block2 = _TinyBlock(first, second, 2)
        self.block3 = _TinyBlock(second, third, 2)
        self.linear = nn.Linear(third, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Logits:
        """Return the class logits of RGB images with values 0..255 (sides divisible by 4; 32 in the benchmark)."""
        features = self.block3(self.block2(self.block1(self.stem(images))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def mlperftiny_resnet8(pretrained: bool = False, width: float | None = None) -> ResNet8:
    """MLPerf Tiny's image classification network: 12.5 M MACs.

    Args:
        pretrained: read the CIFAR-10 weights from the data folder (87.21 % on the test set); inputs from `cifar10` with
            ``normalize="raw"``.
        width: > 0; multiplies every number of channels, rounded, at least 1; None for the network itself.

    Raises:
        SettingError: another width, or any with pretrained weights.
        FormatError: the weights are missing or are not this network's.
    """
    if pretrained and width is not None:
        raise SettingError("mlperftiny_resnet8", "width", got=width, rule="None with pretrained=True")
    model = ResNet8(1.0 if width is None else width)
    return load_weights(model, "weights/cifar10_mlperftiny_resnet8.safetensors") if pretrained else model
