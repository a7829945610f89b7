"""Factorized `torch.nn.Linear`, and the transposed ``Conv1D`` that transformers uses in GPT-2."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.forms.svd import Factors
from spectrim.layers.exchanged import Share
from spectrim.layers.forwards import bare
from spectrim.layers.uses import Features, first_argument
from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import Fold
from spectrim.plain.chain import PlainPair


def linear_pair(factors: Factors, bias: nn.Parameter | None, share: Share, *, conv1d: bool = False) -> PlainPair:
    """Return two `Linear` layers, in → rank → out, that share tied factors; they stand for a ``Conv1D`` where `conv1d` says so."""
    left, right = factors.balanced()
    out, in_ = factors.shape
    rank = right.shape[0]
    first, second = bare(nn.Linear, in_, rank, bias=False), bare(nn.Linear, rank, out, bias=bias is not None)
    first.weight, second.weight = share(factors, "right", right), share(factors, "left", left)
    if bias is not None:
        second.bias = bias
    return PlainPair(first, second, conv1d=conv1d)


def linear_of(factors: Factors, bias: nn.Parameter | None) -> "FactorizedLinear":
    """Return a factorized `Linear` that holds these very factors and this bias."""
    out, in_ = factors.shape
    layer = FactorizedLinear.adopt(nn.Linear(in_, out, bias=False, device="meta"), {"weight": factors}, "channel")
    layer.register_parameter("bias", bias)
    return layer


SAME_AS_LINEAR = ("FalconLinear",)
"""Sub-classes of `torch.nn.Linear` in transformers with another forward that computes the same."""


class FactorizedLinear(OneWeight, nn.Linear):
    """``y = x W^T + b`` with ``W = U diag(S) Vh`` of ``(out_features, in_features)``."""

    dense_kinds = (nn.Linear,)

    @classmethod
    def base_of(cls, own: type) -> type:
        """Return `nn.Linear`, or the class itself where its own forward computes the same; by name, so that no package is needed."""
        return own if own.__name__ in SAME_AS_LINEAR and own.__module__.split(".")[0] == "transformers" else super().base_of(own)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Recognize those of transformers, too."""
        return (cls.base_of(type(module)) is type(module) and isinstance(module, nn.Linear)) or super().accepts(module)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """``out * in``, or ``rank * (out + in)``, for each row of the input."""
        out, in_ = module.out_features, module.in_features
        rows = 1 if shape is None else math.prod(shape[:-1])
        return float(rows * (out * in_ if rank is None else rank * (out + in_)))

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Rows or columns can be kept."""
        return "linear"

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """``rank * (out + in - rank)`` for each row of the input."""
        return float((1 if shape is None else math.prod(shape[:-1])) * rank * (module.out_features + module.in_features - rank))

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """The input's features are the weight's columns."""
        if args or kwargs:
            yield from self._features_at("columns", first_argument(args, kwargs))

    def features_written(self, output: Any) -> Iterator[Features]:
        """The output's features are the weight's rows."""
        yield from self._features_at("rows", output)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        factors = self.factors_of("weight")
        if not factors.splits:
            return self.run_dense("weight", input.shape, lambda weight: factors.run(0, partial(F.linear, bias=self.bias), input, weight))
        if not factors.rounds and self.composes("weight", input.shape):
            return self.run_dense("weight", input.shape, lambda weight: F.linear(input, weight, self.bias))
        left, right = factors.pair()
        return factors.run(1, partial(F.linear, bias=self.bias), factors.run(0, F.linear, input, right), left)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Two `Linear` layers, in → rank → out, or two that hold rows or columns and mix the others."""
        if "weight" not in paying:
            return None
        return self.interpolated(share) or linear_pair(self.factors_of("weight"), self.bias, share)


class FactorizedConv1D(OneWeight):
    """The ``Conv1D`` of transformers: ``y = x W + b`` with ``W^T = U diag(S) Vh`` of ``(nf, nx)``."""

    bias: nn.Parameter

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Recognize the class by name, so that transformers need not be installed."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Transpose to ``(out, in)``."""
        return weight.T

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Transpose back to ``(in, out)``."""
        return matrix.T

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """``out * in``, or ``rank * (out + in)``, for each row of the input."""
        out, in_ = module.nf, module.nx
        rows = 1 if shape is None else math.prod(shape[:-1])
        return float(rows * (out * in_ if rank is None else rank * (out + in_)))

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Rows or columns can be kept."""
        return "linear"

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """``rank * (out + in - rank)`` for each row of the input."""
        return float((1 if shape is None else math.prod(shape[:-1])) * rank * (module.nf + module.nx - rank))

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """The input's features are the weight's columns."""
        if args or kwargs:
            yield from self._features_at("columns", first_argument(args, kwargs))

    def features_written(self, output: Any) -> Iterator[Features]:
        """The output's features are the weight's rows."""
        yield from self._features_at("rows", output)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., nx)`` to ``(..., nf)``."""
        factors = self.factors_of("weight")
        if not factors.splits:
            return self.run_dense("weight", x.shape, lambda weight: factors.run(0, partial(F.linear, bias=self.bias), x, weight.T))
        if not factors.rounds and self.composes("weight", x.shape):
            return self.run_dense("weight", x.shape, lambda weight: F.linear(x, weight.T, self.bias))
        left, right = factors.pair()
        return factors.run(1, partial(F.linear, bias=self.bias), factors.run(0, F.linear, x, right), left)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Two `Linear` layers, in → rank → out, or two that hold rows or columns and mix the others."""
        if "weight" not in paying:
            return None
        return self.interpolated(share) or linear_pair(self.factors_of("weight"), self.bias, share, conv1d=True)
