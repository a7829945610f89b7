"""LeNet-5, as published and as Caffe has it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.zoo.resnet import scaled

__all__ = ["CaffeLeNet5", "LeNet5", "caffe_lenet5", "lenet5"]


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max pooling and three linear layers.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 1998, section II.B.
    Deviation: ReLU and max pooling, full connections between the convolutions, a linear output; 28 x 28 images are padded to 32 x 32 in
    the first layer, other sizes by the same 2 pixels.

    Args:
        num_classes: width of the output, >= 1.
        in_channels: channels of the images, >= 1.
        image_size: side of the square images in pixels, >= 12.
        width: > 0; multiplies the 6 and 16 channels and the 120 and 84 features, rounded, at least 1.

    Raises:
        SettingError: an argument outside these ranges.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 1), ("in_channels", in_channels, 1), ("image_size", image_size, 12)):
            if value < least:
                raise SettingError("LeNet5", name, got=value, rule=f"an integer >= {least}")
        first, second, third, fourth = scaled("LeNet5", width, 6, 16, 120, 84)
        side = (image_size // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * side * side, third)
        self.fc2 = nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, num_classes)

    def forward(self, images: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch classes"]:
        """Return the class logits."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2).flatten(1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))
        return logits


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: float | None = None) -> LeNet5:
    """LeNet-5 for square images; arguments as `LeNet5`, no `width` for the network itself.

    Examples:
        >>> sum(p.numel() for p in lenet5().parameters())
        61706
    """
    return LeNet5(num_classes, in_channels, image_size, 1.0 if width is None else width)


class CaffeLeNet5(nn.Module):
    """The LeNet-5 of Caffe, 430,500 weights and 580 biases, on which pruning papers report: 20 and 50 filters, 500 features, ten classes.

    Source: ``examples/mnist/lenet.prototxt`` of BVLC Caffe.
    Deviation: ReLU after the convolutions too, and torch's initialization.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, images: Float[Tensor, "batch 1 28 28"]) -> Float[Tensor, "batch 10"]:
        """Return the class logits."""
        features = F.relu(F.max_pool2d(self.conv1(images), 2))
        features = F.relu(F.max_pool2d(self.conv2(features), 2)).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(features)))
        return logits


def caffe_lenet5() -> CaffeLeNet5:
    """The LeNet-5 of Caffe for 28 x 28 images of one channel, see `CaffeLeNet5`.

    Examples:
        >>> sum(p.numel() for p in caffe_lenet5().parameters() if p.dim() > 1)
        430500
    """
    return CaffeLeNet5()
