"""`Kernel` and `Nested`: what forms share that hold a kernel as a whole, and not a matrix of it."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from spectrim.errors import LayerError, RankError
from spectrim.forms.form import Form, Size, rung_of, stored
from spectrim.linalg.gram import Metric
from spectrim.linalg.spectral import LEFT_FLOOR, metric_root

Self = TypeVar("Self", bound="Kernel")
Own = TypeVar("Own", bound="Nested")


class Kernel(Form):
    """A kernel ``(out, in, taps...)`` as several parts, whose product is `compose`.

    A sub-class names its parts in `__init__` and adds sizes, `compose`, `decomposed`, `nearest`, `ends` and `with_ends`.
    """

    is_matrix: ClassVar[bool] = False

    @classmethod
    def of(
        cls: type[Self],
        weight: Tensor,
        folded: Tensor,
        choose: Callable[[Tensor], int] | None = None,
        decompose: Any = None,
        name: str = "",
    ) -> Self:
        """Decompose `folded`, ``(out, in, taps...)``, the folded form of `weight`.

        Args:
            weight: gives dtype, device and `requires_grad`.
            folded: in any dtype.
            choose: takes the spectrum along one axis of the size, returns the rank to keep there; all when omitted.
            decompose: of no effect.
            name: of the weight, for errors.

        Raises:
            LayerError: for parts that are not finite in the dtype they are kept in.
        """
        make: Any = cls
        parts = cls.decomposed(folded.detach(), cls.full_size_of(folded))
        made: Self = make(*parts, dtype=weight.dtype, requires_grad=weight.requires_grad, exact=True)
        if not all(bool(torch.isfinite(part).all()) for part in made.parameters()):
            problem = f"its parts are not finite in {stored(weight.dtype)}"
            raise LayerError(name or "weight", problem, hint="load a sound checkpoint, or leave the layer out with where=")
        return made if choose is None else made.cut(choose)

    @staticmethod
    def compose(*parts: Tensor) -> Tensor:
        """Return ``(out, in, taps...)`` in the dtype that is computed in."""
        raise NotImplementedError

    @classmethod
    def decomposed(cls, kernel: Tensor, size: Any) -> tuple[Tensor, ...]:
        """Return the parts of a kernel at a size, in order, in float64; exact at full size."""
        raise NotImplementedError

    def nearest(self, kernel: Tensor, size: Any, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return parts of a smaller size near to a kernel; no farther than the distortion of their rung.

        Args:
            kernel: ``(out, in, taps...)``, float64.
            size: smaller than the present one.
            held: parts at the present size that hold the kernel.
        """
        raise NotImplementedError

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the parts that meet outputs and inputs: ``(out, r)``, ``(in, s)``."""
        raise NotImplementedError

    @classmethod
    def with_ends(cls, parts: tuple[Tensor, ...], left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """Return parts whose ends are multiplied with matrices ``(out, p)`` and ``(in, q)``."""
        raise NotImplementedError

    def parts_in_order(self) -> tuple[Tensor, ...]:
        """Return the parts at the present size in order, in float64; nothing is computed where they are at hand."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Compose ``(out, in, taps...)`` in the dtype that is computed in: that of autocast where it is on, else the weight's."""
        product = self.compose(*self.shown())
        half = not product.is_meta and torch.is_autocast_enabled(product.device.type)
        return product if half else product.to(self.dtype)

    @classmethod
    def composed(cls, *parts: Tensor) -> Tensor:
        """Return the kernel as ``(out, in taps)`` in the dtype of the parts."""
        with torch.autocast(parts[0].device.type, enabled=False):
            return cls.compose(*parts).flatten(1)

    def held(self) -> tuple[Tensor, ...]:
        """Return the parts as they are held, detached, in float64."""
        return tuple(part.detach().double() for part in self.shown())

    @torch.no_grad()
    def written(self) -> tuple[Tensor, ...]:
        """Return `chain` with equal Frobenius norms, detached."""
        parts = [part.detach() for part in self.chain()]
        if parts[0].is_meta:
            return tuple(parts)
        norms = torch.stack([part.double().norm() for part in parts])
        mean = norms.log().mean().exp()
        scales = mean / norms if mean > 0 else torch.ones_like(norms)
        return tuple((part.double() * scale).to(part) for part, scale in zip(parts, scales, strict=True))

    def cut_to(self: Self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> Self:
        """Cut to a size; by the metrics of the outputs and inputs of a position where they are given."""
        self.refuse_not_finite()
        size, parts = self.checked("", size), self.parts_in_order()
        if size != self.size:
            parts = self._cut_parts(parts, size, left, right)
        return self.like(*parts, exact=True)

    def _cut_parts(self, held: tuple[Tensor, ...], size: Size, left: Tensor | None, right: Metric | None) -> tuple[Tensor, ...]:
        if left is None and right is None:
            return self.nearest(self.compose(*held), size, held)
        into, back = self._metrics(left, right)
        weighted = self.with_ends(held, *into)
        return self.ordered(self.with_ends(self.nearest(self.compose(*weighted), size, weighted), *back))

    @classmethod
    def ordered(cls, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return other parts of the same size and the same kernel, in order."""
        raise NotImplementedError

    def _metrics(self, left: Tensor | None, right: Metric | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the matrices that take the ends of the parts into the metrics, and those that take them back."""
        bases = [torch.linalg.qr(end.detach().double()).Q for end in self.ends()]
        roots = [metric_root(basis, metric, LEFT_FLOOR) for basis, metric in zip(bases, (left, right), strict=True)]
        into = [root @ basis.mT for basis, (root, _) in zip(bases, roots, strict=True)]
        back = [basis @ inverse for basis, (_, inverse) in zip(bases, roots, strict=True)]
        return (into[0], into[1]), (back[0], back[1])


class Nested(Form):
    """A form with several ranks, whose sizes are on one path: from ones on, each rung has one more column along one axis.

    The path is chosen once, when it is first asked for. A sub-class adds `nested_path`.
    """

    is_matrix: ClassVar[bool] = False
    _path: tuple[Any, ...] | None = None

    def nested_path(self) -> tuple[Any, ...]:
        """Choose the sizes from ones to the present one."""
        raise NotImplementedError

    def path(self) -> tuple[Any, ...]:
        """Return the sizes from ones to the present one."""
        if self._path is None:
            self._path = self.nested_path()
        return self._path

    def size_of(self, rung: int) -> Any:
        """Return a size of the path."""
        return self.path()[rung - 1]

    def rung_of(self, size: Size) -> int:
        """Return the rung of a size on the path, and of another with as many columns in all."""
        return rung_of(size)

    def like(self: Own, *parts: Tensor, exact: bool = False) -> Own:
        """Return a new form with the settings of this one, and its path where the size is the same."""
        made = super().like(*parts, exact=exact)
        made._path = self._path if made.size == self.size else None
        return made

    def become(self, other: Form) -> None:
        """Take over the parameters and the path of another form of the same kernel, in place."""
        super().become(other)
        self._path = getattr(other, "_path", None)


def several_ranks(form: Form, name: str, size: Any) -> tuple[int, ...]:
    """Return a size with a rank along each axis; a number stands for all, at most what is held.

    Raises:
        RankError: for one below 1 or above the present size.
    """
    held: Any = form.size
    if isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= max(held):
        return tuple(min(size, most) for most in held)
    ranks = tuple(size) if isinstance(size, tuple | list) else ()
    whole = len(ranks) == len(held) and all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
    if not whole or not all(1 <= rank <= most for rank, most in zip(ranks, held, strict=True)):
        raise RankError(name, got=size, out=form.shape[0], in_=form.shape[1], held=held)
    return ranks
