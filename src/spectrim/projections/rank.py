"""`RankAtMost`: the nearest matrix of low rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.projections.structured import as_matrix, check_size
from spectrim.protocols import Bits


@dataclass(frozen=True)
class RankAtMost:
    """Keep the largest singular values of a tensor as a matrix, its first axis by all others, exactly so many.

    Args:
        rank: >= 1; the tensor itself where it has no more.

    Raises:
        SettingError: for anything else.

    Examples:
        >>> RankAtMost(1)(torch.diag(torch.tensor([2.0, 3.0]))).round()
        tensor([[0., 0.],
                [0., 3.]])

    Source: Eckart and Young, Psychometrika 1, 1936.
    """

    rank: int

    def __post_init__(self) -> None:
        check_size("RankAtMost", "rank", self.rank)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor of that rank, computed in float64."""
        matrix = as_matrix(tensor)
        if self.rank >= min(matrix.shape):
            return tensor.clone()
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        product: Tensor = (U[:, : self.rank] * S[: self.rank]) @ Vh[: self.rank]
        return product.to(tensor.dtype).reshape(tensor.shape)

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: two factors in its dtype, or the matrix where that is smaller; no positions."""
        out, in_ = as_matrix(tensor).shape
        return Bits(min(self.rank * (out + in_), out * in_) * 8 * tensor.element_size(), 0)
