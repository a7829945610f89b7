"""`Contract`: what a form answers, one method each for sizes, prices, cuts, training and storage."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.forms.arithmetic import Computed
from spectrim.linalg.gram import Metric

Size = int | tuple[int, ...]
"""A rank, or several of them: `Tucker2` has ``(out, in)`` ranks."""

Choose = Callable[[Tensor], int]
"""Chooses how many columns to keep along one axis of the size, from the spectrum there, ``(rank,)``, descending."""

Self = TypeVar("Self", bound="Contract")


class Contract(Computed):
    """What each form answers about its weight, which `Form` then holds, copies and moves; see there for sizes and rungs."""

    is_matrix: ClassVar[bool] = True
    """Whether the folded weight is a matrix that multiplies the rows of a layer's input, and the form its ``U diag(S) Vh``."""

    called: ClassVar[str] = "a product of two matrices"
    """What errors call it."""

    splits: ClassVar[bool] = True
    """Whether the weight can be written as several operations."""

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
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "Contract":
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

    @property
    def plain_size(self) -> Size:
        """The present size without what pruning and rounding add to it: that of the operations."""
        return self.size

    def plain_of(self, size: Size) -> Size:
        """Return a size without what pruning and rounding add to it."""
        return size

    def coded_bits(self) -> float:
        """Return about how many bits the parts take in a coded file; those of floats, where nothing is on levels."""
        return 32.0 * self.count(self.size) * self.blocks

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

    def turns(self, new: Any) -> dict[str, dict[int, Tensor]]:
        """Return the matrices by which moments of gradients follow a cut: by parameter and axis of it, float64."""
        raise NotImplementedError
