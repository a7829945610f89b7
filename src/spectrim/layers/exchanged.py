"""What is exchanged in a layer: taking over a dense one in place, and giving it back."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from spectrim.forms.form import Form
from spectrim.layers.forwards import leads_to_forward_of, runs_forward_of
from spectrim.linalg.fold import Fold
from spectrim.plain.exchanged import class_of

if TYPE_CHECKING:
    from spectrim.forms.svd import Factors as Held  # the form that all kinds of layers know
else:
    Held = Form

Writing = Literal["pair", "interpolative"]
Self = TypeVar("Self", bound="ExchangedLayer")
Share = Callable[[Form, str, Tensor], nn.Parameter]


STATE = ("scheme", "parameter_order", "execution", "channels_last", "writing")
"""Attributes of factorized layers."""


class ExchangedLayer(nn.Module):
    """A dense torch layer whose weights are composed from `Factors`: the object it was, with its attributes, hooks and further parameters.

    Its class is exchanged in place for one made of a sub-class of this and of the layer's own.
    """

    dense_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()

    factors: nn.ModuleDict
    scheme: Fold
    writing: Writing
    parameter_order: tuple[str, ...]
    execution: dict[tuple[str, int, tuple[int, ...]], bool]

    @property
    def dense_kind(self) -> type[nn.Module]:
        """The layer's original class."""
        kind: Any = type(self)
        return kind._own  # type: ignore[no-any-return]

    @classmethod
    def base_of(cls, own: type) -> type:
        """Return the class whose forward this kind takes the place of in a layer of class `own`: one of `dense_kinds`, else `own`."""
        return next((kind for kind in cls.dense_kinds if issubclass(own, kind)), own)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether `module` is of this kind: the torch class, or a sub-class whose own forward, if any, leads to that of the torch class.

        Such a forward calls ``super().forward`` and reads no weight itself.
        """
        bases = [kind for kind in cls.dense_kinds if isinstance(module, kind)]
        return bool(bases) and (runs_forward_of(module, bases[0]) or leads_to_forward_of(type(module), bases[0]))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be factorized, or None."""
        return None

    @classmethod
    def taken_names(cls, module: nn.Module) -> set[str]:
        """Return the attributes of a dense layer whose names a factorized one needs for itself."""
        own, base = type(module), cls.base_of(type(module))
        needed = {name for name in dir(cls) if not name.startswith("__")} | set(STATE) | {"factors"}
        needed -= {name for kind in (nn.Module, base) for name in dir(kind)}
        above = own.__mro__[: own.__mro__.index(base)]
        return needed & {name for names in (vars(module), *map(vars, above)) for name in names}

    @classmethod
    def schemes(cls, module: nn.Module) -> tuple[Fold, ...]:
        """Return the schemes that differ for this layer, the default first."""
        return ("channel",)

    @classmethod
    def weights(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights that are factorized."""
        return ("weight",)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Return the matrix, ``(out, in)`` or ``(blocks, out, in)``, of one weight."""
        return weight

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Return the weight, in torch's layout, of one matrix: the inverse of `fold`."""
        return matrix

    @classmethod
    def adopt(cls: type[Self], dense: nn.Module, factors: Mapping[str, Form], scheme: Fold) -> Self:
        """Take over a dense layer in place: all of it but its factorized weights, which `factors` replace. Returns the layer."""
        layer: Any = dense
        cls.forget(layer)
        state: dict[str, Any] = {"parameter_order": tuple(layer._parameters), "scheme": scheme, "execution": {}, "writing": "pair"}
        for name in factors:
            del layer._parameters[name]
        layer.__dict__.update(state)
        layer._modules["factors"] = nn.ModuleDict(dict(factors)).train(layer.training)
        own = type(layer)
        layer.__class__ = class_of(cls, own, cls.base_of(own))
        return layer  # type: ignore[no-any-return]

    @classmethod
    def forget(cls, module: nn.Module) -> None:
        """Drop what a dense layer keeps beside its parameters that refers to them, such as lists of weights."""

    def factors_of(self, name: str) -> "Held":
        """Return the form of one weight."""
        held: Any = self._modules["factors"]
        return held._modules[name]  # type: ignore[no-any-return]

    def dense_weight(self, name: str) -> Tensor:
        """Compose one weight in torch's layout and the layer's dtype."""
        return self.unfold(self, name, self.factors_of(name).matrix(), self.scheme)

    def release(self, share: Share) -> nn.Module:
        """Make this the dense layer that was taken over, in place, with composed weights; return it.

        Args:
            share: makes the parameter for a tensor, the same one for tied weights.
        """
        weights = {name: self.laid_out(self.dense_weight(name).detach()) for name in self.factors}
        composed = {name: share(self.factors_of(name), "dense", weight) for name, weight in weights.items()}
        order, later = self.parameter_order, dict(self._parameters)
        dense = self._stripped()
        dense._parameters.clear()
        dense._parameters.update({name: composed.get(name, later.get(name)) for name in order} | later)
        return dense

    def _stripped(self) -> nn.Module:
        """Make this an instance of its original class in place, without anything that factorized layers add."""
        layer: Any = self
        own = self.dense_kind
        del layer._modules["factors"]
        for name in STATE:
            layer.__dict__.pop(name, None)
        layer.__class__ = own
        return layer  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take a dense weight, too: it is decomposed, where the present rank holds it."""
        for name in self.factors:
            weight = state_dict.get(f"{prefix}{name}")
            if weight is None:
                continue
            held = self.factors_of(name)
            matrix = self.fold(self, name, weight.detach(), self.scheme)
            if tuple(matrix.shape) != held.folded_shape:
                folds = f"{tuple(weight.shape)} folds to {tuple(matrix.shape)}, not {held.folded_shape}"
                rest[-1].append(f"size mismatch for {prefix}{name}: {folds}")
                continue
            parts = held.parts_of(matrix)
            if parts is None:
                problem = (
                    f"a dense weight of a higher rank than the {held.size} that this layer holds: load it into the network before prune"
                )
                rest[-1].append(f"{prefix}{name}: {problem}")
                continue
            del state_dict[f"{prefix}{name}"]
            state_dict |= {f"{prefix}factors.{name}.{part}": tensor for part, tensor in parts.items()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a weight in the memory format that the dense layer had."""
        return weight.contiguous()

    def named_factors(self) -> list[tuple[str, Form]]:
        """Return ``(weight name, factors)`` of this layer."""
        return [(name, self.factors_of(name)) for name in self.factors]
