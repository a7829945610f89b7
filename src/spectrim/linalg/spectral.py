"""Singular value decompositions of matrices and of factor products, with and without metrics."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.gram import ProjectedMetric

OVERSAMPLE = 16
"""Columns that `randomized_svd` draws beyond the rank."""


LEFT_FLOOR = 1e-10
"""Smallest eigenvalue, relative to the largest, of a metric of the outputs in `weighted_svd`: its inverse root is taken."""


RIGHT_FLOOR = 1e-14
"""The same of the inputs, whose inverse is not."""


def svd(matrix: Float[Tensor, "*blocks out in_"]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition in double precision, values descending.

    Returns:
        ``U (..., out, full)``, ``S (..., full)``, ``Vh (..., full, in)`` in float64, ``full = min(out, in)``.
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, S, Vh


def spectrum(matrix: Float[Tensor, "*blocks out in_"]) -> Float[Tensor, "*blocks full"]:
    """Singular values, ascending, in float64, from the eigenvalues of the smaller Gram matrix: several times faster than `svd`.

    Values below ``1e-8`` of the largest are lost in rounding: for energies only.
    """
    A = matrix.double()
    gram = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp(min=0).sqrt()


def randomized_svd(matrix: Float[Tensor, "*blocks out in_"], rank: int, *, passes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration on a random sketch of ``rank + 16`` columns; ``O(out in rank)``, in float32 at least.

    The sketch is drawn from a separate generator: the same for every call, on every device. Without passes the expected squared Frobenius
    error is at most ``2 + rank / 15`` times the optimal one; with four the error is within 1 % of it (measured to rank 128 on matrices of
    512 to 3072 rows and columns, Gaussian ones, whose flat spectrum is the hardest, and products of three).

    Args:
        matrix: what is decomposed.
        rank: number of triplets, in ``[1, min(out, in)]``.
        passes: power iterations, each two products with the matrix, >= 0.
        seed: of the sketch.

    Returns:
        ``U (..., out, rank)``, ``S (..., rank)`` descending, ``Vh (..., rank, in)``.

    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1, theorem 10.5.
    """
    A = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    columns = min(rank + OVERSAMPLE, *A.shape[-2:])
    draw = torch.randn(A.shape[-1], columns, generator=torch.Generator().manual_seed(seed), dtype=A.dtype).to(A.device)
    Q = torch.linalg.qr(A @ draw).Q
    for _ in range(passes):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    return Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def svd_of_product(
    U: Float[Tensor, "*blocks out rank"], S: Float[Tensor, "*blocks rank"], Vh: Float[Tensor, "*blocks rank in_"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact singular value decomposition of ``U diag(S) Vh``, without forming the product.

    QR of both factors, then the SVD of the small core: ``O((out + in) rank^2 + rank^3)``.

    Args:
        U: left factor; its columns need not be orthonormal.
        S: of any sign.
        Vh: right factor; its rows need not be orthonormal.

    Returns:
        ``U (..., out, r)``, ``S (..., r)`` descending, ``Vh (..., r, in)`` in float64 with orthonormal columns and rows,
        ``r = min(out, rank, in)``.
    """
    left, left_core = torch.linalg.qr(U.double())
    right, right_core = torch.linalg.qr(Vh.double().mT)
    core_U, core_S, core_Vh = torch.linalg.svd((left_core * S.double().unsqueeze(-2)) @ right_core.mT, full_matrices=False)
    return left @ core_U, core_S, core_Vh @ right.mT


OUTSIDE = 1e-3
"""Largest share of a direction outside those that a projected metric has seen."""


def _seen(vectors: Tensor, metric: Tensor | ProjectedMetric) -> Tensor:
    """Return ``V^T M V`` for columns ``V``."""
    if isinstance(metric, ProjectedMetric):
        if (outside := metric.misses(vectors)) > OUTSIDE:
            hint = "calibrate the model as it is: the moments were projected on the singular vectors that it had"
            raise SettingError(
                "weighted_svd", "metric", got=f"directions of which {outside:.2g} was not seen", rule="of these factors", hint=hint
            )
        return metric.of(vectors)
    metric = metric.to(vectors)
    return vectors.mT @ (metric.unsqueeze(-1) * vectors if metric.dim() == 1 else metric @ vectors)


SURE = 100.0
"""Pivots of a triangular factor that are so many times the floor leave no eigenvalue near it: then the factor is the root."""


WIDE = 256
"""Wider cores are decomposed by the eigenvectors of their Gram matrix, in a third of the time: values lose what is below 1e-8."""


LEAST_SHIFT = 1e-12
"""Share of its norm that is added to the diagonal of a nearly singular matrix at least, so that it has a triangular factor."""


def _triangular_root(gram: Tensor, floor: float) -> tuple[Tensor, Tensor] | None:
    """Return ``R`` with ``R^T R = gram``, triangular, and its inverse; None for a small matrix, or where rounding leaves no such factor.

    A nearly singular matrix, of which few directions are seen, gets the floor, or `LEAST_SHIFT`, of its norm on its diagonal, which takes
    less time than eigenvectors.
    """
    if gram.shape[-1] <= WIDE:
        return None
    triangle, failed = torch.linalg.cholesky_ex(gram)
    pivots = triangle.diagonal(dim1=-2, dim2=-1).square()
    if bool(failed.any()) or bool((pivots.amin(-1) < SURE * floor * pivots.amax(-1)).any()):
        shift = max(floor, LEAST_SHIFT) * torch.linalg.matrix_norm(gram)
        triangle, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift.unsqueeze(-1).expand(gram.shape[:-1])))
        if bool(failed.any()):
            return None
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return triangle.mT, torch.linalg.solve_triangular(triangle, eye, upper=False).mT


def metric_root(vectors: Tensor, metric: Tensor | ProjectedMetric | None, floor: float) -> tuple[Tensor, Tensor]:
    """Return ``R`` with ``R^T R = V^T M V`` for orthonormal columns ``V``, and its inverse; no eigenvalue is below `floor` of the largest.

    Wide matrices that are nearly singular are shifted instead, see `_triangular_root`. For a metric of zeros the identity is used.
    """
    if metric is None:
        eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device).expand(*vectors.shape[:-2], -1, -1)
        return eye, eye
    gram = _seen(vectors, metric)
    gram = (gram + gram.mT) / 2
    if (triangular := _triangular_root(gram, floor)) is not None:
        return triangular
    values, basis = torch.linalg.eigh(gram)
    largest = values[..., -1:]
    roots = torch.where(largest > 0, values.clamp(min=floor * largest), 1.0).sqrt()
    return roots.unsqueeze(-1) * basis.mT, basis / roots.unsqueeze(-2)


def weighted_svd(
    U: Float[Tensor, "*blocks out rank"],
    S: Float[Tensor, "*blocks rank"],
    Vh: Float[Tensor, "*blocks rank in_"],
    left: Tensor | None = None,
    right: Tensor | ProjectedMetric | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``M = U diag(S) Vh`` for approximation in the norm ``||L^1/2 (M - M_r) R^1/2||_F`` instead of the Frobenius norm.

    The first ``r`` columns of ``X`` times the first ``r`` rows of ``Y`` are the best ``M_r`` of rank ``r``, and its squared error is the
    sum of the squared values behind the ``r``-th. With ``A^T A = U^T L U``, ``B^T B = Vh R Vh^T`` and the SVD ``W diag(values) Z`` of
    ``A diag(S) B^T``: ``X = U A^-1 W`` and ``Y = W^T A diag(S) Vh``. So `right` is never inverted. Matrices of the held rank are all that
    is decomposed, by `eigh`, which a rank-deficient metric does not disturb: directions of the input without weight count as if they had
    1e-14 of the largest one (in wide nearly singular metrics 1e-12 of the norm), which decides between cuts that are equal otherwise;
    directions of the output, which are inverted, 1e-10.

    Args:
        U: orthonormal columns.
        S: of any sign.
        Vh: orthonormal rows.
        left: symmetric, positive semidefinite ``(..., out, out)``, or its diagonal ``(out,)``; the identity when omitted.
        right: the same of ``(..., in, in)`` or ``(in,)``, or projected on directions that contain the rows of ``Vh``.

    Returns:
        ``X (..., out, rank)``, ``values (..., rank)`` descending, ``Y (..., rank, in)`` in float64, ``M = X Y``. Columns of ``X`` and rows
        of ``Y`` are not orthonormal; give ``svd_of_product(X[..., :r], ones, Y[..., :r, :])`` for that.

    Examples:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> X, values, Y = weighted_svd(eye, torch.tensor([2.0, 1.0]), eye, right=torch.tensor([1.0, 9.0]))  # the second input is larger
        >>> values.tolist(), (X[:, :1] @ Y[:1]).round(decimals=12).abs().tolist()
        ([3.0, 2.0], [[0.0, 0.0], [0.0, 1.0]])

    Source: Srebro and Jaakkola, ICML 2003, section 2 (separable weights); Wang et al., arXiv 2403.07378 (whitened truncation, by Cholesky).
    Deviation: eigenvalues of the core instead of a Cholesky factor of the whole metric.
    """
    U, S, Vh = U.double(), S.double(), Vh.double()
    A, inverse = metric_root(U, left, LEFT_FLOOR)
    B, _ = metric_root(Vh.mT, right, RIGHT_FLOOR)
    weighted = A * S.unsqueeze(-2)
    core = weighted @ B.mT
    if core.shape[-1] <= WIDE:
        W, values, _ = torch.linalg.svd(core)
    else:
        W = torch.linalg.eigh(core @ core.mT).eigenvectors.flip(-1)
        values = (W.mT @ core).norm(dim=-1)
        order = values.argsort(dim=-1, descending=True)  # of the smallest ones, which are lost in rounding
        W, values = W.gather(-1, order.unsqueeze(-2).expand_as(W)), values.gather(-1, order)
    return U @ (inverse @ W), values, (W.mT @ weighted) @ Vh


def weighted_spectrum(
    U: Float[Tensor, "*blocks out rank"],
    S: Float[Tensor, "*blocks rank"],
    Vh: Float[Tensor, "*blocks rank in_"],
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Float[Tensor, "*blocks held"]:
    """Singular values, descending, of ``L^1/2 U diag(S) Vh R^1/2`` for any factors; in float64, see `weighted_svd`."""
    return weighted_svd(*svd_of_product(U.detach(), S.detach(), Vh.detach()), left, right)[1]


def seen_spectrum(
    S: Float[Tensor, "*blocks rank"], Vh: Float[Tensor, "*blocks rank in_"], right: Tensor | ProjectedMetric
) -> Float[Tensor, "*blocks rank"]:
    """Singular values, descending, of ``U diag(S) Vh R^1/2`` with orthonormal ``U``, in float64: from eigenvalues, without vectors.

    Values below ``1e-8`` of the largest are lost in rounding: for energies only.

    Examples:
        >>> seen_spectrum(torch.tensor([2.0, 1.0]), torch.eye(2), torch.tensor([1.0, 9.0], dtype=torch.float64)).tolist()
        [3.0, 2.0]
    """
    S, gram = S.double(), _seen(Vh.double().mT, right)
    values: Tensor = torch.linalg.eigvalsh(S.unsqueeze(-1) * (gram + gram.mT) / 2 * S.unsqueeze(-2))
    return values.clamp(min=0).sqrt().flip(-1)


def tail_energy(singular_values: Float[Tensor, " full"]) -> Float[Tensor, " full_plus_one"]:
    """Energy discarded at every rank: entry ``r`` is the sum of all but the ``r`` largest squared values; float64.

    The squared Frobenius error of the best rank-r approximation (Eckart and Young, 1936).

    Examples:
        >>> tail_energy(torch.tensor([3.0, 1.0, 2.0])).tolist()
        [14.0, 5.0, 1.0, 0.0]
    """
    squares = singular_values.detach().double().square().sort().values
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def rank_at_energy(singular_values: Float[Tensor, " full"], keep: float) -> int:
    """Return the smallest rank, at least 1, whose largest values hold the fraction `keep` of the sum of squares; 1 for zeros alone.

    Examples:
        >>> rank_at_energy(torch.tensor([3.0, 1.0, 2.0]), 0.9)
        2
    """
    tail = tail_energy(singular_values)
    allowed = (1 - keep) * (1 + 1e-12) * tail[0]  # the slack is for the rounding of 1 - keep: 9 of 10 equal values contain 0.9
    return max(1, int((tail > allowed).sum()))


def pooled_spectrum(S: Float[Tensor, "*blocks rank"]) -> Float[Tensor, " rank"]:
    """Collapse the blocks of a grouped layer to one spectrum whose tail energies are the sums over blocks."""
    ordered = S.detach().double().abs().sort(dim=-1, descending=True).values
    return ordered if S.dim() == 1 else ordered.square().flatten(0, -2).sum(0).sqrt()


def orthogonality_defect(U: Float[Tensor, "*blocks out rank"]) -> float:
    """Return ``||U^T U - I||_F / sqrt(rank)``, the largest over blocks: 0 for orthonormal columns."""
    U = U.detach().double()
    gram = U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    return float(torch.linalg.matrix_norm(gram).max()) / math.sqrt(U.shape[-1])
