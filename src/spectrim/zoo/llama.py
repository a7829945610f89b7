"""The Llama-style language model of stories260K.

Source: Touvron et al., arXiv 2302.13971, section 2.2; Su et al., "RoFormer", arXiv 2104.09864 (rotary embedding, interleaved pairs);
weights by Karpathy, llama2.c.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.zoo.weights import load_weights

__all__ = ["Stories260K", "stories260k"]

States = Float[Tensor, "batch time dim"]
Angles = Float[Tensor, "time pairs"]


def rotate(x: Float[Tensor, "batch time heads width"], cos: Angles, sin: Angles) -> Float[Tensor, "batch time heads width"]:
    """Turn each pair ``(x[2i], x[2i+1])`` by its position's angle (rotary position embedding)."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and fewer key-value heads than query heads."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        width = dim // heads
        self.wq = nn.Linear(dim, heads * width, bias=False)
        self.wk = nn.Linear(dim, kv_heads * width, bias=False)
        self.wv = nn.Linear(dim, kv_heads * width, bias=False)
        self.wo = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x: States, cos: Angles, sin: Angles) -> States:
        """Return the mixed states; position t sees positions up to t."""
        q = rotate(self.wq(x).unflatten(-1, (self.heads, -1)), cos, sin)
        k = rotate(self.wk(x).unflatten(-1, (self.kv_heads, -1)), cos, sin)
        v = self.wv(x).unflatten(-1, (self.kv_heads, -1))
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: States) -> States:
        """Return the new states, position by position."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on normalized states and added to them."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads, kv_heads)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x: States, cos: Angles, sin: Angles) -> States:
        """Return the new states."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Stories260K(nn.Module):
    """A decoder-only transformer with tied embeddings; the defaults are stories260K (260,032 parameters).

    Args:
        vocab: number of token ids, >= 1.
        dim: width of the states; divisible by ``2 * heads``.
        hidden: width of the feed-forward layers, >= 1.
        layers: number of blocks, >= 1.
        heads: query heads; divisible by `kv_heads`.
        kv_heads: key-value heads, >= 1.
        max_length: longest window in tokens, >= 1.

    Raises:
        SettingError: an argument outside these ranges.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocab: int = 512,
        dim: int = 64,
        hidden: int = 172,
        layers: int = 5,
        heads: int = 8,
        kv_heads: int = 4,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        sizes = {"vocab": vocab, "dim": dim, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
        for name, value in {**sizes, "max_length": max_length}.items():
            if value < 1:
                raise SettingError("Stories260K", name, got=value, rule="an integer >= 1")
        if heads % kv_heads:
            raise SettingError("Stories260K", "heads", got=heads, rule=f"divisible by kv_heads ({kv_heads})")
        if dim % (2 * heads):
            raise SettingError("Stories260K", "dim", got=dim, rule=f"divisible by 2 * heads ({2 * heads})")
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(TransformerBlock(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        self.output.weight = self.tok_embeddings.weight
        width = dim // heads
        frequencies = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(max_length, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of the next token at each position, from ids in ``[0, vocab)``.

        Raises:
            SettingError: a window longer than `max_length`.
        """
        time = tokens.shape[1]
        if time > self.cos.shape[0]:
            raise SettingError("Stories260K", "tokens", got=tuple(tokens.shape), rule=f"at most {self.cos.shape[0]} long")
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.output(self.norm(x))
        return logits


def stories260k(pretrained: bool = True) -> Stories260K:
    """The stories260K language model, by default with its weights from the data folder.

    Its loss on the first 60 stories of `story_tokens` is 1.2958 nats per token: each story alone, cut to its first 512 tokens,
    every token after the first predicted from those before it, one mean over all predicted tokens.

    Args:
        pretrained: read the weights from the data folder.

    Raises:
        FormatError: the weights are missing or are not this network's.
    """
    model = Stories260K()
    return load_weights(model, "stories260K/stories260K.safetensors") if pretrained else model
