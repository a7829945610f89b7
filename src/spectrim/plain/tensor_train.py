"""A linear layer as a tensor train."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PlainTensorTrain(nn.Module):
    """A linear layer whose weight is a tensor train (a TT-matrix): a core ``(r, out_k, in_k, r')`` for each pair of axes.

    Inputs are folded to ``in_1 x in_2 x ...``, outputs to ``out_1 x out_2 x ...``. With ranks ``r_k`` it stores
    ``sum r_{k-1} out_k in_k r_k`` numbers. It starts with random cores whose product has the variance of `nn.Linear`'s weight.

    Args:
        in_sizes: their product is the number of input features.
        out_sizes: as many, for the output features.
        ranks: one between each two cores, >= 1.
        bias: whether there is one.

    Raises:
        ValueError: for sizes and ranks that do not fit together.

    Examples:
        >>> layer = PlainTensorTrain((28, 28), (10, 12), (8,))
        >>> layer(torch.randn(5, 784)).shape, sum(core.numel() for core in layer.cores)
        (torch.Size([5, 120]), 4928)

    Source: Novikov, Podoprikhin, Osokin and Vetrov, arXiv 1509.06569.
    """

    def __init__(self, in_sizes: Sequence[int], out_sizes: Sequence[int], ranks: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        sizes = (*in_sizes, *out_sizes, *ranks)
        if len(in_sizes) != len(out_sizes) or len(ranks) != len(in_sizes) - 1 or any(size < 1 for size in sizes):
            got = f"{tuple(in_sizes)}, {tuple(out_sizes)} and {tuple(ranks)}"
            raise ValueError(f"PlainTensorTrain: as many in_sizes as out_sizes, one rank fewer, all at least 1; got {got}")
        self.in_sizes, self.out_sizes = tuple(in_sizes), tuple(out_sizes)
        self.in_features, self.out_features = math.prod(in_sizes), math.prod(out_sizes)
        around = (1, *ranks, 1)
        shapes = zip(around[:-1], self.out_sizes, self.in_sizes, around[1:], strict=True)
        self.cores = nn.ParameterList(torch.empty(shape) for shape in shapes)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw cores whose product has the variance ``1 / (3 in)`` of a new `nn.Linear`, and its bias."""
        variance = 1 / (3 * self.in_features * math.prod(self.ranks))
        for core in self.cores:
            nn.init.normal_(core, std=variance ** (1 / (2 * len(self.cores))))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @property
    def ranks(self) -> tuple[int, ...]:
        """One between each two cores."""
        return tuple(core.shape[0] for core in list(self.cores)[1:])

    @property
    def weight(self) -> Tensor:
        """The dense weight ``(out, in)``, composed on each use."""
        return self._run(torch.eye(self.in_features, dtype=self.cores[0].dtype, device=self.cores[0].device)).mT

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``(..., in)`` core by core."""
        output = self._run(input.reshape(-1, self.in_features)).reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _run(self, rows: Tensor) -> Tensor:
        """Multiply rows ``(n, in)``, without bias: ``(n out_1 ... out_{k-1}, r in_k, rest)`` before core ``k``."""
        rest, held = self.in_features, rows
        for core in self.cores:
            before, out, in_, after = core.shape
            rest = rest // in_
            matrix = core.permute(0, 2, 1, 3).reshape(before * in_, out * after)
            product = held.reshape(-1, before * in_, rest).transpose(1, 2) @ matrix
            held = product.reshape(-1, rest, out, after).permute(0, 2, 3, 1)
        return held.reshape(-1, self.out_features)

    def extra_repr(self) -> str:
        """Sizes and ranks for the module's printout."""
        return f"{self.in_sizes} -> {self.out_sizes}, ranks={self.ranks}, bias={self.bias is not None}"
