"""A network of another library, for the benchmarks that use it."""

from typing import Any

from torch import Tensor, nn


def vit(
    size: int = 32, patch: int = 4, channels: int = 3, hidden: int = 192, blocks: int = 4, heads: int = 3, width: float = 1.0
) -> nn.Module:
    """A small ViT of transformers with ten classes and random weights; `width` multiplies the hidden size, to a multiple of the heads."""
    from transformers import ViTConfig, ViTForImageClassification

    hidden = max(1, round(hidden * width / heads)) * heads
    widths = {"hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    return ViTForImageClassification(ViTConfig(**widths, image_size=size, patch_size=patch, num_channels=channels, num_labels=10))


def logits_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of the ``logits`` in what the network puts out."""
    return nn.functional.cross_entropy(output.logits, target)
