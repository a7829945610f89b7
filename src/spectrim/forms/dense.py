"""`Dense`: a weight as it is, in one part; what `Sparse` and `Rounded` hold where a weight is not decomposed."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms.form import LOST, Form, Size, one_rank, stored
from spectrim.linalg.gram import Metric


class Dense(Form):
    """One weight as a matrix ``(out, in)``, or several equal blocks of it; of one size alone.

    Attributes:
        W: the folded weight, ``(out, in)`` or ``(blocks, out, in)``.
    """

    is_matrix: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    called: ClassVar[str] = "a dense weight"
    W: nn.Parameter

    def __init__(self, W: Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False) -> None:
        """Copy an existing tensor.

        Args:
            W: ``(..., out, in)``.
            dtype: the weight's dtype; `W`'s when omitted.
            requires_grad: False for a frozen layer.
            exact: of no effect but on `exact`.
        """
        super().__init__({"W": W}, dtype=dtype or W.dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None

    @classmethod
    def of(
        cls, weight: Tensor, folded: Tensor, choose: Callable[[Tensor], int] | None = None, decompose: Any = None, name: str = ""
    ) -> "Dense":
        """Hold `folded`, the folded form of `weight`.

        Args:
            weight: gives dtype, device and `requires_grad`.
            folded: in any dtype.
            choose: of no effect.
            decompose: of no effect.
            name: of the weight, for errors.

        Raises:
            LayerError: for a weight that is not finite.
        """
        made = cls(folded, dtype=weight.dtype, requires_grad=weight.requires_grad, exact=True)
        if not made.W.is_meta and not bool(torch.isfinite(made.W).all()):
            raise LayerError(name or "weight", f"is not finite in {stored(weight.dtype)}", hint="load a sound checkpoint")
        return made

    @classmethod
    def full_size_of(cls, folded: Tensor) -> int:
        """Return 1, the only size."""
        return 1

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "Dense":
        """Return zeros of the right shape, for loading a checkpoint into."""
        zeros = torch.zeros(folded.shape, device=weight.device)
        return cls(zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    @property
    def rank(self) -> int:
        """1: there is one rung."""
        return 1

    @property
    def full_size(self) -> int:
        """1."""
        return 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one block."""
        return self.W.shape[-2], self.W.shape[-1]

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """Shape of the folded weight."""
        return tuple(self.W.shape)

    @property
    def lead(self) -> tuple[int, ...]:
        """``(blocks,)`` for a grouped convolution, else none."""
        return tuple(self.W.shape[:-2])

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.W.shape[0] if self.W.dim() > 2 else 1

    def path(self) -> tuple[Any, ...]:
        """Return the only size."""
        return (1,)

    def checked(self, name: str, size: Any) -> int:
        """Return 1; raise a RankError for another size."""
        return one_rank(self, name, size)

    def count(self, size: Size) -> int:
        """``out in``."""
        out, in_ = self.shape
        return out * in_

    @property
    def compose_macs(self) -> int:
        """0: nothing is composed."""
        return 0

    def product(self) -> Tensor:
        """Return the weight in its dtype."""
        return self.W.to(self.dtype)

    @staticmethod
    def composed(*parts: Tensor) -> Tensor:
        """Return the weight as it is."""
        return parts[0]

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weight: the only operation."""
        return (self.product(),)

    def written(self) -> tuple[Tensor, ...]:
        """Return `chain`, detached."""
        return (self.product().detach(),)

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the norm of the weight."""
        return (self.W.detach().double().norm()[None],)

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the energy of the weight, then 0; in any metrics those of the plain energy."""
        return torch.stack([self.W.detach().double().square().sum(), self.W.new_zeros((), dtype=torch.float64)])

    def cut_to(self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> "Dense":
        """Return a copy."""
        self.refuse_not_finite()
        self.checked("", size)
        return self.like(self.W, exact=True)

    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> "Dense":
        """Return a copy: no rank is chosen."""
        return self.cut_to(1)

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "Dense":
        """Return a copy."""
        return self.like(self.W.detach().to(device or self.device))

    def resized(self, size: Size) -> "Dense":
        """Return a copy."""
        return self.like(self.W)

    def random(self, rank: int) -> "Dense":
        """Return random values, in float32 or the weight's dtype."""
        return type(self)(torch.randn(self.W.shape, device=self.device) / self.shape[1] ** 0.5, dtype=self.dtype)

    def sides(self) -> tuple[Tensor, ...]:
        """Return nothing: no columns are orthonormal."""
        return ()

    def values(self) -> tuple[Tensor, ...]:
        """Return nothing: no column can be cut."""
        return ()

    def tail_share(self, size: Size) -> Tensor:
        """Return 0: nothing is cut."""
        return self.W.new_zeros(())

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the weight."""
        return [self.W]

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return ``sum |W dL/dW|``, then 0."""
        rise = (slopes.to(self.W) * self.W.detach()).abs().double().sum()
        return torch.stack([rise, torch.zeros_like(rise)])

    def truncated_parts(self, rank: int) -> tuple[Tensor, ...]:
        """Return the weight, or zeros at rank 0."""
        return (self.W.detach().clone() if rank else torch.zeros_like(self.W),)

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the weight: it is held as it is."""
        return {"W": weight.detach().to(self.W)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> Size | None:
        """Return 1 for a weight of this shape, else None."""
        W = stored.get("W")
        return 1 if isinstance(W, Tensor) and tuple(W.shape) == self.folded_shape else None

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return that moments stay."""
        return {"W": {}}

    def extra_repr(self) -> str:
        """Shape and dtype for the module's printout."""
        return f"{' x '.join(map(str, self.folded_shape))}, dtype={self.dtype}"


def lies_near(weight: Tensor, held: Tensor) -> bool:
    """Whether a weight is another one up to rounding."""
    return bool((weight.double() - held.double()).norm() <= LOST * held.double().norm())
