"""What every factorized layer shares: taking over a dense layer, giving it back, and deciding how to run."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.forms.svd import Factors
from spectrim.layers.forwards import leads_to_forward_of, renew, runs_forward_of
from spectrim.layers.uses import Call, Features, call_on, first_argument
from spectrim.linalg.fold import Fold
from spectrim.plain.exchanged import class_of

TRAFFIC = 0.15
"""Two operations also write and read what is between them: they have to save this share of the multiply-accumulates to be faster.

From the step times of ResNet-20 in the spatial scheme at half the ranks: at equal multiply-accumulates they took 1.2 times as long.
"""

RECOMPUTE_SHARE = 0.02
"""A composed weight is forgotten after the forward pass when composing it again costs at most this share of the layer's step."""


LOST = 1e-5
"""Singular values of a dense weight that is loaded, relative to the largest, which a smaller rank may drop: rounding."""

RECOMPUTE_SIZE = 2**16
"""Weights with fewer elements are kept: they take less memory than the bookkeeping is worth."""

LEAST_GAIN = 0.05
"""Share of the pair's cost, ``r / (m + n)``, that the interpolative writing has to save: its two parts are concatenated."""

Writing = Literal["pair", "interpolative"]
Self = TypeVar("Self", bound="FactorizedLayer")
Share = Callable[[Factors, str, Tensor], nn.Parameter]


def share_nothing(factors: Factors, part: str, tensor: Tensor) -> nn.Parameter:
    """Make a parameter of its own for each tensor: a `Share`."""
    return nn.Parameter(tensor.detach())


class FactorizedLayer(nn.Module):
    """Base of the factorized layers: a dense torch layer whose weights are composed from `Factors`.

    A sub-class names one kind of layer and adds `weights`, `fold`, `work` and `split`. A layer that is adopted stays the object it is and
    an instance of its own class: its class is exchanged in place for one made of the sub-class and that. Attributes, hooks, buffers and
    further parameters stay; ``layer.weight`` gives the dense weight, composed on each use.
    """

    dense_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()

    looks_up: ClassVar[bool] = False
    """Whether the layer looks rows of its weight up, instead of multiplying with it."""

    factors: nn.ModuleDict
    scheme: Fold
    writing: Writing
    parameter_order: tuple[str, ...]
    execution: dict[tuple[str, int, tuple[int, ...]], bool]

    @property
    def dense_kind(self) -> type[nn.Module]:
        """The layer's own class."""
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
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of applying one weight to an input of `shape` (the batch included).

        Args:
            module: the layer, dense or factorized: its sizes are read.
            name: which weight.
            scheme: how it is folded.
            rank: two operations of this rank; None for the dense operation.
            shape: the whole input; None for the cost per output position of a large input, up to a factor common to all ranks.
        """
        raise NotImplementedError

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Return the key of `linalg.writings.WRITINGS` for the interpolative writing of the weight; None where there is none."""
        return None

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of the interpolative writing, as `work`."""
        raise NotImplementedError

    def interpolates(self, name: str, rank: int) -> bool:
        """Whether `merge` writes a rank in ``r (m + n - r)`` numbers: where that was asked for, and saves enough over the pair."""
        factors = self.factors_of(name)
        able = self.writing == "interpolative" and self.interpolated_kind(self, self.scheme) is not None
        return able and rank < factors.full_rank and rank >= LEAST_GAIN * sum(factors.shape)

    def written_work(self, name: str, rank: int | None, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of what `merge` writes at `rank`, or of the dense operation; as `work`."""
        if rank is not None and self.interpolates(name, rank):
            return self.interpolated_work(self, self.scheme, rank, shape)
        return self.work(self, name, self.scheme, rank, shape)

    @classmethod
    def adopt(cls: type[Self], dense: nn.Module, factors: Mapping[str, Factors], scheme: Fold) -> Self:
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

    def factors_of(self, name: str) -> Factors:
        """Return the factors of one weight."""
        return cast(Factors, self.factors[name])

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
        """Make this an instance of its own class in place, without anything that factorized layers add."""
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
            if matrix.shape[-2:] != held.shape:
                rest[-1].append(f"size mismatch for {prefix}{name}: {tuple(weight.shape)} folds to {tuple(matrix.shape)}, not {held.shape}")
                continue
            U, S, Vh = linalg.svd(matrix)
            if held.rank < S.shape[-1] and float(S[..., held.rank :].max()) > LOST * float(S.max()):
                problem = (
                    f"a dense weight of a higher rank than the {held.rank} that this layer holds: load it into the network before prune"
                )
                rest[-1].append(f"{prefix}{name}: {problem}")
                continue
            del state_dict[f"{prefix}{name}"]
            r, base = held.rank, f"{prefix}factors.{name}."
            state_dict |= {base + "U": U[..., :r].to(held.U), base + "S": S[..., :r].to(held.S), base + "Vh": Vh[..., :r, :].to(held.Vh)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a weight in the memory format that the dense layer had."""
        return weight.contiguous()

    def named_factors(self) -> list[tuple[str, Factors]]:
        """Return ``(weight name, factors)`` of this layer."""
        return [(name, self.factors_of(name)) for name in self.factors]

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Yield the uses of the layer's weights in one call."""
        x = first_argument(args, kwargs)
        yield from (call_on(self, name, x) for name, _ in self.named_factors())

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """Yield the features that the weights read as they are; none where that is not known."""
        yield from ()

    def features_written(self, output: Any) -> Iterator[Features]:
        """Yield the features of the output that are the product of a weight; none where that is not known."""
        yield from ()

    def params_written(self, name: str, rank: int | None, site: str) -> dict[str, int]:
        """Return the entries of one block that `merge` stores for a weight, by tensor: what tied weights store once has one key.

        Args:
            name: which weight.
            rank: None for the dense form.
            site: the weight's name in the model, for tensors that are not shared.
        """
        out, in_ = self.factors_of(name).shape
        if rank is None:
            return {"dense": out * in_}
        return {site: rank * (out + in_ - rank if self.interpolates(name, rank) else out + in_)}

    def why_untimed(self, name: str, eager: bool) -> str:
        """Return why multiply-accumulates decide about a weight, not seconds; empty where it is timed."""
        return ""

    def share_timed(self, name: str) -> float:
        """Return what part of the operation that is timed for a weight is that weight."""
        return 1.0

    def timed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input of the operation that is timed for a weight, from that of the layer's input."""
        return shape

    def timed_forms(self, name: str, rank: int) -> tuple[nn.Module, nn.Module]:
        """Return the operation of one weight dense and as the pair that `merge` writes, with values that do not matter."""
        bare, factors = renew(self, type(self)), self.factors_of(name)
        for key, value in vars(bare).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                bare.__dict__[key] = OrderedDict()
        bare._modules["factors"] = nn.ModuleDict({name: factors.random(rank)})
        two = bare.split(share_nothing, (name,))
        return bare.release(share_nothing).eval(), two.eval()

    def overhead(self, name: str) -> float:
        """Return what two operations cost beyond their multiply-accumulates, in the unit of `work` without a shape."""
        return 0.0

    def break_even(self, name: str) -> int:
        """Return the largest rank at which what `merge` writes costs less than the dense operation; 0 when none does."""
        if self.writing == "interpolative" and self.interpolated_kind(self, self.scheme) is not None:
            dense, full = self.work(self, name, self.scheme, None, None), self.factors_of(name).full_rank
            return next((rank for rank in range(full - 1, 0, -1) if self.written_work(name, rank, None) < dense), 0)
        dense, single = (self.work(self, name, self.scheme, rank, None) for rank in (None, 1))
        return max(0, min(self.factors_of(name).full_rank, math.ceil((dense - self.overhead(name)) / single) - 1))

    def pays(self, name: str) -> bool:
        """Whether two operations take fewer multiply-accumulates than the dense one at the present rank."""
        return self.factors_of(name).rank <= self.break_even(name)

    def composes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether composing the weight and running one dense operation costs no more than two operations on this input.

        By measured seconds where `choose_execution` has timed this weight at its present rank, else by multiply-accumulates, of which two
        operations must save the share `TRAFFIC`.
        """
        factors = self.factors_of(name)
        if self.execution:
            measured = self.execution.get((name, factors.rank, tuple(shape[1:])))
            if measured is not None:
                return measured
        dense, two = (self.work(self, name, self.scheme, rank, shape) for rank in (None, factors.rank))
        return dense + factors.compose_macs <= (1 + TRAFFIC) * two

    def run_dense(self, name: str, shape: Sequence[int], operation: Callable[[Tensor], Tensor]) -> Tensor:
        """Run ``operation(weight)`` on one composed weight; backward composes it anew where that is cheap, instead of keeping it.

        Args:
            name: which weight.
            shape: of the layer's input.
            operation: uses the weight; what it returns is returned.
        """
        factors = self.factors_of(name)
        weight = self.laid_out(self.unfold(self, name, factors.product(), self.scheme))
        cheap = factors.compose_macs <= RECOMPUTE_SHARE * 3 * self.work(self, name, self.scheme, None, shape)
        if not (cheap and weight.numel() >= RECOMPUTE_SIZE and weight.requires_grad) or torch.compiler.is_compiling():
            return operation(weight)  # a compiler decides by itself what it keeps
        storage, device, dtype = weight.untyped_storage().data_ptr(), weight.device.type, weight.dtype

        def forget(saved: Tensor) -> Any:
            own = saved.untyped_storage().data_ptr() == storage
            return (saved.shape, saved.stride(), saved.storage_offset()) if own else saved

        def recall(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != factors.dtype):
                return self.laid_out(self.unfold(self, name, factors.product(), self.scheme)).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(forget, recall):
            return operation(weight)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Return the layer as torch layers applied one after the other, or None where no weight pays.

        Args:
            share: makes the parameter for a tensor, the same one for tied weights.
            paying: names of the weights to write as two operations.
        """
        raise NotImplementedError

    def _get_name(self) -> str:
        return f"Factorized{self.dense_kind.__name__}"

    def extra_repr(self) -> str:
        """Return the dense layer's description."""
        return f"{super().extra_repr()}, scheme={self.scheme}".removeprefix(", ")


STATE = ("scheme", "parameter_order", "execution", "channels_last", "writing")
"""Attributes of factorized layers."""
