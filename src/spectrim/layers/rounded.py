"""Dense layers that compute in an `Arithmetic` for a while, and lending one to every weight of a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.forms.arithmetic import Arithmetic, Computed
from spectrim.forms.form import Form
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.forwards import leads_to_forward_of, runs_forward_of
from spectrim.layers.geometry import convolve, whole
from spectrim.layers.site import named_factors
from spectrim.plain.exchanged import Exchanged, class_of


class RoundedLinear(Computed, nn.Linear):
    """A dense `torch.nn.Linear` that is lent an arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return self.run(0, partial(F.linear, bias=self.bias), input, self.weight)


class RoundedConv(Computed):
    """A dense convolution that is lent an arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in, size...)`` or ``(in, size...)``."""
        module: Any = self
        return self.run(0, partial(convolve, bias=module.bias, piece=whole(self), groups=module.groups), input, module.weight)


class RoundedConv1d(RoundedConv, nn.Conv1d):
    """A dense `torch.nn.Conv1d` that is lent an arithmetic."""


class RoundedConv2d(RoundedConv, nn.Conv2d):
    """A dense `torch.nn.Conv2d` that is lent an arithmetic."""


class RoundedConv3d(RoundedConv, nn.Conv3d):
    """A dense `torch.nn.Conv3d` that is lent an arithmetic."""


ROUNDED: dict[type[nn.Module], type[Computed]] = {
    nn.Linear: RoundedLinear,
    nn.Conv1d: RoundedConv1d,
    nn.Conv2d: RoundedConv2d,
    nn.Conv3d: RoundedConv3d,
}
"""Dense layers that can compute in an arithmetic, and what their class is exchanged for in the meantime."""


def lends(module: nn.Module) -> bool:
    """Whether a module is a dense layer that can compute in an arithmetic: it runs the forward of one of `ROUNDED`."""
    if isinstance(module, Computed):
        return not isinstance(module, Form)
    base = _base(module)
    return base is not None and (runs_forward_of(module, base) or leads_to_forward_of(type(module), base))


def computed(model: nn.Module) -> dict[str, nn.Module]:
    """Return what computes with weights, by name, each once: the forms of factorized layers, and dense layers.

    Examples:
        >>> list(computed(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LSTM(2, 2))))
        ['0']
    """
    dense = {name: module for name, module in model.named_modules() if lends(module)}
    return dense | dict(named_factors(model))


def operations_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the operations of a weight: of a dense layer its own, of a form one for each factor, such as ``fc1.Vh``."""
    return tuple(f"{name}.{part}".strip(".") for part in getattr(module, "operations", ("",)))


def lend(model: nn.Module, arithmetics: Mapping[str, Arithmetic]) -> None:
    """Let weights compute in an arithmetic, by the names of `computed`, until `take_back`; classes of dense layers are exchanged."""
    held = computed(model)
    for name, arithmetic in arithmetics.items():
        module: Any = held[name]
        module.__dict__["_arithmetic"] = arithmetic
        if not isinstance(module, Computed):
            base: Any = _base(module)
            module.__class__ = class_of(ROUNDED[base], type(module), base)


def take_back(model: nn.Module) -> dict[str, Arithmetic]:
    """Let everything compute in float again; return what was lent, by name."""
    lent = {}
    forms = {id(form): name for name, form in named_factors(model)}
    for name, module in model.named_modules():
        if "_arithmetic" in vars(module):
            lent[forms.get(id(module), name)] = module.__dict__.pop("_arithmetic")
            if isinstance(module, Exchanged):  # a form keeps its class
                module.__class__ = type(module)._own
    return lent


@contextmanager
def lending(model: nn.Module, arithmetics: Mapping[str, Arithmetic]) -> Iterator[None]:
    """`lend` inside, `take_back` behind."""
    lend(model, arithmetics)
    try:
        yield
    finally:
        take_back(model)


def _base(module: nn.Module) -> type[nn.Module] | None:
    if isinstance(module, FactorizedLayer):
        return None
    return next((kind for kind in ROUNDED if isinstance(module, kind)), None)
