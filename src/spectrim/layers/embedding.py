"""Factorized `torch.nn.Embedding`."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.layers.exchanged import Share
from spectrim.layers.uses import Features
from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import Fold
from spectrim.plain.chain import PlainPair


class FactorizedEmbedding(OneWeight, nn.Embedding):
    """Rows of ``W = U diag(S) Vh``, ``(num_embeddings, embedding_dim)``; ``U`` holds one row for each entry."""

    dense_kinds = (nn.Embedding,)
    looks_up = True

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse what needs the dense table itself."""
        if module.max_norm is not None:
            return "max_norm rescales rows of the dense table in place"
        return "sparse gradients need the dense table" if module.sparse else None

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """A dense look-up multiplies nothing, a low-rank one ``rank * embedding_dim`` a token; without a shape: stored parameters."""
        count, width = module.num_embeddings, module.embedding_dim
        if shape is None:
            return float(count * width if rank is None else rank * (count + width))
        return 0.0 if rank is None else float(math.prod(shape) * rank * width)

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Columns can be kept: a look-up has no rows to mix."""
        return "embedding"

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """``rank * (embedding_dim - rank)`` a token; without a shape: stored parameters."""
        count, width = module.num_embeddings, module.embedding_dim
        return float(rank * (count + width - rank) if shape is None else math.prod(shape) * rank * (width - rank))

    def forward(self, input: Tensor) -> Tensor:
        """Map indices ``(...)`` to ``(..., embedding_dim)``."""
        if self.scale_grad_by_freq or self.composes("weight", input.shape):
            return F.embedding(input, self.dense_weight("weight"), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        left, right = self.factors_of("weight").pair()
        rows = F.embedding(input, left, self.padding_idx) @ right
        if self.padding_idx is None:
            return rows
        return torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)  # padding reaches no gradient, Vh's included

    def features_written(self, output: Any) -> Iterator[Features]:
        """The output's features are the weight's columns."""
        yield from self._features_at("columns", output)

    def why_untimed(self, name: str, eager: bool) -> str:
        """Parameters decide."""
        return "a look-up is never faster as a pair; by parameters"

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """An `Embedding` of ``rank`` columns and a `Linear`, which mixes all columns or those that are not kept."""
        if "weight" not in paying:
            return None
        if (written := self.interpolated(share)) is not None:
            return written
        factors = self.factors_of("weight")
        left, right = factors.balanced()
        rank = left.shape[1]
        table = nn.Embedding(
            self.num_embeddings, rank, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, device="meta"
        )
        table.weight = share(factors, "left", left)
        mix = nn.Linear(rank, self.embedding_dim, bias=False, device="meta")
        mix.weight = share(factors, "right transposed", right.T.contiguous())
        return PlainPair(table, mix)
