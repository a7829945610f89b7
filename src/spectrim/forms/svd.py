"""`Factors`: one weight as `U diag(S) Vh`, or as several equal blocks of it; the only holder of U, S and Vh."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError
from spectrim.forms.compose import Compose
from spectrim.forms.float16 import evened
from spectrim.forms.form import LOST, Form, Size, fitted, one_rank, stored, whole
from spectrim.linalg.gram import Metric

OVERFLOW = "load a sound checkpoint, or leave the layer out with where="


def _overflow(name: str, weight: Tensor) -> LayerError:
    problem = f"its singular values are not finite in {stored(weight.dtype)}: its weights go up to {float(weight.detach().abs().max()):.3g}"
    return LayerError(name or "weight", problem, hint=OVERFLOW)


def tail_share(S: Tensor, rank: int) -> Tensor:
    """Return the fraction of the energy in all but the `rank` largest ``|S|`` of each block, a scalar in [0, 1]; 0 for a spectrum of zeros.

    The total energy is treated as a constant. Values are scaled by the largest first, so that squares neither underflow nor overflow. If
    the largest is so small that the gradient would overflow, all are treated as zeros.

    Examples:
        >>> tail_share(torch.tensor([3.0, -1.0, 0.0]), 1)
        tensor(0.1000)
    """
    S = whole(S).to(torch.promote_types(S.dtype, torch.float32))
    with torch.no_grad():
        size = S.abs()
        largest = size.max()
        zero = largest < torch.finfo(S.dtype).tiny * S.numel()
        scale = torch.where(zero, 1.0, largest)
        order = size.argsort(dim=-1, descending=True, stable=True)
        cut = torch.ones_like(size).scatter_(-1, order[..., :rank], 0.0)
        weight = torch.where(zero, 0.0, cut / torch.where(zero, 1.0, (size / scale).square().sum()))
    return (weight * (S / scale).square()).sum()


class Factors(Form):
    """One weight as ``U diag(S) Vh``; several equal blocks for a grouped convolution.

    Attributes:
        U: ``(out, rank)``, or ``(blocks, out, rank)``.
        S: ``(rank,)``, or ``(blocks, rank)``; signed. Penalties, order and merging take ``|S|``.
        Vh: ``(rank, in)``, or ``(blocks, rank, in)``.

    Source: Yang et al., arXiv 2004.09031, section 3.1.
    Deviation: ``S`` is signed and multiplied into ``U``, instead of ``sqrt(|S|)`` into both factors: the same set of functions, and the
    gradient of a weight of zeros reaches ``S``. `balanced` gives the published form, for merging.
    """

    def __init__(
        self, U: Tensor, S: Tensor, Vh: Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False
    ) -> None:
        """Copy existing tensors.

        Args:
            U: left factor ``(..., out, rank)``.
            S: ``(..., rank)``.
            Vh: right factor ``(..., rank, in)``.
            dtype: the weight's dtype; `U`'s when omitted.
            requires_grad: False for a frozen layer.
            exact: whether these are a singular value decomposition, values descending: nothing is decomposed again until they change.
        """
        super().__init__({"U": U, "S": S, "Vh": Vh}, dtype=dtype or U.dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None

    U: nn.Parameter
    S: nn.Parameter
    Vh: nn.Parameter
    operations = ("Vh", "U")

    @classmethod
    def of(
        cls,
        weight: Tensor,
        matrix: Float[Tensor, "*blocks out in_"],
        choose: Callable[[Tensor], int] | None = None,
        decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = linalg.svd,
        name: str = "",
    ) -> "Factors":
        """Factorize `matrix`, the folded form of `weight`.

        Args:
            weight: gives dtype, device and `requires_grad`.
            matrix: ``(out, in)`` or ``(blocks, out, in)``.
            choose: takes the singular values, returns the rank to keep; all of them when omitted.
            decompose: matrix → ``U, S, Vh``; the exact SVD when omitted.
            name: of the weight, for errors.

        Raises:
            LayerError: for factors that are not finite in the dtype they are kept in, such as singular values above 3e38 in float32.
        """
        try:
            U, S, Vh = decompose(matrix.detach())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # a sketch that overflows
            raise _overflow(name, weight) from error
        rank = S.shape[-1] if choose is None else choose(linalg.pooled_spectrum(S))
        made = cls(U[..., :rank], S[..., :rank], Vh[..., :rank, :], dtype=weight.dtype, requires_grad=weight.requires_grad, exact=True)
        if not made.U.is_meta and not all(bool(torch.isfinite(part).all()) for part in (made.U, made.S, made.Vh)):
            raise _overflow(name, weight)
        return made

    @classmethod
    def full_size_of(cls, folded: Tensor) -> int:
        """Return the full rank of a folded weight."""
        return min(folded.shape[-2:])

    @classmethod
    def empty(cls, weight: Tensor, matrix: Float[Tensor, "*blocks out in_"], size: Size) -> "Factors":
        """Zero factors of the right shapes, for loading a checkpoint into; no decomposition is computed."""
        *blocks, out, in_ = matrix.shape
        assert isinstance(size, int)
        zeros = [torch.zeros(*blocks, *shape, device=weight.device) for shape in ((out, size), (size,), (size, in_))]
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular value decomposition of the weight in float64, values descending; nothing is computed where it is at hand."""
        parts = self.U.detach(), self.S.detach(), self.Vh.detach()
        if self.exact:
            return parts[0].double(), parts[1].double(), parts[2].double()
        return linalg.svd_of_product(*parts)

    def spectrum(self) -> Tensor:
        """Return the true singular values, descending, in float64; blocks pooled: ``(rank,)``."""
        return linalg.pooled_spectrum(self.S if self.exact else self.svd()[1])

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the `spectrum`: an SVD is cut along one axis."""
        return (self.spectrum(),)

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the energy behind each rank, see `linalg.tail_energy`."""
        if left is None and right is None:
            return linalg.tail_energy(self.spectrum())
        return linalg.tail_energy(linalg.pooled_spectrum(linalg.weighted_svd(*self.svd(), left, right)[1]))

    @property
    def rank(self) -> int:
        """Number of singular values held."""
        return self.S.shape[-1]

    @property
    def full_size(self) -> int:
        """``min(out, in)``."""
        return min(self.shape)

    def checked(self, name: str, size: Any) -> int:
        """Return a rank in ``[1, rank]``; raise a RankError for another."""
        return one_rank(self, name, size)

    def count(self, size: Size) -> int:
        """``rank (out + in)``."""
        assert isinstance(size, int)
        return size * sum(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one block."""
        return self.U.shape[-2], self.Vh.shape[-1]

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(blocks, out, in)``."""
        return (*self.lead, *self.shape)

    @property
    def blocks(self) -> int:
        """Number of blocks: the groups of a convolution, else 1."""
        return math.prod(self.S.shape[:-1])

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of each factor: ``(blocks,)`` for a grouped convolution, else none."""
        return tuple(self.S.shape[:-1])

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the matrix."""
        out, in_ = self.shape
        return self.blocks * out * in_ * self.rank

    def product(self) -> Tensor:
        """Compose the matrix in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        compose: Any = Compose.apply if torch.is_grad_enabled() else Compose.forward
        product: Tensor = compose(self.U, self.S, self.Vh)
        half = not product.is_meta and torch.is_autocast_enabled(product.device.type)
        return product if half else product.to(self.dtype)

    @staticmethod
    def composed(*parts: Tensor) -> Tensor:
        """Return ``U diag(S) Vh`` in the dtype of the factors."""
        U, S, Vh = parts
        with torch.autocast(U.device.type, enabled=False):
            return (U * S.unsqueeze(-2)) @ Vh

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return ``U diag(S)`` and ``Vh`` in the weight's dtype, to be applied one after the other, even in float16."""
        S, V = evened(self.S.unsqueeze(-2), self.Vh.mT, self.dtype)
        return (self.U * S).to(self.dtype), V.mT.to(self.dtype)

    def chain(self) -> tuple[Tensor, Tensor]:
        """Return the `pair`, the right one first."""
        left, right = self.pair()
        return right, left

    def written(self) -> tuple[Tensor, Tensor]:
        """Return the halves of `balanced`, the right one first."""
        left, right = self.balanced()
        return right, left

    @torch.no_grad()
    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return ``U diag(sign(S) sqrt|S|)`` and ``diag(sqrt|S|) Vh`` in the weight's dtype, detached: what `merge` writes."""
        root = self.S.abs().sqrt()
        return (self.U * (self.S.sign() * root).unsqueeze(-2)).to(self.dtype), (root.unsqueeze(-1) * self.Vh).to(self.dtype)

    @torch.no_grad()
    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: linalg.Metric | None = None) -> "Factors":
        """Re-orthogonalize exactly, then keep the largest singular values; with metrics, what is nearest in ``||L^1/2 (W - W_r) R^1/2||``.

        Args:
            choose: takes the true singular values (of ``L^1/2 W R^1/2``), returns how many to keep.
            left: metric of the outputs, see `linalg.weighted_svd`.
            right: metric of the inputs.

        Returns:
            New factors of the chosen rank, values descending; these stay as they are. Of the two signs that a pair of singular vectors
            can have, it takes that of the nearest column of `U`, so that averages over training steps stay meaningful.

        Raises:
            LayerError: when the factors hold values that are not finite.
        """
        self.refuse_not_finite()
        exact = self.exact
        U, S, Vh = (self.U, self.S, self.Vh) if exact else self.svd()
        if left is None and right is None:
            rank = choose(linalg.pooled_spectrum(S))
            if exact:
                return self._leading(U, S, Vh, rank)
        else:
            X, values, Y = linalg.weighted_svd(U, S, Vh, left, right)
            rank = choose(linalg.pooled_spectrum(values))
            if rank < values.shape[-1]:  # else nothing is cut
                U, S, Vh = linalg.svd_of_product(X[..., :rank], torch.ones_like(S[..., :rank]), Y[..., :rank, :])
        overlap = self.U.double().mT @ U.double()
        signs = torch.where(overlap.gather(-2, overlap.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
        return self._leading(U * signs, S, Vh * signs.mT, rank)

    def in_order(self) -> "Factors":
        """Return the same weight with orthonormal columns and rows, values descending."""
        return self.like(*self.svd(), exact=True)

    def cut_to(self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> "Factors":
        """Cut to a rank, see `cut`."""
        rank = self.checked("", size)
        return self.cut(lambda spectrum: rank, left, right)

    def _leading(self, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> "Factors":
        """Return new factors of the leading values of a decomposition, trained as these are."""
        return self.like(U[..., :rank], S[..., :rank], Vh[..., :rank, :], exact=True)

    @property
    def sizes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of `U` and `Vh`."""
        return self.U.shape, self.Vh.shape

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``U, S, Vh`` as they are held, detached, in float64."""
        return self.U.detach().double(), self.S.detach().double(), self.Vh.detach().double()

    def block_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `parts` with a leading axis of blocks, also for a single one."""
        U, S, Vh = self.parts()
        return (U, S, Vh) if self.lead else (U[None], S[None], Vh[None])

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients are the slopes of a calibration: the singular values."""
        return [self.S]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``U`` and ``Vh^T``: columns are singular vectors."""
        return self.U, self.Vh.mT

    @torch.no_grad()
    def retract_(self) -> None:
        """Move singular vectors toward orthonormal ones, in place; singular values take over the lengths of their vectors."""
        for side in self.sides():
            made = linalg.retracted(side)
            self.S.mul_((made * side).sum(-2) / made.square().sum(-2))
            side.copy_(made)

    def values(self) -> tuple[Tensor, ...]:
        """Return the singular values as they are held, signed."""
        return (self.S,)

    def tail_share(self, size: Size) -> Tensor:
        """Return the share of the energy in all but the largest ``|S|`` of each block, see `tail_share`."""
        assert isinstance(size, int)
        return tail_share(self.S, size)

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return ``sum_{k>r} |S_k dL/dS_k|`` for each rank ``r`` from 0 on, blocks added up, in float64.

        Values are ordered as a cut orders them, up to the angles between factors that are not orthonormal.

        Args:
            slopes: ``dL/dS``, one for each value held.
        """
        U, S, Vh = self.U.detach(), self.S.detach(), self.Vh.detach()
        size = S.abs() * U.norm(dim=-2) * Vh.norm(dim=-1)
        rises = (slopes.to(S) * S).abs().double().gather(-1, size.argsort(dim=-1)).cumsum(-1)  # of the least ones, the least first
        rises = rises.flatten(0, -2).sum(0) if S.dim() > 1 else rises
        return torch.cat([rises.new_zeros(1), rises]).flip(0)

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return ``P = U_old^T U_new`` for ``U``, ``Q = Vh_old Vh_new^T`` for ``Vh``, and their entries' products for ``S``."""
        assert isinstance(new, Factors)
        (U, _, Vh), (U_new, _, Vh_new) = self.parts(), new.parts()
        P, Q = U.mT @ U_new, Vh @ Vh_new.mT
        return {"U": {-1: P}, "S": {-1: P * Q}, "Vh": {-2: Q}}

    def truncated_parts(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors of the present shapes whose singular values behind the `rank` largest are zero."""
        U, S, Vh = linalg.svd_of_product(self.U.detach(), self.S.detach(), self.Vh.detach())
        S[..., rank:] = 0
        return U, S, Vh

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the SVD of a dense weight at the present rank; None where values beyond rounding would be lost."""
        U, S, Vh = linalg.svd(weight)
        r = self.rank
        if r < S.shape[-1] and float(S[..., r:].max()) > LOST * float(S.max()):
            return None
        return {"U": U[..., :r].to(self.U), "S": S[..., :r].to(self.S), "Vh": Vh[..., :r, :].to(self.Vh)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> int | None:
        """Return the rank of stored factors; None where they are none of this weight."""
        S = stored.get("S")
        if not isinstance(S, Tensor) or S.dim() != len(self.lead) + 1 or not 1 <= S.shape[-1] <= self.full_size:
            return None
        return S.shape[-1]

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "Factors":
        """Return copies of the first columns and rows as they are held, for their sizes; nothing is made exact.

        Args:
            rank: how many, at most.
            device: of the copies; that of these factors when omitted.
        """
        parts = (self.U[..., :rank], self.S[..., :rank], self.Vh[..., :rank, :])
        return self.like(*(part.detach().to(device or self.device) for part in parts))

    def resized(self, size: Size) -> "Factors":
        """Return the first columns and rows as they are held, or zeros beside them."""
        rank = self.rung_of(size)
        parts = ((self.U, -1), (self.S, -1), (self.Vh, -2))
        return self.like(*(fitted(part.detach(), axis, rank) for part, axis in parts))

    def random(self, rank: int) -> "Factors":
        """Return random factors of this weight's shape and another rank, in float32 or the weight's dtype, to time what they do."""
        out, in_ = self.shape
        U, S, Vh = (torch.randn(*self.lead, *shape, device=self.device) for shape in ((out, rank), (rank,), (rank, in_)))
        return type(self)(U / out, S, Vh, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, rank and dtype for the module's printout."""
        out, in_ = self.shape
        blocks = f"{self.blocks} x " if self.S.dim() > 1 else ""
        return f"{blocks}{out} x {in_}, rank={self.rank} of {self.full_rank}, dtype={self.dtype}"
