"""`CP`: a kernel as a sum of products of three vectors; run as 1x1, a depthwise convolution of all taps, 1x1."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.forms.float16 import evened
from spectrim.forms.form import LOST, Form, Size, fitted, one_rank
from spectrim.forms.kernel import Kernel
from spectrim.linalg import cp
from spectrim.linalg.gram import Metric

Parts = tuple[Tensor, ...]


class CP(Kernel):
    """One kernel ``(out, in, taps)`` as ``W[o, i, t] = sum_k A[o, k] B[i, k] C[t, k]``, a canonical polyadic decomposition of rank ``r``.

    Taps of all axes are one axis of the tensor: at 3x3, 9 numbers a component in place of 6 for one vector an axis, and one depthwise
    convolution in place of two.

    Attributes:
        A: ``(out, r)``, columns of length one where it is exact.
        B: ``(in, r)``, the same.
        C: ``(taps, r)``, with the norms; the largest component first where it is exact.

    Source: Lebedev et al., arXiv 1412.6553 (four axes); Kolda and Bader, SIAM Review 51 (2009), for alternating least squares.
    Deviation: taps are one axis. It starts from orthogonal components, singular triplets of slices (`linalg.cp.orthogonal_cp`), of which
    the product of the two smallest sizes is exact; the distortion of a rung is that of leaving components out, and its cut is improved by
    alternating least squares, so that the squared error is at most the distortion.
    """

    called: ClassVar[str] = "a CP form"
    operations = ("B", "C", "A")
    A: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter

    def __init__(
        self, A: Tensor, B: Tensor, C: Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False
    ) -> None:
        """Copy existing tensors.

        Args:
            A: ``(out, r)``.
            B: ``(in, r)``.
            C: ``(taps, r)``.
            dtype: the weight's dtype; `A`'s when omitted.
            requires_grad: False for a frozen layer.
            exact: whether columns of `A` and `B` have length one and those of `C` fall in norm.
        """
        super().__init__({"A": A, "B": B, "C": C}, dtype=dtype or A.dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None

    @classmethod
    def full_size_of(cls, folded: Tensor) -> int:
        """Return the product of the two smallest sizes: so many components hold any kernel of this shape."""
        return cp.cp_rank(tuple(folded.shape))

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "CP":
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        zeros = (torch.zeros(length, _rank(size), device=weight.device) for length in folded.shape)
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    # Sizes

    @property
    def rank(self) -> int:
        """Number of components held."""
        return self.A.shape[1]

    @property
    def full_size(self) -> int:
        """The product of the two smallest sizes."""
        return cp.cp_rank(self.folded_shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.A.shape[0], self.B.shape[0]

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """``(out, in, taps)``."""
        return (*self.shape, self.C.shape[0])

    def path(self) -> tuple[int, ...]:  # type: ignore[override]
        """Return the ranks from 1 to the present one."""
        return tuple(range(1, self.rank + 1))

    def checked(self, name: str, size: Any) -> int:
        """Return a rank in ``[1, rank]``; raise a RankError for another."""
        return one_rank(self, name, size)

    def count(self, size: Size) -> int:
        """``r (out + in + taps)``."""
        return _rank(size) * sum(self.folded_shape)

    def cut_macs(self, size: Size) -> float:
        """Return the multiply-accumulates of all sweeps of alternating least squares."""
        out, in_, taps = self.folded_shape
        return 3.0 * cp.SWEEPS * out * in_ * taps * _rank(size)

    # The weight

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the kernel, without the products of the vectors of inputs and taps."""
        out, in_, taps = self.folded_shape
        return out * in_ * taps * self.rank

    @staticmethod
    def compose(*parts: Tensor) -> Tensor:
        """Return ``(out, in, taps)``."""
        return cp.compose(*parts)

    def chain(self) -> tuple[Tensor, ...]:
        """Return ``B^T (r, in)``, the depthwise kernels ``(r, 1, taps)`` and ``A (out, r)`` in the weight's dtype, even in float16."""
        A, B = evened(self.A, self.B, self.dtype)
        C, B = evened(self.C, B, self.dtype)
        return B.mT.to(self.dtype), C.mT.unsqueeze(1).to(self.dtype), A.to(self.dtype)

    @torch.no_grad()
    def written(self) -> Parts:
        """Return `chain` with equal norms of the three vectors of each component, detached."""
        norms = torch.stack([part.norm(dim=0) for part in (self.B, self.C, self.A)])
        scales = norms.prod(0) ** (1 / 3) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        first, middle, last = (part * scale for part, scale in zip((self.B, self.C, self.A), scales, strict=True))
        return first.mT.to(self.dtype), middle.mT.unsqueeze(1).to(self.dtype), last.to(self.dtype)

    @classmethod
    def decomposed(cls, kernel: Tensor, size: Any) -> Parts:
        """Return orthogonal components at full size, fewer by alternating least squares."""
        return cp.cp(kernel, size)

    @classmethod
    def ordered(cls, parts: Parts) -> Parts:
        """Return the same components, the largest first."""
        A, B, C = parts
        return cp.normalized(A, B, C)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B``."""
        return self.A, self.B

    @classmethod
    def with_ends(cls, parts: Parts, left: Tensor, right: Tensor) -> Parts:
        """Return the components with other vectors of outputs and inputs."""
        A, B, C = parts
        return left @ A, right @ B, C

    @torch.no_grad()
    def parts_in_order(self) -> Parts:
        """Return the components as they are held, the largest first, in float64."""
        return self.held() if self.exact else self.ordered(self.held())

    def nearest(self, kernel: Tensor, size: Any, held: Parts) -> Parts:
        """Improve by alternating least squares what is left of the held components, or of orthogonal ones where these are nearer."""
        starts = [_leading(*parts, size) for parts in (_three(self.ordered(held)), cp.orthogonal_cp(kernel))]
        errors = [cp.squared_error(kernel, start) for start in starts]
        return cp.als(kernel, starts[errors.index(min(errors))])

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the norms of the components, descending."""
        return (self.parts_in_order()[2].norm(dim=0),)

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the energy of leaving out all components behind each rank, the largest kept; never rising."""
        A, B, C = self.parts_in_order()
        if left is None and right is None:
            return _falling(cp.truncation_errors(A, B, C))
        weighted = self.ordered(self.with_ends((A, B, C), *self._metrics(left, right)[0]))
        mine = cp.truncation_errors(*_three(weighted))
        orthogonal = cp.truncation_errors(*cp.orthogonal_cp(cp.compose(*weighted)))
        return _falling(torch.minimum(mine, fitted(orthogonal, 0, len(mine))))  # zero where there are no more of them

    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> "CP":
        """Cut to the number of components that is chosen from their norms."""
        return self.cut_to(choose(self.spectra()[0]), left, right)

    # Training

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return ``C``, which has the norms."""
        return [self.C]

    def sides(self) -> tuple[Tensor, ...]:
        """Return nothing: columns of a CP form are not orthogonal."""
        return ()

    def values(self) -> tuple[Tensor, ...]:
        """Return the norms of the components as they are held."""
        tiny = torch.finfo(self.C.dtype).tiny
        squares = self.A.square().sum(0) * self.B.square().sum(0) * self.C.square().sum(0)
        return ((squares + tiny).sqrt(),)

    def tail_share(self, size: Size) -> Tensor:
        """Return the energy of the components behind the largest ones, relative to the kernel's, which is treated as a constant."""
        behind = self.values()[0].detach().argsort(descending=True, stable=True)[_rank(size) :]
        energy = cp.gram(self.A[:, behind], self.B[:, behind], self.C[:, behind]).sum()
        whole = cp.gram(self.A, self.B, self.C).sum().detach()
        return energy / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return the sum of ``|C_k dL/dC_k|`` over the components behind each rank, the largest kept."""
        rises = (slopes.to(self.C) * self.C.detach()).sum(0).abs().double()
        rises = rises[self.values()[0].detach().argsort(stable=True)].cumsum(0)
        return torch.cat([rises.new_zeros(1), rises]).flip(0)

    def truncated_parts(self, rank: int) -> Parts:
        """Return parts of the present shapes whose components are zero behind a rank, or behind a lower one that is nearer."""
        A, B, C = self.parts_in_order()
        kept = C.clone()
        kept[:, int(cp.truncation_errors(A, B, C)[: rank + 1].argmin()) :] = 0
        return A, B, kept

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return which component each new one continues: the one most like it, with its sign."""
        signed = [_unit(getattr(self, name)).mT @ _unit(getattr(new, name)) for name in "ABC"]
        likeness = signed[0] * signed[1] * signed[2]
        chosen = torch.zeros_like(likeness).scatter_(0, likeness.abs().argmax(0, keepdim=True), 1.0)
        return {name: {1: chosen * torch.where(cosine < 0, -1.0, 1.0)} for name, cosine in zip("ABC", signed, strict=True)}

    # Storage

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the components of a dense kernel at the present size; None where values beyond rounding would be lost."""
        kernel, limit = weight.detach().double(), LOST**2 * float(weight.detach().double().square().sum())
        parts = self.parts_in_order()
        if self.rank == self.full_size or cp.squared_error(kernel, _three(parts)) > limit:
            parts = cp.cp(kernel, self.rank)
        if cp.squared_error(kernel, _three(parts)) > limit:
            return None
        return {name: part.to(self.C) for name, part in zip("ABC", parts, strict=True)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> int | None:
        """Return the number of stored components; None where they are none of this kernel."""
        parts = [stored.get(name) for name in "ABC"]
        if not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
            return None
        shapes = [tuple(part.shape) for part in parts if part is not None]
        rank = shapes[0][1]
        fits = shapes == [(length, rank) for length in self.folded_shape]
        return rank if fits and 1 <= rank <= self.full_size else None

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "CP":
        """Return copies of the leading components as they are held."""
        parts = (part.detach()[:, :rank] for part in (self.A, self.B, self.C))
        return self.like(*(part.to(device or self.device) for part in parts))

    def resized(self, size: Size) -> "CP":
        """Return the leading components as they are held, or zeros beside them."""
        return self.like(*(fitted(part.detach(), 1, _rank(size)) for part in (self.A, self.B, self.C)))

    def random(self, rank: int) -> "CP":
        """Return random components, in float32 or the weight's dtype, to time what they do."""
        A, B, C = (torch.randn(length, min(rank, self.rank), device=self.device) for length in self.folded_shape)
        return type(self)(A / len(A), B / len(B), C, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, rank and dtype for the module's printout."""
        out, in_, taps = self.folded_shape
        return f"{out} x {in_} x {taps}, rank={self.rank} of {self.full_size}, dtype={self.dtype}"


def _rank(size: Size) -> int:
    assert isinstance(size, int)
    return size


def _three(parts: Parts) -> cp.Parts:
    A, B, C = parts
    return A, B, C


def _leading(A: Tensor, B: Tensor, C: Tensor, rank: int) -> cp.Parts:
    """Return the best of the truncations to at most a rank, with components of zero behind it."""
    errors = cp.truncation_errors(A, B, C)[: rank + 1]
    kept = fitted(C[:, :rank].clone(), 1, rank)
    kept[:, int(errors.argmin()) :] = 0
    return fitted(A, 1, rank), fitted(B, 1, rank), kept


def _falling(errors: Tensor) -> Tensor:
    return errors.cummin(0).values


def _unit(part: Tensor) -> Tensor:
    part = part.detach().double()
    norms: Tensor = part.norm(dim=0).clamp_min(torch.finfo(part.dtype).tiny)
    return part / norms
