"""`Parts`: the parts of a form that have zeros, or lie on levels; how they are held, shown and sized."""

from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from spectrim.errors import RankError
from spectrim.forms.dense import Dense
from spectrim.forms.derived import balance_
from spectrim.forms.form import Form, Size
from spectrim.forms.svd import Factors
from spectrim.forms.values import BITS, EXACT, counts_up_to, shown_part

Self = TypeVar("Self", bound="Parts")
Own = dict[str, int]


class Parts(Form):
    """A form whose parts are shown pruned or rounded: how they are held, and its sizes; `Projected` adds cuts and training."""

    is_matrix: ClassVar[bool] = False
    own: ClassVar[tuple[str, ...]] = ()
    _plain: ClassVar[Any] = Dense
    _held: Own

    def __init__(self, *parts: Tensor, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False) -> None:
        self._plain.__init__(self, *parts, dtype=dtype, requires_grad=requires_grad, exact=exact)
        self.__dict__["_held"] = {"kept": self._entries, "bits": EXACT}
        if "bits" in self.own:
            self.register_buffer("bits", torch.tensor(EXACT))
        for name in self._projected if "bits" in self.own else ():
            self.register_buffer(f"step_{name}", torch.zeros((), dtype=self.learned(name).dtype, device=self.device))

    @classmethod
    def over(cls, plain: Any) -> Any:
        """Return the class of this kind over the class of a form."""
        return class_over(cast(Hashable, cls), plain)

    @classmethod
    def around(cls: type[Self], form: Form) -> Self:
        """Return a form with the same weight that can be pruned and rounded; nothing is yet."""
        plain: Any = settled(form)
        made: Self = cls.over(type(plain))(*plain.parameters(recurse=False), dtype=form.dtype, exact=form.exact)
        for (name, mine), theirs in zip(made._parameters.items(), plain._parameters.values(), strict=True):
            fixed = isinstance(form, Factors) and name == "S"
            cast(nn.Parameter, mine).requires_grad_(bool(theirs.requires_grad) and not fixed)
        return made.train(form.training)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revived, (type(self).__mro__[1], self._plain), self.__dict__

    # What is shown of the parts

    @property
    def _projected(self) -> list[str]:
        vectors = ("S",) if issubclass(self._plain, Factors) else ()
        return [name for name in self._parameters if name not in vectors]

    @property
    def _entries(self) -> int:
        return sum(self.learned(name).numel() for name in self._projected)

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_parameters", {}).get(name)
        if part is None or "_held" not in self.__dict__ or name not in self._projected:
            return super().__getattr__(name)
        mask = part.detach() != 0 if self._held["kept"] < self._entries else None
        step = self._buffers[f"step_{name}"] if self._held["bits"] < EXACT else None
        return shown_part(part, mask, step, self._held["bits"])

    def learned(self, name: str) -> nn.Parameter:
        """Return a parameter itself, which optimizers move, and not what is shown of it."""
        part = self._parameters[name]
        assert part is not None
        return part

    def shown(self) -> tuple[Tensor, ...]:
        """Return the parts as they enter the weight, with their gradients."""
        return tuple([getattr(self, name) for name in self._parameters])

    def bare(self) -> Any:
        """Return the form itself, with the parts that are shown, detached."""
        made = self._plain(*[part.detach() for part in self.shown()], dtype=self.dtype, requires_grad=self.trained)
        return made.train(self.training)

    @property
    def _twin(self) -> Any:
        """The form itself without values, for its sizes."""
        shapes = tuple([part.shape for part in self._parameters.values() if part is not None])
        found = self.__dict__.get("_sized")
        if found is None or found[0] != shapes:
            found = shapes, self._plain(*[torch.empty(shape, device="meta") for shape in shapes], dtype=self.dtype)
            self.__dict__["_sized"] = found
        return found[1]

    def like(self: Self, *parts: Tensor, exact: bool = False) -> Self:
        """Return a new form with the settings of this one: its bits, its steps and how many entries it keeps."""
        new = super().like(*parts, exact=exact and not issubclass(self._plain, Factors))
        new._take(self._held, {name: step for name, step in self._buffers.items() if name.startswith("step_") and step is not None})
        return new

    def _take(self, held: Own, steps: Mapping[str, Tensor]) -> None:
        self.__dict__["_held"] = {"kept": min(held["kept"], self._entries), "bits": held["bits"]}
        for name, step in steps.items():
            self._buffers[name] = step.detach().clone().to(self.device)
        if "bits" in self.own:
            self._buffers["bits"] = torch.tensor(held["bits"])

    def become(self, other: Form) -> None:
        """Take over the parameters, the steps and the settings of another form of the same weight, in place."""
        super().become(other)
        if isinstance(other, Parts):
            self._take(other._held, {name: step for name, step in other._buffers.items() if name.startswith("step_") and step is not None})

    @property
    def exact(self) -> bool:
        """Whether the parts are a decomposition: nothing is rounded or pruned, and they are as they were made."""
        whole = self._held["bits"] == EXACT and self._held["kept"] == self._entries
        return whole and self._decomposed is not None and self._decomposed == self._fingerprint()

    # Sizes

    def _joined(self, plain: Size, held: Mapping[str, int]) -> Size:
        """Return a size from that of the form and what its parts keep."""
        own = tuple(held[name] for name in self.own)
        joined = (*(() if issubclass(self._plain, Dense) else plain if isinstance(plain, tuple) else (plain,)), *own)
        return joined if len(joined) > 1 else joined[0]

    def _split(self, size: Size) -> tuple[Any, Own]:
        """Return the size of the form, and what its parts keep."""
        given = size if isinstance(size, tuple) else (size,)
        count = len(given) - len(self.own)
        mine, own = given[:count], dict(zip(self.own, given[count:], strict=True))
        plain: Any = mine if count > 1 or isinstance(self._twin.size, tuple) else mine[0] if mine else self._twin.size
        return plain, {"kept": self._entries if plain == self._twin.size else self._count_at(plain), "bits": EXACT} | own

    def _count_at(self, plain: Size) -> int:
        return int(self._twin.count(plain)) * int(self._twin.blocks)

    @classmethod
    def full_size_of(cls, folded: Tensor) -> Size:
        """Return the largest size of a folded weight: that of the form, all entries, in float."""
        size: Size = cls.empty_of(folded, cls._plain.full_size_of(folded)).size
        return size

    @classmethod
    def empty_of(cls, folded: Tensor, plain: Size) -> Any:
        """Return a form without values."""
        bare = cls._plain.empty(torch.empty(0, dtype=folded.dtype, device="meta"), torch.empty(folded.shape, device="meta"), plain)
        return cls(*bare.parameters(recurse=False), dtype=bare.dtype)

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> Any:
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        plain, held = cls.empty_of(folded, cls._plain.full_size_of(folded))._split(size)
        bare = cls._plain.empty(weight, folded, plain)
        made = cls(*bare.parameters(recurse=False), dtype=bare.dtype, requires_grad=weight.requires_grad)
        made._take(held, {})
        if issubclass(cls._plain, Factors):
            made.learned("S").requires_grad_(False)
        return made

    @property
    def size(self) -> Size:
        """The present size."""
        return self._joined(self._twin.size, self._held)

    @property
    def plain_size(self) -> Size:
        """The size of the form itself."""
        return self._twin.size  # type: ignore[no-any-return]

    def plain_of(self, size: Size) -> Size:
        """Return the size of the form itself at a size."""
        return self._split(size)[0]  # type: ignore[no-any-return]

    @property
    def full_size(self) -> Size:
        """The form's full size, all entries, in float."""
        plain = self._twin.full_size
        return self._joined(plain, {"kept": self._count_at(plain), "bits": EXACT})

    def _rungs(self) -> list[int]:
        """Return the values along the last axis of the size, ascending, up to the present one."""
        held = self._held[self.own[-1]]
        return [bits for bits in BITS if bits <= held] if self.own[-1] == "bits" else counts_up_to(held, self._entries)

    def path(self) -> tuple[Any, ...]:
        """Return the present size at fewer bits, or with fewer entries."""
        return tuple([self._joined(self._twin.size, {**self._held, self.own[-1]: value}) for value in self._rungs()])

    @property
    def rank(self) -> int:
        """Number of rungs."""
        return len(self._rungs())

    def size_of(self, rung: int) -> Size:
        """Return the size of a rung."""
        return self.path()[rung - 1]  # type: ignore[no-any-return]

    @property
    def full_rank(self) -> int:
        """Number of rungs at full size."""
        return len(BITS) if self.own[-1] == "bits" else len(counts_up_to(self._entries, self._entries))

    def rung_of(self, size: Size) -> int:
        """Return the last rung with no more bits, or entries, than a size."""
        value = self._split(size)[1][self.own[-1]]
        return max(1, sum(rung <= value for rung in self._rungs()))

    def checked(self, name: str, size: Any) -> Size:
        """Return a size; a number alone stands for the last axis: the bits, or how many entries are kept.

        Raises:
            RankError: for one above the present size, or bits that are not in ``BITS``.
        """
        wide = isinstance(self.size, tuple)
        if wide and isinstance(size, int) and not isinstance(size, bool):
            size = self._joined(self._twin.size, {**self._held, self.own[-1]: size})
        numbers = tuple(size) if isinstance(size, tuple | list) else (size,)
        if len(numbers) == len(self.size if isinstance(self.size, tuple) else (self.size,)) and all(
            isinstance(number, int) and not isinstance(number, bool) for number in numbers
        ):
            plain, held = self._split(numbers if len(numbers) > 1 else numbers[0])
            self._twin.checked(name, plain)
            most = min(self._held["kept"], self._count_at(plain))
            fewer = "kept" not in self.own or held["kept"] <= self._held["kept"]
            if fewer and held["bits"] in BITS and held["bits"] <= self._held["bits"] and held["kept"] >= 1:
                return self._joined(plain, {**held, "kept": min(held["kept"], most)})
        raise RankError(name, got=size, out=self.shape[0], in_=self.shape[1], held=self.size)

    def count(self, size: Size) -> int:
        """Return how many numbers one block of the form holds, zeros included."""
        return int(self._twin.count(self._split(size)[0]))

    shape = property(lambda self: self._twin.shape)
    lead = property(lambda self: self._twin.lead)
    blocks = property(lambda self: self._twin.blocks)
    folded_shape = property(lambda self: self._twin.folded_shape)
    compose_macs = property(lambda self: self._twin.compose_macs)

    def product(self) -> Tensor:
        """Compose the folded weight from the parts that are shown."""
        if issubclass(self._plain, Factors | Dense):
            made: Tensor = self._plain.product(self)
            return made
        composed: Tensor = self._plain.composed(*self.shown())
        return composed.reshape(self.folded_shape).to(self.dtype)

    def written(self) -> tuple[Tensor, ...]:
        """Return `chain`, detached: no part is scaled, so that levels stay levels."""
        return tuple([part.detach() for part in self.chain()])

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return the two factors as they are."""
        right, left = self.written()
        return left, right


@cache
def class_over(kind: Any, plain: Any) -> Any:
    """Return the class of forms of a kind over the class of a form."""
    space = {"_plain": plain, "splits": plain.splits, "called": f"{plain.called}, pruned or rounded", "__module__": kind.__module__}
    return type(f"{kind.__name__}{plain.__name__}", (kind, plain), space)


def _revived(kind: Any, plain: Any) -> Any:
    """Return an empty form for `pickle` and `copy` to fill."""
    return object.__new__(class_over(kind, plain))


@torch.no_grad()
def settled(form: Form) -> Any:
    """Return a form whose matrices alone hold the weight: of an SVD with singular values of 1."""
    if isinstance(form, Factors) and form.is_matrix:
        form = form.copied()
        if form.device.type != "meta":
            balance_(form)
    return form
