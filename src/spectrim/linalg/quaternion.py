"""Matrices of quaternions, ``Q = A + B j`` with complex ``A`` and ``B``, and their singular value decomposition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.gram import Metric
from spectrim.linalg.spectral import metric_root

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Quaternions:
    """A matrix of quaternions ``a + b i + c j + d k = (a + b i) + (c + d i) j``.

    Args:
        A: ``(m, n)``, complex128: first and second part.
        B: ``(m, n)``, complex128: third and fourth part.

    Examples:
        >>> i, j = Quaternions.of(0.0, 1.0, 0.0, 0.0), Quaternions.of(0.0, 0.0, 1.0, 0.0)
        >>> [round(float(part), 1) for part in (i @ j).parts()]  # i j = k
        [0.0, 0.0, 0.0, 1.0]
    """

    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, a: Tensor | float, b: Tensor | float, c: Tensor | float, d: Tensor | float) -> "Quaternions":
        """Make one of its four real parts, matrices ``(m, n)`` or numbers."""
        made = [torch.as_tensor(part, dtype=torch.float64) for part in (a, b, c, d)]
        shape = max((part.shape for part in made), key=len)
        parts = [part.expand(shape if len(shape) == 2 else (1, 1)) for part in made]
        return cls(torch.complex(parts[0], parts[1]), torch.complex(parts[2], parts[3]))

    @classmethod
    def of_column(cls, column: Tensor) -> "Quaternions":
        """Make one of its four real parts on top of each other, ``(4 m, n)``."""
        return cls.of(*column.double().chunk(4))

    def column(self) -> Tensor:
        """Return the four real parts on top of each other, ``(4 m, n)``."""
        return torch.cat(self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four real parts."""
        return self.A.real, self.A.imag, self.B.real, self.B.imag

    @property
    def shape(self) -> torch.Size:
        """``(m, n)``."""
        return self.A.shape

    def __matmul__(self, other: "Quaternions") -> "Quaternions":
        return Quaternions(self.A @ other.A - self.B @ other.B.conj(), self.A @ other.B + self.B @ other.A.conj())

    def __sub__(self, other: "Quaternions") -> "Quaternions":
        return Quaternions(self.A - other.A, self.B - other.B)

    def scaled(self, factors: Tensor) -> "Quaternions":
        """Multiply the columns by real factors ``(n,)``."""
        return Quaternions(self.A * factors, self.B * factors)

    @property
    def H(self) -> "Quaternions":
        """The conjugate transpose."""
        return Quaternions(self.A.mH, -self.B.mT)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float((self.A.abs().square().sum() + self.B.abs().square().sum()).sqrt())

    def adjoint(self) -> Tensor:
        """Return the complex matrix ``[[A, B], [-conj B, conj A]]``, ``(2 m, 2 n)``: products and norms carry over."""
        return torch.cat([torch.cat([self.A, self.B], 1), torch.cat([-self.B.conj(), self.A.conj()], 1)])

    @classmethod
    def from_columns(cls, columns: Tensor) -> "Quaternions":
        """Return the matrix whose adjoint has these ``(2 m, n)`` as its first n columns."""
        half = columns.shape[0] // 2
        return cls(columns[:half], -columns[half:].conj())

    def columns(self) -> Tensor:
        """Return the first n columns of the adjoint, ``(2 m, n)``."""
        return torch.cat([self.A, -self.B.conj()])


def structured(matrix: Tensor) -> Tensor:
    """Return the real matrix ``(4 m, 4 n)`` of quaternions nearest to a real one.

    It is the mean over products with the units from the right, ``J^T M J`` for ``J = 1, i, j, k``. Those commute with the real matrix ``D``
    of any quaternions, so that ``tr(D M D^T)`` is the same for both: in a metric of real inputs, a weight of quaternions sees this part.

    Examples:
        >>> structured(torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0]))).diagonal()
        tensor([1., 1., 1., 1.])
    """
    m, n = (size // 4 for size in matrix.shape)
    M = matrix.reshape(4, m, 4, n).permute(0, 2, 1, 3)
    a = M[0, 0] + M[1, 1] + M[2, 2] + M[3, 3]
    b = M[1, 0] - M[0, 1] - M[2, 3] + M[3, 2]
    c = M[2, 0] - M[0, 2] + M[1, 3] - M[3, 1]
    d = M[3, 0] - M[0, 3] - M[1, 2] + M[2, 1]
    rows = ((a, -b, -c, -d), (b, a, -d, c), (c, d, a, -b), (d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows]) / 4


def mirrored(columns: Tensor) -> Tensor:
    """Return the last n columns of the adjoint for the first n: orthogonal to them, and of the same norm."""
    half = columns.shape[0] // 2
    return torch.cat([-columns[half:].conj(), columns[:half].conj()])


def orthonormal(candidates: Tensor, count: int) -> Tensor:
    """Choose `count` columns, orthonormal together with their mirrors, that span what the first candidates do.

    Args:
        candidates: ``(2 m, many)``, orthonormal, in order of preference; pairs of them span a space that holds its own mirror.
        count: how many.
    """
    basis = candidates[:, :0]
    for column in candidates.mT:
        for _ in range(2):  # twice is enough for rounding
            both = torch.cat([basis, mirrored(basis)], 1)
            column = column - both @ (both.mH @ column)
        if float(column.norm()) > 0.1:  # else the space of an earlier one
            basis = torch.cat([basis, (column / column.norm())[:, None]], 1)
        if basis.shape[1] == count:
            break
    return basis


def qsvd(Q: Quaternions, rank: int | None = None) -> tuple[Quaternions, Tensor, Quaternions]:
    """Singular value decomposition of a quaternion matrix, exact: by that of its complex adjoint, whose values come in equal pairs.

    Args:
        Q: ``(m, n)``.
        rank: of the leading triplets, in ``[1, min(m, n)]``; all when omitted.

    Returns:
        ``U (m, rank)`` and ``Vh (rank, n)`` with orthonormal columns and rows of quaternions, ``S (rank,)`` real and descending.

    Raises:
        SettingError: for another rank.

    Examples:
        >>> Q = Quaternions.of(0.0, 3.0, 4.0, 0.0)  # the quaternion 3 i + 4 j
        >>> round(float(qsvd(Q)[1]), 6)
        5.0

    Source: Zhang, Linear Algebra Appl. 251 (1997), the adjoint; Liu, Ling and Jia, arXiv 2011.03368.
    """
    count = _rank(Q, rank)
    _, _, Vh = torch.linalg.svd(Q.adjoint(), full_matrices=False)
    return _triplets(Q, orthonormal(Vh.mH, count))


def randomized_qsvd(
    Q: Quaternions, rank: int, *, oversample: int = 8, passes: int = 2, seed: int = 0
) -> tuple[Quaternions, Tensor, Quaternions]:
    """Leading singular triplets from a random sketch of ``rank + oversample`` columns; ``O(m n rank)``.

    The sketch is a quaternion matrix, so that all spaces hold their own mirrors. Returns and raises as `qsvd`.

    Args:
        Q: ``(m, n)``.
        rank: number of triplets, in ``[1, min(m, n)]``.
        oversample: columns beyond the rank, >= 0.
        passes: power iterations, >= 0.
        seed: of the sketch.

    Source: Liu, Ling and Jia, arXiv 2011.03368.
    Deviation: bases by complex QR factorizations of the adjoint, whose column space is the same.
    """
    count = _rank(Q, rank)
    X, width = Q.adjoint(), min(rank + oversample, *Q.shape)
    generator = torch.Generator().manual_seed(seed)
    draw = Quaternions.of(*torch.randn(4, Q.shape[1], width, generator=generator, dtype=torch.float64)).adjoint()
    basis = torch.linalg.qr(X @ draw).Q
    for _ in range(passes):
        basis = torch.linalg.qr(X @ torch.linalg.qr(X.mH @ basis).Q).Q
    _, _, Vh = torch.linalg.svd(basis.mH @ X, full_matrices=False)
    return _triplets(Q, orthonormal(Vh.mH, count))


def _rank(Q: Quaternions, rank: int | None) -> int:
    full = min(Q.shape)
    if not full or not bool(torch.isfinite(torch.view_as_real(Q.A)).all() and torch.isfinite(torch.view_as_real(Q.B)).all()):
        raise SettingError("qsvd", "Q", got=tuple(Q.shape), rule="of finite numbers, not empty")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full):
        raise SettingError("qsvd", "rank", got=rank, rule=f"an integer in [1, {full}]")
    return full if rank is None else rank


def _triplets(Q: Quaternions, right: Tensor) -> tuple[Quaternions, Tensor, Quaternions]:
    """Return the triplets for right singular vectors, as columns of the adjoint; left ones of value zero are any others."""
    V = Quaternions.from_columns(right)
    left = (Q @ V).columns()
    S = left.norm(dim=0)
    order = S.argsort(descending=True, stable=True)
    S, V, left = S[order], Quaternions(V.A[:, order], V.B[:, order]), left[:, order]
    held = S.gt(1e-13 * S[0].clamp(min=1e-300))
    U = left / torch.where(held, S, 1.0)
    if not bool(held.all()):
        others = torch.linalg.qr(torch.cat([U[:, held], mirrored(U[:, held]), torch.eye(len(U), dtype=U.dtype)], 1)).Q
        U = torch.cat([U[:, held], orthonormal(others[:, 2 * int(held.sum()) :], int((~held).sum()))], 1)
    return Quaternions.from_columns(U), S, V.H


def decomposed(folded: Tensor, rank: int | None = None) -> Parts:
    """Return the quaternion SVD of a matrix ``(4 m, n)``, of its leading values, in float64, as three real ones.

    Returns:
        ``U (m, 4 r)`` as a first block row, ``S (r,)``, ``Vh (4 r, n)`` as a first block column.
    """
    U, S, Vh = qsvd(Quaternions.of_column(folded.detach()), rank)
    return row_of(U.column()), S, Vh.column()


def column_of(row: Tensor) -> Tensor:
    """Return the first block column ``(4 m, r)`` for the first block row ``(m, 4 r)``."""
    a, b, c, d = row.chunk(4, 1)
    return torch.cat([a, -b, -c, -d])


def row_of(column: Tensor) -> Tensor:
    """Return the first block row ``(m, 4 r)`` for the first block column ``(4 m, r)``."""
    a, b, c, d = column.chunk(4)
    return torch.cat([a, -b, -c, -d], 1)


def root_of(vectors: Tensor, metric: Metric | None, floor: float) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of ``V^T M V`` as a matrix of quaternions, and its inverse; both real ``(4 r, 4 r)``."""
    if metric is None:
        eye = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        return eye, eye
    R, _ = metric_root(vectors, metric, 0.0)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    root, _ = metric_root(eye, structured(R.mT @ R), floor)
    values = root.norm(dim=1)
    basis = root / values.unsqueeze(1)
    return structured(basis.mT * values @ basis), structured(basis.mT / values @ basis)
