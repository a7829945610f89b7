"""Networks of the usual shapes, in plain torch, for timing: their weights are random."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.zoo import LSTMLanguageModel, mlperftiny_resnet8, resnet20, resnet56, vgg_small


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224 (He et al., arXiv 1512.03385, table 1)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width in (64, 128, 256, 512):
        layers += [Basic(inputs, width, 1 if width == 64 else 2), Basic(width, width, 1)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Block(nn.Module):
    """A transformer block, layer norms first, with a multilayer perceptron four times as wide (GPT-2, ViT)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A ViT-Small-like image transformer of six blocks (Dosovitskiy et al., arXiv 2010.11929), mean of the tokens at the end."""

    def __init__(self, width: int = 384, heads: int = 6, blocks: int = 6, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Case:
    """A network, its input at a batch size, and what is left dense beside its head."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    scheme: Any = "auto"
    rounds: int = 5


def images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


def language_model() -> nn.Module:
    return LSTMLanguageModel(2000, embedding=512, hidden=512, layers=2, dropout=0.0)


def tokens(batch: int) -> Tensor:
    return torch.randint(0, 2000, (batch, 35))


TRAINING = {
    "resnet20-channel": Case(resnet20, images(32), 128, "channel"),
    "resnet20-spatial": Case(resnet20, images(32), 128, "spatial"),
    "resnet20-spatial-bf16": Case(resnet20, images(32), 16, "spatial", rounds=3),  # few images: not every CPU has units for it
    "resnet56-spatial": Case(resnet56, images(32), 64, "spatial"),
    "resnet18-224-channel": Case(resnet18, images(224), 4, "channel"),
    "gpt2-small, 2 blocks": Case(
        lambda: nn.Sequential(*(Block(768, 12, causal=True) for _ in range(2))), lambda batch: torch.randn(batch, 1024, 768), 2, rounds=3
    ),
    "lstm 2 x 512": Case(language_model, tokens, 40),
}

INFERENCE = {
    "VGG, 64 to 256 channels": Case(vgg_small, images(32), 1),
    "ResNet-18, 224": Case(resnet18, images(224), 1),
    "ViT, 6 blocks of 384": Case(ViT, images(224), 1),
    "LSTM, 2 x 512": Case(language_model, tokens, 1),
    "ResNet-20": Case(resnet20, images(32), 1),
    "MLPerf-Tiny ResNet-8": Case(mlperftiny_resnet8, images(32), 1),
}
