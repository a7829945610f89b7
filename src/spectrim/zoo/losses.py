"""Losses for the zoo's language models."""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["language_model_loss"]


def language_model_loss(logits: Float[Tensor, "batch time vocab"], targets: Int64[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over all tokens, in nats per token; its exponential is the perplexity.

    Args:
        logits: scores of the next token.
        targets: ids in ``[0, vocab)``; positions that hold -100 do not count.

    Examples:
        >>> import torch
        >>> uniform, targets = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
        >>> print(f"{language_model_loss(uniform, targets).exp():.1f}")
        8.0
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
