"""`QuaternionFactors`: a weight of quaternions as ``U diag(S) Vh`` of quaternion singular vectors and real values."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError
from spectrim.forms.float16 import evened
from spectrim.forms.form import LOST, Form, Size, fitted, one_rank, stored
from spectrim.linalg.gram import Metric
from spectrim.linalg.quaternion import Parts, Quaternions, column_of, decomposed, qsvd, root_of
from spectrim.linalg.spectral import LEFT_FLOOR, RIGHT_FLOOR
from spectrim.plain.quaternion import hamilton


class QuaternionFactors(Form):
    """A weight ``(m, n)`` of quaternions as ``U diag(S) Vh``, the quaternion SVD, cut to its leading values.

    A weight is the first block column of its real matrix, the four parts on top of each other, ``(4 m, n)``; so is ``Vh``. ``U`` is a
    first block row, ``[a, -b, -c, -d]``. That way a change of basis of the values multiplies each of the two along one of its axes.

    Attributes:
        U: ``(m, 4 r)``: columns are orthonormal as vectors of quaternions where it is exact.
        S: ``(r,)``, signed.
        Vh: ``(4 r, n)``: rows are orthonormal as vectors of quaternions where it is exact.

    Source: Liu, Ling and Jia, arXiv 2011.03368 (the decomposition).
    """

    is_matrix: ClassVar[bool] = False
    called: ClassVar[str] = "a product of two quaternion matrices"
    U: nn.Parameter
    S: nn.Parameter
    Vh: nn.Parameter
    operations = ("Vh", "U")

    def __init__(
        self, U: Tensor, S: Tensor, Vh: Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False
    ) -> None:
        """Copy existing tensors.

        Args:
            U: ``(m, 4 r)``.
            S: ``(r,)``.
            Vh: ``(4 r, n)``.
            dtype: the weight's dtype; `U`'s when omitted.
            requires_grad: False for a frozen layer.
            exact: whether these are a quaternion SVD, values descending: nothing is decomposed again until they change.
        """
        super().__init__({"U": U, "S": S, "Vh": Vh}, dtype=dtype or U.dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None

    @classmethod
    def of(
        cls, weight: Tensor, folded: Tensor, choose: Callable[[Tensor], int] | None = None, decompose: Any = None, name: str = ""
    ) -> "QuaternionFactors":
        """Decompose `folded`, ``(4 m, n)``, the folded form of `weight`.

        Args:
            weight: gives dtype, device and `requires_grad`.
            folded: see above.
            choose: takes the singular values, returns the rank to keep; all of them when omitted.
            decompose: of no effect.
            name: of the weight, for errors.

        Raises:
            LayerError: for parts that are not finite in the dtype they are kept in.
        """
        made = cls(*decomposed(folded), dtype=weight.dtype, requires_grad=weight.requires_grad, exact=True)
        if not all(bool(torch.isfinite(part).all()) for part in made.parameters()):
            raise LayerError(name or "weight", f"its values are not finite in {stored(weight.dtype)}", hint="leave it out with where=")
        return made if choose is None else made.cut(choose)

    @classmethod
    def full_size_of(cls, folded: Tensor) -> int:
        """``min(m, n)``."""
        return min(folded.shape[0] // 4, folded.shape[1])

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "QuaternionFactors":
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        (out, in_), rank = folded.shape, _rank(size)
        zeros = (torch.zeros(shape, device=weight.device) for shape in ((out // 4, 4 * rank), (rank,), (4 * rank, in_)))
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    # Sizes

    @property
    def rank(self) -> int:
        """Number of values held: of one quaternion column and one row each."""
        return self.S.shape[0]

    @property
    def full_size(self) -> int:
        """``min(m, n)``."""
        return min(self.U.shape[0], self.Vh.shape[1])

    def checked(self, name: str, size: Any) -> int:
        """Return a rank in ``[1, rank]``; raise a RankError for another."""
        return one_rank(self, name, size)

    def count(self, size: Size) -> int:
        """``4 r (m + n)`` real numbers."""
        return 4 * _rank(size) * (self.U.shape[0] + self.Vh.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """``(4 m, 4 n)``: of the real matrix that computes the same, which inputs and outputs of a layer have."""
        return 4 * self.U.shape[0], 4 * self.Vh.shape[1]

    @property
    def folded_shape(self) -> tuple[int, int]:
        """``(4 m, n)``."""
        return 4 * self.U.shape[0], self.Vh.shape[1]

    # The weight

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the weight: 16 real ones for one of quaternions."""
        return 16 * self.U.shape[0] * self.Vh.shape[1] * self.rank

    def product(self) -> Tensor:
        """Compose ``(4 m, n)`` in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        product = self._composed(self.U, self.S, self.Vh)
        half = not product.is_meta and torch.is_autocast_enabled(product.device.type)
        return product if half else product.to(self.dtype)

    @staticmethod
    def _composed(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        return hamilton(column_of(U)) @ (S.repeat(4).unsqueeze(-1) * Vh)

    @classmethod
    def composed(cls, *parts: Tensor) -> Tensor:
        """Return ``(4 m, n)`` in the dtype of the parts."""
        with torch.autocast(parts[0].device.type, enabled=False):
            return cls._composed(*parts)

    def chain(self) -> tuple[Tensor, Tensor]:
        """Return ``Vh (4 r, n)`` and ``U diag(S) (4 m, r)``, both as first block columns, in the weight's dtype, even in float16."""
        S, V = evened(self.S.unsqueeze(0), self.Vh.view(4, self.rank, -1).mT, self.dtype)
        return V.mT.flatten(0, 1).to(self.dtype), (column_of(self.U) * S).to(self.dtype)

    @torch.no_grad()
    def written(self) -> tuple[Tensor, Tensor]:
        """Return `chain` with the roots of the values in both, detached."""
        root = self.S.abs().sqrt()
        left = column_of(self.U) * (self.S.sign() * root)
        return (root.repeat(4).unsqueeze(-1) * self.Vh).to(self.dtype), left.to(self.dtype)

    def parts(self) -> Parts:
        """Return the parts as they are held, detached, in float64."""
        return self.U.detach().double(), self.S.detach().double(), self.Vh.detach().double()

    def parts_in_order(self) -> Parts:
        """Return the quaternion SVD at the present rank, in float64; nothing is computed where it is at hand."""
        parts = self.parts()
        return parts if self.exact else decomposed(self._composed(*parts), self.rank)

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the singular values."""
        return (self.parts_in_order()[1].abs(),)

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the energy behind each rank, see `linalg.tail_energy`; in metrics that of the real matrix, four times the quaternions'."""
        return linalg.tail_energy(self.spectra()[0] if left is None and right is None else 2 * self._weighted(left, right)[1])

    def _weighted(self, left: Tensor | None, right: Metric | None) -> Parts:
        """Decompose in metrics of the real outputs and inputs, as `linalg.weighted_svd`, by what quaternions see of each (`structured`).

        That is exact for one metric; for two it is an approximation, as their product has parts that neither mean has.

        Returns:
            ``X`` as a block row, values, ``Y`` as a block column; the weight is ``X Y``.
        """
        U, S, Vh = self.parts_in_order()
        columns, rows = hamilton(column_of(U)), hamilton(Vh)
        A, inverse = root_of(columns, left, LEFT_FLOOR)
        B, _ = root_of(rows.mT, right, RIGHT_FLOOR)
        weighted = A * S.repeat(4)
        W, values, _ = qsvd(Quaternions.of_column((weighted @ B)[:, : len(S)]))
        turn = hamilton(W.column())
        return (columns @ (inverse @ turn))[: len(U)], values, (turn.mT @ weighted) @ Vh

    def cut_to(self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> "QuaternionFactors":
        """Cut to a rank: the nearest matrix of quaternions of that rank, also in metrics."""
        rank = self.checked("", size)
        return self.cut(lambda spectrum: rank, *((left, right) if rank < self.rank else ()))

    @torch.no_grad()
    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> "QuaternionFactors":
        """Cut to what is chosen from the singular values, in the metrics where they are given."""
        self.refuse_not_finite()
        weighted = None if left is None and right is None else self._weighted(left, right)
        rank = choose(self.spectra()[0] if weighted is None else weighted[1])
        if weighted is not None and rank < self.rank:
            X, values, Y = _leading(weighted, rank)
            return self.like(*decomposed(self._composed(X, torch.ones_like(values), Y), rank), exact=True)
        return self.like(*_leading(self.parts_in_order(), rank), exact=True)

    # Training

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the singular values."""
        return [self.S]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return the real matrices of ``U`` and ``Vh^H``, ``(4 m, 4 r)`` and ``(4 n, 4 r)``."""
        return hamilton(column_of(self.U)), hamilton(self.Vh).mT

    @torch.no_grad()
    def retract_(self) -> None:
        """Move singular vectors toward orthonormal ones, in place; singular values take over the lengths of their vectors."""
        left, right = (linalg.retracted(side) for side in self.sides())
        for old, new in ((self.U, left[: len(self.U)]), (self.Vh, right.mT[:, : self.Vh.shape[1]])):
            shape, axes = ((len(old), 4, -1), (0, 1)) if old is self.U else ((4, -1, old.shape[1]), (0, 2))
            self.S.mul_((new * old).reshape(shape).sum(axes) / new.square().reshape(shape).sum(axes))
            old.copy_(new)

    def values(self) -> tuple[Tensor, ...]:
        """Return the singular values as they are held, signed."""
        return (self.S,)

    def tail_share(self, size: Size) -> Tensor:
        """Return the share of the energy in all but the largest ``|S|``, the whole treated as a constant."""
        behind = self.S.detach().abs().argsort(descending=True, stable=True)[_rank(size) :]
        whole = self.S.detach().square().sum().clamp_min(torch.finfo(self.S.dtype).tiny)
        return self.S[behind].square().sum() / whole

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return ``sum_{k>r} |S_k dL/dS_k|`` for each rank ``r`` from 0 on, the largest values kept."""
        S = self.S.detach()
        rises = (slopes.to(S) * S).abs().double()[S.abs().argsort(stable=True)].cumsum(0)
        return torch.cat([rises.new_zeros(1), rises]).flip(0)

    def truncated_parts(self, rank: int) -> Parts:
        """Return parts of the present shapes whose values are zero behind a rank."""
        U, S, Vh = self.parts_in_order()
        return U, torch.cat([S[:rank], torch.zeros_like(S[rank:])]), Vh

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return ``P = U_old^H U_new`` for ``U``, ``Q = Vh_old Vh_new^H`` for ``Vh`` as real matrices, and their products for ``S``."""
        assert isinstance(new, QuaternionFactors)
        (U, _, Vh), (U_new, _, Vh_new) = self.parts(), new.parts()
        P = hamilton(column_of(U)).mT @ hamilton(column_of(U_new))
        Q = hamilton(Vh) @ hamilton(Vh_new).mT
        shape = (4, self.rank, 4, new.rank)
        entries = (P.reshape(shape)[:, :, 0] * Q.reshape(shape)[:, :, 0]).sum(0)  # real parts of conj(p) q
        return {"U": {1: P}, "S": {0: entries}, "Vh": {0: Q}}

    # Storage

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the quaternion SVD of a dense weight at the present rank; None where values beyond rounding would be lost."""
        parts = decomposed(weight)
        if self.rank < len(parts[1]) and float(parts[1][self.rank]) > LOST * float(parts[1][0]):
            return None
        return {name: part.to(self.S) for name, part in zip(("U", "S", "Vh"), _leading(parts, self.rank), strict=True)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> int | None:
        """Return the rank of stored parts; None where they are none of this weight."""
        shapes = [tuple(getattr(stored.get(name), "shape", ())) for name in ("U", "S", "Vh")]
        rank = shapes[1][0] if len(shapes[1]) == 1 else 0
        fits = shapes == [(self.U.shape[0], 4 * rank), (rank,), (4 * rank, self.Vh.shape[1])]
        return rank if fits and 1 <= rank <= self.full_size else None

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "QuaternionFactors":
        """Return copies of the first columns and rows as they are held."""
        return self.resized(rank).to(device or self.device)

    def resized(self, size: Size) -> "QuaternionFactors":
        """Return the first columns and rows as they are held, or zeros beside them."""
        return self.like(*_leading((self.U.detach(), self.S.detach(), self.Vh.detach()), _rank(size)))

    def random(self, rank: int) -> "QuaternionFactors":
        """Return random parts at a rank, in float32 or the weight's dtype, to time what they do."""
        m, n = self.U.shape[0], self.Vh.shape[1]
        U, S, Vh = (torch.randn(shape, device=self.device) / m for shape in ((m, 4 * rank), (rank,), (4 * rank, n)))
        return type(self)(U, S, Vh, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, rank and dtype for the module's printout."""
        return f"{self.U.shape[0]} x {self.Vh.shape[1]} quaternions, rank={self.rank} of {self.full_size}, dtype={self.dtype}"


def _leading(parts: Parts, rank: int) -> Parts:
    """Return the first values with their columns and rows; zeros where there are fewer."""
    U, S, Vh = parts
    columns = fitted(U.reshape(len(U), 4, -1), 2, rank).reshape(len(U), -1)
    return columns, fitted(S, 0, rank), fitted(Vh.reshape(4, -1, Vh.shape[1]), 1, rank).reshape(-1, Vh.shape[1])


def _rank(size: Size) -> int:
    assert isinstance(size, int)
    return size
