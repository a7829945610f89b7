"""A small VGG with BatchNorm."""

from jaxtyping import Float
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.zoo.resnet import scaled

__all__ = ["VGG", "vgg_small"]


class VGG(nn.Module):
    """Stages of two 3x3 convolutions, each with BatchNorm and ReLU, a 2x2 max pooling after each stage, global mean, one linear layer.

    Source: Simonyan & Zisserman, arXiv 1409.1556. Deviation: BatchNorm, two convolutions a stage, one classifier layer.

    Args:
        widths: channels of each stage, all >= 1.
        num_classes: width of the output, >= 1.
        in_channels: channels of the images, >= 1.

    Raises:
        SettingError: a number below 1, or no stages.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        if not widths or min(*widths, num_classes, in_channels) < 1:
            got = {"widths": widths, "num_classes": num_classes, "in_channels": in_channels}
            raise SettingError("VGG", "widths, num_classes and in_channels", got=got, rule="integers >= 1, at least one width")
        layers: list[nn.Module] = []
        inputs = in_channels
        for width in widths:
            for channels in (inputs, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the class logits; each side must be at least ``2 ** stages`` pixels."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def vgg_small(num_classes: int = 10, in_channels: int = 3, width: float | None = None) -> VGG:
    """Six convolutions of 64, 64, 128, 128, 256, 256 channels: 1.15 M parameters, 153 M MACs at 32 x 32, sides of at least 8.

    Args:
        num_classes: width of the output, >= 1.
        in_channels: channels of the images, >= 1.
        width: multiplies every number of channels, > 0; 1 when omitted.
    """
    return VGG(tuple(scaled("vgg_small", 1.0 if width is None else width, 64, 128, 256)), num_classes, in_channels)
