"""`Form`: how ONE weight is held. A form has rungs, the sizes it can be cut to; only the form can read a size."""

from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any, ClassVar, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError, RankError
from spectrim.forms.arithmetic import Computed
from spectrim.forms.fingerprint import fingerprint
from spectrim.linalg.gram import Metric

Size = int | tuple[int, ...]
"""A rank, or several of them: `Tucker2` has ``(out, in)`` ranks."""

Choose = Callable[[Tensor], int]
"""Chooses how many columns to keep along one axis of the size, from the spectrum there, ``(rank,)``, descending."""

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


class Form(Computed):
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

    is_matrix: ClassVar[bool] = True
    """Whether the folded weight is a matrix that multiplies the rows of a layer's input, and the form its ``U diag(S) Vh``."""

    called: ClassVar[str] = "a product of two matrices"
    """What errors call it."""

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

    # What a form answers

    @property
    def rank(self) -> int:
        """The rung of the present size, and the number of rungs."""
        raise NotImplementedError

    @property
    def size(self) -> Size:
        """The present size."""
        return self.size_of(self.rank)

    @classmethod
    def full_size_of(cls, folded: Tensor) -> Size:
        """Return the largest size of a folded weight."""
        raise NotImplementedError

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "Form":
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        raise NotImplementedError

    @property
    def full_size(self) -> Size:
        """The largest size that the weight's shape allows."""
        raise NotImplementedError

    @property
    def full_rank(self) -> int:
        """The rung of the largest size."""
        return self.rung_of(self.full_size)

    def path(self) -> tuple[tuple[int, ...], ...]:
        """Return the size at each rung."""
        raise NotImplementedError

    def size_of(self, rung: int) -> Size:
        """Return the size of a rung in ``[1, rank]``."""
        return rung

    def rung_of(self, size: Size) -> int:
        """Return the number of the rung at which a size, or one as large, is reached."""
        assert isinstance(size, int)
        return size

    def checked(self, name: str, size: Any) -> Size:
        """Return a size as this form reads it; a single number stands for that number along every axis, at most what is held there.

        Args:
            name: of the weight, for the error.
            size: as a caller gave it.

        Raises:
            RankError: for one below 1 or above the present size.
        """
        raise NotImplementedError

    def count(self, size: Size) -> int:
        """Return how many numbers one block holds at a size."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one block of the folded weight."""
        raise NotImplementedError

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """Shape of `matrix`."""
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        """Number of blocks: the groups of a convolution, else 1."""
        return 1

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of each tensor: ``(blocks,)`` for a grouped convolution, else none."""
        return ()

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the weight."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Compose the folded weight in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        raise NotImplementedError

    @staticmethod
    def composed(*parts: Tensor) -> Tensor:
        """Return the weight as a matrix, ``(..., out, in)``, from parts in the order of the parameters, in their dtype."""
        raise NotImplementedError

    def chain(self) -> tuple[Tensor, ...]:
        """Return the folded kernels of the small operations that replace the weight, as they are applied, in the weight's dtype."""
        raise NotImplementedError

    def written(self) -> tuple[Tensor, ...]:
        """Return `chain` with equal norms, detached: what `merge` writes."""
        raise NotImplementedError

    def in_order(self: Self) -> Self:
        """Return the same weight at the same size, decomposed: orthonormal sides, values descending."""
        return self.cut_to(self.size)

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the spectrum along each axis of the size, descending, in float64; blocks pooled."""
        raise NotImplementedError

    def spectrum(self) -> Tensor:
        """Return by rung the root of the energy that it adds, ``(rank,)``, float64; of an SVD the singular values."""
        return (-self.tail().diff()).clamp(min=0).sqrt()

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the squared error at every rung, from none at all on: ``(rank + 1,)``, float64; by the metrics of `cut`."""
        raise NotImplementedError

    def cut_to(self: Self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> Self:
        """Return a new form of a size, the nearest in ``||L^1/2 (W - W_r) R^1/2||``; this one stays as it is.

        Args:
            size: at most the present one.
            left: metric of the outputs, ``(out, out)``; none when omitted.
            right: metric of the inputs, ``(in, in)``.
        """
        raise NotImplementedError

    def cut_macs(self, size: Size) -> float:
        """Return about how many multiply-accumulates `cut_to` takes where it iterates; 0 where decompositions do."""
        return 0.0

    def cut(self: Self, choose: Choose, left: Tensor | None = None, right: Metric | None = None) -> Self:
        """Return a new form, cut along each axis of the size to what is chosen from the spectrum there; otherwise as `cut_to`."""
        raise NotImplementedError

    def first(self: Self, rank: int, *, device: torch.device | str | None = None) -> Self:
        """Return copies of the leading parts as they are held, for their sizes; nothing is made exact.

        Args:
            rank: the rung, at most.
            device: of the copies; that of this form when omitted.
        """
        raise NotImplementedError

    def resized(self: Self, size: Size) -> Self:
        """Return copies of the parts as they are held at another size: the leading entries, zeros where there are fewer."""
        raise NotImplementedError

    def random(self: Self, rank: int) -> Self:
        """Return random values of this weight's shape at another rung, to time what they do."""
        raise NotImplementedError

    def like(self: Self, *parts: Tensor, exact: bool = False) -> Self:
        """Return a new form with the dtype, training mode and `requires_grad` of this one; arguments as for the class."""
        made: Any = type(self)
        new = made(*parts, dtype=self.dtype, exact=exact)
        for mine, theirs in zip(new._parameters.values(), self._parameters.values(), strict=True):
            mine.requires_grad_(theirs is not None and theirs.requires_grad)
        return new if new.training == self.training else new.train(self.training)  # type: ignore[no-any-return]

    def sides(self) -> tuple[Tensor, ...]:
        """Return the parameters whose columns are orthonormal, ``(..., rows, columns)``: what orthogonality penalties see."""
        raise NotImplementedError

    @torch.no_grad()
    def retract_(self) -> None:
        """Move `sides` toward orthonormal columns; other parts take over what they lose, where they can (`linalg.retracted`)."""
        for side in self.sides():
            side.copy_(linalg.retracted(side))

    def values(self) -> tuple[Tensor, ...]:
        """Return what sparsity penalties see: a signed or non-negative value for each column that can be cut, differentiable."""
        raise NotImplementedError

    def tail_share(self, size: Size) -> Tensor:
        """Return the share of the energy that a cut to a size discards, in [0, 1], differentiable; as the parts are held."""
        raise NotImplementedError

    def half_squared_norm(self) -> Tensor:
        """Return ``1/2 ||W||_F^2``, differentiable."""
        return 0.5 * self.product().float().square().sum()

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients are the slopes of a calibration."""
        raise NotImplementedError

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return what the loss gains to first order at every rung, from none at all on: ``(rank + 1,)``, float64, never rising.

        Args:
            slopes: gradients of the loss with respect to the one of `slope_parameters`.
        """
        raise NotImplementedError

    def truncated_parts(self, rank: int) -> tuple[Tensor, ...]:
        """Return parts of the present shapes that hold the weight cut to a rung; 0 for a weight of zeros."""
        raise NotImplementedError

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the parameters that hold a dense folded weight at the present size, by name; None where that is too small for it."""
        raise NotImplementedError

    def size_of_parts(self, stored: Mapping[str, Any]) -> Size | None:
        """Return the size that stored parameters of such a form have; None where they are of another."""
        raise NotImplementedError

    def turns(self, new: "Form") -> dict[str, dict[int, Tensor]]:
        """Return the matrices by which moments of gradients follow a cut: by parameter and axis of it, float64."""
        raise NotImplementedError

    # What all share

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

    def matrix(self) -> Tensor:
        """Compose the folded weight in its dtype."""
        return self.product().to(self.dtype)

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
            narrow = tensor is not self._dtype and moved.dtype.itemsize < 4
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
