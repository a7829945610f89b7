"""LeNet-5."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.errors import SettingError

__all__ = ["LeNet5", "lenet5"]


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max pooling and three linear layers.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 1998, section II.B.
    Deviation: ReLU and max pooling, full connections between the convolutions, a linear output; 28 x 28 images are padded to 32 x 32 in
    the first layer, other sizes by the same 2 pixels.

    Args:
        num_classes: width of the output, >= 1.
        in_channels: channels of the images, >= 1.
        image_size: side of the square images in pixels, >= 12.

    Raises:
        SettingError: an argument outside these ranges.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 1), ("in_channels", in_channels, 1), ("image_size", image_size, 12)):
            if value < least:
                raise SettingError("LeNet5", name, got=value, rule=f"an integer >= {least}")
        side = (image_size // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch classes"]:
        """Return the class logits."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2).flatten(1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))
        return logits


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> LeNet5:
    """LeNet-5 for square images.

    Examples:
        >>> sum(p.numel() for p in lenet5().parameters())
        61706
    """
    return LeNet5(num_classes, in_channels, image_size)
