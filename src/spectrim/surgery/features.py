"""Where features are while a network runs, from the layer that makes them to those that read them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectrim.layers import kind_of
from spectrim.layers.forwards import leads_to_forward_of, runs_forward_of
from spectrim.layers.uses import first_argument
from spectrim.surgery.batchnorm import NORMS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MATRICES = (nn.Linear, *CONVOLUTIONS)

ALIKE = {"clone", "detach", "alias", "_to_copy", "lift_fresh"}
"""Operations of torch's core whose result has the features of what they are given."""

MOVES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "mean", "amax"}
"""Operations that put features elsewhere, which a tensor of their numbers shows."""

POOLS = {"max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "constant_pad_nd"}
POOLS |= {"_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "upsample_nearest2d"}
POOLS |= {"upsample_bilinear2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"}
"""Operations on the positions of each channel by itself."""


@dataclass(eq=False)
class Units:
    """Features of which it is not known yet who reads them."""

    count: int
    makers: list[str]
    through: list[str] = field(default_factory=list)
    readers: list[tuple[str, int]] = field(default_factory=list)
    closed: bool = False
    into: "Units | None" = None

    def root(self) -> "Units":
        """Return the units that these are joined into."""
        return self if self.into is None else self.into.root()

    def joined(self, other: "Units") -> "Units":
        """Return the units of both, which are multiplied or added one by one."""
        one, two = self.root(), other.root()
        if one is not two:
            one.makers += two.makers
            one.through += two.through
            one.readers += two.readers
            one.closed |= two.closed or one.count != two.count
            two.into = one
        return one


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the units are in a tensor: along which axis, counted from the end, and how many consecutive entries each has."""

    units: Units
    axis: int
    taps: int


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows features from layer to layer through one run of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        holders = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values() if tensor is not None)
        self.names = {module: name for name, module in model.named_modules() if _is_plain(module, holders)}
        self.weights = {id(weight): self.names[module] for module in self.names for weight in module._parameters.values()}
        self.places: dict[int, tuple[Tensor, _Place]] = {}
        self.made: list[Units] = []
        self.calls: Counter[str] = Counter()
        self.barred: set[str] = set()
        self.inside: list[tuple[nn.Module, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.barred |= {self.weights[id(leaf)] for leaf in given if id(leaf) in self.weights}
            if any(id(leaf) in self.places for leaf in given):
                self._follow(func, args, kwargs or {}, given, [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        return output

    def place(self, tensor: Any) -> _Place | None:
        """Return where units are in a tensor; None in any other, and for what is no tensor."""
        found = self.places.get(id(tensor))
        return None if found is None else found[1]

    def put(self, tensors: Iterable[Tensor], place: _Place) -> None:
        """Note where units are in tensors."""
        for tensor in tensors:
            self.places[id(tensor)] = tensor, place  # the tensor is held, so that its identity stays its own

    def close(self, tensors: Iterable[Any]) -> None:
        """Leave the units in these alone: something reads them as more than features by themselves."""
        for tensor in tensors:
            if (place := self.place(tensor)) is not None:
                place.units.root().closed = True

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a layer reads."""
        self.inside.append((layer, first_argument(args, kwargs)))

    def leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what a layer makes."""
        x = self.inside.pop()[1]
        name, place = self.names[layer], self.place(x)
        self.calls[name] += 1
        spatial = len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 0
        channels = 1 - x.dim() if isinstance(layer, NORMS) else -1 - spatial
        whole = isinstance(output, Tensor) and (not spatial or x.dim() == spatial + 2)
        if place is not None:
            units = place.units.root()
            fits = whole and place.axis == channels
            if fits and (isinstance(layer, NORMS) or _is_depthwise(layer)) and place.taps == 1:
                units.through.append(name)
                self.put([output], place)
                return
            if not fits or isinstance(layer, NORMS) or (spatial and (place.taps > 1 or layer.groups > 1)):  # type: ignore[operator]
                units.closed = True
            else:
                units.readers.append((name, place.taps))
        if whole and not isinstance(layer, NORMS) and getattr(layer, "groups", 1) == 1:
            self.made.append(Units(output.shape[channels], [name]))
            self.put([output], _Place(self.made[-1], channels, 1))

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        held = [leaf for leaf in given if self.place(leaf) is not None]
        if not made:
            self.close(held)
        elif torch.Tag.pointwise in func.tags or name in ALIKE:
            self._elementwise(given, held, made)
        elif name in POOLS and len(held) == 1 and made[0].dim() == held[0].dim():
            place = self.places[id(held[0])][1]
            same = made[0].shape[place.axis] == held[0].shape[place.axis] and place.axis <= -2
            self.put(made, place) if same else self.close(held)
        elif name in MOVES and len(held) == 1 and (moved := _moved(func, args, kwargs, held[0], self.places[id(held[0])][1])) is not None:
            self.put(made, moved)
        else:
            self.close(held)

    def _elementwise(self, given: list[Tensor], held: list[Tensor], made: list[Tensor]) -> None:
        places = [self.places[id(leaf)][1] for leaf in held]
        first = places[0]
        alike = all((place.axis, place.taps) == (first.axis, first.taps) for place in places)
        others = [leaf for leaf in given if self.place(leaf) is None]
        plain = all(leaf.dim() < -first.axis or leaf.shape[first.axis] == 1 for leaf in others)
        if not (alike and plain and all(leaf.shape[first.axis] == first.units.root().count * first.taps for leaf in (*held, *made))):
            self.close(held)
            return
        units = first.units
        for place in places[1:]:
            units = units.joined(place.units)
        self.put(made, _Place(units, first.axis, first.taps))

    def groups(self) -> list[Units]:
        """Return the units that were made, each once, in the order of their readers."""
        found = [units for units in self.made if units.into is None and len(units.readers) == 1]
        order = list(self.calls)
        return sorted(found, key=lambda units: order.index(units.readers[0][0]))


def _is_plain(module: nn.Module, holders: Counter[int]) -> bool:
    """Whether a layer computes what torch's own does, with tensors of its own; a class of a user may do something before or after."""
    kind = next((kind for kind in (*MATRICES, *NORMS) if isinstance(module, kind)), None)
    known = kind is not None and (runs_forward_of(module, kind) or leads_to_forward_of(type(module), kind))
    if not (known or is_turned(module)) or is_parametrized(module):
        return False
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    return all(holders[id(tensor)] == 1 for tensor in tensors) and not isinstance(module, nn.modules.lazy.LazyModuleMixin)


def is_turned(layer: Any) -> bool:
    """Whether a layer is a linear one that holds its weight as ``(in, out)``: the ``Conv1D`` of transformers, in GPT-2."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and kind_of(layer) is not None


def matrix_of(layer: Any) -> Tensor:
    """Return a layer's weight as ``(out, in, ...)``, a view."""
    weight: Tensor = layer.weight.detach()
    return weight.mT if is_turned(layer) else weight


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _moved(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], x: Tensor, place: _Place) -> _Place | None:
    """Return where the units are after an operation that moves entries: it is given a tensor of their numbers instead."""
    count = place.units.root().count
    numbers = torch.arange(count, device=x.device).repeat_interleave(place.taps).to(torch.float64)
    shape = [1] * x.dim()
    shape[place.axis] = len(numbers)
    try:
        probe = torch.empty_strided(x.shape, x.stride(), dtype=torch.float64, device=x.device).copy_(numbers.view(shape))
        found = func(*[probe if arg is x else arg for arg in args], **kwargs)
    except RuntimeError:  # entries that lie over each other
        return None
    for axis in range(-found.dim(), 0):
        size = found.shape[axis]
        if size % count == 0 and found.numel():
            shape = [1] * found.dim()
            shape[axis] = size
            expected = torch.arange(count, device=x.device).repeat_interleave(size // count).to(torch.float64)
            if bool((found == expected.view(shape)).all()):
                return _Place(place.units, axis, size // count)
    return None
