"""Patterns of active ReLUs: which examples lie on the positive side of a hyperplane through the origin."""

import itertools
import math

import torch
from torch import Tensor

from spectrim.errors import SettingError

FEW = 5000
"""Patterns that are enumerated at most."""


def rows_of_full_rank(X: Tensor) -> Tensor:
    """Return the examples ``(n, rank)`` in a basis of the space that they span."""
    U, S, _ = torch.linalg.svd(X.double(), full_matrices=False)
    kept = S.gt(1e-10 * S[0])
    rows: Tensor = U[:, kept] * S[kept]
    return rows


def most_arrangements(X: Tensor) -> int:
    """Return the number of patterns of examples in general position: ``2 sum_{k < r} C(n - 1, k)`` for ``n`` examples of rank ``r``.

    Examples:
        >>> most_arrangements(torch.eye(3))
        8
    """
    rank = int(torch.linalg.matrix_rank(X.double()))
    return 2 * sum(math.comb(len(X) - 1, k) for k in range(rank))


def arrangements(X: Tensor) -> Tensor:
    """Return all patterns ``(X u > 0)`` for directions ``u`` in general position, ``(patterns, n)`` of zeros and ones in float64.

    Every pattern's cone has a ray on which ``r - 1`` examples are on the boundary; on which side of it those are can be chosen freely.

    Args:
        X: ``(n, in)`` of rank r; no r examples may be linearly dependent.

    Raises:
        SettingError: for more than `FEW` patterns, or examples that are not in general position.

    Examples:
        >>> arrangements(torch.eye(2)).sort(0).values.tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """
    A = rows_of_full_rank(X)
    n, rank = A.shape
    if most_arrangements(X) > FEW:
        raise SettingError("arrangements", "inputs", got=tuple(X.shape), rule=f"few examples: at most {FEW} patterns", hint="use 'relaxed'")
    if rank == 1:
        return torch.stack([(A[:, 0] > 0).double(), (A[:, 0] < 0).double()])
    found = set()
    signs = list(itertools.product((0, 1), repeat=rank - 1))
    for chosen in itertools.combinations(range(n), rank - 1):
        ray = torch.linalg.svd(A[list(chosen)], full_matrices=True)[2][-1]
        heights = A @ ray
        boundary = heights.abs() <= 1e-9 * A.norm(dim=1)
        if int(boundary.sum()) != rank - 1:
            raise SettingError(
                "arrangements", "inputs", got=tuple(X.shape), rule="in general position", hint="use 'relaxed', or remove copies"
            )
        for direction in (1, -1):
            pattern = (direction * heights > 0).int().tolist()
            for choice in signs:
                for place, value in zip(chosen, choice, strict=True):
                    pattern[place] = value
                found.add(tuple(pattern))
    return torch.tensor(sorted(found), dtype=torch.float64)
