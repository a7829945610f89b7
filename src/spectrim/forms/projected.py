"""`Projected`: a form of a form, whose matrices have zeros or lie on levels; its cuts, and what training and storage ask."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms.dense import lies_near
from spectrim.forms.form import Size
from spectrim.forms.parts import Own, Parts, settled
from spectrim.forms.svd import Factors
from spectrim.forms.values import EXACT, bits_of_parts, effects, pruned, steps_of
from spectrim.linalg.gram import Metric

Self = TypeVar("Self", bound="Projected")


class Projected(Parts):
    """A form whose matrices have zeros, lie on levels, or both; its class is made from the class of that form.

    Parameters are what learns. A part that is read, and so the weight, is its projection: zeros stay zero, as their gradient is zero; what
    is rounded gets the gradient of its level (straight through), with steps that stay as they are between cuts. Vectors are not projected.
    Of an SVD the singular values are moved into both factors first and fixed to 1: orthonormal columns have no zeros and no levels.

    Its size is that of the form, if it has several, and then the number of entries that are kept, the bits, or both. Rungs are along the
    last of these; `cut_to` takes any size.
    """

    @torch.no_grad()
    def cut_to(self: Self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> Self:
        """Return a form of a size: the form is cut first, by the metrics, then pruned, then rounded to the nearest levels."""
        self.refuse_not_finite()
        size = self.checked("", size)
        if size == self.size:
            return self.like(*self.parameters(recurse=False), exact=self.exact)
        plain, held = self._split(size)
        parts = [part.detach() for part in self.shown()]
        if plain != self._twin.size:
            parts = [part.detach() for part in settled(self.bare().cut_to(plain, left, right)).parameters(recurse=False)]
        return self._held_at(parts, held)

    def cut(self: Self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> Self:
        """Return a form that is cut to what is chosen from its spectrum, in as many bits, and with the same share of entries."""
        cut = settled(self.bare().cut(choose, left, right))
        parts = [part.detach() for part in cut.parameters(recurse=False)]
        share = self._held["kept"] / self._entries
        total = sum(part.numel() for name, part in zip(self._parameters, parts, strict=True) if name in self._projected)
        return self._held_at(parts, {"kept": max(1, round(share * total)), "bits": self._held["bits"]})

    def _held_at(self: Self, parts: list[Tensor], held: Own) -> Self:
        """Return a form of other parts that are pruned and rounded."""
        names = list(self._parameters)
        values = dict(zip(names, parts, strict=True))
        matrices = {name: values[name] for name in self._projected}
        few = len(matrices) > 1 and held["kept"] < sum(part.numel() for part in matrices.values())
        scales = effects(self._plain.composed, parts) if few else [1.0] * len(parts)
        values |= pruned(matrices, held["kept"], dict(zip(names, scales, strict=True)))
        made = self.like(*values.values(), exact=False)
        steps = steps_of({name: values[name] for name in self._projected}, held["bits"]) if "bits" in self.own else {}
        made._take(held, {f"step_{name}": step for name, step in steps.items()})
        return made

    @torch.no_grad()
    def ladder(self, left: Tensor | None = None, right: Metric | None = None) -> tuple[Tensor, tuple[float, ...]]:
        """Return the squared error at every rung, from none at all on, and the bits that each takes when it is coded.

        Errors are those of the cuts themselves. Kept until the parts change.
        """
        key = (self._fingerprint(), self.size, id(left), id(right))
        found = self.__dict__.get("_ladder")
        if found is None or found[0] != key or key[0] is None:
            whole, errors, bits = self.product().double(), [], []
            for size in self.path():
                cut = self.cut_to(size)
                errors.append(_energy(cut.product().double() - whole, left, right) if size != self.size else 0.0)
                bits.append(cut.coded_bits())
            tail = torch.tensor([max(_energy(whole, left, right), *errors), *errors], dtype=torch.float64, device=self.device)
            found = key, (tail, tuple(bits)), (left, right)
            self.__dict__["_ladder"] = found
        return found[1]

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the squared error of the cut to every rung, from none at all on; it never rises."""
        return self.ladder(left, right)[0].cummin(0).values

    def coded_bits(self) -> float:
        """Return the bits that the parts take when they are coded: values by their entropy, and positions of zeros."""
        parts = {name: getattr(self, name).detach() for name in self._projected}
        steps: dict[str, Any] = {name: self._buffers[f"step_{name}"] for name in parts} if self._held["bits"] < EXACT else {}
        return bits_of_parts(parts, steps)

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the spectra of the form."""
        spectra: tuple[Tensor, ...] = self.bare().spectra()
        return spectra

    def spectrum(self) -> Tensor:
        """Return by rung the root of the energy that it adds."""
        return (-self.tail().diff()).clamp(min=0).sqrt()

    def in_order(self: Self) -> Self:
        """Return a copy: the parts of what is pruned or rounded have no other order."""
        return self.like(*self.parameters(recurse=False), exact=self.exact)

    def first(self: Self, rank: int, *, device: torch.device | str | None = None) -> Self:
        """Return a copy: all rungs have the same shapes."""
        return self.like(*[part.detach().to(device or self.device) for part in self.parameters(recurse=False)])

    def resized(self: Self, size: Size) -> Self:
        """Return copies of the parts as they are shown at another size."""
        plain, held = self._split(size)
        bare = self.bare()
        return self._held_at([part.detach() for part in bare.resized(plain).parameters(recurse=False)], held)

    def random(self, rank: int) -> Any:
        """Return random values of the form itself, to time what they do."""
        return self.bare().random(self._twin.rank)

    # Training

    def sides(self) -> Any:
        """Return nothing: no columns are orthonormal."""
        return ()

    def values(self) -> Any:
        """Return nothing: no column can be cut."""
        return ()

    def tail_share(self, size: Size) -> Tensor:
        """Return the share of the energy by which the weight is away from its cut, which is treated as a constant."""
        weight = self.product()
        if size == self.size:
            return weight.new_zeros(())
        cut = self.cut_to(size).product().detach()
        return (weight - cut).square().sum() / weight.detach().square().sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the largest part."""
        return [max(map(self.learned, self._projected), key=lambda part: part.numel())]

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Return ``sum |dP dL/dP|`` at every rung, for the change ``dP`` of the largest part; it never rises."""
        name = next(name for name in self._projected if self.learned(name) is self.slope_parameters()[0])
        held = getattr(self, name).detach()
        cuts = [torch.zeros_like(held), *(getattr(self.cut_to(size), name).detach() for size in self.path())]
        rises = torch.stack([(slopes.to(held) * (cut - held)).abs().double().sum() for cut in cuts])
        return rises.cummin(0).values

    def truncated_parts(self, rank: int) -> tuple[Tensor, ...]:
        """Return parts of the present shapes that hold the weight cut to a rung."""
        if rank == 0:
            return tuple([torch.zeros_like(part) for part in self.parameters(recurse=False)])
        return tuple([part.detach() for part in self.cut_to(self.size_of(rank)).shown()])

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the parts that hold a dense weight; None where they would have other zeros, or other levels."""
        if lies_near(weight, self.product().detach()):
            return {name: part.detach() for name, part in zip(self._parameters, self.shown(), strict=True)}
        parts = self.bare().parts_of(weight)
        if parts is None or issubclass(self._plain, Factors):
            return None
        made = self.like(*parts.values())
        few = sum(int(part.count_nonzero()) for part in parts.values()) <= self._held["kept"]
        return parts if few and lies_near(weight, made.product().detach()) else None

    def size_of_parts(self, stored: Mapping[str, Any]) -> Size | None:
        """Return the size of stored parts, by their shapes, their zeros and their values; None where they are of another weight."""
        plain = self._twin.size_of_parts(stored)
        parts = [stored.get(name) for name in self._projected]
        if plain is None or not all(isinstance(part, Tensor) for part in parts):
            return None
        kept, bits = sum(int(part.count_nonzero()) for part in parts if part is not None), stored.get("bits")
        if "bits" in self.own and not isinstance(bits, Tensor):
            return None
        return self._joined(plain, {"kept": kept, "bits": EXACT if bits is None else int(bits)})

    def turns(self, new: Any) -> dict[str, dict[int, Tensor]]:
        """Return that moments stay; raise a LayerError where the form itself was cut."""
        if new._twin.size != self._twin.size:
            raise LayerError(type(self).__name__, "moments of rounded or pruned parts do not follow a cut of ranks", hint="cut ranks first")
        return {name: {} for name in self._parameters}

    def extra_repr(self) -> str:
        """Shape, size and dtype for the module's printout."""
        held = ", ".join(f"{name}={self._held[name]}" for name in self.own)
        return f"{' x '.join(map(str, self.folded_shape))}, {held}, dtype={self.dtype}"


def _energy(change: Tensor, left: Tensor | None, right: Any) -> float:
    """Return the squared norm of a change of the folded weight, in metrics of its outputs and inputs."""
    seen = change
    if left is not None or right is not None:
        moved = change.movedim(-1, 0) if left is not None and change.dim() == left.dim() + 1 else change
        seen = moved if left is None else left.to(moved) @ moved
        seen = seen if right is None else seen @ torch.as_tensor(right).to(seen)
        change = moved
    return float((seen * change).sum())
