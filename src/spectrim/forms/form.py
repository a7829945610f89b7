"""`Form`: how ONE weight is held. A form has rungs, the sizes it can be cut to; only the form can read a size."""

from collections.abc import Callable, Iterable
from operator import index
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError, RankError
from spectrim.forms.contract import Contract, Size
from spectrim.forms.fingerprint import fingerprint
from spectrim.forms.offloading import Offloading

__all__ = ["LOST", "Form", "Size", "fitted", "one_rank", "ranks_in", "rung_of", "shown", "stored", "whole"]

LOST = 1e-5
"""Values of a dense weight that is loaded, relative to the largest, which a smaller size may drop: rounding."""

Self = TypeVar("Self", bound="Form")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, gathered from all processes when it is sharded; gradients go back to the shards.

    All processes have to call it together when it is sharded. Its gradient has to be the same on each of them.
    """
    shard: Any = tensor
    return shard.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the parts of a weight of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Form(Offloading, Contract):
    """Holds one weight, and is the only holder of its tensors.

    A weight is folded first (`linalg.fold`): `shape` is that of its rows and columns. A half-precision weight keeps its parameters in
    float32: orthonormal columns cannot be held in half precision, and a product of rounded factors is no longer the weight. What leaves a
    form has the weight's dtype.

    Sizes are on a path, from rung 1 to the present size, rung `rank`; along it every price rises and the distortion falls. Budgets count
    rungs, users see sizes; for an SVD rung, rank and size are one number.

    Args:
        parts: the tensors to hold, by name; they are copied.
        dtype: the weight's dtype.
        requires_grad: False for a frozen layer.
    """

    _dtype: Tensor

    def __init__(self, parts: dict[str, Tensor], *, dtype: torch.dtype, requires_grad: bool = True) -> None:
        super().__init__()
        kept = stored(dtype)
        for name, tensor in parts.items():
            own = tensor.detach().to(kept, copy=True, memory_format=torch.contiguous_format)  # a slice would keep its whole storage
            self._parameters[name] = nn.Parameter(own, requires_grad=requires_grad)
        device = next(iter(parts.values())).device
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._decomposed: tuple[float, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight; follows ``.to()``, ``.half()`` and friends."""
        return self._dtype.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self._parameters.values())).device  # type: ignore[union-attr]

    @property
    def trained(self) -> bool:
        """Whether the values are trained."""
        return self.slope_parameters()[0].requires_grad

    def like(self: Self, *parts: Tensor, exact: bool = False) -> Self:
        """Return a new form with the dtype, training mode and `requires_grad` of this one; arguments as for the class."""
        made: Any = type(self)
        new = made(*parts, dtype=self.dtype, exact=exact)
        for mine, theirs in zip(new._parameters.values(), self._parameters.values(), strict=True):
            mine.requires_grad_(theirs is not None and theirs.requires_grad)
        return new if new.training == self.training else new.train(self.training)  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """Compose the folded weight in its dtype."""
        return self.product().to(self.dtype)

    def shown(self) -> tuple[Tensor, ...]:
        """Return the parts as they enter the weight: the parameters, where a form does not say otherwise."""
        return tuple(self.parameters(recurse=False))

    def _fingerprint(self) -> tuple[float, ...] | None:
        return fingerprint([parameter for parameter in self._parameters.values() if parameter is not None])

    @property
    def exact(self) -> bool:
        """Whether the parts are a decomposition, as they were made; False after a step, a load or a change by hand."""
        return self._decomposed is not None and self._decomposed == self._fingerprint()

    def copied(self: Self) -> Self:
        """Return a copy, which can be changed while this stays."""
        return self.like(*self.parameters(recurse=False))

    @torch.no_grad()
    def set_(self, *parts: Tensor) -> None:
        """Write other values into the parameters, in place and in their order; shapes may differ by axes of length one."""
        for parameter, value in zip(self.parameters(recurse=False), parts, strict=True):
            parameter.copy_(value.reshape(parameter.shape))

    def refuse_not_finite(self) -> None:
        """Raise a LayerError when a parameter holds values that are not finite."""
        for name, tensor in self.named_parameters(recurse=False):
            if not torch.isfinite(tensor).all():
                raise LayerError(name, "holds NaN or infinite values", hint="load the last good checkpoint")

    def become(self, other: "Form") -> None:
        """Take over the parameters of another form of the same weight, in place."""
        for name, parameter in other._parameters.items():
            setattr(self, name, parameter)
        self._decomposed = other._decomposed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow ``.to()``, ``.half()`` and friends, but keep parameters in float32 at least."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = tensor is not self._dtype and moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrow else moved

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def shown(size: Size) -> str:
    """Return a size as text: ``24``, or ``24 x 16``."""
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def rung_of(size: Size | list[int]) -> int:
    """Return the rung of a size on a nested path: one more column at each rung, from one along every axis on."""
    return size if isinstance(size, int) else sum(size) - len(size) + 1


def ranks_in(sizes: Iterable[Size]) -> list[int]:
    """Return every rank in sizes: one of an SVD, two of a Tucker form."""
    return [rank for size in sizes for rank in (size if isinstance(size, tuple) else (size,))]


def fitted(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return the first `size` entries along an axis, zeros where there are fewer."""
    kept = min(size, tensor.shape[axis])
    shape = list(tensor.shape)
    shape[axis] = size
    new = tensor.new_zeros(shape)
    new.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return new


def one_rank(form: Form, name: str, size: Any) -> int:
    """Return a single rank in ``[1, rank]``.

    Raises:
        RankError: for anything else.
    """
    if isinstance(size, bool) or not isinstance(size, SupportsIndex) or not 1 <= index(size) <= form.rank:
        raise RankError(name, got=size, out=form.shape[0], in_=form.shape[1], held=form.rank)
    return index(size)
