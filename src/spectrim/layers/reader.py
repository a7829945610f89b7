"""Factorized layers with a forward of their own that reads weights: sub-classes of torch's layers, and experts in stacked parameters."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.layers.base import FactorizedLayer
from spectrim.layers.conv import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.exchanged import Share
from spectrim.layers.forwards import codes_of
from spectrim.layers.uses import Call
from spectrim.layers.weights import SeveralWeights
from spectrim.linalg.fold import Fold, from_matrix, to_matrix
from spectrim.plain.composed import Composed
from spectrim.plain.product import Product, kernels
from spectrim.plain.reader import PlainReader, ThinPair, held, once

OWN_BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Layers of torch whose sub-classes may read ``weight`` in a forward of their own."""

SIMILAR: tuple[type[FactorizedLayer], ...] = (FactorizedConv1d, FactorizedConv2d, FactorizedConv3d, FactorizedEmbedding)

REACHING = {"_parameters", "get_parameter", "parameters", "named_parameters", "state_dict", "__dict__"}
"""Names in a forward that looks for its parameters: a composed weight is none."""

CHANGING = {"data", "copy_", "clamp_", "clip_", "zero_", "fill_", "renorm_", "normal_", "uniform_", "requires_grad_", "set_", "detach_"}
"""Names in a forward that may change its weight in place."""


class FactorizedReader(SeveralWeights):
    """A layer whose own forward runs on products of factors, see `spectrim.plain.product.Product`.

    Linear maps, matrix products, convolutions and lookups by its weight run as two thin operations where these cost less; whatever else
    the forward does with the weight composes it, once for each call. The matrices of a stack ``(experts, out, in)`` are blocks of one
    form, with one rank.
    """

    own_forward = True
    unobserved = "the layer's own forward reads this weight"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a layer has such weights, and a forward that a product can be put under."""
        return bool(readable(module)) and why_not(module) is None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Return what torch's layer is refused for."""
        kind = next((kind for kind in SIMILAR if isinstance(module, kind.dense_kinds)), None)
        return None if kind is None else kind.refusal(module)

    @classmethod
    def weights(cls, module: Any) -> tuple[str, ...]:
        """Return ``weight``, or the names of the stacked parameters."""
        return readable(module)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Fold a kernel; matrices and stacks of them are what they are."""
        return to_matrix(weight, "channel", module.groups) if _is_kernel(module) else weight

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Unfold a kernel."""
        if not _is_kernel(module):
            return matrix
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return from_matrix(matrix, shape, "channel", module.groups)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """``out * in``, or ``rank * (out + in)``, for each row of the input; what the forward does is found by counting."""
        held = getattr(module, "factors", None)
        out, in_ = held[name].shape if held is not None else cls.fold(module, name, getattr(module, name), scheme).shape[-2:]
        if shape is not None and _is_kernel(module):
            rows = shape[0] * module.groups * math.prod(-(-size // step) for size, step in zip(shape[2:], module.stride, strict=False))
        else:
            rows = 1 if shape is None else math.prod(shape[:-1])
        return float(rows * (out * in_ if rank is None else rank * (out + in_)))

    def why_untimed(self, name: str, eager: bool) -> str:
        """Its operations depend on its forward."""
        return "its own forward reads the weight"

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Yield the uses where the first argument is a tensor."""
        if any(isinstance(value, Tensor) and value.dim() for value in (*args, *kwargs.values())[:1]):
            yield from super().calls_for(args, kwargs)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the layer's own forward; a weight that has to be composed is composed once."""
        with held(self):
            return super().forward(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Return a weight by its name, as a product where two thin operations cost less."""
        factors = self.__dict__.get("_modules", {}).get("factors")
        if factors is None or name not in factors:
            return super().__getattr__(name)
        form = self.factors_of(name)
        if torch.compiler.is_compiling() or form.rounds:
            return self.dense_weight(name)
        shape = self.unfold(self, name, torch.empty(form.folded_shape, device="meta"), self.scheme).shape
        trained, groups = any(parameter.requires_grad for parameter in form.parameters()), _groups(self)
        settings = (self._get_name(), once(self, name, lambda: self.dense_weight(name)), shape, form.dtype, form.device, trained)
        if form.rank * sum(form.shape) >= math.prod(form.shape):
            return Composed(*settings)
        product: Any = Product(*settings)
        return product.with_thin(once(self, f"{name} thin", lambda: kernels(*form.pair(), shape, groups)), groups)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """A `PlainReader` with two thin parameters for each weight that pays, and the others dense."""
        if not paying:
            return None
        pairs, dense = {}, {}
        for name in self.factors:
            form = self.factors_of(name)
            if name in paying:
                left, right = form.balanced()
                shape = tuple(self.unfold(self, name, torch.empty(form.folded_shape, device="meta"), self.scheme).shape)
                pairs[name] = ThinPair(share(form, "left", left), share(form, "right", right), shape, _groups(self))
            else:
                dense[name] = share(form, "dense", self.laid_out(self.dense_weight(name).detach()))
        plain = PlainReader(pairs)
        for name in dict.fromkeys((*self.parameter_order, *self._parameters)):
            if name not in pairs:
                plain.register_parameter(name, dense.get(name, self._parameters.get(name)))
        return plain


def readable(module: nn.Module) -> tuple[str, ...]:
    """Return the weights that the own forward of a layer reads: ``weight`` of a sub-class of torch's, or stacked parameters.

    Stacks are parameters ``(experts, out, in)`` of two experts at least, of a class outside torch whose children hold no parameters.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.", "spectrim.")):
        return ()
    if isinstance(module, OWN_BASES):
        return ("weight",) if "weight" in parameters and _in_class_of(module) else ()
    if any(True for child in module.children() for _ in child.parameters()):
        return ()
    return tuple(name for name, p in parameters.items() if p.dim() == 3 and p.shape[0] > 1 and min(p.shape[1:]) > 1)


def why_not(module: nn.Module) -> str | None:
    """Return why the own forward of a layer cannot run on products, or None."""
    own: Any = type(module)
    names = codes_of(own)
    if found := sorted(names & REACHING):
        return f"its forward looks for its parameters ({', '.join(found)})"
    if found := sorted(names & CHANGING):
        return f"its forward may change its weight in place ({', '.join(found)})"
    return None


def _in_class_of(module: nn.Module) -> bool:
    """Whether ``weight`` is the parameter of torch's layer, and not a property of the own class."""
    return not any("weight" in vars(kind) for kind in type(module).__mro__)


def _is_kernel(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _groups(module: Any) -> int:
    return module.groups if _is_kernel(module) else 0
