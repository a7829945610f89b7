"""The only holder of U, S and Vh."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError
from spectrim.forms.compose import Compose

OVERFLOW = "load a sound checkpoint, or leave the layer out with where="


def _overflow(name: str, weight: Tensor) -> LayerError:
    problem = (
        f"its singular values are not finite in {_stored(weight.dtype)}: its weights go up to {float(weight.detach().abs().max()):.3g}"
    )
    return LayerError(name or "weight", problem, hint=OVERFLOW)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors of a weight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Factors(nn.Module):
    """One weight as ``U diag(S) Vh``; several equal blocks for a grouped convolution.

    A half-precision weight keeps its factors in float32: orthonormal columns cannot be held in half precision, and a product of
    three rounded factors is no longer the weight. What leaves this class (`matrix`, `pair`) has the weight's own dtype.

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
        super().__init__()
        dtype = dtype or U.dtype
        stored = _stored(dtype)
        for name, tensor in (("U", U), ("S", S), ("Vh", Vh)):
            own = tensor.detach().to(stored).clone(memory_format=torch.contiguous_format)  # a slice would keep its whole storage
            self.register_parameter(name, nn.Parameter(own, requires_grad=requires_grad))
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=U.device), persistent=False)
        self._decomposed: tuple[float, ...] | None = self._fingerprint() if exact else None

    U: nn.Parameter
    S: nn.Parameter
    Vh: nn.Parameter
    _dtype: Tensor

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
    def empty(cls, weight: Tensor, matrix: Float[Tensor, "*blocks out in_"], rank: int) -> "Factors":
        """Zero factors of the right shapes, for loading a checkpoint into; no decomposition is computed."""
        *blocks, out, in_ = matrix.shape
        zeros = [torch.zeros(*blocks, *shape, device=weight.device) for shape in ((out, rank), (rank,), (rank, in_))]
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    @torch.no_grad()
    def _fingerprint(self) -> tuple[float, ...] | None:
        """Numbers that change with any entry, however it was written (through ``.data`` too, which torch's version counters do not see)."""
        if self.U.is_meta or hasattr(self.U, "full_tensor"):  # no values, or shards of them
            return None
        return tuple(
            float(flat @ torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64, device=flat.device))
            for flat in (parameter.double().flatten() for parameter in (self.U, self.S, self.Vh))
        )

    @property
    def exact(self) -> bool:
        """Whether the factors are a singular value decomposition, as they were made; False after a step, a load or a change by hand."""
        return self._decomposed is not None and self._decomposed == self._fingerprint()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular value decomposition of the weight in float64, values descending; nothing is computed where it is at hand."""
        parts = self.U.detach(), self.S.detach(), self.Vh.detach()
        if self.exact:
            return parts[0].double(), parts[1].double(), parts[2].double()
        return linalg.svd_of_product(*parts)

    def spectrum(self) -> Tensor:
        """Return the true singular values, descending, in float64; blocks pooled: ``(rank,)``."""
        return linalg.pooled_spectrum(self.S if self.exact else self.svd()[1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight; follows ``.to()``, ``.half()`` and friends."""
        return self._dtype.dtype

    @property
    def rank(self) -> int:
        """Number of singular values held."""
        return self.S.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one block."""
        return self.U.shape[-2], self.Vh.shape[-1]

    @property
    def blocks(self) -> int:
        """Number of blocks: the groups of a convolution, else 1."""
        return self.S[..., 0].numel()

    @property
    def full_rank(self) -> int:
        """``min(out, in)``."""
        return min(self.shape)

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the matrix."""
        out, in_ = self.shape
        return self.blocks * out * in_ * self.rank

    def matrix(self) -> Tensor:
        """Compose ``U diag(S) Vh``: ``(out, in)`` or ``(blocks, out, in)``, in the weight's dtype."""
        return self.product().to(self.dtype)

    def product(self) -> Tensor:
        """Compose the matrix in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        product: Tensor = Compose.apply(self.U, self.S, self.Vh)  # type: ignore[no-untyped-call]
        half = not product.is_meta and torch.is_autocast_enabled(product.device.type)
        return product if half else product.to(self.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return ``U diag(S)`` and ``Vh`` in the weight's dtype, to be applied one after the other."""
        return (self.U * self.S.unsqueeze(-2)).to(self.dtype), self.Vh.to(self.dtype)

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
        for name, tensor in self.named_parameters(recurse=False):
            if not torch.isfinite(tensor).all():
                raise LayerError(name, "holds NaN or infinite values", hint="load the last good checkpoint")
        exact = self.exact
        U, S, Vh = (self.U, self.S, self.Vh) if exact else self.svd()
        if left is None and right is None:
            rank = choose(linalg.pooled_spectrum(S))
            if exact:
                return self._cut_to(U, S, Vh, rank)
        else:
            X, values, Y = linalg.weighted_svd(U, S, Vh, left, right)
            rank = choose(linalg.pooled_spectrum(values))
            if rank < values.shape[-1]:  # else nothing is cut
                U, S, Vh = linalg.svd_of_product(X[..., :rank], torch.ones_like(S[..., :rank]), Y[..., :rank, :])
        overlap = self.U.double().mT @ U.double()
        signs = torch.where(overlap.gather(-2, overlap.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
        return self._cut_to(U * signs, S, Vh * signs.mT, rank)

    def _cut_to(self, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> "Factors":
        """Return new factors of the leading values of a decomposition, trained as these are."""
        return self.like(U[..., :rank], S[..., :rank], Vh[..., :rank, :], exact=True)

    def become(self, other: "Factors") -> None:
        """Take over the parameters of other factors of the same weight, in place."""
        self.U, self.S, self.Vh, self._decomposed = other.U, other.S, other.Vh, other._decomposed

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.U.device

    @property
    def trained(self) -> bool:
        """Whether the singular values are trained."""
        return self.S.requires_grad

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of each factor: ``(blocks,)`` for a grouped convolution, else none."""
        return tuple(self.S.shape[:-1])

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

    @torch.no_grad()
    def set_(self, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """Write other values into the factors, in place; shapes may differ by axes of length one."""
        for parameter, value in zip((self.U, self.S, self.Vh), (U, S, Vh), strict=True):
            parameter.copy_(value.reshape(parameter.shape))

    def like(self, U: Tensor, S: Tensor, Vh: Tensor, *, exact: bool = False) -> "Factors":
        """Return new factors with the dtype, training mode and `requires_grad` of these; arguments as for `Factors`."""
        made = type(self)(U, S, Vh, dtype=self.dtype, exact=exact)
        for new, old in zip(made.parameters(), self.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return made.train(self.training)

    def copied(self) -> "Factors":
        """Return a copy, which can be changed while this stays."""
        return self.like(self.U, self.S, self.Vh)

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "Factors":
        """Return copies of the first columns and rows as they are held, for their sizes; nothing is made exact.

        Args:
            rank: how many, at most.
            device: of the copies; that of these factors when omitted.
        """
        parts = (self.U[..., :rank], self.S[..., :rank], self.Vh[..., :rank, :])
        return self.like(*(part.detach().to(device or self.device) for part in parts))

    def random(self, rank: int) -> "Factors":
        """Return random factors of this weight's shape and another rank, in float32 or the weight's dtype, to time what they do."""
        out, in_ = self.shape
        U, S, Vh = (torch.randn(*self.lead, *shape, device=self.device) for shape in ((out, rank), (rank,), (rank, in_)))
        return type(self)(U / out, S, Vh, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow ``.to()``, ``.half()`` and friends, but keep U, S and Vh in float32 at least."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = tensor is not self._dtype and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrow else moved

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Shape, rank and dtype for the module's printout."""
        out, in_ = self.shape
        blocks = f"{self.blocks} x " if self.S.dim() > 1 else ""
        return f"{blocks}{out} x {in_}, rank={self.rank} of {self.full_rank}, dtype={self.dtype}"
