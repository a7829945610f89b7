"""`Tucker2`: a kernel as channel bases around a core of all taps; run as 1x1, taps, 1x1."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError
from spectrim.forms.float16 import evened
from spectrim.forms.form import LOST, Form, Size, fitted
from spectrim.forms.kernel import Nested, several_ranks
from spectrim.linalg.gram import Metric
from spectrim.linalg.spectral import LEFT_FLOOR, metric_root
from spectrim.linalg.tucker import core_of, hooi, hosvd, nested_path

Pair = tuple[int, int]


class Tucker2(Nested):
    """One kernel ``(out, in, taps)`` as ``core x_1 A x_2 B``, a Tucker decomposition along the channel axes alone.

    A size is ``(r, s)``, the ranks of the outputs and of the inputs. The path of sizes is nested: from ``(1, 1)`` on, the next rung has one
    more of the two, whichever holds more energy for each number that is stored. It is chosen once, when it is first asked for.

    Attributes:
        A: ``(out, r)``, orthonormal columns where it is exact.
        core: ``(r, s, taps)``.
        B: ``(in, s)``, orthonormal columns where it is exact.

    Source: Kim et al., arXiv 1511.06530, section 3.1; the bases by HOSVD and HOOI, see `linalg.tucker`.
    Deviation: ranks come from the budget, not from variational Bayes. The distortion of a rung is that of the truncated HOSVD; its cut is
    improved by HOOI, so that the squared error is at most the distortion.
    """

    is_matrix: ClassVar[bool] = False
    called: ClassVar[str] = "a Tucker form"
    A: nn.Parameter
    core: nn.Parameter
    B: nn.Parameter
    operations = ("B", "core", "A")

    def __init__(
        self, A: Tensor, core: Tensor, B: Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False
    ) -> None:
        """Copy existing tensors.

        Args:
            A: ``(out, r)``.
            core: ``(r, s, taps)``.
            B: ``(in, s)``.
            dtype: the weight's dtype; `A`'s when omitted.
            requires_grad: False for a frozen layer.
            exact: whether these are a higher-order SVD: nothing is decomposed again until they change.
        """
        super().__init__({"A": A, "core": core, "B": B}, dtype=dtype or A.dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None

    @classmethod
    def of(
        cls, weight: Tensor, folded: Tensor, choose: Callable[[Tensor], int] | None = None, decompose: Any = None, name: str = ""
    ) -> "Tucker2":
        """Decompose `folded`, ``(out, in, taps)``, the folded form of `weight`.

        Args:
            weight: gives dtype, device and `requires_grad`.
            folded: in any dtype.
            choose: takes the spectrum along one channel axis, returns the rank to keep there; all when omitted.
            decompose: of no effect.
            name: of the weight, for errors.

        Raises:
            LayerError: for parts that are not finite in the dtype they are kept in.
        """
        full = cls.full_size_of(folded)
        parts = hosvd(folded.detach(), full)
        made = cls(*parts, dtype=weight.dtype, requires_grad=weight.requires_grad, exact=True)
        if not all(bool(torch.isfinite(part).all()) for part in made.parameters()):
            raise LayerError(name or "weight", "its core is not finite", hint="load a sound checkpoint, or leave the layer out with where=")
        return made if choose is None else made.cut(choose)

    @classmethod
    def full_size_of(cls, folded: Tensor) -> Pair:
        """Return ``(min(out, in taps), min(in, out taps))``."""
        out, in_, taps = folded.shape
        return min(out, in_ * taps), min(in_, out * taps)

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "Tucker2":
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        (r, s), (out, in_, taps) = _pair(size), folded.shape
        zeros = (torch.zeros(shape, device=weight.device) for shape in ((out, r), (r, s, taps), (in_, s)))
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    # Sizes

    @property
    def size(self) -> Pair:
        """``(r, s)``."""
        return self.core.shape[0], self.core.shape[1]

    @property
    def rank(self) -> int:
        """The rung of the size: ``r + s - 1``."""
        return sum(self.size) - 1

    @property
    def full_size(self) -> Pair:
        """The largest size that the shape allows."""
        (out, in_), taps = self.shape, self.core.shape[2]
        return min(out, in_ * taps), min(in_, out * taps)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.A.shape[0], self.B.shape[0]

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """``(out, in, taps)``."""
        return (*self.shape, self.core.shape[2])

    def nested_path(self) -> tuple[Pair, ...]:
        """Return the sizes from ``(1, 1)`` to the present one, whose rungs are ``r + s - 1``."""
        energy = torch.ones(self.size) if self.core.is_meta else self.parts_in_order()[1].square().sum(-1)
        return nested_path(energy, *self.folded_shape)

    def checked(self, name: str, size: Any) -> Pair:
        """Return ``(r, s)``; a number stands for both, at most what is held.

        Raises:
            RankError: for one below 1 or above the present size.
        """
        return _pair(several_ranks(self, name, size))

    def count(self, size: Size) -> int:
        """``out r + taps r s + in s``."""
        (r, s), (out, in_) = _pair(size), self.shape
        return out * r + int(self.core.shape[2]) * r * s + in_ * s

    # The weight

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the kernel: the outputs first."""
        (r, s), (out, in_), taps = self.size, self.shape, self.core.shape[2]
        return int(taps * (out * r * s + out * s * in_))

    def product(self) -> Tensor:
        """Compose ``(out, in, taps)`` in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        (r, s), (out, in_, taps) = self.size, self.folded_shape
        rows = (self.A @ self.core.transpose(1, 2).reshape(r, taps * s)).reshape(out * taps, s)
        product = (rows @ self.B.mT.to(rows.dtype)).reshape(out, taps, in_).transpose(1, 2)
        half = not product.is_meta and torch.is_autocast_enabled(product.device.type)
        return product if half else product.to(self.dtype)

    @staticmethod
    def composed(*parts: Tensor) -> Tensor:
        """Return the kernel as ``(out, in taps)`` in the dtype of the parts."""
        A, core, B = parts
        with torch.autocast(A.device.type, enabled=False):
            return torch.einsum("rst,or,is->oit", core, A, B).flatten(1)

    def chain(self) -> tuple[Tensor, ...]:
        """Return ``B^T (s, in)``, the core ``(r, s, taps)`` and ``A (out, r)`` in the weight's dtype, even in float16."""
        core, B = evened(self.core.mT, self.B, self.dtype, across=(0, 1))
        return B.mT.to(self.dtype), core.mT.to(self.dtype), self.A.to(self.dtype)

    @torch.no_grad()
    def written(self) -> tuple[Tensor, ...]:
        """Return `chain` with equal Frobenius norms, detached."""
        parts = [self.B.mT, self.core, self.A]
        norms = [float(part.norm()) for part in parts] if not self.core.is_meta else [1.0] * 3
        mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
        scales = [mean / norm for norm in norms] if mean > 0 else [1.0] * 3
        return tuple((part * scale).to(self.dtype) for part, scale in zip(parts, scales, strict=True))

    @torch.no_grad()
    def parts_in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the higher-order SVD of the kernel at the present size, in float64; nothing is computed where it is at hand."""
        A, core, B = (part.detach().double() for part in (self.A, self.core, self.B))
        if self.exact:
            return A, core, B
        (QA, RA), (QB, RB) = torch.linalg.qr(A), torch.linalg.qr(B)
        P, core, Q = hosvd(core_of(core, RA.mT, RB.mT), self.size)
        return QA @ P, core, QB @ Q

    def _weighted(self, left: Tensor | None, right: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the core in the metrics, and the bases by which a basis of it becomes one of the kernel."""
        A, core, B = self.parts_in_order()
        (RA, back_A), (RB, back_B) = metric_root(A, left, LEFT_FLOOR), metric_root(B, right, LEFT_FLOOR)
        return core_of(core, RA.mT, RB.mT), A @ back_A, B @ back_B

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the norms of the core's slices along each channel axis, descending: the spectra of both unfoldings."""
        core = self.parts_in_order()[1]
        return core.square().sum((1, 2)).sqrt(), core.square().sum((0, 2)).sqrt()

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the energy outside each size of the path, from ``(0, 0)`` on."""
        plain = left is None and right is None
        core = self.parts_in_order()[1] if plain else hosvd(self._weighted(left, right)[0], self.size)[1]
        return self._outside(core.square().sum(-1))

    def _outside(self, energy: Tensor) -> Tensor:
        """Return the sum of ``(r, s)`` entries outside each size of the path, never rising."""
        inside = energy.double().cumsum(0).cumsum(1)
        kept = torch.stack([inside.new_zeros(()), *(inside[r - 1, s - 1] for r, s in self.path())])
        return (inside[-1, -1] - kept).clamp(min=0).cummin(0).values

    def cut_to(self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> "Tucker2":
        """Cut to ``(r, s)``: the truncated HOSVD, improved by HOOI."""
        self.refuse_not_finite()
        pair = self.checked("", size)
        made = self.like(*(self.parts_in_order() if pair == self.size else self._cut_parts(pair, left, right)), exact=True)
        made._path = self.path()[: made.rank] if pair in self.path() else None
        return made

    def _cut_parts(self, pair: Pair, left: Tensor | None, right: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
        if left is None and right is None:
            A, core, B = self.parts_in_order()
            P, core, Q = hooi(core, pair)
            return A @ P, core, B @ Q
        weighted, back_A, back_B = self._weighted(left, right)
        P, core, Q = hooi(weighted, pair)
        (QA, RA), (QB, RB) = torch.linalg.qr(back_A @ P), torch.linalg.qr(back_B @ Q)
        turned_A, core, turned_B = hosvd(core_of(core, RA.mT, RB.mT), pair)
        return QA @ turned_A, core, QB @ turned_B

    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> "Tucker2":
        """Cut to what is chosen from the spectrum along each channel axis."""
        outputs, inputs = self.spectra()
        return self.cut_to((choose(outputs), choose(inputs)), left, right)

    # Training

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the core."""
        return [self.core]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B``."""
        return self.A, self.B

    @torch.no_grad()
    def retract_(self) -> None:
        """Move both factors toward orthonormal columns, in place; the core takes over what they lose."""
        for side, equation in zip(self.sides(), ("ab,bst->ast", "cd,rdt->rct"), strict=True):
            made = linalg.retracted(side)
            taken = torch.linalg.lstsq(made, side).solution
            self.core.copy_(torch.einsum(equation, taken, self.core))
            side.copy_(made)

    def values(self) -> tuple[Tensor, ...]:
        """Return the norms of the core's slices along each channel axis, as they are held."""
        squares = self.core.square()
        return tuple((sums + torch.finfo(sums.dtype).tiny).sqrt() for sums in (squares.sum((1, 2)), squares.sum((0, 2))))

    def tail_share(self, size: Size) -> Tensor:
        """Return the share of the core's energy outside a size; the whole energy is treated as a constant."""
        r, s = _pair(size)
        inside = torch.zeros(self.size, dtype=torch.bool, device=self.core.device)
        inside[:r, :s] = True
        outside = self.core.square().sum(-1).masked_fill(inside, 0.0).sum()
        return outside / self.core.detach().square().sum().clamp_min(torch.finfo(self.core.dtype).tiny)

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return the sum of ``|core dL/dcore|`` outside each size of the path, from ``(0, 0)`` on."""
        return self._outside((slopes.to(self.core) * self.core.detach()).abs().sum(-1))

    def truncated_parts(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return parts of the present shapes whose core is zero outside the size of a rung."""
        A, core, B = self.parts_in_order()
        r, s = self.size_of(rank) if rank else (0, 0)
        kept = torch.zeros_like(core)
        kept[:r, :s] = core[:r, :s]
        return A, kept, B

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return by parameter and axis the matrices that take moments of gradients through a cut."""
        P, Q = (getattr(self, side).detach().double().mT @ getattr(new, side).detach().double() for side in "AB")
        return {"A": {1: P}, "core": {0: P, 1: Q}, "B": {1: Q}}

    # Storage

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the parts of a dense kernel at the present size; None where values beyond rounding would be lost."""
        A, core, B = hooi(weight, self.size)
        whole, kept = float(weight.double().square().sum()), float(core.square().sum())
        if whole - kept > LOST**2 * whole + 1e-12 * whole:
            return None
        return {"A": A.to(self.A), "core": core.to(self.core), "B": B.to(self.B)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> Pair | None:
        """Return the size of stored parts; None where they are none of this kernel."""
        core, most = stored.get("core"), self.full_size
        if not isinstance(core, Tensor) or core.dim() != 3 or core.shape[2] != self.core.shape[2]:
            return None
        size = (core.shape[0], core.shape[1])
        return size if all(1 <= rank <= limit for rank, limit in zip(size, most, strict=True)) else None

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "Tucker2":
        """Return copies of the leading parts at a rung, at most the present one."""
        r, s = self.size_of(min(rank, self.rank))
        made = self.like(*(part.detach().to(device or self.device) for part in (self.A[:, :r], self.core[:r, :s], self.B[:, :s])))
        made._path = self.path()[: made.rank]
        return made

    def resized(self, size: Size) -> "Tucker2":
        """Return the leading entries as they are held, or zeros beside them."""
        (r, s), A, core, B = _pair(size), self.A.detach(), self.core.detach(), self.B.detach()
        return self.like(fitted(A, 1, r), fitted(fitted(core, 0, r), 1, s), fitted(B, 1, s))

    def random(self, rank: int) -> "Tucker2":
        """Return random parts at a rung, in float32 or the weight's dtype, to time what they do."""
        (r, s), (out, in_, taps) = self.size_of(min(rank, self.rank)), self.folded_shape
        A, core, B = (torch.randn(shape, device=self.device) for shape in ((out, r), (r, s, taps), (in_, s)))
        return type(self)(A / out, core, B / in_, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, size and dtype for the module's printout."""
        out, in_, taps = self.folded_shape
        return f"{out} x {in_} x {taps}, size={self.size} of {self.full_size}, dtype={self.dtype}"


def _pair(size: Size) -> Pair:
    assert isinstance(size, tuple)
    r, s = size
    return r, s
